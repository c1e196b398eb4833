#!/usr/bin/env bash
# Random calls of the PyTorch operators and of the C library, and damaged files, in their long forms:
#
#     scripts/fuzz.sh [CALLS]      by default 100000 of each; files are a thirtieth of it
#
# PACE_PYTHON names a Python with torch, peft and what train.py imports; PACE_KERNELS_LIBRARY names the C library. A crash of a process is a failure.
set -euo pipefail

calls="${1:-100000}"
cd "$(dirname "$0")/../python"
export PYTHONPATH=src RAYON_NUM_THREADS=1 OMP_NUM_THREADS=1
for seed in 1 2 3 4; do
    "${PACE_PYTHON:-python3}" tests/fuzz.py ops $((calls / 4)) "$seed"
done
"${PACE_PYTHON:-python3}" tests/fuzz_abi.py "$calls" 5
"${PACE_PYTHON:-python3}" tests/fuzz.py files $((calls / 30)) 6
