"""PACE on the LoRA of PEFT: against the formula, layer by layer; what PEFT does stays as it was."""

import copy

import pace_torch
import pytest
import torch
from conftest import check_layers, close, perturb, vit
from models import Around
from pace_torch import AttachedNoise, PaceError
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SETTINGS = dict(sigma=0.5, lambda_=0.1)
LLAMA = transformers.LlamaConfig(
    vocab_size=30, pad_token_id=0, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_labels=3,
)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(LLAMA).double()


def texts(rows=4):
    # Of different lengths, padded on the right.
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.arange(rows).unsqueeze(1) % 3 + 4).long()
    return {"input_ids": torch.randint(3, 30, (rows, 6), generator=generator) * mask, "attention_mask": mask}


LABELS = torch.tensor([0, 1, 2, 0])


def with_lora(model=None, **settings):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "SEQ_CLS", **settings}
    model = peft.get_peft_model((model or llama()).float(), peft.LoraConfig(**settings))
    return perturb(model.double())


def noises(model):
    return [module for module in model.modules() if isinstance(module, AttachedNoise)]


KINDS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True, lora_alpha=3),
    "dora": dict(use_dora=True),
    "all layers": dict(target_modules="all-linear", lora_alpha=5),
    "pissa": dict(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora(kind, tmp_path):
    plain = with_lora(**KINDS[kind])
    before = plain.eval()(**texts()).logits
    model = pace_torch.attach(copy.deepcopy(plain), **SETTINGS)
    assert torch.equal(model.eval()(**texts()).logits, before)
    losses = None

    def run():
        nonlocal losses
        losses = model.pace.training_step(model, texts(), LABELS)

    check_layers(model, run)
    losses.total.backward()
    assert losses.consistency > 0
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for noise in noises(model):
        noise.sigma = 0.0
    assert model.pace.training_step(model, texts(), LABELS).consistency == 0

    # What PEFT saves, loads and merges is what it would be without.
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    if kind != "pissa":  # its base weights are others than those of the model
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        close(loaded(**texts()).logits, before, 1e-12)
    merged = model.merge_and_unload().eval()
    assert not any(isinstance(module, AttachedNoise) for module in merged.modules())
    close(merged(**texts()).logits, before, 1e-9)
    merged.train()(**texts())


def test_fused_and_not(monkeypatch):
    calls, lora_linear = [], pace_torch.ops.lora_linear
    monkeypatch.setattr(pace_torch.ops, "lora_linear", lambda *args, **kwargs: calls.append(1) or lora_linear(*args, **kwargs))

    def losses_of(change):
        calls.clear()
        model = pace_torch.attach(with_lora(lora_alpha=3), **SETTINGS).train()
        change(model)
        return model.pace.training_step(model, texts(), LABELS).total, len(calls)

    fused, count = losses_of(lambda model: None)
    assert count == 6
    # A hook on a part of a layer is run, so that PEFT has to compute it.
    other, count = losses_of(
        lambda model: [noise.watched.base_layer.register_forward_hook(lambda *_: None) for noise in noises(model)[:6]]
    )
    assert count == 0
    close(other, fused, 1e-12)


def test_bias_of_lora_and_convolutions():
    model = with_lora(vit(), target_modules=["qkv", "proj", "fc2"], modules_to_save=["head"], task_type=None, lora_bias=True)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    model = pace_torch.attach(model, **SETTINGS)
    # The patch embedding is a convolution, in the first block; others get its noise for once.
    convolution = next(noise for noise in noises(model) if "patch_embed" in noise.path)
    convolution.sigma = 0.3
    check_layers(model, lambda: model(images))
    check_layers(model, lambda: model.pace.training_step(model, images, torch.arange(3)))


class Scaled(nn.Linear):
    """Stands for a quantised layer: a forward pass of its own."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def test_layers_with_a_forward_of_their_own():
    model = llama()
    for layer in model.model.layers:
        scaled = Scaled(16, 16, bias=False, dtype=torch.float64)
        scaled.weight = layer.self_attn.v_proj.weight
        layer.self_attn.v_proj = scaled
    model = pace_torch.attach(with_lora(model), **SETTINGS)
    check_layers(model, lambda: model.pace.training_step(model, texts(), LABELS))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = llama().float()
    for layer in model.model.layers:
        old = layer.self_attn.v_proj
        if kind == "4bit":
            new = bnb.nn.Linear4bit(16, 16, bias=False, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(old.weight.detach().clone(), requires_grad=False)
        else:
            new = bnb.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.detach().clone(), requires_grad=False)
        layer.self_attn.v_proj = new.to("cpu")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "4bit", kind == "8bit"
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="SEQ_CLS"))
    model = pace_torch.attach(perturb(model), **SETTINGS).train()
    assert all("bnb" in type(noise.watched).__module__ for noise in noises(model)[:2])
    noise, seen = noises(model)[1], []
    layer = noise.watched
    layer.base_layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    layer.register_forward_hook(lambda _, args, y: seen.append(y))
    losses = model.pace.training_step(model, texts(), LABELS)
    losses.total.backward()
    (x, base), y = seen[-2:]
    z = pace_torch.noise(model.pace.noise(noise.layer, noise.sigma, 8), 4, 16).view(8, 1, 16)
    layer.eval()
    close(y, base + z * layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"], 1e-5)
    assert losses.consistency > 0


@pytest.mark.filterwarnings("ignore:1 layers work on rows")
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_types(autocast):
    """PEFT keeps LoRA in float32 around a model in bfloat16."""
    model = with_lora().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model = pace_torch.attach(model, **SETTINGS).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.pace.training_step(model, texts(), LABELS)
    losses.total.backward()
    exact = pace_torch.attach(with_lora(), **SETTINGS).train()
    want = exact.pace.training_step(exact, texts(), LABELS)
    close(losses.total, want.total, 0.05)
    close(losses.consistency, want.consistency, 0.2)


def test_variants_and_settings():
    model = pace_torch.attach(with_lora(), **SETTINGS, variant="noise").train()
    assert model(**texts()).logits.shape == (4, 3) and model.pace.training_step(model, texts(), LABELS).consistency == 0
    assert not torch.equal(model(**texts()).logits, model(**texts()).logits)
    model = pace_torch.attach(with_lora(), **SETTINGS, variant="baseline").train()
    assert not noises(model) and torch.equal(model(**texts()).logits, model(**texts()).logits)
    model = pace_torch.attach(with_lora(), **SETTINGS, variant="fast", samples=9).train()
    for _ in range(2):
        losses = model.pace.training_step(model, texts(), LABELS, torch.arange(4))
    assert losses.consistency > 0
    model = pace_torch.attach(with_lora(), **SETTINGS, criterion=nn.MSELoss()).train()
    losses = model.pace.training_step(model, texts(), torch.ones(4, 3))
    close(losses.total, (losses.logits - 1).square().mean() + SETTINGS["lambda_"] * losses.consistency, 1e-12)
    model = pace_torch.attach(with_lora(), **SETTINGS, noise_head=False)
    assert [noise.path for noise in noises(model) if "score" in noise.path] == []
    assert "layers.1.self_attn.v_proj" in pace_torch.describe(model) and "0.5" in pace_torch.describe(model)
    # Two adapters of PEFT's at once get one noise together.
    model = with_lora(task_type=None)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    perturb(model).double().base_model.set_adapter(["default", "other"])
    model = pace_torch.attach(model, **SETTINGS, noise_head=False)
    check_layers(model, lambda: model(**texts()))
    # One that comes later, by itself and computed by PEFT.
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"], lora_alpha=9, lora_bias=True))
    model.set_adapter("third")
    perturb(model).double()
    model(**texts())
    for noise in noises(model):
        if "third" not in noise.watched.lora_A:
            noise.sigma = 0.0
        noise.watched.base_layer.register_forward_hook(lambda *_: None)
    check_layers(model, lambda: model(**texts()))
    model.add_adapter("fourth", peft.LoraConfig(target_modules=["k_proj"]))
    with pytest.raises(PaceError, match="k_proj.*since `attach`"):
        model(**texts())
    model.delete_adapter("fourth")
    # PEFT's own switch: nothing of LoRA, nothing of noise.
    model = pace_torch.attach(with_lora(), **SETTINGS)
    with model.train().disable_adapter():
        logits = model(**texts()).logits
    close(logits[:4], logits[4:], 1e-15)


def test_without_a_model_of_pefts():
    """PEFT puts LoRA into any model; so does transformers, by the same."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), llama())
    perturb(model).double()
    before = model.eval()(**texts()).logits
    model = pace_torch.attach(model, **SETTINGS)
    assert torch.equal(model.eval()(**texts()).logits, before)
    check_layers(model, lambda: model.pace.training_step(model, texts(), LABELS))
    model = perturb(peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"]), vit()).double())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    check_layers(model := pace_torch.attach(model, **SETTINGS), lambda: model.pace.training_step(model, images, torch.arange(3)))


def test_a_drop_path_is_not_shared():
    with pytest.warns(UserWarning, match="4 layers drop residual branches.*probability"):
        pace_torch.attach(with_lora(vit(drop_path_rate=0.2), target_modules=["qkv"], task_type=None), **SETTINGS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = (nn.Linear(8, 8) for _ in range(3))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


X, NET = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dict(sigma=0.5, first_noisy=0)


def small(target="a", around=lambda net: net, **settings):
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, **settings)
    return around(peft.get_peft_model(Net().float(), config).double())


def test_adapters_that_come_later():
    def again(model):
        model.delete_adapter("default")
        model.add_adapter("default", peft.LoraConfig(r=2, target_modules=["b"]))
        model.set_adapter("default")

    def head(model):
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"]))
        model.set_adapter("other")

    for around, change, name in (
        (lambda net: net, again, "b"),
        (Around, lambda model: model.net.add_adapter("other", peft.LoraConfig(r=2, target_modules=["b"])), "b"),
        (lambda net: net, head, "head"),
    ):
        model = pace_torch.attach(small(around=around), **NET)
        change(model)
        model.eval()(X)  # PEFT's own business
        with pytest.raises(PaceError, match=f"{name}` has had an adapter of PEFT's since `attach`"):
            model.train()(X)


def test_lora_that_is_computed_by_merging(monkeypatch):
    """Of parameters and within attention: PEFT does not call what adds to them."""
    for settings in (dict(target_parameters=["q_proj.weight"]), dict(target_modules=["k_proj"], target_parameters=["q_proj.weight"])):
        model = peft.get_peft_model(llama().float(), peft.LoraConfig(**{"r": 2, "target_modules": [], **settings})).double()
        if settings.get("target_modules"):
            with pytest.warns(UserWarning, match="2 layers have LoRA that gets no noise.*q_proj"):
                pace_torch.attach(model, **SETTINGS)
        else:
            with pytest.raises(PaceError, match="no LoRA of PEFT's"):
                pace_torch.attach(model, **SETTINGS)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = peft.get_peft_model(nn.Sequential(encoder, nn.Flatten()), peft.LoraConfig(r=2, target_modules=["self_attn", "linear1"]))
    with pytest.warns(UserWarning, match="2 layers have LoRA that gets no noise.*self_attn"):
        model = pace_torch.attach(model, **SETTINGS)
    assert [noise.path.split(".")[-1] for noise in noises(model)] == ["linear1"]


def test_blocks_are_those_of_the_model():
    model = vit(depth=5)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], layers_to_transform=[3], layers_pattern="blocks", modules_to_save=["head", "fc1"])
    model = pace_torch.attach(peft.get_peft_model(model, config), sigma=0.6)
    sigmas = {noise.path.removeprefix("base_model.model."): noise.sigma for noise in noises(model)}
    assert sigmas.keys() == {"blocks.3.attn.qkv", "head"}
    assert sigmas["blocks.3.attn.qkv"] == pytest.approx(0.6 * 3 / 5) and sigmas["head"] == pytest.approx(0.6 / 5)
    other = pace_torch.inject(vit(depth=5), "LoRAadd", 2, sigma=0.6, target_modules=r"blocks\.3\.attn\.qkv")
    assert other.blocks[3].attn.qkv.sigma == pytest.approx(0.6 * 3 / 5) and other.head.sigma == pytest.approx(0.6 / 5)


def test_dora_behind_another_adapter():
    model = small()
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False, use_dora=True))
    for active, fails in ((["default", "dora"], True), (["dora", "default"], False), (["dora"], False)):
        one = copy.deepcopy(model).double()
        one.base_model.set_adapter(active)
        one = perturb(one)
        if fails:
            with pytest.raises(PaceError, match="DoRA behind another"):
                pace_torch.attach(one, **NET)
        else:
            check_layers(pace_torch.attach(one, **NET), lambda: one(X))  # noqa: B023


def test_calls_past_the_model():
    model = pace_torch.attach(small(), **NET).train()
    model.pace.training_step(model, X, torch.arange(4))
    for rows in (4, 8):
        with pytest.raises(PaceError, match="outside of its model"):
            model.base_model.model(torch.cat([X, X])[:rows])
    assert model.eval().base_model.model(X).shape == (4, 8)
    # A part that runs again in the backward pass is none.
    model = pace_torch.attach(with_lora(), **SETTINGS).train()
    model.gradient_checkpointing_enable()
    model.pace.training_step(model, texts(), LABELS).total.backward()


def test_merged_and_trained_on():
    model = pace_torch.attach(small(), **NET).train()
    model.merge_adapter()
    model.eval()(X)
    with pytest.raises(PaceError, match="`base_model.model.a` is merged"):
        model.train()(X)
    model.unmerge_adapter()
    check_layers(model, lambda: model(X))


def test_hooks_on_parts_are_run():
    for part in ("lora_A", "lora_B", "lora_dropout", "base_layer"):
        model = pace_torch.attach(small(), **NET).train()
        layer, called = model.base_model.model.a, []
        module = getattr(layer, part) if part == "base_layer" else getattr(layer, part)["default"]
        module.register_full_backward_hook(lambda *_: called.append(1))
        model.pace.training_step(model, X.clone().requires_grad_(), torch.arange(4)).total.backward()
        assert called, part


@pytest.mark.parametrize("variant", ["pace", "baseline"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_detach(kind, variant):
    plain = with_lora(**KINDS[kind])
    model = pace_torch.attach(copy.deepcopy(plain), variant=variant, **SETTINGS).train()
    model.pace.training_step(model, texts(), LABELS).total.backward()
    other = copy.deepcopy(model)
    pace_torch.detach(model)
    for one in (model.train(), plain.train()):
        one.zero_grad()
        one.logits = one(**texts()).logits
        one.logits.square().sum().backward()
    assert torch.equal(model.logits, plain.logits)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()) if b.grad is not None)
    for name, module in model.named_modules():
        assert not type(module).__module__.startswith("pace_torch") and "forward" not in vars(module), name
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any("pace_torch" in getattr(hook, "__module__", "") for hook in hooks), name
    with pytest.raises(PaceError, match="no PACE attached"):
        pace_torch.detach(model)
    # A copy keeps its own, and PACE can come back.
    assert other.pace.training_step(other, texts(), LABELS).total.isfinite()
    assert pace_torch.detach(other) is other
    model = pace_torch.attach(model, **SETTINGS)
    check_layers(model, lambda: model.pace.training_step(model, texts(), LABELS))
    with pytest.raises(PaceError, match="`merge`"):
        pace_torch.detach(pace_torch.inject(vit()))


def test_copies_have_noise_of_their_own(tmp_path):
    model = pace_torch.attach(with_lora(), **SETTINGS).train()
    model.pace.training_step(model, texts(), LABELS)
    torch.save(model, tmp_path / "model.pt")
    totals = []
    for one in (model, copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        one.pace.step = 7
        totals.append(one.pace.training_step(one, texts(), LABELS).total.item())
        assert one.pace.step == 8
    assert totals[0] == totals[1] == totals[2]
    saved = pace_torch.trainable_state_dict(model)
    assert saved.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fresh = pace_torch.attach(peft.get_peft_model(llama(), model.peft_config["default"]).double(), **SETTINGS)
    pace_torch.load_trainable_state_dict(fresh, saved)
    assert torch.equal(fresh.eval()(**texts()).logits, model.eval()(**texts()).logits)


def test_what_pace_cannot_be_attached_to():
    with pytest.raises(PaceError, match="attach"):
        pace_torch.inject(with_lora())
    with pytest.raises(PaceError, match="already"):
        pace_torch.attach(pace_torch.attach(with_lora()))
    with pytest.raises(PaceError, match="no LoRA of PEFT's"):
        pace_torch.attach(llama())
    model = with_lora()
    model.pace = 3.5
    with pytest.raises(PaceError, match="`pace` of its own"):
        pace_torch.attach(model)
    assert model.pace == 3.5 and not noises(model)
    with torch.inference_mode():
        model = with_lora()
    with pytest.raises(PaceError, match="inference_mode"):
        pace_torch.attach(model)
    with pytest.raises(PaceError, match="merge_and_unload"):
        pace_torch.merge(pace_torch.attach(with_lora()))
    for config in (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), peft.LoHaConfig(target_modules=["q_proj"])):
        with pytest.raises(PaceError, match="q_proj.*PEFT's LoRA"):
            pace_torch.attach(peft.get_peft_model(llama(), config))
    model = small()
    model.merge_adapter()
    with pytest.raises(PaceError, match="merged"):
        pace_torch.attach(model)
    with pytest.raises(PaceError, match="frozen.*is_trainable"):
        pace_torch.attach(small().requires_grad_(False))
    with pytest.raises(PaceError, match="merge_and_unload"):
        pace_torch.merge(pace_torch.attach(small(), variant="baseline"))
    with pytest.raises(PaceError, match="ALoraLinearVariant"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
        pace_torch.attach(peft.get_peft_model(transformers.LlamaForCausalLM(LLAMA), config))
    for function in (pace_torch.describe, pace_torch.merge, pace_torch.trainable_state_dict):
        with pytest.raises(PaceError, match="NoneType, expected a torch.nn.Module"):
            function(None)
    for setting in (dict(batch_of=3), dict(batch_of=[]), dict(noise_head="no"), dict(branches_at=None), dict(noise_shape="CB"), dict(branches_at="end"), dict(variant="slow"), dict(sigma=-1.0), dict(lambda_=-1),
                    dict(seed=0.5), dict(first_noisy=-1), dict(criterion=3)):
        with pytest.raises(PaceError, match=next(iter(setting))):
            pace_torch.attach(with_lora(), **setting)
    with pytest.warns(UserWarning, match="1 layers have LoRA that gets no noise.*embed_tokens"):
        model = pace_torch.attach(with_lora(target_modules=["q_proj", "embed_tokens"]), **SETTINGS)
    check_layers(model, lambda: model(**texts()))
