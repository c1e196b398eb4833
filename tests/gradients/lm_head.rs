//! The head of a language model against the loss of all its logits.

use crate::data::*;
use crate::support::*;
use pace_kernels::cpu::{Consistency, LmHead, LmHeadGrads, Lora, Loss, LossValues};
use pace_kernels::{Divergence, Error, LossSettings, Real, Targets};

const IGNORE: i64 = -100;
const M: usize = 7;
const H: usize = 5;
const V: usize = 11;
const R: usize = 2;

/// A head in plain numbers.
#[derive(Debug, Clone)]
struct Case {
    settings: LossSettings,
    branches: usize,
    has_bias: bool,
    has_lora: bool,
    has_class_weights: bool,
    logit_scale: f64,
    soft_cap: Option<f64>,
    gives_gram: bool,
    chunk_rows: Option<usize>,
    labels: Vec<i64>,
    hidden: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    lora_b: Vec<f64>,
    lora_a: Vec<f64>,
    class_weights: Vec<f64>,
}

const LORA_SCALE: f64 = 0.5;

/// Gradients to hidden states, weight, bias, B and A.
type Grads<T> = [Vec<T>; 5];

fn case(divergence: Divergence) -> Case {
    Case {
        settings: LossSettings { divergence, ignore_label: Some(IGNORE), ..LossSettings::new(V, 0.8) },
        branches: 2,
        has_bias: false,
        has_lora: false,
        has_class_weights: false,
        logit_scale: 1.0,
        soft_cap: None,
        gives_gram: false,
        chunk_rows: None,
        labels: (0..M).map(|i| if i == 2 { IGNORE } else { (i * 5 % V) as i64 }).collect(),
        hidden: uniform(50, 2 * M * H),
        weight: uniform(51, V * H),
        bias: uniform(52, V),
        lora_b: uniform(53, V * R),
        lora_a: uniform(54, R * H),
        // One of them 0, and it is the label of a token.
        class_weights: (0..V).map(|v| (v * 3 % V) as f64 / 4.0).collect(),
    }
}

impl Case {
    fn run<T: Real>(&self, with_gradients: bool) -> (LossValues, Grads<T>) {
        let [weight, bias, lora_b, lora_a, class_weights] =
            [&self.weight, &self.bias, &self.lora_b, &self.lora_a, &self.class_weights]
                .map(|all| cast::<T>(all));
        let lora = Lora { rank: R, lora_a: &lora_a[..], lora_b: &lora_b[..], scale: T::from_f64(LORA_SCALE) };
        let mut head = LmHead {
            branches: self.branches,
            bias: self.has_bias.then_some(&bias[..]),
            lora: self.has_lora.then_some(lora),
            logit_scale: self.logit_scale,
            soft_cap: self.soft_cap,
            chunk_rows: self.chunk_rows,
            class_weights: self.has_class_weights.then_some(&class_weights[..]),
            ..LmHead::new(self.settings, H, &self.labels, &weight)
        };
        let mut gram = unwritten(H * H);
        if self.gives_gram {
            head.gram(&mut gram).unwrap();
            head.gram = Some(&gram);
        }
        let hidden = cast::<T>(&self.hidden[..self.branches * M * H]);
        let mut grads: Grads<T> = [hidden.len(), V * H, V, V * R, R * H]
            .map(|len| if with_gradients { unwritten(len) } else { vec![] });
        let [dh, dw, db, d_lora_b, d_lora_a] = &mut grads;
        let wanted = if with_gradients {
            LmHeadGrads {
                hidden: Some(&mut dh[..]),
                weight: Some(&mut dw[..]),
                bias: self.has_bias.then_some(&mut db[..]),
                lora_b: self.has_lora.then_some(&mut d_lora_b[..]),
                lora_a: self.has_lora.then_some(&mut d_lora_a[..]),
            }
        } else {
            LmHeadGrads::default()
        };
        let values = head.evaluate(&hidden, wanted).unwrap();
        (values, grads)
    }

    /// The same by all logits, in plain loops.
    fn plain(&self) -> (LossValues, Grads<f64>) {
        let rows = self.branches * M;
        let weight: Vec<f64> = (0..V * H)
            .map(|i| {
                let (v, h) = (i / H, i % H);
                let low: f64 = (0..R).map(|r| self.lora_b[v * R + r] * self.lora_a[r * H + h]).sum();
                self.weight[i] + if self.has_lora { LORA_SCALE * low } else { 0.0 }
            })
            .collect();
        let mut logits = vec![0.0; rows * V];
        for (i, l) in logits.iter_mut().enumerate() {
            let (row, v) = (i / V, i % V);
            *l = (0..H).map(|h| self.hidden[row * H + h] * weight[v * H + h]).sum::<f64>();
            *l = self.logit_scale * (*l + if self.has_bias { self.bias[v] } else { 0.0 });
            if let Some(cap) = self.soft_cap {
                *l = cap * (*l / cap).tanh();
            }
        }
        let loss = Loss {
            settings: self.settings,
            targets: Targets::Labels(&self.labels),
            class_weights: self.has_class_weights.then_some(&self.class_weights[..]),
        };
        let mut dl = vec![0.0; logits.len()];
        let consistency = if self.branches == 2 { Consistency::TwoBranch } else { Consistency::None };
        let values = loss.evaluate(&logits, consistency, Some(&mut dl)).unwrap();
        let mut grads: Grads<f64> = [rows * H, V * H, V, V * R, R * H].map(|len| vec![0.0; len]);
        let [dh, dw, db, d_lora_b, d_lora_a] = &mut grads;
        for (i, dl) in dl.iter().enumerate() {
            let (row, v) = (i / V, i % V);
            let capped = self.soft_cap.map_or(1.0, |cap| 1.0 - (logits[i] / cap).powi(2));
            let dl = dl * capped * self.logit_scale;
            db[v] += dl;
            for h in 0..H {
                dh[row * H + h] += dl * weight[v * H + h];
                dw[v * H + h] += dl * self.hidden[row * H + h];
            }
        }
        for (i, dw) in dw.iter().enumerate() {
            let (v, h) = (i / H, i % H);
            for r in 0..R {
                d_lora_b[v * R + r] += LORA_SCALE * dw * self.lora_a[r * H + h];
                d_lora_a[r * H + h] += LORA_SCALE * dw * self.lora_b[v * R + r];
            }
        }
        (values, grads)
    }

    fn check(&self) {
        let (want, want_grads) = self.plain();
        let list = |values: LossValues| [values.total, values.classification, values.consistency];
        for with_gradients in [true, false] {
            let (values, grads) = self.run::<f64>(with_gradients);
            assert_close((self, "values"), &list(values), &list(want));
            if with_gradients {
                self.compare(&grads, &want_grads);
            }
        }
        let (values, grads) = self.run::<f32>(true);
        let list = list(values).map(|value| value as f32);
        assert_close((self, "f32"), &list, &[want.total, want.classification, want.consistency]);
        self.compare(&grads, &want_grads);
    }

    fn compare<T: Real>(&self, got: &Grads<T>, want: &Grads<f64>) {
        let asked = [true, true, self.has_bias, self.has_lora, self.has_lora];
        for (i, (got, want)) in got.iter().zip(want).enumerate().filter(|&(i, _)| asked[i]) {
            assert_close((self, "gradient", i), got, want);
        }
    }
}

const DIVERGENCES: [Divergence; 7] = [
    Divergence::SquaredDifference,
    Divergence::MeanSquaredDifference,
    Divergence::CenteredSquaredDifference,
    Divergence::SymmetricKl,
    Divergence::Kl { temperature: 2.0, detach_target: false },
    Divergence::Kl { temperature: 1.0, detach_target: true },
    Divergence::JensenShannon,
];

#[test]
fn a_head_has_the_loss_of_all_its_logits() {
    for divergence in DIVERGENCES {
        let plain = case(divergence);
        plain.check();
        for chunk_rows in [1, 3, M, 100].map(Some) {
            Case { chunk_rows, ..plain.clone() }.check();
        }
        Case { gives_gram: true, has_bias: true, logit_scale: 0.3, ..plain.clone() }.check();
        Case { gives_gram: true, has_lora: true, has_bias: true, chunk_rows: Some(2), ..plain.clone() }
            .check();
        Case { has_lora: true, logit_scale: -1.5, ..plain.clone() }.check();
        Case { soft_cap: Some(0.7), has_lora: true, has_bias: true, ..plain.clone() }.check();
        Case { branches: 1, soft_cap: Some(2.0), ..plain.clone() }.check();
        let weighted = Case { has_class_weights: true, ..plain.clone() };
        weighted.check();
        Case { branches: 1, chunk_rows: Some(2), ..weighted.clone() }.check();
        Case { gives_gram: true, has_lora: true, has_bias: true, chunk_rows: Some(2), ..weighted.clone() }
            .check();
        let settings = LossSettings { label_smoothing: 0.1, both_branches: true, ..plain.settings };
        Case { settings, soft_cap: Some(0.7), chunk_rows: Some(3), ..weighted.clone() }.check();
        let settings = LossSettings { labelled_only: true, denominator: Some(3.5), ..plain.settings };
        Case { settings, ..weighted }.check();
        let settings = LossSettings { label_smoothing: 0.1, both_branches: true, ..plain.settings };
        Case { settings, has_bias: true, chunk_rows: Some(3), ..plain.clone() }.check();
        let settings = LossSettings { labelled_only: true, denominator: Some(3.5), ..plain.settings };
        Case { settings, has_lora: true, ..plain.clone() }.check();
        let settings = LossSettings { labelled_only: true, ..plain.settings };
        Case { settings, labels: vec![IGNORE; M], chunk_rows: Some(3), ..plain }.check();
    }
}

/// Close branches keep their digits: what is squared is the difference of the hidden states, not of their logits.
#[test]
fn close_branches_keep_their_digits() {
    for divergence in DIVERGENCES {
        let mut close = case(divergence);
        let (first, second) = close.hidden.split_at_mut(M * H);
        for (i, (far, near)) in second.iter_mut().zip(first).enumerate() {
            // Exact in f32.
            *far = *near + (i % 3) as f64 * 2f64.powi(-23);
        }
        let want = close.run::<f64>(false).0.consistency;
        let got = close.run::<f32>(false).0.consistency;
        // A mean of log-probabilities near zero has rounding errors of its own, of 1e-16.
        let tolerance = if divergence.is_of_probabilities() { 2e-2 } else { 1e-5 };
        assert!((got - want).abs() <= tolerance * want, "{divergence:?}: {got:e}, expected {want:e}");
    }
}

#[test]
fn wrong_arguments_of_a_head_are_refused() {
    let hidden = uniform(50, 2 * M * H);
    let weight = uniform(51, V * H);
    let labels = [0, 1, 2, 3, 4, 5, 6];
    let head = LmHead::new(LossSettings::new(V, 1.0), H, &labels, &weight);
    let refused = |head: LmHead<'_, f64>, argument: &str| {
        let mut dh = vec![7.0; hidden.len()];
        let grads = LmHeadGrads { hidden: Some(&mut dh[..]), ..LmHeadGrads::default() };
        let error = head.evaluate(&hidden, grads).unwrap_err();
        assert!(error.to_string().contains(&format!("`{argument}")), "{error}");
        assert!(dh.iter().all(|&g| g == 7.0), "{argument}: something was written");
    };
    let short = &weight[1..];
    let with = |change: fn(&mut LossSettings)| {
        let mut settings = head.settings;
        change(&mut settings);
        LmHead { settings, ..head }
    };
    refused(with(|settings| settings.classes = 0), "classes");
    refused(with(|settings| settings.lambda = -1.0), "lambda");
    refused(with(|settings| settings.denominator = Some(0.0)), "denominator");
    refused(
        with(|s| s.divergence = Divergence::Kl { temperature: 0.0, detach_target: false }),
        "temperature",
    );
    refused(LmHead { hidden_size: 0, ..head }, "hidden_size");
    refused(LmHead { hidden_size: usize::MAX, ..head }, "weight");
    refused(LmHead { weight: short, ..head }, "weight");
    for branches in [0, 1, 3] {
        refused(LmHead { branches, ..head }, if branches == 1 { "hidden" } else { "branches" });
    }
    refused(LmHead { labels: &labels[1..], ..head }, "hidden");
    refused(LmHead { labels: &[], ..head }, "labels");
    refused(LmHead { labels: &[0, 1, 2, 3, 4, 5, 11], ..head }, "labels[6]");
    refused(LmHead { bias: Some(&short[..V - 1]), ..head }, "bias");
    refused(LmHead { gram: Some(short), ..head }, "gram");
    for wrong in [&[1.0; V - 1][..], &[1.0; V + 1]] {
        refused(LmHead { class_weights: Some(wrong), ..head }, "class_weights");
    }
    for wrong in [-1.0, f64::NAN, f64::INFINITY] {
        let mut weights = [1.0; V];
        weights[V - 1] = wrong;
        refused(LmHead { class_weights: Some(&weights), ..head }, "class_weights");
    }
    for (logit_scale, soft_cap) in
        [(0.0, None), (f64::NAN, None), (1.0, Some(0.0)), (1.0, Some(f64::INFINITY))]
    {
        let argument = if soft_cap.is_some() { "soft_cap" } else { "logit_scale" };
        refused(LmHead { logit_scale, soft_cap, ..head }, argument);
    }
    refused(LmHead { chunk_rows: Some(0), ..head }, "chunk_rows");
    let lora = Lora { rank: R, lora_a: &weight[..R * H], lora_b: &weight[..V * R], scale: 1.0 };
    refused(LmHead { lora: Some(Lora { rank: 0, ..lora }), ..head }, "rank");
    refused(LmHead { lora: Some(Lora { rank: 3, ..lora }), ..head }, "lora_b");
    refused(LmHead { lora: Some(Lora { scale: f64::NAN, ..lora }), ..head }, "scale");
    // What is a number in f64 and none, or nothing, in f32.
    let narrow = LmHead::<f32>::new(head.settings, H, head.labels, &[0.0; V * H]);
    for (logit_scale, soft_cap) in [(1e39, None), (1e-50, None), (1.0, Some(1e39)), (1.0, Some(1e-50))] {
        let got =
            LmHead { logit_scale, soft_cap, ..narrow }.evaluate(&[0.0; 2 * M * H], LmHeadGrads::default());
        assert!(matches!(got, Err(Error::Value { .. })), "{logit_scale} {soft_cap:?}: {got:?}");
    }
    // Gradients to what is not there.
    let mut db = [0.0; V];
    let grads = LmHeadGrads { bias: Some(&mut db[..]), ..LmHeadGrads::default() };
    assert!(matches!(head.evaluate(&hidden, grads), Err(Error::Argument { argument: "grads.bias", .. })));
}
