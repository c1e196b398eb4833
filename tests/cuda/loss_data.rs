//! Cases of the loss: their inputs, what the CPU operator in f64 says to them, and the operator on a machine.

use crate::machine::Machine;
use crate::numerics::{self, Format};
use crate::support::{Type, assert_close, rounded, wide};
use crate::uniform;
use pace_kernels::cpu;
use pace_kernels::cuda::{Buffer, Loss, LossStatus, Partner};
use pace_kernels::noise::philox4x32_10;
use pace_kernels::{LossSettings, Targets};

/// Which consistency term.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Variant {
    None,
    TwoBranch,
    History,
}

pub const VARIANTS: [Variant; 3] = [Variant::None, Variant::TwoBranch, Variant::History];

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Logits {
    Uniform,
    /// What does not survive an exponential without its maximum.
    Extreme,
    Equal,
    /// The label is so likely that the cross-entropy is far smaller than a logit's last bit.
    Sure,
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub batch: usize,
    pub classes: usize,
    pub variant: Variant,
    pub logits: Logits,
    pub smoothing: f64,
    pub ignore_label: Option<i64>,
    /// Every how-manieth sample has the ignored label.
    pub ignored: Option<usize>,
    pub gradient: bool,
    /// Elements past an aligned address at which tensors start.
    pub shift: usize,
}

pub const CASE: Case = Case {
    batch: 3,
    classes: 10,
    variant: Variant::TwoBranch,
    logits: Logits::Uniform,
    smoothing: 0.1,
    ignore_label: None,
    ignored: None,
    gradient: true,
    shift: 0,
};

/// Rows of the history table, more than samples.
const EXTRA_ROWS: usize = 2;

impl Case {
    pub fn settings(&self) -> LossSettings {
        LossSettings {
            label_smoothing: self.smoothing,
            ignore_label: self.ignore_label,
            ..LossSettings::new(self.classes, 0.3)
        }
    }

    pub fn rows(&self) -> usize {
        self.batch + EXTRA_ROWS
    }
}

/// Inputs of one case.
#[derive(Debug, Clone)]
pub struct Data<T> {
    pub case: Case,
    pub logits: Vec<T>,
    pub labels: Vec<i64>,
    pub table: Vec<f32>,
    pub index: Vec<i64>,
}

/// What has to come out.
pub struct Want<T> {
    pub values: [f64; 3],
    pub gradient: Vec<f64>,
    /// The gradient with every operation rounded to `T`.
    pub unfused: Vec<T>,
    pub table: Vec<f32>,
}

impl<T: Type> Data<T> {
    pub fn new(case: Case) -> Self {
        let Case { batch, classes, variant, .. } = case;
        let len = if variant == Variant::TwoBranch { 2 } else { 1 } * batch * classes;
        let word = |seed: u32, i: usize| philox4x32_10([i as u32, 0, 0, 0], [seed, 7])[0];
        let label = |i: usize| match case.ignored {
            Some(every) if i.is_multiple_of(every) => case.ignore_label.unwrap(),
            _ => i64::from(word(3, i)) % classes as i64,
        };
        let labels: Vec<i64> = (0..batch).map(label).collect();
        let mut logits: Vec<T> = match case.logits {
            Logits::Uniform | Logits::Sure => {
                rounded::<T>(1, len).iter().map(|l| T::round(4.0 * f64::from(l.widen()))).collect()
            }
            Logits::Extreme => {
                let values = [1e4, -1e4, 0.0, 65504.0, -65504.0, 1.0, 9999.0];
                (0..len).map(|i| T::round(values[word(2, i) as usize % values.len()])).collect()
            }
            Logits::Equal => vec![T::round(-3.5); len],
        };
        if case.logits == Logits::Sure {
            for (row, &label) in logits.chunks_mut(classes).zip(&labels) {
                row[label as usize] = T::round(20.0);
            }
        }
        let (table, index) = match variant {
            Variant::History => {
                // A permutation's beginning: the row of sample i is i's place from the end.
                let index = (0..batch).map(|i| (case.rows() - 1 - i) as i64).collect();
                (uniform(4, case.rows() * classes), index)
            }
            Variant::None | Variant::TwoBranch => (Vec::new(), Vec::new()),
        };
        Self { case, logits, labels, table, index }
    }

    /// Whether the loss can use a sample's label, and whether its index.
    pub fn is_labelled(&self, i: usize) -> bool {
        Some(self.labels[i]) != self.case.ignore_label
            && (0..self.case.classes as i64).contains(&self.labels[i])
    }

    pub fn has_row(&self, i: usize) -> bool {
        let at = self.index[i];
        (0..self.case.rows() as i64).contains(&at) && !self.index[..i].contains(&at)
    }

    /// What the CPU says to the inputs as they are.
    pub fn on_cpu(&self) -> pace_kernels::Result<Want<T>> {
        self.on_cpu_with(self.case.ignore_label, &self.labels)
    }

    fn on_cpu_with(&self, ignore_label: Option<i64>, labels: &[i64]) -> pace_kernels::Result<Want<T>> {
        let settings = LossSettings { ignore_label, ..self.case.settings() };
        let loss = cpu::Loss { settings, targets: Targets::Labels(labels), class_weights: None };
        let mut table: Vec<f64> = wide(&self.table);
        let consistency = match self.case.variant {
            Variant::None => cpu::Consistency::None,
            Variant::TwoBranch => cpu::Consistency::TwoBranch,
            Variant::History => cpu::Consistency::History { table: &mut table, index: &self.index },
        };
        let mut gradient = vec![0.0; self.logits.len()];
        let values = loss.evaluate(&wide(&self.logits), consistency, Some(&mut gradient))?;
        Ok(Want {
            values: [values.total, values.classification, values.consistency],
            gradient,
            unfused: self.unfused(),
            table: table.into_iter().map(|value| value as f32).collect(),
        })
    }

    /// What has to come out of wrong inputs: wrong labels count as ignored, and a sample without a row of the history has
    /// itself for a partner.
    pub fn forgiving(&self) -> Want<T> {
        let Case { batch, classes, variant, ignore_label, .. } = self.case;
        let ignore = ignore_label.unwrap_or(-100);
        let labels: Vec<i64> =
            (0..batch).map(|i| if self.is_labelled(i) { self.labels[i] } else { ignore }).collect();
        if variant != Variant::History {
            return self.on_cpu_with(Some(ignore), &labels).unwrap();
        }
        let settings = LossSettings { ignore_label: Some(ignore), ..self.case.settings() };
        let loss = cpu::Loss { settings, targets: Targets::Labels(&labels), class_weights: None };
        let (mut logits, mut table) = (wide(&self.logits), self.table.clone());
        for i in 0..batch {
            let own = logits[i * classes..][..classes].to_vec();
            if self.has_row(i) {
                let row = &mut table[self.index[i] as usize * classes..][..classes];
                logits.extend(wide(row));
                row.iter_mut().zip(own).for_each(|(row, own)| *row = own as f32);
            } else {
                logits.extend(own);
            }
        }
        let mut gradient = vec![0.0; logits.len()];
        let values = loss.evaluate(&logits, cpu::Consistency::TwoBranch, Some(&mut gradient)).unwrap();
        gradient.truncate(batch * classes);
        Want {
            values: [values.total, values.classification, values.consistency],
            gradient,
            unfused: self.unfused(),
            table,
        }
    }

    /// The gradient with every operation rounded to `T`.
    fn unfused(&self) -> Vec<T> {
        let Case { batch, classes, variant, .. } = self.case;
        let LossSettings { lambda, label_smoothing, .. } = self.case.settings();
        let r = |value: f64| f64::from(T::round(value).widen());
        let labelled = (0..batch).filter(|&i| self.is_labelled(i)).count();
        let (weight, pull) = (r(1.0 / labelled as f64), r(2.0 * lambda / batch as f64));
        let spread = r(label_smoothing / classes as f64);
        let logits = wide(&self.logits);
        let mut gradient = vec![T::round(0.0); logits.len()];
        for i in 0..batch {
            let row = &logits[i * classes..][..classes];
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = row.iter().map(|l| r(r(l - max).exp())).collect();
            let sum = r(powers.iter().sum());
            for c in 0..classes {
                let cross_entropy = if self.is_labelled(i) {
                    let own = if c as i64 == self.labels[i] { r(1.0 - label_smoothing) } else { 0.0 };
                    r(r(r(r(powers[c] / sum) - own) - spread) * weight)
                } else {
                    0.0
                };
                let partner = match variant {
                    Variant::None => row[c],
                    Variant::TwoBranch => logits[(batch + i) * classes + c],
                    Variant::History if self.has_row(i) => {
                        f64::from(self.table[self.index[i] as usize * classes + c])
                    }
                    Variant::History => row[c],
                };
                let pull = r(pull * r(row[c] - partner));
                gradient[i * classes + c] = T::round(cross_entropy + pull);
                if variant == Variant::TwoBranch {
                    gradient[(batch + i) * classes + c] = T::round(-pull);
                }
            }
        }
        gradient
    }

    /// The operator on a machine.
    pub fn operator(&self, machine: &mut Machine<'_>) -> Loss {
        let Case { batch, variant, gradient, .. } = self.case;
        let targets = Targets::Labels(machine.input("labels", &self.labels));
        let partner = match variant {
            Variant::None => Partner::None,
            Variant::TwoBranch => Partner::OtherBranch,
            Variant::History => Partner::History {
                table: machine.in_out("history", &self.table),
                index: machine.input("index", &self.index),
            },
        };
        operator(machine, self.case.settings(), batch, &self.logits, targets, partner, gradient)
    }

    /// Checks what a launch has left, and gives the status.
    pub fn check(&self, machine: &Machine<'_>, operator: &Loss, want: &Want<T>) -> LossStatus {
        let what = format!("{:?}", self.case);
        let values = machine.read::<f32>(operator.values);
        assert_values(&what, &values, want);
        numerics::record(Format::F32, "values", &wide(&values), None, &want.values);
        if let Some(gradient) = operator.gradient {
            let got = machine.read::<T>(gradient);
            assert_close("dlogits", &self.case, &got, &want.unfused, &want.gradient);
            // Of other logits, and of uniform targets, nothing is left.
            if self.case.logits == Logits::Uniform && self.case.smoothing < 1.0 {
                numerics::record(
                    T::FORMAT,
                    "dlogits",
                    &wide(&got),
                    Some(&wide(&want.unfused)),
                    &want.gradient,
                );
            }
        }
        if let Partner::History { table, .. } = operator.partner {
            assert!(machine.read::<f32>(table) == want.table, "{what}: history");
        }
        assert_eq!(machine.read::<u32>(operator.workspace)[0], 0, "{what}: the ticket counter");
        status(machine, operator)
    }
}

/// The operator without class weights on a machine, with room for what it writes; `gradient`: whether that is wanted.
pub fn operator<T: Type>(
    machine: &mut Machine<'_>,
    settings: LossSettings,
    batch: usize,
    logits: &[T],
    targets: Targets<Buffer, Buffer>,
    partner: Partner,
    gradient: bool,
) -> Loss {
    // Nothing but the first word may matter.
    let mut workspace = vec![u32::MAX; settings.workspace_len(batch)];
    workspace[0] = 0;
    Loss {
        settings,
        dtype: T::DTYPE,
        logits: machine.input("logits", logits),
        targets,
        class_weights: None,
        counted: None,
        partner,
        gradient: gradient.then(|| machine.output::<T>("gradient", logits.len())),
        values: machine.output::<f32>("values", 3),
        status: machine.output::<u64>("status", LossStatus::WORDS),
        accumulate: false,
        first_row: 0,
        workspace: machine.in_out("workspace", &workspace),
    }
}

pub fn status(machine: &Machine<'_>, operator: &Loss) -> LossStatus {
    LossStatus::new(machine.read::<u64>(operator.status).try_into().unwrap())
}

/// Values are in f32 for every type of logits.
pub fn assert_values<T>(what: &str, got: &[f32], want: &Want<T>) {
    for (got, want) in got.iter().zip(want.values) {
        let error = (f64::from(*got) - want).abs();
        assert!(want.is_finite() && error <= 1e-5 * want.abs() + 1e-15, "{what}: {got:e}, expected {want:e}");
    }
}
