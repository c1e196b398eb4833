//! What every operator does on a device: a [`Kernel`]'s halves for CUDA tensors as candle's forward and backward pass.

use super::{Kernel, array};
use crate::candle::cuda::view;
pub(in crate::candle) use crate::candle::cuda::{Element, Gpu};
pub(super) use crate::candle::cuda::{by_dtype, with_views};
use candle_core::backend::BackendStorage;
pub(in crate::candle) use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
pub(super) use candle_core::cuda_backend::cudarc::driver::{CudaViewMut, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Shape, Tensor};

/// The forward pass of a candle operation.
pub(super) fn forward<K: Kernel<N>, const N: usize>(
    kernel: &K,
    arguments: [(&CudaStorage, &Layout); N],
) -> Result<(CudaStorage, Shape)> {
    let shape = kernel.shape(arguments.map(|(_, layout)| layout.shape()))?;
    let storage = arguments[0].0;
    by_dtype!(K::NAME, storage.dtype(), T => {
        let gpu = Gpu::of(storage.device())?;
        let views: Vec<CudaView<'_, T>> =
            arguments.iter().map(|(storage, layout)| view(storage, layout)).collect::<Result<_>>()?;
        let mut out = gpu.alloc::<T>(shape.elem_count())?;
        kernel.forward_cuda(&gpu, array(&views)?, &mut out)?;
        Ok((CudaStorage::wrap_cuda_slice(out, gpu.candle), shape))
    })
}

/// The backward pass of a candle operation.
pub(super) fn backward<K: Kernel<N>, const N: usize>(
    kernel: &K,
    device: &CudaDevice,
    arguments: [&Tensor; N],
    grad: &Tensor,
) -> Result<[Option<Tensor>; N]> {
    by_dtype!(K::NAME, grad.dtype(), T => {
        let gpu = Gpu::of(device)?;
        let mut places = [const { None }; N];
        for (place, argument) in places.iter_mut().zip(arguments) {
            *place = argument.track_op().then(|| gpu.alloc::<T>(argument.elem_count())).transpose()?;
        }
        let tensors = [&arguments[..], &[grad]].concat();
        with_views::<T, _>(K::NAME, &tensors, |views| {
            kernel.backward_cuda(&gpu, array(&views[..N])?, &views[N], &mut places)
        })?;
        let mut out = [const { None }; N];
        for ((out, place), argument) in out.iter_mut().zip(places).zip(arguments) {
            *out = place.map(|values| gpu.tensor(values, argument.shape()));
        }
        Ok(out)
    })
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
