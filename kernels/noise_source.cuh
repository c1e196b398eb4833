// Where a kernel's z comes from: nowhere (z = 1), the generator of noise.cuh, or a tensor of the caller.
//
// Mirrored by `NoiseSource` in src/cuda/noise_source.rs.

#ifndef PACE_NOISE_SOURCE_CUH
#define PACE_NOISE_SOURCE_CUH

#include "noise.cuh"
#include "storage.cuh"

namespace pace {

enum NoiseKind : u32 {
    NOISE_OFF = 0,              // z = 1
    NOISE_PER_SAMPLE = 1,       // BC, generated
    NOISE_PER_TOKEN = 2,        // BTC, generated
    NOISE_GIVEN_PER_SAMPLE = 3, // z [R, N] of the caller
    NOISE_GIVEN_PER_TOKEN = 4,  // z [R, T, N] of the caller
};

struct NoiseSource {
    const float *given;            // z of the caller; null if generated
    const noise::Key *key_address; // the key, read when the kernel runs; null: `key` is the key
    noise::Key key;
    u64 first_sample; // number of the batch's sample 0 in the global batch
    u32 batch;        // samples per branch
    u32 kind;         // NoiseKind
    float sigma;
    u32 reserved;
};

PACE_PARAMS(NoiseSource, 48);
PACE_PARAM(NoiseSource, key_address, 8);
PACE_PARAM(NoiseSource, key, 16);
PACE_PARAM(NoiseSource, first_sample, 24);
PACE_PARAM(NoiseSource, batch, 32);
PACE_PARAM(NoiseSource, kind, 36);
PACE_PARAM(NoiseSource, sigma, 40);

// The key in effect: the one at `address`, or `key` if there is no address. A captured graph holds the address, so that
// each replay reads the key anew.
__device__ __forceinline__ noise::Key key_of(const noise::Key *address, noise::Key key) {
    if (address == nullptr) {
        return key;
    }
    return {{load(address->word), load(address->word + 1)}};
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
