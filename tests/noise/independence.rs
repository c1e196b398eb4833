//! Draws at different addresses are independent, and keys are different.

use crate::support::*;
use pace_kernels::noise::Key;
use pace_kernels::noise::NoiseShape::PerSample;
use rayon::prelude::*;

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
