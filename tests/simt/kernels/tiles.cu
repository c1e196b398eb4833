// One wgmma, for the simulator's own tests: on what the test puts into shared memory and into registers.

#include "sm90/ptx.cuh"

namespace pace::sm90 {
namespace {

struct TileParams {
    const uint16_t *shared; // what shared memory holds
    const u32 *a;      // [128, 4]: A registers of each thread
    const float *c;    // [128, n / 2]: accumulators
    float *d;          // the same afterwards
    u64 a_tile, b_tile;
    u32 elements; // of `shared`
    u32 n, is_bf16, in_registers, is_a_transposed, is_b_transposed, accumulate, is_fenced;
};

template <class T, u32 N> void one_wgmma(const TileParams &p) {
    const u32 thread = threadIdx.x;
    for (u32 i = thread; i < p.elements; i += WARPGROUP) {
        f16 element;
        element.bits = load(p.shared + i);
        store_shared_element(shared_base() + 2 * i, element);
    }
    if (p.is_fenced) {
        fence_async_proxy();
    }
    __syncthreads();
    u32 a[4];
    for (u32 i = 0; i < 4; ++i) {
        a[i] = load(p.a + 4 * thread + i);
    }
    float d[N / 2];
    for (u32 i = 0; i < N / 2; ++i) {
        d[i] = load(p.c + N / 2 * thread + i);
    }
    keep(d);
    wgmma_fence();
    const bool accumulate = p.accumulate != 0;
    if (p.in_registers && p.is_b_transposed) {
        wgmma<T, N, true>(d, a, p.b_tile, accumulate);
    } else if (p.in_registers) {
        wgmma<T, N>(d, a, p.b_tile, accumulate);
    } else if (p.is_a_transposed && p.is_b_transposed) {
        wgmma<T, N, true, true>(d, p.a_tile, p.b_tile, accumulate);
    } else if (p.is_a_transposed) {
        wgmma<T, N, true>(d, p.a_tile, p.b_tile, accumulate);
    } else if (p.is_b_transposed) {
        wgmma<T, N, false, true>(d, p.a_tile, p.b_tile, accumulate);
    } else {
        wgmma<T, N>(d, p.a_tile, p.b_tile, accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (u32 i = 0; i < N / 2; ++i) {
        store(p.d + N / 2 * thread + i, d[i]);
    }
}

template <class T> void of_type(const TileParams &p) {
    switch (p.n) {
    case 8:
        return one_wgmma<T, 8>(p);
    case 64:
        return one_wgmma<T, 64>(p);
    case 200:
        return one_wgmma<T, 200>(p);
    case 208:
        return one_wgmma<T, 208>(p);
    case 256:
        return one_wgmma<T, 256>(p);
    }
}

} // namespace
} // namespace pace::sm90

PACE_KERNEL(one_wgmma, pace::sm90::TileParams, 128) {
    p.is_bf16 ? pace::sm90::of_type<pace::bf16>(p) : pace::sm90::of_type<pace::f16>(p);
}
