// Epilogue: accumulators to memory, and biases.

#ifndef PACE_SM80_EPILOGUE_CUH
#define PACE_SM80_EPILOGUE_CUH

#include "mainloop.cuh"

namespace pace::sm80 {

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

} // namespace pace::sm80

#endif // PACE_SM80_EPILOGUE_CUH
