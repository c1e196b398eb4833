// How kernels are declared and how they touch memory: storage types f32, f16 and bf16, single elements and 16-byte
// vectors.
//
// All global memory is read and written through `load`, `store`, `load_vector`, `store_vector` and `count_up`. The
// compiler sees plain accesses; the simulator of the tests (tests/simt) sees each one and checks bounds, alignment and
// whether what is read was ever written. Arithmetic is in f32: `to_float` is exact, `from_float` rounds once, to nearest
// even.

#ifndef PACE_STORAGE_CUH
#define PACE_STORAGE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

// A kernel takes one parameter struct by value, `p`, from params.h. What follows is the number of
// threads in the largest block that plans ask for and, if it matters, of blocks that a multiprocessor has to have room for.
// The simulator brings its own definition.
#if !defined(PACE_KERNEL)
#define PACE_KERNEL(name, Params, ...)                                                                                 \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Params p)
#endif

// One kernel per storage type, NAME_f32, NAME_f16 and NAME_bf16, with one body, in which T is the type. `bounds` are those of
// PACE_KERNEL in parentheses; types with different bounds have lines of their own. build/kernels.rs reads the names from lines
// that begin with one of these macros.
#define PACE_KERNEL_OF(name, Params, bounds, Alias, Type, ...)                                                         \
    PACE_KERNEL(name, Params, PACE_WITHOUT_PARENTHESES bounds) {                                                       \
        using Alias = Type;                                                                                            \
        __VA_ARGS__;                                                                                                   \
    }
#define PACE_WITHOUT_PARENTHESES(...) __VA_ARGS__
#define PACE_KERNELS_F32(name, Params, bounds, ...) PACE_KERNEL_OF(name##_f32, Params, bounds, T, float, __VA_ARGS__)
#define PACE_KERNELS_16(name, Params, bounds, ...)                                                                     \
    PACE_KERNEL_OF(name##_f16, Params, bounds, T, pace::f16, __VA_ARGS__)                                              \
    PACE_KERNEL_OF(name##_bf16, Params, bounds, T, pace::bf16, __VA_ARGS__)
#define PACE_KERNELS(name, Params, bounds, ...)                                                                        \
    PACE_KERNELS_F32(name, Params, bounds, __VA_ARGS__)                                                                \
    PACE_KERNELS_16(name, Params, bounds, __VA_ARGS__)

// The block's dynamic shared memory as an array of T; the simulator brings its own definition.
#if !defined(PACE_SHARED)
extern __shared__ __align__(128) unsigned char pace_shared[];
#define PACE_SHARED(T, name) T *name = reinterpret_cast<T *>(pace_shared)
#endif

// Called before each access; the simulator brings its own definition.
#if !defined(PACE_ACCESS)
#define PACE_ACCESS(address, bytes, is_write) static_cast<void>(0)
#endif

namespace pace {

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Pointers in parameter structs (params.h).
template <class T> using Input = const T *;
template <class T> using Output = T *;
// A tensor map there: kernels only pass its address on.
struct alignas(64) TensorMap {
    u64 words[16];
};

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(f16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ f16 from_float<f16>(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }

// Two floats, and two elements of a 16-bit type in a word, the first in its lower half.
struct alignas(8) Pair {
    float value[2];
};

template <class T> __device__ __forceinline__ Pair unpack(u32 word) {
    T values[2];
    memcpy(values, &word, sizeof word);
    return Pair{{to_float(values[0]), to_float(values[1])}};
}
// An f32 of the same bits above: a shift, and a mask.
template <> __device__ __forceinline__ Pair unpack<bf16>(u32 word) {
    const u32 words[2] = {word << 16, word & 0xffff0000u};
    Pair pair;
    memcpy(&pair, words, sizeof pair);
    return pair;
}

// Rounds both, in one instruction.
template <class T> __device__ __forceinline__ u32 pack(float low, float high) {
    u32 word;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, f16>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, bf16>, "a 16-bit type");
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
#else
    const T values[2] = {from_float<T>(low), from_float<T>(high)};
    memcpy(&word, values, sizeof word);
#endif
    return word;
}

template <class T> __device__ __forceinline__ T load(const T *address) {
    PACE_ACCESS(address, sizeof(T), false);
    return *address;
}

template <class T> __device__ __forceinline__ void store(T *address, T value) {
    PACE_ACCESS(address, sizeof(T), true);
    *address = value;
}

// 2^x: on a device with a relative error of 2^-22, and 0 for what is below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}

// Adds 1 to a counter in global memory, or sets it to 0 if it has reached `last`, and gives what it held before. A release of what
// the thread, and the block before its last barrier, had written, and an acquire: cheaper than fences around an atomic.
__device__ __forceinline__ u32 count_up(u32 *counter, u32 last) {
    PACE_ACCESS(counter, sizeof(u32), false);
    PACE_ACCESS(counter, sizeof(u32), true);
#if defined(PACE_SIMT_H)
    return atomicInc(counter, last);
#else
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
#endif
}

// 16 bytes of T, moved by one instruction where the address is a multiple of 16. Elements of 16 bits stay in pairs, in words: a
// compiler that sees each of them takes a vector apart where it is loaded, which waits for it and needs a register per element.
template <class T> struct alignas(16) Vector {
    static constexpr unsigned SIZE = 16 / sizeof(T);
    u32 word[4];
};
template <> struct alignas(16) Vector<float> {
    static constexpr unsigned SIZE = 4;
    float value[4];
};

template <class T> __device__ __forceinline__ void to_floats(const Vector<T> &vector, float (&value)[Vector<T>::SIZE]) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        const Pair pair = unpack<T>(vector.word[i]);
        value[2 * i] = pair.value[0];
        value[2 * i + 1] = pair.value[1];
    }
}
template <> __device__ __forceinline__ void to_floats(const Vector<float> &vector, float (&value)[4]) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        value[i] = vector.value[i];
    }
}

template <class T> __device__ __forceinline__ Vector<T> from_floats(const float (&value)[Vector<T>::SIZE]) {
    Vector<T> vector;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        vector.word[i] = pack<T>(value[2 * i], value[2 * i + 1]);
    }
    return vector;
}
template <> __device__ __forceinline__ Vector<float> from_floats<float>(const float (&value)[4]) {
    return {{value[0], value[1], value[2], value[3]}};
}

// One element, whose place has to be known when this is compiled.
template <class T> __device__ __forceinline__ float element(const Vector<T> &vector, unsigned i) {
    return unpack<T>(vector.word[i / 2]).value[i % 2];
}
template <> __device__ __forceinline__ float element(const Vector<float> &vector, unsigned i) {
    return vector.value[i];
}

// Bits of an element as the lower ones of a word, and back.
template <class T> __device__ __forceinline__ u32 to_word(T value) {
    u32 word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}
template <class T> __device__ __forceinline__ T from_word(u32 word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

template <class T> __device__ __forceinline__ Vector<T> load_vector(const T *address) {
    PACE_ACCESS(address, 16, false);
    return *reinterpret_cast<const Vector<T> *>(address);
}

template <class T> __device__ __forceinline__ void store_vector(T *address, Vector<T> vector) {
    PACE_ACCESS(address, 16, true);
    *reinterpret_cast<Vector<T> *>(address) = vector;
}

// `count` elements from `address` on; the rest of the vector is zero. `aligned`: the address is a multiple of 16 and
// the vector is full.
template <class T> __device__ __forceinline__ Vector<T> load_some(const T *address, unsigned count, bool aligned) {
    if (aligned) {
        return load_vector(address);
    }
    constexpr unsigned PER_WORD = 4 / sizeof(T);
    u32 words[4] = {};
#pragma unroll
    for (unsigned i = 0; i < Vector<T>::SIZE; ++i) {
        if (i < count) {
            words[i / PER_WORD] |= to_word(load(address + i)) << (i % PER_WORD * 16);
        }
    }
    Vector<T> vector;
    memcpy(&vector, words, sizeof vector);
    return vector;
}

// The first `count` elements of the vector to `address` on.
template <class T>
__device__ __forceinline__ void store_some(T *address, Vector<T> vector, unsigned count, bool aligned) {
    if (aligned) {
        store_vector(address, vector);
        return;
    }
    constexpr unsigned PER_WORD = 4 / sizeof(T);
    u32 words[4];
    memcpy(words, &vector, sizeof vector);
#pragma unroll
    for (unsigned i = 0; i < Vector<T>::SIZE; ++i) {
        if (i < count) {
            store(address + i, from_word<T>(words[i / PER_WORD] >> (i % PER_WORD * 16)));
        }
    }
}

} // namespace pace

#endif // PACE_STORAGE_CUH
