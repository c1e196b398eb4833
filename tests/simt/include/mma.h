// What the host twins of every family share: the fragment layouts that the PTX ISA documents for ldmatrix and mma.sync.
//
// Products of a fragment are summed in double, with the accumulator last, and truncated to float once, as tensor
// cores do (Fasi et al. 2021, doi:10.7717/peerj-cs.330). Hardware truncates each term as well; results agree to a few units in
// the last place, not bit for bit.

#ifndef PACE_SIMT_MMA_H
#define PACE_SIMT_MMA_H

#include "storage.cuh"

#include <cmath>
#include <cstring>

extern "C" {
void pace_simt_collective(const char *file, unsigned line, void (*operation)(void *const *lanes), void *operands);
}

namespace pace::simt {

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

// What each lane brings to COUNT MMAs with one A fragment, and gets: c += a @ b.
template <unsigned COUNT> struct Fragments {
    uint32_t a[4], b[COUNT][2];
    float c[COUNT][4];
};

// A row of b in registers: left to itself, GCC makes vectors along the other index, and far slower code.
typedef double Columns __attribute__((vector_size(64)));

// Truncated, not rounded, as tensor cores do.
inline float cut(double value) {
    float result = static_cast<float>(value);
    if (std::fabs(static_cast<double>(result)) > std::fabs(value)) {
        uint32_t bits;
        std::memcpy(&bits, &result, 4);
        --bits;
        std::memcpy(&result, &bits, 4);
    }
    return result;
}

// c += a @ b for COUNT matrices b, given those of the whole warp. In an accumulator [16, 8] with group g = lane / 4 and
// t = lane % 4 a lane holds c[0..3]: rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1.
template <unsigned K, unsigned COUNT>
void multiply(void *const *lanes, const double (&a)[16][K], const Columns (&b)[COUNT][K]) {
    for (unsigned matrix = 0; matrix < COUNT; ++matrix) {
        for (unsigned row = 0; row < 8; ++row) {
            Columns low = {}, high = {};
            for (unsigned k = 0; k < K; ++k) {
                low += a[row][k] * b[matrix][k];
                high += a[row + 8][k] * b[matrix][k];
            }
            for (unsigned column = 0; column < 8; ++column) {
                float(&c)[4] = static_cast<Fragments<COUNT> *>(lanes[row * 4 + column / 2])->c[matrix];
                const unsigned i = column % 2;
                c[i] = cut(low[column] + static_cast<double>(c[i]));
                c[i + 2] = cut(high[column] + static_cast<double>(c[i + 2]));
            }
        }
    }
}

// mma.m16n8k16 of 16-bit types. A lane holds
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2 t and 2 t + 1, the last two 8 further
//   b[0..1]  column g; rows 2 t and 2 t + 1, the second 8 further
template <class T> struct Atom16 {
    static float element(uint32_t pair, unsigned i) {
        T value;
        value.bits = static_cast<uint16_t>(pair >> 16 * i);
        return to_float(value);
    }
    static float to_float(__half value) { return __half2float(value); }
    static float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

    template <unsigned COUNT> static void together(void *const *lanes) {
        double a[16][16];
        Columns b[COUNT][16];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const auto &x = *static_cast<Fragments<COUNT> *>(lanes[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned i = 0; i < 2; ++i) {
                for (unsigned j = 0; j < 4; ++j) {
                    a[g + 8 * (j % 2)][2 * t + i + 8 * (j / 2)] = element(x.a[j], i);
                }
                for (unsigned matrix = 0; matrix < COUNT; ++matrix) {
                    for (unsigned j = 0; j < 2; ++j) {
                        b[matrix][2 * t + i + 8 * j][g] = element(x.b[matrix][j], i);
                    }
                }
            }
        }
        multiply(lanes, a, b);
    }
};

} // namespace pace::simt

#endif // PACE_SIMT_MMA_H
