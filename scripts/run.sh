#!/usr/bin/env bash
# Tests and measures the CUDA kernels on device 0, from a folder that scripts/bundle.sh made. Needs an NVIDIA driver only;
# takes compute-sanitizer from PATH and cuBLASLt from LD_LIBRARY_PATH, where they are. Everything that is printed goes to
# results/ too, one file per step, and the benchmark's table as bench.json.
set -uo pipefail
cd "$(dirname "$0")" || exit 1
mkdir -p results

device="$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null | head -1)"
failed=()
# step NAME COMMAND...
step() {
    local name="$1"
    shift
    if ! {
        echo "== $name"
        echo "date: $(date -u +%FT%TZ)"
        echo "device: ${device:-nvidia-smi names none}"
        echo "command: $*"
        "$@"
    } 2>&1 | tee "results/$name.txt"; then
        failed+=("$name")
    fi
}

step plan ./test_cuda_plan
step device ./test_cuda device::
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 ./test_cuda --test-threads=1 device::
    done
else
    step sanitizer echo "skipped: no compute-sanitizer in PATH"
fi
step bench env CRITERION_HOME=results/criterion PACE_BENCH_JSON=results/bench.json ./bench_cuda --bench

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
