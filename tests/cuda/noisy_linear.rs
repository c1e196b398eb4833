//! The dense noisy linear layer against the CPU operator in f64.

use crate::machine::{Machine, Target};
use crate::support::{SOURCES, Type, Z, assert_close, distance, rounded, wide};
use half::{bf16, f16};
use pace_kernels::cuda::{self, Base, Buffer, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::{LinearShape, cpu};

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    z: Z,
    base: bool,
    delta: bool,
    biases: bool,
    fold: bool,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

fn cases() -> Vec<Case> {
    let shape = |branches, batch, tokens, in_features, out_features, shared_input| LinearShape {
        branches,
        batch,
        tokens,
        in_features,
        out_features,
        shared_input,
    };
    let mut cases = Vec::new();
    // Every source of noise and every absent part, over sizes around vectors, fragments and tiles.
    let sizes = [
        shape(1, 1, 1, 1, 1, false),
        shape(2, 2, 3, 5, 7, false),
        shape(2, 3, 1, 33, 100, true),
        shape(1, 2, 33, 40, 24, false),
        shape(2, 1, 70, 16, 136, true),
        shape(1, 1, 129, 64, 8, false),
    ];
    for (i, &shape) in sizes.iter().enumerate() {
        for (j, &z) in SOURCES.iter().enumerate() {
            let (base, delta) = [(true, true), (true, false), (false, true)][(i + j) % 3];
            cases.push(Case { shape, z, base, delta, biases: (i + j) % 2 == 0, fold: false, shift: j % 2 });
        }
    }
    // One of each kind at the edges of tiles, with partial sums where the rows are many.
    for (shape, z, fold) in [
        (shape(2, 1, 127, 31, 127, false), Z::Generated(PerSample), true),
        (shape(1, 2, 128, 32, 128, false), Z::Given(PerSample), true),
        (shape(1, 1, 197, 24, 129, false), Z::Keyed(PerSample), true),
        (shape(1, 3, 130, 65, 130, false), Z::Off, true),
        (shape(2, 130, 1, 48, 16, false), Z::Generated(PerSample), false),
        (shape(2, 2, 197, 16, 8, true), Z::Generated(PerSample), false),
        (shape(1, 1, 600, 8, 16, false), Z::Generated(PerToken), false),
    ] {
        for shift in [0, 1] {
            cases.push(Case { shape, z, base: true, delta: true, biases: true, fold, shift });
        }
    }
    cases
}

/// Operands of one case.
struct Data<T> {
    x: Vec<T>,
    dy: Vec<T>,
    weight: Vec<T>,
    delta_weight: Vec<T>,
    bias: Vec<T>,
    delta_bias: Vec<T>,
}

impl<T: Type> Data<T> {
    fn new(shape: &LinearShape) -> Self {
        let (k, n) = (shape.in_features, shape.out_features);
        Self {
            x: rounded(11, shape.in_rows() * k),
            dy: rounded(12, shape.out_rows() * n),
            weight: rounded(13, n * k),
            delta_weight: rounded(14, n * k),
            bias: rounded(15, n),
            delta_bias: rounded(16, n),
        }
    }

    fn layer(
        &self,
        case: &Case,
        machine: &mut Machine<'_>,
        allow_tf32: bool,
    ) -> cuda::NoisyLinear<Buffer, Source> {
        let Case { shape, z, base, delta, biases, fold, .. } = *case;
        let noise = z.source(&shape, machine);
        cuda::NoisyLinear {
            shape,
            noise,
            base: base.then(|| Base {
                weight: machine.input("W0", &self.weight),
                bias: biases.then(|| machine.input("b0", &self.bias)),
            }),
            delta_weight: delta.then(|| machine.input("ΔW", &self.delta_weight)),
            delta_bias: biases.then(|| machine.input("Δb", &self.delta_bias)),
            fold,
            allow_tf32,
        }
    }
}

/// Outputs and gradients: y, dx, dΔW, dΔb.
type Results<T> = [Vec<T>; 4];

const NAMES: [&str; 4] = ["y", "dx", "dΔW", "dΔb"];

/// What the CPU operator gives.
fn exact<T: Type>(case: &Case, data: &Data<T>) -> Results<f64> {
    let Case { shape, base, delta, biases, .. } = *case;
    let [x, dy, weight, delta_weight, bias, delta_bias] =
        [&data.x, &data.dy, &data.weight, &data.delta_weight, &data.bias, &data.delta_bias]
            .map(|values| wide(values));
    let given: Vec<f64> = case.z.given(&shape).into_iter().map(f64::from).collect();
    let layer = cpu::NoisyLinear {
        shape,
        noise: case.z.cpu(&given),
        base: base.then_some(cpu::Base { weight: &weight, bias: biases.then_some(&bias) }),
        delta_weight: delta.then_some(&delta_weight),
        delta_bias: biases.then_some(&delta_bias),
    };
    let mut results =
        [vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; bias.len()]];
    let [y, dx, dw, db] = &mut results;
    layer.forward(&x, y).unwrap();
    let grads =
        cpu::NoisyLinearGrads { input: Some(dx), delta_weight: delta.then_some(dw), delta_bias: Some(db) };
    layer.backward(&x, &dy, grads).unwrap();
    results
}

/// The same with every tensor that the formula names rounded to `T`, as code that is not fused has it.
fn unfused<T: Type>(case: &Case, data: &Data<T>) -> Results<T> {
    let Case { shape, base, delta, biases, .. } = *case;
    let LinearShape { in_features: k, out_features: n, .. } = shape;
    let (m, rows) = (shape.out_rows(), shape.in_rows());
    let round = |value: f64| f64::from(T::round(value).widen());
    let z: Vec<f64> = case.z.written_out(&shape).into_iter().map(|z| round(z.into())).collect();
    let [x, dy, weight, delta_weight, bias, delta_bias] =
        [&data.x, &data.dy, &data.weight, &data.delta_weight, &data.bias, &data.delta_bias]
            .map(|values| wide(values));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        let x = &x[i % rows * k..][..k];
        for c in 0..n {
            let term = |on: bool, weight: &[f64], bias: &[f64]| {
                let product = if on { round(dot(x, &weight[c * k..][..k])) } else { 0.0 };
                if biases { round(product + bias[c]) } else { product }
            };
            let under = if base { term(true, &weight, &bias) } else { 0.0 };
            y[i * n + c] = under + round(z[i * n + c] * term(delta, &delta_weight, &delta_bias));
        }
    }
    let e: Vec<f64> = z.iter().zip(&dy).map(|(z, g)| round(z * g)).collect();
    let (mut dx, mut dw, mut db) = (vec![0.0; rows * k], vec![0.0; n * k], vec![0.0; n]);
    for i in 0..m {
        for j in 0..k {
            let column = |on: bool, g: &[f64], weight: &[f64]| {
                let product = (0..n).map(|c| g[i * n + c] * weight[c * k + j]).sum::<f64>();
                if on { round(product) } else { 0.0 }
            };
            dx[i % rows * k + j] += round(column(base, &dy, &weight) + column(delta, &e, &delta_weight));
        }
        for c in 0..n {
            db[c] += e[i * n + c];
            for j in 0..k {
                dw[c * k + j] += e[i * n + c] * x[i % rows * k + j];
            }
        }
    }
    [y, dx, dw, db].map(|values| values.into_iter().map(T::round).collect())
}

fn run<T: Type>(case: &Case, data: &Data<T>, allow_tf32: bool, machine: &mut Machine<'_>) -> Results<T> {
    let layer = data.layer(case, machine, allow_tf32);
    let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
    let y = machine.output::<T>("y", data.dy.len());
    let launch = layer.forward(T::DTYPE, x, y).unwrap();
    assert_eq!(launch.kernel.name.contains("folded"), case.fold, "{case:?}");
    machine.launch(&launch);
    let grads = cuda::NoisyLinearGrads {
        input: Some(machine.output::<T>("dx", data.x.len())),
        delta_weight: case.delta.then(|| machine.output::<T>("dΔW", data.weight.len())),
        delta_bias: Some(machine.output::<T>("dΔb", data.bias.len())),
    };
    let workspace = machine.output::<f32>("workspace", layer.workspace_len());
    machine.launch(&layer.backward(T::DTYPE, x, dy, grads, workspace).unwrap());
    let results = [Some(y), grads.input, grads.delta_weight, grads.delta_bias];
    results.map(|buffer| buffer.map_or(Vec::new(), |buffer| machine.read::<T>(buffer)))
}

fn typed<T: Type>(case: &Case, target: &Target<'_>) {
    let data = Data::<T>::new(&case.shape);
    let (exact, unfused) = (exact(case, &data), unfused(case, &data));
    let first = std::cell::OnceCell::new();
    target.run(case.shift, |machine| {
        let results = run(case, &data, false, machine);
        for (i, name) in NAMES.iter().enumerate().filter(|&(i, _)| case.delta || i != 2) {
            assert_close(&format!("{name} of {case:?}"), &results[i], &unfused[i], &exact[i]);
        }
        // The same bits in whatever order threads run.
        assert!(first.get_or_init(|| results.clone()) == &results, "{case:?} depends on the order");
    });
}

pub fn f32(target: &Target<'_>) {
    cases().iter().for_each(|case| typed::<f32>(case, target));
}

pub fn f16(target: &Target<'_>) {
    cases().iter().for_each(|case| typed::<f16>(case, target));
}

pub fn bf16(target: &Target<'_>) {
    cases().iter().for_each(|case| typed::<bf16>(case, target));
}

/// TF32 keeps 10 fraction bits of each operand.
pub fn tf32(target: &Target<'_>) {
    for case in cases().iter().filter(|case| case.shift == 0) {
        let data = Data::<f32>::new(&case.shape);
        let exact = exact(case, &data);
        target.run(0, |machine| {
            let results = run(case, &data, true, machine);
            for (i, name) in NAMES.iter().enumerate().filter(|&(i, _)| case.delta || i != 2) {
                let largest = exact[i].iter().fold(0f64, |largest, value| largest.max(value.abs()));
                let error = distance(&wide(&results[i]), &exact[i]);
                assert!(error <= 2e-3 * largest, "{name} of {case:?}: {error:e} of {largest:e}");
            }
        });
    }
}
