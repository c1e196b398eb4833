// Gradients of the weight builders' factors.
//
//   LoRA     Q = [W0 *] grad_Wd, grad_B = scale * (Q @ A^T), grad_A = scale * (B^T @ Q)
//   VPT add  q = W0^T @ g, grad_Pd = q @ Pu^T, grad_Pu = Pd^T @ q, grad_d = b0 * g             g: grad_bd
//
//   B [N, r], A [r, K]; W0, grad_Wd, Q [N, K]; Pd [K, p], Pu [p], b0, d, g [N], q [K]; all of one type, f32, f16 or bf16.
//   Arithmetic and partial sums in f32, results rounded once; Q is taken as it is, q stays in f32.
//
// Two launches, for up to WEIGHT_GRADIENT_LAYERS layers of any sizes, each with LoRA, a prompt or both. A block finds its layer.
//
// weight_gradients: a block has a strip of 128 bytes along K and a part of the rows, which its warps visit 8 at a time, the
// next ones under way. Lane (g, t) = (lane / 4, lane % 4) loads a vector, columns g W to g W + W - 1, of rows t and t + 4. From registers
// these are the right operands of grad_A's MMAs (16 ranks by 8 columns from 8 rows), which stay in registers to the end.
// Through shared memory, a warp's own, they become those of grad_B (16 ranks by 8 rows from 8 columns). Sums for q are of the
// same vectors of W0. Ranks are taken 16 at a time, and grad_Wd and W0 read again for each turn. Written are, in f32:
//   a_partial [parts, r, K]    b_partial [strips, N, r]    q_partial [parts, K]    up_partial [parts * strips, p]   Pd^T @ q
// weight_gradient_sums: adds these up, in order, 128 sums per block, and makes grad_Pd and grad_d.
//
// Bytes: N * K * sizeof(T) of each of grad_Wd and W0, and the partial sums out and back: 4 * r * (parts * K + strips * N).
// In 16-byte accesses where rows are aligned, and otherwise element by element; B, Pd and vectors are read element by element.
// Operations: 2 r fused multiply-adds per element on tensor cores, twice where Q has W0 in it; 1 for q.
// Determinism: gpu-to-gpu bitwise; parts depend on the sizes only, and nothing on which layers share a launch.

#include "grouped.cuh"
#include "low_rank.cuh"
#include "params.h"
#include "partial_sums.cuh"
#include "reduce.cuh"

namespace pace {

constexpr u32 GRADIENT_WARPS = WEIGHT_GRADIENT_THREADS / WARP;

// Floats between rows of a strip in shared memory: reads of four columns of 8 rows meet no bank conflict in the 16-bit types.
template <class T> constexpr u32 PITCH = STRIP<T> + 4;

// Where a lane is: its strip and part of the rows.
template <class T> struct StripPlace {
    static constexpr u32 W = Vector<T>::SIZE;
    u32 g, t, warp, strip, part, end, first, count;

    __device__ __forceinline__ StripPlace(const WeightGradientLayer &p, u32 block) {
        const u32 strips = strips_of(p.columns, STRIP<T>), lane = threadIdx.x % WARP;
        g = lane / 4, t = lane % 4, warp = threadIdx.x / WARP;
        strip = block % strips, part = block / strips;
        end = min(p.rows - part * p.part, p.part) + part * p.part; // of its rows
        first = strip * STRIP<T> + g * W;                          // column of its vector
        count = first < p.columns ? p.columns - first : 0u;
    }
};

// Vectors of a lane, of rows t and t + 4 of an octet.
template <class T> struct Rows {
    Vector<T> grad[2], base[2];

    __device__ __forceinline__ Rows(const WeightGradientLayer &p, const StripPlace<T> &place, u32 octet) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 row = octet + place.t + 4 * i;
            const u64 at = static_cast<u64>(row) * p.columns + place.first;
            const bool exists = row < place.end && place.count > 0u, aligned = p.aligned != 0u;
            grad[i] = load_if(exists && p.grad != nullptr, static_cast<const T *>(p.grad) + at, place.count, aligned);
            base[i] = load_if(exists && p.base != nullptr, static_cast<const T *>(p.base) + at, place.count, aligned);
        }
    }
};

// A turn's ranks of A as left operands of grad_B's MMAs: of ranks g and g + 8, columns 4 W h + t W to 4 W h + t W + W - 1. Each octet
// reads them from the L1 cache: there is no room for them in registers.
template <class T> struct LeftA {
    Vector<T> ranks[2];

    __device__ __forceinline__ LeftA(const WeightGradientLayer &p, const StripPlace<T> &place, u32 chunk, u32 h) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 r = chunk + place.g + 8 * i, first = place.strip * STRIP<T> + (4 * h + place.t) * Vector<T>::SIZE;
            const T *lora_a = static_cast<const T *>(p.lora_a) + static_cast<u64>(r) * p.columns + first;
            ranks[i] = load_if(r < p.rank && first < p.columns, lora_a, p.columns - first, p.aligned != 0u);
        }
    }
};

// Q of a lane's vectors, by column and row.
template <class T>
__device__ __forceinline__ void make_q(const WeightGradientLayer &p, const Rows<T> &rows,
                                       float (&q)[Vector<T>::SIZE][2]) {
    constexpr u32 W = Vector<T>::SIZE;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        float grad[W], base[W];
        to_floats(rows.grad[i], grad);
        to_floats(rows.base[i], base);
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            q[j][i] = grad[j] * (p.base != nullptr ? base[j] : 1.0f);
        }
    }
}

// Takes an octet of rows into the sums of LoRA: grad_A += B^T @ Q in registers, and the strip's part of Q @ A^T to memory. `own`:
// the warp's part of shared memory.
template <class T>
__device__ __forceinline__ void accumulate_factors(const WeightGradientLayer &p, const StripPlace<T> &place,
                                                   const float (&q)[Vector<T>::SIZE][2], u32 octet, u32 chunk,
                                                   float (&grad_a)[Vector<T>::SIZE][4], float *own) {
    constexpr u32 W = Vector<T>::SIZE;
    constexpr bool SPLIT = sizeof(T) == 4;
    const u32 g = place.g, t = place.t;
    float b[4];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
#pragma unroll
        for (u32 j = 0; j < W; j += 4) {
            const Vector<float> four = {q[j][i], q[j + 1][i], q[j + 2][i], q[j + 3][i]};
            *reinterpret_cast<Vector<float> *>(own + (t + 4 * i) * PITCH<T> + g * W + j) = four;
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = octet + t + i / 2 * 4, r = chunk + g + i % 2 * 8;
        const u64 at = static_cast<u64>(row) * p.rank + r;
        b[i] = row < place.end && r < p.rank ? to_float(load(static_cast<const T *>(p.lora_b) + at)) : 0.0f;
    }
    multiply<SPLIT, true>(grad_a, b, q);

    __syncwarp(ALL_LANES);
    float grad_b[2][1][4] = {}; // two sums, so that MMAs wait less for each other
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const LeftA<T> a(p, place, chunk, h);
#pragma unroll
        for (u32 j = 0; j < W; j += 4) {
            const float *at = own + g * PITCH<T> + (4 * h + t) * W + j;
            const Vector<float> four = *reinterpret_cast<const Vector<float> *>(at);
#pragma unroll
            for (u32 i = 0; i < 4; i += 2) {
                const float right[1][2] = {{four.value[i], four.value[i + 1]}};
                const float left[4] = {element(a.ranks[0], j + i), element(a.ranks[1], j + i),
                                       element(a.ranks[0], j + i + 1), element(a.ranks[1], j + i + 1)};
                multiply<SPLIT, true>(grad_b[i / 2], left, right);
            }
        }
    }
    __syncwarp(ALL_LANES); // `own` is free
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = octet + 2 * t + i % 2, r = chunk + g + i / 2 * 8;
        if (row < place.end && r < p.rank) {
            store(p.b_partial + (static_cast<u64>(place.strip) * p.rows + row) * p.rank + r,
                  grad_b[0][0][i] + grad_b[1][0][i]);
        }
    }
}

// Adds up the warps' sums for grad_A, in order. `sums` [GRADIENT_WARPS, RANKS, PITCH], of which a warp's part is free for itself. Must
// be called by all threads in the block; `sums` is free behind it.
template <class T>
__device__ __forceinline__ void store_grad_a(const WeightGradientLayer &p, const StripPlace<T> &place, u32 chunk,
                                             const float (&grad_a)[Vector<T>::SIZE][4], float *sums) {
    constexpr u32 W = Vector<T>::SIZE, FOURS = STRIP<T> / 4;
    float *own = sums + place.warp * RANKS * PITCH<T>;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
#pragma unroll
        for (u32 j = 0; j < W; j += 4) {
            const Vector<float> four = {grad_a[j][i], grad_a[j + 1][i], grad_a[j + 2][i], grad_a[j + 3][i]};
            const u32 rank = place.g + i / 2 * 8, column = (2 * place.t + i % 2) * W + j;
            *reinterpret_cast<Vector<float> *>(own + rank * PITCH<T> + column) = four;
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < RANKS * FOURS; i += WEIGHT_GRADIENT_THREADS) {
        const u32 rank = i / FOURS, column = i % FOURS * 4, first = place.strip * STRIP<T> + column;
        if (chunk + rank < p.rank && first < p.columns) {
            Vector<float> total = {};
#pragma unroll
            for (u32 warp = 0; warp < GRADIENT_WARPS; ++warp) {
                const float *at = sums + (warp * RANKS + rank) * PITCH<T> + column;
                const Vector<float> four = *reinterpret_cast<const Vector<float> *>(at);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    total.value[j] += four.value[j];
                }
            }
            const u64 row = static_cast<u64>(place.part) * p.rank + chunk + rank;
            store_some(p.a_partial + row * p.columns + first, total, p.columns - first, p.aligned != 0u);
        }
    }
    __syncthreads();
}

// Adds up the sums for q over lanes and warps, in order, and makes the block's part of Pd^T @ q. `sums`: [GRADIENT_WARPS, STRIP] of
// free shared memory. Must be called by all threads in the block.
template <class T>
__device__ __forceinline__ void store_prompt(const WeightGradientLayer &p, const StripPlace<T> &place, u32 block,
                                             const float (&q)[Vector<T>::SIZE], float *sums) {
    constexpr u32 W = Vector<T>::SIZE;
#pragma unroll
    for (u32 j = 0; j < W; ++j) {
        float sum = q[j];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1u);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2u);
        if (place.t == 0u) {
            sums[place.warp * STRIP<T> + place.g * W + j] = sum;
        }
    }
    __syncthreads();
    const u32 column = place.strip * STRIP<T> + threadIdx.x;
    if (threadIdx.x < STRIP<T>) {
        float total = sums[threadIdx.x];
        for (u32 warp = 1; warp < GRADIENT_WARPS; ++warp) {
            total += sums[warp * STRIP<T> + threadIdx.x];
        }
        sums[threadIdx.x] = total; // which only this thread reads before the barrier
        if (column < p.columns) {
            store(p.q_partial + static_cast<u64>(place.part) * p.columns + column, total);
        }
    }
    __syncthreads();
    for (u32 r = place.warp; r < p.prompt_rank; r += GRADIENT_WARPS) {
        float sum = 0.0f;
        for (u32 i = threadIdx.x % WARP; i < STRIP<T>; i += WARP) {
            const u32 k = place.strip * STRIP<T> + i;
            if (k < p.columns) {
                const u64 at = static_cast<u64>(k) * p.prompt_rank + r;
                sum += to_float(load(static_cast<const T *>(p.prompt_down) + at)) * sums[i];
            }
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            store(p.up_partial + static_cast<u64>(block) * p.prompt_rank + r, sum);
        }
    }
}

template <class T> __device__ __forceinline__ void weight_gradients(const WeightGradientsParams &p) {
    constexpr u32 W = Vector<T>::SIZE, STEP = GRADIENT_WARPS * OCTET;
    PACE_SHARED(float, sums);
    const u32 member = member_of(p.first_block, static_cast<u32>(p.count), blockIdx.x),
              block = blockIdx.x - p.first_block[member];
    const WeightGradientLayer &layer = p.layers[member];
    const StripPlace<T> place(layer, block);
    const u32 begin = place.part * layer.part + place.warp * OCTET;
    float q[W] = {};
    u32 chunk = 0;
    // Once for a prompt without LoRA.
    do {
        float grad_a[W][4] = {};
        Rows<T> rows(layer, place, begin);
        for (u32 octet = begin; octet < place.end; octet += STEP) {
            if (layer.prompt_rank > 0u && chunk == 0u) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const u32 row = octet + place.t + 4 * i;
                    const float grad =
                        row < place.end ? to_float(load(static_cast<const T *>(layer.bias_grad) + row)) : 0.0f;
                    float base[W];
                    to_floats(rows.base[i], base);
#pragma unroll
                    for (u32 j = 0; j < W; ++j) {
                        q[j] += base[j] * grad;
                    }
                }
            }
            float products[W][2];
            make_q(layer, rows, products);
            rows = Rows<T>(layer, place, octet + STEP); // under way during the MMAs
            if (layer.rank > 0u) {
                float *own = sums + place.warp * RANKS * PITCH<T>;
                accumulate_factors<T>(layer, place, products, octet, chunk, grad_a, own);
            }
        }
        if (layer.rank > 0u) {
            store_grad_a<T>(layer, place, chunk, grad_a, sums);
        }
        chunk += RANKS;
    } while (chunk < layer.rank);
    if (layer.prompt_rank > 0u) {
        store_prompt<T>(layer, place, block, q, sums);
    }
}

// ---- sums

constexpr u32 SUM_GROUPS = WEIGHT_SUM_THREADS * 4 / WEIGHT_SUM_LENGTH; // of threads, which share the parts

__device__ __forceinline__ u32 sum_blocks(u64 length) {
    return static_cast<u32>((length + WEIGHT_SUM_LENGTH - 1) / WEIGHT_SUM_LENGTH);
}

__device__ __forceinline__ SumOfParts sum_of(const float *partial, u32 parts, u64 length, u32 block,
                                             Vector<float> *sums) {
    const bool aligned = reinterpret_cast<u64>(partial) % 16 == 0 && length % 4 == 0;
    return sum_of_parts(partial, parts, length, block, SUM_GROUPS, aligned, sums);
}

// out = scale * the sum over parts, if there is an output.
template <class T>
__device__ __forceinline__ void store_sum(const float *partial, u32 parts, u64 length, u32 block, float scale,
                                          void *out, Vector<float> *sums) {
    if (out == nullptr) {
        return; // the whole block
    }
    const SumOfParts part = sum_of(partial, parts, length, block, sums);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (i < part.count) {
            store(static_cast<T *>(out) + part.first + i, from_float<T>(scale * part.sum.value[i]));
        }
    }
}

// grad_Pd of the block's columns, and a part of grad_d.
template <class T>
__device__ __forceinline__ void store_prompt_grads(const WeightGradientLayer &p, u32 parts, u32 block,
                                                   Vector<float> *sums) {
    const SumOfParts part = sum_of(p.q_partial, parts, p.columns, block, sums);
    const float *q = reinterpret_cast<const float *>(sums);
    __syncthreads();
    if (part.count > 0u) {
        sums[threadIdx.x] = part.sum; // of the first group, whose threads have adjacent elements
    }
    __syncthreads();
    const u32 first = block * WEIGHT_SUM_LENGTH, columns = min(WEIGHT_SUM_LENGTH, p.columns - first);
    if (p.grad_prompt_down != nullptr) {
        // A column per warp.
        for (u32 k = threadIdx.x / WARP; k < columns; k += WEIGHT_SUM_THREADS / WARP) {
            T *out = static_cast<T *>(p.grad_prompt_down) + static_cast<u64>(first + k) * p.prompt_rank;
            for (u32 r = threadIdx.x % WARP; r < p.prompt_rank; r += WARP) {
                store(out + r, from_float<T>(q[k] * to_float(load(static_cast<const T *>(p.prompt_up) + r))));
            }
        }
    }
    if (p.grad_delta_bias != nullptr) {
        const u64 step = static_cast<u64>(sum_blocks(p.columns)) * WEIGHT_SUM_THREADS;
        for (u64 n = static_cast<u64>(block) * WEIGHT_SUM_THREADS + threadIdx.x; n < p.rows; n += step) {
            float value = 0.0f;
            if (p.base_bias != nullptr) {
                value = to_float(load(static_cast<const T *>(p.base_bias) + n)) *
                        to_float(load(static_cast<const T *>(p.bias_grad) + n));
            }
            store(static_cast<T *>(p.grad_delta_bias) + n, from_float<T>(value));
        }
    }
}

template <class T> __device__ __forceinline__ void weight_gradient_sums(const WeightGradientsParams &p) {
    PACE_SHARED(Vector<float>, sums);
    const u32 member = member_of(p.first_block, static_cast<u32>(p.count), blockIdx.x);
    const WeightGradientLayer &layer = p.layers[member];
    const u32 strips = strips_of(layer.columns, STRIP<T>), parts = (layer.rows - 1) / layer.part + 1;
    const u64 a_length = static_cast<u64>(layer.rank) * layer.columns,
              b_length = static_cast<u64>(layer.rank) * layer.rows;
    u32 block = blockIdx.x - p.first_block[member];
    if (block < sum_blocks(a_length)) {
        store_sum<T>(layer.a_partial, parts, a_length, block, layer.scale, layer.grad_lora_a, sums);
        return;
    }
    block -= sum_blocks(a_length);
    if (block < sum_blocks(b_length)) {
        store_sum<T>(layer.b_partial, strips, b_length, block, layer.scale, layer.grad_lora_b, sums);
        return;
    }
    block -= sum_blocks(b_length);
    if (block < sum_blocks(layer.columns)) {
        store_prompt_grads<T>(layer, parts, block, sums);
        return;
    }
    block -= sum_blocks(layer.columns);
    store_sum<T>(layer.up_partial, parts * strips, layer.prompt_rank, block, 1.0f, layer.grad_prompt_up, sums);
}

PACE_KERNELS(weight_gradients, WeightGradientsParams, (WEIGHT_GRADIENT_THREADS, 2), weight_gradients<T>(p))
PACE_KERNELS(weight_gradient_sums, WeightGradientsParams, (WEIGHT_SUM_THREADS), weight_gradient_sums<T>(p))

} // namespace pace
