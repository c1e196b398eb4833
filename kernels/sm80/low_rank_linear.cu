// Low-rank noisy linear layer (LoRA add) for ranks up to 32, forward and the adapter's part of the backward pass, on tensor
// cores.
//
//   forward   s = c x * U^T,  y = x * W0^T + b0 + z . (s * D^T + db)
//   factors   ds = c e * D,  dD = e^T * s,  ddb = sum over rows of e,  with e = z . g
//
//   x [M, K] or, shared by the branches, [B T, K]; W0 [N, K]; U [r, K]; D [N, r]; b0, db [N]; y, g [M, N]; s [rows of x, r];
//   ds [M, r]; c: the scale; z as in noise_source.cuh. What is left of the backward pass, dx = g * W0 + ds * U and
//   dU = ds^T * x, and other ranks are products of noisy_linear.cu.
//
// Forward: a block makes 128 x 128 outputs (mainloop.cuh). Its ring of tiles carries U besides x and W0: each warp
// multiplies one of its four left fragments of x with it, so that s costs no load of x. Then s, rounded to storage, is the
// left operand of one more step of the inner dimension, whose sum takes 16 rows of accumulators at a time.
// Factors: a block has a range of token rows and 1 KiB of channels. 32 rows of g at a time come through registers, are
// multiplied by z on the way, and serve both products from shared memory; z of a sample is made once per thread and run of
// its tokens. ds is summed over the channels of the block, dD and ddb over its rows.
//
// Bytes: forward as a dense layer without its adapter's product, and r / 128 more of U; s written once. Factors: g once; ds
// and dD as partial sums in f32, about 4 r / 1024 of the bytes of g and 4 r KiB (32-bit types: half) per block, which
// kernels/partial_sums.cu adds up. Operations: 2 M N K (1 + R / 128) + 2 M N R forward, R the rank rounded up to 16 or 32;
// 4 M N R for the factors.
// Determinism: run-to-run bitwise; no float atomics, every sum in a fixed order.

#include "../tile_noise.cuh"
#include "epilogue.cuh"

namespace pace {

struct LowRankLinearParams {
    NoiseSource noise;
    const void *x, *weight, *up, *down;
    const void *base_bias, *delta_bias; // or null
    void *s, *y;
    u32 rows;     // M
    u32 tokens;   // T
    u32 channels; // N
    u32 inner;    // K
    u32 rank;     // r
    u32 wrap;     // rows of x
    u32 tile_columns;
    u32 aligned;      // y
    u32 z_aligned;    // a given z
    u32 x_aligned;    // x, W0 and U
    u32 down_aligned; // D
    float scale;      // c
};

PACE_PARAMS(LowRankLinearParams, 160);
PACE_PARAM(LowRankLinearParams, x, 48);
PACE_PARAM(LowRankLinearParams, weight, 56);
PACE_PARAM(LowRankLinearParams, up, 64);
PACE_PARAM(LowRankLinearParams, down, 72);
PACE_PARAM(LowRankLinearParams, base_bias, 80);
PACE_PARAM(LowRankLinearParams, delta_bias, 88);
PACE_PARAM(LowRankLinearParams, s, 96);
PACE_PARAM(LowRankLinearParams, y, 104);
PACE_PARAM(LowRankLinearParams, rows, 112);
PACE_PARAM(LowRankLinearParams, tokens, 116);
PACE_PARAM(LowRankLinearParams, channels, 120);
PACE_PARAM(LowRankLinearParams, inner, 124);
PACE_PARAM(LowRankLinearParams, rank, 128);
PACE_PARAM(LowRankLinearParams, wrap, 132);
PACE_PARAM(LowRankLinearParams, tile_columns, 136);
PACE_PARAM(LowRankLinearParams, aligned, 140);
PACE_PARAM(LowRankLinearParams, z_aligned, 144);
PACE_PARAM(LowRankLinearParams, x_aligned, 148);
PACE_PARAM(LowRankLinearParams, down_aligned, 152);
PACE_PARAM(LowRankLinearParams, scale, 156);

struct LowRankFactorsParams {
    NoiseSource noise;
    const void *g, *s, *down;
    float *ds;         // partial sums [chunks, M, r], or null
    float *down_sums;  // partial sums of dD [parts, N, r], or null
    float *delta_bias; // partial sums of ddb [parts, N], or null
    u32 rows;          // M
    u32 tokens;        // T
    u32 channels;      // N
    u32 rank;          // r
    u32 wrap;          // rows of s
    u32 chunks;        // of channels
    u32 part;          // token rows of a block, a multiple of 32
    u32 aligned;       // g
    u32 z_aligned;     // a given z
    u32 rank_aligned;  // s and D
    float scale;       // c
    u32 reserved;
};

PACE_PARAMS(LowRankFactorsParams, 144);
PACE_PARAM(LowRankFactorsParams, g, 48);
PACE_PARAM(LowRankFactorsParams, s, 56);
PACE_PARAM(LowRankFactorsParams, down, 64);
PACE_PARAM(LowRankFactorsParams, ds, 72);
PACE_PARAM(LowRankFactorsParams, down_sums, 80);
PACE_PARAM(LowRankFactorsParams, delta_bias, 88);
PACE_PARAM(LowRankFactorsParams, rows, 96);
PACE_PARAM(LowRankFactorsParams, tokens, 100);
PACE_PARAM(LowRankFactorsParams, channels, 104);
PACE_PARAM(LowRankFactorsParams, rank, 108);
PACE_PARAM(LowRankFactorsParams, wrap, 112);
PACE_PARAM(LowRankFactorsParams, chunks, 116);
PACE_PARAM(LowRankFactorsParams, part, 120);
PACE_PARAM(LowRankFactorsParams, aligned, 124);
PACE_PARAM(LowRankFactorsParams, z_aligned, 128);
PACE_PARAM(LowRankFactorsParams, rank_aligned, 132);
PACE_PARAM(LowRankFactorsParams, scale, 136);

namespace sm80::low_rank {

// Stages of the forward ring; the host plans shared memory for them.
constexpr u32 STAGES = 3;
// z of a tile whose rows all have their own.
constexpr u32 Z_BYTES = TILE * TILE * sizeof(float);

template <class Numbers, u32 RANK> __device__ __forceinline__ void forward(const LowRankLinearParams &p) {
    using T = typename Numbers::T;
    constexpr u32 STAGE = 2 * TILE_BYTES + RANK * 64;
    constexpr u32 RING = STAGES * STAGE > Z_BYTES ? STAGES * STAGE : Z_BYTES;
    constexpr u32 SLICES = (RANK - 1) / INNER<T> + 1; // tiles that hold the rank
    constexpr u32 SLICE_STEPS = RANK / SLICES * sizeof(T) / 32;
    PACE_SHARED(unsigned char, shared);
    unsigned char *const down = shared + RING, *const low = down + SLICES * TILE_BYTES;
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const bool x_aligned = p.x_aligned != 0u;
    const Operand<T> x = {static_cast<const T *>(p.x), p.rows, p.inner, p.inner, p.wrap, x_aligned};
    const Operand<T> weight = {static_cast<const T *>(p.weight), p.channels, p.inner, p.inner, NO_WRAP, x_aligned};
    const Operand<T> up = {static_cast<const T *>(p.up), p.rank, p.inner, p.inner, NO_WRAP, x_aligned};
    // Arrives with the first tile.
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) {
        copy_tile<T, false>(down + slice * TILE_BYTES,
                            Operand<T>{static_cast<const T *>(p.down), p.channels, p.rank, p.rank, NO_WRAP,
                                       p.down_aligned != 0u},
                            column, slice * INNER<T>);
    }
    const u32 own = warp_column() / WARP_COLUMNS; // which of the warp's left fragments it multiplies with U
    float s[RANK / 16][2][4] = {};
    Accumulators c = {};
    pipeline<STAGES>(
        shared, STAGE, (p.inner - 1) / INNER<T> + 1,
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, false>(stage, x, row, tile * INNER<T>);
            copy_tile<T, false>(stage + TILE_BYTES, weight, column, tile * INNER<T>);
            copy_tile<T, false, RANK>(stage + 2 * TILE_BYTES, up, 0, tile * INNER<T>);
        },
        [&](const unsigned char *stage, u32) {
            multiply_tile<Numbers, false, false>(
                c, stage, stage + TILE_BYTES, NoScale(), [&](u32 part, u32 step, const typename Numbers::Left &a) {
                    if (part == own) {
#pragma unroll
                        for (u32 pair = 0; pair < RANK / 16; ++pair) {
                            u32 bits[4];
                            load_right<T, false>(bits, stage + 2 * TILE_BYTES, 16 * pair, step);
                            const typename Numbers::Right b[2] = {Numbers::right(bits[0], bits[1]),
                                                                  Numbers::right(bits[2], bits[3])};
                            Numbers::multiply(s[pair], a, b);
                        }
                    }
                });
        });

    // s goes to shared memory, and from the first block of a row of blocks to the caller.
    // Two neighbours at a time: nvcc 13.0 takes the chunk of an odd column alone for the column itself, and writes elsewhere.
    struct alignas(2 * sizeof(T)) Pair {
        T value[2];
    };
#pragma unroll
    for (u32 j = 0; j < RANK / 8; ++j) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 r = warp_row() + 16 * own + 8 * half + lane() / 4, within = 2 * (lane() % 4);
            const u32 k = 8 * j + within;
            const float *values = s[j / 2][j % 2] + 2 * half;
            const Pair pair = {{from_float<T>(p.scale * values[0]), from_float<T>(p.scale * values[1])}};
            const u32 chunk = 8 * j % INNER<T> / Vector<T>::SIZE + within / Vector<T>::SIZE;
            *reinterpret_cast<Pair *>(low + 8 * j / INNER<T> * TILE_BYTES + Tile<T, false>::at(r, chunk) +
                                      within % Vector<T>::SIZE * sizeof(T)) = pair;
            if (column == 0 && row + r < p.wrap) {
                T *out = static_cast<T *>(p.s) + static_cast<u64>(row + r) * p.rank + k;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (k + i < p.rank) {
                        store(out + i, pair.value[i]);
                    }
                }
            }
        }
    }
    __syncthreads();
    const NoiseRows noise_rows(p.noise, p.tokens, row);
    const u32 last = min(row + TILE, p.rows) - 1;
    const bool noisy = p.noise.kind != NOISE_OFF;
    float *z = reinterpret_cast<float *>(shared);
    if (noisy) {
        fill_noise<PRODUCT_THREADS, TILE / 4>(z, TILE, p.noise, key_of(p.noise), noise_rows.first, noise_rows.place(last) + 1, p.tokens,
                             column, p.channels, p.z_aligned != 0u);
        __syncthreads();
    }
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
        float adapter[4][4];
#pragma unroll
        for (u32 i = 0; i < 16; ++i) {
            adapter[i / 4][i % 4] = delta_bias.value[i / 4][i % 2];
        }
#pragma unroll
        for (u32 slice = 0; slice < SLICES; ++slice) {
#pragma unroll
            for (u32 step = 0; step < SLICE_STEPS; ++step) {
                typename Numbers::Right b[4];
                u32 bits[4];
#pragma unroll
                for (u32 pair = 0; pair < 2; ++pair) {
                    load_right<T, false>(bits, down + slice * TILE_BYTES, warp_column() + 16 * pair, step);
                    b[2 * pair] = Numbers::right(bits[0], bits[1]);
                    b[2 * pair + 1] = Numbers::right(bits[2], bits[3]);
                }
                load_left<T, false>(bits, low + slice * TILE_BYTES, warp_row() + 16 * part, step);
                Numbers::multiply(adapter, Numbers::left(bits), b);
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 r = min(row + warp_row() + 16 * part + 8 * (i / 2) + lane() / 4, last);
                const u32 k = warp_column() + 8 * j + 2 * (lane() % 4) + i % 2;
                const float factor = noisy ? z[noise_rows.place(r) * TILE + k] : 1.0f;
                c[part][j][i] = fmaf(factor, adapter[j][i], c[part][j][i] + base_bias.value[j][i % 2]);
            }
        }
    }
    store_tile<T>(c, shared, static_cast<T *>(p.y), row, column, p.rows, p.channels, p.aligned != 0u);
}

// Token rows of a tile of e.
constexpr u32 ROWS = 32;
// Channels of a block: 1 KiB of a row.
constexpr u32 ROW_BYTES = 1024;
template <class T> constexpr u32 CHANNELS = ROW_BYTES / sizeof(T);
constexpr u32 ROW_CHUNKS = ROW_BYTES / 16;
// Rows that the block's threads load at once, and how often that makes a tile.
constexpr u32 ROWS_AT_ONCE = PRODUCT_THREADS / ROW_CHUNKS;
constexpr u32 LOADS = ROWS / ROWS_AT_ONCE;

// Where 16-byte chunks of a tile of e lie: eight rows of a matrix, and four rows of single f32, are in different banks.
struct WideTile {
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        return row * ROW_BYTES + (chunk ^ ((row & 3) << 1 | (row >> 2 & 1))) * 16;
    }
};

// Rows of RANK elements; padding has the same effect.
template <class T, u32 RANK> struct NarrowTile {
    static constexpr u32 STRIDE = RANK * sizeof(T) + 16;
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) { return row * STRIDE + chunk * 16; }
};

// Vector `index` of rows of RANK elements that begin at `row` of a tensor [rows, rank], zero where there is none.
template <class T, u32 RANK>
__device__ __forceinline__ Vector<T> load_narrow(const T *tensor, u32 index, u32 row, u32 rows, u32 wrap, u32 rank,
                                                 bool aligned) {
    constexpr u32 CHUNKS = RANK / Vector<T>::SIZE;
    const u32 at = row + index / CHUNKS, column = index % CHUNKS * Vector<T>::SIZE;
    const bool exists = at < rows && column < rank;
    const u32 wrapped = at >= wrap ? at - wrap : at;
    return load_some(tensor + (exists ? static_cast<u64>(wrapped) * rank + column : 0u), exists ? rank - column : 0u,
                     exists && aligned);
}

template <class T, u32 RANK> __device__ __forceinline__ void put_narrow(unsigned char *tile, u32 index, Vector<T> vector) {
    constexpr u32 CHUNKS = RANK / Vector<T>::SIZE;
    *reinterpret_cast<Vector<T> *>(tile + NarrowTile<T, RANK>::at(index / CHUNKS, index % CHUNKS)) = vector;
}

template <class Numbers, u32 RANK> __device__ __forceinline__ void factors(const LowRankFactorsParams &p) {
    using T = typename Numbers::T;
    using Narrow = NarrowTile<T, RANK>;
    constexpr u32 SIZE = Vector<T>::SIZE;
    constexpr u32 STEP = 32 / sizeof(T); // inner indices of one
    constexpr u32 COLUMNS = RANK / 8;
    constexpr u32 PARTS = CHANNELS<T> / 8 / 16; // each of 16 channels of a warp
    constexpr u32 LOW_VECTORS = ROWS * RANK / SIZE;
    PACE_SHARED(unsigned char, shared);
    unsigned char *const e = shared, *const down = e + ROWS * ROW_BYTES, *const low = down + CHANNELS<T> * Narrow::STRIDE;
    float *const sums = reinterpret_cast<float *>(low + ROWS * Narrow::STRIDE); // [4, ROWS, RANK]

    const u32 chunk = blockIdx.x % p.chunks, part = blockIdx.x / p.chunks;
    const u32 first_channel = chunk * CHANNELS<T>;
    const u32 first = part * p.part, end = min(first + p.part, p.rows);
    const u32 warp = threadIdx.x / WARP;
    const bool rank_aligned = p.rank_aligned != 0u;
    for (u32 index = threadIdx.x; index < CHANNELS<T> * RANK / SIZE; index += PRODUCT_THREADS) {
        put_narrow<T, RANK>(down, index,
                            load_narrow<T, RANK>(static_cast<const T *>(p.down), index, first_channel, p.channels, NO_WRAP,
                                                 p.rank, rank_aligned));
    }

    // What this thread loads: a vector of the same channels in every fourth row, and one of s.
    const u32 vector = threadIdx.x % ROW_CHUNKS, own_row = threadIdx.x / ROW_CHUNKS;
    const u32 channel = first_channel + vector * SIZE;
    const u32 count = channel < p.channels ? p.channels - channel : 0u;
    Vector<T> next[LOADS], next_low;
    const auto fetch = [&](u32 row) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 at = row + own_row + i * ROWS_AT_ONCE;
            const bool exists = at < end && count > 0u;
            next[i] = load_some(static_cast<const T *>(p.g) + (exists ? static_cast<u64>(at) * p.channels + channel : 0u),
                                exists ? count : 0u, exists && p.aligned != 0u);
        }
        if (threadIdx.x < LOW_VECTORS) {
            next_low = load_narrow<T, RANK>(static_cast<const T *>(p.s), threadIdx.x, row, end, p.wrap, p.rank, rank_aligned);
        }
    };

    const bool noisy = p.noise.kind != NOISE_OFF;
    const noise::Key key = key_of(p.noise);
    const NoiseRows noise_rows(p.noise, p.tokens, 0);
    u32 z_row = NO_WRAP; // the row of z that `z` holds
    float z[SIZE];
#pragma unroll
    for (u32 k = 0; k < SIZE; ++k) {
        z[k] = 1.0f;
    }
    float bias[SIZE] = {};
    float down_sums[PARTS][COLUMNS][4] = {};
    fetch(first);
    for (u32 row = first; row < end; row += ROWS) {
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 at = own_row + i * ROWS_AT_ONCE;
            if (noisy && row + at < end && count > 0u) {
                const u32 wanted = noise_rows.place(row + at);
                if (wanted != z_row) {
                    z_row = wanted;
#pragma unroll
                    for (u32 k = 0; k < SIZE / 4; ++k) {
                        const noise::Four four = z_of_row(p.noise, key, wanted, p.tokens, channel / 4 + k, p.channels,
                                                          p.z_aligned != 0u);
#pragma unroll
                        for (u32 j = 0; j < 4; ++j) {
                            z[4 * k + j] = four.value[j];
                        }
                    }
                }
            }
#pragma unroll
            for (u32 k = 0; k < SIZE; ++k) {
                const float value = to_float(next[i].value[k]) * z[k];
                bias[k] += value;
                next[i].value[k] = from_float<T>(value);
            }
            *reinterpret_cast<Vector<T> *>(e + WideTile::at(at, vector)) = next[i];
        }
        if (threadIdx.x < LOW_VECTORS) {
            put_narrow<T, RANK>(low, threadIdx.x, next_low);
        }
        __syncthreads();
        if (row + ROWS < end) {
            fetch(row + ROWS);
        }

        // A warp has 16 rows of ds and a quarter of the channels.
        if (p.ds != nullptr) {
            float ds[COLUMNS][4] = {};
            constexpr u32 QUARTER = CHANNELS<T> / 4 / STEP;
#pragma unroll
            for (u32 i = 0; i < QUARTER; ++i) {
                const u32 step = warp / 2 * QUARTER + i;
                u32 bits[4];
                typename Numbers::Right b[COLUMNS];
#pragma unroll
                for (u32 pair = 0; pair < COLUMNS / 2; ++pair) {
                    load_right<T, true, Narrow>(bits, down, 16 * pair, step);
                    b[2 * pair] = Numbers::right(bits[0], bits[1]);
                    b[2 * pair + 1] = Numbers::right(bits[2], bits[3]);
                }
                load_left<T, false, WideTile>(bits, e, warp % 2 * 16, step);
                Numbers::multiply(ds, Numbers::left(bits), b);
            }
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const u32 r = warp % 2 * 16 + 8 * (i / 2) + lane() / 4;
                    sums[(warp / 2 * ROWS + r) * RANK + 8 * j + 2 * (lane() % 4) + i % 2] = ds[j][i];
                }
            }
        }
        // And an eighth of the channels of dD.
        if (p.down_sums != nullptr) {
#pragma unroll
            for (u32 step = 0; step < ROWS / STEP; ++step) {
                u32 bits[4];
                typename Numbers::Right b[COLUMNS];
#pragma unroll
                for (u32 pair = 0; pair < COLUMNS / 2; ++pair) {
                    load_right<T, true, Narrow>(bits, low, 16 * pair, step);
                    b[2 * pair] = Numbers::right(bits[0], bits[1]);
                    b[2 * pair + 1] = Numbers::right(bits[2], bits[3]);
                }
#pragma unroll
                for (u32 i = 0; i < PARTS; ++i) {
                    load_left<T, true, WideTile>(bits, e, (warp * PARTS + i) * 16, step);
                    Numbers::multiply(down_sums[i], Numbers::left(bits), b);
                }
            }
        }
        __syncthreads();
        for (u32 index = threadIdx.x; index < ROWS * RANK && p.ds != nullptr; index += PRODUCT_THREADS) {
            const u32 r = row + index / RANK, j = index % RANK;
            if (r < end && j < p.rank) {
                const float sum = sums[index] + sums[index + ROWS * RANK] + sums[index + 2 * ROWS * RANK] +
                                  sums[index + 3 * ROWS * RANK];
                store(p.ds + (static_cast<u64>(chunk) * p.rows + r) * p.rank + j, p.scale * sum);
            }
        }
    }

    if (p.down_sums != nullptr) {
#pragma unroll
        for (u32 i = 0; i < PARTS; ++i) {
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) {
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    const u32 n = first_channel + (warp * PARTS + i) * 16 + 8 * (k / 2) + lane() / 4;
                    const u32 r = 8 * j + 2 * (lane() % 4) + k % 2;
                    if (n < p.channels && r < p.rank) {
                        store(p.down_sums + (static_cast<u64>(part) * p.channels + n) * p.rank + r, down_sums[i][j][k]);
                    }
                }
            }
        }
    }
    if (p.delta_bias != nullptr) {
        // Nobody reads e any more.
        float *const rows = reinterpret_cast<float *>(e); // [ROWS_AT_ONCE, CHANNELS]
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            rows[own_row * CHANNELS<T> + vector * SIZE + k] = bias[k];
        }
        __syncthreads();
        for (u32 index = threadIdx.x; index < CHANNELS<T>; index += PRODUCT_THREADS) {
            if (first_channel + index < p.channels) {
                float sum = 0.0f;
#pragma unroll
                for (u32 i = 0; i < ROWS_AT_ONCE; ++i) {
                    sum += rows[i * CHANNELS<T> + index];
                }
                store(p.delta_bias + static_cast<u64>(part) * p.channels + first_channel + index, sum);
            }
        }
    }
}

} // namespace sm80::low_rank
} // namespace pace

PACE_KERNEL(low_rank_linear_16_f32, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::Float32, 16>(p);
}
PACE_KERNEL(low_rank_linear_16_tf32, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::Tf32, 16>(p);
}
PACE_KERNEL(low_rank_linear_16_f16, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::SixteenBit<pace::f16>, 16>(p);
}
PACE_KERNEL(low_rank_linear_16_bf16, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::SixteenBit<pace::bf16>, 16>(p);
}
PACE_KERNEL(low_rank_linear_32_f32, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::Float32, 32>(p);
}
PACE_KERNEL(low_rank_linear_32_tf32, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::Tf32, 32>(p);
}
PACE_KERNEL(low_rank_linear_32_f16, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::SixteenBit<pace::f16>, 32>(p);
}
PACE_KERNEL(low_rank_linear_32_bf16, pace::LowRankLinearParams, 256) {
    pace::sm80::low_rank::forward<pace::sm80::SixteenBit<pace::bf16>, 32>(p);
}
PACE_KERNEL(low_rank_factors_16_f32, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::Float32, 16>(p);
}
PACE_KERNEL(low_rank_factors_16_tf32, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::Tf32, 16>(p);
}
PACE_KERNEL(low_rank_factors_16_f16, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::SixteenBit<pace::f16>, 16>(p);
}
PACE_KERNEL(low_rank_factors_16_bf16, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::SixteenBit<pace::bf16>, 16>(p);
}
PACE_KERNEL(low_rank_factors_32_f32, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::Float32, 32>(p);
}
PACE_KERNEL(low_rank_factors_32_tf32, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::Tf32, 32>(p);
}
PACE_KERNEL(low_rank_factors_32_f16, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::SixteenBit<pace::f16>, 32>(p);
}
PACE_KERNEL(low_rank_factors_32_bf16, pace::LowRankFactorsParams, 256) {
    pace::sm80::low_rank::factors<pace::sm80::SixteenBit<pace::bf16>, 32>(p);
}
