//! The operators on CUDA tensors: what [`Op`](super::Op) does there, by [`cuda::Device`](crate::cuda::Device).

use super::{
    DenseKernel, DropPathKernel, FrozenLinear, Kernel, Layer, LayerNoise, LoraMulKernel, LowRankKernel,
    NoisyAddKernel, PromptKernel, dense_arguments, wrap,
};
pub(super) use crate::candle::cuda::by_dtype;
use crate::candle::cuda::{Element, Gpu, view, with_views};
use crate::cuda::{
    Base, DType, LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, Mask, Noise, NoisyLinear,
    NoisyLinearGrads, PromptBias, PromptGrads,
};
use crate::shape::product;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};
use candle_core::cuda_backend::gemm_reduced_precision_f32;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Shape, Tensor};

/// The gradient of each argument, where there is one.
pub(in crate::candle) type Gradients<T> = Vec<Option<CudaSlice<T>>>;

/// What a [`Kernel`] does on a device.
pub(in crate::candle) trait OnDevice {
    /// Computes the result; `out` has as many elements as [`shape`](Kernel::shape) says.
    fn forward_cuda<T: Element>(
        &self,
        _gpu: &Gpu,
        _arguments: &[CudaView<'_, T>],
        _out: &mut CudaSlice<T>,
    ) -> Result<()> {
        candle_core::bail!("this operator has no kernel for CUDA tensors")
    }

    /// Computes, from that of the result, the gradients of the arguments that `wanted` asks for, and perhaps others.
    fn backward_cuda<T: Element>(
        &self,
        _gpu: &Gpu,
        _arguments: &[CudaView<'_, T>],
        _grad: &CudaView<'_, T>,
        _wanted: &[bool],
    ) -> Result<Gradients<T>> {
        candle_core::bail!("this operator has no kernel for CUDA tensors")
    }
}

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

/// A place for the gradient of each argument that needs one.
fn places<T: Element>(gpu: &Gpu, arguments: &[CudaView<'_, T>], wanted: &[bool]) -> Result<Gradients<T>> {
    let place = |(argument, &wanted): (&CudaView<'_, T>, _)| {
        if wanted { gpu.alloc(argument.len()).map(Some) } else { Ok(None) }
    };
    arguments.iter().zip(wanted).map(place).collect()
}

fn input<'a, T: Element>(view: &'a CudaView<'_, T>) -> &'a dyn DevicePtr<T> {
    view
}

fn output<T: Element>(place: &mut Option<CudaSlice<T>>) -> Option<&mut dyn DevicePtrMut<T>> {
    place.as_mut().map(|place| place as _)
}

impl LayerNoise {
    fn on_device<R>(&self, body: impl FnOnce(Noise<'_>) -> Result<R>) -> Result<R> {
        match self {
            Self::Off => body(Noise::Off),
            Self::Generated(generator) => body(Noise::Generated(*generator)),
            Self::Given(z, shape) => {
                // The kernels take z in f32 only.
                let z = z.to_dtype(candle_core::DType::F32)?;
                with_views("z", &[&z], |views| body(Noise::Given { z: &views[0], shape: *shape }))
            }
        }
    }
}

impl FrozenLinear {
    fn on_device<T: Element, R>(&self, body: impl FnOnce(Base<&dyn DevicePtr<T>>) -> Result<R>) -> Result<R> {
        let tensors: Vec<&Tensor> = std::iter::once(&self.weight).chain(&self.bias).collect();
        with_views("base", &tensors, |views| {
            body(Base { weight: input(&views[0]), bias: views.get(1).map(input) })
        })
    }
}

impl Layer {
    fn on_device<T: Element, R>(
        &self,
        body: impl FnOnce(Noise<'_>, Option<Base<&dyn DevicePtr<T>>>) -> Result<R>,
    ) -> Result<R> {
        self.noise.on_device(|noise| match &self.base {
            Some(base) => base.on_device(|base| body(noise, Some(base))),
            None => body(noise, None),
        })
    }
}

impl DenseKernel {
    fn on_device<'a, T: Element>(
        &self,
        noise: Noise<'a>,
        base: Option<Base<&'a dyn DevicePtr<T>>>,
        arguments: &'a [CudaView<'_, T>],
    ) -> NoisyLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        NoisyLinear {
            shape: self.0.shape,
            noise,
            base,
            delta_weight: delta_weight.map(input),
            delta_bias: delta_bias.map(input),
            // A folded weight is rounded to the tensors' type: in 16 bits it would lose an adapter that is small against W0.
            fold: T::DTYPE == DType::F32,
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }
}

impl OnDevice for DenseKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, arguments);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            wrap(gpu.operators.noisy_linear(&layer, &arguments[0], out, &mut workspace, &gpu.stream))
        })
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        wanted: &[bool],
    ) -> Result<Gradients<T>> {
        let mut out = places(gpu, arguments, wanted)?;
        self.0.on_device(|noise, base| {
            let layer = self.on_device(noise, base, arguments);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let mut places = out.iter_mut().map(output);
            let mut next = || places.next().flatten();
            let grads = NoisyLinearGrads {
                input: next(),
                delta_weight: if layer.delta_weight.is_some() { next() } else { None },
                delta_bias: next(),
            };
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.noisy_linear_backward(&layer, x, grad, grads, &mut workspace, stream))
        })?;
        Ok(out)
    }
}

impl LowRankKernel {
    fn on_device<'a, T: Element>(
        &self,
        noise: Noise<'a>,
        base: Option<Base<&'a dyn DevicePtr<T>>>,
        joined: &'a (CudaView<'_, T>, CudaView<'_, T>),
        lora_a: &'a CudaView<'_, T>,
    ) -> LowRankLinear<&'a dyn DevicePtr<T>, Noise<'a>> {
        LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b: &joined.0,
            lora_a,
            delta_bias: Some(&joined.1),
            scale: self.scale as f32,
            allow_tf32: gemm_reduced_precision_f32(),
        }
    }

    fn too_short() -> Error {
        Error::Msg("low_rank_linear: there is no δb behind B".into())
    }
}

impl OnDevice for LowRankKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let joined = arguments[1].try_split_at(self.b_len()).ok_or_else(Self::too_short)?;
        let mut s = gpu.alloc(wrap(product("s", "[M, r]", &[self.layer.shape.in_rows(), self.rank]))?)?;
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &joined, &arguments[2]);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.low_rank_linear(&layer, x, &mut s, out, &mut workspace, stream))
        })?;
        // An operation runs forward once.
        self.s.get_or_init(|| CudaStorage::wrap_cuda_slice(s, gpu.candle.clone()));
        Ok(())
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        wanted: &[bool],
    ) -> Result<Gradients<T>> {
        let joined = arguments[1].try_split_at(self.b_len()).ok_or_else(Self::too_short)?;
        let s = self.s.get().ok_or_else(|| Error::Msg("low_rank_linear: backward before forward".into()))?;
        let s = s.as_cuda_slice::<T>()?;
        let mut out = places(gpu, arguments, wanted)?;
        let [input, joined_grad, lora_a] = &mut out[..] else {
            candle_core::bail!("low_rank_linear takes three arguments");
        };
        let mut halves = match joined_grad {
            Some(place) => Some(place.try_split_at_mut(self.b_len()).ok_or_else(Self::too_short)?),
            None => None,
        };
        self.layer.on_device(|noise, base| {
            let layer = self.on_device(noise, base, &joined, &arguments[2]);
            let mut workspace = gpu.alloc(layer.workspace_len(gpu.operators.gpu(), T::DTYPE))?;
            let (lora_b, delta_bias) = match &mut halves {
                Some((lora_b, bias)) => (Some(lora_b as &mut dyn DevicePtrMut<T>), Some(bias as _)),
                None => (None, None),
            };
            let grads = LowRankGrads { input: output(input), lora_b, lora_a: output(lora_a), delta_bias };
            let (x, stream) = (&arguments[0], &gpu.stream);
            wrap(gpu.operators.low_rank_linear_backward(&layer, x, s, grad, grads, &mut workspace, stream))
        })?;
        Ok(out)
    }
}

impl LoraMulKernel {
    fn on_device<'a, T: Element>(
        &self,
        arguments: &'a [CudaView<'_, T>],
    ) -> LoraFactors<&'a dyn DevicePtr<T>> {
        let [out_features, in_features, rank] = self.sizes;
        let (lora_b, lora_a) = (input(&arguments[0]), input(&arguments[1]));
        LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale: self.scale as f32 }
    }
}

impl OnDevice for LoraMulKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        with_views(Self::NAME, &[&self.base_weight], |base| {
            wrap(gpu.operators.lora_mul_weight(self.on_device(arguments), &base[0], out, &gpu.stream))
        })
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        _: &[bool],
    ) -> Result<Gradients<T>> {
        let lora = self.on_device(arguments);
        let (mut lora_b, mut lora_a) = (gpu.alloc(arguments[0].len())?, gpu.alloc(arguments[1].len())?);
        let mut workspace = gpu.alloc(lora.workspace_len(T::DTYPE))?;
        with_views(Self::NAME, &[&self.base_weight], |base| {
            let grads = LoraGrads::<&mut dyn DevicePtrMut<T>> { lora_b: &mut lora_b, lora_a: &mut lora_a };
            let (base, stream) = (&base[0], &gpu.stream);
            wrap(gpu.operators.lora_mul_weight_backward(lora, base, grad, grads, &mut workspace, stream))
        })?;
        Ok(vec![Some(lora_b), Some(lora_a)])
    }
}

impl PromptKernel {
    fn on_device<'a, T: Element>(
        &self,
        base: Base<&'a dyn DevicePtr<T>>,
        arguments: &'a [CudaView<'_, T>],
    ) -> PromptBias<&'a dyn DevicePtr<T>> {
        let [out_features, in_features, rank] = self.sizes;
        PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: base.weight,
            base_bias: base.bias,
            prompt_down: &arguments[0],
            prompt_up: &arguments[1],
            delta_bias: Some(&arguments[2]),
        }
    }
}

impl OnDevice for PromptKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.base.on_device(|base| {
            let prompt = self.on_device(base, arguments);
            let mut workspace = gpu.alloc(prompt.workspace_len(T::DTYPE))?;
            wrap(gpu.operators.prompt_bias(&prompt, out, &mut workspace, &gpu.stream))
        })
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        _: &[bool],
    ) -> Result<Gradients<T>> {
        let place = |i: usize| gpu.alloc(arguments[i].len());
        let (mut prompt_down, mut prompt_up, mut delta_bias) = (place(0)?, place(1)?, place(2)?);
        self.base.on_device(|base| {
            let prompt = self.on_device(base, arguments);
            let mut workspace = gpu.alloc(prompt.workspace_len(T::DTYPE))?;
            let grads = PromptGrads::<&mut dyn DevicePtrMut<T>> {
                prompt_down: &mut prompt_down,
                prompt_up: &mut prompt_up,
                delta_bias: Some(&mut delta_bias),
            };
            wrap(gpu.operators.prompt_bias_backward(&prompt, grad, grads, &mut workspace, &gpu.stream))
        })?;
        Ok(vec![Some(prompt_down), Some(prompt_up), Some(delta_bias)])
    }
}

impl OnDevice for NoisyAddKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        gpu.candle.memcpy_dtod(&arguments[0], out)?;
        let (shape, a) = (self.shape, &arguments[1]);
        self.noise.on_device(|noise| wrap(gpu.operators.noisy_epilogue(shape, noise, a, out, &gpu.stream)))
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        wanted: &[bool],
    ) -> Result<Gradients<T>> {
        let mut out = places(gpu, arguments, wanted)?;
        let [base, a] = &mut out[..] else { candle_core::bail!("noisy_epilogue takes two arguments") };
        if let Some(base) = base {
            gpu.candle.memcpy_dtod(grad, base)?;
        }
        if let Some(a) = a {
            let (shape, stream) = (self.shape, &gpu.stream);
            self.noise.on_device(|noise| {
                wrap(gpu.operators.noisy_epilogue_backward(shape, noise, grad, a, stream))
            })?;
        }
        Ok(out)
    }
}

impl DropPathKernel {
    /// Bitwise the mask of the CPU.
    fn on_device(&self) -> Mask<'static> {
        let Self { key, probability: drop_probability, first_sample, .. } = *self;
        Mask::Generated { key, key_address: None, drop_probability, first_sample }
    }
}

impl OnDevice for DropPathKernel {
    fn forward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        arguments: &[CudaView<'_, T>],
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        let Self { branches, batch, features, .. } = *self;
        let (mask, x, stream) = (self.on_device(), &arguments[0], &gpu.stream);
        wrap(gpu.operators.shared_drop_path(branches, batch, features, mask, x, out, stream))
    }

    fn backward_cuda<T: Element>(
        &self,
        gpu: &Gpu,
        _: &[CudaView<'_, T>],
        grad: &CudaView<'_, T>,
        _: &[bool],
    ) -> Result<Gradients<T>> {
        let Self { branches, batch, features, .. } = *self;
        let (mask, stream) = (self.on_device(), &gpu.stream);
        let mut dx = gpu.alloc(grad.len())?;
        let operators = &gpu.operators;
        wrap(operators.shared_drop_path_backward(branches, batch, features, mask, grad, &mut dx, stream))?;
        Ok(vec![Some(dx)])
    }
}
