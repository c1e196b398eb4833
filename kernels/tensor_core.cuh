// Tensor cores and asynchronous copies: the few PTX instructions that the products use, for compute capability 8.0 and up.
//
// Fragments are those of the PTX ISA for mma.sync.m16n8k16 (f16, bf16) and m16n8k8 (tf32), accumulators are f32. With
// group g = lane / 4 and t = lane % 4 a lane holds of the accumulator [16, 8] rows g and g + 8, columns 2 t and 2 t + 1.
// The simulator of the tests brings host twins of the same layouts (tests/simt/include/tensor_core.h).

#ifndef PACE_TENSOR_CORE_CUH
#define PACE_TENSOR_CORE_CUH

#include "storage.cuh"

#if defined(PACE_SIMT_H)

#include "tensor_core.h"

// The simulator wants to know where in the kernel lanes meet. A row of COUNT right fragments is one meeting.
#define PACE_LOAD_MATRICES(...) load_matrices_at(__FILE__, __LINE__, __VA_ARGS__)
#define PACE_MULTIPLY(Instruction, c, a, b, part)                                                                       \
    multiply_at<Instruction>(__FILE__, __LINE__, c, a, b, [](const auto &right) -> const u32(&)[2] { return right.part; })

namespace pace {

template <class T> using Mma16 = simt::Mma16<T>;
using MmaTf32 = simt::MmaTf32;

// 16 bytes from global to shared memory, of which the first `bytes` (0 or 16) are read and the rest is zero.
inline void copy_async(void *to, const void *from, u32 bytes) { pace_simt_copy_async(to, from, bytes); }
// Closes a group of copies.
inline void commit_copies() { pace_simt_commit_copies(); }
// Waits until no more than the last PENDING groups of this thread are under way.
template <u32 PENDING> void wait_for_copies() { pace_simt_wait_for_copies(PENDING); }

// Two floats rounded to T, `low` in the lower half.
template <class T> u32 pack(float low, float high) {
    const T halves[2] = {from_float<T>(low), from_float<T>(high)};
    u32 bits;
    std::memcpy(&bits, halves, 4);
    return bits;
}

// Rounded to the 10 fraction bits of tf32, to nearest, ties away from zero.
inline u32 to_tf32(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

} // namespace pace

#else

#define PACE_LOAD_MATRICES(...) load_matrices(__VA_ARGS__)
#define PACE_MULTIPLY(Instruction, c, a, b, part)                                                                       \
    _Pragma("unroll") for (u32 i = 0; i < COUNT; ++i) { Instruction::multiply(c[i], a, b[i].part); }

namespace pace {

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async(void *to, const void *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&result)[4], const void *row, bool transposed) {
    if (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// c += a * b, [16, 16] x [16, 8] of a 16-bit type.
template <class T> struct Mma16;

template <> struct Mma16<f16> {
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

template <> struct Mma16<bf16> {
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

// c += a * b, [16, 8] x [8, 8].
struct MmaTf32 {
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

template <class T> __device__ __forceinline__ u32 pack(float low, float high);

template <> __device__ __forceinline__ u32 pack<f16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ u32 to_tf32(float value) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

} // namespace pace

#endif

#endif // PACE_TENSOR_CORE_CUH
