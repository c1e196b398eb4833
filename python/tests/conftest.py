import json
import multiprocessing
import os
import socket
import struct
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pace_torch
import pytest
import timm
import torch
from pace_torch import AttachedNoise, Head, NoisyLinear
from pace_torch.ops import _arguments
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches" / "peers"))

torch.set_num_threads(1)


class Case:
    """A recorded case of the official code: tensors, and settings as text."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        self.settings, self.tensors = header["__metadata__"], load_file(path)

    def __getitem__(self, name):
        return self.tensors[name]

    def get(self, name):
        return self.tensors.get(name)

    def under(self, prefix):
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def golden(*patterns):
    """Recorded cases, as parameters of a test."""
    paths = sorted(path for pattern in patterns for path in (ROOT / "tests" / "golden").glob(pattern))
    return pytest.mark.parametrize("case", paths, ids=[path.stem for path in paths], indirect=True)


@pytest.fixture
def case(request):
    return Case(request.param)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def fork_server(*modules):
    """Processes that `multiprocessing` starts by "forkserver" come from one that has loaded these modules of the tests, instead of each loading
    PyTorch again."""
    paths = [str(ROOT / "python" / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(modules))
        context.Process(target=int).start()
        yield


def vit(classes=7, drop_path_rate=0.0, depth=3, dtype=torch.float64, seed=0):
    """A vision transformer of the size of the recorded training runs."""
    torch.manual_seed(seed)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=depth, num_heads=4, mlp_ratio=2, num_classes=classes,
        drop_path_rate=drop_path_rate, norm_layer=norm,
    ).to(dtype)


def swin(classes=5, drop_path_rate=0.0, dtype=torch.float64, seed=0):
    """A small Swin with windows, shifts and a downsampling layer without bias."""
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=classes,
        drop_path_rate=drop_path_rate,
    ).to(dtype)


def perturb(model, scale=0.1, seed=1):
    """Moves the trained tensors away from their start, where most gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((scale * noise).to(parameter.dtype))
    return model


def check_layers(model, run, tolerance=1e-10):
    """That in a step each layer with noise gives `base + z⊙(what its adapter adds)` of its own input; what `run` returns."""
    calls = []

    def note(site, args, y):
        # Not in the looks at the model before its first step; what comes behind may change `y` in place.
        if site.training and site.pace.training:
            calls.append((site, args[0].detach().clone(), y.detach().clone()))

    sites = [module for module in model.train().modules() if isinstance(module, (NoisyLinear, AttachedNoise))]
    handles = [site.watched.register_forward_hook(lambda _, args, y, site=site: note(site, args, y)) for site in sites]
    result = run()
    for handle in handles:
        handle.remove()
    noisy = {site: 0 for site in sites if site.sigma and (site.sample_rows is not None or not site.fixed_rows)}
    added = torch.zeros(())
    for site, x, y in calls:
        layer, convolution = site.watched, getattr(site, "adapter", site.watched)
        dim = 1 if getattr(convolution, "is_convolution", hasattr(convolution, "conv_fn")) else y.dim() - 1
        layer.eval()
        with torch.no_grad():
            plain = layer(x)
            if isinstance(site, AttachedNoise):
                base = layer.base_layer(x) if hasattr(layer, "base_layer") else torch.zeros_like(plain)
            else:
                base = torch.zeros_like(plain) if isinstance(site.adapter, Head) else base_of(site.adapter, x)
        layer.train()
        z = torch.ones((), dtype=y.dtype)
        if site in noisy and model.pace.is_on_samples(site, x):
            noise = model.pace.noise(site.layer, site.sigma, len(y))
            z = pace_torch.noise(noise, len(y) // noise.branches, y.shape[dim]).to(y.dtype)
            z = z.view(len(y), *(y.shape[dim] if i == dim else 1 for i in range(1, y.dim())))
            noisy[site] += 1
            if noise.branches == 2:
                assert not torch.allclose(*z.chunk(2))
        added = max(added, (plain - base).abs().max())
        close(y, base + z * (plain - base), tolerance)
    assert added > 0 and noisy and min(noisy.values()) > 0, [site.path for site, count in noisy.items() if not count]
    return result


def base_of(adapter, x):
    """What the layer within an adapter gives."""
    if adapter.is_opaque:
        return adapter.base_module(x)
    x = x.movedim(1, -1) if adapter.is_convolution else x
    y = torch.nn.functional.linear(x, adapter.base_module.weight, adapter.base_module.bias)
    return y.movedim(-1, 1) if adapter.is_convolution else y


@pytest.fixture
def flags(monkeypatch):
    """The flags of every call of a layer that may fold from here on, as numbers."""
    seen, call = [], _arguments._Prepared.__call__

    def note(self, tensors):
        if self.entry.__name__.startswith(("pace_noisy_linear", "pace_lora_mul_linear")):
            seen.append(struct.unpack_from("=QII", self.arguments)[2])
        return call(self, tensors)

    monkeypatch.setattr(_arguments._Prepared, "__call__", note)
    return seen


def error(got, expected):
    """The largest difference, relative to the largest expected value."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def close(got, expected, tolerance=1e-10):
    measured = error(got, expected)
    assert measured <= tolerance, f"off by {measured:.2e}, allowed are {tolerance:.0e}"


# ----------------------------------------------------------------------------------------------- a step to compare with

STEP = dict(rank=2, sigma=0.5, lambda_=0.1, seed=3)
X, LABELS = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def injected(model=None, **settings):
    """A model, by default a small vision transformer, with adapters that have an effect."""
    return perturb(pace_torch.inject(model or vit(drop_path_rate=0.3), **{**STEP, **settings})).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, engine=None, x=X, labels=LABELS):
    """The loss of a training step, and its gradients."""
    model.zero_grad()
    total = model.pace.training_step(model if engine is None else engine, x, labels).total
    total.backward()
    return total.detach(), gradients(model)


def same(got, expected):
    """That two results of `step` are one."""
    close(got[0], expected[0], 1e-12)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(got[1][name], gradient, 1e-9)


def assert_equal_weights(model, other, tolerance=1e-10):
    for name, weight in pace_torch.trainable_state_dict(other).items():
        close(pace_torch.trainable_state_dict(model)[name], weight, tolerance)


@pytest.fixture(scope="session")
def plain():
    """What a step gives without any framework."""
    return step(injected())


@pytest.fixture(scope="session")
def evaluated():
    return injected().eval()(X).detach()
