"""The operators on a CUDA device against the CPU, on a stream of the caller's, and in captured graphs."""

import copy

import pace_torch
import pytest
import torch
from conftest import close, error, perturb, swin, vit
from models import Pixels, Scalings, injected
from pace_torch import Noise, PaceError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def cases():
    """Operator, its differentiable inputs (as they are called), and the noise source or None."""
    w0, b0 = random(48, 32), random(48)
    x, lora_a, lora_b, bias = random(4, 17, 32), random(8, 32), random(48, 8), random(48)
    key = pace_torch.keys(3, 1, 2)[1:]
    linear = {"x": x, "delta_bias": bias, "base_weight": w0, "base_bias": b0}
    return {
        "noisy_linear": (pace_torch.noisy_linear, {**linear, "delta_weight": random(48, 32)}, key),
        "lora_mul_linear": (pace_torch.lora_mul_linear, {**linear, "lora_a": lora_a, "lora_b": lora_b}, key),
        "lora_mul_linear with a prompt": (
            pace_torch.lora_mul_linear,
            {**linear, "lora_a": lora_a, "lora_b": lora_b, "prompt_down": random(32, 8), "prompt_up": random(8, 1)},
            key,
        ),
        "prompt alone": (
            lambda x, **tensors: pace_torch.lora_mul_linear(x, lora_a=None, lora_b=None, **tensors),
            {**linear, "prompt_down": random(32, 8), "prompt_up": random(8, 1)},
            key,
        ),
        "lora_linear": (pace_torch.lora_linear, {**linear, "lora_a": lora_a, "lora_b": lora_b}, key),
        "low_rank_weight": (pace_torch.low_rank_weight, {"lora_a": lora_a, "lora_b": lora_b, "base_weight": w0}, None),
        "prompt_bias": (
            pace_torch.prompt_bias,
            {"base_weight": w0, "base_bias": b0, "prompt_down": random(32, 8), "prompt_up": random(8, 1),
             "delta_bias": bias},
            None,
        ),
        "noisy_epilogue": (pace_torch.noisy_epilogue, {"y": random(4, 17, 48), "a": random(4, 17, 48)}, key),
    }


def run(op, inputs, key, dtype, device, per_token):
    inputs = {name: t.to(device, dtype).requires_grad_(not name.startswith("base")) for name, t in inputs.items()}
    noise = {} if key is None else {"noise": Noise(key.to(device), 0.7, per_token, 5, 2)}
    y = op(**inputs, **noise)
    trained = [t for t in inputs.values() if t.requires_grad]
    grads = torch.autograd.grad(y, trained, torch.ones_like(y) / y.shape[-1])
    return [t.double().cpu() for t in (y, *grads)]


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("per_token", [False, True], ids=["BC", "BTC"])
def test_operators_agree_with_the_cpu(name, per_token):
    torch.manual_seed(0)
    op, inputs, key = cases()[name]
    exact = run(op, inputs, key, torch.float64, "cpu", per_token)
    for got, expected in zip(run(op, inputs, key, torch.float32, DEVICE, per_token), exact):
        close(got, expected, 1e-5)
    for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        rounded = {key: value.to(dtype).double() for key, value in inputs.items()}
        exact_16 = run(op, rounded, key, torch.float64, "cpu", per_token)
        for got, expected in zip(run(op, rounded, key, dtype, DEVICE, per_token), exact_16):
            assert error(got, expected) <= tolerance


def test_noise_has_the_bits_of_the_cpu():
    for per_token in (False, True):
        noise = Noise(pace_torch.keys(7, 8, 1), 0.6, per_token, 9, 2)
        there = pace_torch.noise(noise._replace(key=noise.key.to(DEVICE)), 5, 70, 11)
        assert torch.equal(there.cpu(), pace_torch.noise(noise, 5, 70, 11))


def test_loss_and_status():
    torch.manual_seed(0)
    logits, labels = random(6, 9), torch.tensor([0, 8, -100])
    here, there = logits.clone().requires_grad_(), logits.float().to(DEVICE).requires_grad_()
    expected = pace_torch.pace_loss(here, labels, 0.5, label_smoothing=0.1)
    losses = pace_torch.pace_loss(there, labels.to(DEVICE), 0.5, label_smoothing=0.1)
    losses.check()
    expected.total.backward(), losses.total.backward()
    close(losses.total.cpu(), expected.total, 1e-5)
    close(there.grad.cpu(), here.grad, 1e-5)
    with pytest.raises(PaceError, match=r"labels\[1\]"):
        pace_torch.pace_loss(there, torch.tensor([0, 9, 0], device=DEVICE)).check()
    history = torch.zeros(4, 9, device=DEVICE)
    index = torch.tensor([1, 3, 1], device=DEVICE)
    with pytest.raises(PaceError, match=r"index\[2\]"):
        pace_torch.pace_loss(there[:3], labels.to(DEVICE), history=history, index=index).check()
    # Beside a criterion too, and without an assertion on the device, after which it could not be used.
    index = torch.tensor([1, 3, 4], device=DEVICE)
    mse = torch.nn.functional.mse_loss
    with pytest.raises(PaceError, match=r"index\[2\]"):
        pace_torch.pace_loss(there[:3], there[3:].detach(), history=history, index=index, criterion=mse).check()
    expected = pace_torch.pace_loss(here, here[:3].detach() ** 2, 0.5, criterion=mse)
    losses = pace_torch.pace_loss(there, there[:3].detach() ** 2, 0.5, criterion=mse)
    losses.check()
    close(losses.total.cpu(), expected.total, 1e-5)


@pytest.mark.parametrize("targets", ["labels", "probabilities", "values"])
@pytest.mark.parametrize("divergence", sorted(pace_torch.settings.DIVERGENCES))
def test_every_loss(divergence, targets):
    if targets == "values" and "difference" not in divergence:
        pytest.skip("probabilities of values mean nothing")
    torch.manual_seed(0)
    logits, classes = random(10, 9), torch.rand(9)
    labels = {"labels": torch.tensor([0, 8, -100, 3, 3]), "probabilities": random(5, 9).softmax(1), "values": random(5, 9)}[targets]
    options = dict(divergence=divergence, both_branches=True, labelled_only=targets == "labels")
    if divergence == "kl":
        options.update(temperature=2.0, detach_target=True)
    if targets == "values":
        options["criterion"] = "mean_squared_error"
    else:
        options.update(class_weights=classes, label_smoothing=0.1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        here = logits.to(dtype).double().requires_grad_()
        there = logits.to(DEVICE, dtype).requires_grad_()
        expected = pace_torch.pace_loss(here, labels, 0.5, denominator=torch.tensor(3), **options)
        losses = pace_torch.pace_loss(there, labels.to(DEVICE), 0.5, denominator=torch.tensor(3, device=DEVICE), **options)
        losses.check()
        for name in ("total", "classification", "consistency"):
            close(getattr(losses, name).cpu(), getattr(expected, name), 1e-5)
        expected.total.backward(), losses.total.backward()
        assert error(there.grad.cpu(), here.grad) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows(dtype):
    torch.manual_seed(0)
    x, w, a, b = random(2, 50, 32), random(48, 32), random(4, 32), random(48, 4)
    noise = Noise(z=torch.rand(6, 48), rows=torch.randint(6, (2, 50)), branches=2)
    want = x @ w.T + noise.z[noise.rows].double() * (x @ a.T @ b.T)
    there = Noise(z=noise.z.to(DEVICE), rows=noise.rows.to(DEVICE), branches=2)
    x, w, a, b = (tensor.to(DEVICE, dtype) for tensor in (x, w, a, b))
    y = pace_torch.lora_linear(x, w, None, a.requires_grad_(), b, None, there)
    assert error(y.cpu(), want) <= (1e-5 if dtype == torch.float32 else 3e-2)
    y.sum().backward()


def test_tf32_is_taken_where_pytorch_takes_it(monkeypatch):
    x, w0, lora_a, lora_b = random(64, 256), random(128, 256), random(8, 256), random(128, 8)
    exact = pace_torch.lora_linear(x, w0, None, lora_a, lora_b, None)
    tensors = [t.float().to(DEVICE) for t in (x, w0, lora_a, lora_b)]
    off = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        y = pace_torch.lora_linear(*tensors[:2], None, *tensors[2:], None)
        off[allowed] = error(y.cpu(), exact)
    assert off[False] < 1e-5 < off[True] < 1e-2


def test_a_bias_alone_keeps_no_input():
    """Neither between the passes nor, as a stand-in for x, in the backward pass."""
    adapter = pace_torch.VptAdd(torch.nn.Linear(256, 256), 4).to(DEVICE)
    x = torch.randn(256, 197, 256, device=DEVICE)
    size = x.nbytes
    noise = Noise(pace_torch.keys(0, 0, 1, DEVICE), 0.5, branches=2)
    adapter(x, noise).sum().backward()
    before = torch.cuda.memory_allocated()
    y = adapter(x * 1.0, noise)
    assert torch.cuda.memory_allocated() - before < 1.1 * size
    dy = torch.ones_like(y)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(dy)
    # The workspace has room for the gradient under the noise, which is as large as x here, and for the library.
    assert torch.cuda.max_memory_allocated() - before < 1.6 * size + (33 << 20)


def test_float64_is_named():
    with pytest.raises(PaceError, match="float64"):
        pace_torch.low_rank_weight(random(4, 2).to(DEVICE), random(2, 4).to(DEVICE))


@pytest.mark.parametrize(("make", "image"), [(vit, 16), (swin, 32)], ids=["vit", "swin"])
@pytest.mark.parametrize("adapter", ["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
@pytest.mark.parametrize("variant", ["pace", "fast"])
def test_models_agree_with_the_cpu(make, image, adapter, variant):
    here = perturb(pace_torch.inject(make(drop_path_rate=0.3), adapter, 4, variant=variant, samples=4)).train()
    there = copy.deepcopy(here).float().to(DEVICE)
    x, labels, index = random(4, 3, image, image), torch.tensor([0, 1, 2, 3]), torch.arange(4)
    for _ in range(2):
        expected = here.pace.training_step(here, x, labels, index)
        arguments = x.float().to(DEVICE), labels.to(DEVICE), index.to(DEVICE)
        losses = there.pace.training_step(there, *arguments)
        losses.check()
        close(losses.total.cpu(), expected.total, 1e-4)
    expected.total.backward(), losses.total.backward()
    for a, b in zip(there.parameters(), here.parameters()):
        if b.grad is not None:
            assert (a.grad.cpu() - b.grad).abs().max() <= 1e-3 * b.grad.abs().max().clamp_min(1e-2)


def test_work_is_on_the_current_stream():
    x, w = torch.zeros(4096, 1024, device=DEVICE), torch.eye(1024, device=DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1.0)
        y = pace_torch.noisy_linear(x, w, None, None, None)
    assert not stream.query(), "the operator waited for the device"
    stream.synchronize()
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("variant", ["pace", "fast"])
def test_a_captured_step_is_replayed_with_fresh_noise(variant):
    torch.manual_seed(0)
    eager = pace_torch.inject(vit(drop_path_rate=0.3, dtype=torch.float32), rank=4, variant=variant, samples=4)
    eager = perturb(eager).to(DEVICE).train()
    x, labels = torch.randn(4, 3, 16, 16, device=DEVICE), torch.arange(4, device=DEVICE)
    index = torch.arange(4, device=DEVICE)
    model = copy.deepcopy(eager)
    model.pace.manual_steps = True

    def step():
        losses = model.pace.training_step(model, x, labels, index)
        losses.total.backward()
        return losses.total

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.pace.advance()
        step()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in model.parameters():
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
        with pytest.raises(PaceError, match="CUDA graph"):
            model.pace.advance()
    if variant == "fast":
        model.pace.history.zero_()

    model.pace.step = 0
    seen = []
    for _ in range(3):
        model.pace.advance()
        graph.replay()
        expected = eager.pace.training_step(eager, x, labels, index).total
        close(total, expected, 1e-5)
        seen.append(total.item())
    assert len(set(seen)) == 3


@pytest.mark.parametrize(("variant", "autocast"), [("pace", None), ("fast", None), ("pace", torch.bfloat16)])
def test_a_captured_step_trains_as_any_other(variant, autocast):
    torch.manual_seed(0)
    eager = pace_torch.inject(vit(drop_path_rate=0.3, dtype=torch.float32), rank=4, variant=variant, samples=4)
    eager = perturb(eager).to(DEVICE).train()
    captured = copy.deepcopy(eager)
    batches = [torch.randn(4, 3, 16, 16, device=DEVICE) for _ in range(3)]
    labels = torch.arange(4, device=DEVICE)
    index = torch.arange(4, device=DEVICE) if variant == "fast" else None
    step = pace_torch.CapturedStep(captured, torch.zeros_like(batches[0]), labels, index, autocast=autocast)
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01) for model in (eager, captured)
    ]
    for x in batches:
        optimizers[0].zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast is not None):
            expected = eager.pace.training_step(eager, x, labels, index)
        expected.total.backward()
        losses = step(x, labels, index)
        losses.check()
        close(losses.total, expected.total, 1e-5 if autocast is None else 1e-2)
        close(losses.logits, expected.logits, 1e-4 if autocast is None else 2e-2)
        for optimizer in optimizers:
            optimizer.step()
    assert captured.pace.step == eager.pace.step == 3
    for (name, a), b in zip(captured.named_parameters(), eager.parameters()):
        assert error(a, b) <= (1e-5 if autocast is None else 1e-2), name
    with pytest.raises(PaceError, match=r"`x` is \(2, 3, 16, 16\)"):
        step(batches[0][:2], labels, index)


def test_the_hidden_tensor_of_an_mlp_is_not_kept():
    model = pace_torch.inject(vit(dtype=torch.float32), rank=4).to(DEVICE).train()
    x, labels = torch.randn(64, 3, 16, 16, device=DEVICE), torch.zeros(64, dtype=torch.int64, device=DEVICE)
    held, grads = {}, {}
    for keeps in (True, False):
        for block in model.blocks:
            block.mlp.fc2.__dict__["gelu"] = None if keeps else block.mlp.act
        model.pace.step = 0
        before = torch.cuda.memory_allocated()
        total = model.pace.training_step(model, x, labels).total
        held[keeps] = torch.cuda.memory_allocated() - before
        trained = [p for p in model.parameters() if p.requires_grad]
        grads[keeps] = torch.autograd.grad(total, trained)
    # Of the first block, which has one branch, and the others.
    hidden = 4 * model.blocks[0].mlp.fc1.adapter.base_module.out_features * 64 * model.pos_embed.shape[1]
    assert held[True] - held[False] >= 0.9 * hidden * (2 * len(model.blocks) - 1)
    for a, b in zip(grads[True], grads[False]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_pefts_lora_agrees_with_the_cpu(fused, autocast):
    attach = pytest.importorskip("test_attach", reason="PEFT or transformers is missing")
    here = pace_torch.attach(attach.with_lora(), **attach.SETTINGS).train()
    there = pace_torch.attach(attach.with_lora().float(), **attach.SETTINGS).to(DEVICE).train()
    if not fused:
        for noise in attach.noises(there)[:-1]:
            noise.watched.base_layer.register_forward_hook(lambda *_: None)
    expected = here.pace.training_step(here, attach.texts(), attach.LABELS)
    batch = {name: tensor.to(DEVICE) for name, tensor in attach.texts().items()}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        losses = there.pace.training_step(there, batch, attach.LABELS.to(DEVICE))
    losses.total.backward()
    expected.total.backward()
    for name in ("total", "consistency"):
        close(getattr(losses, name).cpu(), getattr(expected, name), 0.1 if autocast else 1e-4)
    if not autocast:
        for parameter, other in zip(there.parameters(), here.parameters()):
            if other.grad is not None:
                close(parameter.grad.cpu(), other.grad, 1e-3)


def test_layers_of_other_kinds_agree_with_the_cpu():
    for make, settings in ((Pixels, dict(target_modules=r"narrow\.\d")), (Scalings, dict())):
        here = injected(make(), adapter="LoRAadd", **settings)
        there = copy.deepcopy(here).float().to(DEVICE)
        x, labels = here.batch(), torch.arange(2)
        expected = here.pace.training_step(here, x, labels)
        losses = there.pace.training_step(there, x.float().to(DEVICE), labels.to(DEVICE))
        close(losses.total.cpu(), expected.total, 1e-4)
        close(losses.consistency.cpu(), expected.consistency, 1e-4)
