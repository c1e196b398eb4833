"""From tensors and settings to a call of the C library.

The first call with tensors of certain shapes checks them and fills in the C struct. Later calls copy that struct, allocate the
outputs and set addresses: nothing is checked, converted or looked up twice.
"""

import ctypes
from math import inf
from typing import Any, Callable, NamedTuple, Optional, Sequence, get_type_hints

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError, check_choice, check_integer, check_number

# Structs that a function keeps; a program whose shapes never repeat must not fill the memory with them.
MOST_PREPARED = 4096


class Function:
    """A function of the C library, from tensors to new tensors.

    `inputs` and `outputs` are the names of its tensors in `struct`. A name that is in both is a tensor that the function changes:
    it gets a copy of the input. Its other fields are `fields(settings, *inputs)`, the shapes of the outputs are
    `shapes(settings, *inputs)`: None where an output is not wanted. All tensors are of the type of the first one, except for
    those that `_type_of` names, or of `dtype`; `takes_bf16` is whether the CPU takes bfloat16. `workspace` is the operator whose workspace it takes; `zeroed` is whether that starts as zeros.
    """

    def __init__(
        self,
        name: str,
        struct: type[ctypes.Structure],
        *,
        inputs: str,
        outputs: str,
        fields: Callable[..., dict],
        shapes: Callable[..., Sequence],
        workspace: Optional[str] = None,
        zeroed: bool = False,
        takes_tf32: bool = False,
        takes_bf16: bool = False,
        dtype: Optional[torch.dtype] = None,
    ):
        self.name, self.struct, self.fields, self.shapes = name, struct, fields, shapes
        self.inputs, self.outputs = inputs.split(), outputs.split()
        self.workspace, self.new_workspace = workspace, torch.zeros if zeroed else torch.empty
        self.takes_tf32, self.takes_bf16, self.dtype = takes_tf32, takes_bf16, dtype
        self.entry = getattr(lib.library, f"pace_{name}")
        self.prepared: dict[tuple, _Prepared] = {}

    def __call__(self, tensors: Sequence[Optional[Tensor]], settings: NamedTuple) -> list[Optional[Tensor]]:
        flags = lib.ALLOW_TF32 if self.takes_tf32 and tensors[0].is_cuda and allows_tf32(tensors[0].dtype) else 0
        # With their types: 5.0 equals 5, and is refused.
        layouts = [settings, *map(type, settings), flags]
        for tensor in tensors:
            layouts += (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
        layouts = tuple(layouts)
        try:
            prepared = self.prepared[layouts]
        except (KeyError, TypeError):
            # A TypeError is that of a setting without a hash, which is refused now.
            prepared = None
        if prepared is None:
            prepared = _Prepared(self, tensors, settings, flags)
            if len(self.prepared) >= MOST_PREPARED:
                self.prepared.clear()
            self.prepared[layouts] = prepared
        try:
            return prepared(tensors)
        except RuntimeError:
            # A sparse tensor may have the shape of a dense one that was here before: this refuses it.
            _Prepared(self, tensors, settings, flags)
            raise


class _Prepared:
    """A function's struct for tensors of certain shapes, lacking their addresses."""

    def __init__(self, function: Function, tensors: Sequence[Optional[Tensor]], settings: NamedTuple, flags: int):
        like, settings = tensors[0], checked(settings)
        check_dense(_shown(function.inputs[0]), like)
        self.entry, self.device = function.entry, like.device
        self.dtype = function.dtype or working_dtype(function.inputs[0], like, function.takes_bf16)
        result = function.dtype or like.dtype
        self.rounds = self.dtype != result
        if self.device.type == "cpu":
            self.handle = self.stream_of = None
            lib.start_threads()
        else:
            self.handle, self.stream_of = lib.device_handle(self.device.index), self.device.index
        arguments = function.struct(**function.fields(settings, *tensors))
        arguments.size, arguments.dtype = ctypes.sizeof(arguments), lib.DTYPES[self.dtype]
        if flags:
            arguments.flags |= flags
        # (which of the tensors, word of the address, type to convert to or None, whether it may be contiguous and yet a view with the other
        # sign, as the imaginary part of a conjugate is)
        self.inputs = []
        for i, (name, tensor) in enumerate(zip(function.inputs, tensors)):
            if tensor is None:
                continue
            wanted = self._input_type(name, tensor, like)
            if name not in function.outputs:
                convert = None if tensor.dtype == wanted else wanted
                may_be_neg = tensor.numel() == 1 and tensor.is_floating_point()
                self.inputs.append((i, _word(arguments, name, tensor.numel()), convert, may_be_neg))
        # (shape, type, word of the address, which input it is a copy of or None, type to round to or None)
        self.outputs = []
        for name, shape in zip(function.outputs, function.shapes(settings, *tensors)):
            if shape is None:
                self.outputs.append(None)
                continue
            dtype = _type_of(name, self.dtype)
            rounded = result if self.rounds and name not in _TYPES else None
            word = _word(arguments, name, torch.Size(shape).numel())
            copied = function.inputs.index(name) if name in function.inputs else None
            self.outputs.append((tuple(shape), dtype, word, copied, rounded))
        self.workspace, self.new_workspace = 0, function.new_workspace
        if function.workspace is not None:
            self.workspace = lib.workspace(function.workspace, arguments, self.device)
        if self.workspace:
            self.workspace_word = _word(arguments, "workspace", self.workspace)
        self.words = ctypes.c_uint64 * (ctypes.sizeof(arguments) // 8)
        self.arguments = bytes(arguments)

    def _input_type(self, name: str, tensor: Tensor, like: Tensor) -> torch.dtype:
        """The type that the library takes a tensor in. Raises `PaceError` for a tensor that cannot be brought into it."""
        if name == "key_address" and (tensor.dtype != torch.int64 or tensor.numel() != 1 or tensor.device != self.device):
            raise PaceError(
                f"`key` is {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, expected one int64 on {self.device}"
            )
        # To the library it would be absent, as an `s` is that an operator did not make.
        if tensor.numel() == 0 and name != "s":
            raise PaceError(f"`{name}` has shape {tuple(tensor.shape)}, which is empty")
        if tensor.layout != torch.strided or tensor.is_complex():
            raise PaceError(f"`{_shown(name)}` is {tensor.layout} of {tensor.dtype}, expected dense real numbers")
        if tensor.device != self.device:
            raise PaceError(f"`{name}` is on {tensor.device}, expected {self.device} like the other tensors")
        wanted = _type_of(name, self.dtype)
        if name not in _TYPES and tensor.dtype != like.dtype:
            raise PaceError(f"`{name}` is of {tensor.dtype}, expected {like.dtype} like the other tensors")
        return wanted

    def __call__(self, tensors: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
        # A copy of its own: other threads may be in the same call.
        words = self.words.from_buffer_copy(self.arguments)
        held = []
        for i, word, dtype, may_be_neg in self.inputs:
            tensor = tensors[i]
            if dtype is not None or not tensor.is_contiguous() or may_be_neg and tensor.is_neg():
                tensor = tensor.to(dtype or tensor.dtype).contiguous().resolve_neg()
                held += (tensor,)
            words[word] = tensor.data_ptr()
        outputs = []
        for output in self.outputs:
            if output is None:
                outputs += (None,)
                continue
            shape, dtype, word, copied, _ = output
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if copied is not None:
                tensor.copy_(tensors[copied])
            words[word] = tensor.data_ptr()
            outputs += (tensor,)
        if self.workspace:
            workspace = self.new_workspace(self.workspace, dtype=torch.uint8, device=self.device)
            words[self.workspace_word] = workspace.data_ptr()
        stream = None
        if self.handle is not None:
            stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.stream_of))
        status = self.entry(self.handle, stream, words)
        if status:
            lib.check(status)
        if self.rounds:
            outputs = [
                tensor if spec is None or spec[4] is None else tensor.to(spec[4])
                for tensor, spec in zip(outputs, self.outputs)
            ]
        return outputs


def _shown(name: str) -> str:
    """An argument's name in Python."""
    return "key" if name == "key_address" else name


def _word(arguments: ctypes.Structure, name: str, elements: int) -> int:
    """Sets the length of a tensor in a struct; which 64-bit word of the struct its address is."""
    offset = 0
    if not hasattr(arguments, name):
        offset, arguments = type(arguments).noise.offset, arguments.noise
    if name != "key_address":
        getattr(arguments, name).len = elements
    return (offset + getattr(type(arguments), name).offset) // 8


# ---------------------------------------------------------------------------------------------------------------- types


def working_dtype(name: str, x: Tensor, takes_bf16: bool = False) -> torch.dtype:
    """The type in which the library takes tensors like this one; `takes_bf16` is whether bfloat16 is one on the CPU."""
    check_dense(name, x)
    if x.device.type not in ("cpu", "cuda"):
        raise PaceError(f"`{name}` is on `{x.device}`, expected a CPU or CUDA device")
    if x.dtype not in lib.DTYPES:
        raise PaceError(f"`{name}` is of {x.dtype}, expected float32, float64, float16 or bfloat16")
    if x.device.type == "cuda":
        if x.dtype == torch.float64:
            raise PaceError(f"`{name}` is of torch.float64, which the CUDA kernels do not have: use float32, or the CPU")
        return x.dtype
    if x.dtype == torch.float64 or (takes_bf16 and x.dtype == torch.bfloat16):
        return x.dtype
    return torch.float32


def real(dtype: torch.dtype) -> torch.dtype:
    """The type of noise, masks and loss values beside tensors of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_TYPES: dict[str, Callable[[torch.dtype], torch.dtype]] = {
    **dict.fromkeys(("z", "mask", "history", "values", "targets", "class_weights"), real),
    **dict.fromkeys(("labels", "index", "status", "key_address"), lambda _: torch.int64),
    **dict.fromkeys(("norm", "distance"), lambda _: torch.float64),
}


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor of an operator that computes in `dtype`."""
    return _TYPES[name](dtype) if name in _TYPES else dtype


def allows_tf32(dtype: torch.dtype) -> bool:
    """True if PyTorch's own matmuls of this type may use TF32."""
    if dtype != torch.float32:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


# --------------------------------------------------------------------------------------------------------------- checks


def checked(settings: NamedTuple) -> NamedTuple:
    """Settings as plain numbers; raises `PaceError` for those that are none. A tensor would be read once and never again."""
    values = []
    for (name, kind), value in zip(get_type_hints(type(settings)).items(), settings):
        if kind is float:
            value = check_number(name, value)
        elif kind is int:
            value = check_integer(name, value, -inf)
        elif kind is bool:
            value = check_choice(name, value, (True, False))
        elif hasattr(kind, "_fields"):
            value = checked(value)
        values.append(value)
    return type(settings)(*values)


def check_sample(number: int) -> int:
    """The number of a sample. ctypes would cut off what does not fit, and other samples would be meant."""
    return check_integer("first_sample", number, 0, 2**56)


def check_tensor(name: str, value: Any, dim: Optional[int] = None) -> None:
    if not isinstance(value, Tensor):
        raise PaceError(f"`{name}` is {type(value).__name__}, expected a tensor")
    if dim is not None and value.dim() != dim:
        raise PaceError(f"`{name}` has shape {tuple(value.shape)}, expected {dim} dimensions")


def check_dense(name: str, tensor: Optional[Tensor]) -> None:
    """Raises `PaceError` for a tensor whose numbers are not all there."""
    if tensor is not None and (tensor.layout is not torch.strided or tensor.is_meta):
        raise PaceError(f"`{name}` is {tensor.layout} on {tensor.device}, expected a dense tensor on the CPU or a CUDA device")


def batch_of(rows: int, branches: int, name: str = "x") -> int:
    """The samples of a branch among `rows`."""
    check_choice("branches", branches, (1, 2))
    if rows % branches:
        raise PaceError(f"`{name}` has {rows} rows, which {branches} branches cannot share evenly")
    return rows // branches


def check_shape(name: str, tensor: Optional[Tensor], *shape: int) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise PaceError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}")
