//! The operators on NVIDIA devices: planned on the host, launched on the caller's stream.
//!
//! An operator turns its arguments and a [`Gpu`] into a [`Plan`]: launches of kernels, and GEMMs of cuBLASLt, one after the
//! other. Planning checks every argument and needs neither device nor driver; [`select()`] chooses the [`Family`] that computes a
//! linear layer. [`Device`] carries plans out through `cudarc`: methods that take anything which implements `cudarc`'s
//! `DevicePtr` are safe; [`Device::launch`] takes plans over raw addresses.
//!
//! Nothing here allocates device memory, waits for the device or creates a stream, so everything can be captured in a
//! CUDA graph; but cuBLASLt loads a kernel when it is first used, which a capture does not allow, so run a layer once on the same
//! tensors before. A captured graph replays with fresh noise if the key lies in device memory (see
//! [`noise::Noise::Keyed`](crate::noise::Noise::Keyed)). `cudarc` itself records events on tensors as soon as there is a second
//! stream; switch that off (`CudaContext::disable_event_tracking`) before you make the tensors of a graph.
//!
//! Streams and tensors of other libraries come in as [`BorrowedTensor`] and `cudarc`'s `wrap_borrowed_stream`.
//!
//! A graph needs its tensors, workspaces and key for as long as it is replayed. Like `cudarc`, safe methods trust an
//! implementation of `DevicePtr` to tell the truth about its memory.
//!
//! All operators are deterministic run to run, and the noise is bitwise that of the CPU. Tensors are `f32`, `f16` or `bf16`;
//! sums are in `f32`.
//!
//! ```no_run
//! use pace_kernels::LinearShape;
//! use pace_kernels::cuda::{Base, DType, Device, LowRankLinear, Noise};
//! use pace_kernels::noise::{Generator, Key, NoiseShape};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open(0)?;
//! let stream = device.context().new_stream()?;
//! let shape = LinearShape {
//!     branches: 2,
//!     batch: 64,
//!     tokens: 197,
//!     in_features: 768,
//!     out_features: 3072,
//!     shared_input: true,
//! };
//! let (k, n, rank) = (shape.in_features, shape.out_features, 16);
//! let (weight, bias) = (stream.alloc_zeros::<f32>(n * k)?, stream.alloc_zeros::<f32>(n)?);
//! let (lora_b, lora_a) = (stream.alloc_zeros::<f32>(n * rank)?, stream.alloc_zeros::<f32>(rank * k)?);
//! let (seed, step, layer, sigma) = (42, 0, 0, 0.5);
//! let generator = Generator::new(Key::derive(seed, step, layer), sigma, NoiseShape::PerSample, 0)?;
//! let lora = LowRankLinear {
//!     shape,
//!     noise: Noise::Generated(generator),
//!     base: Some(Base { weight: &weight as _, bias: Some(&bias as _) }),
//!     rank,
//!     lora_b: &lora_b as _,
//!     lora_a: &lora_a as _,
//!     delta_bias: None,
//!     scale: 1.0,
//!     allow_tf32: false,
//! };
//! let x = stream.alloc_zeros::<f32>(shape.in_rows() * k)?;
//! let mut s = stream.alloc_zeros::<f32>(shape.in_rows() * rank)?;
//! let mut y = stream.alloc_zeros::<f32>(shape.out_rows() * n)?;
//! let workspace_len = lora.workspace_len(device.gpu(), DType::F32);
//! let mut workspace = stream.alloc_zeros::<f32>(workspace_len.max(1))?;
//! device.low_rank_linear(&lora, &x, &mut s, &mut y, &mut workspace, &stream)?;
//! # Ok(())
//! # }
//! ```

mod adapter_weights;
mod borrowed;
mod borrows;
mod buffer;
mod cublaslt;
mod device;
mod drop_path;
mod gemm;
mod gpu;
mod kernel;
mod layer;
mod layer_epilogue;
mod lm_head;
mod lora_mul_linear;
mod loss;
mod low_rank_linear;
mod low_rank_weight;
mod merge;
mod noise_fill;
mod noise_source;
mod noisy_epilogue;
mod noisy_linear;
mod norms;
mod partial_sums;
mod plan;
mod pointer;
mod prompt_bias;
mod select;
mod sm90;
mod under_noise;
mod units;

pub use crate::cpu::{
    Base, Lora, LoraFactors, LoraGrads, LoraMulLinearGrads, LowRankGrads, NoisyLinearGrads, Prompt,
    PromptBias, PromptGrads,
};
pub use adapter_weights::{
    AdapterWeight, AdapterWeightGrads, LoraWeight, LoraWeightGrads, PromptWeight, PromptWeightGrads,
};
pub use borrowed::BorrowedTensor;
pub use borrows::Noise;
pub use buffer::{Address, Buffer, DType, Direction, Element};
pub use cudarc;
pub use device::Device;
#[cfg(feature = "capi")]
pub(crate) use device::{keeping_context, probe_driver};
pub use drop_path::{DropPath, Mask, MaskSource};
pub use gemm::{Gemm, Matrix, Workspace};
pub use gpu::{Family, Gpu};
pub use kernel::{KERNELS, Kernel};
pub use lm_head::{LmHead, LmHeadDeviceOutputs, LmHeadOnDevice, LmHeadOutputs};
pub use lora_mul_linear::LoraMulLinear;
pub use loss::{Consistency, Finding, Loss, LossInputs, LossOutputs, LossStatus, Partner};
pub use low_rank_linear::LowRankLinear;
pub use merge::{Merge, MergeSign};
pub use noise_fill::NoiseFill;
pub use noise_source::Source;
pub use noisy_epilogue::NoisyEpilogue;
pub use noisy_linear::{NoisyLinear, folds_by_default};
pub use norms::{FpDistance, GradNorm};
pub use plan::{Launch, Params, Plan, Step, TensorMap};
pub use select::{Problem, select};
