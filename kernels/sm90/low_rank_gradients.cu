// Gradients of the low-rank noisy linear layer but that to the input, for ranks up to 32, for 16-bit types and noise per sample or none.
//
//   factors   ds = scale e @ B,  grad_B = e^T @ s,  grad_bd = sum over rows of e,  with e = z * g
//   product   grad_A = ds^T @ x, summed over the branches of a shared input
//
//   g [M, N]; x [M, K] or, shared by the branches, [B T, K]; s [rows of x, r]; ds [M, r]; B [N, r]; z [R, N] in memory, or none.
//   Results are partial sums in f32: ds [chunks, M, r], grad_B [groups, N, r], grad_bd [groups, N], grad_A [groups, r, K].
//
// Bound by memory: g or x is read once, by TMA, and goes from shared memory to the tensor cores without passing through registers. That
// is why z never meets g: with one z per sample and channel, ds = g @ (z * B) per sample, with z * B rounded to T, and grad_B =
// sum over samples of z * (g_s^T @ s_s), with z in f32; a column of ones beside s makes the sum of rows.
//
// A block has a chunk of channels (384 up to rank 16, 256 up to 32) of some consecutive tiles of 64 tokens. The producer's warp 0 issues
// the copies, its others make s^T or ds^T of each tile and z * B of each sample. For `factors` one consumer warpgroup
// computes ds and the other grad_B; for `product` each has half of the chunk.
//
// Bytes: g or x once; partial sums of ds once for each chunk. Determinism: run-to-run bitwise on devices with as many multiprocessors;
// every sum in a fixed order.

#include "low_rank_gradients.cuh"

namespace pace {

namespace sm90::low_rank_gradients {

PACE_CLUSTER_KERNELS_16(sm90_low_rank_factors_16, Sm90LowRankGradientsParams, 1, (THREADS, 1),
                        gradients<T, Layout<16, true>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_factors_32, Sm90LowRankGradientsParams, 1, (THREADS, 1),
                        gradients<T, Layout<32, true>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_product_16, Sm90LowRankGradientsParams, 1, (THREADS, 1),
                        gradients<T, Layout<16, false>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_product_32, Sm90LowRankGradientsParams, 1, (THREADS, 1),
                        gradients<T, Layout<32, false>>(p))

} // namespace sm90::low_rank_gradients
} // namespace pace
