"""What all cases share: settings, and who computes an operator, in this process (`TorchPeer`) or in that of `worker.rs`
(`RustPeer`).

Every peer has

    times()    one iteration with fresh noise: seconds of the forward and of the backward pass
    outputs()  one iteration with the noise of the case: outputs and gradients by name
    noisy      whether noise takes part in its outputs

Outputs and gradients are newly allocated in every iteration, as a training step does.
"""

import os
import pathlib
import subprocess
import time

import numpy as np
import torch

# `tf32` stores f32 and lets every GEMM round its factors to TF32, ours as well as PyTorch's.
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
BRANCHES = 2
RANK = 10
# Block 1 of a 13-block model, the official default: the strongest noise there is in it.
SIGMA = 1.0
LAMBDA = 1.0

EAGER, COMPILED = "official, eager", "official, torch.compile"
REDUCED, COMPILED_GRAPH = "official, reduce-overhead", "official, compiled + captured"
OURS, OURS_COMPILED, RUST = "ours, PyTorch", "ours, torch.compile", "ours, Rust"
CAPTURED, OURS_COMPILED_GRAPH = "ours, captured as a graph", "ours, compiled + captured"
PEFT = "PEFT LoRA, no noise"
# How a peer is run, where it can be run in several ways: `variant` of its row.
VARIANTS = {
    EAGER: "eager", COMPILED: "compiled", REDUCED: "compiled, reduce-overhead", COMPILED_GRAPH: "compiled, captured",
    OURS: "eager", OURS_COMPILED: "compiled", CAPTURED: "captured", OURS_COMPILED_GRAPH: "compiled, captured",
}


class Unavailable(Exception):
    """Why a peer cannot take part."""


def imported(name):
    try:
        return __import__(name, fromlist=["_"])
    except (ImportError, OSError) as error:
        raise Unavailable(f"not installed: {error}") from error


class TorchPeer:
    """A peer in this process. `forward(x)` gives what `backward` takes; `results` names what they made."""

    # A captured graph holds its memory all the time.
    has_peak = True

    def __init__(self, device, forward, backward, results, x=None, noisy=True, set_noise=lambda z: None):
        self.device, self.forward, self.backward, self.results = device, forward, backward, results
        self.x = x or (lambda: None)
        self.noisy, self.set_noise = noisy, set_noise

    def times(self):
        x = self.x()
        marks = [mark(self.device)]
        state = self.forward(x)
        marks.append(mark(self.device))
        kept = self.backward(state)
        marks.append(mark(self.device))
        if self.device == "cpu":
            seconds = marks[1] - marks[0], marks[2] - marks[1]
        else:
            torch.cuda.synchronize()
            seconds = tuple(a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:]))
        del kept
        return seconds

    def outputs(self, z):
        self.set_noise(z if self.noisy else None)
        state = self.forward(self.x())
        results = self.results(state, self.backward(state))
        self.set_noise(None)
        return {name: value.detach() for name, value in results.items()}

    def peak(self):
        """Peak memory of an iteration in bytes, less what was held before it."""
        self.times()
        if self.device == "cpu":
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = process_bytes("VmRSS")
            self.times()
            return max(process_bytes("VmHWM") - before, 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.times()
        return torch.cuda.max_memory_allocated() - before


def mark(device):
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def process_bytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Worker:
    """The process of `worker.rs`, which answers one request at a time; it ends when this object is gone."""

    def __init__(self, path, directory, sizes, **environment):
        self.path, self.directory, self.sizes = path, directory, sizes
        self.process = subprocess.Popen(
            [path, directory.name, *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, command, op):
        print(command, op, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"{self.path} died on `{command} {op}`")
        return answer

    def fresh(self, **environment):
        return Worker(self.path, self.directory, self.sizes, **environment)

    def __del__(self):
        self.process.stdin.close()
        self.process.wait()


class RustPeer:
    noisy = True

    def __init__(self, worker, op, trained):
        self.worker, self.op, self.names = worker, op, ["y", "dx", *trained]

    def times(self):
        return tuple(map(float, self.worker.ask("run", self.op).split()))

    def outputs(self, z):
        """`z` is among the files that the worker reads."""
        self.worker.ask("check", self.op)
        directory = self.worker.directory.name
        files = {name: f"{directory}/{self.op}.{name}.ours.f32" for name in self.names}
        return {name: torch.from_numpy(np.fromfile(path, np.float32)) for name, path in files.items()}

    def peak(self):
        return int(self.worker.fresh(**RETURN_FREED_BLOCKS).ask("memory", self.op))


# Makes the allocator give freed blocks back at once, so that a peak of the process is a peak of its live memory.
RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def no_worker():
    raise Unavailable("the worker runs single layers; `cargo bench --bench loss` and examples/few_shot have the rest")


def set_precision(dtype):
    """Whether GEMMs of f32 may use TF32. The PyTorch package asks PyTorch for the same setting."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def needs_compiler():
    if not torch.cuda.is_available() and not imported("torch._inductor.cpp_builder").get_cpp_compiler():
        raise Unavailable("torch.compile finds no compiler")
    # A function that was compiled for too many cases is not compiled any more, without a word: peers share functions of the model,
    # and each is compiled with given and with drawn noise.
    torch.compiler.reset()
    settings = torch._dynamo.config
    settings.recompile_limit, settings.fail_on_recompile_limit_hit = 32, True


def compiled_or_why_not(module, **options):
    needs_compiler()
    return torch.compile(module, dynamic=False, **options)
