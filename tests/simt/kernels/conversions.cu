// What the simulator's cuda_fp16.h and cuda_bf16.h do, for its own tests.

#include "storage.cuh"

namespace {

struct ConvertParams {
    const float *x;
    float *y;
    unsigned long long n;
};

// y = x rounded to T.
template <class T> void round_trip(const ConvertParams &p) {
    for (unsigned i = threadIdx.x; i < p.n; i += blockDim.x) {
        pace::store(p.y + i, pace::to_float(pace::from_float<T>(pace::load(p.x + i))));
    }
}

} // namespace

PACE_KERNEL(round_to_f16, ConvertParams, 256) { round_trip<pace::f16>(p); }

PACE_KERNEL(round_to_bf16, ConvertParams, 256) { round_trip<pace::bf16>(p); }
