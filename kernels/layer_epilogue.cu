// What goes between a library's GEMMs in a linear layer under noise, forward and backward.
//
//   forward    y = base + z * (a + bias)                       any of base, a, bias absent (zero)
//   backward   e = sum over branches of z * g,  sum = sum over branches of g,  grad_bias = sum over rows of e
//
//   y, g [M, N]; base, a, e, sum [rows, N], where rows are the rows of the layer's input: M, or B T if the branches share it, and
//   then each row serves all branches; bias [N]; in f32, f16 or bf16; z as in noise_source.cuh. Arithmetic in f32, one rounding
//   to storage; grad_bias as partial sums in f32 [parts, N], which kernels/partial_sums.cu adds up.
//
// Mapping: thread (x, y) of a block owns 16 bytes of channels (x) in every blockDim.y-th row (y) of the block's `part` rows. z is kept
// for as long as rows share it: with BC noise it is made once per thread, sample and branch. The next row is loaded before the one at
// hand is worked on, so that the memory is never idle.
//
// Bytes: forward reads rows N twice and writes M N; backward reads M N and writes rows N once or twice; in 16-byte accesses where rows
// are aligned. Operations: 2 per element, plus about 60 per drawn z.
// Determinism: run-to-run bitwise; y, e and sum depend on nothing but the operands, grad_bias on the number of parts.

#include "noise_source.cuh"
#include "params.h"
#include "tile_noise.cuh"

namespace pace {

namespace layer_epilogue {

// z of a thread's channels for rows of the output in ascending order, kept while they share it.
template <class T> struct RowNoise {
    float value[Vector<T>::SIZE];
    u32 end = 0; // the first row that it does not hold for

    __device__ __forceinline__ void move_to(const LayerEpilogueParams &p, noise::Key key, u32 row, u32 channel,
                                            bool aligned) {
        if (row < end) {
            return;
        }
        const u32 tokens = is_per_token(p.noise) ? 1 : p.tokens, z_row = row / tokens;
        end = (z_row + 1) * tokens;
#pragma unroll
        for (u32 i = 0; i < Vector<T>::SIZE; i += 4) {
            const noise::Four four = z_of_row(p.noise, key, z_row, p.tokens, (channel + i) / 4, p.channels, aligned);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                value[i + j] = four.value[j];
            }
        }
    }
};

// What a thread works on.
struct Place {
    u32 channel, count; // the first of its channels, and how many of them and of the following exist
    u32 first, end;     // rows of the block
    bool exists;
    __device__ __forceinline__ Place(const LayerEpilogueParams &p, u32 width)
        : channel((blockIdx.x * blockDim.x + threadIdx.x) * width), count(0), first(blockIdx.y * p.part),
          end(min(p.rows, blockIdx.y * p.part + p.part)), exists(channel < p.channels) {
        count = exists ? p.channels - channel : 0u;
    }
};

// Zero if there is no tensor.
template <class T>
__device__ __forceinline__ Vector<T> load_or_zero(const void *tensor, u64 at, u32 count, bool aligned) {
    if (tensor == nullptr) {
        return {};
    }
    return load_some(static_cast<const T *>(tensor) + at, count, aligned);
}

template <class T, bool ALIGNED> __device__ __forceinline__ void forward(const LayerEpilogueParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    const Place place(p, W);
    if (!place.exists) {
        return;
    }
    const noise::Key key = key_of(p.noise);
    float bias[W];
    to_floats(load_or_zero<T>(p.bias, place.channel, place.count, ALIGNED), bias);
    T *const y = static_cast<T *>(p.output) + place.channel;

    // Branches that share rows read them one after the other: there base and a are not y.
    for (u32 branch = 0; branch < p.branches; ++branch) {
        const u32 first_row = branch * p.rows;
        RowNoise<T> z;
        Vector<T> next_base, next_a;
        const auto load_next = [&](u32 row) {
            if (row < place.end) {
                const u64 at = static_cast<u64>(row) * p.channels + place.channel;
                next_base = load_or_zero<T>(p.base, at, place.count, ALIGNED);
                next_a = load_or_zero<T>(p.input, at, place.count, ALIGNED);
            }
        };
        load_next(place.first + threadIdx.y);
#pragma unroll 1
        for (u32 row = place.first + threadIdx.y; row < place.end; row += blockDim.y) {
            const Vector<T> base = next_base, a = next_a;
            load_next(row + blockDim.y);
            z.move_to(p, key, first_row + row, place.channel, ALIGNED);
            float sum[W], adapter[W];
            to_floats(base, sum);
            to_floats(a, adapter);
#pragma unroll
            for (u32 j = 0; j < W; ++j) {
                sum[j] = fmaf(z.value[j], adapter[j] + bias[j], sum[j]);
            }
            store_some(y + static_cast<u64>(first_row + row) * p.channels, from_floats<T>(sum), place.count, ALIGNED);
        }
    }
}

// Adds up over the block's rows what each thread has of its channels, and writes a partial sum.
template <class T>
__device__ __forceinline__ void store_bias_sums(const LayerEpilogueParams &p, const float (&sums)[Vector<T>::SIZE]) {
    constexpr u32 W = Vector<T>::SIZE;
    PACE_SHARED(float, shared); // [blockDim.y, blockDim.x, W]
#pragma unroll
    for (u32 j = 0; j < W; ++j) {
        shared[(threadIdx.y * blockDim.x + threadIdx.x) * W + j] = sums[j];
    }
    __syncthreads();
    const u32 first = blockIdx.x * blockDim.x * W; // channel of the block
    for (u32 index = threadIdx.y * blockDim.x + threadIdx.x; index < blockDim.x * W; index += blockDim.x * blockDim.y) {
        if (first + index < p.channels) {
            float sum = 0.0f;
            for (u32 y = 0; y < blockDim.y; ++y) {
                sum += shared[y * blockDim.x * W + index];
            }
            store(p.bias_sums + static_cast<u64>(blockIdx.y) * p.channels + first + index, sum);
        }
    }
}

template <class T, u32 BRANCHES, bool ALIGNED> __device__ __forceinline__ void backward(const LayerEpilogueParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    const Place place(p, W);
    const noise::Key key = key_of(p.noise);
    float bias_sums[W] = {};
    RowNoise<T> z[BRANCHES];
    Vector<T> next[BRANCHES];
    const auto load_next = [&](u32 row) {
        if (row < place.end && place.exists) {
#pragma unroll
            for (u32 branch = 0; branch < BRANCHES; ++branch) {
                const u64 at = static_cast<u64>(branch * p.rows + row) * p.channels + place.channel;
                next[branch] = load_some(static_cast<const T *>(p.input) + at, place.count, ALIGNED);
            }
        }
    };
    load_next(place.first + threadIdx.y);
#pragma unroll 1
    for (u32 row = place.first + threadIdx.y; row < place.end && place.exists; row += blockDim.y) {
        Vector<T> g[BRANCHES];
        memcpy(g, next, sizeof g);
        load_next(row + blockDim.y);
        float e[W] = {}, sum[W] = {};
#pragma unroll
        for (u32 branch = 0; branch < BRANCHES; ++branch) {
            z[branch].move_to(p, key, branch * p.rows + row, place.channel, ALIGNED);
            float value[W];
            to_floats(g[branch], value);
#pragma unroll
            for (u32 j = 0; j < W; ++j) {
                e[j] = fmaf(z[branch].value[j], value[j], e[j]);
                sum[j] += value[j];
            }
        }
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            bias_sums[j] += e[j];
        }
        const u64 at = static_cast<u64>(row) * p.channels + place.channel;
        if (p.output != nullptr) {
            store_some(static_cast<T *>(p.output) + at, from_floats<T>(e), place.count, ALIGNED);
        }
        if (p.sum != nullptr) {
            store_some(static_cast<T *>(p.sum) + at, from_floats<T>(sum), place.count, ALIGNED);
        }
    }
    if (p.bias_sums != nullptr) {
        store_bias_sums<T>(p, bias_sums);
    }
}

template <class T, bool ALIGNED> __device__ __forceinline__ void backward(const LayerEpilogueParams &p) {
    if (p.branches == 1) {
        backward<T, 1, ALIGNED>(p);
    } else {
        backward<T, 2, ALIGNED>(p);
    }
}

// Blocks that a multiprocessor has registers for.
constexpr u32 FORWARD_BLOCKS = 4, BACKWARD_BLOCKS = 3;

} // namespace layer_epilogue

PACE_KERNELS(layer_epilogue, LayerEpilogueParams, (LAYER_EPILOGUE_THREADS, layer_epilogue::FORWARD_BLOCKS),
             p.aligned != 0u ? layer_epilogue::forward<T, true>(p) : layer_epilogue::forward<T, false>(p))
PACE_KERNELS(layer_epilogue_backward, LayerEpilogueParams, (LAYER_EPILOGUE_THREADS, layer_epilogue::BACKWARD_BLOCKS),
             p.aligned != 0u ? layer_epilogue::backward<T, true>(p) : layer_epilogue::backward<T, false>(p))

} // namespace pace
