// The divergences of the general loss: their sums over a slice or a row and their gradients; loss_general.cu has the formulas.

#ifndef PACE_LOSS_DIVERGENCE_CUH
#define PACE_LOSS_DIVERGENCE_CUH

#include "loss.cuh"

namespace pace {

namespace loss {

namespace general {

constexpr u32 SECOND_SUMS = FIRST_SUMS + 5, DIVERGENCE_SUMS = SECOND_SUMS + 5,
              LAST_SUMS = DIVERGENCE_SUMS + 7; // LAST_SUMS: 3
constexpr float LN_2 = 0.693147180559945f;
// Below, exponentials are close to 1.
constexpr float CLOSE = 0.5f;

// What is known of the criterion of a branch, in a slice or a row: five sums.
struct Criterion {
    float peaks;       // elements that are the maximum
    float others;      // O: sum of exp(l - M) of the others
    float terms;       // sum of t (M - l), or of (l - v)^2
    float peak_target; // sum of t of the elements that are the maximum
    float rest_target; // and of the others
};

// And of the divergence: the sums of exp((l - M) / T) and their difference, or sums of D and D^2. `at_peak`: the sum of D where a
// branch is at its maximum, and `peaks` how often that is.
struct Sums {
    float zero, one, less;
    float at_peak[2], peaks[2];
};

struct Row {
    float max[2];
    Criterion criterion[2];
    Sums sums;
};
constexpr u32 ROW_WORDS = 2 + 2 * 5 + 7;

// And of a divergence that needs these: its value before `scale`, the sum of p log p/q or p log p/m, and that of q log p/q or
// q log q/m, both without what the logarithm is at the maximum: with a probability near 1 nothing would be left of it. Of
// centred squares those of the squares around the mean, which is rounded, and of what is around it.
struct Divergence {
    float value, of_p, of_q;
};
constexpr u32 SUMMARY_WORDS = LOSS_GENERAL_SUMMARY_WORDS;
static_assert(SUMMARY_WORDS == ROW_WORDS + 3, "a Row and a Divergence");

// A thread's elements.
struct Elements {
    float logit[2][ELEMENTS];
    float difference[ELEMENTS];
    float target[ELEMENTS]; // t, or v
};

__device__ __forceinline__ bool has_partner(const LossParams &p) {
    return p.two_branches != 0u || p.history != nullptr;
}

__device__ __forceinline__ bool is_of_probabilities(const LossParams &p) { return p.divergence >= LOSS_SYMMETRIC_KL; }

// Whether the divergence is a sum that needs sums.
__device__ __forceinline__ bool needs_sums(const LossParams &p) {
    return has_partner(p) && p.divergence >= LOSS_CENTERED_SQUARED_DIFFERENCE;
}

// p x, nothing without probability.
__device__ __forceinline__ float share(float p, float x) { return p == 0.0f ? 0.0f : p * x; }

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// log(S0 / S1), from S0 - S1.
__device__ __forceinline__ float log_ratio(const Sums &sums) {
    return sums.less >= 0.0f ? log1pf(sums.less / sums.one) : -log1pf(-sums.less / sums.zero);
}

// expm1(t) - t, for |t| < CLOSE.
__device__ __forceinline__ float second_order(float t) {
    float series = 1.0f / 40320.0f;
    series = series * t + 1.0f / 5040.0f;
    series = series * t + 1.0f / 720.0f;
    series = series * t + 1.0f / 120.0f;
    series = series * t + 1.0f / 24.0f;
    series = series * t + 1.0f / 6.0f;
    series = series * t + 0.5f;
    return t * t * series;
}

// a - b where a = b exp(exponent). Without a branch: of the lanes of a warp some are close.
__device__ __forceinline__ float subtract(float a, float b, float exponent) {
    return fabsf(exponent) < CLOSE ? b * (exponent + second_order(exponent)) : a - b;
}

// What turns logits into probabilities and the logarithm of their ratio.
struct Softmaxes {
    float max[2], inverse[2];
    float scale, shift, offset;
    // log p/q where the one and the other branch has its maximum; 0 where that is infinite.
    float at_peak[2];

    // log p/q, from the difference of the logits.
    __device__ __forceinline__ float of(float difference) const { return (difference - shift) * scale - offset; }
};

__device__ __forceinline__ Softmaxes softmaxes_of(const LossParams &p, const Row &row) {
    Softmaxes all = {};
    if (!has_partner(p) || !is_of_probabilities(p)) {
        return all;
    }
    all.scale = p.inverse_temperature;
    all.shift = row.max[0] - row.max[1];
    all.offset = log_ratio(row.sums);
#pragma unroll
    for (u32 branch = 0; branch < 2; ++branch) {
        all.max[branch] = row.max[branch];
        all.inverse[branch] = 1.0f / (branch == 0 ? row.sums.zero : row.sums.one);
        const float log = all.of(row.sums.at_peak[branch] / row.sums.peaks[branch]);
        all.at_peak[branch] = fabsf(log) < INF ? log : 0.0f;
    }
    return all;
}

// p, q, log p/q and p - q of an element.
struct Ratio {
    float p, q, log, less;

    __device__ __forceinline__ Ratio(const Softmaxes &all, const Elements &of, u32 k) {
        // Of what is masked in both it is some number, which no probability is multiplied by.
        log = all.of(of.difference[k]);
        p = expf((of.logit[0][k] - all.max[0]) * all.scale) * all.inverse[0];
        q = expf((of.logit[1][k] - all.max[1]) * all.scale) * all.inverse[1];
        less = subtract(p, q, log);
    }
};

// log p/m and log q/m, from log p/q. What is near 0 has not lost digits.
struct Mixture {
    float of_p, of_q, log_cosh, power; // the last two where `is_close`
    bool is_close;

    __device__ __forceinline__ explicit Mixture(float log) : log_cosh(0.0f), power(0.0f), is_close(fabsf(log) < 1.0f) {
        if (is_close) {
            // cosh(t/2)^2 = 1 + (e^t - 1)^2 / (4 e^t)
            power = expm1f(log);
            log_cosh = 0.5f * log1pf(power * power / (4.0f + 4.0f * power));
            of_p = 0.5f * log - log_cosh;
            of_q = -0.5f * log - log_cosh;
        } else {
            of_p = LN_2 - softplus(-log);
            of_q = LN_2 - softplus(log);
        }
    }

    // p times the one plus q times the other.
    __device__ __forceinline__ float term(const Ratio &ratio) const {
        return is_close ? ratio.q * (power * (0.5f * ratio.log) - (2.0f + power) * log_cosh)
                        : share(ratio.p, of_p) + share(ratio.q, of_q);
    }
};

// The sums of the divergence over the group's slice.
template <class T>
__device__ __forceinline__ Divergence sum_divergence(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                     const Row &row, const Softmaxes &all) {
    float sum[3] = {};
    const float mean = row.sums.zero / static_cast<float>(p.classes);
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        if (p.divergence == LOSS_CENTERED_SQUARED_DIFFERENCE) {
            const float centred = slice.has(k) ? of.difference[k] - mean : 0.0f;
            sum[0] += centred * centred;
            sum[1] += centred;
            continue;
        }
        const Ratio ratio(all, of, k);
        if (p.divergence == LOSS_SYMMETRIC_KL) {
            sum[0] += share(ratio.less, ratio.log);
            sum[1] += share(ratio.p, ratio.log - all.at_peak[0]);
            sum[2] += share(ratio.q, ratio.log - all.at_peak[1]);
        } else if (p.divergence == LOSS_KL) {
            const bool is_close = fabsf(ratio.log) < CLOSE;
            sum[0] += is_close ? ratio.q * second_order(ratio.log) : ratio.less - share(ratio.q, ratio.log);
            sum[2] += share(ratio.q, ratio.log - all.at_peak[1]);
        } else {
            const Mixture mixture(ratio.log);
            sum[0] += mixture.term(ratio);
            sum[1] += share(ratio.p, mixture.of_p - Mixture(all.at_peak[0]).of_p);
            sum[2] += share(ratio.q, mixture.of_q - Mixture(all.at_peak[1]).of_q);
        }
    }
    group_reduce<Sum>(sum, first_warp(p), p.group / WARP, shared(LAST_SUMS));
    return {sum[0], sum[1], sum[2]};
}

// The same of a row from those of its slices; a warp computes it.
__device__ __forceinline__ Divergence combine_divergence(const LossParams &p, u32 sample) {
    float sum[3] = {};
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const float *const part = summary_of<SUMMARY_WORDS>(p, sample, i) + ROW_WORDS;
        sum[0] += load(part);
        sum[1] += load(part + 1);
        sum[2] += load(part + 2);
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2]};
}

// The divergence of a row and what its gradient needs, from the sums. Of centred squares `of_p` is the mean's rounding.
__device__ __forceinline__ Divergence finish_divergence(const LossParams &p, const Row &row, Divergence sums) {
    if (p.divergence < LOSS_CENTERED_SQUARED_DIFFERENCE) {
        return {row.sums.one, 0.0f, 0.0f};
    }
    if (p.divergence == LOSS_CENTERED_SQUARED_DIFFERENCE) {
        const float rounding = sums.of_p / static_cast<float>(p.classes);
        // None of an infinite mean.
        const float left = fabsf(rounding) < INF ? rounding : 0.0f;
        return {sums.value - sums.of_p * left, left, 0.0f};
    }
    return sums;
}

// What is known of a row.
struct Known {
    Row row;
    Softmaxes softmaxes;
    Divergence divergence;
};

// Adds the divergence's gradients, times `pull`.
__device__ __forceinline__ void pull_together(const LossParams &p, const Elements &of, const Known &known, float pull,
                                              float (&zero)[ELEMENTS], float (&one)[ELEMENTS]) {
    const Softmaxes &softmaxes = known.softmaxes;
    const Divergence &all = known.divergence;
    const float mean =
        p.divergence == LOSS_CENTERED_SQUARED_DIFFERENCE ? known.row.sums.zero / static_cast<float>(p.classes) : 0.0f;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        float to_zero, to_one;
        if (!is_of_probabilities(p)) {
            to_zero = of.difference[k] - mean - all.of_p;
            to_one = -to_zero;
        } else {
            const Ratio ratio(softmaxes, of, k);
            if (p.divergence == LOSS_SYMMETRIC_KL) {
                to_zero = share(ratio.p, ratio.log - softmaxes.at_peak[0] - all.of_p) + ratio.less;
                to_one = share(ratio.q, all.of_q - (ratio.log - softmaxes.at_peak[1])) - ratio.less;
            } else if (p.divergence == LOSS_KL) {
                to_zero = ratio.less;
                to_one = p.detach_target != 0u ? 0.0f : share(ratio.q, all.of_q - (ratio.log - softmaxes.at_peak[1]));
            } else {
                const Mixture mixture(ratio.log);
                to_zero = share(ratio.p, mixture.of_p - Mixture(softmaxes.at_peak[0]).of_p - all.of_p);
                to_one = share(ratio.q, mixture.of_q - Mixture(softmaxes.at_peak[1]).of_q - all.of_q);
            }
        }
        zero[k] += pull * to_zero;
        one[k] += pull * to_one;
    }
}

} // namespace general

} // namespace loss

} // namespace pace

#endif // PACE_LOSS_DIVERGENCE_CUH
