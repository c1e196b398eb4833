//! One sample of the paper's loss: cross-entropy with a label, squared difference.

use super::Weights;
use super::rows::{LANES, difference, fold, greater, reduce, total};
use crate::cpu::exp::exp;
use crate::loss::{Divergence, LossSettings};
use crate::real::Real;
use crate::vector::{Loop, widest};

/// What the terms weigh in the total.
#[derive(Clone, Copy)]
struct Factors {
    /// Of the cross-entropy.
    criterion: f64,
    /// Share of the target that the label has.
    hard: f64,
    /// Share of the target that every class has.
    spread: f64,
    /// Of a squared difference in the distance.
    square: f64,
    /// Of a difference in the gradient.
    pull: f64,
}

/// One sample: its logits, what they are compared with, and where gradients go.
struct Sample<'a, T> {
    logits: &'a [T],
    partner: Option<&'a [T]>,
    /// None: no part in the cross-entropy.
    label: Option<usize>,
    factors: Factors,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    /// Cross-entropy and distance.
    found: &'a mut (f64, f64),
}

/// The cross-entropy of a sample and its distance from the other branch.
pub(super) fn evaluate<T: Real>(
    settings: &LossSettings,
    logits: &[T],
    partner: Option<&[T]>,
    label: Option<usize>,
    weights: Weights,
    g0: Option<&mut [T]>,
    g1: Option<&mut [T]>,
) -> (f64, f64) {
    let square = match settings.divergence {
        Divergence::MeanSquaredDifference => 1.0 / settings.classes as f64,
        _ => 1.0,
    };
    let factors = Factors {
        criterion: weights.criterion,
        hard: 1.0 - settings.label_smoothing,
        spread: settings.label_smoothing / settings.classes as f64,
        square,
        pull: 2.0 * weights.consistency * square,
    };
    let mut found = (0.0, 0.0);
    widest(Sample { logits, partner, label, factors, g0, g1, found: &mut found });
    found
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { logits, partner, label, factors, mut g0, g1, found } = self;
        let Factors { criterion, hard, spread, square, pull } = factors;
        let mut cross_entropy = 0.0;
        // The gradient of the cross-entropy is scale·e_c − offset, with e_c = exp(l_c − max) in `g0` by then: in f32 that is a
        // second rounding, which the label, whose terms cancel, is spared.
        let (mut scale, mut offset, mut of_label) = (0.0, 0.0, None);
        if let Some(label) = label {
            let max = reduce(fold([logits], f64::NEG_INFINITY, |max, [l]| greater(max, l)), greater);
            let sum = exponentials(logits, max, g0.as_deref_mut());
            let log_sum = max + sum.ln();
            let own = log_sum - logits[label].to_f64();
            cross_entropy = if spread == 0.0 {
                own
            } else {
                hard * own + spread * total(fold([logits], 0.0, |sum, [l]| sum + (log_sum - l)))
            };
            (scale, offset) = (criterion / sum, spread * criterion);
            let probability = exp(logits[label].to_f64() - max) / sum;
            of_label = Some((label, (probability - hard - spread) * criterion));
        } else if let Some(g) = g0.as_deref_mut() {
            g.fill(T::zero());
        }
        let distance = match partner {
            None => 0.0,
            Some(partner) => {
                square
                    * total(fold([logits, partner], 0.0, |sum, [l, m]| {
                        sum + difference(l, m) * difference(l, m)
                    }))
            }
        };
        *found = (cross_entropy, distance);

        let Some(g0) = g0 else { return };
        match partner {
            None => {
                for g in &mut *g0 {
                    *g = T::from_f64(g.to_f64() * scale - offset);
                }
            }
            Some(partner) => {
                for ((g, l), m) in g0.iter_mut().zip(logits).zip(partner) {
                    *g = T::from_f64(g.to_f64() * scale - offset + pull * difference(l.to_f64(), m.to_f64()));
                }
            }
        }
        if let Some((label, of_label)) = of_label {
            let pulled =
                partner.map_or(0.0, |m| pull * difference(logits[label].to_f64(), m[label].to_f64()));
            g0[label] = T::from_f64(of_label + pulled);
        }
        match (g1, partner) {
            (Some(g1), Some(partner)) => {
                for ((g, l), m) in g1.iter_mut().zip(logits).zip(partner) {
                    *g = T::from_f64(-pull * difference(l.to_f64(), m.to_f64()));
                }
            }
            (Some(g1), None) => g1.fill(T::zero()),
            (None, _) => {}
        }
    }
}

/// The sum of `exp(l − max)`, in `f64`; the terms go to `out`.
#[inline(always)]
fn exponentials<T: Real>(logits: &[T], max: f64, mut out: Option<&mut [T]>) -> f64 {
    let mut lanes = [0.0; LANES];
    let mut chunk = |logits: &[T; LANES]| {
        let mut values = [0.0; LANES];
        for ((value, l), sum) in values.iter_mut().zip(logits).zip(&mut lanes) {
            *value = exp(l.to_f64() - max);
            *sum += *value;
        }
        values.map(T::from_f64)
    };
    let (whole, rest) = logits.as_chunks::<LANES>();
    for (i, logits) in whole.iter().enumerate() {
        let values = chunk(logits);
        if let Some(out) = out.as_deref_mut() {
            out[i * LANES..][..LANES].copy_from_slice(&values);
        }
    }
    if !rest.is_empty() {
        let mut padded = [T::from_f32(f32::NEG_INFINITY); LANES];
        padded[..rest.len()].copy_from_slice(rest);
        let values = chunk(&padded);
        if let Some(out) = out {
            out[whole.len() * LANES..].copy_from_slice(&values[..rest.len()]);
        }
    }
    total(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The widest vectors of this processor give the bits of the plain loops, at lengths around the vectors'.
    #[test]
    fn bits_do_not_depend_on_vectors() {
        for classes in [1, 2, 15, 16, 17, 100] {
            let row = |seed: usize| -> Vec<f32> {
                (0..classes).map(|i| ((i * 37 + seed * 11) % 101) as f32 * 0.7 - 35.3).collect()
            };
            let (logits, partner) = (row(1), row(2));
            for (label, spread) in [(None, 0.0), (Some(classes / 2), 0.0), (Some(0), 0.01)] {
                let factors = Factors { criterion: 0.3, hard: 0.9, spread, square: 1.0, pull: 0.7 };
                let run = |wide: bool| {
                    let (mut g0, mut g1, mut found) = (row(3), row(3), (0.0, 0.0));
                    let sample = Sample {
                        logits: &logits,
                        partner: Some(&partner),
                        label,
                        factors,
                        g0: Some(&mut g0),
                        g1: Some(&mut g1),
                        found: &mut found,
                    };
                    if wide {
                        widest(sample)
                    } else {
                        sample.run()
                    }
                    let bits = |g: Vec<f32>| g.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    (bits(g0), bits(g1), found.0.to_bits(), found.1.to_bits())
                };
                assert_eq!(run(true), run(false), "{classes} {label:?} {spread}");
            }
        }
    }
}
