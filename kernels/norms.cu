// The two quantities that the paper plots: gradient norm, over many tensors at once, and FP-distance.
//
//   grad_norm    partial[chunk] = sum of g^2 over a chunk of one tensor
//   fp_distance  partial[chunk] = sum of (a - b)^2 over a chunk
//   norm_total   out = sqrt(sum of partial), or (sum of partial) / divisor
//
//   g any number of tensors of any length, a and b [samples, features], in f32, f16 or bf16; partial [chunks] and out [1]
//   in f64. a - b is rounded to f32; squares and sums are in f64, so that nothing overflows or vanishes.
//
// A chunk is NORMS_CHUNK elements and has a block, whose threads load all of it at once, in vectors of 16 bytes. A launch of
// grad_norm takes up to NORMS_TENSORS tensors, whose addresses and lengths are in the parameter struct; a block finds the tensor of
// its chunk by bisection. One block adds up the partial sums.
//
// Bytes: the tensors once, in 16-byte accesses where they start at multiples of 16 bytes and otherwise element by element;
// 16 per chunk. Operations: a conversion and a fused multiply-add in f64 per element.
// Determinism: gpu-to-gpu bitwise: chunks and the order of their sums depend on the lengths only.

#include "grouped.cuh"
#include "params.h"
#include "reduce.cuh"

#include <cmath>

namespace pace {

// Sum of the squares of `count` elements, or of their differences to `other`, which is null if there is none. Must be
// called by all threads in the block; every one gets it.
template <class T>
__device__ __forceinline__ double sum_of_squares(const T *values, const T *other, u32 count, bool aligned) {
    constexpr u32 W = Vector<T>::SIZE, VECTORS = NORMS_CHUNK / (NORMS_THREADS * W);
    Vector<T> left[VECTORS] = {}, right[VECTORS] = {};
#pragma unroll
    for (u32 i = 0; i < VECTORS; ++i) {
        const u32 at = (i * NORMS_THREADS + threadIdx.x) * W;
        if (at < count) {
            const bool whole = aligned && count - at >= W;
            left[i] = load_some(values + at, count - at, whole);
            if (other != nullptr) {
                right[i] = load_some(other + at, count - at, whole);
            }
        }
    }
    double sum = 0.0;
#pragma unroll
    for (u32 i = 0; i < VECTORS; ++i) {
        float a[W], b[W];
        to_floats(left[i], a);
        to_floats(right[i], b);
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            const double value = a[j] - b[j];
            sum += value * value;
        }
    }
    PACE_SHARED(double, scratch);
    return block_sum(sum, scratch);
}

// Elements of a chunk of a tensor, from `first` on.
__device__ __forceinline__ u32 chunk_size(u64 length, u64 first) {
    return static_cast<u32>(length - first < NORMS_CHUNK ? length - first : NORMS_CHUNK);
}

template <class T> __device__ __forceinline__ void grad_norm(const GradNormParams &p) {
    const u32 tensor = member_of(p.first_chunk, static_cast<u32>(p.count), blockIdx.x);
    const T *values = static_cast<const T *>(p.tensors[tensor]);
    const u64 first = static_cast<u64>(blockIdx.x - p.first_chunk[tensor]) * NORMS_CHUNK;
    const bool aligned = reinterpret_cast<u64>(values) % 16 == 0;
    const double sum = sum_of_squares<T>(values + first, nullptr, chunk_size(p.lengths[tensor], first), aligned);
    if (threadIdx.x == 0u) {
        store(p.partial + blockIdx.x, sum);
    }
}

template <class T> __device__ __forceinline__ void fp_distance(const FpDistanceParams &p) {
    const u64 first = static_cast<u64>(blockIdx.x) * NORMS_CHUNK;
    const double sum =
        sum_of_squares(static_cast<const T *>(p.fine_tuned) + first, static_cast<const T *>(p.pre_trained) + first,
                       chunk_size(p.length, first), p.aligned != 0u);
    if (threadIdx.x == 0u) {
        store(p.partial + blockIdx.x, sum);
    }
}

__device__ __forceinline__ void total(const NormTotalParams &p) {
    PACE_SHARED(double, scratch);
    double sum = 0.0;
    for (u32 part = threadIdx.x; part < p.parts; part += blockDim.x) {
        sum += load(p.partial + part);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0u) {
        store(p.out, p.root != 0u ? sqrt(sum) : sum / p.divisor);
    }
}

PACE_KERNELS(grad_norm, GradNormParams, (NORMS_THREADS), grad_norm<T>(p))
PACE_KERNELS(fp_distance, FpDistanceParams, (NORMS_THREADS), fp_distance<T>(p))
PACE_KERNEL(norm_total, NormTotalParams, NORM_TOTAL_THREADS) { total(p); }

} // namespace pace
