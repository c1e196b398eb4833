"""Random calls of the operators and damaged files: the short form of `fuzz.py`. PACE_FUZZ_CALLS says how many."""

import os

import fuzz
import pytest


def test_operators_with_anything_as_arguments():
    seen = fuzz.fuzz_ops(int(os.environ.get("PACE_FUZZ_CALLS", 600)), seed=1)
    assert seen["taken"] > 0 and seen["refused"] > 0


def test_files_with_anything_in_them():
    pytest.importorskip("peft")
    seen = fuzz.fuzz_files(int(os.environ.get("PACE_FUZZ_CALLS", 60)), seed=1)
    assert len(seen) == 4, seen
