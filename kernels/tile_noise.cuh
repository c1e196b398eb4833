// Noise of a tile of outputs or operands, made by a whole block in shared memory.

#ifndef PACE_TILE_NOISE_CUH
#define PACE_TILE_NOISE_CUH

#include "noise_source.cuh"

namespace pace {

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
template <u32 THREADS, u32 GROUPS>
__device__ __forceinline__ void fill_noise(float *z, u32 stride, const NoiseSource &source, noise::Key key, u32 first,
                                           u32 count, u32 tokens, u32 channel, u32 channels, bool aligned) {
    for (u32 index = threadIdx.x; index < count * GROUPS; index += THREADS) {
        const u32 row = index / GROUPS, group = index % GROUPS;
        const noise::Four four = z_of_row(source, key, first + row, tokens, channel / 4 + group, channels, aligned);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            z[row * stride + 4 * group + i] = four.value[i];
        }
    }
}

} // namespace pace

#endif // PACE_TILE_NOISE_CUH
