"""LoRA mul under noise, with or without a prompt: the paper's main adapter."""

from typing import NamedTuple, Optional

from torch import Tensor

from .. import _library as lib
from .._library import PaceError
from ._arguments import Function, check_shape
from ._layer import (
    BackwardSettings, LayerSettings, check_base, frozen, keep_key, rank_of, same_key, settings_of, shape_fields, y_shape,
)
from ._operator import Derivative, Operator
from .noise import NO_NOISE, Noise, noise_fields


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
    adapter = lora_a, lora_b, prompt_down, prompt_up, delta_bias
    tensors = x, base_weight, base_bias, *adapter, noise.key, noise.z
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
    if (lora_a is None) != (lora_b is None):
        raise PaceError("`lora_a` and `lora_b` go together")
    if (prompt_down is None) != (prompt_up is None):
        raise PaceError("`prompt_down` and `prompt_up` go together")
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


_INPUTS = "base_weight base_bias lora_a lora_b prompt_down prompt_up delta_bias key_address z"
_SCHEMA = "base_weight base_bias? lora_a? lora_b? prompt_down? prompt_up? delta_bias? key? z?"

_lora_mul_linear = Operator(
    "lora_mul_linear",
    f"x {_SCHEMA}",
    LayerSettings,
    Function(
        "lora_mul_linear_forward",
        lib.PaceLoraMulLinear,
        inputs=f"x {_INPUTS}",
        outputs="y",
        fields=_fields,
        shapes=_shapes,
        workspace="lora_mul_linear",
        takes_tf32=True,
    ),
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
    f"dy x? {_SCHEMA}",
    BackwardSettings,
    Function(
        "lora_mul_linear_backward",
        lib.PaceLoraMulLinear,
        inputs=f"dy x {_INPUTS}",
        outputs="grad_input grad_lora_a grad_lora_b grad_prompt_down grad_prompt_up grad_delta_bias",
        fields=_backward_fields,
        shapes=_backward_shapes,
        workspace="lora_mul_linear",
        takes_tf32=True,
    ),
    _backward_shapes,
    outputs=6,
)
