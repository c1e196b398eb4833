"""The noise of a model's steps: its keys, which sample a row is of, and what of it a layer gets."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from ._batch import batch_size
from ._errors import PaceError
from ._library import device_handle
from .ops import Noise

OUTSIDE = "a layer with noise ran outside of its model: call the model itself, or `eval()` first"
# The samples of a process are numbered from here on, times its rank, where processes pack different numbers of sequences.
_PACKED_PER_PROCESS = 2**32


class Packing(NamedTuple):
    """Which of the packed sequences of a batch a token is in: `sample_of_token` int64 `[B, T]`; `rows` `[branches·B, T]`, the same with the
    sequences of each branch numbered behind those of the last; and how many `sequences` there are."""

    sample_of_token: Tensor
    rows: Tensor
    sequences: int


class StepNoise:
    """The part of the controller that layers ask for noise."""

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
        self.keys_elsewhere.clear()
        self.step += 1
        self.drawn = True

    @contextlib.contextmanager
    def sequences(self, sample_of_token: Tensor) -> Iterator[None]:
        """A context for training steps on packed rows, of a model that is not called with `position_ids`: `sample_of_token` `[B, T]` says
        which of the batch's sequences, from 0 on, each token is in. A sequence gets the noise that it would have as sample of that number,
        unpacked.
        """
        if self.settings.noise_shape == "BTC":
            raise PaceError("`sequences` are for one draw per sequence and channel: under the `noise_shape` BTC no two tokens share noise")
        if not isinstance(sample_of_token, Tensor) or sample_of_token.dtype not in (torch.int32, torch.int64) or sample_of_token.dim() != 2:
            what = f"{tuple(sample_of_token.shape)} of {sample_of_token.dtype}" if isinstance(sample_of_token, Tensor) else (
                type(sample_of_token).__name__)
            raise PaceError(f"`sample_of_token` is {what}, expected an integer tensor [B, T]")
        if sample_of_token.numel() == 0 or sample_of_token.min() < 0:
            raise PaceError("`sample_of_token` has no tokens, or numbers below 0")
        before, self.given_sequences = self.given_sequences, sample_of_token.long()
        try:
            yield
        finally:
            self.given_sequences = before

    def _sample_of_token(self, args: tuple, kwargs: dict) -> Optional[Tensor]:
        """Which packed sequence each token of a call is in, `[B, T]`; None if each row is a sample. In evaluation rows may be such all the
        same, and the call without positions."""
        if self.given_sequences is not None or not self.settings.packed:
            return self.given_sequences
        positions = kwargs.get("position_ids")
        if not self.training and (not isinstance(positions, Tensor) or positions.dim() != 2):
            return None
        batch = self._batch_size(args, kwargs) if self.training else positions.shape[0]
        return _starts(positions, batch).flatten().cumsum(0).view(batch, -1) - 1

    def _batch_size(self, args: tuple, kwargs: dict) -> int:
        """The rows of a training step's batch."""
        batch = batch_size(args, kwargs, self.settings.batch_of)
        if batch == 0:
            raise PaceError("the batch is empty: the first tensor of the call, or the one that `batch_of` names, has no rows")
        return batch

    @torch.compiler.disable
    def _pack(self, sample_of_token: Tensor) -> Packing:
        """How the rows of this forward pass are packed."""
        if sample_of_token.shape[0] != self.batch:
            raise PaceError(f"`sample_of_token` has {sample_of_token.shape[0]} rows, expected {self.batch} like the batch")
        sequences = int(sample_of_token.max()) + 1
        rows = torch.cat([sample_of_token + branch * sequences for branch in range(self.branches)])
        return Packing(sample_of_token, rows, sequences)

    def _shard(self) -> tuple[int, int]:
        if self.shard is not None:
            return self.shard
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def _rows_per_sample(self, rows: int, branches: int) -> int:
        """How many of a layer's leading rows belong to a sample and branch."""
        if self.batch == 0:
            raise PaceError(OUTSIDE)
        samples = branches * self.batch
        if rows == 0 or rows % samples:
            raise PaceError(f"a layer has {rows} leading rows, expected a multiple of the model's {samples}")
        return rows // samples

    def key(self, layer: int, device: Optional[torch.device] = None) -> Tensor:
        """The key of a layer in this step."""
        keys = self.keys
        if device is not None and device != keys.device:
            # Models may be spread over devices, or be loaded to another one (`assign=True`).
            keys = self.keys_elsewhere.get(device)
            if keys is None:
                keys = self.keys_elsewhere[device] = self.keys.to(device)
        return keys[layer : layer + 1]

    def check_running(self) -> None:
        """Raises `PaceError` unless the model runs, or a part of it once more in its backward pass: noise would be that of another batch."""
        if not self.running and torch._C._current_graph_task_id() == -1:
            raise PaceError(OUTSIDE)

    def noise(
        self,
        layer: int,
        sigma: float,
        rows: int,
        z: Optional[Tensor] = None,
        device: Optional[torch.device] = None,
        *,
        shape: Optional[tuple[int, ...]] = None,
        channels: int = 0,
        path: Optional[str] = None,
    ) -> Noise:
        """The noise of a layer whose input has `rows` leading rows, on `device`; of packed rows, whose input is of this `shape` and whose
        output has these `channels`. `path` is the layer's name.

        In a model that runs with gradients, a layer that runs without is one in reentrant checkpointing, which runs it again in the
        backward pass; until then the noise must stay what it is. Where samples are cut into windows (Swin), the windows are numbered
        one after the other.
        """
        if self.with_gradient and not torch.is_grad_enabled():
            self.to_run_again.add(layer)
        elif self.to_run_again:
            self.to_run_again.discard(layer)
        if self.packing is not None and z is None:
            return self._packed_noise(layer, sigma, device, shape, channels, path)
        first_sample = self.first_sample * self._rows_per_sample(rows, self.branches)
        return Noise(None if z is not None else self.key(layer, device), sigma, self.per_token, first_sample, self.branches, z)

    def _packed_noise(
        self,
        layer: int,
        sigma: float,
        device: Optional[torch.device],
        shape: Optional[tuple[int, ...]],
        channels: int,
        path: Optional[str],
    ) -> Noise:
        """The noise of packed rows: that of each sequence, for each of its tokens."""
        rows = self.packing.rows
        if device is not None and device != rows.device:
            rows = rows.to(device)
        if shape is not None and len(shape) == 2 and shape[0] == rows.numel():
            rows = rows.flatten()
        elif shape is None or len(shape) != 3 or tuple(shape[:2]) != tuple(rows.shape):
            is_of = "that of a convolution" if shape is None else tuple(shape)
            raise PaceError(f"the input of `{path}` is {is_of} in a batch of packed rows, expected "
                            f"[{rows.shape[0]}, {rows.shape[1]}, K] or [{rows.numel()}, K]: give it no noise (`sigma = 0`), or do not pack")
        key, first_sample = self.key(layer, device), self._shard()[0] * _PACKED_PER_PROCESS
        table = ops.noise(Noise(key, sigma, False, first_sample, self.branches), self.packing.sequences, channels)
        return Noise(key, sigma, True, 0, self.branches, table, rows)

    def ones_of_a_branch(self, x: Tensor) -> Tensor:
        """`[rows, 1, ...]` with the rows of one of the branches of `x`."""
        rows = self._rows_per_sample(x.shape[0], self.branches) * self.batch
        return x.new_ones(rows, *[1] * (x.dim() - 1))

    def drop_path(self, layer: int, drop_prob: float, x: Tensor) -> Tensor:
        """Shared DropPath of the residual branch `x`, `[rows, ...]` with one row per sample and branch."""
        return ops.drop_path(
            x,
            self.key(layer, x.device),
            drop_prob,
            first_sample=self.first_sample,
            branches=self._rows_per_sample(x.shape[0], 1),
            global_batch=self.global_batch,
        )


def _starts(position_ids: Any, batch: int) -> Tensor:
    """Where a sequence begins in packed rows, `[B, T]`: at the first token, and where a position is not the next one."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch):
        what = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise PaceError(f"`position_ids` is {what}, and `packed` is True: expected positions [{batch}, T] as a keyword of the model, by which "
                        "sequences are told apart (or `with model.pace.sequences(sample_of_token)`)")
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff() != 1], 1).expand(batch, -1)


def looks_packed(kwargs: dict) -> bool:
    """Whether the positions of a call begin anew within a row, without a mask that would say that what is before is padding."""
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or kwargs.get("attention_mask") is not None:
        return False
    return bool((positions.diff() < 0).any())
