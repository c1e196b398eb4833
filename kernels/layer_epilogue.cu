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
// for as long as rows share it: with BC noise it is made once per thread, sample and branch.
//
// Bytes: forward reads rows N twice and writes M N; backward reads M N and writes rows N once or twice; in 16-byte accesses where rows
// are aligned. Operations: 2 per element, plus about 60 per drawn z.
// Determinism: run-to-run bitwise; y, e and sum depend on nothing but the operands, grad_bias on the number of parts.

#include "noise_source.cuh"
#include "params.h"
#include "tile_noise.cuh"

namespace pace {

namespace layer_epilogue {

// Rows whose loads are in flight together.
constexpr u32 BATCH = 2;

// z of a thread's channels for one row of the output, kept while rows share it.
template <class T> struct RowNoise {
    static constexpr u32 NONE = 0xffffffffu;
    float value[Vector<T>::SIZE];
    u32 z_row = NONE;

    __device__ __forceinline__ void move_to(const LayerEpilogueParams &p, noise::Key key, u32 row, u32 channel) {
        const u32 wanted = is_per_token(p.noise) ? row : row / p.tokens;
        if (wanted == z_row) {
            return;
        }
        z_row = wanted;
#pragma unroll
        for (u32 i = 0; i < Vector<T>::SIZE; i += 4) {
            const noise::Four four =
                z_of_row(p.noise, key, wanted, p.tokens, (channel + i) / 4, p.channels, p.aligned != 0u);
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

template <class T>
__device__ __forceinline__ Vector<T> load_or_zero(const void *tensor, u64 at, u32 count, bool aligned) {
    if (tensor == nullptr) {
        return load_some(static_cast<const T *>(tensor), 0u, false);
    }
    return load_some(static_cast<const T *>(tensor) + at, count, aligned);
}

template <class T> __device__ __forceinline__ void forward(const LayerEpilogueParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    const Place place(p, W);
    if (!place.exists) {
        return;
    }
    const bool aligned = p.aligned != 0u;
    const noise::Key key = key_of(p.noise);
    const Vector<T> bias = load_or_zero<T>(p.bias, place.channel, place.count, aligned);
    T *const y = static_cast<T *>(p.output) + place.channel;

    // Branches that share rows read them one after the other: there base and a are not y.
    for (u32 branch = 0; branch < p.branches; ++branch) {
        const u32 first_row = branch * p.rows;
        RowNoise<T> z;
        for (u32 batch = place.first + threadIdx.y; batch < place.end; batch += BATCH * blockDim.y) {
            // All loads of a batch, then its arithmetic.
            Vector<T> base[BATCH], a[BATCH];
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                const u32 row = batch + i * blockDim.y;
                if (row < place.end) {
                    const u64 at = static_cast<u64>(row) * p.channels + place.channel;
                    base[i] = load_or_zero<T>(p.base, at, place.count, aligned);
                    a[i] = load_or_zero<T>(p.input, at, place.count, aligned);
                }
            }
#pragma unroll
            for (u32 i = 0; i < BATCH; ++i) {
                const u32 row = batch + i * blockDim.y;
                if (row < place.end) {
                    z.move_to(p, key, first_row + row, place.channel);
#pragma unroll
                    for (u32 j = 0; j < W; ++j) {
                        const float adapter = to_float(a[i].value[j]) + to_float(bias.value[j]);
                        base[i].value[j] = from_float<T>(fmaf(z.value[j], adapter, to_float(base[i].value[j])));
                    }
                    store_some(y + static_cast<u64>(first_row + row) * p.channels, base[i], place.count, aligned);
                }
            }
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

template <class T, u32 BRANCHES> __device__ __forceinline__ void backward(const LayerEpilogueParams &p) {
    constexpr u32 W = Vector<T>::SIZE;
    const Place place(p, W);
    const bool aligned = p.aligned != 0u;
    const noise::Key key = key_of(p.noise);
    float bias_sums[W] = {};
    RowNoise<T> z[BRANCHES];
    for (u32 row = place.first + threadIdx.y; row < place.end && place.exists; row += blockDim.y) {
        const u64 at = static_cast<u64>(row) * p.channels + place.channel;
        Vector<T> g[BRANCHES];
#pragma unroll
        for (u32 branch = 0; branch < BRANCHES; ++branch) {
            g[branch] = load_some(static_cast<const T *>(p.input) + static_cast<u64>(branch) * p.rows * p.channels + at,
                                  place.count, aligned);
        }
        Vector<T> e, sum;
        float e_sums[W] = {}, g_sums[W] = {};
#pragma unroll
        for (u32 branch = 0; branch < BRANCHES; ++branch) {
            z[branch].move_to(p, key, branch * p.rows + row, place.channel);
#pragma unroll
            for (u32 j = 0; j < W; ++j) {
                const float value = to_float(g[branch].value[j]);
                e_sums[j] = fmaf(z[branch].value[j], value, e_sums[j]);
                g_sums[j] += value;
            }
        }
#pragma unroll
        for (u32 j = 0; j < W; ++j) {
            bias_sums[j] += e_sums[j];
            e.value[j] = from_float<T>(e_sums[j]);
            sum.value[j] = from_float<T>(g_sums[j]);
        }
        if (p.output != nullptr) {
            store_some(static_cast<T *>(p.output) + at, e, place.count, aligned);
        }
        if (p.sum != nullptr) {
            store_some(static_cast<T *>(p.sum) + at, sum, place.count, aligned);
        }
    }
    if (p.bias_sums != nullptr) {
        store_bias_sums<T>(p, bias_sums);
    }
}

template <class T> __device__ __forceinline__ void backward(const LayerEpilogueParams &p) {
    if (p.branches == 1) {
        backward<T, 1>(p);
    } else {
        backward<T, 2>(p);
    }
}

} // namespace layer_epilogue

PACE_KERNELS(layer_epilogue, LayerEpilogueParams, (LAYER_EPILOGUE_THREADS), layer_epilogue::forward<T>(p))
PACE_KERNELS(layer_epilogue_backward, LayerEpilogueParams, (LAYER_EPILOGUE_THREADS), layer_epilogue::backward<T>(p))

} // namespace pace
