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

#ifndef PACE_SM80_MAINLOOP_CUH
#define PACE_SM80_MAINLOOP_CUH

#include "../reduce.cuh"
#include "mma.cuh"

namespace pace::sm80 {

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

} // namespace pace::sm80

#endif // PACE_SM80_MAINLOOP_CUH
