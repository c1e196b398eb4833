"""Runs files of tests one after another, each in a process of its own that is forked from this one, which has loaded PyTorch and timm:
to load them takes longer than most files do.

Reads lines, a file of tests, a tab, and a file for what pytest says; when the tests have ended, writes pytest's exit status. `pace_torch` is not
loaded here, for its library would be one that was forked.
"""

import os
import sys

import pytest
import timm  # noqa: F401
import torch  # noqa: F401


def run(file, log):
    """Never returns."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for old, new in (os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2):
        os.dup2(old, new)
    # `-rs` tells why tests were skipped.
    sys.exit(pytest.main(["-q", "-rs", "-p", "no:cacheprovider", file]))


# Processes of `multiprocessing` load this file too.
if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            run(*line.rstrip("\n").split("\t"))
        status = os.waitpid(process, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
