"""PACE for PyTorch (Ni, Zhang, Koniusz, NeurIPS 2024): noisy adapters and consistency on fused operators.

`inject` turns a timm vision transformer or Swin into a PACE model, `model.pace.training_step` evaluates a training
step, `merge` gives a plain model back. `ops` has the operators, for models of your own.
"""

from . import ops
from ._errors import PaceError
from ._library import sigma_by_block
from .attach import attach, detach
from .attached import AttachedNoise
from .captured import CapturedStep
from .controller import Pace
from .drop_paths import SharedDropPath
from .inject import describe, inject, load_trainable_state_dict, merge, trainable_state_dict
from .lm import lm_gram, lm_loss
from .loss import Losses, pace_loss
from .modules import Adapter, Head, LoraAdd, LoraMulVptAdd, NoisyLinear, VptAdd
from .ops import (
    Noise,
    drop_path,
    fp_distance,
    grad_norm,
    keys,
    lora_linear,
    lora_mul_linear,
    low_rank_weight,
    noise,
    noisy_epilogue,
    noisy_linear,
    prompt_bias,
)
from .peft_files import load_peft, save_peft
from .settings import LossOptions, Settings

__all__ = [
    "Adapter",
    "AttachedNoise",
    "CapturedStep",
    "Head",
    "LoraAdd",
    "LoraMulVptAdd",
    "LossOptions",
    "Losses",
    "Noise",
    "NoisyLinear",
    "Pace",
    "PaceError",
    "Settings",
    "SharedDropPath",
    "VptAdd",
    "attach",
    "describe",
    "detach",
    "drop_path",
    "fp_distance",
    "grad_norm",
    "inject",
    "keys",
    "load_peft",
    "lm_gram",
    "lm_loss",
    "load_trainable_state_dict",
    "lora_linear",
    "lora_mul_linear",
    "low_rank_weight",
    "merge",
    "noise",
    "noisy_epilogue",
    "noisy_linear",
    "ops",
    "pace_loss",
    "prompt_bias",
    "save_peft",
    "sigma_by_block",
    "trainable_state_dict",
]
