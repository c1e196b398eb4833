"""What goes into a model and comes out of it: tensors in tuples, lists and mappings, their rows, and logits."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

import torch
from torch import Tensor

from ._errors import PaceError


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with each tensor in it replaced; tuples, lists, mappings and dataclasses are copied, all else is what it was."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, Mapping):
        new = {} if type(value) is dict else copy.copy(value)
        for key, item in value.items():
            new[key] = map_tensors(function, item)
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **map_tensors(function, fields))
    return value


def first_tensor(value: Any) -> Optional[Tensor]:
    """The first tensor with rows in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return value if value.dim() > 0 else None
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = vars(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for item in items:
        tensor = first_tensor(item)
        if tensor is not None:
            return tensor
    return None


# The keyword whose rows are the batch; or all whose rows are its, of which the first tells how many.
BatchOf = Union[None, str, tuple[str, ...], list[str]]


def check_batch_of(batch_of: Any) -> BatchOf:
    """The setting; raises `PaceError` unless it is one."""
    names = batch_of if isinstance(batch_of, (tuple, list)) else [batch_of or ""]
    if not names or not all(isinstance(name, str) for name in names):
        raise PaceError(f"`batch_of` is {batch_of!r}, expected a keyword or a list of keywords")
    return batch_of


def batch_size(args: tuple, kwargs: Mapping, batch_of: BatchOf) -> int:
    """The rows of a model's batch: those of the argument that `batch_of` names, or of the first tensor that has any."""
    name = batch_of if batch_of is None or isinstance(batch_of, str) else batch_of[0]
    if name is not None and name not in kwargs:
        raise PaceError(f"`batch_of` names `{name}`, which the model was not called with as a keyword")
    tensor = first_tensor((args, kwargs) if name is None else kwargs[name])
    if tensor is None:
        raise PaceError("the batch size cannot be told: none of the model's arguments is a tensor with rows, or a tuple, list or "
                        "mapping with one in it")
    return tensor.shape[0]


def with_rows(
    function: Callable[[Tensor], Tensor], args: tuple, kwargs: dict, batch: int, batch_of: BatchOf = None
) -> tuple[tuple, dict]:
    """A call's arguments with each tensor of `batch` rows replaced; if `batch_of` is a list of keywords, only theirs."""

    def replace(tensor: Tensor) -> Tensor:
        return function(tensor) if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    if batch_of is None or isinstance(batch_of, str):
        return map_tensors(replace, args), map_tensors(replace, kwargs)
    return args, {name: map_tensors(replace, value) if name in batch_of else value for name, value in kwargs.items()}


def twice(tensor: Tensor) -> Tensor:
    """The rows twice, the second copy behind the first."""
    return torch.cat([tensor, tensor])


# What attention is told of packed rows besides their positions.
PACKED_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
PACKED = (*PACKED_BOUNDS, "max_length_q", "max_length_k")


def twice_packed(kwargs: Mapping) -> dict[str, Tensor]:
    """The bounds of the sequences in packed rows, as those of two branches of these: the second behind the first."""
    return {name: torch.cat([kwargs[name], kwargs[name][1:] + kwargs[name][-1]]) for name in PACKED_BOUNDS if kwargs.get(name) is not None}


def call(model: Callable, batch: Any) -> Any:
    """What a model makes of a batch: a mapping's items are keywords, those of a tuple or list positional arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def find_logits(output: Any) -> Optional[Tensor]:
    """The logits in what a model returned: a tensor, an object or mapping with `logits`, or the first tensor of a tuple."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)):
        logits = next((item for item in output if isinstance(item, Tensor) and item.dim() > 1), None)
    return logits if isinstance(logits, Tensor) and logits.dim() > 0 else None


def logits_of(output: Any) -> Tensor:
    """The same; raises `PaceError` if there are none."""
    logits = find_logits(output)
    if logits is None:
        raise PaceError(f"there are no logits in what the model returned, {type(output).__name__}: expected a tensor, an object or "
                        "mapping with `logits`, or a tuple with a tensor of two dimensions")
    return logits


def find_loss(output: Any) -> Optional[Tensor]:
    """The loss that a model computed itself: `loss` of an object or mapping, or what a tuple begins with, if it has a gradient."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad else None
