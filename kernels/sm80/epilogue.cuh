// The epilogue of a GEMM: biases, and accumulators to global memory.

#ifndef PACE_SM80_EPILOGUE_CUH
#define PACE_SM80_EPILOGUE_CUH

#include "mainloop.cuh"

namespace pace::sm80 {

// Calls f(m, n, i, row, column in the tile) for each accumulator c[m][n][i] of this thread.
template <class F> __device__ __forceinline__ void each_accumulator(const F &f) {
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                f(m, n, i, warp_row() + 16 * m + 8 * (i / 2) + lane() / 4,
                  warp_column() + 8 * n + 2 * (lane() % 4) + i % 2);
            }
        }
    }
}

// Writes the block's tile to `out`, whose rows are `columns` elements long, from `row` and `column` on. It goes through shared
// memory (TILE * TILE elements, XOR-swizzled), so that threads store 16 bytes each and warps whole rows. Must be called by all
// threads in the block.
template <class T>
__device__ __forceinline__ void store_tile(const Accumulators &c, unsigned char *shared, T *out, u32 row, u32 column,
                                           u32 rows, u32 columns, bool aligned) {
    constexpr u32 SIZE = Vector<T>::SIZE;
    constexpr u32 ROW_BYTES = TILE * sizeof(T);
    constexpr u32 CHUNKS = TILE / SIZE;
    // Accumulators, rounded to T, to shared memory once all threads have left the mainloop.
    __syncthreads();
    each_accumulator([&](u32 m, u32 n, u32 i, u32 r, u32 k) {
        const u32 chunk = k / SIZE ^ (r & 7);
        *reinterpret_cast<T *>(shared + r * ROW_BYTES + chunk * 16 + k % SIZE * sizeof(T)) = from_float<T>(c[m][n][i]);
    });
    __syncthreads();
    // Vectors to global memory.
    for (u32 index = threadIdx.x; index < TILE * CHUNKS; index += THREADS) {
        const u32 r = index / CHUNKS, chunk = index % CHUNKS, k = column + chunk * SIZE;
        if (row + r < rows && k < columns) {
            const auto vector = *reinterpret_cast<const Vector<T> *>(shared + r * ROW_BYTES + ((chunk ^ (r & 7)) * 16));
            store_some(out + static_cast<u64>(row + r) * columns + k, vector, columns - k, aligned);
        }
    }
}

// A bias, zero where there is none.
template <class T> __device__ __forceinline__ float bias_of(const void *bias, u32 channel, u32 channels) {
    return bias != nullptr && channel < channels ? to_float(load(static_cast<const T *>(bias) + channel)) : 0.0f;
}

// A bias of the columns of this thread's accumulators, [n][i % 2], in the tile from column `first` on.
template <class T> struct ColumnBias {
    float value[4][2];
    __device__ __forceinline__ ColumnBias(const void *bias, u32 first, u32 channels) {
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                value[n][i] = bias_of<T>(bias, first + warp_column() + 8 * n + 2 * (lane() % 4) + i, channels);
            }
        }
    }
};

} // namespace pace::sm80

#endif // PACE_SM80_EPILOGUE_CUH
