//! The operators as candle custom operations.
//!
//! A [`Kernel`] is an operator on slices with its backward pass; [`Op`] makes a candle operation of it. What the operators
//! do with CUDA tensors is in `ops/cuda.rs`.

#[cfg(feature = "candle-cuda")]
mod cuda;

use crate::cpu::{
    self, Base, LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads,
    PromptBias, PromptGrads,
};
use crate::noise::{Generator, Key, Noise, NoiseShape, drop_path_mask};
use crate::real::Real;
use crate::shape::LinearShape;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor,
    WithDType,
};
#[cfg(feature = "candle-cuda")]
use candle_core::{CudaStorage, backend::BackendDevice};
#[cfg(feature = "candle-cuda")]
pub(super) use cuda::OnDevice;
#[cfg(feature = "candle-cuda")]
use std::sync::OnceLock;

/// The element types of the operators, to candle, and the functions that the transformer needs of them.
pub(super) trait Element: Real + WithDType {
    fn from_f64(value: f64) -> Self {
        <Self as Real>::from_f64(value)
    }
    fn from_usize(value: usize) -> Self {
        <Self as Real>::from_f64(value as f64)
    }
    fn sqrt(self) -> Self;
    fn exp(self) -> Self;
    fn erf(self) -> Self;
}

impl Element for f32 {
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    /// Branch-free, so that loops over it become vector code; relative error 2e-7. Saturates at e^±87.
    #[inline(always)]
    fn exp(self) -> Self {
        // eˣ = 2ⁿ·2ᶠ with |f| ≤ ½; 1.5·2²³ as a summand rounds to an integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self < -87.0 { -87.0 } else { self };
        let x = if x > 87.0 { 87.0 } else { x };
        let t = x * std::f32::consts::LOG2_E;
        let shifted = t + ROUND;
        let n = shifted - ROUND;
        // ln 2 in two parts, so that the remainder is exact enough.
        let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
        let tail = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
        let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * tail))));
        let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
        p * f32::from_bits(power)
    }

    /// The rational approximation of Eigen and XLA (odd polynomial over even), error 3e-7; saturates at ±4.
    #[inline(always)]
    fn erf(self) -> Self {
        const P: [f32; 7] = [
            -1.609_603_3e-2,
            -2.954_6e-3,
            -7.349_906_3e-4,
            -5.692_506_4e-5,
            -2.101_024e-6,
            2.770_681_4e-8,
            -2.726_142_3e-10,
        ];
        const Q: [f32; 5] = [-1.426_473_9e-2, -7.373_329e-3, -1.682_827e-3, -2.133_740_6e-4, -1.456_607_2e-5];
        let x = if self > 4.0 { 4.0 } else { self };
        let x = if x < -4.0 { -4.0 } else { x };
        let t = x * x;
        let horner = |c: &[f32]| c.iter().rev().fold(0.0, |sum, &c| sum * t + c);
        x * horner(&P) / horner(&Q)
    }
}

impl Element for f64 {
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn erf(self) -> Self {
        libm::erf(self)
    }
}

/// Without the feature `candle-cuda` an operator has nothing to do with devices.
#[cfg(not(feature = "candle-cuda"))]
pub(super) trait OnDevice {}

#[cfg(not(feature = "candle-cuda"))]
impl<K> OnDevice for K {}

/// An operator on one to three tensors: a forward pass on slices, and the gradients of its arguments.
pub(super) trait Kernel: OnDevice + Send + Sync + 'static {
    const NAME: &'static str;

    /// The shape of the result, from the arguments' shapes.
    fn shape(&self, arguments: &[&Shape]) -> Result<Shape>;

    /// Computes the result; `out` has as many elements as [`shape`](Self::shape) says.
    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()>;

    /// Computes the gradients of the arguments that have a place for it, from that of the result.
    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], out: Grads<'_, T>) -> Result<()>;
}

/// A place for the gradient of each argument that needs one.
pub(super) type Grads<'a, T> = Vec<Option<&'a mut [T]>>;

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
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(unsupported($name, other)),
        }
    };
}

/// A [`Kernel`] as a candle operation.
struct Op<K>(K);

impl<K: Kernel> Op<K> {
    fn fwd(&self, arguments: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let shapes: Vec<&Shape> = arguments.iter().map(|(_, layout)| layout.shape()).collect();
        let shape = self.0.shape(&shapes)?;
        let dtype = arguments[0].0.dtype();
        by_dtype!(K::NAME, dtype, T => {
            let slices: Vec<&[T]> = arguments
                .iter()
                .map(|(storage, layout)| view(storage, layout))
                .collect::<Result<_>>()?;
            let mut out = vec![0.0; shape.elem_count()];
            self.0.forward::<T>(&slices, &mut out)?;
            Ok((T::to_cpu_storage_owned(out), shape))
        })
    }

    fn bwd<const N: usize>(&self, arguments: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "candle-cuda")]
        if let candle_core::Device::Cuda(device) = grad.device() {
            return cuda::backward(&self.0, device, arguments, &grad);
        }
        by_dtype!(K::NAME, grad.dtype(), T => {
            let mut grads = arguments.map(|argument| argument.track_op().then(|| vec![0.0; argument.elem_count()]));
            let places: Grads<'_, T> = grads.iter_mut().map(Option::as_deref_mut).collect();
            let mut tensors = arguments.to_vec();
            tensors.push(&grad);
            with_slices::<T, _>(K::NAME, &tensors, |slices| {
                self.0.backward(&slices[..N], slices[N], places)
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

impl<K: Kernel> CustomOp1 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s, l)])
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::forward(&self.0, &[(s, l)])
    }
    fn bwd(&self, a: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [a] = Op::bwd(self, [a], grad)?;
        Ok(a)
    }
}

impl<K: Kernel> CustomOp2 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2)])
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::forward(&self.0, &[(s1, l1), (s2, l2)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = Op::bwd(self, [a, b], grad)?;
        Ok((a, b))
    }
}

impl<K: Kernel> CustomOp3 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::forward(&self.0, &[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = Op::bwd(self, [a, b, c], grad)?;
        Ok((a, b, c))
    }
}

pub(super) fn apply1<K: Kernel>(kernel: K, a: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op1(Op(kernel))
}

fn apply2<K: Kernel>(kernel: K, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, Op(kernel))
}

pub(super) fn apply3<K: Kernel>(kernel: K, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op3(&b.contiguous()?, &c.contiguous()?, Op(kernel))
}

/// Where one layer's `z` comes from.
#[derive(Debug, Clone)]
pub(super) enum LayerNoise {
    Off,
    Generated(Generator),
    /// Contiguous; `[R, N]` or `[R, T, N]`.
    Given(Tensor, NoiseShape),
}

impl LayerNoise {
    fn with<T: Element, R>(&self, body: impl FnOnce(Noise<&'_ [T]>) -> Result<R>) -> Result<R> {
        match self {
            Self::Off => body(Noise::Off),
            Self::Generated(generator) => body(Noise::Generated(*generator)),
            Self::Given(z, shape) => {
                with_slices("z", &[z], |slices| body(Noise::Given { z: slices[0], shape: *shape }))
            }
        }
    }
}

/// The frozen layer of an operation: contiguous tensors that take no gradient.
#[derive(Debug, Clone)]
pub(super) struct FrozenLinear {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl FrozenLinear {
    fn with<T: Element, R>(&self, body: impl FnOnce(Base<'_, T>) -> Result<R>) -> Result<R> {
        let tensors: Vec<&Tensor> = std::iter::once(&self.weight).chain(&self.bias).collect();
        with_slices("base", &tensors, |slices| body(Base { weight: slices[0], bias: slices.get(1).copied() }))
    }
}

/// A noisy linear layer's fixed part, shared by the operations below.
pub(super) struct Layer {
    pub(super) shape: LinearShape,
    pub(super) noise: LayerNoise,
    pub(super) base: Option<FrozenLinear>,
}

impl Layer {
    fn with<T: Element, R>(
        &self,
        body: impl FnOnce(Noise<&'_ [T]>, Option<Base<'_, T>>) -> Result<R>,
    ) -> Result<R> {
        self.noise.with(|noise| match &self.base {
            Some(base) => base.with(|base| body(noise, Some(base))),
            None => body(noise, None),
        })
    }

    /// The input's shape with the features, and if the branches part here the rows, replaced.
    fn out_shape(&self, x: &Shape) -> Result<Shape> {
        let mut dims = x.dims().to_vec();
        let (Some(last), true) = (dims.len().checked_sub(1), dims.len() >= 2) else {
            candle_core::bail!("a linear layer needs [rows, …, features], got {x:?}");
        };
        dims[0] = self.shape.samples();
        dims[last] = self.shape.out_features;
        Ok(Shape::from(dims))
    }
}

/// `(x, ΔW, Δb)`, see [`NoisyLinear`]; `(x, Δb)` where there is no ΔW.
pub(super) struct DenseKernel(pub(super) Layer);

impl Kernel for DenseKernel {
    const NAME: &'static str = "noisy_linear";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        self.0.out_shape(arguments[0])
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        let (delta_weight, delta_bias) = (delta_weight.copied(), delta_bias.copied());
        self.0.with(|noise, base| {
            let layer = NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias };
            wrap(layer.forward(arguments[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], out: Grads<'_, T>) -> Result<()> {
        let (delta_weight, delta_bias) = dense_arguments(arguments);
        let (delta_weight, delta_bias) = (delta_weight.copied(), delta_bias.copied());
        let mut out = out.into_iter();
        let mut next = || out.next().flatten();
        let input = next();
        let grads = NoisyLinearGrads {
            input,
            delta_weight: if delta_weight.is_some() { next() } else { None },
            delta_bias: next(),
        };
        self.0.with(|noise, base| {
            let layer = NoisyLinear { shape: self.0.shape, noise, base, delta_weight, delta_bias };
            wrap(layer.backward(arguments[0], grad, grads))
        })
    }
}

/// ΔW and Δb among the arguments of a [`DenseKernel`].
fn dense_arguments<A>(arguments: &[A]) -> (Option<&A>, Option<&A>) {
    match arguments {
        [_, weight, bias] => (Some(weight), Some(bias)),
        [_, bias] => (None, Some(bias)),
        _ => (None, None),
    }
}

/// `(x, [D, δb] [N·r + N], A)`, see [`LowRankLinear`]: candle's operations take three tensors at most.
pub(super) struct LowRankKernel {
    layer: Layer,
    rank: usize,
    scale: f64,
    /// `scale·x·Aᵀ` of the forward pass on a device; the CPU computes it again.
    #[cfg(feature = "candle-cuda")]
    s: OnceLock<CudaStorage>,
}

impl LowRankKernel {
    fn linear<'a, T: Element>(
        &self,
        noise: Noise<&'a [T]>,
        base: Option<Base<'a, T>>,
        joined: &'a [T],
        lora_a: &'a [T],
    ) -> LowRankLinear<'a, T> {
        let (lora_b, bias) = joined.split_at(self.b_len());
        LowRankLinear {
            shape: self.layer.shape,
            noise,
            base,
            rank: self.rank,
            lora_b,
            lora_a,
            delta_bias: Some(bias),
            scale: Element::from_f64(self.scale),
        }
    }

    /// Where `δb` begins behind `B`.
    fn b_len(&self) -> usize {
        self.layer.shape.out_features * self.rank
    }
}

impl Kernel for LowRankKernel {
    const NAME: &'static str = "low_rank_linear";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        self.layer.out_shape(arguments[0])
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1], arguments[2]);
            wrap(layer.forward(arguments[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let (lora_b, delta_bias) = out[1].take().map(|joined| joined.split_at_mut(self.b_len())).unzip();
        let grads = LowRankGrads { input: out[0].take(), lora_b, lora_a: out[2].take(), delta_bias };
        self.layer.with(|noise, base| {
            let layer = self.linear(noise, base, arguments[1], arguments[2]);
            wrap(layer.backward(arguments[0], grad, grads))
        })
    }
}

/// `(B, A)` to `W0 ⊙ (B·A)`, see [`cpu::lora_mul_weight`].
struct LoraMulKernel {
    base_weight: Tensor,
    sizes: [usize; 3],
    scale: f64,
}

impl LoraMulKernel {
    fn factors<'a, T: Element>(&self, arguments: &[&'a [T]]) -> LoraFactors<'a, T> {
        let [out_features, in_features, rank] = self.sizes;
        LoraFactors {
            out_features,
            in_features,
            rank,
            lora_b: arguments[0],
            lora_a: arguments[1],
            scale: Element::from_f64(self.scale),
        }
    }
}

impl Kernel for LoraMulKernel {
    const NAME: &'static str = "lora_mul_weight";

    fn shape(&self, _: &[&Shape]) -> Result<Shape> {
        Ok(Shape::from((self.sizes[0], self.sizes[1])))
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        with_slices(Self::NAME, &[&self.base_weight], |base| {
            wrap(cpu::lora_mul_weight(self.factors(arguments), base[0], out))
        })
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let factors = self.factors(arguments);
        let mut spare = [vec![], vec![]];
        let [lora_b, lora_a] = places(&mut out, &mut spare, [factors.lora_b.len(), factors.lora_a.len()]);
        with_slices(Self::NAME, &[&self.base_weight], |base| {
            wrap(cpu::lora_mul_weight_backward(factors, base[0], grad, LoraGrads { lora_b, lora_a }))
        })
    }
}

/// Where gradients go that an operator always computes: the place that was given, or a spare one.
fn places<'a, T: Element, const N: usize>(
    out: &'a mut Grads<'_, T>,
    spare: &'a mut [Vec<T>; N],
    lengths: [usize; N],
) -> [&'a mut [T]; N] {
    let mut out = out.iter_mut();
    let mut spare = spare.iter_mut();
    lengths.map(|length| match (out.next(), spare.next()) {
        (Some(Some(place)), _) => &mut place[..],
        (_, Some(spare)) => {
            spare.resize(length, T::zero());
            &mut spare[..]
        }
        _ => &mut [],
    })
}

/// `(Pd, Pu, δb)` to `W0·(Pd·Pu) + b0⊙δb`, see [`PromptBias`].
struct PromptKernel {
    base: FrozenLinear,
    sizes: [usize; 3],
}

impl PromptKernel {
    fn prompt<'a, T: Element>(&self, base: Base<'a, T>, arguments: &[&'a [T]]) -> PromptBias<'a, T> {
        let [out_features, in_features, rank] = self.sizes;
        PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: base.weight,
            base_bias: base.bias,
            prompt_down: arguments[0],
            prompt_up: arguments[1],
            delta_bias: Some(arguments[2]),
        }
    }
}

impl Kernel for PromptKernel {
    const NAME: &'static str = "prompt_bias";

    fn shape(&self, _: &[&Shape]) -> Result<Shape> {
        Ok(Shape::from(self.sizes[0]))
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        self.base.with(|base| wrap(self.prompt(base, arguments).forward(out)))
    }

    fn backward<T: Element>(&self, arguments: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let mut spare = [vec![], vec![], vec![]];
        let lengths = [arguments[0].len(), arguments[1].len(), arguments[2].len()];
        let [prompt_down, prompt_up, delta_bias] = places(&mut out, &mut spare, lengths);
        let grads = PromptGrads { prompt_down, prompt_up, delta_bias: Some(delta_bias) };
        self.base.with(|base| wrap(self.prompt(base, arguments).backward(grad, grads)))
    }
}

/// `(base, a)` to `base + z⊙a`, see [`cpu::noisy_epilogue`].
struct NoisyAddKernel {
    shape: LinearShape,
    noise: LayerNoise,
}

impl Kernel for NoisyAddKernel {
    const NAME: &'static str = "noisy_epilogue";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        if arguments[0] != arguments[1] {
            candle_core::bail!("shapes {:?} and {:?} differ", arguments[0], arguments[1]);
        }
        Ok(arguments[0].clone())
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        out.copy_from_slice(arguments[0]);
        self.noise.with(|noise| wrap(cpu::noisy_epilogue(self.shape, noise, arguments[1], out)))
    }

    fn backward<T: Element>(&self, _: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        if let Some(base) = &mut out[0] {
            base.copy_from_slice(grad);
        }
        match &mut out[1] {
            Some(a) => {
                self.noise.with(|noise| wrap(cpu::noisy_epilogue_backward(self.shape, noise, grad, a)))
            }
            None => Ok(()),
        }
    }
}

/// Shared DropPath, see [`cpu::shared_drop_path`]; both passes draw the same mask.
pub(super) struct DropPathKernel {
    pub(super) branches: usize,
    pub(super) batch: usize,
    pub(super) features: usize,
    pub(super) key: Key,
    pub(super) probability: f64,
    pub(super) first_sample: u64,
}

impl DropPathKernel {
    fn mask<T: Element>(&self) -> Result<Vec<T>> {
        let mut mask = vec![T::zero(); self.batch];
        wrap(drop_path_mask(self.key, self.probability, self.first_sample, &mut mask))?;
        Ok(mask)
    }
}

impl Kernel for DropPathKernel {
    const NAME: &'static str = "shared_drop_path";

    fn shape(&self, arguments: &[&Shape]) -> Result<Shape> {
        Ok(arguments[0].clone())
    }

    fn forward<T: Element>(&self, arguments: &[&[T]], out: &mut [T]) -> Result<()> {
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path(self.branches, self.features, &mask, arguments[0], out))
    }

    fn backward<T: Element>(&self, _: &[&[T]], grad: &[T], mut out: Grads<'_, T>) -> Result<()> {
        let Some(dx) = &mut out[0] else { return Ok(()) };
        let mask = self.mask::<T>()?;
        wrap(cpu::shared_drop_path_backward(self.branches, self.features, &mask, grad, dx))
    }
}

/// A scalar whose value and gradient were computed together beforehand.
struct Scalar {
    value: f64,
    gradient: Tensor,
}

impl CustomOp1 for Scalar {
    fn name(&self) -> &'static str {
        "pace_loss"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(self.name(), s.dtype(), T => {
            let value: T = Element::from_f64(self.value);
            Ok((T::to_cpu_storage_owned(vec![value]), Shape::from(())))
        })
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::by_dtype!(self.name(), s.dtype(), T => {
            let value = <T as WithDType>::from_f64(self.value);
            Ok((s.device().storage_from_slice(&[value])?, Shape::from(())))
        })
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.broadcast_mul(grad)?))
    }
}

/// The scalar `value`, whose gradient to `x` is `gradient`.
pub(super) fn scalar(x: &Tensor, value: f64, gradient: Tensor) -> Result<Tensor> {
    x.apply_op1(Scalar { value, gradient })
}

/// `ΔW = W0 ⊙ (scale·B·A)`, differentiable in `B [N, r]` and `A [r, K]`.
pub(super) fn lora_mul_weight(
    base_weight: &Tensor,
    lora_b: &Tensor,
    lora_a: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let (out_features, rank) = lora_b.dims2()?;
    let sizes = [out_features, lora_a.dim(1)?, rank];
    apply2(LoraMulKernel { base_weight: base_weight.clone(), sizes, scale }, lora_b, lora_a)
}

/// `Δb = W0·(Pd·Pu) + b0⊙δb`, differentiable in `Pd [K, r]`, `Pu [r, 1]` and `δb [N]` (zero if absent).
pub(super) fn prompt_bias(
    base: &FrozenLinear,
    prompt_down: &Tensor,
    prompt_up: &Tensor,
    delta_bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (out_features, in_features) = base.weight.dims2()?;
    let sizes = [out_features, in_features, prompt_down.dim(1)?];
    let kernel = PromptKernel { base: base.clone(), sizes };
    match delta_bias {
        Some(delta_bias) => apply3(kernel, prompt_down, prompt_up, delta_bias),
        None => apply3(
            kernel,
            prompt_down,
            prompt_up,
            &Tensor::zeros(out_features, prompt_down.dtype(), prompt_down.device())?,
        ),
    }
}

/// The low-rank layer, differentiable in `x`, `B [N, r]`, `A [r, K]` and `δb [N]`.
pub(super) fn low_rank_linear(
    layer: Layer,
    x: &Tensor,
    lora_b: &Tensor,
    lora_a: &Tensor,
    delta_bias: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let joined = Tensor::cat(&[&lora_b.flatten_all()?, delta_bias], 0)?;
    let kernel = LowRankKernel {
        layer,
        rank: lora_a.dim(0)?,
        scale,
        #[cfg(feature = "candle-cuda")]
        s: OnceLock::new(),
    };
    apply3(kernel, x, &joined, lora_a)
}

/// `y = base + ΔW and Δb under noise`, differentiable in `x`, `ΔW` and `Δb`.
pub(super) fn noisy_linear(
    layer: Layer,
    x: &Tensor,
    delta_weight: Option<&Tensor>,
    delta_bias: &Tensor,
) -> Result<Tensor> {
    match delta_weight {
        Some(delta_weight) => apply3(DenseKernel(layer), x, delta_weight, delta_bias),
        None => apply2(DenseKernel(layer), x, delta_bias),
    }
}

/// `base + z⊙a` for layers that compute both terms themselves, differentiable in both; `[rows, …, features]`.
///
/// `generator` is the noise and `branches` says how many branches the rows hold; `None` is plain addition.
///
/// # Errors
/// If the shapes differ or do not fit the branches, or the tensors are on a device that has no such operator.
pub fn noisy_add(base: &Tensor, a: &Tensor, generator: Option<Generator>, branches: usize) -> Result<Tensor> {
    let dims = a.dims();
    let Some(rows) = dims.first().filter(|&&rows| branches > 0 && rows % branches == 0 && dims.len() >= 2)
    else {
        candle_core::bail!("`a` needs [rows, …, features] with rows divisible by {branches}, got {dims:?}");
    };
    let features = dims[dims.len() - 1];
    let shape = LinearShape {
        branches,
        batch: rows / branches,
        tokens: dims[1..dims.len() - 1].iter().product(),
        in_features: features,
        out_features: features,
        shared_input: false,
    };
    let noise = generator.map_or(LayerNoise::Off, LayerNoise::Generated);
    apply2(NoisyAddKernel { shape, noise }, base, a)
}
