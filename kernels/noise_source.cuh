// Where a kernel's z comes from (NoiseSource of params.h): nowhere (z = 1), the generator of noise.cuh, or a tensor of the caller.

#ifndef PACE_NOISE_SOURCE_CUH
#define PACE_NOISE_SOURCE_CUH

#include "noise.cuh"
#include "params.h"

namespace pace {

// The key in effect: the one at `address`, or `key` if there is no address. A captured graph holds the address, so that
// each replay reads the key anew.
__device__ __forceinline__ noise::Key key_of(const u64 *address, const u32 (&key)[2]) {
    if (address == nullptr) {
        return {{key[0], key[1]}};
    }
    const u64 loaded = load(address);
    return {{static_cast<u32>(loaded), static_cast<u32>(loaded >> 32)}};
}

__device__ __forceinline__ noise::Key key_of(const NoiseSource &source) {
    return key_of(source.key_address, source.key);
}

__device__ __forceinline__ bool is_per_token(const NoiseSource &source) {
    return source.kind == NOISE_PER_TOKEN || source.kind == NOISE_GIVEN_PER_TOKEN;
}

// Generated z of channels 4 * group .. 4 * group + 3; `sample` counts the samples of all branches.
__device__ __forceinline__ noise::Four generated(const NoiseSource &source, noise::Key key, u32 sample, u32 token,
                                                 u32 group) {
    const u32 branch = sample / source.batch;
    return noise::noise(key, source.sigma, branch, source.first_sample + (sample - branch * source.batch),
                        source.kind == NOISE_PER_TOKEN ? token : noise::ALL_TOKENS, group);
}

// z of channels 4 * group .. 4 * group + 3 from any source. `row`: the row of a given z, that of the sample or of its
// token; `count`: how many of the channels exist; `aligned`: all four do, and rows of a given z start at multiples of 16
// bytes.
__device__ __forceinline__ noise::Four z_of(const NoiseSource &source, noise::Key key, u32 sample, u32 token, u32 row,
                                            u32 group, u32 channels, u32 count, bool aligned) {
    if (source.kind == NOISE_OFF) {
        return {{1.0f, 1.0f, 1.0f, 1.0f}};
    }
    if (source.given != nullptr) {
        const Vector<float> z = load_some(source.given + static_cast<u64>(row) * channels + 4 * group, count, aligned);
        return {{z.value[0], z.value[1], z.value[2], z.value[3]}};
    }
    return generated(source, key, sample, token, group);
}

} // namespace pace

#endif // PACE_NOISE_SOURCE_CUH
