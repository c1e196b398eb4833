// What the two families of loss kernels have in common: slices of rows, labels, history, records of samples, and the values
// and the status that the last block makes of the records.

#ifndef PACE_LOSS_CUH
#define PACE_LOSS_CUH

#include "params.h"
#include "reduce.cuh"

namespace pace {

namespace loss {

constexpr u32 ELEMENTS = LOSS_ELEMENTS; // of a row in a thread's registers
constexpr u32 IN_FLIGHT = 2;            // samples per thread whose loads go out together, in loops over the batch
constexpr u32 LABELS_IN_FLIGHT = 8;     // the same of labels alone, for batches of many blocks
constexpr u32 NONE = 0xffffffffu;
constexpr float INF = __builtin_huge_valf();
// Where maxima start. Not at -inf: exp(-inf - -inf) would make NaN of a slice of -inf only, whose row may have more.
constexpr float LOWEST = -3.402823466e+38f;

constexpr float LOG2_E = 1.44269504088896f;

enum Form {
    WHOLE, // a row has one slice
    SCAN,  // first launch for more
    SUMS,  // of divergences whose sums need what the first has found of the row
    APPLY, // last
};

// Of a label; P: parameters that say what labels are.
template <class P> __device__ __forceinline__ bool is_ignored(const P &p, i64 label) {
    return p.has_ignore_label != 0u && label == p.ignore_label;
}

__device__ __forceinline__ bool is_below(i64 value, u64 end) { return static_cast<u64>(value) < end; }

template <class P> __device__ __forceinline__ bool is_labelled(const P &p, i64 label) {
    return is_below(label, p.classes) && !is_ignored(p, label);
}

// exp(x / T) of logits that are stored as S. Those of 16 bits have the special function unit's: its error, and that of x as a
// multiple of log 2, are 2^-22 to 2^-16, and a rounding of theirs 2^-9 or 2^-12.
template <class S> struct Exponential {
    float rate;
    __device__ __forceinline__ explicit Exponential(float inverse_temperature)
        : rate(sizeof(S) == 2 ? inverse_temperature * LOG2_E : inverse_temperature) {}
    __device__ __forceinline__ float operator()(float x) const {
        return sizeof(S) == 2 ? exp2_fast(x * rate) : expf(x * rate);
    }
};

// What a thread has of one slice: a warp holds 32 * ELEMENTS adjacent elements, a thread of it vectors or every 32nd one.
template <class T> struct Slice {
    bool aligned; // vectors; a constant where the kernel has code for each
    u32 first;    // the thread's first element
    u32 left;     // elements of the slice from there on

    __device__ __forceinline__ Slice(u32 thread, u32 count, bool aligned) : aligned(aligned) {
        const u32 lane = thread % WARP;
        first = (thread - lane) * ELEMENTS + (aligned ? lane * Vector<T>::SIZE : lane);
        left = count > first ? count - first : 0u;
    }

    // Where the thread's element k lies, from the first on.
    __device__ __forceinline__ u32 at(u32 k) const {
        constexpr u32 W = Vector<T>::SIZE;
        return aligned ? k / W * W * WARP + k % W : k * WARP;
    }

    __device__ __forceinline__ bool has(u32 k) const { return at(k) < left; }

    // Whether one of the thread's elements lies there, from the first one on.
    __device__ __forceinline__ bool holds(u32 place) const {
        return place < min(left, ELEMENTS * WARP) &&
               (aligned ? place % (Vector<T>::SIZE * WARP) < Vector<T>::SIZE : place % WARP == 0u);
    }

    // -inf stands for what there is not: it is no maximum and its exponential is zero. Or something else does.
    template <class S>
    __device__ __forceinline__ void read(const S *slice, float (&value)[ELEMENTS], float otherwise = -INF) const {
        // Before the load and not after it, so that nothing waits for it yet: other loads are to follow.
        if (aligned) {
            constexpr u32 STEP = Vector<S>::SIZE;
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; k += STEP) {
                float floats[STEP];
#pragma unroll
                for (u32 i = 0; i < STEP; ++i) {
                    floats[i] = otherwise;
                }
                Vector<S> vector = from_floats<S>(floats);
                if (has(k)) {
                    vector = load_vector(slice + first + at(k));
                }
                to_floats(vector, floats);
#pragma unroll
                for (u32 i = 0; i < STEP; ++i) {
                    value[k + i] = floats[i];
                }
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; ++k) {
                S element = from_float<S>(otherwise);
                if (has(k)) {
                    element = load(slice + first + at(k));
                }
                value[k] = to_float(element);
            }
        }
    }

    template <class S> __device__ __forceinline__ void write(S *slice, const float (&value)[ELEMENTS]) const {
        if (aligned) {
            constexpr u32 STEP = Vector<S>::SIZE;
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; k += STEP) {
                if (has(k)) {
                    float floats[STEP];
#pragma unroll
                    for (u32 i = 0; i < STEP; ++i) {
                        floats[i] = value[k + i];
                    }
                    store_vector(slice + first + at(k), from_floats<S>(floats));
                }
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; ++k) {
                if (has(k)) {
                    store(slice + first + at(k), from_float<S>(value[k]));
                }
            }
        }
    }
};

// What there is of a sample, and what is wrong with it: the bits of the last number of its record.
constexpr u32 HAS_LABEL = 1, WRONG_LABEL = 2, WRONG_INDEX = 4, REPEATED_INDEX = 8;

// The workspace: the ticket counter; a record per sample, which is its criterion, its divergence and what was found; with more
// than one slice a summary of each, and behind all of them what loss_general_rows knows of each sample.
__device__ __forceinline__ float *record_of(const LossParams &p, u32 sample) {
    return reinterpret_cast<float *>(p.workspace) + 1 + 3 * static_cast<u64>(sample);
}

// A summary has WORDS words.
template <u32 WORDS> __device__ __forceinline__ float *summary_of(const LossParams &p, u32 sample, u32 slice) {
    return record_of(p, p.batch) + WORDS * (static_cast<u64>(sample) * p.slices + slice);
}

// Shared memory, in words per warp of the block. A part is written again only behind a barrier that follows its last use.
constexpr u32 TOTALS = 0, POSITIONS = 6, COUNTED = 9, REPEATED = 11, PEAKS = 12, FIRST_SUMS = 14;
constexpr u32 FLAG = LOSS_SHARED_WORDS; // one word

__device__ __forceinline__ float *shared(u32 part) {
    PACE_SHARED(float, words);
    return words + part * (blockDim.x / WARP);
}

// Where a T lies that concerns the whole block, in the place of sums.
template <class T> __device__ __forceinline__ T *shared_by_block() {
    static_assert(sizeof(T) <= 4 * 5 * (LOSS_GROUP / WARP), "the first sums of a group");
    return reinterpret_cast<T *>(shared(FIRST_SUMS));
}

// The first warp of the thread's group. A group has 2^n threads.
__device__ __forceinline__ u32 first_warp(const LossParams &p) { return (threadIdx.x & ~(p.group - 1u)) / WARP; }

// Sums over the group of a thread, which all of its threads get if EVERYWHERE. Where a row has more slices, they go to the summary of the
// block's slice, which has WORDS words, from `word` on. `scratch`: N words per warp.
template <Form FORM, u32 WORDS, bool EVERYWHERE = FORM == WHOLE, u32 N>
__device__ __forceinline__ void group_sum(const LossParams &p, float (&sum)[N], float *scratch, u32 sample, u32 word) {
    constexpr u32 MOST = LOSS_GROUP / WARP;
    const float result = group_reduce_to_lanes<Sum, MOST, EVERYWHERE>(sum, first_warp(p), p.group / WARP, scratch);
    if (FORM != WHOLE && threadIdx.x < N) {
        store(summary_of<WORDS>(p, sample, blockIdx.x) + word + threadIdx.x, result);
    }
    if (EVERYWHERE) {
        each_lane_to_all(result, sum);
    }
}

// Labelled samples of the batch that counts, and the weights of their classes.
struct Labelled {
    float count;
    float weight;
};

// A whole block computes it. Without WEIGHTED there are no class weights. LOADS: labels in flight.
template <bool WEIGHTED, u32 LOADS = IN_FLIGHT> __device__ __forceinline__ Labelled labelled(const LossParams &p) {
    float sum[WEIGHTED ? 2 : 1] = {};
    for (u32 start = threadIdx.x; start < p.counted_len; start += LOADS * blockDim.x) {
        i64 label[LOADS];
#pragma unroll
        for (u32 k = 0; k < LOADS; ++k) {
            // Without a branch, or the next load would wait for this one.
            label[k] = load(p.counted + min(start + k * blockDim.x, p.counted_len - 1u));
        }
#pragma unroll
        for (u32 k = 0; k < LOADS; ++k) {
            const bool exists = start + k * blockDim.x < p.counted_len;
            const bool counts = exists & is_labelled(p, label[k]);
            sum[0] += counts ? 1.0f : 0.0f;
            if (WEIGHTED && counts) {
                sum[WEIGHTED ? 1 : 0] += p.class_weights == nullptr ? 1.0f : load(p.class_weights + label[k]);
            }
        }
    }
    group_reduce<Sum>(sum, 0, blockDim.x / WARP, shared(COUNTED));
    return {sum[0], sum[WEIGHTED ? 1 : 0]};
}

// Whether an earlier sample has the same index; a whole group computes it.
__device__ __forceinline__ bool is_repeated(const LossParams &p, u32 sample, i64 index, u32 thread) {
    float count[1] = {0.0f};
    for (u32 i = thread; i < min(sample, p.batch); i += p.group) {
        count[0] += load(p.index + i) == index ? 1.0f : 0.0f;
    }
    group_reduce<Sum>(count, first_warp(p), p.group / WARP, shared(REPEATED));
    return count[0] > 0.0f;
}

// What a sample is compared with.
struct Partner {
    bool exists; // if not, the sample has no consistency term
    u32 wrong;   // WRONG_INDEX, or REPEATED_INDEX: an earlier sample has the same
};

// Reads what this slice is compared with: branch 1, or the remembered logits, which `logit` then overwrites.
template <class T, Form FORM>
__device__ __forceinline__ Partner read_partner(const LossParams &p, const Slice<T> &slice, const T *branch_1,
                                                u32 sample, u32 thread, u32 start, const float (&logit)[ELEMENTS],
                                                float (&partner)[ELEMENTS]) {
    Partner found = {p.two_branches != 0u, 0u};
    if (found.exists) {
        slice.read(branch_1, partner, p.is_difference != 0u ? 0.0f : -INF);
    } else if (p.history != nullptr) {
        const i64 index = sample < p.batch ? load(p.index + sample) : -1;
        const bool is_row = is_below(index, p.history_rows);
        const bool repeated = is_repeated(p, sample, index, thread);
        found.wrong = !is_row ? WRONG_INDEX : repeated ? REPEATED_INDEX : 0u;
        found.exists = found.wrong == 0u;
        if (found.exists) {
            float *const remembered = p.history + static_cast<u64>(index) * p.classes + start;
            slice.read(remembered, partner);
            if (FORM == WHOLE || FORM == APPLY) {
                slice.write(remembered, logit);
            }
        }
    }
    return found;
}

// What is wrong with one kind of argument: how often, where first, and what is there. Words of the status.
__device__ __forceinline__ void report(const LossParams &p, u64 *status, float count, float position,
                                       const i64 *values) {
    const bool any = count > 0.0f;
    const u32 first = any ? static_cast<u32>(position) : 0u;
    u64 before = 0;
    if (p.accumulate != 0u) {
        before = load(status);
    }
    store(status, before + static_cast<u64>(count));
    // The first one of all launches that add to this status.
    if (before == 0) {
        store(status + 1, any ? p.first_row + first : 0ull);
        store(status + 2, any ? static_cast<u64>(load(values + first)) : 0ull);
    }
}

// Values and status from the six sums and the positions of `finish`; one thread computes them. `all`: what both sums are
// divided by where they are not divided by something given.
__device__ __forceinline__ void store_values(const LossParams &p, const float (&total)[6], const float (&first)[3],
                                             Labelled all) {
    const bool given = p.denominator > 0.0f;
    const float of_criterion = given ? p.denominator : all.weight;
    const float count = p.labelled_only != 0u ? all.count : static_cast<float>(p.counted_len);
    const float of_consistency = given ? p.denominator : count;
    const float criterion = of_criterion > 0.0f ? total[0] / of_criterion : 0.0f;
    const float consistency = of_consistency > 0.0f ? p.scale * total[1] / of_consistency : 0.0f;
    const float values[3] = {criterion + p.lambda * consistency, criterion, consistency};
#pragma unroll
    for (u32 i = 0; i < 3; ++i) {
        store(p.values + i, p.accumulate != 0u ? load(p.values + i) + values[i] : values[i]);
    }
    report(p, p.status, total[3], -first[0], p.labels);
    report(p, p.status + 3, total[4], -first[1], p.index);
    report(p, p.status + 6, total[5], -first[2], p.index);
}

// Values and status from the records; the last block computes them.
template <bool WEIGHTED> __device__ __forceinline__ void finish(const LossParams &p) {
    const u32 warps = blockDim.x / WARP;
    // Criterion, divergence, labelled; wrong labels, wrong indices, repeated indices: in the order of their bits.
    float total[6] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    // Minus the first position of each of the last three.
    float first[3] = {-INF, -INF, -INF};
    for (u32 start = threadIdx.x; start < p.batch; start += IN_FLIGHT * blockDim.x) {
        float record[IN_FLIGHT][3];
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; ++k) {
#pragma unroll
            for (u32 word = 0; word < 3; ++word) {
                record[k][word] = load(record_of(p, min(start + k * blockDim.x, p.batch - 1u)) + word);
            }
        }
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; ++k) {
            const u32 i = start + k * blockDim.x;
            const bool exists = i < p.batch;
            const u32 found = exists ? static_cast<u32>(record[k][2]) : 0u;
            total[0] += exists ? record[k][0] : 0.0f;
            total[1] += exists ? record[k][1] : 0.0f;
            total[2] += (found & HAS_LABEL) != 0u ? 1.0f : 0.0f;
#pragma unroll
            for (u32 kind = 0; kind < 3; ++kind) {
                if ((found & WRONG_LABEL << kind) != 0u) {
                    total[3 + kind] += 1.0f;
                    first[kind] = fmaxf(first[kind], -static_cast<float>(i));
                }
            }
        }
    }
    group_reduce<Sum>(total, 0, warps, shared(TOTALS));
    group_reduce<Max>(first, 0, warps, shared(POSITIONS));
    // Without labels every sample takes part.
    const float count = p.counted != nullptr ? total[2] : static_cast<float>(p.batch);
    Labelled all = {count, count};
    // Weights are not in the records, and neither are the labels of a longer batch.
    const bool is_batch = p.counted == p.labels && p.counted_len == p.batch;
    if (p.counted != nullptr && (WEIGHTED || !is_batch)) {
        all = labelled<WEIGHTED>(p);
    }
    if (threadIdx.x == 0) {
        store_values(p, total, first, all);
    }
}

} // namespace loss

} // namespace pace

#endif // PACE_LOSS_CUH
