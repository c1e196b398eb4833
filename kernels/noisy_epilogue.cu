// The noisy epilogue after a GEMM of the caller's own, forward and backward.
//
//   forward   y += z * a        in place
//   backward  da = z * dy
//
//   y, a, dy, da [M, N] in f32, f16 or bf16, M = R * T token rows, R = branches * batch sample rows; z as noise_source.cuh
//   has it, f32. Arithmetic in f32: one fused multiply-add (forward) or product (backward), one rounding to storage.
//
// A unit of work is one sample's run of at most `chunk` tokens. Thread (x, y, z) of a block owns 16 bytes of channels (x)
// in every blockDim.y-th token (y) of a unit (z); the grid covers the channels by x and strides over the units by y. So
// BC noise is made once per thread and unit, and serves all its tokens; BTC noise is made once per element.
//
// Bytes: forward 3, backward 2 times M * N * sizeof(T), plus a given z; in 16-byte accesses where rows are aligned, and
// otherwise element by element. Operations: 1 per element, plus about 60 per drawn z: with BTC noise these, not the bytes,
// set the time.
// Determinism: gpu-to-gpu bitwise; nothing depends on grid or block.

#include "noise_source.cuh"
#include "params.h"

namespace pace {

// z of the W channels from `channel` on, of which `count` exist.
template <unsigned W>
__device__ __forceinline__ void fill(const NoisyEpilogueParams &p, noise::Key key, u32 sample, u32 token, u32 channel,
                                     u32 count, float (&z)[W]) {
    const u32 row = is_per_token(p.noise) ? sample * p.tokens + token : sample;
#pragma unroll
    for (unsigned i = 0; i < W; i += 4) {
        const noise::Four four = z_of(p.noise, key, sample, token, row, (channel + i) / 4, p.channels,
                                      count > i ? count - i : 0u, p.aligned != 0u);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            z[i + j] = four.value[j];
        }
    }
}

// BATCH: tokens whose loads are in flight together.
template <class T, bool BACKWARD, bool PER_TOKEN, unsigned BATCH>
__device__ __forceinline__ void apply(const NoisyEpilogueParams &p) {
    constexpr unsigned W = Vector<T>::SIZE;
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= (p.channels - 1) / W + 1) {
        return;
    }
    const u32 channel = column * W;
    const u32 count = p.channels - channel;
    const bool aligned = p.aligned != 0u;
    const noise::Key key = key_of(p.noise);
    const T *input = static_cast<const T *>(p.input) + channel;
    T *output = static_cast<T *>(p.output) + channel;

    for (u32 unit = blockIdx.y * blockDim.z + threadIdx.z; unit < p.samples * p.chunks;
         unit += gridDim.y * blockDim.z) {
        const u32 sample = unit / p.chunks;
        const u32 first = (unit - sample * p.chunks) * p.chunk;
        const u32 end = min(p.tokens, first + p.chunk);
        float z[W];
        if (!PER_TOKEN && first + threadIdx.y < end) {
            fill(p, key, sample, 0, channel, count, z);
        }
        for (u32 batch = first + threadIdx.y; batch < end; batch += BATCH * blockDim.y) {
            Vector<T> in[BATCH], out[BATCH];
#pragma unroll
            for (unsigned i = 0; i < BATCH; ++i) {
                const u32 token = batch + i * blockDim.y;
                if (token < end) {
                    const u64 at = (static_cast<u64>(sample) * p.tokens + token) * p.channels;
                    in[i] = load_some(input + at, count, aligned);
                    if (!BACKWARD) {
                        out[i] = load_some<T>(output + at, count, aligned);
                    }
                }
            }
#pragma unroll
            for (unsigned i = 0; i < BATCH; ++i) {
                const u32 token = batch + i * blockDim.y;
                if (token < end) {
                    if (PER_TOKEN) {
                        fill(p, key, sample, token, channel, count, z);
                    }
#pragma unroll
                    for (unsigned j = 0; j < W; ++j) {
                        const float value = to_float(in[i].value[j]);
                        out[i].value[j] =
                            from_float<T>(BACKWARD ? noise::detail::mul_rn(z[j], value)
                                                   : noise::detail::fma_rn(z[j], value, to_float(out[i].value[j])));
                    }
                    const u64 at = (static_cast<u64>(sample) * p.tokens + token) * p.channels;
                    store_some(output + at, out[i], count, aligned);
                }
            }
        }
    }
}

// With 16-bit types a thread has twice the channels and z. Half the tokens at a time leave registers for twice the blocks,
// which is what keeps the memory busy.
constexpr u32 BLOCKS_16_BIT = 4;

template <class T, bool BACKWARD> __device__ __forceinline__ void apply(const NoisyEpilogueParams &p) {
    if (is_per_token(p.noise)) {
        apply<T, BACKWARD, true, 1>(p);
    } else {
        apply<T, BACKWARD, false, sizeof(T) == 4 ? 4 : 2>(p);
    }
}

PACE_KERNELS_F32(noisy_epilogue, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS), apply<T, false>(p))
PACE_KERNELS_16(noisy_epilogue, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS, BLOCKS_16_BIT), apply<T, false>(p))
PACE_KERNELS_F32(noisy_epilogue_backward, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS), apply<T, true>(p))
PACE_KERNELS_16(noisy_epilogue_backward, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS, BLOCKS_16_BIT),
                apply<T, true>(p))

} // namespace pace
