// Matrix products on tensor cores, tile by tile: what the linear layers' kernels share.
//
// A block of 256 threads makes a tile of 128 x 128 outputs; each of its 8 warps a part of 64 x 32. The inner dimension is
// walked in tiles of 64 bytes, which travel through a ring of stages in shared memory by asynchronous 16-byte copies.
//
// An operand's tile holds 128 outer indices (rows or columns of the output) by 64 bytes of inner ones. In memory, a row
// of the operand runs along the inner dimension, or, TRANSPOSED, along the outer one. Both take 8 KiB, with 16-byte
// chunks permuted within rows so that neither copies nor fragment loads meet bank conflicts.
//
// Numbers: how a storage type is multiplied. 16-bit types as they are; f32 as tf32 (10 fraction bits), or as the sum of
// two tf32 numbers and three products, which keeps f32 accuracy (Ootomo and Yokota 2022, arXiv 2203.03341).

#ifndef PACE_PRODUCT_CUH
#define PACE_PRODUCT_CUH

#include "noise_source.cuh"
#include "reduce.cuh"
#include "tensor_core.cuh"

#include <cstring>

namespace pace {

constexpr u32 TILE = 128;
constexpr u32 PRODUCT_THREADS = 256;
constexpr u32 TILE_BYTES = TILE * 64;
// Parts of a tile that one warp multiplies: 4 x 4 accumulators of 16 x 8.
constexpr u32 WARP_ROWS = 64;
constexpr u32 WARP_COLUMNS = 32;
// Inner indices are multiplied 32 bytes at a time.
constexpr u32 STEPS = 2;

using Accumulators = float[4][4][4];

// Elements of T in 64 bytes.
template <class T> constexpr u32 INNER = 64 / sizeof(T);

__device__ __forceinline__ u32 lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_row() { return threadIdx.x / WARP / 4 * WARP_ROWS; }
__device__ __forceinline__ u32 warp_column() { return threadIdx.x / WARP % 4 * WARP_COLUMNS; }

// ---- numbers

// A register of a fragment holds 4 / sizeof(T) elements of T.
template <class T> __device__ __forceinline__ float unpack(u32 bits, u32 i) {
    T values[4 / sizeof(T)];
    memcpy(values, &bits, 4);
    return to_float(values[i]);
}

using noise::detail::to_bits;

// z * element for each element of a register.
template <class T> __device__ __forceinline__ u32 scaled(u32 bits, float z0, float z1) {
    return pack<T>(z0 * unpack<T>(bits, 0), z1 * unpack<T>(bits, 1));
}

template <> __device__ __forceinline__ u32 scaled<float>(u32 bits, float z0, float) {
    return to_bits(z0 * unpack<float>(bits, 0));
}

// base + z * delta for each element of a register.
template <class T> __device__ __forceinline__ u32 folded(u32 base, u32 delta, float z) {
    return pack<T>(fmaf(z, unpack<T>(delta, 0), unpack<T>(base, 0)), fmaf(z, unpack<T>(delta, 1), unpack<T>(base, 1)));
}

template <> __device__ __forceinline__ u32 folded<float>(u32 base, u32 delta, float z) {
    return to_bits(fmaf(z, unpack<float>(delta, 0), unpack<float>(base, 0)));
}

template <class T_> struct SixteenBit {
    using T = T_;
    static constexpr u32 UNROLL = STEPS; // of steps in a tile
    struct Left {
        u32 value[4];
    };
    struct Right {
        u32 value[2];
    };
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) { return {{bits[0], bits[1], bits[2], bits[3]}}; }
    static __device__ __forceinline__ Right right(u32 first, u32 second) { return {{first, second}}; }
    static __device__ __forceinline__ Right ones() { return {{pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f)}}; }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        PACE_MULTIPLY(Mma16<T>, c, a.value, b, value);
    }
};

struct Tf32 {
    using T = float;
    static constexpr u32 UNROLL = STEPS;
    struct Left {
        u32 value[4];
    };
    struct Right {
        u32 value[2];
    };
    static __device__ __forceinline__ u32 round(u32 bits) { return to_tf32(unpack<float>(bits, 0)); }
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) {
        return {{round(bits[0]), round(bits[1]), round(bits[2]), round(bits[3])}};
    }
    static __device__ __forceinline__ Right right(u32 first, u32 second) { return {{round(first), round(second)}}; }
    static __device__ __forceinline__ Right ones() { return {{to_bits(1.0f), to_bits(1.0f)}}; }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        PACE_MULTIPLY(MmaTf32, c, a.value, b, value);
    }
};

struct Float32 {
    using T = float;
    static constexpr u32 UNROLL = 1; // or registers do not suffice
    struct Left {
        u32 high[4], low[4];
    };
    struct Right {
        u32 high[2], low[2];
    };
    static __device__ __forceinline__ void split(u32 bits, u32 &high, u32 &low) {
        const float value = unpack<float>(bits, 0);
        high = to_tf32(value);
        // An infinite value has no low part. Its products are infinite or NaN: here 0 * infinity adds to them.
        low = (high & 0x7f800000u) == 0x7f800000u ? 0u : to_tf32(value - unpack<float>(high, 0));
    }
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) {
        Left result;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            split(bits[i], result.high[i], result.low[i]);
        }
        return result;
    }
    static __device__ __forceinline__ Right right(u32 first, u32 second) {
        Right result;
        split(first, result.high[0], result.low[0]);
        split(second, result.high[1], result.low[1]);
        return result;
    }
    static __device__ __forceinline__ Right ones() { return {{to_bits(1.0f), to_bits(1.0f)}, {0u, 0u}}; }
    // Tensor cores cut off what does not fit the accumulator, so that long sums would shrink: they add up 8 products only, small
    // ones first, and the sums go on in the registers.
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        float sum[COUNT][4] = {};
        PACE_MULTIPLY(MmaTf32, sum, a.low, b, high);
        PACE_MULTIPLY(MmaTf32, sum, a.high, b, low);
        PACE_MULTIPLY(MmaTf32, sum, a.high, b, high);
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                c[i][j] += sum[i][j];
            }
        }
    }
};

// ---- tiles

constexpr u32 NO_WRAP = 0xffffffffu;

// A matrix in memory whose rows are `stride` elements apart.
template <class T> struct Operand {
    const T *data;
    u32 rows;    // rows from this one on are zero
    u32 columns; // as are columns
    u32 stride;
    u32 wrap; // row `wrap` is row 0 again: an input that two branches share
    bool aligned;
};

// Where 16-byte chunk `chunk` of row `row` of a tile lies.
template <class T, bool TRANSPOSED> struct Tile {
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        if (!TRANSPOSED) {
            return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16);
        }
        // Fragments of f32 are read element by element, four rows at a time; the others as matrices of eight rows.
        const u32 permuted = sizeof(T) == 4 ? chunk ^ (row & 3) << 1 : chunk ^ (row & 7);
        return row * TILE * static_cast<u32>(sizeof(T)) + permuted * 16;
    }
};

// Starts the copy of a tile: its outer and inner indices from `outer` and `inner` on. OUTER: fewer outer indices than 128,
// not transposed.
template <class T, bool TRANSPOSED, u32 OUTER = TILE>
__device__ __forceinline__ void copy_tile(unsigned char *tile, const Operand<T> &from, u32 outer, u32 inner) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    constexpr u32 CHUNKS = (TRANSPOSED ? TILE : INNER<T>) / SIZE; // of a row
    constexpr u32 COUNT = OUTER * 4;
#pragma unroll
    for (u32 i = 0; i < (COUNT - 1) / PRODUCT_THREADS + 1; ++i) {
        const u32 index = threadIdx.x + i * PRODUCT_THREADS;
        if (COUNT % PRODUCT_THREADS != 0 && index >= COUNT) {
            break;
        }
        const u32 row = index / CHUNKS, chunk = index % CHUNKS;
        const u32 at = (TRANSPOSED ? inner : outer) + row;
        const u32 column = (TRANSPOSED ? outer : inner) + chunk * SIZE;
        const bool exists = at < from.rows && column < from.columns;
        const u32 wrapped = at >= from.wrap ? at - from.wrap : at;
        const T *source = exists ? from.data + static_cast<u64>(wrapped) * from.stride + column : from.data;
        unsigned char *to = tile + Tile<T, TRANSPOSED>::at(row, chunk);
        if (from.aligned) {
            copy_async(to, source, exists ? 16u : 0u);
        } else {
            *reinterpret_cast<Vector<T> *>(to) = load_some(source, exists ? from.columns - column : 0u, false);
        }
    }
}

// ---- fragments

// The left fragment of 16 outer indices from `outer` on, 32 bytes of inner ones: register j holds outer index
// g + 8 (j % 2) and inner ones from t * 4 / sizeof(T) + (j / 2) * 16 / sizeof(T) on.
template <class T, bool TRANSPOSED, class Layout = Tile<T, TRANSPOSED>>
__device__ __forceinline__ void load_left(u32 (&bits)[4], const unsigned char *tile, u32 outer, u32 step) {
    const u32 i = lane() / 8, j = lane() % 8;
    if (!TRANSPOSED) {
        const u32 row = outer + i % 2 * 8 + j;
        PACE_LOAD_MATRICES(bits, tile + Layout::at(row, 2 * step + i / 2), false);
    } else if (sizeof(T) == 2) {
        const u32 row = step * 16 + i / 2 * 8 + j;
        PACE_LOAD_MATRICES(bits, tile + Layout::at(row, outer / 8 + i % 2), true);
    } else {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 column = outer + lane() / 4 + 8 * (k % 2), row = step * 8 + lane() % 4 + 4 * (k / 2);
            bits[k] = *reinterpret_cast<const u32 *>(tile + Layout::at(row, column / 4) + column % 4 * 4);
        }
    }
}

// The right fragments of 2 x 8 outer indices from `outer` on: registers 2 i and 2 i + 1 are fragment i.
template <class T, bool TRANSPOSED, class Layout = Tile<T, TRANSPOSED>>
__device__ __forceinline__ void load_right(u32 (&bits)[4], const unsigned char *tile, u32 outer, u32 step) {
    const u32 i = lane() / 8, j = lane() % 8;
    if (!TRANSPOSED) {
        const u32 row = outer + i / 2 * 8 + j;
        PACE_LOAD_MATRICES(bits, tile + Layout::at(row, 2 * step + i % 2), false);
    } else if (sizeof(T) == 2) {
        const u32 row = step * 16 + i % 2 * 8 + j;
        PACE_LOAD_MATRICES(bits, tile + Layout::at(row, outer / 8 + i / 2), true);
    } else {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 column = outer + lane() / 4 + 8 * (k / 2), row = step * 8 + lane() % 4 + 4 * (k % 2);
            bits[k] = *reinterpret_cast<const u32 *>(tile + Layout::at(row, column / 4) + column % 4 * 4);
        }
    }
}

// What a register of a left fragment is multiplied with on its way: z of the element's outer and inner index in the tile.
struct NoScale {
    static constexpr bool POSSIBLE = false;
    bool on = false;
    __device__ __forceinline__ float operator()(u32, u32, u32) const { return 1.0f; }
};

// Scales a left fragment. `part`: which 16 of the warp's 64 outer indices.
template <class T, class Scale>
__device__ __forceinline__ void scale_left(u32 (&bits)[4], const Scale &scale, u32 part, u32 step) {
    constexpr u32 EACH = 4 / sizeof(T);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const u32 inner = EACH * (8 * step + lane() % 4 + j / 2 * 4);
        bits[j] = scaled<T>(bits[j], scale(part, j % 2, inner), EACH == 2 ? scale(part, j % 2, inner + 1) : 1.0f);
    }
}

// For products that do nothing else with their left fragments.
struct NoMore {
    template <class Left> __device__ __forceinline__ void operator()(u32, u32, const Left &) const {}
};

// c += a * b over one tile of the inner dimension. `more(part, step, a)` sees each left fragment.
template <class Numbers, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED, class Scale, class More>
__device__ __forceinline__ void multiply_tile(Accumulators &c, const unsigned char *left, const unsigned char *right,
                                              const Scale &scale, const More &more) {
    using T = typename Numbers::T;
#pragma unroll(Numbers::UNROLL)
    for (u32 step = 0; step < STEPS; ++step) {
        typename Numbers::Right b[4];
#pragma unroll
        for (u32 pair = 0; pair < 2; ++pair) {
            u32 bits[4];
            load_right<T, RIGHT_TRANSPOSED>(bits, right, warp_column() + 16 * pair, step);
            b[2 * pair] = Numbers::right(bits[0], bits[1]);
            b[2 * pair + 1] = Numbers::right(bits[2], bits[3]);
        }
#pragma unroll
        for (u32 part = 0; part < 4; ++part) {
            u32 bits[4];
            load_left<T, LEFT_TRANSPOSED>(bits, left, warp_row() + 16 * part, step);
            if (Scale::POSSIBLE && scale.on) {
                scale_left<T>(bits, scale, part, step);
            }
            const typename Numbers::Left a = Numbers::left(bits);
            Numbers::multiply(c[part], a, b);
            more(part, step, a);
        }
    }
}

// Walks `tiles` tiles through a ring of STAGES stages of `stage_bytes`: `copy(stage, tile)` starts the copies of a tile,
// `use(stage, tile)` multiplies it. Threads may leave at different times; put a barrier before shared memory is reused.
template <u32 STAGES, class Copy, class Use>
__device__ __forceinline__ void pipeline(unsigned char *shared, u32 stage_bytes, u32 tiles, const Copy &copy,
                                         const Use &use) {
#pragma unroll
    for (u32 tile = 0; tile < STAGES - 1; ++tile) {
        if (tile < tiles) {
            copy(shared + tile * stage_bytes, tile);
        }
        commit_copies();
    }
    u32 current = 0, next = STAGES - 1;
    for (u32 tile = 0; tile < tiles; ++tile) {
        wait_for_copies<STAGES - 2>();
        __syncthreads(); // this tile has arrived for everyone, and nobody reads the one before it any more
        if (tile + STAGES - 1 < tiles) {
            copy(shared + next * stage_bytes, tile + STAGES - 1);
        }
        commit_copies();
        use(shared + current * stage_bytes, tile);
        current = current + 1 == STAGES ? 0 : current + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// ---- results

// Calls f(part, column, i, row, column in the tile) for each accumulator of this thread.
template <class F> __device__ __forceinline__ void each_accumulator(const F &f) {
#pragma unroll
    for (u32 part = 0; part < 4; ++part) {
#pragma unroll
        for (u32 column = 0; column < 4; ++column) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                f(part, column, i, warp_row() + 16 * part + 8 * (i / 2) + lane() / 4,
                  warp_column() + 8 * column + 2 * (lane() % 4) + i % 2);
            }
        }
    }
}

// Writes the block's tile to `out`, whose rows are `columns` elements long, from `row` and `column` on. Goes through
// shared memory (TILE * TILE elements), for whole rows of 16-byte stores.
template <class T>
__device__ __forceinline__ void store_tile(const Accumulators &c, unsigned char *shared, T *out, u32 row, u32 column,
                                           u32 rows, u32 columns, bool aligned) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    constexpr u32 ROW_BYTES = TILE * sizeof(T);
    __syncthreads();
    each_accumulator([&](u32 part, u32 j, u32 i, u32 r, u32 k) {
        const u32 chunk = k / SIZE ^ (r & 7);
        *reinterpret_cast<T *>(shared + r * ROW_BYTES + chunk * 16 + k % SIZE * sizeof(T)) =
            from_float<T>(c[part][j][i]);
    });
    __syncthreads();
    constexpr u32 CHUNKS = TILE / SIZE;
    for (u32 index = threadIdx.x; index < TILE * CHUNKS; index += PRODUCT_THREADS) {
        const u32 r = index / CHUNKS, chunk = index % CHUNKS, k = column + chunk * SIZE;
        if (row + r < rows && k < columns) {
            const auto vector =
                *reinterpret_cast<const Vector<T> *>(shared + r * ROW_BYTES + ((chunk ^ (r & 7)) * 16));
            store_some(out + static_cast<u64>(row + r) * columns + k, vector, columns - k, aligned);
        }
    }
}

// A bias, zero where there is none.
template <class T> __device__ __forceinline__ float bias_of(const void *bias, u32 channel, u32 channels) {
    return bias != nullptr && channel < channels ? to_float(load(static_cast<const T *>(bias) + channel)) : 0.0f;
}

// A bias of the columns of this thread's accumulators in the tile from `first` on.
template <class T> struct ColumnBias {
    float value[4][2];
    __device__ __forceinline__ ColumnBias(const void *bias, u32 first, u32 channels) {
#pragma unroll
        for (u32 column = 0; column < 4; ++column) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                value[column][i] = bias_of<T>(bias, first + warp_column() + 8 * column + 2 * (lane() % 4) + i, channels);
            }
        }
    }
};

// ---- noise

// Which rows of z a run of token rows needs: one per sample, or one per token.
struct NoiseRows {
    u32 first; // sample or token row of the first
    u32 tokens; // token rows per row of z
    __device__ __forceinline__ NoiseRows(const NoiseSource &source, u32 tokens_per_sample, u32 row)
        : first(0), tokens(is_per_token(source) ? 1 : tokens_per_sample) {
        first = row / tokens;
    }
    // Place of token row `row` among them.
    __device__ __forceinline__ u32 place(u32 row) const { return row / tokens - first; }
};

// z of 4 adjacent channels for the row of z that token row `row` of the output needs.
__device__ __forceinline__ noise::Four z_of_row(const NoiseSource &source, noise::Key key, u32 z_row, u32 tokens,
                                                u32 group, u32 channels, bool aligned) {
    const bool per_token = is_per_token(source);
    const u32 sample = per_token ? z_row / tokens : z_row;
    const u32 channel = 4 * group, count = channel < channels ? channels - channel : 0u;
    return z_of(source, key, sample, per_token ? z_row - sample * tokens : 0u, z_row, group, channels, count,
                aligned && count != 0u);
}

// Fills `z` [rows, `stride`] with z of `count` rows from `first` on, and 4 * GROUPS channels from `channel` on.
template <u32 GROUPS>
__device__ __forceinline__ void fill_noise(float *z, u32 stride, const NoiseSource &source, noise::Key key, u32 first,
                                           u32 count, u32 tokens, u32 channel, u32 channels, bool aligned) {
    for (u32 index = threadIdx.x; index < count * GROUPS; index += PRODUCT_THREADS) {
        const u32 row = index / GROUPS, group = index % GROUPS;
        const noise::Four four = z_of_row(source, key, first + row, tokens, channel / 4 + group, channels, aligned);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            z[row * stride + 4 * group + i] = four.value[i];
        }
    }
}

} // namespace pace

#endif // PACE_PRODUCT_CUH
