// Host twins of kernels/sm80/mma.cuh: fragments as in mma.h, and asynchronous copies that arrive some time between their issue
// and the wait for them (Schedule in src/machine.rs).

#ifndef PACE_SIMT_SM80_H
#define PACE_SIMT_SM80_H

#include "mma.h"

extern "C" {
void pace_simt_shared_access(const void *address, size_t bytes);
void pace_simt_copy_async(void *to, const void *from, size_t bytes);
void pace_simt_commit_copies();
void pace_simt_wait_for_copies(unsigned pending);
}

namespace pace::sm80::simt {

using pace::simt::Columns;
using pace::simt::Fragments;

// mma.m16n8k8 of tf32: a[0..3] rows g, g + 8, g, g + 8 of columns t, t, t + 4, t + 4; b[0..1] rows t, t + 4 of column g.
// The low 13 bits of operands do not count.
struct AtomTf32 {
    static float element(uint32_t bits) {
        bits &= 0xffffe000u;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    template <unsigned COUNT> static void together(void *const *lanes) {
        double a[16][8];
        Columns b[COUNT][8];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const auto &x = *static_cast<Fragments<COUNT> *>(lanes[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned j = 0; j < 4; ++j) {
                a[g + 8 * (j % 2)][t + 4 * (j / 2)] = element(x.a[j]);
            }
            for (unsigned matrix = 0; matrix < COUNT; ++matrix) {
                for (unsigned j = 0; j < 2; ++j) {
                    b[matrix][t + 4 * j][g] = element(x.b[matrix][j]);
                }
            }
        }
        pace::simt::multiply(lanes, a, b);
    }
};

} // namespace pace::sm80::simt

namespace pace::sm80 {

template <class T> using Atom16 = pace::simt::Atom16<T>;
using simt::AtomTf32;

inline void copy_async(void *to, const void *from, u32 bytes) { pace_simt_copy_async(to, from, bytes); }
inline void commit_copies() { pace_simt_commit_copies(); }
template <u32 PENDING> void wait_for_copies() { pace_simt_wait_for_copies(PENDING); }

// The simulator wants to know where in the kernel lanes meet: the default arguments are the place of the call.

inline void ldmatrix(u32 (&result)[4], const void *row, bool transposed, const char *file = __builtin_FILE(),
                     unsigned line = __builtin_LINE()) {
    pace_simt_shared_access(row, 16);
    pace::simt::LoadMatrices operands = {row, {}};
    pace_simt_collective(
        file, line, transposed ? pace::simt::LoadMatrices::together_transposed : pace::simt::LoadMatrices::together, &operands);
    std::memcpy(result, operands.result, sizeof result);
}

// The COUNT fragments b are one meeting.
template <class Atom, u32 COUNT>
void mma(float (&c)[COUNT][4], const u32 (&a)[4], const u32 (&b)[COUNT][2], const char *file = __builtin_FILE(),
         unsigned line = __builtin_LINE()) {
    pace::simt::Fragments<COUNT> fragments;
    std::memcpy(fragments.a, a, sizeof a);
    std::memcpy(fragments.b, b, sizeof b);
    std::memcpy(fragments.c, c, sizeof c);
    pace_simt_collective(file, line, Atom::template together<COUNT>, &fragments);
    std::memcpy(c, fragments.c, sizeof c);
}

inline u32 to_tf32(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

} // namespace pace::sm80

#endif // PACE_SIMT_SM80_H
