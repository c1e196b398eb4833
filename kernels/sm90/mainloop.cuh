// A layer's GEMM with tokens as rows: a persistent, warp-specialised mainloop over TMA and wgmma.
//
// A block has a tile of 128 token rows by CHANNELS columns. Forward, the B operand is CHANNELS rows of W0 and EXTRA rows of the
// adapter's matrix behind them, N = CHANNELS + EXTRA columns: one accumulator for base and adapter. TRANSPOSED, for the gradient
// to the input, it is CHANNELS columns of W0, in panels of 64. Two consumer warpgroups have 64 rows each. In the third, the
// producer, warp 0 issues the copies and the others prepare what the epilogue needs (epilogue.cuh). Blocks stay for many
// tiles, columns fastest, so that those that run together share x in L2.
//
// The reduction is walked 64 elements at a time: rows of 128 bytes, 128B-swizzled, through STAGES stages. Each has a full barrier,
// which the copies complete, and an empty one, at which consumers arrive. The blocks of a cluster have adjacent rows and the
// same columns: each fetches its part of the B operand for all of them.

#ifndef PACE_SM90_MAINLOOP_CUH
#define PACE_SM90_MAINLOOP_CUH

#include "ptx.cuh"

namespace pace::sm90 {

constexpr u32 THREADS = SM90_THREADS;
// Consumer warpgroups, the first ones of the block.
constexpr u32 CONSUMERS = 2;
// Token rows of a block's tile, and of a consumer.
constexpr u32 TILE_ROWS = SM90_TILE_ROWS;
constexpr u32 CONSUMER_ROWS = TILE_ROWS / CONSUMERS;
// Elements and bytes of a tile along K.
constexpr u32 TILE_K = SM90_TILE_K;
constexpr u32 ROW_BYTES = 2 * TILE_K;
// A K step of a wgmma, in bytes.
constexpr u32 K_STEP_BYTES = 32;
// Registers of a thread of the producer and of a consumer; three warpgroups have 504 in each of a multiprocessor's lanes.
constexpr u32 PRODUCER_REGISTERS = 88;
constexpr u32 CONSUMER_REGISTERS = 208;

using KMajor = Tile<ROW_BYTES, 8 * ROW_BYTES>;

// Whether this warp of the producer issues the copies.
__device__ __forceinline__ bool is_copying_warp() {
    return uniform(threadIdx.x / WARP) == CONSUMERS * WARPGROUP / WARP;
}

// The block's number in a cluster of so many.
template <u32 CLUSTER> __device__ __forceinline__ u32 rank_in() { return CLUSTER == 1 ? 0u : cluster_rank(); }

// A barrier of all threads of a cluster of so many blocks.
template <u32 CLUSTER> __device__ __forceinline__ void meet() {
    if (CLUSTER == 1) {
        __syncthreads();
    } else {
        cluster_barrier();
    }
}

// A bias, zero where there is none.
template <class T> __device__ __forceinline__ float bias_of(const void *bias, u32 channel, u32 channels) {
    return bias != nullptr && channel < channels ? to_float(load(static_cast<const T *>(bias) + channel)) : 0.0f;
}

// Where the next stage is.
template <u32 STAGES> struct Turn {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1u;
        }
    }
    __device__ __forceinline__ u32 previous() const { return stage == 0 ? STAGES - 1 : stage - 1; }
};

// Two barriers for something that the producer's other warps prepare for each tile.
struct Handover {
    static constexpr u32 BYTES = 2 * 8;
    // Threads that prepare: all of the producer's warps but the first.
    static constexpr u32 THREADS = WARPGROUP - WARP;

    u32 full, empty;

    // By one thread of the block.
    __device__ __forceinline__ void init() const {
        barrier_init(full, THREADS);
        barrier_init(empty, CONSUMERS * WARPGROUP / WARP);
    }
    // By each warp of the consumers: all of its lanes have read what was handed over.
    __device__ __forceinline__ void release() const {
        __syncwarp(0xffffffffu);
        if (threadIdx.x % WARP == 0) {
            barrier_arrive(empty);
        }
    }
};

// Shared memory of the mainloop, from `base` on: the stages. Barriers lie at `barriers`.
template <u32 CHANNELS_, u32 EXTRA_, u32 STAGES_, u32 CLUSTER_, bool TRANSPOSED_ = false> struct Pipeline {
    static constexpr u32 CHANNELS = CHANNELS_, EXTRA = EXTRA_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static constexpr bool TRANSPOSED = TRANSPOSED_;
    static constexpr u32 N = CHANNELS + EXTRA;
    static constexpr u32 PANEL_BYTES = TILE_K * ROW_BYTES; // of 64 columns of W0
    static constexpr u32 X_BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = X_BYTES + N * ROW_BYTES;
    static constexpr u32 BYTES = STAGES * STAGE_BYTES;
    static constexpr u32 BARRIER_BYTES = 2 * STAGES * 8;
    static_assert(CHANNELS % (8 * CLUSTER) == 0 && EXTRA % (8 * CLUSTER) == 0,
                  "a swizzled tile starts at a multiple of 8 rows");
    static_assert(!TRANSPOSED || (EXTRA == 0 && CHANNELS % TILE_K == 0), "whole panels");
    // The B operand.
    using B = Tile<ROW_BYTES, 8 * ROW_BYTES, TRANSPOSED ? PANEL_BYTES : 16>;
    static constexpr u32 B_STEP = TRANSPOSED ? 16 * ROW_BYTES : K_STEP_BYTES;

    u32 base, barriers;

    __device__ __forceinline__ u32 stage(u32 index) const { return base + index * STAGE_BYTES; }
    __device__ __forceinline__ u32 full(u32 index) const { return barriers + 8 * index; }
    __device__ __forceinline__ u32 empty(u32 index) const { return barriers + 8 * (STAGES + index); }

    // By one thread of the block.
    __device__ __forceinline__ void init() const {
#pragma unroll
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), CONSUMERS * CLUSTER);
        }
    }
};

// The tiles of a block: token rows from `row` on, channels from `column` on. Divides once.
template <u32 CHANNELS, u32 CLUSTER> struct Tiles {
    u32 columns, left, tile_row, tile_column, step_rows, step_columns;
    __device__ __forceinline__ Tiles(const Sm90LinearParams &p) : columns(p.tile_columns) {
        const u32 first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, count = columns * p.tile_rows;
        left = first < count ? (count - 1 - first) / step + 1 : 0u;
        tile_row = first / columns, tile_column = first % columns;
        step_rows = step / columns, step_columns = step % columns;
    }
    __device__ __forceinline__ bool valid() const { return left != 0u; }
    __device__ __forceinline__ void advance() {
        --left;
        tile_row += step_rows, tile_column += step_columns;
        if (tile_column >= columns) {
            tile_column -= columns, ++tile_row;
        }
    }
    __device__ __forceinline__ u32 row(u32 rank) const { return (tile_row * CLUSTER + rank) * TILE_ROWS; }
    __device__ __forceinline__ u32 column() const { return tile_column * CHANNELS; }
};

// A box for all blocks of the cluster.
template <u32 CLUSTER>
__device__ __forceinline__ void copy_to_all(u32 to, const TensorMap &map, u32 barrier, int x, int y, int z) {
    if (CLUSTER == 1) {
        copy_box(to, map, barrier, x, y, z);
    } else {
        copy_box_to((1u << CLUSTER) - 1u, to, map, barrier, x, y, z);
    }
}

// Fetches this block's part of ROWS rows of 64 elements of a matrix, for all blocks of the cluster.
template <u32 ROWS, u32 CLUSTER>
__device__ __forceinline__ void copy_part(u32 to, const TensorMap &map, u32 barrier, int column, int row, u32 rank) {
    if (CLUSTER == 1) {
        copy_box(to, map, barrier, column, row, 0);
    } else {
        constexpr u32 PART = ROWS / CLUSTER;
        copy_box_to((1u << CLUSTER) - 1u, to + rank * PART * ROW_BYTES, map, barrier, column, row + rank * PART, 0);
    }
}

// The producer's copies of one stage: x or g from `row` on of branch `copy`, and the B operand.
template <class Pipe>
__device__ __forceinline__ void copy_stage(const Pipe &pipe, const Sm90LinearParams &p, u32 stage, int row, int column,
                                           u32 copy, int k, u32 rank) {
    const u32 full = pipe.full(stage), x = pipe.stage(stage), weight = x + Pipe::X_BYTES;
    barrier_arrive_and_expect(full, Pipe::STAGE_BYTES);
    copy_box(x, p.x, full, k, row, copy);
    if (Pipe::TRANSPOSED) {
#pragma unroll
        for (u32 panel = 0; panel < Pipe::CHANNELS / TILE_K; ++panel) {
            copy_part<TILE_K, Pipe::CLUSTER>(weight + panel * Pipe::PANEL_BYTES, p.weight, full,
                                             column + panel * TILE_K, k, rank);
        }
    } else {
        copy_part<Pipe::CHANNELS, Pipe::CLUSTER>(weight, p.weight, full, k, column, rank);
        copy_part<Pipe::EXTRA, Pipe::CLUSTER>(weight + Pipe::CHANNELS * ROW_BYTES, p.extra, full, k,
                                              p.extra_by_column != 0 ? column : 0, rank);
    }
}

// Its copies for all tiles, by one thread. TRANSPOSED, the branches' gradients add up.
template <class Pipe> __device__ __forceinline__ void produce(const Pipe &pipe, const Sm90LinearParams &p, u32 rank) {
    prefetch_map(p.x);
    prefetch_map(p.weight);
    prefetch_map(p.y);
    const u32 k_tiles = (p.inner - 1) / TILE_K + 1;
    Turn<Pipe::STAGES> turn;
    for (Tiles<Pipe::CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        const int row = tile.row(rank), column = tile.column();
        for (u32 copy = 0; copy < (Pipe::TRANSPOSED ? p.copies : 1u); ++copy) {
            for (u32 k_tile = 0; k_tile < k_tiles; ++k_tile) {
                barrier_wait(pipe.empty(turn.stage), turn.parity ^ 1u);
                copy_stage(pipe, p, turn.stage, row, column, copy, k_tile * TILE_K, rank);
                turn.advance();
            }
        }
    }
    // No block leaves while another one still copies to it or arrives at its barriers.
    for (u32 i = 0; i < Pipe::STAGES; ++i) {
        barrier_wait(pipe.empty(turn.stage), turn.parity ^ 1u);
        turn.advance();
    }
}

// A consumer is done with a stage: its first threads tell the producers that copy to it.
template <class Pipe> __device__ __forceinline__ void release(const Pipe &pipe, u32 stage) {
    const u32 thread = threadIdx.x % WARPGROUP;
    if (Pipe::CLUSTER == 1) {
        if (thread == 0) {
            barrier_arrive(pipe.empty(stage));
        }
    } else if (thread < Pipe::CLUSTER) {
        barrier_arrive_at(pipe.empty(stage), thread);
    }
}

// The accumulators of a consumer's 64 rows of one tile: acc = x @ [W0; extra]^T, or g @ W0. One group of wgmmas runs while the next stage
// is waited for.
template <class T, class Pipe>
__device__ __forceinline__ void accumulate(float (&acc)[Pipe::N / 2], const Pipe &pipe, Turn<Pipe::STAGES> &turn,
                                           u32 consumer, u32 k_tiles) {
#pragma unroll 1
    for (u32 k_tile = 0; k_tile < k_tiles; ++k_tile) {
        barrier_wait(pipe.full(turn.stage), turn.parity);
        const u32 x = pipe.stage(turn.stage) + consumer * CONSUMER_ROWS * ROW_BYTES;
        const u32 weight = pipe.stage(turn.stage) + Pipe::X_BYTES;
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < ROW_BYTES / K_STEP_BYTES; ++step) {
            wgmma<T, Pipe::N, false, Pipe::TRANSPOSED>(acc, KMajor::at(x + step * K_STEP_BYTES),
                                                       Pipe::B::at(weight + step * Pipe::B_STEP),
                                                       (k_tile | step) != 0u);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k_tile != 0u) {
            release(pipe, turn.previous());
        }
        turn.advance();
    }
    wgmma_wait<0>();
    keep(acc);
    release(pipe, turn.previous());
}

} // namespace pace::sm90

#endif // PACE_SM90_MAINLOOP_CUH
