"""The head of a language model with its loss on CPUs, in one call of the library; `pace_torch.lm_loss` is what to call."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from ._arguments import Function
from ._operator import is_plain
from .loss import LossSettings


class HeadSettings(NamedTuple):
    """What the head is told besides its tensors. `wanted`: the gradients to the hidden states, the weight and the bias."""

    loss: LossSettings
    branches: int
    logit_scale: float
    soft_cap: float
    chunk_rows: int
    wanted: tuple[bool, ...]


def takes(tensors: tuple[Optional[Tensor], ...]) -> bool:
    """Whether the library has the operator for these: on CPUs, in float32 and float64, outside of compiled graphs."""
    return tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.float32, torch.float64) and is_plain(tensors)


def lm_head(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Optional[Tensor], gram: Optional[Tensor], settings: HeadSettings
) -> tuple[Tensor, list[Optional[Tensor]]]:
    """Total, classification and consistency `[3]`, and the gradients that are wanted."""
    *grads, values = _LM_HEAD((hidden, labels, weight, bias, gram), settings)
    return values, grads


def _fields(settings: HeadSettings, hidden, labels, weight, bias, gram):
    loss = settings.loss
    return {
        "divergence": loss.divergence,
        "hidden_size": weight.shape[1],
        "classes": weight.shape[0],
        "branches": settings.branches,
        "chunk_rows": settings.chunk_rows,
        "flags": loss.flags(),
        "lambda": loss.lambda_,
        "label_smoothing": loss.label_smoothing,
        "temperature": loss.temperature,
        "denominator": loss.denominator,
        "has_ignore_label": 1,
        "ignore_label": loss.ignore_index,
        "logit_scale": settings.logit_scale,
        "soft_cap": settings.soft_cap,
    }


def _shapes(settings: HeadSettings, hidden, labels, weight, bias, gram):
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return [*(shape if wanted else None for shape, wanted in zip(shapes, settings.wanted)), (3,)]


_LM_HEAD = Function(
    "lm_head",
    lib.PaceLmHead,
    inputs="hidden labels weight bias gram",
    outputs="grad_hidden grad_weight grad_bias values",
    fields=_fields,
    shapes=_shapes,
)
