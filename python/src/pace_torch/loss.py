"""The training loss: cross-entropy plus consistency, with its gradient in the same pass."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from . import _library as lib
from ._library import PaceError
from .ops._arguments import real
from .ops.loss import LossSettings, loss_and_gradient, loss_total


@dataclass(frozen=True)
class Losses:
    """`total = classification + lambda_ * consistency`; scalars, float32 (float64 beside float64 logits).

    Only `total` has a graph.
    """

    total: Tensor
    classification: Tensor
    consistency: Tensor
    status: Tensor
    classes: int
    history_rows: int

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
) -> Losses:
    """`total = cls + λ·pace` over raw logits (paper equation 11), for `labels`, int64 `[B]`.

    The shape of the logits says which: `[2B, C]`, branch 0 first, is PACE: cross-entropy of branch 0, and
    `pace = mean_i Σ_c (l0_ic − l1_ic)²`. `[B, C]` is plain cross-entropy; with a `history` `[n, C]` (float32, float64
    beside float64 logits; zeros at the start) and `index`, int64 `[B]`, no row twice, it is PACE-fast: consistency with
    the rows `history[index]`, which are then overwritten with the logits.

    `label_smoothing` is as in `torch.nn.functional.cross_entropy`. Samples labelled `ignore_index` take no part in the
    cross-entropy, but do in the consistency; a batch of only such has cross-entropy zero. Differentiable once.

    `labels` may also be probabilities, floating `[B, C]` (mixup, CutMix), except with a history; these go through PyTorch's
    own operators.

    Raises `PaceError` for wrong shapes and types and, on the CPU, wrong labels and indices; for those on CUDA see
    `Losses.check`.
    """
    for name, tensor in (("logits", logits), ("labels", labels), ("history", history), ("index", index)):
        may_be_absent = name in ("history", "index")
        if not isinstance(tensor, Tensor) and not (tensor is None and may_be_absent):
            raise PaceError(f"`{name}` is {type(tensor).__name__}, expected a tensor")
    if logits.dim() != 2:
        raise PaceError(f"`logits` has shape {tuple(logits.shape)}, expected [rows, classes]")
    if labels.is_floating_point():
        return _soft_loss(logits, labels, lambda_, history, label_smoothing)
    for name, integers in (("labels", labels), ("index", index)):
        if integers is not None and (integers.dtype != torch.int64 or integers.dim() != 1):
            raise PaceError(f"`{name}` is {tuple(integers.shape)} of {integers.dtype}, expected one dimension of int64")
    batch, classes = labels.shape[0], logits.shape[1]
    if (history is None) != (index is None):
        raise PaceError("`history` and `index` go together")
    allowed = (batch,) if history is not None else (batch, 2 * batch)
    if logits.shape[0] not in allowed:
        raise PaceError(f"`logits` has {logits.shape[0]} rows, expected {' or '.join(map(str, allowed))}: "
                        f"there are {batch} labels")
    # The gradient leaves the operator before a loss scale can reach it: float16 would lose its small values.
    logits = logits.float() if logits.dtype == torch.float16 else logits
    if history is not None:
        dtype, shape = real(logits.dtype), tuple(history.shape)
        if shape[1:] != (classes,) or history.dtype != dtype:
            raise PaceError(f"`history` is {shape} of {history.dtype}, expected [n, {classes}] of {dtype}")
        if not history.is_contiguous() or history.device != logits.device:
            raise PaceError(f"`history` must be contiguous and on {logits.device}")
    settings = LossSettings(lambda_, label_smoothing, ignore_index)
    values, gradient, status = loss_and_gradient(logits.detach(), labels, history, index, settings)
    total = loss_total(logits, values, gradient)
    return Losses(total, values[1], values[2], status, classes, 0 if history is None else history.shape[0])


def _soft_loss(
    logits: Tensor, labels: Tensor, lambda_: float, history: Optional[Tensor], label_smoothing: float
) -> Losses:
    if history is not None:
        raise PaceError("`labels` are probabilities, which do not go together with a `history`")
    batch, classes = labels.shape[0], logits.shape[1]
    if labels.shape[1:] != (classes,) or logits.shape[0] not in (batch, 2 * batch):
        raise PaceError(f"`labels` is {tuple(labels.shape)}, expected [B, {classes}] for {logits.shape[0]} rows of logits: B or 2·B")
    if not 0 <= lambda_ < float("inf"):
        raise PaceError(f"`lambda_` is {lambda_}, expected at least 0 and finite")
    if labels.device.type == "cpu" and ((labels < 0).any() or ((labels.sum(1) - 1).abs() > 1e-3).any()):
        raise PaceError("`labels` are no probabilities: each row has to be at least 0 and add up to 1")
    logits = logits.to(real(logits.dtype))
    classification = torch.nn.functional.cross_entropy(
        logits[:batch], labels.to(logits.dtype), label_smoothing=label_smoothing
    )
    consistency = logits.new_zeros(())
    if logits.shape[0] == 2 * batch:
        consistency = (logits[:batch] - logits[batch:]).square().sum(1).mean()
    total = classification + lambda_ * consistency
    return Losses(total, classification.detach(), consistency.detach(), torch.empty(0), classes, 0)
