"""What the layers of a model have in common: noise keys, branches, the variant of the loss."""

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from ._library import PaceError, device_handle
from .loss import Losses, pace_loss
from .ops import Noise

VARIANTS = ("pace", "lazy", "fast", "noise", "baseline")


class Pace(nn.Module):
    """The controller of a PACE model, `model.pace`. It adds nothing to the state dict.

    Attributes that may be read and set:

    * `seed`, `step`: the noise is a pure function of (seed, step, layer, branch, sample, channel). `step` counts the
      training forward passes; set it to continue a run with the noise that it would have had.
    * `iteration`: counts the calls of `select`, for the lazy variant.
    * `branches`: 1 or 2, for the next training forward pass; `select` sets it.
    * `manual_steps`: whether the caller draws the noise of each step with `advance()`, which then copies the keys in
      place, so that captured CUDA graphs and `fullgraph` compilation see them. Otherwise each training forward pass
      draws.
    * `shard`: (rank, number) of the processes that share a batch, if torch.distributed is not what knows.
    * `history`: PACE-fast's table of logits `[samples, classes]`, a buffer that is not saved.
    """

    def __init__(
        self,
        layers: int,
        *,
        variant: str,
        lambda_: float,
        lazy_interval: int,
        per_token: bool,
        seed: int,
        samples: Optional[int],
        label_smoothing: float,
        device: torch.device,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise PaceError(f"`variant` is {variant!r}, expected one of {', '.join(VARIANTS)}")
        if variant == "fast" and not samples:
            raise PaceError("`samples`, the number of training samples, is required by the variant `fast`")
        if lazy_interval < 1:
            raise PaceError(f"`lazy_interval` is {lazy_interval}, expected at least 1")
        self.layers, self.variant, self.lambda_, self.lazy_interval = layers, variant, lambda_, lazy_interval
        self.per_token, self.seed, self.samples, self.label_smoothing = per_token, seed, samples, label_smoothing
        self.step = self.iteration = 0
        self.branches = 2 if variant in ("pace", "lazy") else 1
        self.manual_steps = self.drawn = False
        self.shard: Optional[tuple[int, int]] = None
        self.batch = self.first_sample = self.global_batch = 0
        self.handles: list = []
        self.register_buffer("keys", torch.zeros(layers, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("history", None, persistent=False)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, lambda_={self.lambda_:g}, seed={self.seed}, step={self.step}"

    # ------------------------------------------------------------------------------------------ noise

    @torch.compiler.disable
    def advance(self) -> None:
        """Draws the noise of the next step. Not to be captured in a CUDA graph: replays would repeat the noise."""
        if self.keys.is_cuda:
            with torch.cuda.device(self.keys.device):
                if torch.cuda.is_current_stream_capturing():
                    raise PaceError("the noise of a step is drawn inside of a CUDA graph: set `manual_steps`, and call "
                                    "`model.pace.advance()` before each replay")
            # Kernels cannot be loaded while a graph is captured, so not at its first layer.
            device_handle(self.keys.device.index)
        keys = ops.keys(self.seed, self.step, self.layers, self.keys.device)
        if self.manual_steps:
            self.keys.copy_(keys)
        else:
            # A new tensor: an earlier forward pass may still have its backward pass before it.
            self.keys = keys
        self.step += 1
        self.drawn = True

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: fresh noise, and which samples of the global batch these are."""
        if not module.training:
            return
        x = args[0] if args else kwargs["x"]
        rank, world_size = self._shard()
        self.batch = x.shape[0]
        self.first_sample, self.global_batch = rank * self.batch, world_size * self.batch
        if not self.manual_steps:
            self.advance()
        elif not self.drawn:
            raise PaceError("`manual_steps` is on: call `model.pace.advance()` before each step")

    def double_rows(self, module: nn.Module, args: tuple) -> Optional[tuple]:
        """Forward pre-hook of the first block with noise: from here on each sample has two branches."""
        if not module.training or self.branches == 1:
            return None
        return torch.cat([args[0], args[0]]), *args[1:]

    def _shard(self) -> tuple[int, int]:
        if self.shard is not None:
            return self.shard
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def _rows_per_sample(self, rows: int, branches: int) -> int:
        """How many of a layer's leading rows belong to a sample and branch."""
        if self.batch == 0:
            raise PaceError("a layer with noise ran outside of its model: call the model itself")
        samples = branches * self.batch
        if rows == 0 or rows % samples:
            raise PaceError(f"a layer has {rows} leading rows, expected a multiple of the model's {samples}")
        return rows // samples

    def key(self, layer: int) -> Tensor:
        """The key of a layer in this step."""
        return self.keys[layer : layer + 1]

    def noise(self, layer: int, sigma: float, rows: int, z: Optional[Tensor] = None) -> Noise:
        """The noise of a layer whose input has `rows` leading rows.

        Where samples are cut into windows (Swin), the windows are numbered one after the other.
        """
        first_sample = self.first_sample * self._rows_per_sample(rows, self.branches)
        return Noise(None if z is not None else self.key(layer), sigma, self.per_token, first_sample, self.branches, z)

    def drop_path(self, layer: int, drop_prob: float, x: Tensor) -> Tensor:
        """Shared DropPath of the residual branch `x`, `[rows, ...]` with one row per sample and branch."""
        return ops.drop_path(
            x,
            self.key(layer),
            drop_prob,
            first_sample=self.first_sample,
            branches=self._rows_per_sample(x.shape[0], 1),
            global_batch=self.global_batch,
        )

    # ------------------------------------------------------------------------------------------ training step

    def select(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of a batch that the next step uses; sets `branches`.

        The lazy variant uses half of the batch with two branches at every `lazy_interval`-th call, the whole batch with
        one branch at the others. Every other variant uses the batch as it is. With several processes each halves its
        own.
        """
        if not self.training:
            raise PaceError("the model is in evaluation: `select` and `training_step` are for training")
        if self.variant == "lazy":
            self.branches = 2 if self.iteration % self.lazy_interval == 0 else 1
            if self.branches == 2:
                half = x.shape[0] // 2
                if half == 0:
                    raise PaceError("`x` has one sample, expected at least 2 (the lazy variant halves the batch)")
                x, labels = x[:half], labels[:half]
        self.iteration += 1
        return x, labels

    def loss(self, logits: Tensor, labels: Tensor, index: Optional[Tensor] = None) -> Losses:
        """The variant's loss of the logits of a training forward pass, or cross-entropy in evaluation.

        `index`, int64 `[B]`, numbers the samples in the training set; the variant `fast` needs it. Its table is the
        same in every process: after the loss each process sends its rows to all others (`B·C` numbers), so that any
        sampler will do. With a sampler that gives each sample to the same process in every epoch nothing need be sent:
        give `samples` and `index` as numbers within the process, and set `shard` to (rank, number of processes).
        """
        settings = {"label_smoothing": self.label_smoothing}
        if not self.training:
            return pace_loss(logits, labels, self.lambda_, **settings)
        if self.variant != "fast":
            rows = self.branches * labels.shape[0]
            if logits.shape[0] != rows:
                raise PaceError(f"`logits` has {logits.shape[0]} rows, expected {rows}: {labels.shape[0]} labels and "
                                f"{self.branches} branches")
            return pace_loss(logits, labels, self.lambda_, **settings)
        if index is None:
            raise PaceError("`index` is required by the variant `fast`")
        real = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if self.history is None:
            self.history = torch.zeros(self.samples, logits.shape[1], dtype=real, device=logits.device)
        elif self.history.dtype != real or self.history.device != logits.device:
            self.history = self.history.to(logits.device, real)
        losses = pace_loss(logits, labels, self.lambda_, history=self.history, index=index, **settings)
        if self.shard is None and self._shard()[1] > 1:
            self._exchange(index, logits.detach())
        return losses

    @torch.no_grad()
    def _exchange(self, index: Tensor, logits: Tensor) -> None:
        """Writes the rows of every process to the history, in the order of the processes: the last of a row stays."""
        world_size = self._shard()[1]
        all_index = [torch.empty_like(index) for _ in range(world_size)]
        all_logits = [torch.empty_like(logits) for _ in range(world_size)]
        dist.all_gather(all_index, index.contiguous())
        dist.all_gather(all_logits, logits.contiguous())
        for rows, values in zip(all_index, all_logits):
            self.history[rows] = values.to(self.history.dtype)

    def training_step(self, model: nn.Module, x: Tensor, labels: Tensor, index: Optional[Tensor] = None) -> Losses:
        """Forward pass and loss of a batch; call `backward()` on `total`. `model` is the model, or what wraps it."""
        x, labels = self.select(x, labels)
        return self.loss(model(x), labels, index)
