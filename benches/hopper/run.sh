#!/usr/bin/env bash
# Probes of a Hopper GPU (compute capability 9.0) for the kernels with wgmma and TMA; see README.md.
#
# Takes the programs from bin/ where they are and start, and compiles them otherwise (nvcc from NVCC, CUDA_HOME, PATH or
# /usr/local/cuda; ptxas from PACE_PTXAS, if that is set). Each probe is a process of its own with a time limit; a failed one does not stop the others. Writes
# hopper.txt (all that is printed) and hopper.jsonl (one result a line) to $OUT, or to results/hopper in the current folder,
# as it goes, and prints a short summary last. The sweep writes sweep.txt and sweep.jsonl instead.
#
#     run.sh             probes
#     run.sh sweep       every variant of the kernels of sm90 beside cuBLAS; LIMIT is its seconds (150)
#     run.sh --build     only compiles, to bin/ (or the folder in PROBE_BIN)
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${OUT:-$PWD/results}"
[ -n "${OUT:-}" ] || out="$out/hopper"
bin="${PROBE_BIN:-$here/bin}"
probes=(descriptors tma multicast rates conversion mainloop)
# Seconds for each probe; all of them take a few.
limit=20
name=hopper
programs=("${probes[@]}")
case "${1:-}" in
    --build) programs+=(sweep) ;;
    sweep) probes=(sweep) programs=(sweep) limit="${LIMIT:-150}" name=sweep ;;
esac
# The sweep is made of the kernels themselves: of the repository, or of the bundle.
kernels="$here/../../kernels"
[ -d "$kernels" ] || kernels="$here/kernels"

find_nvcc() {
    local home
    [ -n "${NVCC:-}" ] && echo "$NVCC" && return
    for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}"; do
        [ -n "$home" ] && [ -x "$home/bin/nvcc" ] && echo "$home/bin/nvcc" && return
    done
    command -v nvcc || { [ -x /usr/local/cuda/bin/nvcc ] && echo /usr/local/cuda/bin/nvcc; }
}

# compile NVCC ARGUMENT...: with the assembler that PACE_PTXAS names, as the crate's own kernels for Hopper, if it is set
compile() {
    if [ -z "${PACE_PTXAS:-}" ]; then
        "$@"
        return
    fi
    local commands temporary status=0
    temporary="$(mktemp -d)"
    commands="$(TMPDIR="$temporary" "$1" --dryrun "${@:2}" 2>&1)" || { echo "$commands"; return 1; }
    # Commands have their include folders already; those lines are no assignments of a shell.
    sed -n 's/^#\$ //p' <<<"$commands" | sed -E "/^[A-Z_]*(INCLUDES|LIBRARIES)=/d; s/^rm /rm -f /; s#^\"?ptxas\"? #\"$PACE_PTXAS\" #" | bash -e || status=1
    rm -rf "$temporary"
    return $status
}

# Compiles all at once; fails if one fails, or if ptxas says that it serialises wgmmas.
build() {
    local nvcc log folder="$1" failed=0 probe process
    nvcc="$(find_nvcc)" || { echo "no nvcc: set CUDA_HOME" >&2; return 1; }
    mkdir -p "$folder"
    local options=(-std=c++17 -O3 -gencode "arch=compute_90a,code=sm_90a" -I "$kernels" -Xcompiler "-Wall,-Wextra")
    # Toolkits from Python packages keep their libraries in lib.
    local library
    library="$(dirname "$(dirname "$nvcc")")/lib"
    [ -d "$library" ] && options+=(-L "$library")
    local processes=()
    for probe in "${programs[@]}"; do
        compile "$nvcc" "${options[@]}" -o "$folder/$probe" "$here/$probe.cu" >"$folder/$probe.log" 2>&1 &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        wait "$process" || failed=1
    done
    for probe in "${programs[@]}"; do
        log="$folder/$probe.log"
        [ ! -s "$log" ] || cat "$log"
        if grep -q "Potential Performance Loss" "$log"; then
            echo "$probe: wgmmas are serialised: its rates say nothing"
            failed=1
        fi
        rm -f "$log"
    done
    return $failed
}

if [ "${1:-}" = --build ]; then
    build "$bin"
    exit
fi

mkdir -p "$out"
export PROBE_JSON="$out/$name.jsonl"
: >"$PROBE_JSON"
report="$out/$name.txt"
: >"$report"
begin=$SECONDS
{
    echo "date: $(date -u +%FT%TZ)"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu \
        --format=csv 2>&1 || echo "no nvidia-smi"
} | tee -a "$report"

# Those that were compiled elsewhere serve where they start: a program says so without touching the device.
if ! "$bin/${probes[0]}" --starts >/dev/null 2>&1; then
    bin="$out/../hopper-bin"
    [ -z "${OUT:-}" ] || bin="$(mktemp -d)"
    echo "compiling ..." | tee -a "$report"
    build "$bin" 2>&1 | tee -a "$report"
    echo "compiled in $((SECONDS - begin)) s" | tee -a "$report"
fi

for probe in "${probes[@]}"; do
    echo "== $probe" | tee -a "$report"
    if [ ! -x "$bin/$probe" ]; then
        echo "FAIL $probe was not compiled" | tee -a "$report"
        continue
    fi
    timeout -k 2 "$limit" "$bin/$probe" 2>&1 | tee -a "$report"
    status=${PIPESTATUS[0]}
    case $status in
        0 | 1 | 2) ;; # the probe has said itself what failed
        124 | 137) echo "FAIL $probe: more than $limit s, stopped" | tee -a "$report" ;;
        *) echo "FAIL $probe: ended with status $status" | tee -a "$report" ;;
    esac
done
nvidia-smi --query-gpu=clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active --format=csv 2>&1 | tee -a "$report"

passed=$(grep -c "^PASS" "$report")
failed=$(grep -c "^FAIL" "$report")
{
    echo
    echo "== summary: $passed facts hold, $failed do not, $((SECONDS - begin)) s; all of it in $report"
    grep "^FAIL" "$report" | head -n 30
    grep -E "^\|" "$report"
} >"$out/summary.tmp"
cat "$out/summary.tmp" | tee -a "$report"
rm -f "$out/summary.tmp"
[ "$failed" -eq 0 ]
