#!/usr/bin/env bash
# What the crate is made of, and that what is delivered can be built by others: the same bytes, without network or repository.
#
#   scripts/supply_chain.sh [STEP...]      all steps, or these
#
# A table at the end says how each step ended. PACE_PYTHON, or python3, is the Python; the wheel needs torch and timm there.
# Steps are called by their names.
# shellcheck disable=SC2317,SC2329
set -euo pipefail
cd "$(dirname "$0")/.."

steps=(licences advisories msrv minimal_versions package wheel offline reproducible semver)
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
python="${PACE_PYTHON:-python3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The kernels would take minutes to compile each time, and nvcc is not of this crate.
unset NVCC CUDA_HOME CUDA_PATH PACE_REQUIRE_NVCC

skip() {
    echo "skipped: $*" | tee "$work/why"
    exit 1
}

# The repository's files as they are now, in a new folder.
copy() {
    mkdir -p "$1"
    git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$1"
}

have_deny() { cargo deny --version >/dev/null 2>&1 || skip "no cargo-deny (cargo install cargo-deny --locked)"; }

# deny.toml says what is allowed.
licences() {
    have_deny
    cargo deny --workspace check -s licenses bans sources
}

advisories() {
    have_deny
    if cargo deny fetch db; then
        cargo deny --workspace check advisories
    elif compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/advisory-db-*" >/dev/null; then
        echo "no new data can be fetched: with what was fetched last"
        cargo deny --workspace --offline check advisories
    else
        skip "the RustSec database cannot be fetched"
    fi
}

# That of all dependencies, and of the standard library's functions; where there is that compiler, what it says.
msrv() {
    local version
    version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    cargo metadata --locked --format-version 1 | python3 -c '
import json, sys
number = lambda version: [int(part) for part in version.split(".")]
packages = json.load(sys.stdin)["packages"]
newer = [f"{p['"'name'"']} {p['"'version'"']} needs Rust {p['"'rust_version'"']}"
         for p in packages if number(p["rust_version"] or "1")[:2] > number(sys.argv[1])]
print(len(packages), "packages")
sys.exit("\n".join(newer))' "$version"
    # Its lint `incompatible_msrv` is on.
    cargo clippy --locked -p pace-kernels --lib --features capi -- -D warnings
    if rustup toolchain list 2>/dev/null | grep -q "^$version"; then
        cargo "+$version" check --locked -p pace-kernels --lib --features capi
    else
        echo "Rust $version itself is not here"
    fi
}

# The oldest versions that Cargo.toml allows, of what the library itself names.
minimal_versions() {
    cargo +nightly --version >/dev/null 2>&1 || skip "no nightly toolchain"
    copy "$work/minimal"
    cd "$work/minimal"
    awk '/^\[/ { keep = !/^\[(workspace\]|dev-dependencies\]|\[)/ } keep' Cargo.toml >"$work/manifest"
    mv "$work/manifest" Cargo.toml
    rm Cargo.lock
    cargo +nightly update -Z direct-minimal-versions
    cargo check --locked --lib --features capi,candle
}

# The .crate, built and tested where nothing else is.
package() {
    copy "$work/packaging"
    (cd "$work/packaging" && CARGO_TARGET_DIR="$work/packages" cargo package --locked --no-verify -p pace-kernels)
    rm -r "$work/packaging"
    tar -xzf "$work"/packages/package/pace-kernels-*.crate -C "$work"
    cd "$work"/pace-kernels-*
    # The repository's tests switch these on by themselves, by a path that a package cannot have.
    cargo test --locked --no-fail-fast --features candle,capi
}

# Built from a copy that is gone when it is installed, in an environment without anything; then a training step.
wheel() {
    "$python" -c 'import torch, timm' 2>/dev/null || skip "$python has no torch and timm; PACE_PYTHON names another Python"
    # Always the same folder: cargo would compile the crate of another one anew.
    local source="$CARGO_TARGET_DIR/wheel_source"
    rm -rf "$source"
    copy "$source"
    "$python" -m pip wheel -q --no-deps -w "$work" "$source/python"
    rm -r "$source"
    local file=("$work"/pace_torch-*.whl)
    # For every Python 3: the library is loaded by ctypes.
    [[ ${file[0]} == *-py3-none-* ]]
    "$python" -m venv --without-pip "$work/venv"
    "$python" -m pip --python "$work/venv/bin/python" install -q --no-deps --no-index "${file[0]}"
    # They take gigabytes: those that are there.
    "$python" -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' >"$("$work/venv/bin/python" -c \
        'import site; print(site.getsitepackages()[0])')/others.pth"
    local problems
    problems=$("$python" -m pip --python "$work/venv/bin/python" check || true)
    if grep '^pace-torch' <<<"$problems"; then return 1; fi
    cd "$work"
    env -u PYTHONPATH -u PACE_KERNELS_LIBRARY "$work/venv/bin/python" - <<'PYTHON'
import timm, torch, pace_torch
model = pace_torch.inject(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3), rank=2)
loss = model.pace.training_step(model, torch.randn(2, 3, 224, 224), torch.tensor([0, 2])).total
loss.backward()
print(f"a training step of {pace_torch.__name__} in {pace_torch.__file__}: loss {loss.item():.3f}")
PYTHON
}

# Dependencies vendored, then no network at all: the library, the C library and the wheel.
offline() {
    unshare -rn true 2>/dev/null || skip "this machine makes no network namespaces (unshare -rn)"
    copy "$work/offline"
    "$python" -m venv "$work/builder"
    "$work/builder/bin/python" -m pip install -q "setuptools>=77" "setuptools-rust>=1.10"
    cd "$work/offline"
    mkdir .cargo
    cargo vendor --locked >.cargo/config.toml
    # Dependencies of another place would take the place of what is built.
    export CARGO_TARGET_DIR="$work/offline_target"
    unshare -rn cargo build --frozen --release --lib
    unshare -rn cargo rustc --frozen --release --lib --features capi --crate-type cdylib,staticlib
    unshare -rn "$work/builder/bin/python" -m pip wheel -q --no-deps --no-index --no-build-isolation -w "$work/offline_wheel" ./python
    ls "$work"/offline_target/release/libpace_kernels.* "$work/offline_wheel"
}

# The C library twice: two folders, two homes of cargo.
reproducible() {
    local n home="${CARGO_HOME:-$HOME/.cargo}"
    for n in one another; do
        copy "$work/$n/folder"
        mkdir "$work/$n/cargo"
        find "$home" -mindepth 1 -maxdepth 1 \( -name registry -o -name 'config*' \) -exec ln -s -t "$work/$n/cargo" {} +
        (
            export CARGO_HOME="$work/$n/cargo" CARGO_TARGET_DIR="$work/$n/target_of_$n"
            "$work/$n/folder/scripts/install_c.sh" "$work/$n/prefix"
        )
        # Programs look for it by this name.
        [ "$(uname)" != Linux ] || grep -q 'SONAME.*\[libpace_kernels.so\]' <<<"$(readelf -d "$work/$n/prefix/lib/libpace_kernels.so")"
        (cd "$work/$n/prefix" && sha256sum include/* lib/libpace_kernels.*) | tee "$work/$n/sums"
    done
    cmp "$work/one/sums" "$work/another/sums"
}

# Public items that were removed or changed since the last release.
semver() {
    local release
    release=$(git tag --list 'v*' --sort=-version:refname | head -n 1)
    [ -n "$release" ] || skip "there is no release to compare with"
    cargo semver-checks --version >/dev/null 2>&1 || skip "no cargo-semver-checks (cargo install cargo-semver-checks --locked)"
    cargo semver-checks --package pace-kernels --baseline-rev "$release"
}

[ $# -gt 0 ] || set -- "${steps[@]}"
for step in "$@"; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "no step $step; there are ${steps[*]}" >&2; exit 2; }
done
failed=0
for step in "$@"; do
    printf '\n== %s\n' "$step"
    rm -f "$work/why"
    started=$SECONDS
    # A process of its own: `set -e` does nothing within a condition.
    set +e
    (set -e; "$step")
    code=$?
    set -e
    result=ok
    if [ -e "$work/why" ]; then
        result=$(<"$work/why")
    elif [ $code -ne 0 ]; then
        result=FAILED failed=1
    fi
    printf '%-18s %6d s  %s\n' "$step" $((SECONDS - started)) "$result" >>"$work/table"
done
echo
cat "$work/table"
exit $failed
