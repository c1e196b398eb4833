//! One sample of any loss, in `f64`.

use super::plain::{difference, fold, greater, reduce, total};
use super::{Loss, Partner, Target, Weights};
use crate::cpu::exp::exp;
use crate::loss::Divergence;
use crate::real::Real;
use crate::vector::{Loop, widest};

/// What all samples of a batch have in common.
pub(super) struct General<'a, T> {
    loss: &'a Loss<'a, T>,
    weights: Weights,
    /// Share of the criterion that each branch has which takes part in it.
    share: f64,
    /// `Σ_c w_c / C`.
    mean_weight: f64,
}

/// Rows of `f64` that are used for one sample after the other.
#[derive(Default)]
pub(super) struct Scratch {
    rows: Vec<f64>,
}

/// A softmax: `p_c = e_c / sum`, `log p_c = (l_c − max)·scale − log sum`, with `e_c = exp((l_c − max)·scale)` in the row beside it.
#[derive(Clone, Copy)]
struct Softmax {
    max: f64,
    sum: f64,
}

impl<'a, T: Real> General<'a, T> {
    pub(super) fn new(loss: &'a Loss<'a, T>, weights: Weights, two: bool) -> Self {
        let share = if two && loss.settings.both_branches { 0.5 } else { 1.0 };
        let mean_weight = match loss.class_weights {
            None => 1.0,
            Some(all) => all.iter().map(|weight| weight.to_f64()).sum::<f64>() / all.len() as f64,
        };
        Self { loss, weights, share, mean_weight }
    }

    /// Criterion and divergence of a sample.
    pub(super) fn evaluate(
        &self,
        scratch: &mut Scratch,
        logits: &[T],
        partner: Partner<'_, T>,
        target: Target<'_, T>,
        g0: Option<&mut [T]>,
        g1: Option<&mut [T]>,
    ) -> (f64, f64) {
        let mut found = (0.0, 0.0);
        let classes = logits.len();
        scratch.rows.resize(8 * classes, 0.0);
        widest(Sample {
            general: self,
            rows: &mut scratch.rows,
            logits,
            partner,
            target,
            g0,
            g1,
            found: &mut found,
        });
        found
    }
}

struct Sample<'a, T> {
    general: &'a General<'a, T>,
    rows: &'a mut [f64],
    logits: &'a [T],
    partner: Partner<'a, T>,
    target: Target<'a, T>,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    found: &'a mut (f64, f64),
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { general, rows, logits, partner, target, g0, g1, found } = self;
        let mut rows = rows.chunks_exact_mut(logits.len());
        let mut row = || rows.next().expect("there are eight rows");
        let (l0, l1, delta) = (row(), row(), row());
        let (e0, e1, of_target) = (row(), row(), row());
        let mut gradients = [row(), row()];
        gradients.iter_mut().for_each(|row| row.fill(0.0));

        for (l0, l) in l0.iter_mut().zip(logits) {
            *l0 = l.to_f64();
        }
        let has_partner = !matches!(partner, Partner::None);
        match partner {
            Partner::None => {}
            Partner::Logits(other) => {
                for (((l1, delta), &l0), m) in l1.iter_mut().zip(&mut *delta).zip(&*l0).zip(other) {
                    *l1 = m.to_f64();
                    *delta = difference(l0, *l1);
                }
            }
            Partner::Difference(less) => {
                for (((l1, delta), &l0), d) in l1.iter_mut().zip(&mut *delta).zip(&*l0).zip(less) {
                    *delta = d.to_f64();
                    *l1 = l0 - *delta;
                }
            }
        }

        // The criterion of each branch that takes part in it.
        let both = general.share < 1.0 && has_partner;
        let share = if both { general.share } else { 1.0 };
        let Weights { criterion, consistency } = general.weights;
        for (i, logits) in [&*l0, &*l1].into_iter().enumerate().take(if both { 2 } else { 1 }) {
            found.0 +=
                share * general.criterion(logits, target, e0, of_target, share * criterion, gradients[i]);
        }
        if has_partner {
            let divergence = general.loss.settings.divergence;
            found.1 = diverge(divergence, l0, l1, delta, [e0, e1, of_target], consistency, &mut gradients);
        }
        for (gradient, found) in [g0, g1].into_iter().zip(&gradients) {
            let Some(gradient) = gradient else { continue };
            for (g, &found) in gradient.iter_mut().zip(&**found) {
                *g = T::from_f64(found);
            }
        }
    }
}

impl<T: Real> General<'_, T> {
    /// The criterion of one branch; adds `factor` times its gradient. `e` and `of_target` are scratch.
    #[inline(always)]
    fn criterion(
        &self,
        logits: &[f64],
        target: Target<'_, T>,
        e: &mut [f64],
        of_target: &mut [f64],
        factor: f64,
        gradient: &mut [f64],
    ) -> f64 {
        let classes = logits.len() as f64;
        let smoothing = self.loss.settings.label_smoothing;
        let weight = |c: usize| self.loss.class_weights.map_or(1.0, |all| all[c].to_f64());
        match target {
            Target::None => return 0.0,
            Target::Values(values) => {
                let mut sum = 0.0;
                for ((g, &l), v) in gradient.iter_mut().zip(logits).zip(values) {
                    let error = l - v.to_f64();
                    sum += error * error;
                    *g += factor * 2.0 / classes * error;
                }
                return sum / classes;
            }
            Target::Label(label) => {
                for (c, t) in of_target.iter_mut().enumerate() {
                    *t = if smoothing == 0.0 { 0.0 } else { smoothing / classes * weight(c) };
                }
                of_target[label] += (1.0 - smoothing) * weight(label);
            }
            Target::Probabilities(all) => {
                for (c, (t, p)) in of_target.iter_mut().zip(all).enumerate() {
                    *t = weight(c) * ((1.0 - smoothing) * p.to_f64() + smoothing / classes);
                }
            }
        }
        let softmax = softmax(logits, 1.0, e);
        let log_sum = softmax.max + softmax.sum.ln();
        // Targets of zero are no terms: what they would be a share of may be infinite.
        let terms = fold([&*of_target, logits], 0.0, |sum, [t, l]| {
            sum + if t == 0.0 { 0.0 } else { t * (log_sum - l) }
        });
        let all = match target {
            Target::Label(label) => (1.0 - smoothing) * weight(label) + smoothing * self.mean_weight,
            _ => total(fold([&*of_target], 0.0, |sum, [t]| sum + t)),
        };
        let scale = all / softmax.sum;
        for ((g, &e), &t) in gradient.iter_mut().zip(&*e).zip(&*of_target) {
            *g += factor * (scale * e - t);
        }
        total(terms)
    }
}

/// `exp((l − max)·scale)` in `e`.
#[inline(always)]
fn softmax(logits: &[f64], scale: f64, e: &mut [f64]) -> Softmax {
    let max = reduce(fold([logits], f64::NEG_INFINITY, |max, [l]| greater(max, l)), greater);
    for (e, &l) in e.iter_mut().zip(logits) {
        *e = exp((l - max) * scale);
    }
    let sum = total(fold([&*e], 0.0, |sum, [e]| sum + e));
    Softmax { max, sum }
}

/// `p·x`, nothing without probability: there `x` may be infinite.
#[inline(always)]
fn share(p: f64, x: f64) -> f64 {
    if p == 0.0 { 0.0 } else { p * x }
}

/// `log(1 + e^x)`.
#[inline(always)]
fn softplus(x: f64) -> f64 {
    x.max(0.0) + exp(-x.abs()).ln_1p()
}

/// Adds `factor` times what the functions give to each element.
#[inline(always)]
fn add([g0, g1]: &mut [&mut [f64]; 2], factor: f64, d0: impl Fn(usize) -> f64, d1: impl Fn(usize) -> f64) {
    for (c, (g0, g1)) in g0.iter_mut().zip(&mut **g1).enumerate() {
        *g0 += factor * d0(c);
        *g1 += factor * d1(c);
    }
}

/// The divergence of two branches; adds `factor` times its gradients. The other rows are scratch, `delta` is used up.
#[inline(always)]
fn diverge(
    divergence: Divergence,
    l0: &[f64],
    l1: &[f64],
    delta: &mut [f64],
    [e0, e1, spare]: [&mut [f64]; 3],
    factor: f64,
    gradients: &mut [&mut [f64]; 2],
) -> f64 {
    let classes = l0.len() as f64;
    let squares = |delta: &[f64]| total(fold([delta], 0.0, |sum, [d]| sum + d * d));
    // The softmaxes of both branches, in `e0` and `e1`, and log p_c/q_c in `delta`.
    let compare = |delta: &mut [f64], e0: &mut [f64], e1: &mut [f64], scale: f64| {
        let (p, q) = (softmax(l0, scale, e0), softmax(l1, scale, e1));
        // Differences of maxima and of sums are exact where branches are close.
        let (shift, offset) = (p.max - q.max, p.sum.ln() - q.sum.ln());
        for (((e0, e1), d), (&l0, &l1)) in e0.iter_mut().zip(&mut *e1).zip(&mut *delta).zip(l0.iter().zip(l1))
        {
            *e0 /= p.sum;
            *e1 /= q.sum;
            // What is masked in both has no probability in either.
            *d = if l0 == f64::NEG_INFINITY && l1 == l0 { 0.0 } else { (*d - shift) * scale - offset };
        }
    };
    match divergence {
        Divergence::SquaredDifference | Divergence::MeanSquaredDifference => {
            let mean = matches!(divergence, Divergence::MeanSquaredDifference);
            let scale = if mean { 1.0 / classes } else { 1.0 };
            add(gradients, 2.0 * factor * scale, |c| delta[c], |c| -delta[c]);
            scale * squares(delta)
        }
        Divergence::CenteredSquaredDifference => {
            let mean = total(fold([&*delta], 0.0, |sum, [d]| sum + d)) / classes;
            delta.iter_mut().for_each(|d| *d -= mean);
            add(gradients, 2.0 * factor, |c| delta[c], |c| -delta[c]);
            squares(delta)
        }
        Divergence::SymmetricKl => {
            compare(delta, e0, e1, 1.0);
            let (p, q, ratio) = (&*e0, &*e1, &*delta);
            let of_p = total(fold([p, ratio], 0.0, |sum, [p, r]| sum + share(p, r)));
            let of_q = total(fold([q, ratio], 0.0, |sum, [q, r]| sum + share(q, r)));
            add(
                gradients,
                0.5 * factor,
                |c| share(p[c], ratio[c] - of_p) + p[c] - q[c],
                |c| share(q[c], of_q - ratio[c]) + q[c] - p[c],
            );
            0.5 * total(fold([p, q, ratio], 0.0, |sum, [p, q, r]| sum + share(p - q, r)))
        }
        Divergence::Kl { temperature, detach_target } => {
            compare(delta, e0, e1, 1.0 / temperature);
            let (p, q, ratio) = (&*e0, &*e1, &*delta);
            let divergence = total(fold([q, ratio], 0.0, |sum, [q, r]| sum - share(q, r)));
            let of_target = |c: usize| if detach_target { 0.0 } else { share(q[c], -ratio[c] - divergence) };
            add(gradients, temperature * factor, |c| p[c] - q[c], of_target);
            temperature * temperature * divergence
        }
        Divergence::JensenShannon => {
            compare(delta, e0, e1, 1.0);
            for (v, u) in delta.iter_mut().zip(&mut *spare) {
                let ratio = *v;
                (*u, *v) =
                    (std::f64::consts::LN_2 - softplus(-ratio), std::f64::consts::LN_2 - softplus(ratio));
            }
            // log p/m and log q/m.
            let (p, q, u, v) = (&*e0, &*e1, &*spare, &*delta);
            let [of_p, of_q] =
                [(p, u), (q, v)].map(|(p, u)| total(fold([p, u], 0.0, |sum, [p, u]| sum + share(p, u))));
            add(gradients, 0.5 * factor, |c| share(p[c], u[c] - of_p), |c| share(q[c], v[c] - of_q));
            0.5 * (of_p + of_q)
        }
    }
}
