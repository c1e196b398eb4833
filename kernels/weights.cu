// Weight builders: the weight and bias differences of adapters from their trained factors, and merging.
//
//   adapter_weights   Wd = [W0 *] scale * (B @ A)           LoRA add, or LoRA mul where there is W0
//                     bd = W0 @ (Pd @ Pu) + b0 * d          VPT add
//   merge             target += sign * delta                sign 1 or -1
//
//   B [N, r], A [r, K]; W0, Wd [N, K]; Pd [K, p], Pu [p], b0, d, bd [N]; all of one type, f32, f16 or bf16.
//   Arithmetic in f32, results rounded once; Pd @ Pu stays in f32.
//
// adapter_weights: a launch takes up to WEIGHT_LAYERS layers, of any sizes, each with Wd, bd or both; a block finds its layer.
// Wd: a block has a strip of 128 bytes along K and 64 rows, a warp 8 of them. An MMA gives 16 columns by 8 rows from 8 ranks: lane
// (g, t) = (lane / 4, lane % 4) holds columns g W to g W + W - 1 (a vector) of A's rows t, t + 4, t + 8, t + 12 and, of B, these ranks of
// row g; it gets the same columns of rows 2 t and 2 t + 1, whose W0 it loads first.
// bd: a block has 16 rows, a warp 2; Pd @ Pu is made in shared memory by every block, for as many columns as there is room for,
// from a part of Pd that is loaded as vectors. These blocks come first: they wait for memory twice.
// merge: 16 bytes per thread and turn, four loads in flight.
//
// Bytes: Wd 1 or 2 (with W0) times N * K * sizeof(T), and r * K * sizeof(T) for every 64 rows from the L2 cache; bd
// N * K * sizeof(T), and K * p * sizeof(T) for every 16 rows from there; merge 3 * length * sizeof(T). In 16-byte accesses where
// rows are aligned, and otherwise element by element; B is read element by element.
// Operations: r fused multiply-adds per element of Wd, on tensor cores; 1 of bd and of merge.
// Determinism: gpu-to-gpu bitwise; nothing depends on the grid, nor on which layers share a launch.

#include "grouped.cuh"
#include "low_rank.cuh"
#include "params.h"
#include "reduce.cuh"

namespace pace {

constexpr u32 WARPS = WEIGHT_THREADS / WARP;
static_assert(WEIGHT_ROWS == WARPS * OCTET, "8 rows of Wd per warp");
constexpr u32 BIAS_ROWS = BIAS_TILE_ROWS / WARPS; // of bd per warp

// The block's tile of Wd.
template <class T> __device__ __forceinline__ void build_weight(const WeightLayer &p, u32 block) {
    constexpr u32 W = Vector<T>::SIZE;
    constexpr bool SPLIT = sizeof(T) == 4;
    const u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, strips = strips_of(p.columns, STRIP<T>);
    const u32 octet = block / strips * WEIGHT_ROWS + threadIdx.x / WARP * OCTET, row = octet + 2 * t;
    const u32 first = block % strips * STRIP<T> + g * W, count = first < p.columns ? p.columns - first : 0u;
    const bool aligned = p.aligned != 0u;
    if (octet >= p.rows) {
        return; // the whole warp
    }
    const auto at = [&](u32 i) { return static_cast<u64>(row + i) * p.columns + first; };
    const auto exists = [&](u32 i) { return row + i < p.rows && count > 0u; };

    // W0 is under way during the sums.
    const T *base = static_cast<const T *>(p.base);
    Vector<T> factor[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        factor[i] = load_if(base != nullptr && exists(i), base + at(i), count, aligned);
    }

    // B @ A, 16 ranks at a time.
    float sum[W / 2][1][4] = {};
    for (u32 chunk = 0; chunk < p.rank; chunk += RANKS) {
        Vector<T> a[4];
        float b[4] = {};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 r = chunk + 4 * i + t;
            const T *lora_a = static_cast<const T *>(p.lora_a) + static_cast<u64>(r) * p.columns + first;
            a[i] = load_if(r < p.rank && count > 0u, lora_a, count, aligned);
            if (r < p.rank && octet + g < p.rows) {
                b[i] = to_float(load(static_cast<const T *>(p.lora_b) + static_cast<u64>(octet + g) * p.rank + r));
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; i += 2) {
            const float right[1][2] = {{b[i], b[i + 1]}};
#pragma unroll
            for (u32 m = 0; m < W / 2; ++m) {
                const float left[4] = {element(a[i], 2 * m), element(a[i], 2 * m + 1), element(a[i + 1], 2 * m),
                                       element(a[i + 1], 2 * m + 1)};
                multiply<SPLIT, SPLIT>(sum[m], left, right);
            }
        }
    }

    // Wd = [W0 *] scale * sums.
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        float w0[W], value[W];
        to_floats(factor[i], w0);
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            value[j] = p.scale * sum[j / 2][0][i + 2 * (j % 2)];
            value[j] = base != nullptr ? w0[j] * value[j] : value[j];
        }
        if (exists(i)) {
            store_some(static_cast<T *>(p.weight) + at(i), from_floats<T>(value), count, aligned);
        }
    }
}

// Writes Pd @ Pu to `prompt`, `count` columns from `column` on, and zeros up to the next multiple of a vector. Ranks are taken
// `ranks` at a time: all of them, or where they are so many those of one column. `staged` has room for these. Must be called by all
// threads in the block, with a barrier between this and the next access to `prompt`.
template <class T>
__device__ __forceinline__ void make_prompt(const WeightLayer &p, u32 column, u32 count, u32 ranks, float *prompt,
                                            Vector<T> *staged) {
    constexpr u32 W = Vector<T>::SIZE, BATCH = 4;
    for (u32 rank = 0; rank < p.prompt_rank; rank += ranks) {
        const u32 r = min(ranks, p.prompt_rank - rank), length = count * r;
        const T *from = static_cast<const T *>(p.prompt_down) + static_cast<u64>(column) * p.prompt_rank + rank;
        const bool aligned = reinterpret_cast<u64>(from) % 16 == 0;
        __syncthreads(); // the previous part is free
        for (u32 first = threadIdx.x * W; first < length; first += BATCH * WEIGHT_THREADS * W) {
            Vector<T> batch[BATCH];
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                const u32 at = first + i * WEIGHT_THREADS * W;
                batch[i] = load_if(at < length, from + at, length - at, aligned && length - at >= W);
            }
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                const u32 at = first + i * WEIGHT_THREADS * W;
                if (at < length) {
                    staged[at / W] = batch[i];
                }
            }
        }
        __syncthreads();
        for (u32 c = threadIdx.x; c < (count + W - 1) / W * W; c += WEIGHT_THREADS) {
            float sum = rank == 0 ? 0.0f : prompt[c];
#pragma unroll 2
            for (u32 i = 0; i < r && c < count; ++i) {
                sum += to_float(reinterpret_cast<const T *>(staged)[c * r + i]) *
                       to_float(load(static_cast<const T *>(p.prompt_up) + rank + i));
            }
            prompt[c] = sum;
        }
    }
}

// The block's rows of bd.
template <class T> __device__ __forceinline__ void build_bias(const WeightLayer &p, u32 block) {
    constexpr u32 W = Vector<T>::SIZE, STAGED = PROMPT_BYTES / sizeof(T);
    PACE_SHARED(float, prompt);
    Vector<T> *staged = reinterpret_cast<Vector<T> *>(prompt + PROMPT_COLUMNS);
    const u32 lane = threadIdx.x % WARP, row = block * BIAS_TILE_ROWS + threadIdx.x / WARP * BIAS_ROWS;
    const u32 ranks = min(p.prompt_rank, STAGED), most = min(PROMPT_COLUMNS, STAGED / ranks);
    const u32 columns = most < W ? most : most / W * W; // of a turn
    const bool aligned = p.aligned != 0u && columns % W == 0;

    float sum[BIAS_ROWS] = {};
    for (u32 column = 0; column < p.columns; column += columns) {
        const u32 count = min(columns, p.columns - column);
        make_prompt<T>(p, column, count, ranks, prompt, staged);
        __syncthreads();
#pragma unroll 4
        for (u32 at = lane * W; at < count; at += WARP * W) {
#pragma unroll
            for (u32 i = 0; i < BIAS_ROWS; ++i) {
                const T *base = static_cast<const T *>(p.base) + static_cast<u64>(row + i) * p.columns + column;
                float w0[W];
                to_floats(load_if(row + i < p.rows, base + at, count - at, aligned), w0);
#pragma unroll
                for (u32 j = 0; j < W; ++j) {
                    sum[i] += w0[j] * prompt[at + j];
                }
            }
        }
    }
    // A lane has a row.
    float value = warp_reduce<Sum>(sum);
    const u32 n = row + lane;
    if (lane < BIAS_ROWS && n < p.rows) {
        if (p.base_bias != nullptr && p.delta_bias != nullptr) {
            value += to_float(load(static_cast<const T *>(p.base_bias) + n)) *
                     to_float(load(static_cast<const T *>(p.delta_bias) + n));
        }
        store(static_cast<T *>(p.bias) + n, from_float<T>(value));
    }
}

template <class T> __device__ __forceinline__ void adapter_weights(const AdapterWeightsParams &p) {
    const u32 member = member_of(p.first_block, static_cast<u32>(p.count), blockIdx.x),
              block = blockIdx.x - p.first_block[member];
    const WeightLayer &layer = p.layers[member];
    const u32 bias_blocks = layer.bias == nullptr ? 0u : (layer.rows - 1) / BIAS_TILE_ROWS + 1;
    if (block < bias_blocks) {
        build_bias<T>(layer, block);
    } else {
        build_weight<T>(layer, block - bias_blocks);
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

// Registers for as many warps as hide the latency of memory.
PACE_KERNELS_F32(adapter_weights, AdapterWeightsParams, (WEIGHT_THREADS, 3), adapter_weights<T>(p))
PACE_KERNELS_16(adapter_weights, AdapterWeightsParams, (WEIGHT_THREADS, 4), adapter_weights<T>(p))
PACE_KERNELS(merge, MergeParams, (MERGE_THREADS), merge<T>(p))

} // namespace pace
