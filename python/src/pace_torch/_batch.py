"""What goes into a model and comes out of it: tensors in tuples, lists and mappings, their rows, and logits."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from ._library import PaceError


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with each tensor in it replaced; tuples, lists and mappings are copied, all else is what it was."""
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
    return value


def first_tensor(value: Any) -> Optional[Tensor]:
    """The first tensor with rows in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value if value.dim() > 0 else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for item in items:
        tensor = first_tensor(item)
        if tensor is not None:
            return tensor
    return None


def batch_size(args: tuple, kwargs: dict, batch_of: Optional[str]) -> int:
    """The rows of a model's batch: those of the argument `batch_of`, or of the first tensor that has any."""
    if batch_of is not None and batch_of not in kwargs:
        raise PaceError(f"`batch_of` names `{batch_of}`, which the model was not called with as a keyword")
    tensor = first_tensor((args, kwargs) if batch_of is None else kwargs[batch_of])
    if tensor is None:
        raise PaceError("the batch size cannot be told: none of the model's arguments is a tensor with rows, or a tuple, list or "
                        "mapping with one in it")
    return tensor.shape[0]


def doubled(value: Any, batch: int) -> Any:
    """`value` with the rows of each tensor that has `batch` of them twice, the second copy behind the first."""

    def double(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    return map_tensors(double, value)


def call(model: Callable, batch: Any) -> Any:
    """What a model makes of a batch: a mapping's items are keywords, those of a tuple or list positional arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an object or mapping with `logits`, or the first tensor of a tuple."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)):
        logits = next((item for item in output if isinstance(item, Tensor) and item.dim() > 1), None)
    if not isinstance(logits, Tensor):
        raise PaceError(f"there are no logits in what the model returned, {type(output).__name__}: expected a tensor, an object or "
                        "mapping with `logits`, or a tuple with a tensor of two dimensions")
    return logits
