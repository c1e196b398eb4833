"""Which layers of a model get adapters, and which is its classifier."""

import re
import warnings
from collections import Counter
from typing import Optional

import timm.layers
from torch import nn

from ._errors import Names, PaceError, check_names
from ._library import DTYPES

# Names of classifiers: of timm's and torchvision's models, and of Hugging Face's.
CLASSIFIERS = ("head", "head_dist", "fc", "classifier", "classification_head", "logits_proj", "score")


def is_named(name: str, names: Names) -> bool:
    """Whether a layer's name is among `names`, as PEFT has it: the whole name or its end at a dot; a string is a pattern of the
    whole name."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == other or name.endswith(f".{other}") for other in names)


def is_any_named(names: list[str], chosen: Optional[Names]) -> bool:
    """Whether one of a layer's names is; None chooses none."""
    return chosen is not None and any(is_named(name, chosen) for name in names)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer of Hugging Face's GPT-2, whose weight is `[K, N]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_plain(weight: nn.Parameter) -> bool:
    """Whether it is an ordinary parameter of numbers that are computed with, rather than of a quantised layer."""
    return type(weight) is nn.Parameter and weight.dim() == 2 and weight.dtype in DTYPES


def is_opaque(module: nn.Module) -> bool:
    """Whether a linear layer computes something of its own, or with a weight that is quantised."""
    if not isinstance(module, nn.Linear):
        return False
    # timm's own multiplies in the type of its input, as adapters do.
    return type(module).forward not in (nn.Linear.forward, timm.layers.Linear.forward) or not is_plain(module.weight)


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a convolution that is a linear layer for each position."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and {*module.kernel_size, *module.stride, module.groups} == {1}
        # With a kernel of one, "same" is "valid".
        and (isinstance(module.padding, str) or not any(module.padding))
        and type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    )


def is_peft(module: nn.Module) -> bool:
    """Whether it is a layer that PEFT has put around another."""
    return type(module).__module__.startswith("peft.tuners.")


def linears_of(model: nn.Module, *convolutions: Optional[Names]) -> dict[nn.Module, list[str]]:
    """Every linear layer, with all its names; pointwise convolutions if they are named. None whose weight is that of another kind of
    layer too, such as an embedding: it would change with it."""
    linears: dict[nn.Module, list[str]] = {}
    others: set[nn.Parameter] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if is_pointwise(module):
            is_linear = any(is_any_named([name], names) for names in convolutions)
        else:
            is_linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if is_linear:
            linears.setdefault(module, []).append(name)
        else:
            others.update(module.parameters(recurse=False))
    return {linear: names for linear, names in linears.items() if linear.weight not in others}


def drop_paths_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that drop a residual branch of whole samples: told by their class's name, as each library has its own."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, timm.layers.DropPath) or re.search("DropPath|DropConnect|StochasticDepth", type(module).__name__))
        and not type(module).__module__.startswith(f"{__package__}.") and not [*module.children(), *module.parameters()]
    ]


def choose(
    model: nn.Module, target_modules: Optional[Names], exclude_modules: Optional[Names], head: Optional[Names],
    needs_weight: bool,
) -> tuple[dict[nn.Module, list[str]], set[nn.Module]]:
    """The linear layers that get adapters, with all names of each, and those among them that are the classifier. `needs_weight`: whether
    adapters multiply by the layers' weights.

    The classifier is there whatever `target_modules` says, as in PEFT's `modules_to_save`.
    """
    for name, module in model.named_modules():
        if is_peft(module):
            raise PaceError(f"`{name}` is a layer of PEFT's, around which another adapter would not do what either says: `attach` puts "
                            "PACE on PEFT's LoRA")
    target_modules = check_names("target_modules", target_modules)
    exclude_modules, head = check_names("exclude_modules", exclude_modules), check_names("head", head)
    linears = linears_of(model, target_modules, head)
    heads = nearest_classifiers(linears, head)
    if head is None and not heads:
        # Some classifiers are convolutions.
        every = linears_of(model, ".*")
        heads = nearest_classifiers({layer: names for layer, names in every.items() if layer not in linears}, None)
        linears = {layer: names for layer, names in every.items() if layer in linears or layer in heads}
    # What maps to a vocabulary is no classifier that is trained, and gets an adapter if it is named.
    vocabulary = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if vocabulary in linears and vocabulary not in heads and not is_any_named(linears[vocabulary], target_modules):
        del linears[vocabulary]
    others = _other_weights(model, linears)
    kinds = ", ".join(kind for kind, _ in others.most_common(3))
    if not linears:
        raise PaceError(f"`model`, {type(model).__name__}, has no linear layers, which adapters are for: its weights are in "
                        f"{kinds or 'no layer'}")
    if target_modules is not None and not isinstance(target_modules, str):
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if is_named(name, target_modules) and module not in linears and isinstance(weight, nn.Parameter) and weight.dim() > 1:
                raise PaceError(f"`target_modules` names `{name}`, which is a {type(module).__name__} of {tuple(weight.shape)}: no linear layer, or "
                                "one that shares its weight with a layer of another kind")
    if head is None and not heads and vocabulary is None:
        warnings.warn("no classifier is found by its name: if the model has one, name it by `head`, or it stays frozen as it is",
                      stacklevel=3)
    if head is not None and not heads:
        raise PaceError(f"`head` is {head!r}: no linear layer has such a name")
    if target_modules is not None and not any(
        is_any_named(names, target_modules) for names in linears.values()
    ):
        raise PaceError(f"`target_modules` is {target_modules!r}: no linear layer has such a name")

    def wanted(linear: nn.Module, names: list[str]) -> bool:
        if is_any_named(names, exclude_modules):
            return False
        return linear in heads or target_modules is None or is_any_named(names, target_modules)

    # Each by itself: of several names one may be mistaken.
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
    for one in excluded:
        if not any(is_any_named(names, one if one is exclude_modules else [one]) for names in linears.values()):
            warnings.warn(f"`exclude_modules` has {one!r}: no linear layer has such a name", stacklevel=3)
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
        if linear in heads and not linear.weight.is_floating_point():
            raise PaceError(f"the weight of `{names[0]}` is {linear.weight.dtype}, as of a quantised layer, and the classifier is trained in full: "
                            "name another by `head`, or the layer in `exclude_modules`")
        if needs_weight and linear not in heads and is_opaque(linear) and not is_plain(linear.weight):
            raise PaceError(f"`{names[0]}` is a {type(linear).__name__} whose weight is quantised, which LoRAmul and prompts multiply by: "
                            "choose LoRAadd, or name the layer in `exclude_modules`")
    reached = sum(_weights_of(linear) for linear in linears if linear not in heads)
    if others.total() > reached:
        warnings.warn(f"adapters are for linear layers, which have {reached / (reached + others.total()):.0%} of the weights of "
                      f"{type(model).__name__} before its classifier: the others, in {kinds}, stay frozen as they are", stacklevel=3)
    return chosen, heads & chosen.keys()


def _weights_of(module: nn.Module, but: frozenset[nn.Parameter] = frozenset()) -> int:
    """How many weights a layer has itself, biases and the like apart."""
    parameters = [parameter for parameter in module.parameters(recurse=False) if parameter not in but]
    return sum(p.numel() for p in parameters if not isinstance(p, nn.UninitializedParameter) and p.dim() > 1)


def _other_weights(model: nn.Module, linears: dict[nn.Module, list[str]]) -> Counter[str]:
    """How many weights are in which kind of layer that gets no adapter; not in embeddings, which nobody expects to."""
    embeddings = frozenset(p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters())
    weights: Counter[str] = Counter()
    for module in model.modules():
        if module not in linears:
            weights[type(module).__name__] += _weights_of(module, embeddings)
    return +weights


def nearest_classifiers(linears: dict[nn.Module, list[str]], head: Optional[Names] = None) -> set[nn.Module]:
    """Which of some layers, by all their names, are the classifier: those that `head` names, or that are called so."""
    if head is not None:
        return {linear for linear, names in linears.items() if is_any_named(names, head)}
    # Of all that is called so, what lies nearest to the top: a block may have heads of its own, and a `fc` in one is none.
    depths: dict[nn.Module, int] = {}
    for linear, names in linears.items():
        paths = [name.split(".") for name in names]
        found = [depth for path in paths for depth, part in enumerate(path) if part in CLASSIFIERS and (part != "fc" or not any(map(str.isnumeric, path)))]
        if found:
            depths[linear] = min(found)
    return {linear for linear, depth in depths.items() if depth == min(depths.values())}
