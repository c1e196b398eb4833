"""The training loss: a criterion plus consistency, with their gradient in the same pass."""

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from . import _library as lib
from ._errors import PaceError
from .ops._arguments import check_dense, real
from .ops.loss import LossSettings, loss_and_gradient, loss_total
from .settings import DIVERGENCES, SQUARED_ERROR, Criterion, Denominator, LossOptions, check_denominator

# The ignored label beside a `criterion`, where labels only say who takes part: no class has it, as one may have `ignore_index`.
_IGNORED = -1


@dataclass(frozen=True)
class Losses:
    """`total = classification + lambda_ * consistency`; scalars, float32 (float64 beside float64 logits).

    `classification` is the criterion's value, of whatever it is. `logits` are those of branch 0, `[B, C]`, or `[B, T, C]` of tokens,
    for accuracy. Only `total` has a graph.
    """

    total: Tensor
    classification: Tensor
    consistency: Tensor
    status: Tensor
    classes: int
    history_rows: int
    logits: Tensor

    def check(self) -> None:
        """Raises `PaceError` if a label or an index was wrong. On the CPU `pace_loss` did; on CUDA this waits for it.

        After a wrong one on CUDA the values, the gradient and the history are not to be used.
        """
        if self.status.numel():
            # Of each part that was computed by itself.
            for words in self.status.cpu().split(9):
                lib.loss_status(words.contiguous(), self.classes, self.history_rows)


def pace_loss(
    logits: Tensor,
    labels: Tensor,
    lambda_: float = 1.0,
    *,
    divergence: str = "squared_difference",
    temperature: float = 1.0,
    detach_target: bool = False,
    both_branches: bool = False,
    labelled_only: bool = False,
    class_weights: Optional[Tensor] = None,
    denominator: Denominator = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    criterion: Union[None, str, Criterion] = None,
    history: Optional[Tensor] = None,
    index: Optional[Tensor] = None,
) -> Losses:
    """`total = criterion + λ·consistency` over raw logits (paper equation 11, unless the options say otherwise).

    The shape of the logits says which: `[2B, C]`, branch 0 first, is PACE: the criterion of branch 0, and the mean over samples of how
    far the branches are apart. `[B, C]` is the criterion alone; with a `history` `[n, C]` (float32, float64 beside float64 logits; zeros
    at the start) and `index`, int64 `[B]`, no row twice, it is PACE-fast: consistency with the rows `history[index]`, which are then
    overwritten with the logits.

    `labels` are int64 `[B]`, or probabilities, floating `[B, C]` (mixup, CutMix), or what the `criterion` takes. Samples labelled
    `ignore_index` take no part in the cross-entropy, but do in the consistency, unless `labelled_only`; a batch of only such has
    cross-entropy zero. The means are over the samples that take part, or weighted by `class_weights`; a `denominator`, a number or
    a tensor of no dimension (whose value nobody waits for), divides both sums in their place, for batches that are part of one. For the
    other options see `LossOptions`. Differentiable once.

    Raises `PaceError` for wrong shapes and types, options that have no meaning beside each other, a criterion that returns no scalar
    and, on the CPU, wrong labels and indices; for those on CUDA see `Losses.check`.
    """
    options = LossOptions(
        lambda_, divergence, temperature, detach_target, both_branches, labelled_only, class_weights, label_smoothing, ignore_index, criterion
    )
    return evaluate(logits, labels, options, denominator=denominator, history=history, index=index)


def evaluate(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    denominator: Denominator = None,
    history: Optional[Tensor] = None,
    index: Optional[Tensor] = None,
    difference: bool = False,
) -> Losses:
    """As `pace_loss`, with options that are checked already. `difference`: the second half of the logits is branch 0 minus branch 1, to
    both of which the gradient is."""
    _check_tensors(logits, labels, history, index, options.criterion)
    if isinstance(denominator, Tensor):
        check_dense("denominator", denominator)
    denominator = check_denominator(denominator, logits.device, real(logits.dtype))
    batch, classes = labels.shape[0], logits.shape[1]
    by_function = callable(options.criterion)
    if by_function and denominator is not None:
        raise PaceError("`denominator` is given beside a `criterion` that divides by itself: scale the total")
    if history is not None and options.both_branches:
        raise PaceError("`both_branches` is True beside a `history`, of which nothing is trained")
    allowed = (batch,) if history is not None else (batch, 2 * batch)
    if logits.shape[0] not in allowed:
        raise PaceError(f"`logits` has {logits.shape[0]} rows, expected {' or '.join(map(str, allowed))}: "
                        f"there are {batch} labels")
    branch0 = logits.detach()[:batch]
    # The gradient leaves the operator before a loss scale can reach it: float16 would lose its small values.
    logits = logits.float() if logits.dtype == torch.float16 else logits
    if history is not None:
        _check_history(history, logits)
    targets, kind, class_weights = _targets(logits, labels, options)
    divisor = denominator if isinstance(denominator, Tensor) else None
    settings = LossSettings(
        float(options.lambda_), float(options.label_smoothing), _IGNORED if by_function else options.ignore_index,
        DIVERGENCES[options.divergence], float(options.temperature), options.detach_target, options.both_branches and not by_function,
        options.labelled_only, kind, 1.0 if divisor is not None else float(denominator or 0), difference,
        torch.is_grad_enabled() and logits.requires_grad,
    )
    values, gradient, status = loss_and_gradient(logits.detach(), targets, class_weights, history, index, settings)
    total = loss_total(logits, values, gradient)
    if divisor is not None:
        total, values = total / divisor, values / divisor
    classification = values[1]
    if by_function:
        value = _criterion_of(options, logits.to(values.dtype), labels)
        total, classification = total + value, value.detach()
    return Losses(total, classification, values[2], status, classes, 0 if history is None else history.shape[0], branch0)


def _targets(logits: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, int, Optional[Tensor]]:
    """What the operator trains branch 0 on, of which kind that is, and the weights of the classes."""
    batch, classes = labels.shape[0], logits.shape[1]
    is_label = labels.dtype == torch.int64 and labels.dim() == 1
    if options.labelled_only and not is_label:
        raise PaceError(f"`labelled_only` is True, and `labels` is {tuple(labels.shape)} of {labels.dtype}, expected int64 [B]: only such are "
                        "ignored")
    if options.criterion == SQUARED_ERROR:
        expected = f"floating [B, {classes}]" + (" or [B]" if classes == 1 else "")
        if not labels.is_floating_point() or labels.shape[1:] not in ((classes,), *(((),) if classes == 1 else ())):
            raise PaceError(f"`labels` is {tuple(labels.shape)} of {labels.dtype}, expected {expected} for the `criterion` {SQUARED_ERROR!r}")
        return labels.detach().reshape(batch, classes), lib.TARGETS_VALUES, None
    if options.criterion is not None:
        if options.labelled_only:
            # Classes of no weight: the labels say who takes part in the consistency, and no more.
            ignored = torch.where(labels == options.ignore_index, _IGNORED, 0)
            return ignored, lib.TARGETS_LABELS, logits.new_zeros(classes, dtype=real(logits.dtype))
        # The operator ignores every label, which leaves the consistency.
        return torch.full((batch,), _IGNORED, device=logits.device), lib.TARGETS_LABELS, None
    weights = options.class_weights
    if weights is not None:
        if weights.shape != (classes,):
            raise PaceError(f"`class_weights` is {tuple(weights.shape)}, expected [{classes}]")
        check_dense("class_weights", weights)
        weights = weights.to(logits.device, real(logits.dtype))
    if is_label:
        return labels, lib.TARGETS_LABELS, weights
    _check_probabilities(labels, classes)
    return labels.detach(), lib.TARGETS_PROBABILITIES, weights


def _criterion_of(options: LossOptions, logits: Tensor, labels: Tensor) -> Tensor:
    """A function's value of branch 0, or the mean of those of both."""
    branches = logits.split(labels.shape[0]) if options.both_branches else (logits[: labels.shape[0]],)
    values = [options.criterion(branch, labels) for branch in branches]
    for value in values:
        if not isinstance(value, Tensor) or value.dim() > 0:
            returned = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PaceError(f"`criterion` returned {returned}, expected a scalar tensor, such as the mean over the batch")
    return (sum(values) / len(values)).to(logits.dtype)


def _check_tensors(logits, labels, history, index, criterion) -> None:
    for name, tensor in (("logits", logits), ("labels", labels), ("history", history), ("index", index)):
        may_be_absent = name in ("history", "index")
        if not isinstance(tensor, Tensor) and not (tensor is None and may_be_absent):
            raise PaceError(f"`{name}` is {type(tensor).__name__}, expected a tensor")
        # What a function takes for labels is its own affair.
        if name != "labels" or not callable(criterion):
            check_dense(name, tensor)
    if logits.dim() != 2:
        raise PaceError(f"`logits` has shape {tuple(logits.shape)}, expected [rows, classes]")
    if labels.dim() == 0:
        raise PaceError("`labels` is a scalar, expected a tensor with a row for each sample")
    if labels.shape[0] == 0 or logits.shape[1] == 0:
        raise PaceError(f"`logits` is {tuple(logits.shape)} and `labels` {tuple(labels.shape)}, expected at least one sample and one class")
    if labels.requires_grad and not callable(criterion):
        raise PaceError("`labels` require a gradient, and have none, unless a `criterion` of your own gives it")
    if index is not None and (index.dtype != torch.int64 or index.dim() != 1):
        raise PaceError(f"`index` is {tuple(index.shape)} of {index.dtype}, expected one dimension of int64")
    if (history is None) != (index is None):
        raise PaceError("`history` and `index` go together")


def _check_history(history: Tensor, logits: Tensor) -> None:
    dtype, shape, classes = real(logits.dtype), tuple(history.shape), logits.shape[1]
    if shape[1:] != (classes,) or history.dtype != dtype:
        raise PaceError(f"`history` is {shape} of {history.dtype}, expected [n, {classes}] of {dtype}")
    if not history.is_contiguous() or history.device != logits.device:
        raise PaceError(f"`history` must be contiguous and on {logits.device}")
    if history.requires_grad:
        raise PaceError("`history` requires a gradient, and has none")


def _check_probabilities(labels: Tensor, classes: int) -> None:
    if not labels.is_floating_point() or labels.shape[1:] != (classes,):
        raise PaceError(f"`labels` is {tuple(labels.shape)} of {labels.dtype}, expected int64 [B] or probabilities [B, {classes}]; other "
                        "targets need a `criterion`")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # Each may be rounded by half a unit in its last place, in 16 bits too.
    limits = torch.finfo(labels.dtype)
    tolerance = 1e-3 + limits.eps / 2 * (1 + classes * limits.smallest_normal)
    if (labels < 0).any() or not ((labels.sum(1, dtype=real(labels.dtype)) - 1).abs() <= tolerance).all():
        raise PaceError("`labels` are no probabilities: each row has to be at least 0 and add up to 1; other targets need a `criterion`")
