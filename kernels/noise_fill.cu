// z = 1 + sigma * n written out, for callers that want to see it or to multiply themselves.
//
//   z [rows, N] f32; rows = R = branches * batch for BC noise, M = R * T for BTC
//
// Mapping: units.cuh; a thread's channels are the four of one group, one Philox call.
// Bytes: 4 per element, written once; in 16-byte stores where N is a multiple of 4 and z is aligned. Operations: about
// 50 per element, so that with BTC noise these set the time on current devices.
// Determinism: gpu-to-gpu and cpu-to-gpu bitwise; nothing depends on grid or block.

#include "noise_source.cuh"
#include "params.h"
#include "units.cuh"

namespace pace {

PACE_KERNEL(noise_fill, NoiseFillParams, NOISE_FILL_THREADS) {
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x, channels = p.units.channels;
    if (group >= (channels - 1) / 4 + 1) {
        return;
    }
    const noise::Key key = key_of(p.noise);
    each_unit(p.units, [&](u32 sample, u32 first, u32 end) {
        Cursor cursor(p.units, sample, first, 4 * group);
#pragma unroll 1
        while (cursor.token < end) {
            const noise::Four z = generated(p.noise, key, sample, cursor.token, group);
            const Vector<float> vector = {{z.value[0], z.value[1], z.value[2], z.value[3]}};
            store_some(p.z + cursor.at, vector, channels - 4 * group, p.units.aligned != 0u);
            cursor.advance(1, channels);
        }
    });
}

} // namespace pace
