"""A training step as one CUDA graph."""

import dataclasses
from typing import Optional

import torch
from torch import Tensor, nn

from . import ops
from ._errors import PaceError
from ._in_step import check_in_step
from .controller import Pace
from .loss import Losses


class CapturedStep:
    """Forward pass, loss and backward pass of a PACE model as one CUDA graph, replayed with fresh noise at each call.

    A step launches more than a thousand kernels, and on a fast GPU Python may take longer over that than they take to run. A
    graph is launched once. It is made for batches of one shape, from `x [B, ...]`, `labels [B]` and, for the variant
    `fast`, `index [B]`; nothing is trained while it is made. A call takes such a batch, puts the gradients into `grad` of
    the parameters (it does not add to them), and returns the losses and logits, static tensors that the next call
    overwrites. The optimizer stays outside. `autocast` is the type of autocast (bfloat16), or None for the model's own.

    With several processes the replay averages nothing: do that with `parameter.grad` before the optimizer's step.

    Raises `PaceError` for what wraps a model (give the model itself), a model that is not on CUDA or not in training, for the variant `lazy`, whose batches have two
    shapes, and for batches of another shape or type. As in any graph, what the model holds must stay where it is:
    parameters may be written to, not exchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        index: Optional[Tensor] = None,
        *,
        autocast: Optional[torch.dtype] = None,
    ):
        if not isinstance(getattr(model, "pace", None), Pace):
            raise PaceError("`model` is not a PACE model; give the model itself, not what wraps it")
        self.pace = pace = model.pace
        if pace.settings.packed:
            raise PaceError("`packed` is True: how many sequences a batch has would have to be known before the graph is replayed")
        if not x.is_cuda:
            raise PaceError(f"`x` is on {x.device}, expected a CUDA device: other devices have no graphs to capture")
        if pace.variant == "lazy":
            raise PaceError("the variant `lazy` changes the number of its rows from step to step, which a graph cannot")
        self.batch = {"x": x.clone(), "labels": labels.clone(), "index": None if index is None else index.clone()}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def run() -> Losses:
            for parameter in self.parameters:
                parameter.grad = None
            # Casts of one step are of no use to the next, whose weights are others.
            with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
                losses = pace.training_step(model, *self.batch.values())
            losses.total.backward()
            return losses

        history = None if pace.history is None else pace.history.clone()
        before = pace.step, pace.iteration, pace.manual_steps, pace.drawn
        grads = [parameter.grad for parameter in self.parameters]
        pace.manual_steps = True
        try:
            # Libraries and allocators settle on a stream of their own before the capture.
            side = torch.cuda.Stream(x.device)
            side.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(side):
                for _ in range(2):
                    pace.advance()
                    run()
            torch.cuda.current_stream(x.device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.losses = run()
        finally:
            pace.step, pace.iteration, pace.manual_steps, pace.drawn = before
            if pace.history is not None:
                pace.history.zero_() if history is None else pace.history.copy_(history)
            self.grads = [parameter.grad for parameter in self.parameters]
            for parameter, grad in zip(self.parameters, grads):
                parameter.grad = grad
        self.losses = dataclasses.replace(self.losses, total=self.losses.total.detach())
        self.keys, self.history = pace.keys, pace.history

    def __call__(self, x: Tensor, labels: Tensor, index: Optional[Tensor] = None) -> Losses:
        pace = self.pace
        for (name, own), given in zip(self.batch.items(), (x, labels, index)):
            if own is None and given is None:
                continue
            if own is None or given is None or own.shape != given.shape or own.dtype != given.dtype:
                described = lambda t: "None" if t is None else f"{tuple(t.shape)} of {t.dtype}"
                raise PaceError(f"`{name}` is {described(given)}, but the step was captured for {described(own)}")
            own.copy_(given, non_blocking=True)
        if self.history is not None and pace.history is not self.history:
            # A checkpoint was loaded, or the table starts anew.
            self.history.zero_() if pace.history is None else self.history.copy_(pace.history)
            pace.history = self.history
        self.keys.copy_(ops.keys(pace.seed, pace.step, pace.layers, self.keys.device))
        pace.step += 1
        pace.iteration += 1
        check_in_step(pace)
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads):
            parameter.grad = grad
        return self.losses
