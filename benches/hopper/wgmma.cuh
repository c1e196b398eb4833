// wgmma m64nNk16 with f32 accumulators, N = 200, 208 and 256, f16 and bf16, A from shared memory (ss) or registers (rs).

#pragma once

#include "probe.cuh"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads or writes of these registers across this line: it sees no dependence between them
// and the wait that makes them valid. After the last wait for accumulators, before the fence for fragments of A.
template <int N> __device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(u32 (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("" : "+r"(registers[i])::"memory");
}

// Descriptor of an operand in shared memory: swizzle mode (1: 128 B, 2: 64 B), leading and stride byte offsets / 16.
__host__ __device__ constexpr u64 descriptor_of(u32 mode, u32 leading, u32 stride) {
    return static_cast<u64>(leading & 0x3fff) << 16 | static_cast<u64>(stride & 0x3fff) << 32 | static_cast<u64>(mode) << 62;
}
// K-major tile with rows of `span` bytes: groups of 8 rows follow each other, the leading offset is ignored.
template <u32 SPAN> __device__ __forceinline__ u64 k_major(u32 address) {
    static_assert(SPAN == 128 || SPAN == 64);
    return descriptor_of(SPAN == 128 ? 1 : 2, 1, SPAN * 8 / 16) | (address & 0x3ffff) >> 4;
}

// Lists of operands.
#define OPERANDS_10(tens)                                                                                              \
    "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens  \
    "8, %" #tens "9"
#define OPERANDS_100                                                                                                   \
    OPERANDS_10() ", " OPERANDS_10(1) ", " OPERANDS_10(2) ", " OPERANDS_10(3) ", " OPERANDS_10(4) ", " OPERANDS_10(5)   \
    ", " OPERANDS_10(6) ", " OPERANDS_10(7) ", " OPERANDS_10(8) ", " OPERANDS_10(9)
#define OPERANDS_104 OPERANDS_100 ", %100, %101, %102, %103"
#define OPERANDS_128                                                                                                   \
    OPERANDS_100 ", " OPERANDS_10(10) ", " OPERANDS_10(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define REGISTERS_20(d, i)                                                                                             \
    REGISTERS_4(d, i), REGISTERS_4(d, (i) + 4), REGISTERS_4(d, (i) + 8), REGISTERS_4(d, (i) + 12), REGISTERS_4(d, (i) + 16)
#define REGISTERS_100(d)                                                                                               \
    REGISTERS_20(d, 0), REGISTERS_20(d, 20), REGISTERS_20(d, 40), REGISTERS_20(d, 60), REGISTERS_20(d, 80)
#define REGISTERS_104(d) REGISTERS_100(d), REGISTERS_4(d, 100)
#define REGISTERS_128(d) REGISTERS_100(d), REGISTERS_20(d, 100), REGISTERS_4(d, 120), REGISTERS_4(d, 124)

// D += A B (or D = A B where `add` is 0). Transposed operands are M-major or N-major in shared memory.
template <class T, int N> struct Wgmma;

// The numbers are those of the operands after the accumulators.
#define WGMMA(T, NAME, N, LIST, REGISTERS, I0, I1, I2, I3, I4, I5, I6)                                                 \
    template <> struct Wgmma<T, N> {                                                                                   \
        template <int TRANS_A, int TRANS_B>                                                                            \
        static __device__ __forceinline__ void ss(float (&d)[N / 2], u64 a, u64 b, int add) {                          \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, %" #I0 ", %" #I1 \
                         ", p, 1, 1, %" #I3 ", %" #I4 ";\n}"                                                           \
                         : REGISTERS(d)                                                                                \
                         : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));                                      \
        }                                                                                                              \
        template <int TRANS_B>                                                                                         \
        static __device__ __forceinline__ void rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int add) {              \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, {%" #I0         \
                         ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}"                            \
                         : REGISTERS(d)                                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B));                \
        }                                                                                                              \
    };

WGMMA(__nv_bfloat16, "bf16", 200, OPERANDS_100, REGISTERS_100, 100, 101, 102, 103, 104, 105, 106)
WGMMA(__nv_bfloat16, "bf16", 208, OPERANDS_104, REGISTERS_104, 104, 105, 106, 107, 108, 109, 110)
WGMMA(__nv_bfloat16, "bf16", 256, OPERANDS_128, REGISTERS_128, 128, 129, 130, 131, 132, 133, 134)
WGMMA(__half, "f16", 200, OPERANDS_100, REGISTERS_100, 100, 101, 102, 103, 104, 105, 106)
WGMMA(__half, "f16", 208, OPERANDS_104, REGISTERS_104, 104, 105, 106, 107, 108, 109, 110)
WGMMA(__half, "f16", 256, OPERANDS_128, REGISTERS_128, 128, 129, 130, 131, 132, 133, 134)
