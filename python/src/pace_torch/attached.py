"""Noise on what one of PEFT's layers adds."""

from typing import Optional

import torch
from torch import Tensor, nn

from . import ops
from ._errors import PaceError
from .controller import Pace
from .modules import _autocast, _frozen, _is_traced
from .ops import NO_NOISE, Noise


class AttachedNoise(nn.Module):
    """The noise of one of PEFT's layers: a submodule of it, `pace_noise`, without parameters.

    `forward` maps what the layer's adapter adds, `[R, ..., N]` (`[R, N, ...]` for a convolution), to its product with z. `sigma`
    may be set, and `z` as in `NoisyLinear`.
    """

    def __init__(self, layer: nn.Module, sigma: float, pace: Pace, number: int, path: str):
        super().__init__()
        self.sigma, self.layer, self.path = float(sigma), number, path
        self.z: Optional[Tensor] = None
        self.fixed_rows: frozenset[int] = frozenset()
        self.sample_rows: Optional[int] = None
        # Not submodules: the controller is one of the model, and the layer has this as one.
        self.__dict__.update(pace=pace, watched=layer)

    def forward(self, a: Tensor) -> Tensor:
        noise = NO_NOISE if _is_traced(a) else self._noise(a, a.shape[-1])
        if noise is NO_NOISE:
            return a
        of_convolution = hasattr(self.watched, "conv_fn")
        a = a.movedim(1, -1) if of_convolution else a
        y = ops.noisy_epilogue(torch.zeros_like(a), a.contiguous(), noise)
        return y.movedim(-1, 1) if of_convolution else y

    def follow(self, *_) -> None:
        """Forward pre-hook of the layer: sees to it that the part of each of its adapters passes here, of those that came later too."""
        if torch.compiler.is_compiling():
            return
        if self.training and self.watched.merged:
            raise PaceError(f"the LoRA of `{self.path}` is merged into its weight, where it is not trained: `unmerge_adapter` first")
        magnitudes = getattr(self.watched, "lora_magnitude_vector", {})
        if any(name in magnitudes for name in self.watched.active_adapters[1:]):
            raise PaceError(f"`{self.path}` has DoRA behind another active adapter, to whose noise it would add its own: activate it first, or "
                            "by itself")
        for name, up in self.watched.lora_B.items():
            # DoRA's magnitudes compute all that it adds, for which they call `up` with things that are no samples.
            part = magnitudes[name] if name in magnitudes else up
            if not any(getattr(hook, "__self__", None) is self for hook in part._forward_hooks.values()):
                part.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of what computes the adapter's part."""
        if not isinstance(output, Tensor):
            raise PaceError(f"`{self.path}` returns {type(output).__name__}, expected a tensor, on which there is noise: `noise_head=False`")
        return self(output)

    def compute(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The layer's forward pass: fused where the layer is LoRA around a plain linear layer, PEFT's own otherwise."""
        tensors = None if args or kwargs or _is_traced(x) else self._plain_lora(x)
        if tensors is None:
            return type(self.watched).forward(self.watched, x, *args, **kwargs)
        *tensors, scaling = tensors
        return ops.lora_linear(*tensors, self._noise(x, tensors[4].shape[0]), scale=scaling)

    def _noise(self, x: Tensor, channels: int) -> Noise:
        """The noise of rows like those of `x`, in training."""
        is_used = not getattr(self.watched, "disable_adapters", False)
        if not (is_used and self.training and self.pace.training and self.sigma != 0 and self.pace.is_on_samples(self, x)):
            return NO_NOISE
        self.pace.check_running()
        shape = None if hasattr(self.watched, "conv_fn") else x.shape
        return self.pace.noise(self.layer, self.sigma, x.shape[0], self.z, x.device, shape=shape, channels=channels, path=self.path)

    def _plain_lora(self, x: Tensor) -> Optional[list]:
        """Input, W0, b0, A, B, δb and the scaling of a layer in training that computes `W0·x + b0 + B(A(x))·scaling` and nothing
        else, all of one type."""
        layer = self.watched
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if not self.training or layer.disable_adapters or layer.merged or len(names) != 1:
            return None
        name, base = names[0], layer.base_layer
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        # Ours is one.
        if type(base).forward is not nn.Linear.forward or _hooks(base) + _hooks(down) + _hooks(up) + _hooks(dropout) > 1:
            return None
        if name in getattr(layer, "lora_variant", {}) or getattr(dropout, "p", 0) != 0 or layer.scaling[name] == 0:
            return None
        weight, bias = _frozen(base.weight), _frozen(base.bias)
        if weight.requires_grad or bias is not None and bias.requires_grad:
            return None
        delta_b = None if up.bias is None else layer.scaling[name] * up.bias
        tensors = _autocast(x, weight, bias, down.weight, up.weight, delta_b)
        if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
            return None
        return [*tensors, layer.scaling[name]]

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, layer={self.layer}"


def _hooks(module: nn.Module) -> int:
    """How many hooks wait for a call of a module."""
    return sum(len(hooks) for hooks in (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )) + 2 * hasattr(module, "_hf_hook")
