// The kernels of low_rank_linear.cu, which says what they compute and how, as templates.

#ifndef PACE_SM90_LOW_RANK_LINEAR_CUH
#define PACE_SM90_LOW_RANK_LINEAR_CUH

#include "epilogue.cuh"

namespace pace {

namespace sm90::low_rank {

constexpr u32 CHANNELS = SM90_LOW_RANK_CHANNELS;

// How a kernel is built: stages, blocks of a cluster, and a consumer's buffers for outputs.
template <u32 STAGES_, u32 CLUSTER_, u32 STAGING_> struct Shape {
    static constexpr u32 STAGES = STAGES_, CLUSTER = CLUSTER_, STAGING = STAGING_;
};

// Shared memory: stages, staging, what the producer prepares, barriers. Forward, that is the noise table and B; for the gradient
// to the INPUT, A.
template <u32 RANK_, bool INPUT_, class Shape> struct Layout {
    static constexpr u32 RANK = RANK_;
    static constexpr bool INPUT = INPUT_;
    using Pipe = Pipeline<CHANNELS, INPUT ? 0 : RANK, Shape::STAGES, Shape::CLUSTER, INPUT>;
    static constexpr u32 STAGING = Shape::STAGING;
    // Rows of B and A are padded by 16 bytes: eight of them are in different banks.
    static constexpr u32 FACTOR_ROWS = INPUT ? RANK : CHANNELS, FACTOR_COLUMNS = INPUT ? CHANNELS : RANK;
    static constexpr u32 FACTOR_ROW_BYTES = 2 * FACTOR_COLUMNS + 16;
    static constexpr u32 STAGING_AT = Pipe::BYTES;
    static constexpr u32 TABLE_AT = STAGING_AT + CONSUMERS * STAGING * CONSUMER_ROWS * CHUNK * 2;
    static constexpr u32 FACTOR_AT = TABLE_AT + (INPUT ? 0 : NoiseTable<CHANNELS>::BYTES);
    static constexpr u32 BARRIERS_AT = FACTOR_AT + FACTOR_ROWS * FACTOR_ROW_BYTES;
    static constexpr u32 BYTES = BARRIERS_AT + Pipe::BARRIER_BYTES + Handover::BYTES;
    static_assert(BARRIERS_AT % 8 == 0 && BYTES <= 227 * 1024, "what a block of sm_90 may have");

    Pipe pipe;
    Handover handover;
    NoiseTable<CHANNELS> table;
    u32 factor;

    __device__ __forceinline__ explicit Layout(u32 base)
        : pipe{base, base + BARRIERS_AT}, handover{pipe.barriers + Pipe::BARRIER_BYTES,
                                                   pipe.barriers + Pipe::BARRIER_BYTES + 8},
          table{base + TABLE_AT}, factor(base + FACTOR_AT) {}
};

// Writes the tile's part of a factor to shared memory, zeros behind it: rows from `row` on of [rows, columns], columns from
// `column` on.
template <class T, class Shared>
__device__ __forceinline__ void fill_factor(u32 to, const void *factor, u32 filler, u32 row, u32 rows, u32 column,
                                            u32 columns) {
#pragma unroll 4
    for (u32 index = filler; index < Shared::FACTOR_ROWS * Shared::FACTOR_COLUMNS; index += Handover::THREADS) {
        const u32 r = index / Shared::FACTOR_COLUMNS, c = index % Shared::FACTOR_COLUMNS;
        const bool exists = row + r < rows && column + c < columns;
        const T *from = static_cast<const T *>(factor) + static_cast<u64>(row + r) * columns + column + c;
        store_shared_element(to + r * Shared::FACTOR_ROW_BYTES + 2 * c, exists ? load(from) : from_float<T>(0.0f));
    }
}

// Low-rank activations of this thread's rows, as A fragments.
template <u32 RANK> using Fragments = u32[RANK / 16][4];

// s, from the accumulators behind those of the base; `to_caller`, to memory as well.
template <class T, u32 RANK>
__device__ __forceinline__ void take_s(Fragments<RANK> &fragments, const float (&acc)[(CHANNELS + RANK) / 2],
                                       const Sm90LinearParams &p, const OwnRows &own, bool to_caller) {
#pragma unroll
    for (u32 j = 0; j < RANK / 8; ++j) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float *values = acc + CHANNELS / 2 + 4 * j + 2 * half;
            const u32 bits = pack<T>(p.scale * values[0], p.scale * values[1]);
            fragments[j / 2][2 * (j % 2) + half] = bits;
            if (to_caller && own.row(half) < p.rows) {
                const u32 column = 8 * j + own.channel();
                T *out = static_cast<T *>(p.s) + static_cast<u64>(own.row(half)) * p.rank + column;
                T pair[2];
                std::memcpy(pair, &bits, sizeof bits);
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (column + i < p.rank) {
                        store(out + i, pair[i]);
                    }
                }
            }
        }
    }
}

// ds of branch `copy`, from memory. Nothing is computed of what is loaded, so that nothing waits for it.
template <class T, u32 RANK>
__device__ __forceinline__ void load_ds(Fragments<RANK> &fragments, const Sm90LinearParams &p, const OwnRows &own,
                                        u32 copy) {
    const bool pairs = p.rank % 2 == 0u;
#pragma unroll
    for (u32 j = 0; j < RANK / 8; ++j) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = own.row(half), column = 8 * j + own.channel();
            const T *from = static_cast<const T *>(p.s) + (static_cast<u64>(copy) * p.rows + row) * p.rank + column;
            u32 bits = 0;
            if (row < p.rows && column < p.rank) {
                if (pairs) {
                    bits = load(reinterpret_cast<const u32 *>(from));
                } else {
                    const T pair[2] = {load(from), column + 1 < p.rank ? load(from + 1) : from_float<T>(0.0f)};
                    std::memcpy(&bits, pair, sizeof bits);
                }
            }
            fragments[j / 2][2 * (j % 2) + half] = bits;
        }
    }
}

// A part of the factor, as B fragments.
template <class Shared> struct PartFactor {
    static constexpr u32 ROW = Shared::FACTOR_ROW_BYTES, STEPS = Shared::RANK / 16;
    u32 b[STEPS][4];
    __device__ __forceinline__ PartFactor(u32 factor, u32 lane, u32 channel) {
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            // Matrices: the halves of the rank's step of 8 channels, then of the next 8.
            if (Shared::INPUT) {
                ldmatrix<true>(b[step], factor + (16 * step + lane % 16) * ROW + 2 * channel + lane / 16 * 16);
            } else {
                ldmatrix<false>(b[step],
                                factor + (channel + lane / 16 * 8 + lane % 8) * ROW + 32 * step + lane / 8 % 2 * 16);
            }
        }
    }
    // sums [8 channels][accumulators] += a @ the factor's part
    template <class T>
    __device__ __forceinline__ void multiply(float (&sums)[PART / 8][4], const Fragments<Shared::RANK> &a) const {
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
#pragma unroll
            for (u32 j = 0; j < PART / 8; ++j) {
                mma<T>(sums[j], a[step], b[step][2 * j], b[step][2 * j + 1]);
            }
        }
    }
};

// A consumer's part of one tile of y, for branch `copy`.
template <class T, class Shared>
__device__ __forceinline__ void store_y(const float (&acc)[Shared::Pipe::N / 2], const Fragments<Shared::RANK> &s,
                                        const Shared &shared, const Sm90LinearParams &p, u32 turn, u32 consumer,
                                        const OwnRows &own, const u32 (&places)[2], u32 column, u32 copy) {
    struct Loaded {
        PartFactor<Shared> factor;
        PartNoise noise;
    };
    const u32 rows[2] = {shared.table.row(copy, places[0]) + 8 * own.channel(),
                         shared.table.row(copy, places[1]) + 8 * own.channel()};
    store_rows<T, Shared::STAGING, CHANNELS>(
        p, shared.pipe.base + Shared::STAGING_AT, turn, consumer, own, column, copy,
        [&](u32 channel) {
            return Loaded{PartFactor<Shared>(shared.factor, own.lane, channel), PartNoise(rows, channel)};
        },
        [&](u32 channel, const Loaded &loaded, PartPairs &y) {
            float adapter[PART / 8][4] = {};
            loaded.factor.template multiply<T>(adapter, s);
#pragma unroll
            for (u32 i = 0; i < PART / 4; ++i) {
                y[i / 2][i % 2] =
                    loaded.noise.apply(i / 2, i % 2, acc + channel / 2 + 2 * i, adapter[i / 2] + i % 2 * 2);
            }
        });
}

// A consumer's part of one tile of grad_x.
template <class T, class Shared>
__device__ __forceinline__ void
store_grad_x(const float (&acc)[CHANNELS / 2], const Fragments<Shared::RANK> (&ds)[COPIES], const Shared &shared,
             const Sm90LinearParams &p, u32 turn, u32 consumer, const OwnRows &own, u32 column) {
    store_rows<T, Shared::STAGING, CHANNELS>(
        p, shared.pipe.base + Shared::STAGING_AT, turn, consumer, own, column, 0,
        [&](u32 channel) { return PartFactor<Shared>(shared.factor, own.lane, channel); },
        [&](u32 channel, const PartFactor<Shared> &factor, PartPairs &y) {
            float sums[PART / 8][4];
#pragma unroll
            for (u32 i = 0; i < PART / 2; ++i) {
                sums[i / 4][i % 4] = acc[channel / 2 + i];
            }
            factor.template multiply<T>(sums, ds[0]);
            if (p.copies > 1u) {
                factor.template multiply<T>(sums, ds[1]);
            }
#pragma unroll
            for (u32 i = 0; i < PART / 4; ++i) {
                const float *pair = sums[i / 2] + i % 2 * 2;
                y[i / 2][i % 2] = Pair{{pair[0], pair[1]}};
            }
        });
}

// A consumer's part of all tiles.
template <class T, class Shared>
__device__ __forceinline__ void consume(const Shared &shared, const Sm90LinearParams &p, u32 consumer, u32 rank) {
    using Pipe = typename Shared::Pipe;
    const u32 k_tiles = ((p.inner - 1) / TILE_K + 1) * (Shared::INPUT ? p.copies : 1u);
    Turn<Pipe::STAGES> turn;
    u32 parity = 0, stores = 0;
    for (Tiles<CHANNELS, Pipe::CLUSTER> tile(p); tile.valid(); tile.advance()) {
        const OwnRows own(consumer, tile.row(rank));
        // s, or ds of each branch, which comes while the mainloop runs.
        Fragments<Shared::RANK> fragments[COPIES];
        if (Shared::INPUT) {
            load_ds<T, Shared::RANK>(fragments[0], p, own, 0);
            if (p.copies > 1u) {
                load_ds<T, Shared::RANK>(fragments[1], p, own, 1);
            }
        }
        float acc[Pipe::N / 2];
        accumulate<T>(acc, shared.pipe, turn, consumer, k_tiles);

        const u32 column = tile.column();
        barrier_wait(shared.handover.full, parity);
        parity ^= 1u;
        if constexpr (Shared::INPUT) {
            store_grad_x<T>(acc, fragments, shared, p, stores, consumer, own, column);
            stores += CHANNELS / CHUNK;
        } else {
            take_s<T, Shared::RANK>(fragments[0], acc, p, own, column == 0);
            u32 places[2];
            own.places(places, p, load_shared_word(shared.table.end()));
#pragma unroll 1
            for (u32 copy = 0; copy < p.copies; ++copy) {
                store_y<T>(acc, fragments[0], shared, p, stores, consumer, own, places, column, copy);
                stores += CHANNELS / CHUNK;
            }
        }
        shared.handover.release();
    }
}

// The producer's other warps make noise, biases and the factor for each tile.
template <class T, class Shared> __device__ __forceinline__ void linear(const Sm90LinearParams &p) {
    const Shared shared(shared_base());
    by_roles<true>(
        shared, p,
        [&](u32 filler, u32 row, u32 column) {
            if (Shared::INPUT) {
                fill_factor<T, Shared>(shared.factor, p.factor, filler, 0, p.rank, column, p.channels);
            } else {
                fill_factor<T, Shared>(shared.factor, p.factor, filler, column, p.channels, 0, p.rank);
                fill_table<T>(shared.table, p, key_of(p.noise), filler, row, column);
            }
        },
        [&](u32 consumer, u32 rank) { consume<T>(shared, p, consumer, rank); });
}

} // namespace sm90::low_rank
} // namespace pace

#endif // PACE_SM90_LOW_RANK_LINEAR_CUH
