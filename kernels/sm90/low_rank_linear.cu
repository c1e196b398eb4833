// Low-rank noisy linear layer (LoRA add) for ranks up to 32, forward, for 16-bit types and noise per sample.
//
//   y = x @ W0^T + b0 + z * (s @ B^T + bd),  s = scale x @ A^T
//
//   x [M, K] or, shared by the branches, [B T, K]; W0 [N, K]; A [r, K]; B [N, r]; b0, bd [N]; y [M, N]; s [rows of x, r]; z as in
//   noise_source.cuh.
//
// A block has 128 token rows and 192 channels (mainloop.cuh): W0's rows and A's, padded to RANK, are one B operand, so that
// s costs no load of x. Its accumulators, rounded to T, are then the A fragments of the rank's GEMM by mma.sync, whose
// accumulators meet the noise 8 channels at a time. With a shared input the base GEMM runs once for both branches.
//
// Bytes: x (N / 192) times and W0 (M / 128) times from L2, shared within clusters; y once. Operations: 2 M N K (1 + RANK / 192) +
// 2 M N RANK.
// Determinism: run-to-run bitwise; every sum in a fixed order, and a sample's output does not depend on its batch.

#include "epilogue.cuh"

namespace pace {

namespace sm90::low_rank {

constexpr u32 CHANNELS = SM90_LOW_RANK_CHANNELS;

// Shared memory: stages, staging, the noise table, B, barriers.
template <u32 RANK> struct Layout {
    static constexpr u32 STAGING = RANK == 16 ? SM90_LOW_RANK_STAGING : 1;
    using Pipe = Pipeline<CHANNELS, RANK, SM90_LOW_RANK_STAGES, SM90_LOW_RANK_CLUSTER>;
    // Rows of B are padded by 16 bytes: eight of them are in different banks.
    static constexpr u32 B_ROW = 2 * RANK + 16;
    static constexpr u32 STAGING_AT = Pipe::BYTES;
    static constexpr u32 TABLE_AT = STAGING_AT + CONSUMERS * STAGING * CONSUMER_ROWS * CHUNK * 2;
    static constexpr u32 B_AT = TABLE_AT + NoiseTable<CHANNELS>::BYTES;
    static constexpr u32 BARRIERS_AT = B_AT + CHANNELS * B_ROW;
    static constexpr u32 BYTES = BARRIERS_AT + Pipe::BARRIER_BYTES + NoiseTable<CHANNELS>::BARRIER_BYTES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");
};

// Writes the tile's rows of B to shared memory, zeros behind its columns and rows.
template <class T, u32 RANK>
__device__ __forceinline__ void fill_lora_b(u32 to, const Sm90LinearParams &p, u32 filler, u32 column) {
    const T *lora_b = static_cast<const T *>(p.lora_b);
#pragma unroll 4
    for (u32 index = filler; index < CHANNELS * RANK; index += FILLERS) {
        const u32 row = index / RANK, j = index % RANK;
        const bool exists = column + row < p.channels && j < p.rank;
        const T value = exists ? load(lora_b + static_cast<u64>(column + row) * p.rank + j) : from_float<T>(0.0f);
        store_shared_element(to + row * Layout<RANK>::B_ROW + 2 * j, value);
    }
}

// s of this thread's rows as A fragments, and, `to_caller`, in memory.
template <class T, u32 RANK>
__device__ __forceinline__ void take_s(u32 (&fragments)[RANK / 16][4], const float (&acc)[(CHANNELS + RANK) / 2],
                                       const Sm90LinearParams &p, const OwnRows &own, bool to_caller) {
#pragma unroll
    for (u32 j = 0; j < RANK / 8; ++j) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float *values = acc + CHANNELS / 2 + 4 * j + 2 * half;
            const T pair[2] = {from_float<T>(p.scale * values[0]), from_float<T>(p.scale * values[1])};
            fragments[j / 2][2 * (j % 2) + half] = pack<T>(to_float(pair[0]), to_float(pair[1]));
            if (to_caller && own.row(half) < p.rows) {
                const u32 column = 8 * j + own.channel();
                T *out = static_cast<T *>(p.s) + static_cast<u64>(own.row(half)) * p.rank + column;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (column + i < p.rank) {
                        store(out + i, pair[i]);
                    }
                }
            }
        }
    }
}

// The adapter's term of 16 channels from `row` of B on: [8 channels][accumulators].
template <class T, u32 RANK>
__device__ __forceinline__ void multiply_rank(float (&adapter)[2][4], const u32 (&s)[RANK / 16][4], u32 lora_b,
                                              u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        adapter[0][i] = adapter[1][i] = 0.0f;
    }
#pragma unroll
    for (u32 step = 0; step < RANK / 16; ++step) {
        // Matrices: the halves of K of 8 channels, then of the next 8.
        u32 b[4];
        ldmatrix<false>(b, lora_b + (lane / 16 * 8 + lane % 8) * Layout<RANK>::B_ROW + 32 * step + lane / 8 % 2 * 16);
        mma<T>(adapter[0], s[step], b[0], b[1]);
        mma<T>(adapter[1], s[step], b[2], b[3]);
    }
}

// A consumer's part of all tiles.
template <class T, u32 RANK>
__device__ __forceinline__ void consume(const typename Layout<RANK>::Pipe &pipe, const NoiseTable<CHANNELS> &table,
                                        const Sm90LinearParams &p, u32 consumer, u32 rank) {
    using Shared = Layout<RANK>;
    using Pipe = typename Shared::Pipe;
    const u32 k_tiles = (p.inner - 1) / TILE_K + 1;
    Turn<Pipe::STAGES> turn;
    u32 table_parity = 0, stores = 0;
    for (Tiles<CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        float acc[Pipe::N / 2];
        accumulate<T>(acc, pipe, turn, consumer, k_tiles);

        const u32 row = tile.row(rank), column = tile.column();
        const OwnRows own(consumer, row);
        u32 s[RANK / 16][4];
        take_s<T, RANK>(s, acc, p, own, column == 0);
        barrier_wait(table.full, table_parity);
        table_parity ^= 1u;
        u32 places[2];
        own.places(places, p, row);
#pragma unroll 1
        for (u32 copy = 0; copy < p.copies; ++copy) {
            const u32 z[2] = {table.z(copy, places[0]) + 4 * own.channel(),
                              table.z(copy, places[1]) + 4 * own.channel()};
#pragma unroll
            for (u32 chunk = 0; chunk < CHANNELS / CHUNK; ++chunk) {
                float adapter[2][4];
                store_chunk<T, Shared::STAGING>(
                    p, pipe.base + Shared::STAGING_AT, stores + chunk, consumer, own, column + chunk * CHUNK, copy,
                    [&](u32 j, u32 half) {
                        if (j % 2 == 0 && half == 0) {
                            const u32 lora_b =
                                pipe.base + Shared::B_AT + (chunk * CHUNK + 8 * j) * Shared::B_ROW;
                            multiply_rank<T, RANK>(adapter, s, lora_b, own.lane);
                        }
                        const u32 at = z[half] + 4 * (chunk * CHUNK + 8 * j);
                        const Pair factor = load_shared_pair(at), bias = load_shared_pair(at + table.bias_offset());
                        const float *base = acc + chunk * CHUNK / 2 + 4 * j + 2 * half;
                        Pair y;
#pragma unroll
                        for (u32 i = 0; i < 2; ++i) {
                            y.value[i] =
                                fmaf(factor.value[i], adapter[j % 2][2 * half + i], base[i] + bias.value[i]);
                        }
                        return y;
                    });
            }
            stores += CHANNELS / CHUNK;
        }
        // All threads of the consumer have read the table before its last store.
        if (threadIdx.x % WARPGROUP == 0) {
            barrier_arrive(table.empty);
        }
    }
    if (threadIdx.x % WARPGROUP == 0) {
        wait_for_stores();
    }
}

// The producer's other warps: noise, biases and B for each tile.
template <class T, u32 RANK>
__device__ __forceinline__ void prepare(const typename Layout<RANK>::Pipe &pipe, const NoiseTable<CHANNELS> &table,
                                        const Sm90LinearParams &p, u32 rank) {
    const noise::Key key = key_of(p.noise);
    const u32 filler = threadIdx.x % WARPGROUP - WARP;
    u32 parity = 1;
    for (Tiles<CHANNELS, Layout<RANK>::Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        barrier_wait(table.empty, parity);
        parity ^= 1u;
        fill_table<T>(table, p, key, filler, tile.row(rank), tile.column());
        fill_lora_b<T, RANK>(pipe.base + Layout<RANK>::B_AT, p, filler, tile.column());
        barrier_arrive(table.full);
    }
}

template <class T, u32 RANK> __device__ __forceinline__ void forward(const Sm90LinearParams &p) {
    using Shared = Layout<RANK>;
    using Pipe = typename Shared::Pipe;
    const u32 base = shared_base(), rank = Pipe::CLUSTER == 1 ? 0u : cluster_rank();
    const Pipe pipe = {base, base + Shared::BARRIERS_AT};
    const NoiseTable<CHANNELS> table(base + Shared::TABLE_AT, pipe.barriers + Pipe::BARRIER_BYTES);
    start(pipe, table);
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (is_copying_warp()) {
            if (elect()) {
                produce(pipe, p, rank);
            }
        } else {
            prepare<T, RANK>(pipe, table, p, rank);
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume<T, RANK>(pipe, table, p, warpgroup, rank);
    }
}

PACE_CLUSTER_KERNELS_16(sm90_low_rank_linear_16, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1), forward<T, 16>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_linear_32, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1), forward<T, 32>(p))

} // namespace sm90::low_rank
} // namespace pace
