"""Structured random calls of the operators, and damaged files: `python fuzz.py ops|files CALLS [SEED]`.

A call of an operator starts as a right one of random sizes and options; then up to two of its arguments are changed. It gives what
the plain formula gives, or it is refused by a `PaceError` that names an argument that is wrong, and no tensor is changed either way. A
damaged file is refused by a `PaceError` or what its reader raises for any such file, and then the model is as it was; or it is loaded whole.
"""

import json
import pathlib
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, OrderedDict

import pace_torch
import torch
from pace_torch import Noise, PaceError, checkpoint, ops

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}


def tensor(rng, dtype, *shape):
    count = 1
    for size in shape:
        count *= size
    return torch.tensor([rng.randint(-100, 100) / 100 for _ in range(count)], dtype=torch.float64).reshape(shape).to(dtype)


def a_noise(rng, rows, branches, tokens, channels, dtype):
    """No noise, generated noise, or a given z, of whose rows each token may have one."""
    per_token = rng.random() < 0.4
    shape = (rows, tokens, channels) if per_token else (rows, channels)
    kind = rng.choice(("off", "generated", "given", "rows"))
    settings = dict(per_token=per_token, branches=branches)
    if kind == "off":
        return settings
    if kind == "given":
        return {**settings, "z": tensor(rng, ops._arguments.real(dtype), *shape)}
    if kind == "rows":
        of_table = torch.tensor([rng.randrange(3) for _ in range(rows * tokens)]).reshape(rows, tokens)
        z = tensor(rng, ops._arguments.real(dtype), 3, channels)
        return {**settings, "z": z, "rows": of_table if per_token else of_table[:, 0]}
    first = rng.choice((0, 5, 2**40))
    return {**settings, "key": torch.tensor([rng.getrandbits(63)]), "sigma": rng.choice((0.0, 0.5, 3.0)), "first_sample": first}


def written_out(noise, rows, tokens, channels):
    if noise.z is not None:
        return noise.z.double() if noise.rows is None else noise.z.double()[noise.rows]
    if noise.key is None:
        return torch.ones(rows, channels, dtype=torch.float64)
    return pace_torch.noise(noise, rows // noise.branches, channels, tokens).double()


def under(noise, base, adapter):
    """`base + z ⊙ adapter`, both `[R, ..., N]`."""
    rows, channels = base.shape[0], base.shape[-1]
    tokens = base.numel() // (rows * channels)
    z = written_out(noise, rows, tokens, channels)
    z = z.reshape(adapter.shape) if (noise.per_token or noise.rows is not None) and z.dim() > 2 else z.reshape(rows, *[1] * (base.dim() - 2), channels)
    return base + z * adapter


def linear(x, weight, bias, like):
    y = x @ weight.T if weight is not None else torch.zeros(*x.shape[:-1], like, dtype=torch.float64)
    return y if bias is None else y + bias


def a_layer(rng, dtype):
    """Sizes and what all layers take."""
    branches, batch = rng.randint(1, 2), rng.randint(1, 3)
    inner = rng.choice(((), (3,), (2, 2), (40,)))
    k, n, r, p = (rng.randint(1, 9) for _ in range(4))
    rows, tokens = branches * batch, torch.Size(inner).numel()
    shared = rng.random() < 0.3
    x = tensor(rng, dtype, batch if shared else rows, *inner, k)
    noise = a_noise(rng, rows, branches, tokens, n, dtype)
    return dict(x=x, base_weight=tensor(rng, dtype, n, k), base_bias=maybe(rng, tensor(rng, dtype, n))), noise, shared, (n, k, r, p)


def maybe(rng, value):
    return value if rng.random() < 0.6 else None


def widened(arguments):
    return {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for name, value in arguments.items()}


def noisy_linear(rng, dtype):
    arguments, noise, shared, (n, k, *_) = a_layer(rng, dtype)
    arguments |= dict(delta_weight=maybe(rng, tensor(rng, dtype, n, k)), delta_bias=maybe(rng, tensor(rng, dtype, n)))

    def formula(noise, shared_input=False, exact=False, *, x, base_weight, base_bias, delta_weight, delta_bias):
        x = torch.cat([x] * noise.branches) if shared_input else x
        like = len(base_weight if base_weight is not None else delta_weight)
        return under(noise, linear(x, base_weight, base_bias, like), linear(x, delta_weight, delta_bias, like))

    return arguments, noise, dict(shared_input=shared, exact=rng.random() < 0.5), formula


def lora_linear(rng, dtype):
    arguments, noise, shared, (n, k, r, _) = a_layer(rng, dtype)
    arguments |= dict(lora_a=tensor(rng, dtype, r, k), lora_b=tensor(rng, dtype, n, r), delta_bias=maybe(rng, tensor(rng, dtype, n)))

    def formula(noise, scale=1.0, shared_input=False, *, x, base_weight, base_bias, lora_a, lora_b, delta_bias):
        x = torch.cat([x] * noise.branches) if shared_input else x
        return under(noise, linear(x, base_weight, base_bias, len(lora_b)), linear(x, scale * lora_b @ lora_a, delta_bias, len(lora_b)))

    return arguments, noise, dict(scale=rng.choice((1.0, 0.5, 2)), shared_input=shared), formula


def lora_mul_linear(rng, dtype):
    arguments, noise, shared, (n, k, r, p) = a_layer(rng, dtype)
    has_lora, has_prompt = rng.choice(((True, False), (False, True), (True, True)))
    arguments |= dict(
        lora_a=tensor(rng, dtype, r, k) if has_lora else None, lora_b=tensor(rng, dtype, n, r) if has_lora else None,
        delta_bias=maybe(rng, tensor(rng, dtype, n)), prompt_down=tensor(rng, dtype, k, p) if has_prompt else None,
        prompt_up=tensor(rng, dtype, p, 1) if has_prompt else None,
    )

    def formula(noise, scale=1.0, shared_input=False, exact=False, *, x, base_weight, base_bias, lora_a, lora_b, delta_bias, prompt_down, prompt_up):
        x = torch.cat([x] * noise.branches) if shared_input else x
        delta = None if lora_a is None else base_weight * (scale * lora_b @ lora_a)
        if prompt_down is not None:
            prompt = (base_weight @ (prompt_down @ prompt_up.reshape(-1, 1))).flatten()
            delta_bias = prompt if delta_bias is None or base_bias is None else prompt + base_bias * delta_bias
        return under(noise, linear(x, base_weight, base_bias, len(base_weight)), linear(x, delta, delta_bias, len(base_weight)))

    return arguments, noise, dict(scale=rng.choice((1.0, 0.5)), shared_input=shared, exact=rng.random() < 0.5), formula


def noisy_epilogue(rng, dtype):
    branches, batch = rng.randint(1, 2), rng.randint(1, 3)
    shape = (branches * batch, *rng.choice(((), (3,), (2, 2))), rng.randint(1, 9))
    tokens = torch.Size(shape[1:-1]).numel()
    arguments = dict(y=tensor(rng, dtype, *shape), a=tensor(rng, dtype, *shape))
    return arguments, a_noise(rng, shape[0], branches, tokens, shape[-1], dtype), {}, lambda noise, *, y, a: under(noise, y, a)


def low_rank_weight(rng, dtype):
    n, k, r = (rng.randint(1, 9) for _ in range(3))
    arguments = dict(lora_a=tensor(rng, dtype, r, k), lora_b=tensor(rng, dtype, n, r), base_weight=maybe(rng, tensor(rng, dtype, n, k)))

    def formula(noise, scale=1.0, *, lora_a, lora_b, base_weight):
        weight = scale * lora_b @ lora_a
        return weight if base_weight is None else base_weight * weight

    return arguments, None, dict(scale=rng.choice((1.0, -2.0))), formula


def prompt_bias(rng, dtype):
    n, k, r = (rng.randint(1, 9) for _ in range(3))
    arguments = dict(
        base_weight=tensor(rng, dtype, n, k), base_bias=maybe(rng, tensor(rng, dtype, n)), prompt_down=tensor(rng, dtype, k, r),
        prompt_up=tensor(rng, dtype, r, 1), delta_bias=maybe(rng, tensor(rng, dtype, n)),
    )

    def formula(noise, *, base_weight, base_bias, prompt_down, prompt_up, delta_bias):
        bias = (base_weight @ (prompt_down @ prompt_up.reshape(-1, 1))).flatten()
        return bias if base_bias is None or delta_bias is None else bias + base_bias * delta_bias

    return arguments, None, {}, formula


def fp_distance(rng, dtype):
    shape = (rng.randint(1, 5), *rng.choice(((), (4,), (2, 3))))
    arguments = dict(fine_tuned=tensor(rng, dtype, *shape), pre_trained=tensor(rng, dtype, *shape))

    def formula(noise, *, fine_tuned, pre_trained):
        return ((fine_tuned - pre_trained) ** 2).flatten(1).sum(1).mean() if fine_tuned.dim() > 1 else ((fine_tuned - pre_trained) ** 2).mean()

    return arguments, None, {}, formula


def drop_path(rng, dtype):
    branches, batch = rng.randint(1, 2), rng.randint(1, 4)
    x = tensor(rng, dtype, branches * batch, *rng.choice(((), (3,), (2, 3))))
    mask = torch.tensor([float(rng.random() < 0.7) for _ in range(batch)], dtype=ops._arguments.real(dtype))

    def formula(noise, key=None, drop_probability=0.0, branches=1, *, x, mask):
        scale = (mask / (mask.double().mean() + 1e-12)).double().flatten().repeat(int(branches))
        return x * scale.reshape(-1, *[1] * (x.dim() - 1))

    return dict(x=x, mask=mask), None, dict(key=None, drop_probability=0.3, branches=branches), formula


def grad_norm(rng, dtype):
    shapes = [[rng.randint(1, 4) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 4))]
    arguments = {f"tensors[{i}]": tensor(rng, dtype, *shape) for i, shape in enumerate(shapes)}
    return arguments, None, {}, lambda noise, **tensors: torch.cat([tensor.flatten() for tensor in tensors.values()]).norm()


def noise(rng, dtype):
    key = torch.tensor([rng.getrandbits(63)])
    source = dict(key=key, sigma=rng.choice((0.0, 0.5, 3.0)), per_token=rng.random() < 0.5, first_sample=rng.choice((0, 5)), branches=rng.randint(1, 2))

    def formula(noise, batch, channels, tokens):
        ones = torch.ones(noise.branches * batch, tokens if noise.per_token else 1, channels)
        z = ops.noisy_epilogue(torch.zeros_like(ones), ones, noise).double()
        return z if noise.per_token else z[:, 0]

    return {}, source, dict(batch=rng.randint(1, 3), channels=rng.randint(1, 9), tokens=rng.randint(1, 4)), formula


def keys(rng, dtype):
    def formula(noise, seed, step, layers):
        return torch.stack([pace_torch.keys(seed, step, layer + 1)[layer] for layer in range(layers)]) if layers else torch.zeros(0)

    return {}, None, dict(seed=rng.getrandbits(64), step=rng.getrandbits(40), layers=rng.randint(0, 4)), formula


OPERATORS = {f.__name__: f for f in (
    noisy_linear, lora_linear, lora_mul_linear, noisy_epilogue, low_rank_weight, prompt_bias, fp_distance, drop_path, grad_norm, noise, keys)}
RESULTS = {"fp_distance": torch.float64, "grad_norm": torch.float64, "noise": torch.float32, "keys": torch.int64}
# What is allocated: numbers that are right and too large are left out.
SIZES = ("batch", "channels", "tokens", "layers")
WRONG = ("text", 3, 0.5, [1.0], b"", object(), {}, float("nan"))
NUMBERS = (-1, 0, 1, 2, 3, 2**31, 2**56, 2**63, 2**64, 2**64 + 5, 2**70, -(2**64), 0.5, float("nan"), float("inf"), -0.0, 1e300, 1e-320, True, None, "1")


def changed_tensor(rng, value):
    """Another tensor, or something else, in place of one. The second is whether a call may take it and give the formula's result."""
    if value is None:
        return tensor(rng, torch.float32, *(rng.randint(0, 4) for _ in range(rng.randint(0, 4)))), False
    dim = value.dim()
    choices = [
        lambda: (None, False),
        lambda: (rng.choice(WRONG), False),
        lambda: (value.to(rng.choice((*FLOATS, torch.int64, torch.bool, torch.complex64))), False),
        lambda: (value.to("meta"), False),
        lambda: (torch.empty(0, dtype=value.dtype), False),
        lambda: (value.reshape(-1), False),
        lambda: (value.reshape(1, *value.shape), False),
        lambda: (value.T if dim == 2 else value, False),
        lambda: (value.reshape(())[()] if value.numel() == 1 else value.flatten()[0], False),
        lambda: (torch.cat([value] * 2) if dim else value, False),
        lambda: (value[:-1] if dim else value, False),
        lambda: (value[..., :0] if dim else value, False),
        lambda: (torch.full_like(value, float("nan")) if value.is_floating_point() else value, False),
        # Other strides, same numbers.
        lambda: (value.T.contiguous().T if dim == 2 else value, True),
        lambda: (torch.stack([value, value], -1)[..., 0], True),
        lambda: (value[:1].expand_as(value) if dim else value, True),
        lambda: (torch.flip(value, (0,)) if dim else value, True),
        lambda: (value.clone().requires_grad_() if value.is_floating_point() else value, True),
        lambda: (torch.sparse_coo_tensor(torch.zeros(max(dim, 1), 0, dtype=torch.int64), [], value.shape if dim else (1,), check_invariants=False), False),
    ]
    return rng.choice(choices)()


def one_call(name, rng, seen):
    dtype = rng.choice(FLOATS)
    arguments, noise, settings, formula = OPERATORS[name](rng, dtype)
    is_right, what = True, []
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        group = rng.choice([group for group in (arguments, noise, settings) if group])
        key = rng.choice(list(group))
        if key in what:
            continue
        if isinstance(group[key], torch.Tensor) or group is arguments:
            group[key], right = changed_tensor(rng, group[key])
        elif isinstance(group[key], bool):
            group[key], right = not group[key], True
        else:
            numbers = [n for n in NUMBERS if not isinstance(n, int) or not 2**20 < n < 2**62] if key in SIZES else NUMBERS
            group[key], right = rng.choice(numbers), False
        is_right, what = is_right and right, [*what, key]
    everything = [value for group in (arguments, noise or {}, settings) for value in group.values()]
    tensors = [(value, value.detach().clone()) for value in everything if isinstance(value, torch.Tensor) and value.layout == torch.strided]
    describe = lambda: f"{name} of {dtype}, changed {what}: {arguments} {noise} {settings}"
    try:
        result, source = call(name, arguments, noise, settings)
    except PaceError as error:
        assert what, f"a right call is refused: {error}; {describe()}"
        assert is_explained(str(error), what, list(arguments)), f"{error}; {describe()}"
        seen["refused"] += 1
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}; {describe()}") from error
    else:
        seen["taken"] += 1
        check(name, result, arguments, source, settings, formula, is_right, describe)
    for value, before in tensors:
        same = value.is_meta or torch.equal(value.nan_to_num(), before.nan_to_num()) if value.dtype != torch.bool else torch.equal(value, before)
        assert same, f"a tensor was changed: {describe()}"


# Arguments that are wrong if the first one is.
FOLLOWERS = {
    "a": "y z",
    "base_weight": "base_bias delta_weight delta_bias lora_a lora_b prompt_down z",
    "delta_weight": "base_bias delta_bias z",
    "lora_a": "lora_b base_weight",
    "lora_b": "lora_a base_weight base_bias delta_bias z",
    "prompt_down": "prompt_up",
    "prompt_up": "prompt_down",
    "mask": "key",
    "shared_input": "x z rows",
    "per_token": "z",
    "branches": "x y a z mask rows",
    "z": "rows",
    "rows": "z",
}


def is_explained(message, changed, tensors):
    """Whether the argument that an error names first is wrong. The first tensor says how the others have to be."""
    named = re.search(r"`(?:noise\.)?([^`]+)`", message)
    wrong = {name for one in changed for name in (one, *FOLLOWERS.get(one, "").split())}
    if wrong & set(tensors[:1]):
        wrong.update((*tensors, "z", "rows"))
    return named is not None and named[1] in wrong


def call(name, arguments, noise, settings):
    """An operator's result, and its noise."""
    source = None if noise is None else Noise(**noise)
    if name == "grad_norm":
        return ops.grad_norm(list(arguments.values())), None
    if name == "noise":
        return ops.noise(source, **settings), source
    if name == "drop_path":
        return ops.drop_path(arguments["x"], settings["key"], settings["drop_probability"], mask=arguments["mask"], branches=settings["branches"]), None
    if source is not None:
        settings = {**settings, "noise": source}
    result = getattr(ops, name)(**arguments, **settings)
    if result.requires_grad and result.device.type == "cpu":
        leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        result.backward(torch.ones_like(result))
        for leaf in leaves:
            assert leaf.grad is None or leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
    return result.detach(), source


def check(name, result, arguments, source, settings, formula, is_right, describe):
    """The result is that of the formula, where the formula takes the arguments at all."""
    dtype = next((value.dtype for value in arguments.values() if isinstance(value, torch.Tensor)), None)
    assert result.dtype == RESULTS.get(name, dtype), describe()
    if result.is_meta:
        return
    if source is not None and source.key is not None and source.z is None:
        assert 0 <= source.first_sample <= 2**56, f"samples that there are not: {describe()}"
    if "scale" in settings:
        settings = {**settings, "scale": float(settings["scale"])}
    try:
        expected = formula(source, **widened(arguments), **settings)
    except Exception as error:
        raise AssertionError(f"taken, but the formula does not take it: {error}; {describe()}") from error
    assert result.shape == expected.shape, f"{tuple(result.shape)}, expected {tuple(expected.shape)}; {describe()}"
    expected = expected.detach()
    if expected.numel() == 0:
        return
    if not expected.isfinite().all() or not result.isfinite().all():
        assert not is_right, describe()
        return
    largest = max([1.0, *(value.detach().double().abs().max().item() for value in arguments.values() if isinstance(value, torch.Tensor) and value.numel())])
    off = (result.double() - expected).abs().max().item()
    assert off <= TOLERANCES.get(dtype, 0.0) * max(1.0, largest, expected.abs().max().item()), f"off by {off}; {describe()}"


def fuzz_ops(calls, seed):
    rng, seen = random.Random(seed), Counter()
    for i in range(calls):
        one_call(list(OPERATORS)[i % len(OPERATORS)], rng, seen)
    return seen


# -------------------------------------------------------------------------------------------------------------- files


def damaged(rng, content, within):
    """Bytes that were cut off, added or turned over."""
    content = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        del content[rng.randrange(within):]
    elif kind == 1:
        content += bytes(rng.randrange(1, 9))
    elif kind == 2:
        del content[rng.randrange(within // 2):within // 2]
    else:
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(within)] ^= 1 << rng.randrange(8)
    return bytes(content)


def other_header(rng, content):
    """A safetensors file whose header says something else."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    names = [name for name in header if name != "__metadata__"]
    name, huge = rng.choice(names), (0, 1, 3, 2**40, 2**63, 2**64 - 1)
    kind = rng.randrange(6)
    if kind == 0:
        header[name]["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", ""))
    elif kind == 1:
        header[name]["shape"] = [rng.choice(huge) for _ in range(rng.randrange(4))]
    elif kind == 2:
        header[name]["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[rng.choice(("", "x", "base_model.model.a.lora_A.weight", "base_model.model.zz.lora_A.weight"))] = header.pop(name)
    else:
        header[name] = rng.choice((None, [], {}, "F32", -1))
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = text[:-1] + b", " + json.dumps({name: header[rng.choice(list(header))]}).encode()[1:]
    return (rng.choice(huge) if rng.random() < 0.1 else len(text)).to_bytes(8, "little") + text + content[end:]


def other_config(rng, content):
    config = json.loads(content)
    values = (None, True, 0, -1, 3, 2**64, 1e300, 0.5, float("nan"), "", "LORA", "none", "(", [], ["head", 3], {}, {"(": 2}, {".*": -3}, {"": None})
    for _ in range(rng.randint(1, 2)):
        config[rng.choice(list(config))] = rng.choice(values)
    return json.dumps(config).encode()


def fuzz_files(calls, seed):
    """Damaged folders of PEFT, and checkpoints."""
    warnings.simplefilter("ignore")  # PEFT's, of settings that it does not know.
    rng, seen = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        kinds = [PeftFolder(folder), Checkpoint(folder)]
        for i in range(calls):
            seen[kinds[i % len(kinds)].damage_and_load(rng)] += 1
    return seen


class PeftFolder:
    def __init__(self, folder):
        torch.manual_seed(0)
        layers = [("a", torch.nn.Linear(5, 6)), ("b", torch.nn.Linear(6, 4)), ("head", torch.nn.Linear(4, 3))]
        self.model = pace_torch.inject(torch.nn.Sequential(OrderedDict(layers)), "LoRAadd", 2, sigma=0.5, lambda_=0.1, target_modules=["a", "b"])
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter.data)
        self.folder = folder / "peft"
        pace_torch.save_peft(self.model, self.folder)
        self.files = {name: (self.folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def damage_and_load(self, rng):
        files = dict(self.files)
        config, weights = files
        header = 8 + int.from_bytes(files[weights][:8], "little")
        kind = rng.randrange(6)
        if kind == 0:
            files[weights] = damaged(rng, files[weights], header)
        elif kind == 1:
            files[weights] = damaged(rng, files[weights], len(files[weights]))
        elif kind < 4:
            files[weights] = other_header(rng, files[weights])
        elif kind == 4:
            files[config] = damaged(rng, files[config], len(files[config]))
        else:
            files[config] = other_config(rng, files[config])
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        self.model.load_state_dict(self.state)
        try:
            pace_torch.load_peft(self.model, self.folder)
        except PaceError:
            state = self.model.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in self.state.items()), "a refused file was loaded in part"
            return "peft refused"
        return "peft loaded"


class Checkpoint:
    def __init__(self, folder):
        self.path = folder / "checkpoint.pt"
        self.state = {"settings": {"seed": 3}, "log_length": 7, "model": {"w": torch.arange(100.0)}, "step": 5}
        checkpoint.save(self.path, self.state)
        self.content = self.path.read_bytes()

    def damage_and_load(self, rng):
        self.path.write_bytes(damaged(rng, self.content, len(self.content)))
        try:
            state = checkpoint.load(self.path)
        except PaceError as error:
            assert str(self.path) in str(error), error
            return "checkpoint refused"
        # What zip files hold besides their contents may be anything.
        assert torch.equal(state.pop("model")["w"], self.state["model"]["w"])
        assert state == {name: value for name, value in self.state.items() if name != "model"}
        return "checkpoint loaded"


if __name__ == "__main__":
    what, calls, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0])
    torch.set_num_threads(1)
    start = time.monotonic()
    seen = {"ops": fuzz_ops, "files": fuzz_files}[what](calls, seed)
    print(f"{what}: {calls} calls in {time.monotonic() - start:.0f} s: {dict(seen)}")
