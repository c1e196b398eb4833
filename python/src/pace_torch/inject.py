"""Turning a model into a PACE model, and back into a plain one; what of it is saved and shown."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._dropout import give_dropout_back, take_dropout
from ._fused_head import FusedHead, head_of
from ._errors import PaceError, check_choice, check_integer, check_number
from ._layers import Names, choose, drop_paths_of, is_peft, linears_of
from ._library import sigma_by_block
from .attached import AttachedNoise
from .controller import Pace
from .drop_paths import SameInBranches, SharedDropPath
from .modules import Adapter, Head, LoraAdd, LoraMulVptAdd, NoisyLinear, RecomputedGELU, VptAdd, adapters_of
from .settings import settings_from, takes_settings

ADAPTERS = ("LoRAmul_VPTadd", "LoRAadd", "VPTadd")
INPUT, FIRST_NOISY_BLOCK = "input", "first noisy block"
# Models whose blocks take the rows of all samples and keep them apart, so that branches may start at any.
_DOUBLE_WITHIN = (VisionTransformer, SwinTransformer)


# A model's parameters and buffers that DistributedDataParallel leaves alone.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
# What keeps a list of a model's parameters, or a graph.
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")


def block_ids(names: list[str], heads: set[str]) -> tuple[list[int], int]:
    """The block of each layer by the numbers in its path, with the heads as the last block; and the levels of numbers.

    `blocks.3.mlp.fc1` has one level (a ViT), `layers.1.blocks.0.attn.qkv` two (a Swin); layers with fewer count as the
    first of their group.
    """
    paths = [tuple(int(part) for part in name.split(".")[:-1] if part.isnumeric()) for name in names]
    body = [path for name, path in zip(names, paths) if name not in heads]
    levels = max(map(len, body), default=1)
    padded = [
        (float("inf"),) * max(levels, 1) if name in heads else path + (0,) * (levels - len(path))
        for name, path in zip(names, paths)
    ]
    order = {path: i for i, path in enumerate(sorted(set(padded)))}
    return [order[path] for path in padded], levels


def sigmas_of(
    names: list[str], heads: set[str], every: list[str], sigma: float, first_noisy: Optional[int]
) -> list[float]:
    """The standard deviation of each layer's noise: blocks are those of `every` linear layer, also where few have adapters."""
    ids, levels = block_ids([*names, *every], heads)
    blocks = max(ids) + 1
    if first_noisy is None:
        first_noisy = min(1 if levels == 1 else 0, blocks - 1)
    by_block = sigma_by_block(blocks, sigma, first_noisy)
    return [by_block[block] for block in ids[: len(names)]]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another, whose mode, training or evaluation, it takes over."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.get_submodule(name).training))


def block_of(name: str) -> str:
    """The path of the block that a layer is in; the layer itself if it is in none."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isnumeric()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else name


@takes_settings
def inject(
    model: nn.Module,
    adapter: str = "LoRAmul_VPTadd",
    rank: int = 10,
    *,
    sigma: float = 1.0,
    target_modules: Optional[Names] = None,
    exclude_modules: Optional[Names] = None,
    head: Optional[Names] = None,
    first_noisy: Optional[int] = None,
    scale: float = 1.0,
    exact: bool = False,
    new_biases: bool = False,
    noise_head: bool = True,
    branches_at: Optional[str] = None,
    **settings: Any,
) -> nn.Module:
    """Turns a model into a PACE model, in place, and returns it.

    Models of timm and of Hugging Face are tested (docs/models.md); any model will do that calls its linear layers, or gives their
    weights to a linear function itself (Swin V2, BEiT, EVA).

    Every `nn.Linear` gets an adapter of the given kind and rank, and the classifier becomes the noisy head. The adapters and
    the head train, everything else is frozen. DropPath, timm's and those of other libraries (told by their names), becomes one
    that both branches share; other random layers draw for each branch by themselves (dropout: see `Settings`). The standard deviation of the
    noise falls linearly with the block, from `sigma` at block `first_noisy` on (by default 1 for a ViT, 0 for a Swin) to the
    head. The controller is `model.pace`.

    In training, each call of the model, by any arguments, draws fresh noise and, with two branches, maps `[B, ...]` to
    logits `[2B, C]`, branch 0 first. In evaluation there is no noise and one branch. What does not go through the model
    (`forward_features` by itself) does not get fresh noise.

    * `target_modules`, `exclude_modules`: layers with adapters and without, as PEFT has it: names or their ends at a dot, or
      one pattern for whole names. `head`: the same for the classifier, which is always among them; by default what is in the
      module nearest to the top that is called `head`, `head_dist`, `classifier`, `classification_head`, `logits_proj`, `score` or,
      outside of blocks, `fc`.
    * `noise_head`: whether the classifier is under noise too, as in the official code.
    * `new_biases`: whether adapters add a bias to layers that have none, as the official code does. `merge` then leaves it there,
      so that the merged weights do not fit into a fresh model.
    * `branches_at`: where a sample's rows become two. "input": every tensor among the arguments, also within tuples, lists and
      mappings, whose rows are those of the batch. "first noisy block": the same of that block's arguments, so that what comes
      before is computed once; the default for timm's `VisionTransformer` and `SwinTransformer`, which are known to keep rows
      apart.
    * `scale`: factor on LoRA's `B·A`, 1 in the paper.
    * `exact`: for 16-bit types. Layers under noise per sample (`BC`) may otherwise multiply by `W0 + z⊙ΔW`, made in
      float32 and rounded once. In bfloat16, LoRAmul whose rms(ΔW/W0) stays below about 1e-3 over a whole training (a
      learning rate of 1e-4 or less, and few steps) is then attenuated in the forward pass of training; float16 keeps three
      bits more, and in float32 nothing is lost. The other adapters have no dense ΔW; without noise, as in evaluation,
      16-bit weights are never added.
    * `**settings`: those of `Settings`, which `attach` takes as well and `model.pace` has as attributes: the loss (`lambda_`,
      `divergence`, `criterion`, `label_smoothing`, …), `variant`, `noise_shape`, `seed`, `batch_of`, `packed`. The variant `baseline`
      has no `.adapter` in the names.

    Raises `PaceError` for an unknown name, a setting out of range, a model without linear layers, or one that is injected already, has
    something else called `pace`, or was made in inference mode.
    Warns of a model most of whose weights are in other layers (convolutions, an LSTM), which stay frozen.
    """
    of_pace = settings_from(settings)
    check_model(model, branches_at)
    check_choice("adapter", adapter, ADAPTERS)
    check_integer("rank", rank, 1)
    check_choice("noise_head", noise_head, (True, False))
    if check_number("scale", scale) == 0:
        raise PaceError("`scale` is 0, with which no adapter would learn")
    linears, heads = choose(model, target_modules, exclude_modules, head, adapter != "LoRAadd")
    if of_pace.fused_head and (fused := head_of(model)) in linears:
        raise PaceError(f"`fused_head` needs a head without an adapter and without noise, and `{linears[fused][0]}` would have them")
    every = [name for names in linears_of(model).values() for name in names]
    drop_paths = drop_paths_of(model)
    # Those of timm draw as the official code's do, with a key of their own.
    timms = [(name, module) for name, module in drop_paths if isinstance(module, DropPath)]
    noisy = of_pace.variant != "baseline"

    pace = Pace(len(linears) + len(timms) if noisy else 0, of_pace, device=next(iter(linears)).weight.device)
    head_names = {name for linear in heads for name in linears[linear]}
    sigmas = sigmas_of([names[0] for names in linears.values()], head_names, every, sigma, first_noisy)

    if not noise_head:
        sigmas = [0.0 if linear in heads else layer_sigma for linear, layer_sigma in zip(linears, sigmas)]
    first_noisy_layer = None
    for layer, ((linear, names), layer_sigma) in enumerate(zip(linears.items(), sigmas)):
        module = Head(linear) if linear in heads else _adapter_around(linear, adapter, rank, scale, exact, new_biases)
        module.path = names[0]
        if noisy:
            module = NoisyLinear(module, layer_sigma, pace, layer)
            module.path = names[0]
            if first_noisy_layer is None and layer_sigma > 0:
                first_noisy_layer = names[0]
        move_hooks(linear, module)
        for name in names:
            _replace(model, name, module)
        if linear in heads:
            pace.heads[names[0]] = module
    if noisy:
        for layer, (name, module) in enumerate(timms, start=len(linears)):
            _replace(model, name, SharedDropPath(module.drop_prob, pace, layer))
        for name, module in drop_paths:
            if not isinstance(module, DropPath):
                _replace(model, name, SameInBranches(module, pace))
    _recompute_gelus(model)
    trained = _adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    if noisy:
        pace.doubles_input = branches_at == INPUT or branches_at is None and not isinstance(model, _DOUBLE_WITHIN)
        control(model, pace, block_of(first_noisy_layer or next(reversed(linears.values()))[0]))
    else:
        put_into(model, pace)
    return model


def check_module(model: nn.Module) -> nn.Module:
    """The model, if it is one."""
    if not isinstance(model, nn.Module):
        raise PaceError(f"`model` is {type(model).__name__}, expected a torch.nn.Module")
    return model


def check_model(model: nn.Module, branches_at: Optional[str]) -> None:
    check_module(model)
    check_choice("branches_at", branches_at, (None, INPUT, FIRST_NOISY_BLOCK))
    if any(isinstance(module, (Adapter, Pace)) for module in model.modules()):
        raise PaceError("`model` has adapters already")
    if hasattr(model, "pace"):
        raise PaceError("`model` has a `pace` of its own, whose place the controller would take: give it another name")
    if not torch.is_inference_mode_enabled():
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, nn.UninitializedParameter) and parameter.is_inference():
                raise PaceError(f"`{name}` was made under `torch.inference_mode()`, and cannot be trained with: make the model outside of it")
    wrappers = [type(module).__name__ for module in model.modules() if type(module).__name__ in _WRAPPERS]
    if wrappers or any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise PaceError(f"`model` is wrapped or sharded ({wrappers[0] if wrappers else 'DTensor'}), which would not know of its adapters: "
                        "`inject` or `attach` first, then wrap")


def _adapter_around(
    linear: nn.Module, adapter: str, rank: int, scale: float, exact: bool, new_biases: bool
) -> Adapter:
    if adapter == "LoRAmul_VPTadd":
        return LoraMulVptAdd(linear, rank, scale, exact, new_biases)
    if adapter == "LoRAadd":
        return LoraAdd(linear, rank, scale, new_biases)
    return VptAdd(linear, rank, new_biases)


def _recompute_gelus(model: nn.Module) -> None:
    """Puts a GELU that need not be kept before each layer that can do without."""
    for module in model.modules():
        if isinstance(module, Mlp) and type(module.act) is nn.GELU and isinstance(module.fc2, NoisyLinear):
            module.act = RecomputedGELU(module.act.approximate).train(module.act.training)
            module.fc2.__dict__["gelu"] = module.act


def put_into(model: nn.Module, pace: Pace) -> None:
    """Makes `pace` the controller of a model without noise."""
    model.pace = pace.train(model.training)
    pace.causal = _is_causal(model)
    take_dropout(model, pace)
    pace.handles.append(model.register_forward_pre_hook(pace.before_any_forward, with_kwargs=True))
    if pace.settings.fused_head:
        pace.fused = FusedHead(model, pace)
        pace.handles.append(model.register_forward_pre_hook(pace.fused.before_forward, with_kwargs=True))
        pace.handles.append(model.register_forward_hook(pace.fused.after_forward))


def _is_causal(model: nn.Module) -> Optional[bool]:
    """Whether the labels of tokens are those of the next one, as far as Hugging Face tells."""
    known = {"ForCausalLM": True, "ForTokenClassification": False, "ForMaskedLM": False}
    if (kind := getattr(model, "loss_type", None)) in known:
        return known[kind]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__module__.startswith("transformers."):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or None


def control(model: nn.Module, pace: Pace, first_noisy_block: str) -> None:
    """Makes `pace` the model's controller."""
    put_into(model, pace)
    # Processes that share a model derive the same keys; DistributedDataParallel need not send them around.
    setattr(model, _DDP_IGNORES, [*getattr(model, _DDP_IGNORES, ()), "pace.keys"])
    pace.handles.append(model.register_forward_pre_hook(pace.before_forward, with_kwargs=True))
    if not pace.doubles_input:
        block = model.get_submodule(first_noisy_block)
        pace.handles.append(block.register_forward_pre_hook(pace.double_rows, with_kwargs=True))
    pace.handles.append(model.register_forward_hook(pace.after_forward, always_call=True))


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives the forward and backward hooks of one module to another that takes its place; their handles stay valid."""
    for hooks in _HOOKS:
        source.__dict__[hooks], target.__dict__[hooks] = target.__dict__[hooks], source.__dict__[hooks]
    source._is_full_backward_hook, target._is_full_backward_hook = (
        target._is_full_backward_hook, source._is_full_backward_hook
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, DataParallel, FullyShardedDataParallel or what `torch.compile` returns."""
    check_module(model)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif not isinstance(model._modules.get("pace"), Pace) and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def _adapter_parameters(model: nn.Module) -> set[str]:
    """The names of what an adapter or the head trains."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Adapter)
        for name, _ in module.named_parameters()
        if isinstance(module, Head) or not name.startswith("base_module.")
    }


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by the names under which the official script saves it; load it with `strict=False`.

    The adapters and the head, what else has been unfrozen, and the running statistics of normalisation layers. Of a wrapped
    model the names are those of the model inside. Of a model under `fully_shard` it is all of each tensor, in every process;
    all processes have to call it.
    """
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in _trained(model).items()
    }


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `trainable_state_dict`, as the model has them."""
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in check_module(model).parameters()):
        raise PaceError("`model` is in FullyShardedDataParallel: save and load by `get_model_state_dict` and `set_model_state_dict` of "
                        "torch.distributed.checkpoint.state_dict, with StateDictOptions(full_state_dict=True)")
    model = unwrapped(model)
    names = _adapter_parameters(model)
    trained = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name in names or parameter.requires_grad
    }
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            trained.update({f"{prefix}.{name}": buffer for name, buffer in module.named_buffers()})
    # Of what is around a block, activation checkpointing or a compiled graph, the block's names know nothing.
    return {name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): tensor for name, tensor in trained.items()}


@torch.no_grad()
def load_trainable_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads what `trainable_state_dict` gave.

    Raises `PaceError`, and loads nothing, unless it is of a model with the same adapters around the same layers.
    """
    own = _trained(model)
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in state_dict.items()):
        raise PaceError("`state_dict` is no mapping of names to tensors")
    for kind, names in (("is not in the model", state_dict.keys() - own.keys()), ("is missing", own.keys() - state_dict.keys())):
        if names:
            raise PaceError(f"`state_dict` is of other adapters: `{min(names)}` {kind} ({len(names)} such names)")
    new: list[tuple[Tensor, Tensor]] = []
    for name, tensor in state_dict.items():
        if tensor.shape != own[name].shape:
            raise PaceError(f"`state_dict` has `{name}` of {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if own[name].is_meta:
            raise PaceError(f"`{name}` is on the meta device, where nothing can be loaded: `to_empty` first")
        new.append((own[name], to_load(name, tensor, own[name])))
    for target, tensor in new:
        if hasattr(target, "full_tensor"):
            tensor = torch.distributed.tensor.distribute_tensor(tensor, target.device_mesh, target.placements)
        target.copy_(tensor)


def to_load(name: str, tensor: Tensor, target: Tensor) -> Tensor:
    """A tensor of a file in the type of one that it is to be copied to, and on its device; raises `PaceError` if it has no such numbers."""
    is_plain = tensor.layout == torch.strided and not (tensor.is_complex() or tensor.is_quantized or hasattr(tensor, "full_tensor"))
    try:
        if is_plain:
            return tensor.to(target.device, target.dtype)
    except NotImplementedError:  # Of the meta device, or of bits.
        pass
    raise PaceError(f"`{name}` is of {tensor.dtype} ({tensor.layout}, on {tensor.device}), expected a dense tensor of {target.dtype}")


def describe(model: nn.Module) -> str:
    """A table of the layers with adapters, for people to read: adapter, standard deviation of the noise, trained numbers."""
    model = unwrapped(model)
    rows = [("layer", "adapter", "sigma", "trained")]
    layers = adapters_of(model)
    for name, module in model.named_modules():
        adapter, kind = layers.get(module), ""
        if isinstance(module, AttachedNoise):
            name, adapter, kind = module.path, module.watched, "PEFT "
        elif adapter is None:
            continue
        trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
        sigma = f"{module.sigma:.3g}" if hasattr(module, "sigma") else "–"
        if getattr(module, "fixed_rows", None) and module.sample_rows is None:
            sigma = "0 (rows are no samples)"
        rows.append((name, kind + type(adapter).__name__, sigma, f"{trained:,}"))
    numbers = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"{trained:,} of {sum(numbers):,} numbers are trained"])


def _check_whole(model: nn.Module) -> None:
    """Raises `PaceError` unless all weights of adapters and their layers are here."""
    if any(hasattr(parameter, "full_tensor") or getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()):
        raise PaceError("`model` is sharded (FSDP): load its `torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                        "options=StateDictOptions(full_state_dict=True))` into a model that is injected alike and not sharded, and merge "
                        "that")
    for name, module in model.named_modules():
        if isinstance(module, Adapter) and any(parameter.is_meta for parameter in module.parameters()):
            raise PaceError(f"weights of `{name}` are on the meta device: load them, or, where Accelerate offloads them, call "
                            "`accelerate.hooks.remove_hook_from_submodules(model)` first")
        if isinstance(module, Adapter) and any(isinstance(t, Tensor) for t in (vars(module) | vars(module.base_module)).values()):
            raise PaceError(f"`{name}` has tensors that hooks make (pruning, old weight_norm): make them permanent first (`prune.remove`)")


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turns a PACE model back into a plain one that computes the same in evaluation: in place, and returns it.

    The adapters go into the weights of the layers that were there (with a new bias, where `new_biases` asked for one). These weights
    and the head require gradients, what was frozen besides them stays so. Of a wrapped model it is the model inside.

    Raises `PaceError`, and changes nothing, for a model without adapters, or whose weights are sharded, offloaded, quantised or made by
    hooks.
    """
    _check_whole(check_module(model))
    model = unwrapped(model)
    if any(is_peft(module) for module in model.modules()):
        raise PaceError("`model` has layers of PEFT's: its own `merge_and_unload` merges it")
    layers = adapters_of(model)
    for name, module in model.named_modules():
        adapter = layers.get(module)
        if adapter is not None and adapter.is_opaque and not isinstance(adapter, Head):
            raise PaceError(f"`{name}` is a {type(adapter.base_module).__name__}, which computes by itself: what an adapter "
                            "adds to that does not go into its weight. Keep the adapters (`trainable_state_dict`), and evaluate with them")
    if not layers:
        raise PaceError("`model` has no adapters: it is merged already, or was never injected")
    plain: dict[nn.Module, nn.Module] = {}  # by what it replaces
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            _replace(model, name, plain[module])
        elif module in layers:
            linear = layers[module].plain()
            move_hooks(module, linear)
            plain[module] = linear
            _replace(model, name, linear)
        elif isinstance(module, SharedDropPath):
            _replace(model, name, DropPath(module.drop_prob))
        elif isinstance(module, SameInBranches):
            _replace(model, name, module.drop_path)
        elif isinstance(module, RecomputedGELU):
            _replace(model, name, nn.GELU(module.approximate))
    take_out(model)
    return model


def take_out(model: nn.Module) -> None:
    """Takes the controller out of a model again, with its hooks."""
    # Of a module around the model it is the model inside that has one.
    for module in list(model.modules()):
        if isinstance(module._modules.get("pace"), Pace):
            give_dropout_back(module.pace)
            if module.pace.fused is not None:
                module.pace.fused.remove()
            for handle in module.pace.handles:
                handle.remove()
            del module.pace
            own = [name for name in module.__dict__.pop(_DDP_IGNORES, ()) if name != "pace.keys"]
            if own:
                setattr(module, _DDP_IGNORES, own)
