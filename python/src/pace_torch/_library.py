"""The C library (`include/pace_kernels.h`): finding it, its structs, its errors."""

import ctypes
import functools
import os
from ctypes import c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Optional

import torch

from ._errors import PaceError, check_integer, check_number

ABI_VERSION = 3

F32, F64, F16, BF16 = range(4)
DTYPES = {torch.float32: F32, torch.float64: F64, torch.float16: F16, torch.bfloat16: BF16}
NOISE_OFF, NOISE_GENERATED, NOISE_GIVEN = range(3)
PER_SAMPLE, PER_TOKEN = range(2)
EXACT, ALLOW_TF32 = 1, 2
CONSISTENCY_NONE, CONSISTENCY_TWO_BRANCH, CONSISTENCY_HISTORY, CONSISTENCY_DIFFERENCE = range(4)
(DIVERGENCE_SQUARED_DIFFERENCE, DIVERGENCE_MEAN_SQUARED_DIFFERENCE, DIVERGENCE_CENTERED_SQUARED_DIFFERENCE, DIVERGENCE_SYMMETRIC_KL,
 DIVERGENCE_KL, DIVERGENCE_JENSEN_SHANNON) = range(6)
TARGETS_LABELS, TARGETS_PROBABILITIES, TARGETS_VALUES = range(3)
LOSS_BOTH_BRANCHES, LOSS_LABELLED_ONLY, LOSS_DETACH_TARGET = 1, 2, 4


class PaceTensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("len", c_uint64)]


class PaceShape(ctypes.Structure):
    _fields_ = [
        ("branches", c_uint64),
        ("batch", c_uint64),
        ("tokens", c_uint64),
        ("in_features", c_uint64),
        ("out_features", c_uint64),
        ("shared_input", c_uint64),
    ]


class PaceNoise(ctypes.Structure):
    _fields_ = [
        ("kind", c_uint32),
        ("shape", c_uint32),
        ("key", c_uint64),
        ("key_address", ctypes.POINTER(c_uint64)),
        ("first_sample", c_uint64),
        ("sigma", c_float),
        ("reserved", c_uint32),
        ("z", PaceTensor),
    ]


_HEAD = [("size", c_uint64), ("dtype", c_uint32), ("flags", c_uint32)]


def _tensors(*names):
    return [(name, PaceTensor) for name in names]


class PaceNoiseFill(ctypes.Structure):
    _fields_ = [*_HEAD, ("shape", PaceShape), ("noise", PaceNoise), *_tensors("z")]


class PaceNoisyLinear(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("shape", PaceShape),
        ("noise", PaceNoise),
        *_tensors("base_weight", "base_bias", "delta_weight", "delta_bias", "x", "y", "dy"),
        *_tensors("grad_input", "grad_delta_weight", "grad_delta_bias", "workspace"),
    ]


class PaceLowRankLinear(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("shape", PaceShape),
        ("noise", PaceNoise),
        ("rank", c_uint64),
        ("scale", c_double),
        *_tensors("base_weight", "base_bias", "lora_a", "lora_b", "delta_bias", "x", "s", "y", "dy"),
        *_tensors("grad_input", "grad_lora_a", "grad_lora_b", "grad_delta_bias", "workspace"),
    ]


class PaceLoraMulLinear(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("shape", PaceShape),
        ("noise", PaceNoise),
        ("rank", c_uint64),
        ("prompt_rank", c_uint64),
        ("scale", c_double),
        *_tensors("base_weight", "base_bias", "lora_a", "lora_b", "prompt_down", "prompt_up", "delta_bias", "x", "y", "dy"),
        *_tensors("grad_input", "grad_lora_a", "grad_lora_b", "grad_prompt_down", "grad_prompt_up", "grad_delta_bias"),
        *_tensors("workspace"),
    ]


class PaceNoisyEpilogue(ctypes.Structure):
    _fields_ = [*_HEAD, ("shape", PaceShape), ("noise", PaceNoise), *_tensors("a", "y", "dy", "da")]


class PaceLowRankWeight(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("out_features", c_uint64),
        ("in_features", c_uint64),
        ("rank", c_uint64),
        ("scale", c_double),
        *_tensors("lora_a", "lora_b", "base_weight", "out", "dout", "grad_lora_a", "grad_lora_b", "workspace"),
    ]


class PacePromptBias(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("out_features", c_uint64),
        ("in_features", c_uint64),
        ("rank", c_uint64),
        *_tensors("base_weight", "base_bias", "prompt_down", "prompt_up", "delta_bias", "out", "dout"),
        *_tensors("grad_prompt_down", "grad_prompt_up", "grad_delta_bias", "workspace"),
    ]


class PaceMerge(ctypes.Structure):
    _fields_ = [*_HEAD, *_tensors("target", "delta")]


class PaceLoss(ctypes.Structure):
    _fields_ = [
        ("size", c_uint64),
        ("dtype", c_uint32),
        ("consistency", c_uint32),
        ("classes", c_uint64),
        ("lambda", c_double),
        ("label_smoothing", c_double),
        ("has_ignore_label", c_uint64),
        ("ignore_label", c_int64),
        *_tensors("logits", "labels", "history", "index", "gradient", "values", "status", "workspace"),
        ("divergence", c_uint32),
        ("targets_kind", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32),
        ("temperature", c_double),
        ("denominator", c_double),
        *_tensors("targets", "class_weights"),
    ]


class PaceLmHead(ctypes.Structure):
    _fields_ = [
        ("size", c_uint64),
        ("dtype", c_uint32),
        ("divergence", c_uint32),
        ("hidden_size", c_uint64),
        ("classes", c_uint64),
        ("branches", c_uint64),
        ("rank", c_uint64),
        ("chunk_rows", c_uint64),
        ("flags", c_uint32),
        ("gemm_flags", c_uint32),
        ("lambda", c_double),
        ("label_smoothing", c_double),
        ("temperature", c_double),
        ("denominator", c_double),
        ("has_ignore_label", c_uint64),
        ("ignore_label", c_int64),
        ("logit_scale", c_double),
        ("soft_cap", c_double),
        ("scale", c_double),
        *_tensors("hidden", "labels", "weight", "bias", "lora_b", "lora_a", "gram"),
        *_tensors("grad_hidden", "grad_weight", "grad_bias", "grad_lora_b", "grad_lora_a", "values", "class_weights", "status", "workspace"),
    ]


class PaceDropPath(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("branches", c_uint64),
        ("batch", c_uint64),
        ("features", c_uint64),
        *_tensors("mask"),
        ("key", c_uint64),
        ("key_address", ctypes.POINTER(c_uint64)),
        ("drop_probability", c_double),
        ("first_sample", c_uint64),
        *_tensors("x", "y", "dy", "dx"),
    ]


class PaceGradNorm(ctypes.Structure):
    _fields_ = [*_HEAD, ("gradients", ctypes.POINTER(PaceTensor)), ("count", c_uint64), *_tensors("norm", "workspace")]


class PaceFpDistance(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("samples", c_uint64),
        ("features", c_uint64),
        *_tensors("fine_tuned", "pre_trained", "distance", "workspace"),
    ]


def _find() -> Path:
    given = os.environ.get("PACE_KERNELS_LIBRARY")
    if given:
        return Path(given)
    here = Path(__file__).parent
    for pattern in ("_kernels*.so", "_kernels*.dylib", "_kernels*.pyd", "_kernels*.dll"):
        for path in here.glob(pattern):
            return path
    raise ImportError(
        f"the PACE library is not in {here}: install the package with pip, or set PACE_KERNELS_LIBRARY to the shared "
        "library that cargo built (`cargo rustc --release --lib --features capi --crate-type cdylib`)"
    )


def _load() -> ctypes.CDLL:
    # A CDLL releases Python's global lock while a function runs.
    library = ctypes.CDLL(str(_find()))
    library.pace_abi_version.restype = c_uint32
    if library.pace_abi_version() != ABI_VERSION:
        raise ImportError(
            f"the PACE library has binary interface {library.pace_abi_version()}, this package needs {ABI_VERSION}: "
            "build both from the same sources"
        )
    library.pace_last_error.restype = ctypes.c_char_p
    library.pace_version.restype = ctypes.c_char_p
    library.pace_status_name.restype = ctypes.c_char_p
    library.pace_status_name.argtypes = [c_int32]
    library.pace_key.restype = c_uint64
    library.pace_key.argtypes = [c_uint64, c_uint64, c_uint32]
    library.pace_device_open.argtypes = [c_uint32, ctypes.POINTER(c_void_p)]
    library.pace_sigma_by_block.argtypes = [c_uint64, c_double, c_uint64, c_void_p]
    library.pace_loss_status.argtypes = [c_void_p, c_uint64, c_uint64]
    return library


library = _load()


def check(status: int) -> None:
    """Raises what a function of the library returned."""
    if status != 0:
        message = library.pace_last_error().decode()
        raise PaceError(message, library.pace_status_name(status).decode())


def _register_blas() -> None:
    """On Intel's processors, PyTorch's own MKL computes the large GEMMs of the CPU operators.

    There it is faster than the library's own GEMMs; on AMD's it is half as fast (`docs/performance.md`).
    """
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "GenuineIntel" not in cpu.read_text():
        return
    names = ("sgemm", "dgemm", "MKL_Set_Num_Threads_Local")
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        torch_cpu = ctypes.CDLL(str(path))
        if all(hasattr(torch_cpu, name) for name in names):
            check(library.pace_set_blas(*[ctypes.cast(getattr(torch_cpu, name), c_void_p) for name in names]))


_register_blas()


def openmp() -> Optional[c_void_p]:
    """`GOMP_parallel` of the OpenMP that PyTorch's operators run on, if it has one (libgomp, and Intel's and LLVM's on Linux)."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        # Looked for in what this library depends on too.
        parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if parallel is not None:
            return ctypes.cast(parallel, c_void_p)
    return None


def _register_openmp() -> None:
    """PyTorch's threads wait for its next operator without sleeping; ours run on them instead of sharing cores with them."""
    parallel = openmp()
    if parallel is not None:
        # A program that has registered one before keeps that.
        library.pace_set_openmp(parallel)


_register_openmp()


@functools.cache
def device_handle(ordinal: int) -> c_void_p:
    """The library's handle of a CUDA device, opened when it is first used and kept."""
    handle = c_void_p()
    check(library.pace_device_open(ordinal, ctypes.byref(handle)))
    return handle


_threads_are_up = False


def start_threads() -> None:
    """Starts the threads of the CPU operators before the first of them runs: as many as PyTorch's, the calling one among them."""
    global _threads_are_up
    if not _threads_are_up:
        check(library.pace_set_threads(c_uint64(torch.get_num_threads())))
        _threads_are_up = True


def call(name: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """Calls `pace_{name}` where the tensors are: on the CPU, or on the current stream of their CUDA device."""
    handle = stream = None
    if device.type == "cpu":
        start_threads()
    else:
        handle, stream = device_handle(device.index), c_void_p(torch._C._cuda_getCurrentRawStream(device.index))
    check(getattr(library, f"pace_{name}")(handle, stream, ctypes.byref(arguments)))


def workspace(name: str, arguments: ctypes.Structure, device: torch.device) -> int:
    """The bytes of workspace that `pace_{name}_*` takes for these sizes; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    size = c_uint64()
    query = getattr(library, f"pace_{name}_workspace")
    check(query(device_handle(device.index), ctypes.byref(arguments), ctypes.byref(size)))
    return size.value


def key(seed: int, step: int, layer: int) -> int:
    """The key of a layer's noise in a step, as the signed 64-bit number that a tensor of keys holds."""
    return c_int64(library.pace_key(seed, step, layer)).value


def sigma_by_block(blocks: int, sigma: float, first_noisy: int) -> list[float]:
    """The σ of every block: zero before `first_noisy`, then a linear fall from `sigma`.

    It would reach zero one block after the last, which is the head.

    Raises `PaceError` if `blocks` is zero, `first_noisy` is not below it, or `sigma` is
    negative or not finite.
    """
    blocks, sigma = check_integer("blocks", blocks, 1, 2**20), check_number("sigma", sigma)
    first_noisy = check_integer("first_noisy", first_noisy, 0, blocks - 1)
    out = (c_double * blocks)()
    check(library.pace_sigma_by_block(blocks, sigma, first_noisy, ctypes.cast(out, c_void_p)))
    return list(out)


def loss_status(words: torch.Tensor, classes: int, history_rows: int) -> None:
    """Raises `PaceError` if a loss on CUDA met a wrong label or index; `words` is its status, copied to the CPU."""
    check(library.pace_loss_status(words.data_ptr(), classes, history_rows))
