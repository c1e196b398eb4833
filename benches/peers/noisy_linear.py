"""Noisy linear layers, forward + backward: PyTorch eager against this crate, side by side on the CPU.

    pip install torch numpy
    cargo build --release --example peer_worker
    python benches/peers/noisy_linear.py [--out results/peers_noisy_linear.json]

Both sides run f32 on the same number of threads, each in a process of its own that answers one request at a time
(`worker.rs`, and this file with `--eager`). First each operator's output and gradients are compared, with the same
inputs and the same z; then the two take turns, one iteration each per round, so that a noisy machine disturbs both
alike. An iteration is what a training step does: draw z, forward, backward, outputs and gradients newly allocated.

Peak memory is the kernel's own figure (VmHWM, reset before the iteration) less what was resident before it: outputs,
gradients and scratch, but not inputs. It is taken in fresh processes whose allocator returns freed blocks at once.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Gradients that each operator makes, and the parameters that are trained.
LORA = ["down", "up", "delta_bias"]
TRAINED = {"frozen": [], "lora_add": LORA, "lora_mul_vpt": [*LORA, "prompt_down", "prompt_up"]}
# Block 1 of a 13-block model, the official default: the strongest noise there is in it.
SIGMA = 1.0


class Eager:
    """The official formulas, one operator at a time, on the tensors of a directory."""

    def __init__(self, args):
        torch.set_num_threads(args.threads)
        self.dir = pathlib.Path(args.dir)
        self.samples = args.branches * args.batch
        k, n, r = args.in_features, args.out_features, args.rank
        rows = (self.samples, args.tokens)
        self.x = self.read("x", *rows, k).requires_grad_()
        self.dy = self.read("dy", *rows, n)
        self.weight, self.bias = self.read("weight", n, k), self.read("bias", n)
        shapes = dict(down=(n, r), up=(r, k), delta_bias=(n,), prompt_down=(k, r), prompt_up=(r, 1))
        self.p = {name: self.read(name, *shape).requires_grad_() for name, shape in shapes.items()}

    def read(self, name, *shape):
        return torch.from_numpy(np.fromfile(self.dir / f"{name}.f32", np.float32).reshape(shape))

    def adapter(self, op):
        p = self.p
        if op == "lora_add":
            return F.linear(F.linear(self.x, p["up"]), p["down"], p["delta_bias"])
        prompt = (self.weight @ (p["prompt_down"] @ p["prompt_up"])).squeeze()
        bias = prompt + self.bias * p["delta_bias"]
        return F.linear(self.x, self.weight * (p["down"] @ p["up"]), bias)

    def step(self, op, z=None):
        """Forward and backward; y and the gradients of x and of the trained parameters."""
        y = F.linear(self.x, self.weight, self.bias)
        if op != "frozen":
            if z is None:
                z = torch.randn(self.samples, 1, y.shape[-1]) * SIGMA + 1
            y = y + self.adapter(op) * z
        wanted = [self.x, *(self.p[name] for name in TRAINED[op])]
        return y.detach(), torch.autograd.grad(y, wanted, self.dy)

    def run(self, op):
        start = time.perf_counter()
        outputs = self.step(op)
        seconds = time.perf_counter() - start
        del outputs
        return seconds

    def check(self, op):
        y, grads = self.step(op, self.read("z", self.samples, 1, self.weight.shape[0]))
        for name, value in zip(["y", "dx", *TRAINED[op]], [y, *grads]):
            value.numpy().tofile(self.dir / f"{op}.{name}.eager.f32")
        return "ok"

    def memory(self, op):
        self.step(op)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        outputs = self.step(op)
        peak = status("VmHWM") - before
        del outputs
        return peak

    def serve(self):
        for line in sys.stdin:
            command, op = line.split()
            print(getattr(self, command)(op), flush=True)


def status(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Worker:
    """A process that answers `run`, `check` and `memory` requests."""

    def __init__(self, command, **environment):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **environment}
        )

    def ask(self, command, op):
        print(command, op, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            sys.exit(f"{self.process.args[0]} died on `{command} {op}`")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def write_inputs(directory, args):
    rng = np.random.default_rng(0)
    m = args.branches * args.batch * args.tokens
    k, n, r = args.in_features, args.out_features, args.rank
    normal = lambda scale, *shape: rng.standard_normal(shape, np.float32) * np.float32(scale)
    tensors = dict(
        x=normal(1, m, k),
        dy=normal(1, m, n),
        weight=normal(k**-0.5, n, k),
        bias=normal(0.1, n),
        down=normal(0.1, n, r),
        up=normal(k**-0.5, r, k),
        delta_bias=normal(0.1, n),
        prompt_down=normal(0.1, k, r),
        prompt_up=normal(r**-0.5, r),
        z=1 + normal(SIGMA, args.branches * args.batch, n),
    )
    for name, values in tensors.items():
        values.tofile(directory / f"{name}.f32")


def compare(directory, op, workers):
    """Largest difference of each output, relative to the largest value of that output."""
    for worker in workers.values():
        assert worker.ask("check", op) == "ok"
    worst = 0.0
    for name in ["y", "dx", *TRAINED[op]]:
        eager, ours = (np.fromfile(directory / f"{op}.{name}.{side}.f32", np.float32) for side in workers)
        error = float(np.abs(eager - ours).max() / np.abs(eager).max())
        worst = max(worst, error)
        if not error <= 1e-4:
            sys.exit(f"{op}: `{name}` differs from eager by {error:.1e} relative")
    return worst


def quartiles(seconds):
    return [float(v) * 1e3 for v in np.percentile(seconds, [25, 50, 75])]


def measure(args):
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        write_inputs(directory, args)
        sizes = [args.branches, args.batch, args.tokens, args.in_features, args.out_features, args.rank]
        common = [str(v) for v in (directory, *sizes, args.threads)]
        commands = {"eager": [sys.executable, __file__, "--eager", *common], "ours": [args.worker, *common]}
        workers = {side: Worker(command) for side, command in commands.items()}
        results = {}
        for op in TRAINED:
            error = compare(directory, op, workers)
            times = {side: [] for side in workers}
            for turn in range(args.rounds + 2):
                for side in [*workers] if turn % 2 == 0 else reversed(workers):
                    # Let the other side's threads fall asleep.
                    time.sleep(0.02)
                    seconds = float(workers[side].ask("run", op))
                    if turn >= 2:
                        times[side].append(seconds)
            results[op] = {"relative_difference": error, "quartiles_ms": {s: quartiles(t) for s, t in times.items()}}
        for worker in workers.values():
            worker.close()
        for op in TRAINED:
            peaks = results[op]["peak_bytes"] = {}
            for side, command in commands.items():
                worker = Worker(command, MALLOC_MMAP_THRESHOLD_="65536")
                peaks[side] = int(worker.ask("memory", op))
                worker.close()
    return results


def report(args, results):
    m = args.branches * args.batch * args.tokens
    product = 2 * m * args.in_features * args.out_features
    frozen = results["frozen"]["quartiles_ms"]
    print(f"{args.branches}x{args.batch} samples x {args.tokens} tokens, {args.in_features} -> {args.out_features}, "
          f"rank {args.rank}, f32, {args.threads} threads each, {args.rounds} rounds, medians [quartiles]")
    print("GFLOP/s counts the work of the two frozen products only, so that it compares across rows\n")
    print(f"{'forward + backward':18} {'eager ms':>22} {'ours ms':>22} {'ratio':>6} {'GFLOP/s':>10} "
          f"{'x frozen':>11} {'peak MB':>12} {'diff':>8}")
    for op, result in results.items():
        sides = result["quartiles_ms"]
        eager, ours = sides["eager"], sides["ours"]
        result["ratio"] = eager[1] / ours[1]
        result["gflops"] = {side: 2 * product / q[1] / 1e6 for side, q in sides.items()}
        result["times_frozen"] = {side: q[1] / frozen[side][1] for side, q in sides.items()}
        text = [f"{q[1]:8.2f} [{q[0]:.2f}-{q[2]:.2f}]" for q in (eager, ours)]
        pair = lambda key, form, unit=1: "/".join(form.format(v / unit) for v in result[key].values())
        print(f"{op:18} {text[0]:>22} {text[1]:>22} {result['ratio']:6.2f} {pair('gflops', '{:.0f}'):>10} "
              f"{pair('times_frozen', '{:.2f}'):>11} {pair('peak_bytes', '{:.1f}', 1e6):>12} "
              f"{result['relative_difference']:8.1e}")


def cpu_model():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    if sys.argv[1:2] == ["--eager"]:
        names = ["dir", "branches", "batch", "tokens", "in_features", "out_features", "rank", "threads"]
        values = [sys.argv[2], *map(int, sys.argv[3:])]
        return Eager(argparse.Namespace(**dict(zip(names, values, strict=True)))).serve()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--worker", default=str(target / "release/examples/peer_worker"), help="the built example")
    parser.add_argument("--branches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="samples per branch")
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--in-features", type=int, default=768)
    parser.add_argument("--out-features", type=int, default=3072)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    results = measure(args)
    report(args, results)
    about = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "load_before": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "shape": {k: v for k, v in vars(args).items() if k not in ("worker", "out")},
    }
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items() if k != "shape"))
    if args.out:
        path = pathlib.Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
