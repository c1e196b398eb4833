//! Cases of the general loss: their inputs, what the CPU operator in f64 says to them, and the operator on a machine.

use crate::loss_data::operator;
use crate::loss_general::settings;
use crate::machine::Machine;
use crate::support::{Type, rounded, wide};
use crate::uniform;
use pace_kernels::cuda::{DType, Loss, Partner};
use pace_kernels::{Divergence, Targets, cpu};

pub const DIVERGENCES: [Divergence; 7] = [
    Divergence::SquaredDifference,
    Divergence::MeanSquaredDifference,
    Divergence::CenteredSquaredDifference,
    Divergence::SymmetricKl,
    Divergence::Kl { temperature: 2.0, detach_target: false },
    Divergence::Kl { temperature: 0.7, detach_target: true },
    Divergence::JensenShannon,
];

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Criterion {
    Labels,
    WeightedLabels,
    Probabilities,
    Values,
}

pub const CRITERIA: [Criterion; 4] =
    [Criterion::Labels, Criterion::WeightedLabels, Criterion::Probabilities, Criterion::Values];

/// What branch 0 is compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Compared {
    None,
    TwoBranch,
    Difference,
    History,
}

impl Compared {
    pub fn branches(self) -> usize {
        match self {
            Self::TwoBranch | Self::Difference => 2,
            Self::None | Self::History => 1,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Logits {
    Normal,
    /// Branches that differ by a thousandth, and a shift that a softmax does not see.
    Close,
    /// Branches that differ by a thousand and a little more or less, in numbers that f32 has.
    Shifted,
    Equal,
    /// What does not survive an exponential without its maximum.
    Extreme,
    /// The label is so likely that the cross-entropy is far smaller than a logit's last bit.
    Sure,
    /// Each branch is sure of another class.
    SureOfOthers,
    /// A class that branch 0 all but masks lies in a slice that it prefers, the first of 9001 classes.
    Gap,
    /// Classes that both branches have at -inf.
    Masked,
    /// And others that branch 0 has.
    MaskedInOne,
    /// Or branch 1.
    MaskedInOther,
    /// The last of three slices of 9001 classes, masked by both branches, or by one.
    MaskedSlice,
    MaskedSliceInOne,
    MaskedSliceInOther,
}

impl Logits {
    /// Whether a branch masks a class.
    fn masks(self, branch: usize, class: usize, classes: usize) -> bool {
        let in_slice = class >= 2 * classes.div_ceil(3).next_multiple_of(8);
        match self {
            Self::Masked => class % 3 == 1,
            Self::MaskedInOne => class % 3 == 1 || class % 3 == 2 && branch == 0,
            Self::MaskedInOther => class % 3 == 1 || class % 3 == 2 && branch == 1,
            Self::MaskedSlice => in_slice,
            Self::MaskedSliceInOne => in_slice && branch == 0,
            Self::MaskedSliceInOther => in_slice && branch == 1,
            _ => false,
        }
    }

    /// Whether one branch has classes that the other one masks.
    pub fn is_masked_in_one(self) -> bool {
        matches!(
            self,
            Self::MaskedInOne | Self::MaskedInOther | Self::MaskedSliceInOne | Self::MaskedSliceInOther
        )
    }
}

pub const LOGITS: [Logits; 9] = [
    Logits::Shifted,
    Logits::Close,
    Logits::Equal,
    Logits::Extreme,
    Logits::Sure,
    Logits::SureOfOthers,
    Logits::Masked,
    Logits::MaskedInOne,
    Logits::MaskedInOther,
];

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub divergence: Divergence,
    pub criterion: Criterion,
    pub compared: Compared,
    pub logits: Logits,
    pub batch: usize,
    pub classes: usize,
    pub smoothing: f64,
    /// Every how-manieth sample has the ignored label.
    pub ignored: Option<usize>,
    pub labelled_only: bool,
    pub both_branches: bool,
    pub denominator: Option<f64>,
    pub gradient: bool,
    /// Elements past an aligned address at which tensors start.
    pub shift: usize,
}

pub const CASE: Case = Case {
    divergence: Divergence::SymmetricKl,
    criterion: Criterion::Labels,
    compared: Compared::TwoBranch,
    logits: Logits::Normal,
    batch: 3,
    classes: 10,
    smoothing: 0.1,
    ignored: None,
    labelled_only: false,
    both_branches: false,
    denominator: None,
    gradient: true,
    shift: 0,
};

pub const IGNORED: i64 = -100;

/// Inputs of one case.
#[derive(Debug, Clone)]
pub struct Data<T> {
    pub case: Case,
    pub logits: Vec<T>,
    pub labels: Vec<i64>,
    /// Probabilities or values.
    targets: Vec<f32>,
    class_weights: Vec<f32>,
    pub table: Vec<f32>,
    pub index: Vec<i64>,
}

/// What has to come out.
pub struct Want {
    pub values: [f64; 3],
    pub gradient: Vec<f64>,
    pub table: Vec<f32>,
}

/// The logits of branch 0, then of the other one.
fn logits(case: &Case) -> [Vec<f64>; 2] {
    let len = case.batch * case.classes;
    let random = |seed: u32, scale: f64| -> Vec<f64> {
        uniform(seed, len).into_iter().map(|value| scale * f64::from(value)).collect()
    };
    let mut pair = [random(1, 6.0), random(2, 6.0)];
    match case.logits {
        Logits::Normal | Logits::Sure => {}
        Logits::Close => {
            pair[1] = pair[0].iter().zip(random(2, 1e-3)).map(|(l, d)| l + 0.03125 + d).collect()
        }
        Logits::Shifted => {
            let grid = |value: f64| (value * 1024.0).round() / 1024.0;
            pair[0].iter_mut().for_each(|l| *l = grid(*l));
            pair[1] = pair[0].iter().zip(random(2, 0.005)).map(|(l, d)| l - 1000.0 + grid(d)).collect();
        }
        Logits::Equal => pair[1] = pair[0].clone(),
        Logits::SureOfOthers => {
            for first in (0..len).step_by(case.classes) {
                pair[0][first + 1] = 50.0;
                pair[1][first + case.classes - 1] = 50.0;
            }
        }
        Logits::Extreme => {
            let values = [1e4, -1e4, 0.0, 6e4, -6e4, 1.0, 9999.0];
            for row in &mut pair {
                row.iter_mut().for_each(|l| *l = values[(l.abs() * 1e4) as usize % values.len()]);
            }
        }
        Logits::Gap => {
            let [zero, one] = &mut pair;
            for (first, second) in zero.chunks_mut(case.classes).zip(one.chunks_mut(case.classes)) {
                (first[1], second[1]) = (-1e6, 8.0);
                let slice = first.len().div_ceil(3).next_multiple_of(8);
                first.iter_mut().skip(slice).for_each(|l| *l -= 18.0);
                second.iter_mut().skip(slice).for_each(|l| *l += 18.0);
            }
        }
        masked => {
            for (branch, row) in pair.iter_mut().enumerate() {
                for i in (0..len).filter(|i| masked.masks(branch, i % case.classes, case.classes)) {
                    row[i] = f64::NEG_INFINITY;
                }
            }
        }
    }
    pair
}

impl<T: Type> Data<T> {
    pub fn new(case: Case) -> Self {
        let Case { batch, classes, .. } = case;
        let labels: Vec<i64> = (0..batch)
            .map(|i| match case.ignored {
                Some(every) if i.is_multiple_of(every) => IGNORED,
                // Never one that is masked; of rows of several slices, in any of them.
                _ if classes > 4096 => ((i * 5003 + 4000) % classes / 3 * 3) as i64,
                _ => ((i * 7 + 3) % classes / 3 * 3) as i64,
            })
            .collect();
        let [mut first, mut second] = logits(&case);
        if case.logits == Logits::Sure {
            for (i, &label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
                first[i * classes + label as usize] = 30.0;
                second[i * classes + label as usize] = 29.0;
            }
        }
        let round = |values: &[f64]| -> Vec<T> { values.iter().map(|&value| T::round(value)).collect() };
        let mut logits = round(&first);
        match case.compared {
            Compared::TwoBranch => logits.extend(round(&second)),
            Compared::Difference => {
                let less = |(a, b): (&f64, &f64)| if a == b { 0.0 } else { a - b };
                logits.extend(first.iter().zip(&second).map(less).map(T::round));
            }
            Compared::None | Compared::History => {}
        }
        // A permutation's beginning, of more rows than samples.
        let (mut table, mut index) = (Vec::new(), Vec::new());
        if case.compared == Compared::History {
            index = (0..batch as i64).rev().collect();
            table = second.chunks(classes).rev().flatten().map(|&l| l as f32).collect();
            table.extend(uniform(9, 2 * classes));
        }
        let sure = case.logits == Logits::Sure;
        let masked = |k: usize| (0..2).any(|branch| case.logits.masks(branch, k, classes));
        let mut targets: Vec<f32> = match case.criterion {
            Criterion::Labels | Criterion::WeightedLabels => Vec::new(),
            Criterion::Probabilities => rounded::<f32>(5, batch * classes).iter().map(|p| p * p).collect(),
            Criterion::Values => rounded::<f32>(5, batch * classes),
        };
        if case.criterion == Criterion::Probabilities {
            for (row, &label) in targets.chunks_mut(classes).zip(&labels) {
                row.iter_mut().enumerate().filter(|(k, _)| masked(*k)).for_each(|(_, p)| *p = 0.0);
                if sure {
                    row.fill(0.0);
                    row[label.max(0) as usize] = 1.0;
                }
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|p| *p /= sum);
            }
        }
        let class_weights = match case.criterion {
            // One of them is nothing.
            Criterion::WeightedLabels => (0..classes).map(|k| (k * 5 % 4) as f32 * 0.5).collect(),
            _ => Vec::new(),
        };
        Self { case, logits, labels, targets, class_weights, table, index }
    }

    /// Some of the samples as a batch; not with a history.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let Case { batch, classes, .. } = self.case;
        let of = |values: &[T], branch: usize| {
            values[(branch * batch + rows.start) * classes..(branch * batch + rows.end) * classes].to_vec()
        };
        let logits = (0..self.case.compared.branches()).flat_map(|branch| of(&self.logits, branch)).collect();
        let targets = match self.targets.is_empty() {
            true => Vec::new(),
            false => self.targets[rows.start * classes..rows.end * classes].to_vec(),
        };
        let case = Case { batch: rows.len(), ..self.case };
        Self { case, logits, targets, labels: self.labels[rows].to_vec(), ..self.clone() }
    }

    pub fn on_cpu(&self) -> Want {
        let targets = wide(&self.targets);
        let weights = wide(&self.class_weights);
        let loss = cpu::Loss {
            settings: settings(&self.case),
            targets: match self.case.criterion {
                Criterion::Labels | Criterion::WeightedLabels => Targets::Labels(&self.labels[..]),
                Criterion::Probabilities => Targets::Probabilities(&targets[..]),
                Criterion::Values => Targets::Values(&targets[..]),
            },
            class_weights: (!weights.is_empty()).then_some(&weights[..]),
        };
        let mut table = wide(&self.table);
        let consistency = match self.case.compared {
            Compared::None => cpu::Consistency::None,
            Compared::TwoBranch => cpu::Consistency::TwoBranch,
            Compared::Difference => cpu::Consistency::Difference,
            Compared::History => cpu::Consistency::History { table: &mut table, index: &self.index },
        };
        let mut gradient = vec![0.0; self.logits.len()];
        let values = loss.evaluate(&wide(&self.logits), consistency, Some(&mut gradient)).unwrap();
        Want {
            values: [values.total, values.classification, values.consistency],
            gradient,
            table: table.into_iter().map(|value| value as f32).collect(),
        }
    }

    /// The operator on a machine.
    pub fn operator(&self, machine: &mut Machine<'_>) -> Loss {
        let Case { batch, criterion, compared, gradient, .. } = self.case;
        let targets = match criterion {
            Criterion::Labels | Criterion::WeightedLabels => {
                Targets::Labels(machine.input("labels", &self.labels))
            }
            Criterion::Probabilities => Targets::Probabilities(machine.input("targets", &self.targets)),
            Criterion::Values => Targets::Values(machine.input("targets", &self.targets)),
        };
        let partner = match compared {
            Compared::None => Partner::None,
            Compared::TwoBranch => Partner::OtherBranch,
            Compared::Difference => Partner::Difference,
            Compared::History => Partner::History {
                table: machine.in_out("history", &self.table),
                index: machine.input("index", &self.index),
            },
        };
        Loss {
            class_weights: (!self.class_weights.is_empty())
                .then(|| machine.input("class_weights", &self.class_weights)),
            ..operator(machine, settings(&self.case), batch, &self.logits, targets, partner, gradient)
        }
    }
}

/// Values are in f32 for every type of logits. The floor is the oracle's own: of close branches it adds up terms that cancel.
pub fn assert_values(case: &Case, got: &[f32], want: &[f64; 3]) {
    for (&got, &want) in got.iter().zip(want) {
        let error = (f64::from(got) - want).abs();
        let same = f64::from(got) == want || want.is_finite() && error <= 1e-5 * want.abs() + 1e-15;
        assert!(same, "{case:?}: {got:e}, expected {want:e}");
    }
}

/// Arithmetic in f32, to 1e-5 of the row's largest gradient, and one rounding.
pub fn assert_gradient<T: Type>(case: &Case, got: &[T], want: &[f64]) {
    // Below, numbers of 16 bits have fewer bits; and the oracle's own rounding.
    let floor = if T::DTYPE == DType::F16 { 2f64.powi(-25) } else { 1e-16 };
    let epsilon = if T::DTYPE == DType::F32 { 0.0 } else { T::EPSILON };
    for (row, (got, want)) in got.chunks(case.classes).zip(want.chunks(case.classes)).enumerate() {
        let largest = want
            .iter()
            .filter(|value| value.is_finite())
            .fold(0f64, |largest, value| largest.max(value.abs()));
        for (c, (got, &want)) in got.iter().zip(want).enumerate() {
            let got = f64::from(got.widen());
            let bound = epsilon * want.abs() + 1e-5 * largest + floor;
            let close = want.is_finite() && (got - want).abs() <= bound;
            let same = got == want || close || got.is_nan() && want.is_nan();
            assert!(
                same,
                "{case:?} {:?} row {row}, {c}: {got:e}, expected {want:e} of {largest:e}",
                T::DTYPE
            );
        }
    }
}
