//! Arguments out of range are typed errors.

use pace_kernels::Error;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, drop_path_mask};

#[test]
fn arguments_out_of_range_are_typed_errors() {
    let key = Key::derive(0, 0, 0);
    for sigma in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -f32::MIN_POSITIVE] {
        let result = Generator::new(key, sigma, PerSample, 0);
        assert!(matches!(result, Err(Error::Value { argument: "sigma", .. })), "{sigma}: {result:?}");
    }
    for sigma in [0.0, f32::MIN_POSITIVE, 1.0, f32::MAX] {
        assert!(Generator::new(key, sigma, PerSample, 0).is_ok(), "{sigma}");
    }

    let too_many =
        |result: &Result<(), Error>| matches!(result, Err(Error::Value { argument: "first_sample", .. }));
    for (first_sample, allowed) in [(0, true), ((1 << 56) - 1, true), (1 << 56, false), (u64::MAX, false)] {
        let result = Generator::new(key, 1.0, PerToken, first_sample).map(drop);
        assert_eq!((result.is_ok(), too_many(&result)), (allowed, !allowed), "{first_sample}: {result:?}");
    }
    for (first_sample, batch, allowed) in
        [((1u64 << 56) - 4, 4, true), ((1 << 56) - 4, 5, false), (u64::MAX, 1, false), (u64::MAX, 2, false)]
    {
        let result = drop_path_mask(key, 0.5, first_sample, &mut vec![0f32; batch]);
        assert_eq!((result.is_ok(), too_many(&result)), (allowed, !allowed), "{first_sample}: {result:?}");
    }

    for probability in [f64::NAN, f64::INFINITY, -0.1, -f64::MIN_POSITIVE, 1.0, 1.5] {
        let result = drop_path_mask(key, probability, 0, &mut [0f32; 4]);
        let typed = matches!(result, Err(Error::Value { argument: "drop_probability", .. }));
        assert!(typed, "{probability}: {result:?}");
    }
}
