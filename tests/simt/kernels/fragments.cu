// What the host twins of tensor cores and asynchronous copies do, for the simulator's own tests: each lane writes out the
// registers that it holds.

#include "sm80/mma.cuh"

namespace pace::sm80 {
namespace {

struct FragmentParams {
    const u32 *x;
    u32 *y;
};

// x: 32 rows of 16 bytes, then for each lane the row that it gives the address of. y: 4 registers of each lane.
template <bool TRANSPOSED> void load_fragment(const FragmentParams &p) {
    PACE_SHARED(u32, rows);
    const u32 lane = threadIdx.x;
    for (u32 i = 0; i < 4; ++i) {
        rows[4 * lane + i] = load(p.x + 4 * lane + i);
    }
    __syncthreads();
    u32 result[4];
    ldmatrix(result, rows + 4 * load(p.x + 128 + lane), TRANSPOSED);
    for (u32 i = 0; i < 4; ++i) {
        store(p.y + 4 * lane + i, result[i]);
    }
}

// x: of each lane 4 registers of a, 2 of each of two b, 4 of each of two c. y: those of c += a * b.
template <class Atom> void multiply_fragments(const FragmentParams &p) {
    constexpr u32 COUNT = 2;
    const u32 *x = p.x + 16 * threadIdx.x;
    u32 a[4];
    u32 b[COUNT][2];
    float c[COUNT][4];
    for (u32 i = 0; i < 4; ++i) {
        a[i] = load(x + i);
        b[i / 2][i % 2] = load(x + 4 + i);
    }
    for (u32 i = 0; i < 8; ++i) {
        const u32 bits = load(x + 8 + i);
        std::memcpy(&c[i / 4][i % 4], &bits, 4);
    }
    mma<Atom>(c, a, b);
    for (u32 i = 0; i < 8; ++i) {
        u32 bits;
        std::memcpy(&bits, &c[i / 4][i % 4], 4);
        store(p.y + 8 * threadIdx.x + i, bits);
    }
}

float number(const u32 *x) {
    const u32 bits = load(x);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// y: pairs of floats of x in one register.
template <class T> void pack_pair(const FragmentParams &p) {
    store(p.y + threadIdx.x, pack<T>(number(p.x + 2 * threadIdx.x), number(p.x + 2 * threadIdx.x + 1)));
}

} // namespace
} // namespace pace::sm80

using namespace pace;
using namespace pace::sm80;

PACE_KERNEL(load_plain, FragmentParams, 32) { load_fragment<false>(p); }

PACE_KERNEL(load_transposed, FragmentParams, 32) { load_fragment<true>(p); }

PACE_KERNEL(multiply_f16, FragmentParams, 32) { multiply_fragments<Atom16<f16>>(p); }

PACE_KERNEL(multiply_bf16, FragmentParams, 32) { multiply_fragments<Atom16<bf16>>(p); }

PACE_KERNEL(multiply_tf32, FragmentParams, 32) { multiply_fragments<AtomTf32>(p); }

PACE_KERNEL(round_to_tf32, FragmentParams, 32) { store(p.y + threadIdx.x, to_tf32(number(p.x + threadIdx.x))); }

PACE_KERNEL(pack_f16, FragmentParams, 32) { pack_pair<f16>(p); }

PACE_KERNEL(pack_bf16, FragmentParams, 32) { pack_pair<bf16>(p); }

// y: 16 bytes of x from even lanes, zeros from odd ones.
PACE_KERNEL(copy_every_other, FragmentParams, 32) {
    PACE_SHARED(u32, words);
    const u32 lane = threadIdx.x;
    copy_async(words + 4 * lane, p.x + 4 * lane, lane % 2 == 0 ? 16u : 0u);
    commit_copies();
    wait_for_copies<0>();
    for (u32 i = 0; i < 4; ++i) {
        store(p.y + 4 * lane + i, words[4 * lane + i]);
    }
}

// Copies 16 bytes in one group and 16 in the next. y: a word of each when all but the last group was waited for, and of
// the second when that was as well.
PACE_KERNEL(copy_in_groups, FragmentParams, 32) {
    PACE_SHARED(u32, words);
    u32 *first = words + 8 * threadIdx.x;
    u32 *second = first + 4;
    copy_async(first, p.x + 8 * threadIdx.x, 16u);
    commit_copies();
    copy_async(second, p.x + 8 * threadIdx.x + 4, 16u);
    commit_copies();
    wait_for_copies<1>();
    store(p.y + 3 * threadIdx.x, first[0]);
    store(p.y + 3 * threadIdx.x + 1, second[0]);
    wait_for_copies<0>();
    store(p.y + 3 * threadIdx.x + 2, second[0]);
}
