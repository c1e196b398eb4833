// Dense noisy linear layer, forward and backward, on tensor cores.
//
//   forward   y = x @ W0^T + b0 + z * (x @ Wd^T + bd)         any of the four absent
//   folded    y = x @ (W0 + z * Wd)^T + b0 + z * bd           rows of a tile share z: BC noise and many tokens, or none
//   input     dx = g @ W0 + e @ Wd,  e = z * g                sums over the branches that share an input
//   weight    grad_Wd = e^T @ x,  grad_bd = sum over rows of e
//
//   x [M, K] or, shared by the branches, [B T, K]; W0, Wd [N, K]; b0, bd [N]; y, g [M, N]; z as in noise_source.cuh
//
// A GEMM is a list of segments (a, b, inner size) that go to one accumulator or, forward, to two: the base's and the adapter's.
// So GEMMs of the low-rank layer are the same kernels: s @ B^T for x @ Wd^T, ds @ A for e @ Wd; they bring a scale.
//
// Mapping: a block makes 128 x 128 outputs (mainloop.cuh), column tiles first so that blocks that run together read the same
// rows of x. Noise of the forward pass is made once per tile, sample (or token) and channel, in shared memory; that of the
// backward pass one tile along K ahead of its use, and multiplied into the A fragments in f32.
//
// Bytes: operands once per 128 rows or columns of the output that need them, mostly from L2; y, dx, grad_Wd written once.
// grad_Wd is split-K: over token rows into fp32 partials (kernels/partial_sums.cu). Operations: 2 M N K per GEMM; f32 without
// tf32 takes three times as many.
// Determinism: run-to-run bitwise; no float atomics, every sum in a fixed order.

#include "../tile_noise.cuh"
#include "epilogue.cuh"

namespace pace {

namespace sm80 {

// ---- forward

// z of the tile whose rows are `row` to `last`, in shared memory. All threads in the block must have left the mainloop.
__device__ __forceinline__ void fill_tile_noise(float *z, const NoisyLinearParams &p, const NoiseRows &rows, u32 last,
                                                u32 column) {
    fill_noise<THREADS, TILE / 4>(z, p.noise, key_of(p.noise), rows.first, rows.place(last) + 1, p.tokens, column,
                                  p.channels, p.noise.aligned != 0u);
}

// TWO: the base's and the adapter's GEMMs have accumulators of their own. Otherwise there is one of them.
template <class Math, bool TWO> __device__ __forceinline__ void forward(const NoisyLinearParams &p) {
    using T = typename Math::T;
    PACE_SHARED(unsigned char, shared);
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const u32 first_tiles = tiles_of<T>(p.segments[0].inner);
    const u32 tiles = p.count == 1 ? first_tiles : first_tiles + tiles_of<T>(p.segments[1].inner);

    // Mainloop over the tiles of the one segment, then of the other.
    Accumulators base = {}, adapter = {};
    mainloop<SM80_FORWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            const Segment &segment = p.segments[tile < first_tiles ? 0 : 1];
            const u32 k = (tile < first_tiles ? tile : tile - first_tiles) * TILE_K<T>;
            copy_tile<T, false>(stage, operand<T>(segment.left, p.rows, segment.inner, p.wrap, segment.aligned), row,
                                k);
            copy_tile<T, false>(stage + TILE_BYTES,
                                operand<T>(segment.right, p.channels, segment.inner, NO_WRAP, segment.aligned), column,
                                k);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (TWO && tile >= first_tiles) {
                multiply_tile<Math, false, false>(adapter, stage, stage + TILE_BYTES, NoScale(), NoVisit());
            } else {
                multiply_tile<Math, false, false>(base, stage, stage + TILE_BYTES, NoScale(), NoVisit());
            }
        });

    // Noise takes the place of the stages.
    const NoiseRows noise_rows(p.noise, p.tokens, row);
    const u32 last = min(row + TILE, p.rows) - 1;
    const bool noisy = p.noise.kind != NOISE_OFF;
    float *z = reinterpret_cast<float *>(shared);
    if (noisy) {
        __syncthreads();
        fill_tile_noise(z, p, noise_rows, last, column);
        __syncthreads();
    }

    // Epilogue: y = z * (scale * adapter + bd) + base + b0.
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
    const bool only_adapter = !TWO && p.segments[0].adapter != 0u;
    each_accumulator([&](u32 m, u32 n, u32 i, u32 r, u32 k) {
        const float factor = noisy ? z[noise_rows.place(min(row + r, last)) * TILE + k] : 1.0f;
        float &out = base[m][n][i];
        const float under_noise = TWO ? adapter[m][n][i] : only_adapter ? out : 0.0f;
        const float rest = only_adapter ? 0.0f : out;
        out = fmaf(factor, fmaf(p.scale, under_noise, delta_bias.value[n][i % 2]), rest + base_bias.value[n][i % 2]);
    });
    store_tile<T>(base, shared, static_cast<T *>(p.y), row, column, p.rows, p.channels, p.aligned != 0u);
}

// ---- forward, folded

// c += x @ (W0 + z * Wd)^T over one tile along K, with the weight folded in registers. `own`: z of the weight rows of this
// thread's B fragments.
template <class Math>
__device__ __forceinline__ void multiply_folded_tile(Accumulators &c, const unsigned char *stage,
                                                     const float (&own)[4]) {
    using T = typename Math::T;
#pragma unroll
    for (u32 step = 0; step < K_STEPS; ++step) {
        typename Math::template FragmentB<4> b;
#pragma unroll
        for (u32 pair = 0; pair < 2; ++pair) {
            u32 base[4], delta[4];
            load_b<T, false>(base, stage + TILE_BYTES, warp_column() + 16 * pair, step);
            load_b<T, false>(delta, stage + 2 * TILE_BYTES, warp_column() + 16 * pair, step);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 n = 2 * pair + i;
                b.set(n, folded<T>(base[2 * i], delta[2 * i], own[n]),
                      folded<T>(base[2 * i + 1], delta[2 * i + 1], own[n]));
            }
        }
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            u32 bits[4];
            load_a<T, false>(bits, stage, warp_row() + 16 * m, step);
            Math::multiply(c[m], Math::fragment_a(bits), b);
        }
    }
}

// Rows of a tile belong to one sample; segments are the base and the adapter. tokens = M where there is no noise.
template <class Math> __device__ __forceinline__ void forward_folded(const NoisyLinearParams &p) {
    using T = typename Math::T;
    PACE_SHARED(unsigned char, shared);
    float *z = reinterpret_cast<float *>(shared + SM80_FOLDED_STAGES * 3 * TILE_BYTES); // of the tile's columns
    const u32 column = blockIdx.x % p.tile_columns * TILE, rest = blockIdx.x / p.tile_columns;
    const u32 tile_rows = (p.tokens - 1) / TILE + 1;
    const u32 sample = rest / tile_rows, row = rest % tile_rows * TILE;
    const u32 first = sample * p.tokens, inner = p.segments[0].inner;

    // The sample's own x, for branches that share theirs are not folded, and its z for this thread's columns.
    const T *x = static_cast<const T *>(p.segments[0].left) + static_cast<u64>(first) * inner;
    const Operand<T> a = operand<T>(x, p.tokens, inner, NO_WRAP, p.segments[0].aligned);
    fill_noise<THREADS, TILE / 4>(z, p.noise, key_of(p.noise), sample, 1, p.tokens, column, p.channels,
                                  p.noise.aligned != 0u);
    __syncthreads();
    float own[4];
#pragma unroll
    for (u32 n = 0; n < 4; ++n) {
        own[n] = z[warp_column() + 8 * n + lane() / 4];
    }

    // Mainloop: a stage holds a tile of x, of W0 and of Wd.
    Accumulators c = {};
    mainloop<SM80_FOLDED_STAGES>(
        shared, 3 * TILE_BYTES, tiles_of<T>(inner),
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, false>(stage, a, row, tile * TILE_K<T>);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const Segment &segment = p.segments[i];
                copy_tile<T, false>(stage + (1 + i) * TILE_BYTES,
                                    operand<T>(segment.right, p.channels, inner, NO_WRAP, segment.aligned), column,
                                    tile * TILE_K<T>);
            }
        },
        [&](const unsigned char *stage, u32) { multiply_folded_tile<Math>(c, stage, own); });

    // Epilogue: y = c + b0 + z * bd.
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
    each_accumulator([&](u32 m, u32 n, u32 i, u32, u32 k) {
        c[m][n][i] += fmaf(z[k], delta_bias.value[n][i % 2], base_bias.value[n][i % 2]);
    });
    store_tile<T>(c, shared, static_cast<T *>(p.y) + static_cast<u64>(first) * p.channels, row, column, p.tokens,
                  p.channels, p.aligned != 0u);
}

// ---- gradient to the input

// z of the token rows of this thread's A fragments; K is the channels.
template <class T> struct ScaleRows {
    static constexpr bool POSSIBLE = true;
    static constexpr u32 STRIDE = TILE_K<T> + 8; // keeps the rows of a fragment in different banks
    bool on;
    const float *z;
    const u32 (&places)[4][2];
    __device__ __forceinline__ float operator()(u32 m, u32 half, u32 k) const {
        return z[places[m][half] * STRIDE + k];
    }
};

// Segment and inner index of a tile along K.
struct SegmentTile {
    u32 segment, k;
};

template <class T> __device__ __forceinline__ SegmentTile segment_tile(const NoisyLinearInputParams &p, u32 tile) {
    u32 segment = 0;
    for (; segment + 1 < p.count; ++segment) {
        const u32 tiles = tiles_of<T>(p.segments[segment].inner);
        if (tile < tiles) {
            break;
        }
        tile -= tiles;
    }
    return {segment, tile * TILE_K<T>};
}

__device__ __forceinline__ bool is_scaled(const NoisyLinearInputParams &p, const Segment &segment) {
    return segment.adapter != 0u && p.noise.kind != NOISE_OFF;
}

// z of a tile of g, token rows from `row` to `last`, if its segment is under noise.
template <class T>
__device__ __forceinline__ void fill_input_noise(float *z, const NoisyLinearInputParams &p, noise::Key key,
                                                 SegmentTile at, u32 row, u32 last) {
    const Segment &segment = p.segments[at.segment];
    if (is_scaled(p, segment)) {
        const NoiseRows rows(p.noise, p.tokens, segment.first_row + row);
        fill_noise<THREADS, TILE_K<T> / 4, ScaleRows<T>::STRIDE>(z, p.noise, key, rows.first,
                                                                 rows.place(segment.first_row + last) + 1, p.tokens,
                                                                 at.k, p.channels, p.noise.aligned != 0u);
    }
}

// c += (z * g) @ W over one tile along K.
template <class Math>
__device__ __forceinline__ void multiply_input_tile(Accumulators &c, const unsigned char *stage, const float *z,
                                                    const NoisyLinearInputParams &p, const Segment &segment, u32 row,
                                                    u32 last) {
    // Which rows of z belong to the rows of this thread's A fragments.
    const NoiseRows rows(p.noise, p.tokens, segment.first_row + row);
    u32 places[4][2];
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 r = row + warp_row() + 16 * m + 8 * half + lane() / 4;
            places[m][half] = rows.place(segment.first_row + min(r, last));
        }
    }
    multiply_tile<Math, false, true>(c, stage, stage + TILE_BYTES,
                                     ScaleRows<typename Math::T>{is_scaled(p, segment), z, places}, NoVisit());
}

template <class Math> __device__ __forceinline__ void input_gradient(const NoisyLinearInputParams &p) {
    using T = typename Math::T;
    PACE_SHARED(unsigned char, shared);
    // z of a tile goes to one of two buffers: one is filled while the other is in use.
    float *z = reinterpret_cast<float *>(shared + SM80_BACKWARD_STAGES * 2 * TILE_BYTES);
    constexpr u32 Z_SIZE = TILE * ScaleRows<T>::STRIDE;
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const u32 last = min(row + TILE, p.rows) - 1;
    const noise::Key key = key_of(p.noise);
    u32 tiles = 0;
    for (u32 i = 0; i < p.count; ++i) {
        tiles += tiles_of<T>(p.segments[i].inner);
    }

    // Mainloop over the tiles of all segments.
    Accumulators c = {};
    fill_input_noise<T>(z, p, key, segment_tile<T>(p, 0), row, last);
    mainloop<SM80_BACKWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            const SegmentTile at = segment_tile<T>(p, tile);
            const Segment &segment = p.segments[at.segment];
            copy_tile<T, false>(stage, operand<T>(segment.left, p.rows, segment.inner, NO_WRAP, segment.aligned), row,
                                at.k);
            copy_tile<T, true>(stage + TILE_BYTES,
                               operand<T>(segment.right, segment.inner, p.columns, NO_WRAP, segment.aligned), column,
                               at.k);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (tile + 1 < tiles) {
                fill_input_noise<T>(z + (tile + 1) % 2 * Z_SIZE, p, key, segment_tile<T>(p, tile + 1), row, last);
            }
            const Segment &segment = p.segments[segment_tile<T>(p, tile).segment];
            multiply_input_tile<Math>(c, stage, z + tile % 2 * Z_SIZE, p, segment, row, last);
        });

    each_accumulator([&](u32 m, u32 n, u32 i, u32, u32) { c[m][n][i] *= p.scale; });
    store_tile<T>(c, shared, static_cast<T *>(p.dx), row, column, p.rows, p.columns, p.aligned != 0u);
}

// ---- gradient to the weight

// z of the channels of this thread's A fragments; K is the tokens.
struct ScaleColumns {
    static constexpr bool POSSIBLE = true;
    bool on;
    const float *z;
    const u32 *places; // of the tile's tokens
    __device__ __forceinline__ float operator()(u32 m, u32 half, u32 k) const {
        return z[places[k] * TILE + warp_row() + 16 * m + 8 * half + lane() / 4];
    }
};

// z of a tile of g, token rows from `row` on of a split that ends at `end`, and which row of z belongs to which token row.
template <class T>
__device__ __forceinline__ void fill_weight_noise(float *z, u32 *places, const NoisyLinearWeightParams &p,
                                                  noise::Key key, u32 row, u32 end, u32 channel) {
    const u32 last = min(row + TILE_K<T>, end) - 1;
    const NoiseRows rows(p.noise, p.tokens, row);
    fill_noise<THREADS, TILE / 4>(z, p.noise, key, rows.first, rows.place(last) + 1, p.tokens, channel, p.channels,
                                  p.noise.aligned != 0u);
    if (threadIdx.x < TILE_K<T>) {
        places[threadIdx.x] = rows.place(min(row + threadIdx.x, last));
    }
}

// grad_bd of 128 channels from `channel` on, from the first column of the accumulators `sums`.
template <class T>
__device__ __forceinline__ void store_bias_gradient(const NoisyLinearWeightParams &p, const float (&sums)[4][1][4],
                                                    u32 split, u32 channel) {
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 n = channel + warp_row() + 16 * m + 8 * half + lane() / 4;
            if (n < p.channels) {
                const float sum = sums[m][0][2 * half];
                if (p.partial != 0u) {
                    store(static_cast<float *>(p.bias) + static_cast<u64>(split) * p.channels + n, sum);
                } else {
                    store(static_cast<T *>(p.bias) + n, from_float<T>(sum));
                }
            }
        }
    }
}

template <class Math> __device__ __forceinline__ void weight_gradient(const NoisyLinearWeightParams &p) {
    using T = typename Math::T;
    PACE_SHARED(unsigned char, shared);
    // z of a tile, and the places of its tokens, go to one of two buffers: one is filled while the other is in use.
    float *z = reinterpret_cast<float *>(shared + SM80_BACKWARD_STAGES * 2 * TILE_BYTES);
    constexpr u32 Z_SIZE = TILE_K<T> * TILE;
    u32 *places = reinterpret_cast<u32 *>(z + 2 * Z_SIZE);
    const u32 column = blockIdx.x % p.tile_columns * TILE, rest = blockIdx.x / p.tile_columns;
    const u32 channel = rest % p.tile_rows * TILE, split = rest / p.tile_rows;
    const u32 first = split * p.part, end = min(first + p.part, p.rows);
    const u32 tiles = tiles_of<T>(end - first);
    const bool noisy = p.noise.kind != NOISE_OFF;
    const noise::Key key = key_of(p.noise);
    const Operand<T> g = operand<T>(p.g, end, p.channels, NO_WRAP, p.left_aligned);
    const Operand<T> x = operand<T>(p.x, end, p.columns, p.wrap, p.right_aligned);
    const auto fill = [&](u32 tile) {
        if (noisy) {
            fill_weight_noise<T>(z + tile % 2 * Z_SIZE, places + tile % 2 * TILE_K<T>, p, key, first + tile * TILE_K<T>,
                                 end, channel);
        }
    };

    // Mainloop over the token rows of this split. grad_bd is one more column: e^T @ (1, ..., 1).
    const bool sums_up = p.bias != nullptr && column == 0 && warp_column() == 0;
    float sums[4][1][4] = {};
    Accumulators c = {};
    fill(0);
    mainloop<SM80_BACKWARD_STAGES>(
        shared, 2 * TILE_BYTES, tiles,
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, true>(stage, g, channel, first + tile * TILE_K<T>);
            copy_tile<T, true>(stage + TILE_BYTES, x, column, first + tile * TILE_K<T>);
        },
        [&](const unsigned char *stage, u32 tile) {
            if (tile + 1 < tiles) {
                fill(tile + 1);
            }
            multiply_tile<Math, true, true>(c, stage, stage + TILE_BYTES,
                                            ScaleColumns{noisy, z + tile % 2 * Z_SIZE, places + tile % 2 * TILE_K<T>},
                                            [&](u32 m, u32, const typename Math::FragmentA &a) {
                                                if (sums_up) {
                                                    typename Math::template FragmentB<1> ones;
                                                    ones.set_ones(0);
                                                    Math::multiply(sums[m], a, ones);
                                                }
                                            });
        });

    // Epilogue: results, or fp32 partials [split, N, K] and [split, N].
    if (sums_up && lane() % 4 == 0) {
        store_bias_gradient<T>(p, sums, split, channel);
    }
    if (p.partial != 0u) {
        float *out = static_cast<float *>(p.weight) + static_cast<u64>(split) * p.channels * p.columns;
        store_tile<float>(c, shared, out, channel, column, p.channels, p.columns, p.aligned != 0u);
    } else {
        store_tile<T>(c, shared, static_cast<T *>(p.weight), channel, column, p.channels, p.columns, p.aligned != 0u);
    }
}

PACE_GEMM_KERNELS(noisy_linear_one, NoisyLinearParams, (THREADS), forward<Math, false>(p))
PACE_GEMM_KERNELS(noisy_linear_two, NoisyLinearParams, (THREADS), forward<Math, true>(p))
PACE_GEMM_KERNELS(noisy_linear_folded, NoisyLinearParams, (THREADS), forward_folded<Math>(p))
PACE_GEMM_KERNELS(noisy_linear_input, NoisyLinearInputParams, (THREADS), input_gradient<Math>(p))
PACE_GEMM_KERNELS(noisy_linear_weight, NoisyLinearWeightParams, (THREADS), weight_gradient<Math>(p))

} // namespace sm80
} // namespace pace
