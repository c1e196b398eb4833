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
