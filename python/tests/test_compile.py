"""torch.compile: the noise is an input of the graph, so that steps neither compile again nor repeat themselves."""

import copy

import pace_torch
import pytest
import torch
from conftest import close, perturb, swin, vit


def model_of(make, adapter="LoRAmul_VPTadd", **settings):
    return perturb(pace_torch.inject(make(drop_path_rate=0.3), adapter, 4, seed=3, **settings)).train()


def inputs(image=16):
    torch.manual_seed(2)
    return torch.randn(4, 3, image, image, dtype=torch.float64), torch.randint(5, (4,))


@pytest.mark.parametrize(("make", "image", "adapter"), [
    (vit, 16, "LoRAmul_VPTadd"), (vit, 16, "LoRAadd"), (vit, 16, "VPTadd"), (swin, 32, "LoRAmul_VPTadd"),
])
def test_one_graph_for_all_steps(make, image, adapter):
    eager = model_of(make, adapter)
    model = copy.deepcopy(eager)
    model.pace.manual_steps = True
    x, labels = inputs(image)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, labels):
        losses = model.pace.loss(model(x), labels)
        return losses.total, losses.consistency

    seen = []
    for i in range(3):
        model.pace.advance()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            total, consistency = step(x, labels)
        total.backward()
        losses = eager.pace.training_step(eager, x, labels)
        losses.total.backward()
        close(total, losses.total, 1e-12)
        seen.append(consistency.item())
    assert len(set(seen)) == 3
    for a, b in zip(model.parameters(), eager.parameters()):
        if b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-10 * b.grad.abs().max().clamp_min(1e-4)


def test_automatic_steps_break_the_graph_and_stay_fresh():
    eager = model_of(vit)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager")
    x, labels = inputs()
    for _ in range(3):
        losses = model.pace.training_step(compiled, x, labels)
        losses.total.backward()
        close(losses.total, eager.pace.training_step(eager, x, labels).total, 1e-12)
    assert model.pace.step == 3


def test_the_history_is_written_in_a_compiled_step():
    eager = model_of(vit, variant="fast", samples=6)
    x, labels = inputs()
    index = torch.tensor([5, 0, 2, 1])
    eager.pace.training_step(eager, x, labels, index)
    model = copy.deepcopy(eager)
    model.pace.manual_steps = True
    step = torch.compile(
        lambda x: model.pace.loss(model(x), labels, index).total, backend="aot_eager", fullgraph=True
    )
    model.pace.advance()
    total = step(x)
    total.backward()
    close(total, eager.pace.training_step(eager, x, labels, index).total, 1e-12)
    close(model.pace.history, eager.pace.history, 1e-12)


def test_evaluation_compiles_too():
    model = model_of(vit).eval()
    x, _ = inputs()
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), 1e-12)


def test_inductor_on_a_layer():
    torch.manual_seed(0)
    adapter = perturb(pace_torch.LoraMulVptAdd(torch.nn.Linear(8, 6, dtype=torch.float64), 2))
    x, keys = torch.randn(4, 3, 8, dtype=torch.float64), pace_torch.keys(1, 0, 3)

    def layer(x, keys):
        noise = pace_torch.Noise(keys[1:2], 0.5, branches=2)
        return torch.nn.functional.gelu(adapter(x.sin(), noise)).sum()

    layer(x, keys).backward()
    expected = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    adapter.zero_grad()
    compiled = torch.compile(layer, fullgraph=True)
    result = compiled(x, keys)
    close(result, layer(x, keys), 1e-12)
    result.backward()
    for gradient, parameter in zip(expected, (p for p in adapter.parameters() if p.grad is not None)):
        close(parameter.grad, gradient, 1e-10)
    assert compiled(x, pace_torch.keys(1, 1, 3)) != result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_traced_layer_reads_its_input(with_gradients):
    adapter = perturb(pace_torch.LoraMulVptAdd(torch.nn.Linear(8, 6, dtype=torch.float64), 2))
    x, other = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(adapter, (x,), check_trace=False)
        close(traced(other), adapter(other), 1e-12)


def test_settings_that_differ_from_graph_to_graph():
    """After a first other value the compiler takes a number for a variable."""
    adapter = perturb(pace_torch.LoraAdd(torch.nn.Linear(8, 6, dtype=torch.float64), 2))
    x, keys = torch.randn(4, 3, 8, dtype=torch.float64), pace_torch.keys(1, 2, 1, "cpu")

    def run(sigma, first_sample):
        return adapter(x, pace_torch.Noise(keys, sigma, first_sample=first_sample, branches=2))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for sigma, first_sample in ((0.3, 0), (0.5, 4), (0.7, 8), (0.9, 12)):
        close(compiled(sigma, first_sample), run(sigma, first_sample), 1e-12)


def test_a_setting_that_changes_at_every_call():
    """The compiler makes a symbol of such a number, as of a schedule's."""
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2])
    loss = torch.compile(lambda value: pace_torch.pace_loss(logits, labels, lambda_=value).total, backend="aot_eager", fullgraph=True)
    for value in (0.5, 0.6, 0.7):
        close(loss(value), pace_torch.pace_loss(logits, labels, lambda_=value).total)
