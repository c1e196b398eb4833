//! The operators under one signature, each with its reference in plain loops.

use crate::data::*;
use crate::reference;
use pace_kernels::cpu::{
    LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, PromptBias,
    PromptGrads, lora_mul_weight, lora_mul_weight_backward, low_rank_weight, low_rank_weight_backward,
    noisy_epilogue, noisy_epilogue_backward, shared_drop_path, shared_drop_path_backward,
};
use pace_kernels::{LinearShape, Real};

/// The result of an operator, then its gradients by name.
pub type Outputs<T> = Vec<(&'static str, Vec<T>)>;

pub fn dense<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let layer = NoisyLinear {
        shape: case.shape,
        noise: case.noise(&d.z),
        base: case.base(d),
        delta_weight: case.delta_weight.then_some(&d.dw),
        delta_bias: case.delta_bias.then_some(&d.db),
        fold: true,
    };
    let (mut y, mut dx) = (unwritten(d.dy.len()), unwritten(d.x.len()));
    let (mut dw, mut db) = (case.delta_weight.then(|| unwritten(d.dw.len())), unwritten(d.db.len()));
    layer.forward(&d.x, &mut y).unwrap();
    let grads: NoisyLinearGrads<&mut [_]> =
        NoisyLinearGrads { input: Some(&mut dx), delta_weight: dw.as_deref_mut(), delta_bias: Some(&mut db) };
    layer.backward(&d.x, &d.dy, grads).unwrap();
    [("y", y), ("dx", dx), ("dΔb", db)].into_iter().chain(dw.map(|dw| ("dΔW", dw))).collect()
}

fn dense_reference(case: &Case, d: &Data<f64>) -> Outputs<f64> {
    let z = case.z(&d.z);
    let layer = case.layer(d, &z, case.delta_weight.then_some(&d.dw));
    let grads = layer.backward(&d.x, &d.dy);
    let dw = case.delta_weight.then_some(("dΔW", grads.delta_weight));
    [("y", layer.forward(&d.x)), ("dx", grads.input), ("dΔb", grads.delta_bias)]
        .into_iter()
        .chain(dw)
        .collect()
}

fn low_rank<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let layer = LowRankLinear {
        shape: case.shape,
        noise: case.noise(&d.z),
        base: case.base(d),
        rank: case.rank,
        lora_b: &d.lora_b,
        lora_a: &d.lora_a,
        delta_bias: case.delta_bias.then_some(&d.db),
        scale: T::from_f64(case.scale),
    };
    let (mut y, mut dx) = (unwritten(d.dy.len()), unwritten(d.x.len()));
    let (mut dd, mut du, mut db) =
        (unwritten(d.lora_b.len()), unwritten(d.lora_a.len()), unwritten(d.db.len()));
    layer.forward(&d.x, &mut y).unwrap();
    let grads: LowRankGrads<&mut [_]> = LowRankGrads {
        input: Some(&mut dx),
        lora_b: Some(&mut dd),
        lora_a: Some(&mut du),
        delta_bias: Some(&mut db),
    };
    layer.backward(&d.x, &d.dy, grads).unwrap();
    vec![("y", y), ("dx", dx), ("dB", dd), ("dA", du), ("dδb", db)]
}

/// The same layer with ΔW written out.
fn low_rank_reference(case: &Case, d: &Data<f64>) -> Outputs<f64> {
    let (z, factors) = (case.z(&d.z), case.factors());
    let weight = factors.weight(&d.lora_b, &d.lora_a, None);
    let layer = case.layer(d, &z, Some(&weight));
    let grads = layer.backward(&d.x, &d.dy);
    let (dd, du) = factors.backward(&d.lora_b, &d.lora_a, None, &grads.delta_weight);
    vec![("y", layer.forward(&d.x)), ("dx", grads.input), ("dB", dd), ("dA", du), ("dδb", grads.delta_bias)]
}

fn epilogue<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let (mut y, mut da) = (d.y.clone(), unwritten(d.a.len()));
    noisy_epilogue(case.shape, case.noise(&d.z), &d.a, &mut y).unwrap();
    noisy_epilogue_backward(case.shape, case.noise(&d.z), &d.dy, &mut da).unwrap();
    vec![("y", y), ("da", da), ("dy", d.dy.clone())]
}

fn epilogue_reference(case: &Case, d: &Data<f64>) -> Outputs<f64> {
    let z = case.z(&d.z);
    let y = (0..z.len()).map(|i| d.y[i] + z[i] * d.a[i]).collect();
    let da = (0..z.len()).map(|i| z[i] * d.dy[i]).collect();
    vec![("y", y), ("da", da), ("dy", d.dy.clone())]
}

fn lora_factors<'a, T: Real>(case: &Case, d: &'a Data<T>) -> LoraFactors<&'a [T], T> {
    let LinearShape { in_features, out_features, .. } = case.shape;
    let scale = T::from_f64(case.scale);
    LoraFactors { out_features, in_features, rank: case.rank, lora_b: &d.lora_b, lora_a: &d.lora_a, scale }
}

fn lora_add<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let lora = lora_factors(case, d);
    let [mut w, mut dd, mut du] = [d.w0.len(), d.lora_b.len(), d.lora_a.len()].map(unwritten);
    low_rank_weight(lora, &mut w).unwrap();
    low_rank_weight_backward(lora, &d.dw, LoraGrads { lora_b: &mut dd, lora_a: &mut du }).unwrap();
    vec![("ΔW", w), ("dB", dd), ("dA", du)]
}

fn lora_mul<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let lora = lora_factors(case, d);
    let [mut w, mut dd, mut du] = [d.w0.len(), d.lora_b.len(), d.lora_a.len()].map(unwritten);
    lora_mul_weight(lora, &d.w0, &mut w).unwrap();
    lora_mul_weight_backward(lora, &d.w0, &d.dw, LoraGrads { lora_b: &mut dd, lora_a: &mut du }).unwrap();
    vec![("ΔW", w), ("dB", dd), ("dA", du)]
}

fn lora_reference(case: &Case, d: &Data<f64>, mask: Option<&[f64]>) -> Outputs<f64> {
    let factors = case.factors();
    let (dd, du) = factors.backward(&d.lora_b, &d.lora_a, mask, &d.dw);
    vec![("ΔW", factors.weight(&d.lora_b, &d.lora_a, mask)), ("dB", dd), ("dA", du)]
}

fn prompt<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let bias: PromptBias<&[_]> = PromptBias {
        out_features: case.shape.out_features,
        in_features: case.shape.in_features,
        rank: case.rank,
        base_weight: &d.w0,
        base_bias: case.base_bias.then_some(&d.b0),
        prompt_down: &d.prompt_down,
        prompt_up: &d.prompt_up,
        delta_bias: case.delta_bias.then_some(&d.db),
    };
    let [mut out, mut dpd, mut dpu, mut ddb] =
        [d.db.len(), d.prompt_down.len(), d.prompt_up.len(), d.db.len()].map(unwritten);
    bias.forward(&mut out).unwrap();
    let grads: PromptGrads<&mut [_]> =
        PromptGrads { prompt_down: &mut dpd, prompt_up: &mut dpu, delta_bias: Some(&mut ddb) };
    bias.backward(&d.g, grads).unwrap();
    vec![("Δb", out), ("dPd", dpd), ("dPu", dpu), ("dδb", ddb)]
}

fn prompt_reference(case: &Case, d: &Data<f64>) -> Outputs<f64> {
    let sizes = [case.shape.out_features, case.shape.in_features, case.rank];
    let biases = (case.base_bias && case.delta_bias).then_some((&d.b0[..], &d.db[..]));
    let (dpd, dpu) = reference::prompt_backward(sizes, &d.w0, &d.prompt_down, &d.prompt_up, &d.g);
    let ddb = d.g.iter().zip(&d.b0).map(|(g, b)| if case.base_bias { g * b } else { 0.0 }).collect();
    vec![
        ("Δb", reference::prompt_bias(sizes, &d.w0, &d.prompt_down, &d.prompt_up, biases)),
        ("dPd", dpd),
        ("dPu", dpu),
        ("dδb", ddb),
    ]
}

fn drop_path<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let features = case.shape.tokens * case.shape.out_features;
    let (mut y, mut dx) = (unwritten(d.y.len()), unwritten(d.y.len()));
    shared_drop_path(case.shape.branches, features, &d.mask, &d.y, &mut y).unwrap();
    shared_drop_path_backward(case.shape.branches, features, &d.mask, &d.dy, &mut dx).unwrap();
    vec![("y", y), ("dx", dx)]
}

fn drop_path_reference(case: &Case, d: &Data<f64>) -> Outputs<f64> {
    let features = case.shape.tokens * case.shape.out_features;
    let [y, dx] = [&d.y, &d.dy].map(|x| reference::drop_path(features, &d.mask, x));
    vec![("y", y), ("dx", dx)]
}

/// An operator in both types, its reference, the gradient that comes into it, and which input has which gradient.
pub struct Op {
    pub f64: fn(&Case, &Data<f64>) -> Outputs<f64>,
    pub f32: fn(&Case, &Data<f32>) -> Outputs<f32>,
    pub reference: fn(&Case, &Data<f64>) -> Outputs<f64>,
    pub incoming: fn(&Data<f64>) -> &[f64],
    pub gradients: &'static [(&'static str, Field)],
}

pub const DENSE: Op = Op {
    f64: dense,
    f32: dense,
    reference: dense_reference,
    incoming: |d| &d.dy,
    gradients: &[("dx", |d| &mut d.x), ("dΔW", |d| &mut d.dw), ("dΔb", |d| &mut d.db)],
};
pub const LOW_RANK: Op = Op {
    f64: low_rank,
    f32: low_rank,
    reference: low_rank_reference,
    incoming: |d| &d.dy,
    gradients: &[
        ("dx", |d| &mut d.x),
        ("dB", |d| &mut d.lora_b),
        ("dA", |d| &mut d.lora_a),
        ("dδb", |d| &mut d.db),
    ],
};
pub const EPILOGUE: Op = Op {
    f64: epilogue,
    f32: epilogue,
    reference: epilogue_reference,
    incoming: |d| &d.dy,
    gradients: &[("da", |d| &mut d.a), ("dy", |d| &mut d.y)],
};
pub const DROP_PATH: Op = Op {
    f64: drop_path,
    f32: drop_path,
    reference: drop_path_reference,
    incoming: |d| &d.dy,
    gradients: &[("dx", |d| &mut d.y)],
};
pub const WEIGHTS: [Op; 3] = [
    Op {
        f64: lora_add,
        f32: lora_add,
        reference: |case, d| lora_reference(case, d, None),
        incoming: |d| &d.dw,
        gradients: &[("dB", |d| &mut d.lora_b), ("dA", |d| &mut d.lora_a)],
    },
    Op {
        f64: lora_mul,
        f32: lora_mul,
        reference: |case, d| lora_reference(case, d, Some(&d.w0)),
        incoming: |d| &d.dw,
        gradients: &[("dB", |d| &mut d.lora_b), ("dA", |d| &mut d.lora_a)],
    },
    Op {
        f64: prompt,
        f32: prompt,
        reference: prompt_reference,
        incoming: |d| &d.g,
        gradients: &[("dPd", |d| &mut d.prompt_down), ("dPu", |d| &mut d.prompt_up), ("dδb", |d| &mut d.db)],
    },
];
