// z = 1 + sigma * n written out, for callers that want to see it or to multiply themselves.
//
//   z [rows, N] f32; rows = R = branches * batch for BC noise, M = R * T for BTC
//
// Thread (x, y) of a block makes the four channels of one group, one Philox call, of one row; the grid covers the groups
// by x and strides over the rows by y.
//
// Bytes: 4 per element, written once; in 16-byte stores where N is a multiple of 4 and z is aligned. Operations: about
// 60 per element, so arithmetic and memory take about the same time on current devices.
// Determinism: gpu-to-gpu and cpu-to-gpu bitwise; nothing depends on grid or block.

#include "noise_source.cuh"
#include "params.h"

namespace pace {

PACE_KERNEL(noise_fill, NoiseFillParams, NOISE_FILL_THREADS) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= (p.channels - 1) / 4 + 1) {
        return;
    }
    const u32 channel = 4 * group;
    const noise::Key key = key_of(p.noise);
    for (u32 row = blockIdx.y * blockDim.y + threadIdx.y; row < p.rows; row += gridDim.y * blockDim.y) {
        const u32 sample = row / p.tokens;
        const noise::Four z = generated(p.noise, key, sample, row - sample * p.tokens, group);
        const Vector<float> vector = {{z.value[0], z.value[1], z.value[2], z.value[3]}};
        store_some(p.z + static_cast<u64>(row) * p.channels + channel, vector, p.channels - channel, p.aligned != 0u);
    }
}

} // namespace pace
