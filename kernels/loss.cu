// The PACE loss and its gradient to the logits.
//
//   total = cls + lambda * pace                                (paper equation 11)
//   cls   = mean over labelled samples of CE(l0_i, label_i)    branch 0 only, with label smoothing s
//   pace  = mean over all samples of sum_c (l0_ic - m_ic)^2    m: branch 1, the remembered logits H[index_i], or no term
//
//   logits, gradient [2B, C] with two branches, otherwise [B, C], in f32, f16 or bf16; labels, index [B] i64; H [n, C] f32,
//   read, then overwritten with the logits; values [3] f32: total, cls, pace; status [9] u64: what is wrong with labels and
//   indices. Arithmetic in f32, one rounding of each gradient to storage.
//
//   with M = max_c l_c, e_c = exp(l_c - M), O = sum of e_c without the label y, S = O + e_y:
//   CE   = log S + (1 - s) (M - l_y) + s/C sum_c (M - l_c)     log S = log1p(O) where l_y = M: nothing is lost near 0
//   g0_c = (e_c / S - [c = y] (1 - s) - s/C) / labelled + 2 lambda/B (l0_c - m_c);   the label's e_y / S - 1 is -O / S
//   g1_c = - 2 lambda/B (l0_c - m_c)
//
// Also the mean of squares (1/C of the sum), labels alone in pace, and given denominators in place of B and the labelled samples,
// or counted ones; equal logits have difference 0. Everything else that LossSettings has is in loss_general.cu.
//
// A label that is neither a class nor the ignored one counts as ignored. A sample whose index is not a row of H, or that
// of an earlier sample, has no consistency term, and H is neither read nor written for it. Status counts both.
//
// A row (of both branches) is cut into slices of at most 8 elements per thread of a group of whole warps, which holds its
// slice in registers: the maximum, the sums and the gradient need no second read. Groups stride over the samples, by y.
//   loss        a slice is the row (C <= 4096): one launch.
//   loss_scan   more slices, by x: first launch. Writes M, O, with smoothing sum_c (M - l_c), the distance and the label's logit of each slice,
//   loss_apply  which the second launch combines before it reads the logits again for the gradient.
// The gradient may take the place of the logits: a thread has read what it overwrites, and nobody else reads it.
// Where rows are aligned, a thread has vectors of 16 bytes, otherwise every 32nd element: the lanes of a warp always touch
// adjacent memory. Each sample leaves a record; the block that finishes last adds them up.
//
// Bytes: logits and H read once (loss) or twice (the others), gradient and H written once; each block reads all labels to
// count them, and for each row or slice the indices before its own, which are B^2 / 2 * 8 bytes in all for rows of one
// slice. Operations: 1 exponential (loss) or 2 (the others) per pair of logits, and for each of them about 25 instructions in
// loss_scan and 28 in loss_apply, which take less time than memory does. The time of small losses is the chain of a launch, the
// loads, the ticket of the last block and its loads. Hence all loads of the first samples go out at once, the label's logit
// is taken from registers, and loops over the batch have several loads in flight.
// Determinism: run-to-run bitwise, for tensors of the same alignment; the grid does not depend on the device, so
// gpu-to-gpu as far as exp and log are the same: compiled ones, but for the device's own exponential of 16-bit logits.

#include "loss.cuh"

namespace pace {

namespace loss {

// What is known of a slice, or of a row.
struct Summary {
    float max;      // M
    float others;   // O: sum of exp(l_c - M), without the label
    float below;    // sum of M - l_c
    float distance; // sum of (l0_c - m_c)^2
    float of_label; // the label's logit; 0 if it is not here
};

constexpr u32 SUMMARY_WORDS = 5;

// The summary of the slice that a group holds; or it is stored, where a row has more. `logit` becomes exp(logit - max). `label`:
// where it lies, from the thread's first element on.
template <class T, Form FORM>
__device__ __forceinline__ Summary summarise(const LossParams &p, const Slice<T> &slice, float (&logit)[ELEMENTS],
                                             const float (&difference)[ELEMENTS], u32 label, u32 sample) {
    // Most threads have no label.
    const bool holds_label = slice.holds(label);
    float peak[1] = {LOWEST};
    float sum[4] = {};
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        peak[0] = fmaxf(peak[0], logit[k]);
    }
    if (holds_label) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            sum[3] = slice.at(k) == label ? logit[k] : sum[3];
        }
    }
    group_reduce<Max, LOSS_GROUP / WARP>(peak, first_warp(p), p.group / WARP, shared(PEAKS));
    if (p.spread != 0.0f) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            sum[1] += slice.has(k) ? peak[0] - logit[k] : 0.0f;
        }
    }
    const Exponential<T> exponential(1.0f);
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        logit[k] = exponential(logit[k] - peak[0]);
        sum[0] += logit[k];
        sum[2] += difference[k] * difference[k];
    }
    if (holds_label) {
        sum[0] = 0.0f;
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            sum[0] += slice.at(k) == label ? 0.0f : logit[k];
        }
    }
    if (FORM == SCAN && threadIdx.x == 0) {
        store(summary_of<SUMMARY_WORDS>(p, sample, blockIdx.x), peak[0]);
    }
    group_sum<FORM, SUMMARY_WORDS>(p, sum, shared(FIRST_SUMS), sample, 1);
    return {peak[0], sum[0], sum[1], sum[2], sum[3]};
}

// The summary of a row from those of its slices; a warp computes it.
__device__ __forceinline__ Summary combine(const LossParams &p, u32 sample) {
    const u32 lane = threadIdx.x % WARP;
    float peak[1] = {LOWEST};
    for (u32 i = lane; i < p.slices; i += WARP) {
        peak[0] = fmaxf(peak[0], load(summary_of<SUMMARY_WORDS>(p, sample, i)));
    }
    warp_reduce_all<Max>(peak);
    float sum[4] = {};
    for (u32 i = lane; i < p.slices; i += WARP) {
        const float *part = summary_of<SUMMARY_WORDS>(p, sample, i);
        const float below = peak[0] - load(part);
        sum[0] += expf(-below) * load(part + 1);
        sum[1] += load(part + 2) + static_cast<float>(min(p.slice, p.classes - i * p.slice)) * below;
        sum[2] += load(part + 3);
        sum[3] += load(part + 4);
    }
    warp_reduce_all<Sum>(sum);
    return {peak[0], sum[0], sum[1], sum[2], sum[3]};
}

// The sample's record: its cross-entropy, zero without a label, its distance, and what was found. `sum`: S.
__device__ __forceinline__ void store_record(const LossParams &p, const Summary &all, u32 sample, i64 label, float sum,
                                             u32 wrong_index) {
    const bool has_label = is_labelled(p, label);
    float cross_entropy = 0.0f;
    if (has_label) {
        const float log_sum = all.of_label == all.max ? log1pf(all.others) : logf(sum);
        cross_entropy = log_sum + (1.0f - p.smoothing) * (all.max - all.of_label);
        if (p.spread != 0.0f) {
            cross_entropy += p.spread * all.below;
        }
    }
    const u32 found = has_label ? HAS_LABEL : is_ignored(p, label) ? 0u : WRONG_LABEL;
    float *const record = record_of(p, sample);
    store(record, cross_entropy);
    store(record + 1, all.distance);
    store(record + 2, static_cast<float>(found | wrong_index));
}

// Gradients to both branches in place of exp(l - M) and the differences. `weight`: of the cross-entropy.
template <class T>
__device__ __forceinline__ void gradients(const LossParams &p, const Slice<T> &slice, const Summary &all,
                                          bool has_label, u32 label_at, float sum, float weight,
                                          float (&logit)[ELEMENTS], float (&difference)[ELEMENTS]) {
    const float pull = p.pull_per_label != 0u ? p.pull * weight : p.pull;
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        difference[k] *= -pull;
    }
    if (!has_label) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            logit[k] = -difference[k];
        }
        return;
    }
    const float inverse = 1.0f / sum;
    if (!slice.holds(label_at)) {
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            logit[k] = (logit[k] * inverse - p.spread) * weight - difference[k];
        }
        return;
    }
#pragma unroll
    for (u32 k = 0; k < ELEMENTS; ++k) {
        const float probability = slice.at(k) == label_at ? p.smoothing - all.others * inverse : logit[k] * inverse;
        logit[k] = (probability - p.spread) * weight - difference[k];
    }
}

template <class T, Form FORM, bool ALIGNED> __device__ __forceinline__ void evaluate(const LossParams &p) {
    // Divisions take long at the head of the chain: none where the block is one group, as it is of rows of more slices.
    u32 thread = threadIdx.x, own = 0, groups = 1;
    if (FORM == WHOLE && blockDim.x != p.group) {
        thread = threadIdx.x & (p.group - 1u);
        own = threadIdx.x / p.group;
        groups = blockDim.x / p.group;
    }
    const u32 start = blockIdx.x * p.slice;
    const T *const logits = static_cast<const T *>(p.logits);
    T *const gradient = static_cast<T *>(p.gradient);
    const u64 branch = static_cast<u64>(p.batch) * p.classes;
    const u32 first = blockIdx.y * groups;
    float weight = 0.0f; // of a sample's cross-entropy
    for (u32 base = first; base < p.batch; base += gridDim.y * groups) {
        // A group without a sample goes along with nothing to read or write: the others may wait for it at a barrier.
        const u32 sample = base + own;
        const bool exists = sample < p.batch;
        const u64 row = static_cast<u64>(sample) * p.classes;
        const Slice<T> slice(thread, exists ? min(p.slice, p.classes - start) : 0u, ALIGNED);

        // Loads: logits, label and partner. Labels are counted here, with all loads of the first samples under way.
        const i64 label = exists ? load(p.labels + sample) : -1;
        float logit[ELEMENTS], difference[ELEMENTS];
        slice.read(logits + row + start, logit);
        const Partner partner =
            read_partner<T, FORM>(p, slice, logits + branch + row + start, sample, thread, start, logit, difference);
        if (FORM != SCAN && gradient != nullptr && base == first) {
            constexpr u32 LOADS = FORM == WHOLE ? IN_FLIGHT : LABELS_IN_FLIGHT;
            const float count = p.denominator > 0.0f ? p.denominator : labelled<false, LOADS>(p).count;
            weight = count > 0.0f ? 1.0f / count : 0.0f;
        }
        // Not before the labels of the batch are on their way: this waits for the label.
        const bool has_label = is_labelled(p, label);
        const bool takes_part = partner.exists && (p.labelled_only == 0u || has_label);
        const u32 label_at = has_label ? static_cast<u32>(label) - start - slice.first : NONE;

        // The summary of the slice, or of the row; logits become exp(l - M).
        Summary all;
        if (FORM == APPLY) {
            all = of_first_warp(shared_by_block<Summary>(), [&] { return combine(p, sample); });
        }
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; ++k) {
            // Equal ones differ by nothing: classes that both branches mask by -inf, and elements that there are not.
            difference[k] = takes_part && logit[k] != difference[k] ? logit[k] - difference[k] : 0.0f;
            if (FORM == APPLY) {
                logit[k] = Exponential<T>(1.0f)(logit[k] - all.max);
            }
        }
        if (FORM != APPLY) {
            all = summarise<T, FORM>(p, slice, logit, difference, label_at, sample);
        }
        if (FORM == SCAN) {
            continue;
        }

        // The sample's record and gradients.
        const float sum = all.others + (has_label ? Exponential<T>(1.0f)(all.of_label - all.max) : 0.0f);
        if (blockIdx.x == 0 && thread == 0 && exists) {
            store_record(p, all, sample, label, sum, partner.wrong);
        }
        if (gradient != nullptr) {
            gradients(p, slice, all, has_label, label_at, sum, weight, logit, difference);
            slice.write(gradient + row + start, logit);
            if (p.two_branches != 0u) {
                slice.write(gradient + branch + row + start, difference);
            }
        }
    }
    if (FORM != SCAN && is_last_block(p.workspace, reinterpret_cast<u32 *>(shared(FLAG)))) {
        finish<false>(p);
    }
}

template <class T, Form FORM> __device__ __forceinline__ void evaluate(const LossParams &p) {
    if (p.aligned != 0u) {
        evaluate<T, FORM, true>(p);
    } else {
        evaluate<T, FORM, false>(p);
    }
}

PACE_KERNELS(loss, LossParams, (LOSS_GROUP, 2), evaluate<T, WHOLE>(p))
PACE_KERNELS(loss_scan, LossParams, (LOSS_GROUP, 2), evaluate<T, SCAN>(p))
PACE_KERNELS(loss_apply, LossParams, (LOSS_GROUP, 2), evaluate<T, APPLY>(p))

} // namespace loss

} // namespace pace
