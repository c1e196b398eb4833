"""A linear layer whose adapter's contribution is under noise, for any `ΔW`."""

from typing import Optional

from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import check_shape
from ._layer import Layer, LayerSettings, layer_flags, rows_of, settings_of
from .noise import NO_NOISE, Noise, under


def noisy_linear(
    x: Tensor,
    base_weight: Optional[Tensor],
    base_bias: Optional[Tensor],
    delta_weight: Optional[Tensor],
    delta_bias: Optional[Tensor],
    noise: Noise = NO_NOISE,
    *,
    shared_input: bool = False,
    exact: bool = False,
) -> Tensor:
    """`y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` (paper equation 8): `x [R, ..., K]` to `y [R, ..., N]`.

    `base_weight [N, K]` and `base_bias [N]` are frozen; without them the base term is zero (the noisy head).
    `delta_weight [N, K]` and `delta_bias [N]` may each be None for zero. Gradients go to x, ΔW and Δb. With
    `shared_input` all branches read the same rows, `x [B, ..., K]`. In float32 on CUDA, GEMMs use TF32 where PyTorch's own
    may (`torch.backends.cuda.matmul`).

    Where a sample's tokens share z, both passes may take one matmul with `W0 + z⊙ΔW`, made in float32 and rounded once to
    the tensors' type; `exact` is two, with W0 and with ΔW as they are. Without noise only float32 does so. `lora_mul_linear` says
    when to be exact.

    Raises `PaceError` for shapes, types or devices that do not fit.
    """
    tensors = x, base_weight, base_bias, delta_weight, delta_bias
    settings = settings_of(noise, shared_input, exact=exact)
    if noise.rows is not None:
        return under(noise, _noisy_linear, tensors, settings)
    return _noisy_linear((*tensors, noise.key, noise.z), settings)


# ------------------------------------------------------------------------------------------------------------- operator


def _out_features(tensors: dict) -> int:
    base_weight, delta_weight = tensors["base_weight"], tensors["delta_weight"]
    weight = delta_weight if base_weight is None else base_weight
    if weight is None:
        raise PaceError("`delta_weight` is required when there is no `base_weight`")
    return rows_of("delta_weight" if base_weight is None else "base_weight", weight)


def _fields(settings: LayerSettings, tensors: dict, n: int, k: int) -> dict:
    check_shape("delta_weight", tensors["delta_weight"], n, k)
    check_shape("delta_bias", tensors.get("delta_bias"), n)
    return {"flags": layer_flags(settings)}


_noisy_linear = Layer(
    "noisy_linear",
    lib.PaceNoisyLinear,
    inputs="x base_weight? base_bias? delta_weight? delta_bias? key? z?",
    kept="x? base_weight? delta_weight? key? z?",
    out_features=_out_features,
    fields=_fields,
    function="noisy_linear",
    readers=1,
    takes_length=True,
).operator
