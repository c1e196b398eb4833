// Tensor cores and asynchronous copies: the few PTX instructions that the products use, for compute capability 8.0 and up.
//
// Fragments are those of the PTX ISA for mma.sync.m16n8k16 (f16, bf16) and m16n8k8 (tf32), accumulators are f32. With
// group g = lane / 4 and t = lane % 4 a lane holds of the accumulator [16, 8] rows g and g + 8, columns 2 t and 2 t + 1.
// The simulator of the tests brings host twins of the same layouts (tests/simt/include/sm80.h).

#ifndef PACE_SM80_MMA_CUH
#define PACE_SM80_MMA_CUH

#include "../noise.cuh"
#include "../storage.cuh"

#include <cstring>

#if defined(PACE_SIMT_H)

#include "sm80.h"

// The simulator wants to know where in the kernel lanes meet. A row of COUNT right fragments is one meeting.
#define PACE_LOAD_MATRICES(...) load_matrices_at(__FILE__, __LINE__, __VA_ARGS__)
#define PACE_MULTIPLY(Instruction, c, a, b, part)                                                                       \
    multiply_at<Instruction>(__FILE__, __LINE__, c, a, b, [](const auto &right) -> const u32(&)[2] { return right.part; })

namespace pace::sm80 {

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

} // namespace pace::sm80

#else

#define PACE_LOAD_MATRICES(...) load_matrices(__VA_ARGS__)
#define PACE_MULTIPLY(Instruction, c, a, b, part)                                                                       \
    _Pragma("unroll") for (u32 i = 0; i < COUNT; ++i) { Instruction::multiply(c[i], a, b[i].part); }

namespace pace::sm80 {

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

} // namespace pace::sm80

#endif

namespace pace::sm80 {

// A register of a fragment holds 4 / sizeof(T) elements of T.
template <class T> __device__ __forceinline__ float unpack(u32 bits, u32 i) {
    T values[4 / sizeof(T)];
    memcpy(values, &bits, 4);
    return to_float(values[i]);
}

using noise::detail::to_bits;

// z * element for each element of a register.
template <class T> __device__ __forceinline__ u32 scaled(u32 bits, float z0, float z1) {
    return pack<T>(z0 * unpack<T>(bits, 0), z1 * unpack<T>(bits, 1));
}

template <> __device__ __forceinline__ u32 scaled<float>(u32 bits, float z0, float) {
    return to_bits(z0 * unpack<float>(bits, 0));
}

// base + z * delta for each element of a register.
template <class T> __device__ __forceinline__ u32 folded(u32 base, u32 delta, float z) {
    return pack<T>(fmaf(z, unpack<T>(delta, 0), unpack<T>(base, 0)), fmaf(z, unpack<T>(delta, 1), unpack<T>(base, 1)));
}

template <> __device__ __forceinline__ u32 folded<float>(u32 base, u32 delta, float z) {
    return to_bits(fmaf(z, unpack<float>(delta, 0), unpack<float>(base, 0)));
}

template <class T_> struct SixteenBit {
    using T = T_;
    static constexpr u32 UNROLL = 2; // of steps in a tile
    struct Left {
        u32 value[4];
    };
    struct Right {
        u32 value[2];
    };
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) { return {{bits[0], bits[1], bits[2], bits[3]}}; }
    static __device__ __forceinline__ Right right(u32 first, u32 second) { return {{first, second}}; }
    static __device__ __forceinline__ Right ones() { return {{pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f)}}; }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        PACE_MULTIPLY(Mma16<T>, c, a.value, b, value);
    }
};

struct Tf32 {
    using T = float;
    static constexpr u32 UNROLL = 2;
    struct Left {
        u32 value[4];
    };
    struct Right {
        u32 value[2];
    };
    static __device__ __forceinline__ u32 round(u32 bits) { return to_tf32(unpack<float>(bits, 0)); }
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) {
        return {{round(bits[0]), round(bits[1]), round(bits[2]), round(bits[3])}};
    }
    static __device__ __forceinline__ Right right(u32 first, u32 second) { return {{round(first), round(second)}}; }
    static __device__ __forceinline__ Right ones() { return {{to_bits(1.0f), to_bits(1.0f)}}; }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        PACE_MULTIPLY(MmaTf32, c, a.value, b, value);
    }
};

struct Float32 {
    using T = float;
    static constexpr u32 UNROLL = 1; // or registers do not suffice
    struct Left {
        u32 high[4], low[4];
    };
    struct Right {
        u32 high[2], low[2];
    };
    static __device__ __forceinline__ void split(u32 bits, u32 &high, u32 &low) {
        const float value = unpack<float>(bits, 0);
        high = to_tf32(value);
        // An infinite value has no low part. Its products are infinite or NaN: here 0 * infinity adds to them.
        low = (high & 0x7f800000u) == 0x7f800000u ? 0u : to_tf32(value - unpack<float>(high, 0));
    }
    static __device__ __forceinline__ Left left(const u32 (&bits)[4]) {
        Left result;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            split(bits[i], result.high[i], result.low[i]);
        }
        return result;
    }
    static __device__ __forceinline__ Right right(u32 first, u32 second) {
        Right result;
        split(first, result.high[0], result.low[0]);
        split(second, result.high[1], result.low[1]);
        return result;
    }
    static __device__ __forceinline__ Right ones() { return {{to_bits(1.0f), to_bits(1.0f)}, {0u, 0u}}; }
    // Tensor cores cut off what does not fit the accumulator, so that long sums would shrink: they add up 8 products only, small
    // ones first, and the sums go on in the registers.
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const Left &a, const Right (&b)[COUNT]) {
        float sum[COUNT][4] = {};
        PACE_MULTIPLY(MmaTf32, sum, a.low, b, high);
        PACE_MULTIPLY(MmaTf32, sum, a.high, b, low);
        PACE_MULTIPLY(MmaTf32, sum, a.high, b, high);
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                c[i][j] += sum[i][j];
            }
        }
    }
};

} // namespace pace::sm80

#endif // PACE_SM80_MMA_CUH
