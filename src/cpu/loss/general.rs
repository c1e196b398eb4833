//! One sample of any loss, in `f64`: passes over its row for the maxima, for the exponentials, for what the divergence and the
//! criterion need besides, and for the gradients. Exponentials wait in the gradients, as in `plain`.

use super::rows::{LANES, Lanes, Row, RowMut, difference, fold, greater, reduce, total};
use super::terms::*;
use super::{Loss, Partner, Target, Weights};
use crate::cpu::exp::exp;
use crate::loss::{Divergence, LossSettings};
use crate::real::Real;
use crate::vector::{Loop, widest};

/// A temperature above which softmaxes are so even that a mean of their ratio loses digits.
const SMOOTH: f64 = 16.0;

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
        let mut found = (0.0, 0.0);
        widest(self.sample(logits, partner, target, [g0, g1], &mut found));
        found
    }

    fn sample<'b>(
        &'b self,
        logits: &'b [T],
        partner: Partner<'b, T>,
        target: Target<'b, T>,
        [g0, g1]: [Option<&'b mut [T]>; 2],
        found: &'b mut (f64, f64),
    ) -> Sample<'b, T> {
        let trained = match target {
            Target::None => 0,
            _ if self.trains_both => 2,
            _ => 1,
        };
        Sample {
            general: self,
            settings: self.loss.settings,
            branches: Branches::new(logits, partner),
            has_partner: !matches!(partner, Partner::None),
            target,
            trained,
            g0,
            g1,
            found,
        }
    }
}

/// The logits of a sample's branches.
struct Branches<'a, T> {
    first: Row<'a, T>,
    /// Logits of the second branch, or how much smaller they are; without one, those of the first.
    other: Row<'a, T>,
    is_difference: bool,
}

impl<'a, T: Real> Branches<'a, T> {
    fn new(first: &'a [T], partner: Partner<'a, T>) -> Self {
        // What is past the end has no probability and no difference.
        let past = f64::NEG_INFINITY;
        let (other, is_difference) = match partner {
            Partner::None => (Row::new(first, past), false),
            Partner::Logits(logits) => (Row::new(logits, past), false),
            Partner::Difference(less) => (Row::new(less, 0.0), true),
        };
        Self { first: Row::new(first, past), other, is_difference }
    }

    fn classes(&self) -> f64 {
        self.first.all.len() as f64
    }

    #[inline(always)]
    fn class(&self, l: f64, other: f64) -> Class {
        if self.is_difference {
            Class { logits: [l, l - other], delta: other }
        } else {
            Class { logits: [l, other], delta: difference(l, other) }
        }
    }

    #[inline(always)]
    fn at(&self, class: usize) -> Class {
        self.class(self.first.all[class].to_f64(), self.other.all[class].to_f64())
    }

    /// `add` over all classes, for each lane by itself and from `start` on.
    #[inline(always)]
    fn fold(&self, start: f64, add: impl Fn(f64, Class) -> f64) -> Lanes {
        fold([self.first.all, self.other.all], start, |sum, [l, other]| add(sum, self.class(l, other)))
    }

    /// Some classes.
    #[inline(always)]
    fn chunk(&self, chunk: usize) -> Chunk<'_, T> {
        Chunk { branches: self, first: self.first.chunk(chunk), other: self.other.chunk(chunk) }
    }
}

struct Chunk<'a, T> {
    branches: &'a Branches<'a, T>,
    first: &'a [T; LANES],
    other: &'a [T; LANES],
}

impl<T: Real> Chunk<'_, T> {
    #[inline(always)]
    fn class(&self, i: usize) -> Class {
        self.branches.class(self.first[i].to_f64(), self.other[i].to_f64())
    }
}

struct Sample<'a, T> {
    general: &'a General<'a, T>,
    settings: LossSettings,
    branches: Branches<'a, T>,
    has_partner: bool,
    target: Target<'a, T>,
    /// Branches that have a criterion.
    trained: usize,
    g0: Option<&'a mut [T]>,
    g1: Option<&'a mut [T]>,
    found: &'a mut (f64, f64),
}

/// A branch's softmax, as far as it is needed.
struct Softmax {
    max: f64,
    /// The sum of exponentials for the criterion.
    criterion: f64,
    /// Those for the divergence.
    divergence: Sums,
}

impl<T: Real> Loop for Sample<'_, T> {
    #[inline(always)]
    fn run(mut self) {
        let (mut g0, mut g1) = (self.g0.take(), self.g1.take());
        if !self.has_partner && self.trained == 0 {
            [g0, g1].into_iter().flatten().for_each(|g| g.fill(T::zero()));
            return;
        }
        let mut spare = Vec::new();
        if self.compares_probabilities() && g0.is_some() && g1.is_none() {
            // Nobody wants this gradient, but the exponentials have to wait somewhere.
            spare.resize(self.branches.first.all.len(), T::zero());
            g1 = Some(&mut spare);
        }
        let scale = self.scale();
        let first = self.softmax::<0>(scale, g0.as_deref_mut().unwrap_or_default());
        let second = self.softmax::<1>(scale, g1.as_deref_mut().unwrap_or_default());
        let exponentials = Exponentials { max: [first.max, second.max], scale };
        let softmaxes = Softmaxes::new(exponentials, [first.divergence, second.divergence]);
        let share_of_criterion = if self.trained == 2 { 0.5 } else { 1.0 };
        let all_targets = self.all_targets();
        self.found.0 = share_of_criterion
            * (self.criterion::<0>(&first, all_targets) + self.criterion::<1>(&second, all_targets));

        let Weights { criterion, consistency: weight } = self.general.weights;
        let (trained, criterion) = (self.trained, criterion * share_of_criterion);
        let cross_entropy = CrossEntropy {
            trained,
            softmax: [first.criterion, second.criterion].map(|sum| criterion * all_targets / sum),
            weight: criterion,
        };
        let mut to = Gradients { first: g0, second: g1, exponentials };
        // A loop for each, so that what one calls does not keep another from being vectorised.
        self.found.1 = match self.settings.divergence {
            Divergence::SymmetricKl if self.has_partner => {
                self.gradients(&mut to, SymmetricKl { weight, softmaxes }, cross_entropy);
                0.5 * (softmaxes.means[0] - softmaxes.means[1])
            }
            Divergence::Kl { temperature, detach_target } if self.has_partner => {
                let kl = Kl { weight, temperature, detach_target, softmaxes };
                if scale == 1.0 {
                    self.gradients(&mut to, kl, cross_entropy);
                } else {
                    let exponentials = Exponentials { scale: 1.0, ..exponentials };
                    self.gradients(&mut to, kl, OwnCrossEntropy { cross_entropy, exponentials });
                }
                let kl = match temperature > SMOOTH {
                    true => total(self.branches.fold(0.0, |sum, class| sum + softmaxes.second_order(&class))),
                    false => -softmaxes.means[1],
                };
                temperature * temperature * kl
            }
            Divergence::JensenShannon if self.has_partner => {
                let means = self.distances_from_middle(&softmaxes);
                self.gradients(&mut to, JensenShannon { weight, softmaxes, means }, cross_entropy);
                0.5 * (means[0] + means[1])
            }
            _ => {
                let (value, squares) = self.squares(weight);
                if let Target::Values(_) = self.target {
                    let pull = 2.0 * criterion / self.branches.classes();
                    self.gradients(&mut to, squares, SquaredError { trained, pull });
                } else {
                    self.gradients(&mut to, squares, cross_entropy);
                }
                value
            }
        };
    }
}

/// Where gradients go. Until then the exponentials are there.
struct Gradients<'a, T> {
    first: Option<&'a mut [T]>,
    second: Option<&'a mut [T]>,
    exponentials: Exponentials,
}

impl<T: Real> Sample<'_, T> {
    fn compares_probabilities(&self) -> bool {
        self.has_partner && self.settings.divergence.is_of_probabilities()
    }

    /// What the divergence multiplies logits by.
    fn scale(&self) -> f64 {
        match self.settings.divergence {
            Divergence::Kl { temperature, .. } if self.has_partner => 1.0 / temperature,
            _ => 1.0,
        }
    }

    /// The softmax of branch `K`. Exponentials go to `out`: those of the divergence, if there are two kinds.
    #[inline(always)]
    fn softmax<const K: usize>(&self, scale: f64, out: &mut [T]) -> Softmax {
        let has_criterion = K < self.trained && !matches!(self.target, Target::Values(_));
        if !has_criterion && !self.compares_probabilities() {
            return Softmax { max: f64::NEG_INFINITY, criterion: 0.0, divergence: Sums::default() };
        }
        let max = self.branches.fold(f64::NEG_INFINITY, |max, class| greater(max, class.logits[K]));
        let max = reduce(max, greater);
        let divergence = self.exponentials::<K>(max, scale, out);
        let criterion = if has_criterion && scale != 1.0 {
            self.exponentials::<K>(max, 1.0, &mut []).all
        } else {
            divergence.all
        };
        Softmax { max, criterion, divergence }
    }

    /// The exponentials of branch `K`; they go to `out`.
    #[inline(always)]
    fn exponentials<const K: usize>(&self, max: f64, scale: f64, out: &mut [T]) -> Sums {
        let mut out = RowMut::new(out);
        let (mut all, mut pulled) = ([0.0; LANES], [0.0; LANES]);
        for chunk in 0..self.branches.first.chunks() {
            let classes = self.branches.chunk(chunk);
            let mut values = [T::zero(); LANES];
            for i in 0..LANES {
                let Class { logits, delta } = classes.class(i);
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

    /// `KL(p‖m)` and `KL(q‖m)` of `m = ½ (p + q)`.
    #[inline(always)]
    fn distances_from_middle(&self, softmaxes: &Softmaxes) -> [f64; 2] {
        let (mut of_p, mut of_q) = ([0.0; LANES], [0.0; LANES]);
        for chunk in 0..self.branches.first.chunks() {
            let classes = self.branches.chunk(chunk);
            for i in 0..LANES {
                let [first, second] = softmaxes.compare_with_middle(&classes.class(i));
                of_p[i] += first;
                of_q[i] += second;
            }
        }
        [total(of_p), total(of_q)]
    }

    /// A squared difference, and what is to know for its gradient.
    #[inline(always)]
    fn squares(&self, weight: f64) -> (f64, Squares) {
        let classes = self.branches.classes();
        let (factor, is_centered) = match self.settings.divergence {
            Divergence::MeanSquaredDifference => (1.0 / classes, false),
            Divergence::CenteredSquaredDifference => (1.0, true),
            _ => (1.0, false),
        };
        let mut mean = 0.0;
        if is_centered {
            mean = total(self.branches.fold(0.0, |sum, class| sum + class.delta)) / classes;
        }
        let squares = |sum: f64, class: Class| sum + (class.delta - mean) * (class.delta - mean);
        let value = if self.has_partner { total(self.branches.fold(0.0, squares)) } else { 0.0 };
        (factor * value, Squares { pull: 2.0 * factor * weight, mean })
    }

    /// What a label has more than other classes.
    #[inline(always)]
    fn of_label(&self, label: usize) -> f64 {
        let weight = self.general.loss.class_weights.map_or(1.0, |all| all[label].to_f64());
        (1.0 - self.settings.label_smoothing) * weight
    }

    /// Whether classes other than the label have targets.
    #[inline(always)]
    fn has_targets(&self) -> bool {
        match self.target {
            Target::None => false,
            Target::Label(_) => self.settings.label_smoothing != 0.0,
            Target::Probabilities(_) | Target::Values(_) => true,
        }
    }

    /// Targets of a chunk, without what a label has more than others.
    #[inline(always)]
    fn targets(&self, chunk: usize) -> Lanes {
        let smoothing = self.settings.label_smoothing;
        let spread = smoothing / self.branches.classes();
        let mut targets = match self.target {
            Target::None => [0.0; LANES],
            Target::Values(values) => return lanes(values, chunk),
            Target::Label(_) => [spread; LANES],
            Target::Probabilities(all) => {
                let mut targets = lanes(all, chunk);
                targets.iter_mut().for_each(|t| *t = (1.0 - smoothing) * *t + spread);
                targets
            }
        };
        if let Some(all) = self.general.loss.class_weights {
            targets.iter_mut().zip(lanes(all, chunk)).for_each(|(t, weight)| *t *= weight);
        }
        targets
    }

    /// The sum of `term(class, target)` over all classes.
    #[inline(always)]
    fn add_targets(&self, term: impl Fn(Class, f64) -> f64) -> f64 {
        let mut sums = [0.0; LANES];
        for chunk in 0..self.branches.first.chunks() {
            let (classes, targets) = (self.branches.chunk(chunk), self.targets(chunk));
            for i in 0..LANES.min(self.branches.first.all.len() - chunk * LANES) {
                sums[i] += term(classes.class(i), targets[i]);
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
                self.of_label(label) + self.settings.label_smoothing * self.general.mean_weight
            }
            Target::Probabilities(_) => self.add_targets(|_, t| t),
        }
    }

    /// The criterion of branch `K`.
    #[inline(always)]
    fn criterion<const K: usize>(&self, softmax: &Softmax, all_targets: f64) -> f64 {
        if K >= self.trained {
            return 0.0;
        }
        if let Target::Values(_) = self.target {
            let square = |class: Class, value: f64| (class.logits[K] - value) * (class.logits[K] - value);
            return self.add_targets(square) / self.branches.classes();
        }
        // Targets of zero are no terms: what they would be a share of may be infinite.
        let mut below = 0.0;
        if self.has_targets() {
            below += self.add_targets(|class, t| share(t, softmax.max - class.logits[K]));
        }
        if let Target::Label(label) = self.target {
            below += share(self.of_label(label), softmax.max - self.branches.at(label).logits[K]);
        }
        below + all_targets * softmax.criterion.ln()
    }

    /// Writes the gradients, if they are wanted.
    #[inline(always)]
    fn gradients(&self, to: &mut Gradients<'_, T>, divergence: impl Term, criterion: impl Term) {
        let Some(first) = to.first.as_deref_mut() else { return };
        let second = to.second.as_deref_mut().unwrap_or_default();
        let (mut g0, mut g1) = (RowMut::new(first), RowMut::new(second));
        for chunk in 0..self.branches.first.chunks() {
            let classes = self.branches.chunk(chunk);
            let targets = if self.has_targets() { self.targets(chunk) } else { [0.0; LANES] };
            // Copies, so that the loop need not check whether they overlap.
            let (mut d0, mut d1) = (*g0.chunk(chunk), *g1.chunk(chunk));
            for i in 0..LANES {
                let class = classes.class(i);
                let at = Point { class, e: [d0[i].to_f64(), d1[i].to_f64()], target: targets[i] };
                let [a, b] = sum(divergence.gradient(&at), criterion.gradient(&at));
                (d0[i], d1[i]) = (T::from_f64(a), T::from_f64(b));
            }
            (*g0.chunk(chunk), *g1.chunk(chunk)) = (d0, d1);
        }
        g0.finish();
        g1.finish();
        // The terms of the label cancel: it gets exponentials that have not been rounded.
        if let Target::Label(label) = self.target {
            let class = self.branches.at(label);
            let spread = if self.has_targets() { self.targets(label / LANES)[label % LANES] } else { 0.0 };
            let at = Point { class, e: to.exponentials.of(&class), target: spread + self.of_label(label) };
            let [a, b] = sum(divergence.gradient(&at), criterion.gradient(&at));
            first[label] = T::from_f64(a);
            if let Some(g) = second.get_mut(label) {
                *g = T::from_f64(b);
            }
        }
    }
}

#[inline(always)]
fn sum(a: [f64; 2], b: [f64; 2]) -> [f64; 2] {
    [a[0] + b[0], a[1] + b[1]]
}

/// A chunk of a row; 0 past the end.
#[inline(always)]
fn lanes<T: Real>(row: &[T], chunk: usize) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.iter_mut().zip(&row[chunk * LANES..]).for_each(|(to, from)| *to = from.to_f64());
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Targets;

    /// The widest vectors of this processor give the bits of the plain loops, at lengths around the vectors'.
    #[test]
    fn bits_do_not_depend_on_vectors() {
        let divergences = [
            Divergence::CenteredSquaredDifference,
            Divergence::SymmetricKl,
            Divergence::Kl { temperature: 1.0, detach_target: false },
            Divergence::Kl { temperature: 2.0, detach_target: false },
            Divergence::JensenShannon,
        ];
        for (classes, divergence) in
            [1, 15, 16, 17, 100].into_iter().flat_map(|classes| divergences.map(|d| (classes, d)))
        {
            let row = |seed: usize, step: f32| -> Vec<f32> {
                (0..classes).map(|i| ((i * 37 + seed * 11) % 101) as f32 * step).collect()
            };
            let (logits, less, targets) = (row(1, 0.3), row(2, 0.01), row(3, 1e-3));
            let settings =
                LossSettings { divergence, both_branches: true, ..LossSettings::new(classes, 0.7) };
            let loss = Loss { settings, targets: Targets::Probabilities(&targets), class_weights: None };
            let general = General::new(&loss, Weights { criterion: 0.3, consistency: 0.7 }, true);
            let run = |wide: bool| {
                let (mut g0, mut g1, mut found) = (row(4, 1.0), row(4, 1.0), (0.0, 0.0));
                let sample = general.sample(
                    &logits,
                    Partner::Difference(&less),
                    Target::Probabilities(&targets),
                    [Some(&mut g0), Some(&mut g1)],
                    &mut found,
                );
                if wide {
                    widest(sample);
                } else {
                    sample.run();
                }
                let bits = |g: Vec<f32>| g.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                (bits(g0), bits(g1), found.0.to_bits(), found.1.to_bits())
            };
            assert_eq!(run(true), run(false), "{classes} {divergence:?}");
        }
    }
}
