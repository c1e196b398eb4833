//! One sample of any loss, in `f64`. Rows are read in blocks that stay in the first cache: once for the maxima, once for the sums,
//! once more for sums that need those, and once for the gradient. Exponentials wait in the gradient, as in `plain`.

use super::plain::{LANES, difference, greater, reduce, total};
use super::{Loss, Partner, Target, Weights};
use crate::cpu::exp::{SMALL_EXPONENT, exp, small_exp_m1};
use crate::loss::{Divergence, LossSettings};
use crate::real::Real;
use crate::vector::{Loop, widest};
use std::f64::consts::LN_2;

/// Elements of a block.
const BLOCK: usize = 256;
type Block = [f64; BLOCK];
type Lanes = [f64; LANES];

/// What all samples of a batch have in common.
pub(super) struct General<'a, T> {
    loss: &'a Loss<'a, T>,
    weights: Weights,
    /// Share of the criterion that each branch has which takes part in it.
    share: f64,
    /// `Σ_c w_c / C`.
    mean_weight: f64,
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
        logits: &[T],
        partner: Partner<'_, T>,
        target: Target<'_, T>,
        g0: Option<&mut [T]>,
        g1: Option<&mut [T]>,
    ) -> (f64, f64) {
        let mut found = (0.0, 0.0);
        widest(Sample { general: self, logits, partner, target, g0, g1, found: &mut found });
        found
    }

    /// What the target gives to class `c`, and all classes together.
    #[inline(always)]
    fn targets(&self, target: Target<'_, T>, start: usize, block: &mut Block) {
        let LossSettings { classes, label_smoothing: smoothing, .. } = self.loss.settings;
        let len = BLOCK.min(classes - start);
        let spread = if smoothing == 0.0 { 0.0 } else { smoothing / classes as f64 };
        block.fill(0.0);
        match target {
            Target::None | Target::Values(_) => return,
            Target::Label(label) => {
                block[..len].fill(spread);
                if let Some(t) = block[..len].get_mut(label.wrapping_sub(start)) {
                    *t += 1.0 - smoothing;
                }
            }
            Target::Probabilities(all) => {
                for (t, p) in block.iter_mut().zip(&all[start..][..len]) {
                    *t = (1.0 - smoothing) * p.to_f64() + spread;
                }
            }
        }
        if let Some(all) = self.loss.class_weights {
            for (t, weight) in block.iter_mut().zip(&all[start..][..len]) {
                *t *= weight.to_f64();
            }
        }
    }
}

struct Sample<'a, T> {
    general: &'a General<'a, T>,
    logits: &'a [T],
    partner: Partner<'a, T>,
    target: Target<'a, T>,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    found: &'a mut (f64, f64),
}

/// Logits of both branches and their differences.
struct Logits {
    of: [Block; 2],
    delta: Block,
}

/// Sums over a row, in lanes.
#[derive(Clone, Copy)]
struct Sums {
    /// `Σ e` of each branch, for its criterion and for the divergence (with its temperature).
    criterion: [Lanes; 2],
    divergence: [Lanes; 2],
    /// `Σ t·(max − l)` of each branch, or `Σ (l − v)²`.
    below: [Lanes; 2],
    /// `Σ t`.
    targets: Lanes,
    /// `Σ e·Δ` of each branch.
    pulled: [Lanes; 2],
    /// `Σ Δ`, `Σ Δ²`.
    delta: Lanes,
    squares: Lanes,
}

/// `lanes[i] += f(i)` for all elements of a block.
#[inline(always)]
fn add(lanes: &mut Lanes, f: impl Fn(usize) -> f64) {
    for start in (0..BLOCK).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
}

/// `p·x`, nothing without probability: there `x` may be infinite.
#[inline(always)]
fn share(p: f64, x: f64) -> f64 {
    if p == 0.0 { 0.0 } else { p * x }
}

/// `log(1 + e^x)` and `log(1 + e^−x)`.
#[inline(always)]
fn softplus(x: f64) -> (f64, f64) {
    let rest = exp(-x.abs()).ln_1p();
    (x.max(0.0) + rest, (-x).max(0.0) + rest)
}

/// What is known of a row's softmaxes: `p_c = exp((l_c − max)·scale)·inverse`.
#[derive(Clone, Copy)]
struct Softmaxes {
    scale: f64,
    inverse: [f64; 2],
    /// `log p_c/q_c = (Δ_c − shift)·scale − offset`: differences of maxima and of sums are exact where branches are close.
    shift: f64,
    offset: f64,
}

impl Softmaxes {
    /// `log p_c/q_c`; 0 for what is masked in both branches, which has no probability in either.
    #[inline(always)]
    fn ratio(&self, logits: &Logits, i: usize) -> f64 {
        let masked = logits.of[0][i] == f64::NEG_INFINITY && logits.of[1][i] == f64::NEG_INFINITY;
        if masked { 0.0 } else { (logits.delta[i] - self.shift) * self.scale - self.offset }
    }
}

impl<T: Real> Sample<'_, T> {
    #[inline(always)]
    fn load(&self, start: usize, logits: &mut Logits) {
        let len = BLOCK.min(self.logits.len() - start);
        let Logits { of: [first, second], delta } = logits;
        // What there is not has no probability and no difference.
        if len < BLOCK {
            first.fill(f64::NEG_INFINITY);
            second.fill(f64::NEG_INFINITY);
            delta.fill(0.0);
        }
        let row = &self.logits[start..][..len];
        match self.partner {
            Partner::None => {
                for (a, l) in first.iter_mut().zip(row) {
                    *a = l.to_f64();
                }
            }
            Partner::Logits(other) => {
                let rows = row.iter().zip(&other[start..][..len]);
                for (((a, b), d), (l, m)) in first.iter_mut().zip(second).zip(delta).zip(rows) {
                    (*a, *b) = (l.to_f64(), m.to_f64());
                    *d = difference(*a, *b);
                }
            }
            Partner::Difference(less) => {
                let rows = row.iter().zip(&less[start..][..len]);
                for (((a, b), d), (l, m)) in first.iter_mut().zip(second).zip(delta).zip(rows) {
                    (*a, *d) = (l.to_f64(), m.to_f64());
                    *b = *a - *d;
                }
            }
        }
    }
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(mut self) {
        let LossSettings { classes, divergence, .. } = self.general.loss.settings;
        let (mut g0, mut g1) = (self.g0.take(), self.g1.take());
        let mut logits = Logits { of: [[0.0; BLOCK]; 2], delta: [0.0; BLOCK] };
        let mut targets = [0.0; BLOCK];
        let has_partner = !matches!(self.partner, Partner::None);
        let branches = if has_partner { 2 } else { 1 };
        // Which softmaxes are needed, and for how many branches there is a criterion.
        let both = self.general.share < 1.0 && has_partner;
        let trained = match self.target {
            Target::None => 0,
            _ if both => 2,
            _ => 1,
        };
        let is_cross_entropy = !matches!(self.target, Target::None | Target::Values(_));
        let compares = has_partner && divergence.is_of_probabilities();
        let scale = match divergence {
            Divergence::Kl { temperature, .. } if compares => 1.0 / temperature,
            _ => 1.0,
        };
        // One exponential serves both where they are the same.
        let is_shared = scale == 1.0;

        let mut max = [f64::NEG_INFINITY; 2];
        if is_cross_entropy || compares {
            let mut lanes = [[f64::NEG_INFINITY; LANES]; 2];
            for start in (0..classes).step_by(BLOCK) {
                self.load(start, &mut logits);
                for (lanes, block) in lanes.iter_mut().zip(&logits.of).take(branches) {
                    for i in (0..BLOCK).step_by(LANES) {
                        for (lane, max) in lanes.iter_mut().enumerate() {
                            *max = greater(*max, block[i + lane]);
                        }
                    }
                }
            }
            max = lanes.map(|lanes| reduce(lanes, greater));
        }

        const NONE: Lanes = [0.0; LANES];
        let mut sums = Sums {
            criterion: [NONE; 2],
            divergence: [NONE; 2],
            below: [NONE; 2],
            targets: NONE,
            pulled: [NONE; 2],
            delta: NONE,
            squares: NONE,
        };
        let mut e = [0.0; BLOCK];
        for start in (0..classes).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            self.load(start, &mut logits);
            if let Target::Values(values) = self.target {
                for (below, l) in sums.below.iter_mut().zip(&logits.of).take(trained) {
                    let values = &values[start..][..len];
                    add(below, |i| values.get(i).map_or(0.0, |v| (l[i] - v.to_f64()) * (l[i] - v.to_f64())));
                }
            }
            if is_cross_entropy {
                self.general.targets(self.target, start, &mut targets);
                add(&mut sums.targets, |i| targets[i]);
                for branch in 0..trained {
                    let (l, max) = (&logits.of[branch], max[branch]);
                    // Targets of zero are no terms: what they would be a share of may be infinite.
                    add(&mut sums.below[branch], |i| share(targets[i], max - l[i]));
                }
            }
            for branch in 0..branches {
                let (l, max) = (&logits.of[branch], max[branch]);
                let of_criterion = is_cross_entropy && branch < trained;
                if of_criterion || compares && is_shared {
                    for (e, l) in e.iter_mut().zip(l) {
                        *e = exp(l - max);
                    }
                    add(&mut sums.criterion[branch], |i| e[i]);
                }
                if compares && !is_shared {
                    for (e, l) in e.iter_mut().zip(l) {
                        *e = exp((l - max) * scale);
                    }
                }
                if compares {
                    add(&mut sums.divergence[branch], |i| e[i]);
                    add(&mut sums.pulled[branch], |i| share(e[i], logits.delta[i]));
                }
                if let (0, Some(g), _) | (1, _, Some(g)) = (branch, g0.as_deref_mut(), g1.as_deref_mut()) {
                    for (g, e) in g[start..][..len].iter_mut().zip(&e) {
                        *g = T::from_f64(*e);
                    }
                }
            }
            if has_partner && !compares {
                add(&mut sums.delta, |i| logits.delta[i]);
                add(&mut sums.squares, |i| logits.delta[i] * logits.delta[i]);
            }
        }

        // The criterion, and what its gradient is made of.
        let share_of_criterion = if both { self.general.share } else { 1.0 };
        let smoothing = self.general.loss.settings.label_smoothing;
        let all_targets = match self.target {
            Target::Label(label) => {
                let weight = self.general.loss.class_weights.map_or(1.0, |all| all[label].to_f64());
                (1.0 - smoothing) * weight + smoothing * self.general.mean_weight
            }
            _ => total(sums.targets),
        };
        let sum_of = |lanes: [Lanes; 2]| lanes.map(total);
        let (of_criterion, below) = (sum_of(sums.criterion), sum_of(sums.below));
        for branch in 0..trained {
            self.found.0 += share_of_criterion
                * match self.target {
                    Target::Values(_) => below[branch] / classes as f64,
                    _ => below[branch] + all_targets * of_criterion[branch].ln(),
                };
        }

        // The divergence.
        let of_divergence = sum_of(sums.divergence);
        let softmaxes = Softmaxes {
            scale,
            inverse: of_divergence.map(|sum| 1.0 / sum),
            shift: if compares { max[0] - max[1] } else { 0.0 },
            offset: of_divergence[0].ln() - of_divergence[1].ln(),
        };
        let pulled = sum_of(sums.pulled);
        // Means of log p/q under p and q.
        let means: [f64; 2] = std::array::from_fn(|i| {
            (pulled[i] * softmaxes.inverse[i] - softmaxes.shift) * scale - softmaxes.offset
        });
        let mean_delta = total(sums.delta) / classes as f64;
        // Sums that need the sums before.
        let mut later = [NONE; 2];
        let is_jensen_shannon = compares && divergence == Divergence::JensenShannon;
        let is_centered = has_partner && divergence == Divergence::CenteredSquaredDifference;
        if is_jensen_shannon || is_centered {
            for start in (0..classes).step_by(BLOCK) {
                let len = BLOCK.min(classes - start);
                self.load(start, &mut logits);
                if is_centered {
                    add(&mut later[0], |i| {
                        let far = if i < len { logits.delta[i] - mean_delta } else { 0.0 };
                        far * far
                    });
                    continue;
                }
                for i in 0..len {
                    let [p, q] =
                        std::array::from_fn(|k| exp(logits.of[k][i] - max[k]) * softmaxes.inverse[k]);
                    let (up, down) = softplus(softmaxes.ratio(&logits, i));
                    later[0][i % LANES] += share(p, LN_2 - down);
                    later[1][i % LANES] += share(q, LN_2 - up);
                }
            }
        }
        let later = later.map(total);
        if has_partner {
            self.found.1 = match divergence {
                Divergence::SquaredDifference => total(sums.squares),
                Divergence::MeanSquaredDifference => total(sums.squares) / classes as f64,
                Divergence::CenteredSquaredDifference => later[0],
                Divergence::SymmetricKl => 0.5 * (means[0] - means[1]),
                Divergence::Kl { temperature, .. } => -temperature * temperature * means[1],
                Divergence::JensenShannon => 0.5 * (later[0] + later[1]),
            };
        }

        let Some(g0) = g0 else { return };
        let Weights { criterion, consistency } = self.general.weights;
        let criterion = criterion * share_of_criterion;
        let mut gradients = [[0.0; BLOCK]; 2];
        for start in (0..classes).step_by(BLOCK) {
            let len = BLOCK.min(classes - start);
            self.load(start, &mut logits);
            // The exponentials that were left here.
            let mut e = [[0.0; BLOCK]; 2];
            for (e, g) in e[0].iter_mut().zip(&g0[start..][..len]) {
                *e = g.to_f64();
            }
            if let Some(g1) = &g1 {
                for (e, g) in e[1].iter_mut().zip(&g1[start..][..len]) {
                    *e = g.to_f64();
                }
            } else if compares {
                for (e, l) in e[1].iter_mut().zip(&logits.of[1]) {
                    *e = exp((l - max[1]) * scale);
                }
            }
            gradients.iter_mut().for_each(|block| block.fill(0.0));
            let [d0, d1] = &mut gradients;
            if compares {
                let [p, q] = softmaxes.inverse;
                let ratio = |i: usize| softmaxes.ratio(&logits, i);
                let at = |i: usize| (e[0][i] * p, e[1][i] * q, ratio(i));
                // Of close branches the difference has digits that exponentials in f32 have not.
                let differ = |p: f64, q: f64, ratio: f64| {
                    if ratio.abs() <= SMALL_EXPONENT { -p * small_exp_m1(-ratio) } else { p - q }
                };
                // A loop for each, so that what one calls does not keep another from being vectorised.
                match divergence {
                    Divergence::SymmetricKl => {
                        for i in 0..BLOCK {
                            let (p, q, ratio) = at(i);
                            let differ = differ(p, q, ratio);
                            d0[i] = consistency * 0.5 * (share(p, ratio - means[0]) + differ);
                            d1[i] = consistency * 0.5 * (share(q, means[1] - ratio) - differ);
                        }
                    }
                    Divergence::Kl { temperature, detach_target } => {
                        let pull = consistency * temperature;
                        for i in 0..BLOCK {
                            let (p, q, ratio) = at(i);
                            d0[i] = pull * differ(p, q, ratio);
                            d1[i] = pull * share(q, means[1] - ratio);
                        }
                        // No share of what may not be a number.
                        if detach_target {
                            d1.fill(0.0);
                        }
                    }
                    _ => {
                        for i in 0..BLOCK {
                            let (p, q, ratio) = at(i);
                            let (up, down) = softplus(ratio);
                            d0[i] = consistency * 0.5 * share(p, LN_2 - down - later[0]);
                            d1[i] = consistency * 0.5 * share(q, LN_2 - up - later[1]);
                        }
                    }
                }
            } else if has_partner {
                let factor = match divergence {
                    Divergence::MeanSquaredDifference => 2.0 * consistency / classes as f64,
                    _ => 2.0 * consistency,
                };
                let mean = if is_centered { mean_delta } else { 0.0 };
                for i in 0..BLOCK {
                    d0[i] = factor * (logits.delta[i] - mean);
                    d1[i] = -d0[i];
                }
            }
            if is_cross_entropy {
                self.general.targets(self.target, start, &mut targets);
            }
            for (branch, gradient) in gradients.iter_mut().enumerate().take(trained) {
                let l = &logits.of[branch];
                if let Target::Values(values) = self.target {
                    let factor = 2.0 * criterion / classes as f64;
                    for ((g, l), v) in gradient.iter_mut().zip(l).zip(&values[start..][..len]) {
                        *g += factor * (l - v.to_f64());
                    }
                    continue;
                }
                let scale = all_targets / of_criterion[branch];
                if compares && !is_shared {
                    for ((g, l), t) in gradient.iter_mut().zip(l).zip(&targets) {
                        *g += criterion * (scale * exp(l - max[branch]) - t);
                    }
                } else {
                    for ((g, e), t) in gradient.iter_mut().zip(&e[branch]).zip(&targets) {
                        *g += criterion * (scale * e - t);
                    }
                }
            }
            for (g, d) in g0[start..][..len].iter_mut().zip(&gradients[0]) {
                *g = T::from_f64(*d);
            }
            if let Some(g1) = g1.as_deref_mut() {
                for (g, d) in g1[start..][..len].iter_mut().zip(&gradients[1]) {
                    *g = T::from_f64(*d);
                }
            }
        }
    }
}
