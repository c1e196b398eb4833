"""The loss with its gradient in one pass; `pace_torch.pace_loss` is what to call."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from ._arguments import Function, real
from ._operator import Derivative, Operator


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
    return _loss(logits, labels, history, index, *settings)


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
    settings = LossSettings(lambda_, label_smoothing, ignore_index)
    gradient, values, status = _LOSS((logits, labels, history, index), settings)
    return values, gradient, logits.new_empty(0, dtype=torch.int64) if status is None else status


@_loss.register_fake
def _(logits, labels, history, index, lambda_, label_smoothing, ignore_index):
    status = 9 if logits.device.type == "cuda" else 0
    return (
        logits.new_empty(3, dtype=real(logits.dtype)),
        logits.new_empty(logits.shape),
        logits.new_empty(status, dtype=torch.int64),
    )


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
    return None, _loss_backward((gradient, logits, dtotal), NoSettings())[0], None


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
