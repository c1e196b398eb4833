// Low-rank noisy linear layer (LoRA add) for ranks up to 32, forward and the adapter's part of the backward pass, on tensor
// cores.
//
//   forward   s = scale x @ A^T,  y = x @ W0^T + b0 + z * (s @ B^T + bd)
//   factors   ds = scale e @ B,  grad_B = e^T @ s,  grad_bd = sum over rows of e,  with e = z * g
//
//   x [M, K] or, shared by the branches, [B T, K]; W0 [N, K]; A [r, K]; B [N, r]; b0, bd [N]; y, g [M, N]; s [rows of x, r];
//   ds [M, r]; z as in noise_source.cuh. What is left of the backward pass, dx = g @ W0 + ds @ A and grad_A = ds^T @ x, and
//   other ranks are GEMMs of noisy_linear.cu.
//
// Forward: a block makes 128 x 128 outputs (mainloop.cuh). Its stages hold a tile of A besides x and W0: each warp multiplies
// one of its four A fragments of x with it, so that s costs no load of x. Then s, rounded to storage, is the left operand of
// one more K step, whose accumulators are 16 rows at a time.
// Factors: a block has a range of token rows and 1 KiB of channels. 32 rows of g at a time come through registers, are
// multiplied by z on the way, and serve both GEMMs from shared memory; z of a sample is made once per thread and run of its
// tokens. ds is summed over the channels of the block, grad_B and grad_bd over its rows.
//
// Bytes: forward as a dense layer without its adapter's GEMM, and r / 128 more of A; s written once. Factors: g once; ds and
// grad_B as fp32 partials, about 4 r / 1024 of the bytes of g and 4 r KiB (32-bit types: half) per block, which
// kernels/partial_sums.cu adds up. Operations: 2 M N K (1 + R / 128) + 2 M N R forward, R the rank rounded up to 16 or 32;
// 4 M N R for the factors.
// Determinism: run-to-run bitwise; no float atomics, every sum in a fixed order.

#include "../tile_noise.cuh"
#include "epilogue.cuh"

namespace pace {

namespace sm80::low_rank {

// ---- forward

// Stages of the forward pipeline; the host plans shared memory for them.
constexpr u32 STAGES = SM80_LOW_RANK_STAGES;
// z of a tile whose rows all have their own.
constexpr u32 Z_BYTES = TILE * TILE * sizeof(float);

// Shared memory: the stages, each a tile of x, of W0 and of A; later z in their place. Then the tiles of B and of s.
template <class T, u32 RANK> struct Forward {
    static constexpr u32 STAGE_BYTES = 2 * TILE_BYTES + RANK * SM80_TILE_K_BYTES;
    static constexpr u32 STAGES_BYTES = (STAGES * STAGE_BYTES) > Z_BYTES ? (STAGES *STAGE_BYTES) : Z_BYTES;
    static constexpr u32 SLICES = (RANK - 1) / TILE_K<T> + 1; // tiles that hold the rank
    static constexpr u32 SLICE_STEPS = RANK / SLICES * sizeof(T) / 32;
    static constexpr u32 LORA_B = STAGES_BYTES;
    static constexpr u32 S = LORA_B + SLICES * TILE_BYTES;
};

// s of this warp: 16 rows by RANK columns.
template <u32 RANK> using LowRankSums = float[RANK / 16][2][4];

// s += a @ A^T, given the fragment of x, for one K step of a tile of A.
template <class Math, u32 RANK>
__device__ __forceinline__ void accumulate_s(LowRankSums<RANK> &s, const typename Math::FragmentA &a,
                                             const unsigned char *lora_a, u32 step) {
#pragma unroll
    for (u32 pair = 0; pair < RANK / 16; ++pair) {
        Math::multiply(s[pair], a, fragment_b<Math, false, 2>(lora_a, 16 * pair, step));
    }
}

// Writes s of the 16 rows from `first` on, in the block's tile from `row` on, to shared memory and, from the first block of a
// row of blocks, to the caller.
// Two neighbours at a time: nvcc 13.0 takes the chunk of an odd column alone for the column itself, and writes elsewhere.
template <class T, u32 RANK>
__device__ __forceinline__ void store_s(const LowRankLinearParams &p, const LowRankSums<RANK> &s, unsigned char *tiles,
                                        u32 first, u32 row, bool to_caller) {
    struct alignas(2 * sizeof(T)) Pair {
        T value[2];
    };
#pragma unroll
    for (u32 j = 0; j < RANK / 8; ++j) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 r = first + 8 * half + lane() / 4, within = 2 * (lane() % 4);
            const u32 k = 8 * j + within;
            const float *values = s[j / 2][j % 2] + 2 * half;
            const Pair pair = {{from_float<T>(p.scale * values[0]), from_float<T>(p.scale * values[1])}};
            const u32 chunk = 8 * j % TILE_K<T> / Vector<T>::SIZE + within / Vector<T>::SIZE;
            *reinterpret_cast<Pair *>(tiles + 8 * j / TILE_K<T> * TILE_BYTES + Tile<T, false>::at(r, chunk) +
                                      within % Vector<T>::SIZE * sizeof(T)) = pair;
            if (to_caller && row + r < p.wrap) {
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
}

// The epilogue: c = z * (s @ B^T + bd) + c + b0. `z`: null without noise.
template <class Math, u32 RANK>
__device__ __forceinline__ void add_adapter(Accumulators &c, const LowRankLinearParams &p, const unsigned char *lora_b,
                                            const unsigned char *s, const float *z, bool noisy,
                                            const NoiseRows &noise_rows, u32 row, u32 last, u32 column) {
    using T = typename Math::T;
    using Layout = Forward<T, RANK>;
    const ColumnBias<T> base_bias(p.base_bias, column, p.channels), delta_bias(p.delta_bias, column, p.channels);
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
        // 16 rows of the adapter's GEMM, which start from bd.
        float adapter[4][4];
#pragma unroll
        for (u32 i = 0; i < 16; ++i) {
            adapter[i / 4][i % 4] = delta_bias.value[i / 4][i % 2];
        }
#pragma unroll
        for (u32 slice = 0; slice < Layout::SLICES; ++slice) {
#pragma unroll
            for (u32 step = 0; step < Layout::SLICE_STEPS; ++step) {
                const auto b = fragment_b<Math, false, 4>(lora_b + slice * TILE_BYTES, warp_column(), step);
                u32 bits[4];
                load_a<T, false>(bits, s + slice * TILE_BYTES, warp_row() + 16 * m, step);
                Math::multiply(adapter, Math::fragment_a(bits), b);
            }
        }
        // Under the noise, to the base's accumulators.
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 r = min(row + warp_row() + 16 * m + 8 * (i / 2) + lane() / 4, last);
                const u32 k = warp_column() + 8 * n + 2 * (lane() % 4) + i % 2;
                const float factor = noisy ? z[noise_rows.place(r) * TILE + k] : 1.0f;
                c[m][n][i] = fmaf(factor, adapter[n][i], c[m][n][i] + base_bias.value[n][i % 2]);
            }
        }
    }
}

template <class Math, u32 RANK> __device__ __forceinline__ void forward(const LowRankLinearParams &p) {
    using T = typename Math::T;
    using Layout = Forward<T, RANK>;
    PACE_SHARED(unsigned char, shared);
    unsigned char *const lora_b = shared + Layout::LORA_B, *const s_tiles = shared + Layout::S;
    const u32 column = blockIdx.x % p.tile_columns * TILE, row = blockIdx.x / p.tile_columns * TILE;
    const Operand<T> x = operand<T>(p.x, p.rows, p.inner, p.wrap, p.x_aligned);
    const Operand<T> weight = operand<T>(p.weight, p.channels, p.inner, NO_WRAP, p.x_aligned);
    const Operand<T> lora_a = operand<T>(p.lora_a, p.rank, p.inner, NO_WRAP, p.x_aligned);

    // B arrives with the first stage.
#pragma unroll
    for (u32 slice = 0; slice < Layout::SLICES; ++slice) {
        copy_tile<T, false>(lora_b + slice * TILE_BYTES, operand<T>(p.lora_b, p.channels, p.rank, NO_WRAP, p.b_aligned),
                            column, slice * TILE_K<T>);
    }

    // Mainloop: c = x @ W0^T and, from one of this warp's four fragments of x, s = x @ A^T.
    const u32 own = warp_column() / WARP_COLUMNS;
    LowRankSums<RANK> s = {};
    Accumulators c = {};
    mainloop<STAGES>(
        shared, Layout::STAGE_BYTES, tiles_of<T>(p.inner),
        [&](unsigned char *stage, u32 tile) {
            copy_tile<T, false>(stage, x, row, tile * TILE_K<T>);
            copy_tile<T, false>(stage + TILE_BYTES, weight, column, tile * TILE_K<T>);
            copy_tile<T, false, RANK>(stage + 2 * TILE_BYTES, lora_a, 0, tile * TILE_K<T>);
        },
        [&](const unsigned char *stage, u32) {
            multiply_tile<Math, false, false>(c, stage, stage + TILE_BYTES, NoScale(),
                                              [&](u32 m, u32 step, const typename Math::FragmentA &a) {
                                                  if (m == own) {
                                                      accumulate_s<Math, RANK>(s, a, stage + 2 * TILE_BYTES, step);
                                                  }
                                              });
        });

    // s to shared memory; then noise takes the place of the stages.
    store_s<T, RANK>(p, s, s_tiles, warp_row() + 16 * own, row, column == 0);
    __syncthreads();
    const NoiseRows noise_rows(p.noise, p.tokens, row);
    const u32 last = min(row + TILE, p.rows) - 1;
    const bool noisy = p.noise.kind != NOISE_OFF;
    float *z = reinterpret_cast<float *>(shared);
    if (noisy) {
        fill_noise<THREADS, TILE / 4>(z, p.noise, key_of(p.noise), noise_rows.first, noise_rows.place(last) + 1,
                                      p.tokens, column, p.channels, p.noise.aligned != 0u);
        __syncthreads();
    }
    add_adapter<Math, RANK>(c, p, lora_b, s_tiles, z, noisy, noise_rows, row, last, column);
    store_tile<T>(c, shared, static_cast<T *>(p.y), row, column, p.rows, p.channels, p.aligned != 0u);
}

// ---- factors

// Token rows of a tile of e.
constexpr u32 ROWS = SM80_FACTORS_ROWS;
// Channels of a block: 1 KiB of a row.
constexpr u32 ROW_BYTES = SM80_FACTORS_ROW_BYTES;
template <class T> constexpr u32 CHANNELS = ROW_BYTES / sizeof(T);
constexpr u32 ROW_CHUNKS = ROW_BYTES / 16;
// Rows that the block's threads load at once, and how often that makes a tile.
constexpr u32 ROWS_AT_ONCE = THREADS / ROW_CHUNKS;
constexpr u32 LOADS = ROWS / ROWS_AT_ONCE;

// The swizzle of a tile of e: eight rows of a matrix, and four rows of single f32, are in different banks.
struct WideTile {
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        return row * ROW_BYTES + (chunk ^ ((row & 3) << 1 | (row >> 2 & 1))) * 16;
    }
};

// Rows of RANK elements of B or s; padding has the same effect.
template <class T, u32 RANK> struct NarrowTile {
    static constexpr u32 STRIDE = RANK * sizeof(T) + 16;
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) { return row * STRIDE + chunk * 16; }
};

// Vector `index` of rows of RANK elements that begin at `row` of a tensor [rows, rank], zero where there is none.
template <class T, u32 RANK>
__device__ __forceinline__ Vector<T> load_narrow(const void *tensor, u32 index, u32 row, u32 rows, u32 wrap, u32 rank,
                                                 bool aligned) {
    constexpr u32 CHUNKS = RANK / Vector<T>::SIZE;
    const u32 at = row + index / CHUNKS, column = index % CHUNKS * Vector<T>::SIZE;
    const bool exists = at < rows && column < rank;
    const u32 wrapped = at >= wrap ? at - wrap : at;
    return load_some(static_cast<const T *>(tensor) + (exists ? static_cast<u64>(wrapped) * rank + column : 0u),
                     exists ? rank - column : 0u, exists && aligned);
}

template <class T, u32 RANK>
__device__ __forceinline__ void put_narrow(unsigned char *tile, u32 index, Vector<T> vector) {
    constexpr u32 CHUNKS = RANK / Vector<T>::SIZE;
    *reinterpret_cast<Vector<T> *>(tile + NarrowTile<T, RANK>::at(index / CHUNKS, index % CHUNKS)) = vector;
}

// Shared memory: a tile of e, B of the block's channels, a tile of s, and ds of a tile by quarters of the channels.
template <class T, u32 RANK> struct Factors {
    static constexpr u32 K_STEP = 32 / sizeof(T); // elements along K of one
    static constexpr u32 COLUMNS = RANK / 8;      // accumulators beside each other
    static constexpr u32 S_VECTORS = ROWS * RANK / Vector<T>::SIZE;
    // grad_B of a warp: fragments of 16 channels, an eighth of the block's.
    static constexpr u32 FRAGMENTS = CHANNELS<T> / 8 / 16;
    unsigned char *e, *lora_b, *s;
    float *ds; // [4, ROWS, RANK]
    __device__ __forceinline__ explicit Factors(unsigned char *shared)
        : e(shared), lora_b(e + ROWS * ROW_BYTES), s(lora_b + CHANNELS<T> * NarrowTile<T, RANK>::STRIDE),
          ds(reinterpret_cast<float *>(s + ROWS * NarrowTile<T, RANK>::STRIDE)) {}
};

// What a thread loads and multiplies by z: a vector of the same channels in every fourth row, and one of s.
template <class T> struct Loader {
    static constexpr u32 SIZE = Vector<T>::SIZE;
    u32 vector, own_row;   // place in the tile
    u32 channel;           // the vector's first
    Vector<T> g[LOADS], s; // loaded for the next tile
    u32 z_row = NO_WRAP;   // the row of z that `z` holds
    float z[SIZE];         // 1 without noise
    float bias[SIZE] = {}; // sums of e
    __device__ __forceinline__ explicit Loader(u32 first_channel)
        : vector(threadIdx.x % ROW_CHUNKS), own_row(threadIdx.x / ROW_CHUNKS), channel(first_channel + vector * SIZE) {
#pragma unroll
        for (u32 k = 0; k < SIZE; ++k) {
            z[k] = 1.0f;
        }
    }
};

// Loads the tile from token row `row` on into registers; it is used one tile later.
template <class T, u32 RANK>
__device__ __forceinline__ void fetch(Loader<T> &loader, const LowRankFactorsParams &p, u32 row, u32 end) {
#pragma unroll
    for (u32 i = 0; i < LOADS; ++i) {
        const u32 at = row + loader.own_row + i * ROWS_AT_ONCE;
        const bool exists = at < end && loader.channel < p.channels;
        const T *g = static_cast<const T *>(p.g);
        loader.g[i] = load_some(g + (exists ? static_cast<u64>(at) * p.channels + loader.channel : 0u),
                                exists ? p.channels - loader.channel : 0u, exists && p.aligned != 0u);
    }
    if (threadIdx.x < Factors<T, RANK>::S_VECTORS) {
        loader.s = load_narrow<T, RANK>(p.s, threadIdx.x, row, end, p.wrap, p.rank, p.rank_aligned != 0u);
    }
}

// Makes z of token row `row` unless the row before had the same.
template <class T>
__device__ __forceinline__ void update_noise(Loader<T> &loader, const LowRankFactorsParams &p, noise::Key key,
                                             const NoiseRows &noise_rows, u32 row) {
    const u32 wanted = noise_rows.place(row);
    if (wanted == loader.z_row) {
        return;
    }
    loader.z_row = wanted;
#pragma unroll
    for (u32 k = 0; k < Vector<T>::SIZE / 4; ++k) {
        const noise::Four four =
            z_of_row(p.noise, key, wanted, p.tokens, loader.channel / 4 + k, p.channels, p.noise.aligned != 0u);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            loader.z[4 * k + j] = four.value[j];
        }
    }
}

// Writes e = z * g of the tile from token row `row` on, and its s, to shared memory; adds e to the sums for grad_bd.
template <class T, u32 RANK>
__device__ __forceinline__ void load_e_tile(const Factors<T, RANK> &shared, Loader<T> &loader,
                                            const LowRankFactorsParams &p, noise::Key key, const NoiseRows &noise_rows,
                                            u32 row, u32 end) {
    const bool noisy = p.noise.kind != NOISE_OFF;
#pragma unroll
    for (u32 i = 0; i < LOADS; ++i) {
        const u32 at = loader.own_row + i * ROWS_AT_ONCE;
        if (noisy && row + at < end && loader.channel < p.channels) {
            update_noise(loader, p, key, noise_rows, row + at);
        }
        float e[Vector<T>::SIZE];
        to_floats(loader.g[i], e);
#pragma unroll
        for (u32 k = 0; k < Vector<T>::SIZE; ++k) {
            e[k] *= loader.z[k];
            loader.bias[k] += e[k];
        }
        *reinterpret_cast<Vector<T> *>(shared.e + WideTile::at(at, loader.vector)) = from_floats<T>(e);
    }
    if (threadIdx.x < Factors<T, RANK>::S_VECTORS) {
        put_narrow<T, RANK>(shared.s, threadIdx.x, loader.s);
    }
}

// ds = e @ B of this tile: a warp has 16 rows and a quarter of the channels, whose sums go to shared memory.
template <class Math, u32 RANK>
__device__ __forceinline__ void accumulate_ds(const Factors<typename Math::T, RANK> &shared) {
    using T = typename Math::T;
    using F = Factors<T, RANK>;
    constexpr u32 QUARTER = CHANNELS<T> / 4 / F::K_STEP;
    const u32 warp = threadIdx.x / WARP;
    float ds[F::COLUMNS][4] = {};
#pragma unroll
    for (u32 i = 0; i < QUARTER; ++i) {
        const u32 step = warp / 2 * QUARTER + i;
        const auto b = fragment_b<Math, true, F::COLUMNS, NarrowTile<T, RANK>>(shared.lora_b, 0, step);
        u32 bits[4];
        load_a<T, false, WideTile>(bits, shared.e, warp % 2 * 16, step);
        Math::multiply(ds, Math::fragment_a(bits), b);
    }
#pragma unroll
    for (u32 n = 0; n < F::COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 r = warp % 2 * 16 + 8 * (i / 2) + lane() / 4;
            shared.ds[(warp / 2 * ROWS + r) * RANK + 8 * n + 2 * (lane() % 4) + i % 2] = ds[n][i];
        }
    }
}

// grad_B of a warp.
template <class T, u32 RANK> using GradB = float[Factors<T, RANK>::FRAGMENTS][RANK / 8][4];

// grad_B += e^T @ s of this tile: a warp has an eighth of the channels.
template <class Math, u32 RANK>
__device__ __forceinline__ void accumulate_dB(GradB<typename Math::T, RANK> &grad_b,
                                              const Factors<typename Math::T, RANK> &shared) {
    using T = typename Math::T;
    using F = Factors<T, RANK>;
    const u32 warp = threadIdx.x / WARP;
#pragma unroll
    for (u32 step = 0; step < ROWS / F::K_STEP; ++step) {
        const auto b = fragment_b<Math, true, F::COLUMNS, NarrowTile<T, RANK>>(shared.s, 0, step);
#pragma unroll
        for (u32 i = 0; i < F::FRAGMENTS; ++i) {
            u32 bits[4];
            load_a<T, true, WideTile>(bits, shared.e, (warp * F::FRAGMENTS + i) * 16, step);
            Math::multiply(grad_b[i], Math::fragment_a(bits), b);
        }
    }
}

// Adds up the quarters of ds of this tile, in order, and writes the block's partial [chunk, M, r].
template <class T, u32 RANK>
__device__ __forceinline__ void store_ds(const Factors<T, RANK> &shared, const LowRankFactorsParams &p, u32 chunk,
                                         u32 row, u32 end) {
    const float *ds = shared.ds;
    for (u32 index = threadIdx.x; index < ROWS * RANK; index += THREADS) {
        const u32 r = row + index / RANK, j = index % RANK;
        if (r < end && j < p.rank) {
            const float sum =
                ds[index] + ds[index + ROWS * RANK] + ds[index + 2 * ROWS * RANK] + ds[index + 3 * ROWS * RANK];
            store(p.ds + (static_cast<u64>(chunk) * p.rows + r) * p.rank + j, p.scale * sum);
        }
    }
}

// Writes the block's partial of grad_B, [split, N, r].
template <class T, u32 RANK>
__device__ __forceinline__ void store_dB(const GradB<T, RANK> &grad_b, const LowRankFactorsParams &p, u32 split,
                                         u32 first_channel) {
    using F = Factors<T, RANK>;
    const u32 warp = threadIdx.x / WARP;
#pragma unroll
    for (u32 i = 0; i < F::FRAGMENTS; ++i) {
#pragma unroll
        for (u32 j = 0; j < F::COLUMNS; ++j) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                const u32 n = first_channel + (warp * F::FRAGMENTS + i) * 16 + 8 * (k / 2) + lane() / 4;
                const u32 r = 8 * j + 2 * (lane() % 4) + k % 2;
                if (n < p.channels && r < p.rank) {
                    store(p.b_sums + (static_cast<u64>(split) * p.channels + n) * p.rank + r, grad_b[i][j][k]);
                }
            }
        }
    }
}

// Adds up the threads' sums of e, in order, and writes the block's partial of grad_bd, [split, N]. The tile of e is free.
template <class T, u32 RANK>
__device__ __forceinline__ void store_bias_gradient(const Loader<T> &loader, const Factors<T, RANK> &shared,
                                                    const LowRankFactorsParams &p, u32 split, u32 first_channel) {
    float *const rows = reinterpret_cast<float *>(shared.e); // [ROWS_AT_ONCE, CHANNELS]
#pragma unroll
    for (u32 k = 0; k < Vector<T>::SIZE; ++k) {
        rows[loader.own_row * CHANNELS<T> + loader.vector * Vector<T>::SIZE + k] = loader.bias[k];
    }
    __syncthreads();
    for (u32 index = threadIdx.x; index < CHANNELS<T>; index += THREADS) {
        if (first_channel + index < p.channels) {
            float sum = 0.0f;
#pragma unroll
            for (u32 i = 0; i < ROWS_AT_ONCE; ++i) {
                sum += rows[i * CHANNELS<T> + index];
            }
            store(p.delta_bias + static_cast<u64>(split) * p.channels + first_channel + index, sum);
        }
    }
}

template <class Math, u32 RANK> __device__ __forceinline__ void factors(const LowRankFactorsParams &p) {
    using T = typename Math::T;
    PACE_SHARED(unsigned char, bytes);
    const Factors<T, RANK> shared(bytes);
    const u32 chunk = blockIdx.x % p.chunks, split = blockIdx.x / p.chunks;
    const u32 first_channel = chunk * CHANNELS<T>;
    const u32 first = split * p.part, end = min(first + p.part, p.rows);

    // B of the block's channels stays in shared memory.
    for (u32 index = threadIdx.x; index < CHANNELS<T> * RANK / Vector<T>::SIZE; index += THREADS) {
        put_narrow<T, RANK>(
            shared.lora_b, index,
            load_narrow<T, RANK>(p.lora_b, index, first_channel, p.channels, NO_WRAP, p.rank, p.rank_aligned != 0u));
    }

    // Mainloop over tiles of 32 token rows. While one is multiplied, the next is on its way to registers.
    const noise::Key key = key_of(p.noise);
    const NoiseRows noise_rows(p.noise, p.tokens, 0);
    Loader<T> loader(first_channel);
    GradB<T, RANK> grad_b = {};
    fetch<T, RANK>(loader, p, first, end);
    for (u32 row = first; row < end; row += ROWS) {
        load_e_tile<T, RANK>(shared, loader, p, key, noise_rows, row, end);
        __syncthreads();
        if (row + ROWS < end) {
            fetch<T, RANK>(loader, p, row + ROWS, end);
        }
        if (p.ds != nullptr) {
            accumulate_ds<Math, RANK>(shared);
        }
        if (p.b_sums != nullptr) {
            accumulate_dB<Math, RANK>(grad_b, shared);
        }
        __syncthreads(); // ds is complete, and the tiles are free
        if (p.ds != nullptr) {
            store_ds<T, RANK>(shared, p, chunk, row, end);
        }
    }

    // Epilogue: the sums over the block's rows.
    if (p.b_sums != nullptr) {
        store_dB<T, RANK>(grad_b, p, split, first_channel);
    }
    if (p.delta_bias != nullptr) {
        store_bias_gradient<T, RANK>(loader, shared, p, split, first_channel);
    }
}

PACE_GEMM_KERNELS(low_rank_linear_16, LowRankLinearParams, (THREADS), forward<Math, 16>(p))
PACE_GEMM_KERNELS(low_rank_linear_32, LowRankLinearParams, (THREADS), forward<Math, 32>(p))
PACE_GEMM_KERNELS(low_rank_factors_16, LowRankFactorsParams, (THREADS), factors<Math, 16>(p))
PACE_GEMM_KERNELS(low_rank_factors_32, LowRankFactorsParams, (THREADS), factors<Math, 32>(p))

} // namespace sm80::low_rank
} // namespace pace
