//! What every operator does on a device: a [`Kernel`]'s halves for CUDA tensors as candle's forward and backward pass.

use super::Kernel;
use crate::candle::cuda::view;
pub(in crate::candle) use crate::candle::cuda::{Element, Gpu};
pub(super) use crate::candle::cuda::{by_dtype, with_views};
use candle_core::backend::BackendStorage;
pub(in crate::candle) use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
pub(super) use candle_core::cuda_backend::cudarc::driver::{CudaViewMut, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Shape, Tensor};

/// The gradient of each argument, where there is one.
pub(in crate::candle) type Gradients<T> = Vec<Option<CudaSlice<T>>>;

/// The forward pass of a candle operation.
pub(super) fn forward<K: Kernel>(
    kernel: &K,
    arguments: &[(&CudaStorage, &Layout)],
) -> Result<(CudaStorage, Shape)> {
    let shapes: Vec<&Shape> = arguments.iter().map(|(_, layout)| layout.shape()).collect();
    let shape = kernel.shape(&shapes)?;
    let storage = arguments[0].0;
    by_dtype!(K::NAME, storage.dtype(), T => {
        let gpu = Gpu::of(storage.device())?;
        let views: Vec<CudaView<'_, T>> =
            arguments.iter().map(|(storage, layout)| view(storage, layout)).collect::<Result<_>>()?;
        let mut out = gpu.alloc::<T>(shape.elem_count())?;
        kernel.forward_cuda(&gpu, &views, &mut out)?;
        Ok((CudaStorage::wrap_cuda_slice(out, gpu.candle), shape))
    })
}

/// The backward pass of a candle operation.
pub(super) fn backward<K: Kernel, const N: usize>(
    kernel: &K,
    device: &CudaDevice,
    arguments: [&Tensor; N],
    grad: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    by_dtype!(K::NAME, grad.dtype(), T => {
        let gpu = Gpu::of(device)?;
        let wanted = arguments.map(Tensor::track_op);
        let tensors = [&arguments[..], &[grad]].concat();
        let grads = with_views::<T, _>(K::NAME, &tensors, |views| {
            kernel.backward_cuda(&gpu, &views[..N], &views[N], &wanted)
        })?;
        let mut out = [const { None }; N];
        for (((out, grad), argument), wanted) in out.iter_mut().zip(grads).zip(arguments).zip(wanted) {
            *out = grad.filter(|_| wanted).map(|grad| gpu.tensor(grad, argument.shape()));
        }
        Ok(out)
    })
}

/// Memory for the gradient of each argument that needs one.
pub(super) fn places<T: Element>(
    gpu: &Gpu,
    arguments: &[CudaView<'_, T>],
    wanted: &[bool],
) -> Result<Gradients<T>> {
    let place = |(argument, &wanted): (&CudaView<'_, T>, _)| {
        if wanted { gpu.alloc(argument.len()).map(Some) } else { Ok(None) }
    };
    arguments.iter().zip(wanted).map(place).collect()
}

/// A tensor to read, of any type that can be one.
pub(super) fn input<'a, T: Element>(view: &'a CudaView<'_, T>) -> &'a dyn DevicePtr<T> {
    view
}

/// A tensor to write, where there is one.
pub(super) fn output<T: Element, P: DevicePtrMut<T>>(
    place: &mut Option<P>,
) -> Option<&mut dyn DevicePtrMut<T>> {
    place.as_mut().map(|place| place as _)
}
