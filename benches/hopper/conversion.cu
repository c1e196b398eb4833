// Probe 5: how many conversions f32 -> bf16 (F2FP), bf16 FMAs (HFMA2.BF16) and folds of a fragment an SM does per clock,
// alone and beside two warpgroups that run RS n200 wgmma.
//
// Four warps, one per scheduler, each with 16 independent chains: as much as the instruction's latency asks for.

#include "wgmma.cuh"

#include <algorithm>

namespace {

enum Operation { NOTHING, FFMA, F2FP, HFMA2, FOLD };
struct OperationInfo {
    const char *name;
    double elements;      // of one step of a lane: results that an element of A needs
    const char *expected; // elements per clock and SM
};
constexpr OperationInfo INFO[] = {
    {"nothing", 0, ""},
    {"FFMA (f32)", 1, "128 (120 with the loop): checks the method"},
    {"F2FP (cvt.rn.bf16x2.f32)", 2, "32 (16 lanes) or 128 (64 lanes); one sample's folds need 10.2"},
    {"HFMA2.BF16", 2, "256 (240 with the loop)"},
    {"fold in f32 (2 shifts, 2 masks, 2 FFMA, F2FP)", 2, "at least 10.2: 1024 elements per wgmma of 100 clocks with one sample, half of it with two"},
};

constexpr u32 THREADS = 384, CHAINS = 16, UNROLL = 4, B_AT = 16384, SHARED = B_AT + 200 * 128 + 16, DONE_AT = SHARED - 16;

struct Sample {
    long long begin[2], end[2]; // of the wgmma
    long long clocks;           // of the other instructions
    u64 steps;                  // of each lane in these clocks
    u32 sink;
};

template <int OPERATION> __device__ __forceinline__ void step(u32 &x, u32 other, u32 a, u32 b, float z) {
    if constexpr (OPERATION == FFMA) {
        float value = __uint_as_float(x);
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(value) : "f"(z), "f"(__uint_as_float(a)));
        x = __float_as_uint(value);
    } else if constexpr (OPERATION == F2FP) {
        asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(__uint_as_float(x)), "f"(__uint_as_float(a)));
    } else if constexpr (OPERATION == HFMA2) {
        asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
    } else if constexpr (OPERATION == FOLD) {
        x = fold(x, other, z);
    }
}

template <int OPERATION, bool WGMMAS>
__global__ void __launch_bounds__(THREADS, 1) conversion(u32 iterations, u32 a, u32 b, float z, Sample *samples) {
    using T = __nv_bfloat16;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = aligned_base(shared);
    volatile u32 *done = reinterpret_cast<volatile u32 *>(shared + DONE_AT);
    const u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x; i < DONE_AT / 4; i += THREADS)
        reinterpret_cast<u32 *>(shared)[i] = (scramble(i) & 0x80ff80ff) | 0x3f003f00;
    if (threadIdx.x == 0)
        *done = 0;
    fence_async();
    __syncthreads();
    Sample &sample = samples[blockIdx.x];

    if (group == 2) {
        if constexpr (OPERATION != NOTHING) {
            u32 x[CHAINS];
#pragma unroll
            for (u32 c = 0; c < CHAINS; ++c)
                x[c] = 0x3f803f80 + threadIdx.x + c;
            u64 steps = 0;
            const long long begin = clock64();
            // Alone a fixed number of steps, beside the wgmmas until both warpgroups are done.
            for (u32 i = 0; WGMMAS ? *done != 2 : i < iterations; ++i) {
#pragma unroll 1
                for (u32 inner = 0; inner < 16; ++inner)
#pragma unroll
                    for (u32 u = 0; u < UNROLL; ++u)
#pragma unroll
                        for (u32 c = 0; c < CHAINS; ++c)
                            step<OPERATION>(x[c], x[c ^ 1], a, b, z);
                steps += 16 * UNROLL * CHAINS;
            }
            const long long end = clock64();
            u32 sink = 0;
#pragma unroll
            for (u32 c = 0; c < CHAINS; ++c)
                sink ^= x[c];
            if (threadIdx.x == 256) {
                sample.clocks = end - begin;
                sample.steps = steps;
            }
            if (sink == 0x12345678) // hardly ever, but the compiler cannot know
                sample.sink = sink;
        }
    } else if constexpr (WGMMAS) {
        const u32 row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
        float acc[100] = {};
        u32 fragment[4];
        ldmatrix(fragment, base + swizzled(128, row, lane / 16 * 16));
        const long long begin = clock64();
#pragma unroll 1
        for (u32 i = 0; i < iterations; ++i) {
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                Wgmma<T, 200>::rs<0>(acc, fragment, k_major<128>(base + B_AT + k * 32), 1);
            wgmma_commit();
            wgmma_wait<1>();
        }
        wgmma_wait<0>();
        const long long end = clock64();
        pin(acc);
        float sum = 0;
#pragma unroll
        for (u32 i = 0; i < 100; ++i)
            sum += acc[i];
        if (threadIdx.x % 128 == 0) {
            sample.begin[group] = begin;
            sample.end[group] = end;
            atomicAdd(const_cast<u32 *>(done), 1u);
        }
        if (sum == 12345.678f)
            sample.sink = 1;
    }
}

struct Measured {
    double elements = 0, fraction = 0;
};

template <int OPERATION, bool WGMMAS> Measured measure(u32 multiprocessors) {
    constexpr u32 ITERATIONS = 400; // of four wgmmas in two warpgroups, or of 16 * UNROLL * CHAINS steps
    const Buffer<Sample> samples(multiprocessors);
    allow_shared(conversion<OPERATION, WGMMAS>, SHARED);
    for (u32 i = 0; i < 3; ++i)
        launch(conversion<OPERATION, WGMMAS>, multiprocessors, THREADS, SHARED, 1, ITERATIONS, 0x3f7f3f7eu, 0x3c003c00u, 0.999f,
               samples.get());
    finish();
    Measured measured;
    for (const Sample &s : samples.read()) {
        if (OPERATION != NOTHING)
            measured.elements += static_cast<double>(s.steps) * 128 * INFO[OPERATION].elements / static_cast<double>(s.clocks) / multiprocessors;
        if (WGMMAS)
            measured.fraction += 2.0 * ITERATIONS * 4 * 100 /
                                 static_cast<double>(std::max(s.end[0], s.end[1]) - std::min(s.begin[0], s.begin[1])) / multiprocessors;
    }
    return measured;
}

template <int OPERATION> void both(Results &results, u32 multiprocessors, std::string &table) {
    const Measured alone = measure<OPERATION, false>(multiprocessors), beside = measure<OPERATION, true>(multiprocessors);
    results.number(text("%s, alone", INFO[OPERATION].name), alone.elements, "elem/clk", INFO[OPERATION].expected);
    results.number(text("%s, beside wgmma", INFO[OPERATION].name), beside.elements, "elem/clk", "as alone");
    results.number(text("RS n200 beside %s", INFO[OPERATION].name), 100 * beside.fraction, "% of peak", "as with nothing");
    table += text("| %-44s %8.1f elements per clock and SM alone, %8.1f beside wgmma, which has %5.1f %%\n", INFO[OPERATION].name,
                  alone.elements, beside.elements, 100 * beside.fraction);
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("conversion");
    const u32 multiprocessors = static_cast<u32>(open_device(results).multiProcessorCount);
    const Measured quiet = measure<NOTHING, true>(multiprocessors);
    results.number("RS n200 beside nothing", 100 * quiet.fraction, "% of peak", "97 to 100");
    std::string table = text("| RS n200 beside nothing: %.1f %%\n", 100 * quiet.fraction);
    both<FFMA>(results, multiprocessors, table);
    both<F2FP>(results, multiprocessors, table);
    both<HFMA2>(results, multiprocessors, table);
    both<FOLD>(results, multiprocessors, table);
    std::fputs(table.c_str(), stdout);
    return results.status();
}
