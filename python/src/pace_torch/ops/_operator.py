"""Operators as PyTorch sees them: custom operators of the namespace `pace` (`torch.ops.pace`), one node each for autograd and
`torch.compile`.

PyTorch's way through a custom operator takes several times as long as a call of the library. So plain eager code calls the
operator's function itself, and differentiates it as a `torch.autograd.Function`. An operator takes its tensors and one frozen
settings tuple; only the custom operator's schema, generated here, has the settings one by one.
"""

from typing import Callable, NamedTuple, Optional, Sequence, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._errors import PaceError
from ._arguments import check_tensor


class _CustomOperator:
    """`function(tensors, settings)` gives a list of tensors, None for those that are not wanted; `shapes(settings, *tensors)`
    gives their shapes. `tensors` names the inputs, with `?` behind those that may be None. All outputs are of the type of the
    first input.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        settings: type[NamedTuple],
        function: Callable,
        shapes: Callable[..., Sequence],
        outputs: int = 1,
    ):
        self.name, self.function, self.shapes, self.settings = name, function, shapes, settings
        tensors = tensors.split()
        self.required = [i for i, tensor in enumerate(tensors) if not tensor.endswith("?")]
        self.names, self.inputs = [tensor.rstrip("?") for tensor in tensors], len(tensors)
        arguments = [f"Tensor? {tensor[:-1]}" if tensor.endswith("?") else f"Tensor {tensor}" for tensor in tensors]
        arguments += _schema(settings)
        self.width = len(arguments)
        results = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        self.custom = torch.library.custom_op(
            f"pace::{name}", self._flat, mutates_args=(), schema=f"({', '.join(arguments)}) -> {results}"
        )
        self.custom.register_fake(self._fake)

    def split(self, arguments: Sequence) -> tuple[Sequence[Optional[Tensor]], NamedTuple]:
        """The tensors and the settings among the custom operator's arguments."""
        return arguments[: self.inputs], _built(self.settings, iter(arguments[self.inputs :]))

    def _flat(self, *arguments):
        tensors, settings = self.split(arguments)
        return _returned(tensors[0], self.function(tensors, settings))

    def _fake(self, *arguments):
        tensors, settings = self.split(arguments)
        shapes = self.shapes(settings, *tensors)
        return _returned(tensors[0], [None if shape is None else tensors[0].new_empty(shape) for shape in shapes])


class Operator(_CustomOperator):
    """An operator with a derivative, which gives its first output.

    `save(ctx, tensors, settings, outputs)` keeps what `gradients(ctx, dy)` needs: the gradients to the tensors. Outputs behind
    the first are for `save` alone.
    """

    def __init__(self, *arguments, save: Callable, gradients: Callable, **keywords):
        super().__init__(*arguments, **keywords)
        self.save, self.gradients = save, gradients
        self.custom.register_autograd(self._custom_backward, setup_context=self._setup)
        methods = {"forward": staticmethod(self._forward), "backward": staticmethod(self._backward)}
        eager = type(self.name, (torch.autograd.Function,), methods)
        # `Function.apply` looks for what function transforms left in the arguments; here there are none.
        self.apply = super(torch.autograd.Function, eager).apply

    def __call__(self, tensors: Sequence[Optional[Tensor]], settings: NamedTuple) -> Tensor:
        for i in self.required:
            if tensors[i] is None:
                raise PaceError(f"`{self.names[i]}` is None, expected a tensor")
        if is_plain(tensors):
            if torch.is_grad_enabled():
                return self.apply(*tensors, settings)
            return self.function(tensors, settings)[0]
        for name, tensor in zip(self.names, tensors):
            if tensor is not None:
                check_tensor(name, tensor)
        refuse_tensors(settings)
        output = self.custom(*tensors, *_flattened(settings))
        return output if isinstance(output, Tensor) else output[0]

    def _forward(self, ctx, *arguments) -> Tensor:
        tensors, settings = arguments[:-1], arguments[-1]
        outputs = self.function(tensors, settings)
        self.save(ctx, tensors, settings, outputs)
        return outputs[0]

    def _backward(self, ctx, dy: Tensor):
        return *self.gradients(ctx, dy), None

    def _setup(self, ctx, inputs, output) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        if len(outputs) > 1:
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)
        self.save(ctx, *self.split(inputs), outputs)

    def _custom_backward(self, ctx, dy: Optional[Tensor], *_):
        if dy is None:
            return (None,) * self.width
        return *self.gradients(ctx, dy), *[None] * (self.width - self.inputs)


class Derivative(_CustomOperator):
    """The backward pass of an operator. It has no derivative: where autograd records it, the custom operator says so."""

    def __call__(self, tensors: Sequence[Optional[Tensor]], settings: NamedTuple) -> Sequence[Optional[Tensor]]:
        if is_plain(tensors) and not torch.is_grad_enabled():
            return self.function(tensors, settings)
        grads = self.custom(*tensors, *_flattened(settings))
        grads = (grads,) if isinstance(grads, Tensor) else grads
        shapes = self.shapes(settings, *tensors)
        return [None if shape is None else grad for grad, shape in zip(grads, shapes)]


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_plain(tensors: Sequence[Optional[Tensor]]) -> bool:
    """True in plain eager mode: no compiler, no tracer, no function transform, no tensor subclasses.

    Raises `PaceError` for forward-mode differentiation: nothing that asks has such a derivative.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode(tensors)
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return set(map(type, tensors)) <= _PLAIN


def refuse_tensors(settings: NamedTuple) -> None:
    """Raises `PaceError` for a setting that is a tensor, of which a custom operator would take the number and give no gradient."""
    for name, setting in zip(settings._fields, settings):
        if isinstance(setting, Tensor):
            raise PaceError(f"`{name}` is {type(setting).__name__}, expected a number")


def refuse_forward_mode(tensors: Sequence[Optional[Tensor]]) -> None:
    """Raises `PaceError` in forward-mode differentiation to one of the tensors, in which an operator would pass for a constant."""
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise PaceError("operators have no derivative in forward mode (`jvp`, `jacfwd`, `dual_level`): differentiate backwards")


def _has_tangent(tensor: Optional[Tensor]) -> bool:
    if not isinstance(tensor, Tensor):
        return False
    # Within `vmap`, whose own tensors cannot be asked.
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def _returned(like: Tensor, outputs: Sequence[Optional[Tensor]]):
    """What a custom operator returns: it cannot return None."""
    outputs = tuple(like.new_empty(0) if output is None else output for output in outputs)
    return outputs[0] if len(outputs) == 1 else outputs


# ------------------------------------------------------------------------------------- settings in and out of a schema

_KINDS = {float: "float", int: "SymInt", bool: "bool", tuple[bool, ...]: "bool[]", tuple[int, ...]: "SymInt[]"}


def _schema(settings: type[NamedTuple]) -> list[str]:
    declared = []
    for name, kind in get_type_hints(settings).items():
        declared += [f"{_KINDS[kind]} {name}"] if kind in _KINDS else _schema(kind)
    return declared


def _flattened(settings: NamedTuple) -> list:
    values = []
    for value in settings:
        # In this order: a number that differs from graph to graph is no object for the compiler to look into.
        values += _flattened(value) if isinstance(value, tuple) and hasattr(value, "_fields") else [value]
    return values


def _built(settings: type[NamedTuple], values) -> NamedTuple:
    """Settings from an iterator over their values."""
    fields = []
    for kind in get_type_hints(settings).values():
        if kind in _KINDS:
            value = next(values)
            fields.append(tuple(value) if _KINDS[kind].endswith("[]") else value)
        else:
            fields.append(_built(kind, values))
    return settings(*fields)
