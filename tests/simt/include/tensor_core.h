// Host twins of kernels/tensor_core.cuh: the fragment layouts that the PTX ISA documents for ldmatrix and mma.sync, and
// asynchronous copies that arrive when they are waited for and not before.
//
// Products of a fragment are summed in double, with the accumulator last, and rounded to float once. Hardware sums them
// in float with its own order and rounding; results agree to a few units in the last place, not bit for bit.

#ifndef PACE_SIMT_TENSOR_CORE_H
#define PACE_SIMT_TENSOR_CORE_H

#include "cuda_bf16.h"
#include "cuda_fp16.h"

extern "C" {
void pace_simt_collective(const char *file, unsigned line, void (*operation)(void *const *lanes), void *operands);
void pace_simt_shared_access(const void *address, size_t bytes);
void pace_simt_copy_async(void *to, const void *from, size_t bytes);
void pace_simt_commit_copies();
void pace_simt_wait_for_copies(unsigned pending);
}

namespace pace {
namespace simt {

// ldmatrix .x4: lane 8 i + j brings the address of row j of matrix i, 16 bytes; lane t gets of each matrix the two
// 16-bit elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4, or with .trans of column t / 4.
struct LoadMatrices {
    const void *row;
    uint32_t result[4];

    static void together(void *const *lanes) {
        for (unsigned t = 0; t < 32; ++t) {
            LoadMatrices &to = *static_cast<LoadMatrices *>(lanes[t]);
            for (unsigned matrix = 0; matrix < 4; ++matrix) {
                const LoadMatrices &from = *static_cast<LoadMatrices *>(lanes[8 * matrix + t / 4]);
                std::memcpy(&to.result[matrix], static_cast<const char *>(from.row) + 4 * (t % 4), 4);
            }
        }
    }

    static void together_transposed(void *const *lanes) {
        for (unsigned t = 0; t < 32; ++t) {
            LoadMatrices &to = *static_cast<LoadMatrices *>(lanes[t]);
            for (unsigned matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (unsigned i = 0; i < 2; ++i) {
                    const LoadMatrices &from = *static_cast<LoadMatrices *>(lanes[8 * matrix + 2 * (t % 4) + i]);
                    std::memcpy(&pair[i], static_cast<const char *>(from.row) + 2 * (t / 4), 2);
                }
                std::memcpy(&to.result[matrix], pair, 4);
            }
        }
    }
};

inline float element(uint32_t pair, unsigned i, __half *) {
    return __half2float({static_cast<uint16_t>(pair >> 16 * i)});
}

inline float element(uint32_t pair, unsigned i, __nv_bfloat16 *) {
    return __bfloat162float({static_cast<uint16_t>(pair >> 16 * i)});
}

// mma.m16n8k16 of 16-bit types: with group g = lane / 4 and t = lane % 4, a lane holds
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1, the last two 8 further
//   b[0..1]  column g; rows 2 t and 2 t + 1, the second 8 further
//   c[0..3]  rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1
template <class T> struct Multiply16 {
    uint32_t a[4], b[2];
    float c[4];

    static void together(void *const *lanes) {
        float a[16][16], b[16][8];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const Multiply16 &x = *static_cast<Multiply16 *>(lanes[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned i = 0; i < 2; ++i) {
                for (unsigned j = 0; j < 4; ++j) {
                    a[g + 8 * (j % 2)][2 * t + i + 8 * (j / 2)] = element(x.a[j], i, static_cast<T *>(nullptr));
                }
                for (unsigned j = 0; j < 2; ++j) {
                    b[2 * t + i + 8 * j][g] = element(x.b[j], i, static_cast<T *>(nullptr));
                }
            }
        }
        finish<16>(lanes, a, b);
    }

    template <unsigned K> static void finish(void *const *lanes, const float (&a)[16][K], const float (&b)[K][8]) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            float *c = static_cast<Multiply16 *>(lanes[lane])->c;
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double sum = 0.0;
                for (unsigned k = 0; k < K; ++k) {
                    sum += static_cast<double>(a[row][k]) * b[k][column];
                }
                c[i] = static_cast<float>(sum + c[i]);
            }
        }
    }
};

// mma.m16n8k8 of tf32: a[0..3] rows g, g + 8, g, g + 8 of columns t, t, t + 4, t + 4; b[0..1] rows t, t + 4 of column g;
// c as above. The low 13 bits of operands do not count.
struct MultiplyTf32 {
    uint32_t a[4], b[2];
    float c[4];

    static float element(uint32_t bits) {
        bits &= 0xffffe000u;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    static void together(void *const *lanes) {
        static_assert(sizeof(MultiplyTf32) == sizeof(Multiply16<__half>), "finish() writes c of either");
        float a[16][8], b[8][8];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const MultiplyTf32 &x = *static_cast<MultiplyTf32 *>(lanes[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned j = 0; j < 4; ++j) {
                a[g + 8 * (j % 2)][t + 4 * (j / 2)] = element(x.a[j]);
            }
            for (unsigned j = 0; j < 2; ++j) {
                b[t + 4 * j][g] = element(x.b[j]);
            }
        }
        Multiply16<__half>::finish<8>(lanes, a, b);
    }
};

} // namespace simt

inline void load_matrices_at(const char *file, unsigned line, uint32_t (&result)[4], const void *row, bool transposed) {
    pace_simt_shared_access(row, 16);
    simt::LoadMatrices operands = {row, {}};
    pace_simt_collective(file, line,
                         transposed ? simt::LoadMatrices::together_transposed : simt::LoadMatrices::together, &operands);
    std::memcpy(result, operands.result, sizeof result);
}

template <class Operands>
void multiply_at(const char *file, unsigned line, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands operands = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    pace_simt_collective(file, line, Operands::together, &operands);
    std::memcpy(c, operands.c, sizeof c);
}

} // namespace pace

#endif // PACE_SIMT_TENSOR_CORE_H
