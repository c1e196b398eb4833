// Low-rank noisy linear layer (LoRA add) for ranks up to 32, for 16-bit types: forward, with noise per sample, and the gradient to
// the input.
//
//   forward   y = x @ W0^T + b0 + z * (s @ B^T + bd),  s = scale x @ A^T
//   input     grad_x = g @ W0 + ds @ A, summed over the branches of a shared input
//
//   x, grad_x [M, K] or, shared by the branches, [B T, K]; W0 [N, K]; A [r, K]; B [N, r]; b0, bd [N]; y, g [M, N]; s [rows of x, r];
//   ds [M, r], what is under the noise of the backward pass; z as in noise_source.cuh.
//
// A block has 128 token rows and 192 channels, or features of grad_x (mainloop.cuh). Forward, W0's rows and A's, padded to RANK,
// are one B operand, so that s costs no load of x. Its accumulators, rounded to T, are the A fragments of the rank's GEMM by
// mma.sync, whose accumulators meet the noise 8 channels at a time. With a shared input the base GEMM runs once for both
// branches. For grad_x the fragments are those of ds.
//
// Bytes: x (N / 192) times and W0 (M / 128) times from L2, W0 shared within clusters; y once. Operations:
// 2 M N K (1 + RANK / 192) + 2 M N RANK; for grad_x 2 M N K + 2 M K RANK.
// Determinism: run-to-run bitwise; every sum in a fixed order, and a sample's output does not depend on its batch.

#include "low_rank_linear.cuh"

namespace pace {

namespace sm90::low_rank {

template <u32 RANK, bool INPUT>
using Shipped =
    Layout<RANK, INPUT,
           Shape<SM90_LOW_RANK_STAGES, SM90_LOW_RANK_CLUSTER, INPUT || RANK == 16 ? SM90_LOW_RANK_STAGING : 1>>;

PACE_CLUSTER_KERNELS_16(sm90_low_rank_linear_16, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1),
                        linear<T, Shipped<16, false>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_linear_32, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1),
                        linear<T, Shipped<32, false>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_input_16, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1),
                        linear<T, Shipped<16, true>>(p))
PACE_CLUSTER_KERNELS_16(sm90_low_rank_input_32, Sm90LinearParams, SM90_LOW_RANK_CLUSTER, (THREADS, 1),
                        linear<T, Shipped<32, true>>(p))

} // namespace sm90::low_rank
} // namespace pace
