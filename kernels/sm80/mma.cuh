// Tensor cores: cp.async, ldmatrix and mma.sync as compute capability 8.0 has them, and how storage types are multiplied.
//
// Fragments are those of the PTX ISA for mma.sync.m16n8k16 (f16, bf16) and m16n8k8 (tf32); accumulators are f32. With group
// g = lane / 4 and t = lane % 4 a lane holds of the accumulator [16, 8] rows g and g + 8, columns 2 t and 2 t + 1.
// The simulator of the tests brings host twins of the same layouts (tests/simt/include/sm80.h).

#ifndef PACE_SM80_MMA_CUH
#define PACE_SM80_MMA_CUH

#include "../noise.cuh"
#include "../storage.cuh"

#include <cstring>

#if defined(PACE_SIMT_H)

#include "sm80.h"

#else

namespace pace::sm80 {

__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Starts the copy of 16 bytes from global to shared memory, of which the first `bytes` (0 or 16) are read and the rest is
// zero.
__device__ __forceinline__ void copy_async(void *to, const void *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the last PENDING groups of this thread are under way.
template <u32 PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; `row` is the row that this lane gives the address of. Must be called by all
// lanes of the warp.
__device__ __forceinline__ void ldmatrix(u32 (&result)[4], const void *row, bool transposed) {
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

// MMA atoms: c += a @ b, [16, 16] x [16, 8] of a 16-bit type.
template <class T> struct Atom16;

template <> struct Atom16<f16> {
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

template <> struct Atom16<bf16> {
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

// The same, [16, 8] x [8, 8] of tf32.
struct AtomTf32 {
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

// c[n] += a @ b[n] for COUNT fragments b beside each other. Must be called by all lanes of the warp.
template <class Atom, u32 COUNT>
__device__ __forceinline__ void mma(float (&c)[COUNT][4], const u32 (&a)[4], const u32 (&b)[COUNT][2]) {
#pragma unroll
    for (u32 n = 0; n < COUNT; ++n) {
        Atom::mma(c[n], a, b[n]);
    }
}

// Rounded to the 10 fraction bits of tf32, to nearest, ties away from zero.
__device__ __forceinline__ u32 to_tf32(float value) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

} // namespace pace::sm80

#endif

namespace pace::sm80 {

// ---- elements of a 32-bit register of a fragment: 4 / sizeof(T) of T

using noise::detail::to_bits;

template <class T> __device__ __forceinline__ float element(u32 bits, u32 i) {
    T values[4 / sizeof(T)];
    memcpy(values, &bits, 4);
    return to_float(values[i]);
}

// z * element for each of them.
template <class T> __device__ __forceinline__ u32 scaled(u32 bits, float z0, float z1) {
    return pack<T>(z0 * element<T>(bits, 0), z1 * element<T>(bits, 1));
}

template <> __device__ __forceinline__ u32 scaled<float>(u32 bits, float z0, float) {
    return to_bits(z0 * element<float>(bits, 0));
}

// base + z * delta for each of them.
template <class T> __device__ __forceinline__ u32 folded(u32 base, u32 delta, float z) {
    return pack<T>(fmaf(z, element<T>(delta, 0), element<T>(base, 0)),
                   fmaf(z, element<T>(delta, 1), element<T>(base, 1)));
}

template <> __device__ __forceinline__ u32 folded<float>(u32 base, u32 delta, float z) {
    return to_bits(fmaf(z, element<float>(delta, 0), element<float>(base, 0)));
}

// ---- how storage types are multiplied
//
// Each of these structs has the storage type T, fragments A (16 rows) and B (COUNT times 8 columns) of 32 bytes of the inner
// dimension, and multiply: c[n] += a @ b[n].

// 16-bit types as they are.
template <class T_> struct SixteenBit {
    using T = T_;
    static constexpr u32 UNROLL = 2; // K steps of a tile that are unrolled
    struct FragmentA {
        u32 bits[4];
    };
    template <u32 COUNT> struct FragmentB {
        u32 bits[COUNT][2];
        __device__ __forceinline__ void set(u32 n, u32 first, u32 second) { bits[n][0] = first, bits[n][1] = second; }
        __device__ __forceinline__ void set_ones(u32 n) { set(n, pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f)); }
    };
    static __device__ __forceinline__ FragmentA fragment_a(const u32 (&bits)[4]) {
        return {{bits[0], bits[1], bits[2], bits[3]}};
    }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const FragmentA &a,
                                                    const FragmentB<COUNT> &b) {
        mma<Atom16<T>>(c, a.bits, b.bits);
    }
};

// f32 rounded to tf32 (10 fraction bits).
struct Tf32 {
    using T = float;
    static constexpr u32 UNROLL = 2;
    struct FragmentA {
        u32 bits[4];
    };
    static __device__ __forceinline__ u32 round(u32 bits) { return to_tf32(element<float>(bits, 0)); }
    template <u32 COUNT> struct FragmentB {
        u32 bits[COUNT][2];
        __device__ __forceinline__ void set(u32 n, u32 first, u32 second) {
            bits[n][0] = round(first), bits[n][1] = round(second);
        }
        __device__ __forceinline__ void set_ones(u32 n) { bits[n][0] = bits[n][1] = to_bits(1.0f); }
    };
    static __device__ __forceinline__ FragmentA fragment_a(const u32 (&bits)[4]) {
        return {{round(bits[0]), round(bits[1]), round(bits[2]), round(bits[3])}};
    }
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const FragmentA &a,
                                                    const FragmentB<COUNT> &b) {
        mma<AtomTf32>(c, a.bits, b.bits);
    }
};

// f32 as the sum of two tf32 numbers and three MMAs, which keeps f32 accuracy (Ootomo and Yokota 2022, arXiv 2203.03341).
struct Float32 {
    using T = float;
    static constexpr u32 UNROLL = 1; // or registers do not suffice
    struct FragmentA {
        u32 high[4], low[4];
    };
    static __device__ __forceinline__ void split(u32 bits, u32 &high, u32 &low) {
        const float value = element<float>(bits, 0);
        high = to_tf32(value);
        // An infinite value has no low part. Its products are infinite or NaN: here 0 * infinity adds to them.
        low = (high & 0x7f800000u) == 0x7f800000u ? 0u : to_tf32(value - element<float>(high, 0));
    }
    template <u32 COUNT> struct FragmentB {
        u32 high[COUNT][2], low[COUNT][2];
        __device__ __forceinline__ void set(u32 n, u32 first, u32 second) {
            split(first, high[n][0], low[n][0]);
            split(second, high[n][1], low[n][1]);
        }
        __device__ __forceinline__ void set_ones(u32 n) {
            high[n][0] = high[n][1] = to_bits(1.0f);
            low[n][0] = low[n][1] = 0u;
        }
    };
    static __device__ __forceinline__ FragmentA fragment_a(const u32 (&bits)[4]) {
        FragmentA a;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            split(bits[i], a.high[i], a.low[i]);
        }
        return a;
    }
    // Tensor cores truncate when they accumulate. They add up 8 products here, small ones first; the sums are added in fp32
    // registers, which round.
    template <u32 COUNT>
    static __device__ __forceinline__ void multiply(float (&c)[COUNT][4], const FragmentA &a,
                                                    const FragmentB<COUNT> &b) {
        float sum[COUNT][4] = {};
        mma<AtomTf32>(sum, a.low, b.high);
        mma<AtomTf32>(sum, a.high, b.low);
        mma<AtomTf32>(sum, a.high, b.high);
#pragma unroll
        for (u32 n = 0; n < COUNT; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                c[n][i] += sum[n][i];
            }
        }
    }
};

} // namespace pace::sm80

// The kernels NAME_f32, NAME_tf32, NAME_f16 and NAME_bf16: one body, in which Math is how the type is multiplied.
#define PACE_GEMM_KERNELS(name, Params, bounds, ...)                                                                   \
    PACE_KERNEL_OF(name##_f32, Params, bounds, Math, pace::sm80::Float32, __VA_ARGS__)                                 \
    PACE_KERNEL_OF(name##_tf32, Params, bounds, Math, pace::sm80::Tf32, __VA_ARGS__)                                   \
    PACE_KERNEL_OF(name##_f16, Params, bounds, Math, pace::sm80::SixteenBit<pace::f16>, __VA_ARGS__)                   \
    PACE_KERNEL_OF(name##_bf16, Params, bounds, Math, pace::sm80::SixteenBit<pace::bf16>, __VA_ARGS__)

#endif // PACE_SM80_MMA_CUH
