//! Every divergence and criterion of the loss against its definition, finite differences, and at the ends of what logits can be.

use crate::data::*;
use crate::support::*;
use pace_kernels::cpu::{Consistency, Loss, LossValues};
use pace_kernels::{Divergence, Error, LossSettings, Real, Targets};
use std::f64::consts::LN_2;

const DIVERGENCES: [Divergence; 8] = [
    Divergence::SquaredDifference,
    Divergence::MeanSquaredDifference,
    Divergence::CenteredSquaredDifference,
    Divergence::SymmetricKl,
    Divergence::Kl { temperature: 1.0, detach_target: false },
    Divergence::Kl { temperature: 2.5, detach_target: false },
    Divergence::Kl { temperature: 0.5, detach_target: true },
    Divergence::JensenShannon,
];
const IGNORE: i64 = -100;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Partner {
    None,
    Branch,
    Difference,
    History,
}

/// One batch; the partner's logits are given as such.
#[derive(Debug, Clone)]
struct Batch {
    settings: LossSettings,
    targets: Targets<Vec<i64>, Vec<f64>>,
    class_weights: Option<Vec<f64>>,
    partner: Partner,
    logits: Vec<f64>,
    other: Vec<f64>,
}

impl Batch {
    /// Values, and the gradients to the logits and the other branch's.
    fn run<T: Real>(&self) -> (LossValues, Vec<T>, Vec<T>) {
        let c = self.settings.classes;
        let b = self.logits.len() / c;
        let floats: Vec<T>;
        let targets = match &self.targets {
            Targets::Labels(labels) => Targets::Labels(&labels[..]),
            Targets::Probabilities(all) => {
                floats = cast(all);
                Targets::Probabilities(&floats[..])
            }
            Targets::Values(all) => {
                floats = cast(all);
                Targets::Values(&floats[..])
            }
        };
        let class_weights = self.class_weights.as_ref().map(|all| cast::<T>(all));
        let loss = Loss { settings: self.settings, targets, class_weights: class_weights.as_deref() };
        let mut logits = cast::<T>(&self.logits);
        let mut table = cast::<T>(&self.other);
        let index: Vec<i64> = (0..b as i64).collect();
        let difference: Vec<f64> =
            self.logits.iter().zip(&self.other).map(|(l, m)| if l == m { 0.0 } else { l - m }).collect();
        let consistency = match self.partner {
            Partner::None => Consistency::None,
            Partner::Branch => {
                logits.extend(cast::<T>(&self.other));
                Consistency::TwoBranch
            }
            Partner::Difference => {
                logits.extend(cast::<T>(&difference));
                Consistency::Difference
            }
            Partner::History => Consistency::History { table: &mut table, index: &index },
        };
        let mut gradient = unwritten(logits.len());
        let values = loss.evaluate(&logits, consistency, Some(&mut gradient)).unwrap();
        let second = gradient.split_off(self.logits.len());
        (values, gradient, second)
    }

    /// `[total, criterion, consistency]` by the definitions.
    fn defined(&self) -> [f64; 3] {
        let LossSettings { classes: c, lambda, label_smoothing: s, both_branches, labelled_only, .. } =
            self.settings;
        let b = self.logits.len() / c;
        let row = |all: &[f64], i: usize| all[i * c..][..c].to_vec();
        let weight = |class: usize| self.class_weights.as_ref().map_or(1.0, |all| all[class]);
        let label = |i: usize| match &self.targets {
            Targets::Labels(labels) => (labels[i] != IGNORE).then_some(labels[i] as usize),
            _ => None,
        };
        let has_target = |i: usize| label(i).is_some() || !matches!(self.targets, Targets::Labels(_));
        let criterion = |logits: &[f64], i: usize| -> f64 {
            let log_p = log_softmax(logits, 1.0);
            let smooth = -(0..c).map(|k| s / c as f64 * weight(k) * log_p[k]).sum::<f64>();
            match &self.targets {
                Targets::Labels(_) => {
                    let label = label(i).unwrap();
                    -(1.0 - s) * weight(label) * log_p[label] + smooth
                }
                Targets::Probabilities(all) => {
                    -(0..c).map(|k| (1.0 - s) * weight(k) * row(all, i)[k] * log_p[k]).sum::<f64>() + smooth
                }
                Targets::Values(all) => {
                    logits.iter().zip(row(all, i)).map(|(l, v)| (l - v).powi(2)).sum::<f64>() / c as f64
                }
            }
        };
        let two = matches!(self.partner, Partner::Branch | Partner::Difference);
        let counted: f64 = (0..b).filter(|&i| has_target(i)).map(|i| label(i).map_or(1.0, weight)).sum();
        let taking_part: Vec<usize> = (0..b).filter(|&i| has_target(i) || !labelled_only).collect();
        let sum: f64 = (0..b)
            .filter(|&i| has_target(i))
            .map(|i| {
                let own = criterion(&row(&self.logits, i), i);
                if both_branches && two { 0.5 * (own + criterion(&row(&self.other, i), i)) } else { own }
            })
            .sum();
        let far: f64 =
            taking_part.iter().map(|&i| self.divergence(&row(&self.logits, i), &row(&self.other, i))).sum();
        let over = |sum: f64, count: f64| {
            let count = self.settings.denominator.unwrap_or(count);
            if count == 0.0 { 0.0 } else { sum / count }
        };
        let criterion = over(sum, counted);
        let consistency =
            if self.partner == Partner::None { 0.0 } else { over(far, taking_part.len() as f64) };
        [criterion + lambda * consistency, criterion, consistency]
    }

    fn divergence(&self, l: &[f64], m: &[f64]) -> f64 {
        let c = l.len() as f64;
        let delta = || l.iter().zip(m).map(|(l, m)| l - m);
        let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum() };
        let (p, q) = (log_softmax(l, 1.0), log_softmax(m, 1.0));
        match self.settings.divergence {
            Divergence::SquaredDifference => delta().map(|d| d * d).sum(),
            Divergence::MeanSquaredDifference => delta().map(|d| d * d).sum::<f64>() / c,
            Divergence::CenteredSquaredDifference => {
                let mean = delta().sum::<f64>() / c;
                delta().map(|d| (d - mean).powi(2)).sum()
            }
            Divergence::SymmetricKl => 0.5 * (kl(&p, &q) + kl(&q, &p)),
            Divergence::Kl { temperature: t, .. } => t * t * kl(&log_softmax(m, t), &log_softmax(l, t)),
            Divergence::JensenShannon => {
                let middle: Vec<f64> =
                    p.iter().zip(&q).map(|(p, q)| (0.5 * (p.exp() + q.exp())).ln()).collect();
                0.5 * (kl(&p, &middle) + kl(&q, &middle))
            }
            other => panic!("{other:?} has no definition here"),
        }
    }
}

fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|l| l / temperature).collect();
    let max = scaled.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scaled.iter().map(|l| (l - max).exp()).sum();
    scaled.iter().map(|l| l - max - sum.ln()).collect()
}

/// Calls `body` for every divergence, criterion and partner.
fn for_batches(sizes: &[(usize, usize)], mut body: impl FnMut(Batch)) {
    for &(b, c) in sizes {
        let labels = |ignored: usize| -> Targets<Vec<i64>, Vec<f64>> {
            Targets::Labels((0..b).map(|i| if i < ignored { IGNORE } else { (i * 7 % c) as i64 }).collect())
        };
        let positive = |seed, len| uniform(seed, len).iter().map(|v| 0.5 * (v + 1.0)).collect::<Vec<_>>();
        let weights = positive(33, c);
        let shares: Vec<f64> = positive(34, b * c)
            .chunks(c)
            .flat_map(|row| row.iter().map(|v| v / row.iter().sum::<f64>()).collect::<Vec<_>>())
            .collect();
        let plain = LossSettings { ignore_label: Some(IGNORE), ..LossSettings::new(c, 0.7) };
        let with = |label_smoothing, both_branches, labelled_only, denominator| LossSettings {
            label_smoothing,
            both_branches,
            labelled_only,
            denominator,
            ..plain
        };
        let criteria = [
            (labels(0), None, plain),
            (labels(1), None, with(0.1, true, false, None)),
            (labels(1), None, with(0.0, false, true, None)),
            (labels(b), None, with(0.1, false, true, None)),
            (labels(1), Some(weights.clone()), with(0.2, true, true, Some(7.0))),
            (Targets::Probabilities(shares.clone()), Some(weights), with(0.2, true, false, None)),
            (Targets::Probabilities(shares), None, plain),
            (Targets::Values(uniform(35, b * c)), None, with(0.0, true, false, Some(2.5))),
        ];
        for (targets, class_weights, settings) in criteria {
            for divergence in DIVERGENCES {
                for partner in [Partner::None, Partner::Branch, Partner::Difference, Partner::History] {
                    if matches!(targets, Targets::Values(_)) && divergence.is_of_probabilities() {
                        continue;
                    }
                    // With a history there is no other branch to be trained.
                    let both_branches = settings.both_branches && !matches!(partner, Partner::History);
                    body(Batch {
                        settings: LossSettings { divergence, both_branches, ..settings },
                        targets: targets.clone(),
                        class_weights: class_weights.clone(),
                        partner,
                        logits: uniform(31, b * c).iter().map(|l| 4.0 * l).collect(),
                        other: uniform(32, b * c).iter().map(|l| 4.0 * l).collect(),
                    });
                }
            }
        }
    }
}

#[test]
fn values_are_those_of_the_definitions() {
    for_batches(&[(1, 1), (2, 3), (5, 17), (3, 130)], |batch| {
        let want = batch.defined();
        let (values, gradient, second) = batch.run::<f64>();
        let list = |values: LossValues| [values.total, values.classification, values.consistency];
        assert_close((&batch, "f64"), &list(values), &want);
        // In f32 the logits are the same, and a gradient is rounded once.
        let (values, gradient_f32, second_f32) = batch.run::<f32>();
        let close = |got: f64, want: f64| (got - want).abs() <= 1e-6 * want.abs() + 1e-7;
        assert!(
            list(values).iter().zip(want).all(|(&got, want)| close(got, want)),
            "{batch:?}: {values:?}, {want:?}"
        );
        assert_within((&batch, "f32"), &gradient_f32, &gradient, |i| 1e-6 * gradient[i].abs() + 1e-7);
        assert_within((&batch, "f32"), &second_f32, &second, |i| 1e-6 * second[i].abs() + 1e-7);
    });
}

#[test]
fn gradients_are_derivatives() {
    for_batches(&[(1, 1), (2, 3), (3, 5)], |batch| {
        let (_, first, second) = batch.run::<f64>();
        // What is detached is no part of the derivative to the second branch: it follows from that to the first.
        let detached = matches!(batch.settings.divergence, Divergence::Kl { detach_target: true, .. });
        check_differences(&batch, &batch.logits, &first, 1e-4, |logits| {
            Batch { logits: logits.to_vec(), ..batch.clone() }.defined()[0]
        });
        if matches!(batch.partner, Partner::Branch | Partner::Difference) {
            let lambda = if detached { 0.0 } else { batch.settings.lambda };
            let settings = LossSettings { lambda, ..batch.settings };
            check_differences(&batch, &batch.other, &second, 1e-4, |other| {
                Batch { other: other.to_vec(), settings, ..batch.clone() }.defined()[0]
            });
        }
    });
}

/// Gradients of close branches have the digits of f32 relative to themselves, not to the probabilities that they are differences of.
#[test]
fn gradients_of_close_branches_keep_their_digits() {
    let classes = 40;
    for divergence in DIVERGENCES {
        for step in [2f64.powi(-12), 2f64.powi(-17)] {
            // Differences that are exact in f32.
            let logits: Vec<f64> = uniform(44, classes).iter().map(|l| (l * 64.0).round() / 64.0).collect();
            let other: Vec<f64> = logits
                .iter()
                .zip(uniform(45, classes))
                .map(|(l, u)| l + step * (8.0 * u).round() / 8.0)
                .collect();
            let batch = Batch {
                settings: LossSettings {
                    divergence,
                    ignore_label: Some(IGNORE),
                    ..LossSettings::new(classes, 1.0)
                },
                targets: Targets::Labels(vec![IGNORE]),
                class_weights: None,
                partner: Partner::Branch,
                logits,
                other,
            };
            let ((_, want0, want1), (_, got0, got1)) = (batch.run::<f64>(), batch.run::<f32>());
            for (got, want) in [(got0, want0), (got1, want1)] {
                let largest = want.iter().fold(0.0, |largest: f64, g| largest.max(g.abs()));
                assert_within((divergence, step), &got, &want, |_| 1e-6 * largest);
            }
        }
    }
}

/// R-Drop's losses as published: for classes `½(CE0 + CE1) + α/2 (KL(p‖q) + KL(q‖p))`, for numbers `½(MSE0 + MSE1) + α MSE(l0, l1)`.
#[test]
fn r_drop_is_a_setting() {
    let (b, c, alpha) = (3, 4, 0.7);
    let (logits, other) = (uniform(41, b * c), uniform(42, b * c));
    let (p, q): (Vec<_>, Vec<_>) = (0..b)
        .map(|i| (log_softmax(&logits[i * c..][..c], 1.0), log_softmax(&other[i * c..][..c], 1.0)))
        .unzip();
    let labels = vec![2, 0, 3];
    let mut want = 0.0;
    for i in 0..b {
        want -= 0.5 * (p[i][labels[i] as usize] + q[i][labels[i] as usize]);
        for k in 0..c {
            want += alpha / 2.0 * (p[i][k].exp() - q[i][k].exp()) * (p[i][k] - q[i][k]);
        }
    }
    let settings = LossSettings {
        both_branches: true,
        divergence: Divergence::SymmetricKl,
        ..LossSettings::new(c, alpha)
    };
    let batch = Batch {
        settings,
        targets: Targets::Labels(labels),
        class_weights: None,
        partner: Partner::Branch,
        logits: logits.clone(),
        other: other.clone(),
    };
    assert!((batch.run::<f64>().0.total - want / b as f64).abs() < 1e-14);

    let values = uniform(43, b);
    let mean_square =
        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / 3.0;
    let want = 0.5 * (mean_square(&logits[..b], &values) + mean_square(&other[..b], &values))
        + alpha * mean_square(&logits[..b], &other[..b]);
    let settings = LossSettings { classes: 1, divergence: Divergence::MeanSquaredDifference, ..settings };
    let batch = Batch {
        settings,
        targets: Targets::Values(values),
        logits: logits[..b].to_vec(),
        other: other[..b].to_vec(),
        ..batch
    };
    assert!((batch.run::<f64>().0.total - want).abs() < 1e-14);
}

/// Equal branches have no divergence and no gradient from it, whatever they are; so has one class, of probabilities.
#[test]
fn equal_branches_agree() {
    const INF: f64 = f64::INFINITY;
    for divergence in DIVERGENCES {
        for logits in [[0.0; 3], [1e4, -1e4, 3.0], [-INF, 0.3, -INF], [700.0, -700.0, 0.0]] {
            for partner in [Partner::Branch, Partner::Difference, Partner::History] {
                let batch = Batch {
                    settings: LossSettings { divergence, ..LossSettings::new(3, 2.0) },
                    targets: Targets::Labels(vec![1]),
                    class_weights: None,
                    partner,
                    logits: logits.to_vec(),
                    other: logits.to_vec(),
                };
                let alone = Batch { partner: Partner::None, ..batch.clone() }.run::<f64>();
                let (values, first, second) = batch.run::<f64>();
                assert_eq!(values.consistency, 0.0, "{batch:?}");
                assert_close(&batch, &first, &alone.1);
                assert!(second.iter().all(|&g| g == 0.0), "{batch:?}: {second:?}");
            }
        }
        let one = Batch {
            settings: LossSettings { divergence, ..LossSettings::new(1, 2.0) },
            targets: Targets::Labels(vec![0]),
            class_weights: None,
            partner: Partner::Branch,
            logits: vec![4.0],
            other: vec![-1e4],
        };
        let is_zero = one.run::<f64>().0.consistency == 0.0;
        let is_blind =
            divergence.is_of_probabilities() || divergence == Divergence::CenteredSquaredDifference;
        assert_eq!(is_zero, is_blind, "{divergence:?}");
    }
}

/// Logits that are far apart or masked in both branches give finite numbers; a class that one branch alone masks has an infinite
/// distance where the formula has it.
#[test]
fn extreme_logits_give_what_the_formula_gives() {
    const INF: f64 = f64::INFINITY;
    for divergence in DIVERGENCES {
        let value = |logits: [f64; 3], other: [f64; 3]| {
            let batch = Batch {
                settings: LossSettings { divergence, ..LossSettings::new(3, 1.0) },
                targets: Targets::Labels(vec![0]),
                class_weights: None,
                partner: Partner::Branch,
                logits: logits.to_vec(),
                other: other.to_vec(),
            };
            let (values, first, second) = batch.run::<f64>();
            (values.consistency, [first, second].concat())
        };
        for (logits, other) in [
            ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
            ([1e4, 0.0, -INF], [0.0, 1e4, -INF]),
            ([0.0, 1.0, -INF], [1.0, 0.5, -INF]),
        ] {
            let (far, gradient) = value(logits, other);
            assert!(far > 0.0 && far.is_finite(), "{divergence:?} {logits:?} {other:?}: {far}");
            assert!(
                gradient.iter().all(|g| g.is_finite()),
                "{divergence:?} {logits:?} {other:?}: {gradient:?}"
            );
            if divergence == Divergence::JensenShannon {
                assert!(far <= LN_2, "{far}");
            }
        }
        // The classes that are masked in both do not matter.
        let (masked, _) = value([0.0, 1.0, -INF], [1.0, 0.5, -INF]);
        let two = Batch {
            settings: LossSettings { divergence, ..LossSettings::new(2, 1.0) },
            targets: Targets::Labels(vec![0]),
            class_weights: None,
            partner: Partner::Branch,
            logits: vec![0.0, 1.0],
            other: vec![1.0, 0.5],
        };
        if divergence.is_of_probabilities() {
            assert!((masked - two.run::<f64>().0.consistency).abs() < 1e-15, "{divergence:?}");
        }
        // Masked in branch 0 alone: KL(q‖p) is infinite, Jensen-Shannon is not.
        let (one_sided, _) = value([0.0, 1.0, -INF], [0.0, 1.0, 0.5]);
        assert_eq!(
            one_sided.is_finite(),
            divergence == Divergence::JensenShannon,
            "{divergence:?}: {one_sided}"
        );
        assert!(!one_sided.is_nan() || divergence == Divergence::CenteredSquaredDifference, "{divergence:?}");
    }
}

/// What is not a number is one in the loss, and in no gradient of a branch that takes no part.
#[test]
fn a_detached_branch_has_no_gradient() {
    for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let batch = Batch {
            settings: LossSettings {
                divergence: Divergence::Kl { temperature: 0.5, detach_target: true },
                ..LossSettings::new(2, 1.0)
            },
            targets: Targets::Labels(vec![0]),
            class_weights: None,
            partner: Partner::Branch,
            logits: vec![0.5, 1.0],
            other: vec![poison, 0.5],
        };
        let (values, _, second) = batch.run::<f64>();
        assert_eq!(values.consistency.is_nan(), poison != f64::NEG_INFINITY, "{poison}");
        assert_eq!(second, [0.0, 0.0], "{poison}");
    }
}

/// What does not go together is an error that names it.
#[test]
fn settings_that_mean_nothing_are_refused() {
    let refused = |settings: LossSettings, targets, history: bool| {
        let loss = Loss::<f64> { settings, targets, class_weights: None };
        let mut table = [0.0; 2];
        let consistency = match history {
            true => Consistency::History { table: &mut table, index: &[0] },
            false => Consistency::None,
        };
        match loss.evaluate(&[0.0; 2], consistency, None) {
            Err(Error::Argument { argument, .. } | Error::Value { argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    let plain = LossSettings::new(2, 1.0);
    for targets in [Targets::Probabilities(&[0.5, 0.5][..]), Targets::Values(&[0.5, 0.5])] {
        let settings = LossSettings { labelled_only: true, ..plain };
        assert_eq!(refused(settings, targets, false), "labelled_only");
    }
    let settings = LossSettings { both_branches: true, ..plain };
    assert_eq!(refused(settings, Targets::Labels(&[0]), true), "both_branches");
    for temperature in [0.0, -1.0, 1e-7, 1e7, f64::NAN, f64::INFINITY] {
        let divergence = Divergence::Kl { temperature, detach_target: false };
        let settings = LossSettings { divergence, ..plain };
        assert_eq!(refused(settings, Targets::Labels(&[0]), false), "temperature");
    }
}

/// At a high temperature both softmaxes are even, and the divergence is half the variance of the differences.
#[test]
fn a_high_temperature_leaves_the_digits() {
    let (logits, other) = (vec![0.3, -1.0, 2.0, 0.7], vec![0.1, 0.4, 1.0, -0.2]);
    let delta: Vec<f64> = logits.iter().zip(&other).map(|(a, b)| a - b).collect();
    let mean = delta.iter().sum::<f64>() / 4.0;
    let want = delta.iter().map(|d| (d - mean) * (d - mean)).sum::<f64>() / 8.0;
    for temperature in [1e4, 1e6] {
        let batch = Batch {
            settings: LossSettings {
                divergence: Divergence::Kl { temperature, detach_target: false },
                ..LossSettings::new(4, 1.0)
            },
            targets: Targets::Labels(vec![0]),
            class_weights: None,
            partner: Partner::Branch,
            logits: logits.clone(),
            other: other.clone(),
        };
        let got = batch.run::<f64>().0.consistency;
        assert!((got - want).abs() <= 2.0 / temperature * want, "{temperature:e}: {got}, {want}");
    }
}
