//! What the tests share: random tensors, adapted layers, a small transformer, and comparisons with the CPU.

use crate::on::{self, On};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::vit::{Vit, VitConfig};
use pace_kernels::candle::{Injector, PaceContext, PaceLinear, seeded_builder};
use pace_kernels::noise::NoiseShape;
use std::collections::BTreeMap;

pub const CPU: Device = Device::Cpu;

/// Standard normals, the same in every run.
pub fn random(name: &str, shape: &[usize]) -> Tensor {
    let init = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
    seeded_builder(&VarMap::new(), 5, DType::F64, &CPU).get_with_hints(shape, name, init).unwrap().detach()
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    on::values(tensor).unwrap()
}

impl On {
    pub fn random(&self, name: &str, shape: &[usize]) -> Tensor {
        self.place(&random(name, shape)).unwrap()
    }

    pub fn builder(&self, vars: &VarMap, seed: u64) -> VarBuilder<'static> {
        seeded_builder(vars, seed, self.dtype, &self.device)
    }
}

pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// An adapted layer whose factors are all random, not zero as at the start.
pub fn layer(
    on: &On,
    adapter: Adapter,
    sigma: f64,
    shape: NoiseShape,
    context: &PaceContext,
    vars: &VarMap,
) -> PaceLinear {
    let (out, inp, rank) = (6, 4, 2);
    for parameter in adapter.parameters(out, inp, rank).unwrap() {
        let dims: Vec<usize> = std::iter::once(parameter.rows).chain(parameter.columns).collect();
        let var = Var::from_tensor(&on.random(parameter.name, &dims)).unwrap();
        vars.data().lock().unwrap().insert(format!("layer.{}", parameter.name), var);
    }
    let vb = VarBuilder::from_varmap(vars, on.dtype, &on.device);
    let base = Linear::new(on.random("weight", &[out, inp]), Some(on.random("bias", &[out])));
    Injector::new(context, adapter, rank, &[sigma], vb)
        .with_noise_shape(shape)
        .with_scale(1.5)
        .wrap("layer", 0, base)
        .unwrap()
}

pub const CONFIG: VitConfig = VitConfig {
    image_size: 8,
    patch_size: 4,
    channels: 3,
    classes: 5,
    embed_dim: 12,
    depth: 2,
    heads: 3,
    mlp_dim: 24,
    layer_norm_eps: 1e-6,
    drop_path: 0.3,
};

/// A transformer with adapters that have left the identity.
pub fn vit(on: &On, context: &PaceContext, config: &VitConfig, sigmas: &[f64]) -> (Vit, VarMap) {
    let (frozen, vars) = (VarMap::new(), VarMap::new());
    let mut injector = Injector::new(context, Adapter::LoraMulVptAdd, 2, sigmas, on.builder(&vars, 1));
    let model = Vit::with_adapters(config, on.builder(&frozen, 2), &mut injector).unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        var.set(&(on.random(name, var.dims()) * 0.3).unwrap()).unwrap();
    }
    (model, vars)
}

/// Compares what `run` gives in a place with what it gives on the CPU in double precision.
pub fn compare(on: &On, run: impl Fn(&On) -> Result<Vec<Vec<f64>>>) -> Result<()> {
    let (got, expected) = (run(on)?, run(&On::CPU)?);
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(1.0f64, |max, v| max.max(v.abs()));
        for (got, expected) in got.iter().zip(expected) {
            let error = (got - expected).abs() / largest;
            assert!(error < on.tolerance(1e-12, 1e-4), "result {i}: {got}, expected {expected}");
        }
    }
    Ok(())
}

/// The gradients of all variables, by name.
pub fn gradients(vars: &VarMap, grads: &GradStore) -> Vec<Vec<f64>> {
    let vars: BTreeMap<_, _> = vars.data().lock().unwrap().clone().into_iter().collect();
    vars.iter().map(|(name, var)| values(grads.get(var).expect(name))).collect()
}
