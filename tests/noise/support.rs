//! What the tests share: addresses, words to compute normals of, and the bounds of statistical checks.

use pace_kernels::noise::NoiseShape::{self, PerToken};
use pace_kernels::noise::{Generator, Key};

/// Where one row of noise (all channels) comes from.
#[derive(Debug, Clone, Copy)]
pub struct Address {
    pub seed: u64,
    pub step: u64,
    pub layer: u32,
    pub shape: NoiseShape,
    pub branch: u8,
    pub sample: u64,
    pub token: u32,
}

pub const ORIGIN: Address =
    Address { seed: 0, step: 0, layer: 0, shape: PerToken, branch: 0, sample: 0, token: 0 };

impl Address {
    pub fn key(&self) -> Key {
        Key::derive(self.seed, self.step, self.layer)
    }

    /// `z` of `channels` channels from `first_channel` on.
    pub fn z(&self, sigma: f32, first_channel: u32, channels: usize) -> Vec<f32> {
        let mut z = vec![f32::NAN; channels];
        let generator = Generator::new(self.key(), sigma, self.shape, self.sample).unwrap();
        generator.fill(self.branch, 0, self.token, first_channel, &mut z);
        z
    }

    /// `n` of channels `0..channels`, through the public `z = 1 + σ·n`: under σ = 2⁶⁴ the 1 vanishes (it is below
    /// 2⁻⁶⁴ after the division), so `n` comes back without `z`'s rounding.
    pub fn n(&self, channels: usize) -> Vec<f32> {
        const SCALE: f32 = (1u128 << 64) as f32;
        self.z(SCALE, 0, channels).into_iter().map(|z| z / SCALE).collect()
    }
}

/// A word stream for test inputs, unrelated to the generator under test (SplitMix64).
pub struct Words(pub u64);

impl Words {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) as u32
    }

    pub fn four(&mut self) -> [u32; 4] {
        std::array::from_fn(|_| self.next())
    }
}

pub fn bits<const N: usize>(values: [f32; N]) -> [u32; N] {
    values.map(f32::to_bits)
}

/// Words where a branch of the transform, an exponent, or a quadrant changes, with neighbours on both sides.
pub fn edge_words() -> Vec<u32> {
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

/// Words of Philox calls: every pair of edge words, then random ones, 2²⁰ in all.
pub fn calls() -> Vec<[u32; 4]> {
    let edges = edge_words();
    let mut calls: Vec<_> = edges.iter().flat_map(|&u| edges.iter().map(move |&v| [u, v, v, u])).collect();
    let mut random = Words(2);
    calls.resize_with(1 << 20, || random.four());
    calls
}

/// The false-alarm rate of each statistical check: an ideal generator fails a given one at most this often. There are
/// fewer than 2000 checks, so one would fail all of them together at most once in 500 000 tries.
pub const ALPHA: f64 = 1e-9;

/// Bound on a standardised mean, two-sided.
///
/// The normal tail beyond 6.5 is 8e-11 (both sides). Means of products and powers of normals approach it from above;
/// the first corrections multiply it by exp(z³·skew/(6√N) + z⁴·kurtosis/(24N)), which stays below 12 = ALPHA/8e-11
/// wherever it is used (worked out there).
pub const Z_MAX: f64 = 6.5;

/// The number of successes in `trials` independent tries of the given probability.
///
/// Chernoff's inequality, which holds for every number of trials: P(count is this far off) ≤ 2·exp(−trials·KL). Returns
/// the exponent, trials·KL.
pub fn check_count(what: &str, count: f64, trials: f64, probability: f64) -> f64 {
    let term = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a * (a / b).ln() };
    let rate = count / trials;
    let exponent = trials * (term(rate, probability) + term(1.0 - rate, 1.0 - probability));
    let expected = trials * probability;
    assert!(exponent <= (2.0 / ALPHA).ln(), "{what}: {count} of {trials}, expected {expected}");
    exponent
}
