// CUDA's keywords and intrinsics for the host compiler, so that kernels/*.cu runs thread by thread on a CPU.
//
// Included before everything else by the build script. Every CUDA thread is a coroutine (src/machine.rs); the functions
// declared here (src/hooks.rs) are its way back to the scheduler. Threads switch only at barriers and warp exchanges.
// Shared memory is dynamic only (PACE_SHARED): the simulator poisons it and watches its ends, which it cannot do with
// static arrays.

#ifndef PACE_SIMT_H
#define PACE_SIMT_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__

struct uint3 {
    unsigned x, y, z;
};

struct pace_simt_coordinates {
    uint3 thread, block, block_dim, grid_dim;
};

extern "C" {
// The same for all of a thread's life, so one call will do.
__attribute__((const)) const pace_simt_coordinates *pace_simt_thread();
__attribute__((const)) unsigned char *pace_simt_shared();
void pace_simt_barrier(const char *file, unsigned line);
// Waits for the lanes in `mask`, then returns what lane `source` gave.
uint64_t pace_simt_exchange(const char *file, unsigned line, unsigned mask, unsigned source, uint64_t value);
void pace_simt_access(const void *address, size_t bytes, bool is_write);
}

#define threadIdx (pace_simt_thread()->thread)
#define blockIdx (pace_simt_thread()->block)
#define blockDim (pace_simt_thread()->block_dim)
#define gridDim (pace_simt_thread()->grid_dim)

// A kernel is a function on its parameters; the build script finds the name and declares these functions to Rust.
#define PACE_SIMT_KERNEL(name, Params, CLUSTER)                                                                        \
    static void name(const Params &p);                                                                                 \
    extern "C" void pace_simt_run_##name(const void *params) { name(*static_cast<const Params *>(params)); }           \
    extern "C" size_t pace_simt_bytes_##name() { return sizeof(Params); }                                              \
    extern "C" unsigned pace_simt_cluster_##name() { return CLUSTER; }                                                 \
    static void name(const Params &p)
#define PACE_KERNEL(name, Params, ...) PACE_SIMT_KERNEL(name, Params, 1)

#define PACE_ACCESS(address, bytes, is_write) pace_simt_access(address, bytes, is_write)
#define PACE_SHARED(T, name) T *name = reinterpret_cast<T *>(pace_simt_shared())

#define __syncthreads() pace_simt_barrier(__FILE__, __LINE__)
#define __syncwarp(mask) pace::simt::sync_warp(__FILE__, __LINE__, mask)
#define __shfl_sync(...) pace::simt::shuffle(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) pace::simt::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) pace::simt::shuffle_down(__FILE__, __LINE__, __VA_ARGS__)

// Blocks run one after the other, and a thread is interrupted at switch points only.
#define __threadfence() static_cast<void>(0)

inline unsigned atomicInc(unsigned *address, unsigned last) {
    const unsigned before = *address;
    *address = before >= last ? 0 : before + 1;
    return before;
}

inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

namespace pace {
namespace simt {

inline unsigned lane() {
    const pace_simt_coordinates &at = *pace_simt_thread();
    return (at.thread.x + at.block_dim.x * (at.thread.y + at.block_dim.y * at.thread.z)) % 32u;
}

inline void sync_warp(const char *file, unsigned line, unsigned mask) {
    pace_simt_exchange(file, line, mask, lane(), 0);
}

template <class T> T exchange(const char *file, unsigned line, unsigned mask, unsigned source, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = pace_simt_exchange(file, line, mask, source, bits);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// `width`: the warp acts as groups of this many lanes, a power of two.
template <class T>
T shuffle(const char *file, unsigned line, unsigned mask, T value, unsigned source, unsigned width = 32) {
    return exchange(file, line, mask, (lane() & ~(width - 1u)) | (source & (width - 1u)), value);
}

template <class T>
T shuffle_xor(const char *file, unsigned line, unsigned mask, T value, unsigned bits, unsigned width = 32) {
    const unsigned last = lane() | (width - 1u), source = lane() ^ bits;
    return exchange(file, line, mask, source <= last ? source : lane(), value);
}

template <class T>
T shuffle_down(const char *file, unsigned line, unsigned mask, T value, unsigned delta, unsigned width = 32) {
    const unsigned last = lane() | (width - 1u), source = lane() + delta;
    return exchange(file, line, mask, source <= last ? source : lane(), value);
}

} // namespace simt
} // namespace pace

#endif // PACE_SIMT_H
