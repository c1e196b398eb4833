"""Where the time of a training step of ViT-B goes: the device's kernels, by name, of one step on a CUDA device.

    python benches/peers/profile_step.py [--operator step_lora_mul_vpt] [--peer REGEX] [--dtype bf16]

Peers are those of `peers.py`. One step is profiled after a few others. Time between kernels is the difference of `from first to
last` and `kernels`.
"""

import argparse
import collections
import re

import cases
import runners
import step_case
import torch
from torch.profiler import ProfilerActivity, profile


def kernels(peer):
    """(name, begin, end) in µs of every kernel, copy and fill of one step."""
    for _ in range(4):
        peer.times()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        peer.times()
        torch.cuda.synchronize()
    return [(event.name, event.time_range.start, event.time_range.end) for event in profiled.events()
            if event.device_type == torch.autograd.DeviceType.CUDA]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", choices=step_case.ADAPTERS, default=step_case.STEP_MUL)
    parser.add_argument("--peer", type=re.compile, default=re.compile("as a graph"))
    parser.add_argument("--dtype", choices=runners.DTYPES, default="bf16")
    parser.add_argument("--top", type=int, default=45)
    args = parser.parse_args()
    runners.set_precision(args.dtype)
    case = step_case.StepCase(cases.SHAPES["vit_b_step"], args.dtype, "cuda", cases.SHAPES["vit_b_step"].batch, 8, None)
    for name, build in case.operators[args.operator].items():
        if not args.peer.search(name):
            continue
        try:
            found = kernels(build())
        except runners.Unavailable as why:
            print(f"{name}: {why}")
            continue
        # Annotations of the profiler span kernels; they are none.
        found = [event for event in found if not event[0].startswith(("Optimizer.", "ProfilerStep"))]
        sums, counts = collections.Counter(), collections.Counter()
        for kernel, begin, end in found:
            sums[kernel] += end - begin
            counts[kernel] += 1
        span = max(end for _, _, end in found) - min(begin for _, begin, _ in found)
        print(f"## {args.operator}, {args.dtype}, {name}: {len(found)} kernels {sum(sums.values()) / 1e3:.2f} ms, "
              f"from first to last {span / 1e3:.2f} ms")
        for kernel, us in sums.most_common(args.top):
            print(f"  {us / 1e3:8.3f} ms {counts[kernel]:5d} x {us / counts[kernel]:8.1f} us  {kernel[:110]}")


if __name__ == "__main__":
    main()
