#!/usr/bin/env bash
# Builds the C library and installs it: PREFIX/include/pace_kernels.h, PREFIX/lib/libpace_kernels.{so,a} and a pkg-config file.
#
#   scripts/install_c.sh PREFIX            # /usr/local, or any folder
#
# PROFILE (release) is the cargo profile. On macOS the shared library is a .dylib.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 PREFIX" >&2; exit 2; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
# Where cargo put things, from cargo itself; and what a static library needs besides itself.
messages=$(cargo rustc --locked --profile "$profile" --lib --features capi --crate-type cdylib,staticlib \
    --message-format json-render-diagnostics)
library() { grep -o "\"[^\"]*/libpace_kernels\.$1\"" <<<"$messages" | tail -n 1 | tr -d '"'; }
static=$(library a)
shared=$(library so || library dylib)

mkdir -p "$prefix/include" "$prefix/lib/pkgconfig"
cp include/pace_kernels.h "$prefix/include/"
cp "$static" "$shared" "$prefix/lib/"
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
