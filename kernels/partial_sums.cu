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

namespace pace {

template <class T> __device__ __forceinline__ void add_up(const PartialSumsParams &p) {
    PACE_SHARED(Vector<float>, sums); // [groups, columns]
    const u32 columns = blockDim.x / p.groups, column = threadIdx.x % columns, group = threadIdx.x / columns;
    const u64 first = 4 * (static_cast<u64>(blockIdx.x) * columns + column);
    const u32 count = static_cast<u32>(first >= p.length ? 0 : p.length - first < 4 ? p.length - first : 4);
    const u32 each = (p.parts - 1) / p.groups + 1;
    const u32 end = count == 0 ? 0u : min((group + 1) * each, p.parts);
    Vector<float> sum = {};
#pragma unroll 4
    for (u32 part = group * each; part < end; ++part) {
        const Vector<float> four = load_some(p.partial + part * p.length + first, count, p.aligned != 0u);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum.value[i] += four.value[i];
        }
    }
    if (p.groups > 1) {
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (u32 other = 1; other < p.groups && group == 0; ++other) {
            const Vector<float> four = sums[other * columns + column];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                sum.value[i] += four.value[i];
            }
        }
    }
    if (group == 0) {
        T *out = static_cast<T *>(p.out) + first;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (i < count) {
                store(out + i, from_float<T>(sum.value[i]));
            }
        }
    }
}

PACE_KERNELS(partial_sums, PartialSumsParams, (PARTIAL_SUMS_THREADS), add_up<T>(p))

} // namespace pace
