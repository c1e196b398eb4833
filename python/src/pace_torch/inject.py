"""Turning a timm model into a PACE model, and back into a plain one."""

from typing import Optional

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ._library import PaceError, sigma_by_block
from .controller import Pace
from .modules import Adapter, Head, LoraAdd, LoraMulVptAdd, NoisyLinear, RecomputedGELU, SharedDropPath, VptAdd

ADAPTERS = ("LoRAmul_VPTadd", "LoRAadd", "VPTadd")


def block_ids(names: list[str]) -> tuple[list[int], int]:
    """The block of each layer by the numbers in its path, with the head as the last block; and the levels of numbers.

    `blocks.3.mlp.fc1` has one level (a ViT), `layers.1.blocks.0.attn.qkv` two (a Swin); layers with fewer count as the
    first of their group.
    """
    paths = [tuple(int(part) for part in name.split(".")[:-1] if part.isnumeric()) for name in names]
    body = [path for name, path in zip(names, paths) if "head" not in name]
    levels = max(map(len, body), default=1)
    padded = [
        (float("inf"),) * max(levels, 1) if "head" in name else path + (0,) * (levels - len(path))
        for name, path in zip(names, paths)
    ]
    order = {path: i for i, path in enumerate(sorted(set(padded)))}
    return [order[path] for path in padded], levels


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _block(name: str) -> str:
    """The path of the block that a layer is in; the layer itself if it is in none."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isnumeric()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else name


def inject(
    model: nn.Module,
    adapter: str = "LoRAmul_VPTadd",
    rank: int = 10,
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
    scale: float = 1.0,
    exact: bool = False,
) -> nn.Module:
    """Turns a timm vision transformer or Swin into a PACE model, in place, and returns it.

    `VisionTransformer` and `SwinTransformer` are tested; any model will do that calls its linear layers. Some read their
    weights instead (Swin V2, BEiT, EVA): those fail with an error that says so.

    Every `nn.Linear` gets an adapter of the given kind and rank; those with `head` in their path become the noisy head.
    The adapters and the head train, everything else is frozen. timm's DropPath becomes one that both branches share;
    other random layers (Dropout) draw for each branch by themselves. The standard deviation of the noise falls linearly
    with the block, from `sigma` at block `first_noisy` on (by default 1 for a ViT, 0 for a Swin) to the head. The
    controller is `model.pace`.

    In training, `model(x)` draws fresh noise at each call and, with two branches, maps `[B, ...]` to logits `[2B, C]`,
    branch 0 first; what comes before the first noisy block is computed once. In evaluation there is no noise and one
    branch. What does not go through `model(x)` (`forward_features` by itself) does not get fresh noise.

    * `variant`: `pace` (two branches at each step), `lazy` (at every `lazy_interval`-th, with half of the batch),
      `fast` (one branch, consistent with its logits of the last epoch; needs `samples`, the size of the training set),
      `noise` (one branch, no consistency), `baseline` (adapters without noise; no `.adapter` in the names).
    * `lambda_`: strength of the consistency. `noise_shape`: `BC` draws per sample and channel, `BTC` per token too.
    * `scale`: factor on LoRA's `B·A`, 1 in the paper.
    * `exact`: for 16-bit types on CUDA. Layers under noise per sample (`BC`) may otherwise multiply by `W0 + z⊙ΔW`, made in
      float32 and rounded once. In bfloat16, LoRAmul whose rms(ΔW/W0) stays below about 1e-3 over a whole training (a
      learning rate of 1e-4 or less, and few steps) is then attenuated in the forward pass of training; float16 keeps three
      bits more, and in float32 nothing is lost. The other adapters have no dense ΔW; without noise, as in evaluation,
      16-bit weights are never added.

    Raises `PaceError` for an unknown name, a model without linear layers, or one that is injected already.
    """
    _check_arguments(model, adapter, rank, noise_shape)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise PaceError("`model` has no linear layers")
    drop_paths = {name: module for name, module in model.named_modules() if isinstance(module, DropPath)}
    noisy = variant != "baseline"

    pace = Pace(
        len(linears) + len(drop_paths) if noisy else 0,
        variant=variant,
        lambda_=lambda_,
        lazy_interval=lazy_interval,
        per_token=noise_shape == "BTC",
        seed=seed,
        samples=samples,
        label_smoothing=label_smoothing,
        device=next(iter(linears.values())).weight.device,
    )
    ids, levels = block_ids(list(linears))
    blocks = max(ids) + 1
    if first_noisy is None:
        first_noisy = min(1 if levels == 1 else 0, blocks - 1)
    sigmas = sigma_by_block(blocks, sigma, first_noisy)

    first_noisy_layer = None
    for layer, (name, block) in enumerate(zip(linears, ids)):
        module = _adapter_around(linears[name], name, adapter, rank, scale, exact)
        if noisy:
            module = NoisyLinear(module, sigmas[block], pace, layer)
            if first_noisy_layer is None and sigmas[block] > 0:
                first_noisy_layer = name
        _replace(model, name, module)
    if noisy:
        for layer, (name, module) in enumerate(drop_paths.items(), start=len(linears)):
            _replace(model, name, SharedDropPath(module.drop_prob, pace, layer))
    _recompute_gelus(model)
    for name, parameter in model.named_parameters():
        if not _is_trained(name):
            parameter.requires_grad_(False)
    _attach(model, pace, first_noisy_layer or next(reversed(linears)), noisy)
    return model.train(model.training)


def _check_arguments(model: nn.Module, adapter: str, rank: int, noise_shape: str) -> None:
    if adapter not in ADAPTERS:
        raise PaceError(f"`adapter` is {adapter!r}, expected one of {', '.join(ADAPTERS)}")
    if noise_shape not in ("BC", "BTC"):
        raise PaceError(f"`noise_shape` is {noise_shape!r}, expected BC or BTC")
    if rank < 1:
        raise PaceError(f"`rank` is {rank}, expected at least 1")
    if any(isinstance(module, (Adapter, Pace)) for module in model.modules()):
        raise PaceError("`model` has adapters already")


def _adapter_around(linear: nn.Linear, name: str, adapter: str, rank: int, scale: float, exact: bool) -> Adapter:
    if "head" in name.split("."):
        return Head(linear)
    if adapter == "LoRAmul_VPTadd":
        return LoraMulVptAdd(linear, rank, scale, exact)
    return LoraAdd(linear, rank, scale) if adapter == "LoRAadd" else VptAdd(linear, rank)


def _recompute_gelus(model: nn.Module) -> None:
    """Puts a GELU that need not be kept before each layer that can do without."""
    for module in model.modules():
        if isinstance(module, Mlp) and type(module.act) is nn.GELU and isinstance(module.fc2, NoisyLinear):
            module.act = RecomputedGELU(module.act.approximate)
            module.fc2.__dict__["gelu"] = module.act


def _attach(model: nn.Module, pace: Pace, first_noisy_layer: str, noisy: bool) -> None:
    """Makes `pace` the model's controller."""
    model.pace = pace
    # Processes that share a model derive the same keys; DistributedDataParallel need not send them around.
    model._ddp_params_and_buffers_to_ignore = ["pace.keys", "pace.history"]
    if noisy:
        pace.handles.append(model.register_forward_pre_hook(pace.before_forward, with_kwargs=True))
        doubled = model.get_submodule(_block(first_noisy_layer))
        pace.handles.append(doubled.register_forward_pre_hook(pace.double_rows))


def _is_trained(name: str) -> bool:
    return "delta" in name or "head" in name


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by the names under which the official script saves it; load it with `strict=False`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if _is_trained(name)}


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turns a PACE model back into a plain one that computes the same in evaluation: in place, and returns it.

    The adapters go into the weights of plain `nn.Linear` (with a bias, where the adapter adds one).
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NoisyLinear) or (isinstance(module, Adapter) and not name.endswith(".adapter")):
            adapter = module.adapter if isinstance(module, NoisyLinear) else module
            linear = adapter.base_module
            weight, bias = adapter.merged()
            linear.weight = nn.Parameter(weight.clone())
            linear.bias = None if bias is None else nn.Parameter(bias.clone())
            _replace(model, name, linear)
        elif isinstance(module, SharedDropPath):
            _replace(model, name, DropPath(module.drop_prob))
        elif isinstance(module, RecomputedGELU):
            _replace(model, name, nn.GELU(module.approximate))
    if hasattr(model, "pace"):
        for handle in model.pace.handles:
            handle.remove()
        del model.pace, model._ddp_params_and_buffers_to_ignore
    return model.train(model.training)
