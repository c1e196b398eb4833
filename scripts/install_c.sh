#!/usr/bin/env bash
# Builds the C library and installs it: PREFIX/include/pace_kernels.h, PREFIX/lib/libpace_kernels.{so,a} and a pkg-config file.
#
#   scripts/install_c.sh PREFIX            # /usr/local, or any folder
#   scripts/install_c.sh PREFIX FOLDER     # libraries that tests/c_library made in this folder, as tests do
#
# On macOS the shared library is a .dylib. A folder that only root may write to: build into another one first, and copy it.
set -euo pipefail
[ $# -eq 1 ] || [ $# -eq 2 ] || { echo "usage: $0 PREFIX [FOLDER]" >&2; exit 2; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd)
folder=$([ $# -eq 1 ] || (cd "$2" && pwd))
cd "$(dirname "$0")/.."

# The same bytes wherever they are built: no path of this machine is in them. Without a name of its own, programs would remember
# where the library lay when they were linked.
build() {
    local target soname=()
    target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    remap() { printf "'--remap-path-prefix=%s=%s'," "$@"; }
    [ "$(uname)" = Linux ] && soname=("-Clink-arg=-Wl,-soname,libpace_kernels.so")
    # Where cargo put things, from cargo itself. Of two prefixes that fit the last is used.
    cargo --config "build.rustflags=[$(remap "$PWD" pace-kernels "${CARGO_HOME:-$HOME/.cargo}" cargo "$target" target)]" \
        rustc --locked --release --lib --features capi --crate-type cdylib,staticlib \
        --message-format json-render-diagnostics -- ${soname[@]+"${soname[@]}"}
}
if [ -n "$folder" ]; then
    libraries=$(printf '%s\n' "$folder"/libpace_c_library.*)
    [ -e "$folder/libpace_c_library.a" ] || { echo "no libraries in $folder: cargo build --package pace-c-library" >&2; exit 1; }
else
    libraries=$(build | grep -o '"[^"]*/libpace_kernels\.[a-z]*"' | tr -d '"')
fi
static=$(grep '\.a$' <<<"$libraries" | tail -n 1)
shared=$(grep -E '\.(so|dylib)$' <<<"$libraries" | tail -n 1)

mkdir -p "$prefix/include" "$prefix/lib/pkgconfig"
# `install` makes new files: what runs with the old library keeps it.
install -m 644 include/pace_kernels.h "$prefix/include/"
install -m 644 "$static" "$prefix/lib/libpace_kernels.a"
install -m 755 "$shared" "$prefix/lib/libpace_kernels.${shared##*.}"
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
