"""Builders of `ΔW` and `Δb`."""

from typing import NamedTuple, Optional

from torch import Tensor

from .. import _library as lib
from ._arguments import Function, check_shape, check_tensor
from ._layer import frozen, rank_of, rows_of
from ._operator import Derivative, Operator


def low_rank_weight(lora_a: Tensor, lora_b: Tensor, base_weight: Optional[Tensor] = None, *, scale: float = 1.0) -> Tensor:
    """`ΔW [N, K] = scale·B·A`, or `W0 ⊙ (scale·B·A)` with a `base_weight`; `lora_a [r, K]`, `lora_b [N, r]`."""
    return _low_rank_weight((lora_a, lora_b, base_weight), WeightSettings(scale))


def prompt_bias(
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    prompt_down: Tensor,
    prompt_up: Tensor,
    delta_bias: Optional[Tensor] = None,
) -> Tensor:
    """`Δb [N] = W0·(Pd·Pu) + b0⊙δb` (VPT add): `prompt_down [K, p]`, `prompt_up [p, 1]`.

    Without a base bias δb plays no part.
    """
    return _prompt_bias((base_weight, base_bias, prompt_down, prompt_up, delta_bias), PromptSettings())


class WeightSettings(NamedTuple):
    """The factor on `B·A`."""

    scale: float


class PromptSettings(NamedTuple):
    """There are none."""


# ---------------------------------------------------------------------------------------------------- low-rank weight


def _weight_fields(settings: WeightSettings, lora_a, lora_b, base_weight):
    check_tensor("lora_a", lora_a, 2)
    n, k = rows_of("lora_b", lora_b), lora_a.shape[1]
    check_shape("base_weight", base_weight, n, k)
    return {"out_features": n, "in_features": k, "rank": rank_of(lora_a, lora_b, n, k), "scale": settings.scale}


def _weight_shapes(settings: WeightSettings, lora_a, lora_b, base_weight):
    return [(lora_b.shape[0], lora_a.shape[1])]


def _save_weight(ctx, tensors, settings: WeightSettings, outputs) -> None:
    if ctx.needs_input_grad[2]:
        raise frozen(ctx, base_weight=2)
    ctx.settings = settings
    ctx.save_for_backward(*tensors)


def _weight_gradients(ctx, dout: Tensor):
    return *_low_rank_weight_backward((dout, *ctx.saved_tensors), ctx.settings), None


_low_rank_weight = Operator(
    "low_rank_weight",
    "lora_a lora_b base_weight?",
    WeightSettings,
    Function(
        "low_rank_weight_forward",
        lib.PaceLowRankWeight,
        inputs="lora_a lora_b base_weight",
        outputs="out",
        fields=_weight_fields,
        shapes=_weight_shapes,
    ),
    _weight_shapes,
    save=_save_weight,
    gradients=_weight_gradients,
)


def _weight_backward_shapes(settings: WeightSettings, dout, lora_a, lora_b, base_weight):
    return [lora_a.shape, lora_b.shape]


_low_rank_weight_backward = Derivative(
    "low_rank_weight_backward",
    "dout lora_a lora_b base_weight?",
    WeightSettings,
    Function(
        "low_rank_weight_backward",
        lib.PaceLowRankWeight,
        inputs="dout lora_a lora_b base_weight",
        outputs="grad_lora_a grad_lora_b",
        fields=lambda settings, dout, *tensors: _weight_fields(settings, *tensors),
        shapes=_weight_backward_shapes,
        workspace="low_rank_weight",
    ),
    _weight_backward_shapes,
    outputs=2,
)


# -------------------------------------------------------------------------------------------------------- prompt's bias


def _prompt_fields(settings: PromptSettings, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    check_tensor("base_weight", base_weight, 2)
    (n, k), rank = base_weight.shape, prompt_up.numel()
    check_shape("prompt_down", prompt_down, k, rank)
    check_shape("base_bias", base_bias, n)
    check_shape("delta_bias", delta_bias, n)
    return {"out_features": n, "in_features": k, "rank": rank}


def _prompt_shapes(settings: PromptSettings, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    return [base_weight.shape[:1]]


def _save_prompt(ctx, tensors, settings: PromptSettings, outputs) -> None:
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        raise frozen(ctx, base_weight=0, base_bias=1)
    ctx.settings = settings
    ctx.save_for_backward(*tensors)


def _prompt_gradients(ctx, dout: Tensor):
    return None, None, *_prompt_bias_backward((dout, *ctx.saved_tensors), ctx.settings)


_prompt_bias = Operator(
    "prompt_bias",
    "base_weight base_bias? prompt_down prompt_up delta_bias?",
    PromptSettings,
    Function(
        "prompt_bias_forward",
        lib.PacePromptBias,
        inputs="base_weight base_bias prompt_down prompt_up delta_bias",
        outputs="out",
        fields=_prompt_fields,
        shapes=_prompt_shapes,
    ),
    _prompt_shapes,
    save=_save_prompt,
    gradients=_prompt_gradients,
)


def _prompt_backward_shapes(settings: PromptSettings, dout, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
    return [prompt_down.shape, prompt_up.shape, None if delta_bias is None else delta_bias.shape]


_prompt_bias_backward = Derivative(
    "prompt_bias_backward",
    "dout base_weight base_bias? prompt_down prompt_up delta_bias?",
    PromptSettings,
    Function(
        "prompt_bias_backward",
        lib.PacePromptBias,
        inputs="dout base_weight base_bias prompt_down prompt_up delta_bias",
        outputs="grad_prompt_down grad_prompt_up grad_delta_bias",
        fields=lambda settings, dout, *tensors: _prompt_fields(settings, *tensors),
        shapes=_prompt_backward_shapes,
        workspace="prompt_bias",
    ),
    _prompt_backward_shapes,
    outputs=3,
)
