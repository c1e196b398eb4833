"""Which layers of a model get adapters, and which is its classifier."""

import re
import warnings
from collections.abc import Iterable
from typing import Optional, Union

import timm.layers
from torch import nn

from ._library import PaceError

Names = Union[str, Iterable[str]]
# Names of classifiers: of timm's and torchvision's models, and of Hugging Face's.
CLASSIFIERS = ("head", "head_dist", "fc", "classifier", "classification_head", "logits_proj", "score")


def is_named(name: str, names: Names) -> bool:
    """Whether a layer's name is among `names`, as PEFT has it: the whole name or its end at a dot; a string is a pattern of the
    whole name."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == other or name.endswith(f".{other}") for other in names)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer of Hugging Face's GPT-2, whose weight is `[K, N]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linears_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear layer, with all its names. None whose weight is that of another kind of layer too, such as an embedding: it
    would change with it."""
    linears: dict[nn.Module, list[str]] = {}
    others: set[nn.Parameter] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            linears.setdefault(module, []).append(name)
        else:
            others.update(module.parameters(recurse=False))
    return {linear: names for linear, names in linears.items() if linear.weight not in others}


def other_drop_paths(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that drop a residual branch of whole samples and are not timm's: told by their class's name, as each library has its own."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if re.search("DropPath|DropConnect|StochasticDepth", type(module).__name__) and not isinstance(module, timm.layers.DropPath)
        and type(module).__module__ != __package__ + ".modules" and not [*module.children(), *module.parameters()]
    ]


def choose(
    model: nn.Module, target_modules: Optional[Names], exclude_modules: Optional[Names], head: Optional[Names]
) -> tuple[dict[nn.Module, list[str]], set[nn.Module]]:
    """The linear layers that get adapters, with all names of each, and those among them that are the classifier.

    The classifier is there whatever `target_modules` says, as in PEFT's `modules_to_save`.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners."):
            raise PaceError(f"`{name}` is a layer of PEFT's, around which another adapter would not do what either says: "
                            "`merge_and_unload` it first")
    linears = linears_of(model)
    if not linears:
        raise PaceError("`model` has no linear layers")
    heads = _heads(linears, head)
    if head is None and not heads:
        warnings.warn("no classifier is found by its name: if the model has one, name it by `head`, or it stays frozen as it is",
                      stacklevel=3)
    if head is not None and not heads:
        raise PaceError(f"`head` is {head!r}: no linear layer has such a name")
    if target_modules is not None and not any(
        is_named(name, target_modules) for names in linears.values() for name in names
    ):
        raise PaceError(f"`target_modules` is {target_modules!r}: no linear layer has such a name")

    def wanted(linear: nn.Module, names: list[str]) -> bool:
        if exclude_modules is not None and any(is_named(name, exclude_modules) for name in names):
            return False
        return linear in heads or target_modules is None or any(is_named(name, target_modules) for name in names)

    chosen = {linear: names for linear, names in linears.items() if wanted(linear, names)}
    if not chosen:
        raise PaceError("`exclude_modules` leaves no linear layer")
    weights: dict[nn.Parameter, str] = {}
    for linear, names in chosen.items():
        if names[0] == "":
            raise PaceError("`model` is a linear layer itself: put it into a module")
        if "weight" not in linear._parameters or isinstance(linear.weight, nn.UninitializedParameter):
            raise PaceError(f"the weight of `{names[0]}` is made anew at each step, or not made yet: remove its parametrization (weight or "
                            "spectral norm, pruning) or run it once first, or name it in `exclude_modules`")
        other = weights.setdefault(linear.weight, names[0])
        if other != names[0]:
            raise PaceError(f"`{other}` and `{names[0]}` are two layers with one weight, which adapters would tear apart: name them in "
                            "`exclude_modules`")
        # timm's own multiplies in the type of its input, as adapters do.
        if not is_conv1d(linear) and type(linear).forward not in (nn.Linear.forward, timm.layers.Linear.forward):
            raise PaceError(f"`{names[0]}` is a {type(linear).__name__}, whose own forward pass an adapter would replace: name it in "
                            "`exclude_modules`")
    return chosen, heads & chosen.keys()


def _heads(linears: dict[nn.Module, list[str]], head: Optional[Names]) -> set[nn.Module]:
    if head is not None:
        return {linear for linear, names in linears.items() if any(is_named(name, head) for name in names)}
    # Of all that is called so, what lies nearest to the top: a block may have heads of its own, and a `fc` in one is none.
    depths: dict[nn.Module, int] = {}
    for linear, names in linears.items():
        paths = [name.split(".") for name in names]
        found = [depth for path in paths for depth, part in enumerate(path) if part in CLASSIFIERS and (part != "fc" or not any(map(str.isnumeric, path)))]
        if found:
            depths[linear] = min(found)
    return {linear for linear, depth in depths.items() if depth == min(depths.values())}
