//! Every CPU operator against plain loops, against finite differences, and against what its documentation promises.

#[path = "common/reference.rs"]
mod reference;

use pace_kernels::cpu::{
    Base, Consistency, LoraFactors, LoraGrads, Loss, LossValues, LowRankGrads, LowRankLinear, NoisyLinear,
    NoisyLinearGrads, PromptBias, PromptGrads, fp_distance, grad_norm, lora_mul_weight,
    lora_mul_weight_backward, low_rank_weight, low_rank_weight_backward, merge, noisy_epilogue,
    noisy_epilogue_backward, shared_drop_path, shared_drop_path_backward, unmerge,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape, philox4x32_10};
use pace_kernels::{LinearShape, Real};
use std::fmt::Debug;
use std::sync::LazyLock;

/// `len` numbers in `[-1, 1)` that are exact in `f32`.
fn uniform(seed: u32, len: usize) -> Vec<f64> {
    let word = |i: usize| philox4x32_10([i as u32, 0, 0, 0], [seed, 1])[0];
    (0..len).map(|i| f64::from(word(i) as i32 >> 8) / f64::from(1 << 23)).collect()
}

fn cast<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}

/// An output before an operator ran: every element has to be overwritten.
fn unwritten<T: Real>(len: usize) -> Vec<T> {
    vec![T::from_f64(f64::NAN); len]
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Off,
    Generated(NoiseShape),
    Given(NoiseShape),
}

const SOURCES: [Source; 5] = [
    Source::Off,
    Source::Generated(NoiseShape::PerSample),
    Source::Generated(NoiseShape::PerToken),
    Source::Given(NoiseShape::PerSample),
    Source::Given(NoiseShape::PerToken),
];

/// One configuration; each operator uses what concerns it.
#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    source: Source,
    rank: usize,
    scale: f64,
    base: bool,
    base_bias: bool,
    delta_weight: bool,
    delta_bias: bool,
}

/// Every tensor that any operator reads.
#[derive(Clone)]
struct Data<T> {
    x: Vec<T>,
    /// `[M, N]`: an adapter's output, what lies in `y` before, and the gradient that comes in.
    a: Vec<T>,
    y: Vec<T>,
    dy: Vec<T>,
    z: Vec<T>,
    w0: Vec<T>,
    b0: Vec<T>,
    dw: Vec<T>,
    db: Vec<T>,
    lora_b: Vec<T>,
    lora_a: Vec<T>,
    prompt_down: Vec<T>,
    prompt_up: Vec<T>,
    /// `[N]`, the gradient that comes into a bias.
    g: Vec<T>,
    mask: Vec<T>,
}

type Field = fn(&mut Data<f64>) -> &mut Vec<f64>;
const FIELDS: [(&str, Field); 15] = [
    ("x", |d| &mut d.x),
    ("a", |d| &mut d.a),
    ("y", |d| &mut d.y),
    ("dy", |d| &mut d.dy),
    ("z", |d| &mut d.z),
    ("w0", |d| &mut d.w0),
    ("b0", |d| &mut d.b0),
    ("dw", |d| &mut d.dw),
    ("db", |d| &mut d.db),
    ("lora_b", |d| &mut d.lora_b),
    ("lora_a", |d| &mut d.lora_a),
    ("prompt_down", |d| &mut d.prompt_down),
    ("prompt_up", |d| &mut d.prompt_up),
    ("g", |d| &mut d.g),
    ("mask", |d| &mut d.mask),
];

impl Data<f64> {
    fn new(case: &Case) -> Self {
        let LinearShape { in_features: k, out_features: n, batch, .. } = case.shape;
        let (m, r) = (case.shape.out_rows(), case.rank);
        let z_rows = match case.source {
            Source::Given(NoiseShape::PerSample) => case.shape.samples(),
            Source::Given(NoiseShape::PerToken) => m,
            Source::Off | Source::Generated(_) => 0,
        };
        let mut mask: Vec<f64> = uniform(14, batch).iter().map(|&u| f64::from(u > 0.0)).collect();
        mask[0] = 1.0;
        Self {
            x: uniform(0, case.shape.in_rows() * k),
            a: uniform(1, m * n),
            y: uniform(2, m * n),
            dy: uniform(3, m * n),
            z: uniform(4, z_rows * n),
            w0: uniform(5, n * k),
            b0: uniform(6, n),
            dw: uniform(7, n * k),
            db: uniform(8, n),
            lora_b: uniform(9, n * r),
            lora_a: uniform(10, r * k),
            prompt_down: uniform(11, k * r),
            prompt_up: uniform(12, r),
            g: uniform(13, n),
            mask,
        }
    }

    fn cast<T: Real>(&self) -> Data<T> {
        Data {
            x: cast(&self.x),
            a: cast(&self.a),
            y: cast(&self.y),
            dy: cast(&self.dy),
            z: cast(&self.z),
            w0: cast(&self.w0),
            b0: cast(&self.b0),
            dw: cast(&self.dw),
            db: cast(&self.db),
            lora_b: cast(&self.lora_b),
            lora_a: cast(&self.lora_a),
            prompt_down: cast(&self.prompt_down),
            prompt_up: cast(&self.prompt_up),
            g: cast(&self.g),
            mask: cast(&self.mask),
        }
    }
}

impl Case {
    fn generator(&self, shape: NoiseShape) -> Generator {
        Generator::new(Key::derive(7, 3, 2), 0.5, shape, (1 << 32) - 1).unwrap()
    }

    fn noise<'a, T>(&self, z: &'a [T]) -> Noise<&'a [T]> {
        match self.source {
            Source::Off => Noise::Off,
            Source::Generated(shape) => Noise::Generated(self.generator(shape)),
            Source::Given(shape) => Noise::Given { z, shape },
        }
    }

    fn base<'a, T>(&self, d: &'a Data<T>) -> Option<Base<'a, T>> {
        self.base.then_some(Base { weight: &d.w0, bias: self.base_bias.then_some(&d.b0) })
    }

    /// `z` written out for every output element.
    fn z(&self, z: &[f64]) -> Vec<f64> {
        let LinearShape { batch, tokens, out_features: n, .. } = self.shape;
        let mut out = vec![1.0; self.shape.out_rows() * n];
        for (row, out) in out.chunks_mut(n).enumerate() {
            let (sample, token) = (row / tokens, row % tokens);
            match self.source {
                Source::Off => {}
                Source::Generated(shape) => {
                    let (branch, sample) = (sample / batch, sample % batch);
                    self.generator(shape).fill(branch as u8, sample as u64, token as u32, 0, out);
                }
                Source::Given(NoiseShape::PerSample) => out.copy_from_slice(&z[sample * n..][..n]),
                Source::Given(NoiseShape::PerToken) => out.copy_from_slice(&z[row * n..][..n]),
            }
        }
        out
    }

    fn factors(&self) -> reference::Factors {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        reference::Factors { n, k, r: self.rank, scale: self.scale }
    }

    fn layer<'a>(
        &self,
        d: &'a Data<f64>,
        z: &'a [f64],
        delta_weight: Option<&'a [f64]>,
    ) -> reference::Layer<'a> {
        reference::Layer {
            shape: self.shape,
            z,
            base_weight: self.base.then_some(&d.w0),
            base_bias: (self.base && self.base_bias).then_some(&d.b0),
            delta_weight,
            delta_bias: self.delta_bias.then_some(&d.db),
        }
    }
}

/// The result of an operator, then its gradients by name.
type Outputs<T> = Vec<(&'static str, Vec<T>)>;

fn dense<T: Real>(case: &Case, d: &Data<T>) -> Outputs<T> {
    let layer = NoisyLinear {
        shape: case.shape,
        noise: case.noise(&d.z),
        base: case.base(d),
        delta_weight: case.delta_weight.then_some(&d.dw),
        delta_bias: case.delta_bias.then_some(&d.db),
    };
    let (mut y, mut dx) = (unwritten(d.dy.len()), unwritten(d.x.len()));
    let (mut dw, mut db) = (case.delta_weight.then(|| unwritten(d.dw.len())), unwritten(d.db.len()));
    layer.forward(&d.x, &mut y).unwrap();
    let grads =
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
    let grads = LowRankGrads {
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

fn lora_factors<'a, T: Real>(case: &Case, d: &'a Data<T>) -> LoraFactors<'a, T> {
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
    let bias = PromptBias {
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
    let grads = PromptGrads { prompt_down: &mut dpd, prompt_up: &mut dpu, delta_bias: Some(&mut ddb) };
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
struct Op {
    f64: fn(&Case, &Data<f64>) -> Outputs<f64>,
    f32: fn(&Case, &Data<f32>) -> Outputs<f32>,
    reference: fn(&Case, &Data<f64>) -> Outputs<f64>,
    incoming: fn(&Data<f64>) -> &[f64],
    gradients: &'static [(&'static str, Field)],
}

const DENSE: Op = Op {
    f64: dense,
    f32: dense,
    reference: dense_reference,
    incoming: |d| &d.dy,
    gradients: &[("dx", |d| &mut d.x), ("dΔW", |d| &mut d.dw), ("dΔb", |d| &mut d.db)],
};
const LOW_RANK: Op = Op {
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
const EPILOGUE: Op = Op {
    f64: epilogue,
    f32: epilogue,
    reference: epilogue_reference,
    incoming: |d| &d.dy,
    gradients: &[("da", |d| &mut d.a), ("dy", |d| &mut d.y)],
};
const DROP_PATH: Op = Op {
    f64: drop_path,
    f32: drop_path,
    reference: drop_path_reference,
    incoming: |d| &d.dy,
    gradients: &[("dx", |d| &mut d.y)],
};
const WEIGHTS: [Op; 3] = [
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

fn assert_within<T: Real>(what: impl Debug, got: &[T], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what:?}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got.to_f64() - want).abs();
        assert!(error <= bound(i), "{what:?}[{i}]: got {got:?}, expected {want} within {:e}", bound(i));
    }
}

/// For values that are not sums of many: relative to the largest, and to one where terms of that order cancel.
fn assert_close<T: Real>(what: impl Debug, got: &[T], want: &[f64]) {
    let tolerance = if size_of::<T>() == 4 { 1e-5 } else { 1e-12 };
    let largest = want.iter().fold(1.0, |largest: f64, want| largest.max(want.abs()));
    assert_within(what, got, want, |_| tolerance * largest);
}

static POOLS: LazyLock<[rayon::ThreadPool; 2]> = LazyLock::new(|| {
    [1, 4].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
});

/// What an operator should give, and by how much rounding may move each element: the result of the same operator on
/// the magnitudes of its inputs, which is the sum of the magnitudes of the element's terms.
struct Expected {
    values: Outputs<f64>,
    magnitudes: Outputs<f64>,
}

impl Expected {
    fn new(op: &Op, case: &Case, data: &Data<f64>) -> Self {
        let mut magnitudes = Data { z: case.z(&data.z), ..data.clone() };
        for (_, field) in FIELDS {
            field(&mut magnitudes).iter_mut().for_each(|v| *v = v.abs());
        }
        let positive = Case { source: Source::Given(NoiseShape::PerToken), scale: case.scale.abs(), ..*case };
        let magnitudes = (op.reference)(&positive, &magnitudes);
        Self { values: (op.reference)(case, data), magnitudes }
    }
}

/// In pools of one and of four threads: the bits repeat from run to run, and the values are the reference's.
fn check_runs<T: Real>(case: &Case, expected: &Expected, run: impl Fn() -> Outputs<T> + Sync) {
    let tolerance = 16.0 * if size_of::<T>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON };
    for pool in POOLS.iter() {
        let [first, second] = [(); 2].map(|()| pool.install(&run));
        assert_eq!(first.len(), expected.values.len());
        let expected = expected.values.iter().zip(&expected.magnitudes);
        for (((name, got), (_, again)), ((_, want), (_, magnitudes))) in
            first.iter().zip(&second).zip(expected)
        {
            let what = (std::any::type_name::<T>(), pool.current_num_threads(), name, case);
            let same = got.iter().zip(again).all(|(a, b)| a.to_f64().to_bits() == b.to_f64().to_bits());
            assert!(same, "not reproducible: {what:?}");
            assert_within(what, got, want, |i| tolerance * magnitudes[i]);
        }
    }
}

fn check(op: &Op, cases: &[Case]) {
    for case in cases {
        let data = Data::new(case);
        let expected = Expected::new(op, case, &data);
        check_runs(case, &expected, || (op.f64)(case, &data));
        let data = data.cast();
        check_runs(case, &expected, || (op.f32)(case, &data));
    }
}

/// Sizes on both sides of every internal edge: the folding threshold, channel blocks, vector tails.
const TOKENS: [usize; 6] = [1, 3, 31, 32, 50, 197];
const OUT_FEATURES: [usize; 7] = [1, 5, 16, 255, 256, 257, 600];
const IN_FEATURES: [usize; 3] = [1, 7, 64];
const RANKS: [usize; 4] = [1, 4, 10, 70];

/// Everything optional is drawn, by the number of the case.
fn case(number: usize, shape: LinearShape, source: Source) -> Case {
    let draw = philox4x32_10([number as u32, 0, 0, 0], [1, 2]);
    let bit = |i: u32| draw[0] >> i & 1 == 1;
    let (base, delta_weight) =
        [(true, true), (true, true), (true, false), (false, true)][draw[1] as usize % 4];
    Case {
        shape: LinearShape { batch: draw[2] as usize % 3 + 1, ..shape },
        source,
        rank: RANKS[draw[3] as usize % 4],
        scale: if bit(0) { 1.0 } else { -1.75 },
        base,
        base_bias: bit(1),
        delta_weight,
        delta_bias: bit(2),
    }
}

fn layer_cases(branches: usize, shared_input: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in TOKENS {
        for out_features in OUT_FEATURES {
            for in_features in IN_FEATURES {
                let shape =
                    LinearShape { branches, batch: 1, tokens, in_features, out_features, shared_input };
                for source in SOURCES {
                    cases.push(case(cases.len(), shape, source));
                }
            }
        }
    }
    // More input rows than the weight gradients take at a time, and more tasks than they have partial sums.
    for source in SOURCES {
        let shape =
            LinearShape { branches, batch: 1, tokens: 197, in_features: 3, out_features: 17, shared_input };
        let case = case(cases.len(), shape, source);
        cases.push(Case { shape: LinearShape { batch: 43, ..shape }, ..case });
    }
    cases
}

macro_rules! layer_tests {
    ($($name:ident: $op:ident, $branches:literal, $shared:literal;)*) => {
        $(#[test]
        fn $name() {
            check(&$op, &layer_cases($branches, $shared));
        })*
    };
}

layer_tests! {
    dense_one_branch: DENSE, 1, false;
    dense_one_branch_shared: DENSE, 1, true;
    dense_two_branches: DENSE, 2, false;
    dense_two_branches_shared: DENSE, 2, true;
    low_rank_one_branch: LOW_RANK, 1, false;
    low_rank_one_branch_shared: LOW_RANK, 1, true;
    low_rank_two_branches: LOW_RANK, 2, false;
    low_rank_two_branches_shared: LOW_RANK, 2, true;
    epilogue_one_branch: EPILOGUE, 1, false;
    epilogue_two_branches: EPILOGUE, 2, true;
    drop_path_one_branch: DROP_PATH, 1, false;
    drop_path_two_branches: DROP_PATH, 2, false;
}

#[test]
fn weight_builders() {
    let mut cases = Vec::new();
    for out_features in OUT_FEATURES {
        for in_features in [1, 7, 64, 300] {
            for rank in RANKS {
                for (base_bias, delta_bias) in [(true, true), (true, false), (false, true), (false, false)] {
                    let shape = LinearShape { out_features, in_features, ..SMALL };
                    let case = case(cases.len(), shape, Source::Off);
                    cases.push(Case { rank, base_bias, delta_bias, ..case });
                }
            }
        }
    }
    // More channels than the partial sums of a gradient take in blocks of the usual size.
    let shape = LinearShape { out_features: 13_000, in_features: 3, ..SMALL };
    cases.push(Case { rank: 2, ..case(0, shape, Source::Off) });
    for op in &WEIGHTS {
        check(op, &cases);
    }
}

const SMALL: LinearShape =
    LinearShape { branches: 2, batch: 2, tokens: 3, in_features: 4, out_features: 5, shared_input: false };

/// Small layers that take every path.
fn small_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (branches, shared_input) in [(1, false), (2, false), (2, true)] {
        for tokens in [1, 3, 48] {
            for source in SOURCES {
                for (base, delta_weight) in [(true, true), (true, false), (false, true)] {
                    let shape = LinearShape { branches, tokens, shared_input, ..SMALL };
                    cases.push(Case {
                        shape,
                        source,
                        rank: 3,
                        scale: 0.5,
                        base,
                        base_bias: true,
                        delta_weight,
                        delta_bias: true,
                    });
                }
            }
        }
    }
    cases
}

/// Compares `gradient` with central differences of `objective` around `at`.
fn check_differences(
    what: impl Debug,
    at: &[f64],
    gradient: &[f64],
    step: f64,
    mut objective: impl FnMut(&[f64]) -> f64,
) {
    assert_eq!(at.len(), gradient.len(), "{what:?}");
    let mut moved = at.to_vec();
    for (i, &gradient) in gradient.iter().enumerate() {
        let [above, below] = [step, -step].map(|step| {
            moved[i] = at[i] + step;
            objective(&moved)
        });
        moved[i] = at[i];
        let difference = (above - below) / (2.0 * step);
        let tolerance = 1e-7 * difference.abs().max(1.0);
        assert!(
            (difference - gradient).abs() <= tolerance,
            "{what:?}[{i}]: gradient {gradient}, difference {difference}"
        );
    }
}

#[test]
fn gradients_are_derivatives() {
    for case in &small_cases() {
        for op in [DENSE, LOW_RANK, EPILOGUE, DROP_PATH].iter().chain(&WEIGHTS) {
            let data = Data::new(case);
            let outputs = (op.f64)(case, &data);
            for (name, field) in op.gradients {
                let Some((_, gradient)) = outputs.iter().find(|output| output.0 == *name) else { continue };
                let mut moved = data.clone();
                let at = field(&mut moved).clone();
                // Every operator is linear in each input, so a wide step costs no accuracy.
                check_differences((name, case), &at, gradient, 0.25, |values| {
                    field(&mut moved).copy_from_slice(values);
                    let result = &(op.f64)(case, &moved)[0].1;
                    result.iter().zip((op.incoming)(&data)).map(|(y, g)| y * g).sum()
                });
            }
        }
    }
}

/// NaN and infinities in any input reach exactly the outputs that depend on it, as in the plain loops.
#[test]
fn non_finite_inputs_show() {
    let silent = small_cases().into_iter().take(3).map(|case| Case { scale: 0.0, ..case });
    for case in &small_cases().into_iter().chain(silent).collect::<Vec<_>>() {
        for op in [DENSE, LOW_RANK, EPILOGUE, DROP_PATH].iter().chain(&WEIGHTS) {
            for (name, field) in FIELDS {
                let mut data = Data::new(case);
                let len = field(&mut data).len();
                for (position, poison) in
                    [(0, f64::NAN), (len / 2, f64::INFINITY), (len.wrapping_sub(1), f64::NEG_INFINITY)]
                {
                    let Some(value) = field(&mut data).get_mut(position) else { continue };
                    let healthy = std::mem::replace(value, poison);
                    let want = (op.reference)(case, &data);
                    let got = (op.f64)(case, &data);
                    let single = (op.f32)(case, &data.cast());
                    field(&mut data)[position] = healthy;
                    for ((want, got), single) in want.iter().zip(got).zip(single) {
                        for i in 0..want.1.len() {
                            let finite =
                                [want.1[i].is_finite(), got.1[i].is_finite(), single.1[i].is_finite()];
                            let what = (poison, name, position, want.0, i, case);
                            assert!(
                                finite.iter().all(|&f| f == finite[0]),
                                "[want, f64, f32] {finite:?} {what:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Partner {
    None,
    Branch,
    History,
}
const PARTNERS: [Partner; 3] = [Partner::None, Partner::Branch, Partner::History];

/// The crate's loss on plain inputs: values, gradient (both branches), and the history afterwards.
fn run_loss<T: Real>(
    setting: &reference::Loss<'_>,
    kind: Partner,
    logits: &[f64],
    partner: &[f64],
    index: &[i64],
) -> (LossValues, Vec<T>, Vec<T>) {
    let &reference::Loss { classes, labels, lambda, label_smoothing, ignore_label } = setting;
    let loss = Loss { classes, labels, lambda, label_smoothing, ignore_label };
    let mut table = Vec::new();
    let mut logits = cast::<T>(logits);
    let consistency = match kind {
        Partner::None => Consistency::None,
        Partner::Branch => {
            logits.extend(cast::<T>(partner));
            Consistency::TwoBranch
        }
        Partner::History => {
            table = vec![T::from_f64(7.0); (index.iter().max().unwrap() + 2) as usize * classes];
            for (row, &at) in partner.chunks(classes).zip(index) {
                table[at as usize * classes..][..classes].copy_from_slice(&cast::<T>(row));
            }
            Consistency::History { table: &mut table, index }
        }
    };
    let mut gradient = unwritten(logits.len());
    let values = loss.evaluate(&logits, consistency, Some(&mut gradient)).unwrap();
    (values, gradient, table)
}

/// Rows of a history table, in no order.
fn history_rows(batch: usize) -> Vec<i64> {
    (0..batch as i64).map(|i| 2 * (batch as i64 - i)).collect()
}

const IGNORE: i64 = -100;

/// Calls `body(setting, logits, partner)` for losses of many sizes and settings.
fn for_losses(sizes: &[(usize, usize)], mut body: impl FnMut(reference::Loss<'_>, &[f64], &[f64])) {
    for &(batch, classes) in sizes {
        let logits: Vec<f64> = uniform(20, batch * classes).iter().map(|l| 8.0 * l).collect();
        let partner: Vec<f64> = uniform(21, batch * classes).iter().map(|l| 8.0 * l).collect();
        for ignored in [0, 1, batch] {
            let labels: Vec<i64> =
                (0..batch).map(|i| if i < ignored { IGNORE } else { (i * 7 % classes) as i64 }).collect();
            for label_smoothing in [0.0, 0.1, 1.0] {
                for lambda in [0.0, 0.5, 3.0] {
                    let ignore_label = (ignored > 0).then_some(IGNORE);
                    let setting =
                        reference::Loss { classes, labels: &labels, lambda, label_smoothing, ignore_label };
                    body(setting, &logits, &partner);
                }
            }
        }
    }
}

fn check_loss<T: Real>(setting: &reference::Loss<'_>, kind: Partner, logits: &[f64], partner: &[f64]) {
    let index = history_rows(setting.labels.len());
    let (got, gradient, table) = run_loss::<T>(setting, kind, logits, partner, &index);
    let (mut values, mut want, partner_gradient) =
        setting.evaluate(logits, (kind != Partner::None).then_some(partner));
    if kind == Partner::Branch {
        want.extend(partner_gradient);
    }
    // No labelled sample: the mean over none of them counts as zero.
    if setting.labels.iter().all(|&label| Some(label) == setting.ignore_label) {
        values[1] = 0.0;
        values[0] = setting.lambda * values[2];
    }
    let what = (std::any::type_name::<T>(), kind, setting);
    assert_close::<f64>((what, "values"), &[got.total, got.classification, got.consistency], &values);
    assert_close((what, "gradient"), &gradient, &want);
    if kind == Partner::History {
        for (row, table) in table.chunks(setting.classes).enumerate() {
            match index.iter().position(|&at| at as usize == row) {
                Some(sample) => {
                    assert_eq!(table, cast::<T>(&logits[sample * setting.classes..][..setting.classes]))
                }
                None => assert!(table.iter().all(|v| v.to_f64() == 7.0), "row {row} was not in the batch"),
            }
        }
    }
}

#[test]
fn loss_matches_formulas() {
    let sizes = [(1, 1), (1, 2), (2, 10), (5, 3), (64, 101), (3, 1000)];
    for_losses(&sizes, |setting, logits, partner| {
        for kind in PARTNERS {
            check_loss::<f64>(&setting, kind, logits, partner);
            check_loss::<f32>(&setting, kind, logits, partner);
        }
    });
}

#[test]
fn loss_gradients_are_derivatives() {
    for_losses(&[(1, 2), (3, 4)], |setting, logits, partner| {
        for kind in PARTNERS {
            let index = history_rows(setting.labels.len());
            let (_, gradient, _) = run_loss::<f64>(&setting, kind, logits, partner, &index);
            let (first, second) = gradient.split_at(logits.len());
            check_differences((kind, setting), logits, first, 1e-5, |logits| {
                run_loss::<f64>(&setting, kind, logits, partner, &index).0.total
            });
            if kind == Partner::Branch {
                check_differences((kind, setting), partner, second, 1e-5, |partner| {
                    run_loss::<f64>(&setting, kind, logits, partner, &index).0.total
                });
            }
        }
    });
}

/// The values do not depend on whether the gradient is asked for, and nothing depends on the run.
#[test]
fn loss_is_reproducible() {
    for_losses(&[(64, 101)], |setting, logits, partner| {
        let &reference::Loss { classes, labels, lambda, label_smoothing, ignore_label } = &setting;
        let loss = Loss { classes, labels, lambda, label_smoothing, ignore_label };
        let both = [logits, partner].concat();
        let values_only = loss.evaluate(&both, Consistency::TwoBranch, None).unwrap();
        for pool in POOLS.iter() {
            let run = || run_loss::<f64>(&setting, Partner::Branch, logits, partner, &[]);
            let [first, second] = [(); 2].map(|()| pool.install(run));
            assert_eq!((first.0, &first.1), (second.0, &second.1));
            assert_eq!(first.0, values_only);
        }
    });
}

/// Extreme and non-finite logits behave as in `torch.nn.functional.cross_entropy`.
#[test]
fn loss_of_extreme_logits() {
    const INF: f64 = f64::INFINITY;
    // logits of one sample with label 0, smoothing, cross-entropy
    let cases = [
        ([1e4, 0.0, -1e4], 0.0, 0.0),
        ([0.0, 1e4, 0.0], 0.0, 1e4),
        ([-1e30, 0.0, 0.0], 0.0, 1e30),
        ([f64::NAN, 0.0, 0.0], 0.0, f64::NAN),
        ([0.0, f64::NAN, 0.0], 0.0, f64::NAN),
        ([INF, 0.0, 0.0], 0.0, f64::NAN),
        ([0.0, INF, 0.0], 0.0, f64::NAN),
        ([-INF; 3], 0.0, f64::NAN),
        ([-INF, 0.0, 0.0], 0.0, INF),
        ([0.0, -INF, 0.0], 0.0, 2f64.ln()),
        ([0.0, -INF, 0.0], 0.1, INF),
    ];
    for (logits, label_smoothing, want) in cases {
        let setting =
            reference::Loss { classes: 3, labels: &[0], lambda: 1.0, label_smoothing, ignore_label: None };
        let (values, gradient, _) = run_loss::<f64>(&setting, Partner::None, &logits, &[], &[]);
        let same = if want.is_finite() {
            (values.total - want).abs() <= 1e-12 * want.max(1.0)
        } else {
            values.total.to_bits() == want.to_bits() || want.is_nan() && values.total.is_nan()
        };
        assert!(same, "{logits:?} {label_smoothing}: got {values:?}, expected {want}");
        assert_eq!(gradient.iter().all(|g| g.is_finite()), !want.is_nan(), "{logits:?}: {gradient:?}");
    }
}

/// A non-finite logit of either branch, even of an ignored sample and with λ = 0, shows in the loss and in exactly the
/// gradients that depend on it.
#[test]
fn non_finite_logits_show() {
    for lambda in [0.0, 2.0] {
        for labels in [[1, 2], [IGNORE, 2]] {
            let ignore_label = Some(IGNORE);
            let setting =
                reference::Loss { classes: 3, labels: &labels, lambda, label_smoothing: 0.1, ignore_label };
            for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for (branch, kind) in
                    [(0, Partner::Branch), (1, Partner::Branch), (0, Partner::History), (1, Partner::History)]
                {
                    let mut rows = [uniform(22, 6), uniform(23, 6)];
                    rows[branch][1] = poison;
                    let (values, gradient, _) = run_loss::<f64>(&setting, kind, &rows[0], &rows[1], &[0, 1]);
                    let what = format!("{poison} {branch} {kind:?} {setting:?}: {values:?} {gradient:?}");
                    assert!(!values.total.is_finite() && !values.consistency.is_finite(), "{what}");
                    assert!(!gradient[1].is_finite(), "{what}");
                    if kind == Partner::Branch {
                        assert!(!gradient[7].is_finite(), "{what}");
                        assert!(gradient[9..].iter().all(|g| g.is_finite()), "{what}");
                    }
                    assert!(gradient[3..6].iter().all(|g| g.is_finite()), "{what}");
                }
            }
        }
    }
}

/// An unlabelled sample without a consistency term contributes nothing, whatever its logits.
#[test]
fn ignored_samples_do_not_matter() {
    let setting = reference::Loss {
        classes: 2,
        labels: &[IGNORE, 1],
        lambda: 1.0,
        label_smoothing: 0.0,
        ignore_label: Some(IGNORE),
    };
    let (values, gradient, _) =
        run_loss::<f64>(&setting, Partner::None, &[f64::NAN, 3.0, 0.0, 0.0], &[], &[]);
    assert_eq!(values, LossValues { total: 2f64.ln(), classification: 2f64.ln(), consistency: 0.0 });
    assert_eq!(gradient, [0.0, 0.0, 0.5, -0.5]);
}

/// PACE-fast: the first epoch sees zeros, the second what the first wrote.
#[test]
fn history_is_read_then_overwritten() {
    let loss = Loss { classes: 2, labels: &[0, 1], lambda: 1.0, label_smoothing: 0.0, ignore_label: None };
    let mut table = [0.0; 6];
    let mut epoch = |logits: &[f64], index: &[i64]| {
        let consistency = Consistency::History { table: &mut table, index };
        let distance = loss.evaluate(logits, consistency, None).unwrap().consistency;
        (distance, table)
    };
    assert_eq!(epoch(&[1.0, 2.0, 3.0, 4.0], &[2, 0]), (15.0, [3.0, 4.0, 0.0, 0.0, 1.0, 2.0]));
    assert_eq!(epoch(&[3.0, 5.0, 1.0, 1.0], &[0, 1]), (1.5, [3.0, 5.0, 1.0, 1.0, 1.0, 2.0]));
}

#[test]
fn sigma_zero_is_no_noise() {
    for case in small_cases().into_iter().filter(|case| matches!(case.source, Source::Off)) {
        let data = Data::new(&case);
        let layer = NoisyLinear {
            shape: case.shape,
            noise: Noise::Off,
            base: case.base(&data),
            delta_weight: case.delta_weight.then_some(&data.dw),
            delta_bias: Some(&data.db),
        };
        let run = |layer: NoisyLinear<'_, f64>| {
            let (mut y, mut dx) = (unwritten(data.dy.len()), unwritten(data.x.len()));
            layer.forward(&data.x, &mut y).unwrap();
            let grads = NoisyLinearGrads { input: Some(&mut dx), ..Default::default() };
            layer.backward(&data.x, &data.dy, grads).unwrap();
            [y, dx]
        };
        for shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            let silent = Generator::new(Key::derive(1, 2, 3), 0.0, shape, 0).unwrap();
            for (got, want) in
                run(NoisyLinear { noise: Noise::Generated(silent), ..layer }).iter().zip(run(layer))
            {
                assert_close(case, got, &want);
            }
        }
    }
}

#[test]
fn merged_evaluation_equals_adapter_evaluation() {
    for case in small_cases().into_iter().filter(|case| case.base && case.delta_weight) {
        let data = Data::new(&case);
        let (mut weight, mut bias) = (data.w0.clone(), data.b0.clone());
        merge(&mut weight, &data.dw).unwrap();
        merge(&mut bias, &data.db).unwrap();
        let with_adapter = Case { source: Source::Off, ..case };
        let merged = Case { delta_weight: false, delta_bias: false, ..with_adapter };
        let [want, got] = [
            dense(&with_adapter, &data),
            dense(&merged, &Data { w0: weight.clone(), b0: bias.clone(), ..data.clone() }),
        ];
        assert_close((case, "y"), &got[0].1, &want[0].1);
        assert_close((case, "dx"), &got[1].1, &want[1].1);
        unmerge(&mut weight, &data.dw).unwrap();
        unmerge(&mut bias, &data.db).unwrap();
        assert_close((case, "W0"), &weight, &data.w0);
        assert_close((case, "b0"), &bias, &data.b0);
    }
}

/// Reading one input from both branches is the same as reading two copies of it; its gradient is the sum of theirs.
#[test]
fn shared_input_equals_duplicated_input() {
    for case in small_cases().into_iter().filter(|case| case.shape.shared_input) {
        let data = Data::new(&case);
        let copies = Case { shape: LinearShape { shared_input: false, ..case.shape }, ..case };
        let copied = Data { x: data.x.repeat(2), ..data.clone() };
        for op in [DENSE, LOW_RANK] {
            for ((name, got), (_, mut want)) in (op.f64)(&case, &data).iter().zip((op.f64)(&copies, &copied))
            {
                if *name == "dx" {
                    let second = want.split_off(data.x.len());
                    merge(&mut want, &second).unwrap();
                }
                assert_close((name, case), got, &want);
            }
        }
    }
}

/// A part of a batch draws what the whole batch draws there, in every path.
#[test]
fn noise_does_not_depend_on_the_split_of_the_batch() {
    for tokens in [1, 48] {
        for noise_shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            let whole = LinearShape { branches: 1, batch: 5, tokens, ..SMALL };
            let run = |first: usize, batch: usize| {
                let (k, n) = (whole.in_features, whole.out_features);
                let shape = LinearShape { batch, ..whole };
                let generator = Generator::new(Key::derive(1, 2, 3), 0.5, noise_shape, first as u64).unwrap();
                let layer = NoisyLinear {
                    shape,
                    noise: Noise::Generated(generator),
                    base: Some(Base { weight: &uniform(1, n * k), bias: None }),
                    delta_weight: Some(&uniform(2, n * k)),
                    delta_bias: None,
                };
                let mut y = unwritten(shape.out_rows() * n);
                let x = uniform(3, whole.in_rows() * k);
                layer.forward(&x[first * tokens * k..][..batch * tokens * k], &mut y).unwrap();
                y
            };
            assert_close((tokens, noise_shape), &[run(0, 2), run(2, 3)].concat(), &run(0, 5));
        }
    }
}

#[test]
fn norms() {
    let tensors = [uniform(1, 1), uniform(2, 4097), uniform(3, 10_000)];
    let want = tensors.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
    let single = tensors.each_ref().map(|tensor| cast::<f32>(tensor));
    assert_close("f64", &[grad_norm(&tensors.each_ref().map(|t| &t[..]))], &[want]);
    assert_close("f32", &[grad_norm(&single.each_ref().map(|t| &t[..]))], &[want]);
    assert_eq!(grad_norm::<f32>(&[]), 0.0);
    assert!(grad_norm(&[&[1.0, f32::NAN]]).is_nan());
    assert_eq!(grad_norm(&[&[1.0, f32::NEG_INFINITY]]), f64::INFINITY);
    // The squares of f32 gradients fit f64.
    assert_eq!(grad_norm(&[&[3e30f32, 4e30]]) as f32, 5e30);

    for (samples, features) in [(1, 1), (3, 5), (7, 4099)] {
        let [a, b] = [4, 5].map(|seed| uniform(seed, samples * features));
        let want = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / samples as f64;
        assert_close("f64", &[fp_distance(samples, features, &a, &b).unwrap()], &[want]);
        let distance = fp_distance(samples, features, &cast::<f32>(&a), &cast(&b)).unwrap();
        assert_close("f32", &[distance as f32], &[want]);
    }
    assert!(fp_distance(1, 2, &[f64::NAN, 0.0], &[0.0; 2]).unwrap().is_nan());
}
