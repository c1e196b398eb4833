// wgmma.mma_async as inline assembly: d += a @ b, [64, 16] x [16, N] of a 16-bit type, accumulated in f32.
//
// Inline assembly counts its operands, accumulators first, so that their list depends on N. The macros below build the lists
// for up to 128 accumulators, four at a time.

#ifndef PACE_SM90_WGMMA_CUH
#define PACE_SM90_WGMMA_CUH

#include "../storage.cuh"

// clang-format off
#define PACE_ACC_TEXT_4 "%0, %1, %2, %3"
#define PACE_ACC_TEXT_8 PACE_ACC_TEXT_4 ", %4, %5, %6, %7"
#define PACE_ACC_TEXT_12 PACE_ACC_TEXT_8 ", %8, %9, %10, %11"
#define PACE_ACC_TEXT_16 PACE_ACC_TEXT_12 ", %12, %13, %14, %15"
#define PACE_ACC_TEXT_20 PACE_ACC_TEXT_16 ", %16, %17, %18, %19"
#define PACE_ACC_TEXT_24 PACE_ACC_TEXT_20 ", %20, %21, %22, %23"
#define PACE_ACC_TEXT_28 PACE_ACC_TEXT_24 ", %24, %25, %26, %27"
#define PACE_ACC_TEXT_32 PACE_ACC_TEXT_28 ", %28, %29, %30, %31"
#define PACE_ACC_TEXT_36 PACE_ACC_TEXT_32 ", %32, %33, %34, %35"
#define PACE_ACC_TEXT_40 PACE_ACC_TEXT_36 ", %36, %37, %38, %39"
#define PACE_ACC_TEXT_44 PACE_ACC_TEXT_40 ", %40, %41, %42, %43"
#define PACE_ACC_TEXT_48 PACE_ACC_TEXT_44 ", %44, %45, %46, %47"
#define PACE_ACC_TEXT_52 PACE_ACC_TEXT_48 ", %48, %49, %50, %51"
#define PACE_ACC_TEXT_56 PACE_ACC_TEXT_52 ", %52, %53, %54, %55"
#define PACE_ACC_TEXT_60 PACE_ACC_TEXT_56 ", %56, %57, %58, %59"
#define PACE_ACC_TEXT_64 PACE_ACC_TEXT_60 ", %60, %61, %62, %63"
#define PACE_ACC_TEXT_68 PACE_ACC_TEXT_64 ", %64, %65, %66, %67"
#define PACE_ACC_TEXT_72 PACE_ACC_TEXT_68 ", %68, %69, %70, %71"
#define PACE_ACC_TEXT_76 PACE_ACC_TEXT_72 ", %72, %73, %74, %75"
#define PACE_ACC_TEXT_80 PACE_ACC_TEXT_76 ", %76, %77, %78, %79"
#define PACE_ACC_TEXT_84 PACE_ACC_TEXT_80 ", %80, %81, %82, %83"
#define PACE_ACC_TEXT_88 PACE_ACC_TEXT_84 ", %84, %85, %86, %87"
#define PACE_ACC_TEXT_92 PACE_ACC_TEXT_88 ", %88, %89, %90, %91"
#define PACE_ACC_TEXT_96 PACE_ACC_TEXT_92 ", %92, %93, %94, %95"
#define PACE_ACC_TEXT_100 PACE_ACC_TEXT_96 ", %96, %97, %98, %99"
#define PACE_ACC_TEXT_104 PACE_ACC_TEXT_100 ", %100, %101, %102, %103"
#define PACE_ACC_TEXT_108 PACE_ACC_TEXT_104 ", %104, %105, %106, %107"
#define PACE_ACC_TEXT_112 PACE_ACC_TEXT_108 ", %108, %109, %110, %111"
#define PACE_ACC_TEXT_116 PACE_ACC_TEXT_112 ", %112, %113, %114, %115"
#define PACE_ACC_TEXT_120 PACE_ACC_TEXT_116 ", %116, %117, %118, %119"
#define PACE_ACC_TEXT_124 PACE_ACC_TEXT_120 ", %120, %121, %122, %123"
#define PACE_ACC_TEXT_128 PACE_ACC_TEXT_124 ", %124, %125, %126, %127"

#define PACE_ACC_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PACE_ACC_8(d) PACE_ACC_4(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PACE_ACC_12(d) PACE_ACC_8(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PACE_ACC_16(d) PACE_ACC_12(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PACE_ACC_20(d) PACE_ACC_16(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PACE_ACC_24(d) PACE_ACC_20(d), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PACE_ACC_28(d) PACE_ACC_24(d), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PACE_ACC_32(d) PACE_ACC_28(d), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PACE_ACC_36(d) PACE_ACC_32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PACE_ACC_40(d) PACE_ACC_36(d), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PACE_ACC_44(d) PACE_ACC_40(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PACE_ACC_48(d) PACE_ACC_44(d), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PACE_ACC_52(d) PACE_ACC_48(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PACE_ACC_56(d) PACE_ACC_52(d), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PACE_ACC_60(d) PACE_ACC_56(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PACE_ACC_64(d) PACE_ACC_60(d), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PACE_ACC_68(d) PACE_ACC_64(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PACE_ACC_72(d) PACE_ACC_68(d), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PACE_ACC_76(d) PACE_ACC_72(d), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PACE_ACC_80(d) PACE_ACC_76(d), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PACE_ACC_84(d) PACE_ACC_80(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PACE_ACC_88(d) PACE_ACC_84(d), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PACE_ACC_92(d) PACE_ACC_88(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PACE_ACC_96(d) PACE_ACC_92(d), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PACE_ACC_100(d) PACE_ACC_96(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PACE_ACC_104(d) PACE_ACC_100(d), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PACE_ACC_108(d) PACE_ACC_104(d), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PACE_ACC_112(d) PACE_ACC_108(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PACE_ACC_116(d) PACE_ACC_112(d), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PACE_ACC_120(d) PACE_ACC_116(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PACE_ACC_124(d) PACE_ACC_120(d), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PACE_ACC_128(d) PACE_ACC_124(d), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on

// One type and N; COUNT accumulators, and the numbers of the operands behind them. For 1 of `accumulate` d is added to, for 0
// overwritten. Operands' transpositions are immediates.
#define PACE_WGMMA_OF(T, TYPE, N, COUNT, I1, I2, I3, I4, I5, I6)                                                       \
    template <> struct Wgmma<T, N> {                                                                                   \
        template <u32 TRANS_A, u32 TRANS_B>                                                                            \
        static __device__ __forceinline__ void ss(float (&d)[COUNT], u64 a, u64 b, u32 accumulate) {                   \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
                         "k16.f32." TYPE "." TYPE " {" PACE_ACC_TEXT_##COUNT "}, %" #COUNT ", %" #I1                   \
                                                                             ", p, 1, 1, %" #I3 ", %" #I4 "; }"        \
                         : PACE_ACC_##COUNT(d)                                                                         \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(TRANS_A), "n"(TRANS_B));                               \
        }                                                                                                              \
        template <u32 TRANS_B>                                                                                         \
        static __device__ __forceinline__ void rs(float (&d)[COUNT], const u32 (&a)[4], u64 b, u32 accumulate) {       \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #I5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N            \
                         "k16.f32." TYPE "." TYPE " {" PACE_ACC_TEXT_##COUNT                                           \
                         "}, {%" #COUNT ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 "; }"              \
                         : PACE_ACC_##COUNT(d)                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANS_B));         \
        }                                                                                                              \
    };

#define PACE_WGMMA(N, COUNT, I1, I2, I3, I4, I5, I6)                                                                   \
    PACE_WGMMA_OF(f16, "f16", N, COUNT, I1, I2, I3, I4, I5, I6)                                                        \
    PACE_WGMMA_OF(bf16, "bf16", N, COUNT, I1, I2, I3, I4, I5, I6)

namespace pace::sm90 {

template <class T, u32 N> struct Wgmma;

PACE_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
PACE_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
PACE_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
PACE_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
PACE_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
PACE_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
PACE_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
PACE_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
PACE_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
PACE_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
PACE_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

} // namespace pace::sm90

#endif // PACE_SM90_WGMMA_CUH
