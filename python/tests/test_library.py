"""The library behind the package: its structs, its keys, its errors."""

import ctypes
import pickle
import re

import pytest
import torch
from conftest import ROOT

import pace_torch
from pace_torch import _library as lib
from pace_torch import PaceError

C_TYPES = {
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "void *": ctypes.c_void_p,
    "const uint64_t *": ctypes.POINTER(ctypes.c_uint64),
    "const struct PaceTensor *": ctypes.POINTER(lib.PaceTensor),
    "const PaceTensor *": ctypes.POINTER(lib.PaceTensor),
}


def header():
    text = (ROOT / "include" / "pace_kernels.h").read_text()
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)


def structs():
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", header(), flags=re.S):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, pointer, field = re.fullmatch(r"(.*?)\s*(\*?)\s*(\w+)", declaration, flags=re.S).groups()
            fields.append((field.rstrip("_"), f"{kind} {pointer}".strip()))
        yield name, fields


def test_structs_are_those_of_the_header():
    found = dict(structs())
    assert set(found) == {
        name for name, value in vars(lib).items() if name.startswith("Pace") and hasattr(value, "_fields_")
    }
    for name, fields in found.items():
        ours = [(field, kind) for field, kind in getattr(lib, name)._fields_]
        theirs = [(field, C_TYPES.get(kind) or getattr(lib, kind.removeprefix("struct "))) for field, kind in fields]
        assert ours == theirs, name


def test_constants_are_those_of_the_header():
    values = {name: int(value) for name, value in re.findall(r"#define (PACE_\w+) (\d+)", header())}
    assert values["PACE_ABI_VERSION"] == lib.ABI_VERSION == lib.library.pace_abi_version()
    for name in ("F32", "F64", "F16", "BF16", "NOISE_OFF", "NOISE_GENERATED", "NOISE_GIVEN", "PER_SAMPLE", "PER_TOKEN",
                 "EXACT", "ALLOW_TF32", "CONSISTENCY_NONE", "CONSISTENCY_TWO_BRANCH", "CONSISTENCY_HISTORY", "CONSISTENCY_DIFFERENCE",
                 *(name.removeprefix("PACE_") for name in values if name.startswith(("PACE_DIVERGENCE_", "PACE_TARGETS_", "PACE_LOSS_")))):
        assert getattr(lib, name) == values[f"PACE_{name}"], name


def test_keys_are_the_specified_ones():
    # docs/noise.md, section 7: w[0] is the low half.
    expected = {(0, 0, 0): (0x1C29B9B5, 0x81241429), (1, 2, 3): (0xE8167543, 0x3F8DCD11)}
    for (seed, step, layer), (low, high) in expected.items():
        assert lib.key(seed, step, layer) % 2**64 == low | high << 32
    assert pace_torch.keys(1, 2, 4)[3].item() == lib.key(1, 2, 3)


def test_schedule():
    assert pace_torch.sigma_by_block(4, 1.2, 1) == [0.0, 1.2, 1.2 * (2 / 3), 1.2 * (1 / 3)]
    with pytest.raises(PaceError, match="first_noisy"):
        pace_torch.sigma_by_block(4, 1.2, 4)
    with pytest.raises(PaceError, match="blocks"):
        pace_torch.sigma_by_block(-1, 1.2, 0)


def test_errors_are_values_with_a_status():
    with pytest.raises(ValueError, match="sigma") as caught:
        pace_torch.sigma_by_block(4, -1.0, 1)
    assert isinstance(caught.value, PaceError) and caught.value.status == "PACE_ERROR_VALUE"
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.status == caught.value.status


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.delenv("PACE_KERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(lib, "__file__", str(tmp_path / "_library.py"))
    with pytest.raises(ImportError, match="PACE_KERNELS_LIBRARY"):
        lib._find()


X, W = torch.ones(4, 3, 5), torch.ones(6, 5)
KEY = pace_torch.keys(0, 0, 1)
NOISE = pace_torch.Noise(KEY, 0.5, branches=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pace_torch.noisy_linear(X, None, None, None, None), "delta_weight"),
        (lambda: pace_torch.noisy_linear(X, W[:, :4], None, None, None), "base_weight"),
        (lambda: pace_torch.noisy_linear(X, W, torch.ones(5), None, None), "base.bias"),
        (lambda: pace_torch.noisy_linear(X, W.double(), None, None, None), "base_weight.*float64"),
        (lambda: pace_torch.noisy_linear(X.to(torch.int32), W, None, None, None), "int32"),
        (lambda: pace_torch.noisy_linear(X[0, 0], W, None, None, None), "x"),
        (lambda: pace_torch.noisy_linear(X[:3], W, None, W, None, NOISE), "branches"),
        (lambda: pace_torch.noisy_linear(X, W, None, W, None, NOISE._replace(branches=3)), "branches"),
        (lambda: pace_torch.noisy_linear(X, W, None, W, None, NOISE._replace(sigma=-1.0)), "sigma"),
        (lambda: pace_torch.noisy_linear(X, W, None, W, None, NOISE._replace(first_sample=-1)), "first_sample"),
        (lambda: pace_torch.noisy_linear(X, W, None, W, None, NOISE._replace(key=torch.ones(1))), "key"),
        (lambda: pace_torch.noisy_linear(X, W, None, W, None, NOISE._replace(z=torch.ones(4, 5))), "z"),
        (lambda: pace_torch.low_rank_weight(torch.ones(2, 5), torch.ones(6, 3)), "lora_b"),
        (lambda: pace_torch.prompt_bias(W, W[:, 0], torch.ones(5, 2), torch.ones(2, 1), torch.ones(5)), "delta_bias"),
        (lambda: pace_torch.prompt_bias(W, None, torch.ones(6, 2), torch.ones(2, 1)), "prompt_down"),
        (lambda: pace_torch.drop_path(X, KEY, 1.0), "drop_probability"),
        (lambda: pace_torch.drop_path(X, KEY, 0.5, first_sample=2, global_batch=5), "samples"),
        (lambda: pace_torch.grad_norm([]), "tensors"),
        (lambda: pace_torch.fp_distance(W, W[:2]), "pre_trained"),
        (lambda: pace_torch.noise(pace_torch.Noise(), 2, 4), "key"),
        (lambda: pace_torch.pace_loss(W, torch.zeros(6)), "labels"),
        (lambda: pace_torch.pace_loss(W, torch.zeros(4, dtype=torch.int64)), "logits"),
        (lambda: pace_torch.pace_loss(W, torch.full((6,), 5)), r"labels\[0\]"),
        (lambda: pace_torch.pace_loss(W, torch.zeros(6, dtype=torch.int64), -1.0), "lambda"),
        (lambda: pace_torch.pace_loss(W, torch.zeros(6, dtype=torch.int64), index=torch.arange(6)), "history"),
        (
            lambda: pace_torch.pace_loss(
                W, torch.zeros(6, dtype=torch.int64), history=torch.zeros(9, 4), index=torch.arange(6)
            ),
            "history",
        ),
        (
            lambda: pace_torch.pace_loss(
                W, torch.zeros(6, dtype=torch.int64), history=torch.zeros(9, 5), index=torch.zeros(6, dtype=torch.int64)
            ),
            r"index\[1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(PaceError, match=message):
        call()


def test_the_operators_run_on_pytorchs_threads():
    with pytest.raises(PaceError, match="`parallel` is a null pointer"):
        lib.check(lib.library.pace_set_openmp(None))
    parallel = lib.openmp()
    if parallel is None:
        pytest.skip("this PyTorch has an OpenMP without GOMP_parallel")
    # It is registered once, and was when the package was imported.
    with pytest.raises(PaceError, match="`parallel` has been set before"):
        lib.check(lib.library.pace_set_openmp(parallel))
