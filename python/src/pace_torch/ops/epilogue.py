"""Noise on what an adapter of any other kind adds."""

from typing import NamedTuple

from torch import Tensor

from .. import _library as lib
from .._errors import PaceError
from ._arguments import Function
from ._layer import frozen, keep_key, rows_fields, same_key
from ._operator import Derivative, Operator
from .noise import Noise, no_noise, noise_fields, under


def noisy_epilogue(y: Tensor, a: Tensor, noise: Noise) -> Tensor:
    """`y + z ⊙ a` for an adapter `a` of any other kind; both `[R, ..., N]`."""
    if type(noise) is not Noise:
        raise no_noise("noise", noise)
    settings = EpilogueSettings(noise.sigma, noise.per_token, noise.first_sample, noise.branches)
    if noise.rows is not None:
        return under(noise, _noisy_epilogue, (y, a), settings)
    return _noisy_epilogue((y, a, noise.key, noise.z), settings)


class EpilogueSettings(NamedTuple):
    """The fields of a noise besides its tensors."""

    sigma: float
    per_token: bool
    first_sample: int
    branches: int


# ------------------------------------------------------------------------------------------------------------- operator


def _shapes(settings: EpilogueSettings, y, a, key, z):
    return [y.shape]


def _fields(settings: EpilogueSettings, y, a, key, z):
    if y.shape != a.shape:
        raise PaceError(f"`y` has shape {tuple(y.shape)}, expected {tuple(a.shape)} like `a`")
    shape = rows_fields("a", a, settings)
    return {"shape": shape, "noise": noise_fields(settings, key, z, shape)}


def _save(ctx, tensors, settings: EpilogueSettings, outputs) -> None:
    _, _, key, z = tensors
    if ctx.needs_input_grad[3]:
        raise frozen(ctx, z=3)
    ctx.settings = settings
    keep_key(ctx, key)
    ctx.save_for_backward(key, z)


def _gradients(ctx, dy: Tensor):
    key, z = ctx.saved_tensors
    wants_dy, wants_da, *_ = ctx.needs_input_grad
    da = _noisy_epilogue_backward((dy, same_key(ctx, key), z), ctx.settings)[0] if wants_da else None
    return dy if wants_dy else None, da, None, None


_noisy_epilogue = Operator(
    "noisy_epilogue",
    "y a key? z?",
    EpilogueSettings,
    Function(
        "noisy_epilogue_forward",
        lib.PaceNoisyEpilogue,
        inputs="y a key_address z",
        outputs="y",
        fields=_fields,
        shapes=_shapes,
    ),
    _shapes,
    save=_save,
    gradients=_gradients,
)


# ----------------------------------------------------------------------------------------------------------- derivative


def _backward_shapes(settings: EpilogueSettings, dy, key, z):
    return [dy.shape]


def _backward_fields(settings: EpilogueSettings, dy, key, z):
    shape = rows_fields("dy", dy, settings)
    return {"shape": shape, "noise": noise_fields(settings, key, z, shape)}


_noisy_epilogue_backward = Derivative(
    "noisy_epilogue_backward",
    "dy key? z?",
    EpilogueSettings,
    Function(
        "noisy_epilogue_backward",
        lib.PaceNoisyEpilogue,
        inputs="dy key_address z",
        outputs="da",
        fields=_backward_fields,
        shapes=_backward_shapes,
    ),
    _backward_shapes,
)
