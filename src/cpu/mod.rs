//! The operators on the CPU: native, multi-threaded, generic over `f32` and `f64`, layers over `bf16` too.
//!
//! Every forward comes with its backward. Operands are row-major slices; outputs are the caller's. All operators
//! are deterministic run to run. In `f64` they are the oracle that other back ends are tested against.
//! Threads are rayon's: run inside a [`rayon` pool](https://docs.rs/rayon) of your own to choose how many. In a program whose own
//! loops run on OpenMP, [`set_openmp`] has the operators run there too.
//
// What is generic and public is `#[inline(never)]`: the compiler then takes the instances of this library, which the C interface and
// candle's operators have, instead of compiling them in every program again.

mod bf16;
mod blas;
mod drop_path;
mod exp;
mod lm_head;
mod lora_mul_linear;
mod loss;
mod low_rank_linear;
mod matmul;
mod noisy_epilogue;
mod noisy_linear;
mod norms;
mod rows;
mod scratch;
mod store;
mod weights;

pub use crate::parallel::{OpenMp, set_openmp};
pub(crate) use blas::BlasReal;
pub use blas::{Blas, Gemm, set_blas};
pub use drop_path::{shared_drop_path, shared_drop_path_backward};
pub use lm_head::{LmHead, LmHeadGrads};
#[cfg(feature = "cuda")]
pub(crate) use lora_mul_linear::check_adapter;
pub use lora_mul_linear::{Lora, LoraMulLinear, LoraMulLinearGrads, Prompt};
#[cfg(feature = "cuda")]
pub(crate) use loss::rows;
pub use loss::{Consistency, Loss, LossValues};
#[cfg(feature = "cuda")]
pub(crate) use low_rank_linear::check_scale;
pub use low_rank_linear::{LowRankGrads, LowRankLinear};
pub use noisy_epilogue::{noisy_epilogue, noisy_epilogue_backward};
#[cfg(feature = "cuda")]
pub(crate) use noisy_linear::NEEDS_INPUT;
pub use noisy_linear::{NoisyLinear, NoisyLinearGrads};
pub use norms::{fp_distance, grad_norm};
pub(crate) use scratch::Scratched;
pub(crate) use store::Store;
pub use weights::{
    LoraFactors, LoraGrads, PromptBias, PromptGrads, lora_mul_weight, lora_mul_weight_backward,
    low_rank_weight, low_rank_weight_backward, merge, unmerge,
};

/// The frozen layer under an adapter. `B` are the tensors: slices here, and on NVIDIA devices what the operators in `cuda` take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Base<B> {
    /// `W0 [N, K]`.
    pub weight: B,
    /// `b0 [N]`.
    pub bias: Option<B>,
}
