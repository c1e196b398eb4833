"""A language model's head that leaves its logits to the loss, which computes some of them at a time."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from ._checks import check_generation
from ._errors import PaceError
from .lm import OPTIONS, lm_gram, lm_loss
from .loss import Losses
from .settings import OF_PROBABILITIES


class FusedHead:
    """In training the head hands on what it is given, which then stands for the logits in the model's output; otherwise it is as it was."""

    def __init__(self, model: nn.Module, pace: nn.Module):
        head = head_of(model)
        config = getattr(model, "config", None)
        self.soft_cap: Optional[float] = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies, Granite divides.
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.pace, self.head, self.checked = pace, head, False
        # What the head was given in this forward pass, and the version that it had.
        self.given: Optional[tuple[Tensor, int]] = None
        # Forward passes since the last loss.
        self.calls = 0
        self.gram: Optional[tuple[tuple, Tensor]] = None
        head.forward = self.forward

    def __getstate__(self) -> dict:
        # A copy of the model is in no forward pass.
        return {**vars(self), "given": None, "calls": 0}

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: that nobody takes for logits what stands for them in training."""
        if not self.pace.training:
            return
        if kwargs.get("labels") is not None:
            raise PaceError("the model was called with `labels`, and `fused_head` leaves it no logits for a loss of its own: leave them out, and give "
                            "them to `training_step` or `pace.loss`")
        check_generation(self.pace, kwargs)

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's forward pass. Of this object rather than a function bound to the head: that could not be pickled."""
        if not self.pace.training:
            return nn.Linear.forward(self.head, hidden)
        self.given, self.calls = (hidden, _version(hidden)), self.calls + 1
        return hidden

    def remove(self) -> None:
        """Makes the head what it was."""
        del self.head.forward

    def loss(self, output: Tensor, labels: Tensor, denominator: Any) -> Losses:
        """The loss of the logits that the head would have made, `labels` being those of each token's logits."""
        if self.given is None:
            raise PaceError("the model did not call its head (one of `resize_token_embeddings` came after `fused_head`), or `loss` was called "
                            "twice for a forward pass, which `fused_head` cannot be")
        hidden, version = self.given
        if _version(hidden) != version:
            raise PaceError("the model changes its logits in place, which `fused_head` cannot follow: leave it out")
        # Of several forward passes only the last is known.
        if not self.checked or self.calls > 1 and output.data_ptr() != hidden.data_ptr():
            self._check(hidden, output)
        self.given, self.calls = None, 0
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
        if weight.requires_grad or settings.divergence in OF_PROBABILITIES or settings.both_branches or self.soft_cap is not None:
            return None
        version = (self.head.weight.data_ptr(), self.head.weight._version, weight.dtype)
        if self.gram is None or self.gram[0] != version:
            self.gram = version, lm_gram(weight)
        return self.gram[1]

    @torch.no_grad()
    def _check(self, hidden: Tensor, output: Tensor) -> None:
        """Whether the model does with its logits what is known of it: all else would be lost."""
        known = hidden * self.scale
        known = known if self.soft_cap is None else self.soft_cap * torch.tanh(known / self.soft_cap)
        if output.shape != hidden.shape or not torch.allclose(output.to(known.dtype), known, 1e-2, 1e-3):
            why = "this is not the output of the last forward pass, whose loss alone `fused_head` can compute, or " if self.calls > 1 else ""
            raise PaceError(f"{why}the model changes the logits behind its head in a way that `fused_head` does not know: leave it out")
        self.checked = True


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
