"""Whether a model in training is what PACE was put into, and does what it needs; raises `PaceError` or warns if not."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from ._batch import find_logits, find_loss
from ._errors import PaceError
from ._step_noise import looks_packed

if TYPE_CHECKING:
    from .controller import Pace


def check_model(pace: "Pace", module: nn.Module) -> None:
    """Whether the model is still the one that was injected."""
    if getattr(module, "_is_replica", False):
        raise PaceError("the model is trained by DataParallel, whose threads would share its noise: train with one process for each "
                        "device, by DistributedDataParallel (torchrun), or on one device (CUDA_VISIBLE_DEVICES=0)")
    for name, head in pace.heads.items():
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        # What wraps a layer has it among its modules.
        if found is not head and not (isinstance(found, nn.Module) and head in found.modules()):
            raise PaceError(f"`{name}` is no longer the classifier that `inject` found: change it before `inject`, or after `merge`")
    if pace.lone_steps is not None:
        _watch_optimizer(pace, module)


def _watch_optimizer(pace: "Pace", module: nn.Module) -> None:
    """Warns if the first steps of an optimizer change the classifier alone: it was made before `inject`."""
    heads = {id(parameter) for head in pace.heads.values() for parameter in head.parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad and not parameter.is_inference()]
    versions = [sum(p._version for p in trained if (id(p) in heads) == of_head) for of_head in (True, False)]
    before, pace.versions = pace.versions or versions, versions
    if versions[1] != before[1] or all(id(p) in heads for p in trained) or not heads:
        pace.lone_steps = None
    elif versions[0] != before[0]:
        pace.lone_steps += 1
    if pace.lone_steps == 3:
        pace.lone_steps = None
        warnings.warn("three steps have changed the classifier, and no adapter: make the optimizer after `inject`, from the "
                      "parameters that require a gradient then", stacklevel=2)


def check_rerun(pace: "Pace", module: nn.Module) -> None:
    """That all layers of the last step ran with gradients."""
    if not pace.to_run_again:
        return
    names = [layer.path for layer in module.modules() if hasattr(layer, "fixed_rows") and layer.layer in pace.to_run_again]
    pace.to_run_again.clear()
    raise PaceError(f"{len(names)} layers with adapters ran without gradients in the last step, and not again with them "
                    f"({names[0]}): they are within `torch.no_grad()`, in reentrant checkpointing whose input requires no gradient "
                    "(use_reentrant=False, or `model.enable_input_require_grads()`), or `backward()` was not called before the next "
                    "forward pass")


def check_packing(pace: "Pace", kwargs: dict) -> None:
    """That rows in which several sequences are packed are known to be such."""
    if pace.packing is not None or pace.settings.noise_shape == "BTC" or pace.settings.variant == "baseline":
        return
    if kwargs.get("cu_seq_lens_q") is not None:
        raise PaceError("`cu_seq_lens_q` says that the rows are packed, and PACE would give all sequences of a row one noise: `packed=True`")
    if not pace.probed and looks_packed(kwargs):
        warnings.warn("`position_ids` begin anew within a row, as in packed ones, whose sequences would share their noise: `packed=True` "
                      "gives each its own", stacklevel=3)


def check_generation(pace: "Pace", kwargs: dict) -> None:
    """That no noise gets into a cache of keys and values."""
    for name, value in kwargs.items():
        is_cache = name == "past_key_values" and value is not None or any(kind.__name__ == "Cache" for kind in type(value).__mro__)
        what = "noise of a step" if pace.settings.variant != "baseline" else "input of the head for logits"
        if is_cache and (pace.settings.variant != "baseline" or pace.fused is not None):
            raise PaceError(f"the model is called with a cache of keys and values (`{name}`) in training, as `generate` does, which would have the "
                            f"{what}: call `eval()` first")


def check_cache(pace: "Pace", module: nn.Module, kwargs: dict) -> None:
    """That the attention of transformers' models tells packed sequences apart, which it does not beside a cache."""
    is_on = kwargs.get("use_cache", getattr(getattr(module, "config", None), "use_cache", False))
    if is_on and not pace.probed and pace.settings.packed and kwargs.get("cu_seq_lens_q") is None:
        warnings.warn("`use_cache` is on, beside which transformers' models attend from one packed sequence to another: "
                      "`model.config.use_cache = False`", stacklevel=3)


def check_output(pace: "Pace", output: Any) -> None:
    """That what a model in training returned can be trained, and that the model kept the branches apart."""
    if pace.is_labelled and pace.variant in ("pace", "lazy", "fast") and find_loss(output) is not None:
        raise PaceError("the model was called with `labels` and computed a loss of its own, which has no consistency: leave them out, "
                        "and give them to `pace.loss` (in transformers' Trainer: `compute_loss_func=model.pace.compute_loss`)")
    if pace.branches == 1:
        return
    logits = find_logits(output)
    if logits is None:
        return  # whoever computes a loss of such an output knows what it is
    rows = logits.shape[0]
    if rows % (2 * pace.batch):
        raise PaceError(f"the model made {rows} rows of logits out of two branches of {pace.batch} samples, expected a multiple "
                        f"of {2 * pace.batch}: where its branches start (`branches_at`), rows are not samples")
    if pace.classes is not None and logits.dim() == 2 and logits.shape[1] != pace.classes:
        raise PaceError(f"the model made {logits.shape[1]} logits of a sample, and {pace.classes} of one by itself: an argument has as "
                        "many rows as the batch by chance; give `batch_of` a list of those whose rows are samples")
