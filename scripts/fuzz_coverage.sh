#!/usr/bin/env bash
# Random calls, plans and files that libFuzzer chooses by the code that they reach:
#
#     scripts/fuzz_coverage.sh [SECONDS] [TARGET...]      by default 600 seconds of each of c_interface, plans and files
#
# Rust's stable compiler and a C++ compiler will do. What reaches new code stays in target/fuzz/corpus and is where the next run begins; an
# input that fails is in target/fuzz/failures, and `target/fuzz/*/release/TARGET FILE` runs it again.
set -euo pipefail

seconds="${1:-600}"
shift $(($# > 0))
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(c_interface plans files)
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="$PWD/target/fuzz"

# Without kernels where that is possible (not if nvcc is in PATH): they take minutes to compile, and nothing here runs them.
unset NVCC CUDA_HOME CUDA_PATH PACE_REQUIRE_NVCC
counters="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
counters+=" -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
# With a target named, build scripts go without.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="$counters" \
    cargo build --locked --release --manifest-path evidence/fuzz/Cargo.toml --target "$host"

# Inputs to begin with: recorded files, and nothing.
recorded=tests/candle/peft/recorded
# Files that are read are in memory where that is possible.
files=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d)
trap 'rm -rf "$files"' EXIT
for target in "${targets[@]}"; do
    corpus="$CARGO_TARGET_DIR/corpus/$target"
    mkdir -p "$corpus" "$CARGO_TARGET_DIR/failures"
    if [ "$target" = files ]; then
        for weights in "$recorded"/*.safetensors "$recorded"/adapter/*.safetensors; do
            { cat "$recorded/adapter/adapter_config.json"; printf '\377'; cat "$weights"; } >"$corpus/$(basename "$weights")"
        done
    fi
    echo "== $target"
    RAYON_NUM_THREADS=1 TMPDIR="$files" "$CARGO_TARGET_DIR/$host/release/$target" "$corpus" -max_total_time="$seconds" -max_len=32768 \
        -timeout=10 -rss_limit_mb=4096 -artifact_prefix="$CARGO_TARGET_DIR/failures/$target-" -print_final_stats=1 2>&1 |
        grep -Ev --line-buffered '^#[0-9]+\s+(NEW|REDUCE|RELOAD)|^INFO:|NEW_FUNC'
done
