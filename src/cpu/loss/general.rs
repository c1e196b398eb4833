//! One sample of any loss, in `f64`: passes over its row for the maxima, the exponentials and what the criterion and the divergence
//! add up, and one for the gradients. Exponentials wait in the gradients, as in `plain`.

use super::plain::{LANES, difference, fold, greater, reduce, total};
use super::{Loss, Partner, Target, Weights};
use crate::cpu::exp::{SMALL_EXPONENT, exp, ln_1p, small_exp_m1};
use crate::loss::{Divergence, LossSettings};
use crate::real::Real;
use crate::vector::{Loop, widest};
use std::f64::consts::LN_2;

type Lanes = [f64; LANES];

/// What all samples of a batch have in common.
pub(super) struct General<'a, T> {
    loss: &'a Loss<'a, T>,
    weights: Weights,
    /// Whether there are two branches and the criterion is that of both.
    trains_both: bool,
    /// `Σ_c w_c / C`.
    mean_weight: f64,
}

impl<'a, T: Real> General<'a, T> {
    pub(super) fn new(loss: &'a Loss<'a, T>, weights: Weights, two: bool) -> Self {
        let mean_weight = match loss.class_weights {
            None => 1.0,
            Some(all) => all.iter().map(|weight| weight.to_f64()).sum::<f64>() / all.len() as f64,
        };
        Self { loss, weights, trains_both: two && loss.settings.both_branches, mean_weight }
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
        if let (Partner::None, Target::None) = (partner, target) {
            [g0, g1].into_iter().flatten().for_each(|g| g.fill(T::zero()));
            return (0.0, 0.0);
        }
        let trained = match target {
            Target::None => 0,
            _ if self.trains_both => 2,
            _ => 1,
        };
        let branches = Branches::new(logits, partner);
        let mut found = (0.0, 0.0);
        let divergence = match partner {
            Partner::None => None,
            _ => Some(self.loss.settings.divergence),
        };
        widest(Sample { general: self, branches, divergence, target, trained, g0, g1, found: &mut found });
        found
    }
}

/// A row in chunks, of which the last may be padded.
#[derive(Clone, Copy)]
struct Row<'a, T> {
    all: &'a [T],
    whole: &'a [[T; LANES]],
    last: [T; LANES],
}

impl<'a, T: Real> Row<'a, T> {
    #[inline(always)]
    fn new(all: &'a [T], pad: f64) -> Self {
        let (whole, rest) = all.as_chunks::<LANES>();
        let mut last = [T::from_f64(pad); LANES];
        last[..rest.len()].copy_from_slice(rest);
        Self { all, whole, last }
    }

    #[inline(always)]
    fn chunk(&self, i: usize) -> &[T; LANES] {
        self.whole.get(i).unwrap_or(&self.last)
    }

    #[inline(always)]
    fn chunks(&self) -> usize {
        self.all.len().div_ceil(LANES)
    }
}

/// A row that is read and written in chunks.
struct RowMut<'a, T> {
    whole: &'a mut [[T; LANES]],
    rest: &'a mut [T],
    last: [T; LANES],
}

impl<'a, T: Real> RowMut<'a, T> {
    #[inline(always)]
    fn new(all: &'a mut [T]) -> Self {
        let (whole, rest) = all.as_chunks_mut::<LANES>();
        let mut last = [T::zero(); LANES];
        last[..rest.len()].copy_from_slice(rest);
        Self { whole, rest, last }
    }

    /// Beyond an empty row there is one chunk, which is forgotten.
    #[inline(always)]
    fn chunk(&mut self, i: usize) -> &mut [T; LANES] {
        self.whole.get_mut(i).unwrap_or(&mut self.last)
    }

    #[inline(always)]
    fn finish(self) {
        self.rest.copy_from_slice(&self.last[..self.rest.len()]);
    }
}

/// The logits of a sample's branches.
#[derive(Clone, Copy)]
struct Branches<'a, T> {
    first: Row<'a, T>,
    /// Logits of the second branch, or how much smaller they are; without one, those of the first.
    other: Row<'a, T>,
    is_difference: bool,
}

/// A class in both branches.
#[derive(Clone, Copy)]
struct Class {
    logits: [f64; 2],
    /// Of the logits.
    delta: f64,
}

impl<'a, T: Real> Branches<'a, T> {
    fn new(first: &'a [T], partner: Partner<'a, T>) -> Self {
        let (other, is_difference) = match partner {
            Partner::None => (first, false),
            Partner::Logits(logits) => (logits, false),
            Partner::Difference(less) => (less, true),
        };
        // What is past the end has no probability and no difference.
        let past = f64::NEG_INFINITY;
        Self { first: Row::new(first, past), other: Row::new(other, if is_difference { 0.0 } else { past }), is_difference }
    }

    #[inline(always)]
    fn class(&self, l: T, other: T) -> Class {
        self.class_of(l.to_f64(), other.to_f64())
    }

    #[inline(always)]
    fn class_of(&self, l: f64, other: f64) -> Class {
        if self.is_difference {
            Class { logits: [l, l - other], delta: other }
        } else {
            Class { logits: [l, other], delta: difference(l, other) }
        }
    }

    #[inline(always)]
    fn at(&self, class: usize) -> Class {
        self.class(self.first.all[class], self.other.all[class])
    }

    /// `add` over all classes, for each lane by itself and from `start` on.
    #[inline(always)]
    fn fold(&self, start: f64, add: impl Fn(f64, Class) -> f64) -> Lanes {
        fold([self.first.all, self.other.all], start, |sum, [l, other]| add(sum, self.class_of(l, other)))
    }
}

/// `p·x`, nothing without probability: there `x` may be infinite.
#[inline(always)]
fn share(p: f64, x: f64) -> f64 {
    if p == 0.0 { 0.0 } else { p * x }
}

struct Sample<'a, T> {
    general: &'a General<'a, T>,
    branches: Branches<'a, T>,
    /// None without another branch.
    divergence: Option<Divergence>,
    target: Target<'a, T>,
    /// Branches that have a criterion.
    trained: usize,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    found: &'a mut (f64, f64),
}

/// The exponentials of a branch.
struct Exponentials {
    max: f64,
    /// Their sum, for the criterion.
    criterion: f64,
    /// For the divergence, with its temperature.
    divergence: Sums,
}

/// `Σ e` and `Σ e·Δ` of a branch, with `e = exp((l − max)·scale)`.
#[derive(Clone, Copy, Default)]
struct Sums {
    all: f64,
    pulled: f64,
}

/// What is known of both softmaxes: `p = e·inverse`.
#[derive(Clone, Copy)]
struct Softmaxes {
    scale: f64,
    inverse: [f64; 2],
    /// `log p/q = (Δ − shift)·scale − offset`: differences of maxima and of sums are exact where branches are close.
    shift: f64,
    offset: f64,
    /// Means of `log p/q` under p and q.
    means: [f64; 2],
}

impl Softmaxes {
    #[inline(always)]
    fn new(scale: f64, max: [f64; 2], sums: [Sums; 2]) -> Self {
        let inverse = [1.0 / sums[0].all, 1.0 / sums[1].all];
        let (shift, offset) = (max[0] - max[1], sums[0].all.ln() - sums[1].all.ln());
        let mean = |i: usize| (sums[i].pulled * inverse[i] - shift) * scale - offset;
        Self { scale, inverse, shift, offset, means: [mean(0), mean(1)] }
    }

    /// `log p/q`.
    #[inline(always)]
    fn ratio(&self, delta: f64) -> f64 {
        (delta - self.shift) * self.scale - self.offset
    }

    /// `p`, `q` and `log p/q`.
    #[inline(always)]
    fn compare(&self, e: [f64; 2], delta: f64) -> (f64, f64, f64) {
        (e[0] * self.inverse[0], e[1] * self.inverse[1], self.ratio(delta))
    }
}

/// `p − q`. Of close branches it has digits that exponentials in `f32` have not.
#[inline(always)]
fn differ(p: f64, q: f64, ratio: f64) -> f64 {
    if ratio.abs() <= SMALL_EXPONENT { -p * small_exp_m1(-ratio) } else { p - q }
}

/// `log p/m` and `log q/m` of `m = ½ (p + q)`, from `log p/q`.
#[inline(always)]
fn to_middle(ratio: f64) -> (f64, f64) {
    let most = LN_2 - ln_1p(exp(-ratio.abs()));
    (most - (-ratio).max(0.0), most - ratio.max(0.0))
}

/// The criterion in the gradient.
#[derive(Clone, Copy)]
struct Criterion {
    /// Branches that have one.
    trained: usize,
    /// What the exponentials are multiplied by.
    softmax: [f64; 2],
    /// What targets, or differences from values, are multiplied by.
    target: f64,
    max: [f64; 2],
}

impl Criterion {
    /// Zero for a branch that has no criterion, whatever is in it.
    #[inline(always)]
    fn of(&self, [first, second]: [f64; 2]) -> [f64; 2] {
        [if self.trained > 0 { first } else { 0.0 }, if self.trained > 1 { second } else { 0.0 }]
    }

    #[inline(always)]
    fn cross_entropy(&self, e: [f64; 2], t: f64) -> [f64; 2] {
        let Self { softmax, target, .. } = *self;
        self.of([softmax[0] * e[0] - target * t, softmax[1] * e[1] - target * t])
    }
}

/// A class when its gradients are computed.
#[derive(Clone, Copy)]
struct Point {
    class: Class,
    /// Exponentials.
    e: [f64; 2],
    target: f64,
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(mut self) {
        let is_cross_entropy = !matches!(self.target, Target::None | Target::Values(_));
        let compares = self.divergence.filter(Divergence::is_of_probabilities);
        let scale = match compares {
            Some(Divergence::Kl { temperature, .. }) => 1.0 / temperature,
            _ => 1.0,
        };
        // Exponentials in the gradients are those of the divergence, if there are two kinds.
        let (mut g0, mut g1) = (self.g0.take(), self.g1.take());
        let mut spare = Vec::new();
        if compares.is_some() && g0.is_some() && g1.is_none() {
            spare.resize(self.branches.first.all.len(), T::zero());
            g1 = Some(&mut spare);
        }
        let first = self.softmax::<0>(scale, g0.as_deref_mut().unwrap_or_default());
        let second = self.softmax::<1>(scale, g1.as_deref_mut().unwrap_or_default());
        let max = [first.max, second.max];
        let of_criterion = [first.criterion, second.criterion];

        let share_of_criterion = if self.trained == 2 { 0.5 } else { 1.0 };
        let all_targets = self.all_targets();
        let (own, others) = (self.criterion::<0>(&first, all_targets), self.criterion::<1>(&second, all_targets));
        self.found.0 = share_of_criterion * (own + others);
        let softmaxes = Softmaxes::new(scale, max, [first.divergence, second.divergence]);
        let (divergence, middle) = self.divergence(&softmaxes, max);
        self.found.1 = divergence;

        let Some(g0) = g0 else { return };
        let g1 = g1.unwrap_or_default();
        let Weights { criterion, consistency } = self.general.weights;
        let criterion = criterion * share_of_criterion;
        let classes = self.branches.first.all.len() as f64;
        let c = Criterion {
            trained: self.trained,
            softmax: of_criterion.map(|sum| criterion * all_targets / sum),
            target: if is_cross_entropy { criterion } else { 2.0 * criterion / classes },
            max,
        };
        let pull = match self.divergence {
            Some(Divergence::Kl { temperature, .. }) => consistency * temperature,
            Some(Divergence::SymmetricKl | Divergence::JensenShannon) => 0.5 * consistency,
            Some(Divergence::MeanSquaredDifference) => 2.0 * consistency / classes,
            _ => 2.0 * consistency,
        };
        // A loop for each, so that what one calls does not keep another from being vectorised.
        match self.divergence {
            Some(Divergence::SymmetricKl) => {
                self.gradients(g0, g1, scale, max, SymmetricKl { pull, softmaxes }, CrossEntropy(c))
            }
            Some(Divergence::Kl { detach_target, .. }) => {
                let kl = Kl { pull, softmaxes, detach_target };
                if scale == 1.0 {
                    self.gradients(g0, g1, scale, max, kl, CrossEntropy(c))
                } else {
                    self.gradients(g0, g1, scale, max, kl, OtherTemperature(c))
                }
            }
            Some(Divergence::JensenShannon) => {
                self.gradients(g0, g1, scale, max, JensenShannon { pull, softmaxes, means: middle }, CrossEntropy(c))
            }
            _ if is_cross_entropy => {
                self.gradients(g0, g1, scale, max, Squares { pull, mean: middle[0] }, CrossEntropy(c))
            }
            _ => self.gradients(g0, g1, scale, max, Squares { pull, mean: middle[0] }, SquaredError(c)),
        }
    }
}

/// A term of the loss, whose gradient to both branches it gives in one class. A trait, as closures are not always inlined.
trait Term {
    fn gradient(&self, at: &Point) -> [f64; 2];
}

struct Squares {
    pull: f64,
    mean: f64,
}

impl Term for Squares {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let d = self.pull * (at.class.delta - self.mean);
        [d, -d]
    }
}

struct SymmetricKl {
    pull: f64,
    softmaxes: Softmaxes,
}

impl Term for SymmetricKl {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let [of_p, of_q] = self.softmaxes.means;
        let differ = differ(p, q, ratio);
        [self.pull * (share(p, ratio - of_p) + differ), self.pull * (share(q, of_q - ratio) - differ)]
    }
}

struct Kl {
    pull: f64,
    softmaxes: Softmaxes,
    detach_target: bool,
}

impl Term for Kl {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let second = self.pull * share(q, self.softmaxes.means[1] - ratio);
        [self.pull * differ(p, q, ratio), if self.detach_target { 0.0 } else { second }]
    }
}

struct JensenShannon {
    pull: f64,
    softmaxes: Softmaxes,
    means: [f64; 2],
}

impl Term for JensenShannon {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let (first, second) = to_middle(ratio);
        [self.pull * share(p, first - self.means[0]), self.pull * share(q, second - self.means[1])]
    }
}

/// Of the exponentials at hand.
struct CrossEntropy(Criterion);

impl Term for CrossEntropy {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        self.0.cross_entropy(at.e, at.target)
    }
}

/// Cross-entropy beside a divergence with a temperature.
struct OtherTemperature(Criterion);

impl Term for OtherTemperature {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let ([first, second], max) = (at.class.logits, self.0.max);
        self.0.cross_entropy([exp(first - max[0]), exp(second - max[1])], at.target)
    }
}

struct SquaredError(Criterion);

impl Term for SquaredError {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let ([first, second], factor) = (at.class.logits, self.0.target);
        self.0.of([factor * (first - at.target), factor * (second - at.target)])
    }
}

#[inline(always)]
fn gradient(divergence: &impl Term, criterion: &impl Term, at: Point) -> [f64; 2] {
    let (d, c) = (divergence.gradient(&at), criterion.gradient(&at));
    [d[0] + c[0], d[1] + c[1]]
}

impl<T: Real> Sample<'_, T> {
    fn settings(&self) -> &LossSettings {
        &self.general.loss.settings
    }

    /// The exponentials of branch `K`, as far as they are needed. Those of the divergence, if there are two kinds, go to `out`.
    #[inline(always)]
    fn softmax<const K: usize>(&self, scale: f64, out: &mut [T]) -> Exponentials {
        let compares = self.divergence.is_some_and(|divergence| divergence.is_of_probabilities());
        let has_criterion = K < self.trained && !matches!(self.target, Target::Values(_));
        let mut found = Exponentials { max: f64::NEG_INFINITY, criterion: 0.0, divergence: Sums::default() };
        if !compares && !has_criterion {
            return found;
        }
        let max = self.branches.fold(f64::NEG_INFINITY, |max, class| greater(max, class.logits[K]));
        found.max = reduce(max, greater);
        found.divergence = self.exponentials::<K>(found.max, scale, out);
        found.criterion = if compares && has_criterion && scale != 1.0 {
            self.exponentials::<K>(found.max, 1.0, &mut []).all
        } else {
            found.divergence.all
        };
        found
    }

    #[inline(always)]
    fn exponentials<const K: usize>(&self, max: f64, scale: f64, out: &mut [T]) -> Sums {
        let mut out = RowMut::new(out);
        let (mut all, mut pulled) = ([0.0; LANES], [0.0; LANES]);
        for chunk in 0..self.branches.first.chunks() {
            let (first, other) = (self.branches.first.chunk(chunk), self.branches.other.chunk(chunk));
            let mut values = [T::zero(); LANES];
            for i in 0..LANES {
                let Class { logits, delta } = self.branches.class(first[i], other[i]);
                let e = exp((logits[K] - max) * scale);
                all[i] += e;
                pulled[i] += share(e, delta);
                values[i] = T::from_f64(e);
            }
            *out.chunk(chunk) = values;
        }
        out.finish();
        Sums { all: total(all), pulled: total(pulled) }
    }

    /// Share of the target that is spread over all classes.
    #[inline(always)]
    fn spread(&self) -> f64 {
        self.settings().label_smoothing / self.branches.first.all.len() as f64
    }

    /// Whether a class other than the label has a target.
    #[inline(always)]
    fn has_targets(&self) -> bool {
        match self.target {
            Target::None => false,
            Target::Label(_) => self.settings().label_smoothing != 0.0,
            Target::Probabilities(_) | Target::Values(_) => true,
        }
    }

    /// Targets of a chunk, without what a label has more than others.
    #[inline(always)]
    fn targets(&self, chunk: usize) -> Lanes {
        let of = |row: &[T]| {
            let mut lanes = [0.0; LANES];
            lanes.iter_mut().zip(&row[chunk * LANES..]).for_each(|(to, from)| *to = from.to_f64());
            lanes
        };
        let mut targets = match self.target {
            Target::None => return [0.0; LANES],
            Target::Values(values) => return of(values),
            Target::Label(_) => [self.spread(); LANES],
            Target::Probabilities(all) => {
                let hard = 1.0 - self.settings().label_smoothing;
                of(all).map(|p| hard * p + self.spread())
            }
        };
        if let Some(all) = self.general.loss.class_weights {
            targets.iter_mut().zip(of(all)).for_each(|(t, weight)| *t *= weight);
        }
        targets
    }

    /// What a label has more than others.
    #[inline(always)]
    fn of_label(&self, label: usize) -> f64 {
        let weight = self.general.loss.class_weights.map_or(1.0, |all| all[label].to_f64());
        (1.0 - self.settings().label_smoothing) * weight
    }

    /// `lanes[i] += add(class, target)` over all classes.
    #[inline(always)]
    fn add_targets(&self, add: impl Fn(Class, f64) -> f64) -> f64 {
        let mut sums = [0.0; LANES];
        let Branches { first, other, .. } = &self.branches;
        for chunk in 0..first.chunks() {
            let (l, other, targets) = (first.chunk(chunk), other.chunk(chunk), self.targets(chunk));
            for i in 0..LANES.min(first.all.len() - chunk * LANES) {
                sums[i] += add(self.branches.class(l[i], other[i]), targets[i]);
            }
        }
        total(sums)
    }

    /// The sum of the targets of all classes.
    #[inline(always)]
    fn all_targets(&self) -> f64 {
        match self.target {
            Target::None | Target::Values(_) => 0.0,
            Target::Label(label) => {
                self.of_label(label) + self.settings().label_smoothing * self.general.mean_weight
            }
            Target::Probabilities(_) => self.add_targets(|_, t| t),
        }
    }

    /// The criterion of branch `K`.
    #[inline(always)]
    fn criterion<const K: usize>(&self, exponentials: &Exponentials, all_targets: f64) -> f64 {
        if K >= self.trained {
            return 0.0;
        }
        let max = exponentials.max;
        if let Target::Values(_) = self.target {
            let far = |class: Class, value: f64| class.logits[K] - value;
            let squares = self.add_targets(|class, value| far(class, value) * far(class, value));
            return squares / self.branches.first.all.len() as f64;
        }
        // Targets of zero are no terms: what they would be a share of may be infinite.
        let mut below = 0.0;
        if self.has_targets() {
            below += self.add_targets(|class, t| share(t, max - class.logits[K]));
        }
        if let Target::Label(label) = self.target {
            below += share(self.of_label(label), max - self.branches.at(label).logits[K]);
        }
        below + all_targets * exponentials.criterion.ln()
    }

    /// The divergence; means of what it compares, for the gradient.
    #[inline(always)]
    fn divergence(&self, softmaxes: &Softmaxes, max: [f64; 2]) -> (f64, [f64; 2]) {
        let Some(divergence) = self.divergence else { return (0.0, [0.0; 2]) };
        let classes = self.branches.first.all.len() as f64;
        let squares = |mean: f64| {
            total(self.branches.fold(0.0, |sum, class| sum + (class.delta - mean) * (class.delta - mean)))
        };
        let value = match divergence {
            Divergence::SquaredDifference => squares(0.0),
            Divergence::MeanSquaredDifference => squares(0.0) / classes,
            Divergence::CenteredSquaredDifference => {
                let mean = total(self.branches.fold(0.0, |sum, class| sum + class.delta)) / classes;
                return (squares(mean), [mean, 0.0]);
            }
            Divergence::SymmetricKl => 0.5 * (softmaxes.means[0] - softmaxes.means[1]),
            Divergence::Kl { temperature, .. } => -temperature * temperature * softmaxes.means[1],
            Divergence::JensenShannon => {
                let middle = self.to_middle(softmaxes, max);
                return (0.5 * (middle[0] + middle[1]), middle);
            }
        };
        (value, [0.0; 2])
    }

    /// `KL(p‖m)` and `KL(q‖m)` of `m = ½ (p + q)`.
    #[inline(always)]
    fn to_middle(&self, softmaxes: &Softmaxes, max: [f64; 2]) -> [f64; 2] {
        let mut sums = [[0.0; LANES]; 2];
        for chunk in 0..self.branches.first.chunks() {
            let (l, other) = (self.branches.first.chunk(chunk), self.branches.other.chunk(chunk));
            for i in 0..LANES {
                let Class { logits, delta } = self.branches.class(l[i], other[i]);
                let e = [exp(logits[0] - max[0]), exp(logits[1] - max[1])];
                let (p, q, ratio) = softmaxes.compare(e, delta);
                let (first, second) = to_middle(ratio);
                sums[0][i] += share(p, first);
                sums[1][i] += share(q, second);
            }
        }
        [total(sums[0]), total(sums[1])]
    }

    /// Writes the gradients, which hold the exponentials.
    #[inline(always)]
    fn gradients(
        &self,
        g0: &mut [T],
        g1: &mut [T],
        scale: f64,
        max: [f64; 2],
        divergence: impl Term,
        criterion: impl Term,
    ) {
        let Branches { first, other, .. } = &self.branches;
        let (mut to0, mut to1) = (RowMut::new(g0), RowMut::new(g1));
        for chunk in 0..first.chunks() {
            let (l, other) = (first.chunk(chunk), other.chunk(chunk));
            let targets = if self.has_targets() { self.targets(chunk) } else { [0.0; LANES] };
            // Copies, so that they overlap nothing.
            let (mut g0, mut g1) = (*to0.chunk(chunk), *to1.chunk(chunk));
            for i in 0..LANES {
                let class = self.branches.class(l[i], other[i]);
                let at = Point { class, e: [g0[i].to_f64(), g1[i].to_f64()], target: targets[i] };
                let [a, b] = gradient(&divergence, &criterion, at);
                (g0[i], g1[i]) = (T::from_f64(a), T::from_f64(b));
            }
            (*to0.chunk(chunk), *to1.chunk(chunk)) = (g0, g1);
        }
        to0.finish();
        to1.finish();
        // The terms of the label cancel: it gets exponentials that have not been rounded.
        if let Target::Label(label) = self.target {
            let class = self.branches.at(label);
            let e = |k: usize| exp((class.logits[k] - max[k]) * scale);
            let targets = if self.has_targets() { self.targets(label / LANES)[label % LANES] } else { 0.0 };
            let at = Point { class, e: [e(0), e(1)], target: targets + self.of_label(label) };
            let g = gradient(&divergence, &criterion, at);
            g0[label] = T::from_f64(g[0]);
            if let Some(g1) = g1.get_mut(label) {
                *g1 = T::from_f64(g[1]);
            }
        }
    }
}
