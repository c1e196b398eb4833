// Copies of boxes between global and shared memory, for the simulator's own tests.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct CopyBoxParams {
    TensorMap map;
    float *shared;       // out: what shared memory holds, `words` words
    const float *staged; // in: what is stored
    int corner[3];
    u32 bytes; // of the box
    u32 words;
    u32 ranks;
};

// Loads one box, and gives what lies in shared memory.
void load_one(const CopyBoxParams &p) {
    const u32 tile = shared_base(), barrier = tile + 4 * p.words;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barriers();
        barrier_arrive_and_expect(barrier, p.bytes);
        if (p.ranks == 0) {
            copy_box(tile, p.map, barrier, p.corner[0], p.corner[1], p.corner[2]);
        } else {
            copy_box_to(p.ranks, tile, p.map, barrier, p.corner[0], p.corner[1], p.corner[2]);
        }
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    for (u32 i = threadIdx.x; i < p.words; i += blockDim.x) {
        store(p.shared + i, load_shared(tile + 4 * i));
    }
}

// Stores one box of what `staged` puts into shared memory.
void store_one(const CopyBoxParams &p) {
    const u32 tile = shared_base();
    for (u32 i = threadIdx.x; i < p.words; i += blockDim.x) {
        store_shared(tile + 4 * i, load(p.staged + i));
    }
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_box(p.map, tile, p.corner[0], p.corner[1], p.corner[2]);
        commit_stores();
        wait_for_store_reads<0>();
    }
}

// A map that is a copy of the parameters' one.
void load_by_copied_map(const CopyBoxParams &p) {
    const TensorMap map = p.map;
    prefetch_map(map);
}

} // namespace
} // namespace pace::sm90

using namespace pace::sm90;

PACE_KERNEL(copy_box_in, CopyBoxParams, 32) { load_one(p); }

PACE_KERNEL(copy_box_out, CopyBoxParams, 32) { store_one(p); }

PACE_KERNEL(copy_box_by_copied_map, CopyBoxParams, 32) { load_by_copied_map(p); }
