"""Where a layer's noise comes from, and the noise written out."""

from math import prod
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .. import _library as lib
from .._errors import PaceError, check_choice, check_integer
from ._arguments import Function, check_dense, check_sample, check_tensor
from ._operator import is_plain, refuse_tensors


class Noise(NamedTuple):
    """Where a layer's `z = 1 + σ·n` comes from.

    `key` is an int64 tensor of one element on the layer's device, from `keys`: z is made from it, in the forward pass
    and again in the backward pass. `z` is given noise instead, `[R, N]`, or `[R, T, N]` per token. Neither is `z = 1`.
    `first_sample` is the number of the batch's first sample in the global batch.

    `rows`, int64 `[R, T]` or `[R]`, says which row of a given `z [S, N]` each token, or each leading row, is multiplied by: for rows in
    which several sequences are packed. What is made of them, `z[rows]`, is made again in the backward pass and not kept.
    """

    key: Optional[Tensor] = None
    sigma: float = 0.0
    per_token: bool = False
    first_sample: int = 0
    branches: int = 1
    z: Optional[Tensor] = None
    rows: Optional[Tensor] = None


NO_NOISE = Noise()


def keys(seed: int, step: int, layers: int, device: torch.device | str = "cpu") -> Tensor:
    """The keys of a training step's layers, `int64 [layers]`; slices of one element are what `Noise` takes.

    On CUDA the copy is asynchronous.
    """
    # As of `torch.manual_seed`.
    seed, step = check_integer("seed", seed, -(2**63), 2**64 - 1), check_integer("step", step, 0, 2**64 - 1)
    layers = check_integer("layers", layers, 0, 2**32)
    host = torch.tensor([lib.key(seed, step, layer) for layer in range(layers)], dtype=torch.int64)
    device = torch.device(device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def noise(source: Noise, batch: int, channels: int, tokens: int = 1) -> Tensor:
    """A layer's z written out, as it multiplies: float32 `[R, N]`, or `[R, T, N]` per token; for tests, inspection."""
    if type(source) is not Noise:
        raise no_noise("source", source)
    check_tensor("key", source.key)
    settings = FillSettings(source.sigma, source.per_token, source.first_sample, source.branches, batch, tokens, channels)
    if is_plain([source.key]):
        return _FILL([source.key], settings)[0]
    refuse_tensors(settings)
    return _noise(source.key, *settings)


def no_noise(name: str, value: Any) -> PaceError:
    """The error for something else than a `Noise`."""
    return PaceError(f"`{name}` is {type(value).__name__}, expected a `Noise`")


def noise_fields(settings, key: Optional[Tensor], z: Optional[Tensor], sizes: lib.PaceShape) -> lib.PaceNoise:
    """Where z comes from, for a C struct; the addresses of the key and of z are set later."""
    shape = lib.PER_TOKEN if settings.per_token else lib.PER_SAMPLE
    if z is not None:
        # The library counts elements only, of which a transposed z has as many.
        rows, channels = sizes.branches * sizes.batch, sizes.out_features
        if z.dim() < 2 or (z.shape[0], z.shape[-1]) != (rows, channels):
            raise PaceError(f"`z` has shape {tuple(z.shape)}, expected {rows} rows of {channels} channels")
        return lib.PaceNoise(kind=lib.NOISE_GIVEN, shape=shape)
    if key is None:
        return lib.PaceNoise()
    first_sample = check_sample(settings.first_sample)
    return lib.PaceNoise(kind=lib.NOISE_GENERATED, shape=shape, first_sample=first_sample, sigma=settings.sigma)


def under(noise: Noise, operator: Callable, tensors: Sequence[Optional[Tensor]], settings: NamedTuple) -> Tensor:
    """Calls an operator whose last tensors are the key and z of its noise, on `rows` of a `z`."""
    table, rows = noise.z, noise.rows
    check_tensor(operator.names[0], tensors[0])
    copies = check_choice("branches", noise.branches, (1, 2)) if getattr(settings, "shared_input", False) else 1
    _check_rows(table, rows, tensors[0].shape, copies)
    try:
        # To which negative rows are wrong, on CUDA too, where nobody waits for a look at them.
        z = torch.embedding(table, rows)
    except IndexError:
        raise PaceError(f"`rows` has numbers that are not from 0 to {len(table) - 1}, the rows of `z`") from None
    tensors, settings = (*tensors, noise.key, z), settings._replace(per_token=rows.dim() == 2)
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    # Compilers and checkpointing have their own say in what is kept.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or hooks is None or hooks(True) is not None:
        return operator(tensors, settings)
    address, shape, versions = z.data_ptr(), z.shape, (table._version, rows._version)

    def pack(tensor: Tensor) -> Optional[Tensor]:
        return None if tensor.data_ptr() == address and tensor.shape == shape else tensor

    def unpack(kept: Optional[Tensor]) -> Tensor:
        if kept is None and (table._version, rows._version) != versions:
            raise RuntimeError("`z` or `rows` of a packed layer was changed in place before the backward pass")
        return torch.embedding(table, rows) if kept is None else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return operator(tensors, settings)


def _check_rows(table: Any, rows: Any, x_shape: torch.Size, copies: int) -> None:
    """That `rows` says for an input of this shape, which is read so many times, which row of the table each token has."""
    check_tensor("z", table, 2)
    check_dense("z", table)
    check_tensor("rows", rows)
    leading, tokens = copies * x_shape[:1].numel(), x_shape[1:-1].numel()
    if tuple(rows.shape) not in ((leading,), (leading, tokens)) or rows.dtype != torch.int64 or rows.device != table.device:
        raise PaceError(f"`rows` is {tuple(rows.shape)} of {rows.dtype} on {rows.device}, expected int64 [{leading}, {tokens}] or [{leading}] "
                        f"on {table.device}")


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
    check_choice("branches", settings.branches, (1, 2))
    sizes = {name: check_integer(name, getattr(settings, name), 1) for name in ("batch", "tokens", "channels")}
    if prod(sizes.values()) >= 2**60:
        largest = max(sizes, key=sizes.get)
        raise PaceError(f"`{largest}` is {sizes[largest]}, with which z is larger than any memory")
    shape = lib.PaceShape(
        branches=settings.branches, batch=settings.batch, tokens=settings.tokens, in_features=1,
        out_features=settings.channels,
    )
    return {"shape": shape, "noise": noise_fields(settings, key, None, shape)}


_FILL = Function(
    "noise_fill",
    lib.PaceNoiseFill,
    inputs="key_address",
    outputs="z",
    fields=_fields,
    shapes=lambda settings, key: [_shape(settings)],
    dtype=torch.float32,
)
