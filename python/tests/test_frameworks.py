"""What training frameworks, and people, do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import copy
import io

import pace_torch
import pytest
import torch
from conftest import close, perturb, vit
from pace_torch import NoisyLinear, PaceError
from torch import nn

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
