"""A second implementation of docs/noise.md, from its text alone: slow, exact, and without anything but integers.

Each line of standard input is a question, and each line of standard output its answer:

    z SEED STEP LAYER BC|BTC BRANCH SAMPLE TOKEN CHANNEL SIGMA      z
    mask SEED STEP LAYER SAMPLE P                                   1 if the sample is kept, else 0
    normals W0 W1 W2 W3                                             the four normals

All numbers are integers in hexadecimal; those that are not integers are given as their bits (P as those of an f64).
"""

import struct
import sys
from fractions import Fraction
from math import isqrt

WORD = 0xFFFFFFFF


# 1. Generator


def philox(counter, key):
    c, k = counter, key
    for i in range(10):
        if i > 0:
            k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
    return c


# 2. Key


def derive(seed, step, layer):
    return philox([step & WORD, step >> 32, layer, 0x50414345], [seed & WORD, seed >> 32])[:2]


# f32: an integer that counts steps of 2^-149, the smallest distance of two of them. Zero has no sign; z does not depend on it.

STEPS = 149


def rounded(number, steps=STEPS):
    """The f32 nearest to number / 2^steps, of two the even one."""
    magnitude = abs(number)
    drop = max(magnitude.bit_length() - 24, steps - STEPS)
    if drop > 0:
        quotient, rest = magnitude >> drop, magnitude & (1 << drop) - 1
        half = 1 << drop - 1
        magnitude = quotient + (rest > half or rest == half and quotient & 1) << drop
    magnitude >>= steps - STEPS
    return -magnitude if number < 0 else magnitude


def fma(a, b, c):
    return rounded(a * b + (c << STEPS), 2 * STEPS)


def mul(a, b):
    return rounded(a * b, 2 * STEPS)


def sqrt(a):
    # The last bit stands for all that follow.
    scaled = a << STEPS
    root = isqrt(scaled)
    return rounded(2 * root + (root * root != scaled), STEPS + 1)


def from_integer(x, power=0):
    """f32(x) · 2^power."""
    return rounded(x << STEPS + power)


def from_bits(bits):
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    magnitude = fraction if exponent == 0 else (fraction | 0x800000) << exponent - 1
    return -magnitude if bits >> 31 else magnitude


def to_bits(a):
    sign, magnitude = (0x80000000, -a) if a < 0 else (0, a)
    exponent = max(magnitude.bit_length() - 23, 0)
    if exponent == 0:
        return sign | magnitude
    if exponent > 254:
        return sign | 0x7F800000
    return sign | exponent << 23 | magnitude >> exponent - 1 & 0x7FFFFF


def horner(x, coefficients):
    s = coefficients[-1]
    for a in reversed(coefficients[:-1]):
        s = fma(s, x, a)
    return s


def constants(text):
    return [from_bits(int(bits, 16)) for bits in text.split()]


ONE, HALF = from_integer(1), from_integer(1, -1)
Q = constants("3eaaaaa3 be7ffff7 3e4cd2a3 be2ab172 3e119960 bdfda190 3df32844 bdf174f0 3d8da198")
LN2_HI, LN2_LO = constants("3f317218 b102e308")
TAU_HI, TAU_LO = constants("40c90fdb b43bbd2e")
S = constants("c2255ddd 42a32f2a c296c002")
C = constants("c19de9e6 4281e0d7 c2aad8a3 426a3ead")


# 4. Words to normals


def radius(w):
    a = w + 1 & WORD
    shift = (32 - a.bit_length()) % 32
    b = a << shift & WORD
    if b == 0 or b >= 0xB504F334:
        f, k = -from_integer(-b & WORD, -32), from_integer(shift)
    else:
        f, k = from_integer(b - 0x80000000, -31), from_integer(shift + 1)
    q = horner(f, Q)
    log = fma(mul(f, f), fma(f, q, -HALF), f)
    m = fma(k, LN2_HI, fma(k, LN2_LO, -log))
    return sqrt(2 * m)


def cosine_and_sine(w):
    quadrant = (w + 0x20000000 & WORD) >> 30
    d = (w & ~63) - (quadrant << 30) & WORD
    if d >> 31:
        d -= 1 << 32
    x = from_integer(d, -32)
    y = mul(x, x)
    s = fma(x, TAU_HI, mul(x, horner(y, [TAU_LO, *S])))
    c = fma(y, horner(y, C), ONE)
    return [(c, s), (-s, c), (-c, -s), (s, -c)][quadrant]


def normal(words, i):
    """n[i]."""
    pair = i & 2
    return mul(radius(words[pair]), cosine_and_sine(words[pair + 1])[i & 1])


# 3. Address to counter, and 5. z


def noise(key, sigma, kind, branch, sample, token, channel):
    third = sample >> 32 | branch << 24
    counter = [channel >> 2, {"BC": WORD, "BTC": token}[kind], sample & WORD, third]
    return fma(sigma, normal(philox(counter, key), channel & 3), ONE)


# 6. DropPath mask


def keep(key, sample, p):
    word = philox([0, 0xFFFFFFFE, sample & WORD, sample >> 32], key)[0]
    threshold = (Fraction(1.0 - p) * 2**32 + Fraction(1, 2)).__floor__()
    return word < threshold


def answer(question):
    what, *fields = question.split()
    kind = fields.pop(3) if what == "z" else None
    fields = [int(field, 16) for field in fields]
    if what == "normals":
        return " ".join(f"{to_bits(normal(fields, i)):08x}" for i in range(4))
    key = derive(*fields[:3])
    if what == "mask":
        sample, p = fields[3:]
        (p,) = struct.unpack("<d", struct.pack("<Q", p))
        return str(int(keep(key, sample, p)))
    branch, sample, token, channel, sigma = fields[3:]
    return f"{to_bits(noise(key, from_bits(sigma), kind, branch, sample, token, channel)):08x}"


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(line))
