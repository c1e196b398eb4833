//! How far the normals are from the exact transform of their words.

use crate::instruction_sets::{normals_into, paths};
use crate::support::*;
use pace_kernels::noise::normals;
use rayon::prelude::*;
use std::f64::consts::PI;

/// The radius in double precision.
fn radius_f64(word: u32) -> f64 {
    (-2.0 * ((f64::from(word) + 1.0) / 4294967296.0).ln()).sqrt()
}

/// The cosine and sine in double precision.
fn cos_sin_f64(word: u32) -> (f64, f64) {
    let (sin, cos) = (2.0 * PI * f64::from(word >> 6) / 67108864.0).sin_cos();
    (cos, sin)
}

/// The bound on the distance of every normal from the exact transform of the same words.
const BOUND: f64 = 9e-7;

/// Largest distance of `normals` from the double-precision transform, which must be within the bound.
fn error(words: [u32; 4]) -> f64 {
    let mut worst = 0f64;
    let n = normals(words);
    for (pair, n) in words.chunks_exact(2).zip(n.chunks_exact(2)) {
        let (r, (c, s)) = (radius_f64(pair[0]), cos_sin_f64(pair[1]));
        for (got, exact) in [(n[0], r * c), (n[1], r * s)] {
            let e = (f64::from(got) - exact).abs();
            assert!(e <= BOUND, "{words:x?}: {got} is {e:e} from {exact}");
            worst = worst.max(e);
        }
    }
    worst
}

#[test]
fn normals_match_double_precision_at_the_edges() {
    let edges = edge_words();
    let worst = edges
        .par_iter()
        .map(|&u| edges.iter().map(|&v| error([u, v, v, u])).fold(0.0, f64::max))
        .reduce(|| 0.0, f64::max);
    println!("{} edge words, all pairs: largest error {worst:e}", edges.len());
}

#[test]
fn normals_match_double_precision_on_strides_and_random_words() {
    const COUNT: u32 = 1 << 22;
    let stride = u32::MAX / COUNT;
    let strides = (0..COUNT)
        .into_par_iter()
        .map(|i| {
            // Both words sweep the whole range, the angle in an order far from the radius's; the second pair has the
            // largest radii (u below 2⁻¹⁰) and the radii nearest 0 in turn, where errors are largest absolutely and
            // relatively.
            let (radius, angle) = (i * stride, i.wrapping_mul(0x9E37_79B1));
            let end = if i % 2 == 0 { i } else { !i };
            error([radius, angle, end, angle.wrapping_add(stride / 2)])
        })
        .reduce(|| 0.0, f64::max);
    let random = (0..1024u64)
        .into_par_iter()
        .map(|i| {
            let mut words = Words(i << 32);
            (0..4096).map(|_| error(words.four())).fold(0.0, f64::max)
        })
        .reduce(|| 0.0, f64::max);
    println!("largest error: {strides:e} on strides, {random:e} on random words");
}

/// The worst pair found by combining the words with the largest errors.
#[test]
fn the_worst_known_pair_is_within_the_bound() {
    let worst = error([119, 2_839_448_768, 0, 0]);
    println!("worst known pair: error {worst:e}");
}

/// The low 6 bits of an angle's word do not count.
#[test]
fn angles_have_26_bits() {
    for word in edge_words() {
        let expected = bits(normals([0, word, 0, word & !63]));
        for low in 0..64 {
            assert_eq!(bits(normals([0, word & !63 | low, 0, word | 63])), expected, "{word:#x}, {low}");
        }
    }
}

/// Words whose radii are compared at a time.
const CHUNK: usize = 1024;

/// The radii of `CHUNK` words from `first` on in double precision. One logarithm serves them all where it can.
fn radii_f64(first: u32, radii: &mut [f64; CHUNK]) {
    const HALF: f64 = CHUNK as f64 / 2.0;
    if first < 1 << 24 || first > u32::MAX - CHUNK as u32 {
        for (word, radius) in (first..=u32::MAX).zip(radii) {
            *radius = radius_f64(word);
        }
        return;
    }
    // Taylor's series of ln(middle + i) about the middle: x is at most 2⁻¹⁵, so the next term is below 2⁻⁷⁷.
    let middle = f64::from(first) + 1.0 + HALF;
    let (log, inverse) = ((middle / 4294967296.0).ln(), 1.0 / middle);
    for (i, radius) in radii.iter_mut().enumerate() {
        let x = (i as f64 - HALF) * inverse;
        let log = log + x * (1.0 - x * (1.0 / 2.0 - x * (1.0 / 3.0 - x * 0.25)));
        *radius = (-2.0 * log).sqrt();
    }
    for i in [0, CHUNK - 1] {
        assert!((radii[i] - radius_f64(first + i as u32)).abs() <= 1e-14, "the series at {first} + {i}");
    }
}

/// Bounds of the bands of radii: the errors depend on the radius's binade, through its rounding and the product's.
const BANDS: [f32; 4] = [1.0, 2.0, 4.0, 8.0];

/// What is largest in each band.
fn largest<T: Copy + PartialOrd>(a: [T; 4], b: [T; 4]) -> [T; 4] {
    std::array::from_fn(|i| if b[i] > a[i] { b[i] } else { a[i] })
}

/// The largest radius and the largest error of a radius by band, over every `stride`-th chunk of words, and the last.
fn radius_errors(stride: usize) -> ([f32; 4], [f64; 4]) {
    let last = u32::MAX as usize / CHUNK;
    (0..=last)
        .into_par_iter()
        .filter(|&chunk| chunk % stride == 0 || chunk == last)
        .map(|chunk| {
            let first = (chunk * CHUNK) as u32;
            // cos 0 = 1 exactly, so a zero angle gives the radius itself.
            let quads: [_; CHUNK / 2] = std::array::from_fn(|i| {
                let word = first + 2 * i as u32;
                [word, 0, word + 1, 0]
            });
            let mut normals = [[f32::NAN; 4]; CHUNK / 2];
            normals_into(&quads, &mut normals);
            let radii: [_; CHUNK] = std::array::from_fn(|i| normals[i / 2][i % 2 * 2]);
            let mut exact = [f64::NAN; CHUNK];
            radii_f64(first, &mut exact);

            const LANES: usize = 8;
            let (mut radius, mut error, mut valid) = ([0f32; LANES], [0f64; LANES], true);
            for (radii, exact) in radii.chunks_exact(LANES).zip(exact.chunks_exact(LANES)) {
                for i in 0..LANES {
                    let e = (f64::from(radii[i]) - exact[i]).abs();
                    valid &= e <= BOUND;
                    radius[i] = if radii[i] > radius[i] { radii[i] } else { radius[i] };
                    error[i] = if e > error[i] { e } else { error[i] };
                }
            }
            assert!(valid, "radii of the words from {first} on");
            // A chunk across bands counts for the highest.
            let radius = radius.into_iter().fold(0.0, f32::max);
            let error = error.into_iter().fold(0.0, f64::max);
            let band = BANDS.iter().position(|&top| radius < top).expect("a radius below 8");
            (
                std::array::from_fn(|i| if i == band { radius } else { 0.0 }),
                std::array::from_fn(|i| if i == band { error } else { 0.0 }),
            )
        })
        .reduce(|| ([0.0; 4], [0.0; 4]), |a, b| (largest(a.0, b.0), largest(a.1, b.1)))
}

/// A proof of the accuracy: bounds the error of every pair of words from the errors of all 2³² radii and all 2²⁶
/// angles.
#[test]
fn every_normal_is_within_the_bound() {
    // Without fused multiply-adds in hardware, every word would take hours.
    let stride = if cfg!(target_arch = "x86_64") && paths().len() == 1 { 1024 } else { 1 };
    let (radius, radius_error) = radius_errors(stride);
    if stride > 1 {
        println!("not a proof on this processor: 1 of {stride} radii");
    }

    // A word whose radius is exactly 1 gives cosine and sine themselves.
    let guess = ((-0.5f64).exp() * 4294967296.0) as u32;
    let one = (guess - 100..guess + 100).find(|&w| normals([w, 0, 0, 0])[0] == 1.0).expect("a radius of 1");
    let half_ulp = |x: f32| 0.5 * (f64::from(x.next_up()) - f64::from(x));
    let (angle_error, worst) = (0..1u32 << 26)
        .into_par_iter()
        .chunks(CHUNK)
        .map(|angles| {
            // Any low bits: they do not count.
            let words: Vec<_> = angles.iter().map(|&a| a << 6 | a.wrapping_mul(0x9E37_79B1) >> 26).collect();
            let quads: Vec<_> = words.chunks_exact(2).map(|w| [one, w[0], one, w[1]]).collect();
            let mut got = vec![[f32::NAN; 4]; quads.len()];
            normals_into(&quads, &mut got);
            let (mut angle_error, mut worst) = (0f64, [0f64; 4]);
            for (&word, got) in words.iter().zip(got.as_flattened().chunks_exact(2)) {
                let exact = cos_sin_f64(word);
                for (&got, exact) in got.iter().zip([exact.0, exact.1]) {
                    let error = (f64::from(got) - exact).abs();
                    assert!(error <= BOUND, "angle {word:#x}: {got} is {error:e} from {exact}");
                    angle_error = angle_error.max(error);
                    // |fl(r̂ĉ) − rc| ≤ ½ulp + |r̂ − r||ĉ| + r|ĉ − c|
                    let bound = std::array::from_fn(|band| {
                        half_ulp(radius[band] * got.abs())
                            + radius_error[band] * f64::from(got.abs())
                            + (f64::from(radius[band]) + radius_error[band]) * error
                    });
                    worst = largest(worst, bound);
                }
            }
            (angle_error, worst)
        })
        .reduce(|| (0.0, [0.0; 4]), |a, b| (a.0.max(b.0), largest(a.1, b.1)));
    println!("radius: largest {radius:?}, error {radius_error:?}; cosine and sine: error {angle_error:e}");
    println!("normals: error at most {worst:?} by band of the radius, up to {BANDS:?}");
    assert!(worst.iter().all(|&e| e <= BOUND));
    assert!(radius[3] < 6.67);
}
