"""The head of a language model with its loss on CPUs, in one call of the library; `pace_torch.lm_loss` is what to call."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from ._arguments import Function
from ._operator import is_plain
from .loss import LossSettings


class HeadSettings(NamedTuple):
    """What the head is told besides its tensors. `wanted`: the gradients to its first five."""

    loss: LossSettings
    branches: int
    logit_scale: float
    soft_cap: float
    scale: float
    chunk_rows: int
    wanted: tuple[bool, ...]


def takes(tensors: tuple[Optional[Tensor], ...]) -> bool:
    """Whether the library has the operator for these: on CPUs, in float32 and float64, outside of compiled graphs."""
    return tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.float32, torch.float64) and is_plain(tensors)


def lm_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    lora_a: Optional[Tensor],
    lora_b: Optional[Tensor],
    labels: Tensor,
    class_weights: Optional[Tensor],
    gram: Optional[Tensor],
    settings: HeadSettings,
) -> tuple[Tensor, list[Optional[Tensor]]]:
    """Total, classification and consistency `[3]`, and the gradients that are wanted."""
    *grads, values = _LM_HEAD((hidden, weight, bias, lora_a, lora_b, labels, class_weights, gram), settings)
    return values, grads


def _fields(settings: HeadSettings, hidden, weight, bias, lora_a, *_):
    loss = settings.loss
    return {
        "divergence": loss.divergence,
        "hidden_size": weight.shape[1],
        "classes": weight.shape[0],
        "branches": settings.branches,
        "rank": 0 if lora_a is None else lora_a.shape[0],
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
        "scale": settings.scale,
    }


def _shapes(settings: HeadSettings, *tensors):
    return [*(tensor.shape if wanted else None for tensor, wanted in zip(tensors, settings.wanted)), (3,)]


_LM_HEAD = Function(
    "lm_head",
    lib.PaceLmHead,
    inputs="hidden weight bias lora_a lora_b labels class_weights gram",
    outputs="grad_hidden grad_weight grad_bias grad_lora_a grad_lora_b values",
    fields=_fields,
    shapes=_shapes,
)
