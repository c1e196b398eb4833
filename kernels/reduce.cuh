// Sums over the threads of a warp or of a block, always in the same order.

#ifndef PACE_REDUCE_CUH
#define PACE_REDUCE_CUH

#include "storage.cuh"

namespace pace {

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// Every lane gets the sum, bit for bit the same one. T: float or double.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (u32 bits = WARP / 2; bits > 0; bits /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, bits);
    }
    return value;
}

// Lane i gets the sum over the lanes of their value[i]; `value` is used up. One exchange per sum. The sums that are left
// after each step are a parameter of the template, so that `value` stays in registers.
template <u32 LEFT = WARP / 2> __device__ __forceinline__ float warp_sums(float (&value)[WARP]) {
    // Half of the lanes go on with the upper half of the sums, the others with the lower half.
    const bool upper = (threadIdx.x & LEFT) != 0u;
#pragma unroll
    for (u32 i = 0; i < LEFT; ++i) {
        const float keep = upper ? value[i + LEFT] : value[i];
        const float give = upper ? value[i] : value[i + LEFT];
        value[i] = keep + __shfl_xor_sync(ALL_LANES, give, LEFT);
    }
    return warp_sums<LEFT / 2>(value);
}

template <> __device__ __forceinline__ float warp_sums<0>(float (&value)[WARP]) { return value[0]; }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (u32 bits = WARP / 2; bits > 0; bits /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, bits));
    }
    return value;
}

// Sum over a one-dimensional block of whole warps; every thread gets it. `scratch`: a T per warp in shared memory, free
// again after the next barrier. All threads of the block have to come.
template <class T> __device__ __forceinline__ T block_sum(T value, T *scratch) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) {
        scratch[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    T sum = scratch[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) {
        sum += scratch[warp];
    }
    return sum;
}

} // namespace pace

#endif // PACE_REDUCE_CUH
