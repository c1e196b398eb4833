"""A look at a model before its first step: which layers work on rows that are those of samples."""

import warnings
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from ._batch import PACKED, find_logits, map_tensors, twice, with_rows
from ._dropout import check_branches_alike

if TYPE_CHECKING:
    from .controller import Pace

ONE_TWICE, ONE, ALL = [0, 0], [0], slice(None)


@torch.compiler.disable
def look_at(model: nn.Module, pace: "Pace", args: tuple, kwargs: dict) -> None:
    """Runs the model on one sample, twice over and once, and on all, without noise, and finds the layers whose rows are not those of
    samples: they have as many for two samples as for one, or others for the second sample than for the first, or their number depends on
    what the samples are (experts). Their `fixed_rows` and `sample_rows` say so.
    """
    pace.probed = True
    if pace.packing is not None:
        # Of other numbers of rows; models find them by the positions.
        kwargs = {name: value for name, value in kwargs.items() if name not in PACKED}
    layers = [layer for layer in model.modules() if hasattr(layer, "fixed_rows")]
    twice: dict[nn.Module, list[Tensor]] = {}
    rows: dict[nn.Module, list[int]] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = (*args, *kwargs.values())[0].detach()
        rows.setdefault(layer, []).append(x.shape[0])
        if not seen:
            twice.setdefault(layer, []).append(x)

    handles = [
        layer.watched.register_forward_pre_hook(lambda _, args, kwargs, layer=layer: note(layer, args, kwargs), with_kwargs=True)
        for layer in layers
    ]
    # Not `eval()`, which some modules take for a sign to change.
    training = {submodule: submodule.training for submodule in model.modules()}
    buffers = _copied_buffers(model)
    seen: list[dict[nn.Module, list[int]]] = []
    try:
        for submodule in training:
            submodule.training = False
        pace.looking = True
        for samples in (ONE_TWICE, ONE, ALL):
            rows.clear()
            with torch.no_grad():
                one, named = with_rows(lambda tensor: tensor[samples], args, kwargs, pace.batch, pace.batch_of)  # noqa: B023
                logits = _logits_of_a_copy(model, one, named)
            if samples is ONE_TWICE and logits is not None and logits.dim() == 2:
                pace.classes = logits.shape[1]
            seen.append(dict(rows))
    except Exception as error:
        if not seen:
            warnings.warn(f"the model cannot be run on one sample twice over ({error}), which would tell whether the rows of all "
                          "its layers are those of samples: it is taken for granted", stacklevel=2)
    finally:
        pace.looking = False
        for handle in handles:
            handle.remove()
        for submodule, was_training in training.items():
            submodule.training = was_training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if not seen:
        return
    alone, every = (seen[i] if len(seen) > i else {} for i in (1, 2))
    for layer, inputs in twice.items():
        for i, x in enumerate(inputs):
            n = x.shape[0] // 2
            counts = [(alone.get(layer, []), n), (every.get(layer, []), n * pace.batch)]
            doubles = x.shape[0] == 2 * n and all(len(count) != len(inputs) or count[i] == wanted for count, wanted in counts)
            if doubles and torch.allclose(x[:n], x[n:], rtol=1e-2, atol=1e-3 * float(x.abs().max())):
                layer.sample_rows = n
            else:
                layer.fixed_rows = layer.fixed_rows | {x.shape[0]}
    _warn([layer.path for layer in twice if layer.fixed_rows and layer.sample_rows is None],
          "work on rows that are not those of samples, and get no noise")
    _warn([layer.path for layer in layers if layer not in twice], "have an adapter, but the model does not call them")


@torch.compiler.disable
@torch.no_grad()
def look_at_dropout(model: nn.Module, pace: "Pace", args: tuple, kwargs: dict) -> None:
    """Runs the model in training without noise, and checks that its branches are alike."""
    buffers = _copied_buffers(model)
    args, kwargs = with_rows(twice, args, {name: value for name, value in kwargs.items() if name not in PACKED}, pace.batch, pace.batch_of)
    # Layers have no noise then.
    pace.training, pace.looking = False, True
    try:
        check_branches_alike(pace, lambda: _logits_of_a_copy(model, args, kwargs), pace.keys.device)
        pace.is_alike = True
    finally:
        pace.training, pace.looking = True, False
        for buffer, value in buffers:
            buffer.copy_(value)


def _logits_of_a_copy(model: nn.Module, args: tuple, kwargs: dict) -> Optional[Tensor]:
    """The logits of a batch that is the caller's, and not to be changed by a model that normalises it in place."""
    args, kwargs = map_tensors(torch.clone, (args, kwargs))
    return find_logits(model.forward(*args, **kwargs))


def _copied_buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a look may change, with copies. Those of inference mode cannot be changed outside of it."""
    is_inference = torch.is_inference_mode_enabled()
    return [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta and (is_inference or not buffer.is_inference())]


def _warn(layers: list[str], what: str) -> None:
    if layers:
        some = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
        warnings.warn(f"{len(layers)} layers {what}: {some}", stacklevel=3)
