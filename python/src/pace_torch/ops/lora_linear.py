"""LoRA add under noise."""

from typing import Optional

from torch import Tensor

from .. import _library as lib
from ._arguments import check_shape
from ._layer import Layer, LayerSettings, rank_of, rows_of, settings_of
from .noise import NO_NOISE, Noise, under


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
    tensors = x, base_weight, base_bias, lora_a, lora_b, delta_bias
    settings = settings_of(noise, shared_input, scale)
    if noise.rows is not None:
        return under(noise, _lora_linear, tensors, settings)
    return _lora_linear((*tensors, noise.key, noise.z), settings)


# ------------------------------------------------------------------------------------------------------------- operator


def _fields(settings: LayerSettings, tensors: dict, n: int, k: int) -> dict:
    check_shape("delta_bias", tensors["delta_bias"], n)
    return {"rank": rank_of(tensors["lora_a"], tensors["lora_b"], n, k), "scale": settings.scale}


def _s_shape(tensors: dict):
    # s = scale·x·Aᵀ. The CPU computes it again in the backward pass.
    x = tensors["x"]
    return [*x.shape[:-1], tensors["lora_a"].shape[0]] if x.device.type == "cuda" else None


_lora_linear = Layer(
    "lora_linear",
    lib.PaceLowRankLinear,
    inputs="x base_weight? base_bias? lora_a lora_b delta_bias? key? z?",
    kept="x s? base_weight? lora_a lora_b delta_bias? key? z?",
    out_features=lambda tensors: rows_of("lora_b", tensors["lora_b"]),
    fields=_fields,
    function="low_rank_linear",
    s_shape=_s_shape,
).operator
