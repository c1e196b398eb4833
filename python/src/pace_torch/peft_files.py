"""PEFT's adapter files (`adapter_config.json`, `adapter_model.safetensors`) of models with PACE's own LoRA."""

import os
import re
from typing import Union

import torch
from torch import Tensor, nn

from ._layers import is_conv1d
from ._errors import PaceError, check_number
from .inject import to_load, trainable_state_dict, unwrapped
from .modules import Adapter, Head, LoraAdd, adapters_of

PREFIX = "base_model.model."
# Ways to start that leave the model's own weights as they are.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the names of the layers they are around."""
    adapters: dict[str, Adapter] = {}
    layers = adapters_of(model)
    for name, module in model.named_modules(remove_duplicate=False):
        adapter = layers.get(module)
        if adapter is None:
            continue
        if adapter in adapters.values():
            raise PaceError(f"`{name}` is a layer with other names too, of which PEFT knows one only")
        if any(parameter.is_meta for parameter in adapter.parameters()):
            raise PaceError(f"the adapter of `{name}` is on the meta device, and has no numbers: `to_empty` first")
        if not isinstance(adapter, (LoraAdd, Head)):
            raise PaceError(f"the adapter of `{name}` is {type(adapter).__name__}, which PEFT's LoRA does not have: expected LoRAadd")
        adapters[name] = adapter
    if not any(isinstance(adapter, LoraAdd) for adapter in adapters.values()):
        raise PaceError('`model` has no LoRA of PACE\'s: `inject` it with the adapter "LoRAadd"; PEFT saves what `attach` was called for')
    return adapters


@torch.no_grad()
def save_peft(model: nn.Module, folder: Union[str, os.PathLike], base_model_name_or_path: str = "") -> None:
    """Writes an injected model's LoRA and classifier as PEFT does, for `peft.PeftModel.from_pretrained(plain_model, folder)`.

    `lora_A` and `lora_B` are `delta_W_up` and `delta_W_down`, `lora_alpha` is `scale·rank`, `delta_b` becomes the bias of `lora_B`.
    `base_model_name_or_path` tells PEFT where the plain model came from.

    Raises `PaceError`, and writes nothing, for other adapters than `LoRAadd`, and if anything else is trained.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    model = unwrapped(model)
    adapters = _adapters(model)
    # Those that PEFT sees: of the plain model.
    names = [name for name, _ in model.named_modules() if not any(name.startswith(f"{adapter}.") for adapter in adapters)]
    tensors: dict[str, Tensor] = {}
    loras = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoraAdd)}
    has_bias = any(adapter.has_bias and bool((adapter.delta_b != 0).any()) for adapter in loras.values())
    for name, adapter in loras.items():
        parts = {"lora_A.weight": adapter.as_replaced(adapter.delta_W_up), "lora_B.weight": adapter.as_replaced(adapter.delta_W_down)}
        if has_bias:
            parts["lora_B.bias"] = adapter.delta_b / adapter.scale
        tensors.update({f"{PREFIX}{name}.{part}": tensor for part, tensor in parts.items()})
    heads = [name for name, adapter in adapters.items() if isinstance(adapter, Head)]
    for name in heads:
        # PEFT takes what ends like it for the same.
        other = next((other for other in names if other.endswith(name) and other != name), None)
        if other:
            raise PaceError(f"PEFT would take `{other}` for the classifier `{name}`, as its name ends alike: keep the adapters by "
                            "`trainable_state_dict`")
        weights = dict(zip(("weight", "bias"), adapters[name].merged()))
        weights["weight"] = adapters[name].as_replaced(weights["weight"], is_weight=True)
        tensors.update({f"{PREFIX}{name}.{part}": tensor for part, tensor in weights.items() if tensor is not None})
    others = [name for name in trainable_state_dict(model) if not any(name.startswith(f"{adapter}.") for adapter in adapters)]
    if others:
        raise PaceError(f"`{others[0]}` is trained too, for which PEFT's files have no place")
    rank, scale = next(iter(loras.values())).delta_W_up.shape[0], next(iter(loras.values())).scale
    alpha = scale * rank
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=_targets(list(loras), names),
        modules_to_save=heads or None,
        lora_bias=has_bias,
        fan_in_fan_out=any(is_conv1d(adapter.replaced) for adapter in loras.values()),
        base_model_name_or_path=base_model_name_or_path or None,
        inference_mode=True,
    )
    os.makedirs(folder, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # A file that is there is whole: it gets its name when it is.
    written = os.path.join(folder, "adapter_model.safetensors")
    save_file(tensors, f"{written}.new", metadata={"format": "pt"})
    os.replace(f"{written}.new", written)
    config.save_pretrained(folder)


def _targets(names: list[str], every: list[str]) -> Union[str, list[str]]:
    """What tells PEFT these layers and no others: their names, which PEFT also finds at the end of longer ones."""
    if any(other.endswith(f".{name}") for name in names for other in set(every) - set(names)):
        return "|".join(map(re.escape, names))
    return names


def _read(folder: Union[str, os.PathLike]) -> tuple:
    """The configuration and the tensors of a folder with LoRA, or of a model on a hub."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if config.peft_type != peft.PeftType.LORA:
            raise PaceError(f"`{folder}` has adapters of the kind {config.peft_type}, expected LoRA")
        return config, peft.load_peft_weights(folder, device="cpu")
    except PaceError:
        raise
    except Exception as error:  # Whatever PEFT and safetensors raise for any file at all.
        raise PaceError(f"`{folder}` has no adapter that PEFT can read: {error}") from error


def _alpha(config, name: str) -> float:
    """`lora_alpha` of a layer."""
    from peft.utils.other import get_pattern_key

    patterns = config.alpha_pattern or {}
    try:
        alpha = patterns.get(get_pattern_key(patterns.keys(), name), config.lora_alpha)
    except (AttributeError, TypeError, re.error) as error:
        raise PaceError(f"`alpha_pattern` is {patterns!r}, expected numbers by regular expression") from error
    return check_number("lora_alpha", alpha)


@torch.no_grad()
def load_peft(model: nn.Module, folder: Union[str, os.PathLike]) -> None:
    """Loads LoRA and classifier from PEFT's files, or its model on a hub, into a model injected with `LoRAadd`.

    Ranks and scalings (`lora_alpha`, `use_rslora`, patterns) are those of the file: `lora_B` is multiplied by what the model's own
    `scale` leaves of the scaling. A layer whose rank in the file is below the model's keeps its own rows of A beside it, with zeros
    in B.

    Raises `PaceError`, and loads nothing, if the file is not of LoRA around the layers that have it in the model, or of a kind that
    `LoRAadd` is not (DoRA).
    """
    model = unwrapped(model)
    adapters = _adapters(model)
    config, tensors = _read(folder)
    kinds = [name for name, field in type(config).__dataclass_fields__.items() if field.metadata.get("is_lora_variant")]
    wrong = next((name for name in {"use_dora", *kinds} if getattr(config, name, None)), None)
    if wrong:
        raise PaceError(f"`{folder}` has LoRA with `{wrong}`, which LoRAadd does not have")
    start = config.init_lora_weights
    if not isinstance(start, bool) and str(start).lower() not in _STARTS:
        raise PaceError(f"`{folder}` has LoRA that started as {start!r}, which takes a part of the model's own weights away")
    if config.bias != "none":
        raise PaceError(f"`{folder}` has biases of the model trained too (`bias` is {config.bias!r}), expected 'none'")
    new: list[tuple[Tensor, Tensor]] = []

    def take(name: str, part: str, own: Tensor) -> Tensor:
        tensor = tensors.pop(f"{PREFIX}{name}.{part}", None)
        if tensor is None:
            raise PaceError(f"`{folder}` has no `{PREFIX}{name}.{part}`, but the model has an adapter around `{name}`")
        tensor = to_load(f"{name}.{part}", tensor, own)
        tensor = tensor.flatten(1) if adapters[name].is_convolution and tensor.dim() > 2 else tensor
        if tensor.dim() != own.dim() or tensor.shape[1:] != own.shape[1:] and part != "lora_B.weight" or part != "lora_A.weight" and len(tensor) != len(own):
            raise PaceError(f"`{folder}` has `{name}.{part}` of {tuple(tensor.shape)}, expected {tuple(own.shape)}")
        return tensor

    for name, adapter in adapters.items():
        if isinstance(adapter, Head):
            for part, own in adapter.base_module.named_parameters():
                transposed = part == "weight" and is_conv1d(adapter.replaced)
                tensor = take(name, part, own.t() if transposed else own)
                new.append((own, tensor.t() if transposed else tensor))
            continue
        down, up = take(name, "lora_A.weight", adapter.delta_W_up), take(name, "lora_B.weight", adapter.delta_W_down)
        rank = len(down)
        if not 1 <= rank <= len(adapter.delta_W_up) or up.shape[1:] != (rank,):
            raise PaceError(f"`{folder}` has LoRA of rank {rank} around `{name}`, and the model of {len(adapter.delta_W_up)}")
        alpha = _alpha(config, name)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        zeros = torch.zeros_like(adapter.delta_W_down)
        zeros[:, :rank] = up * (scaling / adapter.scale)
        new += [(adapter.delta_W_up[:rank], down), (adapter.delta_W_down, zeros)]
        own = adapter.delta_b
        bias = take(name, "lora_B.bias", own) if f"{PREFIX}{name}.lora_B.bias" in tensors else torch.zeros_like(own)
        if adapter.has_bias:
            new.append((own, scaling * bias))
        elif bias.any():
            raise PaceError(f"`{folder}` has a bias for `{name}`, which has none: `inject` with `new_biases=True`")
    if tensors:
        raise PaceError(f"`{folder}` has `{min(tensors)}`, but the model has no adapter there ({len(tensors)} such names)")
    for own, tensor in new:
        own.copy_(tensor)
