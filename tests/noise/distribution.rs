//! The distribution of the normals: moments, Kolmogorov–Smirnov, χ² and tails.

use crate::support::*;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use rayon::prelude::*;
use std::f64::consts::PI;

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
