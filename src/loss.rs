//! What a loss is made of: settings that every back end takes, checked in one place.

use crate::error::{Error, Result};
use crate::shape::nonzero;

/// How far the logits of a sample's two branches are from each other: one sample's consistency term.
///
/// With `Δ = l0 − l1`, where `Δ_c = 0` for equal logits (classes that are masked by −∞ in both branches), and
/// `p = softmax(l0)`, `q = softmax(l1)`:
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Divergence {
    /// `Σ_c Δ_c²` over raw logits: PACE (paper equation 11).
    #[default]
    SquaredDifference,
    /// `1/C Σ_c Δ_c²`: the same for any number of classes, as language models have many.
    MeanSquaredDifference,
    /// `Σ_c (Δ_c − mean(Δ))²`: without what a softmax does not see.
    CenteredSquaredDifference,
    /// `½ (KL(p‖q) + KL(q‖p)) = ½ Σ_c (p_c − q_c) Δ_c`: R-Drop.
    SymmetricKl,
    /// `T²·KL(q_T‖p_T)` with `p_T = softmax(l0/T)`, `q_T = softmax(l1/T)`: branch 1 is the target.
    Kl {
        /// `T`, from 1e-6 to 1e6. The paper of distillation has the factor `T²`.
        temperature: f64,
        /// Whether branch 1 gets no gradient of this term.
        detach_target: bool,
    },
    /// `½ (KL(p‖m) + KL(q‖m))`, `m = ½ (p + q)`: at most `ln 2`, however far the branches are apart.
    JensenShannon,
}

impl Divergence {
    /// Whether it compares probabilities rather than logits.
    pub fn is_of_probabilities(&self) -> bool {
        matches!(self, Self::SymmetricKl | Self::Kl { .. } | Self::JensenShannon)
    }

    fn check(&self) -> Result<()> {
        match *self {
            // Within it, what is left of differences is right in f32.
            Self::Kl { temperature, .. } if !(1e-6..=1e6).contains(&temperature) => {
                let expected = "in [1e-6, 1e6]";
                Err(Error::Value { argument: "temperature", expected, got: temperature })
            }
            _ => Ok(()),
        }
    }
}

/// What branch 0 is trained on. `L` are int64 labels, `V` floating tensors: slices on the CPU, and on NVIDIA devices what the
/// operators in `cuda` take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Targets<L, V> {
    /// Labels `[B]`: cross-entropy.
    Labels(L),
    /// Probabilities `[B, C]` (mixup, CutMix, distillation): cross-entropy.
    Probabilities(V),
    /// Numbers `[B, C]` (regression): mean squared error over samples and columns.
    Values(V),
}

/// What a loss is made of.
///
/// ```text
/// total       = criterion + λ·consistency
/// criterion   = Σ_i t_i / D        t_i: cross-entropy (or squared error) of l0_i; D: samples with a label, or the sum of
///                                  their classes' weights
/// consistency = Σ_i d_i / D'       d_i: divergence of l0_i and l1_i; D': samples that take part
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSettings {
    /// Number of classes `C`.
    pub classes: usize,
    /// Strength λ of the consistency term: finite, not negative.
    pub lambda: f64,
    /// What the consistency term measures.
    pub divergence: Divergence,
    /// Share of the target spread evenly over all classes, in `[0, 1]`.
    pub label_smoothing: f64,
    /// Samples with this label take no part in the criterion (unlabelled data, padding).
    pub ignore_label: Option<i64>,
    /// Whether samples with the ignored label take no part in the consistency either: right for padding, not for unlabelled data. Of
    /// targets that are labels.
    pub labelled_only: bool,
    /// Whether the criterion is the mean of that of both branches (R-Drop) rather than that of branch 0 (PACE); not with a history.
    pub both_branches: bool,
    /// Divides both sums in place of `D` and `D'`: finite, more than 0. For batches that are parts of one, as when gradients are
    /// accumulated.
    pub denominator: Option<f64>,
}

impl LossSettings {
    /// The paper's loss over that many classes.
    pub const fn new(classes: usize, lambda: f64) -> Self {
        Self {
            classes,
            lambda,
            divergence: Divergence::SquaredDifference,
            label_smoothing: 0.0,
            ignore_label: None,
            labelled_only: false,
            both_branches: false,
            denominator: None,
        }
    }

    /// Whether the Gram matrix of a head's weight can stand for the logits of branch 1, and saves work; `has_gram`: it is there,
    /// `trains_weight`: there is a gradient to the weight.
    pub(crate) fn takes_gram(
        &self,
        tokens: usize,
        hidden_size: usize,
        has_gram: bool,
        trains_weight: bool,
    ) -> bool {
        // As GEMMs over the logits of a branch: `G` takes H/M unless it is given, and the gradient to the weight as much again;
        // differences of logits take 2, and one more for the weight.
        let of_gram = hidden_size.saturating_mul(usize::from(!has_gram) + usize::from(trains_weight));
        let of_differences = tokens.saturating_mul(2 + usize::from(trains_weight));
        of_gram < of_differences && !self.both_branches && !self.divergence.is_of_probabilities()
    }

    /// Checks that there is a second branch where the criterion is of both; with a history there is none.
    pub(crate) fn check_history(&self, has_history: bool) -> Result<()> {
        if self.both_branches && has_history {
            let problem = "needs a second branch, and there is a history in its place";
            return Err(Error::Argument { argument: "both_branches", problem });
        }
        Ok(())
    }

    /// Checks everything, for what it is to be applied to.
    pub(crate) fn check<L, V>(&self, targets: &Targets<L, V>, has_class_weights: bool) -> Result<()> {
        nonzero("classes", self.classes)?;
        check_lambda(self.lambda)?;
        self.divergence.check()?;
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            let got = self.label_smoothing;
            return Err(Error::Value { argument: "label_smoothing", expected: "in [0, 1]", got });
        }
        if let Some(got) = self.denominator.filter(|value| !(value.is_finite() && *value > 0.0)) {
            let expected = "finite and more than 0";
            return Err(Error::Value { argument: "denominator", expected, got });
        }
        if self.labelled_only && !matches!(targets, Targets::Labels(_)) {
            let problem = "is for labels, and the targets are others";
            return Err(Error::Argument { argument: "labelled_only", problem });
        }
        if let Targets::Values(_) = targets {
            let problem = "is for classes, and the targets are values";
            for (argument, is_wrong) in [
                ("label_smoothing", self.label_smoothing != 0.0),
                ("class_weights", has_class_weights),
                ("divergence", self.divergence.is_of_probabilities()),
            ] {
                if is_wrong {
                    return Err(Error::Argument { argument, problem });
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn check_lambda(lambda: f64) -> Result<()> {
    if lambda.is_finite() && lambda >= 0.0 {
        Ok(())
    } else {
        Err(Error::Value { argument: "lambda", expected: "finite and not negative", got: lambda })
    }
}
