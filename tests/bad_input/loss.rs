//! The loss: sizes, settings, labels and rows of the history.

use crate::support::*;
use pace_kernels::cpu::{Consistency, Loss};
use pace_kernels::{Error, LossSettings, Result, Targets};
use proptest::prelude::*;

/// A call of the loss, in a form that can be corrupted piece by piece.
#[derive(Debug, Clone)]
struct LossCall {
    classes: usize,
    labels: Vec<i64>,
    lambda: f64,
    label_smoothing: f64,
    ignore_label: Option<i64>,
    two_branches: bool,
    logits: usize,
    gradient: Option<usize>,
    /// Elements of the table, and the index.
    history: Option<(usize, Vec<i64>)>,
}

impl LossCall {
    /// Runs the loss; on an error, checks that neither the gradient nor the history was written.
    fn run(&self) -> Result<()> {
        let &Self { classes, ref labels, lambda, label_smoothing, ignore_label, .. } = self;
        let settings = LossSettings { label_smoothing, ignore_label, ..LossSettings::new(classes, lambda) };
        let loss = Loss { settings, targets: Targets::Labels(labels), class_weights: None };
        let logits = vec![0.5; self.logits];
        let mut gradient = self.gradient.map(|len| vec![UNTOUCHED; len]);
        let mut table = vec![UNTOUCHED; self.history.as_ref().map_or(0, |history| history.0)];
        let consistency = match &self.history {
            Some((_, index)) => Consistency::History { table: &mut table, index },
            None if self.two_branches => Consistency::TwoBranch,
            None => Consistency::None,
        };
        let result = loss.evaluate(&logits, consistency, gradient.as_deref_mut()).map(drop);
        let mut outputs = gradient.iter().flatten().chain(&table);
        assert!(result.is_ok() || outputs.all(|&v| v == UNTOUCHED), "{result:?}, but outputs were written");
        result
    }

    /// The same with about a quarter of its fields from `garbage`, so that some calls are right after all.
    fn garbled(self, garbage: Self, fitting: u32) -> Self {
        let fits = |i: usize| fitting >> (2 * i) & 3 != 0;
        fn either<T>(fits: bool, right: T, garbage: T) -> T {
            if fits { right } else { garbage }
        }
        Self {
            classes: either(fits(0), self.classes, garbage.classes),
            labels: either(fits(1), self.labels, garbage.labels),
            lambda: either(fits(2), self.lambda, garbage.lambda),
            label_smoothing: either(fits(3), self.label_smoothing, garbage.label_smoothing),
            ignore_label: either(fits(4), self.ignore_label, garbage.ignore_label),
            two_branches: either(fits(5), self.two_branches, garbage.two_branches),
            logits: either(fits(6), self.logits, garbage.logits),
            gradient: either(fits(7), self.gradient, garbage.gradient),
            history: either(fits(8), self.history, garbage.history),
        }
    }

    fn check(&self, corrupt: impl FnOnce(&mut Self), want: Error) {
        let mut call = self.clone();
        corrupt(&mut call);
        assert_error(call.run(), want);
    }

    fn check_corruptions(&self, seed: usize) {
        self.run().unwrap_or_else(|error| panic!("{error} for a correct call {self:?}"));
        let (classes, batch, logits) = (self.classes, self.labels.len(), self.logits);
        let shape = if self.two_branches { "[2B, C]" } else { "[B, C]" };
        let length = |argument, shape, expected, got| Error::Length { argument, shape, expected, got };

        self.check(|c| c.classes = 0, size("classes", "at least 1", 0));
        self.check(|c| c.labels.clear(), size("labels.len()", "at least 1", 0));
        for huge in OVERFLOWS {
            self.check(|c| c.classes = huge, Error::Overflow { argument: "logits", shape });
        }
        for more in [classes + 1, 2 * classes, 1 << 40] {
            self.check(|c| c.classes = more, length("logits", shape, logits / classes * more, logits));
        }
        for wrong in [0, logits - 1, logits + 1, logits * 2] {
            self.check(|c| c.logits = wrong, length("logits", shape, logits, wrong));
            self.check(|c| c.gradient = Some(wrong), length("gradient", shape, logits, wrong));
        }
        for bad in [-1.0, -f64::MIN_POSITIVE].into_iter().chain(NOT_FINITE) {
            self.check(|c| c.lambda = bad, value("lambda", "finite and not negative", bad));
        }
        for bad in [-0.1, 1.0 + f64::EPSILON].into_iter().chain(NOT_FINITE) {
            self.check(|c| c.label_smoothing = bad, value("label_smoothing", "in [0, 1]", bad));
        }
        let position = seed % batch;
        for label in [-1, classes as i64, i64::MIN, i64::MAX] {
            self.check(|c| c.labels[position] = label, Error::Label { position, label, classes });
        }
        if let Some(label) = self.ignore_label
            && let Some(position) = self.labels.iter().position(|&l| l == label)
        {
            self.check(|c| c.ignore_label = None, Error::Label { position, label, classes });
        }
        let Some((table, index)) = &self.history else { return };
        let rows = table / classes;
        fn history(call: &mut LossCall) -> &mut (usize, Vec<i64>) {
            call.history.as_mut().unwrap()
        }
        for bad in [-1, rows as i64, i64::MIN, i64::MAX] {
            self.check(|c| history(c).1[position] = bad, Error::Index { position, index: bad, rows });
        }
        if position > 0 {
            let repeated = index[seed % position];
            let want = Error::DuplicateIndex { position, index: repeated };
            self.check(|c| history(c).1[position] = repeated, want);
        }
        self.check(|c| history(c).1.push(0), length("index", "[B]", batch, batch + 1));
        self.check(|c| history(c).1.clear(), length("index", "[B]", batch, 0));
        let allowed = "a multiple of the number of classes, and not 0";
        self.check(|c| history(c).0 = 0, size("history.len()", allowed, 0));
        if classes > 1 {
            self.check(|c| history(c).0 += 1, size("history.len()", allowed, table + 1));
        }
    }
}

fn loss_call() -> impl Strategy<Value = LossCall> {
    let sizes = (1usize..6, 1usize..6, 0usize..3, any::<bool>(), any::<bool>());
    (sizes, any::<[u8; 6]>(), 0.0..10.0, 0.0..=1.0).prop_map(
        |((classes, batch, partner, ignore, gradient), draws, lambda, label_smoothing)| {
            let label = |i: usize| match draws[i] as usize {
                draw if ignore && draw % 4 == 0 => -100,
                draw => (draw % classes) as i64,
            };
            let two_branches = partner == 1;
            let logits = if two_branches { 2 } else { 1 } * batch * classes;
            let rows = batch + draws[5] as usize % 3;
            let index = (0..batch).map(|i| ((i + draws[0] as usize) % rows) as i64).collect();
            LossCall {
                classes,
                labels: (0..batch).map(label).collect(),
                lambda,
                label_smoothing,
                ignore_label: ignore.then_some(-100),
                two_branches,
                logits,
                gradient: gradient.then_some(logits),
                history: (partner == 2).then_some((rows * classes, index)),
            }
        },
    )
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn one_corruption_of_the_loss_gives_its_error(call in loss_call(), seed: usize) {
        call.check_corruptions(seed);
    }

    #[test]
    fn garbage_loss_is_refused(
        classes in any_size(),
        labels in prop::collection::vec(prop_oneof![0i64..3, any::<i64>()], 0..4),
        lambda in prop::num::f64::ANY,
        label_smoothing in prop_oneof![0.0..1.0, prop::num::f64::ANY],
        ignore_label: Option<i64>,
        two_branches: bool,
        logits in 0usize..20,
        gradient in prop::option::of(0usize..20),
        history in prop::option::of((0usize..20, prop::collection::vec(-1i64..5, 0..4))),
        correct in loss_call(),
        fitting: u32,
    ) {
        let garbage = LossCall {
            classes, labels, lambda, label_smoothing, ignore_label, two_branches, logits, gradient, history,
        };
        let call = correct.garbled(garbage, fitting);
        if call.run().is_ok() {
            prop_assert!(call.lambda.is_finite() && call.lambda >= 0.0);
            prop_assert!((0.0..=1.0).contains(&call.label_smoothing));
            prop_assert!(call.gradient.is_none_or(|len| len == call.logits));
            let branches = if call.two_branches && call.history.is_none() { 2 } else { 1 };
            prop_assert_eq!(call.logits, branches * call.labels.len() * call.classes);
            let is_known = |&label: &i64| {
                Some(label) == call.ignore_label || (0..call.classes as i64).contains(&label)
            };
            prop_assert!(call.labels.iter().all(is_known));
            if let Some((table, index)) = &call.history {
                let rows = (table / call.classes) as i64;
                prop_assert!(table % call.classes == 0 && index.len() == call.labels.len());
                prop_assert!(index.iter().all(|row| (0..rows).contains(row)));
            }
        }
    }
}
