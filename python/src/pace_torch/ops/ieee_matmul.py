"""Matmuls in IEEE float32 whatever PyTorch's own may use, for sums in which digits cancel."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ._operator import is_plain


def ieee_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices, which neither TF32 nor autocast rounds. It has no derivative."""
    return _evaluate(a, b) if is_plain((a, b)) else _ieee_matmul(a, b)


# An operator of its own: a compiled graph does not change PyTorch's settings.
@torch.library.custom_op("pace::ieee_matmul", mutates_args=())
def _ieee_matmul(a: Tensor, b: Tensor) -> Tensor:
    return _evaluate(a, b)


@_ieee_matmul.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


def _evaluate(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False), _without_tf32():
        return a @ b


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 has another name for it, and an error for whoever reads one after the other was set.
    name, ieee = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, ieee)
    try:
        yield
    finally:
        setattr(matmul, name, before)
