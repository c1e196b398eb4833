"""Matmuls in IEEE float32 whatever PyTorch's own may use, for sums in which digits cancel."""

import threading
from typing import Any

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
    with torch.autocast(a.device.type, enabled=False), _CUDA if a.is_cuda else _CPU:
        return a @ b


class _Ieee:
    """While anyone is within it, PyTorch's matmuls are in IEEE float32: its setting is one for all threads."""

    def __init__(self, settings: Any, name: str, ieee: Any):
        self.settings, self.name, self.ieee = settings, name, ieee
        self.lock, self.users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = getattr(self.settings, self.name)
                setattr(self.settings, self.name, self.ieee)
            self.users += 1

    def __exit__(self, *_) -> None:
        with self.lock:
            self.users -= 1
            if self.users > 0:
                return
            if self.name == "fp32_precision":
                setattr(self.settings, self.name, "none")  # inherited, if it was
            if getattr(self.settings, self.name) != self.before:
                setattr(self.settings, self.name, self.before)


# PyTorch 2.9 has other names for it, and an error for whoever reads one after the other was set.
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    _CUDA, _CPU = (_Ieee(backend.matmul, "fp32_precision", "ieee") for backend in (torch.backends.cuda, torch.backends.mkldnn))
else:
    _CUDA = _CPU = _Ieee(torch.backends.cuda.matmul, "allow_tf32", False)
