// Kernels for the simulator's own tests: a few that are right, and the same with one fault each.

#include "storage.cuh"

namespace {

struct CopyParams {
    const float *x;
    float *y;
    unsigned long long n;
};

unsigned index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// y[i] = sum of the block's x, through shared memory.
template <bool BARRIER> void sum(const CopyParams &p) {
    PACE_SHARED(float, values);
    values[threadIdx.x] = pace::load(p.x + index());
    if (BARRIER) {
        __syncthreads();
    }
    float total = 0.0f;
    for (unsigned i = 0; i < blockDim.x; ++i) {
        total += values[i];
    }
    pace::store(p.y + index(), total);
}

} // namespace

PACE_KERNEL(copy, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(p.y + index(), pace::load(p.x + index()));
    }
}

PACE_KERNEL(copy_off_by_one, CopyParams, 256) {
    if (index() <= p.n) {
        pace::store(p.y + index(), 1.0f);
    }
}

PACE_KERNEL(copy_reads_past_the_end, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(p.y + index(), pace::load(p.x + index() + 1));
    }
}

// The write goes around `store`; only the red zone can tell.
PACE_KERNEL(copy_unseen_write, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(p.y + index(), pace::load(p.x + index()));
        p.y[p.n] = 1.0f;
    }
}

PACE_KERNEL(copy_unseen_write_to_input, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(p.y + index(), pace::load(p.x + index()));
        const_cast<float *>(p.x)[index()] = 0.0f;
    }
}

PACE_KERNEL(copy_writes_to_input, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(const_cast<float *>(p.x) + index(), 1.0f);
    }
}

PACE_KERNEL(copy_without_tail, CopyParams, 256) {
    if (index() < p.n / 4) {
        const float *x = p.x + 4 * index();
        pace::store_vector(p.y + 4 * index(), pace::load_vector(x));
    }
}

PACE_KERNEL(copy_reads_output, CopyParams, 256) {
    if (index() < p.n) {
        pace::store(p.y + index(), pace::load(p.y + index()));
    }
}

PACE_KERNEL(sum_of_block, CopyParams, 256) { sum<true>(p); }

PACE_KERNEL(sum_without_barrier, CopyParams, 256) { sum<false>(p); }

PACE_KERNEL(sum_past_shared_memory, CopyParams, 256) {
    PACE_SHARED(float, values);
    values[threadIdx.x + 1] = 0.0f;
    pace::store(p.y + index(), 0.0f);
}

PACE_KERNEL(barrier_in_a_branch, CopyParams, 256) {
    if (threadIdx.x < 5) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    pace::store(p.y + index(), 0.0f);
}

PACE_KERNEL(return_before_a_barrier, CopyParams, 256) {
    if (index() >= p.n) {
        return;
    }
    __syncthreads();
    pace::store(p.y + index(), 0.0f);
}

// y[i] = sum of the warp's x, in the same order in every lane.
PACE_KERNEL(sum_of_warp, CopyParams, 256) {
    float total = pace::load(p.x + index());
    for (unsigned bits = 16; bits > 0; bits /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, bits);
    }
    pace::store(p.y + index(), total);
}

// y[i] = x of the next lane of eight, by `down`, then of lane 2 of eight, added up.
PACE_KERNEL(shuffle_groups, CopyParams, 256) {
    const float x = pace::load(p.x + index());
    const float next = __shfl_down_sync(0xffffffffu, x, 1u, 8u);
    __syncwarp(0xffffffffu);
    pace::store(p.y + index(), next + __shfl_sync(0xffffffffu, x, 2u, 8u));
}

PACE_KERNEL(shuffle_in_a_branch, CopyParams, 256) {
    float x = pace::load(p.x + index());
    if (threadIdx.x % 32 != 7) {
        x = __shfl_xor_sync(0xffffffffu, x, 1u);
    } else {
        __syncthreads();
    }
    pace::store(p.y + index(), x);
}

PACE_KERNEL(shuffle_from_a_missing_lane, CopyParams, 256) {
    float x = pace::load(p.x + index());
    if (threadIdx.x % 32 < 16) {
        x = __shfl_xor_sync(0x0000ffffu, x, 16u);
    }
    pace::store(p.y + index(), x);
}

// What only the sanitizers see.

PACE_KERNEL(unseen_read, CopyParams, 256) { pace::store(p.y + index(), p.x[p.n]); }

PACE_KERNEL(unseen_read_past_the_red_zone, CopyParams, 256) { pace::store(p.y + index(), p.x[p.n + 64]); }

PACE_KERNEL(read_past_shared_memory, CopyParams, 256) {
    PACE_SHARED(float, values);
    pace::store(p.y + index(), values[blockDim.x]);
}

PACE_KERNEL(index_past_an_array, CopyParams, 256) {
    const float values[4] = {};
    pace::store(p.y + index(), values[p.n]);
}

PACE_KERNEL(overflow, CopyParams, 256) {
    const int n = static_cast<int>(p.n);
    pace::store(p.y + index(), static_cast<float>((n << 26) + (n << 26) + (n << 26)));
}

PACE_KERNEL(shift_too_far, CopyParams, 256) { pace::store(p.y + index(), static_cast<float>(1u << (2 * p.n))); }

PACE_KERNEL(cast_too_large, CopyParams, 256) {
    pace::store(p.y + index(), static_cast<float>(static_cast<unsigned>(-1.0f * p.n)));
}

PACE_KERNEL(misaligned, CopyParams, 256) {
    const pace::Vector<float> &vector = *reinterpret_cast<const pace::Vector<float> *>(p.x + p.n / 16);
    pace::store(p.y + index(), vector.value[0]);
}
