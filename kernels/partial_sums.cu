// Adds up partial sums, in their order.
//
//   out[i] = sum over parts of partial[part, i]
//
//   partial [parts, length] f32; out [length] in f32, f16 or bf16
//
// A thread adds 4 adjacent elements, in f32, and rounds once.
// Bytes: 4 * parts * length read, length written; 16-byte loads where rows are aligned.
// Determinism: gpu-to-gpu bitwise.

#include "storage.cuh"

namespace pace {

struct PartialSumsParams {
    const float *partial;
    void *out;
    u64 length;
    u32 parts;
    u32 aligned; // rows of `partial` start at multiples of 16 bytes and hold whole vectors
};

PACE_PARAMS(PartialSumsParams, 32);
PACE_PARAM(PartialSumsParams, out, 8);
PACE_PARAM(PartialSumsParams, length, 16);
PACE_PARAM(PartialSumsParams, parts, 24);
PACE_PARAM(PartialSumsParams, aligned, 28);

template <class T> __device__ __forceinline__ void add_up(const PartialSumsParams &p) {
    const u64 first = 4 * (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (first >= p.length) {
        return;
    }
    const u32 count = static_cast<u32>(p.length - first < 4 ? p.length - first : 4);
    float sum[4] = {};
    for (u32 part = 0; part < p.parts; ++part) {
        const Vector<float> four = load_some(p.partial + part * p.length + first, count, p.aligned != 0u);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum[i] += four.value[i];
        }
    }
    T *out = static_cast<T *>(p.out) + first;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (i < count) {
            store(out + i, from_float<T>(sum[i]));
        }
    }
}

} // namespace pace

PACE_KERNEL(partial_sums_f32, pace::PartialSumsParams, 256) { pace::add_up<float>(p); }
PACE_KERNEL(partial_sums_f16, pace::PartialSumsParams, 256) { pace::add_up<pace::f16>(p); }
PACE_KERNEL(partial_sums_bf16, pace::PartialSumsParams, 256) { pace::add_up<pace::bf16>(p); }
