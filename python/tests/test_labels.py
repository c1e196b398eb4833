"""What a loss is of: labels of every kind by a criterion of one's own, and the logits that come back with it."""

import copy
from functools import partial

import pace_torch
import pytest
import torch
import torch.nn.functional as F
from conftest import close, perturb, vit
from pace_torch import PaceError, pace_loss
from timm.loss import SoftTargetCrossEntropy
from torch import nn

BATCH, CLASSES, LAMBDA = 4, 5, 0.3
CRITERIA = {
    "multi-label": (nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (BATCH, CLASSES)).double()),
    "regression": (lambda logits, labels: F.mse_loss(logits[:, 0], labels), lambda: torch.randn(BATCH, dtype=torch.float64)),
    "class weights": (nn.CrossEntropyLoss(torch.rand(CLASSES, dtype=torch.float64)), lambda: torch.randint(CLASSES, (BATCH,))),
    "mixup": (SoftTargetCrossEntropy(), lambda: torch.rand(BATCH, CLASSES, dtype=torch.float64).softmax(1)),
    "integers of two dimensions": (lambda logits, labels: logits.gather(1, labels).mean(), lambda: torch.randint(CLASSES, (BATCH, 2))),
}


def make(rows, dtype=torch.float64):
    torch.manual_seed(rows)
    return torch.randn(rows, CLASSES, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("consistency", ["two branches", "history", "none"])
def test_criteria(criterion, consistency):
    logits = make(2 * BATCH if consistency == "two branches" else BATCH)
    criterion, labels = CRITERIA[criterion][0], CRITERIA[criterion][1]()
    history = torch.randn(6, CLASSES, dtype=torch.float64) if consistency == "history" else None
    index = torch.tensor([5, 0, 3, 2]) if consistency == "history" else None
    before = None if history is None else history.clone()
    losses = pace_loss(logits, labels, LAMBDA, history=history, index=index, criterion=criterion)
    other = {"two branches": logits[BATCH:], "history": None if history is None else before[index], "none": logits}[consistency]
    want = (logits[:BATCH] - other).square().sum(1).mean()
    total = criterion(logits[:BATCH], labels) + LAMBDA * want
    close(losses.total, total, 1e-13)
    close(losses.classification, criterion(logits[:BATCH], labels), 1e-13)
    close(losses.consistency, want, 1e-13)
    assert torch.equal(losses.logits, logits[:BATCH]) and not losses.logits.requires_grad
    close(*(torch.autograd.grad(3 * loss, logits)[0] for loss in (losses.total, total)), 1e-13)
    if history is not None:
        before[index] = logits.detach()
        assert torch.equal(history, before)


def test_a_criterion_that_is_cross_entropy_is_the_default():
    labels = torch.tensor([1, -100, 4, 0])
    for variant in ("pace", "lazy", "fast", "noise", "baseline"):
        settings = dict(rank=2, lambda_=LAMBDA, variant=variant, samples=BATCH, seed=3)
        model = perturb(pace_torch.inject(vit(CLASSES), **settings)).train()
        chosen = copy.deepcopy(model)
        chosen.pace.criterion = nn.CrossEntropyLoss(torch.ones(CLASSES, dtype=torch.float64))
        for step in range(3):
            x = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
            ours, theirs = (m.pace.training_step(m, x, labels, torch.arange(BATCH)) for m in (model, chosen))
            for name in ("total", "classification", "consistency", "logits"):
                close(getattr(theirs, name), getattr(ours, name), 1e-12)
            if variant == "lazy":
                assert len(ours.logits) == (BATCH // 2 if step % 2 == 0 else BATCH)
        for m in (model, chosen):
            m.zero_grad()
            m.pace.training_step(m, x, labels, torch.arange(BATCH)).total.backward()
        for (name, a), b in zip(model.named_parameters(), chosen.parameters()):
            assert a.grad is None and b.grad is None or (a.grad - b.grad).abs().max() < 1e-12, name
        # In evaluation too; and it is no part of the model.
        twice = lambda logits, labels: 2 * F.cross_entropy(logits, labels)
        x, plain = x[:2], model.eval().pace.loss(model(x[:2]), labels[:2])
        model.pace.criterion = twice
        losses = model.pace.loss(model(x), labels[:2])
        close(losses.total, 2 * plain.total, 1e-12)
        assert losses.consistency == 0 and torch.equal(losses.logits, model(x))
        assert chosen.state_dict().keys() == model.state_dict().keys()
        chosen.load_state_dict(model.state_dict())


def test_settings_of_inject_reach_the_loss():
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.rand(CLASSES, dtype=torch.float64))
    model = perturb(pace_torch.inject(vit(CLASSES), rank=2, lambda_=LAMBDA, criterion=criterion)).train()
    assert model.pace.criterion is criterion
    labels = torch.randint(2, (BATCH, CLASSES)).double()
    losses = model.pace.training_step(model, torch.randn(BATCH, 3, 16, 16, dtype=torch.float64), labels)
    close(losses.total, criterion(losses.logits, labels) + LAMBDA * losses.consistency, 1e-12)
    assert losses.logits.shape == (BATCH, CLASSES) and losses.consistency > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_criterion_sees_no_16_bit_logits(dtype):
    seen = []

    def criterion(logits, labels):
        seen.append(logits.dtype)
        return F.mse_loss(logits, labels.double())

    logits = make(2 * BATCH, torch.float64).detach().to(dtype).requires_grad_()
    labels = torch.zeros(BATCH, CLASSES)
    losses = pace_loss(logits, labels, LAMBDA, criterion=criterion)
    # A loss scale reaches the small gradients before they are rounded to float16.
    (4096 * losses.total).backward()
    exact = logits.detach().double().requires_grad_()
    (4096 * pace_loss(exact, labels, LAMBDA, criterion=criterion).total).backward()
    close(logits.grad, exact.grad, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10)
    assert seen[0] == torch.float32 and losses.total.dtype == losses.classification.dtype == torch.float32
    assert losses.logits.dtype == dtype


def test_ignored_labels_are_consistent_all_the_same():
    logits, labels = make(2 * BATCH), torch.tensor([-100, 2, -100, 0])
    losses = pace_loss(logits, labels, LAMBDA)
    close(losses.classification, F.cross_entropy(logits[:BATCH], labels), 1e-13)
    close(losses.consistency, (logits[:BATCH] - logits[BATCH:]).square().sum(1).mean(), 1e-13)


def test_probabilities_have_a_history_too():
    logits, labels = make(BATCH), torch.rand(BATCH, CLASSES).softmax(1)
    history, index = torch.randn(BATCH, CLASSES, dtype=torch.float64), torch.arange(BATCH)
    want = (logits - history).square().sum(1).mean()
    losses = pace_loss(logits, labels, LAMBDA, history=history, index=index, label_smoothing=0.1)
    close(losses.total, F.cross_entropy(logits, labels.double(), label_smoothing=0.1) + LAMBDA * want, 1e-13)
    assert torch.equal(history, logits)


def test_a_criterion_in_one_graph():
    pace = pace_torch.inject(vit(CLASSES), rank=2, criterion=nn.BCEWithLogitsLoss()).train().pace
    logits, labels = make(2 * BATCH), torch.rand(BATCH, CLASSES, dtype=torch.float64)
    compiled = torch.compile(lambda logits: pace.loss(logits, labels).total, backend="aot_eager", fullgraph=True)
    close(*(torch.autograd.grad(loss(logits), logits)[0] for loss in (compiled, lambda logits: pace.loss(logits, labels).total)), 1e-12)


def test_wrong_criteria_are_named():
    loss = partial(pace_loss, make(2 * BATCH), torch.zeros(BATCH, CLASSES))
    for criterion, message in (
        (nn.BCEWithLogitsLoss(reduction="none"), r"tensor of shape \(4, 5\), expected a scalar"),
        (lambda logits, labels: logits.sum().item(), "returned float, expected a scalar"),
        (lambda logits, labels: None, "returned NoneType"),
        ("bce", "`criterion` is 'bce'"),
    ):
        with pytest.raises(PaceError, match=message):
            loss(criterion=criterion)
    with pytest.raises(PaceError, match="label_smoothing.*criterion"):
        loss(criterion=nn.BCEWithLogitsLoss(), label_smoothing=0.1)
    model = pace_torch.inject(vit(CLASSES), rank=2)
    with pytest.raises(PaceError, match="`criterion` is 'bce'"):
        model.pace.criterion = "bce"
    for labels, message in (
        (torch.zeros(BATCH), "other targets need a `criterion`"),
        (torch.zeros(BATCH, CLASSES, dtype=torch.int64), r"\(4, 5\) of torch.int64.*criterion"),
        (torch.zeros(BATCH, CLASSES), "no probabilities.*criterion"),
        (torch.tensor(1), "a row for each sample"),
    ):
        with pytest.raises(PaceError, match=message):
            pace_loss(make(2 * BATCH), labels)
        with pytest.raises(PaceError, match=message):
            model.train().pace.loss(make(2 * BATCH), labels)


def test_ranges_read_right():
    model = pace_torch.inject(vit(CLASSES), rank=2, variant="fast", samples=6).train()
    for labels, index, message in (
        ([0, 1, 5, 2], [0, 1, 2, 3], r"`labels\[2\]` is 5, expected 0 to 4 or the ignored label"),
        ([0, 1, -1, 2], [0, 1, 2, 3], r"`labels\[2\]` is -1, expected 0 to 4"),
        ([0, 1, 2, 3], [0, 1, 2, 6], r"`index\[3\]` is 6, expected 0 to 5"),
    ):
        with pytest.raises(PaceError, match=message):
            model.pace.loss(make(BATCH), torch.tensor(labels), torch.tensor(index))
