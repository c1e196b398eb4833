// A warp-specialised GEMM in small, for the simulator's own tests: TMA loads, wgmma with A in registers, stmatrix and TMA
// stores; one that is right, and the same with one fault each.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct PipelineParams {
    TensorMap a; // [tiles * 64, K], boxes of 64 x 64
    TensorMap b; // [64, K], boxes of 64 x 64
    TensorMap d; // [tiles * 64, 64]: a @ b transposed
    u32 steps;   // K / 64
    u32 tiles;
};

enum class Seed {
    NOTHING,
    A_SHARED,
    WRONG_BYTES,
    WEAK_WAIT,
    READ_IN_FLIGHT,
    WRITTEN_IN_FLIGHT,
    EARLY_RELEASE,
    NO_RELEASE,
    NO_FENCE_BEFORE_STORE,
    NO_WGMMA_FENCE,
    NO_FENCE_AT_ALL,
    WRONG_PARITY,
    WRONG_SWIZZLE,
    NO_FENCE_BARRIERS,
    NO_INIT,
    MISALIGNED,
    STAGING_REUSED,
    STORE_NOT_AWAITED,
    WGMMA_NOT_AWAITED,
    ONE_WARP_LEAVES,
    OTHER_DESCRIPTOR,
    TOO_MANY_ARRIVALS,
    OVERWRITTEN_BARRIER,
    ACCUMULATOR_TOUCHED,
    OVERLAPPING,
    NOT_COMMITTED,
};

constexpr u32 BOX = 64 * 128;
constexpr u32 STAGES = 3;
// Stages of a and b, what is stored, then barriers.
constexpr u32 STAGING = STAGES * 2 * BOX;
constexpr u32 BARRIERS = STAGING + BOX;

template <Seed SEED> struct Pipeline {
    const PipelineParams &p;
    u32 base = shared_base();

    u32 stage(u32 step) const { return base + step % STAGES * 2 * BOX; }
    u32 full(u32 step) const { return base + BARRIERS + step % STAGES * 8; }
    u32 empty(u32 step) const { return full(step) + STAGES * 8; }

    void init() const {
        if (threadIdx.x == 0 && SEED != Seed::NO_INIT) {
            for (u32 i = 0; i < STAGES; ++i) {
                barrier_init(full(i), 1);
                barrier_init(empty(i), 4);
            }
            if (SEED != Seed::NO_FENCE_BARRIERS) {
                fence_barriers();
            }
        }
        __syncthreads();
    }

    // One thread.
    void produce() const {
        prefetch_map(p.a);
        prefetch_map(p.b);
        u32 step = 0;
        for (u32 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
            for (u32 k = 0; k < p.steps; ++k, ++step) {
                barrier_wait(empty(step), (step / STAGES + 1) % 2);
                barrier_arrive_and_expect(full(step), SEED == Seed::WRONG_BYTES && step == 4 ? 2 * BOX + 16 : 2 * BOX);
                if (SEED == Seed::TOO_MANY_ARRIVALS && step == 1) {
                    barrier_arrive(full(step));
                }
                const int x = static_cast<int>(64 * k);
                copy_box(stage(step) + (SEED == Seed::MISALIGNED ? 512 : 0), p.a, full(step), x,
                         static_cast<int>(64 * tile), 0);
                copy_box(stage(step) + BOX, p.b, full(step), x, 0, 0);
            }
        }
    }

    void load_a(u32 (&a)[4], u32 tile, u32 k16) const {
        const u32 lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
        ldmatrix<false>(a, tile + row * 128 + ((2 * k16 + lane / 16) ^ row % 8) * 16);
    }

    void release(u32 step) const {
        if (threadIdx.x % 32 == 0 && SEED != Seed::NO_RELEASE) {
            barrier_arrive(empty(step));
        }
    }

    // One warpgroup.
    void consume() const {
        using B = Tile<SEED == Seed::WRONG_SWIZZLE ? 64 : 128, SEED == Seed::WRONG_SWIZZLE ? 512 : 1024>;
        using A = Tile<128, 1024>;
        u32 step = 0;
        float pool[40];
        float(&d)[32] = reinterpret_cast<float(&)[32]>(pool);
        u32 a[2][4];
        for (u32 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
            for (u32 k = 0; k < p.steps; ++k, ++step) {
                barrier_wait(full(step), (step / STAGES + (SEED == Seed::WRONG_PARITY ? 1 : 0)) % 2);
                const u32 left = stage(step), right = left + BOX;
                if (SEED == Seed::ONE_WARP_LEAVES && step == 2 && threadIdx.x / 32 == 5) {
                    return;
                }
                for (u32 k16 = 0; k16 < 4; ++k16) {
                    u32(&fragment)[4] = a[k16 % 2];
                    load_a(fragment, left, k16);
                    const bool is_forgotten = SEED == Seed::NO_WGMMA_FENCE || SEED == Seed::ACCUMULATOR_TOUCHED;
                    if (SEED != Seed::NO_FENCE_AT_ALL && !(is_forgotten && step > 0)) {
                        wgmma_fence();
                    }
                    const u64 b = B::at(right + 32 * k16 + (SEED == Seed::OTHER_DESCRIPTOR ? threadIdx.x / 32 * 16 : 0));
                    if (SEED == Seed::OVERLAPPING && k16 == 1) {
                        wgmma<bf16, 64>(reinterpret_cast<float(&)[32]>(pool[8]), fragment, b, true);
                    } else if (SEED == Seed::A_SHARED || SEED == Seed::ACCUMULATOR_TOUCHED) {
                        wgmma<bf16, 64>(d, A::at(left + 32 * k16), b, k + k16 > 0);
                    } else {
                        wgmma<bf16, 64>(d, fragment, b, k + k16 > 0);
                    }
                    if (SEED != Seed::NOT_COMMITTED) {
                        wgmma_commit();
                    }
                    // The other fragment is free.
                    if (SEED == Seed::WEAK_WAIT) {
                        wgmma_wait<2>();
                    } else {
                        wgmma_wait<1>();
                    }
                }
                if (SEED == Seed::EARLY_RELEASE) {
                    release(step);
                }
                if (SEED == Seed::WRITTEN_IN_FLIGHT && k == 1) {
                    d[5] = 0.0f;
                }
                if (SEED != Seed::READ_IN_FLIGHT || k + 1 < p.steps) {
                    wgmma_wait<0>();
                }
                if (SEED == Seed::ACCUMULATOR_TOUCHED && k == 1) {
                    d[5] = 0.5f;
                }
                if (SEED != Seed::EARLY_RELEASE) {
                    release(step);
                }
            }
            finish(d, tile);
        }
        if (SEED == Seed::WGMMA_NOT_AWAITED) {
            wgmma_fence();
            wgmma<bf16, 64>(d, A::at(stage(0)), A::at(stage(0)), false);
            wgmma_commit();
        } else if (SEED == Seed::READ_IN_FLIGHT) {
            wgmma_wait<0>();
        }
    }

    void finish(const float (&d)[32], u32 tile) const {
        const u32 thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane % 16;
        // What the tile before this one has there is read.
        if (thread == 0 && SEED != Seed::STAGING_REUSED) {
            wait_for_store_reads<0>();
        }
        named_barrier(1, 128);
        for (u32 j = 0; j < 4; ++j) {
            const u32 matrices[4] = {pack<bf16>(d[8 * j], d[8 * j + 1]), pack<bf16>(d[8 * j + 2], d[8 * j + 3]),
                                     pack<bf16>(d[8 * j + 4], d[8 * j + 5]), pack<bf16>(d[8 * j + 6], d[8 * j + 7])};
            stmatrix<false>(base + STAGING + row * 128 + ((2 * j + lane / 16) ^ row % 8) * 16, matrices);
        }
        if (SEED == Seed::OVERWRITTEN_BARRIER && thread == 0) {
            store_shared(full(0), 1.0f);
        }
        if (SEED != Seed::NO_FENCE_BEFORE_STORE) {
            fence_async_proxy();
        }
        named_barrier(1, 128);
        if (thread == 0) {
            store_box(p.d, base + STAGING, 0, static_cast<int>(64 * tile), 0);
            commit_stores();
        }
    }

    void run() const {
        init();
        if (threadIdx.x / 128 == 0) {
            shrink_registers<40>();
            if (threadIdx.x / 32 == 0 && elect()) {
                produce();
            }
        } else {
            grow_registers<232>();
            consume();
            if (threadIdx.x == 128 && SEED != Seed::STORE_NOT_AWAITED) {
                wait_for_stores();
            }
        }
    }
};

template <Seed SEED> void pipeline(const PipelineParams &p) { Pipeline<SEED>{p}.run(); }

} // namespace
} // namespace pace::sm90

using namespace pace::sm90;

PACE_KERNEL(pipeline, PipelineParams, 256) { pipeline<Seed::NOTHING>(p); }

PACE_KERNEL(pipeline_a_shared, PipelineParams, 256) { pipeline<Seed::A_SHARED>(p); }

PACE_KERNEL(pipeline_wrong_bytes, PipelineParams, 256) { pipeline<Seed::WRONG_BYTES>(p); }

PACE_KERNEL(pipeline_weak_wait, PipelineParams, 256) { pipeline<Seed::WEAK_WAIT>(p); }

PACE_KERNEL(pipeline_read_in_flight, PipelineParams, 256) { pipeline<Seed::READ_IN_FLIGHT>(p); }

PACE_KERNEL(pipeline_written_in_flight, PipelineParams, 256) { pipeline<Seed::WRITTEN_IN_FLIGHT>(p); }

PACE_KERNEL(pipeline_early_release, PipelineParams, 256) { pipeline<Seed::EARLY_RELEASE>(p); }

PACE_KERNEL(pipeline_no_release, PipelineParams, 256) { pipeline<Seed::NO_RELEASE>(p); }

PACE_KERNEL(pipeline_no_fence_before_store, PipelineParams, 256) { pipeline<Seed::NO_FENCE_BEFORE_STORE>(p); }

PACE_KERNEL(pipeline_no_wgmma_fence, PipelineParams, 256) { pipeline<Seed::NO_WGMMA_FENCE>(p); }

PACE_KERNEL(pipeline_no_fence_at_all, PipelineParams, 256) { pipeline<Seed::NO_FENCE_AT_ALL>(p); }

PACE_KERNEL(pipeline_wrong_parity, PipelineParams, 256) { pipeline<Seed::WRONG_PARITY>(p); }

PACE_KERNEL(pipeline_wrong_swizzle, PipelineParams, 256) { pipeline<Seed::WRONG_SWIZZLE>(p); }

PACE_KERNEL(pipeline_no_fence_barriers, PipelineParams, 256) { pipeline<Seed::NO_FENCE_BARRIERS>(p); }

PACE_KERNEL(pipeline_no_init, PipelineParams, 256) { pipeline<Seed::NO_INIT>(p); }

PACE_KERNEL(pipeline_misaligned, PipelineParams, 256) { pipeline<Seed::MISALIGNED>(p); }

PACE_KERNEL(pipeline_staging_reused, PipelineParams, 256) { pipeline<Seed::STAGING_REUSED>(p); }

PACE_KERNEL(pipeline_store_not_awaited, PipelineParams, 256) { pipeline<Seed::STORE_NOT_AWAITED>(p); }

PACE_KERNEL(pipeline_wgmma_not_awaited, PipelineParams, 256) { pipeline<Seed::WGMMA_NOT_AWAITED>(p); }

PACE_KERNEL(pipeline_one_warp_leaves, PipelineParams, 256) { pipeline<Seed::ONE_WARP_LEAVES>(p); }

PACE_KERNEL(pipeline_other_descriptor, PipelineParams, 256) { pipeline<Seed::OTHER_DESCRIPTOR>(p); }

PACE_KERNEL(pipeline_too_many_arrivals, PipelineParams, 256) { pipeline<Seed::TOO_MANY_ARRIVALS>(p); }

PACE_KERNEL(pipeline_overwritten_barrier, PipelineParams, 256) { pipeline<Seed::OVERWRITTEN_BARRIER>(p); }

PACE_KERNEL(pipeline_accumulator_touched, PipelineParams, 256) { pipeline<Seed::ACCUMULATOR_TOUCHED>(p); }

PACE_KERNEL(pipeline_overlapping, PipelineParams, 256) { pipeline<Seed::OVERLAPPING>(p); }

PACE_KERNEL(pipeline_not_committed, PipelineParams, 256) { pipeline<Seed::NOT_COMMITTED>(p); }
