// DropPath shared by the branches: both copies of a sample live or die together, and the mask is divided by its own mean.
//
//   y = x * mask / (mean(mask) + 1e-12), and the gradient dx from dy by the same kernel
//
//   x, y [branches * B, features] in f32, f16 or bf16; mask [B] f32, given, or 0 and 1 generated as src/noise.rs has it.
//   The mean and its inverse are in f64; the factor of a sample is rounded to f32, its product with an element to storage.
//
// Every block adds up the whole mask, so that one launch is enough: B terms, a handful per thread. `columns` threads share a row,
// and a block as many rows as it has room for; an item of work is DROP_PATH_VECTORS vectors of 16 bytes per thread. A block has a run
// of items, all of a row's before those of the next. The first are loaded before the mask is added up, and the next ones before
// those at hand are multiplied, so that the memory is never idle.
//
// Bytes: 2 * branches * B * features * sizeof(T), in 16-byte accesses where rows are aligned, and otherwise element by
// element. Operations: 1 per element; a generated mask adds about 60 per thread and row.
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

// A block's place: rows that lie side by side, and the part of them.
struct Item {
    u32 rows, chunk;
    __device__ __forceinline__ Item(const DropPathParams &p, u32 item)
        : rows(item / p.chunks), chunk(item % p.chunks) {}
    __device__ __forceinline__ void advance(const DropPathParams &p) {
        chunk = chunk + 1 == p.chunks ? 0u : chunk + 1;
        rows += chunk == 0u ? 1u : 0u;
    }
    // The thread's row, and where its first vector is there.
    __device__ __forceinline__ u32 row(const DropPathParams &p) const {
        return rows * (blockDim.x / p.columns) + threadIdx.x / p.columns;
    }
    __device__ __forceinline__ u32 first(const DropPathParams &p, u32 width) const {
        return (chunk * DROP_PATH_VECTORS * p.columns + threadIdx.x % p.columns) * width;
    }
};

template <class T, bool ALIGNED> struct Vectors {
    static constexpr u32 W = Vector<T>::SIZE;
    Vector<T> vector[DROP_PATH_VECTORS];

    __device__ __forceinline__ void load(const DropPathParams &p, const Item &item) {
        const u32 row = item.row(p), first = item.first(p, W);
        const T *input = static_cast<const T *>(p.input) + static_cast<u64>(row) * p.features;
#pragma unroll
        for (u32 i = 0; i < DROP_PATH_VECTORS; ++i) {
            const u32 at = first + i * p.columns * W;
            if (row < p.rows && at < p.features) {
                vector[i] = load_some(input + at, p.features - at, ALIGNED);
            }
        }
    }

    __device__ __forceinline__ void store(const DropPathParams &p, const Item &item, float factor) const {
        const u32 row = item.row(p), first = item.first(p, W);
        T *output = static_cast<T *>(p.output) + static_cast<u64>(row) * p.features;
#pragma unroll
        for (u32 i = 0; i < DROP_PATH_VECTORS; ++i) {
            const u32 at = first + i * p.columns * W;
            if (row < p.rows && at < p.features) {
                float value[W];
                to_floats(vector[i], value);
#pragma unroll
                for (u32 j = 0; j < W; ++j) {
                    value[j] *= factor;
                }
                store_some(output + at, from_floats<T>(value), p.features - at, ALIGNED);
            }
        }
    }
};

template <class T, bool ALIGNED> __device__ __forceinline__ void drop_path(const DropPathParams &p) {
    const u32 each = (p.items - 1) / gridDim.x + 1, begin = blockIdx.x * each;
    Item item(p, begin);
    Vectors<T, ALIGNED> next;
    next.load(p, item);
    const noise::Key key = key_of(p.key_address, p.key);
    const float scale = scale_of(p, key);
    u32 known = 0xffffffffu; // the row that `factor` is of
    float factor = 0.0f;
#pragma unroll ALIGNED ? 2 : 1
    for (u32 left = begin < p.items ? min(each, p.items - begin) : 0u; left > 0; --left) {
        const Vectors<T, ALIGNED> vectors = next;
        const Item here = item;
        item.advance(p);
        if (left > 1) {
            next.load(p, item);
        }
        const u32 row = here.row(p);
        if (row != known && row < p.rows) {
            known = row;
            factor = mask_of(p, key, row % p.batch) * scale;
        }
        vectors.store(p, here, factor);
    }
}

template <class T> __device__ __forceinline__ void drop_path(const DropPathParams &p) {
    if (p.aligned != 0u) {
        drop_path<T, true>(p);
    } else {
        drop_path<T, false>(p);
    }
}

// Registers for five blocks on a multiprocessor, as many as plans have.
constexpr u32 BLOCKS = 5;

PACE_KERNELS(drop_path, DropPathParams, (DROP_PATH_THREADS, BLOCKS), drop_path<T>(p))

} // namespace pace
