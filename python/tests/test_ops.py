"""Operators against the official formulas: recorded values, the same formulas in plain PyTorch, numerical gradients."""

import official
import pace_torch
import pytest
import torch
from conftest import close, error, golden
from pace_torch import Noise, PaceError, _library, ops
from pace_torch.ops import _layer
from torch.autograd import forward_ad, gradcheck

ADAPTERS = {
    "LoRAmul_VPTadd_Linear": pace_torch.LoraMulVptAdd,
    "LoRAadd_Linear": pace_torch.LoraAdd,
    "VPTadd_Linear": pace_torch.VptAdd,
    "HeadLinear": pace_torch.Head,
}


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def adapter_of(case, dtype):
    kind, rank = ADAPTERS[case.settings["adapter"]], int(case.settings["rank"])
    n, k = case["base_weight"].shape
    base = torch.nn.Linear(k, n, bias=case.get("base_bias") is not None, dtype=dtype)
    adapter = kind(base, rank) if rank else kind(base)
    names = {"base_weight": "base_module.weight", "base_bias": "base_module.bias"}
    values = {names.get(name, name): t for name, t in case.tensors.items() if name.startswith(("base_", "delta_"))}
    adapter.load_state_dict(values)
    return adapter


@golden("lora_*", "vpt_*", "head_*")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_recorded_adapters(case, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    adapter = adapter_of(case, dtype)
    per_token = case.settings["noise_shape"] == "BTC"
    z = case.get("noise_z")
    if z is not None and not per_token:
        z = z.flatten(1)
    noise = Noise(z=z, per_token=per_token, branches=2)
    x = case["x"].to(dtype).requires_grad_()
    y = adapter(x, noise)
    close(y, case["y"], tolerance)
    y.backward(case["dy"].to(dtype))
    close(x.grad, case["dx"], tolerance)
    for name, gradient in case.under("grad_").items():
        parameter = adapter.get_parameter(name.replace("base_", "base_module."))
        close(parameter.grad, gradient, tolerance)
    close(adapter(x), case["y_eval"], tolerance)
    weight, bias = adapter.merged()
    close(torch.nn.functional.linear(x, weight, bias), case["y_eval"], tolerance)


@golden("loss_*")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_recorded_losses(case, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    logits = case["logits"].to(dtype).requires_grad_()
    labels, lambda_ = case["labels"], float(case.settings["lambda_"])
    table = {}
    if case.settings["mode"] == "fast":
        table = {"history": case["history_before"].to(dtype), "index": case["index"]}
    elif case.settings["mode"] == "lazy" and len(logits) != len(labels):
        labels = labels[: len(labels) // 2]
    losses = pace_torch.pace_loss(logits, labels, lambda_, **table)
    losses.check()
    close(losses.total, case["total_loss"][0], tolerance)
    close(losses.classification, case["cls_loss"][0], tolerance)
    if case.get("pace_loss") is not None:
        close(losses.consistency, case["pace_loss"][0], tolerance)
    else:
        assert losses.consistency == 0
    (3 * losses.total).backward()
    close(logits.grad, 3 * case["dlogits"], tolerance)
    assert not losses.classification.requires_grad and not losses.consistency.requires_grad
    if table:
        close(table["history"], case["history_after"], tolerance)


@golden("drop_path*")
def test_recorded_drop_path(case):
    x = case["x"].clone().requires_grad_()
    y = pace_torch.drop_path(x, None, float(case.settings["drop_prob"]), mask=case["mask"], branches=2)
    close(y, case["y"])
    y.backward(case["dy"])
    close(x.grad, case["dx"])


SHAPES = [(4, 24), (4, 5, 24), (2, 3, 4, 24)]


def pair(kind, n=20, k=24, rank=4, bias=True, dtype=torch.float64):
    """One of our adapters, and the same in plain PyTorch."""
    base = torch.nn.Linear(k, n, bias=bias, dtype=torch.float64)
    theirs = {"LoraMulVptAdd": official.LoraMulVptAdd, "LoraAdd": official.LoraAdd, "VptAdd": official.VptAdd}
    ours = getattr(pace_torch, kind)
    if kind == "Head":
        ours, theirs = ours(base), official.NoisyHead(torch.nn.Linear(k, n, bias=bias, dtype=torch.float64))
    else:
        ours, theirs = ours(base, rank), theirs[kind](torch.nn.Linear(k, n, bias=bias, dtype=torch.float64), rank)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        b.requires_grad_(a.requires_grad)
    return ours.to(dtype), theirs.to(dtype)


def run(adapter, x, dy, noise):
    """y, dx and the gradients of the parameters."""
    x = x.clone().requires_grad_()
    y = adapter(x, noise) if isinstance(adapter, pace_torch.Adapter) else noise_of(adapter, noise)(x)
    y.backward(dy.expand_as(y))
    grads = {name: p.grad for name, p in adapter.named_parameters() if p.requires_grad}
    for parameter in adapter.parameters():
        parameter.grad = None
    return {"y": y.detach(), "dx": x.grad, **grads}


def noise_of(adapter, noise):
    module = official.Noise(adapter, 1.0, "BTC" if noise.per_token else "BC")
    module.z = noise.z.to(adapter.base_module.weight.dtype)
    return module


@pytest.mark.parametrize("kind", ["LoraMulVptAdd", "LoraAdd", "VptAdd", "Head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["BC", "BTC"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_generated_noise_in_the_official_formulas(kind, shape, per_token, bias):
    ours, theirs = pair(kind, bias=bias)
    x, dy = random(*shape), random(*shape[:-1], 20)
    tokens = x[0].numel() // 24
    noise = Noise(pace_torch.keys(1, 2, 4)[3:], 0.7, per_token, 5, 2)
    z = pace_torch.noise(noise, shape[0] // 2, 20, tokens).double()
    z = z.view(dy.shape) if per_token else z
    got, expected = run(ours, x, dy, noise), run(theirs, x, dy, Noise(z=z, per_token=per_token))
    assert got.keys() == expected.keys()
    for name in got:
        close(got[name], expected[name])
    # The same in single precision.
    got = run(ours.float(), x.float(), dy.float(), noise)
    for name in got:
        assert got[name].dtype == torch.float32
        close(got[name], expected[name], 1e-5)


@pytest.mark.parametrize("kind", ["LoraMulVptAdd", "LoraAdd", "VptAdd", "Head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("tokens", [17, 40], ids=["few tokens", "enough tokens to fold"])
def test_16_bits_lose_no_more_than_the_unfused_formulas(kind, dtype, tokens):
    ours, theirs = pair(kind, n=96, k=64, rank=10, dtype=dtype)
    x, dy = random(4, tokens, 64, dtype=dtype), random(4, tokens, 96, dtype=dtype)
    # A z that 16 bits hold exactly, so that only the arithmetic differs.
    z = random(4, 96, dtype=dtype)
    got = run(ours, x, dy, Noise(z=z.float(), branches=2))
    unfused = run(theirs, x, dy, Noise(z=z))
    exact = run(theirs.double(), x.double(), dy.double(), Noise(z=z.double()))
    for name in exact:
        assert got[name].dtype == dtype
        ours_off, unfused_off = error(got[name], exact[name]), error(unfused[name], exact[name])
        assert ours_off <= 2 * unfused_off, f"{name}: off by {ours_off:.2e}, unfused {unfused_off:.2e}"


@pytest.mark.parametrize("exact", [False, True])
def test_both_passes_are_exact_or_neither(exact, flags):
    x, w0, delta = random(4, 17, 24).requires_grad_(), random(20, 24), random(20, 24).requires_grad_()
    lora = random(4, 24).requires_grad_(), random(20, 4).requires_grad_()
    noise = Noise(pace_torch.keys(1, 2, 1), 0.7, branches=2)
    layers = [
        pace_torch.noisy_linear(x, w0, None, delta, None, noise, exact=exact),
        pace_torch.lora_mul_linear(x, w0, None, *lora, None, noise, exact=exact),
        pace_torch.LoraMulVptAdd(torch.nn.Linear(24, 20, dtype=torch.float64), 4, exact=exact)(x, noise),
    ]
    sum(y.sum() for y in layers).backward()
    assert flags == [_library.EXACT if exact else 0] * 6


def test_shared_input_is_the_doubled_one():
    x, w0, w, b = random(3, 4, 6), random(5, 6), random(5, 6), random(5)
    lora_a, lora_b = random(2, 6), random(5, 2)
    noise = Noise(pace_torch.keys(1, 0, 1), 0.6, branches=2)
    for call, parameters in (
        (lambda x, *p, **k: pace_torch.noisy_linear(x, w0, b, *p, noise, **k), (w, b.clone())),
        (lambda x, *p, **k: pace_torch.lora_mul_linear(x, w0, b, *p, noise, scale=0.5, **k), (lora_a, lora_b, b.clone())),
        (lambda x, *p, **k: pace_torch.lora_linear(x, w0, b, *p, noise, scale=0.5, **k), (lora_a, lora_b, b.clone())),
    ):
        results = []
        for shared in (True, False):
            inputs = [t.clone().requires_grad_() for t in (x, *parameters)]
            y = call(inputs[0] if shared else torch.cat([inputs[0]] * 2), *inputs[1:], shared_input=shared)
            results.append((y, torch.autograd.grad(y.square().sum(), inputs)))
        close(results[0][0], results[1][0])
        for ours, expected in zip(results[0][1], results[1][1]):
            close(ours, expected)


def test_scale_is_a_factor_on_b_a():
    x, w0, a, b = random(2, 4, 6), random(5, 6), random(2, 6), random(5, 2)
    close(pace_torch.low_rank_weight(a, b, scale=0.5), 0.5 * b @ a)
    close(pace_torch.low_rank_weight(a, b, w0, scale=0.5), w0 * (0.5 * b @ a))
    linear = torch.nn.functional.linear
    close(pace_torch.lora_linear(x, w0, None, a, b, None, scale=2.0), linear(x, w0 + 2 * b @ a))
    close(pace_torch.lora_mul_linear(x, w0, None, a, b, None, scale=2.0), linear(x, w0 * (1 + 2 * b @ a)))


def leaf(*shape):
    return random(*shape).requires_grad_()


KEY = pace_torch.keys(3, 1, 1)
SOURCES = {
    "generated": Noise(KEY, 0.8, branches=2),
    "per-token": Noise(KEY, 0.8, per_token=True, branches=2),
    "off": Noise(branches=2),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("op", ["noisy_linear", "lora_mul_linear", "lora_linear"])
def test_numerical_gradients_of_layers(op, source):
    w0, b0 = random(4, 5), random(4)
    factors = (leaf(4, 5),) if op == "noisy_linear" else (leaf(2, 5), leaf(4, 2))

    def layer(x, bias, *factors):
        return getattr(pace_torch, op)(x, w0, b0, *factors, bias, source)

    assert gradcheck(layer, (leaf(4, 3, 5), leaf(4), *factors))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_numerical_gradients_with_a_prompt(source):
    w0, b0 = random(4, 5), random(4)
    prompt, lora = (leaf(5, 3), leaf(3, 1)), (leaf(2, 5), leaf(4, 2))

    def layer(x, down, up, bias=None, lora_a=None, lora_b=None):
        base_bias = None if bias is None else b0
        return pace_torch.lora_mul_linear(
            x, w0, base_bias, lora_a, lora_b, bias, source, prompt_down=down, prompt_up=up, scale=0.5
        )

    assert gradcheck(layer, (leaf(4, 3, 5), *prompt))
    assert gradcheck(layer, (leaf(4, 3, 5), *prompt, leaf(4)))
    assert gradcheck(layer, (leaf(4, 3, 5), *prompt, leaf(4), *lora))
    # Any of them may be frozen.
    for trained in range(6):
        inputs = [t.detach() for t in (random(4, 3, 5), *prompt, random(4), *lora)]
        inputs[trained].requires_grad_()
        assert gradcheck(layer, inputs)


def test_lora_mul_in_one_operator_is_what_its_parts_are():
    x, w0, b0 = random(4, 3, 5), random(6, 5), random(6)
    trained = [leaf(2, 5), leaf(6, 2), leaf(5, 3), leaf(3, 1), leaf(6)]
    noise = SOURCES["generated"]

    def whole(lora_a, lora_b, down, up, bias):
        return pace_torch.lora_mul_linear(
            x, w0, b0, lora_a, lora_b, bias, noise, prompt_down=down, prompt_up=up, scale=0.5
        )

    def parts(lora_a, lora_b, down, up, bias):
        weight = pace_torch.low_rank_weight(lora_a, lora_b, w0, scale=0.5)
        return pace_torch.noisy_linear(x, w0, b0, weight, pace_torch.prompt_bias(w0, b0, down, up, bias), noise)

    results = []
    for layer in (whole, parts):
        y = layer(*trained)
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for ours, expected in zip(*results):
        close(ours, expected)


def test_numerical_gradients_of_the_others():
    w0, b0 = random(4, 5), random(4)
    noise = SOURCES["generated"]
    assert gradcheck(lambda x, w: pace_torch.noisy_linear(x, None, None, w, None, noise), (leaf(4, 3, 5), leaf(4, 5)))
    assert gradcheck(lambda x, b: pace_torch.noisy_linear(x, w0, b0, None, b, noise), (leaf(4, 3, 5), leaf(4)))
    assert gradcheck(lambda a, b: pace_torch.low_rank_weight(a, b, scale=0.3), (leaf(2, 5), leaf(4, 2)))
    assert gradcheck(lambda a, b: pace_torch.low_rank_weight(a, b, w0), (leaf(2, 5), leaf(4, 2)))
    assert gradcheck(lambda d, u: pace_torch.prompt_bias(w0, None, d, u), (leaf(5, 2), leaf(2, 1)))
    assert gradcheck(lambda d, u, b: pace_torch.prompt_bias(w0, b0, d, u, b), (leaf(5, 2), leaf(2, 1), leaf(4)))
    assert gradcheck(lambda y, a: pace_torch.noisy_epilogue(y, a, noise), (leaf(4, 3, 5), leaf(4, 3, 5)))
    assert gradcheck(lambda x: pace_torch.drop_path(x, KEY, 0.5, branches=2), (leaf(8, 3),))
    assert gradcheck(
        lambda x: pace_torch.drop_path(x, KEY, 0.5, branches=2, first_sample=4, global_batch=12), (leaf(8, 3),)
    )
    labels, index, history = torch.tensor([1, 0, -100]), torch.tensor([2, 0, 5]), random(6, 4)
    assert gradcheck(lambda l: pace_torch.pace_loss(l, labels, 0.3, label_smoothing=0.1).total, (leaf(6, 4),))
    assert gradcheck(lambda l: pace_torch.pace_loss(l, labels, 0.3).total, (leaf(3, 4),))
    assert gradcheck(
        lambda l: pace_torch.pace_loss(l, labels, 0.3, history=history.clone(), index=index).total, (leaf(3, 4),)
    )


def test_second_derivatives_are_errors():
    w0, noise = random(4, 5), SOURCES["generated"]
    labels = torch.tensor([1, 0])
    calls = [
        (lambda x: pace_torch.noisy_linear(x, w0, None, leaf(4, 5), None, noise).sum(), leaf(4, 3, 5)),
        (lambda x: pace_torch.lora_mul_linear(x, w0, None, leaf(2, 5), leaf(4, 2), None, noise).sum(), leaf(4, 3, 5)),
        (lambda x: pace_torch.lora_linear(x, w0, None, leaf(2, 5), leaf(4, 2), None, noise).sum(), leaf(4, 3, 5)),
        (lambda lora_a: pace_torch.low_rank_weight(lora_a, leaf(4, 2)).sum(), leaf(2, 5)),
        (lambda down: pace_torch.prompt_bias(w0, None, down, leaf(2, 1)).sum(), leaf(5, 2)),
        (lambda logits: pace_torch.pace_loss(logits, labels).total, leaf(4, 3)),
    ]
    for call, argument in calls:
        (gradient,) = torch.autograd.grad(call(argument), argument, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match="autograd"):
            gradient.square().sum().backward()


def test_outputs_may_be_changed_in_place():
    w0, noise = random(4, 5), SOURCES["generated"]
    for layer in (
        lambda x: pace_torch.noisy_linear(x, w0, None, leaf(4, 5), None, noise),
        lambda x: pace_torch.lora_linear(x, w0, None, leaf(2, 5), leaf(4, 2), None, noise),
    ):
        layer(leaf(4, 3, 5)).add_(1.0).sum().backward()
        with pytest.raises(PaceError, match="base_bias"):
            pace_torch.noisy_linear(leaf(4, 3, 5), None, random(4), leaf(4, 5), None, noise)


def test_frozen_tensors_must_not_ask_for_gradients():
    labels, index = torch.tensor([1, 0]), torch.tensor([2, 0])
    for call, name in (
        (lambda: pace_torch.noisy_linear(random(2, 5), leaf(4, 5), None, None, None), "base_weight"),
        (lambda: pace_torch.drop_path(random(2, 5), None, 0.5, mask=leaf(2)), "mask"),
        (lambda: pace_torch.pace_loss(leaf(2, 5), labels, history=leaf(3, 5), index=index), "history"),
        (lambda: pace_torch.lm_loss(leaf(4, 5), random(6, 5), labels, gram=leaf(5, 5)), "gram"),
    ):
        with pytest.raises(PaceError, match=f"`{name}`"):
            call()


WEIGHT, LORA = random(5, 6), (random(2, 6), random(5, 2))
# Everything that is made of an `x [4, 6]`.
OF_X = {
    "noisy_linear": lambda x: ops.noisy_linear(x, WEIGHT, None, None, None),
    "lora_linear": lambda x: ops.lora_linear(x, WEIGHT, None, *LORA, None, Noise(KEY, 0.5)),
    "lora_mul_linear": lambda x: ops.lora_mul_linear(x, WEIGHT, None, *LORA, None),
    "noisy_epilogue": lambda x: ops.noisy_epilogue(x, x, Noise(KEY, 0.5)),
    "low_rank_weight": lambda x: ops.low_rank_weight(x, WEIGHT[:, :4]),
    "prompt_bias": lambda x: ops.prompt_bias(WEIGHT[:, :4], None, x, WEIGHT[:1].T),
    "drop_path": lambda x: ops.drop_path(x, KEY, 0.5),
    "fp_distance": lambda x: ops.fp_distance(x, x),
    "grad_norm": lambda x: ops.grad_norm([x]),
    "pace_loss": lambda x: pace_torch.pace_loss(x, torch.tensor([1, 0])).total,
    "lm_loss": lambda x: pace_torch.lm_loss(x, WEIGHT, torch.tensor([1, 0])).total,
    "lm_gram": pace_torch.lm_gram,
}


@pytest.mark.filterwarnings("ignore:.*jit.script")
@pytest.mark.parametrize("call", OF_X.values(), ids=OF_X)
def test_forward_mode_differentiation_is_an_error(call):
    """An operator would pass for a constant."""
    x = random(4, 6)
    with pytest.raises(PaceError, match="forward mode"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(PaceError, match="forward mode"):
        torch.func.jacfwd(call)(x)
    for with_gradient in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(with_gradient):
            dual = forward_ad.make_dual(x, x)
            with pytest.raises(PaceError, match="forward mode"):
                call(dual)
            # What does not depend on anything is right.
            assert torch.equal(call(x), call(x.clone()))


@pytest.mark.filterwarnings("ignore:.*jit.script")
def test_forward_mode_in_other_transforms():
    x, call = random(4, 6), OF_X["lora_linear"]
    for function in (torch.compile(call, backend="aot_eager"), torch.vmap(call)):
        with pytest.raises(PaceError, match="forward mode"):
            torch.func.jvp(function, (x[None],), (x[None],))
    # Constants in it.
    y, tangent = torch.func.jvp(lambda v: v * torch.vmap(call)(x[None]).sum(), (x,), (x,))
    close(tangent, x * call(x).sum())
    # A gradient with a tangent, of a forward pass without.
    y = call(leaf := x.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(PaceError, match="forward mode"):
        torch.autograd.grad(y, leaf, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_layouts_other_than_contiguous():
    x, w0 = random(5, 3, 4), random(5, 4)
    lora_a, lora_b, noise = random(5, 2), random(4, 2), SOURCES["generated"]
    strided = x.permute(2, 1, 0), w0.T, lora_a.T, lora_b
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    results = []
    for copy in (False, True):
        inputs = [t.contiguous() if copy else t for t in strided]
        inputs = [t.detach().requires_grad_(i != 1) for i, t in enumerate(inputs)]
        y = pace_torch.lora_linear(inputs[0], inputs[1], None, *inputs[2:], None, noise)
        # The gradient that comes back is expanded from one element.
        results.append((y, torch.autograd.grad(y.sum(), [inputs[0], *inputs[2:]])))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_numbers_that_are_stored_with_the_other_sign():
    """Of one element, so that they are contiguous."""
    x = torch.tensor([[1 + 2j]]).conj().imag
    assert x.is_neg() and x.is_contiguous()
    one = torch.ones(1, 1)
    assert ops.noisy_linear(x, one, None, None, None) == -2
    assert ops.noisy_linear(one, x, None, None, None, Noise(z=x.detach())) == -2
    assert ops.fp_distance(x, one) == 9
    close(ops.grad_norm([x, one]), torch.tensor(5.0).sqrt(), 1e-6)
    history = torch.tensor([[1 + 2j]]).conj().imag
    with pytest.raises(PaceError, match="`history`"):
        pace_torch.pace_loss(one, torch.tensor([0]), history=history, index=torch.tensor([0]))


def test_keys_that_are_copied_on_the_way():
    """What is kept for the backward pass may come back as a copy, and a forward pass that runs again may make its key again."""
    x, weight, lora = random(4, 6), random(5, 6), (leaf(2, 6), leaf(5, 2))
    layers = (
        lambda key, x: ops.lora_linear(x, weight, None, *lora, None, Noise(key, 0.5)),
        lambda key, x: ops.noisy_epilogue(x, x @ lora[0].T @ lora[1].T @ weight, Noise(key, 0.5)),
        lambda key, x: ops.drop_path(x @ lora[0].T @ lora[1].T, key, 0.5),
    )

    def checkpointed(layer, make):
        return torch.utils.checkpoint.checkpoint(lambda x: layer(make(), x), x.clone().requires_grad_(), use_reentrant=False)

    def copied(layer, key):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            return layer(key, x)

    for layer in layers:
        want = torch.autograd.grad(layer(pace_torch.keys(1, 2, 1), x).square().sum(), lora)
        for y in (copied(layer, pace_torch.keys(1, 2, 1)), checkpointed(layer, lambda: pace_torch.keys(1, 2, 1))):
            for got, expected in zip(torch.autograd.grad(y.square().sum(), lora), want):
                assert torch.equal(got, expected)
        # Other noise in the meantime, in another tensor and in the same one.
        steps = iter((2, 3))
        y = checkpointed(layer, lambda: pace_torch.keys(1, next(steps), 1))
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            y.sum().backward()
        for run in (lambda key: copied(layer, key), lambda key: checkpointed(layer, lambda: key)):
            key = pace_torch.keys(1, 2, 1)
            y = run(key)
            key.add_(1)
            with pytest.raises(RuntimeError, match="gradient checkpointing"):
                y.sum().backward()


def test_whose_hooks_make_again_what_they_do_not_keep():
    """By which a backward pass on CUDA knows whether it may have met other noise."""
    seen = []

    def layer(x):
        seen.append(_layer._is_checkpointed())
        return x * x

    layer(leaf(2))
    torch.utils.checkpoint.checkpoint(layer, leaf(2), use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        layer(leaf(2))
    assert seen == [False, True, False]


def test_noise_is_the_specified_one():
    # docs/noise.md, section 7.
    bits = pace_torch.noise(Noise(pace_torch.keys(0, 0, 1), 1.0, branches=2), 2, 5).view(torch.int32)
    assert bits[0].tolist() == [0x3F7565B0, 0x3FB9F459, 0x3FFD5268, 0x3E8BEFA8, 0x3F457B79]
    assert (bits[2, 0], bits[1, 0]) == (0x3D8B23A0, 0x3FE4F36F)
    bits = pace_torch.noise(Noise(pace_torch.keys(0, 0, 1), 1.0, per_token=True), 1, 1, 2).view(torch.int32)
    assert bits.flatten().tolist() == [0x405E6B98, 0x3D0E24B0]
    noise = Noise(pace_torch.keys(1, 2, 4)[3:], 0.5, first_sample=12345, branches=2)
    assert pace_torch.noise(noise, 1, 768).view(torch.int32)[1, 767] == 0x3F8D5DE2


def test_layers_multiply_by_the_noise_bit_for_bit():
    # A head whose adapter feature is 1 shows its z.
    x, w = torch.ones(6, 3, 1), torch.ones(9, 1)
    noise = Noise(pace_torch.keys(5, 6, 2)[1:], 0.9, first_sample=77, branches=2)
    y = pace_torch.noisy_linear(x, None, None, w, None, noise)
    assert torch.equal(y, pace_torch.noise(noise, 3, 9)[:, None].expand(-1, 3, -1))
    per_token = noise._replace(per_token=True)
    y = pace_torch.noisy_linear(x, None, None, w, None, per_token)
    assert torch.equal(y, pace_torch.noise(per_token, 3, 9, 3))
    y = pace_torch.noisy_epilogue(torch.zeros(6, 3, 9), torch.ones(6, 3, 9), noise)
    assert torch.equal(y, pace_torch.noise(noise, 3, 9)[:, None].expand(-1, 3, -1))


def test_noise_does_not_depend_on_the_split_of_the_batch():
    key = pace_torch.keys(5, 6, 1)
    whole = pace_torch.noise(Noise(key, 0.9, branches=2), 8, 5)
    parts = [pace_torch.noise(Noise(key, 0.9, first_sample=first, branches=2), 4, 5) for first in (0, 4)]
    assert torch.equal(whole[:8], torch.cat([part[:4] for part in parts]))
    assert torch.equal(whole[8:], torch.cat([part[4:] for part in parts]))


def test_drop_path():
    key = pace_torch.keys(1, 2, 4)[3:]
    # docs/noise.md, section 7: the mask of samples 0 to 31, as bits.
    kept = pace_torch.drop_path(torch.ones(64, 2), key, 0.5, branches=2) > 0
    assert sum(1 << i for i in range(32) if kept[i, 0]) == 0x81254796
    assert torch.equal(kept[:32], kept[32:])
    # A process's part of the global batch.
    x = random(64, 3)
    whole = pace_torch.drop_path(x, key, 0.5, branches=2)
    part = pace_torch.drop_path(torch.cat([x[8:16], x[40:48]]), key, 0.5, branches=2, first_sample=8, global_batch=32)
    close(part, torch.cat([whole[8:16], whole[40:48]]), 1e-15)


def test_label_smoothing_and_ignored_labels_are_those_of_pytorch():
    logits, labels = random(5, 7), torch.tensor([0, 6, -1, 3, -1])
    losses = pace_torch.pace_loss(logits, labels, label_smoothing=0.2, ignore_index=-1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, ignore_index=-1)
    close(losses.total, expected)
    assert pace_torch.pace_loss(logits, torch.full((5,), -100)).total == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_loss_of_16_bit_logits(dtype):
    logits = random(6, 5, dtype=dtype).requires_grad_()
    labels = torch.tensor([0, 4, 2])
    losses = pace_torch.pace_loss(logits, labels)
    assert losses.total.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    expected = pace_torch.pace_loss(exact, labels)
    close(losses.total, expected.total, 1e-6)
    losses.total.backward(), expected.total.backward()
    close(logits.grad, exact.grad, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_retained_graph_keeps_the_gradient_of_the_loss(scale):
    logits, labels = leaf(6, 4), torch.tensor([1, 0, 3])
    total = scale * pace_torch.pace_loss(logits, labels).total
    expected = torch.autograd.grad(total, logits, retain_graph=True)[0].clone()
    for last in (False, True):
        found = torch.autograd.grad(total, logits, retain_graph=not last)[0]
        assert torch.equal(found, expected)
        found.zero_()


def test_autograd_sees_that_a_history_was_overwritten():
    logits, labels, index = random(3, 4), torch.tensor([1, 0, 3]), torch.arange(3)
    history = torch.zeros(5, 4, dtype=torch.float64)
    needs_history = (leaf(5, 4) * history).sum()
    pace_torch.pace_loss(logits, labels, history=history, index=index)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_history.backward()


def test_a_loss_scale_saves_the_small_gradients_of_float16():
    # A confident prediction: the gradients to the other logits are below float16's normal numbers, scaled they are not.
    logits = torch.tensor([[14.0, 0.0, 1.0]], dtype=torch.float16, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    for leaf in (logits, exact):
        (4096 * pace_torch.pace_loss(leaf, torch.tensor([0])).total).backward()
    assert ((logits.grad.double() - exact.grad) / exact.grad).abs().max() < 2.0**-10


def test_norms():
    a, b = random(3, 4), random(7)
    close(pace_torch.grad_norm([a, b]), torch.cat([a.flatten(), b]).norm())
    close(pace_torch.grad_norm([a.bfloat16()]), a.bfloat16().double().norm(), 1e-6)
    other = random(3, 4)
    close(pace_torch.fp_distance(a, other), (a - other).square().sum(1).mean())


@pytest.mark.parametrize("op", ["noisy_linear", "lora_mul_linear", "lora_linear", "prompt_bias", "low_rank_weight",
                                "noisy_epilogue", "drop_path", "loss_total"])
def test_operators_keep_what_pytorch_asks_of_them(op):
    """Schema, fake tensors and ahead-of-time tracing, forward and backward, agree with the operator."""
    w0, b0, noise = random(4, 5), random(4), (KEY, None, 0.8, False, 0, 2)
    layer = (KEY, None, 0.8, False, 0, 2, False, 1.0, True)
    lora, prompt = (leaf(2, 5), leaf(4, 2)), (leaf(5, 3), leaf(3, 1))
    arguments = {
        "noisy_linear": (leaf(4, 3, 5), w0, b0, leaf(4, 5), leaf(4), *layer),
        "lora_mul_linear": (leaf(4, 3, 5), w0, b0, *lora, *prompt, leaf(4), *layer),
        "lora_linear": (leaf(4, 3, 5), w0, b0, *lora, leaf(4), *layer),
        "prompt_bias": (w0, b0, leaf(5, 2), leaf(2, 1), leaf(4)),
        "low_rank_weight": (leaf(2, 5), leaf(4, 2), w0, 1.0),
        "noisy_epilogue": (leaf(4, 3, 5), leaf(4, 3, 5), *noise),
        "drop_path": (leaf(4, 3), KEY, None, 0.5, 0, 2, 2),
        "loss_total": (random(3), leaf(4, 3), random(4, 3)),
    }[op]
    torch.library.opcheck(getattr(torch.ops.pace, op).default, arguments)
