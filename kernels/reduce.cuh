// Sums and maxima over the threads of a warp, of some warps or of a block, always in the same order, and which block of a
// grid is the last to finish.

#ifndef PACE_REDUCE_CUH
#define PACE_REDUCE_CUH

#include "storage.cuh"

namespace pace {

constexpr u32 ALL_LANES = 0xffffffffu;

struct Sum {
    static constexpr float NEUTRAL = 0.0f;
    template <class T> static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};

// NaN counts as nothing.
struct Max {
    static constexpr float NEUTRAL = -__builtin_huge_valf();
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces over the lanes that differ from this one in the bits from COUNT on; each gets the same, bit for bit.
template <class Operation, u32 COUNT, class T> __device__ __forceinline__ T warp_reduce_strided(T value) {
#pragma unroll
    for (u32 bits = WARP / 2; bits >= COUNT; bits /= 2) {
        value = Operation::of(value, __shfl_xor_sync(ALL_LANES, value, bits));
    }
    return value;
}

// Every lane gets the sum. T: float or double.
template <class T> __device__ __forceinline__ T warp_sum(T value) { return warp_reduce_strided<Sum, 1>(value); }

// Lane i gets the reduction over the lanes of their value[i % COUNT]; `value` is used up. COUNT: 2^n, at most a warp. Hardly more
// than one exchange per value. The values that are left after each step are a parameter of the template, so that they
// stay in registers.
template <class Operation, u32 COUNT, u32 LEFT = COUNT / 2, class T>
__device__ __forceinline__ T warp_reduce(T (&value)[COUNT]) {
    if constexpr (LEFT == 0) {
        return warp_reduce_strided<Operation, COUNT>(value[0]);
    } else {
        // Half of the lanes go on with the upper half of the values, the others with the lower half.
        const bool upper = (threadIdx.x & LEFT) != 0u;
#pragma unroll
        for (u32 i = 0; i < LEFT; ++i) {
            const T keep = upper ? value[i + LEFT] : value[i];
            const T give = upper ? value[i] : value[i + LEFT];
            value[i] = Operation::of(keep, __shfl_xor_sync(ALL_LANES, give, LEFT));
        }
        return warp_reduce<Operation, COUNT, LEFT / 2>(value);
    }
}

// The least 2^n that is not below.
__device__ constexpr u32 power_of_two(u32 least) { return least <= 1u ? 1u : 2u * power_of_two((least + 1u) / 2u); }

// Reduces N values over each group of `warps` adjacent warps of a one-dimensional block of whole groups. Lane i of a warp gets the
// i-th of its group's results; without EVERYWHERE, only lanes of the group's first warp do. `first`: the first warp of the thread's
// group. MOST: warps of a group, at most. `scratch`: N values per warp of the block in shared memory, free again after the next
// barrier. With groups of one warp there is no barrier in here; otherwise it must be called by all threads in the block.
template <class Operation, u32 MOST, bool EVERYWHERE, u32 N, class T>
__device__ __forceinline__ T group_reduce_to_lanes(const T (&value)[N], u32 first, u32 warps, T *scratch) {
    constexpr u32 COUNT = power_of_two(N);
    static_assert(COUNT <= WARP && MOST <= WARP, "a lane has a value, and at most one of each warp");
    T padded[COUNT];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        padded[i] = i < N ? value[i] : Operation::NEUTRAL;
    }
    // Each lane has one of the values, and many lanes the same.
    const u32 lane = threadIdx.x % WARP, own = lane % COUNT;
    T result = warp_reduce<Operation>(padded);
    if (warps > 1) {
        if (lane < N) {
            scratch[threadIdx.x / WARP * N + lane] = result;
        }
        __syncthreads();
        if (EVERYWHERE || threadIdx.x / WARP == first) {
            // Those that have the same share the warps.
            result = Operation::NEUTRAL;
#pragma unroll
            for (u32 i = 0; i < (MOST * COUNT + WARP - 1) / WARP; ++i) {
                const u32 warp = lane / COUNT + i * (WARP / COUNT);
                if (warp < warps) {
                    result = Operation::of(result, scratch[(first + warp) * N + min(own, N - 1u)]);
                }
            }
            result = warp_reduce_strided<Operation, COUNT>(result);
        }
    }
    return result;
}

// What the first lanes of a warp have, for all of them.
template <u32 N, class T> __device__ __forceinline__ void each_lane_to_all(T of_lane, T (&value)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        value[i] = N == 1 ? of_lane : __shfl_sync(ALL_LANES, of_lane, i);
    }
}

// The same as `group_reduce_to_lanes`, and every thread gets all results of its group.
template <class Operation, u32 MOST = WARP, u32 N, class T>
__device__ __forceinline__ void group_reduce(T (&value)[N], u32 first, u32 warps, T *scratch) {
    each_lane_to_all(group_reduce_to_lanes<Operation, MOST, true>(value, first, warps, scratch), value);
}

// Reduces N values over a warp; every lane gets all of them.
template <class Operation, u32 N, class T> __device__ __forceinline__ void warp_reduce_all(T (&value)[N]) {
    group_reduce<Operation, 1>(value, 0, 1, static_cast<T *>(nullptr));
}

// Sum over a one-dimensional block of whole warps; every thread gets it. `scratch`: a T per warp in shared memory, free
// again after the next barrier. Must be called by all threads in the block.
template <class T> __device__ __forceinline__ T block_sum(T value, T *scratch) {
    T sum[1] = {value};
    group_reduce<Sum>(sum, 0, blockDim.x / WARP, scratch);
    return sum[0];
}

// What the first warp of a block finds, for all of its threads. `shared`: a T in shared memory. Must be called by all threads in the
// block.
template <class T, class Find> __device__ __forceinline__ T of_first_warp(T *shared, const Find &find) {
    // All have read what was here.
    __syncthreads();
    if (threadIdx.x < WARP) {
        const T found = find();
        if (threadIdx.x == 0) {
            *shared = found;
        }
    }
    __syncthreads();
    return *shared;
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
