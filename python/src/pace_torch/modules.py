"""Adapters around linear layers, and the noise around adapters; names and structure are those of the official code."""

import contextlib
import inspect
from typing import Optional

import torch
from torch import Tensor, nn

from . import ops
from ._errors import PaceError
from ._layers import is_conv1d, is_opaque, is_plain, is_pointwise
from .controller import TRACED_IN_TRAINING, Pace
from .ops import NO_NOISE, Noise


def _autocast(x: Tensor, *tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Everything in the type of autocast, if it is on; as PyTorch's, it leaves float64 alone."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *tensors]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *tensors)]


def adapters_of(model: nn.Module) -> "dict[nn.Module, Adapter]":
    """The layers with adapters, and the adapter of each: the layer is the noise around it where there is some, and otherwise the same."""
    layers: dict[nn.Module, Adapter] = {}
    within: set[nn.Module] = set()
    for module in model.modules():  # from the outside to the inside
        if isinstance(module, (NoisyLinear, Adapter)) and module not in within:
            within.update(module.modules())
            layers[module] = next(part for part in module.modules() if isinstance(part, Adapter))
    return layers


def _rename(state_dict: dict, prefix: str, new_name) -> None:
    """Renames the entries of a module; `new_name` gives the new relative name of a relative name."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        renamed = prefix + new_name(name[len(prefix) :])
        if renamed != name:
            state_dict[renamed] = state_dict.pop(name)


class _ReadParameter(Tensor):
    """The weight or bias of a layer with an adapter, for models that read it and multiply by themselves.

    Whoever gives it to a linear function gets what the layer computes, with its adapter and noise; any other use of a weight is an
    error that names the layer.
    """

    @classmethod
    def of(cls, layer: "_CallsItsLayers", name: str) -> "_ReadParameter":
        parameter = torch.Tensor._make_subclass(cls, getattr(_linear(layer), name).detach())
        parameter.layer, parameter.parameter = layer, name
        return parameter

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear:
            return _call_layer(*args, **kwargs)
        if function is torch.nn.functional.multi_head_attention_forward:
            return _attention_before(*args, **kwargs)
        # Sizes, types and copies are what they look like.
        with torch._C.DisableTorchFunctionSubclass():
            if function in _HARMLESS or function is Tensor.to and not isinstance(args[0], _ReadParameter):
                return function(*args, **kwargs)
        read = _read_parameter((args, kwargs))
        raise PaceError(
            f"the model reads the {read.parameter} of {_name(read.layer)} and uses it otherwise than in a linear function "
            f"({getattr(function, '__qualname__', function)}), where an adapter around the layer has no effect: name the layer in "
            "`exclude_modules`"
        )


def _read_parameter(value) -> "Optional[_ReadParameter]":
    """The first one in tuples, lists and mappings."""
    if isinstance(value, _ReadParameter):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((read for item in items if (read := _read_parameter(item)) is not None), None)


_HARMLESS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.is_cuda.__get__,
    Tensor.requires_grad.__get__, Tensor.is_nested.__get__, Tensor.layout.__get__, Tensor.dim, Tensor.size, Tensor.numel,
    Tensor.__repr__, Tensor.__format__, Tensor.element_size, Tensor.is_floating_point, torch.is_floating_point,
    Tensor.is_meta.__get__, Tensor.is_leaf.__get__, Tensor.grad.__get__, Tensor.itemsize.__get__, Tensor.is_sparse.__get__,
    Tensor.is_quantized.__get__, Tensor.is_contiguous, Tensor.stride, Tensor.__len__, Tensor.get_device, Tensor.type_as,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, torch.zeros_like, torch.ones_like,
    torch.empty_like,
}


def _name(layer: nn.Module) -> str:
    return f"`{layer.path}`" if getattr(layer, "path", None) else "a linear layer"


def _call_layer(input: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`F.linear` with a parameter that was read from a layer with an adapter: the layer itself."""
    if not isinstance(weight, _ReadParameter):
        raise PaceError(f"the model uses the bias of {_name(bias.layer)} with another weight: name the layer in `exclude_modules`")
    layer = weight.layer
    if (layer.adapter if isinstance(layer, NoisyLinear) else layer).is_opaque:
        raise PaceError(f"the model reads the weight of {_name(layer)}, which computes by itself: name the layer in `exclude_modules`")
    own = getattr(_linear(layer), "bias", None)
    if isinstance(bias, _ReadParameter) and bias.layer is layer or bias is None and own is None:
        return layer(input)
    if own is None and not isinstance(bias, _ReadParameter):
        adapter = layer.adapter if isinstance(layer, NoisyLinear) else layer
        if adapter.has_bias:
            raise PaceError(f"the model gives {_name(layer)} a bias of its own: there is no place for one of `new_biases`")
        return layer(input) + bias
    raise PaceError(f"the model uses the weight of {_name(layer)} with another bias: name the layer in `exclude_modules`")


_ATTENTION = inspect.signature(torch.nn.functional.multi_head_attention_forward)


def _attention_before(*args, **kwargs):
    """`F.multi_head_attention_forward` up to its output projection, which the layer computes."""
    bound = _ATTENTION.bind(*args, **kwargs)
    given = bound.arguments
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    others = [value for name, value in given.items() if name not in ("out_proj_weight", "out_proj_bias")]
    read = _read_parameter(others)
    if read is not None or not isinstance(weight, _ReadParameter):
        read = read or _read_parameter([weight, bias])
        raise PaceError(f"the model uses the {read.parameter} of {_name(read.layer)} within attention, where an adapter around the layer "
                        "has no effect: name the layer in `exclude_modules`")
    layer, query = weight.layer, given["query"]
    given["out_proj_weight"] = torch.eye(weight.layer.in_features, dtype=query.dtype, device=query.device)
    given["out_proj_bias"] = None
    y, attention = torch.nn.functional.multi_head_attention_forward(*bound.args, **bound.kwargs)
    # `[tokens, samples, channels]`: layers want the samples first.
    return (layer(y.transpose(0, 1)).transpose(0, 1) if y.dim() == 3 else layer(y)), attention


class _CallsItsLayers(nn.Module):
    """Stands for the linear layer within, for those who ask for its sizes, or read its weight and bias."""

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):
            return None if getattr(_linear(self), name) is None else _ReadParameter.of(self, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Sizes of what is no linear layer: `in_channels`, `nf`.
            adapter = self.__dict__.get("_modules", {}).get("adapter", self)
            value = vars(adapter.__dict__.get("replaced") or object).get(name)
            if value is None or name.startswith("_"):
                raise
            return value

    def __setattr__(self, name: str, value):
        if name in ("weight", "bias"):
            raise PaceError(f"the {name} of {_name(self)} is that of the linear layer in its adapter: set it, or tie it to another, "
                            "before `inject`")
        super().__setattr__(name, value)

    @property
    def in_features(self) -> int:
        """`K`, as of the linear layer."""
        return _linear(self).in_features

    @property
    def out_features(self) -> int:
        """`N`, as of the linear layer."""
        return _linear(self).out_features


def _is_traced(x: Tensor) -> bool:
    """Whether a graph is being made by `torch.export`, `torch.jit.trace`, the ONNX exporters built on them, or `torch.fx`."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()


def _refused(y: Tensor) -> Tensor:
    """Raises `PaceError` where a graph is made of a model in training; if by `torch.fx`, which may never run it (feature extractors make
    one of each mode), when it runs."""
    if isinstance(y, torch.fx.Proxy):
        return y.tracer.create_proxy("call_function", _refused, (y,), {})
    raise PaceError(TRACED_IN_TRAINING)


@contextlib.contextmanager
def _fetched(layer: nn.Module, x: Tensor):
    """A context in which a layer's weights are there, where Accelerate's hooks fetch them when the layer is called."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        yield x
        return
    (x,), _ = hook.pre_forward(layer, x)
    try:
        yield x
    finally:
        hook.post_forward(layer, x)


def _check_base(layer: "NoisyLinear") -> None:
    """Raises `PaceError` if the linear layer in an adapter is another, has hooks that would have to run, or if what they fetch would not
    be trained."""
    # Parametrizations and FSDP derive a class.
    if not isinstance(_linear(layer), layer.base_type):
        raise PaceError(f"the linear layer in the adapter of {_name(layer)} was replaced by a {type(_linear(layer)).__name__}, whose "
                        "forward pass does not run: quantise, or add adapters of PEFT, before `inject` or after `merge`")
    if _linear(layer)._forward_pre_hooks:
        raise PaceError(f"the linear layer in the adapter of {_name(layer)} has a hook that makes its weight when it is called (pruning, "
                        "old weight_norm, fully_shard of single layers), but the adapter reads the weight: do so before `inject` and "
                        "make it permanent, after `merge`, or for the block around it")
    if layer.training and torch.is_grad_enabled() and any(p.is_meta and p.requires_grad for p in layer.adapter.parameters()):
        raise PaceError(f"what {_name(layer)} trains is offloaded by Accelerate, which offloads for evaluation only: use FSDP to train, or "
                        "call `eval()`")


def _frozen(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """A frozen weight or bias, which in FullyShardedDataParallel is part of a parameter that requires a gradient."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    # A leaf that requires one was asked to (`functional_call`), which is an error.
    return tensor if isinstance(tensor, Tensor) and tensor.is_leaf else tensor.detach()


def _linear(layer: nn.Module) -> nn.Linear:
    """The linear layer in a layer with an adapter."""
    return (layer.adapter if isinstance(layer, NoisyLinear) else layer).base_module


class Adapter(_CallsItsLayers):
    """A frozen layer and what is trained beside it. `forward(x, noise)` maps `[R, ..., K]` to `[R, ..., N]`, and `[R, K, ...]` to
    `[R, N, ...]` around a convolution.

    Loads its own names, those of a noisy checkpoint (`adapter.…`) and those of the plain layer.
    """

    def __init__(self, base_module: nn.Module, new_bias: bool = True):
        super().__init__()
        # Whether the layer has a bias, or may get one.
        self.has_bias = base_module.bias is not None or new_bias
        # Whether the layer computes by itself, so that the adapter's part is added to what it gives (quantised and scaled layers).
        self.is_opaque = is_opaque(base_module)
        self.is_convolution = is_pointwise(base_module)
        # What was there, without its parameters, if that is no linear layer: the same as one is the base.
        self.__dict__["replaced"] = None
        if self.is_convolution or is_conv1d(base_module):
            self.__dict__["replaced"] = base_module
            linear = nn.Linear(1, 1)
            linear.weight, linear.bias = nn.Parameter(self._as_linear(base_module.weight.detach())), base_module.bias
            linear.out_features, linear.in_features = linear.weight.shape
            base_module.weight = base_module.bias = None
            base_module = linear
        self.base_module = base_module.requires_grad_(False)

    def _as_linear(self, weight: Tensor) -> Tensor:
        """The weight `[N, K]` of a linear layer that does what this one does: of a convolution's `[N, K, 1, ...]`, or of the `[K, N]`
        of Hugging Face's Conv1D."""
        return weight.flatten(1) if self.is_convolution else weight.t().contiguous()

    def as_replaced(self, weight: Tensor, is_weight: bool = False) -> Tensor:
        """A matrix as a convolution would have it, `[.., .., 1, ...]`; if `is_weight`, `[N, K]`, also `[K, N]` for a Conv1D."""
        if self.is_convolution:
            return weight.view(*weight.shape, *(1 for _ in self.replaced.kernel_size))
        return weight.t() if is_weight and self.replaced is not None else weight

    def _parameter(self, *shape: int, init=nn.init.zeros_) -> nn.Parameter:
        weight = self.base_module.weight
        # What is quantised has another type than what is computed.
        parameter = nn.Parameter(torch.empty(shape, dtype=weight.dtype if is_plain(weight) else None, device=weight.device))
        init(parameter)
        return parameter

    def forward(self, input: Tensor, noise: Noise = NO_NOISE, *args, **kwargs) -> Tensor:
        if _is_traced(input):
            return self.traced(input)
        if self.is_convolution:
            return self.compute(input.movedim(1, -1), noise).movedim(-1, 1)
        if self.is_opaque:
            if not isinstance(noise, Noise):
                # An argument of the layer, from a model without noise.
                args, noise = (noise, *args), NO_NOISE
            return self.around_base(input, noise, *args, **kwargs)
        if args or kwargs:
            raise PaceError(f"{_name(self)} is called with more than its input, which a linear layer does not take")
        return self.compute(input, noise)

    def around_base(self, x: Tensor, noise: Noise, *args, **kwargs) -> Tensor:
        """As `compute`, with whatever the base layer makes of `x`."""
        base = self.base_module(x, *args, **kwargs)
        if not isinstance(base, Tensor) or base.shape != (*x.shape[:-1], self.out_features):
            raise PaceError(f"{_name(self)}, a {type(self.base_module).__name__}, does not map [..., {self.in_features}] to "
                            f"[..., {self.out_features}]: name it in `exclude_modules`")
        return ops.noisy_epilogue(base, self.added(x).to(base.dtype), noise)

    def compute(self, x: Tensor, noise: Noise) -> Tensor:
        """The base layer, the adapter and the noise on it, `[R, ..., K]` to `[R, ..., N]`."""
        raise NotImplementedError

    def difference(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """ΔW and Δb, by PyTorch's own operators only; None for zero."""
        raise NotImplementedError

    def added(self, x: Tensor) -> Tensor:
        """What the adapter adds without noise, by PyTorch's own operators only."""
        weight, bias = self.difference()
        if weight is not None:
            return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        shape = (*x.shape[:-1], self.out_features)
        return x.new_zeros(shape) if bias is None else bias.expand(shape)

    def _apply(self, *args, **kwargs):
        """Also gives parameters that leave the meta device (`to_empty`) the values that they start with."""
        meta = [name for name, parameter in self._parameters.items() if parameter.is_meta]
        super()._apply(*args, **kwargs)
        for name in meta:
            if not (parameter := self._parameters[name]).is_meta:
                (nn.init.xavier_uniform_ if name.endswith("_up") else nn.init.zeros_)(parameter)
        return self

    def merged(self) -> tuple[Tensor, Optional[Tensor]]:
        """Weight and bias of the plain layer that computes the same without noise."""
        raise NotImplementedError

    def traced(self, x: Tensor) -> Tensor:
        """What the layer computes without noise, by PyTorch's own operators only: for graphs that go elsewhere."""
        if self.is_opaque:
            return self.base_module(x) + self.added(x)
        weight, bias = (
            base if delta is None else delta if base is None else base + delta
            for base, delta in zip((self.base_module.weight, self.base_module.bias), self.difference())
        )
        if self.is_convolution:
            return torch.nn.functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        return torch.nn.functional.linear(x, weight, bias)

    def plain(self) -> nn.Module:
        """The plain layer: the one that was there, with other weights."""
        weight, bias = self.merged()
        layer = self.base_module if self.replaced is None else self.replaced
        weight = self.as_replaced(weight, is_weight=True)
        for name in list(getattr(layer, "parametrizations", ())):
            nn.utils.parametrize.remove_parametrizations(layer, name)
        layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        def new_name(name: str) -> str:
            name = name.removeprefix("adapter.")
            return f"base_module.{name}" if name in ("weight", "bias") else name

        for name in (f"{prefix}weight", f"{prefix}adapter.weight"):
            if self.replaced is not None and name in state_dict:
                state_dict[name] = self._as_linear(state_dict[name])

        _rename(state_dict, prefix, new_name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoraMulVptAdd(Adapter):
    """`ΔW = W0 ⊙ (scale·B·A)`, `Δb = W0·(Pd·Pu) + b0⊙δb`: the paper's main adapter, `LoRAmul_VPTadd_Linear`.

    Without a bias in the base layer `delta_b` exists but is neither used nor trained; the same holds for the prompts without
    `new_bias`. `scale` and `exact` are those of `ops.lora_mul_linear`.
    """

    def __init__(
        self, base_module: nn.Module, rank: int, scale: float = 1.0, exact: bool = False, new_bias: bool = True
    ):
        super().__init__(base_module, new_bias)
        base_module = self.base_module
        n, k = base_module.out_features, base_module.in_features
        self.scale, self.exact = scale, exact
        self.delta_W_down = self._parameter(n, rank)
        self.delta_W_up = self._parameter(rank, k, init=nn.init.xavier_uniform_)
        self.delta_b = self._parameter(n).requires_grad_(base_module.bias is not None)
        self.delta_prompt_down = self._parameter(k, rank).requires_grad_(self.has_bias)
        self.delta_prompt_up = self._parameter(rank, 1, init=nn.init.xavier_uniform_).requires_grad_(self.has_bias)

    def _tensors(self):
        base = self.base_module
        prompt = (self.delta_prompt_down, self.delta_prompt_up) if self.has_bias else (None, None)
        delta_b = None if base.bias is None else self.delta_b
        return _frozen(base.weight), _frozen(base.bias), self.delta_W_up, self.delta_W_down, delta_b, *prompt

    def compute(self, x, noise):
        x, *tensors, prompt_down, prompt_up = _autocast(x, *self._tensors())
        return ops.lora_mul_linear(
            x, *tensors, noise, prompt_down=prompt_down, prompt_up=prompt_up, scale=self.scale, exact=self.exact
        )

    def merged(self):
        weight, bias, lora_a, lora_b, delta_b, prompt_down, prompt_up = self._tensors()
        merged = weight + ops.low_rank_weight(lora_a, lora_b, weight, scale=self.scale)
        if not self.has_bias:
            return merged, None
        delta = ops.prompt_bias(weight, bias, prompt_down, prompt_up, delta_b)
        return merged, delta if bias is None else bias + delta

    def difference(self):
        weight, bias, lora_a, lora_b, delta_b, prompt_down, prompt_up = self._tensors()
        delta = weight * (self.scale * (lora_b @ lora_a))
        if not self.has_bias:
            return delta, None
        prompt = (weight @ (prompt_down @ prompt_up)).squeeze(1)
        return delta, prompt if bias is None else prompt + bias * delta_b


class LoraAdd(Adapter):
    """`ΔW = scale·B·A`, `Δb = δb`: `LoRAadd_Linear`. Without a bias in the base layer and `new_bias`, `delta_b` is neither used
    nor trained."""

    def __init__(self, base_module: nn.Module, rank: int, scale: float = 1.0, new_bias: bool = True):
        super().__init__(base_module, new_bias)
        n, k = self.base_module.out_features, self.base_module.in_features
        self.scale = scale
        self.delta_W_down = self._parameter(n, rank)
        self.delta_W_up = self._parameter(rank, k, init=nn.init.xavier_uniform_)
        self.delta_b = self._parameter(n).requires_grad_(self.has_bias)

    def compute(self, x, noise):
        base, delta_b = self.base_module, self.delta_b if self.has_bias else None
        weight, bias = _frozen(base.weight), _frozen(base.bias)
        x, *tensors = _autocast(x, weight, bias, self.delta_W_up, self.delta_W_down, delta_b)
        return ops.lora_linear(x, *tensors, noise, scale=self.scale)

    def merged(self):
        weight, bias = self.base_module.weight, self.base_module.bias
        weight = weight + ops.low_rank_weight(self.delta_W_up, self.delta_W_down, scale=self.scale)
        if not self.has_bias:
            return weight, None
        return weight, self.delta_b if bias is None else bias + self.delta_b

    def difference(self):
        return self.scale * (self.delta_W_down @ self.delta_W_up), self.delta_b if self.has_bias else None

    def added(self, x):
        s = torch.nn.functional.linear(x.to(self.delta_W_up.dtype), self.delta_W_up)
        a = torch.nn.functional.linear(s, self.delta_W_down) * self.scale
        return a + self.delta_b if self.has_bias else a


class VptAdd(Adapter):
    """`ΔW = 0`, `Δb = W0·(Pd·Pu)`: `VPTadd_Linear`. Without a bias in the base layer and `new_bias` it does nothing."""

    def __init__(self, base_module: nn.Module, rank: int, new_bias: bool = True):
        super().__init__(base_module, new_bias)
        k = self.base_module.in_features
        self.delta_prompt_down = self._parameter(k, rank).requires_grad_(self.has_bias)
        self.delta_prompt_up = self._parameter(rank, 1, init=nn.init.xavier_uniform_).requires_grad_(self.has_bias)

    def compute(self, x, noise):
        base = self.base_module
        if not self.has_bias:
            return ops.noisy_linear(*_autocast(x, _frozen(base.weight)), None, None, None)
        x, weight, bias, down, up = _autocast(
            x, _frozen(base.weight), _frozen(base.bias), self.delta_prompt_down, self.delta_prompt_up
        )
        return ops.lora_mul_linear(x, weight, bias, None, None, None, noise, prompt_down=down, prompt_up=up)

    def merged(self):
        weight, bias = self.base_module.weight, self.base_module.bias
        if not self.has_bias:
            return weight, None
        delta = ops.prompt_bias(weight, None, self.delta_prompt_down, self.delta_prompt_up)
        return weight, delta if bias is None else bias + delta

    def difference(self):
        if not self.has_bias:
            return None, None
        return None, (self.base_module.weight @ (self.delta_prompt_down @ self.delta_prompt_up)).squeeze(1)


class Head(Adapter):
    """The classification head, trained itself: under noise `y = z⊙(x·Wᵀ + b)`. `HeadLinear`."""

    def __init__(self, base_module: nn.Module):
        super().__init__(base_module)
        self.base_module.requires_grad_(True)

    def around_base(self, x, noise, *args, **kwargs):
        y = self.base_module(x, *args, **kwargs)
        return ops.noisy_epilogue(torch.zeros_like(y), y, noise)

    def compute(self, x, noise):
        x, weight, bias = _autocast(x, self.base_module.weight, self.base_module.bias)
        return ops.noisy_linear(x, None, None, weight, bias, noise)

    def difference(self):
        return None, None

    def merged(self):
        return self.base_module.weight, self.base_module.bias


class RecomputedGELU(nn.GELU):
    """A GELU whose output the linear layer behind it does not keep for its backward pass.

    The GELU keeps its input for its own. From that the layer makes the output again: one element-wise kernel, for a tensor
    of four times the model's width. Only on CUDA, where that costs next to nothing.
    """

    def __init__(self, approximate: str = "none"):
        super().__init__(approximate)
        self.__dict__["last"] = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if _is_traced(x):
            return y
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and _recomputes(y):
            self.__dict__["last"] = x.detach(), x._version, y, y._version
        return y

    def behind(self, y: Tensor):
        """A context for the layer behind, in which `y` is not kept if it is what this module has just returned."""
        last, self.__dict__["last"] = self.last, None
        if last is None or last[2] is not y or last[3] != y._version:
            return contextlib.nullcontext()
        # Checkpointing has its own say in what is kept; where PyTorch cannot tell whether it is on, everything is kept.
        if getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "unknown")(True) is not None:
            return contextlib.nullcontext()
        x, version = last[:2]
        address, shape = y.data_ptr(), y.shape

        def pack(tensor: Tensor) -> Optional[Tensor]:
            return None if tensor.data_ptr() == address and tensor.shape == shape else tensor

        def unpack(kept: Optional[Tensor]) -> Tensor:
            if kept is not None:
                return kept
            if x._version != version:
                raise RuntimeError("the input of a GELU was changed in place before the backward pass")
            return super(RecomputedGELU, self).forward(x)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def __getstate__(self):
        return {**self.__dict__, "last": None}


def _recomputes(y: Tensor) -> bool:
    return y.is_cuda


class NoisyLinear(_CallsItsLayers):
    """An adapter whose contribution is perturbed in training: `MultiplicativeNoiseAdapter`.

    `layer` numbers its noise. A tensor assigned to `z` (`[R, N]`, or `[R, T, N]` per token) is used instead of noise.
    Loads its own names, those of a checkpoint without noise, and those of a plain linear layer.
    """

    def __init__(self, adapter: Adapter, sigma: float, pace: Pace, layer: int):
        super().__init__()
        self.adapter = adapter
        self.sigma, self.layer = float(sigma), layer
        self.z: Optional[Tensor] = None
        # Numbers of leading rows of inputs that are not those of samples, and how many a sample has in the other inputs.
        self.fixed_rows: frozenset[int] = frozenset()
        self.sample_rows: Optional[int] = None
        self.path: Optional[str] = None
        self.base_type = type(adapter.base_module)
        # The controller is a submodule of the model, once; so is the GELU in front of this layer, if there is one.
        self.__dict__.update(pace=pace, gelu=None)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if _is_traced(input):
            y = self.adapter(input)
            return _refused(y) if self.training and self.pace.training else y
        # A part that trains within a model in evaluation has no noise of its own.
        is_noisy = self.training and self.pace.training and self.sigma != 0 and self.pace.is_on_samples(self, input)
        if is_noisy and not self.pace.running:
            self.pace.check_running()
        pace = self.pace
        packed = {} if pace.packing is None else self._of_packed(input)
        noise = pace.noise(self.layer, self.sigma, input.shape[0], self.z, input.device, **packed) if is_noisy else NO_NOISE
        base = self.adapter.base_module
        if self.gelu is None and type(base) is self.base_type and not base._forward_pre_hooks and not hasattr(base, "_hf_hook"):
            return self.adapter(input, noise, *args, **kwargs)
        _check_base(self)
        with _fetched(base, input) as input:
            with contextlib.nullcontext() if self.gelu is None else self.gelu.behind(input):
                return self.adapter(input, noise, *args, **kwargs)

    def _of_packed(self, x: Tensor) -> dict:
        return {"shape": None if self.adapter.is_convolution else x.shape, "channels": self.out_features, "path": self.path}

    @property
    def watched(self) -> nn.Module:
        """The module whose input tells which of its rows are samples."""
        return self

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, layer={self.layer}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        _rename(state_dict, prefix, lambda name: name if name.startswith("adapter.") else f"adapter.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
