//! The loss with every divergence, criterion and target, against the CPU operator in f64.

use crate::loss_cases::*;
use crate::loss_data::status;
use crate::machine::Target;
use crate::numerics::{self, Format};
use crate::support::{Type, wide};
use half::{bf16, f16};
use pace_kernels::cuda::{Finding, LossStatus, Partner};
use pace_kernels::{Divergence, LossSettings};

/// Checks a case; with `any_order` in all orders of threads, and that none changes a bit.
fn evaluate<T: Type>(case: Case, any_order: bool, target: &Target<'_>) {
    let data = Data::<T>::new(case);
    let want = data.on_cpu();
    let first = std::cell::OnceCell::new();
    let body = |machine: &mut crate::machine::Machine<'_>| {
        let operator = data.operator(machine);
        machine.launch(&operator.plan().unwrap());
        let values = machine.read::<f32>(operator.values);
        assert_values(&case, &values, &want.values);
        let gradient = operator.gradient.map(|gradient| machine.read::<T>(gradient));
        if let Some(gradient) = &gradient {
            assert_gradient(&case, gradient, &want.gradient);
            if case.logits == Logits::Normal {
                let result = format!("dlogits, {:?}", case.divergence);
                numerics::record(T::FORMAT, &result, &wide(gradient), None, &want.gradient);
            }
        }
        if case.logits == Logits::Normal {
            numerics::record(Format::F32, "values", &wide(&values), None, &want.values);
        }
        if let Partner::History { table, .. } = operator.partner {
            assert!(machine.read::<f32>(table) == want.table, "{case:?}: history");
        }
        assert_eq!(status(machine, &operator), LossStatus::default(), "{case:?}");
        assert_eq!(machine.read::<u32>(operator.workspace)[0], 0, "{case:?}: the ticket counter");
        // NaN is equal to itself here.
        let all = values.into_iter().chain(gradient.into_iter().flatten().map(T::widen));
        let results: Vec<u32> = all.map(f32::to_bits).collect();
        assert!(first.get_or_init(|| results.clone()) == &results, "{case:?} depends on the order");
    };
    if any_order {
        target.run(case.shift, body);
    } else {
        target.once(case.shift, body);
    }
}

/// Every divergence with every criterion, partner and type.
pub fn test(target: &Target<'_>) {
    let sizes = [10, 2, 100, 1, 33, 8];
    let mut number = 0;
    for divergence in DIVERGENCES {
        for criterion in CRITERIA {
            if criterion == Criterion::Values && divergence.is_of_probabilities() {
                continue;
            }
            for compared in [Compared::TwoBranch, Compared::Difference, Compared::History, Compared::None] {
                if compared == Compared::None && divergence != Divergence::SymmetricKl {
                    continue;
                }
                number += 1;
                let smoothing =
                    if criterion == Criterion::Values { 0.0 } else { [0.0, 0.1, 1.0][number % 3] };
                let case = Case {
                    divergence,
                    criterion,
                    compared,
                    smoothing,
                    classes: sizes[number % 6],
                    batch: 1 + number % 4,
                    shift: number / 2 % 2,
                    both_branches: number.is_multiple_of(2),
                    labelled_only: number % 3 == 1,
                    ignored: [None, Some(2), None, Some(3), Some(1)][number % 5],
                    denominator: [None, None, Some(2.5)][number % 3],
                    ..CASE
                };
                evaluate::<f32>(case, true, target);
                let other = Case { both_branches: !case.both_branches, shift: 1 - case.shift, ..case };
                evaluate::<f16>(Case { classes: sizes[(number + 1) % 6], ..other }, false, target);
                evaluate::<bf16>(Case { classes: sizes[(number + 2) % 6], ..other }, false, target);
            }
        }
    }
    for divergence in DIVERGENCES {
        // Values without a gradient, and more samples than a first round of blocks with one each.
        evaluate::<f32>(Case { divergence, gradient: false, ..CASE }, false, target);
        let criterion = Criterion::WeightedLabels;
        evaluate::<f32>(Case { divergence, criterion, batch: 131, classes: 3, ..CASE }, false, target);
    }
}

/// Logits that make numbers overflow, cancel or vanish.
pub fn extremes(target: &Target<'_>) {
    for divergence in DIVERGENCES {
        for logits in LOGITS {
            // Masked in one branch alone, differences are infinite: only the divergences of probabilities may come to something.
            if logits.is_masked_in_one() && !divergence.is_of_probabilities() {
                continue;
            }
            for compared in [Compared::TwoBranch, Compared::Difference] {
                if compared == Compared::Difference && logits.is_masked_in_one() {
                    continue;
                }
                for (classes, criterion) in [(10, Criterion::Labels), (300, Criterion::Probabilities)] {
                    let smoothing = 0.0;
                    let case = Case {
                        divergence,
                        criterion,
                        logits,
                        compared,
                        classes,
                        smoothing,
                        both_branches: classes == 10,
                        ..CASE
                    };
                    evaluate::<f32>(case, false, target);
                }
            }
        }
    }
}

/// Groups of many warps, and rows of several slices.
pub fn streamed(target: &Target<'_>) {
    for (i, divergence) in DIVERGENCES.into_iter().enumerate() {
        for (j, classes) in [257, 4096, 4097, 9001].into_iter().enumerate() {
            let number = i + j;
            let criterion = match divergence.is_of_probabilities() {
                true => [Criterion::WeightedLabels, Criterion::Probabilities][number % 2],
                false => [Criterion::WeightedLabels, Criterion::Probabilities, Criterion::Values][number % 3],
            };
            let case = Case {
                divergence,
                criterion,
                classes,
                batch: 1 + number % 2,
                compared: [Compared::TwoBranch, Compared::Difference, Compared::History][number % 3],
                logits: [Logits::Normal, Logits::Close][number / 2 % 2],
                both_branches: i % 2 == 0,
                smoothing: if criterion == Criterion::Values { 0.0 } else { [0.1, 0.0][j % 2] },
                shift: i % 2,
                ..CASE
            };
            // The smallest of several slices.
            let any_order = classes == 4097;
            match number % 3 {
                0 => evaluate::<bf16>(case, any_order, target),
                1 => evaluate::<f16>(case, any_order, target),
                _ => evaluate::<f32>(case, any_order, target),
            }
        }
        // What only one slice has.
        for logits in [Logits::Extreme, Logits::Masked] {
            let case = Case { divergence, logits, classes: 4104, batch: 1, smoothing: 0.0, ..CASE };
            evaluate::<f32>(case, false, target);
        }
    }
    // A row's divergence from those of its slices, where these, or their shares, are close, far apart or nothing.
    let slices = [Logits::MaskedSlice, Logits::MaskedSliceInOne, Logits::MaskedSliceInOther, Logits::Gap];
    for (number, logits) in LOGITS.into_iter().chain(slices).enumerate() {
        for divergence in DIVERGENCES.into_iter().filter(Divergence::is_of_probabilities) {
            if logits == Logits::Gap && divergence == Divergence::JensenShannon {
                // Next to log 2 nothing of its logarithms is left in f32.
                continue;
            }
            // A difference is infinite, or has lost the second logit.
            let compared = match logits.is_masked_in_one() || logits == Logits::Gap {
                true => Compared::TwoBranch,
                false => [Compared::TwoBranch, Compared::Difference][number % 2],
            };
            // The criterion of a class that a branch masks is infinite, and would be all that is seen of a small divergence.
            let both_branches =
                number % 2 == 1 && !logits.is_masked_in_one() && logits != Logits::SureOfOthers;
            let case = Case {
                divergence,
                logits,
                compared,
                classes: 9001,
                batch: 2,
                both_branches,
                smoothing: 0.0,
                ..CASE
            };
            evaluate::<f32>(case, false, target);
            // Vectors of 16-bit logits, and of f32 beside them.
            let criterion = [Criterion::Probabilities, Criterion::WeightedLabels][number % 2];
            let (compared, both_branches) = (Compared::History, false);
            let aligned = Case { classes: 4104, batch: 1, criterion, compared, both_branches, ..case };
            evaluate::<bf16>(aligned, false, target);
        }
    }
    // What is left beside a probability of 1 is far below a rounding of log p/q there, which the slice and the row must have alike.
    let divergence = Divergence::Kl { temperature: 0.7, detach_target: false };
    let sure = Case { divergence, logits: Logits::SureOfOthers, classes: 9001, smoothing: 0.0, ..CASE };
    evaluate::<f32>(Case { batch: 16, ..sure }, false, target);
    // Nothing but the summaries is left.
    let divergence = Divergence::JensenShannon;
    evaluate::<f32>(Case { divergence, classes: 4500, gradient: false, ..CASE }, false, target);
    let case = Case { divergence, classes: 9001, batch: 1, compared: Compared::None, ..CASE };
    evaluate::<f32>(Case { criterion: Criterion::Probabilities, ..case }, false, target);
}

/// Rows in slices, whatever the dimensions of the grid that has a block for each of them, or more.
pub fn any_grid(target: &Target<'_>) {
    for divergence in [Divergence::SymmetricKl, Divergence::JensenShannon] {
        let case = Case { divergence, batch: 5, classes: 4104, smoothing: 0.0, ..CASE };
        let data = Data::<bf16>::new(case);
        let want = data.on_cpu();
        for [y, z] in [[1, 5], [2, 3], [6, 1]] {
            target.once(0, |machine| {
                let operator = data.operator(machine);
                let mut plan = operator.plan().unwrap();
                // But for those that have a warp for each row.
                for launch in plan.launches_mut().filter(|launch| launch.grid[0] > 1) {
                    launch.grid = [launch.grid[0], y, z];
                }
                machine.launch(&plan);
                assert_values(&case, &machine.read::<f32>(operator.values), &want.values);
                assert_gradient(&case, &machine.read::<bf16>(operator.gradient.unwrap()), &want.gradient);
            });
        }
    }
}

/// A batch in parts, one after the other: they add up to the whole, with its denominators and its positions.
pub fn parts(target: &Target<'_>) {
    let paper =
        Case { divergence: Divergence::SquaredDifference, batch: 7, classes: 12, ignored: Some(3), ..CASE };
    let general =
        Case { divergence: Divergence::JensenShannon, criterion: Criterion::WeightedLabels, ..paper };
    for case in [
        paper,
        Case { labelled_only: true, ..paper },
        Case { denominator: Some(5.5), ..paper },
        Case { compared: Compared::None, ..paper },
        general,
        Case { labelled_only: true, both_branches: true, ..general },
        Case {
            denominator: Some(5.5),
            criterion: Criterion::Values,
            divergence: paper.divergence,
            smoothing: 0.0,
            ..general
        },
        Case { classes: 4100, ..paper },
        Case { classes: 4100, ..general },
    ] {
        let mut data = Data::<f32>::new(case);
        let want = data.on_cpu();
        let has_labels = case.criterion != Criterion::Values;
        if has_labels {
            // They were ignored, and still are, but reported. Two parts have one.
            (data.labels[3], data.labels[6]) = (-7, 99_999);
        }
        target.once(0, |machine| {
            let mut gradients = Vec::new();
            // Values and status are there before the first part.
            let values = machine.in_out("values", &[0f32; 3]);
            let status_words = machine.in_out("status", &[0u64; LossStatus::WORDS]);
            let counted = has_labels.then(|| machine.input("counted", &data.labels));
            for rows in [0..2, 2..4, 4..7] {
                let part = data.part(rows.clone());
                let mut operator = part.operator(machine);
                operator.counted = counted.filter(|_| case.denominator.is_none());
                (operator.values, operator.status) = (values, status_words);
                (operator.accumulate, operator.first_row) = (true, rows.start);
                machine.launch(&operator.plan().unwrap());
                gradients.push((rows, machine.read::<f32>(operator.gradient.unwrap())));
            }
            assert_values(&case, &machine.read::<f32>(values), &want.values);
            let c = case.classes;
            for (rows, gradient) in gradients {
                for branch in 0..case.compared.branches() {
                    let at = (branch * case.batch + rows.start) * c..(branch * case.batch + rows.end) * c;
                    let part = branch * rows.len() * c..(branch + 1) * rows.len() * c;
                    assert_gradient(&case, &gradient[part], &want.gradient[at]);
                }
            }
            let words = machine.read::<u64>(status_words);
            let found = LossStatus::new(words.try_into().unwrap());
            let labels = match has_labels {
                true => Finding { count: 2, position: 3, value: -7 },
                false => Finding::default(),
            };
            assert_eq!(found, LossStatus { labels, ..LossStatus::default() }, "{case:?}");
        });
    }
}

/// Wrong labels and indices are skipped and reported.
pub fn wrong_data(target: &Target<'_>) {
    for classes in [10, 4200] {
        for divergence in [Divergence::CenteredSquaredDifference, Divergence::SymmetricKl] {
            let compared = Compared::History;
            let case = Case {
                divergence,
                criterion: Criterion::WeightedLabels,
                compared,
                classes,
                batch: 4,
                ..CASE
            };
            let mut data = Data::<f32>::new(case);
            (data.labels[1], data.index[2], data.index[3]) = (-9, 77, data.index[0]);
            target.once(0, |machine| {
                let operator = data.operator(machine);
                machine.launch(&operator.plan().unwrap());
                let found = status(machine, &operator);
                assert_eq!(found.labels, Finding { count: 1, position: 1, value: -9 });
                assert_eq!(found.indices, Finding { count: 1, position: 2, value: 77 });
                assert_eq!(found.repeated, Finding { count: 1, position: 3, value: data.index[0] });
                // What is left of each sample.
                let gradient = machine.read::<f32>(operator.gradient.unwrap());
                let mut forgiving = data.clone();
                forgiving.labels[1] = IGNORED;
                // These are compared with themselves.
                (forgiving.index[2], forgiving.index[3]) = (4, 5);
                let c = classes;
                for i in [2, 3] {
                    let at = forgiving.index[i] as usize * c;
                    for k in 0..c {
                        forgiving.table[at + k] = forgiving.logits[i * c + k];
                    }
                }
                let want = forgiving.on_cpu();
                assert_values(&case, &machine.read::<f32>(operator.values), &want.values);
                assert_gradient(&case, &gradient, &want.gradient);
            });
        }
    }
}

/// NaN and infinity come out where the formula has them, and nowhere else.
pub fn not_a_number(target: &Target<'_>) {
    for divergence in DIVERGENCES {
        for (number, value) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
            // In the second sample of a branch, and beside a class that one branch masks.
            for (classes, place, masked) in [
                (10, 11, None),
                (10, 31, None),
                (10, 11, Some(35)),
                (10, 31, Some(15)),
                (10, 31, Some(11)),
                // In the second of two slices; in the first, with a mask in the second.
                (4104, 8200, None),
                (4104, 4105, Some(16_400)),
            ] {
                let criterion = [Criterion::Probabilities, Criterion::WeightedLabels][number % 2];
                let case = Case { divergence, criterion, batch: 2, classes, smoothing: 0.0, ..CASE };
                let mut data = Data::<f32>::new(case);
                data.labels.fill(0);
                data.logits[place] = value;
                if let Some(masked) = masked {
                    data.logits[masked] = f32::NEG_INFINITY;
                }
                let want = data.on_cpu();
                target.once(0, |machine| {
                    let operator = data.operator(machine);
                    machine.launch(&operator.plan().unwrap());
                    let gradient = machine.read::<f32>(operator.gradient.unwrap());
                    let values = machine.read::<f32>(operator.values);
                    let all = gradient.iter().zip(&want.gradient).chain(values.iter().zip(&want.values));
                    for (&got, &want) in all {
                        let got = f64::from(got);
                        let same = got == want
                            || got.is_nan() && want.is_nan()
                            || want.is_finite() && (got - want).abs() <= 1e-5 * want.abs() + 1e-7;
                        assert!(same, "{case:?} {value} at {place}, masked {masked:?}: {got} {want}");
                    }
                });
            }
        }
    }
}

/// The settings of a case are those that a user would write, without what would be refused.
pub fn settings(case: &Case) -> LossSettings {
    LossSettings {
        divergence: case.divergence,
        label_smoothing: case.smoothing,
        ignore_label: Some(IGNORED),
        labelled_only: case.labelled_only
            && matches!(case.criterion, Criterion::Labels | Criterion::WeightedLabels),
        both_branches: case.both_branches && case.compared != Compared::History,
        denominator: case.denominator,
        ..LossSettings::new(case.classes, 0.3)
    }
}
