"""What training frameworks, and people, do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import copy
import functools
import io
import warnings

import pace_torch
import pytest
import timm.optim
import timm.utils
import torch
from conftest import close, perturb, vit
from models import Around
from pace_torch import NoisyLinear, PaceError
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

SETTINGS = dict(rank=2, sigma=0.5, lambda_=0.1, seed=3)
X, LABELS = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def injected(model=None, **settings):
    return perturb(pace_torch.inject(model or vit(drop_path_rate=0.3), **{**SETTINGS, **settings})).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, engine=None, x=X, labels=LABELS):
    """The loss of a training step, and its gradients."""
    model.zero_grad()
    total = model.pace.training_step(model if engine is None else engine, x, labels).total
    total.backward()
    return total.detach(), gradients(model)


def same(got, expected):
    close(got[0], expected[0], 1e-12)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(got[1][name], gradient, 1e-9)


@pytest.fixture(scope="module")
def plain():
    """What a step gives without any framework."""
    return step(injected())


@pytest.fixture(scope="module")
def evaluated():
    return injected().eval()(X).detach()


# ------------------------------------------------------------------------------------------------------ modes of parts


def test_parts_in_another_mode(plain, evaluated):
    model = injected()
    model(X)
    model.eval()
    for part in (model.head, model.blocks[1].drop_path1, model.blocks[2].drop_path1):
        part.train()
    # Four rows or eight: those of the step before must not count.
    for x, expected in ((X, evaluated), (torch.cat([X, X]), evaluated.repeat(2, 1))):
        close(model(x), expected, 1e-12)
    # The first noisy block, where branches start, and its noise, which the branches then differ by no more.
    model = injected(vit(), first_noisy=1)
    for module in model.modules():
        if isinstance(module, NoisyLinear) and module is not model.blocks[1].attn.qkv:
            module.sigma = 0.0
    assert model.pace.training_step(model, X, LABELS).consistency > 0
    model.blocks[1].eval()
    assert model.pace.training_step(model, X, LABELS).consistency == 0


def test_modes_survive():
    model = vit(drop_path_rate=0.3).train()
    for part in (model.blocks[1], model.head):
        part.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    for change in (pace_torch.inject, pace_torch.merge):
        change(model)
        assert all(module.training == modes[name] for name, module in model.named_modules() if name in modes)
    assert modes.keys() == {name for name, _ in model.named_modules()}
    assert all(not module.training for module in pace_torch.inject(vit().eval()).modules())


# -------------------------------------------------------------------------------------------------------------- graphs


class Small(nn.Module):
    """Without control flow, as `torch.fx` wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


ROWS = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
GRAPHS = {
    "export": lambda model: torch.export.export(model, (ROWS,)).module(),
    "strict export": lambda model: torch.export.export(model, (ROWS,), strict=True).module(),
    "fx": torch.fx.symbolic_trace,
    "jit": lambda model: torch.jit.trace(model, (ROWS,), check_trace=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made_by", GRAPHS)
def test_graphs(made_by):
    model = injected(Small())
    want, make = copy.deepcopy(model).eval()(ROWS), GRAPHS[made_by]
    with pytest.raises(Exception, match=r"call `eval\(\)` first"):
        make(model)(ROWS)
    for evaluating in (model.eval(), pace_torch.merge(copy.deepcopy(model))):
        graph = make(evaluating)
        close(graph(ROWS), want, 1e-12)
        # By PyTorch's own operators, so that it runs where this package is not.
        assert "ops.pace." not in str(graph.graph) and "pace::" not in str(graph.graph)


@pytest.mark.filterwarnings("ignore")
def test_feature_extractors():
    """They make a graph of each mode, whatever the model's is."""
    model = injected(vit(drop_path_rate=0.2))
    for mode in (True, False):
        extractor = timm.models.create_feature_extractor(model.train(mode), ["blocks.1"])
        images, seen = torch.randn(2, 3, 16, 16, dtype=torch.float64), []
        handle = model.blocks[1].register_forward_hook(lambda module, args, y: seen.append(y))
        model.eval()(images)
        handle.remove()
        close(extractor.eval()(images)["blocks.1"], seen[0], 1e-12)
        with pytest.raises(PaceError, match=r"call `eval\(\)` first"):
            extractor.train()(images)


@pytest.mark.filterwarnings("ignore")
def test_onnx(capfd):
    pytest.importorskip("onnxscript", reason="the ONNX exporter of torch.export needs onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = injected(Small()).eval()
    want = model(ROWS)
    for evaluating in (model, pace_torch.merge(copy.deepcopy(model))):
        program = torch.onnx.export(evaluating, (ROWS,), dynamo=True)
        evaluator = reference.ReferenceEvaluator(program.model_proto)
        close(torch.tensor(evaluator.run(None, {evaluator.input_names[0]: ROWS.numpy()})[0]), want, 1e-12)


# --------------------------------------------------------------------------------------------- changes behind its back


def test_changed_classifiers():
    model = injected()
    model(X)
    for classes in (9, 0):
        model.reset_classifier(classes)
        with pytest.raises(PaceError, match="`head` is no longer the classifier"):
            model.double()(X)
    model = injected()
    model.head = torch.compile(model.head, backend="eager")
    step(model)
    # A parameter beside the layer would have no effect.
    model = injected(Small())
    for name in ("weight", "bias"):
        with pytest.raises(PaceError, match=f"the {name} of `head`.*before `inject`"):
            setattr(model.head, name, nn.Parameter(torch.zeros(5)))


def test_wrapped_models(plain, evaluated):
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        with pytest.raises(PaceError, match=r"wrapped.*\((DataParallel|OptimizedModule)\).*`inject` or `attach` first"):
            pace_torch.inject(wrap(vit()))
    # On the CPU DataParallel calls the model itself; on several devices these are what it calls.
    same(step(model := injected(), nn.DataParallel(model)), plain)
    with pytest.raises(PaceError, match="DataParallel.*torchrun"):
        model._replicate_for_data_parallel()(X)
    around = Around(injected())
    close(step(around.net, around)[0], plain[0], 1e-12)
    assert {f"net.{name}" for name in pace_torch.trainable_state_dict(around.net)} == pace_torch.trainable_state_dict(around).keys()
    pace_torch.merge(around).train()
    assert not hasattr(around.net, "pace") and len(around(X)) == 4
    close(around.eval()(X), evaluated, 1e-12)


def test_an_optimizer_of_before():
    x = torch.randn(4, 6, dtype=torch.float64)

    def train(model, sgd, steps=5):
        for _ in range(steps):
            step(model, None, x)
            sgd.step()

    plain = Small()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = injected(plain)
    with pytest.warns(UserWarning, match="optimizer after `inject`") as seen:
        train(model, sgd)
    assert len(seen) == 1
    for model, trained in ((injected(Small()), None), (injected(Small()), "head.")):
        # Everything, or the classifier alone as one wants it.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(trained or ""))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
            train(model, torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_a_sequential_model():
    torch.manual_seed(0)
    layers = nn.Linear(6, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, 5, dtype=torch.float64)
    model = injected(nn.Sequential(*layers), head="2")
    assert model.pace.training_step(model, ROWS, LABELS).consistency > 0
    want = model.eval()(ROWS)
    close(pace_torch.merge(model)(ROWS), want, 1e-12)


# --------------------------------------------------------------------------------------------- how weights come about


@pytest.mark.filterwarnings("ignore")
def test_the_meta_device(plain, evaluated):
    with torch.device("meta"):
        models = [pace_torch.inject(vit(drop_path_rate=0.3), **SETTINGS) for _ in range(2)]
    weights = injected().state_dict()
    models[0].load_state_dict(weights, assign=True)
    models[1].to_empty(device="cpu").load_state_dict(weights)
    for model in models:
        same(step(model.train()), plain)
        close(model.eval()(X), evaluated, 1e-12)
    # Adapters that no checkpoint has start as they always do: with no effect.
    with torch.device("meta"):
        model = pace_torch.inject(vit(), **SETTINGS)
    model.to_empty(device="cpu").load_state_dict(vit().state_dict(), strict=False)
    close(model.eval()(X), vit().eval()(X), 1e-12)
    assert model.blocks[0].attn.qkv.adapter.delta_W_up.abs().min() > 0


def test_weights_that_hooks_make():
    # The hooks would run when the linear layer is called, which it is not.
    for make in (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), torch.nn.utils.spectral_norm):
        model = injected()
        make(model.head.adapter.base_module)
        for use in (lambda: model(X), lambda: pace_torch.merge(model)):
            with pytest.raises(PaceError, match="`head.*pruning"):
                use()
        assert isinstance(model.head, NoisyLinear)
    # An adapter is called, so that it can be pruned.
    model = injected()
    layer = model.blocks[1].mlp.fc1
    prune.l1_unstructured(layer.adapter, "delta_W_down", 0.5)
    step(model)
    with pytest.raises(PaceError, match=r"`blocks.1.mlp.fc1.adapter`.*prune.remove"):
        pace_torch.merge(model)
    prune.remove(layer.adapter, "delta_W_down")
    assert (layer.adapter.delta_W_down == 0).double().mean() == 0.5
    y = model.eval()(X)
    close(pace_torch.merge(model)(X), y, 1e-12)
    with pytest.raises(PaceError, match="head"):
        prune.l1_unstructured(injected().head, "weight", 0.3)


def test_parametrizations():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = injected()
    parametrize = torch.nn.utils.parametrize.register_parametrization
    parametrize(model.blocks[1].mlp.fc1.adapter, "delta_W_down", Twice())
    parametrize(model.blocks[1].mlp.fc2.adapter.base_module, "weight", Twice())
    torch.nn.utils.parametrizations.weight_norm(model.head.adapter.base_module)
    by_hand = injected()
    with torch.no_grad():
        by_hand.blocks[1].mlp.fc1.adapter.delta_W_down *= 2
        by_hand.blocks[1].mlp.fc2.adapter.base_module.weight *= 2
    got, expected = step(model), step(by_hand)
    close(got[0], expected[0], 1e-12)
    name = "blocks.1.mlp.fc1.adapter.{}delta_W_down{}"
    close(got[1][name.format("parametrizations.", ".original")], 2 * expected[1][name.format("", "")], 1e-10)
    assert "head.adapter.base_module.parametrizations.weight.original0" in got[1].keys() & pace_torch.trainable_state_dict(model).keys()
    want = by_hand.eval()(X)
    close(model.eval()(X), want, 1e-12)
    merged = pace_torch.merge(model)
    close(merged(X), want, 1e-12)
    assert merged.state_dict().keys() == vit().state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers():
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in engines else engines[-1]
    model = injected().float().eval()
    want, quantise = model(X.float()), torch.ao.quantization.quantize_dynamic
    with pytest.raises(PaceError, match=r"`blocks.0.attn.qkv` was replaced by a Linear.*quantise.*after `merge`"):
        quantise(model, {nn.Linear})(X.float())
    close(quantise(pace_torch.merge(model), {nn.Linear})(X.float()), want, 0.05)


def test_adapters_of_peft_within():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for name, message in (("qkv", "Target module NoisyLinear"), ("qkv.adapter.base_module", "`blocks.0.attn.qkv` was replaced.*PEFT")):
        with pytest.raises((PaceError, ValueError), match=message):
            peft.get_peft_model(injected(), peft.LoraConfig(target_modules=[name]))(X)


class Encoder(nn.Module):
    """Which PyTorch computes in evaluation by one operator from the weights, if its layers are its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, dtype=torch.float64)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def test_the_fast_path_of_an_encoder():
    model, x = injected(Encoder()), torch.randn(4, 3, 16, dtype=torch.float64)
    step(model, None, x)
    want = model.eval()(x)
    for evaluating in (model, pace_torch.merge(copy.deepcopy(model))):
        with torch.inference_mode():
            close(evaluating(x), want, 1e-12)


def test_functional_calls(plain):
    model = injected()
    trained = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    total = model.pace.loss(torch.func.functional_call(model, trained, (X,)), LABELS).total
    total.backward()
    same((total, {name: p.grad for name, p in trained.items() if p.grad is not None}), plain)
    # Frozen weights have no gradient, and a request for one is not passed over.
    everything = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(PaceError, match="must not require one"):
        torch.func.functional_call(model, everything, (X,))
    with pytest.raises(PaceError, match="must not require one"):
        model.requires_grad_(True)(X)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_within_the_model(plain, evaluated):

    def compiled(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")

    for wrap in (compiled, lambda m: checkpoint_wrapper.apply_activation_checkpointing(m, check_fn=lambda x: type(x).__name__ == "Block")):
        model, fresh = injected(), injected(seed=5)
        saved = {name: tensor.clone() for name, tensor in pace_torch.trainable_state_dict(model).items()}
        wrap(fresh)
        perturb(fresh, seed=7)
        pace_torch.load_trainable_state_dict(fresh, saved)
        close(fresh.eval()(X), evaluated, 1e-12)
        again = pace_torch.trainable_state_dict(fresh)
        assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)
        close(pace_torch.merge(fresh)(X), evaluated, 1e-12)


def checkpointed(model, **settings):
    """Each block in gradient checkpointing."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, **settings)
    return model


def test_reentrant_checkpointing(plain):
    torch.manual_seed(0)
    model = checkpointed(injected(), use_reentrant=True)
    # What `enable_input_require_grads` does for Hugging Face's models.
    handle = model.patch_embed.register_forward_hook(lambda module, args, y: y.requires_grad_())
    for _ in range(2):
        same(step(model), plain)
        model.pace.step = 0
    logits = model(X)
    with pytest.raises(PaceError, match=r"8 layers .*blocks.1.attn.qkv.*`backward\(\)` was not called"):
        model(X)
    logits.sum().backward()
    with torch.no_grad():
        model(X), model(X)
    # Without a gradient of the input the adapters would stay as they are.
    handle.remove()
    with pytest.warns(UserWarning, match="None of the inputs"):
        step(model)
    with pytest.raises(PaceError, match="enable_input_require_grads"):
        step(model)


def test_keys_follow_the_layers():
    pace, meta = injected().pace, torch.device("meta")
    assert pace.key(2, pace.keys.device).data_ptr() == pace.keys[2:].data_ptr()
    moved = pace.key(2, meta)
    assert moved.device == meta and pace.key(0, meta)._base is moved._base
    pace.advance()
    assert pace.key(0, meta)._base is not moved._base


# ----------------------------------------------------------------------------------------------------------- offloading


def test_offloading(plain, evaluated, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate comes with peft")
    offloads = (
        accelerate.cpu_offload,
        lambda model, **where: accelerate.cpu_offload(model, offload_buffers=True, **where),
        lambda model, **where: accelerate.disk_offload(model, str(tmp_path), **where),
    )
    for offload in offloads:
        model = injected(variant="fast", samples=4)
        offload(model, execution_device=torch.device("cpu"))
        close(model.eval()(X), evaluated, 1e-12)
        # Gradients would go to copies that are thrown away.
        with pytest.raises(PaceError, match="offloads for evaluation only"):
            model.train()(X)
        with pytest.raises(PaceError, match="remove_hook_from_submodules"):
            pace_torch.merge(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    close(pace_torch.merge(model.eval())(X), evaluated, 1e-12)
    # A device map that offloads nothing is no hindrance, before `inject` or after.
    for model in (injected(accelerate.dispatch_model(vit(drop_path_rate=0.3), {"": "cpu"}, force_hooks=True)),
                  accelerate.dispatch_model(injected(), {"": "cpu"}, force_hooks=True)):
        same(step(model), plain)
        close(pace_torch.merge(model.eval())(X), evaluated, 1e-12)


# -------------------------------------------------------------------------------------------- transformers, Accelerate


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers comes with peft")


def hugging_face(transformers, **settings):
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, num_labels=5, hidden_dropout_prob=0.0)
    return injected(transformers.ViTForImageClassification(config).double(), **settings)


IMAGES = torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
# One label that does not count.
DATA = [{"pixel_values": image, "labels": -100 if i == 1 else i % 5} for i, image in enumerate(IMAGES)]


def trainer_of(transformers, model, folder, trainer=None, **settings):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, train_sampling_strategy="sequential", num_train_epochs=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        seed=0, **settings,
    )
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    how = {} if trainer else {"compute_loss_func": model.pace.compute_loss}
    return (trainer or transformers.Trainer)(model, arguments, train_dataset=DATA, eval_dataset=DATA[2:6], optimizers=(sgd, None), **how)


def assert_equal_weights(model, other, tolerance=1e-10):
    for name, weight in pace_torch.trainable_state_dict(other).items():
        close(pace_torch.trainable_state_dict(model)[name], weight, tolerance)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trainer(transformers, accumulation, tmp_path):
    model, by_hand = hugging_face(transformers), hugging_face(transformers)
    trainer = trainer_of(transformers, model, tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    sgd = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    batches = [[(row["pixel_values"], row["labels"]) for row in DATA[i : i + 2]] for i in range(0, len(DATA), 2)]
    for i in range(0, len(batches), accumulation):
        large = batches[i : i + accumulation]
        items = sum(label != -100 for rows in large for _, label in rows)
        sgd.zero_grad()
        for rows in large:
            x, labels = torch.stack([x for x, _ in rows]), torch.tensor([label for _, label in rows])
            losses = by_hand.pace.training_step(by_hand, {"pixel_values": x}, labels)
            (losses.total * (labels != -100).sum().item() / items).backward()
        sgd.step()
    assert_equal_weights(model, by_hand)
    assert model.pace.step == 6
    # Evaluation and prediction have one branch, and their loss is cross-entropy.
    with torch.no_grad():
        logits = by_hand.eval()(IMAGES[2:6]).logits
    predicted = trainer.predict(DATA[2:6])
    close(torch.from_numpy(predicted.predictions), logits, 1e-10)
    want = nn.functional.cross_entropy(logits, torch.tensor([2, 3, 4, 0])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6) == predicted.metrics["test_loss"]


def test_trainer_resumes(transformers, tmp_path):
    from pace_torch.trainer import PaceCallback

    def trained(resume=None, callback=PaceCallback, folder=tmp_path, **settings):
        model = hugging_face(transformers)
        trainer = trainer_of(transformers, model, folder, gradient_accumulation_steps=4)
        for name, value in {"save_strategy": "steps", "save_steps": 1, **settings}.items():
            setattr(trainer.args, name, value)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        assert model.pace.step == 6
        return model

    first, other = str(tmp_path / "checkpoint-1"), tmp_path / "other"
    whole = trained()
    assert_equal_weights(trained(first), whole, 0)
    assert_equal_weights(trained(first, PaceCallback(first), other), whole, 0)
    with pytest.raises(PaceError, match="label_smoothing_factor"):
        trained(label_smoothing_factor=0.1)
    with pytest.raises(PaceError, match=r"no .*pace.pt.*`PaceCallback\(folder\)`"):
        trained(first, folder=tmp_path / "another")
    # By this measure the first model is the best one.
    best = trained(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                   greater_is_better=True)
    saved = [torch.load(tmp_path / f"checkpoint-{i}" / "pace.pt")["trained"] for i in (1, 2)]
    name = "vit.layers.0.attention.q_proj.adapter.delta_W_down"  # one that transformers renames
    assert torch.equal(pace_torch.trainable_state_dict(best)[name], saved[0][name]) and not torch.equal(saved[0][name], saved[1][name])


def test_trainer_without_its_loss(transformers, tmp_path):
    class Lazy(transformers.Trainer):
        """As in docs/pytorch/hugging_face.md."""

        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            pace = self.accelerator.unwrap_model(model).pace
            if model.training:
                return pace.training_step(model, inputs, labels).total
            outputs = model(**inputs)
            loss = pace.loss(outputs, labels).total
            return (loss, outputs) if return_outputs else loss

    for variant in ("pace", "lazy", "fast"):
        model = hugging_face(transformers, variant=variant, samples=12)
        # The model's own loss has no consistency.
        with pytest.raises(PaceError, match="`labels`.*compute_loss_func=model.pace.compute_loss"):
            trainer_of(transformers, model, tmp_path, transformers.Trainer).train()
        if variant != "pace":
            with pytest.raises(PaceError, match=f"`{variant}` needs more.*hugging_face.md"):
                trainer_of(transformers, model, tmp_path).train()
    model, by_hand = (hugging_face(transformers, variant="lazy") for _ in range(2))
    trainer = trainer_of(transformers, model, tmp_path, Lazy, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    sgd = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    for i in range(6):
        x, labels = IMAGES[2 * i : 2 * i + 2], torch.tensor([row["labels"] for row in DATA[2 * i : 2 * i + 2]])
        # Labels among the inputs do no harm here: the model's own loss is not used.
        (by_hand.pace.training_step(by_hand, {"pixel_values": x}, labels).total / 2).backward()
        if i % 2:
            sgd.step()
            sgd.zero_grad()
    assert_equal_weights(model, by_hand)


def test_a_batch_with_labels(transformers):
    model = hugging_face(transformers)
    labels = torch.tensor([0, 1, 2, 0])
    losses = model.pace.training_step(model, {"pixel_values": IMAGES[:4], "labels": labels}, labels)
    model.pace.step = 0
    assert torch.equal(losses.total, model.pace.training_step(model, {"pixel_values": IMAGES[:4]}, labels).total)
    # Without consistency the model's own loss is right.
    model = hugging_face(transformers, variant="noise")
    close(model(pixel_values=IMAGES[:4], labels=labels).loss.double(), nn.functional.cross_entropy(
        (setattr(model.pace, "step", 0), model(pixel_values=IMAGES[:4]).logits)[1], labels), 1e-6)


def test_save_pretrained(transformers, tmp_path):
    model = hugging_face(transformers)
    want = model.eval()(IMAGES).logits
    pace_torch.merge(model).save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(again(IMAGES).logits, want, 1e-10)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_hugging_face(transformers, reentrant):
    plain, saving = hugging_face(transformers), hugging_face(transformers)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    batch = {"pixel_values": IMAGES[:4]}
    same(step(saving, None, batch), step(plain, None, batch))


def by_hand(batches, divide=1):
    """A plain loop of SGD over batches, which accumulates `divide` of them."""
    model = injected()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for i, (x, labels) in enumerate(batches, 1):
        (model.pace.training_step(model, x, labels).total / divide).backward()
        if i % divide == 0:
            sgd.step()
            sgd.zero_grad()
    return model


BATCHES = [(X[:2], LABELS[:2]), (X[2:], LABELS[2:])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate(accumulation, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate comes with peft")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = injected()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = torch.utils.data.DataLoader(list(zip(X, LABELS)), batch_size=2)
    engine, sgd, loader = accelerator.prepare(model, sgd, loader)
    accelerator.register_for_checkpointing(model.pace)
    for x, labels in loader:
        with accelerator.accumulate(engine):
            accelerator.backward(model.pace.training_step(engine, x, labels).total)
            sgd.step()
            sgd.zero_grad()
    assert_equal_weights(model, by_hand(BATCHES, accumulation))
    accelerator.save_state(str(tmp_path))
    saved = {name: tensor.clone() for name, tensor in pace_torch.trainable_state_dict(engine).items()}
    perturb(model)
    model.pace.step = 0
    accelerator.load_state(str(tmp_path))
    assert model.pace.step == 2 and all(torch.equal(t, saved[name]) for name, t in pace_torch.trainable_state_dict(model).items())
    assert pace_torch.merge(accelerator.unwrap_model(engine)) is model
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):
        """As in docs/pytorch/hugging_face.md."""

        def __init__(self):
            super().__init__()
            self.net = injected()

        def training_step(self, batch, _):
            x, labels = batch
            return self.net.pace.training_step(self.net, x, labels).total

        def validation_step(self, batch, _):
            x, labels = batch
            self.log("loss", self.net.pace.loss(self.net(x), labels).total)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["pace"] = self.net.pace.state_dict()

        def on_load_checkpoint(self, checkpoint):
            self.net.pace.load_state_dict(checkpoint["pace"])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def fit(epochs, **how):
        module = Module()
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
                                    enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2)
        loader = torch.utils.data.DataLoader(list(zip(X, LABELS)), batch_size=2)
        trainer.fit(module, loader, loader, **how)
        return module, trainer

    module, trainer = fit(1)
    assert_equal_weights(module.net, by_hand(BATCHES, 2))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert_equal_weights(resumed.net, by_hand(BATCHES * 2, 2))
    want = resumed.eval().net(X)
    close(pace_torch.merge(resumed).net(X), want, 1e-12)


# ---------------------------------------------------------------------------------------------------- plain PyTorch


def test_copies(plain, evaluated):
    buffer = io.BytesIO()
    torch.save(injected(), buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(injected()), torch.load(buffer, weights_only=False)):
        same(step(model), plain)
        close(pace_torch.merge(model.eval())(X), evaluated, 1e-12)
        assert not model._forward_hooks and not any(module._forward_pre_hooks for module in model.modules())


def test_moving_averages():
    swa = torch.optim.swa_utils
    averages = {
        "mean": lambda model: swa.AveragedModel(model),
        "mean, buffers": lambda model: swa.AveragedModel(model, use_buffers=True),
        "ema": lambda model: swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5)),
        "timm": lambda model: timm.utils.ModelEmaV3(model, decay=0.5),
    }
    for variant in ("pace", "fast"):
        for kind, average in averages.items():
            model = injected(variant=variant, samples=4)
            ema, seen = average(model), []
            for _ in range(2):
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p.add_(1.0)
                model.pace.training_step(model, X, LABELS, LABELS).total.backward()
                seen.append(model.head.adapter.base_module.bias.detach().clone())
                (ema.update if kind == "timm" else ema.update_parameters)(model)
            # timm's begins with the model of before, PyTorch's with the first that it is given.
            want = (seen[0] - 1) / 4 + seen[0] / 4 + seen[1] / 2 if kind == "timm" else (seen[0] + seen[1]) / 2
            close(ema.module.head.adapter.base_module.bias, want, 1e-12)
            want = ema.eval()(X)
            close(pace_torch.merge(ema).eval()(X), want, 1e-12)
            assert isinstance(model.head, NoisyLinear)


def test_loss_scaling_and_optimizers(plain):
    results = []
    for foreach in (False, True):
        model = injected()
        groups = timm.optim.param_groups_weight_decay(model, 0.1)
        assert sum(len(group["params"]) for group in groups) == len(plain[1])
        adam = torch.optim.AdamW(groups, lr=0.1, foreach=foreach)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        total = model.pace.training_step(model, X, LABELS).total
        scaler.scale(total).backward()
        scaler.unscale_(adam)
        same((total, gradients(model)), plain)
        scaler.step(adam)
        results.append(model)
    assert_equal_weights(*results)
    model.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types(dtype, evaluated):
    model = injected(vit(), variant="fast", samples=4)
    model.pace.training_step(model, X, LABELS, LABELS)
    model.to(dtype)
    assert model.pace.history.dtype == torch.float64
    for _ in range(2):
        losses = model.pace.training_step(model, X.to(dtype), LABELS, LABELS)
        losses.total.backward()
    assert losses.consistency > 0 and model.pace.history.dtype == torch.float32
    close(pace_torch.merge(model.eval())(X.to(dtype)), evaluated, 0.05)


def test_inference_mode_and_freezing(plain, evaluated):
    model = injected()
    with torch.inference_mode():
        model(X)
        close(model.eval()(X), evaluated, 1e-12)
    model.train().pace.step = 0
    same(step(model), plain)
    # Only the head: the others have no gradients, but are saved.
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    model.pace.step = 0
    total, frozen = step(model)
    assert frozen.keys() == {"head.adapter.base_module.weight", "head.adapter.base_module.bias"} < plain[1].keys()
    for name, gradient in frozen.items():
        close(gradient, plain[1][name], 1e-9)
    assert pace_torch.trainable_state_dict(model).keys() == pace_torch.trainable_state_dict(injected()).keys()


def test_initialisation_after_inject():
    def zero(module):
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def every_weight(module):
        if getattr(module, "weight", None) is not None:
            nn.init.zeros_(module.weight)

    # `apply` reaches the linear layers as in the plain model.
    model, plain = pace_torch.inject(vit(), **SETTINGS).eval(), vit().eval()
    close(model.apply(zero)(X), plain.apply(zero)(X), 1e-12)
    with pytest.raises(PaceError, match="reads the weight of `blocks.0.attn.qkv`"):
        model.apply(every_weight)


# ------------------------------------------------------------------------------------------------------------ DropPath


class OwnDropPath(nn.Module):
    """As each project has it."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full_like(x[:, :1], 1 - self.rate)) / (1 - self.rate)


class Residual(nn.Module):
    def __init__(self, drop):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(6, 6, dtype=torch.float64), drop, nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x):
        x = x + self.drop(self.body(x))
        return self.head(x + self.drop(torch.tanh(x)))


def test_other_drop_paths(transformers):
    torchvision = pytest.importorskip("torchvision", reason="torchvision comes with timm")
    swin = transformers.models.swin.modeling_swin
    kinds = [OwnDropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row"), torchvision.ops.StochasticDepth(0.5, "batch"),
             swin.SwinDropPath(0.5)]
    rows = torch.ones(64, 6, dtype=torch.float64)
    for drop in kinds:
        model = injected(Residual(drop), exclude_modules=["body"])
        model.head.sigma = 0.0
        torch.manual_seed(1)
        logits = model(rows)
        # The same samples are dropped in both branches, by what the module draws for one of them, anew at each call.
        assert torch.equal(logits[:64], logits[64:])
        assert len(logits.unique(dim=0)) == (1 if getattr(drop, "mode", "row") == "batch" else 4)
        assert pace_torch.merge(model).drop is drop
        torch.manual_seed(1)
        close(model(rows), logits[:64], 1e-12)


def test_swin_of_hugging_face_drops_paths(transformers):
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2,
                                     drop_path_rate=0.5, num_labels=5)
    model = injected(transformers.SwinForImageClassification(config).double())
    for layer in model.modules():
        if isinstance(layer, NoisyLinear):
            layer.sigma = 0.0
    for _ in range(4):
        assert model.pace.training_step(model, {"pixel_values": IMAGES[:4]}, LABELS).consistency == 0
