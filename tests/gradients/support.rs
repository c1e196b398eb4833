//! What the tests share: comparisons, thread pools, and small layers.

use crate::data::*;
use pace_kernels::{LinearShape, Real};
use std::fmt::Debug;
use std::sync::LazyLock;

pub fn assert_within<T: Real>(what: impl Debug, got: &[T], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what:?}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got.to_f64() - want).abs();
        assert!(error <= bound(i), "{what:?}[{i}]: got {got:?}, expected {want} within {:e}", bound(i));
    }
}

/// For values that are not sums of many: relative to the largest, and to one where terms of that order cancel.
pub fn assert_close<T: Real>(what: impl Debug, got: &[T], want: &[f64]) {
    let tolerance = if size_of::<T>() == 4 { 1e-5 } else { 1e-12 };
    let largest = want.iter().fold(1.0, |largest: f64, want| largest.max(want.abs()));
    assert_within(what, got, want, |_| tolerance * largest);
}

pub static POOLS: LazyLock<[rayon::ThreadPool; 2]> = LazyLock::new(|| {
    [1, 4].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
});

/// Compares `gradient` with central differences of `objective` around `at`.
pub fn check_differences(
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

pub const SMALL: LinearShape =
    LinearShape { branches: 2, batch: 2, tokens: 3, in_features: 4, out_features: 5, shared_input: false };

/// Small layers that take every path.
pub fn small_cases() -> Vec<Case> {
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
