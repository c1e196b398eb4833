//! The training loss: cross-entropy plus consistency, with the gradient to the logits in the same pass.

use super::exp::exp;
use crate::error::{Error, Result};
use crate::real::Real;
use crate::shape::{length, nonzero, product};
use crate::vector::{Loop, widest};
use rayon::prelude::*;

/// Fewest logits of a branch in a task: less than 30 µs of work is not worth waking another thread for.
const MIN_WORK: usize = 1 << 14;

/// `total = cls + λ·pace` over raw logits (paper equation 11):
///
/// ```text
/// cls  = mean over samples with a label of CE(l0_i, label_i)        branch 0 only
/// pace = mean over all samples of Σ_c (l0_ic − m_ic)²               m: branch 1, or the remembered logits
/// ```
///
/// ```
/// use pace_kernels::cpu::{Consistency, Loss};
///
/// let loss = Loss { classes: 2, labels: &[1], lambda: 0.5, label_smoothing: 0.0, ignore_label: None };
/// let mut gradient = [0.0; 4];
/// let values = loss.evaluate(&[0.0f64, 0.0, 1.0, 2.0], Consistency::TwoBranch, Some(&mut gradient))?;
/// assert!((values.total - (2f64.ln() + 0.5 * 5.0)).abs() < 1e-12);
/// # Ok::<(), pace_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Loss<'a> {
    /// Number of classes `C`.
    pub classes: usize,
    /// One label per sample of a branch, `[B]`, in `0..C` or equal to `ignore_label`.
    pub labels: &'a [i64],
    /// Strength λ of the consistency term: finite, not negative.
    pub lambda: f64,
    /// Share of the target spread evenly over all classes, in `[0, 1]`.
    pub label_smoothing: f64,
    /// Samples with this label take no part in the cross-entropy (unlabelled data); they do in the consistency.
    pub ignore_label: Option<i64>,
}

/// What the logits of branch 0 are kept consistent with.
#[derive(Debug)]
pub enum Consistency<'a, T> {
    /// Nothing: plain cross-entropy over logits `[B, C]` (the lazy variant's full-batch iterations).
    None,
    /// The other branch: logits `[2B, C]`; the gradient flows into both.
    TwoBranch,
    /// PACE-fast: the logits `[B, C]` that the same training samples had last time. Read, then overwritten.
    History {
        /// `H [n, C]`, zeros at the start.
        table: &'a mut [T],
        /// The row of each sample, `[B]`; no row twice.
        index: &'a [i64],
    },
}

/// The values of a [`Loss`], accumulated in `f64`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossValues {
    /// `cls + λ·pace`.
    pub total: f64,
    /// Mean cross-entropy; zero when every sample is ignored.
    pub classification: f64,
    /// Mean squared distance of the branches (before λ); zero without a consistency term.
    pub consistency: f64,
}

impl Loss<'_> {
    fn check(&self) -> Result<()> {
        nonzero("classes", self.classes)?;
        nonzero("labels.len()", self.labels.len())?;
        check_lambda(self.lambda)?;
        check_label_smoothing(self.label_smoothing)?;
        for (position, &label) in self.labels.iter().enumerate() {
            if Some(label) != self.ignore_label && !in_range(label, self.classes) {
                return Err(Error::Label { position, label, classes: self.classes });
            }
        }
        Ok(())
    }

    /// Computes the loss of `logits` and, if wanted, its gradient (of the logits' shape; overwritten).
    ///
    /// On an error nothing is written, the history table included.
    ///
    /// # Errors
    /// If a size is zero, a slice has another length than its shape, λ or the smoothing is out of range, a label is
    /// out of range, or a history index is out of range or repeated.
    pub fn evaluate<T: Real>(
        &self,
        logits: &[T],
        consistency: Consistency<'_, T>,
        gradient: Option<&mut [T]>,
    ) -> Result<LossValues> {
        self.check()?;
        let (b, c) = (self.labels.len(), self.classes);
        let two = matches!(consistency, Consistency::TwoBranch);
        let (shape, rows) = if two { ("[2B, C]", 2 * b) } else { ("[B, C]", b) };
        length("logits", shape, logits, product("logits", shape, &[rows, c])?)?;
        if let Some(gradient) = &gradient {
            length("gradient", shape, gradient, rows * c)?;
        }
        if let Consistency::History { table, index } = &consistency {
            check_history(table, index, b, c)?;
        }
        let labelled = self.labels.iter().filter(|&&label| Some(label) != self.ignore_label).count();
        let (first, second) = logits.split_at(b * c);
        // The partner row of sample i, if there is a consistency term.
        let partner = |i: usize| match &consistency {
            Consistency::None => None,
            Consistency::TwoBranch => Some(&second[i * c..][..c]),
            Consistency::History { table, index } => Some(&table[index[i] as usize * c..][..c]),
        };
        let weights = Weights {
            labelled: 1.0 / labelled as f64,
            hard: 1.0 - self.label_smoothing,
            spread: self.label_smoothing / c as f64,
            pull: 2.0 * self.lambda / b as f64,
        };
        let row = |i: usize, g0: Option<&mut [T]>, g1: Option<&mut [T]>| {
            let label = self.labels[i];
            let label = (Some(label) != self.ignore_label).then_some(label as usize);
            let mut found = (0.0, 0.0);
            let (logits, partner) = (&first[i * c..][..c], partner(i));
            widest(Sample { logits, partner, label, weights, g0, g1, found: &mut found });
            found
        };
        let samples = MIN_WORK.div_ceil(c);
        let parts: Vec<(f64, f64)> = match gradient {
            None => (0..b).into_par_iter().with_min_len(samples).map(|i| row(i, None, None)).collect(),
            Some(gradient) => {
                let (g0, g1) = gradient.split_at_mut(b * c);
                let g0 = g0.par_chunks_mut(c).with_min_len(samples).enumerate();
                if two {
                    g0.zip(g1.par_chunks_mut(c)).map(|((i, g0), g1)| row(i, Some(g0), Some(g1))).collect()
                } else {
                    g0.map(|(i, g0)| row(i, Some(g0), None)).collect()
                }
            }
        };
        if let Consistency::History { table, index } = consistency {
            for (&at, logits) in index.iter().zip(logits.chunks(c)) {
                table[at as usize * c..][..c].copy_from_slice(logits);
            }
        }
        let sums = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        let classification = if labelled == 0 { 0.0 } else { sums.0 / labelled as f64 };
        let consistency = sums.1 / b as f64;
        Ok(LossValues { total: classification + self.lambda * consistency, classification, consistency })
    }
}

/// What samples weigh in the means.
#[derive(Clone, Copy)]
struct Weights {
    /// 1 / number of labelled samples.
    labelled: f64,
    /// Share of the target that the label has.
    hard: f64,
    /// Share of the target that every class has.
    spread: f64,
    /// `2λ/B`, of the gradient of a squared distance.
    pull: f64,
}

/// One sample: its logits, what they are compared with, and where gradients go.
struct Sample<'a, T> {
    logits: &'a [T],
    partner: Option<&'a [T]>,
    /// None: no part in the cross-entropy.
    label: Option<usize>,
    weights: Weights,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    /// Cross-entropy and squared distance.
    found: &'a mut (f64, f64),
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { logits, partner, label, weights, mut g0, g1, found } = self;
        let Weights { hard, spread, pull, .. } = weights;
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
            (scale, offset) = (weights.labelled / sum, spread * weights.labelled);
            let probability = exp(logits[label].to_f64() - max) / sum;
            of_label = Some((label, (probability - hard - spread) * weights.labelled));
        } else if let Some(g) = g0.as_deref_mut() {
            g.fill(T::zero());
        }
        let distance = match partner {
            None => 0.0,
            Some(partner) => total(fold([logits, partner], 0.0, |sum, [l, m]| sum + (l - m) * (l - m))),
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
                    *g = T::from_f64(g.to_f64() * scale - offset + pull * (l.to_f64() - m.to_f64()));
                }
            }
        }
        if let Some((label, of_label)) = of_label {
            let pulled = partner.map_or(0.0, |m| pull * (logits[label].to_f64() - m[label].to_f64()));
            g0[label] = T::from_f64(of_label + pulled);
        }
        if let (Some(g1), Some(partner)) = (g1, partner) {
            for ((g, l), m) in g1.iter_mut().zip(logits).zip(partner) {
                *g = T::from_f64(-pull * (l.to_f64() - m.to_f64()));
            }
        }
    }
}

/// Partial sums of a sum over a row: part i has every 16th element from i on. That fixes the order, whatever the vectors of a
/// processor.
const LANES: usize = 16;

/// `add` over the elements of rows of one length, for each lane by itself and from `start` on.
#[inline(always)]
fn fold<T: Real, const N: usize>(
    rows: [&[T]; N],
    start: f64,
    add: impl Fn(f64, [f64; N]) -> f64,
) -> [f64; LANES] {
    let mut lanes = [start; LANES];
    let chunks = rows.map(|row| row.as_chunks::<LANES>());
    for i in 0..chunks[0].0.len() {
        let chunk = chunks.map(|(whole, _)| &whole[i]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum = add(*sum, chunk.map(|chunk| chunk[lane].to_f64()));
        }
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(chunks[0].1.len()) {
        *sum = add(*sum, chunks.map(|(_, rest)| rest[lane].to_f64()));
    }
    lanes
}

/// All lanes in one number: the upper half to the lower half, until one is left.
#[inline(always)]
fn reduce(mut lanes: [f64; LANES], add: impl Fn(f64, f64) -> f64) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, &high) in low.iter_mut().zip(&*high) {
            *low = add(*low, high);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn total(lanes: [f64; LANES]) -> f64 {
    reduce(lanes, |a, b| a + b)
}

/// The greater number; NaN in `b` is passed over.
#[inline(always)]
fn greater(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
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

pub(crate) fn check_lambda(lambda: f64) -> Result<()> {
    if lambda.is_finite() && lambda >= 0.0 {
        Ok(())
    } else {
        Err(Error::Value { argument: "lambda", expected: "finite and not negative", got: lambda })
    }
}

pub(crate) fn check_label_smoothing(smoothing: f64) -> Result<()> {
    if (0.0..=1.0).contains(&smoothing) {
        Ok(())
    } else {
        Err(Error::Value { argument: "label_smoothing", expected: "in [0, 1]", got: smoothing })
    }
}

/// The rows of a history table of `len` elements.
pub(crate) fn history_rows(len: usize, classes: usize) -> Result<usize> {
    if len == 0 || !len.is_multiple_of(classes) {
        return Err(Error::Size {
            argument: "history.len()",
            expected: "a multiple of the number of classes, and not 0",
            got: len,
        });
    }
    Ok(len / classes)
}

fn in_range(index: i64, len: usize) -> bool {
    usize::try_from(index).is_ok_and(|index| index < len)
}

fn check_history<T>(table: &[T], index: &[i64], batch: usize, classes: usize) -> Result<()> {
    length("index", "[B]", index, batch)?;
    let rows = history_rows(table.len(), classes)?;
    let mut seen = std::collections::HashSet::with_capacity(batch);
    for (position, &at) in index.iter().enumerate() {
        if !in_range(at, rows) {
            return Err(Error::Index { position, index: at, rows });
        }
        if !seen.insert(at) {
            return Err(Error::DuplicateIndex { position, index: at });
        }
    }
    Ok(())
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
                let weights = Weights { labelled: 0.3, hard: 0.9, spread, pull: 0.7 };
                let run = |wide: bool| {
                    let (mut g0, mut g1, mut found) = (row(3), row(3), (0.0, 0.0));
                    let sample = Sample {
                        logits: &logits,
                        partner: Some(&partner),
                        label,
                        weights,
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
