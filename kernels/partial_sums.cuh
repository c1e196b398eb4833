// Sums of partial results in their order, by the threads of a block.

#ifndef PACE_PARTIAL_SUMS_CUH
#define PACE_PARTIAL_SUMS_CUH

#include "storage.cuh"

namespace pace {

// Elements of the sum that a thread has: `count` of 4, from `first` on.
struct SumOfParts {
    Vector<float> sum;
    u64 first;
    u32 count;
};

// The sum over `parts` of partial [parts, length], of the elements that block `block` of those for this sum has: 4 adjacent
// ones for each of blockDim.x / groups columns of threads. `groups` threads share the parts of the same elements: each adds a run
// of parts, and the first adds up the runs, in order. Only the first group has elements. `sums`: a vector per thread in shared
// memory, free again after the next barrier; unused with one group. `aligned`: rows of `partial` start at multiples of 16 bytes and
// hold whole vectors. Must be called by all threads in the block.
__device__ __forceinline__ SumOfParts sum_of_parts(const float *partial, u32 parts, u64 length, u64 block, u32 groups,
                                                   bool aligned, Vector<float> *sums) {
    const u32 columns = blockDim.x / groups, column = threadIdx.x % columns, group = threadIdx.x / columns;
    const u64 first = 4 * (block * columns + column);
    const u32 count = static_cast<u32>(first >= length ? 0 : length - first < 4 ? length - first : 4);
    const u32 each = (parts - 1) / groups + 1;
    const u32 end = count == 0 ? 0u : min((group + 1) * each, parts);
    Vector<float> sum = {};
#pragma unroll 4
    for (u32 part = group * each; part < end; ++part) {
        const Vector<float> four = load_some(partial + part * length + first, count, aligned);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum.value[i] += four.value[i];
        }
    }
    if (groups > 1) {
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (u32 other = 1; other < groups && group == 0; ++other) {
            const Vector<float> four = sums[other * columns + column];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                sum.value[i] += four.value[i];
            }
        }
    }
    return {sum, first, group == 0 ? count : 0u};
}

} // namespace pace

#endif // PACE_PARTIAL_SUMS_CUH
