//! What the tests share: hostile numbers, and the errors that they expect.

use pace_kernels::{Error, Result};
use proptest::prelude::*;

/// What lies in outputs beforehand.
pub const UNTOUCHED: f64 = 1234.5;
/// Every tensor of this many elements overflows the address space.
pub const OVERFLOWS: [usize; 4] = [1 << 60, 1 << 63, usize::MAX - 1, usize::MAX];
pub const NOT_FINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// NaN differs from itself, so errors are compared as text.
pub fn assert_error<T: std::fmt::Debug>(result: Result<T>, want: Error) {
    assert_eq!(format!("{result:?}"), format!("{:?}", Err::<T, _>(want)));
}

pub fn value(argument: &'static str, expected: &'static str, got: f64) -> Error {
    Error::Value { argument, expected, got }
}

pub fn size(argument: &'static str, expected: &'static str, got: usize) -> Error {
    Error::Size { argument, expected, got }
}

pub fn any_size() -> impl Strategy<Value = usize> {
    let hostile = [0, 0, 1, 2, 255, 1 << 16, 1 << 31, 1 << 32, (1 << 32) - 2, 1 << 40, 1 << 59];
    prop_oneof![6 => 1usize..5, 1 => (0..hostile.len()).prop_map(move |i| hostile[i]), 1 => any::<usize>()]
}

/// The settings of a test with random arguments: as many cases as `PACE_FUZZ_CALLS` says, or these.
pub fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PACE_FUZZ_CALLS");
    let cases = cases.map_or(default, |cases| cases.parse().expect("PACE_FUZZ_CALLS is a number"));
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}
