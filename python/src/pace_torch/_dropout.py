"""Dropout beside two branches: drawn for each by itself, shared by both, or off."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from ._errors import PaceError

if TYPE_CHECKING:
    from .controller import Pace

DROPOUTS = ("independent", "shared", "off")
_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class SharedDropout:
    """The forward pass of a dropout layer whose mask holds in both branches, around the one that it had."""

    def __init__(self, layer: nn.Module, pace: "Pace"):
        self.layer, self.was_called = layer, False
        self.pace: Optional[Pace] = pace
        # Somebody may have replaced it, as hooks of accelerate do.
        self.before = vars(layer).get("forward")
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        layer, pace = self.layer, self.pace
        self.was_called = True
        # Other rows are those of a table that all samples share.
        if pace is None or not layer.training or pace.branches == 1 or layer.p == 0 or pace.batch == 0 or x.shape[0] % (2 * pace.batch):
            return self._drop(x)
        mask = self._drop(torch.ones_like(x[: x.shape[0] // 2]))
        return x * torch.cat([mask, mask])

    def _drop(self, x: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, x) if self.before is None else self.before(x)

    def remove(self) -> None:
        """Makes the layer what it was; who has replaced the forward pass since goes on to the one before."""
        self.pace = None
        give_forward_back(self.layer, self.forward, self.before)


def give_forward_back(module: nn.Module, ours: Callable, before: Optional[Callable] = None) -> None:
    """Puts the forward pass back that was there before `ours`, unless somebody has put another around it since."""
    if vars(module).get("forward") != ours:
        return
    if before is None:
        del module.forward
    else:
        module.forward = before


def take_dropout(model: nn.Module, pace: "Pace") -> None:
    """Does to a model's dropout what the setting says. What attention is told of by a number (`attention_dropout`) cannot be shared, and
    is off then too."""
    if pace.settings.dropout == "independent":
        return
    for module in model.modules():
        if isinstance(module, _LAYERS):
            if pace.settings.dropout == "off":
                switch_off(pace, module, "p")
            else:
                pace.shared_dropout.append(SharedDropout(module, pace))
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float) and value > 0:
                switch_off(pace, module, name)


def switch_off(pace: "Pace", module: nn.Module, name: str) -> None:
    """Sets a probability to 0, and notes what it was."""
    pace.dropout_before.append((module, name, getattr(module, name)))
    setattr(module, name, 0.0)


def give_dropout_back(pace: "Pace") -> None:
    """Undoes `take_dropout`."""
    for shared in pace.shared_dropout:
        shared.remove()
    for module, name, value in pace.dropout_before:
        setattr(module, name, value)
    pace.shared_dropout, pace.dropout_before = [], []


def check_branches_alike(pace: "Pace", run, device: torch.device) -> None:
    """Raises `PaceError` if the two branches differ in training but for their noise. `run()` gives the logits of a batch, without noise, in
    two branches. Layers of dropout that are not called give their probability to attention: they are switched off.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        logits = run()
        unshared = [one.layer for one in pace.shared_dropout if not one.was_called and one.layer.p > 0]
        for layer in unshared:
            switch_off(pace, layer, "p")
        logits = run() if unshared else logits
    if logits is None:
        return
    one, two = logits.float().chunk(2)
    if not torch.allclose(one, two, rtol=1e-2, atol=1e-3 * max(float(one.abs().max()), math.ulp(1.0))):
        raise PaceError(f"`dropout` is {pace.settings.dropout!r}, and the branches differ without noise all the same: the model draws at random "
                        "by other means than layers and probabilities that are called dropout")
