"""The official formulas of PACE in plain PyTorch, one operator after the other, as a reference and as a peer in the
bench.

It does the work that the official implementation (https://github.com/MaxwellYaoNi/PACE) does, in the same order:
frozen and adapted features are separate GEMMs, noise is a tensor of its own, both branches pass through the whole
trunk as one batch, and a layer without noise (sigma = 0, or evaluation) is one GEMM with merged weights. Parameters
have the official names, so state dictionaries fit. Written from the formulas (`docs/method.md`); shapes below are `x
[B, ..., K]`, `y [B, ..., N]`, rank `r`. Everything is in the dtype and on the device of the frozen layer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn


class Adapter(nn.Module):
    """A linear layer and what is added to it. In use by itself it computes the merged product."""

    def __init__(self, base_module):
        super().__init__()
        self.base_module = base_module

    def parameter(self, *shape, xavier=False):
        value = self.base_module.weight.new_zeros(shape)
        return nn.Parameter(nn.init.xavier_uniform_(value) if xavier else value)

    def base(self, x):
        """Features of the frozen layer, `x·W0ᵀ + b0`."""
        return self.base_module(x)

    def delta(self, x):
        """Features of the adapter, `x·ΔWᵀ + Δb`."""
        raise NotImplementedError

    def forward(self, x):
        """`x·(W0 + ΔW)ᵀ + (b0 + Δb)`."""
        raise NotImplementedError


class LoraMulVptAdd(Adapter):
    """`ΔW = W0 ⊙ (D·U)`, `Δb = W0·(Pd·Pu) + b0 ⊙ δb`: the paper's main adapter."""

    def __init__(self, base_module, rank):
        super().__init__(base_module)
        n, k = base_module.weight.shape
        self.delta_W_down = self.parameter(n, rank)
        self.delta_W_up = self.parameter(rank, k, xavier=True)
        self.delta_b = self.parameter(n)
        self.delta_prompt_down = self.parameter(k, rank)
        self.delta_prompt_up = self.parameter(rank, 1, xavier=True)

    def product(self, x, lora, delta_b):
        base = self.base_module
        b = (base.weight @ (self.delta_prompt_down @ self.delta_prompt_up)).squeeze(-1)
        if base.bias is not None:
            b = b + base.bias * delta_b
        return F.linear(x, base.weight * lora, b)

    def delta(self, x):
        return self.product(x, self.delta_W_down @ self.delta_W_up, self.delta_b)

    def forward(self, x):
        return self.product(x, 1 + self.delta_W_down @ self.delta_W_up, 1 + self.delta_b)


class LoraAdd(Adapter):
    """`ΔW = D·U`, `Δb = δb`."""

    def __init__(self, base_module, rank):
        super().__init__(base_module)
        n, k = base_module.weight.shape
        self.delta_W_down = self.parameter(n, rank)
        self.delta_W_up = self.parameter(rank, k, xavier=True)
        self.delta_b = self.parameter(n)

    def delta(self, x):
        return F.linear(F.linear(x, self.delta_W_up), self.delta_W_down, self.delta_b)

    def forward(self, x):
        base = self.base_module
        b = self.delta_b if base.bias is None else self.delta_b + base.bias
        return F.linear(x, base.weight + self.delta_W_down @ self.delta_W_up, b)


class VptAdd(Adapter):
    """`ΔW = 0`, `Δb = W0·(Pd·Pu)`."""

    def __init__(self, base_module, rank):
        super().__init__(base_module)
        self.delta_prompt_down = self.parameter(base_module.in_features, rank)
        self.delta_prompt_up = self.parameter(rank, 1, xavier=True)

    def prompt(self):
        return (self.base_module.weight @ (self.delta_prompt_down @ self.delta_prompt_up)).squeeze(-1)

    def delta(self, x):
        return self.prompt().expand(*x.shape[:-1], -1)

    def forward(self, x):
        base = self.base_module
        b = self.prompt() if base.bias is None else self.prompt() + base.bias
        return F.linear(x, base.weight, b)


class NoisyHead(Adapter):
    """The classifier is all adapter: nothing of it is frozen."""

    def base(self, x):
        return 0

    def delta(self, x):
        return self.base_module(x)

    def forward(self, x):
        return self.base_module(x)


ADAPTERS = {"lora_mul_vpt": LoraMulVptAdd, "lora_add": LoraAdd, "vpt_add": VptAdd}


class Noise(nn.Module):
    """`y = base + z ⊙ delta` with `z = 1 + sigma·n` in training, one GEMM with merged weights in evaluation or where sigma is 0.

    `shape` is `"BC"` (one draw per sample and channel) or `"BTC"` (one per sample, token and channel). Where `z` is
    set, it is used instead of a draw: `[B, ..., N]` or anything that broadcasts to it, or `[B, N]` for `"BC"`.
    """

    def __init__(self, adapter, sigma, shape="BC"):
        super().__init__()
        if shape not in ("BC", "BTC"):
            raise ValueError(f"shape: expected 'BC' or 'BTC', got {shape!r}")
        self.adapter, self.sigma, self.shape, self.z = adapter, float(sigma), shape, None

    def draw(self, delta):
        size = delta.shape
        if self.shape == "BC":
            size = (size[0], *[1] * (delta.ndim - 2), size[-1])
        if self.z is not None:
            return self.z.view(size) if self.shape == "BC" else self.z
        # The official code draws f32 whatever the features are; in their own dtype a bf16 model stays one.
        return torch.randn(size, dtype=delta.dtype, device=delta.device) * self.sigma + 1

    def forward(self, x):
        if not self.training or self.sigma == 0:
            return self.adapter(x)
        base, delta = self.adapter.base(x), self.adapter.delta(x)
        return base + delta * self.draw(delta)


class SharedDropPath(DropPath):
    """DropPath that drops the same samples in every branch and divides its mask by the mask's own mean.

    `branches` is how many branches a batch holds, one after the other. Where `mask` is set (`[B]` per branch, 0 or 1),
    it is used instead of a draw.
    """

    branches = 1
    mask = None

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        size = (x.shape[0], *[1] * (x.ndim - 1))
        if self.mask is None:
            mask = x.new_empty(size).bernoulli_(keep)
        else:
            mask = self.mask.to(x).repeat(self.branches).view(size)
        if keep > 0 and self.scale_by_keep:
            mask = mask / keep
        if self.branches > 1:
            mask = torch.cat([mask[: x.shape[0] // self.branches]] * self.branches)
        return x * (mask / (mask.mean() + 1e-12))


def set_branches(model, branches):
    for module in model.modules():
        if isinstance(module, SharedDropPath):
            module.branches = branches


def inject(model, adapter="lora_mul_vpt", rank=10, sigma=1.0, noise=True, first_noisy=1, shape="BC"):
    """Wraps the linear layers of a timm model in place, replaces its DropPath, and freezes what is not trained.

    Linear layers on a path with a component `head` become noisy heads. With `n` blocks, the head being the last, block
    `k` gets `sigma·(n - k)/(n - first_noisy)`, and 0 where `k < first_noisy` (1 for a ViT, 0 for a Swin).
    `noise=False` leaves the adapters without noise wrappers: the baseline. Returns the model.
    """
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    block = {tuple(path): block_key(path) for path in paths}
    # Shorter keys are filled with zeros, so that the linear layers beside the blocks of a stage sort with its first
    # block.
    length = max(map(len, block.values()))
    block = {path: key + (0,) * (length - len(key)) for path, key in block.items()}
    order = sorted(set(block.values()))
    for path, key in block.items():
        parent = model.get_submodule(".".join(path[:-1]))
        linear = getattr(parent, path[-1])
        wrapped = NoisyHead(linear) if "head" in path else ADAPTERS[adapter](linear, rank)
        if noise:
            k, n = order.index(key), len(order)
            layer_sigma = sigma * (n - k) / (n - first_noisy) if k >= first_noisy else 0.0
            wrapped = Noise(wrapped, layer_sigma, shape)
        setattr(parent, path[-1], wrapped)
    for name, module in list(model.named_modules()):
        if isinstance(module, DropPath):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SharedDropPath(module.drop_prob, module.scale_by_keep))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("delta" in name or "head" in name)
    return model


def block_key(path):
    """Where a layer is: the numbers in its path, the head after everything."""
    return (float("inf"),) if "head" in path else tuple(int(part) for part in path if part.isnumeric())


class Losses(NamedTuple):
    total: torch.Tensor
    cls: torch.Tensor
    pace: torch.Tensor
    logits: torch.Tensor


def losses(logits, labels, target, lambda_):
    """`cls + lambda·pace` of logits `[B, C]`, labels `[B]`, and the logits that they shall agree with."""
    cls = F.cross_entropy(logits, labels)
    pace = (logits - target).square().sum(-1).mean()
    return Losses(cls + lambda_ * pace, cls, pace, logits)


def two_branch_loss(model, x, labels, lambda_):
    """PACE: the batch twice through the whole model; cross-entropy of the first branch, consistency between the two."""
    set_branches(model, 2)
    first, second = model(torch.cat([x, x])).chunk(2)
    return losses(first, labels, second, lambda_)


def fast_loss(model, x, labels, lambda_, history, index):
    """PACE-fast: one branch, consistent with the logits `history[index]` of the last epoch, which it replaces.

    `history` is `[samples, C]` and starts at zero.
    """
    set_branches(model, 1)
    logits = model(x)
    with torch.no_grad():
        recent = history[index].to(logits.device)
        history[index] = logits.to(history)
    return losses(logits, labels, recent, lambda_)


def lazy_half_loss(model, x, labels, lambda_, step, interval):
    """PACE-lazy: every `interval`-th step two branches of half the batch, otherwise one branch of all and no
    consistency."""
    if step % interval == 0:
        half = x.shape[0] // 2
        return two_branch_loss(model, x[:half], labels[:half], lambda_)
    set_branches(model, 1)
    logits = model(x)
    cls = F.cross_entropy(logits, labels)
    return Losses(cls, cls, torch.zeros_like(cls), logits)
