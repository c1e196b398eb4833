"""LoRA add under noise."""

from typing import Optional

from torch import Tensor

from .. import _library as lib
from ._arguments import Function, check_shape
from ._layer import (
    BackwardSettings, LayerSettings, check_base, frozen, keep_key, rank_of, same_key, settings_of, shape_fields,
    y_shape,
)
from ._operator import Derivative, Operator
from .noise import NO_NOISE, Noise, noise_fields


def lora_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    scale: float = 1.0,
    shared_input: bool = False,
) -> Tensor:
    """LoRA add under noise: `y = x·W0ᵀ + b0 + z ⊙ (scale·(x·Aᵀ)·Bᵀ + δb)`.

    `lora_a [r, K]`, `lora_b [N, r]`; the rest as in `noisy_linear`. Gradients go to x, A, B and δb.
    """
    tensors = x, base_weight, base_bias, lora_a, lora_b, delta_bias, noise.key, noise.z
    return _lora_linear(tensors, settings_of(noise, shared_input, scale))


# ------------------------------------------------------------------------------------------------------------- operator


def _shapes(settings: LayerSettings, x, base_weight, base_bias, lora_a, lora_b, delta_bias, key, z):
    # s = scale·x·Aᵀ. The CPU computes it again in the backward pass.
    s = [*x.shape[:-1], lora_a.shape[0]] if x.device.type == "cuda" else None
    return [y_shape(x, lora_b.shape[0], settings), s]


def _fields(settings: LayerSettings, x, base_weight, base_bias, lora_a, lora_b, delta_bias, key, z):
    n, k = lora_b.shape[0], x.shape[-1]
    check_base(base_weight, base_bias, n, k)
    check_shape("delta_bias", delta_bias, n)
    return {
        "shape": shape_fields(x.shape, n, settings),
        "noise": noise_fields(settings, key, z),
        "rank": rank_of(lora_a, lora_b, n, k),
        "scale": settings.scale,
    }


def _save(ctx, tensors, settings: LayerSettings, outputs) -> None:
    x, base_weight, _, lora_a, lora_b, delta_bias, key, z = tensors
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[7]:
        raise frozen("base_weight", "base_bias", "z")
    ctx.settings = BackwardSettings((needs[0], *needs[3:6]), x.shape, settings)
    keep_key(ctx, key)
    ctx.save_for_backward(x, outputs[1], base_weight, lora_a, lora_b, delta_bias, key, z)


def _gradients(ctx, dy: Tensor):
    x, s, base_weight, lora_a, lora_b, delta_bias, key, z = ctx.saved_tensors
    tensors = dy, x, s, base_weight, lora_a, lora_b, delta_bias, same_key(ctx, key), z
    dx, da, db, dbias = _lora_linear_backward(tensors, ctx.settings)
    return dx, None, None, da, db, dbias, None, None


_lora_linear = Operator(
    "lora_linear",
    "x base_weight? base_bias? lora_a lora_b delta_bias? key? z?",
    LayerSettings,
    Function(
        "low_rank_linear_forward",
        lib.PaceLowRankLinear,
        inputs="x base_weight base_bias lora_a lora_b delta_bias key_address z",
        outputs="y s",
        fields=_fields,
        shapes=_shapes,
        workspace="low_rank_linear",
        takes_tf32=True,
    ),
    _shapes,
    outputs=2,
    save=_save,
    gradients=_gradients,
)


# ----------------------------------------------------------------------------------------------------------- derivative


def _backward_shapes(settings: BackwardSettings, dy, x, s, base_weight, lora_a, lora_b, delta_bias, key, z):
    shapes = x.shape, lora_a.shape, lora_b.shape, (dy.shape[-1],)
    return [shape if wanted else None for shape, wanted in zip(shapes, settings.wanted)]


def _backward_fields(settings: BackwardSettings, dy, x, s, base_weight, lora_a, lora_b, delta_bias, key, z):
    return {
        "shape": shape_fields(x.shape, dy.shape[-1], settings.layer),
        "noise": noise_fields(settings.layer, key, z),
        "rank": lora_a.shape[0],
        "scale": settings.layer.scale,
    }


_lora_linear_backward = Derivative(
    "lora_linear_backward",
    "dy x s? base_weight? lora_a lora_b delta_bias? key? z?",
    BackwardSettings,
    Function(
        "low_rank_linear_backward",
        lib.PaceLowRankLinear,
        inputs="dy x s base_weight lora_a lora_b delta_bias key_address z",
        outputs="grad_input grad_lora_a grad_lora_b grad_delta_bias",
        fields=_backward_fields,
        shapes=_backward_shapes,
        workspace="low_rank_linear",
        takes_tf32=True,
    ),
    _backward_shapes,
    outputs=4,
)
