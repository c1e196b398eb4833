// Probe 4: what an SM does per clock when wgmma, ldmatrix and TMA writes share its shared memory.
//
// Two consumer warpgroups run a stream of wgmma over fixed tiles: no barrier, no waiting, so that what they lose, they lose
// to shared memory and issue. A third warpgroup's first thread brings tiles from L2 into a ring that nobody reads, one copy
// every so many clocks. Whole mainloops wait for each other besides; these rates are their upper bounds.
//
// Clocks are those of clock64 on each SM. A wgmma m64nNk16 is N/2 clocks of the tensor cores (2048 FMA per clock and SM).

#include "wgmma.cuh"

#include <algorithm>

namespace {

enum Kind {
    NONE,  // copies only
    RS_0,  // RS n200, one fragment of A for ever
    RS_1,  // + one ldmatrix.x4 per wgmma and warp: 20.5 B/clk at full rate
    RS_2,  // + two: 41 B/clk
    FOLD1, // one sample: two ldmatrix and a fold in f32 for each wgmma, one wgmma in flight
    FOLD2, // two samples share the ldmatrix: the mainloop of the folded forward
    SS_208,
    SS_256,
};
struct KindInfo {
    const char *name;
    u32 n;            // 0: no wgmma
    double bytes;     // of shared memory that consumers read per clock at full rate
    u32 wgmmas;       // of a warpgroup per iteration (4 k16 steps)
};
constexpr KindInfo INFO[] = {
    {"TMA only", 0, 0, 0},
    {"RS n200", 200, 64, 4},
    {"RS n200 + ldmatrix 20.5 B/clk", 200, 64 + 20.48, 4},
    {"RS n200 + ldmatrix 41 B/clk", 200, 64 + 40.96, 4},
    {"RS n200, fold, 1 sample", 200, 64 + 40.96, 4},
    {"RS n200, fold, 2 samples", 200, 64 + 20.48, 8},
    {"SS n208", 208, 64 + 19.69, 4},
    {"SS n256", 256, 64 + 16, 4},
};

constexpr u32 THREADS = 384, A_BYTES = 16384, B_AT = 2 * A_BYTES, SAMPLE_BYTES = 200 * 128;
constexpr u32 RING_AT = B_AT + 2 * SAMPLE_BYTES, RING_BYTES = 102400, MOST_SLOTS = 8;
constexpr u32 FULL_AT = RING_AT + RING_BYTES, EMPTY_AT = FULL_AT + 8 * MOST_SLOTS, DONE_AT = EMPTY_AT + 8 * MOST_SLOTS;
constexpr u32 SHARED = DONE_AT + 16;
static_assert(B_AT % 1024 == 0 && RING_AT % 1024 == 0 && FULL_AT % 8 == 0);
constexpr u32 SAMPLES = 24, TOKENS = 197, COLUMNS = 768, ROWS = 200;

struct Config {
    u32 iterations, random;
    u32 copies;            // at most, of the CTA or pair; 0: no TMA
    u32 interval;          // clocks from one copy to the next
    u32 slots, bytes, row; // of the ring, of a copy, of its rows
    u32 multicast;
};

struct Sample {
    long long begin[2], end[2]; // of the warpgroups
    u64 nanoseconds;            // of warpgroup 0
    long long copy_clocks;
    u64 copy_bytes; // landed here in copy_clocks
    u32 ended_early;
    float sum;
};

template <u32 SPAN> __device__ __forceinline__ u32 b_address(u32 tile, u32 rows, u32 k) {
    return tile + k * 32 / SPAN * (rows * SPAN) + k * 32 % SPAN;
}
template <u32 SPAN> __device__ __forceinline__ u32 a_address(u32 tile, u32 offset, u32 k) {
    return tile + k * 32 / SPAN * (128 * SPAN) + (offset ^ k * 32 % SPAN);
}

template <int N> __device__ __forceinline__ float sum_of(const float (&acc)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
        sum += acc[i];
    return sum;
}
// Only for its traffic.
template <u32 SPAN> __device__ __forceinline__ u32 load_fragment(u32 tile, u32 offset, u32 k) {
    u32 loaded[4];
    ldmatrix(loaded, a_address<SPAN>(tile, offset, k));
    return loaded[0] ^ loaded[1] ^ loaded[2] ^ loaded[3];
}

// The stream of one consumer warpgroup. Returns something of all results, so that nothing can be left out.
template <int KIND, u32 SPAN>
__device__ __forceinline__ float consume(u32 base, u32 group, u32 iterations, long long &begin, long long &end, u64 &time) {
    using T = __nv_bfloat16;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const u32 row = group * 64 + warp * 16 + lane % 16, offset = swizzled(SPAN, row, lane / 16 * 16);
    const u32 b = base + B_AT;
    float sum = 0;
    if constexpr (KIND == RS_0 || KIND == RS_1 || KIND == RS_2) {
        float acc[100] = {};
        u32 a[4], sink = 0;
        ldmatrix(a, a_address<SPAN>(base, offset, 0));
        const u64 ns = nanoseconds();
        begin = clock64();
#pragma unroll 1
        for (u32 i = 0; i < iterations; ++i) {
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                Wgmma<T, 200>::rs<0>(acc, a, k_major<SPAN>(b_address<SPAN>(b, 200, k)), 1);
                if constexpr (KIND >= RS_1)
                    sink ^= load_fragment<SPAN>(base, offset, k);
                if constexpr (KIND >= RS_2)
                    sink ^= load_fragment<SPAN>(base + A_BYTES, offset, k);
            }
            wgmma_commit();
            wgmma_wait<1>();
        }
        wgmma_wait<0>();
        end = clock64();
        time = nanoseconds() - ns;
        pin(acc);
        sum = sum_of(acc) + __uint_as_float(sink & 1);
    } else if constexpr (KIND == FOLD1) {
        float acc[100] = {};
        u32 a[2][4];
        const float z[2] = {1.0f + lane * 0.001f, 0.5f};
        const u64 ns = nanoseconds();
        begin = clock64();
#pragma unroll 1
        for (u32 i = 0; i < iterations; ++i) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                u32 w0[4], dw[4];
                ldmatrix(w0, a_address<SPAN>(base, offset, k));
                ldmatrix(dw, a_address<SPAN>(base + A_BYTES, offset, k));
                wgmma_wait<1>(); // the one that reads a[k % 2] has retired
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
                    a[k % 2][j] = fold(w0[j], dw[j], z[j % 2]);
                pin(a[k % 2]);
                wgmma_fence();
                Wgmma<T, 200>::rs<0>(acc, a[k % 2], k_major<SPAN>(b_address<SPAN>(b, 200, k)), 1);
                wgmma_commit();
            }
        }
        wgmma_wait<0>();
        end = clock64();
        time = nanoseconds() - ns;
        pin(acc);
        sum = sum_of(acc);
    } else if constexpr (KIND == FOLD2) {
        float acc[2][100] = {};
        u32 a[2][4];
        const float z[2][2] = {{1.0f + lane * 0.001f, 0.5f}, {0.75f, 1.25f}};
        const u64 ns = nanoseconds();
        begin = clock64();
#pragma unroll 1
        for (u32 i = 0; i < iterations; ++i) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                u32 w0[4], dw[4];
                ldmatrix(w0, a_address<SPAN>(base, offset, k));
                ldmatrix(dw, a_address<SPAN>(base + A_BYTES, offset, k));
#pragma unroll
                for (u32 s = 0; s < 2; ++s) {
                    wgmma_wait<1>(); // the one that reads a[s] has retired, the other sample's runs
#pragma unroll
                    for (u32 j = 0; j < 4; ++j)
                        a[s][j] = fold(w0[j], dw[j], z[s][j % 2]);
                    pin(a[s]);
                    wgmma_fence();
                    Wgmma<T, 200>::rs<0>(acc[s], a[s], k_major<SPAN>(b_address<SPAN>(b + s * SAMPLE_BYTES, 200, k)), 1);
                    wgmma_commit();
                }
            }
        }
        wgmma_wait<0>();
        end = clock64();
        time = nanoseconds() - ns;
        pin(acc[0]);
        pin(acc[1]);
        sum = sum_of(acc[0]) + sum_of(acc[1]);
    } else if constexpr (KIND == SS_208 || KIND == SS_256) {
        constexpr int N = KIND == SS_208 ? 208 : 256;
        float acc[N / 2] = {};
        const u64 ns = nanoseconds();
        begin = clock64();
#pragma unroll 1
        for (u32 i = 0; i < iterations; ++i) {
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                Wgmma<T, N>::template ss<0, 0>(acc, k_major<SPAN>(b_address<SPAN>(base + group * 64 * SPAN, 128, k)),
                                               k_major<SPAN>(b_address<SPAN>(b, N, k)), 1);
            wgmma_commit();
            wgmma_wait<1>();
        }
        wgmma_wait<0>();
        end = clock64();
        time = nanoseconds() - ns;
        pin(acc);
        sum = sum_of(acc);
    }
    return sum;
}

template <int KIND, u32 SPAN>
__global__ void __launch_bounds__(THREADS, 1)
    rates(const __grid_constant__ Map x, const __grid_constant__ Config config, Sample *samples, Stuck *stuck) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = aligned_base(shared), full = base + FULL_AT, empty = base + EMPTY_AT;
    volatile u32 *done = reinterpret_cast<volatile u32 *>(shared + DONE_AT);
    const u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    // Tiles: pairs of bf16 of either sign between 0.5 and 2, or zeros.
    for (u32 i = threadIdx.x; i < RING_AT / 4; i += THREADS)
        reinterpret_cast<u32 *>(shared)[i] =
            config.random ? (scramble(i + blockIdx.x * 65536) & 0x80ff80ff) | 0x3f003f00 : 0;
    if (threadIdx.x == 0) {
        *done = 0;
        for (u32 s = 0; s < MOST_SLOTS; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2); // the producers of both CTAs
        }
        fence_barrier_init();
    }
    fence_async();
    __syncthreads();
    cluster_sync();
    Sample &sample = samples[blockIdx.x];

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256 && config.copies != 0) {
            const u32 rank = cluster_rank(), worker = config.multicast ? blockIdx.x / 2 : blockIdx.x;
            const u32 chunks = COLUMNS * 2 / config.row;
            u32 slot = 0, use = 0, chunk = worker * 5 % chunks, of = worker * 7 % SAMPLES;
            bool recorded = false, going = true;
            const long long begin = clock64();
            for (u32 i = 0; i < config.copies; ++i) {
                // The slot's last copy has landed.
                if (use != 0 && !(going = wait(full + 8 * slot, (use - 1) & 1, stuck, PRODUCER, FULL, slot, i)))
                    break;
                if (KIND != NONE && !recorded && *done == 2) {
                    sample.copy_clocks = clock64() - begin;
                    sample.copy_bytes = use == 0 ? 0 : static_cast<u64>(i + 1 - config.slots) * config.bytes;
                    recorded = true;
                    if (!config.multicast) {
                        // Copies i - slots + 1 .. i - 1 are under way: leave when they are in.
                        for (u32 j = i + 1 < config.slots ? 0 : i + 1 - config.slots; j < i && going; ++j)
                            going = wait(full + 8 * (j % config.slots), j / config.slots & 1, stuck, PRODUCER, FULL,
                                         j % config.slots, j);
                        going = false;
                        break;
                    }
                }
                arrive_expect(full + 8 * slot, config.bytes);
                const u32 issuer = config.multicast ? slot % 2 : rank;
                if (config.multicast) {
                    arrive_remote(empty + 8 * slot, issuer);
                    if (issuer == rank && !(going = wait(empty + 8 * slot, use & 1, stuck, PRODUCER, EMPTY, slot, i)))
                        break;
                }
                if (issuer == rank) {
                    while (clock64() - begin < static_cast<long long>(i) * config.interval) {
                    }
                    const u32 to = base + RING_AT + slot * config.bytes;
                    const int column = static_cast<int>(chunk * (config.row / 2));
                    if (config.multicast)
                        tma_multicast(to, &x, full + 8 * slot, column, 0, static_cast<int>(of), 3);
                    else
                        tma_load(to, &x, full + 8 * slot, column, 0, static_cast<int>(of));
                }
                if (++chunk == chunks) {
                    chunk = 0;
                    of = of + 1 == SAMPLES ? 0 : of + 1;
                }
                if (++slot == config.slots) {
                    slot = 0;
                    ++use;
                }
            }
            if (going) { // all copies were issued: wait for the last ones
                for (u32 i = 0; i < config.slots && going; ++i) {
                    if (use != 0)
                        going = wait(full + 8 * slot, (use - 1) & 1, stuck, PRODUCER, FULL, slot, config.copies + i);
                    if (++slot == config.slots) {
                        slot = 0;
                        ++use;
                    }
                }
                if (!recorded) {
                    sample.copy_clocks = clock64() - begin;
                    sample.copy_bytes = static_cast<u64>(config.copies) * config.bytes;
                    sample.ended_early = KIND != NONE;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        long long begin = 0, end = 0;
        u64 time = 0;
        const float sum = consume<KIND, SPAN>(base, group, config.iterations, begin, end, time);
        if (threadIdx.x % 128 == 0) {
            atomicAdd(const_cast<u32 *>(done), 1u);
            sample.begin[group] = begin;
            sample.end[group] = end;
            if (group == 0)
                sample.nanoseconds = time;
        }
        if (sum == 12345.678f) // never, but the compiler cannot know
            sample.sum = sum;
    }
    cluster_sync(); // nobody leaves while the other may still write here or arrive
}

struct Measured {
    double fraction = 0, slowest = 1; // of the tensor cores' peak, mean and least of the SMs
    double copied = 0;                // bytes per clock into each SM
    double megahertz = 0, microseconds = 0;
    bool early = false, stuck = false;
};

using Kernel = void (*)(Map, Config, Sample *, Stuck *);

struct Setup {
    Results &results;
    Map wide, narrow; // rows of 128 and 64 bytes
    u32 multiprocessors;
};

// Runs `repeat` times back to back; clocks are of the last run, wall time is the mean.
Measured measure(Setup &setup, Kernel kernel, Kind kind, Config config, u32 ctas, u32 cluster, u32 repeat) {
    Measured measured;
    const Buffer<Sample> samples(ctas);
    const Buffer<Stuck> stuck(1);
    allow_shared(kernel, SHARED);
    const Map &map = config.row == 128 ? setup.wide : setup.narrow;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    launch(kernel, ctas, THREADS, SHARED, cluster, map, config, samples.get(), stuck.get()); // brings x into L2
    CHECK(cudaEventRecord(begin));
    for (u32 i = 0; i < repeat; ++i)
        launch(kernel, ctas, THREADS, SHARED, cluster, map, config, samples.get(), stuck.get());
    CHECK(cudaEventRecord(end));
    finish();
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    measured.microseconds = milliseconds * 1000 / repeat;
    if (!nobody_stuck(setup.results, stuck, INFO[kind].name)) {
        measured.stuck = true;
        return measured;
    }
    const double ideal = 2.0 * config.iterations * INFO[kind].wgmmas * INFO[kind].n / 2;
    for (const Sample &s : samples.read()) {
        if (INFO[kind].n != 0) {
            const double clocks = static_cast<double>(std::max(s.end[0], s.end[1]) - std::min(s.begin[0], s.begin[1]));
            measured.fraction += ideal / clocks / ctas;
            measured.slowest = std::min(measured.slowest, ideal / clocks);
            if (s.nanoseconds != 0)
                measured.megahertz += 1000.0 * static_cast<double>(s.end[0] - s.begin[0]) / static_cast<double>(s.nanoseconds) / ctas;
        }
        if (s.copy_clocks > 0)
            measured.copied += static_cast<double>(s.copy_bytes) / static_cast<double>(s.copy_clocks) / ctas;
        measured.early = measured.early || s.ended_early != 0;
    }
    return measured;
}

Config quiet(u32 iterations, bool random) {
    Config config{};
    config.iterations = iterations;
    config.random = random;
    config.row = 128;
    config.slots = 4;
    config.bytes = ROWS * 128;
    return config;
}
// With copies of `row`-byte rows that bring `rate` bytes per clock, as many as possible where it is 0.
Config with_copies(Config config, Kind kind, u32 row, double rate, bool multicast) {
    config.row = row;
    config.bytes = ROWS * row;
    config.slots = RING_BYTES / config.bytes;
    config.multicast = multicast;
    config.interval = rate == 0 ? 0 : static_cast<u32>(config.bytes / rate + 0.5);
    const double clocks = INFO[kind].n == 0 ? 200e3 : 3.0 * 2 * config.iterations * INFO[kind].wgmmas * INFO[kind].n / 2;
    config.copies = static_cast<u32>(clocks * (rate == 0 ? 128 : rate) / config.bytes) + 16;
    return config;
}

constexpr u32 ITERATIONS = 480;
// As many clocks for all kinds.
u32 iterations(Kind kind) { return INFO[kind].n == 0 ? 0 : ITERATIONS * 800 / (INFO[kind].wgmmas * INFO[kind].n); }

std::string cell(const Measured &m) {
    if (m.stuck)
        return "stuck";
    return text("%5.1f%%@%4.1f%s", 100 * m.fraction, m.copied, m.early ? "!" : "");
}

void rate_table(Setup &setup, bool all) {
    const u32 everywhere = setup.multiprocessors / 2 * 2;
    struct Load {
        u32 row;
        double rate;
        bool multicast;
    };
    const std::vector<Load> loads = {{128, 0, false}, {128, 50, false}, {128, 50, true}, {128, 70, true},
                                     {64, 50, false}, {64, 50, true},   {64, 70, true}};
    std::printf("| %s, random data: %% of the tensor cores' peak @ bytes per clock that TMA writes into each SM\n",
                all ? "all SMs" : "one SM (multicast: one pair)");
    std::printf("| %-30s %12s", "", "no TMA");
    for (const Load &load : loads)
        std::printf(" %12s", text("%uB %s %s", load.row, load.multicast ? "mc" : "-", load.rate == 0 ? "max" : text("%.0f", load.rate).c_str()).c_str());
    std::printf("\n");
    struct Row {
        Kind kind;
        Kernel kernel;
    };
    const std::vector<Row> rows = {{NONE, rates<NONE, 128>},     {RS_0, rates<RS_0, 128>},   {RS_1, rates<RS_1, 128>},
                                   {RS_2, rates<RS_2, 128>},     {FOLD1, rates<FOLD1, 128>}, {FOLD2, rates<FOLD2, 128>},
                                   {SS_208, rates<SS_208, 128>}, {SS_256, rates<SS_256, 128>}};
    const char *scope = all ? "all SMs" : "one SM";
    std::string table;
    for (const Row &row : rows) {
        std::string line = text("| %-30s", INFO[row.kind].name);
        if (row.kind != NONE) {
            const Measured m =
                measure(setup, row.kernel, row.kind, quiet(iterations(row.kind), true), all ? everywhere : 1, 1, 3);
            setup.results.number(text("%s, %s", INFO[row.kind].name, scope), 100 * m.fraction, "% of peak",
                                 text("%.0f (slowest SM %.1f, %.0f MHz, %.1f us)",
                                      100 * std::min(1.0, 128 / INFO[row.kind].bytes), 100 * m.slowest, m.megahertz,
                                      m.microseconds));
            line += text(" %12s", cell(m).c_str());
        } else {
            line += text(" %12s", "");
        }
        for (const Load &load : loads) {
            const Config config =
                with_copies(quiet(iterations(row.kind), true), row.kind, load.row, load.rate, load.multicast);
            const u32 cluster = load.multicast ? 2 : 1;
            const Measured m = measure(setup, row.kernel, row.kind, config, all ? everywhere : cluster, cluster, 3);
            const std::string title =
                text("%s, %s, TMA %u B rows%s, %s", INFO[row.kind].name, scope, load.row, load.multicast ? ", multicast" : "",
                     load.rate == 0 ? "as fast as it goes" : text("%.0f B/clk wanted", load.rate).c_str());
            if (row.kind != NONE) {
                const double sum = std::min(1.0, (128 - m.copied) / INFO[row.kind].bytes);
                setup.results.number(title, 100 * m.fraction, "% of peak",
                                     text("%.0f if TMA writes share the 128 B/clk, %.0f if not; slowest SM %.1f%s", 100 * sum,
                                          100 * std::min(1.0, 128 / INFO[row.kind].bytes), 100 * m.slowest,
                                          m.early ? "; the copies ended early" : ""));
            }
            setup.results.number(title + ": TMA", m.copied, "B/clk",
                                 text("%s", load.multicast ? "up to 70 (L2 gives half of it)" : all ? "35 to 47" : "up to 64"));
            line += text(" %12s", cell(m).c_str());
        }
        table += line + "\n";
    }
    std::fputs(table.c_str(), stdout);
    std::fflush(stdout);
}

// Longer runs: does the clock fall, and what do zeros, random data and the swizzle change.
void sustained(Setup &setup) {
    struct Row {
        Kind kind;
        u32 span;
        Kernel kernel;
    };
    const std::vector<Row> rows = {{RS_0, 128, rates<RS_0, 128>},   {RS_0, 64, rates<RS_0, 64>},
                                   {RS_2, 128, rates<RS_2, 128>},   {RS_2, 64, rates<RS_2, 64>},
                                   {FOLD2, 128, rates<FOLD2, 128>}, {FOLD2, 64, rates<FOLD2, 64>},
                                   {SS_256, 128, rates<SS_256, 128>}};
    const u32 ctas = setup.multiprocessors / 2 * 2;
    std::string table = "| all SMs, no TMA, 200 launches back to back\n";
    for (const Row &row : rows)
        for (const bool random : {false, true}) {
            const Config config = quiet(4 * iterations(row.kind), random);
            const Measured m = measure(setup, row.kernel, row.kind, config, ctas, 1, 200);
            const double flop = 2.0 * 64 * 16 * INFO[row.kind].n * 2 * config.iterations * INFO[row.kind].wgmmas * ctas;
            const double teraflops = flop / m.microseconds / 1e6;
            const std::string name = text("%s, %u B swizzle, %s, sustained", INFO[row.kind].name, row.span, random ? "random" : "zeros");
            setup.results.number(name, teraflops, "TFLOP/s",
                                 text("%s of 989 at 1830 MHz (%.1f %% per clock, %.0f MHz)",
                                      random ? "650 to 850" : "900 to 1000", 100 * m.fraction, m.megahertz));
            table += text("| %-56s %6.0f TFLOP/s %5.1f %% per clock %5.0f MHz\n", name.c_str(), teraflops, 100 * m.fraction,
                          m.megahertz);
        }
    std::fputs(table.c_str(), stdout);
    std::fflush(stdout);
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("rates");
    const cudaDeviceProp device = open_device(results);
    std::vector<u16> x(static_cast<size_t>(SAMPLES) * TOKENS * COLUMNS);
    for (size_t i = 0; i < x.size(); ++i)
        x[i] = static_cast<u16>((scramble(static_cast<u32>(i)) & 0x80ff) | 0x3f00);
    const Buffer<u16> on_device(x);
    Setup setup{results, tensor_map(on_device.get(), {COLUMNS, TOKENS, SAMPLES}, {64, ROWS, 1}, 128),
                tensor_map(on_device.get(), {COLUMNS, TOKENS, SAMPLES}, {32, ROWS, 1}, 64),
                static_cast<u32>(device.multiProcessorCount)};
    rate_table(setup, true);
    rate_table(setup, false);
    sustained(setup);
    return results.status();
}
