"""DropPath with one mask for all branches."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError, check_integer
from ._arguments import Function, batch_of, check_sample, check_tensor, checked, real, working_dtype
from ._layer import frozen, keep_key, same_key
from ._operator import Operator


def drop_path(
    x: Tensor,
    key: Optional[Tensor],
    drop_probability: float,
    *,
    mask: Optional[Tensor] = None,
    first_sample: int = 0,
    branches: int = 1,
    global_batch: Optional[int] = None,
) -> Tensor:
    """DropPath that drops the same samples in all branches: `x ⊙ mask / (mean(mask) + 1e-12)`, `x [R, ...]`.

    The mask is drawn from `key`, or given as `mask [B]`, at any scale. The mean of a drawn one is over the `global_batch`
    samples that all processes hold together (by default the B here).
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise PaceError("`x` is a scalar, expected [rows, ...]")
    if global_batch is None:
        global_batch = batch_of(x.shape[0], branches)
    return _drop_path((x, key, mask), DropPathSettings(drop_probability, first_sample, branches, global_batch))


class DropPathSettings(NamedTuple):
    """Which samples are dropped, and how rows are arranged."""

    drop_probability: float
    first_sample: int
    branches: int
    global_batch: int


# ------------------------------------------------------------------------------------------------------------- operator


def _shapes(settings: DropPathSettings, x, key, mask):
    return [x.shape]


def _forward(tensors, settings: DropPathSettings):
    x, key, mask = tensors
    batch = batch_of(x.shape[0], settings.branches)
    if (key is None) == (mask is None):
        raise PaceError("one of `key` and `mask` is required, and not both")
    whole = settings.global_batch
    if type(whole) is int and whole == batch:
        return _FORWARD(tensors, settings)
    if mask is not None:
        raise PaceError("`mask` is of this batch: `global_batch` goes with `key`")
    check_integer("global_batch", whole, 1, 2**56)
    return [_part_of_the_global_batch(x, key, batch, checked(settings))]


def _part_of_the_global_batch(x: Tensor, key: Tensor, batch: int, settings: DropPathSettings) -> Tensor:
    """The mean is over the whole global batch, whose mask every process can make: it is a pure function."""
    first, whole = settings.first_sample, settings.global_batch
    check_sample(first)
    if first + batch > whole:
        raise PaceError(f"samples {first} to {first + batch} are not in a batch of {whole}")
    ones = torch.ones(whole, 1, dtype=real(working_dtype("x", x)), device=x.device)
    (scale,) = _FORWARD((ones, key, None), DropPathSettings(settings.drop_probability, 0, 1, whole))
    scale = scale[first : first + batch].repeat(settings.branches, 1)
    return (x * scale.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def _fields(settings: DropPathSettings, x, key, mask):
    return {
        "branches": settings.branches,
        "batch": batch_of(x.shape[0], settings.branches),
        "features": x.numel() // max(x.shape[0], 1),
        "drop_probability": settings.drop_probability,
        "first_sample": check_sample(settings.first_sample),
    }


_FORWARD = Function(
    "drop_path_forward", lib.PaceDropPath, inputs="x key_address mask", outputs="y", fields=_fields, shapes=_shapes
)


def _save(ctx, tensors, settings: DropPathSettings, outputs) -> None:
    _, key, mask = tensors
    if ctx.needs_input_grad[2]:
        raise frozen(ctx, mask=2)
    ctx.settings = settings
    keep_key(ctx, key)
    ctx.save_for_backward(key, mask)


def _gradients(ctx, dy: Tensor):
    key, mask = ctx.saved_tensors
    # Linear in x with a diagonal matrix: the gradient is the same operator.
    return _drop_path((dy, same_key(ctx, key), mask), ctx.settings), None, None


_drop_path = Operator("drop_path", "x key? mask?", DropPathSettings, _forward, _shapes, save=_save, gradients=_gradients)
