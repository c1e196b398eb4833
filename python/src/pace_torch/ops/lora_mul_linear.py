"""LoRA mul under noise, with or without a prompt: the paper's main adapter."""

from typing import NamedTuple, Optional

from torch import Tensor

from .._library import PaceError
from ._arguments import check_shape
from ._layer import (
    BackwardSettings, LayerSettings, check_base, frozen, keep_key, rank_of, same_key, settings_of, shape_fields, y_shape,
)
from ._operator import Derivative, Operator
from .noise import NO_NOISE, Noise, noise_fields
from .noisy_linear import _noisy_linear, _noisy_linear_backward
from .weights import (
    PromptSettings, WeightSettings, _low_rank_weight, _low_rank_weight_backward, _prompt_bias, _prompt_bias_backward,
)


def lora_mul_linear(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Optional[Tensor],
    lora_a: Optional[Tensor],
    lora_b: Optional[Tensor],
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    prompt_down: Optional[Tensor] = None,
    prompt_up: Optional[Tensor] = None,
    scale: float = 1.0,
    shared_input: bool = False,
) -> Tensor:
    """`y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` with `ΔW = W0 ⊙ (scale·B·A)`, which is built in each pass and never kept.

    `lora_a [r, K]` and `lora_b [N, r]`, or None for both: then ΔW is zero (VPT add). `Δb` is `delta_bias [N]`; with a prompt,
    `prompt_down [K, p]` and `prompt_up [p, 1]`, it is `W0·(Pd·Pu) + b0⊙δb`, `delta_bias` being δb. The rest is as in
    `noisy_linear`. Gradients go to x, A, B, Pd, Pu and δb.
    """
    tensors = (
        x, base_weight, base_bias, lora_a, lora_b, prompt_down, prompt_up, delta_bias, noise.key, noise.z,
    )
    return _lora_mul_linear(tensors, settings_of(noise, shared_input, scale))


# ------------------------------------------------------------------------------------------------------------- operator


class _Tensors(NamedTuple):
    """What both passes take."""

    base_weight: Tensor
    base_bias: Optional[Tensor]
    lora_a: Optional[Tensor]
    lora_b: Optional[Tensor]
    prompt_down: Optional[Tensor]
    prompt_up: Optional[Tensor]
    delta_bias: Optional[Tensor]
    key: Optional[Tensor]
    z: Optional[Tensor]


def _layer_fields(settings: LayerSettings, x_shape, tensors: _Tensors) -> dict:
    base_weight, base_bias, lora_a, lora_b, prompt_down, prompt_up, delta_bias, key, z = tensors
    n, k = base_weight.shape[0], x_shape[-1]
    check_base(base_weight, base_bias, n, k)
    check_shape("delta_bias", delta_bias, n)
    for one, other, names in ((lora_a, lora_b, "`lora_a` and `lora_b`"), (prompt_down, prompt_up, "`prompt_down` and `prompt_up`")):
        if (one is None) != (other is None):
            raise PaceError(f"{names} go together")
    prompt_rank = 0 if prompt_up is None else prompt_up.numel()
    check_shape("prompt_down", prompt_down, k, prompt_rank)
    return {
        "shape": shape_fields(x_shape, n, settings),
        "noise": noise_fields(settings, key, z),
        "rank": 0 if lora_a is None else rank_of(lora_a, lora_b, n, k),
        "prompt_rank": prompt_rank,
        "scale": settings.scale,
    }


def _fields(settings: LayerSettings, x, *tensors):
    return _layer_fields(settings, x.shape, _Tensors(*tensors))


def _shapes(settings: LayerSettings, x, base_weight, *tensors):
    return [y_shape(x, base_weight.shape[0], settings)]


def _save(ctx, tensors, settings: LayerSettings, outputs) -> None:
    x, *others = tensors
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[9]:
        raise frozen("base_weight", "base_bias", "z")
    ctx.settings = BackwardSettings((needs[0], *needs[3:8]), x.shape, settings)
    keep_key(ctx, others[7])
    # Gradients to biases and prompts do not read x.
    ctx.save_for_backward(x if needs[3] or needs[4] else None, *others)


def _gradients(ctx, dy: Tensor):
    x, *others, key, z = ctx.saved_tensors
    dx, *grads = _lora_mul_linear_backward((dy, x, *others, same_key(ctx, key), z), ctx.settings)
    return dx, None, None, *grads, None, None


def _delta(settings: LayerSettings, tensors: _Tensors) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """`ΔW` and `Δb`."""
    weight, bias = None, tensors.delta_bias
    if tensors.lora_a is not None:
        inputs = tensors.lora_a, tensors.lora_b, tensors.base_weight
        (weight,) = _low_rank_weight.function(inputs, WeightSettings(settings.scale))
    if tensors.prompt_down is not None:
        inputs = tensors.base_weight, tensors.base_bias, tensors.prompt_down, tensors.prompt_up, bias
        (bias,) = _prompt_bias.function(inputs, PromptSettings())
    return weight, bias


def _forward(tensors, settings: LayerSettings):
    x, *others = tensors
    others = _Tensors(*others)
    _layer_fields(settings, x.shape, others)
    inputs = x, others.base_weight, others.base_bias, *_delta(settings, others), others.key, others.z
    return _noisy_linear.function(inputs, settings)


def _backward(tensors, settings: BackwardSettings):
    dy, x, *others = tensors
    others = _Tensors(*others)
    wants_x, wants_a, wants_b, wants_down, wants_up, wants_bias = settings.wanted
    wanted = wants_x, wants_a or wants_b, wants_down or wants_up or wants_bias
    weight, _ = _delta(settings.layer, others)
    inputs = dy, x, others.base_weight, weight, others.key, others.z
    dx, dweight, dbias = _noisy_linear_backward.function(inputs, settings._replace(wanted=wanted))
    da = db = ddown = dup = None
    if dweight is not None:
        inputs = dweight, others.lora_a, others.lora_b, others.base_weight
        da, db = _low_rank_weight_backward.function(inputs, WeightSettings(settings.layer.scale))
    if dbias is not None and others.prompt_down is not None:
        inputs = dbias, others.base_weight, others.base_bias, others.prompt_down, others.prompt_up, others.delta_bias
        ddown, dup, dbias = _prompt_bias_backward.function(inputs, PromptSettings())
    grads = dx, da, db, ddown, dup, dbias
    return [grad if wanted else None for grad, wanted in zip(grads, settings.wanted)]


SCHEMA = "base_weight base_bias? lora_a? lora_b? prompt_down? prompt_up? delta_bias? key? z?"

_lora_mul_linear = Operator(
    "lora_mul_linear",
    f"x {SCHEMA}",
    LayerSettings,
    _forward,
    _shapes,
    save=_save,
    gradients=_gradients,
)


# ----------------------------------------------------------------------------------------------------------- derivative


def _backward_shapes(settings: BackwardSettings, dy, x, base_weight, base_bias, lora_a, lora_b, down, up, delta_bias, key, z):
    inputs = lora_a, lora_b, down, up, delta_bias
    shapes = [tensor.shape if wanted else None for tensor, wanted in zip(inputs, settings.wanted[1:])]
    return [settings.x_shape if settings.wanted[0] else None, *shapes]


def _backward_fields(settings: BackwardSettings, dy, x, *tensors):
    return _layer_fields(settings.layer, settings.x_shape, _Tensors(*tensors))


_lora_mul_linear_backward = Derivative(
    "lora_mul_linear_backward",
    f"dy x? {SCHEMA}",
    BackwardSettings,
    _backward,
    _backward_shapes,
    outputs=6,
)
