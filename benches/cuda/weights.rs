//! Weight builders and their gradients, rank 16, and merging, in bf16.

use crate::gpu::{Gpu, Value};
use crate::{Case, Fallible, Launch, Set};
use half::bf16;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{Element, LoraFactors, LoraGrads, PromptBias, PromptGrads};

const RANK: usize = 16;

type T = bf16;

pub fn cases() -> Vec<Case> {
    [(768, 768), (768, 3072)]
        .into_iter()
        .flat_map(|(k, n)| {
            let factors = RANK * (n + k);
            let case = |operator, elements, set| Case {
                operator,
                family: "–",
                dtype: T::NAME,
                shape: format!("{k}->{n}"),
                bytes: size_of::<T>() * elements,
                flop: 0,
                against_product: false,
                set,
            };
            [
                case("low_rank_weight", n * k + factors, lora(k, n, false)),
                case("low_rank_weight backward", n * k + 2 * factors, lora_backward(k, n, false)),
                case("lora_mul_weight", 2 * n * k + factors, lora(k, n, true)),
                case("lora_mul_weight backward", 2 * n * k + 2 * factors, lora_backward(k, n, true)),
                case("prompt_bias", n * k + RANK * (k + 1) + 3 * n, prompt(k, n)),
                case("prompt_bias backward", n * k + 2 * RANK * (k + 1) + 3 * n, prompt_backward(k, n)),
                case("merge", 3 * n * k, merge(k, n)),
            ]
        })
        .collect()
}

/// `B`, `A`, and `W0` for LoRA mul.
struct Lora {
    out_features: usize,
    in_features: usize,
    lora_b: CudaSlice<T>,
    lora_a: CudaSlice<T>,
    weight: Option<CudaSlice<T>>,
}

impl Lora {
    fn new(gpu: &Gpu, k: usize, n: usize, mul: bool) -> Fallible<Self> {
        Ok(Self {
            out_features: n,
            in_features: k,
            lora_b: gpu.values(n * RANK)?,
            lora_a: gpu.values(RANK * k)?,
            weight: mul.then(|| gpu.values(n * k)).transpose()?,
        })
    }

    fn factors(&self) -> LoraFactors<&dyn DevicePtr<T>> {
        let &Self { out_features, in_features, ref lora_b, ref lora_a, .. } = self;
        LoraFactors { out_features, in_features, rank: RANK, lora_b, lora_a, scale: 1.0 }
    }
}

fn lora(k: usize, n: usize, mul: bool) -> Set {
    Box::new(move |gpu| {
        let (lora, mut out) = (Lora::new(gpu, k, n, mul)?, gpu.zeros::<T>(n * k)?);
        let launch: Launch = Box::new(move |gpu: &Gpu| {
            let (device, stream) = (&gpu.device, &gpu.stream);
            Ok(match &lora.weight {
                Some(weight) => device.lora_mul_weight(lora.factors(), weight, &mut out, stream),
                None => device.low_rank_weight(lora.factors(), &mut out, stream),
            }?)
        });
        Ok(launch)
    })
}

fn lora_backward(k: usize, n: usize, mul: bool) -> Set {
    Box::new(move |gpu| {
        let (lora, dw) = (Lora::new(gpu, k, n, mul)?, gpu.values::<T>(n * k)?);
        let (mut dd, mut du) = (gpu.zeros::<T>(n * RANK)?, gpu.zeros::<T>(RANK * k)?);
        let mut workspace = gpu.zeros::<f32>(lora.factors().workspace_len(T::DTYPE))?;
        let launch: Launch = Box::new(move |gpu: &Gpu| {
            let (device, stream, workspace) = (&gpu.device, &gpu.stream, &mut workspace);
            let grads = LoraGrads { lora_b: &mut dd as &mut dyn DevicePtrMut<T>, lora_a: &mut du };
            let factors = lora.factors();
            Ok(match &lora.weight {
                Some(weight) => {
                    device.lora_mul_weight_backward(factors, weight, &dw, grads, workspace, stream)
                }
                None => device.low_rank_weight_backward(factors, &dw, grads, workspace, stream),
            }?)
        });
        Ok(launch)
    })
}

/// What both passes of the prompt's bias read.
struct Prompt {
    out_features: usize,
    in_features: usize,
    weight: CudaSlice<T>,
    bias: CudaSlice<T>,
    lora_b: CudaSlice<T>,
    lora_a: CudaSlice<T>,
    delta_bias: CudaSlice<T>,
}

impl Prompt {
    fn new(gpu: &Gpu, k: usize, n: usize) -> Fallible<Self> {
        Ok(Self {
            out_features: n,
            in_features: k,
            weight: gpu.values(n * k)?,
            bias: gpu.values(n)?,
            lora_b: gpu.values(k * RANK)?,
            lora_a: gpu.values(RANK)?,
            delta_bias: gpu.values(n)?,
        })
    }

    fn adapter(&self) -> PromptBias<&dyn DevicePtr<T>> {
        PromptBias {
            out_features: self.out_features,
            in_features: self.in_features,
            rank: RANK,
            base_weight: &self.weight,
            base_bias: Some(&self.bias),
            prompt_down: &self.lora_b,
            prompt_up: &self.lora_a,
            delta_bias: Some(&self.delta_bias),
        }
    }
}

fn prompt(k: usize, n: usize) -> Set {
    Box::new(move |gpu| {
        let (prompt, mut out) = (Prompt::new(gpu, k, n)?, gpu.zeros::<T>(n)?);
        let launch: Launch = Box::new(move |gpu: &Gpu| {
            Ok(gpu.device.prompt_bias(&prompt.adapter(), &mut out, &gpu.stream)?)
        });
        Ok(launch)
    })
}

fn prompt_backward(k: usize, n: usize) -> Set {
    Box::new(move |gpu| {
        let (prompt, db) = (Prompt::new(gpu, k, n)?, gpu.values::<T>(n)?);
        let (mut dd, mut du) = (gpu.zeros::<T>(k * RANK)?, gpu.zeros::<T>(RANK)?);
        let mut ddb = gpu.zeros::<T>(n)?;
        let mut workspace = gpu.zeros::<f32>(prompt.adapter().workspace_len(T::DTYPE))?;
        let launch: Launch = Box::new(move |gpu: &Gpu| {
            let grads = PromptGrads {
                prompt_down: &mut dd as &mut dyn DevicePtrMut<T>,
                prompt_up: &mut du,
                delta_bias: Some(&mut ddb),
            };
            let (device, stream) = (&gpu.device, &gpu.stream);
            Ok(device.prompt_bias_backward(&prompt.adapter(), &db, grads, &mut workspace, stream)?)
        });
        Ok(launch)
    })
}

fn merge(k: usize, n: usize) -> Set {
    Box::new(move |gpu| {
        let (mut target, delta) = (gpu.values::<T>(n * k)?, gpu.values::<T>(n * k)?);
        let launch: Launch =
            Box::new(move |gpu: &Gpu| Ok(gpu.device.merge(&mut target, &delta, &gpu.stream)?));
        Ok(launch)
    })
}
