// Pairs of blocks that fetch tiles for each other, and barriers of every kind, for the simulator's own tests.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct PairParams {
    TensorMap x; // [tiles * 16, 64] of f32, boxes of 32 x 8, two of which are a row of a tile
    float *y;    // [2, tiles, 128]: each block's sums of columns of each tile
    u32 tiles;
};

enum class Seed {
    NOTHING,
    LEAVES,
    OWN_ARRIVALS_ONLY,
    NO_CLUSTER_BARRIER,
    RANK_OUTSIDE,
    RETURNS_BEFORE_CLUSTER_BARRIER,
};

constexpr u32 BOX = 128 * 8;
constexpr u32 TILE = 2 * BOX;
constexpr u32 STAGES = 2;

// A warp that fetches, and one that adds up. Of each tile [8, 64] block r fetches columns 32 r to 32 r + 31 for both.
template <Seed SEED> void pair(const PairParams &p) {
    const u32 rank = cluster_rank(), base = shared_base(), barriers = base + STAGES * TILE;
    const auto full = [&](u32 tile) { return barriers + tile % STAGES * 16; };
    const auto empty = [&](u32 tile) { return full(tile) + 8; };
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 2);
        }
        fence_barriers();
    }
    if (SEED == Seed::RETURNS_BEFORE_CLUSTER_BARRIER && rank == 1 && threadIdx.x == 40) {
        return;
    }
    if (SEED == Seed::NO_CLUSTER_BARRIER) {
        __syncthreads();
    } else {
        cluster_barrier();
    }
    if (uniform(threadIdx.x / 32) == 0) {
        if (!elect()) {
            return;
        }
        for (u32 tile = 0; tile < p.tiles; ++tile) {
            barrier_wait(empty(tile), (tile / STAGES + 1) % 2);
            barrier_arrive_and_expect(full(tile), TILE);
            copy_box_to(3u, base + tile % STAGES * TILE + rank * BOX, p.x, full(tile), static_cast<int>(32 * rank),
                        static_cast<int>(8 * tile), 0);
        }
        // No block leaves while the other still fetches for it, or arrives.
        for (u32 tile = p.tiles; tile < p.tiles + STAGES && SEED != Seed::LEAVES; ++tile) {
            barrier_wait(empty(tile), (tile / STAGES + 1) % 2);
        }
        return;
    }
    for (u32 tile = 0; tile < p.tiles; ++tile) {
        barrier_wait(full(tile), tile / STAGES % 2);
        for (u32 column = threadIdx.x - 32; column < 64; column += 32) {
            float sum = 0.0f;
            for (u32 row = 0; row < 8; ++row) {
                sum += load_shared(base + tile % STAGES * TILE + column / 32 * BOX + row * 128 + column % 32 * 4);
            }
            store(p.y + (rank * p.tiles + tile) * 64 + column, sum);
        }
        __syncwarp(0xffffffffu);
        if (threadIdx.x == 32) {
            for (u32 to = 0; to < 2; ++to) {
                const u32 block = SEED == Seed::OWN_ARRIVALS_ONLY ? rank : to;
                barrier_arrive_at(empty(tile), SEED == Seed::RANK_OUTSIDE ? 2 : block);
            }
        }
    }
}

struct BarrierParams {
    float *y;
    u32 mode;
};

// Two warps meet at a named barrier and hand over what they wrote; the others meet at theirs.
void named(const BarrierParams &p) {
    const u32 pair = threadIdx.x / 64, mine = shared_base() + 4 * threadIdx.x;
    const u32 other = shared_base() + 4 * (threadIdx.x ^ 32u);
    if (p.mode == 1 && threadIdx.x == 70) {
        return;
    }
    if (p.mode == 2 && threadIdx.x / 32 == 3) {
        named_barrier(2, 96);
    }
    if (p.mode == 3) {
        named_barrier(16, 64);
    }
    if (p.mode == 4) {
        named_barrier(1, 48);
    }
    if (p.mode == 5) {
        shrink_registers<20>();
    }
    if (p.mode == 9) {
        grow_registers<256>();
    }
    if (p.mode == 6 && threadIdx.x == 3) {
        barrier_wait(shared_base(), 0);
    }
    if (p.mode == 7 && threadIdx.x == 3) {
        barrier_init(shared_base() + 4, 1);
    }
    if (p.mode == 8 && threadIdx.x < 2) {
        barrier_init(shared_base(), 1);
    }
    store_shared(mine, static_cast<float>(threadIdx.x));
    named_barrier(1 + pair, 64);
    store(p.y + threadIdx.x, load_shared(other));
    // What a wgmma would look at.
    const Pair both = load_shared_pair(other & ~7u);
    store(p.y + 128 + threadIdx.x, both.value[0] + both.value[1]);
}

} // namespace
} // namespace pace::sm90

using namespace pace::sm90;

PACE_CLUSTER_KERNEL(pair, PairParams, 2, 64) { pair<Seed::NOTHING>(p); }

PACE_CLUSTER_KERNEL(pair_leaves, PairParams, 2, 64) { pair<Seed::LEAVES>(p); }

PACE_CLUSTER_KERNEL(pair_own_arrivals_only, PairParams, 2, 64) { pair<Seed::OWN_ARRIVALS_ONLY>(p); }

PACE_CLUSTER_KERNEL(pair_no_cluster_barrier, PairParams, 2, 64) { pair<Seed::NO_CLUSTER_BARRIER>(p); }

PACE_CLUSTER_KERNEL(pair_rank_outside, PairParams, 2, 64) { pair<Seed::RANK_OUTSIDE>(p); }

PACE_CLUSTER_KERNEL(pair_returns, PairParams, 2, 64) { pair<Seed::RETURNS_BEFORE_CLUSTER_BARRIER>(p); }

PACE_KERNEL(named_barriers, BarrierParams, 128) { named(p); }
