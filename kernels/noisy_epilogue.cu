// The noisy epilogue after a GEMM of the caller's own, forward and backward.
//
//   forward   y += z * a        in place
//   backward  da = z * dy
//
//   y, a, dy, da [M, N] in f32, f16 or bf16, M = R * T token rows, R = branches * batch sample rows; z as noise_source.cuh
//   has it, f32. Arithmetic in f32: one fused multiply-add (forward) or product (backward), one rounding to storage.
//
// Mapping: units.cuh; a thread's channels are 16 bytes. BC noise is made once per thread and unit, and serves all its tokens; BTC
// noise is made once per element. The first tokens of a unit are loaded before z is made, and the next ones before those at hand
// are worked on, so that the memory is never idle.
//
// Bytes: forward 3, backward 2 times M * N * sizeof(T), plus a given z; in 16-byte accesses where rows are aligned, and
// otherwise element by element. Operations: 1 per element, plus about 60 per drawn z: with BTC noise these, not the bytes,
// set the time.
// Determinism: gpu-to-gpu bitwise; nothing depends on grid or block.

#include "noise_source.cuh"
#include "params.h"
#include "units.cuh"

namespace pace {

// How a kernel runs: from a to y or from dy to da, with 16-byte vectors or single elements, one z per sample or per token, with
// BATCH of a thread's tokens loaded together.
template <bool BACKWARD_, bool ALIGNED_, bool PER_TOKEN_, unsigned BATCH_> struct Mode {
    static constexpr bool BACKWARD = BACKWARD_, ALIGNED = ALIGNED_, PER_TOKEN = PER_TOKEN_;
    static constexpr unsigned BATCH = BATCH_;
};

// z of the W channels from `channel` on, of which `count` exist.
template <class Mode, unsigned W>
__device__ __forceinline__ void fill(const NoisyEpilogueParams &p, noise::Key key, u32 sample, u32 token, u32 channel,
                                     u32 count, float (&z)[W]) {
    const u32 row = Mode::PER_TOKEN ? sample * p.units.tokens + token : sample;
#pragma unroll
    for (unsigned i = 0; i < W; i += 4) {
        const noise::Four four = z_of(p.noise, key, sample, token, row, (channel + i) / 4, p.units.channels,
                                      count > i ? count - i : 0u, Mode::ALIGNED);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            z[i + j] = four.value[j];
        }
    }
}

template <class T, unsigned BATCH> struct Operands { Vector<T> input[BATCH], output[BATCH]; };

// Loads what there is of the next tokens.
template <class Mode, class T>
__device__ __forceinline__ void load_operands(const NoisyEpilogueParams &p, Cursor cursor, u32 end, u32 count,
                                              Operands<T, Mode::BATCH> &operands) {
#pragma unroll
    for (unsigned i = 0; i < Mode::BATCH; ++i) {
        if (cursor.token < end) {
            operands.input[i] = load_some(static_cast<const T *>(p.input) + cursor.at, count, Mode::ALIGNED);
            if (!Mode::BACKWARD) {
                operands.output[i] = load_some<T>(static_cast<T *>(p.output) + cursor.at, count, Mode::ALIGNED);
            }
        }
        cursor.advance(1, p.units.channels);
    }
}

template <class Mode, class T> __device__ __forceinline__ void apply(const NoisyEpilogueParams &p) {
    constexpr unsigned W = Vector<T>::SIZE, BATCH = Mode::BATCH;
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= (p.units.channels - 1) / W + 1) {
        return;
    }
    const u32 channel = column * W;
    const u32 count = p.units.channels - channel;
    const noise::Key key = key_of(p.noise);

    each_unit(p.units, [&](u32 sample, u32 first, u32 end) {
        Cursor cursor(p.units, sample, first, channel);
        Operands<T, BATCH> next;
        load_operands<Mode>(p, cursor, end, count, next);
        float z[W];
        if (!Mode::PER_TOKEN && cursor.token < end) {
            fill<Mode>(p, key, sample, 0, channel, count, z);
        }
#pragma unroll Mode::ALIGNED && !Mode::PER_TOKEN ? 2 : 1
        while (cursor.token < end) {
            const Operands<T, BATCH> operands = next;
            Cursor ahead = cursor;
            ahead.advance(BATCH, p.units.channels);
            load_operands<Mode>(p, ahead, end, count, next);
#pragma unroll
            for (unsigned i = 0; i < BATCH; ++i) {
                if (cursor.token < end) {
                    if (Mode::PER_TOKEN) {
                        fill<Mode>(p, key, sample, cursor.token, channel, count, z);
                    }
                    float value[W], result[W];
                    to_floats(operands.input[i], value);
                    to_floats(operands.output[i], result);
#pragma unroll
                    for (unsigned j = 0; j < W; ++j) {
                        result[j] = Mode::BACKWARD ? noise::detail::mul_rn(z[j], value[j])
                                                   : noise::detail::fma_rn(z[j], value[j], result[j]);
                    }
                    T *to = static_cast<T *>(p.output) + cursor.at;
                    store_some(to, from_floats<T>(result), count, Mode::ALIGNED);
                }
                cursor.advance(1, p.units.channels);
            }
        }
    });
}

template <class T, bool BACKWARD> __device__ __forceinline__ void apply(const NoisyEpilogueParams &p) {
    const bool aligned = p.units.aligned != 0u;
    if (is_per_token(p.noise)) {
        aligned ? apply<Mode<BACKWARD, true, true, 1>, T>(p) : apply<Mode<BACKWARD, false, true, 1>, T>(p);
    } else {
        aligned ? apply<Mode<BACKWARD, true, false, 2>, T>(p) : apply<Mode<BACKWARD, false, false, 1>, T>(p);
    }
}

// Registers for four blocks on a multiprocessor, which is what keeps the memory busy.
constexpr u32 BLOCKS = 4;

PACE_KERNELS(noisy_epilogue, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS, BLOCKS), apply<T, false>(p))
PACE_KERNELS(noisy_epilogue_backward, NoisyEpilogueParams, (NOISY_EPILOGUE_THREADS, BLOCKS), apply<T, true>(p))

} // namespace pace
