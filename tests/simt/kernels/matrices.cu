// ldmatrix, stmatrix and mma.sync by shared addresses, for the simulator's own tests.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct MatrixParams {
    const u32 *x; // [32, 4] registers
    u32 *y;       // [256] words of shared memory, or [32, 4] registers
};

// Row j of matrix i lies at 16-byte line (8 i + j) * 5 % 64.
u32 line(u32 row) { return shared_base() + row * 5 % 64 * 16; }

template <bool TRANSPOSED, u32 COUNT> void store_matrices(const MatrixParams &p) {
    const u32 lane = threadIdx.x;
    for (u32 i = 0; i < 8; ++i) {
        store_shared(shared_base() + 4 * (8 * lane + i), 0.0f);
    }
    u32 registers[COUNT];
    for (u32 i = 0; i < COUNT; ++i) {
        registers[i] = load(p.x + 4 * lane + i);
    }
    __syncwarp(0xffffffffu);
    // Lanes past 8 COUNT bring addresses that nobody looks at.
    stmatrix<TRANSPOSED>(lane < 8 * COUNT ? line(lane) : 3u, registers);
    for (u32 i = 0; i < 8; ++i) {
        const float word = load_shared(shared_base() + 4 * (8 * lane + i));
        u32 bits;
        std::memcpy(&bits, &word, 4);
        store(p.y + 8 * lane + i, bits);
    }
}

// Stores four matrices and loads them again.
template <bool TRANSPOSED> void store_and_load(const MatrixParams &p) {
    u32 registers[4];
    for (u32 i = 0; i < 4; ++i) {
        registers[i] = load(p.x + 4 * threadIdx.x + i);
    }
    stmatrix<TRANSPOSED>(line(threadIdx.x), registers);
    u32 result[4];
    ldmatrix<TRANSPOSED>(result, line(threadIdx.x));
    for (u32 i = 0; i < 4; ++i) {
        store(p.y + 4 * threadIdx.x + i, result[i]);
    }
}

// c = 1 + a @ b, where the first registers are a, and b the first two of them.
template <class T> void multiply_small(const MatrixParams &p) {
    u32 a[4];
    for (u32 i = 0; i < 4; ++i) {
        a[i] = load(p.x + 4 * threadIdx.x + i);
    }
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma<T>(c, a, a[0], a[1]);
    for (u32 i = 0; i < 4; ++i) {
        u32 bits;
        std::memcpy(&bits, &c[i], 4);
        store(p.y + 4 * threadIdx.x + i, bits);
    }
}

} // namespace
} // namespace pace::sm90

using namespace pace;
using namespace pace::sm90;

PACE_KERNEL(store_four, MatrixParams, 32) { store_matrices<false, 4>(p); }

PACE_KERNEL(store_four_transposed, MatrixParams, 32) { store_matrices<true, 4>(p); }

PACE_KERNEL(store_two, MatrixParams, 32) { store_matrices<false, 2>(p); }

PACE_KERNEL(store_two_transposed, MatrixParams, 32) { store_matrices<true, 2>(p); }

PACE_KERNEL(store_and_load_four, MatrixParams, 32) { store_and_load<false>(p); }

PACE_KERNEL(store_and_load_four_transposed, MatrixParams, 32) { store_and_load<true>(p); }

PACE_KERNEL(multiply_small_f16, MatrixParams, 32) { multiply_small<f16>(p); }

PACE_KERNEL(multiply_small_bf16, MatrixParams, 32) { multiply_small<bf16>(p); }
