// Probe 6: the folded forward, whole but for biases: TMA (multicast in a pair of CTAs), full and empty barriers, ldmatrix, the
// fold W0 + z dW in f32, RS n200 wgmma, stmatrix and TMA store; for one and two samples per CTA and BK = 32 and 64.
//
//     y[s, t, n] = sum_k bf16(W0[n, k] + z[s, n] dW[n, k]) x[s, t, k]
//
// First with small integers against a plain kernel, bit by bit: a fragment that is rewritten too early, or a stage that is
// released too early, gives wrong numbers. Then timed at the shapes of ViT-B.

#include "wgmma.cuh"

namespace {

constexpr u32 THREADS = 384, ROWS = 200, TOKENS = 197, CHANNELS = 128;

// S samples, tiles of BK columns (rows of 2 BK bytes, swizzled over as many), clusters of CLUSTER CTAs.
template <int S_, u32 BK_, u32 STAGES_, u32 CLUSTER_> struct Shape {
    static constexpr int S = S_;
    static constexpr u32 BK = BK_, STAGES = STAGES_, CLUSTER = CLUSTER_, SPAN = 2 * BK;
    static constexpr u32 W_BYTES = CHANNELS * SPAN, X_BYTES = ROWS * SPAN, STAGE_BYTES = 2 * W_BYTES + S * X_BYTES;
    static constexpr u32 OUT_BYTES = ROWS * 128; // a warpgroup's staging tile, [tokens][64 channels]
    static constexpr u32 OUT_AT = STAGES * STAGE_BYTES, BARRIERS_AT = OUT_AT + 2 * OUT_BYTES, SHARED = BARRIERS_AT + 16 * STAGES;
    static_assert(OUT_AT % 1024 == 0 && W_BYTES % (8 * SPAN) == 0 && X_BYTES % (8 * SPAN) == 0 && SHARED <= 227 * 1024);
};

struct Problem {
    Map w0, dw, x, y; // y: [samples, TOKENS, n]
    const float *z;   // [samples, n]
    u32 n, ktiles, columns, tiles;
    Stuck *stuck; // in host memory, to be read after the trap
};

// For consumers, where a watchdog costs the last registers: the producer's, which waits for them, is enough.
__device__ __forceinline__ void wait_forever(u32 barrier, u32 parity) {
    while (!try_wait(barrier, parity)) {
    }
}
// For producers: ends the kernel with an error if the phase does not come.
__device__ __forceinline__ void wait_or_trap(u32 barrier, u32 parity, Stuck *stuck, u32 stage, u32 step) {
    u64 begin = 0;
    while (!try_wait(barrier, parity)) {
        if (begin == 0)
            begin = nanoseconds();
        if (nanoseconds() - begin > 2'000'000'000) {
            if (stuck->stop == 0) {
                stuck->block = blockIdx.x;
                stuck->role = PRODUCER;
                stuck->barrier = EMPTY;
                stuck->stage = stage;
                stuck->parity = parity;
                stuck->step = step;
                stuck->stop = 1;
                __threadfence_system();
            }
            __trap();
        }
    }
}

template <class P>
__global__ void __launch_bounds__(THREADS, 1) mainloop(const __grid_constant__ Problem problem) {
    using T = __nv_bfloat16;
    constexpr int S = P::S;
    constexpr u32 SPAN = P::SPAN, STEPS = P::BK / 16;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = aligned_base(shared), full = base + P::BARRIERS_AT, empty = full + 8 * P::STAGES;
    const u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const u32 rank = P::CLUSTER == 1 ? 0 : cluster_rank(), worker = blockIdx.x / P::CLUSTER;
    const u32 workers = gridDim.x / P::CLUSTER;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < P::STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2 * P::CLUSTER); // the consumer warpgroups of all CTAs
        }
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync();

    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) {
            u32 stage = 0, phase = 0;
            for (u32 tile = worker; tile < problem.tiles; tile += workers) {
                const int channel = static_cast<int>((tile % problem.columns * P::CLUSTER + rank) * CHANNELS);
                const int sample = static_cast<int>(tile / problem.columns * S);
                for (u32 kt = 0; kt < problem.ktiles; ++kt) {
                    wait_or_trap(empty + 8 * stage, phase ^ 1, problem.stuck, stage, kt);
                    const u32 bar = full + 8 * stage, at = base + stage * P::STAGE_BYTES, x_at = at + 2 * P::W_BYTES;
                    const int k = static_cast<int>(kt * P::BK);
                    arrive_expect(bar, P::STAGE_BYTES);
                    tma_load(at, &problem.w0, bar, k, channel, 0);
                    tma_load(at + P::W_BYTES, &problem.dw, bar, k, channel, 0);
                    if constexpr (P::CLUSTER == 1) {
                        for (int i = 0; i < S; ++i)
                            tma_load(x_at + i * P::X_BYTES, &problem.x, bar, k, 0, sample + i);
                    } else if constexpr (S == 2) { // each CTA brings one sample for both
                        tma_multicast(x_at + rank * P::X_BYTES, &problem.x, bar, k, 0, sample + static_cast<int>(rank), 3);
                    } else if (rank == kt % 2) { // in turn
                        tma_multicast(x_at, &problem.x, bar, k, 0, sample, 3);
                    }
                    if (++stage == P::STAGES) {
                        stage = 0;
                        phase ^= 1;
                    }
                }
            }
            for (u32 i = 0; i < P::STAGES; ++i) { // until all that was written here or there is released
                wait_or_trap(empty + 8 * stage, phase ^ 1, problem.stuck, stage, ~0u);
                if (++stage == P::STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 offset = swizzled(SPAN, group * 64 + warp * 16 + lane % 16, lane / 16 * 16);
        u32 stage = 0, phase = 0;
#pragma unroll 1
        for (u32 tile = worker; tile < problem.tiles; tile += workers) {
            const u32 channel = (tile % problem.columns * P::CLUSTER + rank) * CHANNELS + group * 64 + warp * 16 + lane / 4;
            const u32 sample = tile / problem.columns * S;
            float acc[S][100], z[S][2];
#pragma unroll
            for (int i = 0; i < S; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    z[i][h] = problem.z[(sample + i) * problem.n + channel + 8 * h];
            u32 a[2][4];
            int add = 0;
#pragma unroll 1
            for (u32 kt = 0; kt < problem.ktiles; ++kt) {
                wait_forever(full + 8 * stage, phase);
                const u32 at = base + stage * P::STAGE_BYTES;
#pragma unroll
                for (u32 k = 0; k < STEPS; ++k) {
                    u32 w0[4], dw[4];
                    ldmatrix(w0, at + (offset ^ k * 32));
                    ldmatrix(dw, at + P::W_BYTES + (offset ^ k * 32));
#pragma unroll
                    for (int i = 0; i < S; ++i) {
                        u32(&fragment)[4] = a[S == 2 ? i : k % 2];
                        wgmma_wait<1>(); // the one that reads `fragment` has retired
                        // And all that read the previous stage, when the newest is of this one.
                        if (k == (S == 2 ? 0 : 1) && i == S - 1 && kt != 0) {
                            const u32 previous = stage == 0 ? P::STAGES - 1 : stage - 1;
                            if (threadIdx.x % 128 < P::CLUSTER)
                                arrive_remote(empty + 8 * previous, threadIdx.x % 128);
                        }
#pragma unroll
                        for (u32 j = 0; j < 4; ++j)
                            fragment[j] = fold(w0[j], dw[j], z[i][j % 2]);
                        pin(fragment);
                        wgmma_fence();
                        Wgmma<T, 200>::rs<0>(acc[i], fragment, k_major<SPAN>(at + 2 * P::W_BYTES + i * P::X_BYTES + k * 32), add);
                        wgmma_commit();
                    }
                    add = 1;
                }
                if (++stage == P::STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            wgmma_wait<0>();
            if (threadIdx.x % 128 < P::CLUSTER)
                arrive_remote(empty + 8 * (stage == 0 ? P::STAGES - 1 : stage - 1), threadIdx.x % 128);
#pragma unroll
            for (int i = 0; i < S; ++i)
                pin(acc[i]);
            const u32 out = base + P::OUT_AT + group * P::OUT_BYTES, chunk = (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
            for (int i = 0; i < S; ++i) {
                if (threadIdx.x % 128 == 0)
                    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); // the last store has read the tile
                named_barrier(1 + group, 128);
                const float(&d)[100] = acc[i];
#pragma unroll
                for (u32 j = 0; j + 8 <= 100; j += 8)
                    stmatrix_trans(out + swizzled(128, j * 2 + lane % 8 + lane / 16 * 8, chunk), pack<T>(d[j], d[j + 1]),
                                   pack<T>(d[j + 2], d[j + 3]), pack<T>(d[j + 4], d[j + 5]), pack<T>(d[j + 6], d[j + 7]));
                stmatrix_trans(out + swizzled(128, 192 + lane % 8, chunk), pack<T>(d[96], d[97]), pack<T>(d[98], d[99]));
                fence_async();
                named_barrier(1 + group, 128);
                if (threadIdx.x % 128 == 0) { // rows beyond 197 are clipped
                    tma_store(&problem.y, out, static_cast<int>(channel - lane / 4 - warp * 16), 0, static_cast<int>(sample) + i);
                    tma_commit();
                }
            }
        }
        if (threadIdx.x % 128 == 0)
            tma_wait_all();
    }
    cluster_sync();
}

// One thread for each element of y.
__global__ void reference(const __nv_bfloat16 *w0, const __nv_bfloat16 *dw, const __nv_bfloat16 *x, const float *z, u32 n, u32 k,
                          u32 rows, const u16 *y, u32 *wrong) {
    const u32 column = blockIdx.x * 64 + threadIdx.x % 64, row = blockIdx.y * 4 + threadIdx.x / 64;
    if (column >= n || row >= rows)
        return;
    const float noise = z[row / TOKENS * n + column];
    float sum = 0;
    for (u32 i = 0; i < k; ++i) {
        const float w = fmaf(noise, __bfloat162float(dw[static_cast<size_t>(column) * k + i]), __bfloat162float(w0[static_cast<size_t>(column) * k + i]));
        sum = fmaf(__bfloat162float(__float2bfloat16(w)), __bfloat162float(x[static_cast<size_t>(row) * k + i]), sum);
    }
    const __nv_bfloat16 got = __ushort_as_bfloat16(y[static_cast<size_t>(row) * n + column]);
    if (__bfloat162float(__float2bfloat16(sum)) != __bfloat162float(got))
        atomicAdd(wrong, 1u);
}

// bf16 of small integers in [-range, range], or of either sign between 0.5 and 2 where range is 0.
__global__ void fill(u16 *to, size_t count, u32 range, u32 seed) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
        const u32 random = scramble(static_cast<u32>(i) + seed);
        const __nv_bfloat16 value = __float2bfloat16(static_cast<float>(static_cast<int>(random % (2 * range + 1)) - static_cast<int>(range)));
        to[i] = range == 0 ? static_cast<u16>((random & 0x80ff) | 0x3f00) : __bfloat16_as_ushort(value);
    }
}
__global__ void fill_z(float *to, u32 count, bool integers) {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256)
        to[i] = integers ? static_cast<float>(static_cast<int>(scramble(i + 31) % 5) - 2) : 1.0f + static_cast<float>(scramble(i) % 1024) / 4096;
}

struct Layer {
    u32 k, n;
    double cublas; // us of one product of 25,216 rows on an H200, without any adapter
};
constexpr u32 SAMPLES = 128;
constexpr Layer LAYERS[] = {{768, 768, 51}, {768, 3072, 188}, {3072, 768, 202}};

struct Tensors {
    Buffer<u16> w0, dw, x, y;
    Buffer<float> z;
    explicit Tensors(const Layer &layer)
        : w0(static_cast<size_t>(layer.n) * layer.k), dw(static_cast<size_t>(layer.n) * layer.k),
          x(static_cast<size_t>(SAMPLES) * TOKENS * layer.k), y(static_cast<size_t>(SAMPLES) * TOKENS * layer.n), z(static_cast<size_t>(SAMPLES) * layer.n) {}
    void fill_all(const Layer &layer, bool integers) {
        const size_t weights = static_cast<size_t>(layer.n) * layer.k;
        fill<<<512, 256>>>(w0.get(), weights, integers ? 2 : 0, 1);
        fill<<<512, 256>>>(dw.get(), weights, integers ? 2 : 0, 12345678);
        fill<<<512, 256>>>(x.get(), static_cast<size_t>(SAMPLES) * TOKENS * layer.k, integers ? 2 : 0, 87654321);
        fill_z<<<512, 256>>>(z.get(), SAMPLES * layer.n, integers);
        finish();
    }
};

template <class P> Problem problem_of(const Layer &layer, const Tensors &tensors, Stuck *stuck) {
    Problem problem{};
    problem.w0 = tensor_map(tensors.w0.get(), {layer.k, layer.n, 1}, {P::BK, CHANNELS, 1}, P::SPAN);
    problem.dw = tensor_map(tensors.dw.get(), {layer.k, layer.n, 1}, {P::BK, CHANNELS, 1}, P::SPAN);
    problem.x = tensor_map(tensors.x.get(), {layer.k, TOKENS, SAMPLES}, {P::BK, ROWS, 1}, P::SPAN);
    problem.y = tensor_map(tensors.y.get(), {layer.n, TOKENS, SAMPLES}, {64, ROWS, 1}, 128);
    problem.z = tensors.z.get();
    problem.n = layer.n;
    problem.ktiles = layer.k / P::BK;
    problem.columns = layer.n / (CHANNELS * P::CLUSTER);
    problem.tiles = problem.columns * (SAMPLES / P::S);
    problem.stuck = stuck;
    return problem;
}

// finish(), with who got stuck where the kernel has ended itself.
void finish_or_tell(Stuck *stuck) {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess)
        return;
    const Stuck s = *stuck;
    if (s.stop == 0)
        fail_hard("%s", cudaGetErrorString(error));
    fail_hard("gave up: CTA %u, %s, waited for %s[%u] parity %u at k tile %u", s.block, s.role == PRODUCER ? "producer" : "consumer",
              s.barrier == FULL ? "full" : "empty", s.stage, s.parity, s.step);
}

template <class P> std::string name_of() {
    return text("%d sample%s, BK %u, %u stages, %s", P::S, P::S == 1 ? "" : "s", P::BK, P::STAGES, P::CLUSTER == 2 ? "pair" : "single");
}

template <class P> void check(Results &results, u32 ctas, Stuck *stuck) {
    const Layer layer = LAYERS[0];
    Tensors tensors(layer);
    tensors.fill_all(layer, true);
    const size_t elements = static_cast<size_t>(SAMPLES) * TOKENS * layer.n;
    const Buffer<u32> wrong(1);
    const Problem problem = problem_of<P>(layer, tensors, stuck);
    allow_shared(mainloop<P>, P::SHARED);
    launch(mainloop<P>, ctas, THREADS, P::SHARED, P::CLUSTER, problem);
    finish_or_tell(stuck);
    using B = const __nv_bfloat16 *;
    reference<<<dim3(layer.n / 64, SAMPLES * TOKENS / 4), 256>>>(reinterpret_cast<B>(tensors.w0.get()), reinterpret_cast<B>(tensors.dw.get()),
                                                                 reinterpret_cast<B>(tensors.x.get()), tensors.z.get(), layer.n,
                                                                 layer.k, SAMPLES * TOKENS, tensors.y.get(), wrong.get());
    finish();
    results.check(wrong.read()[0] == 0, name_of<P>(), text("%u of %zu wrong; expected 0", wrong.read()[0], elements));
}

template <class P> void time_all(Results &results, u32 ctas, Stuck *stuck, const char *expected, std::string &table) {
    allow_shared(mainloop<P>, P::SHARED);
    std::string line = text("| %-36s", name_of<P>().c_str());
    for (const Layer &layer : LAYERS) {
        Tensors tensors(layer);
        tensors.fill_all(layer, false);
        const Problem problem = problem_of<P>(layer, tensors, stuck);
        cudaEvent_t begin, end;
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        constexpr u32 REPEAT = 50;
        for (u32 i = 0; i < 5; ++i)
            launch(mainloop<P>, ctas, THREADS, P::SHARED, P::CLUSTER, problem);
        CHECK(cudaEventRecord(begin));
        for (u32 i = 0; i < REPEAT; ++i)
            launch(mainloop<P>, ctas, THREADS, P::SHARED, P::CLUSTER, problem);
        CHECK(cudaEventRecord(end));
        finish_or_tell(stuck);
        float milliseconds = 0;
        CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
        CHECK(cudaEventDestroy(begin));
        CHECK(cudaEventDestroy(end));
        const double us = milliseconds * 1000 / REPEAT;
        const double teraflops = 2.0 * SAMPLES * TOKENS * layer.k * layer.n / us / 1e6;
        results.number(text("%s, %u -> %u", name_of<P>().c_str(), layer.k, layer.n), us, "us",
                       text("%s; %.0f TFLOP/s without the padding; cuBLAS on an H200: %.0f us", expected, teraflops, layer.cublas));
        line += text(" %7.1f us %4.0f TF %4.2f", us, teraflops, layer.cublas / us);
    }
    table += line + "\n";
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("mainloop");
    const u32 ctas = static_cast<u32>(open_device(results).multiProcessorCount) / 2 * 2;
    Stuck *stuck = nullptr;
    CHECK(cudaHostAlloc(&stuck, sizeof(Stuck), cudaHostAllocMapped));
    std::memset(stuck, 0, sizeof(Stuck));
    using Design = Shape<2, 32, 4, 2>;
    using Single = Shape<2, 32, 4, 1>;
    using Wide = Shape<2, 64, 2, 2>;
    using One = Shape<1, 32, 6, 2>;
    using OneWide = Shape<1, 64, 3, 2>;
    check<Design>(results, ctas, stuck);
    check<Single>(results, ctas, stuck);
    check<Wide>(results, ctas, stuck);
    check<One>(results, ctas, stuck);
    check<OneWide>(results, ctas, stuck);
    std::string table = "| folded forward without biases, 25,216 rows, random data; last figure: cuBLAS on an H200 / this\n";
    table += text("| %-36s %23s %23s %23s\n", "", "768 -> 768", "768 -> 3072", "3072 -> 768");
    time_all<Design>(results, ctas, stuck, "0.65 to 0.95 of cuBLAS' speed", table);
    time_all<Single>(results, ctas, stuck, "bound by L2: 52 B/clk wanted, 35 to 47 there", table);
    time_all<Wide>(results, ctas, stuck, "below BK 32 if two stages are too few", table);
    time_all<One>(results, ctas, stuck, "0.5 to 0.7 of cuBLAS' speed", table);
    time_all<OneWide>(results, ctas, stuck, "0.5 to 0.7 of cuBLAS' speed", table);
    std::fputs(table.c_str(), stdout);
    CHECK(cudaFreeHost(stuck));
    return results.status();
}
