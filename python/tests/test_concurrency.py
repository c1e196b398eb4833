"""Threads, forked processes, several processes and several interpreters in one."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pace_torch
import pytest
import torch
from pace_torch import PaceError, ops
from pace_torch import _library as lib
from torch.utils.data import DataLoader, Dataset

THREADS, ROUNDS = 8, 20


def step(seed, x, weight, delta):
    """A layer under noise, its loss and gradients: all that a thread computes of shared tensors."""
    delta = delta.clone().requires_grad_()
    noise = pace_torch.Noise(pace_torch.keys(seed, 0, 1), 0.5, branches=2)
    logits = ops.noisy_linear(x, weight, None, delta, None, noise)
    losses = pace_torch.pace_loss(logits.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1] // 2) % 7, 0.5)
    losses.total.backward()
    return losses.total.detach(), delta.grad, logits.detach()


def test_threads_get_what_one_thread_gets():
    generator = torch.Generator().manual_seed(0)
    x, weight, delta = (torch.randn(*shape, generator=generator) for shape in ((32, 5, 96), (80, 96), (80, 96)))
    alone = [step(seed, x, weight, delta) for seed in range(THREADS)]
    assert not torch.equal(alone[0][2], alone[1][2])
    together = threading.Barrier(THREADS)

    def run(seed):
        together.wait()
        for _ in range(ROUNDS):
            for got, expected in zip(step(seed, x, weight, delta), alone[seed]):
                assert torch.equal(got, expected)
            # An error is told to the thread that made it.
            with pytest.raises(PaceError, match=rf"`sigma` is -{seed + 1}(\.0)?,"):
                pace_torch.sigma_by_block(3, -1.0 - seed, 0)
        return True

    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(run, range(THREADS)))


class Drawing(Dataset):
    """Draws noise by an operator in whatever process it is."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return pace_torch.noise(pace_torch.Noise(pace_torch.keys(i, 0, 1), 0.5), 2, 4)


def in_child(work):
    """How a forked process that does this ends; one that hangs is ended."""
    pid = os.fork()
    if pid == 0:
        try:
            import signal

            signal.alarm(20)
            work()
            os._exit(0)
        except PaceError as error:
            os._exit(7 if error.status == "PACE_ERROR_FORKED" and "forked" in str(error) else 8)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_process_is_told_that_it_cannot():
    """Its operators would wait for threads that are not there. Before there are any, it is a process like others, also if PyTorch has threads."""
    program = """
        import sys; sys.path.insert(0, sys.argv[1])
        from test_concurrency import Drawing, in_child, step, torch
        torch.ones(1 << 22).add(1)
        tensors = [torch.ones(*shape) for shape in ((32, 5, 96), (80, 96), (80, 96))]
        print(in_child(lambda: step(0, *tensors)), in_child(lambda: torch.ones(3).sum()), Drawing()[0].numel(), in_child(lambda: Drawing()[0]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), os.path.dirname(__file__)], capture_output=True, text=True)
    assert done.stdout == "0 0 8 7\n", done


def test_workers_that_load_data_are_told():
    """They are forked by default, up to Python 3.13."""
    drawn = [Drawing()[i] for i in range(2)]
    with pytest.raises(PaceError, match="forked"):
        list(DataLoader(Drawing(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=20))
    fresh = DataLoader(Drawing(), batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=60)
    for ours, theirs in zip(drawn, fresh):
        assert torch.equal(ours, theirs)


# What takes the library and no PyTorch, which loads once in a process: noise by a key, and the message of an error.
DRAW = """
import ctypes
library = ctypes.CDLL({path!r})
library.pace_last_error.restype = ctypes.c_char_p
def draw(key, len=64):
    z = (ctypes.c_float * (len * len))()
    words = (ctypes.c_uint64 * {words})()
    # size, dtype and flags, shape; then noise and z, as in PaceNoiseFill.
    words[0], words[1] = {words} * 8, 0
    words[2:8] = 1, len, 1, 0, len, 0
    words[8], words[9], words[12] = {kind}, key, 0x3F000000
    words[{z}], words[{z} + 1] = ctypes.addressof(z), len * len
    status = library.pace_noise_fill(None, None, words)
    assert status == 0, library.pace_last_error()
    return bytes(z)
for i in range(20):
    assert draw({key}) == draw({key})
    assert library.pace_sigma_by_block(ctypes.c_uint64(3), ctypes.c_double(-{key}.0), ctypes.c_uint64(0), None) == 4
    assert b"-{key}" in library.pace_last_error()
import hashlib
digest = hashlib.sha256(draw({key})).hexdigest()
"""


def program(key):
    args = lib.PaceNoiseFill
    assert (args.shape.offset, args.noise.offset) == (16, 64) and args.z.offset % 8 == 0
    return DRAW.format(
        path=str(lib._find()), words=ctypes.sizeof(args) // 8, kind=lib.NOISE_GENERATED, z=args.z.offset // 8, key=key
    )


def digest(key):
    values = {}
    exec(program(key), values)
    return values["digest"]


def test_processes_get_what_one_process_gets():
    processes = [
        subprocess.Popen([sys.executable, "-c", program(key) + "print(digest)"], stdout=subprocess.PIPE, text=True) for key in (1, 1, 2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [digest(1), digest(1), digest(2)]
    assert digest(1) != digest(2)


def test_interpreters_in_one_process():
    """Each loads the library; PyTorch does not load in a second interpreter, so that this is ctypes alone."""
    run = """
        import sys, threading
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        programs = eval(sys.stdin.read())
        ids = [interpreters.create() for _ in programs]
        def start(id, program):
            error = interpreters.run_string(id, program)
            if error is not None:
                print(error)
        threads = [threading.Thread(target=start, args=pair) for pair in zip(ids, programs)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        for id in ids[:2]: interpreters.destroy(id)
        # The library is still there for those that are left.
        start(ids[2], programs[2])
    """
    # One call of the system for a line: the outputs of interpreters that run at once would mix.
    programs = [program(key) + 'import os; os.write(1, (digest + "\\n").encode())' for key in (1, 2, 3)]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(run)], input=repr(programs), capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    if "No module named '_xxsubinterpreters'" in said or "does not support loading in subinterpreters" in said:
        pytest.skip(f"this Python's interpreters do not load ctypes: {said.splitlines()[-1]}")
    assert done.returncode == 0 and sorted(done.stdout.split()) == sorted(map(digest, (1, 2, 3, 3))), said
