// The kernels of folded_linear.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_FOLDED_LINEAR_CUH
#define PACE_SM90_FOLDED_LINEAR_CUH

#include "mainloop.cuh"

namespace pace {

namespace sm90::folded {

constexpr u32 ROWS = SM90_FOLDED_ROWS; // of the output transposed
constexpr u32 FOLDED_REGISTERS = 240;
constexpr u32 COPYING_REGISTERS = 24;
// Bytes of a consumer's tile of one of the matrices.
constexpr u32 MATRIX_BYTES = CONSUMER_ROWS * ROW_BYTES;

// How a kernel is built: a unit's tokens, the units of a tile, tokens that go out at once, stages, blocks of a cluster.
// Shared memory: stages of tiles of each unit; as many entries of one consumer's tiles of W0 and Wd, for both consumers in turn; two
// buffers of each consumer for outputs; z of the stages where it varies along the reduction; barriers.
template <u32 TOKENS_, u32 SAMPLES_, u32 CHUNK_, u32 STAGES_, u32 CLUSTER_> struct Layout {
    static constexpr u32 TOKENS = TOKENS_, SAMPLES = SAMPLES_, CHUNK = CHUNK_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static_assert(STAGES % CONSUMERS == 1,
                  "each consumer comes to every entry, and again when it does to the same stage");
    static_assert(SAMPLES > 1, "while a fragment is folded, the wgmma of another unit runs");
    static_assert(SAMPLES * (TOKENS / CHUNK) % 2 == 0, "every tile begins with the same buffer");
    static_assert(TOKENS % CHUNK == 0, "whole chunks");
    static constexpr u32 UNIT_BYTES = TOKENS * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = SAMPLES * UNIT_BYTES;
    static constexpr u32 ENTRY_BYTES = 2 * MATRIX_BYTES;
    static constexpr u32 Z_BYTES = SAMPLES * TILE_K * 4;
    static constexpr u32 ENTRIES_AT = STAGES * STAGE_BYTES;
    static constexpr u32 STAGING_AT = ENTRIES_AT + STAGES * ENTRY_BYTES;
    static constexpr u32 STAGING_BYTES = CHUNK * ROW_BYTES;
    static constexpr u32 Z_AT = STAGING_AT + 2 * CONSUMERS * STAGING_BYTES;
    static constexpr u32 BARRIERS_AT = Z_AT + STAGES * Z_BYTES;
    static_assert(UNIT_BYTES % 1024 == 0 && STAGING_BYTES % 1024 == 0, "swizzled tiles");
    static constexpr u32 BYTES = BARRIERS_AT + 8 * 5 * STAGES;
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    u32 base;
    __device__ __forceinline__ u32 unit(u32 stage, u32 unit) const {
        return base + stage * STAGE_BYTES + unit * UNIT_BYTES;
    }
    __device__ __forceinline__ u32 entry(u32 index) const { return base + ENTRIES_AT + index * ENTRY_BYTES; }
    __device__ __forceinline__ u32 staging(u32 consumer, u32 turn) const {
        return base + STAGING_AT + (2 * consumer + turn % 2) * STAGING_BYTES;
    }
    __device__ __forceinline__ u32 z(u32 stage, u32 unit) const {
        return base + Z_AT + stage * Z_BYTES + unit * TILE_K * 4;
    }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + BARRIERS_AT + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(STAGES + stage); }
    // For each consumer a barrier of its own: it would not see the phases in which an entry is the other's.
    __device__ __forceinline__ u32 entry_full(u32 index, u32 consumer) const {
        return full((2 + consumer) * STAGES + index);
    }
    __device__ __forceinline__ u32 entry_empty(u32 index) const { return full(4 * STAGES + index); }
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

// The producer's copies of tokens for one stage. INPUT: of the gradient to the input.
template <bool INPUT, class Shared>
__device__ __forceinline__ void copy_tokens(const Shared &shared, const Sm90FoldedParams &p, u32 stage,
                                            const Unit (&units)[Shared::SAMPLES], u32 rank, u32 copy, int depth) {
    const u32 full = shared.full(stage);
    barrier_arrive_and_expect(full, Shared::STAGE_BYTES + (INPUT ? Shared::Z_BYTES : 0u));
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

// Its copies of one entry: a consumer's rows of the output transposed, and 64 elements of the reduction, which INPUT are the matrices'
// rows.
template <bool INPUT, class Shared>
__device__ __forceinline__ void copy_weights(const Shared &shared, const Sm90FoldedParams &p, u32 index, u32 consumer,
                                             u32 row, int depth) {
    const u32 full = shared.entry_full(index, consumer), to = shared.entry(index);
    const int x = INPUT ? static_cast<int>(row) : depth, y = INPUT ? depth : static_cast<int>(row);
    barrier_arrive_and_expect(full, Shared::ENTRY_BYTES);
    copy_box(to, p.weight, full, x, y, 0);
    copy_box(to + MATRIX_BYTES, p.delta, full, x, y, 0);
}

// The producer's copies for all tiles, by one thread.
template <bool INPUT, class Shared>
__device__ __forceinline__ void produce(const Shared &shared, const Sm90FoldedParams &p, u32 rank) {
    prefetch_map(p.x);
    prefetch_map(p.weight);
    prefetch_map(p.delta);
    prefetch_map(p.y);
    const u32 depths = (p.inner - 1) / TILE_K + 1;
    Turn<Shared::STAGES> turn;
    Turn<Shared::STAGES> entry;
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
                copy_tokens<INPUT>(shared, p, turn.stage, units, rank, copy, depth * TILE_K);
                turn.advance();
#pragma unroll
                for (u32 consumer = 0; consumer < CONSUMERS; ++consumer) {
                    barrier_wait(shared.entry_empty(entry.stage), entry.parity ^ 1u);
                    copy_weights<INPUT>(shared, p, entry.stage, consumer, row + consumer * CONSUMER_ROWS,
                                        depth * TILE_K);
                    entry.advance();
                }
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

// What a lane gives ldmatrix for its warp's 16 rows and the first K step of an entry.
template <bool INPUT> __device__ __forceinline__ u32 place_of() {
    const u32 row = INPUT ? lane() % 8 + lane() / 16 * 8 : 16 * warp() + lane() % 16;
    const u32 chunk = INPUT ? 2 * warp() + lane() / 8 % 2 : lane() / 16;
    return row * ROW_BYTES + ((chunk ^ (row & 7)) * 16);
}

// What a K step is folded of: this thread's elements of W0 and Wd and, where z varies along the reduction, z of each unit.
template <bool INPUT, class Shared> struct Operands {
    u32 base[4], delta[4];
    float z[INPUT ? Shared::SAMPLES : 1][4];

    __device__ __forceinline__ void load(const Shared &shared, u32 stage, u32 entry, u32 place, u32 step) {
        const u32 tile = shared.entry(entry) + (INPUT ? place + step * 16 * ROW_BYTES : place ^ step * K_STEP_BYTES);
        ldmatrix<INPUT>(base, tile);
        ldmatrix<INPUT>(delta, tile + MATRIX_BYTES);
        if (INPUT) {
#pragma unroll
            for (u32 i = 0; i < Shared::SAMPLES; ++i) {
#pragma unroll
                for (u32 j = 0; j < 2; ++j) {
                    const Pair pair = load_shared_pair(shared.z(stage, i) + lane() % 4 * 8 + 64 * step + 32 * j);
                    z[i][2 * j] = pair.value[0], z[i][2 * j + 1] = pair.value[1];
                }
            }
        }
    }
};

// Waits for a consumer's tiles of a stage. `entry_of`: where those of the matrices are, every second entry being the other's.
template <class Shared> __device__ __forceinline__ u32 entry_of(u32 stage, u32 consumer) {
    const u32 entry = CONSUMERS * stage + consumer;
    return entry - (entry >= Shared::STAGES ? Shared::STAGES : 0u);
}
template <class Shared>
__device__ __forceinline__ void wait_for_tiles(const Shared &shared, const Turn<Shared::STAGES> &turn, u32 consumer) {
    barrier_wait(shared.full(turn.stage), turn.parity);
    barrier_wait(shared.entry_full(entry_of<Shared>(turn.stage, consumer), consumer), turn.parity);
}

// The accumulators of one tile. z [unit][half] of the thread's rows counts for the forward pass; that of the gradient comes with the
// stages. A fragment is rewritten when the wgmma that had it has retired, while those of the other units run. The next step's
// operands are asked for in front of the last wgmma: a load that is issued behind wgmmas is served behind them.
template <class T, bool INPUT, class Shared>
__device__ __forceinline__ void accumulate(float (&acc)[Shared::SAMPLES][Shared::TOKENS / 2], const Shared &shared,
                                           Turn<Shared::STAGES> &turn, u32 consumer,
                                           const float (&z)[Shared::SAMPLES][2], u32 place, u32 depths) {
    constexpr u32 STEPS = TILE_K / 16, LAST = Shared::SAMPLES - 1;
    u32 fragments[Shared::SAMPLES][4];
    Operands<INPUT, Shared> operands;
    wait_for_tiles(shared, turn, consumer);
    operands.load(shared, turn.stage, entry_of<Shared>(turn.stage, consumer), place, 0);
#pragma unroll 1
    for (u32 depth = 0; depth < depths; ++depth) {
        const u64 units = KMajor::at(shared.unit(turn.stage, 0));
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
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const float *factor = INPUT ? operands.z[i] + j / 2 * 2 : z[i] + j % 2;
                    fragments[i][j] = fold<T>(operands.base[j], operands.delta[j], factor[0], factor[INPUT ? 1 : 0]);
                }
                if (i == LAST && step + 1 < STEPS) {
                    operands.load(shared, turn.stage, entry_of<Shared>(turn.stage, consumer), place, step + 1);
                }
                wgmma_fence();
                wgmma<T, Shared::TOKENS>(acc[i], fragments[i],
                                         behind(units, i * Shared::UNIT_BYTES + step * K_STEP_BYTES),
                                         (depth | step) != 0u);
                wgmma_commit();
            }
        }
        // The warp's lanes have folded what they read of the entry.
        if (lane() == 0) {
            barrier_arrive(shared.entry_empty(entry_of<Shared>(turn.stage, consumer)));
        }
        turn.advance();
        if (depth + 1 < depths) {
            wait_for_tiles(shared, turn, consumer);
            operands.load(shared, turn.stage, entry_of<Shared>(turn.stage, consumer), place, 0);
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

// Writes a consumer's 64 rows of one unit, transposed: chunks of [token][64 rows] by stmatrix to one of two buffers, and from there by
// TMA, which clips what lies outside. `bias` [half]: of the thread's rows. `turn` counts the
// tile's chunks, of which there are an even number.
template <class T, class Shared>
__device__ __forceinline__ void store_unit(const float (&acc)[Shared::TOKENS / 2], const Sm90FoldedParams &p,
                                           const Shared &shared, u32 turn, u32 consumer, const Unit &unit, u32 row,
                                           const float (&bias)[2]) {
    constexpr u32 CHUNK = Shared::CHUNK;
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
    for (u32 first = 0; first < Shared::TOKENS; first += CHUNK) {
        const u32 staging = shared.staging(consumer, turn + first / CHUNK);
#pragma unroll
        for (u32 j = 0; j + 2 <= CHUNK / 8; j += 2) {
            const u32 token = 8 * j + lane / 16 * 8 + lane % 8, at = first / 8 + j;
            const u32 matrices[4] = {bits(at, 0), bits(at, 1), bits(at + 1, 0), bits(at + 1, 1)};
            stmatrix<true>(staging + token * ROW_BYTES + ((chunk ^ (token & 7)) * 16), matrices);
        }
        if (CHUNK / 8 % 2 != 0) {
            constexpr u32 LAST = CHUNK / 8 - 1;
            const u32 token = 8 * LAST + lane % 8, at = first / 8 + LAST;
            const u32 matrices[2] = {bits(at, 0), bits(at, 1)};
            stmatrix<true>(staging + token * ROW_BYTES + ((chunk ^ (token & 7)) * 16), matrices);
        }
        fence_async_proxy();
        if (thread[0] == 0) {
            // The other buffer, which the next chunk goes to, has been read.
            wait_for_store_reads<0>();
        }
        named_barrier(1 + consumer, WARPGROUP);
        if (thread[0] == 0) {
            store_box(p.y, staging, row, unit.token + first, unit.sample);
            commit_stores();
        }
    }
}

// A consumer's part of all tiles.
template <class T, bool INPUT, class Shared>
__device__ __forceinline__ void consume(const Shared &shared, const Sm90FoldedParams &p, u32 consumer) {
    constexpr u32 SAMPLES = Shared::SAMPLES;
    const u32 depths = ((p.inner - 1) / TILE_K + 1) * p.copies;
    const u32 place = place_of<INPUT>();
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
        accumulate<T, INPUT>(acc, shared, turn, consumer, z, place, depths);
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
            store_unit<T>(acc[i], p, shared, i * (Shared::TOKENS / Shared::CHUNK), consumer,
                          Unit(p, unit + i, Shared::TOKENS), row, bias);
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
            barrier_init(shared.entry_full(i, 0), 1);
            barrier_init(shared.entry_full(i, 1), 1);
            barrier_init(shared.entry_empty(i), WARPGROUP / WARP);
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
