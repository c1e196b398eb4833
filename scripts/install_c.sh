#!/usr/bin/env bash
# Builds the C library and installs it: PREFIX/include/pace_kernels.h, PREFIX/lib/libpace_kernels.{so,a} and a pkg-config file.
#
#   scripts/install_c.sh PREFIX            # /usr/local, or any folder
#
# PROFILE (release) is the cargo profile. On macOS the shared library is a .dylib. A folder that only root may write to: build
# into another one first, and copy it.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 PREFIX" >&2; exit 2; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
# Without a name of its own, programs would remember where the library lay when they were linked.
soname=()
[ "$(uname)" = Linux ] && soname=("-Clink-arg=-Wl,-soname,libpace_kernels.so")
# The same bytes wherever they are built: no path of this machine is in them. Not while developing, for dependencies would be
# compiled once more.
paths=()
if [ "$profile" = release ]; then
    target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    remap() { printf "'--remap-path-prefix=%s=%s'," "$@"; }
    # The last one that fits is used.
    paths=(--config "build.rustflags=[$(remap "$PWD" pace-kernels "${CARGO_HOME:-$HOME/.cargo}" cargo "$target" target)]")
fi
# Where cargo put things, from cargo itself; and what a static library needs besides itself.
messages=$(cargo ${paths[@]+"${paths[@]}"} rustc --locked --profile "$profile" --lib --features capi --crate-type cdylib,staticlib \
    --message-format json-render-diagnostics -- ${soname[@]+"${soname[@]}"})
library() { grep -o "\"[^\"]*/libpace_kernels\.$1\"" <<<"$messages" | tail -n 1 | tr -d '"'; }
static=$(library a)
shared=$(library so || library dylib)

mkdir -p "$prefix/include" "$prefix/lib/pkgconfig"
# `install` makes new files: what runs with the old library keeps it.
install -m 644 include/pace_kernels.h "$prefix/include/"
install -m 644 "$static" "$prefix/lib/"
install -m 755 "$shared" "$prefix/lib/"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
cat >"$prefix/lib/pkgconfig/pace-kernels.pc" <<PC
prefix=$prefix
includedir=\${prefix}/include
libdir=\${prefix}/lib

Name: pace-kernels
Description: Fused operators for PACE, on the CPU and on CUDA
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -lpace_kernels
Libs.private: -lm -lpthread -ldl
PC
echo "installed pace-kernels $version in $prefix"
