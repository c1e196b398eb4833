//! What tests of several operators need: element types, sources of noise, and the bounds on errors.

use crate::machine::{Machine, Target};
use crate::numerics::{self, Format};
use crate::uniform;
use half::{bf16, f16};
use pace_kernels::LinearShape;
use pace_kernels::cuda::{Element, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};

/// The types of tensors.
pub trait Type: Element + bytemuck::Pod + PartialEq + std::fmt::Debug {
    /// Largest relative error of rounding to it.
    const EPSILON: f64;
    const FORMAT: Format;
    fn round(value: f64) -> Self;
    fn widen(self) -> f32;
}

impl Type for f32 {
    const EPSILON: f64 = f32::EPSILON as f64 / 2.0;
    const FORMAT: Format = Format::F32;
    fn round(value: f64) -> Self {
        value as f32
    }
    fn widen(self) -> f32 {
        self
    }
}

impl Type for f16 {
    const EPSILON: f64 = 1.0 / 2048.0;
    const FORMAT: Format = Format::F16;
    fn round(value: f64) -> Self {
        f16::from_f32(value as f32)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Type for bf16 {
    const EPSILON: f64 = 1.0 / 256.0;
    const FORMAT: Format = Format::Bf16;
    fn round(value: f64) -> Self {
        bf16::from_f32(value as f32)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Tokens per sample: of ViT, DINOv2, CLIP and Swin, and odd ones.
pub const TOKENS: [usize; 10] = [49, 64, 196, 198, 256, 261, 577, 1024, 37, 131];

/// A linear layer's sizes.
pub fn shape(
    branches: usize,
    batch: usize,
    tokens: usize,
    in_features: usize,
    out_features: usize,
    shared_input: bool,
) -> LinearShape {
    LinearShape { branches, batch, tokens, in_features, out_features, shared_input }
}

/// Exactly the values, in the oracle's type.
pub fn wide<T: Type>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| f64::from(value.widen())).collect()
}

/// `len` numbers in `[-1, 1)` rounded to `T`.
pub fn rounded<T: Type>(seed: u32, len: usize) -> Vec<T> {
    uniform(seed, len).into_iter().map(|value| T::round(value.into())).collect()
}

/// Largest difference.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // NaN counts as the largest.
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |largest, d| if d.is_nan() { f64::INFINITY } else { f64::max(largest, d) })
}

/// Checks a result of a case in `T` against the `exact` one: in `f32` to 1e-5 of the largest value; in the others it is no
/// further away than twice `unfused`, the same formula with every operation rounded to `T`.
pub fn assert_close<T: Type>(
    result: &str,
    case: &dyn std::fmt::Debug,
    got: &[T],
    unfused: &[T],
    exact: &[f64],
) {
    let error = distance(&wide(got), exact);
    let largest = exact.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    let bound = match size_of::<T>() {
        // The oracle rounds as well: it shows where terms of about 1 cancel and nothing is left.
        4 => 1e-5 * largest + f64::EPSILON,
        // One rounding more, for results of few elements, where the unfused formula may be right by chance: of a term, which is
        // about 1 where the sum is not.
        _ if exact.len() < 8 => 2.0 * distance(&wide(unfused), exact) + T::EPSILON * largest.max(1.0),
        _ => 2.0 * distance(&wide(unfused), exact) + T::EPSILON * largest,
    };
    assert!(error <= bound, "{result} of {case:?} {:?}: error {error:e}, allowed {bound:e}", T::DTYPE);
}

/// The same, and records the errors.
pub fn compare<T: Type>(result: &str, case: &dyn std::fmt::Debug, got: &[T], unfused: &[T], exact: &[f64]) {
    assert_close(result, case, got, unfused, exact);
    // The terms of fewer may have cancelled all together.
    if exact.len() >= 8 {
        numerics::record(T::FORMAT, result, &wide(got), Some(&wide(unfused)), exact);
    }
}

/// Runs a case and checks each of its results by [`assert_close`], and that they are the same bits in whatever order threads
/// run.
pub fn check_results<T: Type, const N: usize>(
    target: &Target<'_>,
    (case, shift): (&dyn std::fmt::Debug, usize),
    names: [&str; N],
    unfused: &[Vec<T>; N],
    exact: &[Vec<f64>; N],
    run: impl Fn(&mut Machine<'_>) -> [Vec<T>; N],
) {
    let first = std::cell::OnceCell::new();
    target.run(shift, |machine| {
        let results = run(machine);
        for (i, name) in names.iter().enumerate() {
            compare(name, case, &results[i], &unfused[i], &exact[i]);
        }
        assert!(first.get_or_init(|| results.clone()) == &results, "{case:?} depends on the order");
    });
}

/// The same for products in TF32, which keeps 10 fraction bits of each operand: errors up to `bound` of the largest value.
pub fn check_tf32<const N: usize>(
    target: &Target<'_>,
    case: &dyn std::fmt::Debug,
    names: [&str; N],
    bound: f64,
    exact: &[Vec<f64>; N],
    run: impl Fn(&mut Machine<'_>) -> [Vec<f32>; N],
) {
    target.run(0, |machine| {
        for (i, got) in run(machine).iter().enumerate() {
            let largest = exact[i].iter().fold(0f64, |largest, value| largest.max(value.abs()));
            let got = wide(got);
            let error = distance(&got, &exact[i]);
            assert!(error <= bound * largest, "{} of {case:?}: {error:e} of {largest:e}", names[i]);
            if got.len() >= 8 {
                numerics::record(Format::Tf32, names[i], &got, None, &exact[i]);
            }
        }
    });
}

/// Where `z` comes from in a case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Z {
    Off,
    Generated(NoiseShape),
    /// Generated, with a key in device memory.
    Keyed(NoiseShape),
    Given(NoiseShape),
}

pub const SOURCES: [Z; 7] = [
    Z::Off,
    Z::Generated(PerSample),
    Z::Generated(PerToken),
    Z::Keyed(PerSample),
    Z::Keyed(PerToken),
    Z::Given(PerSample),
    Z::Given(PerToken),
];

pub fn key() -> Key {
    Key::derive(7, 3, 2)
}

pub fn generator(shape: NoiseShape, key: Key) -> Generator {
    Generator::new(key, 0.5, shape, (1 << 32) - 1).unwrap()
}

impl Z {
    /// The values of a given `z`; none for the other sources.
    pub fn given(self, shape: &LinearShape) -> Vec<f32> {
        match self {
            Z::Given(PerSample) => uniform(3, shape.samples() * shape.out_features),
            Z::Given(PerToken) => uniform(3, shape.out_rows() * shape.out_features),
            Z::Off | Z::Generated(_) | Z::Keyed(_) => Vec::new(),
        }
    }

    /// `z` of every element, `[M, N]`.
    pub fn written_out(self, shape: &LinearShape) -> Vec<f32> {
        let LinearShape { batch, tokens, out_features: n, .. } = *shape;
        let given = self.given(shape);
        let mut z = vec![1f32; shape.out_rows() * n];
        for (row, z) in z.chunks_mut(n).enumerate() {
            let (sample, token) = (row / tokens, row % tokens);
            match self {
                Z::Off => {}
                Z::Generated(shape) | Z::Keyed(shape) => {
                    let (branch, sample) = (sample / batch, sample % batch);
                    generator(shape, key()).fill(branch as u8, sample as u64, token as u32, 0, z);
                }
                Z::Given(PerSample) => z.copy_from_slice(&given[sample * n..][..n]),
                Z::Given(PerToken) => z.copy_from_slice(&given[row * n..][..n]),
            }
        }
        z
    }

    /// The same for the CPU; `given` holds [`Z::given`].
    pub fn cpu(self, given: &[f64]) -> Noise<&'_ [f64]> {
        self.on_cpu(given)
    }

    /// The same in any precision.
    pub fn on_cpu<R>(self, given: &[R]) -> Noise<&'_ [R]> {
        match self {
            Z::Off => Noise::Off,
            Z::Generated(shape) | Z::Keyed(shape) => Noise::Generated(generator(shape, key())),
            Z::Given(shape) => Noise::Given { z: given, shape },
        }
    }

    /// The same for a plan.
    pub fn source(self, shape: &LinearShape, machine: &mut Machine<'_>) -> Source {
        match self {
            Z::Off => Source::Off,
            Z::Generated(shape) => Source::Generated(generator(shape, key())),
            Z::Keyed(shape) => {
                let key = machine.input("key", &[u64::from(key())]);
                Source::Keyed { generator: generator(shape, Key([0, 0])), key }
            }
            Z::Given(noise) => Source::Given { z: machine.input("z", &self.given(shape)), shape: noise },
        }
    }
}
