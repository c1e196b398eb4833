//! The training loss: cross-entropy plus consistency, with the gradient to the logits in the same pass.

use crate::error::{Error, Result};
use crate::real::Real;
use crate::shape::{length, nonzero, product};
use rayon::prelude::*;

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
        let row = |i: usize, g0: Option<&mut [T]>, g1: Option<&mut [T]>| {
            self.sample(i, &first[i * c..][..c], partner(i), labelled, g0, g1)
        };
        let parts: Vec<(f64, f64)> = match gradient {
            None => (0..b).into_par_iter().map(|i| row(i, None, None)).collect(),
            Some(gradient) => {
                let (g0, g1) = gradient.split_at_mut(b * c);
                let g0 = g0.par_chunks_mut(c).enumerate();
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

    /// Cross-entropy and squared distance of one sample, and the gradients of the mean losses.
    fn sample<T: Real>(
        &self,
        i: usize,
        logits: &[T],
        partner: Option<&[T]>,
        labelled: usize,
        mut g0: Option<&mut [T]>,
        g1: Option<&mut [T]>,
    ) -> (f64, f64) {
        let label = self.labels[i];
        let mut cross_entropy = 0.0;
        if Some(label) == self.ignore_label {
            if let Some(g) = g0.as_deref_mut() {
                g.fill(T::zero());
            }
        } else {
            let spread = self.label_smoothing / self.classes as f64;
            let max = logits.iter().fold(f64::NEG_INFINITY, |max, l| max.max(l.to_f64()));
            let sum: f64 = logits.iter().map(|l| (l.to_f64() - max).exp()).sum();
            let log_sum = max + sum.ln();
            let own = log_sum - logits[label as usize].to_f64();
            cross_entropy = if spread == 0.0 {
                own
            } else {
                let all: f64 = logits.iter().map(|l| log_sum - l.to_f64()).sum();
                (1.0 - self.label_smoothing) * own + spread * all
            };
            if let Some(g) = g0.as_deref_mut() {
                let scale = 1.0 / labelled as f64;
                for (class, (g, l)) in g.iter_mut().zip(logits).enumerate() {
                    let probability = (l.to_f64() - log_sum).exp();
                    let hard = if class == label as usize { 1.0 - self.label_smoothing } else { 0.0 };
                    *g = T::from_f64((probability - hard - spread) * scale);
                }
            }
        }
        let Some(partner) = partner else { return (cross_entropy, 0.0) };
        let difference = |c: usize| logits[c].to_f64() - partner[c].to_f64();
        let distance = (0..logits.len()).map(|c| difference(c) * difference(c)).sum();
        let scale = 2.0 * self.lambda / self.labels.len() as f64;
        if let Some(g) = g0 {
            for (c, g) in g.iter_mut().enumerate() {
                *g = T::from_f64(g.to_f64() + scale * difference(c));
            }
        }
        if let Some(g) = g1 {
            for (c, g) in g.iter_mut().enumerate() {
                *g = T::from_f64(-scale * difference(c));
            }
        }
        (cross_entropy, distance)
    }
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
