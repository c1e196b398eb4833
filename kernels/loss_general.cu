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
//   loss_general        a slice is the row (C <= 4096): one launch.
//   loss_general_scan   more slices, by x: first launch. Writes maxima and sums of each slice (struct Row).
//   loss_general_sums   where the divergence is a sum that needs these: a second launch, the same for its two sums.
//   loss_general_apply  combines them, always in the same order, and reads again for the gradient.
// Bytes: logits, H, probabilities or values read once per launch, gradient and H written once; class weights come from a cache.
// Operations: per element and branch up to 5 exponentials or logarithms (loss_general), so the divergences of probabilities are bound by
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
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float ratio = logit[k] / p.soft_cap;
        gradient[k] *= 1.0f - ratio * ratio;
    }
}

// Both logits of each element and their difference, from what was read in the place of the second ones.
template <class T>
__device__ __forceinline__ void compare(const LossParams &p, const Slice<T> &slice, bool exists, Elements &of) {
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float first = of.logit[0][k], read = exists ? of.logit[1][k] : first;
        if (exists && p.is_difference != 0u) {
            of.difference[k] = slice.has(k) ? read : 0.0f;
            of.logit[1][k] = first - of.difference[k];
        } else {
            // Equal ones may be infinite: classes that both branches mask, and elements that there are not.
            of.difference[k] = first == read ? 0.0f : first - read;
            of.logit[1][k] = read;
        }
    }
}

// t of each element, or v.
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

// The criterion's sums over the group's slice.
template <class T>
__device__ __forceinline__ Criterion sum_criterion(const LossParams &p, const Slice<T> &slice,
                                                   const float (&logit)[ELEMENTS], const float (&target)[ELEMENTS],
                                                   float max, u32 part) {
    float sum[5] = {};
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        if (p.criterion == LOSS_VALUES) {
            const float error = slice.has(k) ? logit[k] - target[k] : 0.0f;
            sum[2] += error * error;
        } else {
            // Of an infinite maximum it is no number.
            const float below = max - logit[k], power = expf(-below);
            if (logit[k] == max) {
                sum[0] += power;
                sum[3] += target[k];
            } else {
                sum[1] += power;
                sum[4] += target[k];
            }
            sum[2] += share(target[k], below);
        }
    }
    group_reduce<Sum>(sum, first_warp(p), p.group / WARP, shared(part));
    return {sum[0], sum[1], sum[2], sum[3], sum[4]};
}

__device__ __forceinline__ Sums sum_powers(const LossParams &p, const Elements &of, const float (&max)[2]) {
    float sum[7] = {};
    const float shift = max[0] - max[1];
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float difference = of.difference[k];
        if (is_of_probabilities(p)) {
            const float zero = expf((of.logit[0][k] - max[0]) * p.inverse_temperature);
            const float one = expf((of.logit[1][k] - max[1]) * p.inverse_temperature);
            sum[0] += zero;
            sum[1] += one;
            sum[2] += subtract(zero, one, (difference - shift) * p.inverse_temperature);
#pragma unroll
            for (u32 branch = 0; branch < 2; ++branch) {
                if (of.logit[branch][k] == max[branch]) {
                    sum[3 + branch] += difference;
                    sum[5 + branch] += 1.0f;
                }
            }
        } else {
            sum[0] += difference;
            sum[1] += difference * difference;
        }
    }
    group_reduce<Sum>(sum, first_warp(p), p.group / WARP, shared(DIVERGENCE_SUMS));
    return {sum[0], sum[1], sum[2], {sum[3], sum[4]}, {sum[5], sum[6]}};
}

// All that a first look at a slice finds.
template <class T>
__device__ __forceinline__ Row summarise(const LossParams &p, const Slice<T> &slice, const Elements &of) {
    Row row = {};
    row.max[0] = LOWEST;
    row.max[1] = LOWEST;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        row.max[0] = fmaxf(row.max[0], of.logit[0][k]);
        row.max[1] = fmaxf(row.max[1], of.logit[1][k]);
    }
    group_reduce<Max>(row.max, first_warp(p), p.group / WARP, shared(PEAKS));
    if (has_partner(p)) {
        row.sums = sum_powers(p, of, row.max);
    }
    row.criterion[0] = sum_criterion(p, slice, of.logit[0], of.target, row.max[0], FIRST_SUMS);
    if (p.both_branches != 0u) {
        row.criterion[1] = sum_criterion(p, slice, of.logit[1], of.target, row.max[1], SECOND_SUMS);
    }
    return row;
}

__device__ __forceinline__ void store_row(const LossParams &p, const Row &row, u32 sample) {
    float *const part = summary_of<SUMMARY_WORDS>(p, sample, blockIdx.x);
    store(part, row.max[0]);
    store(part + 1, row.max[1]);
#pragma unroll
    for (u32 branch = 0; branch < 2; ++branch) {
        const Criterion &all = row.criterion[branch];
        const float words[5] = {all.peaks, all.others, all.terms, all.peak_target, all.rest_target};
#pragma unroll
        for (u32 i = 0; i < 5; ++i) {
            store(part + 2 + 5 * branch + i, words[i]);
        }
    }
    store(part + 12, row.sums.zero);
    store(part + 13, row.sums.one);
    store(part + 14, row.sums.less);
#pragma unroll
    for (u32 branch = 0; branch < 2; ++branch) {
        store(part + 15 + branch, row.sums.at_peak[branch]);
        store(part + 17 + branch, row.sums.peaks[branch]);
    }
}

// The criterion of a row from those of its slices; a warp computes it.
__device__ __forceinline__ Criterion combine_criterion(const LossParams &p, u32 sample, u32 branch, float max) {
    float sum[5] = {};
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        const float *const part = summary_of<SUMMARY_WORDS>(p, sample, i);
        const float *const words = part + 2 + 5 * branch;
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
        const float zero = load(part + 12), one = load(part + 13), less = load(part + 14);
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
                sum[3 + branch] += is_peak ? load(part + 15 + branch) : 0.0f;
                sum[5 + branch] += is_peak ? load(part + 17 + branch) : 0.0f;
            }
        } else {
            sum[0] += zero;
            sum[1] += one;
        }
    }
    warp_reduce_all<Sum>(sum);
    return {sum[0], sum[1], sum[2], {sum[3], sum[4]}, {sum[5], sum[6]}};
}

// What is known of a row, from what is known of its slices; a warp computes it.
template <Form FORM> __device__ __forceinline__ Known combine(const LossParams &p, u32 sample) {
    Row row = {};
    row.max[0] = LOWEST;
    row.max[1] = LOWEST;
    for (u32 i = threadIdx.x % WARP; i < p.slices; i += WARP) {
        row.max[0] = fmaxf(row.max[0], load(summary_of<SUMMARY_WORDS>(p, sample, i)));
        row.max[1] = fmaxf(row.max[1], load(summary_of<SUMMARY_WORDS>(p, sample, i) + 1));
    }
    warp_reduce_all<Max>(row.max);
    if (FORM != SUMS) {
        row.criterion[0] = combine_criterion(p, sample, 0, row.max[0]);
    }
    if (FORM != SUMS && p.both_branches != 0u) {
        row.criterion[1] = combine_criterion(p, sample, 1, row.max[1]);
    }
    if (has_partner(p)) {
        row.sums = combine_powers(p, sample, row.max);
    }
    Known known = {row, softmaxes_of(p, row), {}};
    if (FORM != SUMS) {
        known.divergence = finish_divergence(p, row, needs_sums(p) ? combine_divergence(p, sample) : Divergence{});
    }
    return known;
}

// The criterion of a branch.
__device__ __forceinline__ float value_of(const LossParams &p, const Criterion &all) {
    if (p.criterion == LOSS_VALUES) {
        return all.terms / static_cast<float>(p.classes);
    }
    const float log_sum = all.peaks == 1.0f ? log1pf(all.others) : logf(all.peaks + all.others);
    return (all.peak_target + all.rest_target) * log_sum + all.terms;
}

// The gradient of a branch's criterion, times `weight`.
__device__ __forceinline__ void criterion_gradient(const LossParams &p, const Criterion &all, float max, float weight,
                                                   const float (&logit)[ELEMENTS], const float (&target)[ELEMENTS],
                                                   float (&gradient)[ELEMENTS]) {
    const float scale = (all.peak_target + all.rest_target) / (all.peaks + all.others);
    const float twice = 2.0f / static_cast<float>(p.classes);
    // Nothing cancels in 1 - O/S of a probability below a half, nor in O/S of one above.
    const bool is_sure = all.peaks == 1.0f && all.others < 1.0f;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        float of_one;
        if (p.criterion == LOSS_VALUES) {
            of_one = twice * (logit[k] - target[k]);
        } else if (is_sure && logit[k] == max) {
            of_one = all.rest_target - scale * all.others;
        } else {
            of_one = scale * expf(logit[k] - max) - target[k];
        }
        gradient[k] = weight * of_one;
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

// What the terms of a sample weigh in the gradient: of the criterion, and of the divergence.
struct Weights {
    float criterion, pull;
};

// A whole block computes it.
__device__ __forceinline__ Weights weigh(const LossParams &p) {
    Labelled all = {p.denominator, p.denominator};
    if (!(p.denominator > 0.0f)) {
        const float batch = static_cast<float>(p.counted_len);
        all = p.criterion == LOSS_LABELS ? labelled<true>(p) : Labelled{batch, batch};
    }
    const float share_of_branch = p.both_branches != 0u ? 0.5f : 1.0f;
    const float per_label = all.count > 0.0f ? 1.0f / all.count : 0.0f;
    return {all.weight > 0.0f ? share_of_branch / all.weight : 0.0f,
            p.pull_per_label != 0u ? p.pull * per_label : p.pull};
}

// The sample's gradients.
template <class T>
__device__ __forceinline__ void write_gradients(const LossParams &p, const Slice<T> &slice, const Elements &of,
                                                const Known &known, bool has_target, bool takes_part, Weights weights,
                                                T *to) {
    const Row &row = known.row;
    float zero[ELEMENTS] = {}, one[ELEMENTS] = {};
    if (has_target) {
        criterion_gradient(p, row.criterion[0], row.max[0], weights.criterion, of.logit[0], of.target, zero);
        if (p.both_branches != 0u) {
            criterion_gradient(p, row.criterion[1], row.max[1], weights.criterion, of.logit[1], of.target, one);
        }
    }
    if (takes_part) {
        pull_together(p, of, known, weights.pull, zero, one);
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
    const u32 first = blockIdx.y * groups;
    Weights weights = {};
    for (u32 base = first; base < p.batch; base += gridDim.y * groups) {
        // A group without a sample goes along with nothing to read or write: the others may wait for it at a barrier.
        const u32 sample = base + own;
        const bool exists = sample < p.batch;
        const u64 row = static_cast<u64>(sample) * p.classes;
        const Slice<T> slice(thread, exists ? min(p.slice, p.classes - start) : 0u, p.aligned != 0u);
        const i64 label = p.criterion == LOSS_LABELS && exists ? load(p.labels + sample) : -1;
        Elements of;
        slice.read(logits + row + start, of.logit[0]);
        const Partner partner = read_partner<T, FORM>(p, slice, logits + branch + row + start, sample, thread, start,
                                                      of.logit[0], of.logit[1]);
        const bool has_target = p.criterion == LOSS_LABELS ? is_labelled(p, label) : exists;
        const u32 label_at = has_target ? static_cast<u32>(label) - start - slice.first : NONE;
        const bool takes_part = partner.exists && (p.labelled_only == 0u || has_target);
        if (FORM != SUMS) {
            read_targets(p, slice, sample, start, label_at, has_target, of.target);
        }
        if (p.soft_cap > 0.0f) {
            cap_logits(p, slice, of.logit[0]);
            if (partner.exists) {
                cap_logits(p, slice, of.logit[1]);
            }
        }
        compare(p, slice, partner.exists, of);
        if ((FORM == WHOLE || FORM == APPLY) && p.gradient != nullptr && base == first) {
            weights = weigh(p);
        }

        Known known = {};
        if (FORM == WHOLE || FORM == SCAN) {
            known.row = summarise(p, slice, of);
        } else {
            known = of_first_warp(shared_by_block<Known>(), [&] { return combine<FORM>(p, sample); });
        }
        if (FORM == SCAN) {
            if (thread == 0 && exists) {
                store_row(p, known.row, sample);
            }
            continue;
        }
        if (FORM == SUMS) {
            const Divergence sums = sum_divergence(p, slice, of, known.row, known.softmaxes);
            if (thread == 0 && exists) {
                float *const part = summary_of<SUMMARY_WORDS>(p, sample, blockIdx.x) + ROW_WORDS;
                store(part, sums.value);
                store(part + 1, sums.of_p);
                store(part + 2, sums.of_q);
            }
            continue;
        }
        if (FORM == WHOLE) {
            known.softmaxes = softmaxes_of(p, known.row);
            const Divergence sums =
                needs_sums(p) ? sum_divergence(p, slice, of, known.row, known.softmaxes) : Divergence{};
            known.divergence = finish_divergence(p, known.row, sums);
        }
        if (blockIdx.x == 0 && thread == 0 && exists) {
            const float divergence = takes_part ? known.divergence.value : 0.0f;
            store_record(p, known.row, divergence, sample, label, has_target, partner.wrong);
        }
        if (p.gradient != nullptr) {
            T *const to = static_cast<T *>(p.gradient) + row + start;
            write_gradients(p, slice, of, known, has_target, takes_part, weights, to);
        }
    }
    if ((FORM == WHOLE || FORM == APPLY) && is_last_block(p.workspace, reinterpret_cast<u32 *>(shared(FLAG)))) {
        finish<true>(p);
    }
}

PACE_KERNELS(loss_general, LossParams, (LOSS_GROUP, 1), evaluate<T, WHOLE>(p))
PACE_KERNELS(loss_general_scan, LossParams, (LOSS_GROUP, 2), evaluate<T, SCAN>(p))
PACE_KERNELS(loss_general_sums, LossParams, (LOSS_GROUP, 2), evaluate<T, SUMS>(p))
PACE_KERNELS(loss_general_apply, LossParams, (LOSS_GROUP, 1), evaluate<T, APPLY>(p))

} // namespace general

} // namespace loss

} // namespace pace
