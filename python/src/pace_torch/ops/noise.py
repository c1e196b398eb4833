"""Where a layer's noise comes from, and the noise written out."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import Function, not_negative


class Noise(NamedTuple):
    """Where a layer's `z = 1 + σ·n` comes from.

    `key` is an int64 tensor of one element on the layer's device, from `keys`: z is made from it, in the forward pass
    and again in the backward pass. `z` is given noise instead, `[R, N]`, or `[R, T, N]` per token. Neither is `z = 1`.
    `first_sample` is the number of the batch's first sample in the global batch.
    """

    key: Optional[Tensor] = None
    sigma: float = 0.0
    per_token: bool = False
    first_sample: int = 0
    branches: int = 1
    z: Optional[Tensor] = None


NO_NOISE = Noise()


def keys(seed: int, step: int, layers: int, device: torch.device | str = "cpu") -> Tensor:
    """The keys of a training step's layers, `int64 [layers]`; slices of one element are what `Noise` takes.

    On CUDA the copy is asynchronous.
    """
    host = torch.tensor([lib.key(seed, step, layer) for layer in range(layers)], dtype=torch.int64)
    device = torch.device(device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def noise(source: Noise, batch: int, channels: int, tokens: int = 1) -> Tensor:
    """A layer's z written out, as it multiplies: float32 `[R, N]`, or `[R, T, N]` per token; for tests, inspection."""
    if source.key is None:
        raise PaceError("`source` has no key")
    return _noise(
        source.key, source.sigma, source.per_token, source.first_sample, source.branches, batch, tokens, channels
    )


def noise_fields(settings, key: Optional[Tensor], z: Optional[Tensor]) -> lib.PaceNoise:
    """Where z comes from, for a C struct; the addresses of the key and of z are set later."""
    shape = lib.PER_TOKEN if settings.per_token else lib.PER_SAMPLE
    if z is not None:
        return lib.PaceNoise(kind=lib.NOISE_GIVEN, shape=shape)
    if key is None:
        return lib.PaceNoise()
    first_sample = not_negative("first_sample", settings.first_sample)
    return lib.PaceNoise(kind=lib.NOISE_GENERATED, shape=shape, first_sample=first_sample, sigma=settings.sigma)


class FillSettings(NamedTuple):
    """What the noise is filled in for."""

    sigma: float
    per_token: bool
    first_sample: int
    branches: int
    batch: int
    tokens: int
    channels: int


@torch.library.custom_op("pace::noise", mutates_args=())
def _noise(
    key: Tensor, sigma: float, per_token: bool, first_sample: int, branches: int, batch: int, tokens: int, channels: int
) -> Tensor:
    return _FILL([key], FillSettings(sigma, per_token, first_sample, branches, batch, tokens, channels))[0]


@_noise.register_fake
def _(key, *settings):
    return key.new_empty(_shape(FillSettings(*settings)), dtype=torch.float32)


def _shape(settings: FillSettings) -> tuple[int, ...]:
    rows = settings.branches * settings.batch
    return (rows, settings.tokens, settings.channels) if settings.per_token else (rows, settings.channels)


def _fields(settings: FillSettings, key: Tensor) -> dict:
    shape = lib.PaceShape(
        branches=settings.branches, batch=settings.batch, tokens=settings.tokens, in_features=1,
        out_features=settings.channels,
    )
    return {"shape": shape, "noise": noise_fields(settings, key, None)}


_FILL = Function(
    "noise_fill",
    lib.PaceNoiseFill,
    inputs="key_address",
    outputs="z",
    fields=_fields,
    shapes=lambda settings, key: [_shape(settings)],
    dtype=torch.float32,
)
