"""What the layers of a model have in common: noise keys, branches, the variant of the loss."""

import warnings
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from ._batch import BatchOf, batch_size, call, check_batch_of, find_logits, find_loss, logits_of, twice, with_rows
from ._errors import PaceError, check_choice, check_integer, check_number
from ._in_step import check_in_step
from ._library import device_handle
from ._look import look_at
from .loss import Criterion, Losses, check_criterion, pace_loss
from .ops import Noise

TRACED_IN_TRAINING = "the model is in training, whose noise a traced or exported graph would repeat: call `eval()` first"
OUTSIDE = "a layer with noise ran outside of its model: call the model itself, or `eval()` first"
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
    * `batch_of`: the keyword whose rows are the batch, where that is not the first tensor of a call; or a list of all that have
      these rows.
    * `causal`: for logits of tokens, whether a token's label is the next one's (causal language models) or its own; `inject` and
      `attach` know it of Hugging Face's models.
    * `criterion`: what of the logits is trained, None for the cross-entropy (see `pace_loss`). It is no submodule: put what weights
      it has on the device yourself.
    * `history`: PACE-fast's table of logits `[samples, classes]`, which `state_dict` has.
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
        batch_of: BatchOf,
        criterion: Optional[Criterion] = None,
        device: torch.device,
    ):
        super().__init__()
        self.layers, self.per_token = layers, per_token
        self.variant = check_choice("variant", variant, VARIANTS)
        if variant == "fast" and samples is None:
            raise PaceError("`samples`, the number of training samples, is required by the variant `fast`")
        self.samples = None if samples is None else check_integer("samples", samples, 1)
        self.lambda_ = check_number("lambda_", lambda_, 0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
        self.lazy_interval = check_integer("lazy_interval", lazy_interval, 1)
        # As of `torch.manual_seed`.
        self.seed = check_integer("seed", seed, -(2**63), 2**64 - 1)
        self.criterion = criterion
        self.step = self.iteration = 0
        self.branches = 2 if variant in ("pace", "lazy") else 1
        self.manual_steps = self.drawn = False
        self.shard: Optional[tuple[int, int]] = None
        self.batch_of, self.doubles_input = check_batch_of(batch_of), False
        self.causal: Optional[bool] = None
        self.probed, self.classes = False, None
        self.batch = self.first_sample = self.global_batch = 0
        self.running = False
        self.in_training_step = self.is_labelled = False
        self.keys_elsewhere: dict[torch.device, Tensor] = {}
        # Whether the model runs with gradients, and the layers that have run without since.
        self.with_gradient, self.to_run_again = False, set()
        # Steps of the optimizer that changed the classifier alone, None once that is settled; what counts changes, of both.
        self.lone_steps: Optional[int] = 0
        self.versions: Optional[list[int]] = None
        self.handles: list = []
        self.heads: dict[str, nn.Module] = {}
        self.register_buffer("keys", torch.zeros(layers, dtype=torch.int64, device=device), persistent=False)
        # No buffer: it would lose digits with the model in half precision, and `loss` puts it beside the logits.
        self.history: Optional[Tensor] = None

    def state_dict(self, *args, destination: Optional[dict] = None, **kwargs) -> dict:
        """Where training is: `step`, `iteration` and `history`. Not part of the model's state dict."""
        if destination is not None or args:
            return destination if destination is not None else args[0]
        return {"step": self.step, "iteration": self.iteration, "history": self.history}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False) -> None:
        """Goes on where `state_dict()` was taken."""
        if state_dict.keys() != {"step", "iteration", "history"}:
            raise PaceError(f"`state_dict` has {', '.join(map(str, state_dict))}, expected step, iteration and history")
        self.step, self.iteration = state_dict["step"], state_dict["iteration"]
        history = state_dict["history"]
        self.history = None if history is None else history.to(self.keys.device, copy=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "criterion":
            check_criterion(value, self.label_smoothing)
            # Not a submodule, even if it is a module: it is no part of the model.
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, lambda_={self.lambda_:g}, seed={self.seed}, step={self.step}"

    def forward(self, x: Any) -> Any:
        """Nothing: `nn.Sequential` calls all of its children."""
        return x

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
        self.keys_elsewhere.clear()
        self.step += 1
        self.drawn = True

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple]:
        """Forward pre-hook of the model: fresh noise, which samples of the global batch these are, and two branches of each if
        they start at the input."""
        if not module.training:
            return None
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise PaceError(TRACED_IN_TRAINING)
        if not torch.compiler.is_compiling():
            self._check_model(module)
        if self.to_run_again:
            names = [layer.path for layer in module.modules() if getattr(layer, "layer", None) in self.to_run_again]
            self.to_run_again.clear()
            raise PaceError(f"{len(names)} layers with adapters ran without gradients in the last step, and not again with them "
                            f"({names[0]}): they are within `torch.no_grad()`, in reentrant checkpointing whose input requires no gradient "
                            "(use_reentrant=False, or `model.enable_input_require_grads()`), or `backward()` was not called before the next "
                            "forward pass")
        self.with_gradient = torch.is_grad_enabled()
        self.is_labelled = self.with_gradient and kwargs.get("labels") is not None and not self.in_training_step
        rank, world_size = self._shard()
        self.batch = batch_size(args, kwargs, self.batch_of)
        self.first_sample, self.global_batch = rank * self.batch, world_size * self.batch
        self.running = True
        if not self.manual_steps:
            self.advance()
        elif not self.drawn:
            raise PaceError("`manual_steps` is on: call `model.pace.advance()` before each step")
        if self.doubles_input:
            # A graph that must not break cannot be left to look at the model.
            if not self.probed and not (self.manual_steps and torch.compiler.is_compiling()):
                look_at(module, self, args, kwargs)
            return self.double_rows(module, args, kwargs)
        return None

    def _check_model(self, module: nn.Module) -> None:
        """Whether the model is still the one that was injected."""
        if getattr(module, "_is_replica", False):
            raise PaceError("the model is trained by DataParallel, whose threads would share its noise: train with one process for each "
                            "device, by DistributedDataParallel (torchrun), or on one device (CUDA_VISIBLE_DEVICES=0)")
        for name, head in self.heads.items():
            found = module
            for part in name.split("."):
                found = getattr(found, part, None)
            # What wraps a layer has it among its modules.
            if found is not head and not (isinstance(found, nn.Module) and head in found.modules()):
                raise PaceError(f"`{name}` is no longer the classifier that `inject` found: change it before `inject`, or after `merge`")
        if self.lone_steps is not None:
            self._watch_optimizer(module)

    def _watch_optimizer(self, module: nn.Module) -> None:
        """Warns if the first steps of an optimizer change the classifier alone: it was made before `inject`."""
        heads = {id(parameter) for head in self.heads.values() for parameter in head.parameters()}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad and not parameter.is_inference()]
        versions = [sum(p._version for p in trained if (id(p) in heads) == of_head) for of_head in (True, False)]
        before, self.versions = self.versions or versions, versions
        if versions[1] != before[1] or all(id(p) in heads for p in trained) or not heads:
            self.lone_steps = None
        elif versions[0] != before[0]:
            self.lone_steps += 1
        if self.lone_steps == 3:
            self.lone_steps = None
            warnings.warn("three steps have changed the classifier, and no adapter: make the optimizer after `inject`, from the "
                          "parameters that require a gradient then", stacklevel=2)

    def is_on_samples(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether the rows of a layer's input belong to samples; others, such as those of a table of positions, get no noise."""
        if not layer.fixed_rows:
            return True
        if layer.sample_rows is None:
            return False
        return x.shape[0] not in layer.fixed_rows or x.shape[0] == layer.sample_rows * self.branches * self.batch

    def double_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple]:
        """Forward pre-hook of where the branches start: from here on each sample has two, in every tensor with a row per sample."""
        # `module` may be a block in evaluation within a model in training, which has two branches all the same.
        if not self.training or self.branches == 1:
            return None
        return with_rows(twice, args, kwargs, self.batch, self.batch_of if self.doubles_input else None)

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model: whether it kept the branches apart."""
        self.running = False
        if not module.training:
            return
        if self.is_labelled and self.variant in ("pace", "lazy", "fast") and find_loss(output) is not None:
            raise PaceError("the model was called with `labels` and computed a loss of its own, which has no consistency: leave them out, "
                            "and give them to `pace.loss` (in transformers' Trainer: `compute_loss_func=model.pace.compute_loss`)")
        if self.branches == 1:
            return
        logits = find_logits(output)
        if logits is None:
            return  # whoever computes a loss of such an output knows what it is
        rows = logits.shape[0]
        if rows % (2 * self.batch):
            raise PaceError(f"the model made {rows} rows of logits out of two branches of {self.batch} samples, expected a multiple "
                            f"of {2 * self.batch}: where its branches start (`branches_at`), rows are not samples")
        if self.classes is not None and logits.dim() == 2 and logits.shape[1] != self.classes:
            raise PaceError(f"the model made {logits.shape[1]} logits of a sample, and {self.classes} of one by itself: an argument has as "
                            "many rows as the batch by chance; give `batch_of` a list of those whose rows are samples")

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
        self, layer: int, sigma: float, rows: int, z: Optional[Tensor] = None, device: Optional[torch.device] = None
    ) -> Noise:
        """The noise of a layer whose input has `rows` leading rows, on `device`.

        In a model that runs with gradients, a layer that runs without is one in reentrant checkpointing, which runs it again in the
        backward pass; until then the noise must stay what it is. Where samples are cut into windows (Swin), the windows are numbered
        one after the other.
        """
        first_sample = self.first_sample * self._rows_per_sample(rows, self.branches)
        if self.with_gradient and not torch.is_grad_enabled():
            self.to_run_again.add(layer)
        elif self.to_run_again:
            self.to_run_again.discard(layer)
        return Noise(None if z is not None else self.key(layer, device), sigma, self.per_token, first_sample, self.branches, z)

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

    # ------------------------------------------------------------------------------------------ training step

    def select(self, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The samples of a batch that the next step uses; sets `branches`. `x` is a tensor, or a tuple, list or mapping of some.

        The lazy variant uses half of the batch with two branches at every `lazy_interval`-th call, the whole batch with
        one branch at the others. Every other variant uses the batch as it is. With several processes each halves its
        own.
        """
        if not self.training:
            raise PaceError("the model is in evaluation: `select` and `training_step` are for training")
        if self.variant == "lazy":
            self.branches = 2 if self.iteration % self.lazy_interval == 0 else 1
            if self.branches == 2:
                args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
                batch_of = self.batch_of if kwargs else None
                batch = batch_size(args, kwargs, batch_of)
                half = batch // 2
                if half == 0:
                    raise PaceError("`x` has one sample, expected at least 2 (the lazy variant halves the batch)")
                args, kwargs = with_rows(lambda tensor: tensor[:half], args, kwargs, batch, batch_of)
                x = kwargs or args[0]
                labels = labels[:half]
        self.iteration += 1
        return x, labels

    def loss(self, output: Any, labels: Tensor, index: Optional[Tensor] = None) -> Losses:
        """The variant's loss of what a training forward pass returned; in evaluation without the consistency.

        `output`: the logits, an object or mapping that has them as `logits`, or a tuple that begins with them.

        Logits of tokens, `[R, T, C]` for labels `[B, T]`, are taken at the tokens that have a label other than -100: both terms are
        means over these, as if each were a sample (see `causal`).

        `index`, int64 `[B]`, numbers the samples in the training set; the variant `fast` needs it. Its table is the
        same in every process: after the loss each process sends its rows to all others (`B·C` numbers), so that any
        sampler will do. With a sampler that gives each sample to the same process in every epoch nothing need be sent:
        give `samples` and `index` as numbers within the process, and set `shard` to (rank, number of processes).
        """
        settings = {"label_smoothing": self.label_smoothing, "criterion": self.criterion}
        logits = logits_of(output)
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            raise PaceError(f"`labels` is {type(labels).__name__}, expected a tensor with a row for each sample")
        if logits.dim() == 3 and labels.dim() == 2:
            logits, labels = self._of_tokens(logits, labels)
            if labels.shape[0] == 0:
                return Losses(logits.sum(), *(logits.new_zeros(()) for _ in range(2)), torch.empty(0), logits.shape[1], 0, logits.detach())
        if not self.training:
            return pace_loss(logits, labels, self.lambda_, **settings)
        check_in_step(self)
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

    def _of_tokens(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the tokens that have labels, `[branches·n, C]`, and these, `[n]`."""
        branches = self.branches if self.training else 1
        if logits.shape[:2] != (branches * labels.shape[0], labels.shape[1]):
            raise PaceError(f"`logits` is {tuple(logits.shape)} and `labels` {tuple(labels.shape)}, expected [{branches}·B, T, C] and [B, T]")
        if self.variant == "fast":
            raise PaceError("the variant `fast` keeps a row of logits for each sample, which those of tokens are not: choose another")
        if self.causal is None:
            raise PaceError("are the labels of tokens their own or those of the next one? Set `model.pace.causal` to False or True")
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        taken = labels != -100
        rows = logits.unflatten(0, (branches, -1))[:, taken]
        return rows.flatten(0, 1), labels[taken]

    def compute_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Union[None, int, Tensor] = None) -> Tensor:
        """The total loss, as transformers' `Trainer` wants it: `Trainer(model, args, compute_loss_func=model.pace.compute_loss, ...)`.

        `num_items_in_batch` counts the labels, but for those of -100, in all batches of which gradients are accumulated, in all
        processes. This batch's mean then counts by its share of them, so that the gradients add up to those of one large batch.

        Raises `PaceError` in training for the variants `lazy` and `fast`: they halve the batch before the forward pass and need
        `index`. In evaluation it is cross-entropy.
        """
        if self.training and self.variant in ("lazy", "fast"):
            raise PaceError(f"the variant `{self.variant}` needs more than outputs and labels: give Trainer a `compute_loss` that calls "
                            "`pace.training_step` (docs/pytorch/hugging_face.md)")
        total = self.loss(outputs, labels).total
        if num_items_in_batch is None:
            return total
        labels = labels[:, 1:] if labels.dim() == 2 and self.causal else labels
        return total * labels.ne(-100).sum() / num_items_in_batch

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
            self.in_training_step = False
        return self.loss(output, labels, index)
