// Adds up partial sums, in their order.
//
//   out[i] = sum over parts of partial[part, i]
//
//   partial [parts, length] f32; out [length] in f32, f16 or bf16
//
// A thread adds 4 adjacent elements of a run of parts, in f32; `groups` threads share the parts of the same elements, and the
// first of them adds up what each has, in order, and rounds once.
// Bytes: 4 * parts * length read, length written; 16-byte loads where rows are aligned.
// Determinism: gpu-to-gpu bitwise.

#include "params.h"
#include "partial_sums.cuh"

namespace pace {

template <class T> __device__ __forceinline__ void add_up(const PartialSumsParams &p) {
    PACE_SHARED(Vector<float>, sums);
    const SumOfParts part = sum_of_parts(p.partial, p.parts, p.length, blockIdx.x, p.groups, p.aligned != 0u, sums);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (i < part.count) {
            store(static_cast<T *>(p.out) + part.first + i, from_float<T>(part.sum.value[i]));
        }
    }
}

PACE_KERNELS(partial_sums, PartialSumsParams, (PARTIAL_SUMS_THREADS), add_up<T>(p))

} // namespace pace
