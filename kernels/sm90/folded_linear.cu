// Dense noisy linear layer for 16-bit types and noise per sample, base and adapter folded into one GEMM: forward, and the gradient
// to the input.
//
//   forward   y = x @ (W0 + z * Wd)^T + b0 + z * bd
//   input     grad_x = g @ (W0 + z * Wd), summed over the branches of a shared input
//
//   x, grad_x [M, K] or, shared by the branches, [B T, K]; W0, Wd [N, K]; b0, bd [N]; y, g [M, N]; z [R, N] in memory.
//
// The folded weights differ from sample to sample. So they are the A operand, made in registers: fmaf in f32, rounded to T once. A
// block has 128 rows of the output transposed (channels, or features of grad_x), 64 for each of two consumer warpgroups, and
// SAMPLES units of TOKENS tokens, a unit being a part of a sample's tokens. The units share the fragments of W0 and Wd: of one
// sample alone, reading them would take more of shared memory than the MMAs leave. While the wgmma of one unit runs, the
// fragment of the next is folded.
//
// The reduction is walked 64 elements at a time, as TMA takes as long for a row of 64 bytes as for one of 128: the units' tiles through
// STAGES stages, and each consumer's tiles of both matrices through as many entries of a ring of their own, since there is no room
// for both consumers' in a stage. The two blocks of a cluster have adjacent channels and the same units; each fetches every second unit for both.
//
// Bytes: x or g (channels / 256) times and both matrices (units / SAMPLES) times from L2; the output once. Operations: 2 M N K,
// and 2 N K for each unit's folding. Determinism: run-to-run bitwise; every sum in a fixed order, and a sample's output does not
// depend on its batch.

#include "folded_linear.cuh"

namespace pace {

namespace sm90::folded {

template <u32 TOKENS, u32 SAMPLES, u32 CHUNK>
using Shipped = Layout<TOKENS, SAMPLES, CHUNK, SM90_FOLDED_STAGES, SM90_FOLDED_CLUSTER>;

PACE_CLUSTER_KERNELS_16(sm90_folded_linear_200, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, false, Shipped<200, 2, 40>>(p))
PACE_CLUSTER_KERNELS_16(sm90_folded_linear_136, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, false, Shipped<136, 2, 136>>(p))
PACE_CLUSTER_KERNELS_16(sm90_folded_linear_64, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, false, Shipped<64, 4, 64>>(p))
PACE_CLUSTER_KERNELS_16(sm90_folded_input_200, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, true, Shipped<200, 2, 40>>(p))
PACE_CLUSTER_KERNELS_16(sm90_folded_input_136, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, true, Shipped<136, 2, 136>>(p))
PACE_CLUSTER_KERNELS_16(sm90_folded_input_64, Sm90FoldedParams, SM90_FOLDED_CLUSTER, (THREADS, 1),
                        linear<T, true, Shipped<64, 4, 64>>(p))

} // namespace sm90::folded
} // namespace pace
