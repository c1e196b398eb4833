//! The loss against its formulas and finite differences, with logits that are not finite, ignored samples and a history.

use crate::data::*;
use crate::reference;
use crate::support::*;
use pace_kernels::cpu::{Consistency, Loss, LossValues};
use pace_kernels::{LossSettings, Real, Targets};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Partner {
    None,
    Branch,
    History,
}
const PARTNERS: [Partner; 3] = [Partner::None, Partner::Branch, Partner::History];

/// The crate's loss on plain inputs: values, gradient (both branches), and the history afterwards.
fn run_loss<T: Real>(
    setting: &reference::Loss<'_>,
    kind: Partner,
    logits: &[f64],
    partner: &[f64],
    index: &[i64],
) -> (LossValues, Vec<T>, Vec<T>) {
    let &reference::Loss { classes, labels, lambda, label_smoothing, ignore_label } = setting;
    let settings = LossSettings { label_smoothing, ignore_label, ..LossSettings::new(classes, lambda) };
    let loss = Loss { settings, targets: Targets::Labels(labels), class_weights: None };
    let mut table = Vec::new();
    let mut logits = cast::<T>(logits);
    let consistency = match kind {
        Partner::None => Consistency::None,
        Partner::Branch => {
            logits.extend(cast::<T>(partner));
            Consistency::TwoBranch
        }
        Partner::History => {
            table = vec![T::from_f64(7.0); (index.iter().max().unwrap() + 2) as usize * classes];
            for (row, &at) in partner.chunks(classes).zip(index) {
                table[at as usize * classes..][..classes].copy_from_slice(&cast::<T>(row));
            }
            Consistency::History { table: &mut table, index }
        }
    };
    let mut gradient = unwritten(logits.len());
    let values = loss.evaluate(&logits, consistency, Some(&mut gradient)).unwrap();
    (values, gradient, table)
}

/// Rows of a history table, in no order.
fn history_rows(batch: usize) -> Vec<i64> {
    (0..batch as i64).map(|i| 2 * (batch as i64 - i)).collect()
}

const IGNORE: i64 = -100;

/// Calls `body(setting, logits, partner)` for losses of many sizes and settings.
fn for_losses(sizes: &[(usize, usize)], mut body: impl FnMut(reference::Loss<'_>, &[f64], &[f64])) {
    for &(batch, classes) in sizes {
        let logits: Vec<f64> = uniform(20, batch * classes).iter().map(|l| 8.0 * l).collect();
        let partner: Vec<f64> = uniform(21, batch * classes).iter().map(|l| 8.0 * l).collect();
        for ignored in [0, 1, batch] {
            let labels: Vec<i64> =
                (0..batch).map(|i| if i < ignored { IGNORE } else { (i * 7 % classes) as i64 }).collect();
            for label_smoothing in [0.0, 0.1, 1.0] {
                for lambda in [0.0, 0.5, 3.0] {
                    let ignore_label = (ignored > 0).then_some(IGNORE);
                    let setting =
                        reference::Loss { classes, labels: &labels, lambda, label_smoothing, ignore_label };
                    body(setting, &logits, &partner);
                }
            }
        }
    }
}

fn check_loss<T: Real>(setting: &reference::Loss<'_>, kind: Partner, logits: &[f64], partner: &[f64]) {
    let index = history_rows(setting.labels.len());
    let (got, gradient, table) = run_loss::<T>(setting, kind, logits, partner, &index);
    let (mut values, mut want, partner_gradient) =
        setting.evaluate(logits, (kind != Partner::None).then_some(partner));
    if kind == Partner::Branch {
        want.extend(partner_gradient);
    }
    // No labelled sample: the mean over none of them counts as zero.
    if setting.labels.iter().all(|&label| Some(label) == setting.ignore_label) {
        values[1] = 0.0;
        values[0] = setting.lambda * values[2];
    }
    let what = (std::any::type_name::<T>(), kind, setting);
    assert_close::<f64>((what, "values"), &[got.total, got.classification, got.consistency], &values);
    assert_close((what, "gradient"), &gradient, &want);
    if kind == Partner::History {
        for (row, table) in table.chunks(setting.classes).enumerate() {
            match index.iter().position(|&at| at as usize == row) {
                Some(sample) => {
                    assert_eq!(table, cast::<T>(&logits[sample * setting.classes..][..setting.classes]))
                }
                None => assert!(table.iter().all(|v| v.to_f64() == 7.0), "row {row} was not in the batch"),
            }
        }
    }
}

#[test]
fn loss_matches_formulas() {
    let sizes = [(1, 1), (1, 2), (2, 10), (5, 3), (64, 101), (3, 1000)];
    for_losses(&sizes, |setting, logits, partner| {
        for kind in PARTNERS {
            check_loss::<f64>(&setting, kind, logits, partner);
            check_loss::<f32>(&setting, kind, logits, partner);
        }
    });
}

#[test]
fn loss_gradients_are_derivatives() {
    for_losses(&[(1, 2), (3, 4)], |setting, logits, partner| {
        for kind in PARTNERS {
            let index = history_rows(setting.labels.len());
            let (_, gradient, _) = run_loss::<f64>(&setting, kind, logits, partner, &index);
            let (first, second) = gradient.split_at(logits.len());
            check_differences((kind, setting), logits, first, 1e-5, |logits| {
                run_loss::<f64>(&setting, kind, logits, partner, &index).0.total
            });
            if kind == Partner::Branch {
                check_differences((kind, setting), partner, second, 1e-5, |partner| {
                    run_loss::<f64>(&setting, kind, logits, partner, &index).0.total
                });
            }
        }
    });
}

/// The values do not depend on whether the gradient is asked for, and nothing depends on the run or the number of threads.
#[test]
fn loss_is_reproducible() {
    for_losses(&[(64, 101), (64, 1001)], |setting, logits, partner| {
        let &reference::Loss { classes, labels, lambda, label_smoothing, ignore_label } = &setting;
        let settings = LossSettings { label_smoothing, ignore_label, ..LossSettings::new(classes, lambda) };
        let loss = Loss { settings, targets: Targets::Labels(labels), class_weights: None };
        let both = [logits, partner].concat();
        let values_only = loss.evaluate(&both, Consistency::TwoBranch, None).unwrap();
        let run = || run_loss::<f64>(&setting, Partner::Branch, logits, partner, &[]);
        let gradients: Vec<_> = POOLS
            .iter()
            .flat_map(|pool| [(); 2].map(|()| pool.install(run)))
            .map(|(values, gradient, _)| {
                assert_eq!(values, values_only);
                gradient
            })
            .collect();
        assert!(gradients.iter().all(|gradient| *gradient == gradients[0]));
    });
}

/// In `f32` the values are those of `f64`, and a gradient has two roundings: of `exp(l_c − max)`, and of the result. That of
/// the label, where terms cancel, has the last one alone.
#[test]
fn loss_in_f32_rounds_gradients_alone() {
    for (batch, classes) in [(3, 1), (2, 10), (4, 101), (2, 5000)] {
        let logits: Vec<f64> =
            uniform(20, batch * classes).iter().map(|l| f64::from((40.0 * l) as f32)).collect();
        // The most probable class, where the terms cancel most.
        let largest = |row: &[f64]| (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i64;
        let labels: Vec<i64> = logits.chunks(classes).map(largest).collect();
        let setting = reference::Loss {
            classes,
            labels: &labels,
            lambda: 0.0,
            label_smoothing: 0.0,
            ignore_label: None,
        };
        let (values, gradient, _) = run_loss::<f32>(&setting, Partner::None, &logits, &[], &[]);
        let (want_values, want, _) = run_loss::<f64>(&setting, Partner::None, &logits, &[], &[]);
        assert_eq!(values, want_values);
        let half = f64::from(f32::EPSILON) / 2.0;
        assert_within((batch, classes), &gradient, &want, |i| {
            let roundings = if i % classes == labels[i / classes] as usize { 1.0 } else { 2.0 };
            1.0001 * roundings * half * want[i].abs() + f64::from(f32::from_bits(1))
        });
    }
}

/// Extreme and non-finite logits behave as in `torch.nn.functional.cross_entropy`.
#[test]
fn loss_of_extreme_logits() {
    const INF: f64 = f64::INFINITY;
    // logits of one sample with label 0, smoothing, cross-entropy
    let cases = [
        ([1e4, 0.0, -1e4], 0.0, 0.0),
        ([0.0, 1e4, 0.0], 0.0, 1e4),
        ([-1e30, 0.0, 0.0], 0.0, 1e30),
        ([f64::NAN, 0.0, 0.0], 0.0, f64::NAN),
        ([0.0, f64::NAN, 0.0], 0.0, f64::NAN),
        ([INF, 0.0, 0.0], 0.0, f64::NAN),
        ([0.0, INF, 0.0], 0.0, f64::NAN),
        ([-INF; 3], 0.0, f64::NAN),
        ([-INF, 0.0, 0.0], 0.0, INF),
        ([0.0, -INF, 0.0], 0.0, 2f64.ln()),
        ([0.0, -INF, 0.0], 0.1, INF),
    ];
    for (logits, label_smoothing, want) in cases {
        let setting =
            reference::Loss { classes: 3, labels: &[0], lambda: 1.0, label_smoothing, ignore_label: None };
        let (values, gradient, _) = run_loss::<f64>(&setting, Partner::None, &logits, &[], &[]);
        let same = if want.is_finite() {
            (values.total - want).abs() <= 1e-12 * want.max(1.0)
        } else {
            values.total.to_bits() == want.to_bits() || want.is_nan() && values.total.is_nan()
        };
        assert!(same, "{logits:?} {label_smoothing}: got {values:?}, expected {want}");
        assert_eq!(gradient.iter().all(|g| g.is_finite()), !want.is_nan(), "{logits:?}: {gradient:?}");
    }
}

/// A non-finite logit of either branch, even of an ignored sample and with λ = 0, shows in the loss and in exactly the
/// gradients that depend on it.
#[test]
fn non_finite_logits_show() {
    for lambda in [0.0, 2.0] {
        for labels in [[1, 2], [IGNORE, 2]] {
            let ignore_label = Some(IGNORE);
            let setting =
                reference::Loss { classes: 3, labels: &labels, lambda, label_smoothing: 0.1, ignore_label };
            for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for (branch, kind) in
                    [(0, Partner::Branch), (1, Partner::Branch), (0, Partner::History), (1, Partner::History)]
                {
                    let mut rows = [uniform(22, 6), uniform(23, 6)];
                    rows[branch][1] = poison;
                    let (values, gradient, _) = run_loss::<f64>(&setting, kind, &rows[0], &rows[1], &[0, 1]);
                    let what = format!("{poison} {branch} {kind:?} {setting:?}: {values:?} {gradient:?}");
                    assert!(!values.total.is_finite() && !values.consistency.is_finite(), "{what}");
                    assert!(!gradient[1].is_finite(), "{what}");
                    if kind == Partner::Branch {
                        assert!(!gradient[7].is_finite(), "{what}");
                        assert!(gradient[9..].iter().all(|g| g.is_finite()), "{what}");
                    }
                    assert!(gradient[3..6].iter().all(|g| g.is_finite()), "{what}");
                }
            }
        }
    }
}

/// An unlabelled sample without a consistency term contributes nothing, whatever its logits.
#[test]
fn ignored_samples_do_not_matter() {
    let setting = reference::Loss {
        classes: 2,
        labels: &[IGNORE, 1],
        lambda: 1.0,
        label_smoothing: 0.0,
        ignore_label: Some(IGNORE),
    };
    let (values, gradient, _) =
        run_loss::<f64>(&setting, Partner::None, &[f64::NAN, 3.0, 0.0, 0.0], &[], &[]);
    assert_eq!(values, LossValues { total: 2f64.ln(), classification: 2f64.ln(), consistency: 0.0 });
    assert_eq!(gradient, [0.0, 0.0, 0.5, -0.5]);
}

/// PACE-fast: the first epoch sees zeros, the second what the first wrote.
#[test]
fn history_is_read_then_overwritten() {
    let loss =
        Loss { settings: LossSettings::new(2, 1.0), targets: Targets::Labels(&[0, 1]), class_weights: None };
    let mut table = [0.0; 6];
    let mut epoch = |logits: &[f64], index: &[i64]| {
        let consistency = Consistency::History { table: &mut table, index };
        let distance = loss.evaluate(logits, consistency, None).unwrap().consistency;
        (distance, table)
    };
    assert_eq!(epoch(&[1.0, 2.0, 3.0, 4.0], &[2, 0]), (15.0, [3.0, 4.0, 0.0, 0.0, 1.0, 2.0]));
    assert_eq!(epoch(&[3.0, 5.0, 1.0, 1.0], &[0, 1]), (1.5, [3.0, 5.0, 1.0, 1.0, 1.0, 2.0]));
}
