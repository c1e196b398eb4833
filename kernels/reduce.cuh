// Sums and maxima over the threads of a warp, of some warps or of a block, always in the same order, and which block of a
// grid is the last to finish.

#ifndef PACE_REDUCE_CUH
#define PACE_REDUCE_CUH

#include "storage.cuh"

namespace pace {

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
// again after the next barrier. Must be called by all threads in the block.
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

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
    static __device__ __forceinline__ float of_warp(float value) { return warp_sum(value); }
};

// NaN counts as nothing.
struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
    static __device__ __forceinline__ float of_warp(float value) { return warp_max(value); }
};

// Reduces N values over each group of `warps` adjacent warps of a one-dimensional block of whole groups; every thread gets
// its group's results. `first`: the first warp of the thread's group. `scratch`: N floats per warp of the block in shared memory,
// free again after the next barrier. With groups of one warp there is no barrier in here; otherwise it must be called by all
// threads in the block.
template <class Operation, unsigned N>
__device__ __forceinline__ void group_reduce(float (&value)[N], u32 first, u32 warps, float *scratch) {
#pragma unroll
    for (unsigned i = 0; i < N; ++i) {
        value[i] = Operation::of_warp(value[i]);
    }
    if (warps == 1) {
        return;
    }
    const u32 warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            scratch[warp * N + i] = value[i];
        }
    }
    __syncthreads();
    const float *group = scratch + first * N;
#pragma unroll
    for (unsigned i = 0; i < N; ++i) {
        value[i] = group[i];
    }
    for (u32 other = 1; other < warps; ++other) {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) {
            value[i] = Operation::of(value[i], group[other * N + i]);
        }
    }
}

// Whether this block is the last of the grid to come here; it then sees all that the others had written to global memory by
// then. `ticket`: a counter in global memory, 0 before the launch and 0 again after it. `flag`: a word of shared memory. Must be
// called by all threads in the block.
__device__ __forceinline__ bool is_last_block(u32 *ticket, u32 *flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 last = gridDim.x * gridDim.y * gridDim.z - 1;
        // What the block wrote before the barrier comes before its ticket, and what the others wrote before theirs can be
        // read after the last one.
        *flag = count_up(ticket, last) == last ? 1u : 0u;
    }
    __syncthreads();
    return *flag != 0u;
}

} // namespace pace

#endif // PACE_REDUCE_CUH
