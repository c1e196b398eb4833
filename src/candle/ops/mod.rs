//! The operators as candle custom operations.
//!
//! A [`Kernel`] is an operator with its backward pass, on slices and with the feature `candle-cuda` on device memory; [`Op`]
//! makes a candle operation of it. Each operator is a file, with both halves.

#[cfg(feature = "candle-cuda")]
mod device;
mod drop_path;
mod element;
mod joined;
mod layer;
mod lora_mul_linear;
mod low_rank_linear;
mod noisy_add;
mod noisy_linear;
mod scalar;

#[cfg(feature = "candle-cuda")]
use self::device::{CudaSlice, CudaView, Gpu};
pub(super) use self::drop_path::DropPathKernel;
pub(super) use self::element::Element;
use self::joined::Joined;
pub(super) use self::layer::{FrozenLinear, Layer, LayerNoise};
pub(super) use self::lora_mul_linear::lora_mul_linear;
pub(super) use self::low_rank_linear::low_rank_linear;
pub use self::noisy_add::noisy_add;
pub(super) use self::noisy_linear::noisy_linear;
pub(super) use self::scalar::scalar;
#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor,
    WithDType,
};

/// An operator on `N` tensors, one to three: a forward pass on slices, and the gradients of its arguments.
pub(super) trait Kernel<const N: usize>: Send + Sync + 'static {
    const NAME: &'static str;

    /// The shape of the result, from the arguments' shapes.
    fn shape(&self, arguments: [&Shape; N]) -> Result<Shape>;

    /// Computes the result; `out` has as many elements as [`shape`](Self::shape) says.
    fn forward<T: Element>(&self, arguments: [&[T]; N], out: &mut [T]) -> Result<()>;

    /// Computes the gradients of the arguments that have a place for it, from that of the result.
    fn backward<T: Element>(&self, arguments: [&[T]; N], grad: &[T], out: Grads<'_, T, N>) -> Result<()>;

    /// [`forward`](Self::forward) on a device. Contents of `out` are ignored.
    #[cfg(feature = "candle-cuda")]
    fn forward_cuda<T: device::Element>(
        &self,
        _gpu: &Gpu,
        _arguments: &[CudaView<'_, T>; N],
        _out: &mut CudaSlice<T>,
    ) -> Result<()> {
        candle_core::bail!("this operator has no kernel for CUDA tensors")
    }

    /// [`backward`](Self::backward) on a device. Contents of `out` are ignored.
    #[cfg(feature = "candle-cuda")]
    fn backward_cuda<T: device::Element>(
        &self,
        _gpu: &Gpu,
        _arguments: &[CudaView<'_, T>; N],
        _grad: &CudaView<'_, T>,
        _out: &mut [Option<CudaSlice<T>>; N],
    ) -> Result<()> {
        candle_core::bail!("this operator has no kernel for CUDA tensors")
    }
}

/// A place for the gradient of each argument that needs one.
pub(super) type Grads<'a, T, const N: usize> = [Option<&'a mut [T]>; N];

/// Errors of the operators, to candle.
pub(super) fn wrap<V>(result: crate::Result<V>) -> Result<V> {
    result.map_err(Error::wrap)
}

fn unsupported(name: &str, dtype: DType) -> Error {
    Error::Msg(format!("{name}: element type {dtype:?} is not supported, expected F32 or F64"))
}

/// The elements of a contiguous CPU tensor.
fn view<'a, T: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a tensor that should be contiguous is not");
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

fn on_cpu<'a>(storage: &'a Storage, name: &str) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("{name}: a tensor is not on the CPU, as the others are"),
    }
}

/// Calls `body` with the elements of contiguous CPU tensors.
pub(super) fn with_slices<T: Element, R>(
    name: &str,
    tensors: &[&Tensor],
    body: impl FnOnce(&[&[T]]) -> Result<R>,
) -> Result<R> {
    let storages: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let slices: Vec<&[T]> = storages
        .iter()
        .map(|(storage, layout)| view::<T>(on_cpu(storage, name)?, layout))
        .collect::<Result<_>>()?;
    body(&slices)
}

/// Runs one of two monomorphic versions by element type.
macro_rules! by_dtype {
    ($name:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::candle::ops::unsupported($name, other)),
        }
    };
}
use by_dtype;

/// The values as an array: there is one for each argument.
fn array<V, const N: usize>(values: &[V]) -> Result<&[V; N]> {
    values.try_into().map_err(Error::wrap)
}

/// A [`Kernel`] as a candle operation.
struct Op<K>(K);

impl<K> Op<K> {
    fn fwd<const N: usize>(&self, arguments: [(&CpuStorage, &Layout); N]) -> Result<(CpuStorage, Shape)>
    where
        K: Kernel<N>,
    {
        let shape = self.0.shape(arguments.map(|(_, layout)| layout.shape()))?;
        let dtype = arguments[0].0.dtype();
        by_dtype!(K::NAME, dtype, T => {
            let slices: Vec<&[T]> = arguments
                .iter()
                .map(|(storage, layout)| view(storage, layout))
                .collect::<Result<_>>()?;
            let mut out = vec![0.0; shape.elem_count()];
            self.0.forward::<T>(*array(&slices)?, &mut out)?;
            Ok((T::to_cpu_storage_owned(out), shape))
        })
    }

    fn bwd<const N: usize>(&self, arguments: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>
    where
        K: Kernel<N>,
    {
        let grad = grad.contiguous()?;
        #[cfg(feature = "candle-cuda")]
        if let candle_core::Device::Cuda(gpu) = grad.device() {
            return device::backward(&self.0, gpu, arguments, &grad);
        }
        by_dtype!(K::NAME, grad.dtype(), T => {
            let mut grads = arguments.map(|argument| argument.track_op().then(|| vec![0.0; argument.elem_count()]));
            let places = grads.each_mut().map(Option::as_deref_mut);
            let tensors = [&arguments[..], &[&grad]].concat();
            with_slices::<T, _>(K::NAME, &tensors, |slices| {
                self.0.backward(*array(&slices[..N])?, slices[N], places)
            })?;
            let mut out = [const { None }; N];
            for ((out, values), argument) in out.iter_mut().zip(grads).zip(arguments) {
                *out = values
                    .map(|values| Tensor::from_vec(values, argument.shape(), argument.device()))
                    .transpose()?;
            }
            Ok(out)
        })
    }
}

/// One of candle's traits, which differ in how many tensors they name.
macro_rules! custom_op {
    ($Trait:ident, $N:literal, $($storage:ident $layout:ident $tensor:ident),+ => $Grads:ty) => {
        impl<K: Kernel<$N>> $Trait for Op<K> {
            fn name(&self) -> &'static str {
                K::NAME
            }
            fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),+) -> Result<(CpuStorage, Shape)> {
                self.fwd([$(($storage, $layout)),+])
            }
            #[cfg(feature = "candle-cuda")]
            fn cuda_fwd(&self, $($storage: &CudaStorage, $layout: &Layout),+) -> Result<(CudaStorage, Shape)> {
                device::forward(&self.0, [$(($storage, $layout)),+])
            }
            fn bwd(&self, $($tensor: &Tensor,)+ _: &Tensor, grad: &Tensor) -> Result<$Grads> {
                let [$($tensor),+] = Op::bwd(self, [$($tensor),+], grad)?;
                Ok(($($tensor),+))
            }
        }
    };
}
custom_op!(CustomOp1, 1, s1 l1 a => Option<Tensor>);
custom_op!(CustomOp2, 2, s1 l1 a, s2 l2 b => (Option<Tensor>, Option<Tensor>));
custom_op!(CustomOp3, 3, s1 l1 a, s2 l2 b, s3 l3 c => (Option<Tensor>, Option<Tensor>, Option<Tensor>));

pub(super) fn apply1<K: Kernel<1>>(kernel: K, a: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op1(Op(kernel))
}

fn apply2<K: Kernel<2>>(kernel: K, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, Op(kernel))
}

pub(super) fn apply3<K: Kernel<3>>(kernel: K, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op3(&b.contiguous()?, &c.contiguous()?, Op(kernel))
}
