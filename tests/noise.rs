//! The noise: the generator's known answers, the accuracy and the distribution of its normals, and that an element's
//! noise depends on its address alone (not on batch splits, channel windows, vector width or language).
//!
//! Every draw is a fixed function of its address, so these tests cannot fail by chance: each statistical check passed
//! once and for all. What its false-alarm rate says is how often an *ideal* generator would fail it, and with that
//! how strict the check is. Checks print what they measured (`cargo test --test noise -- --nocapture`).

use pace_kernels::Error;
use pace_kernels::noise::{Generator, Key, NoiseShape, drop_path_mask, normals, philox4x32_10};
use rayon::prelude::*;
use std::f64::consts::PI;
use std::path::Path;
use std::process::Command;

use NoiseShape::{PerSample, PerToken};

/// Where one row of noise (all channels) comes from.
#[derive(Debug, Clone, Copy)]
struct Address {
    seed: u64,
    step: u64,
    layer: u32,
    shape: NoiseShape,
    branch: u8,
    sample: u64,
    token: u32,
}

const ORIGIN: Address =
    Address { seed: 0, step: 0, layer: 0, shape: PerToken, branch: 0, sample: 0, token: 0 };

impl Address {
    fn key(&self) -> Key {
        Key::derive(self.seed, self.step, self.layer)
    }

    /// `z` of `channels` channels from `first_channel` on.
    fn z(&self, sigma: f32, first_channel: u32, channels: usize) -> Vec<f32> {
        let mut z = vec![f32::NAN; channels];
        let generator = Generator::new(self.key(), sigma, self.shape, self.sample).unwrap();
        generator.fill(self.branch, 0, self.token, first_channel, &mut z);
        z
    }

    /// `n` of channels `0..channels`, through the public `z = 1 + σ·n`: under σ = 2⁶⁴ the 1 vanishes (it is below
    /// 2⁻⁶⁴ after the division), so `n` comes back without `z`'s rounding.
    fn n(&self, channels: usize) -> Vec<f32> {
        const SCALE: f32 = (1u128 << 64) as f32;
        self.z(SCALE, 0, channels).into_iter().map(|z| z / SCALE).collect()
    }
}

/// A word stream for test inputs, unrelated to the generator under test (SplitMix64).
struct Words(u64);

impl Words {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) as u32
    }

    fn four(&mut self) -> [u32; 4] {
        std::array::from_fn(|_| self.next())
    }
}

fn bits<const N: usize>(values: [f32; N]) -> [u32; N] {
    values.map(f32::to_bits)
}

// ------------------------------------------------------------------------------------------------------------------
// Philox
// ------------------------------------------------------------------------------------------------------------------

/// The three known answers that Random123 ships for philox4x32-10.
#[test]
fn philox_known_answers() {
    let known = [
        ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
        (
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        ),
    ];
    for (counter, key, expected) in known {
        assert_eq!(philox4x32_10(counter, key), expected, "counter {counter:x?}, key {key:x?}");
    }
}

/// An independent implementation agrees on 2²² words: consecutive blocks, across the carries of the counter's words.
#[test]
fn philox_agrees_with_rand_philox() {
    const BLOCKS: usize = 1 << 16;
    let mut random = Words(1);
    for start_high in [0u128, 0xffff_ffff, u128::MAX >> 32, 0x0123_4567_89ab_cdef_0246_8ace] {
        for key in [[0, 0], [0, 1], [u32::MAX; 2], [random.next(), random.next()]] {
            // Starts half the blocks below a carry out of the lowest word.
            let start = (start_high << 32).wrapping_add((1 << 32) - BLOCKS as u128 / 2);
            let mut theirs = vec![0; 4 * BLOCKS];
            rand_philox::Philox::new(key, start).fill_u32(&mut theirs);
            for (block, theirs) in theirs.chunks_exact(4).enumerate() {
                let c = start.wrapping_add(block as u128);
                let counter = [c as u32, (c >> 32) as u32, (c >> 64) as u32, (c >> 96) as u32];
                assert_eq!(philox4x32_10(counter, key), theirs, "counter {counter:x?}, key {key:x?}");
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Word → normal: accuracy
// ------------------------------------------------------------------------------------------------------------------

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

/// Words where a branch of the transform, an exponent, or a quadrant changes, with neighbours on both sides.
fn edge_words() -> Vec<u32> {
    let mut centres = vec![0u32, u32::MAX];
    centres.extend((0..32).map(|k| 1 << k));
    // u = m·2⁻ᵏ with m at √½, where the reduction switches sides; a word w stands for u = (w + 1)/2³².
    centres.extend((0..32).map(|k| (0xB504_F334u32 >> k) - 1));
    // Quadrants change at odd multiples of π/4; sine and cosine have zeros and extrema at even ones. The neighbouring
    // angle is 64 words away.
    let turns = (0..8u32).map(|k| k << 29);
    centres.extend(turns.flat_map(|c| (-2..=2).map(move |d| c.wrapping_add_signed(64 * d))));
    let mut words: Vec<_> =
        centres.iter().flat_map(|&c| (-2..=2).map(move |d| c.wrapping_add_signed(d))).collect();
    words.sort_unstable();
    words.dedup();
    words
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

// ------------------------------------------------------------------------------------------------------------------
// One value per address, whatever computes it
// ------------------------------------------------------------------------------------------------------------------

/// The transform of many calls, for the compiler to vectorise at the caller's instruction set.
#[inline(always)]
fn normals_loop(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    for (words, out) in words.iter().zip(out) {
        *out = normals(*words);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512cd,avx512dq,avx512bw,avx512vl,avx2,fma")]
fn normals_avx512(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    normals_loop(words, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn normals_avx2(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    normals_loop(words, out);
}

/// A way to compute many calls.
type Transform = fn(&[[u32; 4]], &mut [[f32; 4]]);

/// The ways that this machine has, the narrowest first.
fn paths() -> Vec<(&'static str, Transform)> {
    let mut paths: Vec<(&'static str, Transform)> = vec![("portable", |words, out| normals_loop(words, out))];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("lzcnt")
        {
            // SAFETY: the processor has every feature that the function enables.
            paths.push(("AVX2", |words, out| unsafe { normals_avx2(words, out) }));
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
        {
            // SAFETY: the processor has every feature that the function enables (AVX-512 includes AVX2).
            paths.push(("AVX-512", |words, out| unsafe { normals_avx512(words, out) }));
        }
    }
    paths
}

/// The transform of many calls by the widest vectors.
fn normals_into(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    paths().last().unwrap().1(words, out);
}

/// Vectorised or not, the transform gives the same bits: random words and every pair of edge words.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    let words = calls();
    let paths = paths();
    let mut expected = vec![[0.0; 4]; words.len()];
    paths[0].1(&words, &mut expected);
    for (name, path) in &paths[1..] {
        let mut got = vec![[0.0; 4]; words.len()];
        path(&words, &mut got);
        for ((words, expected), got) in words.iter().zip(&expected).zip(&got) {
            assert_eq!(bits(*got), bits(*expected), "{name} at {words:x?}: {got:?}, portable {expected:?}");
        }
    }
    println!("{} calls by {:?}", words.len(), paths.iter().map(|p| p.0).collect::<Vec<_>>());
}

/// The address → counter map, written out once more: `fill` is `1 + σ·n` of the documented counter, bit for bit.
#[test]
fn fill_is_the_documented_function_of_the_address() {
    const CHANNELS: usize = 515;
    let mut random = Words(3);
    for i in 0..1 << 13 {
        // Every field has small values, large values, and its largest.
        let seed = u64::from(random.next()) << 32 | u64::from(random.next());
        let address = Address {
            seed: [0, u64::MAX, seed][i % 3],
            step: [7, 1 << 40 | seed >> 60][i % 2],
            layer: [i as u32, u32::MAX][i / 2 % 2],
            shape: [PerSample, PerToken][i / 4 % 2],
            branch: [0, 1, 255, random.next() as u8][i / 8 % 4],
            sample: [i as u64, (1 << 56) - 1, seed >> 8, 1 << 32][i / 32 % 4],
            token: [i as u32 % 197, random.next()][i / 128 % 2],
        };
        let first_channel =
            [0, 1, 2, 3, 64, 770, u32::MAX - 4 * CHANNELS as u32, random.next() >> 1][i / 256 % 8];
        let sigma = [1.0, 0.5, 1e-3, 0.0, 2.5][i % 5];

        let key = address.key().0;
        for (i, z) in address.z(sigma, first_channel, CHANNELS).into_iter().enumerate() {
            let channel = first_channel + i as u32;
            let counter = [
                channel / 4,
                if address.shape == PerToken { address.token } else { u32::MAX },
                address.sample as u32,
                (address.sample >> 32) as u32 | u32::from(address.branch) << 24,
            ];
            let n = normals(philox4x32_10(counter, key))[channel as usize % 4];
            let expected = sigma.mul_add(n, 1.0);
            assert_eq!(
                z.to_bits(),
                expected.to_bits(),
                "{address:?}, channel {channel}: {z}, not {expected}"
            );
        }
    }
}

/// One batch of 8 draws what its pieces draw, wherever it is cut.
#[test]
fn batch_splits_do_not_change_the_noise() {
    const BATCH: u64 = 8;
    let key = Key::derive(1, 2, 3);
    let draw = |shape, first_sample, samples: u64| {
        let generator = Generator::new(key, 1.0, shape, first_sample).unwrap();
        let mut z = Vec::new();
        for sample in 0..samples {
            for branch in 0..2 {
                for token in 0..3 {
                    let mut row = [0f32; 37];
                    generator.fill(branch, sample, token, 0, &mut row);
                    z.push(bits(row));
                }
            }
        }
        z
    };
    // The last one crosses from one 32-bit word of the sample number into the next.
    for first_sample in [0, 1000, (1 << 32) - 3] {
        for shape in [PerSample, PerToken] {
            let whole = draw(shape, first_sample, BATCH);
            for cut in 0..=BATCH {
                let mut pieces = draw(shape, first_sample, cut);
                pieces.extend(draw(shape, first_sample + cut, BATCH - cut));
                assert_eq!(pieces, whole, "{shape:?} from {first_sample}, cut at {cut}");
            }
        }
    }
}

/// Any window of channels, aligned to the generator's groups of 4 or not, is that part of the whole row.
#[test]
fn channel_windows_do_not_change_the_noise() {
    for shape in [PerSample, PerToken] {
        for start in [0, 3, 4095, 1 << 20] {
            let address = Address { shape, ..ORIGIN };
            let row = address.z(1.0, start, 300);
            for first in 0..80 {
                for len in (0..80).chain([127, 128, 129, 200]) {
                    let window = address.z(1.0, start + first as u32, len);
                    let same = window.iter().zip(&row[first..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same && window.len() == len, "{shape:?}: {len} channels from {start} + {first}");
                }
            }
        }
    }
}

#[test]
fn f64_output_holds_the_same_values() {
    let generator = Generator::new(Key::derive(4, 5, 6), 0.7, PerToken, 9).unwrap();
    let (mut single, mut double) = ([0f32; 999], [0f64; 999]);
    generator.fill(1, 2, 3, 5, &mut single);
    generator.fill(1, 2, 3, 5, &mut double);
    assert_eq!(single.map(f64::from).map(f64::to_bits), double.map(f64::to_bits));

    let (mut single, mut double) = ([2f32; 999], [2f64; 999]);
    drop_path_mask(generator.key(), 0.3, 9, &mut single).unwrap();
    drop_path_mask(generator.key(), 0.3, 9, &mut double).unwrap();
    assert_eq!(single.map(f64::from), double);
}

/// BC noise is one draw per sample; BTC noise differs by token. Both differ by every other part of the address.
#[test]
fn which_elements_share_a_draw() {
    let row = |address: Address| address.z(1.0, 0, 64);
    for shape in [PerSample, PerToken] {
        let base = Address { shape, ..ORIGIN };
        for token in [1, 2, 196, 1 << 31, u32::MAX - 2] {
            let same = row(Address { token, ..base }) == row(base);
            assert_eq!(same, shape == PerSample, "{shape:?}, token {token}");
        }
        for other in [
            Address { seed: 1, ..base },
            Address { step: 1, ..base },
            Address { layer: 1, ..base },
            Address { branch: 1, ..base },
            Address { sample: 1, ..base },
            Address { sample: 1 << 32, ..base },
        ] {
            assert!(row(other).iter().zip(row(base)).all(|(a, b)| *a != b), "{other:?}");
        }
    }
    assert_ne!(row(Address { shape: PerSample, ..ORIGIN }), row(ORIGIN));
}

const KEYS: [(u64, u64, u32, [u32; 2]); 5] = [
    (0, 0, 0, [0x1c29_b9b5, 0x8124_1429]),
    (1, 2, 3, [0xe816_7543, 0x3f8d_cd11]),
    (42, 0, 11, [0xda3b_94c7, 0x08ea_8d78]),
    (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 0xdead_beef, [0xedb4_58e1, 0x0e6f_f7e2]),
    (u64::MAX, u64::MAX, u32::MAX, [0x1a99_a8b5, 0xc145_effb]),
];

const NORMALS: [([u32; 4], [u32; 4]); 6] = [
    // u = 1, hence a radius of 0, at angles whose cosine and sine are positive.
    ([u32::MAX, 0x1234_5678, u32::MAX, 1], [0, 0, 0, 0]),
    ([0, 0x1234_5678, 1, 0x9abc_def0], [0x40c0_360f, 0x4038_2f2d, 0xc0a6_3454, 0xc07f_fd3d]),
    (
        [0x1234_5678, 0x5abc_def0, 0xb504_f332, 0xdead_beef],
        [0xbfb3_9380, 0x3fe9_2f38, 0x3f11_be1f, 0xbf1b_840e],
    ),
    (
        [0xb504_f333, 0x1fff_ffff, 0xffff_fffe, 0x2000_0000],
        [0x3f16_b560, 0x3f16_b55e, 0x377f_ffff, 0x377f_ffff],
    ),
    (
        [0x7fff_ffff, 0x5fff_ffff, 0x8000_0000, 0x6000_0001],
        [0xbf55_224b, 0x3f55_224d, 0xbf55_224c, 0x3f55_224c],
    ),
    (
        [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        [0x3f7d_bb31, 0xbf6c_b6b0, 0xbf1e_1b9f, 0xbef6_d1b1],
    ),
];

const ZERO_BC: Address = Address { shape: PerSample, ..ORIGIN };
const ONE_TWO_THREE: Address = Address { seed: 1, step: 2, layer: 3, branch: 1, sample: 12345, ..ORIGIN };

/// Address, σ, channel, bits of z.
const Z: [(Address, f32, u32, u32); 14] = [
    (ZERO_BC, 1.0, 0, 0x3f75_65b0),
    (ZERO_BC, 1.0, 1, 0x3fb9_f459),
    (ZERO_BC, 1.0, 2, 0x3ffd_5268),
    (ZERO_BC, 1.0, 3, 0x3e8b_efa8),
    (ZERO_BC, 1.0, 4, 0x3f45_7b79),
    (Address { branch: 1, ..ZERO_BC }, 1.0, 0, 0x3d8b_23a0),
    (Address { sample: 1, ..ZERO_BC }, 1.0, 0, 0x3fe4_f36f),
    (ORIGIN, 1.0, 0, 0x405e_6b98),
    (Address { token: 1, ..ORIGIN }, 1.0, 0, 0x3d0e_24b0),
    (Address { shape: PerSample, ..ONE_TWO_THREE }, 0.5, 767, 0x3f8d_5de2),
    (Address { token: 196, ..ONE_TWO_THREE }, 0.5, 767, 0x3f9c_99e4),
    (Address { seed: 42, layer: 11, sample: (1 << 32) + 5, token: 7, ..ORIGIN }, 0.25, 3071, 0x3fca_aa59),
    (
        Address {
            seed: 0x0123_4567_89ab_cdef,
            step: 0xfedc_ba98_7654_3210,
            layer: 0xdead_beef,
            branch: 255,
            sample: (1 << 56) - 1,
            ..ZERO_BC
        },
        2.0,
        u32::MAX,
        0x4094_a704,
    ),
    (
        Address {
            seed: u64::MAX,
            step: u64::MAX,
            layer: u32::MAX,
            shape: PerToken,
            branch: 2,
            sample: 0x00ab_cdef_0123_4567,
            token: u32::MAX - 2,
        },
        0.0078125,
        1_000_003,
        0x3f7b_2500,
    ),
];

/// Bit i: whether sample i survives under the key of (1, 2, 3) and a probability of ½.
const MASK: u32 = 0x8125_4796;

/// FNV-1a (64 bits, over little-endian bytes) of the normals of [`calls`].
const CALLS_HASH: u64 = 0x65a0_b7a3_7890_f9c2;

/// Words of Philox calls: every pair of edge words, then random ones, 2²⁰ in all.
fn calls() -> Vec<[u32; 4]> {
    let edges = edge_words();
    let mut calls: Vec<_> = edges.iter().flat_map(|&u| edges.iter().map(move |&v| [u, v, v, u])).collect();
    let mut random = Words(2);
    calls.resize_with(1 << 20, || random.four());
    calls
}

/// Key, normals and z of fixed inputs as bit patterns: a change of the noise changes trained models, so it must not
/// happen unnoticed. `docs/noise.md` lists the same values.
#[test]
fn pinned_values() {
    for (seed, step, layer, key) in KEYS {
        assert_eq!(Key::derive(seed, step, layer).0, key, "seed {seed:#x}, step {step:#x}, layer {layer:#x}");
    }
    for (words, expected) in NORMALS {
        assert_eq!(bits(normals(words)), expected, "words {words:x?}: {:?}", normals(words));
    }
    let hash = calls()
        .into_iter()
        .flat_map(|words| bits(normals(words)))
        .flat_map(u32::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    assert_eq!(hash, CALLS_HASH, "{hash:#x}");
    for (address, sigma, channel, expected) in Z {
        let z = address.z(sigma, channel, 1)[0];
        assert_eq!(
            z.to_bits(),
            expected,
            "{address:?}, σ {sigma}, channel {channel}: {z:?} {:#x}",
            z.to_bits()
        );
    }
    let mut mask = [0f32; 32];
    drop_path_mask(Key::derive(1, 2, 3), 0.5, 0, &mut mask).unwrap();
    let mask = mask.iter().rev().fold(0, |bits, &keep| bits << 1 | keep as u32);
    assert_eq!(mask, MASK, "{mask:#x}");
}

// ------------------------------------------------------------------------------------------------------------------
// The C++ and CUDA header
// ------------------------------------------------------------------------------------------------------------------

/// The C++ compiler: `$CXX`, or the first of the usual names that runs.
fn cxx() -> Option<String> {
    if let Some(cxx) = std::env::var("CXX").ok().filter(|cxx| !cxx.is_empty()) {
        return Some(cxx);
    }
    let runs = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    ["c++", "g++", "clang++"].into_iter().find(|name| runs(name)).map(String::from)
}

/// Runs a command to its end; panics with what it printed if it fails.
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
}

/// `kernels/noise.cuh` computes the same bits: 2²⁰ calls and 2²⁰ addresses, by several compilations of it.
#[test]
fn the_cpp_header_computes_the_same_bits() {
    if std::env::var("PACE_NO_CXX").is_ok_and(|v| v == "1") {
        println!("skipped, because PACE_NO_CXX=1: kernels/noise.cuh was not compared with the Rust code");
        return;
    }
    let cxx = cxx().expect(
        "this test compiles kernels/noise.cuh and found no C++ compiler: install c++, g++ or clang++, name one in \
         CXX, or set PACE_NO_CXX=1 to skip the comparison",
    );

    let (mut records, mut expected) = (Vec::new(), Vec::new());
    let mut random = Words(4);
    let calls = calls();
    for &words in &calls {
        records.extend(words);
        expected.extend(bits(normals(words)));
    }
    let addresses = 1usize << 20;
    for i in 0..addresses {
        let wide = |random: &mut Words| u64::from(random.next()) << 32 | u64::from(random.next());
        let small = i % 2 == 0;
        let address = Address {
            seed: if small { i as u64 % 5 } else { wide(&mut random) },
            step: if small { i as u64 } else { wide(&mut random) },
            layer: if small { i as u32 % 24 } else { random.next() },
            shape: [PerSample, PerToken][i / 2 % 2],
            branch: if small { i as u8 / 4 % 2 } else { random.next() as u8 },
            sample: if small { i as u64 % 1024 } else { wide(&mut random) >> 8 },
            token: if small { i as u32 % 197 } else { random.next() },
        };
        let sigma = [1.0, 0.1, 0.0, 1e-40, f32::from_bits(random.next() >> 2)][i % 5];
        let group = if small { i as u32 % 1024 } else { random.next() >> 2 };
        let probability = [0.0, 0.1, 0.5, 0.9][i / 4 % 4];
        let threshold = ((1.0 - probability) * 4294967296.0f64).round() as u64;

        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        records.extend(halves(address.seed));
        records.extend(halves(address.step));
        records.extend([address.layer, sigma.to_bits(), u32::from(address.shape == PerToken)]);
        records.push(address.branch.into());
        records.extend(halves(address.sample));
        records.extend([address.token, group]);
        records.extend(halves(threshold));

        let key = address.key();
        expected.extend(key.0);
        expected.extend(address.z(sigma, 4 * group, 4).into_iter().map(f32::to_bits));
        let mut keep = [0f32];
        drop_path_mask(key, probability, address.sample, &mut keep).unwrap();
        expected.push(keep[0] as u32);
    }

    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/noise_twin.cpp");
    let input = directory.join("noise_twin.in");
    let mut bytes = Vec::with_capacity(4 * records.len() + 8);
    bytes.extend((calls.len() as u32).to_ne_bytes());
    bytes.extend((addresses as u32).to_ne_bytes());
    bytes.extend(records.iter().flat_map(|word| word.to_ne_bytes()));
    std::fs::write(&input, bytes).unwrap();

    let mut variants = vec![
        ("plain", vec!["-O2"]),
        ("unoptimised", vec!["-O0"]),
        // The device branches, on the intrinsics in plain C++.
        ("device", vec!["-O2", "-DEMULATE_DEVICE"]),
    ];
    // A target with fused multiply-adds, where the compiler may contract whatever it can.
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") {
        variants.push(("contracting", vec!["-O3", "-mfma", "-ffp-contract=fast"]));
    }
    #[cfg(target_arch = "aarch64")]
    variants.push(("contracting", vec!["-O3", "-ffp-contract=fast"]));

    for (name, flags) in &variants {
        let program = directory.join(format!("noise_twin_{name}{}", std::env::consts::EXE_SUFFIX));
        let output = directory.join(format!("noise_twin_{name}.out"));
        run(Command::new(&cxx).arg("-std=c++17").args(flags).arg("-o").arg(&program).arg(&source));
        run(Command::new(&program).arg(&input).arg(&output));
        let got = std::fs::read(&output).unwrap();
        assert_eq!(got.len(), 4 * expected.len(), "{name}: length of the output");
        let got = got.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        for (i, (got, &expected)) in got.zip(&expected).enumerate() {
            let at = || match i.checked_sub(4 * calls.len()) {
                None => format!("words {:x?}, normal {}", calls[i / 4], i % 4),
                Some(i) => format!("address {}, word {} of its answer", i / 7, i % 7),
            };
            assert!(got == expected, "{name}: {}: {got:#x}, in Rust {expected:#x}", at());
        }
    }
    println!(
        "{} words compared by {cxx}: {:?}",
        expected.len(),
        variants.iter().map(|v| v.0).collect::<Vec<_>>()
    );
}

// ------------------------------------------------------------------------------------------------------------------
// Arguments
// ------------------------------------------------------------------------------------------------------------------

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

// ------------------------------------------------------------------------------------------------------------------
// DropPath mask
// ------------------------------------------------------------------------------------------------------------------

#[test]
fn drop_path_masks_do_not_depend_on_the_split() {
    let key = Key::derive(1, 2, 3);
    for first_sample in [0, 77, (1 << 32) - 3] {
        let mut whole = [2f32; 16];
        drop_path_mask(key, 0.5, first_sample, &mut whole).unwrap();
        for cut in 0..=16 {
            let mut pieces = [2f32; 16];
            let (left, right) = pieces.split_at_mut(cut);
            drop_path_mask(key, 0.5, first_sample, left).unwrap();
            drop_path_mask(key, 0.5, first_sample + cut as u64, right).unwrap();
            assert_eq!(pieces, whole, "from {first_sample}, cut at {cut}");
        }
    }
}

/// The frequency of survivors, and of pairs of survivors of neighbouring samples, steps, layers and seeds.
#[test]
fn drop_path_frequency_is_one_minus_the_probability() {
    const SAMPLES: usize = 1 << 21;
    let draw = |key, probability| {
        let mut mask = vec![2f32; SAMPLES];
        drop_path_mask(key, probability, 0, &mut mask).unwrap();
        assert!(mask.iter().all(|&keep| keep == 0.0 || keep == 1.0));
        mask
    };
    assert!(draw(Key::derive(0, 0, 0), 0.0).iter().all(|&keep| keep == 1.0));
    for probability in [1e-4, 0.1, 0.25, 0.5, 0.9, 0.9999] {
        let keep = 1.0 - probability;
        let mask = draw(Key::derive(5, 6, 7), probability);
        let survivors = mask.iter().sum::<f32>();
        let what = format!("survivors, p = {probability}");
        check_count(&what, survivors.into(), SAMPLES as f64, keep);
        println!("{what}: {survivors} of {SAMPLES}, expected {:.1}", keep * SAMPLES as f64);

        let mut shifted = mask.clone();
        shifted.rotate_left(1);
        let neighbours = [
            ("samples", shifted),
            ("seeds", draw(Key::derive(6, 6, 7), probability)),
            ("steps", draw(Key::derive(5, 7, 7), probability)),
            ("layers", draw(Key::derive(5, 6, 8), probability)),
        ];
        for (name, other) in neighbours {
            // Each pair of neighbouring samples overlaps the next; every other pair is disjoint from the rest.
            let step = if name == "samples" { 2 } else { 1 };
            let pairs = SAMPLES / step;
            let both: f32 = mask.iter().zip(other).step_by(step).map(|(a, b)| a * b).sum();
            let what = format!("both of two {name}, p = {probability}");
            check_count(&what, both.into(), pairs as f64, keep * keep);
            println!("{what}: {both} of {pairs}, expected {:.1}", keep * keep * pairs as f64);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Statistics
// ------------------------------------------------------------------------------------------------------------------

/// The false-alarm rate of each statistical check: an ideal generator fails a given one at most this often. There are
/// fewer than 2000 checks, so one would fail all of them together at most once in 500 000 tries.
const ALPHA: f64 = 1e-9;

/// Bound on a standardised mean, two-sided.
///
/// The normal tail beyond 6.5 is 8e-11 (both sides). Means of products and powers of normals approach it from above;
/// the first corrections multiply it by exp(z³·skew/(6√N) + z⁴·kurtosis/(24N)), which stays below 12 = ALPHA/8e-11
/// wherever it is used (worked out there).
const Z_MAX: f64 = 6.5;

/// The number of successes in `trials` independent tries of the given probability.
///
/// Chernoff's inequality, which holds for every number of trials: P(count is this far off) ≤ 2·exp(−trials·KL). Returns
/// the exponent, trials·KL.
fn check_count(what: &str, count: f64, trials: f64, probability: f64) -> f64 {
    let term = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a * (a / b).ln() };
    let rate = count / trials;
    let exponent = trials * (term(rate, probability) + term(1.0 - rate, 1.0 - probability));
    let expected = trials * probability;
    assert!(exponent <= (2.0 / ALPHA).ln(), "{what}: {count} of {trials}, expected {expected}");
    exponent
}

/// The normal distribution function: absolute error 1e-15, and relative error 1e-9 in the lower tail down to −8.
fn normal_cdf(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
    if x < -4.0 {
        // Laplace's continued fraction of Mills' ratio.
        density / (1..=200).rev().fold(-x, |fraction, k| -x + f64::from(k) / fraction)
    } else if x > 4.0 {
        1.0 - normal_cdf(-x)
    } else {
        // Φ(x) = ½ + φ(x)·(x + x³/3 + x⁵/15 + …)
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term.abs() > 1e-18 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        0.5 + density * sum
    }
}

#[test]
fn the_reference_distribution_function_is_right() {
    // Φ to 15 digits from the standard tables.
    for (x, expected) in [
        (-8.0, 6.220960574271786e-16),
        (-6.0, 9.86587645037698e-10),
        (-4.0, 3.167124183311992e-5),
        (-1.0, 0.158655253931457),
        (0.0, 0.5),
        (1.959963984540054, 0.975),
        (3.0, 0.998650101968370),
        (5.0, 0.999999713348428),
    ] {
        let got = normal_cdf(x);
        assert!((got - expected).abs() <= 2e-15 + 1e-9 * expected.min(1.0 - expected), "Φ({x}) = {got}");
    }
}

/// Histogram cells: width 2⁻¹⁴ over [−8, 8). Normals reach ±6.67 at most.
const CELLS: usize = 1 << 18;
const CELLS_PER_UNIT: f64 = 16384.0;

/// Sums over draws, kept apart by `channel % 4`, the draw's place in its Philox call (cosine or sine, first or second
/// pair of words).
#[derive(Clone)]
struct Tally {
    /// Σ of the Hermite polynomials He₁…He₆.
    hermite: [[f64; 6]; 4],
    cells: Vec<[u32; 4]>,
}

impl Tally {
    fn new() -> Self {
        Self { hermite: [[0.0; 6]; 4], cells: vec![[0; 4]; CELLS] }
    }

    fn add(&mut self, row: &[f32]) {
        for group in row.chunks_exact(4) {
            for (place, &n) in group.iter().enumerate() {
                let n = f64::from(n);
                self.cells[(n * CELLS_PER_UNIT + CELLS as f64 / 2.0) as usize][place] += 1;
                let (mut before, mut he) = (1.0, n);
                for (k, sum) in self.hermite[place].iter_mut().enumerate() {
                    *sum += he;
                    (before, he) = (he, n * he - (k + 1) as f64 * before);
                }
            }
        }
    }

    fn merge(mut self, other: Self) -> Self {
        for place in 0..4 {
            for k in 0..6 {
                self.hermite[place][k] += other.hermite[place][k];
            }
        }
        for (a, b) in self.cells.iter_mut().flatten().zip(other.cells.iter().flatten()) {
            *a += b;
        }
        self
    }
}

/// 2²⁷ (134 million) draws from 2¹³ rows: both shapes and branches, neighbouring samples, tokens, layers, steps and
/// seeds, 2¹⁴ channels.
fn pool() -> Tally {
    (0..1u64 << 13)
        .into_par_iter()
        .fold(Tally::new, |mut tally, i| {
            let (shape, token) = if i & 1 == 0 { (PerSample, 0) } else { (PerToken, i >> 1 & 7) };
            // A BC row has no token: it takes 8 times as many samples instead, so that no row occurs twice.
            let sample = if shape == PerSample { i >> 1 & 127 } else { i >> 4 & 15 };
            tally.add(
                &Address {
                    seed: i >> 12 & 1,
                    step: i >> 11 & 1,
                    layer: (i >> 9 & 3) as u32,
                    shape,
                    branch: (i >> 8 & 1) as u8,
                    sample,
                    token: token as u32,
                }
                .n(1 << 14),
            );
            tally
        })
        .reduce(Tally::new, Tally::merge)
}

/// Moments, Kolmogorov–Smirnov, χ² and tails of 2²⁷ draws, together and by place in the Philox call.
#[test]
fn draws_are_standard_normal() {
    let pool = pool();
    let cdf: Vec<_> =
        (0..=CELLS).map(|i| normal_cdf((i as f64 - CELLS as f64 / 2.0) / CELLS_PER_UNIT)).collect();
    for places in [0..4, 0..1, 1..2, 2..3, 3..4] {
        let name = if places.len() == 4 { "all places".into() } else { format!("place {}", places.start) };
        let counts: Vec<_> =
            pool.cells.iter().map(|c| c[places.clone()].iter().map(|&c| u64::from(c)).sum::<u64>()).collect();
        let draws = counts.iter().sum::<u64>() as f64;
        assert_eq!(draws, places.len() as f64 * f64::from(1 << 25));

        // The mean of Heₖ(n) is 0 with variance k!/N: k = 1 is the mean, 2 the variance − 1, 3 the skewness and 4 the
        // excess kurtosis (about the known mean 0 and variance 1), 5 and 6 the next two standardised moments.
        // Correction factors to the false-alarm rate, from E[He₆³] = 6!³/3!³ and E[He₆⁴] ≤ 3¹²·6!² (hypercontractivity)
        // at N = 2²⁵: exp(0.7) and exp(1.2); smaller orders and larger N have smaller ones.
        let mut factorial = 1.0;
        for k in 0..6 {
            factorial *= (k + 1) as f64;
            let mean = pool.hermite[places.clone()].iter().map(|h| h[k]).sum::<f64>() / draws;
            let z = mean * (draws / factorial).sqrt();
            println!("{name}: mean of He{} {mean:+.3e}, {z:+.2} standard errors", k + 1);
            assert!(z.abs() <= Z_MAX, "{name}: mean of He{} is {z} standard errors from 0", k + 1);
        }

        // Kolmogorov–Smirnov at every cell edge (between edges the distribution function rises by at most 2.5e-5).
        // Massart's form of the Dvoretzky–Kiefer–Wolfowitz inequality: P(D > ε) ≤ 2·exp(−2Nε²) for every N.
        let mut below = 0;
        let mut distance = 0f64;
        for (count, cdf) in counts.iter().zip(&cdf[1..]) {
            below += count;
            distance = distance.max((below as f64 / draws - cdf).abs());
        }
        let bound = ((2.0 / ALPHA).ln() / (2.0 * draws)).sqrt();
        println!("{name}: Kolmogorov–Smirnov distance {distance:.3e}, bound {bound:.3e}");
        assert!(distance <= bound, "{name}: Kolmogorov–Smirnov distance {distance:e}, bound {bound:e}");

        // χ² over 1024 equiprobable bins, with edges rounded to cell edges and the probabilities taken between those.
        // For χ² with d degrees of freedom, P(χ² ≥ d + 2√(dx) + 2x) and P(χ² ≤ d − 2√(dx)) are each at most exp(−x)
        // (Laurent and Massart 2000). At more than 30 000 expected draws per bin, the χ² law itself is not in doubt.
        const BINS: usize = 1024;
        let (mut chi2, mut first) = (0.0, 0);
        for bin in 1..=BINS {
            let last =
                if bin == BINS { CELLS } else { cdf.partition_point(|&p| p < bin as f64 / BINS as f64) };
            let observed = counts[first..last].iter().sum::<u64>() as f64;
            let expected = draws * (cdf[last] - cdf[first]);
            chi2 += (observed - expected).powi(2) / expected;
            first = last;
        }
        let (d, x) = (BINS as f64 - 1.0, (2.0 / ALPHA).ln());
        let (low, high) = (d - 2.0 * (d * x).sqrt(), d + 2.0 * (d * x).sqrt() + 2.0 * x);
        println!("{name}: χ² {chi2:.1} on {d} degrees of freedom, bounds {low:.1} and {high:.1}");
        assert!((low..=high).contains(&chi2), "{name}: χ² {chi2}, bounds {low} and {high}");

        for t in [3.0, 4.0, 5.0, 5.5, 6.0] {
            let cell = CELLS / 2 - (t * CELLS_PER_UNIT) as usize;
            let (lower, upper) = (&counts[..cell], &counts[CELLS - cell..]);
            for (side, tail) in [("below −", lower), ("from +", upper)] {
                let (count, probability) = (tail.iter().sum::<u64>(), normal_cdf(-t));
                println!("{name}, {side}{t}: {count} draws, expected {:.1}", draws * probability);
                check_count(&format!("{name}, {side}{t}"), count as f64, draws, probability);
            }
        }
    }
}

/// Sums over pairs of draws that should be independent.
#[derive(Clone, Copy, Default)]
struct Pairs {
    count: f64,
    /// Σ a·b: the correlation.
    product: f64,
    /// Σ ½(a² − 1)(b² − 1): the correlation of squares, which sees a shared radius.
    squares: f64,
}

impl Pairs {
    fn of(a: impl IntoIterator<Item = f32>, b: impl IntoIterator<Item = f32>) -> Self {
        let mut sum = Self::default();
        for (a, b) in a.into_iter().zip(b) {
            let (a, b) = (f64::from(a), f64::from(b));
            sum.count += 1.0;
            sum.product += a * b;
            sum.squares += 0.5 * (a * a - 1.0) * (b * b - 1.0);
        }
        sum
    }

    fn merge(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            product: self.product + other.product,
            squares: self.squares + other.squares,
        }
    }

    /// Both summands have mean 0 and variance 1. The product of squares has skewness 8 and excess kurtosis 222; at
    /// 2¹⁸ pairs, the fewest used, the correction factors are exp(0.72) and exp(0.07). (Where a draw belongs to two
    /// pairs, the summands are still uncorrelated.) Returns the larger of the two distances in standard errors.
    fn check(self, what: &str) -> f64 {
        assert!(self.count >= f64::from(1 << 18));
        let z = [self.product, self.squares].map(|sum| sum / self.count.sqrt());
        assert!(z.iter().all(|z| z.abs() <= Z_MAX), "{what}: correlations {z:?} standard errors from 0");
        z[0].abs().max(z[1].abs())
    }
}

/// Draws at neighbouring addresses are uncorrelated, and so are their squares: 2²² pairs per relation.
#[test]
fn neighbouring_addresses_are_independent() {
    const CHANNELS: usize = 1 << 12;
    type Relation = (&'static str, fn(Address) -> Address);
    let relations: [Relation; 21] = [
        ("the two branches", |a| Address { branch: 1, ..a }),
        ("branches 0 and 255", |a| Address { branch: 255, ..a }),
        ("samples 1 apart", |a| Address { sample: a.sample + 1, ..a }),
        ("samples 32 apart", |a| Address { sample: a.sample + 32, ..a }),
        ("samples 2³² apart", |a| Address { sample: a.sample + (1 << 32), ..a }),
        ("samples 2⁵⁵ apart", |a| Address { sample: a.sample + (1 << 55), ..a }),
        ("tokens 1 apart", |a| Address { token: a.token + 1, ..a }),
        ("tokens 197 apart", |a| Address { token: a.token + 197, ..a }),
        ("tokens 2³¹ apart", |a| Address { token: a.token + (1 << 31), ..a }),
        ("BTC and BC", |a| Address { shape: PerSample, sample: a.sample + 64 * u64::from(a.token), ..a }),
        ("sample and token swapped", |a| Address { sample: a.token.into(), token: a.sample as u32, ..a }),
        ("layers 1 apart", |a| Address { layer: a.layer + 1, ..a }),
        ("layers 12 apart", |a| Address { layer: a.layer + 12, ..a }),
        ("layers 2³¹ apart", |a| Address { layer: a.layer + (1 << 31), ..a }),
        ("steps 1 apart", |a| Address { step: a.step + 1, ..a }),
        ("steps 1000 apart", |a| Address { step: a.step + 1000, ..a }),
        ("steps 2³² apart", |a| Address { step: a.step + (1 << 32), ..a }),
        ("step and layer swapped", |a| Address { step: a.layer.into(), layer: a.step as u32, ..a }),
        ("seeds 1 apart", |a| Address { seed: a.seed + 1, ..a }),
        ("seeds 2³² apart", |a| Address { seed: a.seed + (1 << 32), ..a }),
        ("seeds 2⁶³ apart", |a| Address { seed: a.seed + (1 << 63), ..a }),
    ];
    for (name, relation) in relations {
        let pairs = (0..1024u32)
            .into_par_iter()
            .map(|row| {
                // Samples 32…63 and tokens 0…31: no row is another one's with sample and token swapped.
                let sample = u64::from(32 + row % 32);
                let a = Address { step: 3, layer: 5, sample, token: row / 32, ..ORIGIN };
                Pairs::of(a.n(CHANNELS), relation(a).n(CHANNELS))
            })
            .reduce(Pairs::default, Pairs::merge);
        println!("{name}: at most {:.2} standard errors", pairs.check(name));
    }
}

/// Flipping any single bit of any field of the address gives an independent row: 256 bits, 2¹⁸ pairs each.
#[test]
fn every_bit_of_the_address_counts() {
    let base = Address { seed: 0x1234, step: 99, layer: 7, branch: 1, sample: 5, token: 3, ..ORIGIN };
    let row = base.n(1 << 18);
    let flips: Vec<_> = (0..64)
        .map(|bit| Address { seed: base.seed ^ 1 << bit, ..base })
        .chain((0..64).map(|bit| Address { step: base.step ^ 1 << bit, ..base }))
        .chain((0..32).map(|bit| Address { layer: base.layer ^ 1 << bit, ..base }))
        .chain((0..8).map(|bit| Address { branch: base.branch ^ 1 << bit, ..base }))
        .chain((0..56).map(|bit| Address { sample: base.sample ^ 1 << bit, ..base }))
        .chain((0..32).map(|bit| Address { token: base.token ^ 1 << bit, ..base }))
        .collect();
    assert_eq!(flips.len(), 256);
    let worst = flips
        .par_iter()
        .map(|flip| Pairs::of(row.iter().copied(), flip.n(1 << 18)).check(&format!("{flip:?}")))
        .reduce(|| 0.0, f64::max);
    println!("256 single-bit flips: at most {worst:.2} standard errors");
}

/// Channels of one row: at fixed distances, and by place in the Philox call (0 and 1, like 2 and 3, are the cosine and
/// the sine of the same two words).
#[test]
fn channels_are_independent() {
    const CHANNELS: usize = 1 << 15;
    let rows: Vec<_> = (0..128u64)
        .into_par_iter()
        .map(|row| Address { sample: row, shape: PerSample, ..ORIGIN }.n(CHANNELS))
        .collect();
    for lag in [1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 192, 768, 1024, 3072, 4096, 16384] {
        let pairs = rows
            .par_iter()
            .map(|row| Pairs::of(row.iter().copied(), row[lag..].iter().copied()))
            .reduce(Pairs::default, Pairs::merge);
        println!("channels {lag} apart: at most {:.2} standard errors", pairs.check("channels"));
    }
    for (a, b) in [(0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3)] {
        let pairs = rows
            .par_iter()
            .map(|row| {
                let place = |p: usize| row.iter().copied().skip(p).step_by(4);
                Pairs::of(place(a), place(b))
            })
            .reduce(Pairs::default, Pairs::merge);
        println!("places {a} and {b}: at most {:.2} standard errors", pairs.check("places"));
    }
}

/// 2²² (seed, step, layer) give as many different keys (chance of a repeat among ideal keys: 5e-7), each of whose 64
/// bits is set half of the time.
#[test]
fn keys_are_distinct() {
    let mut keys = Vec::new();
    for seed in (0..32).chain((0..32).map(|bit| 1u64 << (bit + 32))) {
        for step in (0..1024).chain((0..1024).map(|k| k << 54 | 1 << 40)) {
            for layer in (0..24).chain((0..8).map(|k| u32::MAX - k)) {
                let [low, high] = Key::derive(seed, step, layer).0;
                keys.push(u64::from(high) << 32 | u64::from(low));
            }
        }
    }
    assert_eq!(keys.len(), 1 << 22);
    let mut worst = 0f64;
    for bit in 0..64 {
        let set = keys.iter().filter(|&&key| key >> bit & 1 == 1).count();
        worst = worst.max(check_count(&format!("key bit {bit}"), set as f64, keys.len() as f64, 0.5));
    }
    println!("key bits: largest exponent {worst:.2}, bound {:.2}", (2.0 / ALPHA).ln());
    keys.par_sort_unstable();
    assert!(keys.windows(2).all(|pair| pair[0] != pair[1]), "two addresses share a key");
}
