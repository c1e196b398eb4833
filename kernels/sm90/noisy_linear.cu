// Dense noisy linear layer, forward, for 16-bit types, with an accumulator for base and adapter each.
//
//   y = x @ W0^T + b0 + z * (x @ Wd^T + bd)
//
//   x [M, K] or, shared by the branches, [B T, K]; W0, Wd [N, K]; b0, bd [N]; y [M, N]; z as in noise_source.cuh.
//
// A block has 128 token rows and 128 channels (mainloop.cuh): W0's rows and Wd's are one B operand of 256 columns, so that a
// thread has base and adapter of the same elements, and z meets them in f32. With a shared input both GEMMs run once for both
// branches. Two variants of the epilogue: z by a table, where a tile has few rows of it, or each thread makes its own.
//
// Bytes: x (N / 128) times and both matrices (M / 128) times from L2, shared within clusters; y once. Operations: 4 M N K.
// Determinism: run-to-run bitwise; every sum in a fixed order, and a sample's output does not depend on its batch.

#include "noisy_linear.cuh"

namespace pace {

namespace sm90::exact {

using Shipped = Layout<SM90_EXACT_STAGES, SM90_EXACT_CLUSTER, SM90_EXACT_STAGING>;

PACE_CLUSTER_KERNELS_16(sm90_noisy_linear_exact, Sm90LinearParams, SM90_EXACT_CLUSTER, (THREADS, 1),
                        forward<T, true, Shipped>(p))
PACE_CLUSTER_KERNELS_16(sm90_noisy_linear_exact_any, Sm90LinearParams, SM90_EXACT_CLUSTER, (THREADS, 1),
                        forward<T, false, Shipped>(p))

} // namespace sm90::exact
} // namespace pace
