// Every other loss: any divergence, with a criterion of one branch or both, of labels, probabilities or values.
//
//   total     = criterion + lambda * consistency
//   criterion = sum_i t_i / D,  consistency = sum_i d_i / D'             D, D': see LossSettings in src/loss.rs
//   t_i  of branch 0, or the mean of that of both branches:
//        cross-entropy  sum_c t_c (log sum_j exp(l_j) - l_c),  t_c = w_c ((1 - s) y_c + s/C)   w: class weights, or 1
//                       y: the label's one-hot vector, or probabilities
//        squared error  1/C sum_c (l_c - v_c)^2
//   d_i  of D_c = l0_c - l1_c (0 where both are equal), p = softmax(l0), q = softmax(l1), m = (p + q) / 2:
//        sum D_c^2;  1/C sum D_c^2;  sum (D_c - mean D)^2;  (KL(p|q) + KL(q|p)) / 2;  T^2 KL(q_T|p_T);  (KL(p|m) + KL(q|m)) / 2
//
//   logits, gradient [2B, C] or [B, C] in f32, f16 or bf16; labels, index [B] i64; probabilities, values [B, C] f32; class weights
//   [C] f32; H [n, C] f32, as in loss.cu. The second half of the logits is l1, or l0 - l1; that of the gradient is to l1.
//   Arithmetic in f32, one rounding of each gradient to storage.
//
// Nothing is lost where branches are close, or the criterion is near 0. With M the maximum of a row, S the sum of
// e_c = exp(l_c - M) and O that without the elements that are M:
//   log S = log1p(O) if one element is M. Its gradient A e/S - t, A = sum of t, is (A - t) - A O/S where
//   O < 1, and A - t is a sum as well.
//   r_c = D_c - (M0 - M1),  t_c = log(p_c/q_c) = r_c - log(S0/S1),  S0 - S1 = sum of e0_c - e1_c, or of e1_c expm1(r_c) where
//   r_c is near 0:  no difference of large numbers, and for any M0 - M1 the same. p - q likewise. Each divergence is a sum of
//   terms that are not negative:  (p - q) t;  q (expm1(t) - t) = p - q - q t;  p u + q v with u = log p/m = t/2 - h,
//   v = log q/m = -t/2 - h, h = log cosh(t/2).
//   Without probability a term is nothing: there t may be infinite.
// Gradients to l0, l1: of squares +-2 D;  p (t - sum pt) + p - q, q (sum qt - t) + q - p;  p - q, q (-t - KL);
// p (u - sum pu), q (v - sum qv), times what `pull` has of lambda, T and D'.
//
// With a soft cap, logits are given as x of l = cap tanh(x / cap), and the gradient is to x.
//
// Slices, groups, alignment, records and status are those of loss.cu; a thread has 8 elements of both rows, of D and of t.
//   loss_general            a slice is the row (C <= 4096): one launch.
//   loss_general_scan       more slices, by x, of a sample, by y and z: first launch. Writes maxima and sums of each slice, and
//                           its own KL divergence, with softmaxes of its own.
//   loss_general_rows       combines them, always in the same order: a warp finds what is known of a row (struct Known).
//   loss_general_sums       where the divergence is a sum that needs these: the same for its sums, as slices do not add up
//   loss_general_divergence to the one of centred squares or of Jensen and Shannon; and for them.
//   loss_general_apply      reads again for the gradient.
// KL by the chain rule: with P and Q what a slice has of the probabilities and T = log P/Q,
//   KL(q|p) = sum over slices of Q KL(q|p there) + Q (expm1(T) - T).
// What is the same for all elements is asked outside of loops over them, and threads without the maximum or the label of their slice do
// not compare elements with them.
// Bytes: logits, H, probabilities or values read once per launch, gradient and H written once; class weights come from a cache.
// Operations: per element and branch up to 7 exponentials or logarithms (loss_general), so the divergences of probabilities are bound by
// arithmetic rather than by memory.
// Determinism: as in loss.cu.

#include "loss_divergence.cuh"

namespace pace {

namespace loss {

namespace general {

// What the cap makes of logits; not of elements that there are not.
template <class T>
__device__ __forceinline__ void cap_logits(const LossParams &p, const Slice<T> &slice, float (&logit)[ELEMENTS]) {
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        if (slice.has(k)) {
            logit[k] = p.soft_cap * tanhf(logit[k] / p.soft_cap);
        }
    }
}

// Gradients to logits before the cap: d cap tanh(x / cap) = 1 - (l / cap)^2.
__device__ __forceinline__ void pull_through_cap(const LossParams &p, const float (&logit)[ELEMENTS],
                                                 float (&gradient)[ELEMENTS]) {
    const float inverse = 1.0f / p.soft_cap;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float ratio = logit[k] * inverse;
        gradient[k] *= 1.0f - ratio * ratio;
    }
}

// Both logits of each element and their difference, from what was read in the place of the second ones.
__device__ __forceinline__ void compare(const LossParams &p, bool exists, Elements &of) {
    if (!exists) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            of.difference[k] = 0.0f;
            of.logit[1][k] = of.logit[0][k];
        }
    } else if (p.is_difference != 0u) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            of.difference[k] = of.logit[1][k];
            of.logit[1][k] = of.logit[0][k] - of.difference[k];
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            // Equal ones may be infinite: classes that both branches mask, and elements that there are not.
            const float first = of.logit[0][k], second = of.logit[1][k];
            of.difference[k] = first == second ? 0.0f : first - second;
        }
    }
}

// Whether the target of a sample is its label alone, so that all other elements have t = 0.
__device__ __forceinline__ bool is_hard(const LossParams &p) { return p.criterion == LOSS_LABELS && p.spread == 0.0f; }

// A label: where it lies, from the thread's first element on, and the weight of its class.
struct Label {
    u32 at;
    float weight;
};

// t of each element, or v; not where `is_hard`.
template <class T>
__device__ __forceinline__ void read_targets(const LossParams &p, const Slice<T> &slice, u32 sample, u32 start,
                                             u32 label_at, bool has_target, float (&target)[ELEMENTS]) {
    if (p.criterion != LOSS_LABELS) {
        slice.read(p.targets + static_cast<u64>(sample) * p.classes + start, target);
    }
    if (p.criterion == LOSS_VALUES) {
        return;
    }
    float weight[ELEMENTS];
    if (p.class_weights != nullptr) {
        slice.read(p.class_weights + start, weight);
    }
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float hard = p.criterion == LOSS_LABELS ? (slice.at(k) == label_at ? 1.0f : 0.0f) : target[k];
        const float mixed = (1.0f - p.smoothing) * hard + p.spread;
        const bool counts = has_target && slice.has(k);
        target[k] = !counts ? 0.0f : p.class_weights == nullptr ? mixed : weight[k] * mixed;
    }
}

// The criterion's sums over the group's slice, or to its summary. `peak`: the maximum of the thread's elements, most of which are not that of all, so
// that the others do not ask.
template <class T, Form FORM>
__device__ __forceinline__ Criterion sum_criterion(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                   const Label &label, u32 branch, float peak, float max, u32 sample) {
    const float(&logit)[ELEMENTS] = of.logit[branch];
    float sum[5] = {};
    if (p.criterion == LOSS_VALUES) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const float error = slice.has(k) ? logit[k] - of.target[k] : 0.0f;
            sum[2] += error * error;
        }
    } else {
        const Exponential<T> exponential(1.0f);
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            // Of an infinite maximum it is no number.
            sum[1] += exponential(logit[k] - max);
        }
        if (!is_hard(p)) {
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; ++k) {
                sum[2] += share(of.target[k], max - logit[k]);
                sum[4] += of.target[k];
            }
        } else if (slice.holds(label.at)) {
            sum[4] = label.weight;
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; ++k) {
                if (slice.at(k) == label.at) {
                    sum[2] = share(label.weight, max - logit[k]);
                }
            }
        }
        if (peak == max) {
            sum[1] = 0.0f;
            sum[4] = 0.0f;
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; ++k) {
                const bool is_label = slice.has(k) && slice.at(k) == label.at;
                const float target = is_hard(p) ? (is_label ? label.weight : 0.0f) : of.target[k];
                const float power = exponential(logit[k] - max);
                const bool is_peak = logit[k] == max;
                sum[0] += is_peak ? power : 0.0f;
                sum[1] += is_peak ? 0.0f : power;
                sum[3] += is_peak ? target : 0.0f;
                sum[4] += is_peak ? 0.0f : target;
            }
        }
    }
    group_sum<FORM, SUMMARY_WORDS>(p, sum, shared(branch == 0 ? FIRST_SUMS : SECOND_SUMS), sample,
                                   CRITERION_WORDS + 5 * branch);
    return {sum[0], sum[1], sum[2], sum[3], sum[4]};
}

template <class T, Form FORM>
__device__ __forceinline__ void sum_criteria(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                             const Label &label, const float (&peak)[2], u32 sample, Row &row) {
    row.criterion[0] = sum_criterion<T, FORM>(p, slice, of, label, 0, peak[0], row.max[0], sample);
    if (p.both_branches != 0u) {
        row.criterion[1] = sum_criterion<T, FORM>(p, slice, of, label, 1, peak[1], row.max[1], sample);
    }
}

template <class T, Form FORM>
__device__ __forceinline__ Sums sum_powers(const LossParams &p, const Elements &of, const float (&peak)[2],
                                           const float (&max)[2], u32 sample) {
    float sum[7] = {};
    if (is_of_probabilities(p)) {
        const Exponential<T> exponential(p.inverse_temperature);
        const float shift = max[0] - max[1];
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            const float zero = exponential(of.logit[0][k] - max[0]), one = exponential(of.logit[1][k] - max[1]);
            sum[0] += zero;
            sum[1] += one;
            sum[2] += subtract(zero, one, (of.difference[k] - shift) * p.inverse_temperature);
        }
#pragma unroll
        for (u32 branch = 0; branch < 2; ++branch) {
            if (peak[branch] == max[branch]) {
#pragma unroll
                for (u32 k = 0; k < ELEMENTS; ++k) {
                    const bool is_peak = of.logit[branch][k] == max[branch];
                    sum[3 + branch] += is_peak ? of.difference[k] : 0.0f;
                    sum[5 + branch] += is_peak ? 1.0f : 0.0f;
                }
            }
        }
    } else {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            sum[0] += of.difference[k];
            sum[1] += of.difference[k] * of.difference[k];
        }
    }
    // Slices that have a divergence of their own need them.
    group_sum<FORM, SUMMARY_WORDS, true>(p, sum, shared(DIVERGENCE_SUMS), sample, POWER_WORDS);
    return {sum[0], sum[1], sum[2], {sum[3], sum[4]}, {sum[5], sum[6]}};
}

// The maxima of the group's slice; `peak`: those of the thread.
template <Form FORM>
__device__ __forceinline__ void find_maxima(const LossParams &p, const Elements &of, u32 sample, float (&peak)[2],
                                            float (&max)[2]) {
    peak[0] = LOWEST;
    peak[1] = LOWEST;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        peak[0] = fmaxf(peak[0], of.logit[0][k]);
        peak[1] = fmaxf(peak[1], of.logit[1][k]);
    }
    max[0] = peak[0];
    max[1] = peak[1];
    group_reduce<Max, LOSS_GROUP / WARP>(max, first_warp(p), p.group / WARP, shared(PEAKS));
    if (FORM == SCAN && threadIdx.x == 0) {
        store(summary_of<SUMMARY_WORDS>(p, sample, blockIdx.x), max[0]);
        store(summary_of<SUMMARY_WORDS>(p, sample, blockIdx.x) + 1, max[1]);
    }
}

// The criterion of a row from those of its slices; a warp computes it.
__device__ __forceinline__ Criterion combine_criterion(const LossParams &p, u32 sample, u32 branch, float max) {
    float sum[5] = {};
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const float *const part = summary_of<SUMMARY_WORDS>(p, sample, i);
        const float *const words = part + CRITERION_WORDS + 5 * branch;
        const float below = max - load(part + branch);
        const float peaks = load(words), others = load(words + 1);
        const float peak_target = load(words + 3), rest_target = load(words + 4);
        const bool is_peak = below == 0.0f;
        sum[0] += is_peak ? peaks : 0.0f;
        sum[1] += is_peak ? others : expf(-below) * (peaks + others);
        sum[2] += load(words + 2) + share(peak_target + rest_target, below);
        sum[3] += is_peak ? peak_target : 0.0f;
        sum[4] += is_peak ? rest_target : peak_target + rest_target;
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2], sum[3], sum[4]};
}

__device__ __forceinline__ Sums combine_powers(const LossParams &p, u32 sample, const float (&max)[2]) {
    float sum[7] = {};
    const float shift = max[0] - max[1];
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const float *const part = summary_of<SUMMARY_WORDS>(p, sample, i);
        const float *const words = part + POWER_WORDS;
        const float zero = load(words), one = load(words + 1), less = load(words + 2);
        if (is_of_probabilities(p)) {
            const float of_zero = load(part), of_one = load(part + 1);
            const float scale_zero = expf((of_zero - max[0]) * p.inverse_temperature);
            const float scale_one = expf((of_one - max[1]) * p.inverse_temperature);
            // S0 - S1 = scale0 (S0' - S1') + (scale0 - scale1) S1'
            const float scales = subtract(scale_zero, scale_one, (of_zero - of_one - shift) * p.inverse_temperature);
            sum[0] += scale_zero * zero;
            sum[1] += scale_one * one;
            sum[2] += scale_zero * less + scales * one;
#pragma unroll
            for (u32 branch = 0; branch < 2; ++branch) {
                const bool is_peak = load(part + branch) == max[branch];
                sum[3 + branch] += is_peak ? load(words + 3 + branch) : 0.0f;
                sum[5 + branch] += is_peak ? load(words + 5 + branch) : 0.0f;
            }
        } else {
            sum[0] += zero;
            sum[1] += one;
        }
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2], {sum[3], sum[4]}, {sum[5], sum[6]}};
}

// The criterion of a branch.
__device__ __forceinline__ float value_of(const LossParams &p, const Criterion &all) {
    if (p.criterion == LOSS_VALUES) {
        return all.terms / static_cast<float>(p.classes);
    }
    const float log_sum = all.peaks == 1.0f ? log1pf(all.others) : logf(all.peaks + all.others);
    return (all.peak_target + all.rest_target) * log_sum + all.terms;
}

// What the criteria's gradients are multiples of: of errors, or of powers.
__device__ __forceinline__ void scale_criteria(const LossParams &p, Known &known) {
#pragma unroll
    for (u32 branch = 0; branch < 2; ++branch) {
        const Criterion &all = known.row.criterion[branch];
        known.scale[branch] = p.criterion == LOSS_VALUES
                                  ? 2.0f / static_cast<float>(p.classes)
                                  : (all.peak_target + all.rest_target) / (all.peaks + all.others);
    }
}

// What is known of a row from what is known of its slices, but for divergences without a chain rule; a warp computes it.
__device__ __forceinline__ Known combine(const LossParams &p, u32 sample) {
    Row row = {};
    row.max[0] = LOWEST;
    row.max[1] = LOWEST;
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        row.max[0] = fmaxf(row.max[0], load(summary_of<SUMMARY_WORDS>(p, sample, i)));
        row.max[1] = fmaxf(row.max[1], load(summary_of<SUMMARY_WORDS>(p, sample, i) + 1));
    }
    warp_reduce_all<Max>(row.max);
    row.criterion[0] = combine_criterion(p, sample, 0, row.max[0]);
    if (p.both_branches != 0u) {
        row.criterion[1] = combine_criterion(p, sample, 1, row.max[1]);
    }
    if (has_partner(p)) {
        row.sums = combine_powers(p, sample, row.max);
    }
    Known known = {row, softmaxes_of(p, row), {}, {}, {}};
    known.divergence =
        finish_divergence(p, row, has_chain_rule(p) ? chain_divergence(p, sample, row, known.softmaxes) : Divergence{});
    scale_criteria(p, known);
    return known;
}

// Adds the gradient of a branch's criterion, times `weight`.
template <class T>
__device__ __forceinline__ void criterion_gradient(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                   const Label &label, const Known &known, u32 branch, float weight,
                                                   float (&gradient)[ELEMENTS]) {
    const float(&logit)[ELEMENTS] = of.logit[branch];
    const Criterion &all = known.row.criterion[branch];
    const float scale = known.scale[branch];
    if (p.criterion == LOSS_VALUES) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            gradient[k] += weight * scale * (logit[k] - of.target[k]);
        }
        return;
    }
    // Nothing cancels in 1 - O/S of a probability below a half, nor in O/S of one above.
    const bool is_sure = all.peaks == 1.0f && all.others < 1.0f;
    const float of_peak = all.rest_target - scale * all.others;
    const bool holds_label = is_hard(p) && slice.holds(label.at);
    const Exponential<T> exponential(1.0f);
    const float max = known.row.max[branch];
    if (is_hard(p) && !is_sure && !holds_label) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            gradient[k] += weight * scale * exponential(logit[k] - max);
        }
        return;
    }
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float target = !is_hard(p) ? of.target[k] : holds_label && slice.at(k) == label.at ? label.weight : 0.0f;
        const float soft = scale * exponential(logit[k] - max) - target;
        gradient[k] += weight * (is_sure && logit[k] == max ? of_peak : soft);
    }
}

__device__ __forceinline__ void store_record(const LossParams &p, const Row &row, float divergence, u32 sample,
                                             i64 label, bool has_target, u32 wrong_index) {
    float criterion = 0.0f;
    if (has_target) {
        criterion = value_of(p, row.criterion[0]);
        if (p.both_branches != 0u) {
            criterion = 0.5f * (criterion + value_of(p, row.criterion[1]));
        }
    }
    u32 found = 0;
    if (p.criterion == LOSS_LABELS) {
        found = has_target ? HAS_LABEL : is_ignored(p, label) ? 0u : WRONG_LABEL;
    }
    float *const record = record_of(p, sample);
    store(record, criterion);
    store(record + 1, divergence);
    store(record + 2, static_cast<float>(found | wrong_index));
}

// A whole block computes it.
template <u32 LOADS> __device__ __forceinline__ Weights weigh(const LossParams &p) {
    Labelled all = {p.denominator, p.denominator};
    if (!(p.denominator > 0.0f)) {
        const float batch = static_cast<float>(p.counted_len);
        all = p.criterion == LOSS_LABELS ? labelled<true, LOADS>(p) : Labelled{batch, batch};
    }
    const float share_of_branch = p.both_branches != 0u ? 0.5f : 1.0f;
    const float per_label = all.count > 0.0f ? 1.0f / all.count : 0.0f;
    return {all.weight > 0.0f ? share_of_branch / all.weight : 0.0f,
            p.pull_per_label != 0u ? p.pull * per_label : p.pull};
}

// The sample's gradients. `finite`: see `compute_logs`. `read_late`: reads the targets, if they are not there yet.
template <class T, class Read>
__device__ __forceinline__ void write_gradients(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                const Label &label, const Known &known, bool has_target,
                                                bool takes_part, bool finite, const Read &read_late, T *to) {
    float zero[ELEMENTS] = {}, one[ELEMENTS] = {};
    if (takes_part) {
        pull_together<T>(p, of, known, known.weights.pull, finite, zero, one);
    }
    if (has_target) {
        read_late();
        criterion_gradient(p, slice, of, label, known, 0, known.weights.criterion, zero);
        if (p.both_branches != 0u) {
            criterion_gradient(p, slice, of, label, known, 1, known.weights.criterion, one);
        }
    }
    if (p.soft_cap > 0.0f) {
        pull_through_cap(p, of.logit[0], zero);
        pull_through_cap(p, of.logit[1], one);
    }
    slice.write(to, zero);
    if (p.two_branches != 0u) {
        slice.write(to + static_cast<u64>(p.batch) * p.classes, one);
    }
}

template <class T, Form FORM> __device__ __forceinline__ void evaluate(const LossParams &p) {
    // A row of more slices is for whole blocks.
    u32 thread = threadIdx.x, own = 0, groups = 1;
    if (FORM == WHOLE) {
        thread = threadIdx.x & (p.group - 1u);
        own = threadIdx.x / p.group;
        groups = blockDim.x / p.group;
    }
    const u32 start = blockIdx.x * p.slice;
    const T *const logits = static_cast<const T *>(p.logits);
    const u64 branch = static_cast<u64>(p.batch) * p.classes;
    // A block of a slice has one sample: what a loop keeps in registers would not fit beside its elements.
    const u32 first = FORM == WHOLE ? blockIdx.y * groups : blockIdx.z * gridDim.y + blockIdx.y;
    Weights weights = {};
    for (u32 base = first; base < p.batch; base += gridDim.y * groups) {
        // A group without a sample goes along with nothing to read or write: the others may wait for it at a barrier.
        const u32 sample = base + own;
        const bool exists = sample < p.batch;
        const u64 row = static_cast<u64>(sample) * p.classes;
        const Slice<T> slice(thread, exists ? min(p.slice, p.classes - start) : 0u, p.aligned != 0u);
        const i64 class_of_label = p.criterion == LOSS_LABELS && exists ? load(p.labels + sample) : -1;
        Elements of;
        slice.read(logits + row + start, of.logit[0]);
        const Partner partner = read_partner<T, FORM>(p, slice, logits + branch + row + start, sample, thread, start,
                                                      of.logit[0], of.logit[1]);
        const bool has_target = p.criterion == LOSS_LABELS ? is_labelled(p, class_of_label) : exists;
        Label label = {has_target ? static_cast<u32>(class_of_label) - start - slice.first : NONE, 1.0f};
        const bool takes_part = partner.exists && (p.labelled_only == 0u || has_target);
        const auto read_target = [&] {
            if (!is_hard(p)) {
                read_targets(p, slice, sample, start, label.at, has_target, of.target);
            } else if (p.class_weights != nullptr && has_target) {
                label.weight = load(p.class_weights + class_of_label);
            }
        };
        // A slice of many has its targets late, when registers are free again.
        const auto read_late = [&] {
            if (FORM != WHOLE) {
                read_target();
            }
        };
        if (FORM == WHOLE) {
            read_target();
        }
        if (p.soft_cap > 0.0f) {
            cap_logits(p, slice, of.logit[0]);
            if (partner.exists) {
                cap_logits(p, slice, of.logit[1]);
            }
        }
        compare(p, partner.exists, of);
        if (FORM == WHOLE && p.gradient != nullptr && base == first) {
            weights = weigh<IN_FLIGHT>(p);
        }

        // What is known of the row, or found of the slice.
        Known known = {};
        float peak[2];
        if (FORM == SUMS || FORM == APPLY) {
            known = load_words<Known>(known_of(p, sample));
        } else {
            find_maxima<FORM>(p, of, sample, peak, known.row.max);
            read_late();
            sum_criteria<T, FORM>(p, slice, of, label, peak, sample, known.row);
            if (has_partner(p)) {
                known.row.sums = sum_powers<T, FORM>(p, of, peak, known.row.max, sample);
            }
        }
        // Of a slice its divergence, where that of the row can be had from it.
        bool finite = true;
        if (FORM != SCAN || has_chain_rule(p)) {
            if (FORM == WHOLE || FORM == SCAN) {
                known.softmaxes = softmaxes_of(p, known.row);
            }
            if (needs_softmaxes(p)) {
                finite = compute_logs(known.softmaxes, of);
            }
            if (FORM == SUMS || FORM == SCAN || (FORM == WHOLE && needs_sums(p))) {
                known.divergence = sum_divergence<T, FORM>(p, slice, of, known.row, known.softmaxes, finite, sample);
            }
        }
        if (FORM == SCAN || FORM == SUMS) {
            return;
        }
        if (FORM == WHOLE) {
            known.divergence = finish_divergence(p, known.row, known.divergence);
            known.weights = weights;
            scale_criteria(p, known);
        }
        if (blockIdx.x == 0 && thread == 0 && exists) {
            const float divergence = takes_part ? known.divergence.value : 0.0f;
            store_record(p, known.row, divergence, sample, class_of_label, has_target, partner.wrong);
        }
        if (p.gradient != nullptr) {
            T *const to = static_cast<T *>(p.gradient) + row + start;
            write_gradients(p, slice, of, label, known, has_target, takes_part, finite, read_late, to);
        }
        if (FORM == APPLY) {
            break;
        }
    }
    if ((FORM == WHOLE || FORM == APPLY) && is_last_block(p.workspace, reinterpret_cast<u32 *>(shared(FLAG)))) {
        finish<true>(p);
    }
}

// What is known of rows, from what is known of their slices; a warp for each.
template <Form FORM> __device__ __forceinline__ void combine_rows(const LossParams &p) {
    const Weights weights = FORM == SCAN && p.gradient != nullptr ? weigh<LABELS_IN_FLIGHT>(p) : Weights{};
    const u32 warps = blockDim.x / WARP;
    for (u32 sample = blockIdx.y * warps + threadIdx.x / WARP; sample < p.batch; sample += gridDim.y * warps) {
        float *const to = known_of(p, sample);
        Known known = {};
        if (FORM == SCAN) {
            known = combine(p, sample);
            known.weights = weights;
        } else {
            known.divergence = finish_divergence(p, load_words<Row>(to), combine_divergence(p, sample));
        }
        if (threadIdx.x % WARP == 0) {
            if (FORM == SCAN) {
                store_words(to, known);
            } else {
                store_words(to + offsetof(Known, divergence) / sizeof(float), known.divergence);
            }
        }
    }
}

PACE_KERNELS(loss_general, LossParams, (LOSS_GROUP, 1), evaluate<T, WHOLE>(p))
PACE_KERNELS(loss_general_scan, LossParams, (LOSS_GROUP, 2), evaluate<T, SCAN>(p))
PACE_KERNELS(loss_general_sums, LossParams, (LOSS_GROUP, 2), evaluate<T, SUMS>(p))
PACE_KERNELS(loss_general_apply, LossParams, (LOSS_GROUP, 2), evaluate<T, APPLY>(p))
PACE_KERNEL(loss_general_rows, LossParams, LOSS_GROUP, 1) { combine_rows<SCAN>(p); }
PACE_KERNEL(loss_general_divergence, LossParams, LOSS_GROUP, 1) { combine_rows<SUMS>(p); }

} // namespace general

} // namespace loss

} // namespace pace
