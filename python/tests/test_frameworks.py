"""What training frameworks, and people, do to a model between `inject` and `merge`: the same numbers, or an error that says so."""

import copy
import io

import pace_torch
import pytest
import torch
from conftest import close, perturb, vit
from pace_torch import NoisyLinear, PaceError
from torch import nn

SETTINGS = dict(rank=2, sigma=0.5, lambda_=0.1, seed=3)
X, LABELS = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def injected(model=None, **settings):
    return perturb(pace_torch.inject(model or vit(drop_path_rate=0.3), **{**SETTINGS, **settings})).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, engine=None, x=X, labels=LABELS):
    """The loss of a training step, and its gradients."""
    model.zero_grad()
    total = model.pace.training_step(engine or model, x, labels).total
    total.backward()
    return total.detach(), gradients(model)


def same(got, expected):
    close(got[0], expected[0], 1e-12)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(got[1][name], gradient, 1e-9)


@pytest.fixture(scope="module")
def plain():
    """What a step gives without any framework."""
    return step(injected())


@pytest.fixture(scope="module")
def evaluated():
    return injected().eval()(X).detach()


# ------------------------------------------------------------------------------------------------------ modes of parts


def test_parts_in_another_mode(plain, evaluated):
    model = injected()
    model(X)
    model.eval()
    for part in (model.head, model.blocks[1].drop_path1, model.blocks[2].drop_path1):
        part.train()
    # Four rows or eight: those of the step before must not count.
    for x, expected in ((X, evaluated), (torch.cat([X, X]), evaluated.repeat(2, 1))):
        close(model(x), expected, 1e-12)
    # The first noisy block, where branches start, and its noise, which the branches then differ by no more.
    model = injected(vit(), first_noisy=1)
    for module in model.modules():
        if isinstance(module, NoisyLinear) and module is not model.blocks[1].attn.qkv:
            module.sigma = 0.0
    assert model.pace.training_step(model, X, LABELS).consistency > 0
    model.blocks[1].eval()
    assert model.pace.training_step(model, X, LABELS).consistency == 0
