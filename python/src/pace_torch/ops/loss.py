"""The loss with its gradient in one pass; `pace_torch.pace_loss` is what to call."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import Function, real
from ._operator import Derivative, Operator, is_plain


class LossSettings(NamedTuple):
    """What the loss is told besides its tensors; numbers for names, as in `PaceLoss`. `denominator` 0 is what is counted; `difference` is
    whether the second half of the logits is branch 0 minus branch 1; `wants_gradient` whether there is one."""

    lambda_: float
    label_smoothing: float
    ignore_index: int
    divergence: int = lib.DIVERGENCE_SQUARED_DIFFERENCE
    temperature: float = 1.0
    detach_target: bool = False
    both_branches: bool = False
    labelled_only: bool = False
    targets_kind: int = lib.TARGETS_LABELS
    denominator: float = 0.0
    difference: bool = False
    wants_gradient: bool = True

    def flags(self) -> int:
        """`PACE_LOSS_*`."""
        return (lib.LOSS_BOTH_BRANCHES * self.both_branches + lib.LOSS_LABELLED_ONLY * self.labelled_only
                + lib.LOSS_DETACH_TARGET * self.detach_target)


class NoSettings(NamedTuple):
    """There are none."""


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    class_weights: Optional[Tensor],
    history: Optional[Tensor],
    index: Optional[Tensor],
    settings: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, classification and consistency `[3]`; the gradient of the total, empty if it is not wanted; on CUDA, the status. Overwrites
    history rows.

    `targets` are of the settings' `targets_kind`.
    """
    labels = targets if settings.targets_kind == lib.TARGETS_LABELS else None
    tensors = (logits, labels, None if labels is not None else targets, class_weights, history, index)
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
    labels: Optional[Tensor],
    targets: Optional[Tensor],
    class_weights: Optional[Tensor],
    history: Optional[Tensor],
    index: Optional[Tensor],
    lambda_: float,
    label_smoothing: float,
    ignore_index: int,
    divergence: int,
    temperature: float,
    detach_target: bool,
    both_branches: bool,
    labelled_only: bool,
    targets_kind: int,
    denominator: float,
    difference: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = LossSettings(lambda_, label_smoothing, ignore_index, divergence, temperature, detach_target, both_branches, labelled_only,
                            targets_kind, denominator, difference, wants_gradient)
    return _evaluate((logits, labels, targets, class_weights, history, index), settings)


@_loss.register_fake
def _(logits, *arguments):
    status = 9 if logits.device.type == "cuda" else 0
    return (
        logits.new_empty(3, dtype=real(logits.dtype)),
        logits.new_empty(logits.shape if arguments[-1] else 0),
        logits.new_empty(status, dtype=torch.int64),
    )


def _evaluate(tensors, settings: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    history = tensors[4]
    if history is not None and history.is_neg():
        # A copy would be written to.
        raise PaceError("`history` is a view with the other sign, as the imaginary part of a conjugate is")
    gradient, values, status = _LOSS(tensors, settings)
    nothing = tensors[0].new_empty(0)
    return values, nothing if gradient is None else gradient, nothing.long() if status is None else status


def _fields(settings: LossSettings, logits, labels, targets, class_weights, history, index):
    batch = len(targets if labels is None else labels)
    if history is not None:
        consistency = lib.CONSISTENCY_HISTORY
    elif len(logits) == batch:
        consistency = lib.CONSISTENCY_NONE
    else:
        consistency = lib.CONSISTENCY_DIFFERENCE if settings.difference else lib.CONSISTENCY_TWO_BRANCH
    return {
        "consistency": consistency,
        "classes": logits.shape[1],
        "lambda": settings.lambda_,
        "label_smoothing": settings.label_smoothing,
        "has_ignore_label": int(labels is not None),
        "ignore_label": settings.ignore_index,
        "divergence": settings.divergence,
        "targets_kind": settings.targets_kind,
        "flags": settings.flags(),
        "temperature": settings.temperature,
        "denominator": settings.denominator,
    }


_LOSS = Function(
    "loss",
    lib.PaceLoss,
    inputs="logits labels targets class_weights history index",
    outputs="gradient values status",
    fields=_fields,
    shapes=lambda settings, logits, *_: [logits.shape if settings.wants_gradient else None, (3,), (9,) if logits.is_cuda else None],
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
