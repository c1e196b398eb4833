"""The loss of a model's steps: of samples or of tokens, with the variant's consistency."""

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ._batch import batch_size, call, logits_of, with_rows
from ._errors import PaceError
from ._in_step import check_in_step
from .loss import Losses, evaluate
from .settings import SQUARED_ERROR, Denominator


class StepLoss:
    """The part of the controller that makes a loss of what the model returned."""

    def select(self, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The samples of a batch that the next step uses; sets `branches`. `x` is a tensor, or a tuple, list or mapping of some.

        The lazy variant uses half of the batch with two branches at every `lazy_interval`-th call, the whole batch with
        one branch at the others. Every other variant uses the batch as it is. With several processes each halves its
        own.
        """
        if not self.training:
            raise PaceError("the model is in evaluation: `select` and `training_step` are for training")
        if self.settings.variant == "lazy":
            _check_labels(labels)
            self.branches = 2 if self.iteration % self.lazy_interval == 0 else 1
            if self.branches == 2:
                args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
                batch_of = self.batch_of if kwargs else None
                batch = batch_size(args, kwargs, batch_of)
                half = batch // 2
                if half == 0:
                    raise PaceError(f"`x` has {batch} samples, expected at least 2 (the lazy variant halves the batch)")
                if labels.shape[0] != batch:
                    raise PaceError(f"`labels` has {labels.shape[0]} rows, and the batch {batch} samples")
                args, kwargs = with_rows(lambda tensor: tensor[:half], args, kwargs, batch, batch_of)
                x = kwargs or args[0]
                labels = labels[:half]
        self.iteration += 1
        return x, labels

    def loss(
        self, output: Any, labels: Tensor, index: Optional[Tensor] = None, *, denominator: Denominator = None
    ) -> Losses:
        """The variant's loss of what a training forward pass returned; in evaluation without the consistency.

        `output`: the logits, an object or mapping that has them as `logits`, or a tuple that begins with them.

        Logits of tokens, `[R, T, C]` for labels `[B, T]`, are taken at the tokens that have a label other than `ignore_index`: both terms
        are means over these, as if each were a sample (see `causal`). `denominator` is that of `pace_loss`.

        `index`, int64 `[B]`, numbers the samples in the training set; the variant `fast` needs it. Its table is the
        same in every process: after the loss each process sends its rows to all others (`B·C` numbers), so that any
        sampler will do. With a sampler that gives each sample to the same process in every epoch nothing need be sent:
        give `samples` and `index` as numbers within the process, and set `shard` to (rank, number of processes).
        """
        logits = logits_of(output)
        _check_labels(labels)
        self._place_class_weights(logits)
        if self.training:
            check_in_step(self)
        if self.training and self.fused is not None and (logits.dim() != 3 or labels.dim() != 2):
            raise PaceError(f"`logits` is {tuple(logits.shape)} and `labels` {tuple(labels.shape)}: `fused_head` is for those of tokens, [B, T]")
        if logits.dim() == 3 and labels.dim() == 2:
            return self._loss_of_tokens(logits, labels, denominator)
        if not self.training:
            return evaluate(logits, labels, self.settings, denominator=denominator)
        if self.settings.variant != "fast":
            rows = self.branches * labels.shape[0]
            if logits.shape[0] != rows:
                raise PaceError(f"`logits` has {logits.shape[0]} rows, expected {rows}: {labels.shape[0]} labels and "
                                f"{self.branches} branches")
            return evaluate(logits, labels, self.settings, denominator=denominator)
        if index is None:
            raise PaceError("`index` is required by the variant `fast`")
        real = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if self.history is None:
            self.history = torch.zeros(self.settings.samples, logits.shape[1], dtype=real, device=logits.device)
        elif self.history.dtype != real or self.history.device != logits.device:
            self.history = self.history.to(logits.device, real)
        losses = evaluate(logits, labels, self.settings, denominator=denominator, history=self.history, index=index)
        if self.shard is None and self._shard()[1] > 1:
            self._exchange(index, logits.detach())
        return losses

    def _place_class_weights(self, logits: Tensor) -> None:
        """Puts the weights of the classes beside the logits, once: a copy to a GPU would wait for it at each step."""
        weights = self.settings.class_weights
        if weights is not None and weights.device != logits.device:
            self.class_weights = weights.to(logits.device)

    def _loss_of_tokens(self, logits: Tensor, labels: Tensor, denominator: Denominator) -> Losses:
        """The loss of logits `[branches·B, T, C]` at the tokens that have labels, `[B, T]`."""
        branches = self.branches if self.training else 1
        if logits.shape[:2] != (branches * labels.shape[0], labels.shape[1]):
            raise PaceError(f"`logits` is {tuple(logits.shape)} and `labels` {tuple(labels.shape)}, expected [{branches}·B, T, C] and [B, T]")
        if self.settings.variant == "fast":
            raise PaceError("the variant `fast` keeps a row of logits for each sample, which those of tokens are not: choose another")
        if self.settings.criterion == SQUARED_ERROR:
            raise PaceError(f"`criterion` is {SQUARED_ERROR!r}, and the logits are of tokens, whose targets are classes")
        if self.training and self.fused is not None:
            return self.fused.loss(logits, self._labels_of_tokens(labels), denominator)
        branch0, labels = logits.detach()[: labels.shape[0]], self._labels_of_tokens(labels)
        if self.settings.criterion is None:
            # A view: tokens without a label are no rows less, but count for nothing.
            losses = evaluate(logits.flatten(0, 1), labels.flatten(), self.of_tokens, denominator=denominator)
        else:
            taken = labels != self.settings.ignore_index
            rows = logits.unflatten(0, (branches, -1))[:, taken].flatten(0, 1)
            if rows.shape[0] == 0:
                zeros = (rows.new_zeros(()) for _ in range(2))
                return Losses(rows.sum(), *zeros, torch.empty(0), logits.shape[2], 0, branch0)
            losses = evaluate(rows, labels[taken], self.settings, denominator=denominator)
        return Losses(losses.total, losses.classification, losses.consistency, losses.status, losses.classes, 0, branch0)

    def _labels_of_tokens(self, labels: Tensor) -> Tensor:
        """The label of each token's logits, `[B, T]`: of a causal model the next token's, if that is of the same sequence."""
        if labels.dtype != torch.int64:
            raise PaceError(f"`labels` of tokens are of {labels.dtype}, expected int64")
        if self.causal is None:
            raise PaceError("are the labels of tokens their own or those of the next one? Set `model.pace.causal` to False or True")
        if not self.causal:
            return labels
        ignored, sample_of_token = self.settings.ignore_index, self.sample_of_token
        # Positions may be one row for all.
        if sample_of_token is not None and sample_of_token.shape[1] == labels.shape[1] and len(sample_of_token) in (1, len(labels)):
            goes_on = sample_of_token.diff() == 0
            return F.pad(torch.where(goes_on.to(labels.device), labels[:, 1:], ignored), (0, 1), value=ignored)
        return F.pad(labels[:, 1:], (0, 1), value=ignored)

    def compute_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Union[None, int, Tensor] = None) -> Tensor:
        """The total loss, as transformers' `Trainer` wants it: `Trainer(model, args, compute_loss_func=model.pace.compute_loss, ...)`.

        `num_items_in_batch` counts the labels, but for those of -100, in all batches of which gradients are accumulated, in all
        processes. Both sums over tokens are divided by it; a mean over samples counts by its share of them. So the gradients add up to
        those of one large batch.

        Raises `PaceError` in training for the variants `lazy` and `fast`: they halve the batch before the forward pass and need
        `index`. In evaluation it is the criterion.
        """
        if self.training and self.settings.variant in ("lazy", "fast"):
            raise PaceError(f"the variant `{self.settings.variant}` needs more than outputs and labels: give Trainer a `compute_loss` that "
                            "calls `pace.training_step` (docs/pytorch/hugging_face.md)")
        if num_items_in_batch is None:
            return self.loss(outputs, labels).total
        if self.settings.ignore_index != -100:
            raise PaceError(f"`ignore_index` is {self.settings.ignore_index}, and Trainer counts the labels other than -100")
        of_tokens = isinstance(labels, Tensor) and labels.dim() == 2 and logits_of(outputs).dim() == 3
        if of_tokens and self.settings.criterion is None:
            # Of no labels at all the sums are 0, and stay it.
            count = num_items_in_batch.clamp(min=1) if isinstance(num_items_in_batch, Tensor) else max(num_items_in_batch, 1)
            return self.loss(outputs, labels, denominator=count).total
        labels_here = self._labels_of_tokens(labels) if of_tokens else labels
        return self.loss(outputs, labels).total * labels_here.ne(-100).sum() / num_items_in_batch

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

    def training_step(self, model: nn.Module, x: Any, labels: Tensor, index: Optional[Tensor] = None) -> Losses:
        """Forward pass and loss of a batch; call `backward()` on `total`. `model` is the model, or what wraps it.

        `x` is what the model takes: a tensor; a mapping, whose items are its keywords; or a tuple or list of its arguments.
        """
        x, labels = self.select(x, labels)
        self.in_training_step = True
        try:
            output = call(model, x)
        finally:
            # Hooks do not run after a KeyboardInterrupt.
            self.in_training_step = self.running = False
        return self.loss(output, labels, index)


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        raise PaceError(f"`labels` is {type(labels).__name__}, expected a tensor with a row for each sample")
