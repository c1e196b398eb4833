//! Differentiable PACE layers and losses on [candle](candle_core) tensors (feature `candle`).
//!
//! * [`PaceContext`] is what all noisy layers of a model share: seed, step, branches, training or evaluation.
//! * [`PaceLinear`] is a frozen linear layer with a noisy adapter; [`Injector`] wraps every linear layer of a model.
//! * [`Objective`] evaluates one training step: plain, PACE, PACE-lazy or PACE-fast.
//! * [`PeftAdapter`] reads and writes the adapter files of Hugging Face's PEFT.
//! * [`vit`] is a vision transformer in timm's layout, to fine-tune or to copy from.
//!
//! Layers work on any number of token dimensions, `[rows, …, features]`, of CPU tensors of `f32` and `f64`, and with the
//! feature `candle-cuda` of CUDA tensors of `f32`, `f16` and `bf16`; all tensors of an operation are in one place. The
//! operators behind them are those of [`cpu`](crate::cpu) and `cuda`; the backward pass makes the noise again.
//!
//! The feature `candle-cuda` takes what candle's own CUDA support takes to build, nvcc and NVIDIA's libraries, and a device
//! that `cuda::Device::open` accepts. Operators run on the stream of the candle device and allocate from it; only
//! [`Objective::step`] and [`grad_norm`] wait for the device. GEMMs of `f32` follow candle's own switch for TF32,
//! `candle_core::cuda::set_gemm_reduced_precision_f32`, which is off at the start. The operators of [`vit`] that are not
//! PACE's (layer norm, attention, GELU) are composed of candle's on CUDA.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::VarMap;
//! use pace_kernels::adapter::Adapter;
//! use pace_kernels::candle::{Batch, Injector, Objective, PaceContext, Variant, seeded_builder};
//!
//! # fn main() -> candle_core::Result<()> {
//! let (device, vars) = (Device::Cpu, VarMap::new());
//! let vb = seeded_builder(&vars, 42, DType::F32, &device);
//! let context = PaceContext::new(7);
//! let mut injector = Injector::new(&context, Adapter::LoraMulVptAdd, 4, &[0.5, 0.25], vb.clone());
//! let pre_trained = |out: usize, inp: usize| -> candle_core::Result<_> {
//!     Ok(candle_nn::Linear::new(Tensor::randn(0f32, 1.0, (out, inp), &device)?, None))
//! };
//! let hidden = injector.wrap("hidden", 0, pre_trained(16, 8)?)?;
//! let head = injector.wrap_head("head", 1, pre_trained(3, 16)?)?;
//!
//! let mut objective = Objective::new(&context, Variant::Pace, 0.1)?;
//! let x = Tensor::randn(0f32, 1.0, (4, 8), &device)?;
//! let step = objective.step(0, &Batch::new(&x, &[0, 1, 2, 0]), |x| {
//!     let x = hidden.forward_branching(x)?; // 4 rows in, 2·4 differently perturbed rows out
//!     head.forward(&x.relu()?)
//! })?;
//! let gradients = step.loss.backward()?;
//! assert!(step.values.consistency > 0.0 && gradients.get(&vars.all_vars()[0]).is_some());
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "candle-cuda")]
mod cuda;
mod injector;
mod layers;
mod loss;
mod ops;
mod peft;
mod vars;
pub mod vit;

pub use injector::Injector;
pub use layers::{PaceContext, PaceLinear, SharedDropPath};
pub use loss::{Batch, Objective, Step, Variant};
pub use ops::noisy_add;
pub use peft::{PeftAdapter, PeftLayer};
pub use vars::{grad_norm, seeded_builder};
