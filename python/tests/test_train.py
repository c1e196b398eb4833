"""The training script: what it writes, that it goes on where it was stopped, several processes, wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pace_torch
import pytest
import timm
import torch
from conftest import free_port
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
sys.path.insert(0, str(SCRIPT.parent))
import train  # noqa: E402

CLASSES, TRAINING, VALIDATION, STEPS = ("left", "right", "top"), 8, 4, 3  # images of a class; steps in an epoch


@pytest.fixture(autouse=True)
def threads():
    """The script sets these; later tests shall not notice."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise, one half of which is bright: which half is the class."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    halves = {"left": np.s_[:, :16], "right": np.s_[:, 16:], "top": np.s_[:16]}
    for part, number in (("train", TRAINING), ("val", VALIDATION)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 150, (32, 32, 3))
                pixels[halves[name]] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def arguments(folder, out, *more):
    """Short runs; a later option overrides an earlier one. One thread, so that every process rounds alike."""
    text = "--batch 8 --epochs 2 --rank 4 --lr 5e-3 --lambda 0.1 --threads 1 --device cpu"
    return ["--data", str(folder), "--out", str(out), *text.split(), *map(str, more)]


def run(folder, out, *more):
    train.main(arguments(folder, out, *more))
    return results(out)


def results(out):
    """The metrics, without the seconds, in which equal runs differ, and the checkpoint."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines, torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a, b):
    """Bitwise the same state, whatever its structure."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a.keys() - {"log_length"}:  # The seconds in the log have more or fewer digits.
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("variant", ["baseline", "noise", "pace", "fast", "lazy"])
def test_variants_train(variant, folder, tmp_path, capsys):
    lines, state = run(folder, tmp_path, "--variant", variant, "--eval-every", 1)
    steps = [line for line in lines if "total" in line]
    evaluations = [line for line in lines if "accuracy" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    names = {"step", "epoch", "total", "classification", "consistency", "gradient_norm", "lr"}
    assert all(line.keys() == names for line in steps)
    assert all(line.keys() == {"step", "epoch", "accuracy", "fp_distance"} for line in evaluations)
    assert [line["epoch"] for line in steps] == [1] * STEPS + [2] * STEPS
    assert [line["lr"] for line in steps] == [5e-3] * STEPS + [pytest.approx((5e-3 + 1e-5) / 2)] * STEPS

    losses = [line["classification"] for line in steps]
    assert sum(losses[STEPS:]) < 0.95 * sum(losses[:STEPS])
    for line in steps:
        assert line["total"] == pytest.approx(line["classification"] + 0.1 * line["consistency"], rel=1e-5)
        assert line["gradient_norm"] > 0
    consistent = [line["consistency"] > 0 for line in steps]
    assert consistent == {
        "baseline": [False] * 6, "noise": [False] * 6, "pace": [True] * 6, "fast": [True] * 6, "lazy": [True, False] * 3
    }[variant]
    assert 0 < evaluations[0]["fp_distance"] < evaluations[1]["fp_distance"]

    assert state["step"] == 2 * STEPS
    assert (state["history"] is not None) == (variant == "fast")
    assert any(".adapter." in name for name in state["weights"]) == (variant != "baseline")
    shown = capsys.readouterr().out.splitlines()[-1].split()
    assert shown[:3] == [variant, f"{steps[-1]['total']:.3f}", f"{100 * evaluations[1]['accuracy']:.1f}"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Runs that nobody stopped, by variant: five epochs."""
    runs = {}

    def get(variant):
        if variant not in runs:
            runs[variant] = run(folder, tmp_path_factory.mktemp(variant), "--variant", variant, "--epochs", 5)
        return runs[variant]

    return get


@pytest.mark.parametrize(("variant", "number"), [("fast", signal.SIGKILL), ("lazy", signal.SIGTERM)])
def test_killed_and_resumed(variant, number, whole, folder, tmp_path):
    settings = ["--variant", variant, "--epochs", 5]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(folder, tmp_path, *settings)], text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    log, end = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 2 * STEPS + 1:
        assert process.poll() is None and time.monotonic() < end, "it ended, or hangs"
        time.sleep(0.002)
    os.killpg(process.pid, number)  # Its workers as well.
    said = process.communicate(timeout=60)[1]
    stopped = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 2 * STEPS <= stopped < 5 * STEPS
    if number == signal.SIGTERM:
        assert process.returncode == 1 and "Traceback" not in said
        assert f"stopped after step {stopped} of 15; --resume goes on" in said
    with open(log, "a") as file:
        file.write('{"step": 8, "epo')  # What a machine that lost its power may leave.
    lines, state = run(folder, tmp_path, *settings, "--resume")
    assert lines == whole(variant)[0]
    assert_same(state, whole(variant)[1])


@pytest.mark.parametrize(("variant", "number"), [("baseline", signal.SIGTERM), ("pace", signal.SIGINT)])
def test_stopped_in_an_epoch_and_resumed(variant, number, whole, folder, tmp_path, monkeypatch):
    settings, steps, norm = ["--variant", variant, "--epochs", 5], iter(range(1, 100)), pace_torch.grad_norm

    def stop_in_the_fifth(gradients):
        if next(steps) == 5:
            signal.raise_signal(number)
        return norm(gradients)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped after step 5 of 15"):
        patch.setattr(pace_torch, "grad_norm", stop_in_the_fifth)
        run(folder, tmp_path, *settings)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    lines, state = run(folder, tmp_path, *settings, "--resume")
    assert lines == whole(variant)[0]
    assert_same(state, whole(variant)[1])
    # What is done already stays as it is.
    assert_same(run(folder, tmp_path, *settings, "--resume"), (lines, state))


def test_nothing_to_resume_is_a_start(whole, folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1}\n')  # Killed before the first checkpoint.
    lines, state = run(folder, tmp_path, "--variant", "pace", "--epochs", 5, "--resume")
    assert lines == whole("pace")[0]
    assert_same(state, whole("pace")[1])


# Where torchrun's processes meet, those of one run have left what confuses those of the next.
PROGRAM = """
import os, runpy, sys
import timm
for port, settings in {runs}:
    process = os.fork()
    if not process:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
        sys.argv[1:] = settings
        runpy.run_path({script!r}, run_name="__main__")
        sys.exit()
    if os.waitpid(process, 0)[1]:
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    """Where two processes have trained each variant: the script again and again, for most of the time goes to loading PyTorch."""
    root = tmp_path_factory.mktemp("pairs")
    variants = ("pace", "fast", "lazy")
    runs = [(free_port(), arguments(folder, root / variant, "--variant", variant, "--epochs", 5)) for variant in variants]
    (root / "program.py").write_text(PROGRAM.format(runs=runs, script=str(SCRIPT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, root / "program.py"], check=True, timeout=240, stdout=subprocess.PIPE)
    return root


@pytest.mark.parametrize("variant", ["pace", "fast", "lazy"])
def test_processes_together_do_what_one_does(variant, whole, pairs):
    together, state = results(pairs / variant)
    alone, expected = whole(variant)
    assert [line.keys() for line in together] == [line.keys() for line in alone]
    for ours, theirs in zip(together, alone):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    # Where a gradient is nearly zero, AdamW follows its rounding.
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(state["weights"][name], tensor, rtol=0, atol=1e-3)


def test_a_fresh_model_has_the_accuracy_that_was_written(folder, tmp_path):
    lines, state = run(folder, tmp_path)
    model = timm.create_model(**train.DIGITS_VIT, num_classes=len(CLASSES), checkpoint_path="")
    source = timm.models.load_state_dict(str(train.DIGITS_WEIGHTS))
    model.load_state_dict({name: t for name, t in source.items() if "head" not in name}, strict=False)
    pace_torch.inject(model, rank=4)
    missing, unexpected = model.load_state_dict(state["weights"], strict=False)
    assert not unexpected and not any("delta" in name or "head" in name for name in missing)
    right = 0
    model.eval()
    for merged in (False, True):
        model = pace_torch.merge(model) if merged else model
        for label, name in enumerate(CLASSES):
            for path in (folder / "val" / name).iterdir():
                image = Image.open(path).resize((28, 28), Image.Resampling.BICUBIC).convert("L")
                x = torch.from_numpy(np.asarray(image, dtype=np.float32))[None, None] / 127.5 - 1
                with torch.no_grad():
                    right += model(x).argmax().item() == label
    assert right == 2 * round(lines[-1]["accuracy"] * VALIDATION * len(CLASSES))


def test_optdigits(tmp_path):
    out = tmp_path / "out"
    lines, _ = run("optdigits", out, "--shots", 160, "--batch", 200, "--epochs", 1, "--variant", "baseline")
    assert len(lines) == 8 + 1 and lines[-1]["accuracy"] > 0.2
    # Prepared like MNIST: the source model knows most of these digits, though its head does not stay.
    training, validation, classes = train.load_optdigits(4, 0, 1, (28, 28))
    assert (len(training), len(validation), classes) == (40, 1757, 10)
    assert sorted(label.item() for _, label, _ in training) == sorted(list(range(10)) * 4)
    model = timm.create_model(**train.DIGITS_VIT, num_classes=10)
    model.load_state_dict(timm.models.load_state_dict(str(train.DIGITS_WEIGHTS)))
    images, labels, _ = zip(*(validation[i] for i in range(0, len(validation), 8)))
    with torch.no_grad():
        predicted = model.eval()(torch.stack(images) * 2 - 1).argmax(1)
    assert (predicted == torch.stack(labels)).float().mean() > 0.75


def test_weights_of_a_file(folder, tmp_path):
    source = timm.models.load_state_dict(str(train.DIGITS_WEIGHTS))
    torch.save({"state_dict": source}, tmp_path / "same.pt")
    torch.save({name: 1.5 * tensor for name, tensor in source.items()}, tmp_path / "other.pt")
    settings = "--epochs", 1
    shipped = run(folder, tmp_path / "shipped", *settings)[0]
    assert run(folder, tmp_path / "same", *settings, "--weights", tmp_path / "same.pt")[0] == shipped
    assert run(folder, tmp_path / "other", *settings, "--weights", tmp_path / "other.pt")[0] != shipped
    del source["blocks.3.norm1.bias"]
    torch.save(source, tmp_path / "part.pt")
    with pytest.raises(SystemExit, match="part.pt has not the weights of digits: blocks.3.norm1.bias is in one"):
        run(folder, tmp_path / "part", "--weights", tmp_path / "part.pt")


def test_another_model_of_timm(folder, tmp_path):
    lines, _ = run(folder, tmp_path, "--model", "test_vit", "--epochs", 1, "--adapter", "LoRAadd", "--amp")
    assert len(lines) == STEPS + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no folder nowhere/train,"),
        (["--variant", "more"], "invalid choice: 'more'"),
        (["--rank", "0"], "0 is below 1"),
        (["--sigma", "-1"], "sigma"),
        (["--shots", "2"], "--shots is for optdigits"),
        (["--data", "optdigits", "--shots", "180"], "a class of 174 images"),
        (["--model", "vit_of_nobody"], "Unknown model"),
        (["--pretrained"], "--pretrained needs a --model"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--weights", str(SCRIPT)], "train.py cannot be read as weights"),
        (["--model", "test_vit", "--weights", str(train.DIGITS_WEIGHTS)], "as weights of test_vit: size mismatch"),
        (["--variant", "lazy", "--batch", "1"], "too few to divide by 2"),
    ],
)
def test_wrong_input_is_a_sentence(options, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", *options)
    text = capsys.readouterr().err + str(stop.value.code)
    assert message in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_wrong_images_are_a_sentence(folder, tmp_path):
    for part, name in (("train", "a"), ("train", "b"), ("val", "a")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / part / name / "0.png")
    with pytest.raises(SystemExit, match=r"train/ has 2 classes, val/ 1; not in both: b"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(SystemExit, match="no valid file for the classes b"):
        run(tmp_path, tmp_path / "out")
    broken = tmp_path / "val" / "b" / "0.png"
    broken.write_bytes(b"no image")
    # By itself, since it has to end by itself: with workers left, which live on for a minute.
    script = [sys.executable, SCRIPT, *arguments(tmp_path, tmp_path / "out", "--batch", 2)]
    stopped = subprocess.run(script, timeout=50, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stopped.returncode == 1 and stopped.stderr.endswith("\n")
    assert f"train.py: OSError: {broken}: cannot identify image file" in stopped.stderr and "Traceback" not in stopped.stderr


def test_a_run_is_not_overwritten_or_mixed_up(folder, tmp_path):
    run(folder, tmp_path, "--epochs", 1)
    checkpoint, log = tmp_path / "checkpoint.pt", tmp_path / "metrics.jsonl"
    before = checkpoint.read_bytes(), log.read_bytes()
    for options, message in (
        ([], "has a run already"),
        (["--resume", "--lambda", 0.5, "--rank", 5], r"rank was 4, is 5; lambda was 0\.1, is 0\.5\."),
        (["--resume", "--data", "optdigits"], "data was .*, is optdigits"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(folder, tmp_path, "--epochs", 1, *options)
        assert before == (checkpoint.read_bytes(), log.read_bytes())
    log.write_text("")
    with pytest.raises(SystemExit, match="metrics.jsonl is shorter than when"):
        run(folder, tmp_path, "--epochs", 1, "--resume")
    flipped = bytearray(before[0])
    weights = torch.load(checkpoint, weights_only=True)["weights"]
    flipped[flipped.index(max(weights.values(), key=torch.numel).numpy().tobytes())] ^= 1
    for content in (b"", b"something else", before[0][:1000], bytes(flipped)):
        checkpoint.write_bytes(content)
        with pytest.raises(SystemExit, match="checkpoint.pt is not whole: "):
            run(folder, tmp_path, "--epochs", 1, "--resume")
    torch.save({"model": {}}, checkpoint)
    with pytest.raises(SystemExit, match="checkpoint.pt is not a checkpoint of this script"):
        run(folder, tmp_path, "--epochs", 1, "--resume")
