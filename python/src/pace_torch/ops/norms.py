"""Norms and distances, without gradients."""

import ctypes
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import Function, check_dense, check_tensor, working_dtype
from ._operator import refuse_forward_mode


def grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, as a float64 scalar on their device; one type and device for all."""
    tensors = list(tensors)
    if not tensors:
        raise PaceError("`tensors` is empty")
    for i, tensor in enumerate(tensors):
        check_tensor(f"tensors[{i}]", tensor)
        check_dense(f"tensors[{i}]", tensor)
    refuse_forward_mode(tensors)
    device, dtype = tensors[0].device, working_dtype("tensors[0]", tensors[0])
    for i, tensor in enumerate(tensors):
        for property, like in (("dtype", tensors[0].dtype), ("device", device)):
            if getattr(tensor, property) != like:
                raise PaceError(f"`tensors[{i}]` has {property} {getattr(tensor, property)}, expected {like} as the first")
    tensors = [tensor.detach().to(dtype).contiguous().resolve_neg() for tensor in tensors]
    norm = torch.empty(1, dtype=torch.float64, device=device)
    arguments = lib.PaceGradNorm(
        size=ctypes.sizeof(lib.PaceGradNorm),
        dtype=lib.DTYPES[dtype],
        gradients=(lib.PaceTensor * len(tensors))(*[(tensor.data_ptr(), tensor.numel()) for tensor in tensors]),
        count=len(tensors),
        norm=(norm.data_ptr(), 1),
    )
    size = lib.workspace("grad_norm", arguments, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    if size:
        arguments.workspace = lib.PaceTensor(workspace.data_ptr(), size)
    lib.call("grad_norm", arguments, device)
    return norm[0]


def fp_distance(fine_tuned: Tensor, pre_trained: Tensor) -> Tensor:
    """`mean_i ‖f(θ; x_i) − f(θ0; x_i)‖²` (paper section 3.2) of two outputs `[samples, ...]`, as a float64 scalar."""
    check_tensor("fine_tuned", fine_tuned)
    check_tensor("pre_trained", pre_trained)
    if fine_tuned.dim() == 0:
        raise PaceError("`fine_tuned` is a scalar, expected [samples, ...]")
    if fine_tuned.shape != pre_trained.shape:
        raise PaceError(f"`pre_trained` has shape {tuple(pre_trained.shape)}, expected {tuple(fine_tuned.shape)}")
    refuse_forward_mode((fine_tuned, pre_trained))
    return _FP_DISTANCE((fine_tuned.detach(), pre_trained.detach()), _NoSettings())[0][0]


class _NoSettings(NamedTuple):
    """There are none."""


def _fields(settings: _NoSettings, fine_tuned: Tensor, pre_trained: Tensor) -> dict:
    samples = fine_tuned.shape[0]
    return {"samples": samples, "features": fine_tuned.numel() // max(samples, 1)}


_FP_DISTANCE = Function(
    "fp_distance",
    lib.PaceFpDistance,
    inputs="fine_tuned pre_trained",
    outputs="distance",
    fields=_fields,
    shapes=lambda settings, *tensors: [(1,)],
    workspace="fp_distance",
)
