// The epilogue of the forward GEMM: y = base + b0 + z * (adapter + bd), to global memory by TMA.
//
// With one z per sample a tile of 128 token rows needs few rows of z. The producer's warps 1 to 3 make them while the mainloop
// runs, as a table in shared memory of z and z * bd + b0, so that the epilogue is one addition and one fma an element.
// A tile goes out in chunks of 64 channels: rounded to T, by stmatrix to 128B-swizzled staging, and from there by TMA, which
// clips what lies outside y.

#ifndef PACE_SM90_EPILOGUE_CUH
#define PACE_SM90_EPILOGUE_CUH

#include "../tile_noise.cuh"
#include "mainloop.cuh"

namespace pace::sm90 {

// Samples whose tokens a tile may have; plans check it.
constexpr u32 PLACES = SM90_TILE_SAMPLES;
// Copies of a tile's rows that share x, one per branch.
constexpr u32 COPIES = 2;
// Channels of a chunk.
constexpr u32 CHUNK = SM90_TILE_K;
// The table in shared memory, [copy][place][pair of channels] of z of both and z * bd + b0 of both; behind it the row at which
// the second sample of the tile begins.
template <u32 CHANNELS> struct NoiseTable {
    static constexpr u32 ROW = 2 * CHANNELS * sizeof(float);
    static constexpr u32 END_AT = COPIES * PLACES * ROW;
    static constexpr u32 BYTES = END_AT + 16;

    u32 base;

    __device__ __forceinline__ u32 row(u32 copy, u32 place) const { return base + (copy * PLACES + place) * ROW; }
    __device__ __forceinline__ u32 end() const { return base + END_AT; }
};

// The last token row of a tile that exists.
__device__ __forceinline__ u32 last_row(const Sm90LinearParams &p, u32 row) { return min(row + TILE_ROWS, p.rows) - 1; }

// Initialises the barriers; by all threads of the cluster, at the start.
template <class Pipe> __device__ __forceinline__ void start(const Pipe &pipe, const Handover &handover) {
    if (threadIdx.x == 0) {
        pipe.init();
        handover.init();
        fence_barriers();
    }
    meet<Pipe::CLUSTER>();
}

// Fills the table for the tile from `row` and `column` on; by the threads of a handover, this one its `filler`th.
template <class T, u32 CHANNELS>
__device__ __forceinline__ void fill_table(const NoiseTable<CHANNELS> &table, const Sm90LinearParams &p, noise::Key key,
                                           u32 filler, u32 row, u32 column) {
    constexpr u32 GROUPS = CHANNELS / 4;
    const u32 first = row / p.tokens, places = row < p.rows ? last_row(p, row) / p.tokens - first + 1 : 0u;
#pragma unroll 1
    for (u32 index = filler; index < p.copies * places * GROUPS; index += Handover::THREADS) {
        const u32 group = index % GROUPS, place = index / GROUPS % places, copy = index / GROUPS / places;
        const u32 channel = column + 4 * group;
        const noise::Four z = z_of_row(p.noise, key, copy * p.samples + first + place, p.tokens, channel / 4,
                                       p.channels, p.noise.aligned != 0u);
        float bias[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            bias[i] = fmaf(z.value[i], bias_of<T>(p.delta_bias, channel + i, p.channels),
                           bias_of<T>(p.base_bias, channel + i, p.channels));
        }
        const u32 to = table.row(copy, place) + 32 * group;
        store_shared_four(to, Four{{z.value[0], z.value[1], bias[0], bias[1]}});
        store_shared_four(to + 16, Four{{z.value[2], z.value[3], bias[2], bias[3]}});
    }
    if (filler == 0u) {
        store_shared_word(table.end(), (first + 1) * p.tokens);
    }
}

// Gives the warpgroups of a block their roles: `prepare(filler, row, column)` makes what is handed over for a tile, by all threads of the
// producer's warps but the first; `consume(consumer, rank)` computes a consumer's part of all tiles. PREPARES: whether there is
// anything to hand over.
template <bool PREPARES, class Shared, class Prepare, class Consume>
__device__ __forceinline__ void by_roles(const Shared &shared, const Sm90LinearParams &p, const Prepare &prepare,
                                         const Consume &consume) {
    using Pipe = typename Shared::Pipe;
    const u32 rank = rank_in<Pipe::CLUSTER>();
    start(shared.pipe, shared.handover);
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (is_copying_warp()) {
            if (elect()) {
                produce(shared.pipe, p, rank);
            }
        } else if (PREPARES) {
            u32 parity = 1;
            for (Tiles<Pipe::CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
                barrier_wait(shared.handover.empty, parity);
                parity ^= 1u;
                prepare(threadIdx.x % WARPGROUP - WARP, tile.row(rank), tile.column());
                barrier_arrive(shared.handover.full);
            }
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume(warpgroup, rank);
        if (threadIdx.x % WARP == 0) {
            wait_for_stores();
        }
    }
}

// What a thread has of a consumer's 64 rows: rows g and g + 8 of its warp's 16.
struct OwnRows {
    u32 lane, warp, first;
    __device__ __forceinline__ OwnRows(u32 consumer, u32 row)
        : lane(threadIdx.x % WARP), warp(threadIdx.x / WARP % 4), first(row + consumer * CONSUMER_ROWS + 16 * warp) {}
    // Its row `half`, among all token rows.
    __device__ __forceinline__ u32 row(u32 half) const { return first + lane / 4 + 8 * half; }
    // The first of its two channels of every 8.
    __device__ __forceinline__ u32 channel() const { return 2 * (lane % 4); }
    // Which of the tile's samples its rows belong to, of which the first ends before row `end`; rows that do not exist, to that of
    // the last.
    __device__ __forceinline__ void places(u32 (&places)[2], const Sm90LinearParams &p, u32 end) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 existing = min(row(half), p.rows - 1);
            places[half] = 0;
#pragma unroll
            for (u32 i = 0; i < PLACES - 1; ++i) {
                // No sum that could be too large for 32 bits.
                places[half] += existing >= end && existing - end >= i * p.tokens ? 1u : 0u;
            }
        }
    }
};

// Channels whose outputs are made at once.
constexpr u32 PART = 16;
// Of a thread: pairs of channels, [8 channels][row].
using PartPairs = Pair[PART / 8][2];

// z and biases of a thread's part, whose rows in the table begin at `rows` for its first pair.
struct PartNoise {
    Four of[PART / 8][2];
    __device__ __forceinline__ PartNoise(const u32 (&rows)[2], u32 channel) {
#pragma unroll
        for (u32 j = 0; j < PART / 8; ++j) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                of[j][half] = load_shared_four(rows[half] + 8 * (channel + 8 * j));
            }
        }
    }
    // base + bias + z * adapter
    __device__ __forceinline__ Pair apply(u32 j, u32 half, const float *base, const float *adapter) const {
        const float(&value)[4] = of[j][half].value;
        return Pair{{fmaf(value[0], adapter[0], base[0] + value[2]), fmaf(value[1], adapter[1], base[1] + value[3])}};
    }
};

// Writes CHANNELS channels of a consumer's 64 rows, each warp its 16: `load(channel)` gets from shared memory what the part from that
// channel on needs, and `make(channel, loaded, y)` makes it. A part is loaded while the one before is made, and a chunk is sent when
// the next has been made: neither loads nor what the fence waits for are waited for. `staging`: STAGING buffers of each consumer, used
// in turn from `turn` on.
template <class T, u32 STAGING, u32 CHANNELS, class Load, class Make>
__device__ __forceinline__ void store_rows(const Sm90LinearParams &p, u32 staging, u32 turn, u32 consumer,
                                           const OwnRows &own, u32 column, u32 copy, const Load &load,
                                           const Make &make) {
    const auto buffer = [&](u32 chunk) {
        const u32 number = consumer * STAGING + (turn + chunk) % STAGING;
        return staging + (number * CONSUMER_ROWS + 16 * own.warp) * CHUNK * 2;
    };
    const auto send = [&](u32 chunk) {
        fence_async_proxy();
        __syncwarp(0xffffffffu);
        if (own.lane == 0) {
            store_box(p.y, buffer(chunk), column + chunk * CHUNK, own.first, copy);
            commit_stores();
        }
    };
    u32 bits[CHUNK / 8][2];
    auto ahead = load(0);
#pragma unroll
    for (u32 channel = 0; channel < CHANNELS; channel += PART) {
        const auto loaded = ahead;
        if (channel + PART < CHANNELS) {
            ahead = load(channel + PART);
        }
        PartPairs y;
        make(channel, loaded, y);
#pragma unroll
        for (u32 i = 0; i < PART / 4; ++i) {
            bits[channel % CHUNK / 8 + i / 2][i % 2] = pack<T>(y[i / 2][i % 2].value[0], y[i / 2][i % 2].value[1]);
        }
        if ((channel + PART) % CHUNK == 0) {
            const u32 chunk = channel / CHUNK;
            if (chunk != 0) {
                send(chunk - 1);
            }
            // The store that was here before has been read.
            if (own.lane == 0) {
                wait_for_store_reads<STAGING - 1>();
            }
            __syncwarp(0xffffffffu);
            // Matrices of 8 x 8: the two halves of the rows of 8 channels, then of the next 8.
            const u32 row = own.lane % 16, line = buffer(chunk) + row * 128;
#pragma unroll
            for (u32 j = 0; j < CHUNK / 8; j += 2) {
                const u32 matrices[4] = {bits[j][0], bits[j][1], bits[j + 1][0], bits[j + 1][1]};
                stmatrix<false>(line + ((j + own.lane / 16) ^ (row & 7)) * 16, matrices);
            }
        }
    }
    send(CHANNELS / CHUNK - 1);
}

} // namespace pace::sm90

#endif // PACE_SM90_EPILOGUE_CUH
