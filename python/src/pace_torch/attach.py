"""PACE on the LoRA that PEFT has put into a model: noise on what it adds, and consistency between two branches."""

import operator
import warnings
from typing import Any, Optional

from torch import nn

from ._errors import PaceError, check_choice
from ._dropout import give_forward_back
from ._fused_head import head_of
from ._layers import drop_paths_of, is_peft, nearest_classifiers
from .attached import AttachedNoise
from .controller import Pace
from .inject import FIRST_NOISY_BLOCK, INPUT, block_of, check_model, control, put_into, sigmas_of, take_out, unwrapped
from .settings import settings_from, takes_settings

# Kinds of LoRA that PEFT computes otherwise than by adding `B(A(x))·scaling`, and whose sum is known to be right all the same.
_VARIANTS = ("DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant")
# Layers that PEFT computes by merging, without calling what adds to them.
_MERGED = ("ParamWrapper", "MultiheadAttention")


@takes_settings
def attach(
    model: nn.Module,
    *,
    sigma: float = 1.0,
    first_noisy: Optional[int] = None,
    noise_head: bool = True,
    branches_at: str = INPUT,
    **settings: Any,
) -> nn.Module:
    """Puts PACE on the LoRA that PEFT has put into a model (`peft.get_peft_model`), in place, and returns it.

    What LoRA adds to a layer, `B(A(x))·scaling`, is multiplied by noise in training, also where the layer is quantised or
    LoRA is rsLoRA, and all that DoRA adds. What PEFT trains, saves, loads, merges and computes in evaluation is
    as it was: `save_pretrained`, `from_pretrained`, `merge_and_unload`. `detach` takes PACE off again. The controller is `model.pace`; train by
    `model.pace.training_step(model, batch, labels)`.

    Layers around a plain `nn.Linear`, with no dropout before A and all in one type (which autocast sees to), are computed by the
    fused operator, others by PEFT and a multiplication.

    * `noise_head`: whether a classifier that PEFT trains in full (`modules_to_save`) is under noise as well, as in the official
      code.
    * `sigma`, `first_noisy`, `branches_at` and `**settings` are those of `inject`.

    Dropout draws for each branch by itself, unless `dropout` says otherwise: the consistency is then between two dropouts too.

    Raises `PaceError` for a model without LoRA, or that has PACE already. Layers with adapters of other kinds are an error; those with
    LoRA that is not computed by linear layers or convolutions (embeddings, parameters) are trained without noise, which a warning says.
    """
    of_pace = settings_from(settings)
    check_model(model, branches_at)
    check_choice("branches_at", branches_at, (INPUT, FIRST_NOISY_BLOCK))
    check_choice("noise_head", noise_head, (True, False))
    if of_pace.fused_head:
        head_of(model)
    layers, heads = _layers(model, noise_head)
    if not any(parameter.requires_grad for layer in layers.values() for name, parameter in layer.named_parameters() if "lora_" in name):
        raise PaceError("the LoRA of `model` is frozen: load it with `is_trainable=True`")
    merged = next((path for path, layer in layers.items() if layer.merged), None)
    if merged:
        raise PaceError(f"the LoRA of `{merged}` is merged into its weight: `unmerge_adapter` first")
    names = [*layers, *heads]
    noisy = of_pace.variant != "baseline"
    pace = Pace(len(names) if noisy else 0, of_pace, device=next(model.parameters()).device)
    within = tuple(f"{path}." for path in layers)
    every = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and not path.startswith(within)]
    sigmas = sigmas_of(names, set(heads), every, sigma, first_noisy)
    # Not submodules.
    pace.owners = [module for module in model.modules() if "peft_config" in vars(module)]
    if not noisy:
        put_into(model, pace)
        return model
    for number, ((path, layer), layer_sigma) in enumerate(zip([*layers.items(), *heads.items()], sigmas)):
        layer.pace_noise = noise = AttachedNoise(layer, layer_sigma, pace, number, path)
        noise.train(layer.training)
        if path in heads:
            layer.register_forward_hook(noise.after)
            continue
        noise.follow()
        layer.register_forward_pre_hook(noise.follow)
        # One that somebody has replaced stays: the hooks above do without ours.
        if type(layer) is _lora_linear() and "forward" not in vars(layer):
            layer.forward = noise.compute
    drawing = [name for name, module in drop_paths_of(model) if getattr(module, "drop_prob", getattr(module, "p", 0))]
    if drawing:
        warnings.warn(f"{len(drawing)} layers drop residual branches ({drawing[0]}), for each branch of PACE by itself, which their "
                      "consistency punishes: set their probability to 0", stacklevel=2)
    pace.doubles_input = branches_at == INPUT
    first = next((name for name, layer_sigma in zip(names, sigmas) if layer_sigma > 0), names[-1])
    control(model, pace, block_of(first))
    pace.noise_head, pace.adapters = noise_head, _adapters(pace)
    pace.handles.append(model.register_forward_pre_hook(_check_adapters))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Takes PACE off a model again, in place, and returns it: PEFT's, with what was trained, as if `attach` had never been.

    Raises `PaceError` for a model that it is not on.
    """
    model = unwrapped(model)
    pace = getattr(model, "pace", None)
    if not isinstance(pace, Pace) or not hasattr(pace, "owners"):
        raise PaceError("`model` has no PACE attached: `merge` is for what `inject` made")
    for noise in [module for module in model.modules() if isinstance(module, AttachedNoise)]:
        layer = noise.watched
        for module in layer.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is noise]:
                    del hooks[key]
        give_forward_back(layer, noise.compute)
        del layer.pace_noise
    take_out(model)
    return model


def _adapters(pace: Pace) -> list:
    """What tells whether adapters have come or gone: PEFT's configurations, each the object that it is."""
    return [config for owner in pace.owners for config in owner.peft_config.values()]


def _check_adapters(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the model: adapters that came after `attach` may be around layers that had none."""
    adapters, before = _adapters(model.pace), model.pace.adapters
    if not model.training or len(adapters) == len(before) and all(map(operator.is_, adapters, before)):
        return
    layers, heads = _layers(model, model.pace.noise_head)
    new = [path for path, layer in {**layers, **heads}.items() if not hasattr(layer, "pace_noise")]
    if new:
        raise PaceError(f"`{new[0]}` has had an adapter of PEFT's since `attach`, without noise ({len(new)} such layers): add all adapters "
                        "first")
    model.pace.adapters = adapters


def _lora_linear() -> type:
    # Whoever has such layers has PEFT.
    from peft.tuners.lora import Linear

    return Linear


def _layers(model: nn.Module, noise_head: bool) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers with LoRA, and the classifiers that PEFT trains in full, by their paths."""
    layers, wrappers, others, merged = {}, {}, [], ()
    for path, module in model.named_modules():
        if type(module).__name__ == "ModulesToSaveWrapper":
            wrappers[module] = [path]
        if not is_peft(module) or not hasattr(module, "base_layer") or "TrainableTokens" in type(module).__name__:
            continue
        if not hasattr(module, "lora_A"):
            raise PaceError(f"`{path}` is a {type(module).__module__}.{type(module).__name__}, and PACE can be attached to PEFT's LoRA: "
                            "`inject` puts its own adapters into a model")
        for name, variant in getattr(module, "lora_variant", {}).items():
            if type(variant).__name__ not in _VARIANTS:
                raise PaceError(f"adapter {name!r} of `{path}` is LoRA of the kind {type(variant).__name__}, expected LoRA, rsLoRA or DoRA")
        if type(module).__name__ in _MERGED:
            merged = (*merged, f"{path}.")
        if len(module.lora_B) and all(isinstance(up, nn.Module) for up in module.lora_B.values()) and not f"{path}.".startswith(merged):
            layers[path] = module
        else:
            others.append(path)
    if not layers:
        raise PaceError("`model` has no LoRA of PEFT's on linear layers or convolutions that are called: `peft.get_peft_model` first, or "
                        "`inject` PACE's own adapters")
    if others:
        warnings.warn(f"{len(others)} layers have LoRA that gets no noise, not being that of linear layers or convolutions that are called: "
                      f"{', '.join(others[:3])}", stacklevel=3)
    return layers, {wrappers[head][0]: head for head in nearest_classifiers(wrappers)} if noise_head else {}
