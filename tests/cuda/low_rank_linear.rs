//! The low-rank noisy linear layer against the CPU operator in f64.

use crate::device::Opened;
use crate::machine::{Machine, Target};
use crate::support::{SOURCES, TOKENS, Type, Z, check_results, check_tf32, rounded, shape, wide};
use half::{bf16, f16};
use pace_kernels::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{self, Base, Buffer, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key};
use pace_kernels::{LinearShape, cpu};

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    rank: usize,
    z: Z,
    base: bool,
    biases: bool,
    scale: f32,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Every source of noise and every rank, over sizes around vectors and fragments.
    let sizes = [
        (shape(1, 1, 9, 1, 1, false), [1, 2, 16, 33]),
        (shape(1, 1, 1, 5, 9, false), [1, 10, 32, 40]),
        (shape(2, 2, 3, 5, 7, false), [3, 16, 17, 40]),
        (shape(2, 3, 1, 33, 100, true), [1, 10, 32, 33]),
        (shape(1, 2, 33, 40, 24, false), [8, 16, 24, 64]),
    ];
    for (i, &(shape, ranks)) in sizes.iter().enumerate() {
        for (j, &z) in SOURCES.iter().enumerate() {
            cases.push(Case {
                shape,
                rank: ranks[(i + j) % 4],
                z,
                base: (i + j) % 3 != 0,
                biases: (i + j) % 2 == 0,
                scale: [1.0, 0.5, -2.0][j % 3],
                shift: j % 2,
            });
        }
    }
    // The edges of tiles: 128 rows and columns, 32 rows and 1 KiB of channels, more than one part of the rows.
    for (shape, rank, z) in [
        (shape(2, 1, 70, 16, 136, true), 16, Z::Generated(PerToken)),
        (shape(1, 1, 129, 64, 128, false), 10, Z::Given(PerSample)),
        (shape(1, 1, 31, 8, 256, false), 16, Z::Generated(PerSample)),
        (shape(1, 3, 11, 8, 257, false), 4, Z::Keyed(PerSample)),
        (shape(1, 1, 32, 8, 512, false), 32, Z::Given(PerToken)),
        (shape(1, 2, 16, 8, 520, false), 16, Z::Generated(PerSample)),
        (shape(2, 3, 40, 16, 16, true), 16, Z::Generated(PerSample)),
    ] {
        for shift in [0, 1] {
            cases.push(Case { shape, rank, z, base: true, biases: true, scale: 0.5, shift });
        }
    }
    // What TMA walks: more than one tile of rows, columns and the reduction, for blocks that have more than one tile.
    for (shape, rank, z) in [
        (shape(2, 2, 70, 72, 200, false), 10, Z::Generated(PerSample)),
        (shape(2, 3, 50, 136, 64, true), 16, Z::Keyed(PerSample)),
        (shape(1, 1, 260, 64, 392, false), 32, Z::Given(PerSample)),
        (shape(1, 2, 64, 520, 16, false), 24, Z::Off),
        // Blocks that come to a third sample, and to both branches without noise.
        (shape(2, 4, 70, 24, 264, true), 17, Z::Generated(PerSample)),
        (shape(2, 3, 33, 392, 392, true), 1, Z::Off),
    ] {
        cases.push(Case { shape, rank, z, base: true, biases: true, scale: 0.5, shift: 0 });
    }
    cases
}

/// Operands of one case.
struct Data<T> {
    x: Vec<T>,
    dy: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    lora_b: Vec<T>,
    lora_a: Vec<T>,
    delta_bias: Vec<T>,
}

impl<T: Type> Data<T> {
    fn new(case: &Case) -> Self {
        let Case { shape, rank, .. } = case;
        let (k, n) = (shape.in_features, shape.out_features);
        Self {
            x: rounded(21, shape.in_rows() * k),
            dy: rounded(22, shape.out_rows() * n),
            weight: rounded(23, n * k),
            bias: rounded(24, n),
            lora_b: rounded(25, n * rank),
            lora_a: rounded(26, rank * k),
            delta_bias: rounded(27, n),
        }
    }

    fn layer(
        &self,
        case: &Case,
        machine: &mut Machine<'_>,
        allow_tf32: bool,
    ) -> cuda::LowRankLinear<Buffer, Source> {
        let Case { shape, rank, z, base, biases, scale, .. } = *case;
        cuda::LowRankLinear {
            shape,
            noise: z.source(&shape, machine),
            base: base.then(|| Base {
                weight: machine.input("W0", &self.weight),
                bias: biases.then(|| machine.input("b0", &self.bias)),
            }),
            rank,
            lora_b: machine.input("B", &self.lora_b),
            lora_a: machine.input("A", &self.lora_a),
            delta_bias: biases.then(|| machine.input("δb", &self.delta_bias)),
            scale,
            allow_tf32,
        }
    }
}

/// Outputs and gradients.
type Results<T> = [Vec<T>; 6];

const NAMES: [&str; 6] = ["s", "y", "dx", "dB", "dA", "dδb"];

/// `a·bᵀ`, `[rows, columns]`, over `inner`.
fn times(a: &[f64], b: &[f64], inner: usize) -> Vec<f64> {
    a.chunks(inner).flat_map(|a| b.chunks(inner).map(|b| dot(a, b))).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|j| a.iter().skip(j).step_by(columns).copied()).collect()
}

/// What the CPU operator gives.
fn exact<T: Type>(case: &Case, data: &Data<T>) -> Results<f64> {
    let Case { shape, rank, base, biases, scale, .. } = *case;
    let [x, dy, weight, bias, lora_b, lora_a, delta_bias] =
        [&data.x, &data.dy, &data.weight, &data.bias, &data.lora_b, &data.lora_a, &data.delta_bias]
            .map(|values| wide(values));
    let given: Vec<f64> = case.z.given(&shape).into_iter().map(f64::from).collect();
    let layer = cpu::LowRankLinear {
        shape,
        noise: case.z.cpu(&given),
        base: base.then_some(cpu::Base { weight: &weight, bias: biases.then_some(&bias) }),
        rank,
        lora_b: &lora_b,
        lora_a: &lora_a,
        delta_bias: biases.then_some(&delta_bias),
        scale: scale.into(),
    };
    let s = times(&x, &lora_a, shape.in_features).iter().map(|s| f64::from(scale) * s).collect();
    let mut results =
        [&data.dy, &data.x, &data.lora_b, &data.lora_a, &data.bias].map(|like| vec![0.0; like.len()]);
    let [y, dx, dd, du, db] = &mut results;
    layer.forward(&x, y).unwrap();
    let grads: cpu::LowRankGrads<&mut [_]> =
        cpu::LowRankGrads { input: Some(dx), lora_b: Some(dd), lora_a: Some(du), delta_bias: Some(db) };
    layer.backward(&x, &dy, grads).unwrap();
    let [y, dx, dd, du, db] = results;
    [s, y, dx, dd, du, db]
}

/// The same with every tensor that the formula names rounded to `T`, as code that is not fused has it.
fn unfused<T: Type>(case: &Case, data: &Data<T>) -> Results<T> {
    let Case { shape, rank: r, base, biases, scale, .. } = *case;
    let LinearShape { in_features: k, out_features: n, .. } = shape;
    let (m, rows) = (shape.out_rows(), shape.in_rows());
    let round = |value: f64| f64::from(T::round(value).widen());
    let rounded = |values: Vec<f64>| values.into_iter().map(round).collect::<Vec<f64>>();
    let z: Vec<f64> = case.z.written_out(&shape).into_iter().map(|z| round(z.into())).collect();
    let [x, dy, weight, bias, lora_b, lora_a, delta_bias] =
        [&data.x, &data.dy, &data.weight, &data.bias, &data.lora_b, &data.lora_a, &data.delta_bias]
            .map(|values| wide(values));
    // Both branches' rows of what they share.
    let shared = |values: &[f64], columns: usize| -> Vec<f64> {
        (0..m).flat_map(|i| values[i % rows * columns..][..columns].to_vec()).collect()
    };
    let scaled = |values: Vec<f64>| rounded(rounded(values).iter().map(|v| f64::from(scale) * v).collect());
    let s = scaled(times(&x, &lora_a, k));
    let (x, s_all) = (shared(&x, k), shared(&s, r));
    let with_bias = |product: Vec<f64>, bias: &[f64]| match biases {
        true => rounded(product.iter().zip(bias.iter().cycle()).map(|(p, b)| p + b).collect()),
        false => product,
    };
    let adapter = with_bias(rounded(times(&s_all, &lora_b, r)), &delta_bias);
    let under = match base {
        true => with_bias(rounded(times(&x, &weight, k)), &bias),
        false => vec![0.0; m * n],
    };
    let y = (0..m * n).map(|i| under[i] + round(z[i] * adapter[i])).collect();
    let e: Vec<f64> = z.iter().zip(&dy).map(|(z, g)| round(z * g)).collect();
    let ds = scaled(times(&e, &transposed(&lora_b, r), n));
    let mut dx = vec![0.0; rows * k];
    let adapter = rounded(times(&ds, &transposed(&lora_a, k), r));
    let under = match base {
        true => rounded(times(&dy, &transposed(&weight, k), n)),
        false => vec![0.0; m * k],
    };
    for i in 0..m * k {
        dx[i % (rows * k)] += round(adapter[i] + under[i]);
    }
    let dd = times(&transposed(&e, n), &transposed(&s_all, r), m);
    let du = times(&transposed(&ds, r), &transposed(&x, k), m);
    let db = transposed(&e, n).chunks(m).map(|e| e.iter().sum()).collect();
    [s, y, dx, dd, du, db].map(|values: Vec<f64>| values.into_iter().map(T::round).collect())
}

fn run<T: Type>(case: &Case, data: &Data<T>, allow_tf32: bool, machine: &mut Machine<'_>) -> Results<T> {
    let layer = data.layer(case, machine, allow_tf32);
    launch(&layer, data, machine)
}

fn launch<T: Type>(
    layer: &cuda::LowRankLinear<Buffer, Source>,
    data: &Data<T>,
    machine: &mut Machine<'_>,
) -> Results<T> {
    let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
    let s = machine.output::<T>("s", layer.shape.in_rows() * layer.rank);
    let y = machine.output::<T>("y", data.dy.len());
    let gpu = machine.gpu;
    let workspace = machine.output::<f32>("workspace", layer.workspace_len(&gpu, T::DTYPE));
    machine.launch(&layer.forward(&gpu, T::DTYPE, x, s, y, workspace).unwrap());
    let mut grad = |name: &str, like: &[T]| machine.output::<T>(name, like.len());
    let grads =
        [grad("dx", &data.x), grad("dB", &data.lora_b), grad("dA", &data.lora_a), grad("dδb", &data.bias)];
    let [input, lora_b, lora_a, delta_bias] = grads.map(Some);
    let targets = cuda::LowRankGrads { input, lora_b, lora_a, delta_bias };
    machine.launch(&layer.backward(&gpu, T::DTYPE, x, s, dy, targets, workspace).unwrap());
    let [dx, dd, du, db] = grads;
    [s, y, dx, dd, du, db].map(|buffer| machine.read::<T>(buffer))
}

fn typed<T: Type>(case: &Case, target: &Target<'_>) {
    let data = Data::<T>::new(case);
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
        let data = Data::<f32>::new(case);
        let run = |machine: &mut Machine<'_>| run(case, &data, true, machine);
        check_tf32(target, case, NAMES, 4e-3, &exact(case, &data), run);
    }
}

/// Samples of as many tokens as vision transformers have, and of odd ones.
pub fn tokens(target: &Target<'_>) {
    for tokens in TOKENS {
        let (z, shape) = (Z::Generated(PerSample), shape(1, 2, tokens, 24, 16, false));
        typed::<bf16>(&Case { shape, rank: 10, z, base: true, biases: true, scale: 0.5, shift: 0 }, target);
    }
}

/// Each gradient alone is the one that all together have.
pub fn one_gradient(target: &Target<'_>) {
    one_gradient_in::<f32>(target);
    one_gradient_in::<f16>(target);
}

fn one_gradient_in<T: Type>(target: &Target<'_>) {
    let case = |rank| Case {
        shape: LinearShape {
            branches: 2,
            batch: 2,
            tokens: 40,
            in_features: 16,
            out_features: 24,
            shared_input: true,
        },
        rank,
        z: Z::Generated(PerSample),
        base: true,
        biases: true,
        scale: 0.5,
        shift: 0,
    };
    for case in [case(5), case(40)] {
        let data = Data::<T>::new(&case);
        target.run(0, |machine| {
            let all = run(&case, &data, false, machine);
            let layer = data.layer(&case, machine, false);
            let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
            let s = machine.input("s", &all[0]);
            for (i, want) in all.iter().enumerate().skip(2) {
                let grad = machine.output::<T>(NAMES[i], want.len());
                let one = |j| (i == j).then_some(grad);
                let (input, lora_b, lora_a, delta_bias) = (one(2), one(3), one(4), one(5));
                let grads = cuda::LowRankGrads { input, lora_b, lora_a, delta_bias };
                let workspace =
                    machine.output::<f32>("workspace", layer.workspace_len(&machine.gpu, T::DTYPE));
                let plan = layer.backward(&machine.gpu, T::DTYPE, x, s, dy, grads, workspace).unwrap();
                machine.launch(&plan);
                assert!(machine.read::<T>(grad) == *want, "{} of rank {}", NAMES[i], case.rank);
            }
        });
    }
}

/// A sample's output and input gradient do not depend on the batch that it is in.
pub fn batch_split(target: &Target<'_>) {
    let on = |samples: std::ops::Range<usize>, rank, noise| {
        let shape = |batch| LinearShape {
            branches: 1,
            batch,
            tokens: 50,
            in_features: 24,
            out_features: 40,
            shared_input: false,
        };
        let case = |batch| Case {
            shape: shape(batch),
            rank,
            z: Z::Generated(noise),
            base: true,
            biases: true,
            scale: 0.5,
            shift: 0,
        };
        let mut data = Data::<f16>::new(&case(5));
        let (x, dy) = (50 * 24, 50 * 40);
        data.x = data.x[samples.start * x..samples.end * x].to_vec();
        data.dy = data.dy[samples.start * dy..samples.end * dy].to_vec();
        let results = std::cell::RefCell::new(Results::default());
        target.run(0, |machine| {
            let mut layer = data.layer(&case(samples.len()), machine, false);
            let from = crate::support::generator(noise, crate::support::key());
            let first = from.first_sample() + samples.start as u64;
            let generator = Generator::new(from.key(), from.sigma(), noise, first).unwrap();
            layer.noise = Source::Generated(generator);
            *results.borrow_mut() = launch(&layer, &data, machine);
        });
        results.into_inner()
    };
    for (rank, noise) in [(10, PerSample), (10, PerToken), (40, PerSample)] {
        let (whole, first, rest) = (on(0..5, rank, noise), on(0..2, rank, noise), on(2..5, rank, noise));
        for i in 0..3 {
            assert!([&first[i][..], &rest[i]].concat() == whole[i], "{}, rank {rank}, {noise:?}", NAMES[i]);
        }
    }
}

/// The safe methods, on views into larger tensors, give what plans give.
pub fn safe_methods(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in cases().iter().filter(|case| matches!(case.z, Z::Generated(_))) {
        let Case { shape, rank, z, base, biases, scale, shift } = *case;
        let Z::Generated(noise) = z else { unreachable!("filtered") };
        let data = Data::<f16>::new(case);
        let want = std::cell::RefCell::new(Results::default());
        opened.target().run(shift, |machine| *want.borrow_mut() = run(case, &data, false, machine));
        let want = want.into_inner();

        let inputs =
            [&data.x, &data.dy, &data.weight, &data.bias, &data.lora_b, &data.lora_a, &data.delta_bias]
                .map(|values| opened.upload(shift, values));
        let views = inputs.each_ref().map(|tensor| tensor.slice(shift..));
        let [x, dy, weight, bias, lora_b, lora_a, delta_bias] = &views;
        let layer: cuda::LowRankLinear<&dyn DevicePtr<f16>, cuda::Noise<'_>> = cuda::LowRankLinear {
            shape,
            noise: cuda::Noise::Generated(crate::support::generator(noise, crate::support::key())),
            base: base.then_some(Base { weight, bias: biases.then_some(bias as _) }),
            rank,
            lora_b,
            lora_a,
            delta_bias: biases.then_some(delta_bias as _),
            scale,
            allow_tf32: false,
        };
        let mut outputs = want.each_ref().map(|want| opened.upload(shift, &vec![f16::NAN; want.len()]));
        {
            let [s, y, dx, dd, du, db] = outputs.each_mut().map(|output| output.slice_mut(shift..));
            let (mut s, mut y, mut dx, mut dd, mut du, mut db) = (s, y, dx, dd, du, db);
            let len = layer.workspace_len(device.gpu(), cuda::DType::F16);
            let mut workspace = stream.alloc_zeros::<f32>(len).unwrap();
            device.low_rank_linear(&layer, x, &mut s, &mut y, &mut workspace, stream).unwrap();
            let grads = cuda::LowRankGrads {
                input: Some(&mut dx as &mut dyn DevicePtrMut<f16>),
                lora_b: Some(&mut dd),
                lora_a: Some(&mut du),
                delta_bias: Some(&mut db),
            };
            device.low_rank_linear_backward(&layer, x, &s, dy, grads, &mut workspace, stream).unwrap();
        }
        for (i, output) in outputs.iter().enumerate() {
            assert!(opened.download(shift, output) == want[i], "{} of {case:?}", NAMES[i]);
        }
    }
}

/// A captured forward and backward pass has the noise of the key that lies in memory when it is replayed.
pub fn in_a_graph(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in [10, 40].map(|rank| Case { rank, z: Z::Keyed(PerSample), base: true, shift: 0, ..cases()[0] })
    {
        let Case { shape, rank, scale, .. } = case;
        let data = Data::<bf16>::new(&case);
        let [x, dy, weight, lora_b, lora_a] = [&data.x, &data.dy, &data.weight, &data.lora_b, &data.lora_a]
            .map(|values| opened.upload(0, values));
        let mut key = opened.upload(0, &[0u64]);
        let generator = |key| crate::support::generator(PerSample, key);
        let mut s = opened.upload(0, &vec![bf16::NAN; shape.in_rows() * rank]);
        // Enough for any family.
        let mut workspace = stream.alloc_zeros::<f32>(12 << 20).unwrap();
        let outputs = || [&data.dy, &data.x].map(|like| opened.upload(0, &vec![bf16::NAN; like.len()]));
        let mut pass = |noise: cuda::Noise<'_>, [y, dx]: &mut [CudaSlice<bf16>; 2]| {
            let layer: cuda::LowRankLinear<&dyn DevicePtr<bf16>, _> = cuda::LowRankLinear {
                shape,
                noise,
                base: Some(Base { weight: &weight, bias: None }),
                rank,
                lora_b: &lora_b,
                lora_a: &lora_a,
                delta_bias: None,
                scale,
                allow_tf32: false,
            };
            device.low_rank_linear(&layer, &x, &mut s, y, &mut workspace, stream).unwrap();
            let grads = cuda::LowRankGrads { input: Some(dx as _), ..Default::default() };
            device.low_rank_linear_backward(&layer, &x, &s, &dy, grads, &mut workspace, stream).unwrap();
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
            pass(cuda::Noise::Generated(generator(fresh)), &mut direct);
            for (replayed, direct) in replayed.iter().zip(&direct) {
                assert!(opened.download(0, replayed) == opened.download(0, direct), "rank {rank}");
            }
        }
    }
}

/// Vectors and a given `z` may start anywhere: TMA walks neither.
pub fn unaligned_vectors(target: &Target<'_>) {
    let shape = shape(2, 2, 50, 72, 200, false);
    let case =
        Case { shape, rank: 10, z: Z::Given(PerSample), base: true, biases: true, scale: 0.5, shift: 0 };
    let data = Data::<bf16>::new(&case);
    let (exact, unfused) = (exact(&case, &data), unfused(&case, &data));
    check_results(target, (&case, 0), NAMES, &unfused, &exact, |machine| {
        let mut layer = data.layer(&case, machine, false);
        let mut base = layer.base.expect("the case has one");
        base.bias = Some(one_further(machine, "b0", &data.bias));
        layer.base = Some(base);
        layer.delta_bias = Some(one_further(machine, "δb", &data.delta_bias));
        layer.noise = Source::Given { z: one_further(machine, "z", &case.z.given(&shape)), shape: PerSample };
        launch(&layer, &data, machine)
    });
}

/// A tensor that starts one element past an aligned address.
fn one_further<T: bytemuck::Pod>(machine: &mut Machine<'_>, name: &str, values: &[T]) -> Buffer {
    let buffer = machine.input(name, &[&values[..1], values].concat());
    Buffer { address: buffer.address + size_of::<T>() as u64, len: values.len() }
}
