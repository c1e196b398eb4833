"""The training loss: a criterion plus consistency; cross-entropy and consistency have their gradient in the same pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from . import _library as lib
from ._errors import PaceError
from .ops._arguments import real
from .ops.loss import LossSettings, loss_and_gradient, loss_total

# What is computed of branch 0: a scalar of its logits `[B, C]` and the labels `[B, ...]`.
Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """`total = classification + lambda_ * consistency`; scalars, float32 (float64 beside float64 logits).

    `classification` is the criterion's value, of whatever it is. `logits [B, C]` are those of branch 0, for accuracy. Only `total`
    has a graph.
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
            lib.loss_status(self.status.cpu(), self.classes, self.history_rows)


def pace_loss(
    logits: Tensor,
    labels: Tensor,
    lambda_: float = 1.0,
    *,
    history: Optional[Tensor] = None,
    index: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    criterion: Optional[Criterion] = None,
) -> Losses:
    """`total = cls + λ·pace` over raw logits (paper equation 11), for `labels`, int64 `[B]`.

    The shape of the logits says which: `[2B, C]`, branch 0 first, is PACE: cross-entropy of branch 0, and
    `pace = mean_i Σ_c (l0_ic − l1_ic)²`. `[B, C]` is plain cross-entropy; with a `history` `[n, C]` (float32, float64
    beside float64 logits; zeros at the start) and `index`, int64 `[B]`, no row twice, it is PACE-fast: consistency with
    the rows `history[index]`, which are then overwritten with the logits.

    `label_smoothing` is as in `torch.nn.functional.cross_entropy`. Samples labelled `ignore_index` take no part in the
    cross-entropy, but do in the consistency; a batch of only such has cross-entropy zero. Differentiable once.

    `labels` may also be probabilities, floating `[B, C]` (mixup, CutMix). `criterion` replaces the cross-entropy: it maps
    branch 0's logits `[B, C]`, float32 or float64, and labels of any shape and type with B rows to a scalar. Both go through
    PyTorch's own operators.

    Raises `PaceError` for wrong shapes and types, `label_smoothing` beside a criterion, a criterion that returns no scalar and, on
    the CPU, wrong labels and indices; for those on CUDA see `Losses.check`.
    """
    for name, tensor in (("logits", logits), ("labels", labels), ("history", history), ("index", index)):
        may_be_absent = name in ("history", "index")
        if not isinstance(tensor, Tensor) and not (tensor is None and may_be_absent):
            raise PaceError(f"`{name}` is {type(tensor).__name__}, expected a tensor")
    check_criterion(criterion, label_smoothing)
    if logits.dim() != 2:
        raise PaceError(f"`logits` has shape {tuple(logits.shape)}, expected [rows, classes]")
    if labels.dim() == 0:
        raise PaceError("`labels` is a scalar, expected a tensor with a row for each sample")
    if index is not None and (index.dtype != torch.int64 or index.dim() != 1):
        raise PaceError(f"`index` is {tuple(index.shape)} of {index.dtype}, expected one dimension of int64")
    batch, classes = labels.shape[0], logits.shape[1]
    if criterion is None and (labels.dtype != torch.int64 or labels.dim() != 1):
        _check_probabilities(labels, classes)
        criterion = partial(_soft_cross_entropy, label_smoothing=label_smoothing)
    if (history is None) != (index is None):
        raise PaceError("`history` and `index` go together")
    allowed = (batch,) if history is not None else (batch, 2 * batch)
    if logits.shape[0] not in allowed:
        raise PaceError(f"`logits` has {logits.shape[0]} rows, expected {' or '.join(map(str, allowed))}: "
                        f"there are {batch} labels")
    branch0 = logits.detach()[:batch]
    # The gradient leaves the operator before a loss scale can reach it: float16 would lose its small values.
    logits = logits.float() if logits.dtype == torch.float16 else logits
    if history is not None:
        dtype, shape = real(logits.dtype), tuple(history.shape)
        if shape[1:] != (classes,) or history.dtype != dtype:
            raise PaceError(f"`history` is {shape} of {history.dtype}, expected [n, {classes}] of {dtype}")
        if not history.is_contiguous() or history.device != logits.device:
            raise PaceError(f"`history` must be contiguous and on {logits.device}")
    settings = LossSettings(lambda_, label_smoothing, ignore_index)
    # Beside a criterion the operator ignores every label, which leaves the consistency.
    targets = labels if criterion is None else torch.full((batch,), ignore_index, device=logits.device)
    values, gradient, status = loss_and_gradient(logits.detach(), targets, history, index, settings)
    total, classification = loss_total(logits, values, gradient), values[1]
    if criterion is not None:
        value = criterion(logits[:batch].to(values.dtype), labels)
        if not isinstance(value, Tensor) or value.dim() > 0:
            returned = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PaceError(f"`criterion` returned {returned}, expected a scalar tensor, such as the mean over the batch")
        value = value.to(values.dtype)
        total, classification = total + value, value.detach()
    return Losses(total, classification, values[2], status, classes, 0 if history is None else history.shape[0], branch0)


def check_criterion(criterion: Optional[Criterion], label_smoothing: float) -> None:
    """Raises `PaceError` for what cannot be called, and for label smoothing, which a criterion has to do itself."""
    if criterion is not None and not callable(criterion):
        raise PaceError(f"`criterion` is {type(criterion).__name__}, expected a function of logits and labels, or None")
    if criterion is not None and label_smoothing != 0:
        raise PaceError(f"`label_smoothing` is {label_smoothing} beside a `criterion`, which has to smooth its labels itself")


def _check_probabilities(labels: Tensor, classes: int) -> None:
    if not labels.is_floating_point() or labels.shape[1:] != (classes,):
        raise PaceError(f"`labels` is {tuple(labels.shape)} of {labels.dtype}, expected int64 [B] or probabilities [B, {classes}]; other "
                        "targets need a `criterion`")
    if labels.device.type == "cpu" and ((labels < 0).any() or ((labels.sum(1) - 1).abs() > 1e-3).any()):
        raise PaceError("`labels` are no probabilities: each row has to be at least 0 and add up to 1; other targets need a `criterion`")


def _soft_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels.to(logits.dtype), label_smoothing=label_smoothing)
