"""What the layers under noise have in common: settings, shapes, the operator with its derivative, and the key that both passes
must read.
"""

import ctypes
import operator
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import Function, batch_of, check_shape, check_tensor
from ._operator import Derivative, Operator
from .noise import Noise, no_noise, noise_fields


class LayerSettings(NamedTuple):
    """What a layer is told besides its tensors: the fields of its noise, how its rows are arranged, the factor on `B·A`, and
    whether ΔW is never added to W0 before it is multiplied, as that of LoRA add never is. Both passes have the same.
    """

    sigma: float
    per_token: bool
    first_sample: int
    branches: int
    shared_input: bool
    scale: float
    exact: bool


class BackwardSettings(NamedTuple):
    """What the backward pass of a layer is told besides: which gradients are wanted, and the shape of x, if it was not kept."""

    wanted: tuple[bool, ...]
    x_shape: tuple[int, ...]
    layer: LayerSettings


def settings_of(noise: Noise, shared_input: bool, scale: float = 1.0, exact: bool = False) -> LayerSettings:
    if type(noise) is not Noise:
        raise no_noise("noise", noise)
    return LayerSettings(noise.sigma, noise.per_token, noise.first_sample, noise.branches, shared_input, scale, exact)


# --------------------------------------------------------------------------------------------------- fields of C structs


def shape_fields(x_shape: torch.Size, out_features: int, settings: LayerSettings) -> lib.PaceShape:
    elements = torch.Size(x_shape).numel()
    if elements == 0:
        raise PaceError(f"`x` has shape {tuple(x_shape)}, which is empty")
    rows, in_features = x_shape[0], x_shape[-1]
    return lib.PaceShape(
        branches=settings.branches,
        batch=batch_of(rows * settings.branches if settings.shared_input else rows, settings.branches),
        tokens=elements // (rows * in_features),
        in_features=in_features,
        out_features=out_features,
        shared_input=settings.shared_input,
    )


def rows_fields(name: str, x: Tensor, settings) -> lib.PaceShape:
    """The sizes of an operator on outputs, `[rows, ..., features]`."""
    if x.dim() < 2:
        raise PaceError(f"`{name}` has shape {tuple(x.shape)}, expected [rows, ..., features]")
    return lib.PaceShape(
        branches=settings.branches,
        batch=batch_of(x.shape[0], settings.branches, name),
        tokens=x.numel() // max(x.shape[0] * x.shape[-1], 1),
        in_features=1,
        out_features=x.shape[-1],
    )


def layer_flags(settings: LayerSettings) -> int:
    """The flags of a layer that may fold."""
    return lib.EXACT if settings.exact else 0


def y_shape(x: Tensor, out_features: int, settings: LayerSettings) -> list:
    rows = x.shape[0] * settings.branches if settings.shared_input else x.shape[0]
    return [rows, *x.shape[1:-1], out_features]


def check_base(base_weight: Optional[Tensor], base_bias: Optional[Tensor], n: int, k: int) -> None:
    if base_weight is None and base_bias is not None:
        raise PaceError("`base_bias` is given without a `base_weight`")
    check_shape("base_weight", base_weight, n, k)
    check_shape("base_bias", base_bias, n)


def rows_of(name: str, weight: Tensor) -> int:
    """The rows of a matrix."""
    check_tensor(name, weight, 2)
    return weight.shape[0]


def rank_of(lora_a: Tensor, lora_b: Tensor, n: int, k: int) -> int:
    """The rank of `lora_a [r, K]` and `lora_b [N, r]`."""
    rank = rows_of("lora_a", lora_a)
    check_shape("lora_a", lora_a, rank, k)
    check_shape("lora_b", lora_b, n, rank)
    return rank


# ------------------------------------------------------------------------------------------------------------- operator


class Layer:
    """`operator`, a layer under noise, and `derivative`, its backward pass: from what sets the layer apart from the others.

    `inputs` are x, the frozen `base_weight` and `base_bias`, the trained tensors, `key` and `z`; `kept` is what the backward pass
    takes besides dy, in the same order. Both are in the names of `struct`, with `?` behind what may be None. Gradients go to x
    and to the trained tensors; one of these that is not kept is a bias.

    * `out_features(tensors)` is N; `tensors` are the inputs, or dy and what is kept, by name.
    * `fields(settings, tensors, n, k)` are the fields of `struct` besides shape and noise. It checks the trained tensors.
    * `function` is the name in the library of the functions `_forward` and `_backward`, and of their workspace.
    * `s_shape(tensors)` is the shape of a second output `s`, which the backward pass takes behind x; None where there is none.
    * `readers` are how many of the trained tensors, the first ones, have gradients that read x: x is kept if one of these is
      wanted, or always if `readers` is None.
    * `takes_length` is whether the library wants an x of the right length where it does not read it.
    """

    def __init__(
        self,
        name: str,
        struct: type[ctypes.Structure],
        inputs: str,
        kept: str,
        *,
        out_features: Callable[[dict], int],
        fields: Callable[[LayerSettings, dict, int, int], dict],
        function: str,
        s_shape: Optional[Callable[[dict], Optional[Sequence]]] = None,
        readers: Optional[int] = None,
        takes_length: bool = False,
    ):
        self.out_features, self.fields, self.s_shape = out_features, fields, s_shape
        self.names, self.kept = _names(inputs), ("dy", *_names(kept))
        self.trained = self.names[3:-2]
        self.wanted = slice(3, len(self.names) - 2)
        self.readers = slice(None) if readers is None else slice(3, 3 + readers)
        self.z = len(self.names) - 1
        self.keep = operator.itemgetter(*(i for i, name in enumerate(self.names) if i and name in self.kept))
        outputs = "y" if s_shape is None else "y s"
        grads = " ".join(f"grad_{name}" for name in ("input", *self.trained))
        forward = Function(
            f"{function}_forward", struct, inputs=_of_library(self.names), outputs=outputs, fields=self._fields,
            shapes=self._shapes, workspace=function, takes_tf32=True, takes_bf16=True,
        )
        self.backward = Function(
            f"{function}_backward", struct, inputs=_of_library(self.kept), outputs=grads, fields=self._backward_fields,
            shapes=self._backward_shapes, workspace=function, takes_tf32=True, takes_bf16=True,
        )
        self.operator = Operator(
            name, inputs, LayerSettings, forward, self._shapes, outputs=len(outputs.split()), save=self._save,
            gradients=self._gradients,
        )
        self.derivative = Derivative(
            f"{name}_backward",
            f"dy {kept}",
            BackwardSettings,
            self._backward_of_length if takes_length else self.backward,
            self._backward_shapes,
            outputs=1 + len(self.trained),
        )

    def _shapes(self, settings: LayerSettings, *tensors):
        tensors = dict(zip(self.names, tensors))
        shapes = [y_shape(tensors["x"], self.out_features(tensors), settings)]
        return shapes if self.s_shape is None else [*shapes, self.s_shape(tensors)]

    def _fields(self, settings: LayerSettings, *tensors):
        return self._all_fields(settings, tensors[0].shape, dict(zip(self.names, tensors)))

    def _all_fields(self, settings: LayerSettings, x_shape: Sequence[int], tensors: dict) -> dict:
        if len(x_shape) < 2:
            raise PaceError(f"`x` has shape {tuple(x_shape)}, expected [rows, ..., in_features]")
        n, k = self.out_features(tensors), x_shape[-1]
        check_base(tensors["base_weight"], tensors.get("base_bias"), n, k)
        fields = self.fields(settings, tensors, n, k)
        shape = shape_fields(x_shape, n, settings)
        return {"shape": shape, "noise": noise_fields(settings, tensors["key"], tensors["z"], shape), **fields}

    def _save(self, ctx, tensors, settings: LayerSettings, outputs) -> None:
        needs = ctx.needs_input_grad
        if needs[1] or needs[2] or needs[self.z]:
            raise frozen(ctx, base_weight=1, base_bias=2, z=self.z)
        ctx.settings = BackwardSettings((needs[0], *needs[self.wanted]), tensors[0].shape, settings)
        keep_key(ctx, tensors[-2])
        x = tensors[0] if True in needs[self.readers] else None
        ctx.save_for_backward(x, *outputs[1:], *self.keep(tensors))

    def _gradients(self, ctx, dy: Tensor):
        *tensors, key, z = ctx.saved_tensors
        dx, *grads = self.derivative((dy, *tensors, same_key(ctx, key), z), ctx.settings)
        return dx, None, None, *grads, None, None

    def _backward_shapes(self, settings: BackwardSettings, dy, *kept):
        shapes = {name: tensor.shape for name, tensor in zip(self.kept[1:], kept) if tensor is not None}
        shapes = settings.x_shape, *(shapes.get(name, dy.shape[-1:]) for name in self.trained)
        return [shape if wanted else None for shape, wanted in zip(shapes, settings.wanted)]

    def _backward_fields(self, settings: BackwardSettings, *tensors):
        return self._all_fields(settings.layer, settings.x_shape, dict(zip(self.kept, tensors)))

    def _backward_of_length(self, tensors, settings: BackwardSettings):
        dy, x, *others = tensors
        return self.backward((dy, dy.new_empty(settings.x_shape) if x is None else x, *others), settings)


def _names(tensors: str) -> list[str]:
    return tensors.replace("?", "").split()


def _of_library(names: Sequence[str]) -> str:
    return " ".join("key_address" if name == "key" else name for name in names)


# ------------------------------------------------------------------------------------------------------- autograd context


def frozen(ctx, **places: int) -> PaceError:
    """The error for that of these inputs, by their places, which requires a gradient and has none."""
    name = next(name for name, place in places.items() if ctx.needs_input_grad[place])
    return PaceError(f"`{name}` has no gradient, and must not require one")


def keep_key(ctx, key: Optional[Tensor]) -> None:
    """Notes the key of a forward pass, beside saving it."""
    ctx.key = key
    # Compilation runs this on stand-ins, whose versions mean nothing.
    ctx.key_version = key._version if type(key) is Tensor else None
    ctx.runs_again = ctx.key_version is not None and key.is_cuda and _is_checkpointed()


def same_key(ctx, key: Optional[Tensor]) -> Optional[Tensor]:
    """The saved key, if it is the one that the forward pass used.

    Gradient checkpointing saves nothing and runs the forward pass again, which then reads the model's present keys: other
    ones, or the same tensor with other contents. Other hooks bring back a copy of what was saved.
    """
    if type(key) is Tensor and type(ctx.key) is Tensor:
        if ctx.key._version != ctx.key_version:
            raise RuntimeError(_OTHER_NOISE)
        if key.data_ptr() != ctx.key.data_ptr():
            if ctx.runs_again:
                raise RuntimeError(f"{_OTHER_NOISE} (on CUDA nobody looks whether another tensor has the same key: make keys outside of what "
                                   "is checkpointed)")
            # On CUDA by the device: to look would be to wait for it.
            torch._assert_async(key == ctx.key, _OTHER_NOISE)
    return key


_OTHER_NOISE = (
    "gradient checkpointing ran a layer again after the model had moved on to other noise: call backward() before the next forward pass"
)


def _is_checkpointed() -> bool:
    """Whether what is saved now is not kept but made again, by PyTorch's own gradient checkpointing."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # Before PyTorch 2.8 nobody can tell: an error that can be caught rather than one of the device.
        return True
    hooks = top(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"
