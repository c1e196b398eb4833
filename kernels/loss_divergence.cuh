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
// Sums of three numbers below it are finite.
constexpr float LARGE = 1e38f;
// Below, series take the place of what would lose digits; 1/8 for differences of two numbers, whose digits it loses gradually.
constexpr float CLOSE = 0.5f, CLOSE_TO_SUBTRACT = 0.125f;

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

// And of a divergence that needs these: its value before `scale`, the sum of p log p/q or p log p/m, and that of q log p/q or
// q log q/m, both without what the logarithm is at the maximum: with a probability near 1 nothing would be left of it. Of
// centred squares those of the squares around the mean, which is rounded, and of what is around it; then the mean.
struct Divergence {
    float value, of_p, of_q;
};

// Where these lie in the summary of a slice, which is a Row and a Divergence.
constexpr u32 CRITERION_WORDS = 2, POWER_WORDS = CRITERION_WORDS + 2 * 5, DIVERGENCE_WORDS = POWER_WORDS + 7;
constexpr u32 SUMMARY_WORDS = LOSS_GENERAL_SUMMARY_WORDS;
static_assert(sizeof(Row) == sizeof(float) * DIVERGENCE_WORDS, "words");
static_assert(sizeof(Divergence) == sizeof(float) * (SUMMARY_WORDS - DIVERGENCE_WORDS), "words");

template <class S> __device__ __forceinline__ void store_words(float *to, const S &value) {
    float words[sizeof(S) / sizeof(float)];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (u32 i = 0; i < sizeof(S) / sizeof(float); ++i) {
        store(to + i, words[i]);
    }
}

template <class S> __device__ __forceinline__ S load_words(const float *from) {
    float words[sizeof(S) / sizeof(float)];
#pragma unroll
    for (u32 i = 0; i < sizeof(S) / sizeof(float); ++i) {
        words[i] = load(from + i);
    }
    S value;
    memcpy(&value, words, sizeof value);
    return value;
}

// A thread's elements.
struct Elements {
    float logit[2][ELEMENTS];
    float difference[ELEMENTS]; // then log p/q
    float target[ELEMENTS];     // t, or v; not where `is_hard`
};

__device__ __forceinline__ bool has_partner(const LossParams &p) {
    return p.two_branches != 0u || p.history != nullptr;
}

__device__ __forceinline__ bool is_of_probabilities(const LossParams &p) { return p.divergence >= LOSS_SYMMETRIC_KL; }

// Whether the divergence is a sum that needs sums.
__device__ __forceinline__ bool needs_sums(const LossParams &p) {
    return has_partner(p) && p.divergence >= LOSS_CENTERED_SQUARED_DIFFERENCE;
}

// Whether that of a row can be had from those of slices.
__device__ __forceinline__ bool has_chain_rule(const LossParams &p) {
    return has_partner(p) && (p.divergence == LOSS_SYMMETRIC_KL || p.divergence == LOSS_KL);
}

// Whether it takes the probabilities of both branches.
__device__ __forceinline__ bool needs_softmaxes(const LossParams &p) {
    return has_partner(p) && is_of_probabilities(p);
}

// p x, nothing without probability. Where all x are finite there is nothing to ask.
template <bool FINITE = false> __device__ __forceinline__ float share(float p, float x) {
    return !FINITE && p == 0.0f ? 0.0f : p * x;
}

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

// a - b where a = b exp(t). Without a branch: of the lanes of a warp some are close.
__device__ __forceinline__ float subtract(float a, float b, float t) {
    const float series = t + t * t * (0.5f + t * (1.0f / 6.0f + t * (1.0f / 24.0f + t * (1.0f / 120.0f))));
    return fabsf(t) < CLOSE_TO_SUBTRACT ? b * series : a - b;
}

// What turns logits into probabilities and the logarithm of their ratio.
struct Softmaxes {
    float max[2], inverse[2];
    float scale, shift, offset;
    // log p/q where the one and the other branch has its maximum; 0 where that is infinite, or nearly.
    float at_peak[2];

    // log p/q, from the difference of the logits.
    __device__ __forceinline__ float of(float difference) const { return (difference - shift) * scale - offset; }
};

__device__ __forceinline__ Softmaxes softmaxes_of(const LossParams &p, const Row &row) {
    Softmaxes all = {};
    if (!needs_softmaxes(p)) {
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
        all.at_peak[branch] = fabsf(log) < LARGE ? log : 0.0f;
    }
    return all;
}

// Puts log p/q in the place of the differences, and says whether all are well below infinity. Of what is masked in both branches it is some
// number, which no probability is multiplied by.
__device__ __forceinline__ bool compute_logs(const Softmaxes &all, Elements &of) {
    bool finite = true;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        of.difference[k] = all.of(of.difference[k]);
        finite &= fabsf(of.difference[k]) < LARGE;
    }
    return finite;
}

// p, q, log p/q and p - q of an element of logits that are stored as S.
template <class S> struct Ratio {
    float p, q, log, less;

    __device__ __forceinline__ Ratio(const Softmaxes &all, const Elements &of, u32 k) : log(of.difference[k]) {
        const Exponential<S> exponential(all.scale);
        p = exponential(of.logit[0][k] - all.max[0]) * all.inverse[0];
        q = exponential(of.logit[1][k] - all.max[1]) * all.inverse[1];
        less = subtract(p, q, log);
    }
};

// log p/m and log q/m, from t = log p/q. What is near 0 has not lost digits.
struct Mixture {
    float of_p, of_q, log_cosh; // the last one where `is_close`: log cosh(t/2)
    bool is_close;

    __device__ __forceinline__ explicit Mixture(float t) {
        const float size = fabsf(t), square = t * t;
        is_close = size < CLOSE;
        log_cosh = square * (1.0f / 8.0f +
                             square * (-1.0f / 192.0f + square * (1.0f / 2880.0f + square * (-17.0f / 645120.0f))));
        // log 2 - log(1 + exp(-+t))
        const float far = LN_2 - log1pf(expf(-size));
        of_p = is_close ? 0.5f * t - log_cosh : far + fminf(t, 0.0f);
        of_q = is_close ? -0.5f * t - log_cosh : far - fmaxf(t, 0.0f);
    }

    // p times the one plus q times the other.
    template <bool FINITE, class S> __device__ __forceinline__ float term(const Ratio<S> &ratio) const {
        return is_close ? 0.5f * ratio.less * ratio.log - (ratio.p + ratio.q) * log_cosh
                        : share<FINITE>(ratio.p, of_p) + share<FINITE>(ratio.q, of_q);
    }
};

// Adds a thread's part of the sums of a divergence of probabilities.
template <class S, bool FINITE>
__device__ __forceinline__ void sum_ratios(const LossParams &p, const Elements &of, const Softmaxes &all,
                                           float (&sum)[3]) {
    // A loop for each, rather than a question for each element.
    if (p.divergence == LOSS_SYMMETRIC_KL) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            sum[0] += share<FINITE>(ratio.less, ratio.log);
            sum[1] += share<FINITE>(ratio.p, ratio.log - all.at_peak[0]);
            sum[2] += share<FINITE>(ratio.q, ratio.log - all.at_peak[1]);
        }
    } else if (p.divergence == LOSS_KL) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            sum[0] += fabsf(ratio.log) < CLOSE ? ratio.q * second_order(ratio.log)
                                               : ratio.less - share<FINITE>(ratio.q, ratio.log);
            sum[2] += share<FINITE>(ratio.q, ratio.log - all.at_peak[1]);
        }
    } else {
        const float peak_p = Mixture(all.at_peak[0]).of_p, peak_q = Mixture(all.at_peak[1]).of_q;
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            const Mixture mixture(ratio.log);
            sum[0] += mixture.term<FINITE>(ratio);
            sum[1] += share<FINITE>(ratio.p, mixture.of_p - peak_p);
            sum[2] += share<FINITE>(ratio.q, mixture.of_q - peak_q);
        }
    }
}

// The sums of the divergence over the group's slice, or to its summary; `finite`: whether the thread's log p/q are.
template <class T, Form FORM>
__device__ __forceinline__ Divergence sum_divergence(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                     const Row &row, const Softmaxes &all, bool finite, u32 sample) {
    float sum[3] = {};
    if (p.divergence == LOSS_CENTERED_SQUARED_DIFFERENCE) {
        const float mean = row.sums.zero / static_cast<float>(p.classes);
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const float centred = slice.has(k) ? of.difference[k] - mean : 0.0f;
            sum[0] += centred * centred;
            sum[1] += centred;
        }
    } else if (finite) {
        sum_ratios<T, true>(p, of, all, sum);
    } else {
        sum_ratios<T, false>(p, of, all, sum);
    }
    group_sum<FORM, SUMMARY_WORDS>(p, sum, shared(LAST_SUMS), sample, DIVERGENCE_WORDS);
    return {sum[0], sum[1], sum[2]};
}

// The same of a row from those of its slices, which are sums of the same; a warp computes it.
__device__ __forceinline__ Divergence combine_divergence(const LossParams &p, u32 sample) {
    float sum[3] = {};
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const Divergence part = load_words<Divergence>(summary_of<SUMMARY_WORDS>(p, sample, i) + DIVERGENCE_WORDS);
        sum[0] += part.value;
        sum[1] += part.of_p;
        sum[2] += part.of_q;
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2]};
}

// And from those of slices that took their own softmaxes, by the chain rule. With P and Q what a slice has of the probabilities and
// T = log P/Q, an element's p is P times that of the slice, p', and log p/q is T more than there, t':
//   KL(q|p) = sum of Q KL(q'|p') + Q (expm1(T) - T)
//   sum of (p - q) log p/q = sum of P sum (p' - q') t' + (P - Q) (T + sum q' t') = sum of Q sum (p' - q') t' + (P - Q) (T + sum p' t')
// Nothing cancels in the one where P is less than Q, and in the other one otherwise.
__device__ __forceinline__ Divergence chain_divergence(const LossParams &p, u32 sample, const Row &row,
                                                       const Softmaxes &all) {
    float sum[3] = {};
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const float *const part = summary_of<SUMMARY_WORDS>(p, sample, i);
        const Row own = load_words<Row>(part);
        Divergence inner = load_words<Divergence>(part + DIVERGENCE_WORDS);
        if (own.sums.zero == 0.0f || own.sums.one == 0.0f) {
            // All masked: the slice has no softmax.
            inner = {};
        }
        const Softmaxes softmaxes = softmaxes_of(p, own);
        const float shares[2] = {expf((own.max[0] - row.max[0]) * all.scale) * own.sums.zero * all.inverse[0],
                                 expf((own.max[1] - row.max[1]) * all.scale) * own.sums.one * all.inverse[1]};
        const float log = (softmaxes.shift - all.shift) * all.scale + (softmaxes.offset - all.offset);
        const float less = subtract(shares[0], shares[1], log);
        if (p.divergence == LOSS_SYMMETRIC_KL) {
            const bool is_less = shares[0] < shares[1];
            const float mean = is_less ? inner.of_q + softmaxes.at_peak[1] : inner.of_p + softmaxes.at_peak[0];
            sum[0] += share(is_less ? shares[0] : shares[1], inner.value) + share(less, log + mean);
        } else {
            const float of_shares = fabsf(log) < CLOSE ? shares[1] * second_order(log) : less - share(shares[1], log);
            sum[0] += share(shares[1], inner.value) + of_shares;
        }
#pragma unroll
        for (u32 branch = 0; branch < 2; ++branch) {
            // From log p/q at the row's maximum to that at the slice's: nothing, without a rounding, where they are the same.
            const float here = own.sums.at_peak[branch] / own.sums.peaks[branch];
            const float there = row.sums.at_peak[branch] / row.sums.peaks[branch];
            const float from_peak = fabsf(here) < LARGE && fabsf(there) < LARGE
                                        ? (here - there) * all.scale
                                        : softmaxes.at_peak[branch] + log - all.at_peak[branch];
            sum[1 + branch] += share(shares[branch], (branch == 0 ? inner.of_p : inner.of_q) + from_peak);
        }
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2]};
}

// The divergence of a row and what its gradient needs, from the sums. Of centred squares `of_p` is the mean's
// rounding, and `of_q` the mean.
__device__ __forceinline__ Divergence finish_divergence(const LossParams &p, const Row &row, Divergence sums) {
    if (p.divergence < LOSS_CENTERED_SQUARED_DIFFERENCE) {
        return {row.sums.one, 0.0f, 0.0f};
    }
    if (p.divergence == LOSS_CENTERED_SQUARED_DIFFERENCE) {
        const float rounding = sums.of_p / static_cast<float>(p.classes);
        // None of an infinite mean.
        const float left = fabsf(rounding) < INF ? rounding : 0.0f;
        return {sums.value - sums.of_p * left, left, row.sums.zero / static_cast<float>(p.classes)};
    }
    return sums;
}

// What the terms of a sample weigh in the gradient: of the criterion, and of the divergence.
struct Weights {
    float criterion, pull;
};

// What is known of a row.
struct Known {
    Row row;
    Softmaxes softmaxes;
    Weights weights;
    float scale[2]; // see `scale_criteria`
    Divergence divergence;
};
constexpr u32 KNOWN_WORDS = LOSS_GENERAL_KNOWN_WORDS;
static_assert(sizeof(Known) == sizeof(float) * KNOWN_WORDS, "words");

// Of a row of more slices; behind all summaries.
__device__ __forceinline__ float *known_of(const LossParams &p, u32 sample) {
    return summary_of<SUMMARY_WORDS>(p, p.batch, 0) + KNOWN_WORDS * static_cast<u64>(sample);
}

// The gradients of a divergence of probabilities, times `pull`.
template <class S, bool FINITE>
__device__ __forceinline__ void pull_ratios(const LossParams &p, const Elements &of, const Known &known, float pull,
                                            float (&zero)[ELEMENTS], float (&one)[ELEMENTS]) {
    const Softmaxes &all = known.softmaxes;
    const float mean_p = known.divergence.of_p, mean_q = known.divergence.of_q;
    if (p.divergence == LOSS_SYMMETRIC_KL) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            zero[k] = pull * (share<FINITE>(ratio.p, ratio.log - all.at_peak[0] - mean_p) + ratio.less);
            one[k] = pull * (share<FINITE>(ratio.q, mean_q - (ratio.log - all.at_peak[1])) - ratio.less);
        }
    } else if (p.divergence == LOSS_KL) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            zero[k] = pull * ratio.less;
            one[k] =
                p.detach_target != 0u ? 0.0f : pull * share<FINITE>(ratio.q, mean_q - (ratio.log - all.at_peak[1]));
        }
    } else {
        const float peak_p = Mixture(all.at_peak[0]).of_p, peak_q = Mixture(all.at_peak[1]).of_q;
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const Ratio<S> ratio(all, of, k);
            const Mixture mixture(ratio.log);
            zero[k] = pull * share<FINITE>(ratio.p, mixture.of_p - peak_p - mean_p);
            one[k] = pull * share<FINITE>(ratio.q, mixture.of_q - peak_q - mean_q);
        }
    }
}

// The divergence's gradients, times `pull`; `finite` as above.
template <class S>
__device__ __forceinline__ void pull_together(const LossParams &p, const Elements &of, const Known &known, float pull,
                                              bool finite, float (&zero)[ELEMENTS], float (&one)[ELEMENTS]) {
    if (!is_of_probabilities(p)) {
        // No mean of others.
        const float mean = known.divergence.of_q, rounding = known.divergence.of_p;
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            zero[k] = pull * (of.difference[k] - mean - rounding);
            one[k] = -zero[k];
        }
    } else if (finite && fabsf(known.divergence.of_p) < LARGE && fabsf(known.divergence.of_q) < LARGE) {
        pull_ratios<S, true>(p, of, known, pull, zero, one);
    } else {
        pull_ratios<S, false>(p, of, known, pull, zero, one);
    }
}

} // namespace general

} // namespace loss

} // namespace pace

#endif // PACE_LOSS_DIVERGENCE_CUH
