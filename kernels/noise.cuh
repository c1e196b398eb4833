// Multiplicative Gaussian noise of PACE: z = 1 + sigma * n as a function of (key, branch, sample, token, channel).
//
// The same functions as `src/noise.rs`, bit for bit; docs/noise.md is the specification. For CUDA C++17 (nvcc, NVRTC,
// clang) and, for tests and other hosts, plain C++17.
//
//   key      = first two words of philox(counter = {step low, step high, layer, "PACE"}, key = {seed low, seed high})
//   words    = philox(counter = {channel / 4, token or 2^32 - 1, sample low, sample high | branch << 24}, key)
//   n[0,1]   = sqrt(-2 ln u) * {cos, sin}(2 pi v),  u = (words[0] + 1) / 2^32,  v = floor(words[1] / 64) / 2^26
//   n[2,3]   = the same from words[2], words[3]
//   z        = fma(sigma, n[channel % 4], 1)
//   keep     = first word of philox(counter = {0, 2^32 - 2, sample low, sample high}, key) < round((1 - p) * 2^32)
//
// with these polynomials, all evaluated by Horner's rule in fused multiply-adds:
//
//   ln m     = f + f^2 * (-1/2 + f * Q(f)),  f = m - 1 in [sqrt(1/2) - 1, sqrt(2) - 1)
//   sin 2 pi x = x * H + x * S(x^2),  cos 2 pi x = 1 + x^2 * C(x^2),  |x| <= 1/8,  H + S(0) = 2 pi in two parts
//
// Why the bits cannot depend on the compiler. Every floating-point operation goes through one of the helpers in
// `detail`, each of which is one operation that IEEE 754 rounds to nearest, ties to even. On the device the helpers
// are the `_rn` intrinsics, which nvcc never contracts or reorders and which no flag makes less precise
// (-prec-sqrt=false, --fmad). On the host there is no addition or subtraction outside `fmaf`, and contraction can only
// fuse a product into one of those, so -ffp-contract does not matter. No value here is ever subnormal, except a
// subnormal sigma, for which z is 1 either way: flushing to zero (-ftz=true, DAZ, FTZ) does not matter either.
// Value-changing optimisation (-ffast-math) and extended-precision evaluation (x87) would matter; both are rejected.

#ifndef PACE_NOISE_CUH
#define PACE_NOISE_CUH

#if !defined(__CUDACC_RTC__)
#include <cfloat>
#include <cmath>
#include <cstring>
#endif

#if !defined(__CUDA_ARCH__)
#if defined(__FAST_MATH__)
#error "noise.cuh: -ffast-math would change the bits of the noise"
#endif
static_assert(FLT_EVAL_METHOD == 0, "noise.cuh: float expressions must be evaluated in float (on x86: -mfpmath=sse)");
static_assert(sizeof(unsigned int) == 4, "noise.cuh: unsigned int must have 32 bits");
#endif

#if defined(__CUDACC__)
#define PACE_NOISE_FN __host__ __device__ __forceinline__
#else
#define PACE_NOISE_FN inline
#endif

namespace pace {
namespace noise {

using u32 = unsigned int;
using u64 = unsigned long long;

namespace detail {

// High half of the 64-bit product.
PACE_NOISE_FN u32 mul_hi(u32 a, u32 b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<u32>((static_cast<u64>(a) * b) >> 32);
#endif
}

// How far x has to be shifted to the left for its top bit to be set; 0 for x = 0.
PACE_NOISE_FN u32 normalising_shift(u32 x) {
#if defined(__CUDA_ARCH__)
    return static_cast<u32>(__clz(static_cast<int>(x))) & 31u;
#else
    u32 shift = 0;
    for (; x != 0 && x < 0x80000000u; x <<= 1) {
        ++shift;
    }
    return shift;
#endif
}

PACE_NOISE_FN float from_bits(u32 bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

PACE_NOISE_FN u32 to_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// a * b + c, rounded once.
PACE_NOISE_FN float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fmaf(a, b, c);
#endif
}

PACE_NOISE_FN float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

PACE_NOISE_FN float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

PACE_NOISE_FN float float_from_u32(u32 a) {
#if defined(__CUDA_ARCH__)
    return __uint2float_rn(a);
#else
    return static_cast<float>(a);
#endif
}

// The word read as a two's complement number.
PACE_NOISE_FN float float_from_i32(u32 a) {
#if defined(__CUDA_ARCH__)
    return __int2float_rn(static_cast<int>(a));
#else
    return static_cast<float>(static_cast<int>(a));
#endif
}

// The polar radius sqrt(-2 ln u), u = (word + 1) / 2^32, which lies in (0, 1].
PACE_NOISE_FN float radius(u32 word) {
    // u = m / 2^k with m in [sqrt(1/2), sqrt(2)). f = m - 1 is formed in integers, so it is exact up to one rounding and
    // u near 1 keeps its relative precision. a = 0 stands for 2^32 (u = 1): k = 0, f = 0.
    const u32 a = word + 1u;
    const u32 shift = normalising_shift(a);
    const u32 b = a << shift;
    // b = 0 or b >= sqrt(1/2) * 2^32, in one signed comparison: m = b / 2^32, f = (b - 2^32) / 2^32. Otherwise m = b / 2^31,
    // f = (2 b - 2^32) / 2^32. Modulo 2^32, as a signed number, the numerator is b or 2 b.
    const bool below_one = static_cast<int>(b) >= static_cast<int>(0xB504F334u);
    const float k = float_from_u32(below_one ? shift : shift + 1u);
    const float f = mul_rn(float_from_i32(below_one ? b : b + b), from_bits(0x2f800000u)); // 2^-32

    float q = from_bits(0x3d8da198u);
    q = fma_rn(q, f, from_bits(0xbdf174f0u));
    q = fma_rn(q, f, from_bits(0x3df32844u));
    q = fma_rn(q, f, from_bits(0xbdfda190u));
    q = fma_rn(q, f, from_bits(0x3e119960u));
    q = fma_rn(q, f, from_bits(0xbe2ab172u));
    q = fma_rn(q, f, from_bits(0x3e4cd2a3u));
    q = fma_rn(q, f, from_bits(0xbe7ffff7u));
    q = fma_rn(q, f, from_bits(0x3eaaaaa3u));
    const float log_m = fma_rn(mul_rn(f, f), fma_rn(f, q, from_bits(0xbf000000u)), f); // -1/2
    // k ln 2 - ln m, with ln 2 in two parts.
    const float minus_log = fma_rn(k, from_bits(0x3f317218u), fma_rn(k, from_bits(0xb102e308u), -log_m));
    return sqrt_rn(mul_rn(minus_log, from_bits(0x40000000u))); // 2, exact
}

struct CosSin {
    float cos;
    float sin;
};

// Cosine and sine of 2 pi floor(word / 64) / 2^26.
PACE_NOISE_FN CosSin cos_sin(u32 word) {
    // The upper two bits are the quadrant, the lower ones the turns since its beginning, an eighth of a turn before its axis.
    const u32 turned = word + 0x20000000u;
    // Turns from the axis, the nearest quarter turn: a multiple of 2^-26 of at most 1/8, so exact.
    const float x = mul_rn(float_from_i32((turned & 0x3fffffc0u) - 0x20000000u), from_bits(0x2f800000u)); // 2^-32
    const float square = mul_rn(x, x);

    float s = from_bits(0xc296c002u);
    s = fma_rn(s, square, from_bits(0x42a32f2au));
    s = fma_rn(s, square, from_bits(0xc2255dddu));
    s = fma_rn(s, square, from_bits(0xb43bbd2eu));
    // x * 2 pi, with 2 pi in two parts, of which s has the lower.
    const float sin = fma_rn(x, from_bits(0x40c90fdbu), mul_rn(x, s));

    float c = from_bits(0x426a3eadu);
    c = fma_rn(c, square, from_bits(0xc2aad8a3u));
    c = fma_rn(c, square, from_bits(0x4281e0d7u));
    c = fma_rn(c, square, from_bits(0xc19de9e6u));
    const float cos = fma_rn(square, c, from_bits(0x3f800000u)); // 1

    // In quadrants 1 and 3 cos and sin change places. cos is negative in 1 and 2, sin in 2 and 3.
    const bool swap = (turned & 0x40000000u) != 0u;
    const u32 cos_sign = (turned + 0x40000000u) & 0x80000000u, sin_sign = turned & 0x80000000u;
    return {from_bits(to_bits(swap ? sin : cos) ^ cos_sign), from_bits(to_bits(swap ? cos : sin) ^ sin_sign)};
}

} // namespace detail

// The two words of a Philox key; the layout of a 64-bit key in memory.
struct Key {
    u32 word[2];
};

struct Words {
    u32 word[4];
};

struct Four {
    float value[4];
};

// One call of Philox4x32-10 (Salmon et al. 2011).
PACE_NOISE_FN Words philox4x32_10(Words counter, Key key) {
    u32 c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    u32 k0 = key.word[0], k1 = key.word[1];
    for (int round = 0; round < 10; ++round) {
        const u32 high0 = detail::mul_hi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const u32 high1 = detail::mul_hi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The key of a layer at one training step of the run seeded with `seed`.
PACE_NOISE_FN Key derive_key(u64 seed, u64 step, u32 layer) {
    const Words words =
        philox4x32_10({{static_cast<u32>(step), static_cast<u32>(step >> 32), layer, 0x50414345u}}, // "PACE"
                      {{static_cast<u32>(seed), static_cast<u32>(seed >> 32)}});
    return {{words.word[0], words.word[1]}};
}

// Stands in the token field when a sample's tokens share one draw (BC noise).
constexpr u32 ALL_TOKENS = 0xFFFFFFFFu;

// The counter of channels 4 * group .. 4 * group + 3; `sample` is the number in the global batch, below 2^56.
PACE_NOISE_FN Words counter(u32 branch, u64 sample, u32 token, u32 group) {
    const u32 sample_high = static_cast<u32>(sample >> 32) & 0x00FFFFFFu;
    return {{group, token, static_cast<u32>(sample), sample_high | branch << 24}};
}

// Four standard normals from the four words of one Philox call (Box-Muller; two words make two normals).
PACE_NOISE_FN Four normals(Words words) {
    const float r0 = detail::radius(words.word[0]), r1 = detail::radius(words.word[2]);
    const detail::CosSin a0 = detail::cos_sin(words.word[1]), a1 = detail::cos_sin(words.word[3]);
    return {{detail::mul_rn(r0, a0.cos), detail::mul_rn(r0, a0.sin), detail::mul_rn(r1, a1.cos),
             detail::mul_rn(r1, a1.sin)}};
}

// z of channels 4 * group .. 4 * group + 3 at one address.
PACE_NOISE_FN Four noise(Key key, float sigma, u32 branch, u64 sample, u32 token, u32 group) {
    Four z = normals(philox4x32_10(counter(branch, sample, token, group), key));
    for (int i = 0; i < 4; ++i) {
        z.value[i] = detail::fma_rn(sigma, z.value[i], detail::from_bits(0x3f800000u)); // 1
    }
    return z;
}

// Whether the DropPath branch of a sample survives; threshold = round((1 - drop probability) * 2^32), up to 2^32.
PACE_NOISE_FN bool drop_path_keep(Key key, u64 sample, u64 threshold) {
    const Words words =
        philox4x32_10({{0u, 0xFFFFFFFEu, static_cast<u32>(sample), static_cast<u32>(sample >> 32)}}, key);
    return words.word[0] < threshold;
}

} // namespace noise
} // namespace pace

#undef PACE_NOISE_FN

#endif // PACE_NOISE_CUH
