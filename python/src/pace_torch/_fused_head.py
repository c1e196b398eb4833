"""A language model's head that leaves its logits to the loss, which computes some of them at a time."""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ._batch import find_logits
from ._dropout import give_forward_back
from ._errors import PaceError
from .lm import OPTIONS, behind_head, lm_gram, lm_loss, takes_gram
from .loss import Losses

# Names that transformers' configurations have for what a model does with its logits. Cohere multiplies, Granite divides.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS, _DIVISORS = ("logit_scale",), ("logits_scaling",)


class _Given(NamedTuple):
    """What the head was given in a forward pass, what it handed on, and the version that this had."""

    hidden: Tensor
    handed: Tensor
    version: int


class FusedHead:
    """In training the head hands on what it is given, which then stands for the logits in the model's output; otherwise it is as it was.

    Until a loss was computed it hands on a probe instead, by which `loss` sees what the model does with its logits.
    """

    def __init__(self, model: nn.Module, pace: nn.Module):
        head = head_of(model)
        config = getattr(model, "config", None)
        self.soft_cap = _from_config(config, _SOFT_CAPS)
        self.scale = _from_config(config, _FACTORS) or 1 / (_from_config(config, _DIVISORS) or 1)
        self.head, self.checked, self.passes = head, False, 0
        self.pace: Optional[nn.Module] = pace
        self._begin()
        self.gram: Optional[tuple[tuple, Tensor]] = None
        head.forward = self.forward

    def __getstate__(self) -> dict:
        # A copy of the model is in no forward pass.
        return {**vars(self), "given": None, "output": None, "calls": 0}

    def _begin(self) -> None:
        """Forgets the last forward pass: what the head was given, how often, and the model's logits."""
        self.given: Optional[_Given] = None
        self.output: Optional[Tensor] = None
        self.calls = 0

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: that nobody takes for logits what stands for them in training."""
        if not self.pace.training:
            return
        if kwargs.get("labels") is not None:
            raise PaceError("the model was called with `labels`, and `fused_head` leaves it no logits for a loss of its own: leave them out, and give "
                            "them to `training_step` or `pace.loss`")
        self._begin()
        self.passes += not self.checked

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model: by which logits `loss` knows those of the last forward pass."""
        if self.pace.training:
            self.output = find_logits(output)

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's forward pass. Of this object rather than a function bound to the head: that could not be pickled."""
        if self.pace is None or not (self.pace.training or self.pace.looking):
            return nn.Linear.forward(self.head, hidden)
        if self.pace.looking:
            return hidden
        handed = hidden if self.checked else _probe(hidden, self.passes)
        self.given, self.calls = _Given(hidden, handed, _version(handed)), self.calls + 1
        return handed

    def remove(self) -> None:
        """Makes the head what it was."""
        self.pace = None
        give_forward_back(self.head, self.forward)

    def loss(self, output: Tensor, labels: Tensor, denominator: Any) -> Losses:
        """The loss of the logits that the head would have made, `labels` being those of each token's logits."""
        if self.given is None:
            raise PaceError("the model did not call its head (one of `resize_token_embeddings` came after `fused_head`), or `loss` was called "
                            "twice for a forward pass, which `fused_head` cannot be")
        hidden, handed, version = self.given
        if self.calls > 1:
            raise PaceError(f"the model calls its head {self.calls} times in a forward pass, which `fused_head` cannot follow: leave it out")
        if _version(handed) != version:
            raise PaceError("the model changes its logits in place, which `fused_head` cannot follow: leave it out")
        # What wraps a model may copy its output; a look at the values waits for the device.
        if not self.checked or output is not self.output:
            self._check(handed, output)
        self._begin()
        weight, bias = self.head.weight, self.head.bias
        if hasattr(weight, "full_tensor") or weight.shape != (self.head.out_features, self.head.in_features):
            raise PaceError("the weight of the head is sharded: `fused_head` needs all of it in each process")
        # Autocast runs the body in 16 bits.
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        settings = self.pace.settings
        return lm_loss(
            hidden.flatten(0, 1), weight, labels.flatten(), settings.lambda_, bias=bias, logit_scale=self.scale, soft_cap=self.soft_cap,
            gram=self._gram(weight, settings), denominator=denominator, **{name: getattr(settings, name) for name in OPTIONS},
        )

    def _gram(self, weight: Tensor, settings: Any) -> Optional[Tensor]:
        """The Gram matrix of a head that is not trained, made once."""
        if weight.requires_grad or not takes_gram(settings, self.soft_cap):
            return None
        version = (self.head.weight.data_ptr(), self.head.weight._version, weight.dtype)
        if self.gram is None or self.gram[0] != version:
            self.gram = version, lm_gram(weight)
        return self.gram[1]

    @torch.no_grad()
    def _check(self, handed: Tensor, output: Tensor) -> None:
        """Whether the logits are those of the last forward pass, and what is known of the model: all else would be lost."""
        exact = torch.promote_types(handed.dtype, torch.float32)
        known = behind_head(handed.to(exact), self.scale, self.soft_cap)
        coarsest = max((handed.dtype, output.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        near = max(2 * torch.finfo(coarsest).eps, 1e-5), torch.finfo(coarsest).tiny
        if output.shape == handed.shape and torch.allclose(output.to(exact), known, *near, equal_nan=True):
            self.checked = True
            return
        stale = "this is not the output of the last forward pass, whose loss alone `fused_head` can compute"
        changed = "the model changes the logits behind its head in a way that `fused_head` does not know: leave it out"
        raise PaceError(stale if self.checked else changed if output is self.output else f"{stale}, or {changed}")


def _from_config(config: Any, names: tuple[str, ...]) -> Optional[float]:
    """The first of these that a model's configuration has, or that of its text model."""
    configs = [config.get_text_config(decoder=True), config] if hasattr(config, "get_text_config") else [config]
    values = [getattr(one, name, None) for one in configs for name in names]
    return next((value for value in values if value is not None), None)


@torch.no_grad()
def _probe(hidden: Tensor, number: int) -> Tensor:
    """Logits of the shape of `hidden` from -1000 to 1000, many of them small: what a model does to large ones is seen too. By its number
    one is told from the next."""
    values = torch.linspace(-10, 10, hidden.shape[-1], device=hidden.device) ** 3
    return values.roll(number).to(hidden.dtype).expand_as(hidden).clone()


def head_of(model: nn.Module) -> nn.Linear:
    """The head of a model, if it can be fused."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        what = "has no `get_output_embeddings`" if head is None else f"has a {type(head).__module__}.{type(head).__name__} for it"
        raise PaceError(f"`fused_head` needs a head that is an nn.Linear without an adapter and without noise, and `model` {what}")
    if "forward" in vars(head):
        raise PaceError("`fused_head` needs a head whose forward pass nobody has replaced, as hooks of accelerate do")
    return head


def _version(hidden: Tensor) -> int:
    """How often it was changed in place, which tensors of inference mode do not count."""
    return 0 if hidden.is_inference() else hidden._version
