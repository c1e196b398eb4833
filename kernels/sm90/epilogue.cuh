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
// The table in shared memory, [copy][place][channel] of z and behind it of z * bd + b0.
template <u32 CHANNELS> struct NoiseTable {
    static constexpr u32 ROW = CHANNELS * sizeof(float);
    static constexpr u32 BYTES = 2 * COPIES * PLACES * ROW;

    u32 base;

    __device__ __forceinline__ u32 z(u32 copy, u32 place) const { return base + (copy * PLACES + place) * ROW; }
    __device__ __forceinline__ static constexpr u32 bias_offset() { return COPIES * PLACES * ROW; }
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
        const u32 to = table.z(copy, place) + 16 * group;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const float bias = fmaf(z.value[i], bias_of<T>(p.delta_bias, channel + i, p.channels),
                                    bias_of<T>(p.base_bias, channel + i, p.channels));
            store_shared(to + 4 * i, z.value[i]);
            store_shared(to + table.bias_offset() + 4 * i, bias);
        }
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
        if (threadIdx.x % WARPGROUP == 0) {
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
    // Which of the samples of the tile from `tile_row` on its rows belong to; those that do not exist, to that of the last.
    __device__ __forceinline__ void places(u32 (&places)[2], const Sm90LinearParams &p, u32 tile_row) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            places[half] = tile_row < p.rows ? min(row(half), p.rows - 1) / p.tokens - tile_row / p.tokens : 0u;
        }
    }
};

// Writes one chunk of 64 channels of a consumer's 64 rows: `element(j, half, y)` gives y of the pair of channels 8 j + 2 t of row
// `half`, j from 0 to 7. `staging`: STAGING buffers of 8 KiB of this consumer, used in turn.
template <class T, u32 STAGING, class Element>
__device__ __forceinline__ void store_chunk(const Sm90LinearParams &p, u32 staging, u32 turn, u32 consumer,
                                            const OwnRows &own, u32 column, u32 copy, const Element &element) {
    const bool leader = threadIdx.x % WARPGROUP == 0;
    const u32 buffer = staging + (consumer * STAGING + turn % STAGING) * CONSUMER_ROWS * CHUNK * 2;
    // The store that was here before has been read.
    if (leader) {
        wait_for_store_reads<STAGING - 1>();
    }
    named_barrier(1 + consumer, WARPGROUP);
    // Matrices of 8 x 8: the two halves of the rows of 8 channels, then of the next 8.
    const u32 row = 16 * own.warp + own.lane % 16;
    const u32 line = buffer + row * 128;
#pragma unroll
    for (u32 pair = 0; pair < CHUNK / 16; ++pair) {
        u32 matrices[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const Pair y = element(2 * pair + i / 2, i % 2);
            matrices[i] = pack<T>(y.value[0], y.value[1]);
        }
        stmatrix<false>(line + ((2 * pair + own.lane / 16) ^ (row & 7)) * 16, matrices);
    }
    fence_async_proxy();
    named_barrier(1 + consumer, WARPGROUP);
    if (leader) {
        store_box(p.y, buffer, column, own.first, copy);
        commit_stores();
    }
}

} // namespace pace::sm90

#endif // PACE_SM90_EPILOGUE_CUH
