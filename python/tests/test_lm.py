"""The head of a language model with its loss, some rows at a time, against all logits at once."""

import concurrent.futures
from functools import partial

import pace_torch
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from pace_torch import PaceError, lm_gram, lm_loss
from pace_torch.ops._arguments import allows_tf32
from pace_torch.ops.ieee_matmul import _CUDA, ieee_matmul
from test_losses import DIVERGENCES, divergence_of, options_of


@pytest.fixture(params=["native", "chunks"])
def way(request, monkeypatch):
    """By the library's operator, or by PyTorch's matmuls as on other devices."""
    calls, run = [], pace_torch.lm.lm_head
    monkeypatch.setattr(pace_torch.lm, "lm_head", lambda *args: calls.append(1) or run(*args))
    if request.param == "chunks":
        monkeypatch.setattr(pace_torch.lm, "takes", lambda tensors: False)
    yield
    assert bool(calls) == (request.param == "native")


B, T, H, V, R, LAMBDA = 2, 5, 4, 11, 3, 0.3
# One of them 0.
WEIGHTS = torch.arange(float(V), dtype=torch.float64) / 4


def make(branches=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (branches * B, T, H), (V, H), (V,)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 2] = labels[1, 4] = -100
    return hidden, weight, labels, bias


def make_lora(dtype=torch.float64):
    """A and B of a LoRA on the head."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in ((R, H), (V, R)))


def reference(hidden, weight, labels, bias, options, causal=True, scale=1.0, cap=None, both=False, smoothing=0.0, weights=None):
    """Sums of criterion and divergence of the tokens that have labels, and the weight and the number of these."""
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    taken = labels != -100
    rows, y = logits.unflatten(0, (-1, B))[:, :][:, taken], labels[taken]
    cross = partial(F.cross_entropy, reduction="sum", label_smoothing=smoothing, weight=weights)
    classification = (cross(rows[0], y) + cross(rows[1], y)) / 2 if both else cross(rows[0], y)
    consistency = divergence_of(rows[0], rows[1], **options).sum() if len(rows) == 2 else torch.zeros(())
    return classification, consistency, (len(y) if weights is None else weights[y].sum(), len(y))


def check(losses, reference, leaves, denominator=None, tolerance=1e-11):
    classification, consistency, counts = reference
    of_criterion, of_consistency = counts if denominator is None else (denominator, denominator)
    close(losses.classification, classification / of_criterion, tolerance)
    if consistency.requires_grad:
        close(losses.consistency, consistency / of_consistency, tolerance)
    total = classification / of_criterion + LAMBDA * consistency / of_consistency
    close(losses.total, total, tolerance)
    assert not losses.classification.requires_grad and losses.logits.shape == (0, V)
    for got, want in zip(*(torch.autograd.grad(3 * loss, leaves, retain_graph=True) for loss in (losses.total, total))):
        close(got, want, tolerance)


@pytest.mark.parametrize("chunk_rows", [None, 3, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name, chunk_rows, way):
    hidden, weight, labels, bias = make()
    options = options_of(name)
    run = partial(lm_loss, hidden, weight, labels, LAMBDA, bias=bias, chunk_rows=chunk_rows, **options)
    want = partial(reference, hidden, weight, labels, bias, options)
    leaves = hidden, weight, bias
    check(run(causal=True), want(), leaves)
    check(run(), want(causal=False), leaves)
    check(run(both_branches=True, label_smoothing=0.1), want(causal=False, both=True, smoothing=0.1), leaves)
    check(run(logit_scale=-0.5), want(causal=False, scale=-0.5), leaves)
    check(run(logit_scale=2.0, soft_cap=3.0), want(causal=False, scale=2.0, cap=3.0), leaves)
    for denominator in (7, torch.tensor(7)):
        check(run(denominator=denominator), want(causal=False), leaves, 7)
    flat = lm_loss(hidden.flatten(0, 1), weight, labels.flatten(), LAMBDA, bias=bias, chunk_rows=chunk_rows, **options)
    check(flat, want(causal=False), leaves)
    # Ignored tokens, and only they, have no gradient.
    gradient = torch.autograd.grad(run(causal=True).total, hidden)[0].abs().sum(-1)
    ignored = F.pad(labels[:, 1:], (0, 1), value=-100) == -100
    assert not gradient[ignored.repeat(2, 1)].any() and (gradient[:B][~ignored] > 0).all()


def test_a_frozen_head(way):
    hidden, weight, labels, bias = make()
    weight, bias = weight.detach(), bias.detach()
    for name in ("squared_difference", "mean_squared_difference", "centered_squared_difference"):
        losses = lm_loss(hidden, weight, labels, LAMBDA, bias=bias, gram=lm_gram(weight), divergence=name)
        check(losses, reference(hidden, weight, labels, bias, {"divergence": name}, causal=False), [hidden])
    for options in ({}, {"divergence": "kl"}):
        losses = lm_loss(hidden, weight, labels, LAMBDA, **options)
        check(losses, reference(hidden, weight, labels, None, {"divergence": "squared_difference", **options}, causal=False), [hidden])
    with torch.no_grad():
        assert lm_loss(hidden, weight, labels, LAMBDA).total.isfinite()


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_class_weights(name, chunk_rows, way):
    hidden, weight, labels, bias = make()
    leaves, options = (hidden, weight, bias), options_of(name)
    # More precise than they have to be, and on the CPU: they are brought to the logits.
    run = partial(lm_loss, hidden, weight, labels, LAMBDA, bias=bias, chunk_rows=chunk_rows, class_weights=WEIGHTS, **options)
    want = partial(reference, hidden, weight, labels, bias, options, weights=WEIGHTS)
    check(run(causal=True), want(), leaves)
    check(run(both_branches=True, label_smoothing=0.1), want(causal=False, both=True, smoothing=0.1), leaves)
    check(run(soft_cap=3.0), want(causal=False, cap=3.0), leaves)
    check(run(denominator=7), want(causal=False), leaves, 7)
    # The ignored label is a class, of which no token is.
    one, labels = hidden[:B], torch.where(labels == 3, -100, labels)
    check(lm_loss(one, weight, torch.where(labels == -100, 3, labels), LAMBDA, bias=bias, class_weights=WEIGHTS, ignore_index=3),
          reference(one, weight, labels, bias, {}, causal=False, weights=WEIGHTS), leaves)


def test_classes_of_no_weight(way):
    hidden, weight, labels, _ = make()
    losses = lm_loss(hidden, weight, labels, LAMBDA, class_weights=torch.zeros(V), label_smoothing=0.1)
    assert losses.classification == 0 and losses.total == LAMBDA * losses.consistency > 0
    want = lm_loss(hidden, weight, labels, LAMBDA)
    close(losses.consistency, want.consistency, 1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_lora_on_the_head(name, chunk_rows, way):
    hidden, weight, labels, bias = make()
    lora_a, lora_b = make_lora()
    options, scale = options_of(name), 0.5
    for trains in (True, False):
        weight, bias = weight.detach().requires_grad_(trains), bias.detach().requires_grad_(trains)
        leaves = (hidden, weight, bias, lora_a, lora_b) if trains else (hidden, lora_a, lora_b)
        run = partial(lm_loss, hidden, weight, labels, LAMBDA, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, chunk_rows=chunk_rows, **options)
        want = partial(reference, hidden, weight + scale * lora_b @ lora_a, labels, bias, options)
        check(run(causal=True), want(), leaves)
        check(run(both_branches=True, label_smoothing=0.1, class_weights=WEIGHTS), want(causal=False, both=True, smoothing=0.1, weights=WEIGHTS), leaves)
        check(run(logit_scale=-0.5, denominator=7), want(causal=False, scale=-0.5), leaves, 7)
        check(run(logit_scale=2.0, soft_cap=3.0), want(causal=False, scale=2.0, cap=3.0), leaves)
        if not trains:
            check(run(gram=lm_gram(weight)), want(causal=False), leaves)
        # One of its factors alone.
        for factor, others in ((lora_a, dict(lora_b=lora_b.detach())), (lora_b, dict(lora_a=lora_a.detach()))):
            check(run(**others), want(causal=False), (factor,))
    one = lm_loss(hidden[:B], weight, labels, LAMBDA, lora_a=lora_a, lora_b=lora_b, **options)
    check(one, reference(hidden[:B], weight + lora_b @ lora_a, labels, None, {}, causal=False), (hidden, lora_a, lora_b))


def test_one_branch_and_no_labels(way):
    hidden, weight, labels, bias = make(1)
    losses = lm_loss(hidden, weight, labels, LAMBDA, bias=bias, causal=True)
    check(losses, reference(hidden, weight, labels, bias, {}), (hidden, weight, bias))
    assert losses.consistency == 0
    hidden, weight, labels, bias = make()
    for divergence in ("squared_difference", "symmetric_kl"):
        losses = lm_loss(hidden, weight, torch.full_like(labels, -100), LAMBDA, divergence=divergence)
        assert losses.total == losses.classification == losses.consistency == 0
        assert not torch.autograd.grad(losses.total, hidden)[0].any()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["squared_difference", "symmetric_kl"])
def test_close_branches_in_16_bits(name, lora):
    """The difference of the branches keeps its digits where logits in 16 bits have lost them."""
    hidden, weight, labels, _ = make()
    one = hidden.detach()[:B].bfloat16()
    noise = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    two = (one.double() * (1 + 0.01 * noise)).bfloat16()
    hidden, weight, bias = torch.cat([one, two]), weight.detach().bfloat16(), torch.full((V,), 64.0).bfloat16()
    lora_a, lora_b = (factor.detach() for factor in make_lora(torch.bfloat16)) if lora else (None, None)
    whole = weight.double() + (lora_b.double() @ lora_a.double() if lora else 0)
    _, consistency, (_, count) = reference(hidden.double(), whole, labels, bias.double(), {"divergence": name}, causal=False)
    losses = lm_loss(hidden, weight, labels, LAMBDA, bias=bias, lora_a=lora_a, lora_b=lora_b, divergence=name)
    close(losses.consistency, consistency / count, 0.1)
    rounded = pace_torch.pace_loss((hidden @ whole.bfloat16().T + bias).flatten(0, 1), labels.flatten(), divergence=name, labelled_only=True)
    assert not 0.5 < rounded.consistency / (consistency / count) < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["squared_difference", "symmetric_kl"])
def test_lora_in_16_bits(name, dtype):
    hidden, weight, labels, bias = make(dtype=dtype)
    lora_a, lora_b = make_lora(dtype)
    weight, leaves = weight.detach(), (hidden, lora_a, lora_b)
    losses = lm_loss(hidden, weight, labels, LAMBDA, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=0.5, divergence=name)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    whole = weight.double() + 0.5 * exact[2] @ exact[1]
    classification, consistency, (_, count) = reference(exact[0], whole, labels, bias.double(), {"divergence": name}, causal=False)
    total = (classification + LAMBDA * consistency) / count
    close(losses.total, total, 2e-2)
    for got, want in zip(torch.autograd.grad(losses.total, leaves), torch.autograd.grad(total, exact)):
        assert got.dtype == dtype
        close(got, want, 2e-2)


@pytest.mark.parametrize("name", ["squared_difference", "symmetric_kl"])
def test_compiled(name):
    hidden, weight, labels, bias = make()
    leaves = hidden, weight, bias, *make_lora()
    run = lambda hidden, weight, bias, lora_a, lora_b: lm_loss(
        hidden, weight, labels, LAMBDA, bias=bias, lora_a=lora_a, lora_b=lora_b, causal=True, divergence=name, chunk_rows=4, class_weights=WEIGHTS).total
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(compiled(*leaves), run(*leaves), 1e-12)
    grads = [torch.autograd.grad(function(*leaves), leaves) for function in (compiled, run)]
    for got, want in zip(*grads):
        close(got, want, 1e-12)


def test_float32(way):
    hidden, weight, labels, bias = make()
    leaves = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    losses = lm_loss(leaves[0], leaves[1], labels, LAMBDA, bias=leaves[2], divergence="symmetric_kl")
    check(losses, reference(*(leaf.double() for leaf in leaves[:2]), labels, leaves[2].double(), {"divergence": "symmetric_kl"}, causal=False),
          leaves, tolerance=1e-5)


def test_wrong_arguments_are_named():
    hidden, weight, labels, bias = (tensor.detach() for tensor in make())
    run = partial(lm_loss, hidden, weight, labels)
    lora_a, lora_b = (factor.detach() for factor in make_lora())
    for call, message in (
        (lambda: run(criterion="mean_squared_error"), "`criterion` is not for `lm_loss`"),
        (lambda: run(class_weights=torch.ones(V + 1)), r"`class_weights` is \(12,\), expected \[11\]"),
        (lambda: run(class_weights=torch.ones(V).long()), "`class_weights` is .*int64"),
        (lambda: run(class_weights=-WEIGHTS), "class_weights.*not negative"),
        (lambda: run(lora_a=lora_a), "`lora_a` is given without `lora_b`"),
        (lambda: run(lora_b=lora_b), "`lora_b` is given without `lora_a`"),
        (lambda: run(scale=0.5), "`scale` is 0.5, and there is no LoRA"),
        (lambda: run(lora_a=lora_a, lora_b=lora_b, scale=0), "`scale` is 0"),
        (lambda: run(lora_a=lora_a, lora_b=lora_b, scale=float("nan")), "`scale` is nan"),
        (lambda: run(lora_a=lora_a[1:], lora_b=lora_b), r"`lora_b` is \(11, 3\), expected \[11, 2\]"),
        (lambda: run(lora_a=lora_a[:, 1:], lora_b=lora_b), r"`lora_a` is \(3, 3\), expected \[r, 4\]"),
        (lambda: run(lora_a=lora_a[:0], lora_b=lora_b[:, :0]), r"`lora_a` is \(0, 4\), expected \[r, 4\]"),
        (lambda: run(lora_a=lora_a, lora_b=lora_b.float()), "`lora_b` is of torch.float32"),
        (lambda: run(lora_a=None, lora_b=[lora_b]), "`lora_b` is list"),
        (lambda: run(diverence="kl"), "`diverence` is no option"),
        (lambda: run(temperature=2.0), "`temperature`"),
        (lambda: run(logit_scale=0), "`logit_scale` is 0"),
        (lambda: run(soft_cap=0), "`soft_cap` is 0"),
        (lambda: run(chunk_rows=0), "`chunk_rows`"),
        (lambda: run(causal=1.5), "`causal`"),
        (lambda: run(denominator=0), "`denominator`"),
        (lambda: run(bias=bias[1:]), "`bias`"),
        (lambda: run(bias=bias.float()), "`bias` is of torch.float32"),
        (lambda: run(gram=torch.ones(H, H)), "`gram` is .*float32"),
        (lambda: run(gram=lm_gram(weight).to_sparse()), "`gram` is .*sparse"),
        (lambda: run(class_weights=WEIGHTS.to_sparse()), "`class_weights` is .*sparse"),
        (lambda: run(class_weights=WEIGHTS.to("meta")), "`class_weights` is .*meta"),
        (lambda: run(denominator=torch.tensor(2.0, device="meta")), "`denominator` is .*meta"),
        (lambda: lm_loss(hidden.to_sparse(), weight, labels), "`hidden` is .*sparse"),
        (lambda: lm_loss(hidden, weight, labels.to_sparse()), "`labels` is .*sparse"),
        (lambda: run(bias=bias.to_sparse()), "`bias` is .*sparse"),
        (lambda: run(lambda_=10**400), "`lambda_` is"),
        (lambda: run(logit_scale=10**400), "`logit_scale` is"),
        (lambda: run(causal=torch.tensor([True, False])), "`causal` is"),
        (lambda: lm_gram("x"), "`weight` is str"),
        (lambda: lm_gram(weight[0]), "`weight` .*dimensions"),
        (lambda: lm_gram(weight[:, :0]), r"`weight` .*\(11, 0\)"),
        (lambda: lm_gram(weight.int()), "`weight` is .*int32"),
        (lambda: lm_gram(weight + 0j), "`weight` is .*complex"),
        (lambda: lm_gram(weight.to_sparse()), "`weight` is .*sparse"),
        (lambda: lm_gram(weight.to("meta")), "`weight` is .*meta"),
        (lambda: lm_loss(hidden, weight.clone().requires_grad_(), labels, gram=lm_gram(weight)), "`gram` is given for a `weight` that is trained"),
        (lambda: lm_loss(hidden[:3], weight, labels), "`hidden` is"),
        (lambda: lm_loss(hidden, weight[:, 1:], labels), "`hidden` is"),
        (lambda: lm_loss(hidden, weight[0], labels), "`weight` is"),
        (lambda: lm_loss(hidden, weight, labels.int()), "`labels` is"),
        (lambda: lm_loss(hidden.flatten(0, 1), weight, labels.flatten(), causal=True), "`causal` is True"),
        (lambda: lm_loss(hidden, weight, labels.masked_fill(labels == labels[1, 1], V)), r"`labels\[\d+\]` is 11, expected 0 to 10"),
        (lambda: lm_loss(None, weight, labels), "`hidden` is NoneType"),
    ):
        with pytest.raises(PaceError, match=message):
            call()


def test_a_second_derivative_is_an_error(way):
    """Not a zero: a penalty of the gradient would be none."""
    hidden, weight, labels, _ = make()
    losses = lm_loss(hidden, weight, labels, LAMBDA)
    with pytest.raises(PaceError, match="differentiable once"):
        torch.autograd.grad(losses.total, hidden, create_graph=True)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_does_not_round_the_gram_matrix(trained):
    generator = torch.Generator().manual_seed(0)
    # Nearly all of the weight is in one direction, across which the branches differ.
    weight = 0.02 * torch.randn(300, 16, generator=generator) + torch.randn(300, 1, generator=generator) @ torch.ones(1, 16)
    hidden = torch.randn(1, 8, 16, generator=generator)
    step = torch.randn(1, 8, 16, generator=generator).sign().cumsum(2).diff(dim=2, append=torch.zeros(1, 8, 1))
    hidden = torch.cat([hidden, hidden + 0.5 * (step - step.mean(2, keepdim=True))]).bfloat16().requires_grad_()
    weight, labels = weight.bfloat16().requires_grad_(trained), torch.randint(300, (1, 8), generator=generator)
    want = lm_loss(hidden.double(), weight.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = lm_loss(hidden, weight, labels)
    close(got.consistency, want.consistency, 1e-2)


@pytest.mark.parametrize("name", ["squared_difference", "symmetric_kl"])
def test_autocast(name, monkeypatch):
    """Of a head in float32: GEMMs in 16 bits, and gradients in float32."""
    monkeypatch.setattr(pace_torch.lm, "takes", lambda tensors: False)
    hidden, weight, labels, bias = make(dtype=torch.float32)
    lora_a, lora_b = make_lora(torch.float32)
    leaves = hidden, weight, bias, lora_a, lora_b
    run = partial(lm_loss, hidden, weight, labels, LAMBDA, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=0.5, divergence=name)
    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    close(got.total, want.total, 2e-2)
    for gradients in zip(*(torch.autograd.grad(losses.total, leaves) for losses in (got, want))):
        assert gradients[0].dtype == torch.float32
        close(*gradients, 3e-2)


def test_no_gradient_is_made_of_what_asks_for_none(way, monkeypatch):
    hidden, weight, labels, _ = make()
    made, evaluate = [], pace_torch.lm._evaluate
    monkeypatch.setattr(pace_torch.lm, "_evaluate", lambda *args: made.append(evaluate(*args)) or made[-1])
    kernel, gradients = pace_torch.lm.loss_and_gradient, []
    monkeypatch.setattr(pace_torch.lm, "loss_and_gradient", lambda *args: gradients.append(kernel(*args)) or gradients[-1])
    with torch.no_grad():
        plain = lm_loss(hidden, weight, labels, LAMBDA)
    assert all(grad is None for grad in made[0][1]) and not any(gradient.numel() for _, gradient, _ in gradients)
    assert not plain.total.requires_grad
    close(plain.total, lm_loss(hidden, weight, labels, LAMBDA).total, 1e-15)


@pytest.mark.parametrize("options", [
    {}, dict(weight=True), dict(soft_cap=3000.0), dict(both_branches=True), dict(lora=True),
], ids=str)
def test_float16_overflows_no_sooner_than_by_all_logits(options):
    """Sums over tokens are divided before they are rounded, and products with a gradient of any size are of one that is not."""
    options, generator = dict(options), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    one = 10 * draw(64, 32)
    hidden = torch.cat([one, one + 10 * draw(64, 32)]).half().requires_grad_()
    weight = (0.14 * draw(50257, 32)).half().requires_grad_(options.pop("weight", False))
    factors = [factor.half().requires_grad_() for factor in (0.01 * draw(3, 32), 0.1 * draw(50257, 3))] if options.pop("lora", False) else []
    labels, leaves = torch.randint(50257, (64,), generator=generator), [x for x in (hidden, weight, *factors) if x.requires_grad]
    grads = []
    for way in (lambda x: x, lambda x: x.detach().double().requires_grad_()):
        these = [way(leaf) for leaf in leaves]
        x, w, a, b = *these[:1], *(these[1:2] if weight.requires_grad else [weight.to(these[0].dtype)]), *(these[-2:] if factors else [None] * 2)
        grads.append(torch.autograd.grad(lm_loss(x, w, labels, 2.0, lora_a=a, lora_b=b, **options).total, these))
    for got, want in zip(*grads):
        fits = want.abs() < 6e4
        assert fits.double().mean() > 0.5 and got[fits].isfinite().all()
        close(got[fits], want[fits], 3e-3)


def test_float16_keeps_small_gradients():
    """That to a logit of many tokens and classes is nothing in float16, until a loss scale gets to it: all of them together are half of the
    gradient to the hidden states."""
    generator = torch.Generator().manual_seed(0)
    tokens, classes = 2000, 5000
    hidden, weight = (torch.randn(tokens, 8, generator=generator) / 8).half(), (1 + torch.randn(classes, 8, generator=generator) / 8).half()
    labels = torch.randint(classes, (tokens,), generator=generator)
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(1024 * lm_loss(*leaves, labels, chunk_rows=700).total, leaves))
    for got, want in zip(*grads):
        close(got, want, 1e-2)


def rounds():
    """Whether PyTorch's matmuls in float32 may be of fewer bits here."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return allows_tf32(torch.float32) if matmul is None else matmul.fp32_precision != "ieee"


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_the_gram_matrix_is_in_ieee_float32(monkeypatch, precision):
    """Whatever PyTorch's own matmuls may use: rounded to TF32 as to 16 bits it can have negative distances."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("matmul", "__matmul__", "mm", "addmm", "addmm_", "linear", "__rmatmul__"):
                seen.append(rounds())
            return function(*args, **(kwargs or {}))

    def watched(*args):
        with Watch():
            return distance(*args)

    monkeypatch.setattr(pace_torch.lm, "takes", lambda tensors: False)
    distance = pace_torch.lm._distance
    monkeypatch.setattr(pace_torch.lm, "_distance", watched)
    hidden, weight, labels, _ = make(dtype=torch.float32)
    factors = make_lora(torch.float32)
    precision("medium")
    for run in (lambda: lm_loss(hidden, weight, labels, lora_a=factors[0], lora_b=factors[1]),
                lambda: lm_loss(hidden, weight.detach(), labels, gram=lm_gram(weight))):
        seen.clear()
        run()
        assert seen and not any(seen) and rounds()
    with Watch():
        seen.clear()
        lm_gram(weight)
        assert seen == [False] and rounds()
    with pytest.raises(RuntimeError):
        ieee_matmul(torch.ones(2, 3), torch.ones(2, 3))
    assert rounds() and torch.get_float32_matmul_precision() == "medium"
    # Where the processor has matmuls of 16 bits.
    large = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    close(lm_gram(large), large.double().T @ large.double(), 1e-6)
    precision("highest")
    lm_gram(weight)
    assert not rounds()


def test_threads_leave_the_settings_of_pytorch_alone(precision):
    precision("high")
    weight, before = make(dtype=torch.float32)[1].detach(), (rounds(), allows_tf32(torch.float32))
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for _ in range(8):
            list(threads.map(lambda _: [lm_gram(weight) for _ in range(100)], range(3)))
            assert (rounds(), allows_tf32(torch.float32)) == before
    # As of two matmuls on CUDA, the first of which ends first.
    cuda = [_CUDA, _CUDA]
    for within in cuda:
        within.__enter__()
        assert not allows_tf32(torch.float32)
    for within, allowed in zip(cuda, (False, True)):
        within.__exit__(None, None, None)
        assert allows_tf32(torch.float32) == allowed


def test_autocast_does_not_round_a_gram_matrix_by_itself():
    weight = make(dtype=torch.float32)[1]
    with torch.autocast("cpu", torch.bfloat16):
        gram = lm_gram(weight)
    close(gram, weight.double().T @ weight.double(), 1e-6)
