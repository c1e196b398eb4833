// The kernels of noisy_linear.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_NOISY_LINEAR_CUH
#define PACE_SM90_NOISY_LINEAR_CUH

#include "epilogue.cuh"

namespace pace {

namespace sm90::exact {

constexpr u32 CHANNELS = SM90_EXACT_CHANNELS;
using Table = NoiseTable<CHANNELS>;

// Shared memory: stages, staging, the noise table, barriers. How a kernel is built: stages, blocks of a cluster, and a consumer's
// buffers for outputs.
template <u32 STAGES, u32 CLUSTER, u32 STAGING_> struct Layout {
    using Pipe = Pipeline<CHANNELS, CHANNELS, STAGES, CLUSTER>;
    static constexpr u32 STAGING = STAGING_;
    static constexpr u32 STAGING_AT = Pipe::BYTES;
    static constexpr u32 TABLE_AT = STAGING_AT + CONSUMERS * STAGING * CONSUMER_ROWS * CHUNK * 2;
    static constexpr u32 BARRIERS_AT = TABLE_AT + Table::BYTES;
    static constexpr u32 BYTES = BARRIERS_AT + Pipe::BARRIER_BYTES + Handover::BYTES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    Pipe pipe;
    Handover handover;
    Table table;

    __device__ __forceinline__ explicit Layout(u32 base)
        : pipe{base, base + BARRIERS_AT}, handover{pipe.barriers + Pipe::BARRIER_BYTES,
                                                   pipe.barriers + Pipe::BARRIER_BYTES + 8},
          table{base + TABLE_AT} {}
};

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
        const noise::Four mine =
            z_of_row(p.noise, key, odd ? z_rows[1] : z_rows[0], tokens, channel / 4, p.channels, p.noise.aligned != 0u);
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const float theirs = __shfl_xor_sync(0xffffffffu, odd ? mine.value[i] : mine.value[2 + i], 1);
            z[0].value[i] = odd ? theirs : mine.value[i];
            z[1].value[i] = odd ? mine.value[2 + i] : theirs;
        }
    }
};

// A consumer's part of one tile's output.
template <class T, bool BY_TABLE, class Shared>
__device__ __forceinline__ void store_tile(const float (&acc)[CHANNELS], const Shared &shared,
                                           const Sm90LinearParams &p, u32 turn, u32 consumer, const OwnRows &own,
                                           const u32 (&places)[2], u32 column, u32 copy) {
    const u32 staging = shared.pipe.base + Shared::STAGING_AT;
    if constexpr (BY_TABLE) {
        const u32 rows[2] = {shared.table.row(copy, places[0]) + 8 * own.channel(),
                             shared.table.row(copy, places[1]) + 8 * own.channel()};
        store_rows<T, Shared::STAGING, CHANNELS>(
            p, staging, turn, consumer, own, column, copy, [&](u32 channel) { return PartNoise(rows, channel); },
            [&](u32 channel, const PartNoise &noise, PartPairs &y) {
#pragma unroll
                for (u32 i = 0; i < PART / 4; ++i) {
                    const float *base = acc + channel / 2 + 2 * i;
                    y[i / 2][i % 2] = noise.apply(i / 2, i % 2, base, base + CHANNELS / 2);
                }
            });
    } else {
        const OwnNoise noise(p, own, copy);
        store_rows<T, Shared::STAGING, CHANNELS>(
            p, staging, turn, consumer, own, column, copy, [](u32) { return 0; },
            [&](u32 channel, int, PartPairs &y) {
#pragma unroll
                for (u32 j = 0; j < PART / 8; ++j) {
                    const u32 first = column + channel + 8 * j + own.channel();
                    const float *base = acc + channel / 2 + 4 * j, *adapter = base + CHANNELS / 2;
                    Pair z[2];
                    noise.make(z, p, own.lane, first);
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        const u32 at = first + i % 2;
                        y[j][i / 2].value[i % 2] =
                            fmaf(z[i / 2].value[i % 2], adapter[i] + bias_of<T>(p.delta_bias, at, p.channels),
                                 base[i] + bias_of<T>(p.base_bias, at, p.channels));
                    }
                }
            });
    }
}

// A consumer's part of all tiles.
template <class T, bool BY_TABLE, class Shared>
__device__ __forceinline__ void consume(const Shared &shared, const Sm90LinearParams &p, u32 consumer, u32 rank) {
    using Pipe = typename Shared::Pipe;
    const u32 k_tiles = (p.inner - 1) / TILE_K + 1;
    Turn<Pipe::STAGES> turn;
    u32 parity = 0, stores = 0;
    for (Tiles<CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        float acc[Pipe::N / 2];
        accumulate<T>(acc, shared.pipe, turn, consumer, k_tiles);

        const u32 row = tile.row(rank), column = tile.column();
        const OwnRows own(consumer, row);
        u32 places[2] = {0, 0};
        if (BY_TABLE) {
            barrier_wait(shared.handover.full, parity);
            parity ^= 1u;
            own.places(places, p, load_shared_word(shared.table.end()));
        }
#pragma unroll 1
        for (u32 copy = 0; copy < p.copies; ++copy) {
            store_tile<T, BY_TABLE>(acc, shared, p, stores, consumer, own, places, column, copy);
            stores += CHANNELS / CHUNK;
        }
        if (BY_TABLE) {
            shared.handover.release();
        }
    }
}

// The producer's other warps make noise and biases for each tile.
template <class T, bool BY_TABLE, class Shared> __device__ __forceinline__ void forward(const Sm90LinearParams &p) {
    const Shared shared(shared_base());
    by_roles<BY_TABLE>(
        shared, p,
        [&](u32 filler, u32 row, u32 column) { fill_table<T>(shared.table, p, key_of(p.noise), filler, row, column); },
        [&](u32 consumer, u32 rank) { consume<T, BY_TABLE>(shared, p, consumer, rank); });
}

} // namespace sm90::exact
} // namespace pace

#endif // PACE_SM90_NOISY_LINEAR_CUH
