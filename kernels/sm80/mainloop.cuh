// The GEMM mainloop on tensor cores: tiles, their copies, fragments and the multistage pipeline.
//
// A block of 256 threads makes a tile of 128 x 128 outputs, c = a @ b; each of its 8 warps makes 64 x 32 of it. The inner
// dimension K is walked in tiles of 64 bytes, which go through a multistage pipeline in shared memory by cp.async.
//
// An operand's tile holds 128 rows of a (or columns of b) by 64 bytes of K, 8 KiB. In global memory the operand is K-major, or,
// TRANSPOSED, K runs over its rows. Both tiles are XOR-swizzled in chunks of 16 bytes: no bank conflicts for cp.async stores
// and ldmatrix.

#ifndef PACE_SM80_MAINLOOP_CUH
#define PACE_SM80_MAINLOOP_CUH

#include "../params.h"
#include "../reduce.cuh"
#include "mma.cuh"

namespace pace::sm80 {

constexpr u32 TILE = SM80_TILE; // rows and columns of a block's tile
constexpr u32 THREADS = SM80_THREADS;
constexpr u32 TILE_BYTES = TILE * SM80_TILE_K_BYTES; // of an operand's tile
// A warp's part of the block's tile: 4 x 4 accumulators of 16 x 8.
constexpr u32 WARP_ROWS = 64;
constexpr u32 WARP_COLUMNS = 32;
// MMAs take 32 bytes of K at a time.
constexpr u32 K_STEPS = SM80_TILE_K_BYTES / 32;

using Accumulators = float[4][4][4]; // [m][n]: 16 rows, 8 columns

// Elements of T in a tile along K.
template <class T> constexpr u32 TILE_K = SM80_TILE_K_BYTES / sizeof(T);

// Tiles that cover `k` elements of K.
template <class T> __device__ __forceinline__ u32 tiles_of(u32 k) { return (k - 1) / TILE_K<T> + 1; }

__device__ __forceinline__ u32 lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_row() { return threadIdx.x / WARP / 4 * WARP_ROWS; }
__device__ __forceinline__ u32 warp_column() { return threadIdx.x / WARP % 4 * WARP_COLUMNS; }

// ---- tiles

constexpr u32 NO_WRAP = 0xffffffffu;

// A row-major matrix in global memory.
template <class T> struct Operand {
    const T *data;
    u32 rows;     // rows from this one on are zero
    u32 columns;  // as are columns
    u32 wrap;     // row `wrap` is row 0 again: an input that two branches share
    bool aligned; // rows hold whole 16-byte vectors and start at multiples of 16 bytes
};

template <class T>
__device__ __forceinline__ Operand<T> operand(const void *data, u32 rows, u32 columns, u32 wrap, u32 aligned) {
    return {static_cast<const T *>(data), rows, columns, wrap, aligned != 0u};
}

// The swizzle: where 16-byte chunk `chunk` of row `row` of a tile lies.
template <class T, bool TRANSPOSED> struct Tile {
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        if (!TRANSPOSED) {
            return row * SM80_TILE_K_BYTES + ((chunk ^ (row >> 1 & 3)) * 16);
        }
        // Fragments of f32 are read element by element, four rows at a time; the others as matrices of eight rows.
        const u32 swizzled = sizeof(T) == 4 ? chunk ^ (row & 3) << 1 : chunk ^ (row & 7);
        return row * TILE * static_cast<u32>(sizeof(T)) + swizzled * 16;
    }
};

// Starts the copy of a tile from outer index `outer` and inner index `k` on. OUTER: fewer outer indices than 128, not
// transposed.
template <class T, bool TRANSPOSED, u32 OUTER = TILE>
__device__ __forceinline__ void copy_tile(unsigned char *tile, const Operand<T> &from, u32 outer, u32 k) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    constexpr u32 CHUNKS = (TRANSPOSED ? TILE : TILE_K<T>) / SIZE; // of a row
    constexpr u32 COUNT = OUTER * 4;
#pragma unroll
    for (u32 i = 0; i < (COUNT - 1) / THREADS + 1; ++i) {
        const u32 index = threadIdx.x + i * THREADS;
        if (COUNT % THREADS != 0 && index >= COUNT) {
            break;
        }
        const u32 row = index / CHUNKS, chunk = index % CHUNKS;
        const u32 at = (TRANSPOSED ? k : outer) + row;
        const u32 column = (TRANSPOSED ? outer : k) + chunk * SIZE;
        const bool exists = at < from.rows && column < from.columns;
        const u32 wrapped = at >= from.wrap ? at - from.wrap : at;
        const T *source = exists ? from.data + static_cast<u64>(wrapped) * from.columns + column : from.data;
        unsigned char *to = tile + Tile<T, TRANSPOSED>::at(row, chunk);
        if (from.aligned) {
            copy_async(to, source, exists ? 16u : 0u);
        } else {
            *reinterpret_cast<Vector<T> *>(to) = load_some(source, exists ? from.columns - column : 0u, false);
        }
    }
}

// ---- fragments

// The registers of the A fragment of 16 rows from `outer` on and K step `step`: register j holds row g + 8 (j % 2) and inner
// indices from t * 4 / sizeof(T) + (j / 2) * 16 / sizeof(T) on.
template <class T, bool TRANSPOSED, class Layout = Tile<T, TRANSPOSED>>
__device__ __forceinline__ void load_a(u32 (&bits)[4], const unsigned char *tile, u32 outer, u32 step) {
    const u32 i = lane() / 8, j = lane() % 8;
    if (!TRANSPOSED) {
        const u32 row = outer + i % 2 * 8 + j;
        ldmatrix(bits, tile + Layout::at(row, 2 * step + i / 2), false);
    } else if (sizeof(T) == 2) {
        const u32 row = step * 16 + i / 2 * 8 + j;
        ldmatrix(bits, tile + Layout::at(row, outer / 8 + i % 2), true);
    } else {
        // ldmatrix transposes elements of 16 bits only.
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            const u32 column = outer + lane() / 4 + 8 * (r % 2), row = step * 8 + lane() % 4 + 4 * (r / 2);
            bits[r] = *reinterpret_cast<const u32 *>(tile + Layout::at(row, column / 4) + column % 4 * 4);
        }
    }
}

// The registers of two B fragments, of 2 x 8 columns from `outer` on: registers 2 i and 2 i + 1 are fragment i.
template <class T, bool TRANSPOSED, class Layout = Tile<T, TRANSPOSED>>
__device__ __forceinline__ void load_b(u32 (&bits)[4], const unsigned char *tile, u32 outer, u32 step) {
    const u32 i = lane() / 8, j = lane() % 8;
    if (!TRANSPOSED) {
        const u32 row = outer + i / 2 * 8 + j;
        ldmatrix(bits, tile + Layout::at(row, 2 * step + i % 2), false);
    } else if (sizeof(T) == 2) {
        const u32 row = step * 16 + i % 2 * 8 + j;
        ldmatrix(bits, tile + Layout::at(row, outer / 8 + i / 2), true);
    } else {
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            const u32 column = outer + lane() / 4 + 8 * (r / 2), row = step * 8 + lane() % 4 + 4 * (r % 2);
            bits[r] = *reinterpret_cast<const u32 *>(tile + Layout::at(row, column / 4) + column % 4 * 4);
        }
    }
}

// B fragments of COUNT times 8 columns from `outer` on.
template <class Math, bool TRANSPOSED, u32 COUNT, class Layout = Tile<typename Math::T, TRANSPOSED>>
__device__ __forceinline__ typename Math::template FragmentB<COUNT> fragment_b(const unsigned char *tile, u32 outer,
                                                                               u32 step) {
    typename Math::template FragmentB<COUNT> b;
#pragma unroll
    for (u32 pair = 0; pair < COUNT / 2; ++pair) {
        u32 bits[4];
        load_b<typename Math::T, TRANSPOSED, Layout>(bits, tile, outer + 16 * pair, step);
        b.set(2 * pair, bits[0], bits[1]);
        b.set(2 * pair + 1, bits[2], bits[3]);
    }
    return b;
}

// What A is multiplied by in registers, element by element: a function of the 16-row fragment m of the warp, the half of its
// rows, and the index in the tile along K.
struct NoScale {
    static constexpr bool POSSIBLE = false;
    bool on = false;
    __device__ __forceinline__ float operator()(u32, u32, u32) const { return 1.0f; }
};

template <class T, class Scale>
__device__ __forceinline__ void scale_a(u32 (&bits)[4], const Scale &scale, u32 m, u32 step) {
    constexpr u32 EACH = 4 / sizeof(T);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        const u32 k = EACH * (8 * step + lane() % 4 + j / 2 * 4);
        bits[j] = scaled<T>(bits[j], scale(m, j % 2, k), EACH == 2 ? scale(m, j % 2, k + 1) : 1.0f);
    }
}

// For mainloops that need A fragments once.
struct NoVisit {
    template <class FragmentA> __device__ __forceinline__ void operator()(u32, u32, const FragmentA &) const {}
};

// c += (scale * a) @ b over one tile along K. `visit(m, step, fragment)` sees each A fragment.
template <class Math, bool A_TRANSPOSED, bool B_TRANSPOSED, class Scale, class Visit>
__device__ __forceinline__ void multiply_tile(Accumulators &c, const unsigned char *a_tile, const unsigned char *b_tile,
                                              const Scale &scale, const Visit &visit) {
    using T = typename Math::T;
#pragma unroll(Math::UNROLL)
    for (u32 step = 0; step < K_STEPS; ++step) {
        const auto b = fragment_b<Math, B_TRANSPOSED, 4>(b_tile, warp_column(), step);
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            u32 bits[4];
            load_a<T, A_TRANSPOSED>(bits, a_tile, warp_row() + 16 * m, step);
            if (Scale::POSSIBLE && scale.on) {
                scale_a<T>(bits, scale, m, step);
            }
            const auto a = Math::fragment_a(bits);
            Math::multiply(c[m], a, b);
            visit(m, step, a);
        }
    }
}

// ---- pipeline

// Walks `tiles` tiles along K through STAGES stages of `stage_bytes` in shared memory: `copy(stage, tile)` starts the copies of
// a tile, `use(stage, tile)` multiplies it. Must be called by all threads in the block. They leave at different times: put a
// barrier before shared memory is used again.
template <u32 STAGES, class Copy, class Use>
__device__ __forceinline__ void mainloop(unsigned char *shared, u32 stage_bytes, u32 tiles, const Copy &copy,
                                         const Use &use) {
    // Prologue: all stages but one are under way. Groups are committed for missing tiles too, so that they can be counted.
#pragma unroll
    for (u32 tile = 0; tile < STAGES - 1; ++tile) {
        if (tile < tiles) {
            copy(shared + tile * stage_bytes, tile);
        }
        commit_copies();
    }
    u32 current = 0, next = STAGES - 1;
    for (u32 tile = 0; tile < tiles; ++tile) {
        // This tile has arrived for all threads, and the previous stage is free.
        wait_for_copies<STAGES - 2>();
        __syncthreads();
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
