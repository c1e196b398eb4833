"""The operators, as PyTorch custom operators of the namespace `pace` (`torch.ops.pace`).

Each is differentiable once, not in forward mode, known to `torch.compile` as one node, and runs on the CPU (float32, float64; float16 and
bfloat16 through float32, each operator rounding its result once) and on CUDA (float32, float16, bfloat16; on the current stream,
without synchronisation). A layer is one call of the C library in each pass. Inputs that are not contiguous are copied.

Notation: `B` samples per branch, `G` branches (1 or 2), `R = G*B` leading rows, branch 0 first; `K` in-features, `N`
out-features, rank `r`. A layer's input is `[R, ..., K]`; what lies between is a sample's tokens, `T` of them. LoRA's `A [r, K]`
and `B [N, r]` are `delta_W_up` and `delta_W_down` in the official code and in state dicts.

One file per operator: the public function, the operator, its derivative. `_operator.py` is what PyTorch sees of one,
`_arguments.py` calls the C library, and `_layer.py` makes operator and derivative of a layer from a description.
"""

from .drop_path import drop_path
from .epilogue import noisy_epilogue
from .lora_linear import lora_linear
from .lora_mul_linear import lora_mul_linear
from .noise import NO_NOISE, Noise, keys, noise
from .noisy_linear import noisy_linear
from .norms import fp_distance, grad_norm
from .weights import low_rank_weight, prompt_bias

__all__ = [
    "NO_NOISE",
    "Noise",
    "drop_path",
    "fp_distance",
    "grad_norm",
    "keys",
    "lora_linear",
    "lora_mul_linear",
    "low_rank_weight",
    "noise",
    "noisy_epilogue",
    "noisy_linear",
    "prompt_bias",
]
