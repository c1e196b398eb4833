//! Multiplicative Gaussian noise as a pure function.
//!
//! PACE multiplies adapter features by `z = 1 + σ·n`, `n ~ N(0, 1)` (paper section 3.3, equation 8). Here
//! `z` is a function of *where* it is used, never of how the work is split:
//!
//! ```text
//! z = noise(key(seed, step, layer), branch, global sample, token, channel, σ)
//! ```
//!
//! A counter-based generator (Philox4x32-10, Salmon et al. 2011) makes 128 random bits from the address, and a
//! Box–Muller transform whose logarithm, sine and cosine are fixed polynomials in fused multiply-adds turns them
//! into four normals. Only operations that IEEE 754 rounds in exactly one way are used, so every machine
//! computes the same bits, and a batch that is split over processes draws what the whole batch would draw.
//! `docs/noise.md` in the repository is the specification, for other implementations.

use crate::error::{Error, Result};
use crate::real::Real;
use crate::vector::{Loop, widest};
use std::convert::Infallible;

/// One call of Philox4x32-10: ten rounds over a 128-bit `counter` under a 64-bit `key`.
///
/// Agrees with the known answers of Random123.
///
/// ```
/// use pace_kernels::noise::philox4x32_10;
/// assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
/// ```
#[inline(always)]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for round in 0..10 {
        if round > 0 {
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
    }
    [c0, c1, c2, c3]
}

/// `log1p(f) = f + f²·(−½ + f·Q(f))` for `f` in `[√½ − 1, √2 − 1]`; minimax, relative error below 9.3e-10
/// with these coefficients in exact arithmetic.
const LOG_Q: [f32; 9] = [
    f32::from_bits(0x3eaa_aaa3),
    f32::from_bits(0xbe7f_fff7),
    f32::from_bits(0x3e4c_d2a3),
    f32::from_bits(0xbe2a_b172),
    f32::from_bits(0x3e11_9960),
    f32::from_bits(0xbdfd_a190),
    f32::from_bits(0x3df3_2844),
    f32::from_bits(0xbdf1_74f0),
    f32::from_bits(0x3d8d_a198),
];
/// ln 2 in two parts.
const LN2_HI: f32 = f32::from_bits(0x3f31_7218);
const LN2_LO: f32 = f32::from_bits(0xb102_e308);
/// ⌈2³²·√½⌉: from here on a normalised word is read as a value just below 1, not just above ½.
const SQRT_HALF: u32 = 0xB504_F334;
/// `sin(2πx) = x·TAU_HI + x·S(x²)` for `|x| ≤ ⅛`; minimax, error below 1.9e-9 with these coefficients in exact
/// arithmetic.
const SIN_S: [f32; 4] =
    [TAU_LO, f32::from_bits(0xc225_5ddd), f32::from_bits(0x42a3_2f2a), f32::from_bits(0xc296_c002)];
/// 2π in two parts.
const TAU_HI: f32 = f32::from_bits(0x40c9_0fdb);
const TAU_LO: f32 = f32::from_bits(0xb43b_bd2e);
/// `cos(2πx) = 1 + x²·C(x²)` for `|x| ≤ ⅛`; minimax, error below 4.1e-10 with these coefficients in exact
/// arithmetic.
const COS_C: [f32; 4] = [
    f32::from_bits(0xc19d_e9e6),
    f32::from_bits(0x4281_e0d7),
    f32::from_bits(0xc2aa_d8a3),
    f32::from_bits(0x426a_3ead),
];
/// 2⁻³¹ and 2⁻³².
const TWO_M31: f32 = f32::from_bits(0x3000_0000);
const TWO_M32: f32 = f32::from_bits(0x2f80_0000);

/// Horner's rule in fused multiply-adds, lowest coefficient first.
#[inline(always)]
fn horner<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for &c in coefficients[..N - 1].iter().rev() {
        sum = sum.mul_add(x, c);
    }
    sum
}

/// The polar radius `√(−2·ln u)` with `u = (word + 1)/2³²`, which lies in (0, 1].
#[inline(always)]
fn radius(word: u32) -> f32 {
    // u = m·2⁻ᵏ with m in [√½, √2); f = m − 1 is formed in integers, so it is exact up to one rounding and u near 1
    // keeps its relative precision. a = 0 stands for 2³² (u = 1), which the masked shift turns into k = 0, f = 0.
    let a = word.wrapping_add(1);
    let shift = a.leading_zeros() & 31;
    let b = a << shift;
    let below_one = b.wrapping_sub(1) >= SQRT_HALF - 1;
    let distance = if below_one { b.wrapping_neg() } else { b.wrapping_sub(0x8000_0000) };
    let scale = if below_one { -TWO_M32 } else { TWO_M31 };
    let k = (if below_one { shift } else { shift + 1 }) as f32;
    let f = distance as f32 * scale;
    let log_m = (f * f).mul_add(f.mul_add(horner(f, LOG_Q), -0.5), f);
    let minus_log = k.mul_add(LN2_HI, k.mul_add(LN2_LO, -log_m));
    (minus_log + minus_log).sqrt()
}

/// `(cos, sin)` of the angle `2π·⌊word/64⌋/2²⁶`.
#[inline(always)]
fn cos_sin(word: u32) -> (f32, f32) {
    let quadrant = word.wrapping_add(0x2000_0000) >> 30;
    // Turns from the nearest quarter turn: a multiple of 2⁻²⁶ of at most ⅛, so exact.
    let x = (word & !63).wrapping_sub(quadrant << 30) as i32 as f32 * TWO_M32;
    let square = x * x;
    let sin = x.mul_add(TAU_HI, x * horner(square, SIN_S));
    let cos = square.mul_add(horner(square, COS_C), 1.0);
    let (c, s) = if quadrant & 1 == 0 { (cos, sin) } else { (sin, cos) };
    // cos is negative in quadrants 1 and 2, sin in quadrants 2 and 3.
    let c = f32::from_bits(c.to_bits() ^ ((quadrant.wrapping_add(1) & 2) << 30));
    let s = f32::from_bits(s.to_bits() ^ ((quadrant & 2) << 30));
    (c, s)
}

/// Four standard normals from the four words of one Philox call (Box–Muller; two words make two normals).
///
/// The first word of a pair makes the radius, the upper 26 bits of the second one the angle. Within 9e-7 of the same
/// transform in exact arithmetic for every pair of words; never larger than 6.67 in magnitude.
#[inline(always)]
pub fn normals(words: [u32; 4]) -> [f32; 4] {
    let (r0, (c0, s0)) = (radius(words[0]), cos_sin(words[1]));
    let (r1, (c1, s1)) = (radius(words[2]), cos_sin(words[3]));
    [r0 * c0, r0 * s0, r1 * c1, r1 * s1]
}

/// Which stream of random numbers a layer uses at one training step.
///
/// Derived on the host; 64 bits, so that a kernel can also read it through a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub [u32; 2]);

impl Key {
    /// The key of layer `layer` at step `step` of the run seeded with `seed`.
    ///
    /// One Philox call under the seed, over a counter made of step, layer and a tag: for one seed, different
    /// (step, layer) give independent-looking keys.
    pub fn derive(seed: u64, step: u64, layer: u32) -> Self {
        const TAG: u32 = 0x5041_4345; // "PACE"
        let words =
            philox4x32_10([step as u32, (step >> 32) as u32, layer, TAG], [seed as u32, (seed >> 32) as u32]);
        Self([words[0], words[1]])
    }
}

/// The key as one number, first word in the low half: how a kernel reads it from device memory.
impl From<Key> for u64 {
    fn from(Key([low, high]): Key) -> Self {
        u64::from(high) << 32 | u64::from(low)
    }
}

/// Which elements share one draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoiseShape {
    /// `BC`: one draw per (sample, channel), shared by the sample's tokens; the official default.
    PerSample,
    /// `BTC`: one draw per (sample, token, channel).
    PerToken,
}

/// Samples are addressed by 56 bits.
const MAX_SAMPLES: u64 = 1 << 56;

/// Noise that a layer generates for itself: `z = 1 + σ·n`, addressed by branch, global sample, token and channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generator {
    key: Key,
    sigma: f32,
    shape: NoiseShape,
    first_sample: u64,
}

impl Generator {
    /// Noise of strength `sigma` for a batch whose sample 0 is number `first_sample` of the global batch.
    ///
    /// # Errors
    /// [`Error::Value`] if `sigma` is negative or not finite, or `first_sample` is 2⁵⁶ or more.
    pub fn new(key: Key, sigma: f32, shape: NoiseShape, first_sample: u64) -> Result<Self> {
        check_sigma(sigma.into())?;
        check_samples(first_sample, 1)?;
        Ok(Self { key, sigma, shape, first_sample })
    }

    /// The key.
    pub fn key(&self) -> Key {
        self.key
    }

    /// The standard deviation σ.
    pub fn sigma(&self) -> f32 {
        self.sigma
    }

    /// Which elements share one draw.
    pub fn shape(&self) -> NoiseShape {
        self.shape
    }

    /// Number of the batch's first sample in the global batch.
    pub fn first_sample(&self) -> u64 {
        self.first_sample
    }

    /// The counter of channel group 0 (channels 0…3) at an address; `token` is ignored for [`NoiseShape::PerSample`].
    fn counter(&self, branch: u8, sample: u64, token: u32) -> [u32; 4] {
        let sample = self.first_sample.wrapping_add(sample);
        let token = match self.shape {
            NoiseShape::PerSample => u32::MAX,
            NoiseShape::PerToken => token,
        };
        [0, token, sample as u32, (sample >> 32) as u32 & 0x00FF_FFFF | u32::from(branch) << 24]
    }

    /// Writes `z` of channels `first_channel..first_channel + out.len()` of one (branch, local sample, token).
    ///
    /// `token` is ignored for [`NoiseShape::PerSample`]. Any window of channels gives the same values as the whole row.
    /// Samples count modulo 2⁵⁶, which operators refuse to reach.
    #[inline(never)]
    pub fn fill<T: Real>(&self, branch: u8, sample: u64, token: u32, first_channel: u32, out: &mut [T]) {
        let counter = self.counter(branch, sample, token);
        widest(FillRow { counter, key: self.key.0, sigma: self.sigma, first_channel, out });
    }
}

pub(crate) fn check_sigma(sigma: f64) -> Result<()> {
    if sigma.is_finite() && sigma >= 0.0 {
        Ok(())
    } else {
        Err(Error::Value { argument: "sigma", expected: "finite and not negative", got: sigma })
    }
}

/// Philox calls that one pass of the inner loop makes side by side: a 512-bit vector of words.
const LANES: usize = 16;

/// Channels `first_channel..` of the row at `counter`.
struct FillRow<'a, T> {
    counter: [u32; 4],
    key: [u32; 2],
    sigma: f32,
    first_channel: u32,
    out: &'a mut [T],
}

impl<T: Real> Loop for FillRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        let [_, token, low, high] = self.counter;
        let mut group = self.first_channel / 4;
        let mut skip = (self.first_channel % 4) as usize;
        let mut rest = self.out;
        while !rest.is_empty() {
            let mut block = [[0f32; 4]; LANES];
            for (lane, z) in block.iter_mut().enumerate() {
                let words = philox4x32_10([group.wrapping_add(lane as u32), token, low, high], self.key);
                *z = normals(words).map(|n| self.sigma.mul_add(n, 1.0));
            }
            let flat = &block.as_flattened()[skip..];
            let n = flat.len().min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            for (out, &z) in now.iter_mut().zip(flat) {
                *out = T::from_f32(z);
            }
            rest = later;
            group = group.wrapping_add(LANES as u32);
            skip = 0;
        }
    }
}

/// Samples whose DropPath branch survives: `mask[i]` is 1 with probability `1 − drop_probability`, else 0.
///
/// Addressed like the noise (key, global sample), on a counter that no `z` uses; both branches share the mask.
///
/// # Errors
/// [`Error::Value`] if `drop_probability` is not in `[0, 1)`, or the samples reach 2⁵⁶.
pub fn drop_path_mask<T: Real>(
    key: Key,
    drop_probability: f64,
    first_sample: u64,
    mask: &mut [T],
) -> Result<()> {
    let threshold = keep_threshold(drop_probability)?;
    check_samples(first_sample, mask.len())?;
    for (sample, out) in (first_sample..).zip(mask) {
        let counter = [0, u32::MAX - 1, sample as u32, (sample >> 32) as u32];
        let word = philox4x32_10(counter, key.0)[0];
        *out = if u64::from(word) < threshold { T::one() } else { T::zero() };
    }
    Ok(())
}

/// A sample is kept when its 32-bit word is below this; 2³² (always) does not fit 32 bits.
pub(crate) fn keep_threshold(drop_probability: f64) -> Result<u64> {
    check_drop_probability(drop_probability)?;
    Ok(((1.0 - drop_probability) * (1u64 << 32) as f64).round() as u64)
}

pub(crate) fn check_drop_probability(p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        Ok(())
    } else {
        Err(Error::Value { argument: "drop_probability", expected: "in [0, 1)", got: p })
    }
}

pub(crate) fn check_samples(first_sample: u64, batch: usize) -> Result<()> {
    match first_sample.checked_add(batch as u64) {
        Some(end) if end <= MAX_SAMPLES => Ok(()),
        _ => Err(Error::Value {
            argument: "first_sample",
            expected: "at most 2^56 with the batch added",
            got: first_sample as f64,
        }),
    }
}

/// Where a layer's `z` comes from, on every device.
///
/// `Z` is a tensor of given values: a slice for the operators in [`cpu`](crate::cpu), device memory for those in `cuda`. `K` is a key
/// in device memory; the CPU has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Noise<Z, K = Infallible> {
    /// No noise, `z = 1`: evaluation, and layers with σ = 0.
    Off,
    /// Generated on the fly in the forward pass and again in the backward pass; never stored.
    Generated(Generator),
    /// The same with a key that is read when the kernel runs, instead of the generator's: one `u64` in device memory, made by
    /// `u64::from(key)`. A captured CUDA graph is replayed with fresh noise by changing it.
    Keyed {
        /// Strength, shape and addresses of the noise.
        generator: Generator,
        /// The key.
        key: K,
    },
    /// Given by the caller: `[R, N]` for [`NoiseShape::PerSample`], `[R, T, N]` for [`NoiseShape::PerToken`], where
    /// `R` is branches × batch.
    Given {
        /// The values, row-major.
        z: Z,
        /// Which elements share one value.
        shape: NoiseShape,
    },
}

impl<Z, K> Noise<Z, K> {
    /// Which elements share a `z`; `None` if there is no noise.
    pub fn shape(&self) -> Option<NoiseShape> {
        match self {
            Noise::Off => None,
            Noise::Generated(generator) | Noise::Keyed { generator, .. } => Some(generator.shape()),
            Noise::Given { shape, .. } => Some(*shape),
        }
    }
}
