// Loops of wgmmas that leave PENDING groups in flight when they wait, some of them one too many: a fragment is overwritten that a
// wgmma may not have read yet. ptxas does not notice that, as it does where an accumulator is touched or where no wait stands between
// (`serialised.cu`). Compiled by `planted.rs`, never run.

#include "../../kernels/sm90/ptx.cuh"

namespace pace::sm90 {

constexpr u32 N = 136, K = 16, STEPS = 4, TILE = 128 * 64 * 2;

__device__ __forceinline__ void load(u32 (&fragment)[4], u32 stage, u32 step) {
    ldmatrix<false>(fragment, stage + threadIdx.x % 32 * 128 + step * K * 2);
}

__device__ __forceinline__ u64 tile(u32 stage, u32 step) { return Tile<128, 1024>::at(stage + TILE + step * K * 2); }

template <u32 COUNT> __device__ __forceinline__ void store(float *y, const float (&d)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        y[threadIdx.x * COUNT + i] = d[i];
    }
}

// One group of wgmmas a pass, on fragments in registers, which the next pass loads.
template <u32 PENDING> __device__ __forceinline__ void from_registers(float *y, u32 tiles) {
    float d[N / 2];
    u32 a[STEPS][4];
#pragma unroll 1
    for (u32 t = 0; t < tiles; ++t) {
        const u32 stage = shared_base() + t % 4 * 2 * TILE;
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            load(a[step], stage, step);
        }
        keep(d);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            wgmma<bf16, N>(d, a[step], tile(stage, step), t + step > 0);
        }
        wgmma_commit();
        wgmma_wait<PENDING>();
    }
    wgmma_wait<0>();
    keep(d);
    store(y, d);
}

// Two accumulators and two sets of fragments by turns: while a set is loaded the other one's group is in flight.
template <u32 PENDING> __device__ __forceinline__ void by_turns(float *y, u32 tiles) {
    float d[2][N / 2];
    u32 a[2][4];
#pragma unroll 1
    for (u32 t = 0; t < tiles; ++t) {
        const u32 stage = shared_base() + t % 4 * 2 * TILE;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            wgmma_wait<PENDING>();
            load(a[i], stage, i);
            keep(a[i]);
            keep(d[i]);
            wgmma_fence();
            wgmma<bf16, N>(d[i], a[i], tile(stage, i), t > 0);
            wgmma_commit();
        }
    }
    wgmma_wait<0>();
    keep(d[0]);
    keep(d[1]);
    store(y, d[0]);
    store(y + blockDim.x * N / 2, d[1]);
}

// The fragment of a pass is made from the one before, in the same registers.
template <u32 PENDING> __device__ __forceinline__ void in_place(float *y, u32 tiles) {
    float d[N / 2];
    u32 a[4];
    load(a, shared_base(), 0);
#pragma unroll 1
    for (u32 t = 0; t < tiles; ++t) {
        keep(a);
        keep(d);
        wgmma_fence();
        wgmma<bf16, N>(d, a, tile(shared_base() + t % 4 * 2 * TILE, 0), t > 0);
        wgmma_commit();
        wgmma_wait<PENDING>();
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            a[i] ^= t;
        }
    }
    wgmma_wait<0>();
    keep(d);
    store(y, d);
}

// Both operands in shared memory: a group may stay in flight until the next one is started.
__device__ __forceinline__ void from_shared(float *y, u32 tiles) {
    float d[N / 2];
#pragma unroll 1
    for (u32 t = 0; t < tiles; ++t) {
        const u32 stage = shared_base() + t % 4 * 2 * TILE;
        keep(d);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            wgmma<bf16, N>(d, Tile<128, 1024>::at(stage + step * K * 2), tile(stage, step), t + step > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    keep(d);
    store(y, d);
}

} // namespace pace::sm90

#define PACE_TRIAL(name, loop)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128, 1) name(float *y, unsigned tiles) { pace::sm90::loop(y, tiles); }

PACE_TRIAL(right_registers, from_registers<0>)
PACE_TRIAL(wrong_registers, from_registers<1>)
PACE_TRIAL(right_turns, by_turns<1>)
PACE_TRIAL(wrong_turns, by_turns<2>)
PACE_TRIAL(right_in_place, in_place<0>)
PACE_TRIAL(wrong_in_place, in_place<1>)
PACE_TRIAL(right_shared, from_shared)
