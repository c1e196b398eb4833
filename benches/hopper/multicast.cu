// Probe 3: the pipeline of a pair of CTAs. Each CTA loads one sample of x for both (multicast), and a weight tile for itself,
// through 4 stages with full and empty barriers; both its consumer warpgroups read every stage and release it at both CTAs.
//
// Everything that arrives is added up, weighted by place and tile, and compared with sums made by the host. A wait of more
// than two seconds ends the kernel and says who waited for what.

#include "probe.cuh"

namespace {

constexpr u32 STAGES = 4, TOKENS = 197, ROWS = 200, SPAN = 64, SAMPLES = 32, COLUMNS = 256;
constexpr u32 CHUNKS = COLUMNS / (SPAN / 2), WEIGHT_ROWS = 128;
constexpr u32 X_BYTES = ROWS * SPAN, W_BYTES = WEIGHT_ROWS * SPAN, STAGE_BYTES = W_BYTES + 2 * X_BYTES;
static_assert(W_BYTES % 512 == 0 && X_BYTES % 512 == 0 && STAGE_BYTES % 512 == 0);
constexpr u32 BARRIERS_AT = STAGES * STAGE_BYTES, SHARED = BARRIERS_AT + 2 * STAGES * 8;
constexpr u32 TILES = 1000, THREADS = 384;

struct Result {
    u32 sums[3]; // of the weights, of sample 0, of sample 1
    u32 clocks;
};

// What the pair `cluster` loads for tile t.
__host__ __device__ constexpr u32 sample_of(u32 cluster, u32 t, u32 rank) { return (2 * (cluster + t) + rank) % SAMPLES; }
__host__ __device__ constexpr u32 chunk_of(u32 cluster, u32 t) { return (t * 5 + cluster) % CHUNKS; }
__host__ __device__ constexpr u32 weight_of(u32 t) { return 2 * t + 1; }

__global__ void __launch_bounds__(THREADS, 1)
    pipeline(const __grid_constant__ Map x, const __grid_constant__ Map w, Result *results, Stuck *stuck) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u32 sums[3];
    const u32 base = aligned_base(shared), full = base + BARRIERS_AT, empty = full + STAGES * 8;
    const u32 rank = cluster_rank(), cluster = blockIdx.x / 2;
    const u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x < 3)
        sums[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 4); // two warpgroups of two CTAs
        }
        fence_barrier_init();
    }
    __syncthreads();
    cluster_sync(); // before anybody signals the other CTA
    const long long begin = clock64();

    if (group == 2) {
        if (threadIdx.x == 256) {
            u32 stage = 0, phase = 0;
            bool going = true;
            for (u32 t = 0; t < TILES && going; ++t) {
                going = wait(empty + 8 * stage, phase ^ 1, stuck, PRODUCER, EMPTY, stage, t);
                if (!going)
                    break;
                const u32 at = base + stage * STAGE_BYTES, bar = full + 8 * stage;
                const int column = static_cast<int>(chunk_of(cluster, t) * (SPAN / 2));
                arrive_expect(bar, STAGE_BYTES);
                tma_load(at, &w, bar, column, static_cast<int>(rank * WEIGHT_ROWS), 0);
                tma_multicast(at + W_BYTES + rank * X_BYTES, &x, bar, column, 0,
                              static_cast<int>(sample_of(cluster, t, rank)), 3);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            // Until the other CTA has released all that this one has written.
            for (u32 i = 0; i < STAGES && going; ++i) {
                going = wait(empty + 8 * stage, phase ^ 1, stuck, PRODUCER, EMPTY, stage, TILES + i);
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }
    } else {
        u32 stage = 0, phase = 0, own[3] = {0, 0, 0};
        for (u32 t = 0; t < TILES; ++t) {
            const bool arrived = wait(full + 8 * stage, phase, stuck, CONSUMER, FULL, stage, t);
            if (!named_barrier_all(1 + group, 128, arrived))
                break;
            // Both warpgroups read the whole stage, as both would read all of x.
            const u32 *words = reinterpret_cast<const u32 *>(shared + stage * STAGE_BYTES);
            u32 w_sum = 0, x_sum[2] = {0, 0};
            for (u32 i = threadIdx.x % 128; i < W_BYTES / 4; i += 128)
                w_sum += words[i] * (2 * i + 1);
            for (u32 r = 0; r < 2; ++r)
                for (u32 i = threadIdx.x % 128; i < X_BYTES / 4; i += 128)
                    x_sum[r] += words[(W_BYTES + r * X_BYTES) / 4 + i] * (2 * i + 1);
            own[0] += w_sum * weight_of(t);
            own[1] += x_sum[0] * weight_of(t);
            own[2] += x_sum[1] * weight_of(t);
            named_barrier(1 + group, 128); // all 128 have read
            if (threadIdx.x % 128 < 2)
                arrive_remote(empty + 8 * stage, threadIdx.x % 128);
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
        for (u32 i = 0; i < 3; ++i)
            atomicAdd(&sums[i], own[i]);
    }
    __syncthreads();
    const long long end = clock64();
    cluster_sync(); // nobody leaves while the other may still write here or arrive
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 3; ++i)
            results[blockIdx.x].sums[i] = sums[i];
        results[blockIdx.x].clocks = static_cast<u32>(end - begin);
    }
}

u16 x_element(u32 sample, u32 row, u32 k) { return static_cast<u16>(scramble(sample * 1000003 + row * 1009 + k + 5)); }
u16 w_element(u32 row, u32 k) { return static_cast<u16>(scramble(row * 4099 + k + 99)); }

// The sum that a consumer makes of a box: 32-bit words by their place in shared memory.
template <class F> u32 box_sum(u32 rows, F &&value) {
    std::vector<u8> image(rows * SPAN);
    for (u32 row = 0; row < rows; ++row)
        for (u32 k = 0; k < SPAN / 2; ++k) {
            const u16 element = value(row, k);
            std::memcpy(&image[swizzled(SPAN, row, k * 2)], &element, 2);
        }
    u32 sum = 0;
    for (u32 i = 0; i < rows * SPAN / 4; ++i) {
        u32 word;
        std::memcpy(&word, &image[i * 4], 4);
        sum += word * (2 * i + 1);
    }
    return sum;
}

void run(Results &results, u32 ctas, const char *name) {
    std::vector<u16> x(static_cast<size_t>(SAMPLES) * TOKENS * COLUMNS), w(static_cast<size_t>(2) * WEIGHT_ROWS * COLUMNS);
    for (u32 s = 0; s < SAMPLES; ++s)
        for (u32 row = 0; row < TOKENS; ++row)
            for (u32 k = 0; k < COLUMNS; ++k)
                x[(static_cast<size_t>(s) * TOKENS + row) * COLUMNS + k] = x_element(s, row, k);
    for (u32 row = 0; row < 2 * WEIGHT_ROWS; ++row)
        for (u32 k = 0; k < COLUMNS; ++k)
            w[static_cast<size_t>(row) * COLUMNS + k] = w_element(row, k);
    const Buffer<u16> x_device(x), w_device(w);
    const Map x_map = tensor_map(x_device.get(), {COLUMNS, TOKENS, SAMPLES}, {SPAN / 2, ROWS, 1}, SPAN);
    const Map w_map = tensor_map(w_device.get(), {COLUMNS, 2 * WEIGHT_ROWS, 1}, {SPAN / 2, WEIGHT_ROWS, 1}, SPAN);
    const Buffer<Result> out(ctas);
    const Buffer<Stuck> stuck(1);
    allow_shared(pipeline, SHARED);
    launch(pipeline, ctas, THREADS, SHARED, 2, x_map, w_map, out.get(), stuck.get());
    finish();
    if (!nobody_stuck(results, stuck, name))
        return;

    std::vector<u32> x_sums(SAMPLES * CHUNKS), w_sums(2 * CHUNKS);
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        for (u32 s = 0; s < SAMPLES; ++s)
            x_sums[s * CHUNKS + chunk] = box_sum(ROWS, [&](u32 row, u32 k) {
                return row < TOKENS ? x_element(s, row, chunk * (SPAN / 2) + k) : u16{0};
            });
        for (u32 r = 0; r < 2; ++r)
            w_sums[r * CHUNKS + chunk] = box_sum(
                WEIGHT_ROWS, [&](u32 row, u32 k) { return w_element(r * WEIGHT_ROWS + row, chunk * (SPAN / 2) + k); });
    }
    const std::vector<Result> got = out.read();
    u32 wrong = 0;
    double clocks = 0;
    for (u32 cta = 0; cta < ctas; ++cta) {
        const u32 cluster = cta / 2;
        u32 expected[3] = {0, 0, 0};
        for (u32 t = 0; t < TILES; ++t) {
            const u32 chunk = chunk_of(cluster, t);
            expected[0] += w_sums[cta % 2 * CHUNKS + chunk] * weight_of(t);
            for (u32 r = 0; r < 2; ++r)
                expected[1 + r] += x_sums[sample_of(cluster, t, r) * CHUNKS + chunk] * weight_of(t);
        }
        for (u32 i = 0; i < 3; ++i)
            wrong += got[cta].sums[i] != 2 * expected[i]; // two warpgroups
        clocks += got[cta].clocks;
    }
    results.check(wrong == 0, name, text("%u tiles of %u CTAs, %u of %u sums wrong; expected 0", TILES, ctas, wrong, 3 * ctas));
    results.number(std::string(name) + ", bytes per clock and SM", double(TILES) * STAGE_BYTES / (clocks / ctas), "B/clk",
                   "(bound by the consumers' generic loads; at least 15)");
}

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("multicast");
    const cudaDeviceProp device = open_device(results);
    allow_shared(pipeline, SHARED);
    for (const u32 size : {2u, 4u}) {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(size);
        config.blockDim = dim3(THREADS);
        config.dynamicSmemBytes = 227 * 1024 - 1024; // the whole SM, as the kernels to come
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = size;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
        allow_shared(pipeline, 227 * 1024 - 1024);
        int clusters = 0;
        CHECK(cudaOccupancyMaxActiveClusters(&clusters, pipeline, &config));
        results.number(text("clusters of %u at a time", size), clusters, "clusters", size == 2 ? "66" : "32 or 33");
    }
    run(results, 2, "one pair");
    run(results, static_cast<u32>(device.multiProcessorCount) / 2 * 2, "all SMs");
    return results.status();
}
