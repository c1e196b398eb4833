#!/usr/bin/env bash
# Tests and measures the CUDA kernels on device 0, from a folder that scripts/bundle.sh made. Needs an NVIDIA driver only; takes
# compute-sanitizer from PATH, cuBLASLt from LD_LIBRARY_PATH or PyTorch's packages, and torch, timm, peft and pytest from python3, where
# they are. Everything that is printed goes to results/ too, one file per step, and the benchmark's table as bench.json.
set -uo pipefail
cd "$(dirname "$0")" || exit 1
mkdir -p results

# cuBLASLt of PyTorch's packages, where the loader knows no other.
libraries="$(python3 -c 'import glob, site
folders = site.getsitepackages() + [site.getusersitepackages()]
print(":".join({p.rsplit("/", 1)[0] for f in folders for p in glob.glob(f + "/nvidia/**/libcublasLt.so.*", recursive=True)}))' \
    2>/dev/null)"
[ -z "$libraries" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"

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

# First, because they decide the design of kernels: what a Hopper GPU's units do. Two minutes at most.
case "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)" in
    9.0) step hopper env -u OUT timeout -k 5 120 ./hopper/run.sh ;;
    *) step hopper echo "skipped: no device of compute capability 9.0" ;;
esac
step device ./test_cuda device::
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 ./test_cuda --test-threads=1 device::
    done
else
    step sanitizer echo "skipped: no compute-sanitizer in PATH"
fi
export PACE_KERNELS_LIBRARY="$PWD/libpace_kernels.so" PYTHONPATH="$PWD/repository/python/src"
# pytorch MODULES NAME COMMAND...: a step, if python3 has the modules
pytorch() {
    local modules="$1" name="$2"
    shift 2
    if python3 -c "import $modules" 2>/dev/null; then
        step "$name" "$@"
    else
        step "$name" echo "skipped: python3 cannot import $modules"
    fi
}
pytorch "torch, timm, safetensors, pytest" pytorch python3 -m pytest -q -rs repository/python/tests
pytorch "torch, numpy" effective_weights python3 repository/benches/peers/effective_weights.py
pytorch "torch, timm, numpy" peers \
    python3 repository/benches/peers/peers.py --device cuda --out results/peers.json --chart results/peers.svg
step bench env CRITERION_HOME=results/criterion PACE_BENCH_JSON=results/bench.json ./bench_cuda --bench

[ -n "$device" ] || echo "nvidia-smi names no device: probably nothing ran on one"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
