// The kernels of weight_gradient.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_WEIGHT_GRADIENT_CUH
#define PACE_SM90_WEIGHT_GRADIENT_CUH

#include "mainloop.cuh"

#include <cstring>

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

// Shared memory: stages and barriers.
template <u32 STAGES_> struct Layout {
    static constexpr u32 STAGES = STAGES_;
    static constexpr u32 BARRIERS_AT = STAGES * STAGE_BYTES;
    static constexpr u32 BYTES = BARRIERS_AT + 16 * STAGES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    u32 base;
    __device__ __forceinline__ u32 g(u32 stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return g(stage) + G_PANELS * PANEL_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + BARRIERS_AT + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + BARRIERS_AT + 8 * (STAGES + stage); }
};

// Units of work before block `block`.
__device__ __forceinline__ u32 units_before(const Sm90WeightParams &p, u32 block) {
    return static_cast<u32>(static_cast<u64>(block) * p.tiles * p.samples / p.blocks);
}

// The block that has a unit.
__device__ __forceinline__ u32 block_of(const Sm90WeightParams &p, u32 unit) {
    // The last whose first unit is not behind it.
    return static_cast<u32>(((static_cast<u64>(unit) + 1) * p.blocks - 1) / (static_cast<u64>(p.tiles) * p.samples));
}

// Where block `block` puts its sum of a tile: it has two that it shares at most, its first and its last.
__device__ __forceinline__ u32 slot_of(const Sm90WeightParams &p, u32 block, u32 tile) {
    return 2 * block + (tile != units_before(p, block) / p.samples ? 1u : 0u);
}

// A block's runs of units, each of one tile.
struct Runs {
    u32 unit, end, tile, samples;
    __device__ __forceinline__ explicit Runs(const Sm90WeightParams &p)
        : unit(units_before(p, blockIdx.x)), end(units_before(p, blockIdx.x + 1)), tile(unit / p.samples),
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
template <class Shared> __device__ __forceinline__ void produce(const Shared &shared, const Sm90WeightParams &p) {
    prefetch_map(p.g);
    prefetch_map(p.x);
    Turn<Shared::STAGES> turn;
    for (Runs run(p); run.valid(); run.advance()) {
        const u32 row = run.tile / p.tile_columns * ROWS, column = run.tile % p.tile_columns * COLUMNS;
        for (u32 sample = run.first(); sample < run.last(); ++sample) {
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
                    copy_box(shared.x(turn.stage) + i * PANEL_BYTES, p.x, full, column + i * TILE_K, token,
                             sample % p.wrap);
                }
                turn.advance();
            }
        }
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

// Stages of which wgmmas were issued, to tell when they are free: after waiting for all but the last one, that of the one before.
struct Issued {
    u32 last, before;
    template <class Shared> __device__ __forceinline__ void release(const Shared &shared) const {
        if (last != before && threadIdx.x % WARPGROUP == 0) {
            barrier_arrive(shared.empty(before));
        }
    }
    __device__ __forceinline__ void issue(u32 stage) { before = last, last = stage; }
};

// What a consumer has while it walks the tokens.
template <u32 STAGES> struct Walk {
    Turn<STAGES> turn;
    Issued issued;
    // What the lane gives ldmatrix for the first step of a stage.
    u32 at;
};

// One step of 16 tokens: sums += e^T @ x.
template <class T, class Shared>
__device__ __forceinline__ void multiply_step(Sums &sums, Walk<Shared::STAGES> &walk, u32 (&fragment)[4],
                                              const Shared &shared, const float (&z)[2], u32 step, bool accumulate) {
    u32 g[4];
    ldmatrix<true>(g, shared.g(walk.turn.stage) + walk.at + step * 16 * ROW_BYTES);
    // The fragment of the step before the last is free.
    wgmma_wait<1>();
    walk.issued.release(shared);
    keep(fragment);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        T pair[2];
        memcpy(pair, &g[j], 4);
        const float e[2] = {z[j % 2] * to_float(pair[0]), z[j % 2] * to_float(pair[1])};
        sums.bias[j % 2] += e[0] + e[1];
        fragment[j] = pack<T>(e[0], e[1]);
    }
    wgmma_fence();
    wgmma<T, COLUMNS, true>(sums.weight, fragment, Features::at(shared.x(walk.turn.stage) + step * 16 * ROW_BYTES),
                            accumulate);
    wgmma_commit();
    walk.issued.issue(walk.turn.stage);
}

// One sample: full stages, then one of fewer steps. All are done at its end: the steps may be odd, and the next sample would put
// two wgmmas in one fragment.
template <class T, class Shared>
__device__ __forceinline__ void accumulate(Sums &sums, Walk<Shared::STAGES> &walk, const Shared &shared,
                                           const float (&z)[2], u32 tokens, bool first) {
    walk.issued = {walk.turn.stage, walk.turn.stage};
    u32 fragments[2][4];
    u32 token = 0;
#pragma unroll 1
    for (; token + DEPTH <= tokens; token += DEPTH) {
        barrier_wait(shared.full(walk.turn.stage), walk.turn.parity);
#pragma unroll
        for (u32 step = 0; step < DEPTH / 16; ++step) {
            multiply_step<T>(sums, walk, fragments[step % 2], shared, z, step, !(first && token == 0u && step == 0));
        }
        walk.turn.advance();
    }
    if (token < tokens) {
        barrier_wait(shared.full(walk.turn.stage), walk.turn.parity);
#pragma unroll
        for (u32 step = 0; step < DEPTH / 16; ++step) {
            if (token + 16 * step >= tokens) {
                break;
            }
            multiply_step<T>(sums, walk, fragments[step % 2], shared, z, step, !(first && token == 0u && step == 0));
        }
        walk.turn.advance();
    }
    wgmma_wait<0>();
    keep(fragments[0]);
    keep(fragments[1]);
    walk.issued.release(shared);
    if (threadIdx.x % WARPGROUP == 0) {
        barrier_arrive(shared.empty(walk.issued.last));
    }
}

// Writes the sums of a tile: of a whole one to the gradients, otherwise to this block's slot.
template <class T>
__device__ __forceinline__ void store_sums(Sums &sums, const Sm90WeightParams &p, const Runs &run, u32 channel) {
    const u32 lane = threadIdx.x % WARP, column = run.tile % p.tile_columns * COLUMNS;
    const u32 row = run.tile / p.tile_columns * ROWS;
    const u64 slot = slot_of(p, blockIdx.x, run.tile);
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
__device__ __forceinline__ void consume(const Shared &shared, const Sm90WeightParams &p, u32 consumer) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    // The consumer's channels are a panel.
    const u32 row = lane % 8 + lane / 16 * 8, chunk = 2 * warp + lane / 8 % 2;
    Walk<Shared::STAGES> walk;
    walk.at = consumer * PANEL_BYTES + row * ROW_BYTES + ((chunk ^ (row & 7)) * 16);
    for (Runs run(p); run.valid(); run.advance()) {
        const u32 channel = run.tile / p.tile_columns * ROWS + consumer * CONSUMER_ROWS + 16 * warp + lane / 4;
        Sums sums;
        sums.bias[0] = sums.bias[1] = 0.0f;
        float next[2];
        load_z(next, p, run.first(), channel);
#pragma unroll 1
        for (u32 sample = run.first(); sample < run.last(); ++sample) {
            const float z[2] = {next[0], next[1]};
            load_z(next, p, sample + 1, channel);
            accumulate<T>(sums, walk, shared, z, p.tokens, sample == run.first());
        }
        keep(sums.weight);
        store_sums<T>(sums, p, run, channel);
    }
}

template <class T, class Shared> __device__ __forceinline__ void gradient(const Sm90WeightParams &p) {
    const Shared shared = {shared_base()};
    if (threadIdx.x == 0) {
#pragma unroll
        for (u32 i = 0; i < Shared::STAGES; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), CONSUMERS);
        }
        fence_barriers();
    }
    __syncthreads();
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<COPYING_REGISTERS>();
        if (is_copying_warp() && elect()) {
            produce(shared, p);
        }
    } else {
        grow_registers<WEIGHT_REGISTERS>();
        consume<T>(shared, p, warpgroup);
    }
}

// Adds up what blocks have of a tile that they share. A block of threads has SUM_ROWS channels of a tile.
constexpr u32 SUM_ROWS = SM90_WEIGHT_SUM_ROWS;

template <class T> __device__ __forceinline__ void add_up(const Sm90WeightParams &p) {
    constexpr u32 PARTS = ROWS / SUM_ROWS;
    const u32 tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const u32 first = block_of(p, tile * p.samples), last = block_of(p, (tile + 1) * p.samples - 1);
    if (first == last) {
        return;
    }
    const u32 row = tile / p.tile_columns * ROWS, column = tile % p.tile_columns * COLUMNS;
    for (u32 index = threadIdx.x; index < SUM_ROWS * COLUMNS / 4; index += SM90_WEIGHT_SUM_THREADS) {
        const u32 r = part * SUM_ROWS + index / (COLUMNS / 4), c = index % (COLUMNS / 4) * 4;
        if (row + r < p.rows && column + c < p.columns) {
            float sum[4] = {};
            for (u32 block = first; block <= last; ++block) {
                const u64 slot = slot_of(p, block, tile);
                const Vector<float> value = load_vector(p.partial + (slot * ROWS + r) * COLUMNS + c);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    sum[i] += value.value[i];
                }
            }
            T *to = static_cast<T *>(p.weight) + static_cast<u64>(row + r) * p.columns + column + c;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                store(to + i, from_float<T>(sum[i]));
            }
        }
    }
    if (column == 0 && threadIdx.x < SUM_ROWS && p.bias_partial != nullptr) {
        const u32 r = part * SUM_ROWS + threadIdx.x;
        if (row + r < p.rows) {
            float sum = 0.0f;
            for (u32 block = first; block <= last; ++block) {
                sum += load(p.bias_partial + static_cast<u64>(slot_of(p, block, tile)) * ROWS + r);
            }
            store(static_cast<T *>(p.bias) + row + r, from_float<T>(sum));
        }
    }
}

} // namespace sm90::weight
} // namespace pace

#endif // PACE_SM90_WEIGHT_GRADIENT_CUH
