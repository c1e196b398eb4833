"""Structured random calls of the C library between pages that nothing may touch: `python fuzz_abi.py CALLS [SEED]`.

Right calls are those that `fuzz.py` makes of the operators. Of each, copies are made whose tensors end where a page ends, and up to three
arguments are changed. Whatever comes of it, nothing but the tensors is touched and nothing but outputs is written, and those by a call that
succeeds; an error names an argument that is wrong, as in `tests/capi/guarded.rs`.
"""

import ctypes
import pathlib
import random
import re
import sys
import time
from collections import Counter

import fuzz
import torch
from pace_torch import _library as lib
from pace_torch.ops import _arguments

PAGE, PAGES = 1 << 15, 28
# What lies around tensors, in outputs, and in inputs: numbers from 4e-4 to 0.8 in every type.
AROUND, POISON, INPUT = 0xA5, 0xFB, 0x3F
NUMBERS = (0, 1, 2, 3, 7, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 0.5, 1e300, 1e-300)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


_rust = (pathlib.Path(__file__).parents[2] / "tests" / "capi" / "fields.rs").read_text()
# Arguments that are wrong if the first one is; `z` too where noise is said to be given and is not.
FOLLOWERS = dict(re.findall(r'\(\s*"(\w+)",\s*"([^"]+)",?\s*\)', re.search(r"const FOLLOWERS.*?\];", _rust, re.DOTALL)[0]))
FOLLOWERS["kind"] = "z"


def is_explained(message, changed):
    """Whether an error names an argument that is wrong: the first is the culprit; of two that overlap either may be."""
    named = [re.split("[.>]", name.split("[")[0].removesuffix("()").removesuffix(".len"))[-1] for name in message.split("`")[1::2]]
    named = named[: 2 if "overlaps" in message else 1]
    return any(name == one or name in FOLLOWERS.get(one, "").split() for name in named for one in changed)


def guarded_pages():
    """Addresses of pages, each between two that nothing may touch."""
    start = _libc.mmap(None, (2 * PAGES + 1) * PAGE, 0, 0x22, -1, 0)  # PROT_NONE; MAP_PRIVATE | MAP_ANONYMOUS
    pages = [start + (2 * i + 1) * PAGE for i in range(PAGES)]
    assert start != 2**64 - 1 and not any(_libc.mprotect(page, PAGE, 3) for page in pages)  # PROT_READ | PROT_WRITE
    return pages


def fields(struct, offset=0):
    """(name, type, offset) of all fields, those of structs in it too."""
    for name, kind, *_ in struct._fields_:
        at = offset + getattr(struct, name).offset
        if issubclass(kind, ctypes.Structure) and kind is not lib.PaceTensor:
            yield from fields(kind, at)
        else:
            yield name, kind, at


class Abi:
    def __init__(self, calls, seed):
        self.rng, self.left, self.seen, self.pages = random.Random(seed), calls, Counter(), guarded_pages()

    def guard(self, prepared, function):
        """Puts changed calls before those of a function."""
        entry, layout = function.entry, list(fields(function.struct))

        def call(handle, stream, words):
            for _ in range(25):
                self.one_call(entry, layout, function, prepared, bytes(words))
                self.left -= 1
            return entry(handle, stream, words)

        prepared.entry = call

    def one_call(self, entry, layout, function, prepared, right):
        rng, struct, changed = self.rng, bytearray(right), []
        tensors = {}
        for i, (name, kind, at) in enumerate(layout):
            if kind is lib.PaceTensor or name == "key_address":
                address = int.from_bytes(right[at : at + 8], "little")
                length = 1 if name == "key_address" else int.from_bytes(right[at + 8 : at + 16], "little")
                tensors[name] = [address, length, 0, len(tensors) + 1, at]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            name, kind, at = rng.choice(layout)
            changed.append(name)
            if name in tensors:
                place = tensors[name]
                what = rng.randrange(5)
                if what == 0:
                    place[:2] = 0, 0
                elif what == 1:
                    place[0] = 0
                elif what == 2:
                    place[2] = rng.randint(1, 7)
                elif what == 3 and name != "key_address" and place[0]:
                    place[1] = rng.choice((0, 1, place[1] + 1, max(place[1] - 1, 0)))
                elif place[0]:
                    other = rng.choice(list(tensors))
                    place[3], changed = tensors[other][3], [*changed, other]
            elif kind in (ctypes.c_double, ctypes.c_float):
                struct[at : at + ctypes.sizeof(kind)] = bytes(kind(rng.choice(FLOATS)))
            elif name != "size":
                size = ctypes.sizeof(kind)
                value = rng.choice((*NUMBERS, rng.getrandbits(64), int.from_bytes(right[at : at + size], "little") ^ 1))
                struct[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        dtype = int.from_bytes(struct[8:12], "little")
        item = {0: 4, 1: 8}.get(dtype, 2)
        for page in self.pages:
            ctypes.memset(page, AROUND, PAGE)
        written = []
        for name, (address, length, shift, page, at) in tensors.items():
            size = 8 if name in ("key_address", "distance", "norm", "labels", "index") else item
            if name in ("z", "mask", "history", "values", "targets", "class_weights"):
                size = 8 if dtype == 1 else 4
            if name == "workspace":
                size = 1
            count = length * size
            start = self.pages[page] + PAGE - count - shift if address else 0
            struct[at : at + 8] = start.to_bytes(8, "little")
            if name != "key_address":
                struct[at + 8 : at + 16] = length.to_bytes(8, "little")
            if address and count:
                is_output = name in function.outputs
                if is_output and name not in function.inputs:
                    ctypes.memset(start, POISON, count)
                else:
                    ctypes.memset(start, INPUT, count)
                if is_output:
                    written.append((start, count))
        args = self.pages[0] + PAGE - len(struct)
        ctypes.memmove(args, bytes(struct), len(struct))
        before = [ctypes.string_at(page, PAGE) for page in self.pages]
        status = entry(None, None, ctypes.c_void_p(args))
        message = lib.library.pace_last_error().decode() if status else ""
        self.seen[lib.library.pace_status_name(status).decode()] += 1
        describe = f"{function.name}, changed {changed}: {status} {message}"
        after = [ctypes.string_at(page, PAGE) for page in self.pages]
        if status == 0:
            for i, page in enumerate(self.pages):
                for start, count in written:
                    if page <= start < page + PAGE:
                        at = start - page
                        assert bytes([POISON]) * 8 not in after[i][at : at + count], f"not written: {describe}"
                        before[i] = before[i][:at] + after[i][at : at + count] + before[i][at + count :]
        else:
            assert changed, f"a right call is refused: {describe}"
            assert status in range(1, 9), describe
            assert is_explained(message, changed), describe
        assert before == after, f"written to: {describe}"


def main(calls, seed):
    abi = Abi(calls, seed)
    make = _arguments._Prepared.__init__

    def guarded(self, function, tensors, settings, flags):
        make(self, function, tensors, settings, flags)
        abi.guard(self, function)

    _arguments._Prepared.__init__ = guarded
    rng, start = random.Random(seed), time.monotonic()
    # Those that are called by a `Function`.
    names = [name for name in fuzz.OPERATORS if name not in ("grad_norm", "keys")]
    i = 0
    while abi.left > 0:
        arguments, noise, settings, _ = fuzz.OPERATORS[names[i % len(names)]](rng, rng.choice((torch.float32, torch.float64, torch.bfloat16)))
        floats = [t.requires_grad_() for key, t in arguments.items()
                  if isinstance(t, torch.Tensor) and t.is_floating_point() and not key.startswith("base_") and key != "mask"]
        assert floats or not arguments
        fuzz.call(names[i % len(names)], arguments, noise, settings)
        i += 1
    print(f"{calls} calls in {time.monotonic() - start:.0f} s:", *(f"{n} {name}" for name, n in abi.seen.most_common()), sep="\n  ")


if __name__ == "__main__":
    main(int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]))
