// A GEMM as kernels/sm80/mainloop.cuh makes it, in small, for the simulator's own tests: one that is right, and the same with
// one fault each.

#include "sm80/mma.cuh"

namespace pace::sm80 {
namespace {

struct ProductParams {
    const f16 *a; // [16, 128]
    const f16 *b; // [16, 128]
    float *y;     // [16, 16]: a times b transposed
};

enum class Seed {
    NOTHING,
    ROWS_SWAPPED,
    NO_WAIT,
    NO_BARRIER_BEFORE_USE,
    NO_BARRIER_AFTER_USE,
    LANE_LEAVES,
    FIRST_LANE_LEAVES,
    OTHER_PLACE,
    OTHER_OPERATION,
    OUT_OF_BOUNDS,
    MISALIGNED,
    CHUNK_NOT_COPIED,
};

constexpr u32 INNER = 128;
constexpr u32 STAGES = 3;
constexpr u32 TILES = INNER / 16;
constexpr u32 PART_BYTES = 16 * 16 * sizeof(f16);
constexpr u32 STAGE_BYTES = 2 * PART_BYTES;

// Two warps. The first copies a and the second b, 16 bytes each thread; both read all of a, and each its half of b.
template <Seed SEED> void small_product(const ProductParams &p) {
    PACE_SHARED(unsigned char, shared);
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const auto copy = [&](u32 tile) {
        if (tile < TILES && !(SEED == Seed::CHUNK_NOT_COPIED && thread == 3)) {
            const u32 row = lane / 2, chunk = lane % 2;
            const f16 *from = (warp == 0 ? p.a : p.b) + row * INNER + tile * 16 + chunk * 8;
            copy_async(shared + tile % STAGES * STAGE_BYTES + warp * PART_BYTES + lane * 16, from, 16u);
        }
        commit_copies();
    };
    for (u32 tile = 0; tile < STAGES - 1; ++tile) {
        copy(tile);
    }
    float c[1][4] = {};
    for (u32 tile = 0; tile < TILES; ++tile) {
        if (SEED != Seed::NO_WAIT) {
            wait_for_copies<STAGES - 2>();
        }
        // The stage of the tile before this one: others may still read it.
        if (SEED == Seed::NO_BARRIER_AFTER_USE) {
            copy(tile + STAGES - 1);
        }
        if (SEED != Seed::NO_BARRIER_BEFORE_USE) {
            __syncthreads();
        }
        if (SEED != Seed::NO_BARRIER_AFTER_USE) {
            copy(tile + STAGES - 1);
        }
        const unsigned char *left = shared + tile % STAGES * STAGE_BYTES, *right = left + PART_BYTES;
        const bool is_last = tile == TILES - 1;
        if (SEED == Seed::LANE_LEAVES && is_last && thread == 37) {
            return;
        }
        if (SEED == Seed::FIRST_LANE_LEAVES && is_last && thread == 32) {
            return;
        }
        const u32 row = SEED == Seed::ROWS_SWAPPED ? lane % 16 ^ 1 : lane % 16;
        const unsigned char *address = left + row * 32 + lane / 16 * 16;
        if (SEED == Seed::OUT_OF_BOUNDS && is_last && thread == 40) {
            address = shared + STAGES * STAGE_BYTES;
        }
        if (SEED == Seed::MISALIGNED && is_last && thread == 40) {
            address = shared + 8;
        }
        u32 a[4], bits[4];
        if (SEED == Seed::OTHER_PLACE && is_last && thread == 37) {
            ldmatrix(a, address, false);
        } else {
            ldmatrix(a, address, SEED == Seed::OTHER_OPERATION && is_last && thread == 37);
        }
        ldmatrix(bits, right + (8 * warp + lane % 8) * 32 + lane / 8 % 2 * 16, false);
        const u32 b[1][2] = {{bits[0], bits[1]}};
        mma<Atom16<f16>>(c, a, b);
    }
    for (u32 i = 0; i < 4; ++i) {
        store(p.y + (lane / 4 + i / 2 * 8) * 16 + 8 * warp + lane % 4 * 2 + i % 2, c[0][i]);
    }
}

} // namespace
} // namespace pace::sm80

using namespace pace;
using namespace pace::sm80;

PACE_KERNEL(product, ProductParams, 64) { small_product<Seed::NOTHING>(p); }

PACE_KERNEL(product_rows_swapped, ProductParams, 64) { small_product<Seed::ROWS_SWAPPED>(p); }

PACE_KERNEL(product_no_wait, ProductParams, 64) { small_product<Seed::NO_WAIT>(p); }

PACE_KERNEL(product_no_barrier_before_use, ProductParams, 64) { small_product<Seed::NO_BARRIER_BEFORE_USE>(p); }

PACE_KERNEL(product_no_barrier_after_use, ProductParams, 64) { small_product<Seed::NO_BARRIER_AFTER_USE>(p); }

PACE_KERNEL(product_lane_leaves, ProductParams, 64) { small_product<Seed::LANE_LEAVES>(p); }

PACE_KERNEL(product_first_lane_leaves, ProductParams, 64) { small_product<Seed::FIRST_LANE_LEAVES>(p); }

PACE_KERNEL(product_other_place, ProductParams, 64) { small_product<Seed::OTHER_PLACE>(p); }

PACE_KERNEL(product_other_operation, ProductParams, 64) { small_product<Seed::OTHER_OPERATION>(p); }

PACE_KERNEL(product_out_of_bounds, ProductParams, 64) { small_product<Seed::OUT_OF_BOUNDS>(p); }

PACE_KERNEL(product_misaligned, ProductParams, 64) { small_product<Seed::MISALIGNED>(p); }

PACE_KERNEL(product_chunk_not_copied, ProductParams, 64) { small_product<Seed::CHUNK_NOT_COPIED>(p); }
