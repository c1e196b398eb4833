//! candle's CUDA tensors, and the operators of [`cuda`](crate::cuda) on them.
//!
//! Everything runs on the stream of the candle device that the tensors belong to, and in memory allocated there.

use super::ops::wrap;
use crate::cuda::{self, Device, GradNorm};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, CudaView, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{DType, Error, Layout, Result, Shape, Storage, Tensor};
use std::sync::Arc;

/// The element types of the operators on devices, to candle.
pub(super) trait Element: cuda::Element + CudaDType + DeviceRepr {}

impl Element for f32 {}
impl Element for half::f16 {}
impl Element for half::bf16 {}

/// Runs one of three monomorphic versions by element type.
macro_rules! by_dtype {
    ($name:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::candle::cuda::unsupported($name, other)),
        }
    };
}
pub(super) use by_dtype;

pub(super) fn unsupported(name: &str, dtype: DType) -> Error {
    Error::Msg(format!("{name}: element type {dtype:?} is not supported on CUDA, expected F32, F16 or BF16"))
}

/// A candle device with the kernels loaded.
pub(super) struct Gpu {
    pub(super) operators: Device,
    pub(super) candle: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
}

impl Gpu {
    /// The kernels are loaded on first use and stay.
    pub(super) fn of(candle: &CudaDevice) -> Result<Self> {
        let stream = candle.cuda_stream();
        let operators = wrap(Device::open(stream.context().ordinal()))?;
        Ok(Self { operators, candle: candle.clone(), stream })
    }

    /// Memory for `len` elements, at least one: the driver has no empty allocations. It holds anything: a kernel writes it
    /// before it is read.
    pub(super) fn alloc<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: the operators overwrite their outputs in full and take workspaces that hold anything; where one fails,
        // what it should have written is dropped unread.
        unsafe { self.candle.alloc(len.max(1)) }
    }

    /// A tensor of what an operator wrote.
    pub(super) fn tensor<T: Element>(&self, values: CudaSlice<T>, shape: &Shape) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(values, self.candle.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }
}

/// The elements of a contiguous CUDA tensor.
pub(super) fn view<'a, T: Element>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let view = match layout.contiguous_offsets() {
        Some((start, end)) => storage.as_cuda_slice::<T>()?.try_slice(start..end),
        None => candle_core::bail!("a tensor that should be contiguous is not"),
    };
    view.ok_or_else(|| Error::Msg("a tensor reaches past the end of its storage".into()))
}

/// Calls `body` with the elements of contiguous CUDA tensors.
pub(super) fn with_views<T: Element, R>(
    name: &str,
    tensors: &[&Tensor],
    body: impl FnOnce(&[CudaView<'_, T>]) -> Result<R>,
) -> Result<R> {
    let storages: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let views: Vec<CudaView<'_, T>> = storages
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cuda(storage) => view(storage, layout),
            _ => candle_core::bail!("{name}: a tensor is not on a CUDA device, as the others are"),
        })
        .collect::<Result<_>>()?;
    body(&views)
}

/// The sum of the squares of all elements of some CUDA tensors.
pub(super) fn sum_of_squares(mut tensors: Vec<Tensor>) -> Result<f64> {
    let mut sum = 0.0;
    // One launch takes tensors of one type on one device.
    while let Some(first) = tensors.first().cloned() {
        let (group, rest): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|tensor| {
            tensor.dtype() == first.dtype() && tensor.device().same_device(first.device())
        });
        let norm: f64 = by_dtype!("grad_norm", first.dtype(), T => norm::<T>(first.device(), &group))?;
        sum += norm * norm;
        tensors = rest;
    }
    Ok(sum)
}

fn norm<T: Element>(device: &candle_core::Device, tensors: &[Tensor]) -> Result<f64> {
    let gpu = Gpu::of(device.as_cuda_device()?)?;
    let tensors: Vec<Tensor> = tensors.iter().map(Tensor::contiguous).collect::<Result<_>>()?;
    let tensors: Vec<&Tensor> = tensors.iter().collect();
    let mut norm = gpu.alloc::<f64>(1)?;
    let len = GradNorm::workspace_len(tensors.iter().map(|tensor| tensor.elem_count()));
    let mut workspace = gpu.alloc::<f64>(len)?;
    with_views::<T, _>("grad_norm", &tensors, |views| {
        let views: Vec<_> = views.iter().map(|view| view as _).collect();
        wrap(gpu.operators.grad_norm(&views, &mut norm, &mut workspace, &gpu.stream))
    })?;
    Ok(gpu.candle.clone_dtoh(&norm)?.iter().sum())
}
