// Launches that work on many tensors or layers at once: their descriptions lie in the parameter struct, and each has a run of blocks.

#ifndef PACE_GROUPED_CUH
#define PACE_GROUPED_CUH

#include "storage.cuh"

namespace pace {

// The last of `count` members of a group that starts at this block or before it, by bisection. `first_block` ascends from 0.
template <class Blocks> __device__ __forceinline__ u32 member_of(const Blocks &first_block, u32 count, u32 block) {
    u32 member = 0, end = count;
    while (end - member > 1) {
        const u32 middle = (member + end) / 2;
        if (first_block[middle] <= block) {
            member = middle;
        } else {
            end = middle;
        }
    }
    return member;
}

} // namespace pace

#endif // PACE_GROUPED_CUH
