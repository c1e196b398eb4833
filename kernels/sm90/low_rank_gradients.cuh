// The kernels of low_rank_gradients.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_LOW_RANK_GRADIENTS_CUH
#define PACE_SM90_LOW_RANK_GRADIENTS_CUH

#include "mainloop.cuh"

namespace pace {

namespace sm90::low_rank_gradients {

// Tokens of a tile, and elements of a panel's rows.
constexpr u32 TOKENS = SM90_TILE_K;
constexpr u32 PANEL_BYTES = TOKENS * ROW_BYTES;
constexpr u32 CONSUMER_REGISTERS = 200;
constexpr u32 PRODUCER_REGISTERS = 104;
// Threads that prepare operands: all of the producer's warps but the first.
constexpr u32 PREPARERS = WARPGROUP - WARP;
// The named barrier that they share.
constexpr u32 PREPARERS_BARRIER = 1;

// A tile of g or x as it lies, its channels along the rows; and the low-rank operands, tokens or channels along theirs.
using Transposed = Tile<ROW_BYTES, 8 * ROW_BYTES, PANEL_BYTES>;

// Shared memory. A stage has a tile of 64 tokens, in panels of 64 channels, and the low-rank rows of these tokens, transposed, of
// each copy. FACTORS: a row of ones is behind them, whose product is the gradient to the bias; and there are z * B of two samples
// and B.
template <u32 RANK_, bool FACTORS_> struct Layout {
    static constexpr u32 RANK = RANK_;
    static constexpr bool FACTORS = FACTORS_;
    static constexpr u32 PANELS =
        RANK == 16 ? SM90_GRADIENTS_CHANNELS_16 / TILE_K : SM90_GRADIENTS_CHANNELS_32 / TILE_K;
    static constexpr u32 CHANNELS = PANELS * TILE_K;
    static constexpr u32 STAGES = SM90_GRADIENTS_STAGES;
    static constexpr u32 CLUSTER = 1;
    // Columns of the products with the tile's transpose, and panels of a consumer.
    static constexpr u32 COLUMNS = FACTORS ? RANK + 8 : RANK;
    static constexpr u32 OWN_PANELS = FACTORS ? PANELS : PANELS / CONSUMERS;
    static constexpr u32 COPIES = FACTORS ? 1 : 2;
    static constexpr u32 TILE_BYTES = PANELS * PANEL_BYTES;
    static constexpr u32 LOW_BYTES = COLUMNS * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = TILE_BYTES + COPIES * LOW_BYTES;
    static constexpr u32 SCALED_PANEL_BYTES = RANK * ROW_BYTES;
    static constexpr u32 SCALED_BYTES = FACTORS ? PANELS * SCALED_PANEL_BYTES : 0;
    static constexpr u32 SCALED_AT = STAGES * STAGE_BYTES;
    static constexpr u32 FACTOR_AT = SCALED_AT + 2 * SCALED_BYTES;
    static constexpr u32 BARRIERS_AT = FACTOR_AT + (FACTORS ? CHANNELS * RANK * 2 : 0);
    static constexpr u32 BYTES = BARRIERS_AT + 8 * (2 * STAGES + 4);
    static_assert(STAGE_BYTES % 1024 == 0 && SCALED_PANEL_BYTES % 1024 == 0, "swizzled tiles");
    static_assert(BYTES <= 227 * 1024, "what a block of sm_90 may have");

    u32 base;
    __device__ __forceinline__ u32 tile(u32 stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 low(u32 stage, u32 copy) const {
        return tile(stage) + TILE_BYTES + copy * LOW_BYTES;
    }
    __device__ __forceinline__ u32 scaled(u32 buffer) const { return base + SCALED_AT + buffer * SCALED_BYTES; }
    __device__ __forceinline__ u32 factor() const { return base + FACTOR_AT; }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + BARRIERS_AT + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return full(STAGES + stage); }
    __device__ __forceinline__ u32 scaled_full(u32 buffer) const { return full(2 * STAGES + buffer); }
    __device__ __forceinline__ u32 scaled_empty(u32 buffer) const { return full(2 * STAGES + 2 + buffer); }
};

// Where an element of a row of 64 lies, 128B-swizzled.
__device__ __forceinline__ u32 swizzled(u32 row, u32 element) {
    return row * ROW_BYTES + (element / 8 ^ (row & 7)) * 16 + element % 8 * 2;
}

// A block's part of the work: a chunk of channels of some tiles, samples after each other.
struct Part {
    u32 channel, group, tiles, first, last;
    __device__ __forceinline__ Part(const Sm90LowRankGradientsParams &p, u32 channels)
        : channel(blockIdx.x % p.chunks * channels), group(blockIdx.x / p.chunks), tiles((p.tokens - 1) / TOKENS + 1),
          first(before(p, group)), last(before(p, group + 1)) {}
    __device__ __forceinline__ u32 before(const Sm90LowRankGradientsParams &p, u32 group) const {
        return static_cast<u32>(static_cast<u64>(group) * p.samples * tiles / p.groups);
    }
};

// Its tiles, one after the other. Divides once.
struct Walk {
    u32 left, sample, tile, tiles;
    __device__ __forceinline__ explicit Walk(const Part &part)
        : left(part.last - part.first), sample(part.first / part.tiles), tile(part.first % part.tiles),
          tiles(part.tiles) {}
    __device__ __forceinline__ bool valid() const { return left != 0u; }
    __device__ __forceinline__ u32 token() const { return tile * TOKENS; }
    // Whether it is the last one of its sample here.
    __device__ __forceinline__ bool ends() const { return left == 1u || tile + 1 == tiles; }
    __device__ __forceinline__ void advance() {
        --left;
        if (++tile == tiles) {
            tile = 0;
            ++sample;
        }
    }
};

// The copies of tiles, by one thread.
template <class Shared>
__device__ __forceinline__ void produce(const Shared &shared, const Sm90LowRankGradientsParams &p, const Part &part) {
    prefetch_map(p.tile);
    Turn<Shared::STAGES> turn;
    for (Walk walk(part); walk.valid(); walk.advance()) {
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
        barrier_arrive_and_expect(shared.full(turn.stage), Shared::TILE_BYTES);
#pragma unroll
        for (u32 i = 0; i < Shared::PANELS; ++i) {
            copy_box(shared.tile(turn.stage) + i * PANEL_BYTES, p.tile, shared.full(turn.stage),
                     part.channel + i * TILE_K, walk.token(), walk.sample);
        }
        turn.advance();
    }
}

// The low-rank rows of one tile's tokens of a copy: what a thread loads of them, before the stage is free for them.
template <class T, class Shared> struct LowRows {
    static constexpr u32 EACH = (TOKENS * Shared::RANK + PREPARERS - 1) / PREPARERS;
    T values[EACH];

    __device__ __forceinline__ void load(const Sm90LowRankGradientsParams &p, const Walk &walk, u32 copy, u32 thread) {
        const u64 row = (static_cast<u64>(copy) * p.copy_samples + walk.sample % p.wrap) * p.tokens + walk.token();
        const T *from = static_cast<const T *>(p.low) + row * p.rank;
        const u32 existing = min(p.tokens - walk.token(), TOKENS) * p.rank;
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) {
            const u32 at = thread + i * PREPARERS;
            values[i] = at < existing ? pace::load(from + at) : from_float<T>(0.0f);
        }
    }
    // Transposed; tokens that do not exist as zeros.
    __device__ __forceinline__ void store(u32 to, u32 rank, u32 thread) const {
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) {
            const u32 at = thread + i * PREPARERS, token = at / rank;
            if (token < TOKENS) {
                store_shared_element(to + swizzled(at % rank, token), values[i]);
            }
        }
    }
};

// z * B of one sample: rows of the rank, channels along them.
template <class T, class Shared>
__device__ __forceinline__ void scale_factor(const Shared &shared, const Sm90LowRankGradientsParams &p, u32 buffer,
                                             u32 sample, u32 first_channel, u32 thread) {
#pragma unroll 1
    for (u32 pair = thread; pair < Shared::CHANNELS / 2; pair += PREPARERS) {
        const u32 channel = 2 * pair, column = first_channel + channel;
        float z[2] = {1.0f, 1.0f};
        if (p.z != nullptr) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                z[i] = column + i < p.columns ? load(p.z + static_cast<u64>(sample) * p.columns + column + i) : 0.0f;
            }
        }
        const u32 to = shared.scaled(buffer) + channel / TILE_K * Shared::SCALED_PANEL_BYTES;
#pragma unroll
        for (u32 r = 0; r < Shared::RANK; r += 2) {
            const u32 from = shared.factor() + (channel * Shared::RANK + r) * 2;
            const Pair b[2] = {unpack<T>(load_shared_word(from)), unpack<T>(load_shared_word(from + 2 * Shared::RANK))};
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                store_shared_word(to + swizzled(r + i, channel % TILE_K),
                                  pack<T>(z[0] * b[0].value[i], z[1] * b[1].value[i]));
            }
        }
    }
}

// The operands that do not come by TMA, by the preparers.
template <class T, class Shared>
__device__ __forceinline__ void prepare(const Shared &shared, const Sm90LowRankGradientsParams &p, const Part &part,
                                        u32 thread) {
    // What stays: zeros behind the rank, and the ones.
    for (u32 index = thread; index < Shared::STAGES * Shared::COPIES * Shared::COLUMNS * TOKENS; index += PREPARERS) {
        const u32 token = index % TOKENS, row = index / TOKENS % Shared::COLUMNS,
                  tile = index / TOKENS / Shared::COLUMNS;
        const T value = from_float<T>(Shared::FACTORS && row == Shared::RANK ? 1.0f : 0.0f);
        store_shared_element(shared.low(tile / Shared::COPIES, tile % Shared::COPIES) + swizzled(row, token), value);
    }
    if (Shared::FACTORS) {
        for (u32 index = thread; index < Shared::CHANNELS * Shared::RANK; index += PREPARERS) {
            const u32 r = index % Shared::RANK, channel = part.channel + index / Shared::RANK;
            const bool exists = r < p.rank && channel < p.columns;
            const T *from = static_cast<const T *>(p.factor) + static_cast<u64>(channel) * p.rank + r;
            store_shared_element(shared.factor() + 2 * index, exists ? load(from) : from_float<T>(0.0f));
        }
    }
    named_barrier(PREPARERS_BARRIER, PREPARERS);
    Turn<Shared::STAGES> turn;
    Turn<2> scaled;
    bool begins = true;
    for (Walk walk(part); walk.valid(); walk.advance()) {
        LowRows<T, Shared> rows[Shared::COPIES];
        rows[0].load(p, walk, 0, thread);
        if (Shared::COPIES > 1 && p.copies > 1u) {
            rows[Shared::COPIES - 1].load(p, walk, 1, thread);
        }
        if (Shared::FACTORS && begins) {
            barrier_wait(shared.scaled_empty(scaled.stage), scaled.parity ^ 1u);
            scale_factor<T>(shared, p, scaled.stage, walk.sample, part.channel, thread);
            fence_async_proxy();
            barrier_arrive(shared.scaled_full(scaled.stage));
            scaled.advance();
        }
        begins = walk.ends();
        barrier_wait(shared.empty(turn.stage), turn.parity ^ 1u);
        rows[0].store(shared.low(turn.stage, 0), p.rank, thread);
        if (Shared::COPIES > 1 && p.copies > 1u) {
            rows[Shared::COPIES - 1].store(shared.low(turn.stage, 1), p.rank, thread);
        }
        fence_async_proxy();
        barrier_arrive(shared.full(turn.stage));
        turn.advance();
    }
}

// ds = scale g @ (z * B) over the block's channels, one tile after the other, as partial sums.
template <class T, class Shared>
__device__ __forceinline__ void consume_rows(const Shared &shared, const Sm90LowRankGradientsParams &p,
                                             const Part &part) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    Turn<Shared::STAGES> turn;
    Turn<2> scaled;
    bool begins = true;
    for (Walk walk(part); walk.valid(); walk.advance()) {
        if (begins) {
            barrier_wait(shared.scaled_full(scaled.stage), scaled.parity);
        }
        barrier_wait(shared.full(turn.stage), turn.parity);
        const u64 g = KMajor::at(shared.tile(turn.stage)), factor = KMajor::at(shared.scaled(scaled.stage));
        float acc[Shared::RANK / 2];
        wgmma_fence();
#pragma unroll
        for (u32 panel = 0; panel < Shared::PANELS; ++panel) {
#pragma unroll
            for (u32 step = 0; step < TILE_K / 16; ++step) {
                wgmma<T, Shared::RANK, false, false>(
                    acc, behind(g, panel * PANEL_BYTES + step * K_STEP_BYTES),
                    behind(factor, panel * Shared::SCALED_PANEL_BYTES + step * K_STEP_BYTES), (panel | step) != 0u);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep(acc);
        release(shared, turn.stage);
        turn.advance();
        begins = walk.ends();
        if (begins) {
            if (threadIdx.x % WARPGROUP == 0) {
                barrier_arrive(shared.scaled_empty(scaled.stage));
            }
            scaled.advance();
        }
        if (p.ds != nullptr) {
            const u64 rows = static_cast<u64>(p.samples) * p.tokens;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 token = walk.token() + 16 * warp + lane / 4 + 8 * half;
                if (token < p.tokens) {
                    const u64 row = static_cast<u64>(walk.sample) * p.tokens + token;
                    float *to = p.ds + (blockIdx.x % p.chunks * rows + row) * p.rank;
#pragma unroll
                    for (u32 i = 0; i < Shared::RANK / 4; ++i) {
                        const u32 column = i / 2 * 8 + lane % 4 * 2 + i % 2;
                        if (column < p.rank) {
                            store(to + column, p.scale * acc[i / 2 * 4 + 2 * half + i % 2]);
                        }
                    }
                }
            }
        }
    }
}

// Products of a tile's transpose and the low-rank rows, [channels, COLUMNS], added up over the part. FACTORS: those of a sample are
// multiplied by its z in f32.
template <class T, class Shared>
__device__ __forceinline__ void consume_columns(const Shared &shared, const Sm90LowRankGradientsParams &p,
                                                const Part &part, u32 first_panel) {
    constexpr u32 COLUMNS = Shared::COLUMNS, PANELS = Shared::OWN_PANELS;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const u32 channel = part.channel + first_panel * TILE_K + 16 * warp + lane / 4;
    float sums[PANELS][COLUMNS / 2];
    float totals[Shared::FACTORS ? PANELS : 1][COLUMNS / 2] = {};
    Turn<Shared::STAGES> turn;
    bool begins = true;
    for (Walk walk(part); walk.valid(); walk.advance()) {
        // A sample's z comes while its tiles do.
        float z[Shared::FACTORS ? PANELS : 1][2];
        if (Shared::FACTORS) {
#pragma unroll
            for (u32 i = 0; i < 2 * PANELS; ++i) {
                const u32 at = min(channel + i / 2 * TILE_K + 8 * (i % 2), p.columns - 1);
                z[Shared::FACTORS ? i / 2 : 0][i % 2] =
                    p.z != nullptr ? load(p.z + static_cast<u64>(walk.sample) * p.columns + at) : 1.0f;
            }
        }
        barrier_wait(shared.full(turn.stage), turn.parity);
        const u64 tile = Transposed::at(shared.tile(turn.stage) + first_panel * PANEL_BYTES);
        // Adds what copy `copy` of the low-rank rows makes of the tile.
        const auto multiply = [&](u32 copy, bool accumulate) {
            const u64 low = KMajor::at(shared.low(turn.stage, copy));
#pragma unroll
            for (u32 i = 0; i < PANELS; ++i) {
#pragma unroll
                for (u32 step = 0; step < TOKENS / 16; ++step) {
                    wgmma<T, COLUMNS, true, false>(sums[i], behind(tile, i * PANEL_BYTES + step * 16 * ROW_BYTES),
                                                   behind(low, step * K_STEP_BYTES), step != 0u || accumulate);
                }
            }
            wgmma_commit();
        };
        wgmma_fence();
        multiply(0, !begins);
        if (Shared::COPIES > 1 && p.copies > 1u) {
            multiply(1, true);
        }
        wgmma_wait<0>();
#pragma unroll
        for (u32 i = 0; i < PANELS; ++i) {
            keep(sums[i]);
        }
        release(shared, turn.stage);
        turn.advance();
        begins = Shared::FACTORS && walk.ends();
        if (begins) {
#pragma unroll
            for (u32 i = 0; i < PANELS; ++i) {
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 2; ++j) {
                    float &total = totals[Shared::FACTORS ? i : 0][j];
                    total = fmaf(z[Shared::FACTORS ? i : 0][j / 2 % 2], sums[i][j], total);
                }
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < PANELS; ++i) {
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 2; ++j) {
            const u32 c = channel + i * TILE_K + 8 * (j / 2 % 2), column = j / 4 * 8 + lane % 4 * 2 + j % 2;
            if (c < p.columns) {
                const float result = Shared::FACTORS ? totals[Shared::FACTORS ? i : 0][j] : sums[i][j];
                if (column < p.rank && p.sums != nullptr) {
                    const u64 row = Shared::FACTORS ? (static_cast<u64>(part.group) * p.columns + c) * p.rank + column
                                                    : (static_cast<u64>(part.group) * p.rank + column) * p.columns + c;
                    store(p.sums + row, result);
                }
                if (Shared::FACTORS && column == Shared::RANK && p.delta_bias != nullptr) {
                    store(p.delta_bias + static_cast<u64>(part.group) * p.columns + c, result);
                }
            }
        }
    }
}

template <class T, class Shared> __device__ __forceinline__ void gradients(const Sm90LowRankGradientsParams &p) {
    const Shared shared = {shared_base()};
    if (threadIdx.x == 0) {
#pragma unroll
        for (u32 i = 0; i < Shared::STAGES; ++i) {
            barrier_init(shared.full(i), 1 + PREPARERS);
            barrier_init(shared.empty(i), CONSUMERS);
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            barrier_init(shared.scaled_full(i), PREPARERS);
            barrier_init(shared.scaled_empty(i), 1);
        }
        fence_barriers();
    }
    __syncthreads();
    const Part part(p, Shared::CHANNELS);
    const u32 warpgroup = uniform(threadIdx.x / WARPGROUP);
    if (warpgroup == CONSUMERS) {
        shrink_registers<PRODUCER_REGISTERS>();
        if (!is_copying_warp()) {
            prepare<T>(shared, p, part, threadIdx.x % WARPGROUP - WARP);
        } else if (elect()) {
            produce(shared, p, part);
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        if (!Shared::FACTORS) {
            consume_columns<T>(shared, p, part, warpgroup * Shared::OWN_PANELS);
        } else if (warpgroup == 0) {
            consume_rows<T>(shared, p, part);
        } else {
            consume_columns<T>(shared, p, part, 0);
        }
    }
}

} // namespace sm90::low_rank_gradients
} // namespace pace

#endif // PACE_SM90_LOW_RANK_GRADIENTS_CUH
