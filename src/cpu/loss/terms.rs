//! Gradients of the terms of the loss in one class, given the sums over all of them.

use crate::cpu::exp::{SMALL_EXPONENT, exp, ln_1p, small_exp_m1, small_exp_m1_m_x};
use std::f64::consts::LN_2;

/// A class in both branches.
#[derive(Clone, Copy)]
pub(super) struct Class {
    pub logits: [f64; 2],
    /// `Δ`, the difference of the logits.
    pub delta: f64,
}

/// A class with all that gradients depend on.
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub class: Class,
    /// Exponentials, where the divergence or the criterion needs them.
    pub e: [f64; 2],
    pub target: f64,
}

/// A term of the loss. A trait, as closures are not always inlined, and are compiled without wide vectors where they are not.
pub(super) trait Term {
    /// Its gradient to both branches.
    fn gradient(&self, at: &Point) -> [f64; 2];
}

/// `e = exp((l − max)·scale)` for each branch.
#[derive(Clone, Copy)]
pub(super) struct Exponentials {
    pub max: [f64; 2],
    pub scale: f64,
}

impl Exponentials {
    #[inline(always)]
    pub fn of(&self, class: &Class) -> [f64; 2] {
        let Self { max, scale } = *self;
        let [first, second] = class.logits;
        [exp((first - max[0]) * scale), exp((second - max[1]) * scale)]
    }
}

/// `Σ e` and `Σ e·Δ` of a branch.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    pub all: f64,
    pub pulled: f64,
}

/// What is known of both softmaxes: `p = e·inverse`.
#[derive(Clone, Copy)]
pub(super) struct Softmaxes {
    exponentials: Exponentials,
    inverse: [f64; 2],
    /// `log p/q = (Δ − shift)·scale − offset`: differences of maxima and of sums are exact where branches are close.
    shift: f64,
    offset: f64,
    /// Means of `log p/q` under p and under q: `KL(p‖q)` and `−KL(q‖p)`.
    pub means: [f64; 2],
}

impl Softmaxes {
    #[inline(always)]
    pub fn new(exponentials: Exponentials, [first, second]: [Sums; 2]) -> Self {
        let Exponentials { max, scale } = exponentials;
        let inverse = [1.0 / first.all, 1.0 / second.all];
        let (shift, offset) = (max[0] - max[1], first.all.ln() - second.all.ln());
        let means = [
            (first.pulled * inverse[0] - shift) * scale - offset,
            (second.pulled * inverse[1] - shift) * scale - offset,
        ];
        Self { exponentials, inverse, shift, offset, means }
    }

    /// `p`, `q` and `log p/q`.
    #[inline(always)]
    fn compare(&self, e: [f64; 2], delta: f64) -> (f64, f64, f64) {
        let ratio = (delta - self.shift) * self.exponentials.scale - self.offset;
        (e[0] * self.inverse[0], e[1] * self.inverse[1], ratio)
    }

    /// A term `p − q − q log p/q` of `KL(q‖p)`, none of which is negative: where `p` and `q` are almost the same nothing is left of the
    /// means.
    #[inline(always)]
    pub fn second_order(&self, class: &Class) -> f64 {
        let (p, q, ratio) = self.compare(self.exponentials.of(class), class.delta);
        if ratio.abs() <= SMALL_EXPONENT { q * small_exp_m1_m_x(ratio) } else { p - q - share(q, ratio) }
    }

    /// `p log p/m` and `q log q/m` of `m = ½ (p + q)`.
    #[inline(always)]
    pub fn compare_with_middle(&self, class: &Class) -> [f64; 2] {
        let (p, q, ratio) = self.compare(self.exponentials.of(class), class.delta);
        let (first, second) = logs_to_middle(ratio);
        [share(p, first), share(q, second)]
    }
}

/// `p·x`, nothing without probability: there `x` may be infinite.
#[inline(always)]
pub(super) fn share(p: f64, x: f64) -> f64 {
    if p == 0.0 { 0.0 } else { p * x }
}

/// `p − q`. Of close branches it has digits that exponentials in `f32` have not.
#[inline(always)]
fn differ(p: f64, q: f64, ratio: f64) -> f64 {
    if ratio.abs() <= SMALL_EXPONENT { -p * small_exp_m1(-ratio) } else { p - q }
}

/// `log p/m` and `log q/m` of `m = ½ (p + q)`, from `log p/q`.
#[inline(always)]
fn logs_to_middle(ratio: f64) -> (f64, f64) {
    let larger = LN_2 - ln_1p(exp(-ratio.abs()));
    (larger + ratio.min(0.0), larger - ratio.max(0.0))
}

/// `Σ (Δ − mean)²`.
pub(super) struct Squares {
    /// Of a difference in the gradient.
    pub pull: f64,
    pub mean: f64,
}

impl Term for Squares {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let d = self.pull * (at.class.delta - self.mean);
        [d, -d]
    }
}

/// `½ (KL(p‖q) + KL(q‖p))`.
pub(super) struct SymmetricKl {
    pub weight: f64,
    pub softmaxes: Softmaxes,
}

impl Term for SymmetricKl {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let ([of_p, of_q], half) = (self.softmaxes.means, 0.5 * self.weight);
        let differ = differ(p, q, ratio);
        [half * (share(p, ratio - of_p) + differ), half * (share(q, of_q - ratio) - differ)]
    }
}

/// `T²·KL(q‖p)`.
pub(super) struct Kl {
    pub weight: f64,
    pub temperature: f64,
    pub detach_target: bool,
    pub softmaxes: Softmaxes,
}

impl Term for Kl {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let pull = self.weight * self.temperature;
        // No share of what may not be a number.
        let second = if self.detach_target { 0.0 } else { pull * share(q, self.softmaxes.means[1] - ratio) };
        [pull * differ(p, q, ratio), second]
    }
}

/// `½ (KL(p‖m) + KL(q‖m))`.
pub(super) struct JensenShannon {
    pub weight: f64,
    pub softmaxes: Softmaxes,
    /// `KL(p‖m)` and `KL(q‖m)`.
    pub means: [f64; 2],
}

impl Term for JensenShannon {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        let (p, q, ratio) = self.softmaxes.compare(at.e, at.class.delta);
        let ((first, second), half) = (logs_to_middle(ratio), 0.5 * self.weight);
        [half * share(p, first - self.means[0]), half * share(q, second - self.means[1])]
    }
}

/// Nothing for branches that have no criterion, whatever is in them.
#[inline(always)]
fn of_trained(trained: usize, [first, second]: [f64; 2]) -> [f64; 2] {
    [if trained > 0 { first } else { 0.0 }, if trained > 1 { second } else { 0.0 }]
}

/// Cross-entropy whose exponentials are those at hand.
pub(super) struct CrossEntropy {
    /// Branches that have one.
    pub trained: usize,
    /// Of an exponential.
    pub softmax: [f64; 2],
    pub weight: f64,
}

impl Term for CrossEntropy {
    #[inline(always)]
    fn gradient(&self, &Point { e, target, .. }: &Point) -> [f64; 2] {
        let target = self.weight * target;
        of_trained(self.trained, [self.softmax[0] * e[0] - target, self.softmax[1] * e[1] - target])
    }
}

/// Cross-entropy beside a divergence with a temperature: the exponentials at hand are not its own.
pub(super) struct OwnCrossEntropy {
    pub cross_entropy: CrossEntropy,
    pub exponentials: Exponentials,
}

impl Term for OwnCrossEntropy {
    #[inline(always)]
    fn gradient(&self, at: &Point) -> [f64; 2] {
        self.cross_entropy.gradient(&Point { e: self.exponentials.of(&at.class), ..*at })
    }
}

/// `Σ (l − target)²`.
pub(super) struct SquaredError {
    /// Branches that have one.
    pub trained: usize,
    /// Of a difference in the gradient.
    pub pull: f64,
}

impl Term for SquaredError {
    #[inline(always)]
    fn gradient(&self, &Point { class, target, .. }: &Point) -> [f64; 2] {
        let [first, second] = class.logits;
        of_trained(self.trained, [self.pull * (first - target), self.pull * (second - target)])
    }
}
