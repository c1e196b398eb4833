//! The norm of gradients, and the distance of features.

use crate::data::*;
use crate::support::*;
use pace_kernels::cpu::{fp_distance, grad_norm};

#[test]
fn norms() {
    let tensors = [uniform(1, 1), uniform(2, 4097), uniform(3, 10_000)];
    let want = tensors.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
    let single = tensors.each_ref().map(|tensor| cast::<f32>(tensor));
    assert_close("f64", &[grad_norm(&tensors.each_ref().map(|t| &t[..]))], &[want]);
    assert_close("f32", &[grad_norm(&single.each_ref().map(|t| &t[..]))], &[want]);
    assert_eq!(grad_norm::<f32>(&[]), 0.0);
    assert!(grad_norm(&[&[1.0, f32::NAN]]).is_nan());
    assert_eq!(grad_norm(&[&[1.0, f32::NEG_INFINITY]]), f64::INFINITY);
    // The squares of f32 gradients fit f64.
    assert_eq!(grad_norm(&[&[3e30f32, 4e30]]) as f32, 5e30);

    for (samples, features) in [(1, 1), (3, 5), (7, 4099)] {
        let [a, b] = [4, 5].map(|seed| uniform(seed, samples * features));
        let want = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / samples as f64;
        assert_close("f64", &[fp_distance(samples, features, &a, &b).unwrap()], &[want]);
        let distance = fp_distance(samples, features, &cast::<f32>(&a), &cast(&b)).unwrap();
        assert_close("f32", &[distance as f32], &[want]);
    }
    assert!(fp_distance(1, 2, &[f64::NAN, 0.0], &[0.0; 2]).unwrap().is_nan());
}
