// The part of CUDA's cuda_fp16.h that the kernels use: storage and exact conversions.

#ifndef PACE_SIMT_FP16_H
#define PACE_SIMT_FP16_H

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    const uint32_t exponent = value.bits >> 10 & 31u, fraction = value.bits & 1023u;
    uint32_t bits;
    float magnitude;
    if (exponent == 31) {
        bits = 0x7f800000u | fraction << 13; // infinity, or NaN with its payload
    } else if (exponent == 0) {
        magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f; // 2^-24
        std::memcpy(&bits, &magnitude, 4);
    } else {
        bits = (exponent + 112u) << 23 | fraction << 13;
    }
    bits |= static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
}

// To nearest, ties to even.
inline __half __float2half_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {0x7fffu}; // CUDA's canonical NaN
    }
    if (magnitude >= 0x477ff000u) { // 65520, half way to what would come next
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) { // below 2^-14: a multiple of 2^-24
        float absolute;
        std::memcpy(&absolute, &magnitude, 4);
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(absolute, 24))))};
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

#endif // PACE_SIMT_FP16_H
