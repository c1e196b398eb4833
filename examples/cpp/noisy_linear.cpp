// LoRA mul under noise in C++: a small wrapper with exceptions, gradients against finite differences, a batch that two threads
// split without changing its noise.
//
//   c++ -std=c++17 noisy_linear.cpp $(pkg-config --cflags --libs pace-kernels) -pthread -o noisy_linear && ./noisy_linear
//
// after scripts/install_c.sh (docs/embedding.md).
#include <pace_kernels.h>

#include <cmath>
#include <cstdint>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace pace {

struct Error : std::runtime_error {
    explicit Error(PaceStatus status)
        : std::runtime_error(std::string(pace_status_name(status)) + ": " + pace_last_error()), status(status) {}
    PaceStatus status;
};

inline void check(PaceStatus status) {
    if (status != PACE_OK) throw Error(status);
}

template <class Args>
Args args() {
    Args args{};
    args.size = sizeof args;
    args.dtype = PACE_F64;
    return args;
}

inline PaceTensor tensor(std::vector<double>& values) { return {values.data(), values.size()}; }

inline PaceTensor rows(std::vector<double>& values, std::size_t first, std::size_t count) {
    return {values.data() + first, count};
}

struct Close {
    void operator()(PaceDevice* device) const { pace_device_close(device); }
};
using Device = std::unique_ptr<PaceDevice, Close>;

inline Device open(std::uint32_t ordinal) {
    PaceDevice* device = nullptr;
    check(pace_device_open(ordinal, &device));
    return Device(device);
}

}  // namespace pace

constexpr std::size_t BATCH = 4, TOKENS = 3, IN = 8, OUT = 5, RANK = 2;

struct Layer {
    std::vector<double> weight = numbers(OUT * IN), bias = numbers(OUT), lora_b = numbers(OUT * RANK), lora_a = numbers(RANK * IN);

    static std::vector<double> numbers(std::size_t count) {
        std::vector<double> values(count);
        for (std::size_t i = 0; i < count; i++) values[i] = std::sin(1.0 + 3.7 * static_cast<double>(i));
        return values;
    }

    PaceLowRankWeight builder() {
        auto args = pace::args<PaceLowRankWeight>();
        args.out_features = OUT;
        args.in_features = IN;
        args.rank = RANK;
        args.scale = 1.0;
        args.lora_b = pace::tensor(lora_b);
        args.lora_a = pace::tensor(lora_a);
        args.base_weight = pace::tensor(weight);
        return args;
    }

    // y = x W0ᵀ + b0 + z ⊙ (x ΔWᵀ) of the samples first..first + count, with ΔW = W0 ⊙ (B A).
    PaceNoisyLinear linear(std::vector<double>& delta, std::vector<double>& x, std::size_t first, std::size_t count) {
        auto args = pace::args<PaceNoisyLinear>();
        args.shape = {1, count, TOKENS, IN, OUT, 0};
        args.noise.kind = PACE_NOISE_GENERATED;
        args.noise.key = pace_key(7, 0, 0);
        args.noise.sigma = 0.5f;
        args.noise.first_sample = first;  // noise belongs to the global sample, whoever computes it
        args.base_weight = pace::tensor(weight);
        args.base_bias = pace::tensor(bias);
        args.delta_weight = pace::tensor(delta);
        args.x = pace::rows(x, first * TOKENS * IN, count * TOKENS * IN);
        return args;
    }

    std::vector<double> forward(std::vector<double>& x, std::size_t threads) {
        std::vector<double> delta(OUT * IN), y(BATCH * TOKENS * OUT);
        auto build = builder();
        build.out = pace::tensor(delta);
        pace::check(pace_low_rank_weight_forward(nullptr, nullptr, &build));
        std::vector<std::thread> workers;
        std::vector<PaceStatus> status(threads);
        for (std::size_t t = 0; t < threads; t++)
            workers.emplace_back([&, t] {
                const std::size_t count = BATCH / threads, first = t * count;
                auto args = linear(delta, x, first, count);
                args.y = pace::rows(y, first * TOKENS * OUT, count * TOKENS * OUT);
                status[t] = pace_noisy_linear_forward(nullptr, nullptr, &args);
            });
        for (auto& worker : workers) worker.join();
        for (auto each : status)
            if (each != PACE_OK) throw std::runtime_error(pace_status_name(each));
        return y;
    }

    // Gradients of Σ y to D and U.
    std::pair<std::vector<double>, std::vector<double>> backward(std::vector<double>& x) {
        std::vector<double> delta(OUT * IN), ddelta(OUT * IN), dy(BATCH * TOKENS * OUT, 1.0), grad_b(OUT * RANK), grad_a(RANK * IN);
        auto build = builder();
        build.out = pace::tensor(delta);
        pace::check(pace_low_rank_weight_forward(nullptr, nullptr, &build));
        auto args = linear(delta, x, 0, BATCH);
        args.dy = pace::tensor(dy);
        args.grad_delta_weight = pace::tensor(ddelta);
        pace::check(pace_noisy_linear_backward(nullptr, nullptr, &args));
        build.dout = pace::tensor(ddelta);
        build.grad_lora_b = pace::tensor(grad_b);
        build.grad_lora_a = pace::tensor(grad_a);
        pace::check(pace_low_rank_weight_backward(nullptr, nullptr, &build));
        return {grad_b, grad_a};
    }
};

static double sum(const std::vector<double>& values) {
    double total = 0;
    for (double value : values) total += value;
    return total;
}

int main() try {
    Layer layer;
    auto x = Layer::numbers(BATCH * TOKENS * IN);
    const auto y = layer.forward(x, 1);
    std::cout << "pace-kernels " << pace_version() << ": " << y.size() << " outputs, first " << y[0] << "\n";

    // As close as products of other sizes round.
    const auto split = layer.forward(x, 2);
    for (std::size_t i = 0; i < y.size(); i++)
        if (!(std::abs(split[i] - y[i]) < 1e-12)) throw std::runtime_error("two threads give other outputs than one");

    const auto [grad_b, grad_a] = layer.backward(x);
    double worst = 0;
    for (auto [values, gradient] : {std::pair{&layer.lora_b, &grad_b}, std::pair{&layer.lora_a, &grad_a}})
        for (std::size_t i = 0; i < values->size(); i++) {
            const double h = 1e-6, kept = (*values)[i];
            (*values)[i] = kept + h;
            const double above = sum(layer.forward(x, 1));
            (*values)[i] = kept - h;
            const double below = sum(layer.forward(x, 1));
            (*values)[i] = kept;
            worst = std::max(worst, std::abs((above - below) / (2 * h) - (*gradient)[i]));
        }
    std::cout << "largest difference of a gradient from finite differences: " << worst << "\n";
    if (!(worst < 1e-6)) throw std::runtime_error("wrong gradient");

    try {
        const auto device = pace::open(0);
        std::cout << "there is a CUDA device\n";
    } catch (const pace::Error& error) {
        std::cout << error.what() << "\n";
    }
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
