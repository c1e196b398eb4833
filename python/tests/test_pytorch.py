"""What PyTorch's own tools, and people, do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import copy
import functools
import io
import warnings

import pace_torch
import pytest
import timm.optim
import timm.utils
import torch
from conftest import LABELS, STEP, X, assert_equal_weights, close, gradients, injected, perturb, same, step, vit
from models import Around
from pace_torch import NoisyLinear, PaceError
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_pass_that_fails(plain, error, compiled):
    """Its layers are outside of their model again, and the next step is what it would have been."""
    model = injected()

    def fail(module, args):
        raise error

    failing, engine = model.norm.register_forward_pre_hook(fail), torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(error):
        step(model, engine)
    with pytest.raises(PaceError, match="outside of its model"):
        model.blocks[1](torch.ones(8, 17, 24, dtype=torch.float64))
    failing.remove()
    model.pace.step = 0
    same(step(model, engine), plain)


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
        models = [pace_torch.inject(vit(drop_path_rate=0.3), **STEP) for _ in range(2)]
    weights = injected().state_dict()
    models[0].load_state_dict(weights, assign=True)
    models[1].to_empty(device="cpu").load_state_dict(weights)
    for model in models:
        same(step(model.train()), plain)
        close(model.eval()(X), evaluated, 1e-12)
    # Adapters that no checkpoint has start as they always do: with no effect.
    with torch.device("meta"):
        model = pace_torch.inject(vit(), **STEP)
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
    for number, block in enumerate(model.blocks):
        block.layer = 4 * number  # a name that layers with noise have too
    # What `enable_input_require_grads` does for Hugging Face's models.
    handle = model.patch_embed.register_forward_hook(lambda module, args, y: y.requires_grad_())
    for _ in range(2):
        same(step(model), plain)
        model.pace.step = 0
    logits = model(X)
    with pytest.raises(PaceError, match=r"8 layers .*blocks.1.attn.qkv.*`backward\(\)` was not called"):
        model(X)
    logits.sum().backward()
    # A pass that failed has no backward pass.
    failing = model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    failing.remove()
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
    model, plain = pace_torch.inject(vit(), **STEP).eval(), vit().eval()
    close(model.apply(zero)(X), plain.apply(zero)(X), 1e-12)
    with pytest.raises(PaceError, match="reads the weight of `blocks.0.attn.qkv`"):
        model.apply(every_weight)
