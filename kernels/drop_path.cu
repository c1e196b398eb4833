// DropPath shared by the branches: both copies of a sample live or die together, and the mask is divided by its own mean.
//
//   y = x * mask / (mean(mask) + 1e-12), and the gradient dx from dy by the same kernel
//
//   x, y [branches * B, features] in f32, f16 or bf16; mask [B] f32, given, or 0 and 1 generated as src/noise.rs has it.
//   The mean and its inverse are in f64; the factor of a sample is rounded to f32, its product with an element to storage.
//
// Every block adds up the whole mask, so that one launch is enough: B terms, a handful per thread. After that `columns`
// threads share a row, each with up to BATCH vectors of 16 bytes, all loaded before the first is stored. The grid covers
// the features by x and strides over the rows by y.
//
// Bytes: 2 * branches * B * features * sizeof(T), in 16-byte accesses where rows are aligned, and otherwise element by
// element. Operations: 1 per element; a generated mask adds about 60 per BATCH vectors.
// Determinism: gpu-to-gpu bitwise, and bitwise that of the CPU in f32 for masks whose sum is exact in f64 (all that are
// generated).

#include "noise_source.cuh"
#include "params.h"
#include "reduce.cuh"

namespace pace {

__device__ __forceinline__ float mask_of(const DropPathParams &p, noise::Key key, u32 sample) {
    if (p.given != nullptr) {
        return load(p.given + sample);
    }
    return noise::drop_path_keep(key, p.first_sample + sample, p.threshold) ? 1.0f : 0.0f;
}

// 1 / (mean(mask) + 1e-12); 1e-12 keeps it finite when all samples are dropped.
__device__ __forceinline__ float scale_of(const DropPathParams &p, noise::Key key) {
    PACE_SHARED(double, scratch);
    double sum = 0.0;
    for (u32 sample = threadIdx.x; sample < p.batch; sample += blockDim.x) {
        sum += mask_of(p, key, sample);
    }
    return static_cast<float>(1.0 / (block_sum(sum, scratch) / p.batch + 1e-12));
}

template <class T> __device__ __forceinline__ void drop_path(const DropPathParams &p) {
    constexpr u32 W = Vector<T>::SIZE, BATCH = DROP_PATH_VECTORS;
    const noise::Key key = key_of(p.key_address, p.key);
    const float scale = scale_of(p, key);

    const u32 rows = blockDim.x / p.columns; // side by side
    const u32 first = (blockIdx.x * BATCH * p.columns + threadIdx.x % p.columns) * W;
    for (u32 row = blockIdx.y * rows + threadIdx.x / p.columns; row < p.rows; row += gridDim.y * rows) {
        const float factor = mask_of(p, key, row % p.batch) * scale;
        const T *input = static_cast<const T *>(p.input) + static_cast<u64>(row) * p.features;
        T *output = static_cast<T *>(p.output) + static_cast<u64>(row) * p.features;
        Vector<T> vector[BATCH] = {};
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u32 at = first + i * p.columns * W;
            if (at < p.features) {
                vector[i] = load_some(input + at, p.features - at, p.aligned != 0u);
            }
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u32 at = first + i * p.columns * W;
            if (at < p.features) {
#pragma unroll
                for (u32 j = 0; j < W; ++j) {
                    vector[i].value[j] = from_float<T>(to_float(vector[i].value[j]) * factor);
                }
                store_some(output + at, vector[i], p.features - at, p.aligned != 0u);
            }
        }
    }
}

PACE_KERNELS(drop_path, DropPathParams, (DROP_PATH_THREADS), drop_path<T>(p))

} // namespace pace
