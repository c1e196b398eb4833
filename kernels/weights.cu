// Weight builders: the weight and bias differences of adapters from their trained factors, their gradients, and merging.
//
//   low_rank_weight           Wd = [W0 *] scale * (B @ A)       LoRA add, or LoRA mul where there is W0
//   low_rank_weight_backward  grad_B = scale * (Q @ A^T), grad_A = scale * (B^T @ Q), with Q = [W0 *] grad_Wd
//   prompt_bias               bd = W0 @ (Pd @ Pu) + b0 * d      VPT add; prompt_bias_product is what stands in parentheses
//   prompt_bias_columns       q = W0^T @ g                      g: grad_bd
//   prompt_bias_grads         grad_Pd = q @ Pu^T, grad_Pu = Pd^T @ q, grad_d = b0 * g
//   merge                     target += sign * delta            sign 1 or -1
//
//   B [N, r], A [r, K], W0, Wd, Q [N, K]; Pd [K, r], Pu [r], b0, d, bd, g [N]; all of one type, f32, f16 or bf16.
//   Arithmetic in f32; every result is rounded once. Pd @ Pu and q stay in f32.
//
// low_rank_weight: a warp owns a strip of 16 bytes per lane along K and 4 rows; a block has 4 warps below each other and
// goes through r in chunks of 16, whose parts of A and B it keeps in shared memory, in f32.
// low_rank_weight_backward: the same strips; a block owns a split of rows, which its warps visit 4 at a time, and goes
// through r in chunks of 8: a lane holds its columns of the chunk of A in registers and adds up theirs of grad_A. The 32 sums
// of 4 rows by 8 of grad_B go over the lanes at once. Q is read again for each chunk: a split of it stays in the cache. Sums
// over the strips (grad_B) and over the splits (grad_A) are left to partial_sums. prompt_bias_columns is the same with one
// sum, and no grad_B.
// prompt_bias, prompt_bias_product: a warp per row. merge: 16 bytes per thread and turn, four loads in flight.
//
// Bytes: low_rank_weight 1 or 2 (with W0) times N * K * sizeof(T); its gradient as many, and ceil(K / strip) * N * r +
// splits * r * K floats out and back; prompt_bias and prompt_bias_columns N * K * sizeof(T); merge 3 * length * sizeof(T).
// In 16-byte accesses where rows are aligned, and otherwise element by element; factors are read element by element.
// Operations: r fused multiply-adds per element of Wd, 2 r of its gradient, 1 of the others.
// Determinism: gpu-to-gpu bitwise; nothing depends on the grid.

#include "params.h"
#include "reduce.cuh"

namespace pace {

constexpr u32 WARPS = WEIGHT_WARPS; // of a block, where rows are shared by warps
constexpr u32 TILE = WEIGHT_ROWS;
constexpr u32 ROWS = TILE / WARPS; // of a warp at a time

// W floats from `address` on, of which `count` exist; the rest is zero.
template <u32 W, class T>
__device__ __forceinline__ void load_floats(const T *address, u32 count, bool aligned, float (&value)[W]) {
    constexpr u32 SIZE = Vector<T>::SIZE;
#pragma unroll
    for (u32 i = 0; i < W; i += SIZE) {
        float floats[SIZE];
        to_floats(load_some(address + i, count > i ? count - i : 0u, aligned), floats);
#pragma unroll
        for (u32 j = 0; j < SIZE; ++j) {
            value[i + j] = floats[j];
        }
    }
}

// Writes A's rows and B's columns of a chunk of ranks to shared memory, in f32: `lora_a` [WEIGHT_RANKS, FOURS, WARP], `lora_b`
// [WEIGHT_RANKS, WARPS], ROWS of each warp. Four columns of a lane lie beside those of the next one, so that a warp reads all
// banks at once.
template <class T>
__device__ __forceinline__ void load_factors(const LowRankWeightParams &p, Vector<float> *lora_a, Vector<float> *lora_b,
                                             u32 chunk, u32 ranks, u32 tile, u32 first, u32 count) {
    constexpr u32 W = Vector<T>::SIZE, FOURS = W / 4;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 i = warp; i < ranks; i += WARPS) {
        float value[W] = {};
        if (count > 0u) {
            const u64 at = static_cast<u64>(chunk + i) * p.columns + first;
            load_floats(static_cast<const T *>(p.lora_a) + at, count, p.aligned != 0u, value);
        }
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            lora_a[(i * FOURS + j / 4) * WARP + lane].value[j % 4] = value[j];
        }
    }
    for (u32 i = threadIdx.x; i < TILE * WEIGHT_RANKS; i += WARPS * WARP) {
        const u32 r = i % WEIGHT_RANKS, n = i / WEIGHT_RANKS;
        const u64 at = static_cast<u64>(tile + n) * p.rank + chunk + r;
        const bool exists = r < ranks && tile + n < p.rows;
        lora_b[r * WARPS + n / ROWS].value[n % ROWS] =
            exists ? to_float(load(static_cast<const T *>(p.lora_b) + at)) : 0.0f;
    }
}

template <class T> __device__ __forceinline__ void low_rank_weight(const LowRankWeightParams &p) {
    constexpr u32 W = Vector<T>::SIZE, FOURS = W / 4;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    PACE_SHARED(Vector<float>, lora_a);
    Vector<float> *lora_b = lora_a + WEIGHT_RANKS * FOURS * WARP;
    const u32 first = (blockIdx.x * WARP + lane) * W;
    const u32 count = first < p.columns ? p.columns - first : 0u;
    const bool aligned = p.aligned != 0u;
    const T *base = static_cast<const T *>(p.base);

    for (u32 tile = blockIdx.y * TILE; tile < p.rows; tile += gridDim.y * TILE) {
        const u32 row = tile + warp * ROWS;
        // W0 is under way during the sums.
        Vector<T> factor[ROWS] = {};
        if (base != nullptr && count > 0u) {
#pragma unroll
            for (u32 i = 0; i < ROWS; ++i) {
                if (row + i < p.rows) {
                    factor[i] = load_some(base + static_cast<u64>(row + i) * p.columns + first, count, aligned);
                }
            }
        }

        // B @ A, chunk by chunk of ranks.
        float sum[ROWS][W] = {};
        for (u32 chunk = 0; chunk < p.rank; chunk += WEIGHT_RANKS) {
            const u32 ranks = min(WEIGHT_RANKS, p.rank - chunk);
            __syncthreads(); // the previous chunk is free
            load_factors<T>(p, lora_a, lora_b, chunk, ranks, tile, first, count);
            __syncthreads();
#pragma unroll 4
            for (u32 r = 0; r < ranks; ++r) {
                const Vector<float> b = lora_b[r * WARPS + warp];
#pragma unroll
                for (u32 four = 0; four < FOURS; ++four) {
                    const Vector<float> a = lora_a[(r * FOURS + four) * WARP + lane];
#pragma unroll
                    for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
                        for (u32 j = 0; j < 4; ++j) {
                            sum[i][four * 4 + j] += b.value[i] * a.value[j];
                        }
                    }
                }
            }
        }

        // Wd = [W0 *] scale * sums.
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            if (row + i < p.rows && count > 0u) {
                float w0[W], value[W];
                to_floats(factor[i], w0);
#pragma unroll
                for (u32 j = 0; j < W; ++j) {
                    value[j] = p.scale * sum[i][j];
                    value[j] = base != nullptr ? w0[j] * value[j] : value[j];
                }
                T *to = static_cast<T *>(p.out) + static_cast<u64>(row + i) * p.columns + first;
                store_some(to, from_floats<T>(value), count, aligned);
            }
        }
    }
}

// What a lane holds of a chunk of RANKS ranks, in its W columns: A, and the sums for grad_A.
template <u32 W, u32 RANKS> struct Columns {
    float lora_a[RANKS][W] = {};
    float grad_a[RANKS][W] = {};
};

// Takes 4 rows of Q, from `row` on of the split of `rows` rows that starts at `begin`, into the sums: grad_A += B^T @ Q and, for
// GRAD_B, the lane's part of Q @ A^T. The lane has `count` columns from `first` on.
template <class T, u32 RANKS, bool GRAD_B>
__device__ __forceinline__ void accumulate_rows(const LowRankBackwardParams &p, const float *lora_b, u32 begin, u32 row,
                                                u32 rows, u32 first, u32 count, Columns<Vector<T>::SIZE, RANKS> &own,
                                                float (&grad_b)[WARP]) {
    constexpr u32 W = Vector<T>::SIZE;
    const T *grad = static_cast<const T *>(p.grad) + first, *base = static_cast<const T *>(p.base);
    const bool aligned = p.aligned != 0u;
    // All loads before the first use.
    Vector<T> left[ROWS] = {}, right[ROWS] = {};
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
        if (row + i < rows && count > 0u) {
            const u64 at = static_cast<u64>(begin + row + i) * p.columns;
            left[i] = load_some(grad + at, count, aligned);
            if (base != nullptr) {
                right[i] = load_some(base + at + first, count, aligned);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
        float q[W], w0[W];
        to_floats(left[i], q);
        to_floats(right[i], w0);
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            q[j] *= base != nullptr ? w0[j] : 1.0f;
        }
#pragma unroll
        for (u32 r = 0; r < RANKS; ++r) {
            const float b = row + i < rows ? lora_b[(row + i) * RANKS + r] : 0.0f;
#pragma unroll
            for (u32 j = 0; j < W; ++j) {
                own.grad_a[r][j] += b * q[j];
                if (GRAD_B) {
                    grad_b[i * RANKS + r] += q[j] * own.lora_a[r][j];
                }
            }
        }
    }
}

// Adds up the warps' sums for grad_A, in order, through `sums` [WARPS, RANKS, FOURS, WARP] in shared memory, and writes them to
// `out` [rank, columns], which begins at the chunk and the lane's first column. Must be called by all threads in the block.
template <u32 W, u32 RANKS>
__device__ __forceinline__ void store_grad_a(const float (&grad_a)[RANKS][W], Vector<float> *sums, float *out,
                                             u32 ranks, u64 columns, u32 count, float scale, bool aligned) {
    constexpr u32 FOURS = W / 4;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (u32 r = 0; r < RANKS; ++r) {
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            sums[((warp * RANKS + r) * FOURS + j / 4) * WARP + lane].value[j % 4] = grad_a[r][j];
        }
    }
    __syncthreads();
    // A row of the chunk per warp.
    for (u32 r = warp; r < ranks; r += WARPS) {
#pragma unroll
        for (u32 four = 0; four < FOURS; ++four) {
            Vector<float> total = {};
#pragma unroll
            for (u32 from = 0; from < WARPS; ++from) {
                const Vector<float> sum = sums[((from * RANKS + r) * FOURS + four) * WARP + lane];
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    total.value[j] += sum.value[j];
                }
            }
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                total.value[j] *= scale;
            }
            if (count > four * 4) {
                store_some(out + r * columns + four * 4, total, count - four * 4, aligned);
            }
        }
    }
}

// RANKS: of a chunk. GRAD_B: whether grad_B is wanted.
template <class T, u32 RANKS, bool GRAD_B>
__device__ __forceinline__ void low_rank_backward(const LowRankBackwardParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    static_assert(!GRAD_B || ROWS * RANKS == WARP, "a warp adds up one sum per lane");
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    PACE_SHARED(Vector<float>, sums);
    float *lora_b = reinterpret_cast<float *>(sums + WARPS * RANKS * W / 4 * WARP); // [part, RANKS]
    const u32 first = (blockIdx.x * WARP + lane) * W;
    const u32 count = first < p.columns ? p.columns - first : 0u;
    const bool aligned = p.aligned != 0u;

    for (u32 split = blockIdx.y; static_cast<u64>(split) * p.part < p.rows; split += gridDim.y) {
        const u32 begin = split * p.part, rows = min(p.part, p.rows - begin);
        for (u32 chunk = 0; chunk < p.rank; chunk += RANKS) {
            // The chunk of B to shared memory, that of A to registers.
            const u32 ranks = min(RANKS, p.rank - chunk);
            for (u32 i = threadIdx.x; i < rows * RANKS; i += WARPS * WARP) {
                const u32 r = i % RANKS, n = i / RANKS;
                const u64 at = static_cast<u64>(begin + n) * p.rank + chunk + r;
                lora_b[i] = r < ranks ? to_float(load(static_cast<const T *>(p.lora_b) + at)) : 0.0f;
            }
            Columns<W, RANKS> own;
#pragma unroll
            for (u32 r = 0; r < RANKS; ++r) {
                if (GRAD_B && r < ranks && count > 0u) {
                    const u64 at = static_cast<u64>(chunk + r) * p.columns + first;
                    load_floats(static_cast<const T *>(p.lora_a) + at, count, aligned, own.lora_a[r]);
                }
            }
            __syncthreads();

            // The rows of the split, 4 at a time by each warp.
            for (u32 row = warp * ROWS; row < rows; row += TILE) {
                float grad_b[WARP] = {};
                accumulate_rows<T, RANKS, GRAD_B>(p, lora_b, begin, row, rows, first, count, own, grad_b);
                if (GRAD_B) {
                    const float sum = warp_sums(grad_b);
                    const u32 n = row + lane / RANKS, r = lane % RANKS;
                    if (n < rows && r < ranks) {
                        const u64 at = static_cast<u64>(blockIdx.x) * p.rows + begin + n;
                        store(p.b_partial + at * p.rank + chunk + r, p.scale * sum);
                    }
                }
            }

            // `sums` is not written again before all have passed the next chunk's barrier, and `lora_b` is free by now.
            const u64 at = (static_cast<u64>(split) * p.rank + chunk) * p.columns + first;
            store_grad_a(own.grad_a, sums, p.a_partial + at, ranks, p.columns, count, p.scale, aligned);
        }
    }
}

// Matrix and biases are T, the vector V, the output Out.
template <class T, class V, class Out> __device__ __forceinline__ void prompt_bias(const PromptBiasParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    const u32 lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= p.rows) {
        return; // the whole warp
    }
    const T *matrix = static_cast<const T *>(p.matrix) + static_cast<u64>(row) * p.columns;
    float sum = 0.0f;
#pragma unroll 4
    for (u32 at = lane * W; at < p.columns; at += WARP * W) {
        float left[W], right[W];
        load_floats(matrix + at, p.columns - at, p.aligned != 0u, left);
        load_floats(static_cast<const V *>(p.vector) + at, p.columns - at, p.aligned != 0u, right);
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            sum += left[j] * right[j];
        }
    }
    sum = warp_sum(sum);
    if (lane == 0u) {
        if (p.base_bias != nullptr && p.delta_bias != nullptr) {
            sum += to_float(load(static_cast<const T *>(p.base_bias) + row)) *
                   to_float(load(static_cast<const T *>(p.delta_bias) + row));
        }
        store(static_cast<Out *>(p.out) + row, from_float<Out>(sum));
    }
}

template <class T> __device__ __forceinline__ void prompt_grads(const PromptGradsParams &p) {
    PACE_SHARED(float, sums);
    const T *down = static_cast<const T *>(p.prompt_down);
    T *down_grad = static_cast<T *>(p.prompt_down_grad);
    const u32 x = threadIdx.x % p.width, y = threadIdx.x / p.width, height = blockDim.x / p.width;
    const u32 begin = blockIdx.x * p.part, end = min(p.columns, begin + p.part);
    for (u32 chunk = 0; chunk < p.rank; chunk += p.width) {
        const u32 r = chunk + x;
        float sum = 0.0f;
        if (r < p.rank) {
            const float up = to_float(load(static_cast<const T *>(p.prompt_up) + r));
            for (u32 k = begin + y; k < end; k += height) {
                const u64 at = static_cast<u64>(k) * p.rank + r;
                const float q = load(p.q + k);
                sum += to_float(load(down + at)) * q;
                store(down_grad + at, from_float<T>(q * up));
            }
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (y == 0u && r < p.rank) {
            for (u32 other = 1; other < height; ++other) {
                sum += sums[other * p.width + x];
            }
            store(p.prompt_up_partial + static_cast<u64>(blockIdx.x) * p.rank + r, sum);
        }
        // Another chunk follows only where the block is as wide as a chunk, and then threads read only their own sums.
    }
    if (p.delta_bias != nullptr) {
        for (u64 n = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; n < p.rows;
             n += static_cast<u64>(gridDim.x) * blockDim.x) {
            float value = 0.0f;
            if (p.base_bias != nullptr) {
                value = to_float(load(static_cast<const T *>(p.base_bias) + n)) *
                        to_float(load(static_cast<const T *>(p.grad) + n));
            }
            store(static_cast<T *>(p.delta_bias) + n, from_float<T>(value));
        }
    }
}

template <class T> __device__ __forceinline__ void merge(const MergeParams &p) {
    constexpr u32 W = Vector<T>::SIZE, BATCH = 4;
    T *target = static_cast<T *>(p.target);
    const T *delta = static_cast<const T *>(p.delta);
    const u64 step = static_cast<u64>(gridDim.x) * blockDim.x * W;
    for (u64 first = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * W; first < p.length;
         first += BATCH * step) {
        Vector<T> sum[BATCH] = {}, change[BATCH] = {};
        // Elements of a vector, and whether it is full and aligned.
        const auto count = [&](u64 at) { return static_cast<u32>(p.length - at < W ? p.length - at : W); };
        const auto whole = [&](u64 at) { return p.aligned != 0u && count(at) == W; };
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u64 at = first + i * step;
            if (at < p.length) {
                sum[i] = load_some<T>(target + at, count(at), whole(at));
                change[i] = load_some(delta + at, count(at), whole(at));
            }
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u64 at = first + i * step;
            if (at < p.length) {
                float value[W], delta[W];
                to_floats(sum[i], value);
                to_floats(change[i], delta);
#pragma unroll
                for (u32 j = 0; j < W; ++j) {
                    value[j] += p.sign * delta[j];
                }
                store_some(target + at, from_floats<T>(value), count(at), whole(at));
            }
        }
    }
}

PACE_KERNELS(low_rank_weight, LowRankWeightParams, (WEIGHT_WARPS * WARP), low_rank_weight<T>(p))
PACE_KERNELS(low_rank_weight_backward, LowRankBackwardParams, (WEIGHT_WARPS * WARP),
             low_rank_backward<T, WEIGHT_BACKWARD_RANKS, true>(p))
PACE_KERNELS(prompt_bias_product, PromptBiasParams, (PROMPT_THREADS), prompt_bias<T, T, float>(p))
PACE_KERNELS(prompt_bias, PromptBiasParams, (PROMPT_THREADS), prompt_bias<T, float, T>(p))
PACE_KERNELS(prompt_bias_columns, LowRankBackwardParams, (WEIGHT_WARPS * WARP), low_rank_backward<T, 1, false>(p))
PACE_KERNELS(prompt_bias_grads, PromptGradsParams, (PROMPT_THREADS), prompt_grads<T>(p))
PACE_KERNELS(merge, MergeParams, (MERGE_THREADS), merge<T>(p))

} // namespace pace
