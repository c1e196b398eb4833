//! The dense noisy linear layer against the CPU operator in f64.

use crate::device::Opened;
use crate::machine::{Machine, Target};
use crate::support::{
    SOURCES, TOKENS, Type, Z, assert_close, check_results, check_tf32, rounded, shape, wide,
};
use half::{bf16, f16};
use pace_kernels::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{self, Base, Buffer, Family, Launch, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key};
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
    // What TMA walks: more than one tile of rows, columns and the reduction, for blocks that have more than one tile; samples of one
    // unit of tokens, of several, and of a short one.
    for (shape, z, fold) in [
        (shape(2, 2, 70, 72, 200, false), Z::Given(PerToken), false),
        (shape(2, 3, 50, 136, 64, true), Z::Keyed(PerSample), false),
        (shape(2, 3, 50, 136, 64, true), Z::Generated(PerToken), false),
        (shape(2, 1, 197, 72, 264, false), Z::Generated(PerSample), true),
        (shape(2, 3, 50, 136, 64, true), Z::Keyed(PerSample), true),
        (shape(1, 3, 257, 40, 136, false), Z::Given(PerSample), true),
        (shape(1, 1, 400, 40, 32, false), Z::Off, true),
        // Sums of three tiles by two clusters: one begins a tile that it shares where it has another before.
        (shape(1, 3, 40, 24, 520, false), Z::Given(PerSample), true),
    ] {
        cases.push(Case { shape, z, base: true, delta: true, biases: true, fold, shift: 0 });
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
        fold: false,
    };
    let mut results =
        [vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; weight.len()], vec![0.0; bias.len()]];
    let [y, dx, dw, db] = &mut results;
    layer.forward(&x, y).unwrap();
    let grads: cpu::NoisyLinearGrads<&mut [_]> =
        cpu::NoisyLinearGrads { input: Some(dx), delta_weight: delta.then_some(dw), delta_bias: Some(db) };
    layer.backward(&x, &dy, grads).unwrap();
    without_absent(case, results)
}

/// There is no dΔW where there is no ΔW.
fn without_absent<T>(case: &Case, mut results: Results<T>) -> Results<T> {
    if !case.delta {
        results[2].clear();
    }
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
    without_absent(case, [y, dx, dw, db].map(|values| values.into_iter().map(T::round).collect()))
}

fn run<T: Type>(case: &Case, data: &Data<T>, allow_tf32: bool, machine: &mut Machine<'_>) -> Results<T> {
    let layer = data.layer(case, machine, allow_tf32);
    launch(&layer, data, machine)
}

fn launch<T: Type>(
    layer: &cuda::NoisyLinear<Buffer, Source>,
    data: &Data<T>,
    machine: &mut Machine<'_>,
) -> Results<T> {
    let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
    let y = machine.output::<T>("y", data.dy.len());
    let gpu = machine.gpu;
    let workspace = machine.output::<f32>("workspace", layer.workspace_len(&gpu, T::DTYPE));
    let forward = layer.forward(&gpu, T::DTYPE, x, y, workspace).unwrap();
    if gpu.family == Some(Family::Sm80) {
        let is_folded = |launch: &Launch| launch.kernel.name.contains("folded");
        // Not where branches share rows of x, nor, under noise, where samples leave more than a third of their tiles of 128 rows empty.
        let LinearShape { tokens, shared_input, .. } = layer.shape;
        let pays = layer.noise == Source::Off || 2 * tokens.next_multiple_of(128) <= 3 * tokens;
        let folds = layer.fold && !shared_input && pays;
        assert_eq!(forward.launches().any(is_folded), folds, "{layer:?}");
    }
    machine.launch(&forward);
    let delta = layer.delta_weight.is_some();
    let grads = cuda::NoisyLinearGrads {
        input: Some(machine.output::<T>("dx", data.x.len())),
        delta_weight: delta.then(|| machine.output::<T>("dΔW", data.weight.len())),
        delta_bias: Some(machine.output::<T>("dΔb", data.bias.len())),
    };
    machine.launch(&layer.backward(&gpu, T::DTYPE, x, dy, grads, workspace).unwrap());
    let results = [Some(y), grads.input, grads.delta_weight, grads.delta_bias];
    results.map(|buffer| buffer.map_or(Vec::new(), |buffer| machine.read::<T>(buffer)))
}

fn typed<T: Type>(case: &Case, target: &Target<'_>) {
    let data = Data::<T>::new(&case.shape);
    let (exact, unfused) = (exact(case, &data), unfused(case, &data));
    let run = |machine: &mut Machine<'_>| run(case, &data, false, machine);
    check_results(target, (case, case.shift), NAMES, &unfused, &exact, run);
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

pub fn tf32(target: &Target<'_>) {
    for case in cases().iter().filter(|case| case.shift == 0) {
        let data = Data::<f32>::new(&case.shape);
        let run = |machine: &mut Machine<'_>| run(case, &data, true, machine);
        check_tf32(target, case, NAMES, 2e-3, &exact(case, &data), run);
    }
}

/// Sums over thousands of products keep f32 accuracy, though tensor cores cut off: over in-features, channels and rows.
pub fn long_sums(target: &Target<'_>) {
    for (tokens, in_features, out_features) in [(8, 6144, 8), (8, 8, 6144), (6144, 8, 264)] {
        let shape =
            LinearShape { branches: 1, batch: 1, tokens, in_features, out_features, shared_input: false };
        let z = Z::Generated(PerSample);
        typed::<f32>(
            &Case { shape, z, base: true, delta: true, biases: true, fold: false, shift: 0 },
            target,
        );
    }
}

/// Samples of as many tokens as vision transformers have, and of odd ones.
pub fn tokens(target: &Target<'_>) {
    for tokens in TOKENS {
        let (z, shape) = (Z::Generated(PerSample), shape(1, 2, tokens, 24, 16, false));
        for fold in [true, false] {
            typed::<f16>(&Case { shape, z, base: true, delta: true, biases: true, fold, shift: 0 }, target);
        }
    }
}

/// A sample's output and input gradient do not depend on the batch that it is in.
pub fn batch_split(target: &Target<'_>) {
    let shape = |batch| LinearShape {
        branches: 1,
        batch,
        tokens: 50,
        in_features: 24,
        out_features: 40,
        shared_input: false,
    };
    for (noise, fold) in [(PerSample, false), (PerToken, false), (PerSample, true)] {
        let case = |batch| Case {
            shape: shape(batch),
            z: Z::Generated(noise),
            base: true,
            delta: true,
            biases: true,
            fold,
            shift: 0,
        };
        let all = Data::<bf16>::new(&shape(5));
        let on = |samples: std::ops::Range<usize>| {
            let (x, dy) = (50 * 24, 50 * 40);
            let data = Data {
                x: all.x[samples.start * x..samples.end * x].to_vec(),
                dy: all.dy[samples.start * dy..samples.end * dy].to_vec(),
                weight: all.weight.clone(),
                delta_weight: all.delta_weight.clone(),
                bias: all.bias.clone(),
                delta_bias: all.delta_bias.clone(),
            };
            let results = std::cell::RefCell::new(Results::default());
            target.run(0, |machine| {
                let mut layer = data.layer(&case(samples.len()), machine, false);
                let mut from = crate::support::generator(noise, crate::support::key());
                let first = from.first_sample() + samples.start as u64;
                from = Generator::new(from.key(), from.sigma(), noise, first).unwrap();
                layer.noise = Source::Generated(from);
                *results.borrow_mut() = launch(&layer, &data, machine);
            });
            results.into_inner()
        };
        let (whole, first, rest) = (on(0..5), on(0..2), on(2..5));
        for i in 0..2 {
            assert!([&first[i][..], &rest[i]].concat() == whole[i], "{} with {noise:?}", NAMES[i]);
        }
    }
}

/// The safe methods, on views into larger tensors, give what plans give.
pub fn safe_methods(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in cases().iter().filter(|case| matches!(case.z, Z::Generated(_)) && case.delta) {
        let Case { shape, z, base, biases, fold, shift, .. } = *case;
        let Z::Generated(noise) = z else { unreachable!("filtered") };
        let data = Data::<bf16>::new(&shape);
        let want = std::cell::RefCell::new(Results::default());
        opened.target().run(shift, |machine| *want.borrow_mut() = run(case, &data, false, machine));
        let want = want.into_inner();

        let inputs = [&data.x, &data.dy, &data.weight, &data.delta_weight, &data.bias, &data.delta_bias]
            .map(|values| opened.upload(shift, values));
        let views = inputs.each_ref().map(|tensor| tensor.slice(shift..));
        let [x, dy, weight, delta_weight, bias, delta_bias] = &views;
        let layer: cuda::NoisyLinear<&dyn DevicePtr<bf16>, cuda::Noise<'_>> = cuda::NoisyLinear {
            shape,
            noise: cuda::Noise::Generated(crate::support::generator(noise, crate::support::key())),
            base: base.then_some(Base { weight, bias: biases.then_some(bias as _) }),
            delta_weight: Some(delta_weight),
            delta_bias: biases.then_some(delta_bias as _),
            fold,
            allow_tf32: false,
        };
        let mut outputs = want.each_ref().map(|want| opened.upload(shift, &vec![bf16::NAN; want.len()]));
        {
            let [y, dx, dw, db] = &mut outputs;
            let (mut y, mut dx) = (y.slice_mut(shift..), dx.slice_mut(shift..));
            let (mut dw, mut db) = (dw.slice_mut(shift..), db.slice_mut(shift..));
            let len = layer.workspace_len(device.gpu(), cuda::DType::BF16).max(1);
            let mut workspace = stream.alloc_zeros::<f32>(len).unwrap();
            device.noisy_linear(&layer, x, &mut y, &mut workspace, stream).unwrap();
            let grads = cuda::NoisyLinearGrads {
                input: Some(&mut dx as &mut dyn DevicePtrMut<bf16>),
                delta_weight: Some(&mut dw),
                delta_bias: Some(&mut db),
            };
            device.noisy_linear_backward(&layer, x, dy, grads, &mut workspace, stream).unwrap();
        }
        for (i, output) in outputs.iter().enumerate() {
            assert!(opened.download(shift, output) == want[i], "{} of {case:?}", NAMES[i]);
        }
    }
}

/// A captured forward and backward pass has the noise of the key that lies in memory when it is replayed.
pub fn in_a_graph(opened: &Opened) {
    let Opened { device, stream } = opened;
    let case = cases().into_iter().find(|case| case.z == Z::Keyed(PerSample) && case.delta).expect("one");
    let shape = case.shape;
    let data = Data::<bf16>::new(&shape);
    let [x, dy, weight] = [&data.x, &data.dy, &data.delta_weight].map(|values| opened.upload(0, values));
    let mut key = opened.upload(0, &[0u64]);
    let generator = |key| crate::support::generator(PerSample, key);
    let outputs = || [&data.dy, &data.x].map(|like| opened.upload(0, &vec![bf16::NAN; like.len()]));
    // Enough for any family.
    let mut workspace = stream.alloc_zeros::<f32>(12 << 20).unwrap();
    let mut pass = |noise: cuda::Noise<'_>, [y, dx]: &mut [CudaSlice<bf16>; 2]| {
        let layer: cuda::NoisyLinear<&dyn DevicePtr<bf16>, _> = cuda::NoisyLinear {
            shape,
            noise,
            base: None,
            delta_weight: Some(&weight),
            delta_bias: None,
            fold: false,
            allow_tf32: false,
        };
        device.noisy_linear(&layer, &x, y, &mut workspace, stream).unwrap();
        let grads = cuda::NoisyLinearGrads { input: Some(dx as _), ..Default::default() };
        device.noisy_linear_backward(&layer, &x, &dy, grads, &mut workspace, stream).unwrap();
    };
    let mut replayed = outputs();
    // A library loads what it needs when it is first used, which a capture does not allow.
    pass(cuda::Noise::Off, &mut replayed);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let noise = cuda::Noise::Keyed { generator: generator(Key([0, 0])), key: &key };
    pass(noise, &mut replayed);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    for fresh in [Key::derive(1, 0, 0), Key::derive(1, 1, 0)] {
        stream.memcpy_htod(&[u64::from(fresh)], &mut key).unwrap();
        graph.launch().unwrap();
        let mut direct = outputs();
        let noise = cuda::Noise::Generated(generator(fresh));
        pass(noise, &mut direct);
        for (replayed, direct) in replayed.iter().zip(&direct) {
            assert!(opened.download(0, replayed) == opened.download(0, direct));
        }
    }
}

/// Each gradient can be asked for alone.
pub fn one_gradient(target: &Target<'_>) {
    let shape = shape(2, 2, 50, 24, 136, true);
    let z = Z::Generated(PerSample);
    let case = Case { shape, z, base: true, delta: true, biases: true, fold: true, shift: 0 };
    let data = Data::<bf16>::new(&shape);
    let (exact, unfused) = (exact(&case, &data), unfused(&case, &data));
    for i in 1..NAMES.len() {
        target.run(0, |machine| {
            let layer = data.layer(&case, machine, false);
            let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
            let grad = machine.output::<bf16>(NAMES[i], exact[i].len());
            let one = |j| (i == j).then_some(grad);
            let (input, delta_weight, delta_bias) = (one(1), one(2), one(3));
            let grads = cuda::NoisyLinearGrads { input, delta_weight, delta_bias };
            let len = layer.workspace_len(&machine.gpu, cuda::DType::BF16);
            let workspace = machine.output::<f32>("workspace", len);
            machine
                .launch(&layer.backward(&machine.gpu, cuda::DType::BF16, x, dy, grads, workspace).unwrap());
            assert_close(NAMES[i], &case, &machine.read::<bf16>(grad), &unfused[i], &exact[i]);
        });
    }
}
