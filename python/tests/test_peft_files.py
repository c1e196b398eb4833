"""PEFT's adapter files: written for PEFT, read from it, refused where they say something that LoRAadd cannot."""

import json

import pace_torch
import pytest
import torch
from conftest import close, perturb, vit
from pace_torch import PaceError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def ours(model=None, rank=3, **settings):
    settings = {"target_modules": ["qkv", "fc2"], "scale": 1.5, **settings}
    return pace_torch.inject(model or vit(), "LoRAadd", rank, sigma=0.5, lambda_=0.1, **settings)


def theirs(model=None, **settings):
    settings = {"r": 3, "target_modules": ["qkv", "fc2"], "modules_to_save": ["head"], **settings}
    return perturb(peft.get_peft_model(model or vit(), peft.LoraConfig(**settings)).double()).eval()


def test_written_for_peft(tmp_path):
    model = perturb(ours()).eval()
    pace_torch.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    close(loaded(IMAGES), model(IMAGES), 1e-12)
    assert not torch.allclose(loaded(IMAGES), vit().eval()(IMAGES))
    merged = loaded.merge_and_unload()
    close(merged(IMAGES), model(IMAGES), 1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    # And back.
    fresh = ours(scale=2.0)
    pace_torch.load_peft(fresh, tmp_path)
    close(fresh.eval()(IMAGES), model(IMAGES), 1e-12)


def test_damaged_files_are_refused_whole(tmp_path):
    pace_torch.save_peft(perturb(ours(), seed=7), tmp_path)
    model = ours()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (tmp_path / name).read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"\0" + content[1:]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(PaceError, match="no adapter that PEFT can read"):
                pace_torch.load_peft(model, tmp_path)
        (tmp_path / name).write_bytes(content)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Mixes(nn.Module):
    """Two layers called `mix`, one within `body`, and one without a bias."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential()
        self.body.add_module("mix", nn.Linear(6, 6))
        self.body.add_module("narrow", nn.Linear(6, 4, bias=False))
        self.mix, self.classifier = nn.Linear(4, 4, bias=bias), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.classifier(torch.tanh(self.mix(torch.tanh(self.body(x)))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classifier", [True, False])
def test_layers_are_told_apart(bias, classifier, tmp_path):
    settings = dict(target_modules=r"mix|body\.narrow", exclude_modules=None if classifier else ["classifier"])
    x = torch.randn(3, 6, dtype=torch.float64)
    adapted = perturb(ours(Mixes(bias), **settings)).eval()
    pace_torch.save_peft(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == r"body\.narrow|mix" and config["lora_bias"] == bias
    loaded = peft.PeftModel.from_pretrained(Mixes(bias), tmp_path).eval()
    close(loaded(x), adapted(x), 1e-12)
    fresh = ours(Mixes(bias), **settings)
    pace_torch.load_peft(fresh, tmp_path)
    close(fresh.eval()(x), adapted(x), 1e-12)


KINDS = {
    "plain": dict(lora_alpha=8),
    "rslora": dict(lora_alpha=8, use_rslora=True),
    "patterns": dict(rank_pattern={"blocks.1.attn.qkv": 2, "fc2": 1}, alpha_pattern={r"blocks\.[02].*": 5}),
    "bias": dict(lora_bias=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_from_peft(kind, tmp_path):
    model = theirs(**KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = perturb(ours(), seed=5)
    pace_torch.load_peft(loaded, tmp_path)
    close(loaded.eval()(IMAGES), model(IMAGES), 1e-12)
    # It goes on from there, also where the file has a smaller rank.
    loaded.train().pace.training_step(loaded, IMAGES, torch.arange(2)).total.backward()
    assert all((layer.adapter.delta_W_down.grad != 0).any(0).all() for layer in loaded.modules()
               if isinstance(layer, pace_torch.NoisyLinear) and isinstance(layer.adapter, pace_torch.LoraAdd))


def test_conv1d(tmp_path):
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=30, pad_token_id=0, num_labels=3)).double()

    batch = {"input_ids": torch.randint(1, 30, (2, 5))}
    model = perturb(ours(make(), target_modules=["c_attn"])).eval()
    pace_torch.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    close(loaded(**batch).logits, model(**batch).logits, 1e-12)


class Kinds(nn.Module):
    """A layer `a` and a classifier `fc` of other kinds than nn.Linear, and names that are hard to tell apart."""

    def __init__(self, kind):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.a = nn.Conv1d(8, 8, 1) if kind == "convolution" else nn.Linear(8, 8)
        self.b = self.a if kind == "shared" else nn.Linear(8, 8)
        self.fc = (transformers.pytorch_utils.Conv1D(8, 8) if kind == "Conv1D head" else nn.Conv1d(8, 8, 1) if kind == "convolution head"
                   else nn.Linear(8, 8))
        self.mlp = nn.ModuleDict({"fc" if kind == "same end" else "c+d": nn.Linear(8, 8), "ccd": nn.Linear(8, 8)})
        self.double()

    def forward(self, x):
        for layer in (self.a, self.b, *self.mlp.values(), self.fc):
            x = torch.tanh(layer(x.unsqueeze(-1)).squeeze(-1) if isinstance(getattr(layer, "adapter", layer), nn.Conv1d) or
                           getattr(getattr(layer, "adapter", None), "is_convolution", False) else layer(x))
        return x


@pytest.mark.parametrize("kind", ["plain", "convolution", "convolution head", "Conv1D head", "shared", "same end"])
def test_layers_of_other_kinds(kind, tmp_path):
    settings = dict(target_modules=["a", "c+d"] if kind != "same end" else ["a"], head="fc")
    x = torch.randn(4, 8, dtype=torch.float64)
    model = perturb(ours(Kinds(kind), **settings)).eval()
    if kind in ("shared", "same end"):
        with pytest.raises(PaceError, match="other names too" if kind == "shared" else "`mlp.fc` for the classifier `fc`"):
            pace_torch.save_peft(model, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    pace_torch.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Kinds(kind), tmp_path).eval()
    fresh = ours(Kinds(kind), **settings)
    pace_torch.load_peft(fresh, tmp_path)
    close(fresh.eval()(x), model(x), 1e-12)
    if "convolution" not in kind:
        close(loaded(x), model(x), 1e-12)
        return
    # PEFT's layers are no nn.Conv1d, which this model asks for.
    merged = loaded.merge_and_unload()
    close(merged(x), model(x), 1e-12)


class Adapters(nn.Module):
    """Layers that are called as the inside of one with an adapter is."""

    def __init__(self, first="adapter"):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.adapter = nn.ModuleDict({first: nn.Linear(6, 6), "base_module": nn.Linear(6, 4)}), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        for layer in self.body.values():
            x = torch.tanh(layer(x))
        return self.adapter(x)


@pytest.mark.filterwarnings("ignore:no classifier")
@pytest.mark.parametrize("variant", ["pace", "baseline"])
def test_layers_called_adapter(variant, tmp_path):
    x = torch.randn(3, 6, dtype=torch.float64)
    for target, head in ((["body.adapter"], "body.base_module"), (["body.adapter", "body.base_module"], None)):
        settings = dict(target_modules=target, head=head and [head], variant=variant)
        model, fresh = perturb(ours(Adapters(), **settings)).eval(), ours(Adapters(), **settings)
        pace_torch.save_peft(model, tmp_path)
        close(peft.PeftModel.from_pretrained(Adapters(), tmp_path).eval()(x), model(x), 1e-12)
        pace_torch.load_peft(fresh, tmp_path)
        close(fresh.eval()(x), model(x), 1e-12)
    # PEFT would take both for the classifier; it sees nothing of what is within a layer.
    settings = dict(target_modules=["body.base_module"], head="adapter", variant=variant)
    with pytest.raises(PaceError, match="`body.adapter` for the classifier `adapter`"):
        pace_torch.save_peft(ours(Adapters(), **settings), tmp_path)
    model = perturb(ours(Adapters("other"), **settings)).eval()
    pace_torch.save_peft(model, tmp_path)
    close(peft.PeftModel.from_pretrained(Adapters("other"), tmp_path).eval()(x), model(x), 1e-12)


def test_tensors_that_cannot_be_loaded(tmp_path):
    theirs().save_pretrained(tmp_path)
    weights, model = load_file(tmp_path / "adapter_model.safetensors"), ours()
    (tmp_path / "adapter_model.safetensors").unlink()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = list(weights)[-1]
    for of_name in (Tensor.to_sparse, lambda tensor: tensor.to("meta"), lambda tensor: tensor + 1j,
                    lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)):
        torch.save({**weights, name: of_name(weights[name])}, tmp_path / "adapter_model.bin")
        with pytest.raises(PaceError, match=name.removeprefix("base_model.model.")):
            pace_torch.load_peft(model, tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refusals(tmp_path):
    for adapter, message in (("LoRAmul_VPTadd", "LoraMulVptAdd.*LoRAadd"), ("VPTadd", "VptAdd")):
        with pytest.raises(PaceError, match=message):
            pace_torch.save_peft(pace_torch.inject(vit(), adapter), tmp_path)
    unfrozen = ours()
    unfrozen.pos_embed.requires_grad_(True)
    with pytest.raises(PaceError, match="pos_embed"):
        pace_torch.save_peft(unfrozen, tmp_path)
    with pytest.raises(PaceError, match="inject"):
        pace_torch.save_peft(vit(), tmp_path)
    assert not list(tmp_path.iterdir())

    with torch.device("meta"):
        empty = ours(vit())
    with pytest.raises(PaceError, match="meta device"):
        pace_torch.save_peft(empty, tmp_path)
    assert not list(tmp_path.iterdir())

    theirs().save_pretrained(tmp_path)
    with pytest.raises(PaceError, match="meta device"):
        pace_torch.load_peft(empty, tmp_path)
    with pytest.raises(PaceError, match="str, expected a torch.nn.Module"):
        pace_torch.load_peft("model", tmp_path)
    weights, config = load_file(tmp_path / "adapter_model.safetensors"), json.loads((tmp_path / "adapter_config.json").read_text())
    name = "base_model.model.blocks.1.attn.qkv.lora_A.weight"
    without = {key: value for key, value in weights.items() if key != name}
    for tensors, changes, settings, message in (
        (without, {}, {}, "has no `base_model.model.blocks.1.attn.qkv.lora_A.weight`"),
        ({**weights, "base_model.model.blocks.7.lora_A.weight": torch.ones(3, 3)}, {}, {}, "blocks.7.lora_A"),
        ({**weights, name: torch.ones(3, 7)}, {}, {}, r"lora_A.weight` of \(3, 7\), expected \(3, 24\)"),
        (weights, {}, dict(rank=2), "rank 3 around .* the model of 2"),
        (weights, {}, dict(target_modules=["qkv"]), "has no adapter there"),
        (weights, {}, dict(target_modules=["qkv", "fc1", "fc2"]), "has an adapter around `blocks.0.mlp.fc1`"),
        (weights, {"use_dora": True}, {}, "use_dora"),
        (weights, {"lora_alpha": None}, {}, "lora_alpha"),
        (weights, {"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4"),
        (weights, {"bias": "all"}, {}, "`bias` is 'all'"),
        (weights, {"peft_type": "IA3"}, {}, "IA3"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        model = ours(**settings)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(PaceError, match=message):
            pace_torch.load_peft(model, tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
