"""Every divergence and criterion against its formula in plain PyTorch, in float64; what has no meaning beside what."""

import dataclasses
import inspect
from functools import partial

import pace_torch
import pytest
import torch
import torch.nn.functional as F
from conftest import close, perturb, vit
from models import batch as tokens_batch
from models import injected
from pace_torch import PaceError, pace_loss
from torch import nn

BATCH, CLASSES, LAMBDA = 5, 7, 0.3
LABELS = torch.tensor([1, -100, 4, 6, 1])
DIVERGENCES = {
    "squared_difference": {},
    "mean_squared_difference": {},
    "centered_squared_difference": {},
    "symmetric_kl": {},
    "kl": {"temperature": 2.0},
    "kl, detached": {"divergence": "kl", "detach_target": True},
    "jensen_shannon": {},
}


def options_of(name):
    return {"divergence": name, **DIVERGENCES[name]}


def kl(a, b):
    """KL(a‖b) of the softmaxes of rows."""
    log_a, log_b = a.log_softmax(1), b.log_softmax(1)
    return (log_a.exp() * (log_a - log_b)).sum(1)


def divergence_of(l0, l1, divergence, temperature=1.0, detach_target=False):
    """Of each sample, by the definition."""
    delta = l0 - l1
    if divergence == "squared_difference":
        return delta.square().sum(1)
    if divergence == "mean_squared_difference":
        return delta.square().mean(1)
    if divergence == "centered_squared_difference":
        return (delta - delta.mean(1, keepdim=True)).square().sum(1)
    if divergence == "symmetric_kl":
        return (kl(l0, l1) + kl(l1, l0)) / 2
    if divergence == "kl":
        l1 = l1.detach() if detach_target else l1
        return temperature**2 * kl(l1 / temperature, l0 / temperature)
    log_p, log_q = l0.log_softmax(1), l1.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, dtype=l0.dtype).log()
    return ((log_p.exp() * (log_p - log_m)).sum(1) + (log_q.exp() * (log_q - log_m)).sum(1)) / 2


def make(rows=2 * BATCH, classes=CLASSES, seed=0):
    return torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def same(losses, logits, classification, consistency, tolerance=1e-12, lambda_=LAMBDA):
    close(losses.classification, classification, tolerance)
    close(losses.consistency, consistency, tolerance)
    total = classification + lambda_ * consistency
    close(losses.total, total, tolerance)
    close(*(torch.autograd.grad(3 * loss, logits, retain_graph=True)[0] for loss in (losses.total, total)), tolerance)


CRITERIA = {
    "labels": lambda l, y, **o: F.cross_entropy(l, y, **o),
    "weights and smoothing": lambda l, y, **o: F.cross_entropy(l, y, weight=WEIGHTS, label_smoothing=0.1, **o),
    "probabilities": lambda l, y, **o: F.cross_entropy(l, y, weight=WEIGHTS, label_smoothing=0.1),
    "values": lambda l, y, **o: F.mse_loss(l, y),
    "a function": lambda l, y, **o: F.multi_margin_loss(l, y.clamp_min(0)),
}
WEIGHTS = torch.rand(CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def criterion_of(name):
    """Labels, and what `pace_loss` is told."""
    generator = torch.Generator().manual_seed(2)
    return {
        "labels": (LABELS, {}),
        "weights and smoothing": (LABELS, dict(class_weights=WEIGHTS, label_smoothing=0.1)),
        "probabilities": (torch.rand(BATCH, CLASSES, dtype=torch.float64, generator=generator).softmax(1),
                          dict(class_weights=WEIGHTS, label_smoothing=0.1)),
        "values": (torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=generator), dict(criterion="mean_squared_error")),
        "a function": (LABELS, dict(criterion=CRITERIA["a function"])),
    }[name]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_formulas_and_gradients(name, criterion, both):
    labels, settings = criterion_of(criterion)
    options = options_of(name)
    if criterion == "values" and "difference" not in name:
        with pytest.raises(PaceError, match="divergence"):
            pace_loss(make(), labels, **settings, **options)
        return
    logits = make()
    losses = pace_loss(logits, labels, LAMBDA, both_branches=both, **settings, **options)
    l0, l1 = logits.split(BATCH)
    want = CRITERIA[criterion](l0, labels)
    want = (want + CRITERIA[criterion](l1, labels)) / 2 if both else want
    each = divergence_of(l0, l1, **options)
    same(losses, logits, want, each.mean())
    assert torch.equal(losses.logits, l0) and not losses.logits.requires_grad
    # Finite differences see the same, but for what is detached.
    if "detached" not in name:
        direction = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        total = lambda logits: pace_loss(logits, labels, LAMBDA, both_branches=both, **settings, **options).total
        h = 1e-4
        moved = [total(logits.detach() + i * h * direction) for i in (-2, -1, 1, 2)]
        slope = (8 * (moved[2] - moved[1]) - (moved[3] - moved[0])) / (12 * h)
        close((torch.autograd.grad(losses.total, logits)[0] * direction).sum(), slope, 1e-7)

    # Of the labelled samples alone, and divided by a number of one's own.
    if labels is LABELS:
        taken = labels != -100
        only = pace_loss(logits, labels, LAMBDA, both_branches=both, labelled_only=True, **settings, **options)
        same(only, logits, want, each[taken].mean())
    if criterion != "a function":
        count = WEIGHTS[labels[labels != -100]].sum() if criterion.startswith("weights") else (4 if labels is LABELS else BATCH)
        for denominator in (8.0, 8, torch.tensor(8), torch.tensor(8.0)):
            losses = pace_loss(logits, labels, LAMBDA, both_branches=both, denominator=denominator, **settings, **options)
            same(losses, logits, want * count / 8, each.sum() / 8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extremes(name):
    """Logits far apart, masked classes, one class, equal branches: finite, and the formula's."""
    options = options_of(name)
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 1])
    far = 1e4 * torch.randn(4, 3, dtype=torch.float64, generator=generator).sign().requires_grad_()
    masked = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    masked[:, 2] = -torch.inf
    for logits in (far, masked):
        leaf = logits.detach().requires_grad_()
        losses = pace_loss(leaf, labels, LAMBDA, **options)
        gradient = torch.autograd.grad(losses.total, leaf)[0]
        assert losses.total.isfinite() and gradient.isfinite().all()
        seen = logits.isfinite().all(0)
        kept = leaf.detach()[:, seen].requires_grad_()
        want = divergence_of(*kept.split(2), **options)
        if logits is masked and name in ("mean_squared_difference", "centered_squared_difference"):
            # The mean is over all classes, also those that are masked in both branches and differ by 0.
            delta = torch.cat([kept[:2] - kept[2:], torch.zeros(2, 1, dtype=torch.float64)], 1)
            want = (delta - (0 if "mean_sq" in name else delta.mean(1, keepdim=True))).square()
            want = want.mean(1) if "mean_sq" in name else want.sum(1)
        total = F.cross_entropy(kept[:2], labels) + LAMBDA * want.mean()
        close(losses.total, total, 1e-10)
        close(gradient[:, seen], torch.autograd.grad(total, kept)[0], 1e-10)
        if name != "centered_squared_difference":
            assert not gradient[:, ~seen].any()
    one = make(4, 1)
    losses = pace_loss(one, torch.tensor([0, 0]), LAMBDA, **options)
    want = divergence_of(*one.split(2), **options).mean()
    assert losses.classification == 0 and losses.consistency == pytest.approx(want.item(), rel=1e-12, abs=1e-12)
    equal = make(2, 3).detach().repeat(2, 1).requires_grad_()
    losses = pace_loss(equal, labels, LAMBDA, **options)
    plain = torch.autograd.grad(F.cross_entropy(equal[:2], labels), equal)[0]
    assert abs(losses.consistency.item()) < 1e-15
    close(torch.autograd.grad(losses.total, equal)[0], plain, 1e-12)


def test_a_bound():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.float64)
    assert pace_loss(logits, torch.tensor([0]), divergence="jensen_shannon").consistency.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_r_drop():
    """R-Drop's published loss: `½(CE0 + CE1) + α·½(KL(p‖q) + KL(q‖p))`, whose code sums KL over the batch; and that of a regression."""
    logits, labels, alpha = make(), torch.tensor([1, 0, 4, 6, 1]), 0.7
    l0, l1 = logits.split(BATCH)

    def published(reduction):
        p_loss = F.kl_div(F.log_softmax(l0, -1), F.softmax(l1, -1), reduction="none")
        q_loss = F.kl_div(F.log_softmax(l1, -1), F.softmax(l0, -1), reduction="none")
        both = [loss.sum() / (1 if reduction == "sum" else BATCH) for loss in (p_loss, q_loss)]
        return (F.cross_entropy(l0, labels) + F.cross_entropy(l1, labels)) / 2 + alpha * sum(both) / 2

    for reduction, lambda_ in (("mean over the batch", alpha), ("sum", alpha * BATCH)):
        losses = pace_loss(logits, labels, lambda_, divergence="symmetric_kl", both_branches=True)
        close(losses.total, published(reduction), 1e-12)
        close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (losses.total, published(reduction))), 1e-12)

    scores, y = make(2 * BATCH, 1, seed=7), torch.randn(BATCH, dtype=torch.float64)
    losses = pace_loss(scores, y, 0.8, criterion="mean_squared_error", both_branches=True, divergence="mean_squared_difference")
    s0, s1 = scores.squeeze(1).split(BATCH)
    want = (F.mse_loss(s0, y) + F.mse_loss(s1, y)) / 2 + 0.8 * F.mse_loss(s0, s1)
    close(losses.total, want, 1e-12)
    close(*(torch.autograd.grad(loss, scores)[0] for loss in (losses.total, want)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_other_types(name, dtype):
    exact = make().detach().to(dtype).double().requires_grad_()
    logits = exact.detach().to(dtype).requires_grad_()
    options = dict(both_branches=True, class_weights=WEIGHTS, denominator=torch.tensor(3.0), **options_of(name))
    losses, want = pace_loss(logits, LABELS, LAMBDA, **options), pace_loss(exact, LABELS, LAMBDA, **options)
    close(losses.total, want.total, 1e-6)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    close(*(torch.autograd.grad(loss.total, leaf)[0] for loss, leaf in ((losses, logits), (want, exact))), tolerance)


@pytest.mark.parametrize("kind", ["symmetric_kl", "kl", "values", "probabilities", "a function"])
def test_compiled_is_plain(kind):
    name = kind if kind in DIVERGENCES else "squared_difference"
    labels, settings = criterion_of("weights and smoothing" if kind in DIVERGENCES else kind)
    settings = {**settings, **options_of(name), "both_branches": True}
    if kind != "a function":
        settings["denominator"] = torch.tensor(3.0)

    def loss(logits):
        losses = pace_loss(logits, labels, LAMBDA, **settings)
        return losses.total, losses.consistency

    logits = make()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (compiled, loss):
        total, consistency = function(logits)
        found.append((total, consistency, torch.autograd.grad(total, logits)[0]))
    for a, b in zip(*found):
        close(a, b, 1e-12)


def test_a_denominator_on_a_device_is_not_looked_at():
    """A tensor that refuses to tell its value, as one on a GPU would wait."""

    class Deaf(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function) and "is_nonzero" not in str(function), "the value was read"
            args = [a.elem if isinstance(a, Deaf) else a for a in args]
            return function(*args, **(kwargs or {}))

        @staticmethod
        def of(tensor):
            deaf = torch.Tensor._make_wrapper_subclass(Deaf, tensor.shape, dtype=tensor.dtype)
            deaf.elem = tensor
            return deaf

    logits = make()
    losses = pace_loss(logits, LABELS, LAMBDA, denominator=Deaf.of(torch.tensor(8.0, dtype=torch.float64)))
    close(losses.total, pace_loss(logits, LABELS, LAMBDA, denominator=8).total, 1e-14)


WRONG = [
    (dict(temperature=2.0), "`temperature`.*only the divergence \"kl\" has"),
    (dict(temperature=0, divergence="kl"), "`temperature` is 0"),
    (dict(detach_target=True, divergence="jensen_shannon"), "`detach_target`.*only the divergence"),
    (dict(criterion="mse"), "`criterion` is 'mse'"),
    (dict(criterion="mean_squared_error", label_smoothing=0.1), "`label_smoothing` is 0.1.*mean_squared_error"),
    (dict(criterion="mean_squared_error", class_weights=WEIGHTS), "`class_weights`.*mean_squared_error"),
    (dict(criterion="mean_squared_error", divergence="symmetric_kl"), "`divergence` is 'symmetric_kl'.*mean_squared_error"),
    (dict(criterion=nn.CrossEntropyLoss(), class_weights=WEIGHTS), "`class_weights`.*itself"),
    (dict(class_weights=WEIGHTS.clone().requires_grad_()), "`class_weights` requires a gradient"),
]
WRONG_CALLS = [
    (dict(criterion="mean_squared_error"), LABELS, r"`labels` is \(5,\) of torch.int64, expected floating \[B, 7\]"),
    (dict(criterion="mean_squared_error"), torch.zeros(BATCH), r"`labels` is \(5,\).*expected floating \[B, 7\]"),
    (dict(class_weights=WEIGHTS[1:]), LABELS, r"`class_weights` is \(6,\), expected \[7\]"),
    (dict(class_weights=-WEIGHTS), LABELS, "class_weights"),
    (dict(class_weights=WEIGHTS.to_sparse()), LABELS, "`class_weights` is .*sparse"),
    (dict(class_weights=WEIGHTS.to("meta")), LABELS, "`class_weights` is .*meta"),
    (dict(denominator=torch.tensor(2.0, device="meta")), LABELS, "`denominator` is .*meta"),
    (dict(denominator=torch.tensor(2.0).to_sparse()), LABELS, "`denominator` is .*sparse"),
    (dict(denominator=10**400), LABELS, "`denominator` is"),
    (dict(lambda_=10**400), LABELS, "`lambda_` is"),
    (dict(), torch.full((BATCH, CLASSES), 1 / CLASSES).to_sparse(), "`labels` is .*sparse"),
    (dict(criterion="mean_squared_error"), torch.ones(BATCH, CLASSES).to_sparse(), "`labels` is .*sparse"),
    (dict(labelled_only=True), torch.full((BATCH, CLASSES), 1 / CLASSES), "`labelled_only`.*only such are ignored"),
    (dict(denominator=0), LABELS, "`denominator` is 0"),
    (dict(denominator=-1.0), LABELS, "`denominator` is -1.0"),
    (dict(denominator=float("nan")), LABELS, "`denominator` is nan"),
    (dict(denominator=True), LABELS, "`denominator` is True"),
    (dict(denominator=torch.ones(2)), LABELS, r"`denominator` is \(2,\)"),
    (dict(denominator=torch.ones((), requires_grad=True)), LABELS, "`denominator` requires a gradient"),
    (dict(denominator=2, criterion=nn.CrossEntropyLoss()), LABELS, "`denominator`.*`criterion`"),
    (dict(), torch.full((BATCH, CLASSES), 1 / CLASSES, requires_grad=True), "`labels` require a gradient"),
]


def test_what_has_no_meaning_is_named():
    for settings, message in WRONG:
        for call in (partial(pace_loss, make(), LABELS), partial(pace_torch.inject, vit(), rank=1), partial(pace_torch.LossOptions)):
            with pytest.raises(PaceError, match=message):
                call(**settings)
    for settings, labels, message in WRONG_CALLS:
        with pytest.raises(PaceError, match=message):
            pace_loss(make(), labels, **settings)
    history = dict(history=torch.zeros(BATCH, CLASSES, dtype=torch.float64), index=torch.arange(BATCH))
    with pytest.raises(PaceError, match="`both_branches`.*`history`"):
        pace_loss(make(BATCH), LABELS, both_branches=True, **history)
    with pytest.raises(PaceError, match="`history` is .*sparse"):
        pace_loss(make(BATCH), LABELS, **{**history, "history": history["history"].to_sparse()})
    with pytest.raises(PaceError, match="`logits` is .*sparse"):
        pace_loss(make().detach().to_sparse(), LABELS)
    for settings, message in (
        (dict(variant="fast", samples=9, both_branches=True), "`both_branches`.*fast"),
        (dict(variant="fast", samples=9, packed=True), "`packed`.*fast"),
        (dict(noise_shape="BTC", packed=True), "`packed`.*BTC"),
        (dict(lamda=1.0), "`lamda` is no setting, expected one of lambda_,"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_torch.inject(vit(), **settings)


# ------------------------------------------------------------------------------------------------- in a model


def test_settings_are_one_thing():
    """`inject`, `attach` and `Pace` take them alike, and the controller has each as an attribute that is checked."""
    names = [field.name for field in dataclasses.fields(pace_torch.Settings)]
    for function in (pace_torch.inject, pace_torch.attach):
        parameters = inspect.signature(function).parameters
        assert set(names) <= parameters.keys() and "settings" not in parameters
        assert parameters["divergence"].default == "squared_difference"
    assert {field.name for field in dataclasses.fields(pace_torch.LossOptions)} < inspect.signature(pace_loss).parameters.keys()
    pace = pace_torch.Pace(2, divergence="kl", temperature=2.0, variant="noise")
    assert (pace.temperature, pace.divergence, pace.branches, pace.settings.temperature) == (2.0, "kl", 1, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pace.settings.temperature = 3.0
    pace.lambda_ = 0.5
    pace.criterion = nn.MSELoss()
    assert pace.settings.lambda_ == 0.5 and not list(pace.children())
    for name, value in (("lambda_", -1), ("divergence", "mse"), ("class_weights", torch.ones(5)), ("variant", "fast"), ("batch_of", 3)):
        with pytest.raises(PaceError, match=name if name != "variant" else "samples"):
            setattr(pace, name, value)
    # What was done to the model already.
    for name, value in (("dropout", "off"), ("variant", "baseline")):
        with pytest.raises(PaceError, match=f"`{name}`.*`attach`"):
            setattr(pace, name, value)
    pace.variant = "pace"
    assert pace.branches == 2


def test_options_reach_every_step():
    x, mask, labels = tokens_batch(4)
    options = dict(divergence="symmetric_kl", both_branches=True, class_weights=torch.arange(1.0, 6.0))
    model = injected(**options)
    assert not any("class_weights" in name for name in model.state_dict())
    losses = model.pace.training_step(model, {"x": x, "mask": mask}, labels)
    model.pace.step -= 1
    want = pace_loss(model(x, mask), labels, 0.1, **options)
    assert losses.consistency > 0
    for name in ("total", "classification", "consistency"):
        close(getattr(losses, name), getattr(want, name), 1e-12)
    # In evaluation there is one branch, and its criterion.
    logits = model.eval()(x, mask)
    close(model.pace.loss(logits, labels).total, F.cross_entropy(logits, labels, weight=options["class_weights"].double()), 1e-12)
    # Set on the way.
    model.train().pace.divergence = "mean_squared_difference"
    logits = model(x, mask)
    close(model.pace.loss(logits, labels, denominator=2).consistency, (logits[:4] - logits[4:]).square().sum() / 5 / 2, 1e-12)


def test_options_of_the_variants():
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    for variant in ("lazy", "fast", "noise", "baseline"):
        model = perturb(pace_torch.inject(vit(), rank=2, variant=variant, samples=4, divergence="jensen_shannon", lambda_=0.5)).train()
        history = torch.zeros(4, 7, dtype=torch.float64)
        for step in range(2):
            losses = model.pace.training_step(model, images, labels, torch.arange(4))
            if variant == "fast":
                want = divergence_of(losses.logits, history, "jensen_shannon").mean()
                close(losses.consistency, want, 1e-12)
                history = losses.logits
            else:
                assert (losses.consistency > 0) == (variant == "lazy" and step == 0)


@pytest.mark.parametrize("shape, options", [
    ((0, 5), {}), ((0, 5), dict(criterion="mean_squared_error")), ((2, 0), dict(criterion="mean_squared_error")),
])
def test_nothing_to_compute_a_loss_of_is_an_error(shape, options):
    labels = torch.zeros(shape) if options else torch.zeros(shape[0], dtype=torch.int64)
    with pytest.raises(PaceError, match="at least one sample and one class"):
        pace_loss(torch.zeros(shape), labels, **options)


@pytest.mark.parametrize("ignored", [0, 2, -100])
def test_a_function_beside_any_ignored_label(ignored):
    """The consistency is that of the samples with labels, whatever label stands for none, and the label 0 is none of its own."""
    logits, labels = make(), torch.arange(BATCH) % CLASSES
    labels[1] = ignored
    taken = labels != ignored
    one, two = logits.detach().chunk(2)
    for only, rows in ((True, taken), (False, torch.ones_like(taken))):
        criterion = nn.CrossEntropyLoss(ignore_index=ignored)
        losses = pace_loss(logits, labels, LAMBDA, criterion=criterion, labelled_only=only, ignore_index=ignored)
        close(losses.consistency, (one - two)[rows].square().sum(1).mean(), 1e-12)
        close(losses.classification, criterion(one, labels), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_that_were_rounded(dtype):
    for classes in (3, 10, 1000, 50000):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(64 if classes > 5000 else 256, classes, generator=generator)
        targets = torch.softmax(2 * torch.randn(logits.shape, generator=generator), 1).to(dtype)
        for given in (targets, torch.full_like(targets, 1 / classes)):
            close(pace_loss(logits, given).total, F.cross_entropy(logits, given.float()), 1e-4)
    with pytest.raises(PaceError, match="`labels` are no probabilities"):
        pace_loss(torch.randn(4, 10), torch.full((4, 10), 0.102, dtype=dtype))


def test_no_gradient_is_made_of_what_asks_for_none(monkeypatch):
    """In evaluation it would be as large as the logits."""
    made, evaluate = [], pace_torch.ops.loss._evaluate
    monkeypatch.setattr(pace_torch.ops.loss, "_evaluate", lambda *args: made.append(evaluate(*args)) or made[-1])
    logits, labels = make(), torch.arange(BATCH)
    totals = [pace_loss(logits, labels).total]
    with torch.no_grad():
        totals += [pace_loss(logits, labels).total]
    totals += [pace_loss(logits.detach(), labels).total]
    assert [result[1].numel() for result in made] == [logits.numel(), 0, 0]
    assert [total.requires_grad for total in totals] == [True, False, False] and len(set(map(float, totals))) == 1
    compiled = torch.compile(lambda logits: pace_loss(logits, labels).total, backend="aot_eager", fullgraph=True)
    for given in (logits, logits.detach()):
        assert compiled(given).item() == totals[0].item() and compiled(given).requires_grad == given.requires_grad
