//! Trained variables: seeded initial values and the norm of their gradients.

use super::ops::wrap;
use crate::noise::{normals, philox4x32_10};
use crate::shape::product;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};

/// A [`VarBuilder`] over `vars` that starts missing variables from `seed`, the same on every machine.
///
/// candle's own generator on the CPU cannot be seeded. Values depend on the seed and the variable's name, not on
/// the order of creation. `Init::Kaiming` uses the gain of its non-linearity as candle does.
pub fn seeded_builder(vars: &VarMap, seed: u64, dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(SeededVars { vars: vars.clone(), seed }), dtype, device.clone())
}

struct SeededVars {
    vars: VarMap,
    seed: u64,
}

impl SeededVars {
    /// Philox words for one variable: its name takes the place of the key.
    fn words(&self, name: &str) -> impl Iterator<Item = [u32; 4]> {
        // FNV-1a; a well-mixed key is Philox's own business.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let key = [hash as u32, (hash >> 32) as u32];
        let seed = [self.seed as u32, (self.seed >> 32) as u32];
        (0u64..).map(move |i| philox4x32_10([i as u32, (i >> 32) as u32, seed[0], seed[1]], key))
    }

    fn start(&self, shape: &Shape, name: &str, init: Init) -> Result<Vec<f64>> {
        let uniforms = || self.words(name).flatten().map(|w| (f64::from(w) + 0.5) / 4_294_967_296.0);
        let gaussians = || self.words(name).flat_map(normals).map(f64::from);
        let count = wrap(product("variable", "the requested one", shape.dims()))?;
        let mut out = Vec::new();
        if out.try_reserve_exact(count).is_err() {
            candle_core::bail!("there is no memory for `{name}` {shape:?}");
        }
        match init {
            Init::Const(value) => out.resize(count, value),
            Init::Randn { mean, stdev } => out.extend(gaussians().map(|n| mean + stdev * n).take(count)),
            Init::Uniform { lo, up } => out.extend(uniforms().map(|u| lo + (up - lo) * u).take(count)),
            Init::Kaiming { dist, fan, non_linearity } => {
                let std = non_linearity.gain() / (fan.for_shape(shape).max(1) as f64).sqrt();
                match dist {
                    candle_nn::init::NormalOrUniform::Normal => {
                        out.extend(gaussians().map(|n| std * n).take(count));
                    }
                    candle_nn::init::NormalOrUniform::Uniform => {
                        let bound = 3f64.sqrt() * std;
                        out.extend(uniforms().map(|u| bound * (2.0 * u - 1.0)).take(count));
                    }
                }
            }
        }
        Ok(out)
    }
}

impl SimpleBackend for SeededVars {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.contains_tensor(name) {
            // Rounded on the CPU, so that all devices start from the same.
            let start = Tensor::from_vec(self.start(&shape, name, init)?, &shape, &Device::Cpu)?;
            let var = Var::from_tensor(&start.to_dtype(dtype)?.to_device(device)?)?;
            if let Ok(mut vars) = self.vars.data().lock() {
                vars.insert(name.to_owned(), var);
            }
        }
        // `VarMap` checks the shape of what was there before.
        self.vars.get(shape, name, init, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        SimpleBackend::get_unchecked(&self.vars, name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        SimpleBackend::contains_tensor(&self.vars, name)
    }
}

/// Euclidean norm of the gradients of `vars` together; variables without a gradient count as zero.
///
/// # Errors
/// If a gradient has an element type that the operators on its device do not have.
pub fn grad_norm<'a>(vars: impl IntoIterator<Item = &'a Var>, grads: &GradStore) -> Result<f64> {
    let mut sum = 0.0;
    #[cfg(feature = "candle-cuda")]
    let mut on_device = Vec::new();
    for grad in vars.into_iter().filter_map(|var| grads.get(var)) {
        #[cfg(feature = "candle-cuda")]
        if grad.device().is_cuda() {
            on_device.push(grad.clone());
            continue;
        }
        let norm = match grad.dtype() {
            DType::F32 => crate::cpu::grad_norm(&[&grad.flatten_all()?.to_vec1::<f32>()?]),
            _ => crate::cpu::grad_norm(&[&grad.flatten_all()?.to_vec1::<f64>()?]),
        };
        sum += norm * norm;
    }
    #[cfg(feature = "candle-cuda")]
    {
        sum += super::cuda::sum_of_squares(on_device)?;
    }
    Ok(sum.sqrt())
}
