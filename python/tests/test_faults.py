"""The training script when things break: killed at any moment, disks that are full or read-only, damaged files, a process that dies.

    PACE_FAULTS=50 python -m pytest -s python/tests/test_faults.py      # so many kills, and the whole of the rest

Without PACE_FAULTS a few of each. Runs are processes that a fork server starts, in which PyTorch is loaded already.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import fork_server, free_port
from pace_torch import PaceError, checkpoint
from test_train import SCRIPT, STEPS, arguments, assert_same, folder, results, train  # noqa: F401

KILLS = int(os.environ.get("PACE_FAULTS", 0))
EPOCHS = 4 if KILLS else 3
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    with fork_server("test_faults"):
        yield


def body(settings, said, environment):
    """What a process of a run does: its words go to the file `said`."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    multiprocessing.set_start_method("fork", force=True)  # As in a process that was started by hand.
    train.main(settings)


def start(images, out, *more, words=None, **environment):
    settings = [*arguments(images, out, "--epochs", EPOCHS, "--eval-every", 2, *more), "--resume"]
    out.parent.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=body, args=(settings, words or said(out), environment))
    process.start()
    return process


def said(out):
    return out.with_suffix(".said")


def kill(process, workers=True):
    """Ends it now, with its workers or without."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if workers else os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # It has ended, or has no group yet.
        process.kill()
    process.join()


def finished(process):
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


class Whole(NamedTuple):
    """A run that nothing happened to."""

    lines: list
    state: dict
    seconds: float
    out: Path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):  # noqa: F811
    """Runs that nothing happened to, by their settings."""
    runs = {}

    def get(*settings):
        if settings not in runs:
            out, begin = tmp_path_factory.mktemp("whole") / "out", time.monotonic()
            assert finished(start(folder, out, *settings)) == 0, said(out).read_text()
            runs[settings] = Whole(*results(out), time.monotonic() - begin, out)
        return runs[settings]

    return get


def assert_whole(out, expected):
    """Bitwise the run that nothing happened to; every line of the log once."""
    lines, state = results(out)
    assert lines == expected.lines
    assert_same(state, expected.state)
    assert not (out / "checkpoint.part").exists()


def test_killed_at_random_moments(folder, whole, tmp_path):  # noqa: F811
    """Half of the kills come while a checkpoint is written, or shortly after."""
    random, found, kills, run = np.random.default_rng(KILLS), {}, 0, 0
    while kills < (KILLS or 2):
        variant = ("fast", "pace", "lazy", "baseline")[run % 4 if KILLS else 0]
        expected, out = whole("--variant", variant), tmp_path / f"{run}" / "out"
        for attempt in range(5):
            process = start(folder, out, "--variant", variant)
            if attempt == 4 or kills == (KILLS or 2):
                assert finished(process) == 0, said(out).read_text()
                break
            end, saves = time.monotonic() + random.uniform(0.1, 1) * expected.seconds, random.integers(1, EPOCHS) if kills % 2 else 0
            part, seen = out / "checkpoint.part", False
            while time.monotonic() < end or saves and process.is_alive():
                if saves and part.exists() != seen:
                    seen = not seen
                    saves -= seen
                    if saves == 0:
                        time.sleep(random.uniform(0, 0.004))
                        break
                if process.exitcode is not None:
                    break
                if not saves:
                    time.sleep(0.005)
            kill(process, workers=kills % 3 != 0)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, said(out).read_text()
            kills += 1
            there = [name for name in ("checkpoint.part", "checkpoint.pt", "checkpoint.previous.pt") if (out / name).exists()]
            found[", ".join(there)] = found.get(", ".join(there), 0) + 1
        assert_whole(out, expected)
        run += 1
    print(f"\n{kills} kills in {run} runs of {expected.seconds:.1f} s; files found after them:", found)


# ------------------------------------------------------------------------------------------------------------- one save


SETTINGS = {"rank": 4}


def state(step, numbers=700):
    return {"step": step, "weights": {"a": torch.arange(numbers) + step, "b": torch.tensor([step])}}


def saved(out, step, numbers=700):
    """The files in `out` after this step as the script writes them."""
    result = train.Results(out, SETTINGS, resume=True)
    result.create()
    with open(result.log, "a") as log:
        log.write(f"line {step}\n")
        log.flush()
        result.save(state(step, numbers), log)


def newest(out, numbers=700):
    """The step from which a run would go on."""
    result = train.Results(out, SETTINGS, resume=True)
    step = result.state["step"]
    expected = state(step, numbers)
    assert_same({name: result.state[name] for name in expected}, expected)
    assert result.log.read_bytes()[: result.state["log_length"]].endswith(b"line %d\n" % step)
    return step


def child(work):
    """How a forked process that does this ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except train.InputError:
            os._exit(3)
        finally:
            os._exit(2 if sys.exc_info()[0] else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(line, out):
    """Writes the third checkpoint, and is killed before the line of that number that its writing comes to."""
    files, lines = (train.__file__, checkpoint.__file__), iter(range(1, 1 << 30))

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    saved(out, 3)
    sys.settrace(None)


def test_killed_at_every_line_of_a_save(tmp_path):
    """Also where the newest checkpoint is damaged: then the one before must live on."""
    good, damaged = tmp_path / "good", tmp_path / "damaged"
    for step in (1, 2):
        saved(good, step)
    shutil.copytree(good, damaged)
    (damaged / "checkpoint.pt").write_bytes(b"damaged")
    for base, before in ((good, 2), (damaged, 1)):
        line, steps = 1, []
        while True:
            out = shutil.copytree(base, tmp_path / f"{base.name} {line}")
            if (ended := child(partial(die_at, line, out))) != -signal.SIGKILL:
                break
            steps.append(newest(out))
            shutil.rmtree(out)
            line += 1 if KILLS else 4
        assert ended == 0 and newest(out) == 3
        assert steps == sorted(steps) and (steps[0], steps[-1]) == (before, 3), steps
        assert len(steps) > (30 if KILLS else 7)


def test_killed_within_a_write(tmp_path):
    """The system ends the process at the first byte that a file may not have; or the write is an error, as on a full disk."""
    large = 50_000  # PyTorch writes what is larger than a buffer of Python, and meets the error itself.
    for step in (1, 2):
        saved(tmp_path / "base", step, large)
    size = (tmp_path / "base" / "checkpoint.pt").stat().st_size
    for kind, ended in ((signal.SIG_DFL, -signal.SIGXFSZ), (signal.SIG_IGN, 3)):
        for limit in np.linspace(30, size - 1, 40 if KILLS else 6).astype(int).tolist():

            def work():
                signal.signal(signal.SIGXFSZ, kind)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                saved(out, 3, large)

            out = shutil.copytree(tmp_path / "base", tmp_path / f"{kind} {limit}")
            assert child(work) == ended
            assert newest(out, large) == 2
            # An error leaves nothing behind that would fill the disk.
            assert (out / "checkpoint.part").exists() == (kind == signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------- damaged files


def test_damage_is_noticed(tmp_path):
    """A bit that flips anywhere is an error, or in a part of the file that has no meaning; so is a file that ends early."""
    path, expected = tmp_path / "checkpoint.pt", state(3)
    checkpoint.save(path, expected)
    content, harmless = path.read_bytes(), 0
    random = np.random.default_rng(0)
    for at in range(0, len(content), 1 if KILLS else 29):
        damaged = bytearray(content)
        damaged[at] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            assert_same(checkpoint.load(path), expected)
            harmless += 1
        except PaceError as error:
            assert "checkpoint.pt is not whole: " in str(error)
        path.write_bytes(content[:at])
        with pytest.raises(PaceError, match="is not whole"):
            checkpoint.load(path)
    assert harmless < len(content) / 4 / (1 if KILLS else 29)
    path.write_bytes(content)
    assert_same(checkpoint.load(path), expected)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "log"])
def test_the_one_before_is_used(damage, folder, whole, tmp_path):  # noqa: F811
    """And the run says which and why."""
    settings, out = ("--variant", "fast"), tmp_path / "out"
    newest, previous, log = out / "checkpoint.pt", out / "checkpoint.previous.pt", out / "metrics.jsonl"
    if not KILLS and damage != "flipped":
        pytest.skip("PACE_FAULTS is not set, and one kind of damage to a run is enough")
    shutil.copytree(whole(*settings).out, out)
    content = newest.read_bytes()
    if damage == "gone":
        newest.unlink()
    elif damage == "log":
        log.write_bytes(log.read_bytes()[:-3])
    else:
        # In the data of a tensor: what fills up between them means nothing.
        at = content.index(max(whole(*settings).state["weights"].values(), key=torch.numel).numpy().tobytes())
        newest.write_bytes(content[:at] + (b"" if damage == "cut" else bytes([content[at] ^ 4]) + content[at + 1 :]))
    found = newest.read_bytes() if newest.exists() else None
    assert finished(start(folder, out, *settings)) == 0, said(out).read_text()
    why = {"gone": f"there is no {newest}: its writing was cut off", "log": f"{log} is shorter than when {newest} was written"}
    text = said(out).read_text()
    assert f"{why.get(damage, f'{newest} is not whole: ')}" in text and f"; goes on from {previous}\n" in text
    assert f"from step {STEPS * (EPOCHS - 1)}" in text
    # What it cannot go on from is kept.
    if damage != "gone":
        assert (out / "checkpoint.damaged.pt").read_bytes() == found
    assert_whole(out, whole(*settings))
    if damage == "cut":
        for path in (newest, previous):
            path.write_bytes(content[:1000])
        before = log.read_bytes()
        assert finished(start(folder, out, *settings)) == 1
        assert said(out).read_text().endswith(f"train.py: {previous} is not whole: File is not a zip file\n")
        assert log.read_bytes() == before


# --------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that mounts it anew with other options."""

    def mount(*options):
        done = subprocess.run(["mount", *options, tmp_path / "disk"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    (tmp_path / "disk").mkdir()
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a file system takes root")
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    yield tmp_path / "disk", lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_full_and_read_only_disks(folder, whole, small_disk):  # noqa: F811
    """Each is a sentence and an exit status of 1; what is there stays; the run goes on when the disk is as it should be."""
    settings, (disk, remount) = ("--variant", "fast"), small_disk
    expected, out, words = whole(*settings), disk / "out", disk.parent / "words"
    # Room for the first checkpoint, and for half of the second.
    remount(f"size={(expected.out / 'checkpoint.pt').stat().st_size * 3 // 2 // 1024}k")
    assert finished(start(folder, out, *settings, words=words)) == 1
    text = words.read_text()
    assert "train.py: " in text and "No space left on device" in text and "Traceback" not in text, text
    files = {path: path.read_bytes() for path in out.iterdir()}
    assert {path.name for path in files} == {"metrics.jsonl", "checkpoint.pt"}
    assert checkpoint.load(out / "checkpoint.pt")["step"] == STEPS
    remount("ro")
    assert finished(start(folder, out, *settings, words=words)) == 1
    text = words.read_text().removeprefix(text)
    assert "train.py: " in text and "Read-only file system" in text and "Traceback" not in text, text
    assert files == {path: path.read_bytes() for path in out.iterdir()}
    remount("rw,size=64m")
    assert finished(start(folder, out, *settings, words=words)) == 0, words.read_text()
    assert_whole(out, expected)


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_process_that_dies_ends_the_others(folder, whole, tmp_path):  # noqa: F811
    """At once, since the connection breaks; and the run goes on when all are started again."""
    # So many epochs that nobody ends before it is noticed.
    settings, ranks = ("--variant", "pace", "--epochs", 30), 2

    def together(out):
        run = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return [start(folder, out, *settings, **run, RANK=str(rank)) for rank in range(ranks)]

    for victim in range(ranks) if KILLS else (1,):
        out = tmp_path / f"{victim}" / "out"
        processes, end = together(out), time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < STEPS + 1:
            assert time.monotonic() < end and all(process.is_alive() for process in processes), said(out).read_text()
            time.sleep(0.002)
        kill(processes[victim])
        begin = time.monotonic()
        other = processes[1 - victim]
        other.join(30)
        print(f"\nrank {victim} killed: the other ends after {time.monotonic() - begin:.2f} s")
        if other.exitcode is None:
            kill(other)
            pytest.fail("it waits for a process that is dead")
        assert other.exitcode == 1
        if KILLS:
            expected = tmp_path / f"expected {victim}" / "out"
            for folder_of_run in (expected, out):
                assert [finished(process) for process in together(folder_of_run)] == [0, 0], said(folder_of_run).read_text()
            assert_whole(out, Whole(*results(expected), 0, expected))
