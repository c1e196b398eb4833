// Gradients to the adapter of the dense noisy linear layer, for 16-bit types and noise per sample.
//
//   grad_Wd = e^T @ x,  grad_bd = sum over rows of e,  with e = z * g
//
//   g [M, N]; x [M, K] or, shared by the branches, [B T, K]; z [R, N] in memory; grad_Wd [N, K]; grad_bd [N].
//
// A cluster's tile is 256 features by 128 channels of each of its two blocks, and a unit of work one sample of a tile; the blocks fetch
// half of x each, for both. Clusters, one on each pair of multiprocessors, have equal runs of units, tile by tile (stream-K): a tile
// whose units are all of one cluster goes out at once, of others each block writes its fp32 sum, and weight_sums adds them up in the
// order of the clusters.
// e^T is the A operand: fragments of g, transposed by ldmatrix and multiplied by z in f32 on their way; its rows are channels, so
// that a thread has two z of a sample. Two consumer warpgroups have 64 channels each. Tokens are walked 64 at a time through
// STAGES stages, rows that do not exist as zeros, and steps of 16 that have none are left out.
//
// Bytes: g (K / 256) times and x (N / 256) times from L2; grad_Wd once, and at most 256 KiB of partial sums per block twice.
// Operations: 2 M N K. Determinism: run-to-run bitwise on devices with as many multiprocessors; every sum in a fixed order.

#include "weight_gradient.cuh"

namespace pace {

namespace sm90::weight {

PACE_CLUSTER_KERNELS_16(sm90_weight_gradient, Sm90WeightParams, SM90_WEIGHT_CLUSTER, (THREADS, 1),
                        gradient<T, Layout<SM90_WEIGHT_STAGES, SM90_WEIGHT_CLUSTER>>(p))
PACE_KERNELS_16(sm90_weight_sums, Sm90WeightParams, (SM90_WEIGHT_SUM_THREADS), add_up<T, SM90_WEIGHT_CLUSTER>(p))

} // namespace sm90::weight
} // namespace pace
