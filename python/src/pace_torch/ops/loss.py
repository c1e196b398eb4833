"""The loss with its gradient in one pass; `pace_torch.pace_loss` is what to call."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from ._arguments import Function, real
from ._operator import Derivative, Operator, is_plain


class LossSettings(NamedTuple):
    """What the loss is told besides its tensors."""

    lambda_: float
    label_smoothing: float
    ignore_index: int


class NoSettings(NamedTuple):
    """There are none."""


def loss_and_gradient(
    logits: Tensor, labels: Tensor, history: Optional[Tensor], index: Optional[Tensor], settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, classification and consistency `[3]`; the gradient of the total; on CUDA, the status. Overwrites history rows."""
    tensors = (logits, labels, history, index)
    if not is_plain(tensors):
        return _loss(*tensors, *settings)
    if history is not None:
        # What PyTorch does around a custom operator.
        torch.autograd.graph.increment_version(history)
    return _evaluate(tensors, settings)


def loss_total(logits: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
    """The total among the values of `loss_and_gradient`, as the function of the logits that has this gradient.

    A separate operator because one that writes to its arguments (the history) cannot be differentiated.
    """
    return _loss_total((values, logits, gradient), NoSettings())


# ----------------------------------------------------------------------------------------------------------------- loss


@torch.library.custom_op("pace::loss", mutates_args=("history",))
def _loss(
    logits: Tensor,
    labels: Tensor,
    history: Optional[Tensor],
    index: Optional[Tensor],
    lambda_: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _evaluate((logits, labels, history, index), LossSettings(lambda_, label_smoothing, ignore_index))


@_loss.register_fake
def _(logits, labels, history, index, lambda_, label_smoothing, ignore_index):
    status = 9 if logits.device.type == "cuda" else 0
    return (
        logits.new_empty(3, dtype=real(logits.dtype)),
        logits.new_empty(logits.shape),
        logits.new_empty(status, dtype=torch.int64),
    )


def _evaluate(tensors, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    gradient, values, status = _LOSS(tensors, settings)
    return values, gradient, tensors[0].new_empty(0, dtype=torch.int64) if status is None else status


def _fields(settings: LossSettings, logits, labels, history, index):
    if history is not None:
        consistency = lib.CONSISTENCY_HISTORY
    else:
        consistency = lib.CONSISTENCY_NONE if len(logits) == len(labels) else lib.CONSISTENCY_TWO_BRANCH
    return {
        "consistency": consistency,
        "classes": logits.shape[1],
        "lambda": settings.lambda_,
        "label_smoothing": settings.label_smoothing,
        "has_ignore_label": 1,
        "ignore_label": settings.ignore_index,
    }


_LOSS = Function(
    "loss",
    lib.PaceLoss,
    inputs="logits labels history index",
    outputs="gradient values status",
    fields=_fields,
    shapes=lambda settings, logits, *_: [logits.shape, (3,), (9,) if logits.is_cuda else None],
    workspace="loss",
    zeroed=True,
)


# ---------------------------------------------------------------------------------------------------------------- total


def _save(ctx, tensors, settings: NoSettings, outputs) -> None:
    _, logits, gradient = tensors
    ctx.save_for_backward(gradient, logits)


def _gradients(ctx, dtotal: Tensor):
    gradient, logits = ctx.saved_tensors
    if _is_one(dtotal) and not _is_kept():
        return None, gradient, None
    return None, _loss_backward((gradient, logits, dtotal), NoSettings())[0], None


# Whether the present backward pass retains the graph. PyTorch 2.4 cannot tell.
_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_one(dtotal: Tensor) -> bool:
    """True for the gradient that `backward()` begins with, on the CPU: on CUDA reading it would wait for the device."""
    return (
        dtotal.device.type == "cpu"
        and is_plain((dtotal,))
        # A second derivative is an error of the derivative's.
        and not torch.is_grad_enabled()
        and dtotal.item() == 1
    )


_loss_total = Operator(
    "loss_total",
    "values logits gradient",
    NoSettings,
    lambda tensors, settings: [tensors[0][0].clone()],
    lambda settings, values, logits, gradient: [()],
    save=_save,
    gradients=_gradients,
)


def _scaled(tensors, settings: NoSettings):
    # The logits make the result depend on them, so that a second derivative is an error and not a zero.
    gradient, _, dtotal = tensors
    return [(dtotal * gradient).to(gradient.dtype)]


_loss_backward = Derivative(
    "loss_backward",
    "gradient logits dtotal",
    NoSettings,
    _scaled,
    lambda settings, gradient, logits, dtotal: [gradient.shape],
)
