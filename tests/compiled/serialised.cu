// wgmmas between which an accumulator is touched: ptxas makes each of them wait for the one before. Never run.

#include "../../kernels/sm90/ptx.cuh"

extern "C" __global__ void __launch_bounds__(128, 1) serialised(float *y, unsigned tiles) {
    using namespace pace::sm90;
    float d[68];
    wgmma_fence();
    for (unsigned t = 0; t < tiles; ++t) {
        wgmma<pace::bf16, 136>(d, Tile<128, 1024>::at(shared_base()), Tile<128, 1024>::at(shared_base() + 16384),
                               t > 0);
        d[0] += 1.f;
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (unsigned i = 0; i < 68; ++i) {
        y[threadIdx.x * 68 + i] = d[i];
    }
}
