// The kernels of folded_linear.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_FOLDED_LINEAR_CUH
#define PACE_SM90_FOLDED_LINEAR_CUH

#include "mainloop.cuh"

namespace pace {

namespace sm90::folded {

constexpr u32 ROWS = SM90_FOLDED_ROWS; // of the output transposed
constexpr u32 FOLDED_REGISTERS = 240;
constexpr u32 COPYING_REGISTERS = 24;

// Shared memory: stages of a tile of W0, of Wd and of each unit; of z where it varies along the reduction; staging; barriers.
// How a kernel is built: a unit's tokens, the units of a tile, elements of a tile along the reduction, stages, blocks of a cluster.
template <u32 TOKENS_, u32 SAMPLES_, u32 DEPTH_, u32 STAGES_, u32 CLUSTER_> struct Layout {
    static constexpr u32 TOKENS = TOKENS_, SAMPLES = SAMPLES_, DEPTH = DEPTH_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static_assert(DEPTH == 32 || DEPTH == 64, "a row of a tile is a swizzle's span");
    static_assert(SAMPLES > 1, "while a fragment is folded, the wgmma of another unit runs");
    static constexpr u32 WEIGHT_BYTES = ROWS * DEPTH * 2;
    static constexpr u32 UNIT_BYTES = TOKENS * DEPTH * 2;
    static constexpr u32 STAGE_BYTES = 2 * WEIGHT_BYTES + SAMPLES * UNIT_BYTES;
    static constexpr u32 Z_BYTES = SAMPLES * DEPTH * 4;
    static constexpr u32 Z_AT = STAGES * STAGE_BYTES;
    static constexpr u32 STAGING_AT = Z_AT + (STAGES * Z_BYTES + 1023) / 1024 * 1024;
    static constexpr u32 STAGING_BYTES = TOKENS * 128;
    static constexpr u32 BARRIERS_AT = STAGING_AT + CONSUMERS * STAGING_BYTES;
    static_assert(STAGE_BYTES % 1024 == 0 && UNIT_BYTES % 512 == 0 && STAGING_BYTES % 1024 == 0, "swizzled tiles");
    static constexpr u32 BYTES = BARRIERS_AT + 16 * STAGES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    u32 base;
    __device__ __forceinline__ u32 stage(u32 index) const { return base + index * STAGE_BYTES; }
    __device__ __forceinline__ u32 unit(u32 index, u32 unit) const {
        return stage(index) + 2 * WEIGHT_BYTES + unit * UNIT_BYTES;
    }
    __device__ __forceinline__ u32 z(u32 index, u32 unit) const {
        return base + Z_AT + index * Z_BYTES + unit * DEPTH * 4;
    }
    __device__ __forceinline__ u32 full(u32 index) const { return base + BARRIERS_AT + 8 * index; }
    __device__ __forceinline__ u32 empty(u32 index) const { return base + BARRIERS_AT + 8 * (STAGES + index); }
};

// A unit: some tokens of a sample.
struct Unit {
    u32 sample, token;
    Unit() = default;
    __device__ __forceinline__ Unit(const Sm90FoldedParams &p, u32 index, u32 tokens)
        : sample(index / p.parts), token(index % p.parts * tokens) {}
};

// The tiles of a block: units from `unit` on, rows of the output transposed from `row` on.
template <class Shared> struct FoldedTiles {
    static constexpr u32 CLUSTER = Shared::CLUSTER;
    const Sm90FoldedParams &p;
    u32 next;
    __device__ __forceinline__ FoldedTiles(const Sm90FoldedParams &p) : p(p), next(blockIdx.x / CLUSTER) {}
    __device__ __forceinline__ bool valid() const { return next < p.tile_columns * p.tile_rows; }
    __device__ __forceinline__ void advance() { next += gridDim.x / CLUSTER; }
    __device__ __forceinline__ u32 unit() const { return next / p.tile_columns * Shared::SAMPLES; }
    __device__ __forceinline__ u32 row(u32 rank) const { return (next % p.tile_columns * CLUSTER + rank) * ROWS; }
};

// The producer's copies of one stage. INPUT: of the gradient to the input.
template <bool INPUT, class Shared>
__device__ __forceinline__ void copy_stage(const Shared &shared, const Sm90FoldedParams &p, u32 stage,
                                           const Unit (&units)[Shared::SAMPLES], u32 row, u32 rank, u32 copy,
                                           int depth) {
    const u32 full = shared.full(stage), weight = shared.stage(stage), delta = weight + Shared::WEIGHT_BYTES;
    barrier_arrive_and_expect(full, Shared::STAGE_BYTES + (INPUT ? Shared::Z_BYTES : 0u));
    if (INPUT) {
        // Rows of the matrices are the reduction; a consumer's 64 features are a panel.
#pragma unroll
        for (u32 panel = 0; panel < CONSUMERS; ++panel) {
            const u32 to = panel * Shared::WEIGHT_BYTES / CONSUMERS;
            copy_box(weight + to, p.weight, full, row + panel * CONSUMER_ROWS, depth, 0);
            copy_box(delta + to, p.delta, full, row + panel * CONSUMER_ROWS, depth, 0);
        }
    } else {
        copy_box(weight, p.weight, full, depth, row, 0);
        copy_box(delta, p.delta, full, depth, row, 0);
    }
#pragma unroll
    for (u32 i = 0; i < Shared::SAMPLES; ++i) {
        if (i % Shared::CLUSTER == rank) {
            const u32 sample = units[i].sample + copy * p.samples;
            copy_to_all<Shared::CLUSTER>(shared.unit(stage, i), p.x, full, depth, units[i].token, sample);
            if (INPUT) {
                copy_to_all<Shared::CLUSTER>(shared.z(stage, i), p.z_map, full, depth, sample, 0);
            }
        }
    }
}

// The producer's copies for all tiles, by one thread.
template <bool INPUT, class Shared>
__device__ __forceinline__ void produce(const Shared &shared, const Sm90FoldedParams &p, u32 rank) {
    prefetch_map(p.x);
    prefetch_map(p.weight);
    prefetch_map(p.delta);
    prefetch_map(p.y);
    const u32 depths = (p.inner - 1) / Shared::DEPTH + 1;
    Turn<Shared::STAGES> turn;
    for (FoldedTiles<Shared> tile(p); tile.valid(); tile.advance()) {
        const u32 row = tile.row(rank);
        // Divisions once for a tile: they would delay each stage.
        Unit units[Shared::SAMPLES];
#pragma unroll
        for (u32 i = 0; i < Shared::SAMPLES; ++i) {
            units[i] = Unit(p, tile.unit() + i, Shared::TOKENS);
            units[i].sample = INPUT ? units[i].sample : units[i].sample % p.wrap;
        }
        for (u32 copy = 0; copy < p.copies; ++copy) {
            for (u32 depth = 0; depth < depths; ++depth) {
                barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
                copy_stage<INPUT>(shared, p, turn.stage, units, row, rank, copy, depth * Shared::DEPTH);
                turn.advance();
            }
        }
    }
    // No block leaves while the other one still copies to it or arrives at its barriers.
    for (u32 i = 0; i < Shared::STAGES; ++i) {
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
        turn.advance();
    }
}

// W0 + z * Wd for two elements.
template <class T> __device__ __forceinline__ u32 fold(u32 base, u32 delta, float z0, float z1) {
    const Pair w0 = unpack<T>(base), wd = unpack<T>(delta);
    return pack<T>(fmaf(z0, wd.value[0], w0.value[0]), fmaf(z1, wd.value[1], w0.value[1]));
}

__device__ __forceinline__ u32 lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp() { return threadIdx.x / WARP % 4; }

// What a lane gives ldmatrix for its warp's 16 rows and the first K step of a tile; where its z is.
struct Place {
    u32 at, z;
};

template <bool INPUT, u32 DEPTH> __device__ __forceinline__ Place place_of(u32 consumer) {
    Place own = {};
    if (INPUT) {
        const u32 row = lane() % 8 + lane() / 16 * 8, chunk = 2 * warp() + lane() / 8 % 2;
        own.at = consumer * CONSUMER_ROWS * DEPTH * 2 + row * 128 + ((chunk ^ (row & 7)) * 16);
        own.z = lane() % 4 * 8;
    } else {
        const u32 row = consumer * CONSUMER_ROWS + 16 * warp() + lane() % 16;
        own.at = row * DEPTH * 2 + ((lane() / 16 ^ (DEPTH == 32 ? row >> 1 & 3 : row & 7)) * 16);
    }
    return own;
}

// What a K step of a tile is folded of: this thread's elements of W0 and Wd and, where z varies along the reduction, z of
// each unit.
template <bool INPUT, class Shared> struct Operands {
    u32 base[4], delta[4];
    float z[INPUT ? Shared::SAMPLES : 1][4];

    __device__ __forceinline__ void load(const Shared &shared, u32 stage, const Place &own, u32 step) {
        const u32 tile = shared.stage(stage) + (INPUT ? own.at + step * 16 * 128 : own.at ^ step * 32);
        ldmatrix<INPUT>(base, tile);
        ldmatrix<INPUT>(delta, tile + Shared::WEIGHT_BYTES);
        if (INPUT) {
#pragma unroll
            for (u32 i = 0; i < Shared::SAMPLES; ++i) {
#pragma unroll
                for (u32 j = 0; j < 2; ++j) {
                    const Pair pair = load_shared_pair(shared.z(stage, i) + own.z + 64 * step + 32 * j);
                    z[i][2 * j] = pair.value[0], z[i][2 * j + 1] = pair.value[1];
                }
            }
        }
    }
};

// The accumulators of one tile. z [unit][half] of the thread's rows counts for the forward pass; that of the gradient comes with the
// stages. A fragment is rewritten when the wgmma that had it has retired, while those of the other units run. Operands of the next
// step are on their way meanwhile: a load from shared memory takes as long as a wgmma when the tensor cores read it too.
template <class T, bool INPUT, class Shared>
__device__ __forceinline__ void accumulate(float (&acc)[Shared::SAMPLES][Shared::TOKENS / 2], const Shared &shared,
                                           Turn<Shared::STAGES> &turn, const float (&z)[Shared::SAMPLES][2],
                                           const Place &own, u32 depths) {
    using Units = Tile<2 * Shared::DEPTH, 16 * Shared::DEPTH>;
    constexpr u32 STEPS = Shared::DEPTH / 16, LAST = Shared::SAMPLES - 1;
    u32 fragments[Shared::SAMPLES][4];
    Operands<INPUT, Shared> operands;
    barrier_wait(shared.full(turn.stage), turn.parity);
    operands.load(shared, turn.stage, own, 0);
#pragma unroll 1
    for (u32 depth = 0; depth < depths; ++depth) {
        const u64 units = Units::at(shared.unit(turn.stage, 0));
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
#pragma unroll
            for (u32 i = 0; i < Shared::SAMPLES; ++i) {
                wgmma_wait<LAST>();
                if (step == 0 && i == LAST && depth != 0u) {
                    // All that read the previous stage is done.
                    release(shared, turn.previous());
                }
                keep(fragments[i]);
                // Unpacked for each unit anew: there are no registers for it.
                keep(operands.base);
                keep(operands.delta);
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const float *factor = INPUT ? operands.z[i] + j / 2 * 2 : z[i] + j % 2;
                    fragments[i][j] = fold<T>(operands.base[j], operands.delta[j], factor[0], factor[INPUT ? 1 : 0]);
                }
                if (i == LAST && step + 1 < STEPS) {
                    operands.load(shared, turn.stage, own, step + 1);
                }
                wgmma_fence();
                wgmma<T, Shared::TOKENS>(acc[i], fragments[i],
                                         behind(units, i * Shared::UNIT_BYTES + step * K_STEP_BYTES),
                                         (depth | step) != 0u);
                wgmma_commit();
            }
        }
        turn.advance();
        if (depth + 1 < depths) {
            barrier_wait(shared.full(turn.stage), turn.parity);
            operands.load(shared, turn.stage, own, 0);
        }
    }
    wgmma_wait<0>();
    release(shared, turn.previous());
#pragma unroll
    for (u32 i = 0; i < Shared::SAMPLES; ++i) {
        keep(fragments[i]);
        keep(acc[i]);
    }
}

// Writes a consumer's 64 rows of one unit, transposed: [token][64 rows] by stmatrix to staging, and from there by TMA, which clips
// what lies outside. `bias` [half]: of the thread's rows.
template <class T, u32 TOKENS>
__device__ __forceinline__ void store_unit(const float (&acc)[TOKENS / 2], const Sm90FoldedParams &p, u32 staging,
                                           u32 consumer, const Unit &unit, u32 row, const float (&bias)[2]) {
    const bool leader = threadIdx.x % WARPGROUP == 0;
    if (leader) {
        wait_for_store_reads<0>();
    }
    named_barrier(1 + consumer, WARPGROUP);
    // Registers are short: `keep` hides that this could be kept from tile to tile.
    u32 thread[1] = {threadIdx.x % WARPGROUP};
    keep(thread);
    const u32 lane = thread[0] % WARP;
    const auto bits = [&](u32 j, u32 half) {
        return pack<T>(acc[4 * j + 2 * half] + bias[half], acc[4 * j + 2 * half + 1] + bias[half]);
    };
    // Matrices of 8 x 8: the halves of the rows of 8 tokens, then of the next 8.
    const u32 chunk = 2 * (thread[0] / WARP) + lane / 8 % 2;
#pragma unroll
    for (u32 j = 0; j + 2 <= TOKENS / 8; j += 2) {
        const u32 token = 8 * j + lane / 16 * 8 + lane % 8;
        const u32 matrices[4] = {bits(j, 0), bits(j, 1), bits(j + 1, 0), bits(j + 1, 1)};
        stmatrix<true>(staging + token * 128 + ((chunk ^ (token & 7)) * 16), matrices);
    }
    if (TOKENS / 8 % 2 != 0) {
        constexpr u32 LAST = TOKENS / 8 - 1;
        const u32 token = 8 * LAST + lane % 8;
        const u32 matrices[2] = {bits(LAST, 0), bits(LAST, 1)};
        stmatrix<true>(staging + token * 128 + ((chunk ^ (token & 7)) * 16), matrices);
    }
    fence_async_proxy();
    named_barrier(1 + consumer, WARPGROUP);
    if (leader) {
        store_box(p.y, staging, row, unit.token, unit.sample);
        commit_stores();
    }
}

// A consumer's part of all tiles.
template <class T, bool INPUT, class Shared>
__device__ __forceinline__ void consume(const Shared &shared, const Sm90FoldedParams &p, u32 consumer) {
    constexpr u32 SAMPLES = Shared::SAMPLES;
    const u32 depths = ((p.inner - 1) / Shared::DEPTH + 1) * p.copies;
    const Place own = place_of<INPUT, Shared::DEPTH>(consumer);
    Turn<Shared::STAGES> turn;
    for (FoldedTiles<Shared> tile(p); tile.valid(); tile.advance()) {
        const u32 unit = tile.unit(), row = tile.row(rank_in<Shared::CLUSTER>()) + consumer * CONSUMER_ROWS;
        const u32 first = row + 16 * warp() + lane() / 4;
        float z[SAMPLES][2] = {};
        if (!INPUT) {
#pragma unroll
            for (u32 i = 0; i < SAMPLES; ++i) {
                const u32 sample = min(Unit(p, unit + i, Shared::TOKENS).sample, p.samples - 1);
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const u32 channel = min(first + 8 * half, p.rows - 1);
                    z[i][half] = load(p.z + static_cast<u64>(sample) * p.rows + channel);
                }
            }
        }
        float acc[SAMPLES][Shared::TOKENS / 2];
        accumulate<T, INPUT>(acc, shared, turn, z, own, depths);
        float base_bias[2] = {}, delta_bias[2] = {};
        if (!INPUT) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                base_bias[half] = bias_of<T>(p.base_bias, first + 8 * half, p.rows);
                delta_bias[half] = bias_of<T>(p.delta_bias, first + 8 * half, p.rows);
            }
        }
#pragma unroll
        for (u32 i = 0; i < SAMPLES; ++i) {
            const float bias[2] = {fmaf(z[i][0], delta_bias[0], base_bias[0]),
                                   fmaf(z[i][1], delta_bias[1], base_bias[1])};
            const u32 staging = shared.base + Shared::STAGING_AT + consumer * Shared::STAGING_BYTES;
            store_unit<T, Shared::TOKENS>(acc[i], p, staging, consumer, Unit(p, unit + i, Shared::TOKENS), row, bias);
        }
    }
    if (threadIdx.x % WARPGROUP == 0) {
        wait_for_stores();
    }
}

template <class T, bool INPUT, class Shared> __device__ __forceinline__ void linear(const Sm90FoldedParams &p) {
    const Shared shared = {shared_base()};
    if (threadIdx.x == 0) {
#pragma unroll
        for (u32 i = 0; i < Shared::STAGES; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), CONSUMERS * Shared::CLUSTER);
        }
        fence_barriers();
    }
    meet<Shared::CLUSTER>();
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<COPYING_REGISTERS>();
        if (is_copying_warp() && elect()) {
            produce<INPUT>(shared, p, rank_in<Shared::CLUSTER>());
        }
    } else {
        grow_registers<FOLDED_REGISTERS>();
        consume<T, INPUT>(shared, p, warpgroup);
    }
}

} // namespace sm90::folded
} // namespace pace

#endif // PACE_SM90_FOLDED_LINEAR_CUH
