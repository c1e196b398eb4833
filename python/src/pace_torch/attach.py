"""PACE on the LoRA that PEFT has put into a model: noise on what it adds, and consistency between two branches."""

import warnings
from typing import Optional

from torch import nn

from ._batch import BatchOf
from ._layers import drop_paths_of, is_classifier, is_peft
from ._errors import PaceError
from .attached import AttachedNoise
from .controller import Pace
from .inject import INPUT, block_of, check_model, control, put_into, sigmas_of
from .loss import Criterion

# Kinds of LoRA that PEFT computes otherwise than by adding `B(A(x))·scaling`, and whose sum is known to be right all the same.
_VARIANTS = ("DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant", "ALoraLinearVariant")


def attach(
    model: nn.Module,
    *,
    sigma: float = 1.0,
    lambda_: float = 1.0,
    variant: str = "pace",
    lazy_interval: int = 2,
    noise_shape: str = "BC",
    seed: int = 0,
    first_noisy: Optional[int] = None,
    samples: Optional[int] = None,
    label_smoothing: float = 0.0,
    noise_head: bool = True,
    branches_at: str = INPUT,
    batch_of: BatchOf = None,
    criterion: Optional[Criterion] = None,
) -> nn.Module:
    """Puts PACE on the LoRA that PEFT has put into a model (`peft.get_peft_model`), in place, and returns it.

    What LoRA adds to a layer, `B(A(x))·scaling`, is multiplied by noise in training, also where the layer is quantised or
    LoRA is rsLoRA, and all that DoRA adds. What PEFT trains, saves, loads, merges and computes in evaluation is
    as it was: `save_pretrained`, `from_pretrained`, `merge_and_unload`. The controller is `model.pace`; train by
    `model.pace.training_step(model, batch, labels)`.

    Layers around a plain `nn.Linear`, with no dropout before A and all in one type (which autocast sees to), are computed by the
    fused operator, others by PEFT and a multiplication.

    * `noise_head`: whether a classifier that PEFT trains in full (`modules_to_save`) is under noise as well, as in the official
      code.
    * The other settings are those of `inject`.

    Dropout draws for each branch by itself: the consistency is then between two dropouts too.

    Raises `PaceError` for a model without LoRA, or that has PACE already. Layers with adapters of other kinds are an error; those with
    LoRA that is not computed by linear layers or convolutions (embeddings, parameters) are trained without noise, which a warning says.
    """
    check_model(model, noise_shape, branches_at)
    layers, heads = _layers(model, noise_head)
    names = [*layers, *heads]
    pace = Pace(
        len(names) if variant != "baseline" else 0,
        variant=variant,
        lambda_=lambda_,
        lazy_interval=lazy_interval,
        per_token=noise_shape == "BTC",
        seed=seed,
        samples=samples,
        label_smoothing=label_smoothing,
        batch_of=batch_of,
        criterion=criterion,
        device=next(model.parameters()).device,
    )
    sigmas = sigmas_of(names, set(heads), sigma, first_noisy)
    if variant == "baseline":
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
        if type(layer) is _lora_linear():
            layer.forward = noise.compute
    drawing = [name for name, module in drop_paths_of(model) if getattr(module, "drop_prob", getattr(module, "p", 0))]
    if drawing:
        warnings.warn(f"{len(drawing)} layers drop residual branches ({drawing[0]}), for each branch of PACE by itself, which their "
                      "consistency punishes: set their probability to 0", stacklevel=2)
    pace.doubles_input = branches_at == INPUT
    first = next((name for name, layer_sigma in zip(names, sigmas) if layer_sigma > 0), names[-1])
    control(model, pace, block_of(first))
    pace.adapters = tuple(getattr(model, "peft_config", ()))
    model.register_forward_pre_hook(_check_adapters)
    return model


def _check_adapters(model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the model: adapters that came after `attach` may be around layers that had none."""
    adapters = tuple(getattr(model, "peft_config", ()))
    if adapters != model.pace.adapters:
        layers, _ = _layers(model, False)
        new = [path for path, layer in layers.items() if not hasattr(layer, "pace_noise")]
        if new:
            raise PaceError(f"`{new[0]}` has had LoRA since `attach`, without noise ({len(new)} such layers): add all adapters first")
        model.pace.adapters = adapters


def _lora_linear() -> type:
    # Whoever has such layers has PEFT.
    from peft.tuners.lora import Linear

    return Linear


def _layers(model: nn.Module, noise_head: bool) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers with LoRA, and the classifiers that PEFT trains in full, by their paths."""
    layers, heads, others = {}, {}, []
    for path, module in model.named_modules():
        if not is_peft(module):
            if noise_head and type(module).__name__ == "ModulesToSaveWrapper" and is_classifier(path):
                heads[path] = module
            continue
        if not hasattr(module, "base_layer") or not hasattr(module, "active_adapters"):
            continue
        if not hasattr(module, "lora_A"):
            if hasattr(module, "token_adapter") or "TrainableTokens" in type(module).__name__:
                continue
            raise PaceError(f"`{path}` is a {type(module).__module__}.{type(module).__name__}, and PACE can be attached to PEFT's LoRA: "
                            "`inject` puts its own adapters into a model")
        for name, variant in getattr(module, "lora_variant", {}).items():
            if type(variant).__name__ not in _VARIANTS:
                raise PaceError(f"adapter {name!r} of `{path}` is LoRA of the kind {type(variant).__name__}, expected LoRA, rsLoRA or DoRA")
        if len(module.lora_B) and all(isinstance(up, nn.Module) for up in module.lora_B.values()):
            layers[path] = module
        else:
            others.append(path)
    if not layers:
        raise PaceError("`model` has no layers with LoRA of PEFT's: `peft.get_peft_model` first, or `inject` PACE's own adapters")
    if others:
        warnings.warn(f"{len(others)} layers have LoRA that gets no noise, not being that of linear layers or convolutions: "
                      f"{', '.join(others[:3])}", stacklevel=3)
    return layers, heads
