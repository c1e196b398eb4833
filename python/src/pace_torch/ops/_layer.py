"""What the layers under noise have in common: settings, shapes, and the key that both passes must read."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from .._library import PaceError
from ._arguments import batch_of, check_shape
from .noise import Noise


class LayerSettings(NamedTuple):
    """What a layer is told besides its tensors: the fields of its noise, how its rows are arranged, the factor on `B·A`."""

    sigma: float
    per_token: bool
    first_sample: int
    branches: int
    shared_input: bool
    scale: float


class BackwardSettings(NamedTuple):
    """What the backward pass of a layer is told besides: which gradients are wanted, and the shape of x, if it was not kept."""

    wanted: tuple[bool, ...]
    x_shape: tuple[int, ...]
    layer: LayerSettings


def settings_of(noise: Noise, shared_input: bool, scale: float = 1.0) -> LayerSettings:
    return LayerSettings(noise.sigma, noise.per_token, noise.first_sample, noise.branches, shared_input, scale)


# --------------------------------------------------------------------------------------------------- fields of C structs


def shape_fields(x_shape: torch.Size, out_features: int, settings: LayerSettings) -> lib.PaceShape:
    if len(x_shape) < 2:
        raise PaceError(f"`x` has shape {tuple(x_shape)}, expected [rows, ..., in_features]")
    elements = torch.Size(x_shape).numel()
    if elements == 0:
        raise PaceError(f"`x` has shape {tuple(x_shape)}, which is empty")
    rows, in_features = x_shape[0], x_shape[-1]
    return lib.PaceShape(
        branches=settings.branches,
        batch=rows if settings.shared_input else batch_of(rows, settings.branches),
        tokens=elements // (rows * in_features),
        in_features=in_features,
        out_features=out_features,
        shared_input=settings.shared_input,
    )


def rows_fields(x: Tensor, settings) -> lib.PaceShape:
    """The sizes of an operator on outputs, `[rows, ..., features]`."""
    if x.dim() < 2:
        raise PaceError(f"the tensor has shape {tuple(x.shape)}, expected [rows, ..., features]")
    return lib.PaceShape(
        branches=settings.branches,
        batch=batch_of(x.shape[0], settings.branches),
        tokens=x.numel() // max(x.shape[0] * x.shape[-1], 1),
        in_features=1,
        out_features=x.shape[-1],
    )


def y_shape(x: Tensor, out_features: int, settings: LayerSettings) -> list:
    rows = x.shape[0] * settings.branches if settings.shared_input else x.shape[0]
    return [rows, *x.shape[1:-1], out_features]


def check_base(base_weight: Optional[Tensor], base_bias: Optional[Tensor], n: int, k: int) -> None:
    if base_weight is None and base_bias is not None:
        raise PaceError("`base_bias` is given without a `base_weight`")
    check_shape("base_weight", base_weight, n, k)
    check_shape("base_bias", base_bias, n)


def rank_of(lora_a: Tensor, lora_b: Tensor, n: int, k: int) -> int:
    """The rank of `lora_a [r, K]` and `lora_b [N, r]`."""
    rank = lora_a.shape[0]
    check_shape("lora_a", lora_a, rank, k)
    check_shape("lora_b", lora_b, n, rank)
    return rank


# ------------------------------------------------------------------------------------------------------- autograd context


def frozen(*names: str) -> PaceError:
    """The error for inputs that require a gradient and have none."""
    return PaceError(f"{', '.join(f'`{name}`' for name in names)}: these have no gradient, and must not require one")


def keep_key(ctx, key: Optional[Tensor]) -> None:
    """Notes the key of a forward pass, beside saving it."""
    ctx.key = key
    # Compilation runs this on stand-ins, whose versions mean nothing.
    ctx.key_version = key._version if type(key) is Tensor else None


def same_key(ctx, key: Optional[Tensor]) -> Optional[Tensor]:
    """The saved key, if it is the one that the forward pass used.

    Gradient checkpointing saves nothing and runs the forward pass again, which then reads the model's present keys: other
    ones, or the same tensor with other contents.
    """
    if type(key) is Tensor and type(ctx.key) is Tensor:
        if key.data_ptr() != ctx.key.data_ptr() or ctx.key._version != ctx.key_version:
            raise RuntimeError(
                "gradient checkpointing ran a layer again after the model had moved on to other noise: "
                "call backward() before the next forward pass"
            )
    return key
