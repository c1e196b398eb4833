// Dense noisy linear layer, forward, for 16-bit types, with an accumulator for base and adapter each.
//
//   y = x @ W0^T + b0 + z * (x @ Wd^T + bd)
//
//   x [M, K] or, shared by the branches, [B T, K]; W0, Wd [N, K]; b0, bd [N]; y [M, N]; z as in noise_source.cuh.
//
// A block has 128 token rows and 128 channels (mainloop.cuh): W0's rows and Wd's are one B operand of 256 columns, so that a
// thread has base and adapter of the same elements, and z meets them in f32. With a shared input both GEMMs run once for both
// branches. Two variants of the epilogue: z by a table, where a tile has few rows of it, or each thread makes its own.
//
// Bytes: x (N / 128) times and both matrices (M / 128) times from L2, shared within clusters; y once. Operations: 4 M N K.
// Determinism: run-to-run bitwise; every sum in a fixed order, and a sample's output does not depend on its batch.

#include "epilogue.cuh"

namespace pace {

namespace sm90::exact {

constexpr u32 CHANNELS = SM90_EXACT_CHANNELS;
constexpr u32 STAGING = SM90_EXACT_STAGING;
using Pipe = Pipeline<CHANNELS, CHANNELS, SM90_EXACT_STAGES, SM90_EXACT_CLUSTER>;
using Table = NoiseTable<CHANNELS>;

// Shared memory: stages, staging, the noise table, barriers.
constexpr u32 STAGING_AT = Pipe::BYTES;
constexpr u32 TABLE_AT = STAGING_AT + CONSUMERS * STAGING * CONSUMER_ROWS * CHUNK * 2;
constexpr u32 BARRIERS_AT = TABLE_AT + Table::BYTES;
static_assert(BARRIERS_AT + Pipe::BARRIER_BYTES + Handover::BYTES <= 227 * 1024, "what a block of sm_90 may have");

// z of a thread's pairs of channels, made by the thread and its neighbour: of the four channels that they share, lane 2 q makes z
// of row g and lane 2 q + 1 that of row g + 8, and they exchange what the other needs.
struct OwnNoise {
    noise::Key key;
    u32 z_rows[2]; // row of z of this thread's rows
    u32 tokens;
    __device__ __forceinline__ OwnNoise(const Sm90LinearParams &p, const OwnRows &own, u32 copy)
        : key(key_of(p.noise)), tokens(p.tokens) {
        const u32 each = is_per_token(p.noise) ? 1u : p.tokens;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            z_rows[half] = copy * (p.rows / each) + min(own.row(half), p.rows - 1) / each;
        }
    }
    // Of channels `channel` and the next, rows g and g + 8. Must be called by all lanes of the warp.
    __device__ __forceinline__ void make(Pair (&z)[2], const Sm90LinearParams &p, u32 lane, u32 channel) const {
        const bool odd = lane % 2 != 0;
        const noise::Four mine = z_of_row(p.noise, key, odd ? z_rows[1] : z_rows[0], tokens, channel / 4, p.channels,
                                          p.noise.aligned != 0u);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const float theirs = __shfl_xor_sync(0xffffffffu, odd ? mine.value[i] : mine.value[2 + i], 1);
            z[0].value[i] = odd ? theirs : mine.value[i];
            z[1].value[i] = odd ? mine.value[2 + i] : theirs;
        }
    }
};

// A consumer's part of one tile's output.
template <class T, bool BY_TABLE>
__device__ __forceinline__ void store_tile(const float (&acc)[Pipe::N / 2], const Table &table,
                                           const Sm90LinearParams &p, u32 staging, u32 turn, u32 consumer,
                                           const OwnRows &own, const u32 (&places)[2], u32 column, u32 copy) {
    const OwnNoise noise(p, own, copy);
#pragma unroll
    for (u32 chunk = 0; chunk < CHANNELS / CHUNK; ++chunk) {
        Pair z[2];
        store_chunk<T, STAGING>(
            p, staging, turn + chunk, consumer, own, column + chunk * CHUNK, copy, [&](u32 j, u32 half) {
                const u32 channel = chunk * CHUNK + 8 * j + own.channel();
                const float *base = acc + chunk * CHUNK / 2 + 4 * j + 2 * half, *adapter = base + CHANNELS / 2;
                if (!BY_TABLE && half == 0) {
                    noise.make(z, p, own.lane, column + channel);
                }
                Pair y;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (BY_TABLE) {
                        const u32 at = table.z(copy, places[half]) + 4 * (channel + i);
                        y.value[i] =
                            fmaf(load_shared(at), adapter[i], base[i] + load_shared(at + table.bias_offset()));
                    } else {
                        const u32 at = column + channel + i;
                        y.value[i] =
                            fmaf(z[half].value[i], adapter[i] + bias_of<T>(p.delta_bias, at, p.channels),
                                 base[i] + bias_of<T>(p.base_bias, at, p.channels));
                    }
                }
                return y;
            });
    }
}

// A consumer's part of all tiles.
template <class T, bool BY_TABLE>
__device__ __forceinline__ void consume(const Pipe &pipe, const Table &table, const Handover &handover,
                                        const Sm90LinearParams &p, u32 consumer, u32 rank) {
    const u32 k_tiles = (p.inner - 1) / TILE_K + 1;
    Turn<Pipe::STAGES> turn;
    u32 parity = 0, stores = 0;
    for (Tiles<CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        float acc[Pipe::N / 2];
        accumulate<T>(acc, pipe, turn, consumer, k_tiles);

        const u32 row = tile.row(rank), column = tile.column();
        const OwnRows own(consumer, row);
        u32 places[2] = {0, 0};
        if (BY_TABLE) {
            barrier_wait(handover.full, parity);
            parity ^= 1u;
            own.places(places, p, row);
        }
#pragma unroll 1
        for (u32 copy = 0; copy < p.copies; ++copy) {
            store_tile<T, BY_TABLE>(acc, table, p, pipe.base + STAGING_AT, stores, consumer, own, places, column, copy);
            stores += CHANNELS / CHUNK;
        }
        // All threads of the consumer have read the table before its last store.
        if (BY_TABLE && threadIdx.x % WARPGROUP == 0) {
            barrier_arrive(handover.empty);
        }
    }
    if (threadIdx.x % WARPGROUP == 0) {
        wait_for_stores();
    }
}

// The producer's other warps: noise and biases for each tile.
template <class T>
__device__ __forceinline__ void prepare(const Table &table, const Handover &handover, const Sm90LinearParams &p,
                                        u32 rank) {
    const noise::Key key = key_of(p.noise);
    const u32 filler = threadIdx.x % WARPGROUP - WARP;
    u32 parity = 1;
    for (Tiles<CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        barrier_wait(handover.empty, parity);
        parity ^= 1u;
        fill_table<T>(table, p, key, filler, tile.row(rank), tile.column());
        barrier_arrive(handover.full);
    }
}

template <class T, bool BY_TABLE> __device__ __forceinline__ void forward(const Sm90LinearParams &p) {
    const u32 base = shared_base(), rank = Pipe::CLUSTER == 1 ? 0u : cluster_rank();
    const Pipe pipe = {base, base + BARRIERS_AT};
    const Table table = {base + TABLE_AT};
    const Handover handover = {pipe.barriers + Pipe::BARRIER_BYTES, pipe.barriers + Pipe::BARRIER_BYTES + 8};
    start(pipe, handover);
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (is_copying_warp()) {
            if (elect()) {
                produce(pipe, p, rank);
            }
        } else if (BY_TABLE) {
            prepare<T>(table, handover, p, rank);
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume<T, BY_TABLE>(pipe, table, handover, p, warpgroup, rank);
    }
}

PACE_CLUSTER_KERNELS_16(sm90_noisy_linear_exact, Sm90LinearParams, SM90_EXACT_CLUSTER, (THREADS, 1), forward<T, true>(p))
PACE_CLUSTER_KERNELS_16(sm90_noisy_linear_exact_any, Sm90LinearParams, SM90_EXACT_CLUSTER, (THREADS, 1), forward<T, false>(p))

} // namespace sm90::exact
} // namespace pace
