// A GEMM by pairs of blocks, for the simulator's own tests: two warpgroups of each multiply 64 rows of a, and both blocks share
// b, half of which each of them fetches for both.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct PairPipelineParams {
    TensorMap a; // [M, K], boxes of 64 x 64
    TensorMap b; // [64, K], boxes of 32 x 64
    TensorMap d; // [M, 64]: a @ b transposed
    u32 steps;   // K / 64
    u32 tiles;   // of 256 rows, which are a pair's
};

constexpr u32 BOX = 64 * 128;
constexpr u32 STAGES = 2;
// Of a stage: two boxes of a, then b.
constexpr u32 STAGE = 3 * BOX;
constexpr u32 STAGING = STAGES * STAGE;
constexpr u32 BARRIERS = STAGING + 2 * BOX;

struct PairPipeline {
    const PairPipelineParams &p;
    u32 base = shared_base();
    u32 rank = cluster_rank();

    u32 stage(u32 step) const { return base + step % STAGES * STAGE; }
    u32 full(u32 step) const { return base + BARRIERS + step % STAGES * 8; }
    u32 empty(u32 step) const { return full(step) + STAGES * 8; }
    // The first row of a warpgroup's part.
    int row(u32 tile, u32 group) const { return static_cast<int>(256 * tile + 128 * rank + 64 * group); }

    void produce() const {
        u32 step = 0;
        for (u32 tile = blockIdx.x / 2; tile < p.tiles; tile += gridDim.x / 2) {
            for (u32 k = 0; k < p.steps; ++k, ++step) {
                const int x = static_cast<int>(64 * k);
                barrier_wait(empty(step), (step / STAGES + 1) % 2);
                barrier_arrive_and_expect(full(step), STAGE);
                copy_box(stage(step), p.a, full(step), x, row(tile, 0), 0);
                copy_box(stage(step) + BOX, p.a, full(step), x, row(tile, 1), 0);
                copy_box_to(3u, stage(step) + 2 * BOX + rank * (BOX / 2), p.b, full(step), x,
                            static_cast<int>(32 * rank), 0);
            }
        }
        for (u32 i = 0; i < STAGES; ++i, ++step) {
            barrier_wait(empty(step), (step / STAGES + 1) % 2);
        }
    }

    void consume(u32 group) const {
        using Operand = Tile<128, 1024>;
        float d[32];
        u32 step = 0;
        for (u32 tile = blockIdx.x / 2; tile < p.tiles; tile += gridDim.x / 2) {
            for (u32 k = 0; k < p.steps; ++k, ++step) {
                barrier_wait(full(step), step / STAGES % 2);
                wgmma_fence();
                for (u32 k16 = 0; k16 < 4; ++k16) {
                    wgmma<bf16, 64>(d, Operand::at(stage(step) + group * BOX + 32 * k16),
                                    Operand::at(stage(step) + 2 * BOX + 32 * k16), k + k16 > 0);
                }
                wgmma_commit();
                // The stage before this one is done with.
                wgmma_wait<1>();
                if (k > 0) {
                    release(step - 1);
                }
            }
            wgmma_wait<0>();
            release(step - 1);
            finish(d, group, row(tile, group));
        }
    }

    void release(u32 step) const {
        if (threadIdx.x % 128 < 2) {
            barrier_arrive_at(empty(step), threadIdx.x % 128);
        }
    }

    void finish(const float (&d)[32], u32 group, int first) const {
        const u32 thread = threadIdx.x % 128, lane = thread % 32, line = thread / 32 * 16 + lane % 16;
        const u32 staging = base + STAGING + group * BOX;
        if (thread == 0) {
            wait_for_store_reads<0>();
        }
        named_barrier(1 + group, 128);
        for (u32 j = 0; j < 4; ++j) {
            const u32 matrices[4] = {pack<bf16>(d[8 * j], d[8 * j + 1]), pack<bf16>(d[8 * j + 2], d[8 * j + 3]),
                                     pack<bf16>(d[8 * j + 4], d[8 * j + 5]), pack<bf16>(d[8 * j + 6], d[8 * j + 7])};
            stmatrix<false>(staging + line * 128 + ((2 * j + lane / 16) ^ line % 8) * 16, matrices);
        }
        fence_async_proxy();
        named_barrier(1 + group, 128);
        if (thread == 0) {
            store_box(p.d, staging, 0, first, 0);
            commit_stores();
        }
    }

    void run() const {
        if (threadIdx.x == 0) {
            for (u32 i = 0; i < STAGES; ++i) {
                barrier_init(full(i), 1);
                barrier_init(empty(i), 4);
            }
            fence_barriers();
        }
        cluster_barrier();
        const u32 group = uniform(threadIdx.x / 128);
        if (group == 2) {
            shrink_registers<24>();
            if (threadIdx.x / 32 == 8 && elect()) {
                produce();
            }
            return;
        }
        grow_registers<240>();
        consume(group);
        if (threadIdx.x % 128 == 0) {
            wait_for_stores();
        }
    }
};

} // namespace
} // namespace pace::sm90

PACE_CLUSTER_KERNEL(pair_pipeline, pace::sm90::PairPipelineParams, 2, 384, 1) { pace::sm90::PairPipeline{p}.run(); }
