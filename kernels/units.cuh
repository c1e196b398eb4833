// How kernels that keep a sample's noise in registers go through a tensor [samples, tokens, channels] (Units of params.h).
//
// A unit of work is one sample's run of at most `chunk` tokens. Thread (x, y, z) of a block owns some adjacent channels (x) in every
// blockDim.y-th token (y) of a unit (z); the grid covers the channels by x and strides over the units by y. So what depends on
// sample and channels only is done once for all tokens of a unit.

#ifndef PACE_UNITS_CUH
#define PACE_UNITS_CUH

#include "params.h"

namespace pace {

// Calls `work(sample, token, end)` for each unit of the thread, with its first token there and the end of the unit's tokens.
template <class Work> __device__ __forceinline__ void each_unit(const Units &units, Work work) {
    for (u32 unit = blockIdx.y * blockDim.z + threadIdx.z; unit < units.samples * units.chunks;
         unit += gridDim.y * blockDim.z) {
        const u32 sample = unit / units.chunks, first = (unit - sample * units.chunks) * units.chunk;
        work(sample, first + threadIdx.y, min(units.tokens, first + units.chunk));
    }
}

// A thread's place in a unit: its next token, and the element that its channels begin with there.
struct Cursor {
    u32 token;
    u64 at;
    __device__ __forceinline__ Cursor(const Units &units, u32 sample, u32 first, u32 channel)
        : token(first), at((static_cast<u64>(sample) * units.tokens + first) * units.channels + channel) {}
    // Goes on by so many of the thread's tokens.
    __device__ __forceinline__ void advance(u32 tokens, u32 channels) {
        token += tokens * blockDim.y;
        at += static_cast<u64>(tokens * blockDim.y) * channels;
    }
};

} // namespace pace

#endif // PACE_UNITS_CUH
