//! Settings of the noise, schedules and parameters of adapters.

use crate::support::*;
use pace_kernels::Error;
use pace_kernels::adapter::{Adapter, Init, Parameter};
use pace_kernels::noise::{Generator, Key, NoiseShape, drop_path_mask};
use pace_kernels::schedule::{LazySchedule, sigma_by_block};

#[test]
fn noise_settings() {
    let generator = |sigma, first| Generator::new(Key([0, 0]), sigma, NoiseShape::PerSample, first).map(drop);
    for sigma in [-1.0, -f32::MIN_POSITIVE, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_error(generator(sigma, 0), value("sigma", "finite and not negative", sigma.into()));
    }
    const SAMPLES: &str = "at most 2^56 with the batch added";
    generator(f32::MAX, (1 << 56) - 1).unwrap();
    for first in [1 << 56, u64::MAX] {
        assert_error(generator(0.0, first), value("first_sample", SAMPLES, first as f64));
    }
    let mask = |probability, first| {
        let mut mask = [UNTOUCHED; 2];
        let result = drop_path_mask(Key([0, 0]), probability, first, &mut mask);
        assert!(result.is_ok() || mask == [UNTOUCHED; 2]);
        result
    };
    for probability in [-0.1, 1.0, 2.0].into_iter().chain(NOT_FINITE) {
        assert_error(mask(probability, 0), value("drop_probability", "in [0, 1)", probability));
    }
    mask(1.0 - f64::EPSILON, (1 << 56) - 2).unwrap();
    for first in [(1 << 56) - 1, u64::MAX - 1, u64::MAX] {
        assert_error(mask(0.0, first), value("first_sample", SAMPLES, first as f64));
    }
}

#[test]
fn schedules() {
    for blocks in [0, (1 << 20) + 1, 1 << 40, usize::MAX] {
        assert_error(sigma_by_block(blocks, 1.0, 0), size("blocks", "1 to 2^20", blocks));
    }
    for sigma in [-1.0].into_iter().chain(NOT_FINITE) {
        assert_error(sigma_by_block(2, sigma, 0), value("sigma", "finite and not negative", sigma));
    }
    for first_noisy in [2, usize::MAX] {
        assert_error(
            sigma_by_block(2, 1.0, first_noisy),
            size("first_noisy", "less than `blocks`", first_noisy),
        );
    }
    assert_error(LazySchedule::new(0), size("interval", "at least 1", 0));
    let lazy = LazySchedule::new(3).unwrap();
    for batch in [0, 1] {
        let want = size("batch", "at least 2 (the lazy variant halves it)", batch);
        assert_error(lazy.two_branch_samples(3, batch), want);
    }
    assert_error(lazy.two_branch_samples(4, 0), size("batch", "at least 1", 0));
    assert_eq!(lazy.two_branch_samples(usize::MAX, usize::MAX), Ok(Some(usize::MAX / 2)));
    assert_eq!(lazy.two_branch_samples(0, 7), Ok(Some(3)));
    assert_eq!(lazy.two_branch_samples(1, 7), Ok(None));
}

#[test]
fn adapter_parameters() {
    for adapter in Adapter::ALL {
        for (argument, [n, k, r]) in
            [("out_features", [0, 1, 1]), ("in_features", [1, 0, 1]), ("rank", [1, 1, 0])]
        {
            assert_error(adapter.parameters(n, k, r), size(argument, "at least 1", 0));
        }
        let want = Error::Overflow { argument: "adapter", shape: "[N + K, r]" };
        for huge in OVERFLOWS {
            for [n, k, r] in [[huge, 1, 1], [1, huge, 1], [1, 1, huge], [huge, huge, huge]] {
                assert_error(adapter.parameters(n, k, r), want.clone());
            }
        }
    }
    let mut rng = rand::rng();
    for parameter in Adapter::LoraMulVptAdd.parameters(3, 4, 2).unwrap() {
        let len = parameter.len();
        for got in [0, len - 1, len + 1] {
            let want =
                Error::Length { argument: parameter.name, shape: "[rows, columns]", expected: len, got };
            assert_error(parameter.initialize(&mut rng, &mut vec![0.0; got]), want);
        }
    }
    let huge =
        Parameter { name: "p", rows: usize::MAX, columns: Some(usize::MAX), init: Init::XavierUniform };
    assert!(huge.xavier_bound() > 0.0);
    let want = Error::Length { argument: "p", shape: "[rows, columns]", expected: usize::MAX, got: 1 };
    assert_error(huge.initialize(&mut rng, &mut [0.0]), want);
}
