// Every variant of the kernels in kernels/sm90 at the layers of a ViT-B, in bf16, each beside cuBLAS' GEMM of the same layer.
//
// A variant is a kernel's template with other stages, clusters or staging than what ships. One line each: median of
// ROUNDS rounds, interleaved with cuBLAS; the ratio to cuBLAS' median; the largest error of some outputs against sums in
// double, in units of the largest of them. `--profile` only launches what ships, once at 768 -> 3072, for a profiler. What wins belongs into the constants of src/cuda/**/sm90.
//
// Tensors are [M, K] and [M, N] with M = 2 * 64 * 197 rows; random bf16 in [-1, 1), matrices divided by sqrt(K), z in [0.5, 1.5).

#include "probe.cuh"

#include "sm90/folded_linear.cuh"
#include "sm90/low_rank_linear.cuh"
#include "sm90/noisy_linear.cuh"
#include "sm90/weight_gradient.cuh"

#include <algorithm>
#include <cmath>
#include <dlfcn.h>
#include <functional>

namespace {

namespace sm90 = pace::sm90;
using bf16 = __nv_bfloat16;

constexpr u32 SAMPLES = 128, TOKENS = 197, ROWS = SAMPLES * TOKENS, RANK = 16;
constexpr u32 ROUNDS = 7, REPEAT = 10, CHECKED = 2048;

// ---- kernels: what PACE_CLUSTER_KERNELS_16 makes of the shipped ones, with the cluster given at the launch

template <class Shared> __global__ void __launch_bounds__(384, 1) low_rank(const __grid_constant__ pace::Sm90LinearParams p) {
    sm90::low_rank::linear<bf16, Shared>(p);
}
template <class Shared> __global__ void __launch_bounds__(384, 1) exact(const __grid_constant__ pace::Sm90LinearParams p) {
    sm90::exact::forward<bf16, true, Shared>(p);
}
template <bool INPUT, class Shared>
__global__ void __launch_bounds__(384, 1) folded(const __grid_constant__ pace::Sm90FoldedParams p) {
    sm90::folded::linear<bf16, INPUT, Shared>(p);
}
template <class Shared> __global__ void __launch_bounds__(384, 1) weight(const __grid_constant__ pace::Sm90WeightParams p) {
    sm90::weight::gradient<bf16, Shared>(p);
}
template <u32 CLUSTER> __global__ void __launch_bounds__(256) weight_sums(const __grid_constant__ pace::Sm90WeightParams p) {
    sm90::weight::add_up<bf16, CLUSTER>(p);
}

__global__ void fill(bf16 *to, size_t count, float scale, u32 seed) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull)
        to[i] = __float2bfloat16(scale * (static_cast<float>(scramble(static_cast<u32>(i) ^ seed) >> 8) / 8388608.0f - 1.0f));
}
__global__ void fill_z(float *to, size_t count) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull)
        to[i] = 0.5f + static_cast<float>(scramble(static_cast<u32>(i) ^ 77u) >> 8) / 16777216.0f;
}

// ---- tensors of one layer

struct Layer {
    u32 k, n;
};
constexpr Layer LAYERS[] = {{768, 768}, {768, 2304}, {768, 3072}, {3072, 768}};

struct Tensors {
    u32 k, n;
    Buffer<bf16> x, g, w0, wd, a, b, s, ds, y, dx, dw;
    Buffer<float> z, partial, bias_partial;
    explicit Tensors(const Layer &layer)
        : k(layer.k), n(layer.n), x(size_t(ROWS) * k), g(size_t(ROWS) * n), w0(size_t(n) * k), wd(size_t(n) * k), a(size_t(RANK) * k),
          b(size_t(n) * RANK), s(size_t(ROWS) * RANK), ds(size_t(ROWS) * RANK), y(size_t(ROWS) * n), dx(size_t(ROWS) * k), dw(size_t(n) * k),
          z(size_t(SAMPLES) * n), partial(size_t(2) * 144 * 128 * 256), bias_partial(size_t(2) * 144 * 128) {
        const float small = 1.0f / std::sqrt(static_cast<float>(k));
        fill<<<512, 256>>>(x.get(), size_t(ROWS) * k, 1.0f, 1);
        fill<<<512, 256>>>(g.get(), size_t(ROWS) * n, 1.0f, 2);
        fill<<<512, 256>>>(w0.get(), size_t(n) * k, small, 3);
        fill<<<512, 256>>>(wd.get(), size_t(n) * k, small, 4);
        fill<<<512, 256>>>(a.get(), size_t(RANK) * k, small, 5);
        fill<<<512, 256>>>(b.get(), size_t(n) * RANK, 1.0f, 6);
        fill<<<512, 256>>>(ds.get(), size_t(ROWS) * RANK, 1.0f, 7);
        fill_z<<<512, 256>>>(z.get(), size_t(SAMPLES) * n);
        finish();
    }
};

pace::TensorMap map_of(const void *base, const u64 (&dims)[3], const u32 (&box)[3], u32 span) {
    const Map map = tensor_map(const_cast<void *>(base), dims, box, span);
    pace::TensorMap words;
    static_assert(sizeof words == sizeof map);
    std::memcpy(&words, &map, sizeof map);
    return words;
}

// ---- cuBLAS, from whichever library the loader finds

class Cublas {
    using Create = int(void **);
    using Gemm = int(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *,
                     void *, int, int, int, int);
    void *handle_ = nullptr;
    Gemm *gemm_ = nullptr;

  public:
    Cublas() {
        for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
            if (void *library = dlopen(name, RTLD_NOW)) {
                auto *create = reinterpret_cast<Create *>(dlsym(library, "cublasCreate_v2"));
                gemm_ = reinterpret_cast<Gemm *>(dlsym(library, "cublasGemmEx"));
                if (!create || create(&handle_) != 0)
                    gemm_ = nullptr;
                return;
            }
        }
    }
    bool found() const { return gemm_ != nullptr; }
    // Column-major c [m, n] = a @ b in bf16, f32 inside.
    void run(bool trans_a, bool trans_b, u32 m, u32 n, u32 k, const void *a, u32 lda, const void *b, u32 ldb, void *c, u32 ldc) const {
        const float one = 1, zero = 0;
        constexpr int BF16 = 14, F32 = 68, DEFAULT = -1;
        const int status = gemm_(handle_, trans_a, trans_b, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), &one, a, BF16,
                                 static_cast<int>(lda), b, BF16, static_cast<int>(ldb), &zero, c, BF16, static_cast<int>(ldc), F32, DEFAULT);
        if (status != 0)
            fail_hard("cublasGemmEx: %d", status);
    }
};

// ---- timing

// Median microseconds of one launch.
class Timer {
    cudaEvent_t begin_, end_;

  public:
    Timer() {
        CHECK(cudaEventCreate(&begin_));
        CHECK(cudaEventCreate(&end_));
    }
    double run(const std::function<void()> &what) {
        what();
        CHECK(cudaEventRecord(begin_));
        for (u32 i = 0; i < REPEAT; ++i)
            what();
        CHECK(cudaEventRecord(end_));
        finish();
        float milliseconds = 0;
        CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
        return milliseconds * 1000 / REPEAT;
    }
};

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

struct Variant {
    std::string name;
    std::function<void()> launch;
    std::function<double()> error;
};

// What `--profile` runs: the shipped variant and cuBLAS, once each, for a profiler to look into.
bool profiling = false;

// Times what belongs to one GEMM of one layer.
void time_all(Results &results, std::string &table, const std::string &what, const Layer &layer, const std::function<void()> &cublas,
              const std::vector<Variant> &variants) {
    if (profiling) {
        if (cublas)
            cublas();
        variants.front().launch();
        finish();
        return;
    }
    Timer timer;
    std::vector<std::vector<double>> times(variants.size() + 1);
    for (u32 round = 0; round < ROUNDS; ++round) {
        if (cublas)
            times[0].push_back(timer.run(cublas));
        for (size_t i = 0; i < variants.size(); ++i)
            times[i + 1].push_back(timer.run(variants[i].launch));
    }
    const double base = cublas ? median(times[0]) : NAN;
    const double flop = 2.0 * ROWS * layer.k * layer.n;
    if (cublas)
        table += text("| %-12s %4u -> %4u  %-34s %8.1f us %5.0f TF\n", what.c_str(), layer.k, layer.n, "cuBLAS, the bare GEMM", base, flop / base / 1e6);
    for (size_t i = 0; i < variants.size(); ++i) {
        variants[i].launch();
        finish();
        const double us = median(times[i + 1]), error = variants[i].error();
        const std::string name = text("%s, %u -> %u, %s", what.c_str(), layer.k, layer.n, variants[i].name.c_str());
        results.check(error < 0.02, name, text("error %.2g of the largest output; below 0.02 is right", error));
        results.number(name, us, "us", text("cuBLAS %.1f us, ratio %.2f", base, us / base));
        table += text("| %-12s %4u -> %4u  %-34s %8.1f us %5.0f TF  %5.2f x  error %.1e\n", what.c_str(), layer.k, layer.n,
                      variants[i].name.c_str(), us, flop / us / 1e6, us / base, error);
    }
}

// ---- variants

std::vector<float> wide(const std::vector<bf16> &values) {
    std::vector<float> result(values.size());
    for (size_t i = 0; i < values.size(); ++i)
        result[i] = __bfloat162float(values[i]);
    return result;
}

// Host copies, for the expected values.
struct Host {
    std::vector<float> x, g, w0, wd, a, b, ds, z;
    explicit Host(const Tensors &t)
        : x(wide(t.x.read())), g(wide(t.g.read())), w0(wide(t.w0.read())), wd(wide(t.wd.read())), a(wide(t.a.read())), b(wide(t.b.read())),
          ds(wide(t.ds.read())), z(t.z.read()) {}
};

// Largest difference of some outputs [rows, columns] from `expected`, in units of the largest of those.
double error_of(const Buffer<bf16> &output, u32 rows, u32 columns, const std::function<double(u32, u32)> &expected, u32 checked = CHECKED) {
    double worst = 0, largest = 0;
    u32 state = 12345;
    for (u32 i = 0; i < checked; ++i) {
        state = state * 1664525u + 1013904223u;
        const u32 row = (state >> 4) % rows;
        state = state * 1664525u + 1013904223u;
        const u32 column = (state >> 4) % columns;
        const double want = expected(row, column);
        bf16 got;
        CHECK(cudaMemcpy(&got, output.get() + size_t(row) * columns + column, sizeof got, cudaMemcpyDeviceToHost));
        const double difference = std::fabs(__bfloat162float(got) - want);
        worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
        largest = std::max(largest, std::fabs(want));
    }
    return worst / largest;
}

class Sweep {
    Tensors t_;
    Host h_;
    u32 sms_;

    double noise(u32 row, u32 n) const { return h_.z[size_t(row / TOKENS) * t_.n + n]; }

    pace::Sm90LinearParams linear(u32 tile_columns_of, u32 cluster, bool input) const {
        pace::Sm90LinearParams p{};
        p.noise.given = t_.z.get();
        p.noise.kind = pace::NOISE_GIVEN_PER_SAMPLE;
        p.noise.batch = SAMPLES / 2;
        p.noise.aligned = 1;
        p.rows = ROWS, p.copies = 1, p.samples = SAMPLES, p.tokens = TOKENS, p.rank = RANK, p.scale = 1;
        p.channels = input ? t_.k : t_.n, p.inner = input ? t_.n : t_.k;
        p.tile_rows = (ROWS + 128 * cluster - 1) / (128 * cluster);
        p.tile_columns = (p.channels + tile_columns_of - 1) / tile_columns_of;
        const bf16 *x = input ? t_.g.get() : t_.x.get(), *y = input ? t_.dx.get() : t_.y.get();
        p.x = map_of(x, {p.inner, ROWS, 1}, {64, 128, 1}, 128);
        p.weight = map_of(t_.w0.get(), {t_.k, t_.n, 1}, {64, (input ? 64 : tile_columns_of) / cluster, 1}, 128);
        p.y = map_of(y, {p.channels, ROWS, 1}, {64, 16, 1}, 128);
        return p;
    }

    u32 blocks(u32 cluster) const { return sms_ / cluster * cluster; }

  public:
    Sweep(const Layer &layer, u32 sms) : t_(layer), h_(t_), sms_(sms) {}

    template <u32 STAGES, u32 CLUSTER, u32 STAGING, bool INPUT> Variant low_rank_variant(const char *mark) const {
        using Shared = sm90::low_rank::Layout<RANK, INPUT, sm90::low_rank::Shape<STAGES, CLUSTER, STAGING>>;
        pace::Sm90LinearParams p = linear(sm90::low_rank::CHANNELS, CLUSTER, INPUT);
        if (INPUT) {
            p.factor = t_.a.get(), p.s = const_cast<bf16 *>(t_.ds.get());
        } else {
            p.factor = t_.b.get(), p.s = t_.s.get();
            p.extra = map_of(t_.a.get(), {t_.k, RANK, 1}, {64, RANK / CLUSTER, 1}, 128);
        }
        allow_shared(low_rank<Shared>, Shared::BYTES);
        const u32 grid = blocks(CLUSTER);
        const auto expected = [this](u32 row, u32 column) {
            double base = 0, adapter = 0;
            if (INPUT) {
                for (u32 n = 0; n < t_.n; ++n)
                    base += double(h_.g[size_t(row) * t_.n + n]) * h_.w0[size_t(n) * t_.k + column];
                for (u32 r = 0; r < RANK; ++r)
                    adapter += double(h_.ds[size_t(row) * RANK + r]) * h_.a[size_t(r) * t_.k + column];
            } else {
                for (u32 r = 0; r < RANK; ++r) {
                    double s = 0;
                    for (u32 k = 0; k < t_.k; ++k)
                        s += double(h_.x[size_t(row) * t_.k + k]) * h_.a[size_t(r) * t_.k + k];
                    adapter += noise(row, column) * s * h_.b[size_t(column) * RANK + r];
                }
                for (u32 k = 0; k < t_.k; ++k)
                    base += double(h_.x[size_t(row) * t_.k + k]) * h_.w0[size_t(column) * t_.k + k];
            }
            return base + adapter;
        };
        return {text("%u stages, cluster %u, staging %u%s", STAGES, CLUSTER, STAGING, mark),
                [=] { launch(low_rank<Shared>, grid, 384, Shared::BYTES, CLUSTER, p); },
                [=] { return error_of(INPUT ? t_.dx : t_.y, ROWS, INPUT ? t_.k : t_.n, expected); }};
    }

    // x @ W0^T + z * (x @ Wd^T), or for INPUT g @ (W0 + z * Wd).
    double dense(bool input, u32 row, u32 column) const {
        double sum = 0;
        if (input) {
            for (u32 n = 0; n < t_.n; ++n)
                sum += h_.g[size_t(row) * t_.n + n] * (h_.w0[size_t(n) * t_.k + column] + noise(row, n) * h_.wd[size_t(n) * t_.k + column]);
        } else {
            for (u32 k = 0; k < t_.k; ++k)
                sum += h_.x[size_t(row) * t_.k + k] * (h_.w0[size_t(column) * t_.k + k] + noise(row, column) * h_.wd[size_t(column) * t_.k + k]);
        }
        return sum;
    }

    template <u32 STAGES, u32 CLUSTER, u32 STAGING> Variant exact_variant(const char *mark) const {
        using Shared = sm90::exact::Layout<STAGES, CLUSTER, STAGING>;
        pace::Sm90LinearParams p = linear(sm90::exact::CHANNELS, CLUSTER, false);
        p.extra = map_of(t_.wd.get(), {t_.k, t_.n, 1}, {64, sm90::exact::CHANNELS / CLUSTER, 1}, 128);
        p.extra_by_column = 1;
        allow_shared(exact<Shared>, Shared::BYTES);
        const u32 grid = blocks(CLUSTER);
        return {text("%u stages, cluster %u, staging %u%s", STAGES, CLUSTER, STAGING, mark),
                [=] { launch(exact<Shared>, grid, 384, Shared::BYTES, CLUSTER, p); },
                [this] { return error_of(t_.y, ROWS, t_.n, [this](u32 r, u32 c) { return dense(false, r, c); }); }};
    }

    template <bool INPUT, u32 UNIT, u32 COUNT, u32 CHUNK, u32 STAGES, u32 CLUSTER>
    Variant folded_variant(const char *mark) const {
        using Shared = sm90::folded::Layout<UNIT, COUNT, CHUNK, STAGES, CLUSTER>;
        pace::Sm90FoldedParams p{};
        p.z = t_.z.get();
        p.rows = INPUT ? t_.k : t_.n, p.inner = INPUT ? t_.n : t_.k;
        p.samples = p.wrap = SAMPLES, p.copies = 1, p.parts = (TOKENS + UNIT - 1) / UNIT;
        p.tile_rows = (SAMPLES * p.parts + COUNT - 1) / COUNT;
        p.tile_columns = (p.rows + 128 * CLUSTER - 1) / (128 * CLUSTER);
        p.weight = map_of(t_.w0.get(), {t_.k, t_.n, 1}, {64, 64, 1}, 128);
        p.delta = map_of(t_.wd.get(), {t_.k, t_.n, 1}, {64, 64, 1}, 128);
        p.x = map_of(INPUT ? t_.g.get() : t_.x.get(), {p.inner, TOKENS, SAMPLES}, {64, UNIT, 1}, 128);
        p.y = map_of(INPUT ? t_.dx.get() : t_.y.get(), {p.rows, TOKENS, SAMPLES}, {64, CHUNK, 1}, 128);
        const Map z = tensor_map(t_.z.get(), {t_.n, SAMPLES, 1}, {64, 1, 1}, 0, true);
        std::memcpy(&p.z_map, &z, sizeof z);
        allow_shared(folded<INPUT, Shared>, Shared::BYTES);
        const u32 grid = blocks(CLUSTER);
        return {text("%u x %u tokens by %u, %u stages, cluster %u%s", COUNT, UNIT, CHUNK, STAGES, CLUSTER, mark),
                [=] { launch(folded<INPUT, Shared>, grid, 384, Shared::BYTES, CLUSTER, p); },
                [this] { return error_of(INPUT ? t_.dx : t_.y, ROWS, INPUT ? t_.k : t_.n, [this](u32 r, u32 c) { return dense(INPUT, r, c); }); }};
    }

    template <u32 STAGES, u32 CLUSTER> Variant weight_variant(const char *mark) const {
        using Shared = sm90::weight::Layout<STAGES, CLUSTER>;
        pace::Sm90WeightParams p{};
        p.z = t_.z.get(), p.weight = t_.dw.get(), p.partial = t_.partial.get();
        p.rows = t_.n, p.columns = t_.k, p.samples = p.wrap = SAMPLES, p.tokens = TOKENS;
        p.tile_columns = (t_.k + 255) / 256, p.tiles = (t_.n + 128 * CLUSTER - 1) / (128 * CLUSTER) * p.tile_columns;
        p.clusters = std::min(sms_, 144u) / CLUSTER;
        p.g = map_of(t_.g.get(), {t_.n, TOKENS, SAMPLES}, {64, 64, 1}, 128);
        p.x = map_of(t_.x.get(), {t_.k, TOKENS, SAMPLES}, {64, 64, 1}, 128);
        allow_shared(weight<Shared>, Shared::BYTES);
        const auto expected = [this](u32 n, u32 k) {
            double sum = 0;
            for (u32 row = 0; row < ROWS; ++row)
                sum += noise(row, n) * h_.g[size_t(row) * t_.n + n] * h_.x[size_t(row) * t_.k + k];
            return sum;
        };
        return {text("%u stages, cluster %u, with the sums%s", STAGES, CLUSTER, mark),
                [=] {
                    launch(weight<Shared>, p.clusters * CLUSTER, 384, Shared::BYTES, CLUSTER, p);
                    launch(weight_sums<CLUSTER>, p.tiles * CLUSTER * (128 / pace::SM90_WEIGHT_SUM_ROWS), 256, 0, 1, p);
                },
                [=] { return error_of(t_.dw, t_.n, t_.k, expected, 64); }};
    }

    void run(Results &results, std::string &table, const Layer &layer, const Cublas &cublas) {
        const auto bare = [&](std::function<void()> gemm) { return cublas.found() ? gemm : std::function<void()>(); };
        const auto forward = bare([&] { cublas.run(true, false, t_.n, ROWS, t_.k, t_.w0.get(), t_.k, t_.x.get(), t_.k, t_.y.get(), t_.n); });
        const auto input = bare([&] { cublas.run(false, false, t_.k, ROWS, t_.n, t_.w0.get(), t_.k, t_.g.get(), t_.n, t_.dx.get(), t_.k); });
        const auto gradient = bare([&] { cublas.run(false, true, t_.k, t_.n, ROWS, t_.x.get(), t_.k, t_.g.get(), t_.n, t_.dw.get(), t_.k); });
        const char *ships = " (ships)";
        time_all(results, table, "low rank", layer, forward,
                 {low_rank_variant<4, 2, 2, false>(ships), low_rank_variant<4, 1, 2, false>(""), low_rank_variant<3, 2, 2, false>(""),
                  low_rank_variant<4, 2, 1, false>(""), low_rank_variant<3, 2, 3, false>("")});
        time_all(results, table, "low rank dx", layer, input,
                 {low_rank_variant<4, 2, 2, true>(ships), low_rank_variant<4, 1, 2, true>(""), low_rank_variant<3, 2, 3, true>("")});
        time_all(results, table, "exact", layer, forward,
                 {exact_variant<4, 2, 1>(ships), exact_variant<4, 1, 1>(""), exact_variant<3, 2, 2>("")});
        time_all(results, table, "folded", layer, forward,
                 {folded_variant<false, 200, 2, 40, 3, 2>(ships), folded_variant<false, 200, 2, 40, 3, 1>(""),
                  folded_variant<false, 136, 2, 136, 3, 2>(""),
                  folded_variant<false, 64, 4, 64, 3, 2>("")});
        time_all(results, table, "folded dx", layer, input,
                 {folded_variant<true, 200, 2, 40, 3, 2>(ships), folded_variant<true, 200, 2, 40, 3, 1>("")});
        time_all(results, table, "dW", layer, gradient, {weight_variant<4, 2>(ships), weight_variant<4, 1>(""), weight_variant<3, 2>("")});
    }
};

} // namespace

int main(int count, char **arguments) {
    answer_starts(count, arguments);
    Results results("sweep");
    const u32 sms = static_cast<u32>(open_device(results).multiProcessorCount);
    const Cublas cublas;
    results.note("cuBLAS", cublas.found() ? "found" : "not found: no ratios");
    std::string table = text("| kernels of sm90 in bf16, %u rows; x: time / cuBLAS' of the bare GEMM\n", ROWS);
    profiling = count == 2 && std::strcmp(arguments[1], "--profile") == 0;
    for (const Layer &layer : LAYERS) {
        if (profiling && layer.n != 3072)
            continue;
        Sweep(layer, sms).run(results, table, layer, cublas);
        std::fflush(stdout);
    }
    std::fputs(table.c_str(), stdout);
    return results.status();
}
