"""LoRA mul under noise, with or without a prompt: the paper's main adapter."""

from typing import Optional

from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import check_shape
from ._layer import Layer, LayerSettings, layer_flags, rank_of, rows_of, settings_of
from .noise import NO_NOISE, Noise, under


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
    exact: bool = False,
) -> Tensor:
    """`y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` with `ΔW = W0 ⊙ (scale·B·A)`, which is built in each pass and never kept.

    `lora_a [r, K]` and `lora_b [N, r]`, or None for both: then ΔW is zero (VPT add). `Δb` is `delta_bias [N]`; with a prompt,
    `prompt_down [K, p]` and `prompt_up [p, 1]`, it is `W0·(Pd·Pu) + b0⊙δb`, `delta_bias` being δb. The rest is as in
    `noisy_linear`. Gradients go to x, A, B, Pd, Pu and δb.

    Be `exact` in bfloat16 if rms(ΔW/W0) stays below about 1e-3 over a whole training (a learning rate of 1e-4 or less, and few
    steps): rounded together with W0, such a ΔW is attenuated in the forward pass of training. float16 keeps three bits more;
    larger adapters leave that range within a few steps.
    """
    adapter = lora_a, lora_b, prompt_down, prompt_up, delta_bias
    tensors = x, base_weight, base_bias, *adapter
    settings = settings_of(noise, shared_input, scale, exact)
    if noise.rows is not None:
        return under(noise, _lora_mul_linear, tensors, settings)
    return _lora_mul_linear((*tensors, noise.key, noise.z), settings)


# ------------------------------------------------------------------------------------------------------------- operator


def _fields(settings: LayerSettings, tensors: dict, n: int, k: int) -> dict:
    lora_a, lora_b, down, up = (tensors[name] for name in ("lora_a", "lora_b", "prompt_down", "prompt_up"))
    check_shape("delta_bias", tensors["delta_bias"], n)
    if (lora_a is None) != (lora_b is None):
        raise PaceError("`lora_a` and `lora_b` go together")
    if (down is None) != (up is None):
        raise PaceError("`prompt_down` and `prompt_up` go together")
    prompt_rank = 0 if up is None else up.numel()
    check_shape("prompt_down", down, k, prompt_rank)
    rank = 0 if lora_a is None else rank_of(lora_a, lora_b, n, k)
    return {"flags": layer_flags(settings), "rank": rank, "prompt_rank": prompt_rank, "scale": settings.scale}


_FACTORS = "base_weight base_bias? lora_a? lora_b? prompt_down? prompt_up? delta_bias? key? z?"

_lora_mul_linear = Layer(
    "lora_mul_linear",
    lib.PaceLoraMulLinear,
    inputs=f"x {_FACTORS}",
    kept=f"x? {_FACTORS}",
    out_features=lambda tensors: rows_of("base_weight", tensors["base_weight"]),
    fields=_fields,
    function="lora_mul_linear",
    readers=2,
).operator
