"""What the layers of a model have in common: noise keys, branches, the variant of the loss."""

import dataclasses
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ._batch import twice, twice_packed, with_rows
from ._checks import check_cache, check_generation, check_model, check_output, check_packing, check_rerun
from ._dropout import SharedDropout
from ._errors import PaceError, check_choice, check_integer
from ._fused_head import FusedHead
from ._look import look_at, look_at_dropout
from ._step_loss import StepLoss
from ._step_noise import Packing, StepNoise
from .settings import OF_TOKENS, Settings, settings_from

TRACED_IN_TRAINING = "the model is in training, whose noise a traced or exported graph would repeat: call `eval()` first"
_NAMES = tuple(field.name for field in dataclasses.fields(Settings))


def _check_shard(shard: Any) -> Optional[tuple[int, int]]:
    is_pair = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in shard)
    if shard is not None and not (is_pair and 0 <= shard[0] < shard[1]):
        raise PaceError(f"`shard` is {shard!r}, expected None or (rank, number) of processes")
    return shard


def _check_history(history: Any) -> Optional[Tensor]:
    is_table = isinstance(history, Tensor) and history.dim() == 2 and history.is_floating_point() and history.layout == torch.strided
    if history is not None and (not is_table or history.is_meta):
        what = f"{tuple(history.shape)} of {history.dtype} on {history.device}" if isinstance(history, Tensor) else type(history).__name__
        raise PaceError(f"`history` is {what}, expected None or a floating tensor [samples, classes]")
    return history


# Of what may be set besides the settings: the value as it is kept, or `PaceError`.
_CHECKS = {
    "step": lambda step: check_integer("step", step, 0, 2**64 - 1),
    "iteration": lambda iteration: check_integer("iteration", iteration, 0),
    "branches": lambda branches: check_integer("branches", branches, 1, 2),
    "manual_steps": lambda manual_steps: check_choice("manual_steps", manual_steps, (True, False)),
    "causal": lambda causal: check_choice("causal", causal, (None, True, False)),
    "shard": _check_shard,
    "history": _check_history,
}
_STATE = ("step", "iteration", "history")


class Pace(StepNoise, StepLoss, nn.Module):
    """The controller of a PACE model, `model.pace`. It adds nothing to the state dict.

    `settings` are those of `inject` and `attach` (`pace_torch.Settings`). Each is an attribute too, which may be read and set, such as
    `lambda_`, `seed`, `batch_of` or `criterion`; what is set is checked. `criterion` is no submodule: put what weights it has on the
    device yourself.

    Other attributes that may be read and set, and are checked too:

    * `step`: the noise is a pure function of (seed, step, layer, branch, sample, channel). `step` counts the
      training forward passes; set it to continue a run with the noise that it would have had.
    * `iteration`: counts the calls of `select`, for the lazy variant.
    * `branches`: 1 or 2, for the next training forward pass; `select` sets it.
    * `manual_steps`: whether the caller draws the noise of each step with `advance()`, which then copies the keys in
      place, so that captured CUDA graphs and `fullgraph` compilation see them. Otherwise each training forward pass
      draws.
    * `shard`: (rank, number) of the processes that share a batch, if torch.distributed is not what knows.
    * `causal`: for logits of tokens, whether a token's label is the next one's (causal language models) or its own; `inject` and
      `attach` know it of Hugging Face's models.
    * `history`: PACE-fast's table of logits `[samples, classes]`, which `state_dict` has.
    """

    settings: Settings
    # Of these: as they are for tokens, and whether noise is drawn per token too.
    of_tokens: Settings
    per_token: bool

    def __init__(self, layers: int, settings: Optional[Settings] = None, *, device: Optional[torch.device] = None, **more: Any):
        super().__init__()
        self.settings = dataclasses.replace(settings, **more) if settings is not None else settings_from(more)
        self.layers = layers
        self.step = self.iteration = 0
        self.branches = 2 if self.variant in ("pace", "lazy") else 1
        self.manual_steps = self.drawn = False
        self.shard: Optional[tuple[int, int]] = None
        self.doubles_input = False
        self.causal: Optional[bool] = None
        self.probed, self.classes = False, None
        # Whether the branches are known to differ by noise alone, or by dropout as they may.
        self.is_alike = self.settings.dropout == "independent"
        # 0 before the first forward pass: none has an empty batch.
        self.batch = self.first_sample = self.global_batch = 0
        # Whether the model runs; whether that is a look at it, without noise, and by `fused_head` without logits too.
        self.running = self.looking = False
        self.fused: Optional[FusedHead] = None
        self.packing: Optional[Packing] = None
        # Which sequence each token of the last forward pass is in, of packed rows.
        self.sample_of_token: Optional[Tensor] = None
        self.shared_dropout: list[SharedDropout] = []
        self.dropout_before: list[tuple[nn.Module, str, float]] = []
        self.given_sequences: Optional[Tensor] = None
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
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False) -> None:
        """Goes on where `state_dict()` was taken. Raises `PaceError`, and stays where it is, if it is no such state."""
        if not isinstance(state_dict, Mapping) or state_dict.keys() != set(_STATE):
            what = f"has {', '.join(map(str, state_dict))}" if isinstance(state_dict, Mapping) else f"is {type(state_dict).__name__}"
            raise PaceError(f"`state_dict` {what}, expected step, iteration and history")
        self.step, self.iteration, history = (_CHECKS[name](state_dict[name]) for name in _STATE)
        # `loss` puts it beside the logits.
        self.history = None if history is None else history.detach().clone()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES:
            name, value = "settings", self._with_setting(name, value)
        if name == "settings":
            # Not a submodule, even if a setting is a module: it is no part of the model.
            of_tokens = dataclasses.replace(value, labelled_only=OF_TOKENS["labelled_only"])
            self.__dict__.update(settings=value, of_tokens=of_tokens, per_token=value.noise_shape == "BTC")
        else:
            super().__setattr__(name, _CHECKS[name](value) if name in _CHECKS else value)

    def _with_setting(self, name: str, value: Any) -> Settings:
        """The settings with one of them changed, if it can be changed in a model that is there."""
        settings = dataclasses.replace(self.settings, **{name: value})
        if name == "dropout" and value != self.settings.dropout:
            raise PaceError("`dropout` is done to a model by `inject` and `attach`: give it to them")
        if name == "fused_head" and value != self.settings.fused_head:
            raise PaceError("`fused_head` is done to a model by `inject` and `attach`: give it to them")
        if name == "variant" and value != self.settings.variant:
            if "baseline" in (value, self.settings.variant):
                raise PaceError("`variant` is baseline in a model without noise in its layers, and only there: give it to `inject` or `attach`")
            self.branches = 2 if value in ("pace", "lazy") else 1
        return settings

    def extra_repr(self) -> str:
        return f"variant={self.variant}, lambda_={self.lambda_:g}, seed={self.seed}, step={self.step}"

    def forward(self, x: Any) -> Any:
        """Nothing: `nn.Sequential` calls all of its children."""
        return x

    def before_any_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model, also in evaluation and without noise."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return
        if module.training:
            check_generation(self, kwargs)
        self.sample_of_token = self._sample_of_token(args, kwargs)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple]:
        """Forward pre-hook of the model: fresh noise, which samples of the global batch these are, and two branches of each if
        they start at the input."""
        if not module.training:
            return None
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise PaceError(TRACED_IN_TRAINING)
        if not torch.compiler.is_compiling():
            check_model(self, module)
        check_rerun(self, module)
        self.with_gradient = torch.is_grad_enabled()
        self.is_labelled = self.with_gradient and kwargs.get("labels") is not None and not self.in_training_step
        rank, world_size = self._shard()
        self.batch = self._batch_size(args, kwargs)
        self.first_sample, self.global_batch = rank * self.batch, world_size * self.batch
        self.packing = None
        if self.sample_of_token is not None:
            self.packing = self._pack(self.sample_of_token)
            check_cache(self, module, kwargs)
        elif not torch.compiler.is_compiling():
            check_packing(self, kwargs)
        self.running = True
        if not self.manual_steps:
            self.advance()
        elif not self.drawn:
            raise PaceError("`manual_steps` is on: call `model.pace.advance()` before each step")
        if not self.is_alike and self.branches == 2 and not torch.compiler.is_compiling():
            look_at_dropout(module, self, args, kwargs)
        if self.doubles_input:
            # A graph that must not break cannot be left to look at the model.
            if not self.probed and not (self.manual_steps and torch.compiler.is_compiling()):
                look_at(module, self, args, kwargs)
            return self.double_rows(module, args, kwargs)
        return None

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
        doubled = with_rows(twice, args, kwargs, self.batch, self.settings.batch_of if self.doubles_input else None)
        return doubled if self.packing is None else (doubled[0], {**doubled[1], **twice_packed(kwargs)})

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the model: whether it kept the branches apart. Runs without `output` if the forward pass failed."""
        self.running = False
        if output is None:
            # What ran without gradients does not run again.
            self.to_run_again.clear()
        if module.training:
            check_output(self, output)


def _setting(name: str) -> property:
    return property(lambda self: getattr(self.settings, name))


for _name in _NAMES:
    setattr(Pace, _name, _setting(_name))
