"""A linear layer whose adapter's contribution is under noise, for any `ΔW`."""

from typing import Optional

from torch import Tensor

from .. import _library as lib
from .._library import PaceError
from ._arguments import Function, check_shape
from ._layer import (
    BackwardSettings, LayerSettings, check_base, frozen, keep_key, same_key, settings_of, shape_fields, y_shape,
)
from ._operator import Derivative, Operator
from .noise import NO_NOISE, Noise, noise_fields


def noisy_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    delta_weight: Optional[Tensor],
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    shared_input: bool = False,
) -> Tensor:
    """`y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` (paper equation 8): `x [R, ..., K]` to `y [R, ..., N]`.

    `base_weight [N, K]` and `base_bias [N]` are frozen; without them the base term is zero (the noisy head).
    `delta_weight [N, K]` and `delta_bias [N]` may each be None for zero. Gradients go to x, ΔW and Δb. With
    `shared_input` all branches read the same rows, `x [B, ..., K]`. In float32 on CUDA, GEMMs use TF32 where PyTorch's own
    may (`torch.backends.cuda.matmul`).

    Raises `PaceError` for shapes, types or devices that do not fit.
    """
    tensors = x, base_weight, base_bias, delta_weight, delta_bias, noise.key, noise.z
    return _noisy_linear(tensors, settings_of(noise, shared_input))


# ------------------------------------------------------------------------------------------------------------- operator


def _out_features(base_weight: Optional[Tensor], delta_weight: Optional[Tensor]) -> int:
    weight = delta_weight if base_weight is None else base_weight
    if weight is None:
        raise PaceError("`delta_weight` is required when there is no `base_weight`")
    return weight.shape[0]


def _shapes(settings: LayerSettings, x, base_weight, base_bias, delta_weight, delta_bias, key, z):
    return [y_shape(x, _out_features(base_weight, delta_weight), settings)]


def _fields(settings: LayerSettings, x, base_weight, base_bias, delta_weight, delta_bias, key, z):
    n, k = _out_features(base_weight, delta_weight), x.shape[-1]
    check_base(base_weight, base_bias, n, k)
    check_shape("delta_weight", delta_weight, n, k)
    check_shape("delta_bias", delta_bias, n)
    return {"shape": shape_fields(x.shape, n, settings), "noise": noise_fields(settings, key, z)}


def _save(ctx, tensors, settings: LayerSettings, outputs) -> None:
    x, base_weight, _, delta_weight, _, key, z = tensors
    needs = ctx.needs_input_grad
    if needs[1] or needs[2] or needs[6]:
        raise frozen("base_weight", "base_bias", "z")
    ctx.settings = BackwardSettings((needs[0], needs[3], needs[4]), x.shape, settings)
    keep_key(ctx, key)
    ctx.save_for_backward(x if needs[3] else None, base_weight, delta_weight, key, z)


def _gradients(ctx, dy: Tensor):
    x, base_weight, delta_weight, key, z = ctx.saved_tensors
    tensors = dy, x, base_weight, delta_weight, same_key(ctx, key), z
    dx, dweight, dbias = _noisy_linear_backward(tensors, ctx.settings)
    return dx, None, None, dweight, dbias, None, None


_noisy_linear = Operator(
    "noisy_linear",
    "x base_weight? base_bias? delta_weight? delta_bias? key? z?",
    LayerSettings,
    Function(
        "noisy_linear_forward",
        lib.PaceNoisyLinear,
        inputs="x base_weight base_bias delta_weight delta_bias key_address z",
        outputs="y",
        fields=_fields,
        shapes=_shapes,
        workspace="noisy_linear",
        takes_tf32=True,
    ),
    _shapes,
    save=_save,
    gradients=_gradients,
)


# ----------------------------------------------------------------------------------------------------------- derivative


def _backward_shapes(settings: BackwardSettings, dy, x, base_weight, delta_weight, key, z):
    shapes = settings.x_shape, (dy.shape[-1], settings.x_shape[-1]), (dy.shape[-1],)
    return [shape if wanted else None for shape, wanted in zip(shapes, settings.wanted)]


def _backward_fields(settings: BackwardSettings, dy, x, base_weight, delta_weight, key, z):
    shape = shape_fields(settings.x_shape, dy.shape[-1], settings.layer)
    return {"shape": shape, "noise": noise_fields(settings.layer, key, z)}


_BACKWARD = Function(
    "noisy_linear_backward",
    lib.PaceNoisyLinear,
    inputs="dy x base_weight delta_weight key_address z",
    outputs="grad_input grad_delta_weight grad_delta_bias",
    fields=_backward_fields,
    shapes=_backward_shapes,
    workspace="noisy_linear",
    takes_tf32=True,
)


def _backward(tensors, settings: BackwardSettings):
    dy, x, *others = tensors
    if x is None:
        # The gradient to a bias does not read x, so it was not kept; the library takes its length.
        x = dy.new_empty(settings.x_shape)
    return _BACKWARD((dy, x, *others), settings)


_noisy_linear_backward = Derivative(
    "noisy_linear_backward",
    "dy x? base_weight? delta_weight? key? z?",
    BackwardSettings,
    _backward,
    _backward_shapes,
    outputs=3,
)
