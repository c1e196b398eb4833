//! What the tests share: buffers, a shape, and the errors that they expect.

use pace_kernels::cuda::{Buffer, Launch, Plan};
use pace_kernels::noise::{Generator, Key, NoiseShape};
use pace_kernels::{Error, LinearShape};

pub const SHAPE: LinearShape =
    LinearShape { branches: 2, batch: 3, tokens: 5, in_features: 0, out_features: 24, shared_input: true };
/// Samples and token rows of `SHAPE`.
pub const R: usize = 6;
pub const M: usize = 30;

pub fn generator(shape: NoiseShape, first_sample: u64) -> Generator {
    Generator::new(Key::derive(1, 2, 3), 0.5, shape, first_sample).unwrap()
}

pub fn buffer(address: u64, len: usize) -> Buffer {
    Buffer { address, len }
}

pub const NULL: &str = "is a null pointer";
pub const MISALIGNED: &str = "does not start at a multiple of its element size";
pub const ENDLESS: &str = "reaches past the end of the address space";

pub fn assert_error<T: std::fmt::Debug>(result: Result<T, Error>, want: &Error) {
    match result {
        Err(got) => assert_eq!(got, *want),
        Ok(plan) => panic!("{plan:?} instead of {want}"),
    }
}

pub fn argument(argument: &'static str, problem: &'static str) -> Error {
    Error::Argument { argument, problem }
}

pub fn length(argument: &'static str, shape: &'static str, expected: usize, got: usize) -> Error {
    Error::Length { argument, shape, expected, got }
}

/// The only launch of a plan that has no other step.
pub fn only(plan: &Plan) -> &Launch {
    match plan.launches().collect::<Vec<_>>()[..] {
        [launch] if plan.steps().len() == 1 => launch,
        _ => panic!("{plan:?}"),
    }
}

/// The launches of a plan that has no other step.
pub fn launches<const COUNT: usize>(plan: &Plan) -> [&Launch; COUNT] {
    let launches: Vec<_> = plan.launches().collect();
    assert_eq!(launches.len(), plan.steps().len(), "{plan:?}");
    launches.try_into().unwrap_or_else(|_| panic!("{plan:?}"))
}
