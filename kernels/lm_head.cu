// What the head of a language model needs between the GEMMs of a library and the kernels of the loss.
//
//   lm_head_difference  D = h0 - h1, rounded: what branch 1's logits are computed from, where they are needed
//   lm_head_parts       D in bf16 as the sum of two numbers: for products with the Gram matrix G of the weight
//   lm_head_scale       factor * m, a matrix in f32
//   lm_head_split       the same in bf16, as one number or as the sum of two
//   lm_head_pull        from P = D G: dh0 = w P, dh1 = -w P, and the squared difference of logits, sum of D * P, for the values
//   lm_head_bias        db += factor * sum over rows of dl
//   lm_head_weight      1 over the number of labels, where they alone take part
//
//   h0, h1, dh0, dh1 [rows, H] in f32, f16 or bf16; P [rows, H] and m f32; dl [rows, V] of the type of h; db [V] f32;
//   labels i64; values [3] f32: total, criterion, consistency. With labelled_only, rows without a label have D = 0.
//
// A thread has a vector of 16 bytes of T at a time. Bytes: every tensor once. Operations: a few per element, so memory sets the time.
// Determinism: run-to-run bitwise; the grid depends on sizes only, and the last block adds up what blocks have found, in their order.

#include "loss.cuh"
#include "params.h"
#include "reduce.cuh"

namespace pace {

namespace lm_head {

// A vector of a row-major matrix.
struct Place {
    u64 at; // its first element
    u32 row;
    u32 count;     // of its elements that the row has
    bool is_whole; // and aligned
};

template <u32 SIZE> __device__ __forceinline__ u64 vectors(u32 rows, u32 columns) {
    return static_cast<u64>(rows) * ((columns + SIZE - 1) / SIZE);
}

template <u32 SIZE> __device__ __forceinline__ Place place_of(u64 vector, u32 columns, u32 aligned) {
    const u32 of_row = (columns + SIZE - 1) / SIZE;
    const u32 row = static_cast<u32>(vector / of_row);
    const u32 column = static_cast<u32>(vector - static_cast<u64>(row) * of_row) * SIZE;
    const u32 count = min(columns - column, SIZE);
    return {static_cast<u64>(row) * columns + column, row, count, aligned != 0u && count == SIZE};
}

__device__ __forceinline__ u64 thread_of_grid() { return static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T, u32 SIZE>
__device__ __forceinline__ void read(const void *matrix, const Place &place, float (&value)[SIZE]) {
    static_assert(SIZE == Vector<T>::SIZE, "one vector");
    to_floats(load_some(static_cast<const T *>(matrix) + place.at, place.count, place.is_whole), value);
}

template <class T, u32 SIZE>
__device__ __forceinline__ void write(void *matrix, const Place &place, const float (&value)[SIZE]) {
    static_assert(SIZE == Vector<T>::SIZE, "one vector");
    store_some(static_cast<T *>(matrix) + place.at, from_floats<T>(value), place.count, place.is_whole);
}

// As many elements of f32 as a vector of another type has.
template <u32 SIZE>
__device__ __forceinline__ void read_f32(const float *matrix, const Place &place, float (&value)[SIZE]) {
#pragma unroll
    for (u32 k = 0; k < SIZE; k += 4) {
        const u32 left = place.count > k ? place.count - k : 0u;
        const Vector<float> part = load_some(matrix + place.at + k, left, place.is_whole);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            value[k + i] = part.value[i];
        }
    }
}

// D of a vector.
template <class T, u32 SIZE>
__device__ __forceinline__ void read_difference(const LmHeadRows &rows, const Place &place, float (&value)[SIZE]) {
    const bool takes_part = rows.labelled_only == 0u || loss::is_labelled(rows, load(rows.labels + place.row));
    float other[SIZE];
    read<T>(rows.first, place, value);
    read<T>(rows.second, place, other);
#pragma unroll
    for (u32 k = 0; k < SIZE; ++k) {
        value[k] = takes_part ? value[k] - other[k] : 0.0f;
    }
}

// Writes what S has room for to `high`, and the rest to `low`, if there is one.
template <class S, u32 SIZE>
__device__ __forceinline__ void write_parts(void *high, void *low, const Place &place, const float (&value)[SIZE]) {
    write<S>(high, place, value);
    if (low != nullptr) {
        float rest[SIZE];
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            rest[k] = value[k] - to_float(from_float<S>(value[k]));
        }
        write<S>(low, place, rest);
    }
}

template <class T, class S> __device__ __forceinline__ void difference(const LmHeadDifferenceParams &p) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    const u64 vector = thread_of_grid();
    if (vector < vectors<SIZE>(p.rows.count, p.rows.columns)) {
        const Place place = place_of<SIZE>(vector, p.rows.columns, p.rows.aligned);
        float value[SIZE];
        read_difference<T>(p.rows, place, value);
        write_parts<S>(p.high, p.low, place, value);
    }
}

template <class S> __device__ __forceinline__ void split(const LmHeadSplitParams &p) {
    constexpr u32 SIZE = Vector<S>::SIZE;
    const u64 vector = thread_of_grid();
    if (vector < vectors<SIZE>(p.rows, p.columns)) {
        const Place place = place_of<SIZE>(vector, p.columns, p.aligned);
        const float factor = p.weight == nullptr ? p.factor : p.factor * load(p.weight);
        float value[SIZE];
        read_f32(p.matrix, place, value);
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            value[k] *= factor;
        }
        write_parts<S>(p.high, p.low, place, value);
    }
}

// Adds the sum over all blocks to the values; the last block does it.
__device__ __forceinline__ void add_to_values(const LmHeadPullParams &p, float sum, float scale) {
    PACE_SHARED(float, scratch);
    float *const partial = reinterpret_cast<float *>(p.workspace) + 1;
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) {
        store(partial + blockIdx.x, sum);
    }
    if (!is_last_block(p.workspace, reinterpret_cast<u32 *>(scratch + blockDim.x / WARP))) {
        return;
    }
    float total = 0.0f;
    for (u32 i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
        total += load(partial + i);
    }
    total = block_sum(total, scratch);
    const bool is_first = p.is_first != 0u;
    if (threadIdx.x == 0) {
        const float consistency = scale * total;
        store(p.values, (is_first ? 0.0f : load(p.values)) + p.lambda * consistency);
        store(p.values + 2, (is_first ? 0.0f : load(p.values + 2)) + consistency);
        if (is_first) {
            store(p.values + 1, 0.0f);
        }
    }
    if (is_first && threadIdx.x < LOSS_STATUS_WORDS) {
        store(p.status + threadIdx.x, static_cast<u64>(0));
    }
}

template <class T> __device__ __forceinline__ void pull(const LmHeadPullParams &p) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    const float weight = p.weight == nullptr ? 1.0f : load(p.weight);
    const float of_gradient = p.pull * weight;
    float sum = 0.0f;
    for (u64 vector = thread_of_grid(); vector < vectors<SIZE>(p.rows.count, p.rows.columns);
         vector += static_cast<u64>(gridDim.x) * blockDim.x) {
        const Place place = place_of<SIZE>(vector, p.rows.columns, p.rows.aligned);
        float difference[SIZE], product[SIZE];
        read_difference<T>(p.rows, place, difference);
        read_f32(p.product, place, product);
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            sum += difference[k] * product[k];
        }
        if (p.to_first != nullptr) {
            float gradient[SIZE], opposite[SIZE];
#pragma unroll
            for (u32 k = 0; k < SIZE; ++k) {
                gradient[k] = of_gradient * product[k];
                opposite[k] = -gradient[k];
            }
            write<T>(p.to_first, place, gradient);
            write<T>(p.to_second, place, opposite);
        }
    }
    add_to_values(p, sum, p.scale * weight);
}

template <class T> __device__ __forceinline__ void bias(const LmHeadBiasParams &p) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    const u64 vector = thread_of_grid();
    if (vector >= vectors<SIZE>(1, p.columns)) {
        return;
    }
    Place place = place_of<SIZE>(vector, p.columns, p.aligned);
    const u64 first = place.at;
    float sum[SIZE] = {};
#pragma unroll 4
    for (u32 row = 0; row < p.rows; ++row, place.at += p.columns) {
        float value[SIZE];
        read<T>(p.gradient, place, value);
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            sum[k] += value[k];
        }
    }
#pragma unroll
    for (u32 k = 0; k < SIZE; ++k) {
        if (k < place.count) {
            float *const to = p.bias + first + k;
            store(to, p.factor * sum[k] + (p.accumulate != 0u ? load(to) : 0.0f));
        }
    }
}

// One block.
__device__ __forceinline__ void weight(const LmHeadWeightParams &p) {
    PACE_SHARED(float, scratch);
    float count = 0.0f;
    for (u32 i = threadIdx.x; i < p.rows; i += blockDim.x) {
        count += loss::is_labelled(p, load(p.labels + i)) ? 1.0f : 0.0f;
    }
    count = block_sum(count, scratch);
    if (threadIdx.x == 0) {
        store(p.weight, count > 0.0f ? 1.0f / count : 0.0f);
    }
}

PACE_KERNELS(lm_head_difference, LmHeadDifferenceParams, (LM_HEAD_THREADS), difference<T, T>(p))
PACE_KERNELS_16(lm_head_parts, LmHeadDifferenceParams, (LM_HEAD_THREADS), difference<T, bf16>(p))
PACE_KERNEL(lm_head_scale, LmHeadSplitParams, LM_HEAD_THREADS) { split<float>(p); }
PACE_KERNEL(lm_head_split, LmHeadSplitParams, LM_HEAD_THREADS) { split<bf16>(p); }
PACE_KERNELS(lm_head_pull, LmHeadPullParams, (LM_HEAD_THREADS), pull<T>(p))
PACE_KERNELS(lm_head_bias, LmHeadBiasParams, (LM_HEAD_THREADS), bias<T>(p))
PACE_KERNEL(lm_head_weight, LmHeadWeightParams, LM_HEAD_THREADS) { weight(p); }

} // namespace lm_head

} // namespace pace
