//! What a test found, and when that is a failure.

use statrs::distribution::{ChiSquared, ContinuousCDF, DiscreteCDF, Normal, Poisson};

/// Least probability that passes, of either tail: an ideal generator falls below in one of 5·10⁸ findings.
pub const LEAST: f64 = 1e-9;

/// A statistic and how probable it is under an ideal generator.
#[derive(Debug, Clone)]
pub struct Finding {
    pub test: String,
    /// Probability of a statistic as small as this, and of one as large.
    pub lower: f64,
    pub upper: f64,
    /// Whether `upper` is uniform in [0, 1] under an ideal generator. It is not where the statistic is a small number, or
    /// the probability a bound.
    pub uniform: bool,
}

impl Finding {
    /// Σ (observed − expected)²/expected over cells; cells with too few expected belong together beforehand.
    pub fn chi_squared(test: impl Into<String>, cells: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let (mut sum, mut count) = (0.0, 0);
        for (observed, expected) in cells {
            sum += (observed - expected).powi(2) / expected;
            count += 1;
        }
        Self::chi_squared_sum(test, sum, f64::from(count - 1))
    }

    pub fn chi_squared_sum(test: impl Into<String>, sum: f64, freedom: f64) -> Self {
        let law = ChiSquared::new(freedom).expect("degrees of freedom");
        Self { test: test.into(), lower: law.cdf(sum), upper: law.sf(sum), uniform: true }
    }

    /// A statistic that is standard normal.
    pub fn normal(test: impl Into<String>, z: f64) -> Self {
        let law = Normal::standard();
        Self { test: test.into(), lower: law.cdf(z), upper: law.sf(z), uniform: true }
    }

    /// The largest magnitude among `count` standard normals: Bonferroni's bound.
    pub fn largest(test: impl Into<String>, z: f64, count: usize) -> Self {
        let upper = (2.0 * count as f64 * Normal::standard().sf(z)).min(1.0);
        Self { test: test.into(), lower: 1.0, upper, uniform: false }
    }

    /// A number of rare events.
    pub fn poisson(test: impl Into<String>, count: u64, mean: f64) -> Self {
        let law = Poisson::new(mean).expect("a positive mean");
        let upper = if count == 0 { 1.0 } else { law.sf(count - 1) };
        Self { test: test.into(), lower: law.cdf(count), upper, uniform: false }
    }

    /// The probability of the tail that the statistic lies in.
    pub fn p(&self) -> f64 {
        // A statistic that is not a number fails.
        if self.lower.is_nan() || self.upper.is_nan() { 0.0 } else { self.lower.min(self.upper) }
    }

    pub fn fails(&self) -> bool {
        self.p() < LEAST
    }
}

/// Whether probabilities that should be uniform are, by Kolmogorov and Smirnov: `P(D > d) ≤ 2·exp(−2nd²)` (Dvoretzky,
/// Kiefer, Wolfowitz, Massart), near equality in the tail.
pub fn uniformity<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Finding {
    let mut p: Vec<_> = findings.into_iter().filter(|f| f.uniform).map(|f| f.upper).collect();
    p.sort_unstable_by(f64::total_cmp);
    let n = p.len() as f64;
    let distance =
        p.iter().enumerate().fold(0f64, |d, (i, p)| d.max(p - i as f64 / n).max((i + 1) as f64 / n - p));
    let upper = (2.0 * (-2.0 * n * distance * distance).exp()).min(1.0);
    Finding { test: format!("uniformity of {n} p-values"), lower: 1.0, upper, uniform: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `chi` standard deviations above the mean: near the normal tail where there are many degrees of freedom, by
    /// Wilson's and Hilferty's cube root.
    #[test]
    fn distribution_functions_hold_for_large_arguments() {
        for freedom in [32.0f64, 6000.0, 65535.0] {
            // The sum is not negative.
            let below = if freedom > 50.0 { -5.0 } else { -2.0 };
            for sigma in [below, 0.0, 3.0, 6.0] {
                let found = Finding::chi_squared_sum("", freedom + sigma * (2.0 * freedom).sqrt(), freedom);
                let scale = 2.0 / (9.0 * freedom);
                let cube = (1.0 + sigma * (2.0 / freedom).sqrt()).max(0.0).cbrt();
                let upper = Normal::standard().sf((cube - (1.0 - scale)) / scale.sqrt());
                let error = (found.upper.min(found.lower) / upper.min(1.0 - upper)).ln().abs();
                assert!(error < 0.15, "{freedom} {sigma}: {} {upper}", found.upper);
                assert!((found.lower + found.upper - 1.0).abs() < 1e-9);
            }
        }
        for mean in [8.0, 1e3, 1e6] {
            let found = Finding::poisson("", mean as u64, mean);
            assert!((found.lower + found.upper - 1.0) > 0.0 && (found.lower - 0.5).abs() < 0.1, "{found:?}");
        }
    }

    #[test]
    fn p_values_that_are_not_uniform_fail() {
        let findings = |power: f64| -> Vec<_> {
            (0..1000)
                .map(|i| {
                    Finding::normal(
                        "",
                        Normal::standard().inverse_cdf(((f64::from(i) + 0.5) / 1000.0).powf(power)),
                    )
                })
                .collect()
        };
        assert!(!uniformity(&findings(1.0)).fails());
        assert!(uniformity(&findings(1.5)).fails());
    }
}
