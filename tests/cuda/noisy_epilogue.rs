//! The noisy epilogue in f32, f16 and bf16: bitwise what its documentation says, and close to the CPU operator.

use crate::device::Opened;
use crate::{output_shape, simt, uniform};
use half::{bf16, f16};
use pace_kernels::LinearShape;
use pace_kernels::cpu;
use pace_kernels::cuda::cudarc::driver::{DevicePtr, DeviceRepr};
use pace_kernels::cuda::{self, Direction, Element, NoisyEpilogue, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use pace_simt::{Memory, Schedule, Tensor};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Z {
    Off,
    Generated(NoiseShape),
    /// Generated, with a key in device memory.
    Keyed(NoiseShape),
    Given(NoiseShape),
}

const SOURCES: [Z; 7] = [
    Z::Off,
    Z::Generated(PerSample),
    Z::Generated(PerToken),
    Z::Keyed(PerSample),
    Z::Keyed(PerToken),
    Z::Given(PerSample),
    Z::Given(PerToken),
];

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    z: Z,
    direction: Direction,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

fn cases() -> Vec<Case> {
    // Channels around vectors of 4 and 8 elements and blocks of 32 of them; tokens around a block's 8, the batch of 4 that
    // a thread loads at once, and the 64 of a unit.
    let sizes = [
        (1, 1, 1, 1),
        (2, 2, 1, 2),
        (1, 2, 2, 3),
        (2, 1, 3, 4),
        (1, 3, 7, 5),
        (2, 1, 8, 7),
        (2, 2, 9, 8),
        (1, 1, 33, 9),
        (2, 5, 1, 15),
        (1, 1, 64, 16),
        (2, 1, 65, 17),
        (1, 2, 10, 24),
        (2, 3, 3, 100),
        (1, 1, 5, 127),
        (1, 2, 3, 128),
        (1, 1, 4, 129),
        (1, 1, 3, 256),
        (1, 1, 2, 257),
        (2, 1, 197, 20),
    ];
    let mut cases = Vec::new();
    for (branches, batch, tokens, channels) in sizes {
        for z in SOURCES {
            for direction in [Direction::Forward, Direction::Backward] {
                for shift in [0, 1] {
                    let shape = output_shape(branches, batch, tokens, channels);
                    cases.push(Case { shape, z, direction, shift });
                }
            }
        }
    }
    cases
}

fn key() -> Key {
    Key::derive(7, 3, 2)
}

fn generator(shape: NoiseShape, key: Key) -> Generator {
    Generator::new(key, 0.5, shape, (1 << 32) - 1).unwrap()
}

/// The types of tensors, as the tests need them.
trait Type: Element + DeviceRepr + bytemuck::Pod + PartialEq + Default + std::fmt::Debug {
    fn round(value: f32) -> Self;
    fn widen(self) -> f32;
}

impl Type for f32 {
    fn round(value: f32) -> Self {
        value
    }
    fn widen(self) -> f32 {
        self
    }
}

impl Type for f16 {
    fn round(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Type for bf16 {
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Operands of one case, and what has to come out.
struct Data<T> {
    input: Vec<T>,
    /// `y` before the forward pass; nothing the backward pass would read.
    before: Vec<T>,
    /// A given `z`.
    given: Vec<f32>,
    want: Vec<T>,
}

impl<T: Type> Data<T> {
    fn new(case: &Case) -> Self {
        let LinearShape { batch, tokens, out_features: n, .. } = case.shape;
        let len = case.shape.out_rows() * n;
        let rounded = |seed| uniform(seed, len).into_iter().map(T::round).collect::<Vec<T>>();
        let (input, before) = (rounded(1), rounded(2));
        let given = match case.z {
            Z::Given(PerSample) => uniform(3, case.shape.samples() * n),
            Z::Given(PerToken) => uniform(3, len),
            Z::Off | Z::Generated(_) | Z::Keyed(_) => Vec::new(),
        };
        // z of every element.
        let mut z = vec![1f32; len];
        for (row, z) in z.chunks_mut(n).enumerate() {
            let (sample, token) = (row / tokens, row % tokens);
            match case.z {
                Z::Off => {}
                Z::Generated(shape) | Z::Keyed(shape) => {
                    let (branch, sample) = (sample / batch, sample % batch);
                    generator(shape, key()).fill(branch as u8, sample as u64, token as u32, 0, z);
                }
                Z::Given(PerSample) => z.copy_from_slice(&given[sample * n..][..n]),
                Z::Given(PerToken) => z.copy_from_slice(&given[row * n..][..n]),
            }
        }
        let operands = || z.iter().zip(&input).zip(&before);
        let want: Vec<T> = match case.direction {
            Direction::Forward => {
                operands().map(|((z, a), y)| T::round(z.mul_add(a.widen(), y.widen()))).collect()
            }
            Direction::Backward => operands().map(|((z, dy), _)| T::round(z * dy.widen())).collect(),
        };
        // The same with every operation rounded to the tensors' type.
        let unfused: Vec<T> = match case.direction {
            Direction::Forward => operands()
                .map(|((z, a), y)| {
                    let product = T::round(T::round(*z).widen() * a.widen());
                    T::round(product.widen() + y.widen())
                })
                .collect(),
            Direction::Backward => {
                operands().map(|((z, dy), _)| T::round(T::round(*z).widen() * dy.widen())).collect()
            }
        };
        Self { input, before, given, want }.checked(case, &unfused)
    }

    /// What is wanted is no further from the CPU operator in f64 than twice an unfused computation in the tensors' type.
    fn checked(self, case: &Case, unfused: &[T]) -> Self {
        let wide = |values: &[T]| values.iter().map(|v| f64::from(v.widen())).collect::<Vec<f64>>();
        let z: Vec<f64> = self.given.iter().copied().map(f64::from).collect();
        let noise = match case.z {
            Z::Off => Noise::Off,
            Z::Generated(shape) | Z::Keyed(shape) => Noise::Generated(generator(shape, key())),
            Z::Given(shape) => Noise::Given { z: &z, shape },
        };
        let (input, mut exact) = (wide(&self.input), wide(&self.before));
        match case.direction {
            Direction::Forward => cpu::noisy_epilogue(case.shape, noise, &input, &mut exact).unwrap(),
            Direction::Backward => {
                cpu::noisy_epilogue_backward(case.shape, noise, &input, &mut exact).unwrap()
            }
        }
        let error = |values: &[T]| {
            wide(values).iter().zip(&exact).map(|(value, exact)| (value - exact).abs()).fold(0.0, f64::max)
        };
        let (ours, theirs) = (error(&self.want), error(unfused));
        assert!(ours <= 2.0 * theirs, "{case:?} {:?}: {ours:e}, unfused {theirs:e}", T::DTYPE);
        if T::DTYPE == cuda::DType::F32 {
            let largest = exact.iter().fold(0f64, |largest, value| largest.max(value.abs()));
            assert!(ours <= 1e-5 * largest, "{case:?}: {ours:e} of {largest:e}");
        }
        self
    }
}

fn each(mut test: impl FnMut(&Case)) {
    cases().iter().for_each(&mut test);
}

/// Operands in the simulator's memory, and the operator on them.
fn simulated<T: Type>(case: &Case, data: &Data<T>, memory: &mut Memory) -> (Tensor, NoisyEpilogue) {
    let (names, output) = match case.direction {
        Direction::Forward => (("a", "y"), true),
        Direction::Backward => (("dy", "da"), false),
    };
    let input = memory.input(names.0, &data.input);
    let output = match output {
        true => memory.in_out(names.1, &data.before),
        false => memory.output::<T>(names.1, data.before.len()),
    };
    let noise = match case.z {
        Z::Off => Source::Off,
        Z::Generated(shape) => Source::Generated { generator: generator(shape, key()), key: None },
        Z::Keyed(shape) => {
            let key = simt::buffer(&memory.input("key", &[u64::from(key())]));
            Source::Generated { generator: generator(shape, Key([0, 0])), key: Some(key) }
        }
        Z::Given(shape) => Source::Given { z: simt::buffer(&memory.input("z", &data.given)), shape },
    };
    let operator = NoisyEpilogue {
        shape: case.shape,
        noise,
        direction: case.direction,
        dtype: T::DTYPE,
        input: simt::buffer(&input),
        output: simt::buffer(&output),
    };
    (output, operator)
}

fn simt_typed<T: Type>(case: &Case) {
    let data = Data::<T>::new(case);
    let (_, operator) = simulated(case, &data, &mut Memory::new(case.shift));
    for schedule in simt::schedules(&operator.plan().unwrap()) {
        let mut memory = Memory::new(case.shift);
        let (output, operator) = simulated(case, &data, &mut memory);
        simt::run(&mut memory, &operator.plan().unwrap(), schedule);
        assert!(memory.read::<T>(&output).unwrap() == data.want, "{case:?} {:?} {schedule:?}", T::DTYPE);
    }
}

pub fn simt() {
    each(simt_typed::<f32>);
    each(simt_typed::<f16>);
    each(simt_typed::<bf16>);
}

/// Results do not depend on how many blocks share the work, nor on how a block's threads are arranged.
pub fn simt_any_grid() {
    each(|case| {
        let data = Data::<f16>::new(case);
        for (rows, block) in [(1, None), (2, None), (1, Some([32, 1, 1])), (3, Some([32, 2, 4]))] {
            let mut memory = Memory::new(case.shift);
            let (output, operator) = simulated(case, &data, &mut memory);
            let mut launch = operator.plan().unwrap();
            launch.grid[1] = rows;
            if let Some(block) = block {
                launch.block = block;
                launch.grid[0] = case.shape.out_features.div_ceil(8 * 32) as u32;
            }
            simt::run(&mut memory, &launch, Schedule::Random(1));
            assert!(memory.read::<f16>(&output).unwrap() == data.want, "{case:?} {launch:?}");
        }
    });
}

fn device_typed<T: Type>(case: &Case, opened: &Opened) {
    let Opened { device, stream } = opened;
    let data = Data::<T>::new(case);
    let shift = case.shift;
    let (input, mut output) = (opened.upload(shift, &data.input), opened.upload(shift, &data.before));
    let key = opened.upload(0, &[u64::from(key())]);
    let given = opened.upload(shift, if data.given.is_empty() { &[0.0] } else { &data.given });
    let given = given.slice(shift..);
    let noise = match case.z {
        Z::Off => cuda::Noise::Off,
        Z::Generated(shape) => cuda::Noise::Generated { generator: generator(shape, self::key()), key: None },
        Z::Keyed(shape) => {
            let key: &dyn DevicePtr<u64> = &key;
            cuda::Noise::Generated { generator: generator(shape, Key([0, 0])), key: Some(key) }
        }
        Z::Given(shape) => cuda::Noise::Given { z: &given, shape },
    };
    let (from, mut to) = (input.slice(shift..), output.slice_mut(shift..));
    match case.direction {
        Direction::Forward => device.noisy_epilogue::<T>(case.shape, noise, &from, &mut to, stream),
        Direction::Backward => device.noisy_epilogue_backward::<T>(case.shape, noise, &from, &mut to, stream),
    }
    .unwrap();
    assert!(opened.download(shift, &output) == data.want, "{case:?} {:?}", T::DTYPE);
}

pub fn device(opened: &Opened) {
    each(|case| device_typed::<f32>(case, opened));
    each(|case| device_typed::<f16>(case, opened));
    each(|case| device_typed::<bf16>(case, opened));
}
