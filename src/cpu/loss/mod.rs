//! The training loss: criterion plus consistency, with the gradient to the logits in the same pass.

mod general;
mod plain;
mod rows;
mod terms;

use crate::error::{Error, Result};
use crate::loss::{Divergence, LossSettings, Targets};
use crate::parallel;
use crate::real::Real;
use crate::shape::{length, nonzero, product};
use std::iter::repeat_with;

/// Fewest logits of a branch in a task: less than 30 µs of work is not worth waking another thread for.
const MIN_WORK: usize = 1 << 14;

/// A criterion and a consistency term over raw logits (paper equation 11, unless the settings say otherwise).
///
/// ```
/// use pace_kernels::cpu::{Consistency, Loss};
/// use pace_kernels::{LossSettings, Targets};
///
/// let settings = LossSettings::new(2, 0.5);
/// let loss = Loss { settings, targets: Targets::Labels(&[1]), class_weights: None };
/// let mut gradient = [0.0; 4];
/// let values = loss.evaluate(&[0.0f64, 0.0, 1.0, 2.0], Consistency::TwoBranch, Some(&mut gradient))?;
/// assert!((values.total - (2f64.ln() + 0.5 * 5.0)).abs() < 1e-12);
/// # Ok::<(), pace_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Loss<'a, T> {
    /// What it is made of.
    pub settings: LossSettings,
    /// What branch 0 is trained on, for `B` samples. Labels are in `0..C` or equal to the ignored one; probabilities are not
    /// negative.
    pub targets: Targets<&'a [i64], &'a [T]>,
    /// Weights of the classes in the cross-entropy, `[C]`, finite and not negative; `None`: all 1.
    pub class_weights: Option<&'a [T]>,
}

/// What the logits of branch 0 are kept consistent with.
#[derive(Debug)]
pub enum Consistency<'a, T> {
    /// Nothing: the criterion of logits `[B, C]` alone (the lazy variant's full-batch iterations).
    None,
    /// The other branch: logits `[2B, C]`; the gradient flows into both.
    TwoBranch,
    /// The other branch, given as the difference `l0 − l1` in the second half of the logits `[2B, C]`: what is computed exactly loses
    /// its digits in a difference of two rounded numbers. The gradient is to `l0` and `l1`.
    Difference,
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
    /// `criterion + λ·consistency`.
    pub total: f64,
    /// The criterion: a mean cross-entropy, zero when every sample is ignored, or a mean squared error.
    pub classification: f64,
    /// Mean divergence of the branches (before λ); zero without a consistency term.
    pub consistency: f64,
}

/// A share of nothing is nothing.
fn share(of: f64, denominator: f64) -> f64 {
    if denominator == 0.0 { 0.0 } else { of / denominator }
}

/// What a sample's terms weigh in the total.
#[derive(Clone, Copy)]
struct Weights {
    /// 1 / D.
    criterion: f64,
    /// `λ / D'`.
    consistency: f64,
}

/// What a sample is compared with.
#[derive(Clone, Copy)]
enum Partner<'a, T> {
    None,
    /// Logits.
    Logits(&'a [T]),
    /// How much smaller the other branch's logits are.
    Difference(&'a [T]),
}

/// What one sample is trained on.
#[derive(Clone, Copy)]
enum Target<'a, T> {
    /// No part in the criterion.
    None,
    Label(usize),
    Probabilities(&'a [T]),
    Values(&'a [T]),
}

impl<T: Real> Loss<'_, T> {
    /// Samples of the batch.
    fn batch(&self) -> Result<usize> {
        let classes = self.settings.classes;
        let (argument, len) = match self.targets {
            Targets::Labels(labels) => return nonzero("labels.len()", labels.len()).map(|()| labels.len()),
            Targets::Probabilities(all) => ("probabilities.len()", all.len()),
            Targets::Values(all) => ("values.len()", all.len()),
        };
        rows(argument, len, classes)
    }

    /// Checks settings and lengths, and gives the samples of the batch.
    pub(super) fn check_sizes(&self) -> Result<usize> {
        let Self { settings, targets, class_weights } = self;
        settings.check(targets, class_weights.is_some())?;
        if let Some(weights) = *class_weights {
            length("class_weights", "[C]", weights, settings.classes)?;
        }
        self.batch()
    }

    /// Checks what is in targets and weights; a caller looks at the other lengths first, which may show that those of targets are wrong.
    pub(super) fn check_contents(&self) -> Result<()> {
        let Self { settings, targets, class_weights } = self;
        if let Targets::Labels(labels) = *targets {
            for (position, &label) in labels.iter().enumerate() {
                if Some(label) != settings.ignore_label && !in_range(label, settings.classes) {
                    return Err(Error::Label { position, label, classes: settings.classes });
                }
            }
        }
        let none_below = |argument, values: &[T]| match values
            .iter()
            .map(|value| value.to_f64())
            .find(|value| !(value.is_finite() && *value >= 0.0))
        {
            Some(got) => Err(Error::Value { argument, expected: "finite and not negative", got }),
            None => Ok(()),
        };
        if let Targets::Probabilities(all) = *targets {
            none_below("probabilities", all)?;
        }
        if let Some(weights) = *class_weights {
            none_below("class_weights", weights)?;
        }
        Ok(())
    }

    /// What sample `i` is trained on.
    fn target(&self, i: usize) -> Target<'_, T> {
        let c = self.settings.classes;
        match self.targets {
            Targets::Labels(labels) if Some(labels[i]) == self.settings.ignore_label => Target::None,
            Targets::Labels(labels) => Target::Label(labels[i] as usize),
            Targets::Probabilities(all) => Target::Probabilities(&all[i * c..][..c]),
            Targets::Values(all) => Target::Values(&all[i * c..][..c]),
        }
    }

    /// The denominators `D` and `D'`, 0 if nothing takes part.
    pub(super) fn denominators(&self, batch: usize) -> (f64, f64) {
        let labelled =
            || (0..batch).filter_map(|i| if let Target::Label(y) = self.target(i) { Some(y) } else { None });
        let (count, weight) = match (self.targets, self.class_weights) {
            (Targets::Labels(_), None) => (labelled().count() as f64, labelled().count() as f64),
            (Targets::Labels(_), Some(weights)) => {
                (labelled().count() as f64, labelled().map(|label| weights[label].to_f64()).sum())
            }
            _ => (batch as f64, batch as f64),
        };
        let taking_part = if self.settings.labelled_only { count } else { batch as f64 };
        match self.settings.denominator {
            Some(denominator) => (denominator, denominator),
            None => (weight, taking_part),
        }
    }

    /// Computes the loss of `logits` and, if wanted, its gradient (of the logits' shape; overwritten).
    ///
    /// On an error nothing is written, the history table included.
    ///
    /// # Errors
    /// If a size is zero, a slice has another length than its shape, a setting is out of range or has no meaning for the targets, a
    /// label, probability or weight is out of range, or a history index is out of range or repeated.
    #[inline(never)]
    pub fn evaluate(
        &self,
        logits: &[T],
        consistency: Consistency<'_, T>,
        gradient: Option<&mut [T]>,
    ) -> Result<LossValues> {
        let b = self.check_sizes()?;
        let c = self.settings.classes;
        self.settings.check_history(matches!(consistency, Consistency::History { .. }))?;
        let two = matches!(consistency, Consistency::TwoBranch | Consistency::Difference);
        let (shape, rows) = if two { ("[2B, C]", 2 * b) } else { ("[B, C]", b) };
        length("logits", shape, logits, product("logits", shape, &[rows, c])?)?;
        if let Some(gradient) = &gradient {
            length("gradient", shape, gradient, rows * c)?;
        }
        self.check_contents()?;
        if let Consistency::History { table, index } = &consistency {
            check_history(table, index, b, c)?;
        }
        let denominators = self.denominators(b);
        let sums = self.sums(logits, &consistency, gradient, denominators);
        if let Consistency::History { table, index } = consistency {
            for (&at, logits) in index.iter().zip(logits.chunks(c)) {
                table[at as usize * c..][..c].copy_from_slice(logits);
            }
        }
        Ok(self.values(sums, denominators))
    }

    /// The values of sums.
    pub(super) fn values(&self, sums: (f64, f64), denominators: (f64, f64)) -> LossValues {
        let (classification, consistency) = (share(sums.0, denominators.0), share(sums.1, denominators.1));
        let total = classification + self.settings.lambda * consistency;
        LossValues { total, classification, consistency }
    }

    /// The sums of the criterion and of the divergence over samples, and the gradient of the total with these denominators. Arguments
    /// have been checked.
    pub(super) fn sums(
        &self,
        logits: &[T],
        consistency: &Consistency<'_, T>,
        gradient: Option<&mut [T]>,
        (of_criterion, of_consistency): (f64, f64),
    ) -> (f64, f64) {
        let c = self.settings.classes;
        let two = matches!(consistency, Consistency::TwoBranch | Consistency::Difference);
        let b = logits.len() / c / if two { 2 } else { 1 };
        let (first, second) = logits.split_at(b * c);
        let of_row = |i: usize, target: &Target<'_, T>| match consistency {
            _ if self.settings.labelled_only && matches!(target, Target::None) => Partner::None,
            Consistency::None => Partner::None,
            Consistency::TwoBranch => Partner::Logits(&second[i * c..][..c]),
            Consistency::Difference => Partner::Difference(&second[i * c..][..c]),
            Consistency::History { table, index } => Partner::Logits(&table[index[i] as usize * c..][..c]),
        };
        let weights = Weights {
            criterion: share(1.0, of_criterion),
            consistency: share(self.settings.lambda, of_consistency),
        };
        let general = general::General::new(self, weights, two);
        let row = |i: usize, g0: Option<&mut [T]>, g1: Option<&mut [T]>| {
            let target = self.target(i);
            let (l0, partner) = (&first[i * c..][..c], of_row(i, &target));
            match self.plain(partner, target) {
                Some((partner, label)) => {
                    plain::evaluate(&self.settings, l0, partner, label, weights, g0, g1)
                }
                None => general.evaluate(l0, partner, target, g0, g1),
            }
        };
        let samples = MIN_WORK.div_ceil(c);
        let (g0, g1) = gradient.map(|gradient| gradient.split_at_mut(b * c)).unzip();
        let mut parts = vec![(0.0, 0.0); b];
        let tasks = parts
            .chunks_mut(samples)
            .zip(parts_of(g0, samples * c))
            .zip(parts_of(g1, samples * c))
            .enumerate();
        parallel::for_each(tasks, |(i, ((parts, g0), g1))| {
            let rows = parts.iter_mut().zip(parts_of(g0, c)).zip(parts_of(g1, c));
            for (at, ((part, g0), g1)) in rows.enumerate() {
                *part = row(i * samples + at, g0, g1);
            }
        });
        parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1))
    }

    /// The partner's logits and the label of a sample that is simple enough for `plain`.
    fn plain<'b>(
        &self,
        partner: Partner<'b, T>,
        target: Target<'_, T>,
    ) -> Option<(Option<&'b [T]>, Option<usize>)> {
        let divergence = self.settings.divergence;
        if !matches!(divergence, Divergence::SquaredDifference | Divergence::MeanSquaredDifference)
            || self.settings.both_branches
            || self.class_weights.is_some()
        {
            return None;
        }
        let partner = match partner {
            Partner::None => None,
            Partner::Logits(logits) => Some(logits),
            Partner::Difference(_) => return None,
        };
        match target {
            Target::None => Some((partner, None)),
            Target::Label(label) => Some((partner, Some(label))),
            Target::Probabilities(_) | Target::Values(_) => None,
        }
    }
}

/// Parts of `size` elements of what may be missing; then its parts are as well.
fn parts_of<T>(all: Option<&mut [T]>, size: usize) -> impl Iterator<Item = Option<&mut [T]>> {
    all.into_iter().flat_map(move |all| all.chunks_mut(size)).map(Some).chain(repeat_with(|| None))
}

/// The rows of a tensor of `len` elements.
pub(crate) fn rows(argument: &'static str, len: usize, classes: usize) -> Result<usize> {
    if len == 0 || !len.is_multiple_of(classes) {
        return Err(Error::Size {
            argument,
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
    let rows = rows("history.len()", table.len(), classes)?;
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
