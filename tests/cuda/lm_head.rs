//! The head of a language model against the loss of all its logits, in f64 and with every step rounded to the type of tensors.

use crate::device;
use crate::machine::{Machine, Target};
use crate::numerics;
use crate::support::{Type, distance, rounded, wide};
use half::{bf16, f16};
use pace_kernels::cuda::{Buffer, DType, Finding, LmHead, LmHeadOutputs, Lora, LossStatus, Plan, Step};
use pace_kernels::{Divergence, LossSettings, Targets, cpu};

const IGNORED: i64 = -100;
const LORA_SCALE: f32 = 0.5;
const RANK: usize = 2;

#[derive(Debug, Clone, Copy)]
struct Case {
    divergence: Divergence,
    branches: usize,
    tokens: usize,
    hidden_size: usize,
    classes: usize,
    chunk_rows: Option<usize>,
    has_bias: bool,
    has_lora: bool,
    has_class_weights: bool,
    gives_gram: bool,
    /// Whether there are gradients to hidden states, and to all else.
    trains: [bool; 2],
    labelled_only: bool,
    both_branches: bool,
    smoothing: f64,
    denominator: Option<f64>,
    logit_scale: f64,
    soft_cap: Option<f64>,
    lambda: f64,
    /// How far branches are apart.
    far: f64,
    shift: usize,
}

const CASE: Case = Case {
    divergence: Divergence::SquaredDifference,
    branches: 2,
    tokens: 12,
    hidden_size: 8,
    classes: 40,
    chunk_rows: None,
    has_bias: false,
    has_lora: false,
    has_class_weights: false,
    gives_gram: false,
    trains: [true; 2],
    labelled_only: false,
    both_branches: false,
    smoothing: 0.0,
    denominator: None,
    logit_scale: 1.0,
    soft_cap: None,
    lambda: 0.7,
    far: 0.3,
    shift: 0,
};

const NAMES: [&str; 5] = ["dh", "dW", "db", "dB", "dA"];

/// Values, and gradients by [`NAMES`].
#[derive(Debug, Clone, PartialEq)]
struct Results {
    values: Vec<f64>,
    grads: [Vec<f64>; 5],
}

struct Data<T> {
    case: Case,
    hidden: Vec<T>,
    labels: Vec<i64>,
    weight: Vec<T>,
    bias: Vec<T>,
    lora_b: Vec<T>,
    lora_a: Vec<T>,
    class_weights: Vec<f32>,
}

/// `a [m, k] @ bᵀ`, `b [n, k]`.
fn times_transposed(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b))).collect()
}

fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|j| a[j..].iter().step_by(columns).copied()).collect()
}

fn add(to: &mut [f64], other: &[f64], round: impl Fn(f64) -> f64) {
    to.iter_mut().zip(other).for_each(|(a, b)| *a = round(*a + b));
}

impl<T: Type> Data<T> {
    fn new(case: Case) -> Self {
        let Case { tokens: m, hidden_size: h, classes: v, .. } = case;
        let mut hidden = rounded::<T>(1, m * h);
        if case.branches == 2 {
            let other = rounded::<f32>(2, m * h);
            let near = |(a, b): (&T, f32)| T::round(f64::from(a.widen()) + case.far * f64::from(b));
            let second: Vec<T> = hidden.iter().zip(other).map(near).collect();
            hidden.extend(second);
        }
        let labels = (0..m).map(|i| if i % 4 == 2 { IGNORED } else { (i * 1021 % v) as i64 }).collect();
        let class_weights = (0..v).map(|k| (k % 4) as f32 * 0.5 + 0.25).collect();
        Self {
            case,
            hidden,
            labels,
            weight: rounded(3, v * h),
            bias: rounded(4, v),
            lora_b: rounded(5, v * RANK),
            lora_a: rounded(6, RANK * h),
            class_weights,
        }
    }

    fn settings(&self) -> LossSettings {
        let Case { divergence, classes, labelled_only, both_branches, smoothing, denominator, .. } =
            self.case;
        LossSettings {
            divergence,
            labelled_only,
            both_branches,
            label_smoothing: smoothing,
            denominator,
            ignore_label: Some(IGNORED),
            ..LossSettings::new(classes, self.case.lambda)
        }
    }

    /// By all logits, with every product and sum rounded.
    fn reference(&self, round: fn(f64) -> f64) -> Results {
        let Case { branches, hidden_size: h, classes: v, logit_scale: a, soft_cap, has_lora, .. } = self.case;
        let all = |values: Vec<f64>| -> Vec<f64> { values.into_iter().map(round).collect() };
        let scaled =
            |values: Vec<f64>, factor: f64| all(values.into_iter().map(|value| value * factor).collect());
        let [hidden, weight, bias, lora_b, lora_a] =
            [&self.hidden, &self.weight, &self.bias, &self.lora_b, &self.lora_a].map(|values| wide(values));
        let mut logits = times_transposed(&hidden, &weight, h);
        if self.case.has_bias {
            logits.iter_mut().enumerate().for_each(|(i, l)| *l += bias[i % v]);
        }
        logits = scaled(logits, a);
        let scale = f64::from(LORA_SCALE);
        let low = all(times_transposed(&hidden, &lora_a, h));
        if has_lora {
            add(&mut logits, &scaled(times_transposed(&low, &lora_b, RANK), a * scale), round);
        }
        if let Some(cap) = soft_cap {
            logits.iter_mut().for_each(|l| *l = round(cap * (*l / cap).tanh()));
        }
        let class_weights = wide(&self.class_weights);
        let loss = cpu::Loss {
            settings: self.settings(),
            targets: Targets::Labels(&self.labels[..]),
            class_weights: self.case.has_class_weights.then_some(&class_weights[..]),
        };
        let consistency = if branches == 2 { cpu::Consistency::TwoBranch } else { cpu::Consistency::None };
        let mut dl = vec![0.0; logits.len()];
        let values = loss.evaluate(&logits, consistency, Some(&mut dl)).unwrap();
        if let Some(cap) = soft_cap {
            dl.iter_mut().zip(&logits).for_each(|(d, l)| *d *= 1.0 - (l / cap).powi(2));
        }
        let dl = all(dl);
        let mut dh = scaled(times_transposed(&dl, &transposed(&weight, h), v), a);
        let (dl_columns, rows) = (transposed(&dl, v), branches * self.case.tokens);
        let dw = scaled(times_transposed(&dl_columns, &transposed(&hidden, h), rows), a);
        let db = dl_columns.chunks(rows).map(|column| round(a * column.iter().sum::<f64>())).collect();
        let ds = scaled(times_transposed(&dl, &transposed(&lora_b, RANK), v), a * scale);
        if has_lora {
            add(&mut dh, &all(times_transposed(&ds, &transposed(&lora_a, h), RANK)), round);
        }
        let d_lora_b = scaled(times_transposed(&dl_columns, &transposed(&low, RANK), rows), a * scale);
        let d_lora_a = all(times_transposed(&transposed(&ds, RANK), &transposed(&hidden, h), rows));
        Results {
            values: vec![values.total, values.classification, values.consistency],
            grads: [dh, dw, db, d_lora_b, d_lora_a],
        }
    }

    /// Lengths of the gradients that are wanted, 0 of others.
    fn wanted(&self) -> [usize; 5] {
        let Case { tokens: m, hidden_size: h, classes: v, branches, has_bias, has_lora, trains, .. } =
            self.case;
        let [of_hidden, of_rest] = trains;
        [
            (of_hidden, branches * m * h),
            (of_rest, v * h),
            (of_rest && has_bias, v),
            (of_rest && has_lora, v * RANK),
            (of_rest && has_lora, RANK * h),
        ]
        .map(|(is_wanted, len)| if is_wanted { len } else { 0 })
    }

    fn head(&self, machine: &mut Machine<'_>) -> LmHead<Buffer, Buffer, Buffer> {
        let case = self.case;
        let mut head = LmHead {
            settings: self.settings(),
            tokens: case.tokens,
            hidden_size: case.hidden_size,
            branches: case.branches,
            labels: machine.input("labels", &self.labels),
            weight: machine.input("weight", &self.weight),
            bias: case.has_bias.then(|| machine.input("bias", &self.bias)),
            lora: case.has_lora.then(|| Lora {
                rank: RANK,
                lora_a: machine.input("lora_a", &self.lora_a),
                lora_b: machine.input("lora_b", &self.lora_b),
                scale: LORA_SCALE,
            }),
            class_weights: case
                .has_class_weights
                .then(|| machine.input("class_weights", &self.class_weights)),
            gram: None,
            logit_scale: case.logit_scale,
            soft_cap: case.soft_cap,
            chunk_rows: case.chunk_rows,
            allow_tf32: false,
        };
        if case.gives_gram {
            let gram = machine.output::<f32>("gram", case.hidden_size * case.hidden_size);
            let workspace = vec![u32::MAX; head.gram_workspace_len(&machine.gpu)];
            let workspace = machine.in_out("gram workspace", &workspace);
            machine.launch(&head.gram(&machine.gpu, T::DTYPE, gram, workspace).unwrap());
            head.gram = Some(gram);
        }
        head
    }

    fn run(&self, machine: &mut Machine<'_>) -> (Results, LossStatus) {
        self.run_changed(machine, |_| {})
    }

    /// The same by a plan that is changed before.
    fn run_changed(&self, machine: &mut Machine<'_>, change: impl Fn(&mut Plan)) -> (Results, LossStatus) {
        let head = self.head(machine);
        let hidden = machine.input("hidden", &self.hidden);
        let [dh, dw, db, d_lora_b, d_lora_a] = self.wanted();
        let mut gradient = |name: &str, len: usize| (len > 0).then(|| machine.output::<f32>(name, len));
        let (weight, bias) = (gradient("dW", dw), gradient("db", db));
        let (lora_b, lora_a) = (gradient("dB", d_lora_b), gradient("dA", d_lora_a));
        // Nothing but the first word may matter.
        let mut workspace = vec![u32::MAX; head.workspace_len(&machine.gpu, T::DTYPE, weight.is_some())];
        workspace[0] = 0;
        let outputs = LmHeadOutputs {
            hidden: (dh > 0).then(|| machine.output::<T>("dh", dh)),
            weight,
            bias,
            lora_b,
            lora_a,
            values: machine.output::<f32>("values", 3),
            status: machine.output::<u64>("status", LossStatus::WORDS),
            workspace: machine.in_out("workspace", &workspace),
        };
        let mut plan = head.plan(&machine.gpu, T::DTYPE, hidden, outputs).unwrap();
        change(&mut plan);
        machine.launch(&plan);
        assert_eq!(machine.read::<u32>(outputs.workspace)[0], 0, "the ticket");
        let read = |grad: Option<Buffer>| grad.map_or(Vec::new(), |grad| wide(&machine.read::<f32>(grad)));
        let dh = outputs.hidden.map_or(Vec::new(), |dh| wide(&machine.read::<T>(dh)));
        let results = Results {
            values: wide(&machine.read::<f32>(outputs.values)),
            grads: [dh, read(weight), read(bias), read(lora_b), read(lora_a)],
        };
        (results, LossStatus::new(machine.read::<u64>(outputs.status).try_into().unwrap()))
    }
}

/// In `f32` to 1e-5 of the largest value; in others no further away than twice what rounding every step gives, and a rounding.
fn assert_near<T: Type>(result: &str, case: &Case, got: &[f64], unfused: &[f64], exact: &[f64]) {
    let error = distance(got, exact);
    let largest = exact.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    let bound = match T::DTYPE {
        DType::F32 => 1e-5 * largest,
        DType::F16 | DType::BF16 => 2.0 * distance(unfused, exact) + T::EPSILON * largest,
    };
    assert!(error <= bound, "{result} of {case:?} {:?}: error {error:e}, allowed {bound:e}", T::DTYPE);
}

fn evaluate<T: Type>(case: Case, target: &Target<'_>) {
    let data = Data::<T>::new(case);
    let (exact, unfused) = (data.reference(|x| x), data.reference(|x| f64::from(T::round(x).widen())));
    let first = std::cell::OnceCell::new();
    target.run(case.shift, |machine| {
        let (got, status) = data.run(machine);
        assert_eq!(status, LossStatus::default());
        for (i, name) in ["total", "criterion", "consistency"].into_iter().enumerate() {
            let at = i..i + 1;
            assert_near::<T>(
                name,
                &case,
                &got.values[at.clone()],
                &unfused.values[at.clone()],
                &exact.values[at],
            );
        }
        for (i, name) in NAMES.into_iter().enumerate().filter(|(i, _)| data.wanted()[*i] > 0) {
            assert_near::<T>(name, &case, &got.grads[i], &unfused.grads[i], &exact.grads[i]);
            // Weights' gradients are f32, whose unit would say nothing beside operands of 16 bits.
            numerics::record(T::FORMAT, name, &got.grads[i], Some(&unfused.grads[i]), &exact.grads[i]);
        }
        numerics::record(T::FORMAT, "values", &got.values, Some(&unfused.values), &exact.values);
        assert!(first.get_or_init(|| got.clone()) == &got, "{case:?} depends on the order");
    });
}

fn every_type(case: Case, target: &Target<'_>) {
    evaluate::<f32>(case, target);
    evaluate::<bf16>(case, target);
    // Gradients of f16 need a loss scale.
    evaluate::<f16>(Case { denominator: Some(case.denominator.unwrap_or(9.0) / 64.0), ..case }, target);
}

const DIVERGENCES: [Divergence; 5] = [
    Divergence::MeanSquaredDifference,
    Divergence::CenteredSquaredDifference,
    Divergence::SymmetricKl,
    Divergence::Kl { temperature: 2.0, detach_target: false },
    Divergence::JensenShannon,
];

/// Squared differences by the Gram matrix.
pub fn by_gram(target: &Target<'_>) {
    let cases = [
        CASE,
        Case { gives_gram: true, ..CASE },
        Case { gives_gram: true, trains: [true, false], ..CASE },
        Case { trains: [false, true], labelled_only: true, ..CASE },
        Case { gives_gram: true, trains: [false; 2], ..CASE },
        Case { divergence: Divergence::MeanSquaredDifference, logit_scale: -0.5, ..CASE },
        Case { chunk_rows: Some(5), labelled_only: true, has_bias: true, ..CASE },
        Case { chunk_rows: Some(1), gives_gram: true, denominator: Some(3.0), ..CASE },
        Case { chunk_rows: Some(100), smoothing: 0.2, has_class_weights: true, ..CASE },
        Case { has_lora: true, ..CASE },
        Case { has_lora: true, gives_gram: true, trains: [true, false], chunk_rows: Some(5), ..CASE },
        Case { has_lora: true, gives_gram: true, labelled_only: true, logit_scale: 2.0, ..CASE },
        Case { has_lora: true, hidden_size: 7, classes: 41, shift: 1, ..CASE },
        Case { hidden_size: 1, classes: 1, smoothing: 0.1, ..CASE },
        Case { lambda: 0.0, ..CASE },
        // Rows without whole vectors, at addresses without alignment.
        Case { hidden_size: 7, classes: 41, shift: 1, chunk_rows: Some(7), ..CASE },
        Case { hidden_size: 7, classes: 41, shift: 1, gives_gram: true, trains: [true, false], ..CASE },
    ];
    for case in cases {
        every_type(case, target);
    }
}

/// Everything else by differences of logits, or by the logits of both branches.
pub fn by_logits(target: &Target<'_>) {
    for divergence in DIVERGENCES {
        every_type(Case { divergence, chunk_rows: Some(5), labelled_only: true, ..CASE }, target);
        let capped = Case { divergence, soft_cap: Some(1.5), logit_scale: 0.5, ..CASE };
        every_type(Case { both_branches: true, chunk_rows: Some(8), ..capped }, target);
    }
    let kl = Case { divergence: Divergence::SymmetricKl, ..CASE };
    let cases = [
        Case { branches: 1, has_bias: true, both_branches: true, ..CASE },
        Case { classes: 1, ..kl },
        Case { branches: 1, soft_cap: Some(1.5), chunk_rows: Some(5), ..CASE },
        Case { has_lora: true, chunk_rows: Some(5), logit_scale: 2.0, ..kl },
        Case { has_lora: true, both_branches: true, has_bias: true, ..kl },
        Case { has_lora: true, trains: [true, false], ..kl },
        Case { has_lora: true, trains: [false, true], hidden_size: 7, classes: 41, shift: 1, ..kl },
        Case { has_class_weights: true, smoothing: 0.1, denominator: Some(5.0), ..kl },
        // Fewer tokens than the Gram matrix is worth.
        Case { tokens: 2, ..CASE },
        Case { trains: [false; 2], ..kl },
    ];
    for case in cases {
        every_type(case, target);
    }
}

/// A vocabulary of several slices, whose logits are read again after others have become gradients.
pub fn streamed(target: &Target<'_>) {
    let long = Case { tokens: 5, hidden_size: 4, classes: 4104, chunk_rows: Some(3), ..CASE };
    for case in [
        Case { gives_gram: true, trains: [true, false], ..long },
        Case { divergence: Divergence::SymmetricKl, soft_cap: Some(2.0), ..long },
        Case { divergence: Divergence::JensenShannon, classes: 4101, shift: 1, ..long },
    ] {
        evaluate::<f32>(case, target);
        evaluate::<bf16>(case, target);
    }
}

/// Branches that are close keep the digits of their distance in 16 bits, where logits have lost them.
pub fn close_branches(target: &Target<'_>) {
    for divergence in [Divergence::SquaredDifference, Divergence::SymmetricKl] {
        let case = Case { divergence, far: 0.004, hidden_size: 32, classes: 64, tokens: 64, ..CASE };
        let data = Data::<bf16>::new(case);
        let (exact, unfused) =
            (data.reference(|x| x).values[2], data.reference(|x| f64::from(bf16::from_f64(x))).values[2]);
        let lost = (unfused - exact).abs() / exact;
        assert!(lost > 0.05, "an easy case: {lost}");
        target.once(0, |machine| {
            let got = data.run(machine).0.values[2];
            assert!((got - exact).abs() <= 5e-3 * exact, "{divergence:?}: {got:e}, expected {exact:e}");
        });
    }
}

/// Distances in directions that the weight hardly has are right in 16 bits, where a Gram matrix of one `bf16` number has none.
pub fn low_directions(target: &Target<'_>) {
    let case = Case { hidden_size: 32, classes: 64, tokens: 32, gives_gram: true, ..CASE };
    let h = case.hidden_size;
    let mut data = Data::<bf16>::new(case);
    let sign = |j: usize| if j.is_multiple_of(3) { 1.0 } else { -1.0 };
    for row in data.weight.chunks_mut(h) {
        let along = (0..h).map(|j| sign(j) * f64::from(row[j].to_f32())).sum::<f64>() / h as f64;
        row.iter_mut().enumerate().for_each(|(j, w)| *w = bf16::from_f64(w.to_f64() - sign(j) * along));
    }
    // Differences of 10 bits: 1, or 1 and 2⁻⁹.
    let (first, second) = data.hidden.split_at_mut(case.tokens * h);
    for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
        let j = i % h;
        *a = bf16::from_f64(if (i * 7 + i / h) % 5 < 2 { sign(j) / 512.0 } else { 0.0 });
        *b = bf16::from_f64(-sign(j));
    }
    let exact = data.reference(|x| x);
    let weight = wide(&data.weight);
    let gram = times_transposed(&transposed(&weight, h), &transposed(&weight, h), case.classes);
    let distance = |round: fn(f64) -> f64| -> f64 {
        let delta: Vec<f64> = {
            let (a, b) = data.hidden.split_at(case.tokens * h);
            a.iter().zip(b).map(|(a, b)| round(a.to_f64() - b.to_f64())).collect()
        };
        let gram: Vec<f64> = gram.iter().map(|&g| round(g)).collect();
        let product = times_transposed(&delta, &gram, h);
        product.iter().zip(&delta).map(|(p, d)| p * d).sum::<f64>() / case.tokens as f64
    };
    let want = exact.values[2];
    assert!((distance(|x| x) - want).abs() < 1e-9 * want);
    let lost = (distance(|x| bf16::from_f64(x).to_f64()) - want).abs() / want;
    assert!(lost > 0.5, "an easy case: {lost}");
    target.once(0, |machine| {
        let got = data.run(machine).0.values[2];
        assert!((got - want).abs() <= 0.02 * want, "{got:e}, expected {want:e}");
    });
}

/// Labels that are none count as ignored, and the status says where they stand in the whole batch.
pub fn wrong_labels(target: &Target<'_>) {
    for divergence in [Divergence::SquaredDifference, Divergence::SymmetricKl] {
        let case = Case { divergence, chunk_rows: Some(5), labelled_only: true, ..CASE };
        let mut data = Data::<f32>::new(case);
        for i in [7, 9] {
            data.labels[i] = IGNORED;
        }
        let exact = data.reference(|x| x);
        (data.labels[7], data.labels[9]) = (40, -1);
        target.once(0, |machine| {
            let (got, status) = data.run(machine);
            assert_near::<f32>("total", &case, &got.values[..1], &[], &exact.values[..1]);
            for (i, name) in NAMES.into_iter().enumerate().take(2) {
                assert_near::<f32>(name, &case, &got.grads[i], &[], &exact.grads[i]);
            }
            assert_eq!(status.labels, Finding { count: 2, position: 7, value: 40 });
        });
    }
}

/// Without a label nothing is learnt, and with one nobody divides by 0.
pub fn no_labels(target: &Target<'_>) {
    for divergence in [Divergence::SquaredDifference, Divergence::SymmetricKl] {
        let mut data = Data::<bf16>::new(Case { divergence, labelled_only: true, ..CASE });
        data.labels.fill(IGNORED);
        target.once(0, |machine| {
            let (got, _) = data.run(machine);
            assert_eq!(got.values, [0.0; 3]);
            assert!(got.grads.iter().flatten().all(|&g| g == 0.0), "{got:?}");
        });
    }
}

/// The squared difference by one block, and by more blocks than there are threads that add up what they found.
pub fn any_grid(target: &Target<'_>) {
    let data = Data::<f32>::new(CASE);
    let exact = data.reference(|x| x);
    for blocks in [1, 300] {
        target.once(0, |machine| {
            let (got, _) = data.run_changed(machine, |plan| {
                let pulls =
                    plan.launches_mut().filter(|launch| launch.kernel.name.starts_with("lm_head_pull"));
                assert_eq!(pulls.map(|launch| launch.grid[0] = blocks).count(), 1);
            });
            for (got, want) in got.values.iter().zip(&exact.values) {
                assert!((got - want).abs() <= 1e-5 * want, "{blocks} blocks: {got:e}, expected {want:e}");
            }
        });
    }
}

/// With the loss scale in the denominator, the sums of f16 stay in its range.
pub fn loss_scale(target: &Target<'_>) {
    for has_lora in [false, true] {
        let denominator = Some(12.0 / 65536.0);
        let case = Case { has_lora, denominator, far: 0.5, ..CASE };
        let data = Data::<f16>::new(Case { lambda: 0.05, ..case });
        let exact = data.reference(|x| x);
        target.once(0, |machine| {
            let (got, _) = data.run(machine);
            for (i, name) in NAMES.into_iter().enumerate().filter(|(i, _)| data.wanted()[*i] > 0) {
                let error = distance(&got.grads[i], &exact.grads[i]);
                let largest = exact.grads[i].iter().fold(0f64, |largest, value| largest.max(value.abs()));
                assert!(error <= 5e-3 * largest, "{name}: {error:e} of {largest:e}");
            }
        });
    }
}

/// No logits of branch 1 are computed where the Gram matrix stands for them.
pub fn products(target: &Target<'_>) {
    target.once(0, |machine| {
        let count = |case: Case, machine: &mut Machine<'_>| {
            let data = Data::<bf16>::new(case);
            let head = data.head(machine);
            let hidden = machine.input("hidden", &data.hidden);
            let outputs = LmHeadOutputs {
                hidden: Some(machine.output::<bf16>("dh", data.hidden.len())),
                weight: None,
                bias: None,
                lora_b: None,
                lora_a: None,
                values: machine.output::<f32>("values", 3),
                status: machine.output::<u64>("status", LossStatus::WORDS),
                workspace: machine.in_out("workspace", &vec![0u32; head.workspace_len(&machine.gpu, DType::BF16, false)]),
            };
            let plan = head.plan(&machine.gpu, DType::BF16, hidden, outputs).unwrap();
            let over_classes = |step: &&Step| {
                matches!(step, Step::Gemm(gemm) if [gemm.m, gemm.n, gemm.k].contains(&case.classes))
            };
            plan.steps().iter().filter(over_classes).count()
        };
        assert_eq!(count(Case { gives_gram: true, ..CASE }, machine), 2);
        assert_eq!(count(CASE, machine), 3);
        assert_eq!(count(Case { divergence: Divergence::SymmetricKl, ..CASE }, machine), 4);
    });
}

/// The safe methods over `cudarc`'s tensors.
pub fn safe_methods(opened: &device::Opened) {
    let device::Opened { device, stream } = opened;
    let data = Data::<bf16>::new(Case { has_bias: true, ..CASE });
    let (exact, unfused) = (data.reference(|x| x), data.reference(|x| f64::from(bf16::from_f64(x))));
    let [hidden, weight, bias] =
        [&data.hidden, &data.weight, &data.bias].map(|values| opened.upload(0, values));
    let labels = opened.upload(0, &data.labels);
    let mut gram = opened.upload(0, &[f32::NAN; 64]);
    let mut head = LmHead {
        bias: Some(&bias as _),
        chunk_rows: Some(5),
        ..LmHead::new(data.settings(), CASE.tokens, CASE.hidden_size, &labels as _, &weight as _)
    };
    let mut words = stream.alloc_zeros::<u32>(head.gram_workspace_len(device.gpu())).unwrap();
    device.lm_head_gram(&head, &mut gram, &mut words, stream).unwrap();
    head.gram = Some(&gram as _);
    let mut workspace =
        stream.alloc_zeros::<u32>(head.workspace_len(device.gpu(), DType::BF16, true)).unwrap();
    let mut dh = opened.upload(0, &vec![bf16::NAN; data.hidden.len()]);
    let [mut dw, mut db, mut values] =
        [data.weight.len(), 40, 3].map(|len| opened.upload(0, &vec![f32::NAN; len]));
    let mut status = opened.upload(0, &[u64::MAX; LossStatus::WORDS]);
    for _ in 0..2 {
        let outputs = LmHeadOutputs {
            hidden: Some(&mut dh as _),
            weight: Some(&mut dw as _),
            bias: Some(&mut db as _),
            lora_b: None,
            lora_a: None,
            values: &mut values as _,
            status: &mut status as _,
            workspace: &mut workspace as _,
        };
        device.lm_head::<bf16>(&head, &hidden, outputs, stream).unwrap();
    }
    let grads =
        [wide(&opened.download(0, &dh)), wide(&opened.download(0, &dw)), wide(&opened.download(0, &db))];
    for (i, got) in grads.iter().enumerate() {
        assert_near::<bf16>(NAMES[i], &data.case, got, &unfused.grads[i], &exact.grads[i]);
    }
    let values = wide(&opened.download(0, &values));
    assert_near::<bf16>("total", &data.case, &values[..1], &unfused.values[..1], &exact.values[..1]);
    let words: Vec<u64> = opened.download(0, &status);
    assert_eq!(LossStatus::new(words.try_into().unwrap()), LossStatus::default());
}
