// What the weight builders and their gradients share: strips of 128 bytes along K, and products of rank 16 on tensor cores.
//
// MMAs are m16n8k8 of tf32, for every storage type: numbers of the 16-bit types are tf32 numbers, products of two of them are
// the sum of two, and f32 is taken as the sum of two to f32 accuracy. Which element of a vector of 16 bytes is which row, column
// or inner index of an MMA is chosen such that lanes load whole vectors and have no need to exchange what they loaded.

#ifndef PACE_LOW_RANK_CUH
#define PACE_LOW_RANK_CUH

#include "sm80/mma.cuh" // mma.sync, which all architectures have

namespace pace {

constexpr u32 RANKS = 16; // that the MMAs of a turn take
constexpr u32 OCTET = 8;  // rows that they take

// Columns of a strip: a vector for each of a warp's 8 groups of lanes.
template <class T> constexpr u32 STRIP = 8 * Vector<T>::SIZE;

__device__ __forceinline__ u32 strips_of(u32 columns, u32 strip) { return (columns - 1) / strip + 1; }

// As load_some; zeros unless it `exists`.
template <class T>
__device__ __forceinline__ Vector<T> load_if(bool exists, const T *address, u32 count, bool aligned) {
    Vector<T> vector = {};
    if (exists) {
        vector = load_some(address, count, aligned);
    }
    if constexpr (sizeof(T) == 2) {
        // Conversions stay behind the place where the paths meet.
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            asm("" : "+r"(vector.word[i]));
        }
    }
    return vector;
}

// A number as tf32 numbers, of which `low` counts if SPLIT.
template <bool SPLIT> __device__ __forceinline__ void split(float value, u32 &high, u32 &low) {
    if (SPLIT) {
        sm80::Float32::split(sm80::to_bits(value), high, low);
    } else {
        high = sm80::to_bits(value);
    }
}

// c[n] += a @ b[n], [16, 8] x [8, 8]. SPLIT_A, SPLIT_B: which operand is no tf32 number. Must be called by all lanes of the warp.
template <bool SPLIT_A, bool SPLIT_B, u32 COUNT>
__device__ __forceinline__ void multiply(float (&c)[COUNT][4], const float (&a)[4], const float (&b)[COUNT][2]) {
    u32 high[4], low[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        split<SPLIT_A>(a[i], high[i], low[i]);
    }
#pragma unroll
    for (u32 n = 0; n < COUNT; ++n) {
        u32 b_high[1][2], b_low[1][2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            split<SPLIT_B>(b[n][i], b_high[0][i], b_low[0][i]);
        }
        // Tensor cores truncate when they accumulate: of f32 they add up 8 products, and fp32 registers, which round, the sums.
        float sum[1][4] = {};
        float(&to)[1][4] = SPLIT_A && SPLIT_B ? sum : reinterpret_cast<float(&)[1][4]>(c[n]);
        if (SPLIT_A) {
            sm80::mma<sm80::AtomTf32>(to, low, b_high);
        }
        if (SPLIT_B) {
            sm80::mma<sm80::AtomTf32>(to, high, b_low);
        }
        sm80::mma<sm80::AtomTf32>(to, high, b_high);
#pragma unroll
        for (u32 i = 0; i < 4 && SPLIT_A && SPLIT_B; ++i) {
            c[n][i] += sum[0][i];
        }
    }
}

} // namespace pace

#endif // PACE_LOW_RANK_CUH
