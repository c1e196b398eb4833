"""What a model is trained with: settings that `inject` and `attach` take alike, checked when they are made."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Optional, Union

import torch
from torch import Tensor

from . import _library as lib
from ._batch import BatchOf, check_batch_of
from ._dropout import DROPOUTS
from ._errors import PaceError, check_choice, check_integer, check_number

# A scalar of logits `[B, C]` and labels `[B, ...]`.
Criterion = Callable[[Tensor, Tensor], Tensor]

DIVERGENCES = {
    "squared_difference": lib.DIVERGENCE_SQUARED_DIFFERENCE,
    "mean_squared_difference": lib.DIVERGENCE_MEAN_SQUARED_DIFFERENCE,
    "centered_squared_difference": lib.DIVERGENCE_CENTERED_SQUARED_DIFFERENCE,
    "symmetric_kl": lib.DIVERGENCE_SYMMETRIC_KL,
    "kl": lib.DIVERGENCE_KL,
    "jensen_shannon": lib.DIVERGENCE_JENSEN_SHANNON,
}
OF_PROBABILITIES = ("symmetric_kl", "kl", "jensen_shannon")
SQUARED_ERROR = "mean_squared_error"
# Options that are no choice where head and loss are one operator: a cross-entropy of the tokens that have labels.
OF_TOKENS = {"criterion": None, "labelled_only": True}
VARIANTS = ("pace", "lazy", "fast", "noise", "baseline")


@dataclass(frozen=True, eq=False)
class LossOptions:
    """What a loss is made of, `total = criterion + λ·consistency`. The defaults are the paper's (equation 11).

    * `lambda_`: strength λ of the consistency.
    * `divergence`: the consistency of a sample, of the logits l0, l1 of its branches, Δ = l0 − l1, p and q their softmaxes:
      "squared_difference" `Σ_c Δ_c²` over raw logits, the paper's; "mean_squared_difference" `1/C Σ_c Δ_c²`;
      "centered_squared_difference" `Σ_c (Δ_c − mean Δ)²`, without the offset that a softmax does not see; "symmetric_kl"
      `½(KL(p‖q) + KL(q‖p))`, R-Drop's; "kl" `T²·KL(q_T‖p_T)` at the `temperature` T, branch 1 being the target, to which no
      gradient goes if `detach_target`; "jensen_shannon" `½(KL(p‖m) + KL(q‖m))`, m = ½(p + q), at most log 2.
    * `both_branches`: whether the criterion is the mean of that of both branches (R-Drop) rather than that of branch 0 (PACE).
    * `labelled_only`: whether samples labelled `ignore_index` take no part in the consistency either. They never do in the criterion;
      tokens without a label take part in neither, whatever this says.
    * `criterion`: None is cross-entropy; "mean_squared_error" is for targets `[B, C]` (`[B]` if C is 1), the mean over samples and
      columns; a function maps logits `[B, C]`, float32 or float64, and labels of any shape and type with B rows to a scalar, by
      PyTorch's own operators.
    * `label_smoothing`, `class_weights` `[C]`: of the cross-entropy, as in `torch.nn.functional.cross_entropy`.

    Raises `PaceError` for what is out of range or has no meaning beside the rest.
    """

    lambda_: float = 1.0
    divergence: str = "squared_difference"
    temperature: float = 1.0
    detach_target: bool = False
    both_branches: bool = False
    labelled_only: bool = False
    class_weights: Optional[Tensor] = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    criterion: Union[None, str, Criterion] = None

    def __post_init__(self):
        check_number("lambda_", self.lambda_, 0)
        check_choice("divergence", self.divergence, tuple(DIVERGENCES))
        if check_number("temperature", self.temperature, 0) == 0:
            raise PaceError("`temperature` is 0, expected more than 0")
        for name in ("detach_target", "both_branches", "labelled_only"):
            check_choice(name, getattr(self, name), (True, False))
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_integer("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        self._check_class_weights()
        if self.divergence != "kl":
            for name in ("temperature", "detach_target"):
                if getattr(self, name) != getattr(LossOptions, name):
                    raise PaceError(f"`{name}` is {getattr(self, name)}, which only the divergence \"kl\" has, beside {self.divergence!r}")
        self._check_criterion()

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if weights is None:
            return
        if not isinstance(weights, Tensor) or weights.dim() != 1 or not weights.is_floating_point():
            what = f"{tuple(weights.shape)} of {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
            raise PaceError(f"`class_weights` is {what}, expected a floating tensor [C]")
        if weights.requires_grad:
            raise PaceError("`class_weights` requires a gradient, and has none")

    def _check_criterion(self) -> None:
        criterion = self.criterion
        if criterion is None:
            return
        if isinstance(criterion, str) and criterion != SQUARED_ERROR or not isinstance(criterion, str) and not callable(criterion):
            what = repr(criterion) if isinstance(criterion, str) else type(criterion).__name__
            raise PaceError(f"`criterion` is {what}, expected a function of logits and labels, \"{SQUARED_ERROR}\", or None")
        named = f"the `criterion` {criterion!r}, which has no classes" if criterion == SQUARED_ERROR else (
            "a `criterion`, which has to do that itself")
        if self.label_smoothing != 0:
            raise PaceError(f"`label_smoothing` is {self.label_smoothing} beside {named}")
        if self.class_weights is not None:
            raise PaceError(f"`class_weights` are given beside {named}")
        if criterion == SQUARED_ERROR and self.divergence in OF_PROBABILITIES:
            raise PaceError(f"`divergence` is {self.divergence!r}, of probabilities, beside the `criterion` {criterion!r}, for which logits are "
                            "none")


@dataclass(frozen=True, eq=False)
class Settings(LossOptions):
    """What a model is trained with: the options of the loss, and what is of the model's steps.

    * `variant`: `pace` (two branches at each step), `lazy` (at every `lazy_interval`-th, with half of the batch),
      `fast` (one branch, consistent with its logits of the last epoch; needs `samples`, the size of the training set),
      `noise` (one branch, no consistency), `baseline` (adapters without noise).
    * `noise_shape`: `BC` draws per sample and channel, `BTC` per token too.
    * `seed`: of the noise.
    * `batch_of`: the keyword of a call whose rows are the batch, by default the first tensor's; or a list of keywords, and no other
      arguments are doubled.
    * `dropout`: what the dropout of a model draws for the two branches: "independent", masks for each, so that they differ by these too, as
      in R-Drop; "shared", one for both, as DropPath; "off", none. Dropout within attention, which is no layer, cannot be shared, and is
      off then. `merge` and `detach` give a model its dropout back.
    * `packed`: whether the rows of a batch are several sequences each, that begin where `position_ids` do not go on. Each gets noise
      of its own (see `Pace.sequences`).
    * `fused_head`: for language models whether the head and the loss are one operator, which makes some logits at a time (`lm_loss`). In
      training the model's output then has what the head was given in place of logits; in evaluation it has logits.
    """

    variant: str = "pace"
    lazy_interval: int = 2
    noise_shape: str = "BC"
    seed: int = 0
    samples: Optional[int] = None
    batch_of: BatchOf = None
    packed: bool = False
    dropout: str = "independent"
    fused_head: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        check_integer("lazy_interval", self.lazy_interval, 1)
        check_choice("noise_shape", self.noise_shape, ("BC", "BTC"))
        # As of `torch.manual_seed`.
        check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.samples is not None:
            check_integer("samples", self.samples, 1)
        elif self.variant == "fast":
            raise PaceError("`samples`, the number of training samples, is required by the variant `fast`")
        if self.variant == "fast" and self.both_branches:
            raise PaceError("`both_branches` is True beside the variant `fast`, which has one")
        check_batch_of(self.batch_of)
        check_choice("dropout", self.dropout, DROPOUTS)
        if check_choice("packed", self.packed, (True, False)) and self.noise_shape == "BTC":
            raise PaceError("`packed` is True beside the `noise_shape` BTC, by which no two tokens share noise: leave it out")
        if check_choice("fused_head", self.fused_head, (True, False)):
            # Tokens without a label take part in nothing, whatever `labelled_only` says.
            if self.criterion is not OF_TOKENS["criterion"]:
                raise PaceError("`criterion` is given beside `fused_head`, which computes the cross-entropy of tokens")
            if self.variant == "fast":
                raise PaceError("`fused_head` is True beside the variant `fast`, which keeps a row of logits for each sample")
        if self.packed and self.variant == "fast":
            raise PaceError("`packed` is True beside the variant `fast`, which keeps a row of logits for each sample")


def settings_from(given: dict[str, Any]) -> Settings:
    """The settings of these names; raises `PaceError` for a name that is none."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name not in names:
            raise PaceError(f"`{name}` is no setting, expected one of {', '.join(names)}")
    return Settings(**given)


def takes_settings(function: Callable) -> Callable:
    """Shows `**settings` as what they are in the signature of a function."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Settings)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *more])
    return function


# Divides the sums of a loss in place of what is counted.
Denominator = Union[None, float, Tensor]


def check_denominator(denominator: Any, device: torch.device, dtype: torch.dtype) -> Denominator:
    """A number above 0, or a tensor of no dimension, whose value nobody looks at, on the device of a loss and of its type."""
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        if denominator.dim() > 0 or denominator.dtype == torch.bool or denominator.is_complex():
            raise PaceError(f"`denominator` is {tuple(denominator.shape)} of {denominator.dtype}, expected a number or a tensor of no dimension")
        if denominator.requires_grad:
            raise PaceError("`denominator` requires a gradient, and has none")
        return denominator.to(device, dtype, non_blocking=True)
    if check_number("denominator", denominator, 0) == 0 or 1 / denominator == inf:
        raise PaceError(f"`denominator` is {denominator}, expected more than 0")
    return denominator
