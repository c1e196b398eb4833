"""Small models of one's own, for the tests."""

import copy

import pace_torch
import torch
from conftest import perturb
from pace_torch import NoisyLinear
from torch import nn

SETTINGS = dict(rank=2, sigma=0.5, lambda_=0.1)


def linear(k, n, **settings):
    return nn.Linear(k, n, dtype=torch.float64, **settings)


class Tokens(nn.Module):
    """A model of one's own: tokens `[B, T, 6]`, a mask of them `[B, T]`, and a table of positions that is no sample."""

    def __init__(self, returns=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.position, self.body = linear(2, 8), nn.ModuleList([linear(6, 8), linear(8, 8)])
        self.classifier = linear(8, 5)
        self.register_buffer("table", torch.randn(4, 2, dtype=torch.float64))
        self.returns = returns

    def forward(self, x, mask=None):
        x = torch.tanh(self.body[0](x)) + self.position(self.table)[: x.shape[1]]
        x = torch.tanh(self.body[1](x))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return self.returns(self.classifier(x.mean(1)))


def batch(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 6, dtype=torch.float64, generator=generator)
    mask = (torch.rand(n, 4, generator=generator) > 0.3).double()
    return x, mask, torch.arange(n) % 5


def injected(model=None, **settings):
    return perturb(pace_torch.inject(model or Tokens(), **{**SETTINGS, **settings})).train()


def names_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, NoisyLinear)}


class Scaled(nn.Linear):
    """A forward pass of its own; stands for a quantised layer too."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Scalings(nn.Module):
    """Layers with a forward pass of their own, the classifier among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = Scaled(6, 8, dtype=torch.float64), Scaled(8, 5, dtype=torch.float64)

    def forward(self, x):
        return self.classifier(torch.tanh(self.body(x)).mean(1))

    @staticmethod
    def batch():
        return torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Pixels(nn.Module):
    """Pointwise convolutions between others, the classifier among them."""

    def __init__(self, convolutions=True):
        super().__init__()
        torch.manual_seed(0)
        make = (lambda k, n: nn.Conv2d(k, n, 1, dtype=torch.float64)) if convolutions else linear
        self.stem = nn.Conv2d(3, 6, 3, dtype=torch.float64)
        self.narrow = nn.ModuleList([make(6, 8), make(8, 8)])
        self.head = make(8, 5)
        self.convolutions = convolutions

    def forward(self, x):
        x = self.stem(x)
        x = x if self.convolutions else x.movedim(1, -1)
        for layer in self.narrow:
            x = torch.tanh(layer(x))
        pooled = x.mean((2, 3) if self.convolutions else (1, 2), keepdim=True)
        return self.head(pooled).flatten(1)

    @staticmethod
    def batch():
        return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def explicit(model, x, mask, step=0):
    """Both branches by the formulas, with the noise written out."""
    copied = copy.deepcopy(model)
    copied.pace.step = step
    copied.pace.advance()
    copied.pace.batch, copied.pace.first_sample = len(x), 0

    def layer(noisy, x):
        weight, bias = noisy.adapter.merged()
        base = noisy.adapter.base_module
        trained = isinstance(noisy.adapter, pace_torch.Head)
        weight0, bias0 = (0 * base.weight, 0 * base.bias) if trained else (base.weight, base.bias)
        z = torch.ones(len(x), base.out_features, dtype=torch.float64)
        if noisy.sigma and len(x) == 2 * copied.pace.batch:
            z = pace_torch.noise(copied.pace.noise(noisy.layer, noisy.sigma, len(x)), copied.pace.batch, base.out_features)
        z = z.double().view(-1, *(1,) * (x.dim() - 2), base.out_features)
        return x @ weight0.T + bias0 + z * (x @ (weight - weight0).T + (bias - bias0))

    with torch.no_grad():
        x, mask = torch.cat([x, x]), torch.cat([mask, mask])
        position = copied.position.adapter.traced(copied.table) if isinstance(copied.position, NoisyLinear) else (
            copied.position(copied.table))
        x = torch.tanh(layer(copied.body[0], x)) + position[: x.shape[1]]
        x = torch.tanh(layer(copied.body[1], x)) * mask.unsqueeze(-1)
        return layer(copied.classifier, x.mean(1))


class Around(nn.Module):
    """A module with a model in it, as Lightning's."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)
