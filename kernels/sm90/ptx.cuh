// What compute capability 9.0a has: warpgroup MMA (wgmma), tensor copies (TMA), mbarriers and clusters, one function each.
//
// Shared memory is addressed by 32-bit numbers, as these instructions do; `shared_base()` is the start of the block's dynamic
// shared memory, a multiple of 1024. Everything else that a kernel needs of it goes through `load_shared` and `store_shared`.
// The simulator of the tests brings host twins of all of this (tests/simt/include/sm90.h), and finds out what the hardware
// would not: registers or memory touched while an asynchronous instruction still uses them, missing fences and waits.

#ifndef PACE_SM90_PTX_CUH
#define PACE_SM90_PTX_CUH

#include "../params.h"
#include "../storage.cuh"

#include <cstring>

namespace pace::sm90 {

// Lanes of a warpgroup, which wgmma takes together.
constexpr u32 WARPGROUP = 128;

// Four floats beside each other.
struct alignas(16) Four {
    float value[4];
};

} // namespace pace::sm90

#if defined(PACE_SIMT_H)

#include "sm90.h"

#else

#include "wgmma.cuh"

// A kernel whose blocks run in clusters of CLUSTER along x.
#define PACE_CLUSTER_KERNEL(name, Params, CLUSTER, ...)                                                                \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(__VA_ARGS__)                          \
        name(const __grid_constant__ Params p)

namespace pace::sm90 {

extern __shared__ __align__(1024) unsigned char swizzled_shared[];

// ---- places

__device__ __forceinline__ u32 shared_base() { return static_cast<u32>(__cvta_generic_to_shared(swizzled_shared)); }

// The block's number in its cluster.
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The same value in every lane, as lane 0 has it: the compiler keeps it in a uniform register.
__device__ __forceinline__ u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// True in one lane of the warp. Must be called by all of its lanes together.
__device__ __forceinline__ bool elect() {
    u32 elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0u;
}

// ---- registers

// Changes how many registers a thread has; by all warps of a warpgroup.
template <u32 COUNT> __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <u32 COUNT> __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Keeps the compiler from moving accesses to these registers across this point.
template <u32 COUNT> __device__ __forceinline__ void keep(float (&registers)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}
template <u32 COUNT> __device__ __forceinline__ void keep(u32 (&registers)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        asm volatile("" : "+r"(registers[i])::"memory");
    }
}

// ---- shared memory, through the generic proxy

__device__ __forceinline__ float load_shared(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ u32 load_shared_word(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_word(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// A multiple of 8.
__device__ __forceinline__ Pair load_shared_pair(u32 address) {
    Pair pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(pair.value[0]), "=f"(pair.value[1])
                 : "r"(address)
                 : "memory");
    return pair;
}

// A multiple of 16.
__device__ __forceinline__ Four load_shared_four(u32 address) {
    Four four;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four.value[0]), "=f"(four.value[1]), "=f"(four.value[2]), "=f"(four.value[3])
                 : "r"(address)
                 : "memory");
    return four;
}

__device__ __forceinline__ void store_shared_four(u32 address, const Four &four) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(four.value[0]), "f"(four.value[1]),
                 "f"(four.value[2]), "f"(four.value[3])
                 : "memory");
}

// A 16-bit type.
template <class T> __device__ __forceinline__ void store_shared_element(u32 address, T value) {
    static_assert(sizeof(T) == 2, "a 16-bit type");
    const unsigned short bits = *reinterpret_cast<const unsigned short *>(&value);
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j brings the address of row j of matrix i. Lane t gets of matrix i the
// elements 2 (t % 4) and the next of row t / 4; TRANSPOSED: of column t / 4.
template <bool TRANSPOSED> __device__ __forceinline__ void ldmatrix(u32 (&result)[4], u32 row) {
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                     : "r"(row)
                     : "memory");
    }
}

// The reverse for COUNT matrices, 2 or 4; with 2 the addresses of lanes 16 and up are ignored.
template <bool TRANSPOSED> __device__ __forceinline__ void stmatrix(u32 row, const u32 (&matrices)[4]) {
    if (TRANSPOSED) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                     "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(matrices[0]),
                     "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                     : "memory");
    }
}
template <bool TRANSPOSED> __device__ __forceinline__ void stmatrix(u32 row, const u32 (&matrices)[2]) {
    if (TRANSPOSED) {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(matrices[0]),
                     "r"(matrices[1])
                     : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(matrices[0]),
                     "r"(matrices[1])
                     : "memory");
    }
}

// ---- barriers

// Named barrier `id`, 1 to 15, of `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mbarriers: 8 bytes of shared memory that count arrivals and bytes, phase after phase.

// By one thread; `fence_barriers` and a barrier of all threads follow.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes what this thread has initialised visible to copies and to other blocks of the cluster.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void barrier_arrive_and_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier in the same place of block `rank` of the cluster. Without a scope it publishes nothing to other blocks, who
// only learn that this one has read; with `.release.cluster` it would be a memory barrier of the whole device.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// Waits until the phase of this parity has completed: phases have parities 0, 1, 0, ..., and the one before the first counts as
// completed with parity 1.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra WAIT_%=; }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

// ---- the async proxy: TMA and wgmma's reads

// What this thread has written to shared memory becomes visible to the async proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts the copy of a box, whose lowest corner has these coordinates, to `to`, and makes the barrier count its bytes: all of the
// box, although what lies outside the tensor is not read and becomes zero. By one thread.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same to `to` of each block of the cluster whose bit in `ranks` is set, and to its barrier in the same place.
__device__ __forceinline__ void copy_box_to(u32 ranks, u32 to, const TensorMap &map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(static_cast<unsigned short>(ranks))
        : "memory");
}

// Starts the copy of a box from `from`; what lies outside the tensor is not written. By one thread.
__device__ __forceinline__ void store_box(const TensorMap &map, u32 from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(from), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Closes a group of this thread's stores.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until no more than the last PENDING groups of this thread still read shared memory.
template <u32 PENDING> __device__ __forceinline__ void wait_for_store_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until all stores of this thread are done.
__device__ __forceinline__ void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- wgmma

// Orders accesses to registers before wgmma's: before the first one, and whenever an accumulator or an A fragment was touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of wgmmas.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until no more than the last PENDING groups are under way. Until then their accumulators, A fragments and tiles in shared
// memory must not be touched.
template <u32 PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d = a @ b, plus d if `accumulate`: [64, 16] x [16, N], operands by descriptors of tiles in shared memory. An operand is K-major,
// or TRANS if its other index is the one along memory. Lane t = lane % 4, g = lane / 4 of warp w holds of d
//   d[4 j + 2 h + i] = D[16 w + g + 8 h][8 j + 2 t + i]
template <class T, u32 N, bool TRANS_A = false, bool TRANS_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    Wgmma<T, N>::template ss<TRANS_A, TRANS_B>(d, a, b, accumulate);
}

// The same with a in registers: a[j] = A[16 w + g + 8 (j % 2)][2 t + 8 (j / 2) + {0, 1}].
template <class T, u32 N, bool TRANS_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
    Wgmma<T, N>::template rs<TRANS_B>(d, a, b, accumulate);
}

// ---- mma.sync, for what is too small for wgmma: c += a @ b, [16, 16] x [16, 8]

template <class T> __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace pace::sm90

#endif

// The kernels NAME_f16 and NAME_bf16, in clusters, with one body, in which T is the type; `bounds` as in storage.cuh.
#define PACE_CLUSTER_KERNEL_OF(name, Params, CLUSTER, bounds, Type, ...)                                               \
    PACE_CLUSTER_KERNEL(name, Params, CLUSTER, PACE_WITHOUT_PARENTHESES bounds) {                                      \
        using T = Type;                                                                                                \
        __VA_ARGS__;                                                                                                   \
    }
#define PACE_CLUSTER_KERNELS_16(name, Params, CLUSTER, bounds, ...)                                                    \
    PACE_CLUSTER_KERNEL_OF(name##_f16, Params, CLUSTER, bounds, pace::f16, __VA_ARGS__)                                \
    PACE_CLUSTER_KERNEL_OF(name##_bf16, Params, CLUSTER, bounds, pace::bf16, __VA_ARGS__)

namespace pace::sm90 {

// ---- descriptors of tiles in shared memory, which wgmma reads

// Bits of a tile's descriptor but its address: how it is swizzled, and distances in bytes. K-major with a swizzle of SPAN bytes, a
// row is SPAN bytes long and GROUP = 8 SPAN is the distance of 8 rows; PANEL counts only for transposed operands, as the distance
// of panels of SPAN bytes.
template <u32 SPAN, u32 GROUP, u32 PANEL = 16> struct Tile {
    static_assert(SPAN == 64 || SPAN == 128, "a swizzle's span");
    static constexpr u64 BITS = static_cast<u64>(SPAN == 128 ? 1 : 2) << 62 | static_cast<u64>(GROUP >> 4) << 32 |
                                static_cast<u64>(PANEL >> 4) << 16;
    // Of the tile or the part of one at this address.
    static __device__ __forceinline__ u64 at(u32 address) { return BITS | (address & 0x3ffffu) >> 4; }
};

// The descriptor of the part so many bytes behind: no carry leaves the address.
__device__ __forceinline__ u64 behind(u64 descriptor, u32 bytes) {
    return (descriptor & 0xffffffff00000000u) | (static_cast<u32>(descriptor) + (bytes >> 4));
}

} // namespace pace::sm90

#endif // PACE_SM90_PTX_CUH
