"""What training frameworks, and people, do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import copy
import functools

import pace_torch
import pytest
import torch
from conftest import close, perturb, vit
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
    total = model.pace.training_step(engine or model, x, labels).total
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
        make(model)
    for evaluating in (model.eval(), pace_torch.merge(copy.deepcopy(model))):
        graph = make(evaluating)
        close(graph(ROWS), want, 1e-12)
        # By PyTorch's own operators, so that it runs where this package is not.
        assert "ops.pace." not in str(graph.graph) and "pace::" not in str(graph.graph)


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


class Around(nn.Module):
    """A module with a model in it, as Lightning's."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


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
        with pytest.raises(PaceError, match=r"wrapped.*\((DataParallel|OptimizedModule)\).*`inject` first"):
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
    with pytest.raises(PaceError, match="quantised.*`merge` first"):
        quantise(model, {nn.Linear})(X.float())
    close(quantise(pace_torch.merge(model), {nn.Linear})(X.float()), want, 0.05)


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
