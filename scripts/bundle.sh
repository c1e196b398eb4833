#!/usr/bin/env bash
# Builds a folder that tests and measures the CUDA kernels and the PyTorch package on a machine with an NVIDIA driver and no
# Rust:
#
#     scripts/bundle.sh [FOLDER]      by default cuda-bundle in cargo's target folder
#
# and packs it into FOLDER.tar.gz.
#
# There, ./run.sh does it all, ./run.sh PART... some of it. It has to have Linux on the same kind of processor, and a C library at least as
# new as this machine's.
set -euo pipefail

# Of the archive: small enough for any way of copying it.
limit_mib=60

repository="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(realpath -m "${1:-${CARGO_TARGET_DIR:-$repository/target}/cuda-bundle}")"
cd "$repository"

# Without kernels there is nothing to bundle: no nvcc is an error here.
export PACE_REQUIRE_NVCC=1
# `KIND_NAME PATH` of each executable, from cargo's messages.
artifact='.*"target":{"kind":\["\(test\|bench\)"\][^}]*"name":"\([a-z_]*\)".*"executable":"\([^"]*\)".*'
executables() {
    if ! cargo "$@" --locked --no-run --message-format=json-render-diagnostics \
        | sed -n "s/$artifact/\1_\2 \3/p"; then
        echo "bundle.sh: the build failed, see above; the kernels need nvcc (CUDA_HOME, see README.md)" >&2
        return 1
    fi
}
tests="$(executables test --release --test cuda)"
bench="$(executables bench --bench cuda)"

library="$(cargo rustc --locked --release --lib --features capi --crate-type cdylib \
    --message-format=json-render-diagnostics | grep -o '"[^"]*/libpace_kernels\.so"' | tail -n 1 | tr -d '"')"

mkdir -p "$folder"
while read -r name executable; do
    strip -o "$folder/$name" "$executable"
done <<<"$tests"$'\n'"$bench"
strip -o "$folder/libpace_kernels.so" "$library"
cp scripts/run.sh "$folder/run.sh"
# The probes of Hopper GPUs and the sweep, compiled here; sources too, for a machine where the programs do not start.
rm -rf "$folder/hopper" && mkdir "$folder/hopper"
cp benches/hopper/*.cu benches/hopper/*.cuh benches/hopper/run.sh benches/hopper/README.md "$folder/hopper/"
git ls-files -z kernels | tar --null -T - -cf - | tar -xf - -C "$folder/hopper"
PROBE_BIN="$folder/hopper/bin" benches/hopper/run.sh --build
strip "$folder"/hopper/bin/*
# What the PyTorch package's tests and the side-by-side benchmark read, at the same places as here.
rm -rf "$folder/repository" && mkdir "$folder/repository"
git ls-files -z python 'benches/peers/*.py' tests/golden include \
    | tar --null -T - -cf - | tar -xf - -C "$folder/repository"

# As it travels. Each program holds all kernels, so that packing saves more than half.
archive="$folder.tar.gz"
tar -czf "$archive" -C "$(dirname "$folder")" "$(basename "$folder")"
mib=$(( ($(stat -c %s "$archive") + (1 << 20) - 1) >> 20 ))
echo "$archive: $mib MiB"
if [ "$mib" -gt "$limit_mib" ]; then
    echo "bundle.sh: more than $limit_mib MiB" >&2
    exit 1
fi
