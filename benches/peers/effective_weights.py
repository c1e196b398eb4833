"""Is one GEMM with effective weights faster than two GEMMs? LoRA mul in f32 without TF32, one z per sample and channel.

`y = x·W0ᵀ + z⊙(x·ΔWᵀ)` and `dx = g·W0 + (z⊙g)·ΔW`, biases left out, are computed by
    two GEMMs     and, forward, an element-wise epilogue; z⊙g is there already, because the gradient of ΔW needs it
    chunks of c   effective weights `W0 + z⊙ΔW` of c samples in a scratch that all chunks share, then their batched GEMM
    weights of c  the effective weights alone, which are no pass: by PyTorch's kernel, which one of ours may beat
All take turns, on CUDA as graphs. Printed: ms, two GEMMs' ms over it, error against f64. `--small` runs anywhere, for a try.
"""

import statistics
import sys
from functools import partial

import torch
from runners import mark

ROUNDS, WARM_UP = 21, 3


def ways(x, w, d, z, out, forward):
    """Ways to compute a pass, by name: `x [S, T, K]` to `out [S, T, N]`, or g to dx; `w, d [N, K]`, `z [S, 1, N]`."""
    turned = (lambda weight: weight.mT) if forward else (lambda weight: weight)
    flat_x, flat_out, adapter = (t.flatten(0, 1) for t in (x, out, torch.empty_like(out) if forward else x * z))

    def two():
        torch.mm(flat_x, turned(w), out=flat_out)
        if not forward:
            return flat_out.addmm_(adapter, turned(d))
        torch.mm(flat_x, turned(d), out=adapter)
        return out.addcmul_(z, adapter.view_as(out))

    def chunks(c, weights, multiplies):
        for i in range(0, len(x), c):
            torch.addcmul(w, z[i : i + c].mT, d, out=weights)
            if multiplies:
                torch.bmm(x[i : i + c], turned(weights), out=out[i : i + c])

    found = {"two GEMMs": two}
    for c in (c for c in (1, 2, 4, 8, 16) if c <= len(x)):
        found[f"chunks of {c}"] = partial(chunks, c, w.new_empty(c, *w.shape), True)
        found[f"weights of {c}"] = partial(chunks, c, w.new_empty(c, *w.shape), False)
    return found


def compare(x, w, d, z, out, forward):
    x64, w64, d64, z64 = (t.double() for t in (x[:2], w, d, z[:2]))
    expected = x64 @ w64.mT + z64 * (x64 @ d64.mT) if forward else x64 @ w64 + (z64 * x64) @ d64
    runs, errors, turns = ways(x, w, d, z, out, forward), {}, {}
    for name, run in runs.items():
        out.zero_()
        run()  # Libraries choose and allocate.
        errors[name] = ((out[:2] - expected).abs().max() / expected.abs().max()).item()
        if x.is_cuda:
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                run()
            runs[name] = graph.replay
    for turn in range(WARM_UP + ROUNDS):
        for name in [*runs] if turn % 2 == 0 else reversed(runs):
            turns.setdefault(name, []).append((mark(x.device.type), runs[name](), mark(x.device.type)))
    if x.is_cuda:
        torch.cuda.synchronize()
    ms = lambda start, _, end: start.elapsed_time(end) if x.is_cuda else (end - start) * 1e3
    times = {name: statistics.median(ms(*turn) for turn in found[WARM_UP:]) for name, found in turns.items()}
    for name, time in times.items():
        more = "" if "weights" in name else f"{times['two GEMMs'] / time:7.2f}{errors[name]:9.0e}"
        print(f"    {name:14}{time:10.3f}{more}")


small, device = "--small" in sys.argv, "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu" and not small:
    sys.exit("PyTorch finds no CUDA device; --small runs on the CPU")
torch.set_float32_matmul_precision("highest")
print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "PyTorch", torch.__version__, f"{ROUNDS} rounds")
for samples, tokens in [(4, 7)] if small else [(2 * 64, 197), (2 * 64, 50)]:
    for k, n in [(32, 32), (32, 96)] if small else [(768, 768), (768, 3072), (3072, 768)]:
        sizes = (samples, tokens, k), (samples, tokens, n), (n, k), (n, k), (samples, 1, n)
        x, g, w, d, z = (torch.randn(size, device=device) for size in sizes)
        for title, given, wanted in ("forward", x, g), ("dx", g, x):
            print(f"\n{title}: {samples} samples x {tokens} tokens, {k} -> {n}, a weight has {w.nbytes / 2**20:.1f} MiB")
            compare(given, w, d, 1 + z, torch.empty_like(wanted), title == "forward")
