//! Many threads at once: operators on the CPU in pools of every kind, the C interface, and plans.

use pace_kernels::capi::*;
use pace_kernels::cpu::{
    Base, Consistency, Loss, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads,
};
use pace_kernels::cuda::{Buffer, DType, Family, Gpu, NoisyLinear as DeviceNoisyLinear, Plan, Source};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use pace_kernels::{LinearShape, LossSettings, Real, Targets};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use std::ffi::CStr;
use std::ptr::{null, null_mut};
use std::sync::Barrier;
use std::thread;

/// Threads of a test: more than cores, so that they are interrupted anywhere.
const THREADS: usize = 8;

const SHAPE: LinearShape =
    LinearShape { branches: 2, batch: 6, tokens: 19, in_features: 40, out_features: 72, shared_input: false };
const RANK: usize = 5;

fn generator() -> Generator {
    Generator::new(Key::derive(1, 2, 3), 0.5, NoiseShape::PerSample, 0).unwrap()
}

/// What all threads read, and nobody writes.
struct Inputs<T> {
    weight: Vec<T>,
    delta: Vec<T>,
    bias: Vec<T>,
    lora_b: Vec<T>,
    lora_a: Vec<T>,
    x: Vec<T>,
    dy: Vec<T>,
    labels: Vec<i64>,
}

fn values<T: Real>(seed: usize, len: usize) -> Vec<T> {
    (0..len).map(|i| T::from_f64(((i * 37 + seed * 101) % 211) as f64 / 105.0 - 1.0)).collect()
}

impl<T: Real> Inputs<T> {
    fn new() -> Self {
        let (k, n) = (SHAPE.in_features, SHAPE.out_features);
        Self {
            weight: values(1, n * k),
            delta: values(2, n * k),
            bias: values(3, n),
            lora_b: values(4, n * RANK),
            lora_a: values(5, RANK * k),
            x: values(6, SHAPE.in_rows() * k),
            dy: values(7, SHAPE.out_rows() * n),
            labels: (0..SHAPE.out_rows() as i64 / 2).map(|i| i % n as i64).collect(),
        }
    }

    /// What a dense layer, a low-rank layer and a loss give in this thread's pool.
    fn run(&self) -> Vec<Vec<T>> {
        let (k, n) = (SHAPE.in_features, SHAPE.out_features);
        let empty = |len: usize| vec![T::from_f64(f64::NAN); len];
        let base = Some(Base { weight: &self.weight[..], bias: Some(&self.bias[..]) });
        let (mut y, mut dx) = (empty(self.dy.len()), empty(self.x.len()));
        let (mut dw, mut db) = (empty(n * k), empty(n));
        let noise = Noise::Generated(generator());
        let dense = NoisyLinear {
            shape: SHAPE,
            noise,
            base,
            delta_weight: Some(&self.delta),
            delta_bias: Some(&self.bias),
            fold: true,
        };
        dense.forward(&self.x, &mut y).unwrap();
        let grads: NoisyLinearGrads<&mut [_]> =
            NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: Some(&mut db) };
        dense.backward(&self.x, &self.dy, grads).unwrap();
        let (mut y2, mut dx2, mut dd, mut du) =
            (empty(self.dy.len()), empty(self.x.len()), empty(n * RANK), empty(RANK * k));
        let low_rank = LowRankLinear {
            shape: SHAPE,
            noise,
            base,
            rank: RANK,
            lora_b: &self.lora_b,
            lora_a: &self.lora_a,
            delta_bias: None,
            scale: T::from_f64(0.5),
        };
        low_rank.forward(&self.x, &mut y2).unwrap();
        let grads: LowRankGrads<&mut [_]> = LowRankGrads {
            input: Some(&mut dx2),
            lora_b: Some(&mut dd),
            lora_a: Some(&mut du),
            delta_bias: None,
        };
        low_rank.backward(&self.x, &self.dy, grads).unwrap();
        let mut gradient = empty(y.len());
        let settings = LossSettings::new(n, 0.7);
        let loss = Loss { settings, targets: Targets::Labels(&self.labels), class_weights: None };
        let losses = loss.evaluate(&y, Consistency::TwoBranch, Some(&mut gradient)).unwrap();
        vec![y, dx, dw, db, y2, dx2, dd, du, gradient, vec![T::from_f64(losses.total)]]
    }
}

/// What each of several threads gives, which start together.
fn at_once<R: Send>(run: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        let spawn = |i| {
            let (start, run) = (&start, &run);
            scope.spawn(move || {
                start.wait();
                run(i)
            })
        };
        let threads: Vec<_> = (0..THREADS).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn operators_do_not_disturb_each_other<T: Real>() {
    let inputs = Inputs::<T>::new();
    let pools: Vec<_> =
        [1, 2, 3].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap()).into();
    // The sums of a gradient are of as many parts as threads: results belong to a size of pool.
    let alone: Vec<_> = pools.iter().map(|pool| pool.install(|| inputs.run())).collect();
    assert!(alone.iter().flatten().flatten().all(|value| value.to_f64().is_finite()));
    let global = inputs.run();
    for round in 0..3 {
        // From outside into pools, some shared and some not, and into the global one.
        let together = at_once(|i| match i % 4 {
            3 => inputs.run() == global,
            pool => pools[pool].install(|| inputs.run()) == alone[pool],
        });
        assert_eq!(together, [true; THREADS], "round {round}");
        // From tasks of a pool, which steal each other's parts, into the same pool and from pool to pool.
        let nested: Vec<_> = pools[2].install(|| {
            let within = |i: usize| match i % 3 {
                0 => inputs.run() == alone[2],
                1 => pools[1].install(|| inputs.run()) == alone[1],
                _ => pools[1].install(|| pools[2].install(|| inputs.run())) == alone[2],
            };
            (0..2 * THREADS).into_par_iter().map(within).collect()
        });
        assert_eq!(nested, [true; 2 * THREADS], "round {round}");
    }
}

#[test]
fn operators_in_f32() {
    operators_do_not_disturb_each_other::<f32>();
}

#[test]
fn operators_in_f64() {
    operators_do_not_disturb_each_other::<f64>();
}

/// Right calls of the C interface on shared inputs, beside wrong ones, whose messages stay with their thread.
#[test]
fn the_c_interface_keeps_threads_apart() {
    let inputs = Inputs::<f32>::new();
    let tensor =
        |values: &[f32]| PaceTensor { data: values.as_ptr().cast_mut().cast(), len: values.len() as u64 };
    let forward = |key: u64, y: &mut [f32], wrong_by: u64| {
        // SAFETY: a struct of numbers and raw pointers.
        let mut args: PaceNoisyLinear = unsafe { std::mem::MaybeUninit::zeroed().assume_init() };
        args.size = size_of::<PaceNoisyLinear>() as u64;
        args.shape = PaceShape {
            branches: SHAPE.branches as u64,
            batch: SHAPE.batch as u64,
            tokens: SHAPE.tokens as u64,
            in_features: SHAPE.in_features as u64,
            out_features: SHAPE.out_features as u64,
            shared_input: 0,
        };
        (args.noise.kind, args.noise.sigma, args.noise.key) = (PACE_NOISE_GENERATED, 0.5, key);
        args.delta_weight = tensor(&inputs.delta);
        args.x = PaceTensor { len: inputs.x.len() as u64 - wrong_by, ..tensor(&inputs.x) };
        args.y = PaceTensor { data: y.as_mut_ptr().cast(), len: y.len() as u64 };
        // SAFETY: inputs are only read, and `y` is this call's.
        unsafe { pace_noisy_linear_forward(null(), null_mut(), &args) }
    };
    // SAFETY: the library gives a string that lives until this thread's next error.
    let message = || unsafe { CStr::from_ptr(pace_last_error()) }.to_str().unwrap().to_owned();
    let results = |i: usize| {
        let mut outputs = Vec::new();
        for step in 0..20 {
            let wrong_by = 1 + (i * 20 + step) as u64;
            let mut y = vec![f32::NAN; inputs.dy.len()];
            assert_eq!(forward(0, &mut y, wrong_by), PACE_ERROR_LENGTH);
            assert!(y.iter().all(|y| y.is_nan()), "an error has written");
            assert_eq!(forward(pace_key(1, step as u64, i as u32), &mut y, 0), PACE_OK);
            let expected = format!("has {} elements", inputs.x.len() as u64 - wrong_by);
            assert!(message().contains(&expected), "{}: {expected}", message());
            outputs.push(y);
        }
        outputs
    };
    let alone: Vec<_> = (0..THREADS).map(results).collect();
    assert_ne!(alone[0], alone[1]);
    assert!(at_once(results) == alone, "a thread's results depend on the others");
}

/// Plans are values: whoever makes them, and how many at a time.
#[test]
fn plans_are_those_of_one_thread() {
    let buffer = |i: u64, len: usize| Buffer { address: i << 24, len };
    let plans = |i: usize| -> Vec<Plan> {
        let sizes = (0..40).map(|j| (1 + (i + j) % 7, 8 * (1 + (i * 5 + j) % 40)));
        sizes
            .flat_map(|(batch, features)| {
                let shape = LinearShape { batch, in_features: features, ..SHAPE };
                let (k, n) = (features, shape.out_features);
                let layer = DeviceNoisyLinear {
                    shape,
                    noise: Source::Generated(generator()),
                    base: Some(Base { weight: buffer(1, n * k), bias: None }),
                    delta_weight: Some(buffer(2, n * k)),
                    delta_bias: None,
                    fold: batch % 2 == 0,
                    allow_tf32: false,
                };
                let (x, y) = (buffer(3, shape.in_rows() * k), buffer(4, shape.out_rows() * n));
                Family::ALL.map(|family| {
                    layer
                        .forward(&Gpu::H100.with_family(family), DType::BF16, x, y, buffer(5, 1 << 22))
                        .unwrap()
                })
            })
            .collect()
    };
    let alone: Vec<_> = (0..THREADS).map(plans).collect();
    assert_ne!(alone[0], alone[1]);
    for _ in 0..5 {
        assert!(at_once(plans) == alone, "a plan depends on the other threads");
    }
}
