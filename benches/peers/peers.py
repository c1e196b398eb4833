"""PACE's layers, loss and training step: the official formulas, other libraries and this crate, side by side.

    pip install torch timm peft numpy matplotlib ./python
    cargo build --release --example peer_worker
    python benches/peers/peers.py --out results/peers.json --chart results/peers.svg

First every peer's outputs and gradients, with the same inputs and the same noise, are compared with the official
formulas in f64: f32 to 1e-4 of the largest value, bf16 to twice the error of the official formulas in bf16 (or one
rounding, 2⁻⁸, where that is more). What disagrees is not timed, and the exit status is 1. Then all peers of an
operator take turns, one iteration each per round, so that a noisy machine disturbs all alike. An iteration is what a
training step does: draw noise, forward, backward; outputs and gradients are newly allocated. On CUDA, times are the
device's own, between events.

Peak memory is that of one iteration less what was held before it: outputs, gradients and scratch, but not inputs. On a
CPU it is the kernel's own figure (VmHWM), taken in fresh processes whose allocator returns freed blocks at once; on
CUDA that of PyTorch's allocator. Bytes per output element are not measured but counted, from the formula and each
peer's sequence of kernels: `TRAFFIC` in `layer_case.py` says how.

The Rust worker is a process of its own (`worker.rs`); everything else runs in this one. PyTorch's idle OpenMP threads
are made to sleep at once (`OMP_WAIT_POLICY=PASSIVE`), or they would spin for milliseconds on the cores of whoever
comes next.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time

# Read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cases
import layer_case
import loss_case
import numpy as np
import runners
import step_case
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSES = ["forward", "backward", "both"]
# One rounding of a 16-bit type or of TF32, relative to the largest value.
ROUNDING = {"tf32": 2**-11, "bf16": 2**-8}
TITLES = {
    layer_case.FROZEN: "frozen layer",
    layer_case.LORA_ADD: "LoRA add",
    layer_case.LORA_MUL: "LoRA mul + VPT add",
    step_case.STEP_ADD: "training step, LoRA add",
    step_case.STEP_MUL: "training step, LoRA mul + VPT add",
}
COLOURS = {
    "torch": "#b0b0b0",
    runners.EAGER: "#707070",
    runners.COMPILED: "#a8a8a8",
    runners.REDUCED: "#c4c4c4",
    runners.COMPILED_GRAPH: "#dadada",
    runners.PEFT: "#d9a441",
    step_case.PEFT_ONE: "#ecd3a0",
    step_case.PEFT_TWO: "#d9a441",
    loss_case.CROSS_ENTROPY: "#c98b8b",
    loss_case.LIGER: "#9c4f4f",
    runners.OURS: "#1f6fb4",
    runners.OURS_COMPILED: "#3f88c6",
    runners.CAPTURED: "#58a0d8",
    runners.OURS_COMPILED_GRAPH: "#8cc1ea",
    runners.RUST: "#0b3c66",
}


def errors(outputs, reference):
    """Largest difference of each output, relative to the largest value of that output."""
    found = {}
    for name, expected in reference.items():
        value = outputs[name].to(expected).view_as(expected)
        found[name] = float((value - expected).abs().max() / expected.abs().max())
    return found


def prepare(case, op, peers, rows, args, save):
    """Compares each peer with the reference, and runs it with noise of its own: what a peer compiles or captures it has then.
    Removes peers that disagree, that fail, or for which no time is left. Returns the largest error of each.

    With a limit of time each row has a `preview` at once, of three runs alone, and is saved: whoever stops the program while
    a peer compiles keeps those before it."""
    worst, unfused = {}, {}
    references = {noisy: case.reference(op, noisy) for noisy in {peer.noisy for peer in peers.values()}}
    for name, peer in [*peers.items()]:
        if time.monotonic() > args.begin + 0.8 * args.seconds:
            rows[name]["unavailable"] = "no time left, see --seconds"
            del peers[name]
            continue
        reference = references[peer.noisy]
        try:
            if reference is not None:
                found = errors(peer.outputs(case.z), reference)
                worst[name] = max(found.values())
                # The first peer of a kind is the unfused one.
                disagree(case.dtype, found, unfused.setdefault(peer.noisy, found))
            peer.times()
            if args.seconds < float("inf"):
                alone = np.median([[*seconds, sum(seconds)] for seconds in (peer.times() for _ in range(3))], axis=0)
                rows[name]["preview_ms"] = dict(zip(PASSES, (alone * 1e3).tolist()))
                print(f"    {name:32} alone {rows[name]['preview_ms']['both']:.3f} ms", flush=True)
                save(rows)
        except Exception as error:
            # On a device that is at hand rarely the other peers are to go on, whatever is wrong with one.
            rows[name]["wrong"] = failure(error)
            del peers[name]
    return worst


class Disagrees(Exception):
    pass


def disagree(dtype, found, unfused):
    """Raises an error if errors are larger than they may be."""
    for output, error in found.items():
        limit = 1e-4 if dtype == "f32" else max(2 * unfused[output], ROUNDING[dtype])
        if not error <= limit:
            raise Disagrees(f"`{output}` is off by {error:.1e}, allowed are {limit:.1e}")


def failure(error):
    text = next(iter(str(error).splitlines()), "")[:200]
    return f"DISAGREES: {text}" if isinstance(error, Disagrees) else f"FAILED: {type(error).__name__}: {text}"


def measure(case, op, args, save):
    """Rows of an operator: peer -> figures, or why there are none."""
    rows, peers = {}, {}
    for name, build in case.operators[op].items():
        if not args.peers.search(name):
            continue
        rows[name] = {"variant": runners.VARIANTS[name]} if name in runners.VARIANTS else {}
        try:
            peers[name] = build()
        except runners.Unavailable as reason:
            rows[name]["unavailable"] = str(reason)
        except Exception as error:
            rows[name]["wrong"] = failure(error)
    worst = prepare(case, op, peers, rows, args, save)
    times = {name: [] for name in peers}
    warm_up = 2 if case.device == "cpu" else 5
    for turn in range(args.rounds + warm_up):
        if turn >= warm_up + 3 and time.monotonic() > args.begin + args.seconds:
            break
        for name in [*peers] if turn % 2 == 0 else [*reversed(peers)]:
            if case.device == "cpu":
                # Let the others' threads fall asleep.
                time.sleep(0.02)
            try:
                seconds = peers[name].times()
            except Exception as error:
                rows[name]["wrong"] = failure(error)
                del peers[name]
                continue
            if turn >= warm_up:
                times[name].append([*seconds, sum(seconds)])
    for name, peer in peers.items():
        quartiles = np.percentile(np.array(times[name]) * 1e3, [25, 50, 75], axis=0)
        rows[name]["quartiles_ms"] = {part: quartiles[:, i].tolist() for i, part in enumerate(PASSES)}
        rows[name]["error"] = worst.get(name)
        rows[name]["bytes_per_output"] = case.bytes_per_output(op, name)
        if isinstance(peer, runners.RustPeer) or (case.device == "cuda" and peer.has_peak):
            rows[name]["peak_bytes"] = peer.peak()
    peers.clear()
    return rows


def fresh_peaks(shape, dtype, op, rows, args):
    """Peak memory of the peers of this process, each in a process of its own."""
    for peer, row in rows.items():
        if "quartiles_ms" in row and "peak_bytes" not in row:
            request = [shape, dtype, op, peer, str(args.batch or 0), str(args.threads), args.worker]
            answer = subprocess.run(
                [sys.executable, __file__, "--peak", *request],
                env={**os.environ, **runners.RETURN_FREED_BLOCKS},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row["peak_bytes"] = int(answer.stdout)


def peak(shape, dtype, op, peer, batch, threads, worker):
    set_threads(int(threads))
    case = cases.build(shape, dtype, "cpu", int(batch), int(threads), worker)
    print(case.operators[op][peer]().peak())


def set_threads(number):
    torch.set_num_threads(number)
    # Read by this crate's library when it is loaded, and by the worker.
    os.environ["RAYON_NUM_THREADS"] = str(number)


def ratios(rows):
    """How many times faster than the first row a row is."""
    baseline = next(iter(rows.values()), {}).get("quartiles_ms")
    for row in rows.values():
        if baseline and "quartiles_ms" in row:
            row["ratio"] = {part: baseline[part][1] / row["quartiles_ms"][part][1] for part in PASSES}


def report(op, rows):
    print(f"  {TITLES.get(op, op):34} {'forward':>9} {'backward':>9} {'both, ms [quartiles]':>28} "
          f"{'ratio: fwd':>11} {'bwd':>5} {'both':>5} {'peak MB':>8} {'B/output':>8} {'error':>8}")
    for name, row in rows.items():
        if "quartiles_ms" not in row:
            print(f"    {name:32} {row.get('unavailable') or row['wrong']}")
            continue
        times, ratio = row["quartiles_ms"], row.get("ratio")
        low, median, high = times["both"]
        both = f"{median:.3f} [{low:.3f}-{high:.3f}]"
        fwd, bwd, total = (f"{ratio[part]:.2f}" for part in PASSES) if ratio else "---"
        peak = f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else "-"
        moved = f"{sum(row['bytes_per_output']):.1f}" if row["bytes_per_output"] else "-"
        error = f"{row['error']:.1e}" if row["error"] is not None else "-"
        print(f"    {name:32} {times['forward'][1]:9.3f} {times['backward'][1]:9.3f} {both:>28} {fwd:>11} {bwd:>5} "
              f"{total:>5} {peak:>8} {moved:>8} {error:>8}")


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    return platform.processor()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def chart(path, results, about):
    """Time of forward and backward against the first peer of each operator: a panel per operator and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operators = list(dict.fromkeys(r["operator"] for r in results if len(timed(r)) > 1))
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    groups = {(op, dtype): [r for r in results if (r["operator"], r["dtype"]) == (op, dtype) and len(timed(r)) > 1]
              for op in operators for dtype in dtypes}
    shown = {name for r in results for name in timed(r)}
    names = [name for name in COLOURS if name in shown]
    bars = [max((sum(len(timed(r)) + 1 for r in groups[op, dtype]) for dtype in dtypes), default=1) for op in operators]
    figure, axes = plt.subplots(
        len(operators), len(dtypes), squeeze=False,
        figsize=(7.5 * len(dtypes), 1.6 + sum(0.22 * n + 0.9 for n in bars)),
        gridspec_kw={"height_ratios": bars}, layout="constrained",
    )
    for (op, dtype), axis in zip(groups, axes.flat):
        place, ticks = 0, []
        for result in groups[op, dtype]:
            rows = timed(result)
            unit = next(iter(rows.values()))["quartiles_ms"]["both"][1]
            ticks.append((place + (len(rows) - 1) / 2, result["shape"]))
            for name, row in rows.items():
                low, median, high = row["quartiles_ms"]["both"]
                spread = [[(median - low) / unit], [(high - median) / unit]]
                axis.barh(place, median / unit, 0.85, xerr=spread, color=COLOURS[name], ecolor="#444444")
                axis.text(high / unit, place, f"  {milliseconds(median)}", va="center", fontsize=7)
                place += 1
            place += 1
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_title(f"{TITLES.get(op, op)}, {dtype}", fontsize=10)
        axis.set_xlabel(f"time, {next(iter(timed(groups[op, dtype][0])))} = 1" if groups[op, dtype] else "", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"Forward + backward: medians and quartiles; shorter is faster\n{about['machine']}, "
                    f"PyTorch {about['versions']['torch']}, {about['date']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def milliseconds(value):
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1e3:.3g} s"


def timed(result):
    return {name: row for name, row in result["rows"].items() if "quartiles_ms" in row}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

    def names(allowed):
        def parse(text):
            for name in text.split(","):
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"no {name!r} among {', '.join(allowed)}")
            return text.split(",")

        return parse

    dtypes = [*runners.DTYPES]
    parser.add_argument("--shapes", type=names([*cases.SHAPES]), help=", ".join(cases.SHAPES))
    parser.add_argument("--dtypes", type=names(dtypes), help=", ".join(dtypes))
    parser.add_argument("--operators", type=names([*TITLES, "loss"]), help=", ".join([*TITLES, "loss"]))
    parser.add_argument("--peers", type=re.compile, default="", metavar="REGEX",
                        help="only peers with such a name; the first is the unit of ratios and of errors")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, help="21 by default")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="after 8/10 of them no peer begins any more, after all of them an operator has 3 rounds")
    parser.add_argument("--batch", type=int, help="samples per branch; by default each shape's own, fewer on a CPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", default=str(target / "release/examples/peer_worker"), help="the built Rust example")
    parser.add_argument("--quick", action="store_true",
                        help="a layer, a loss and a small model in f32, 3 rounds, where nothing else is said")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    parser.add_argument("--chart", type=pathlib.Path, help="draw the times: .png or .svg")
    args = parser.parse_args()
    args.begin = time.monotonic()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        shapes, dtypes, rounds = ["vit_b_proj", "loss_100", "vit_tiny_step"], ["f32"], 3
    else:
        shapes, rounds = [name for name in cases.SHAPES if name != "vit_tiny_step"], 21
        dtypes = ["f32", "bf16"] if args.device == "cpu" else dtypes
    args.shapes, args.dtypes, args.rounds = args.shapes or shapes, args.dtypes or dtypes, args.rounds or rounds
    return args


def main():
    if sys.argv[1:2] == ["--peak"]:
        return peak(*sys.argv[2:])
    args = arguments()
    set_threads(args.threads)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device),
        "device": args.device,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "timm", "peft", "liger_kernel", "pace-torch", "numpy")},
    }
    print(f"{about['machine']}, {args.threads} threads, torch {torch.__version__}, load {about['load_before']:.2f}, "
          f"{args.rounds} rounds, ratio: time of the first row / time")
    if args.device == "cpu" and not args.batch:
        print("on a CPU the batches are smaller than on CUDA, unless --batch says otherwise")
    results = []

    def save(*unfinished):
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"about": about, "results": [*results, *unfinished]}, indent=2) + "\n")

    def report_and_save(op, rows):
        report(op, rows)
        sys.stdout.flush()
        save()

    for name in args.shapes:
        for dtype in args.dtypes:
            if why := cases.unfit(name, dtype, args.device):
                print(f"\n{name}, {dtype}: skipped, {why}")
                continue
            case = cases.build(name, dtype, args.device, args.batch, args.threads, args.worker)
            title = case.title
            print(f"\n{name}: {title}", flush=True)
            measured = {}
            for op in case.operators:
                if args.operators and op not in args.operators:
                    continue
                about_op = {"shape": name, "title": title, "dtype": dtype, "operator": op}
                rows = measured[op] = measure(case, op, args, lambda rows, of=about_op: save({**of, "rows": rows}))
                ratios(rows)
                results.append({**about_op, "rows": rows})
                if args.device == "cpu":
                    save()
                else:
                    report_and_save(op, rows)
            del case
            if args.device == "cpu":
                for op, rows in measured.items():
                    fresh_peaks(name, dtype, op, rows, args)
                    report_and_save(op, rows)
    failed = any("wrong" in row for result in results for row in result["rows"].values())
    if args.chart:
        chart(args.chart, results, about)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
