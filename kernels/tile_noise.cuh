// Noise of a tile of outputs or operands, made by a whole block in shared memory. Knows no architecture.
//
// A row of z belongs to a sample, whose token rows share it (BC), or to a token row (BTC). A tile needs only the rows of z of
// its token rows: with BC noise and many tokens a few of them.

#ifndef PACE_TILE_NOISE_CUH
#define PACE_TILE_NOISE_CUH

#include "noise_source.cuh"

namespace pace {

// The rows of z that a run of token rows needs.
struct NoiseRows {
    u32 first;  // sample or token row of the first
    u32 tokens; // token rows per row of z
    __device__ __forceinline__ NoiseRows(const NoiseSource &source, u32 tokens_per_sample, u32 row)
        : first(0), tokens(is_per_token(source) ? 1 : tokens_per_sample) {
        first = row / tokens;
    }
    // Place of token row `row` among them.
    __device__ __forceinline__ u32 place(u32 row) const { return row / tokens - first; }
};

// Row `z_row` of z, 4 adjacent channels.
__device__ __forceinline__ noise::Four z_of_row(const NoiseSource &source, noise::Key key, u32 z_row, u32 tokens,
                                                u32 group, u32 channels, bool aligned) {
    const bool per_token = is_per_token(source);
    const u32 sample = per_token ? z_row / tokens : z_row;
    const u32 channel = 4 * group, count = channel < channels ? channels - channel : 0u;
    return z_of(source, key, sample, per_token ? z_row - sample * tokens : 0u, z_row, group, channels, count,
                aligned && count != 0u);
}

// Fills `z` [count, STRIDE] with `count` rows of z from `first` on, 4 * GROUPS channels from `channel` on. Called by the
// block's THREADS threads, with a barrier before `z` is read.
template <u32 THREADS, u32 GROUPS, u32 STRIDE = 4 * GROUPS>
__device__ __forceinline__ void fill_noise(float *z, const NoiseSource &source, noise::Key key, u32 first, u32 count,
                                           u32 tokens, u32 channel, u32 channels, bool aligned) {
    for (u32 index = threadIdx.x; index < count * GROUPS; index += THREADS) {
        const u32 row = index / GROUPS, group = index % GROUPS;
        const noise::Four four = z_of_row(source, key, first + row, tokens, channel / 4 + group, channels, aligned);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            z[row * STRIDE + 4 * group + i] = four.value[i];
        }
    }
}

} // namespace pace

#endif // PACE_TILE_NOISE_CUH
