// The kernels of weight_gradient.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_WEIGHT_GRADIENT_CUH
#define PACE_SM90_WEIGHT_GRADIENT_CUH

#include "mainloop.cuh"

namespace pace {

namespace sm90::weight {

constexpr u32 ROWS = SM90_WEIGHT_ROWS;       // channels of a tile
constexpr u32 COLUMNS = SM90_WEIGHT_COLUMNS; // features of a tile
constexpr u32 DEPTH = SM90_WEIGHT_DEPTH;     // tokens of a stage
constexpr u32 PANEL_BYTES = DEPTH * ROW_BYTES;
constexpr u32 G_PANELS = ROWS / TILE_K, X_PANELS = COLUMNS / TILE_K;
constexpr u32 STAGE_BYTES = (G_PANELS + X_PANELS) * PANEL_BYTES;
constexpr u32 WEIGHT_REGISTERS = 232;
constexpr u32 COPYING_REGISTERS = 24;
// x as it lies, features along the rows.
using Features = Tile<ROW_BYTES, 8 * ROW_BYTES, PANEL_BYTES>;

// Shared memory: stages and barriers. CLUSTER blocks have channels beside each other and the same features and samples.
template <u32 STAGES_, u32 CLUSTER_> struct Layout {
    static constexpr u32 STAGES = STAGES_, CLUSTER = CLUSTER_;
    static constexpr u32 BARRIERS_AT = STAGES * STAGE_BYTES;
    static constexpr u32 BYTES = BARRIERS_AT + 16 * STAGES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    u32 base;
    __device__ __forceinline__ u32 g(u32 stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return g(stage) + G_PANELS * PANEL_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + BARRIERS_AT + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + BARRIERS_AT + 8 * (STAGES + stage); }
};

// Units of work before a cluster.
__device__ __forceinline__ u32 units_before(const Sm90WeightParams &p, u32 cluster) {
    return static_cast<u32>(static_cast<u64>(cluster) * p.tiles * p.samples / p.clusters);
}

// The cluster that has a unit.
__device__ __forceinline__ u32 cluster_of(const Sm90WeightParams &p, u32 unit) {
    // The last whose first unit is not behind it.
    return static_cast<u32>(((static_cast<u64>(unit) + 1) * p.clusters - 1) / (static_cast<u64>(p.tiles) * p.samples));
}

// Where a tile lies, in tiles.
struct Corner {
    u32 row, column;
    __device__ __forceinline__ Corner(const Sm90WeightParams &p, u32 tile)
        : row(tile / p.tile_columns), column(tile % p.tile_columns) {}
};

// Where a block puts its sum of a tile: a cluster shares two with others at most, its first and its last.
__device__ __forceinline__ u64 slot_of(u32 cluster, bool is_first, u32 size, u32 rank) {
    return static_cast<u64>(2 * cluster + (is_first ? 0u : 1u)) * size + rank;
}

// A cluster's runs of units, each of one tile.
struct Runs {
    u32 unit, end, tile, first_tile, samples;
    __device__ __forceinline__ Runs(const Sm90WeightParams &p, u32 cluster)
        : unit(units_before(p, cluster)), end(units_before(p, cluster + 1)), tile(unit / p.samples), first_tile(tile),
          samples(p.samples) {}
    __device__ __forceinline__ bool valid() const { return unit < end; }
    __device__ __forceinline__ u32 first() const { return unit - tile * samples; }
    __device__ __forceinline__ u32 last() const { return min(end - tile * samples, samples); }
    __device__ __forceinline__ bool whole() const { return last() - first() == samples; }
    __device__ __forceinline__ void advance() {
        unit = (tile + 1) * samples;
        ++tile;
    }
};

// The producer's copies, by one thread.
template <class Shared>
__device__ __forceinline__ void produce(const Shared &shared, const Sm90WeightParams &p, u32 rank) {
    constexpr u32 CLUSTER = Shared::CLUSTER;
    prefetch_map(p.g);
    prefetch_map(p.x);
    Turn<Shared::STAGES> turn;
    for (Runs run(p, blockIdx.x / CLUSTER); run.valid(); run.advance()) {
        const Corner corner(p, run.tile);
        const u32 row = (corner.row * CLUSTER + rank) * ROWS, column = corner.column * COLUMNS;
        for (u32 sample = run.first(); sample < run.last(); ++sample) {
            const u32 from = sample % p.wrap;
            for (u32 token = 0; token < p.tokens; token += DEPTH) {
                barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
                const u32 full = shared.full(turn.stage);
                barrier_arrive_and_expect(full, STAGE_BYTES);
#pragma unroll
                for (u32 i = 0; i < G_PANELS; ++i) {
                    copy_box(shared.g(turn.stage) + i * PANEL_BYTES, p.g, full, row + i * TILE_K, token, sample);
                }
#pragma unroll
                for (u32 i = 0; i < X_PANELS; ++i) {
                    if (i % CLUSTER == rank) {
                        copy_to_all<CLUSTER>(shared.x(turn.stage) + i * PANEL_BYTES, p.x, full, column + i * TILE_K,
                                             token, from);
                    }
                }
                turn.advance();
            }
        }
    }
    // No block leaves while another one still copies to it or arrives at its barriers.
    for (u32 i = 0; i < Shared::STAGES; ++i) {
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
        turn.advance();
    }
}

// z of the thread's channels of a sample.
__device__ __forceinline__ void load_z(float (&z)[2], const Sm90WeightParams &p, u32 sample, u32 channel) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 existing = min(channel + 8 * half, p.rows - 1);
        z[half] = load(p.z + static_cast<u64>(min(sample, p.samples - 1)) * p.rows + existing);
    }
}

// What a consumer adds up: 64 channels by 256 features, and the sums of e of the thread's two channels.
struct Sums {
    float weight[COLUMNS / 2];
    float bias[2];
};

// Stages whose wgmmas may still run: those of the last one and of the one before it.
struct Issued {
    static constexpr u32 NONE = ~0u;
    u32 last = NONE, before = NONE;
    // When all wgmmas but the last have retired.
    template <class Shared> __device__ __forceinline__ void release_but_last(const Shared &shared) const {
        if (last != before && before != NONE) {
            release(shared, before);
        }
    }
    // When all have.
    template <class Shared> __device__ __forceinline__ void release_all(const Shared &shared) {
        release_but_last(shared);
        if (last != NONE) {
            release(shared, last);
        }
        last = before = NONE;
    }
    __device__ __forceinline__ void issue(u32 stage) { before = last, last = stage; }
};

// What a consumer has while it walks the tokens.
template <u32 STAGES> struct Walk {
    Turn<STAGES> turn;
    Issued issued;
    // What the lane gives ldmatrix for the first step of a stage; g of the next step, on its way; stages of this run that are left.
    u32 at, g[4], left;
    u32 fragments[2][4];
};

// Starts to load g of a step of the current stage.
template <class Shared>
__device__ __forceinline__ void load_g(Walk<Shared::STAGES> &walk, const Shared &shared, u32 step) {
    ldmatrix<true>(walk.g, shared.g(walk.turn.stage) + walk.at + step * 16 * ROW_BYTES);
}

// To the next stage of the run, if there is one.
template <class Shared> __device__ __forceinline__ void begin_stage(Walk<Shared::STAGES> &walk, const Shared &shared) {
    if (walk.left != 0u) {
        --walk.left;
        barrier_wait(shared.full(walk.turn.stage), walk.turn.parity);
        load_g(walk, shared, 0);
    }
}

// One step of 16 tokens: sums += e^T @ x. ALONE: with a fragment that the last wgmma has, so that it waits for all of them. The next
// g is asked for in front of the wgmma: a load that is issued behind wgmmas is served behind them.
template <class T, bool ALONE, class Shared>
__device__ __forceinline__ void multiply_step(Sums &sums, Walk<Shared::STAGES> &walk, const Shared &shared, u64 x,
                                              const float (&z)[2], u32 step, bool is_last, bool accumulate) {
    u32(&fragment)[4] = walk.fragments[step % 2];
    if (ALONE) {
        wgmma_wait<0>();
        walk.issued.release_all(shared);
    } else {
        wgmma_wait<1>();
        walk.issued.release_but_last(shared);
    }
    keep(fragment);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const Pair g = unpack<T>(walk.g[j]);
        const float e[2] = {z[j % 2] * g.value[0], z[j % 2] * g.value[1]};
        sums.bias[j % 2] += e[0] + e[1];
        fragment[j] = pack<T>(e[0], e[1]);
    }
    walk.issued.issue(walk.turn.stage);
    if (is_last) {
        walk.turn.advance();
        begin_stage(walk, shared);
    } else {
        load_g(walk, shared, step + 1);
    }
    wgmma_fence();
    wgmma<T, COLUMNS, true>(sums.weight, fragment, behind(x, step * 16 * ROW_BYTES), accumulate);
    wgmma_commit();
}

// A full stage. FIRST of a sample: the steps of the sample before may have been odd.
template <class T, bool FIRST, class Shared>
__device__ __forceinline__ void multiply_stage(Sums &sums, Walk<Shared::STAGES> &walk, const Shared &shared,
                                               const float (&z)[2], bool begins) {
    const u64 x = Features::at(shared.x(walk.turn.stage));
    multiply_step<T, FIRST>(sums, walk, shared, x, z, 0, false, !begins);
#pragma unroll
    for (u32 step = 1; step < DEPTH / 16; ++step) {
        multiply_step<T, false>(sums, walk, shared, x, z, step, step + 1 == DEPTH / 16, true);
    }
}

// One sample: full stages, then one of fewer steps. `first` of its run.
template <class T, class Shared>
__device__ __forceinline__ void accumulate(Sums &sums, Walk<Shared::STAGES> &walk, const Shared &shared,
                                           const float (&z)[2], u32 tokens, bool first) {
    const u32 full = tokens / DEPTH, steps = (tokens % DEPTH + 15) / 16;
    if (full != 0u) {
        multiply_stage<T, true>(sums, walk, shared, z, first);
#pragma unroll 1
        for (u32 i = 1; i < full; ++i) {
            multiply_stage<T, false>(sums, walk, shared, z, false);
        }
    } else {
        // As a FIRST stage would.
        wgmma_wait<0>();
        walk.issued.release_all(shared);
    }
    if (steps != 0u) {
        const u64 x = Features::at(shared.x(walk.turn.stage));
#pragma unroll
        for (u32 step = 0; step < DEPTH / 16; ++step) {
            if (step >= steps) {
                break;
            }
            multiply_step<T, false>(sums, walk, shared, x, z, step, step + 1 == steps,
                                    !(first && full == 0u && step == 0));
        }
    }
}

// Writes the sums of a tile: of a whole one to the gradients, otherwise to this block's slot.
template <class T>
__device__ __forceinline__ void store_sums(Sums &sums, const Sm90WeightParams &p, const Runs &run, u64 slot, u32 row,
                                           u32 column, u32 channel) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 r = channel + 8 * half;
        if (r < p.rows) {
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; ++j) {
                const u32 within = 8 * j + 2 * (lane % 4), c = column + within;
                if (c < p.columns) {
                    const float *pair = sums.weight + 4 * j + 2 * half;
                    if (run.whole()) {
                        T *to = static_cast<T *>(p.weight) + static_cast<u64>(r) * p.columns + c;
                        store(reinterpret_cast<u32 *>(to), pack<T>(pair[0], pair[1]));
                    } else {
                        float *to = p.partial + (slot * ROWS + (r - row)) * COLUMNS + within;
                        store(reinterpret_cast<Pair *>(to), Pair{{pair[0], pair[1]}});
                    }
                }
            }
        }
        // The four lanes of a row have different tokens.
        float bias = sums.bias[half];
        bias += __shfl_xor_sync(0xffffffffu, bias, 1);
        bias += __shfl_xor_sync(0xffffffffu, bias, 2);
        if (column == 0 && lane % 4 == 0 && r < p.rows && p.bias_partial != nullptr) {
            if (run.whole()) {
                store(static_cast<T *>(p.bias) + r, from_float<T>(bias));
            } else {
                store(p.bias_partial + slot * ROWS + (r - row), bias);
            }
        }
    }
}

// A consumer's part of all runs.
template <class T, class Shared>
__device__ __forceinline__ void consume(const Shared &shared, const Sm90WeightParams &p, u32 consumer, u32 rank) {
    constexpr u32 CLUSTER = Shared::CLUSTER;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const u32 cluster = blockIdx.x / CLUSTER, stages = (p.tokens - 1) / DEPTH + 1;
    // The consumer's channels are a panel.
    const u32 row = lane % 8 + lane / 16 * 8, chunk = 2 * warp + lane / 8 % 2;
    Walk<Shared::STAGES> walk;
    walk.at = consumer * PANEL_BYTES + row * ROW_BYTES + ((chunk ^ (row & 7)) * 16);
    for (Runs run(p, cluster); run.valid(); run.advance()) {
        const Corner corner(p, run.tile);
        const u32 tile_row = (corner.row * CLUSTER + rank) * ROWS;
        const u32 channel = tile_row + consumer * CONSUMER_ROWS + 16 * warp + lane / 4;
        Sums sums;
        sums.bias[0] = sums.bias[1] = 0.0f;
        float next[2];
        load_z(next, p, run.first(), channel);
        walk.left = (run.last() - run.first()) * stages;
        begin_stage(walk, shared);
#pragma unroll 1
        for (u32 sample = run.first(); sample < run.last(); ++sample) {
            const float z[2] = {next[0], next[1]};
            load_z(next, p, sample + 1, channel);
            accumulate<T>(sums, walk, shared, z, p.tokens, sample == run.first());
        }
        wgmma_wait<0>();
        walk.issued.release_all(shared);
        keep(walk.fragments[0]);
        keep(walk.fragments[1]);
        keep(sums.weight);
        const u64 slot = slot_of(cluster, run.tile == run.first_tile, CLUSTER, rank);
        store_sums<T>(sums, p, run, slot, tile_row, corner.column * COLUMNS, channel);
    }
}

template <class T, class Shared> __device__ __forceinline__ void gradient(const Sm90WeightParams &p) {
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
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP), rank = rank_in<Shared::CLUSTER>();
    if (warpgroup == CONSUMERS) {
        shrink_registers<COPYING_REGISTERS>();
        if (is_copying_warp() && elect()) {
            produce(shared, p, rank);
        }
    } else {
        grow_registers<WEIGHT_REGISTERS>();
        consume<T>(shared, p, warpgroup, rank);
    }
}

// Adds up what clusters of SIZE blocks have of a tile that they share. A block of threads has SUM_ROWS channels of a block's tile.
constexpr u32 SUM_ROWS = SM90_WEIGHT_SUM_ROWS;

template <class T, u32 SIZE> __device__ __forceinline__ void add_up(const Sm90WeightParams &p) {
    constexpr u32 PARTS = ROWS / SUM_ROWS, FOURS = SUM_ROWS * COLUMNS / 4 / SM90_WEIGHT_SUM_THREADS;
    const u32 part = blockIdx.x % PARTS, rank = blockIdx.x / PARTS % SIZE, tile = blockIdx.x / PARTS / SIZE;
    const u32 first = cluster_of(p, tile * p.samples), last = cluster_of(p, (tile + 1) * p.samples - 1);
    if (first == last) {
        return;
    }
    const Corner corner(p, tile);
    const u32 row = (corner.row * SIZE + rank) * ROWS + part * SUM_ROWS, column = corner.column * COLUMNS;
    // All but the first cluster begin within the tile.
    const bool first_begins = units_before(p, first) >= tile * p.samples;
    const auto row_of = [&](u32 cluster) {
        return slot_of(cluster, cluster != first || first_begins, SIZE, rank) * ROWS + part * SUM_ROWS;
    };
    const u32 c = threadIdx.x % (COLUMNS / 4) * 4, r = threadIdx.x / (COLUMNS / 4);
    constexpr u32 ROWS_AT_ONCE = SM90_WEIGHT_SUM_THREADS / (COLUMNS / 4);
    if (column + c < p.columns) {
        float sums[FOURS][4] = {};
        for (u32 cluster = first; cluster <= last; ++cluster) {
            const float *from = p.partial + (row_of(cluster) + r) * COLUMNS + c;
            Vector<float> values[FOURS] = {};
#pragma unroll
            for (u32 i = 0; i < FOURS; ++i) {
                if (row + r + i * ROWS_AT_ONCE < p.rows) {
                    values[i] = load_vector(from + i * ROWS_AT_ONCE * COLUMNS);
                }
            }
#pragma unroll
            for (u32 i = 0; i < FOURS; ++i) {
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    sums[i][j] += values[i].value[j];
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < FOURS; ++i) {
            if (row + r + i * ROWS_AT_ONCE < p.rows) {
                T *to =
                    static_cast<T *>(p.weight) + static_cast<u64>(row + r + i * ROWS_AT_ONCE) * p.columns + column + c;
                store(reinterpret_cast<u32 *>(to), pack<T>(sums[i][0], sums[i][1]));
                store(reinterpret_cast<u32 *>(to) + 1, pack<T>(sums[i][2], sums[i][3]));
            }
        }
    }
    if (column == 0 && threadIdx.x < SUM_ROWS && p.bias_partial != nullptr && row + threadIdx.x < p.rows) {
        float sum = 0.0f;
        for (u32 cluster = first; cluster <= last; ++cluster) {
            sum += load(p.bias_partial + row_of(cluster) + threadIdx.x);
        }
        store(static_cast<T *>(p.bias) + row + threadIdx.x, from_float<T>(sum));
    }
}

} // namespace sm90::weight
} // namespace pace

#endif // PACE_SM90_WEIGHT_GRADIENT_CUH
