//! The weight builders, their gradients and merging against the CPU operators in f64.

use crate::device::Opened;
use crate::machine::{Machine, Target};
use crate::support::{self, Type, rounded, wide};
use half::{bf16, f16};
use pace_kernels::cpu;
use pace_kernels::cuda::cudarc::driver::{DevicePtr, DevicePtrMut};
use pace_kernels::cuda::{
    AdapterWeight, AdapterWeightGrads, Buffer, Element, LoraFactors, LoraGrads, LoraWeight, LoraWeightGrads,
    Merge, MergeSign, PromptBias, PromptGrads, PromptWeight, PromptWeightGrads,
};
use std::cell::OnceCell;

const SCALE: f32 = 0.75;

#[derive(Debug, Clone, Copy)]
struct Case {
    n: usize,
    k: usize,
    r: usize,
    /// Whether there is what may be absent: `W0` of LoRA, the biases of the prompt.
    full: bool,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

fn cases() -> Vec<Case> {
    // Around vectors (4 and 8 elements), strips (32 and 64 columns), octets of rows, tiles of ΔW (64 rows) and of Δb (16), parts of
    // rows (64 and up), turns of the rank (16), and what the sums of a block are (128).
    let sizes = [
        (1, 1, 1),
        (3, 5, 2),
        (4, 4, 1),
        (5, 8, 3),
        (15, 9, 7),
        (16, 63, 8),
        (17, 64, 9),
        (33, 65, 15),
        (31, 127, 16),
        (8, 128, 17),
        (20, 129, 10),
        (3, 255, 33),
        (36, 256, 4),
        (18, 257, 64),
        (2, 264, 12),
        (24, 520, 10),
        (2, 3, 260),
        (150, 70, 11),
    ];
    let variants = [(true, 0), (false, 1)];
    let of = |(n, k, r)| variants.map(|(full, shift)| Case { n, k, r, full, shift });
    // More parts than a device is kept busy by if they had 64 rows.
    let long = Case { n: 17000, k: 8, r: 1, full: true, shift: 0 };
    // Strips of which a part takes several turns of all warps.
    let wide = Case { n: 200, k: 8200, r: 2, full: true, shift: 0 };
    sizes.into_iter().flat_map(of).chain([long, wide]).collect()
}

fn round<T: Type>(value: f64) -> f64 {
    T::round(value).widen().into()
}

fn dot(len: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..len).map(term).sum()
}

/// `[rows, columns]`, each element rounded to `T`.
fn table<T: Type>(rows: usize, columns: usize, element: impl Fn(usize, usize) -> f64) -> Vec<T> {
    (0..rows * columns).map(|i| T::round(element(i / columns, i % columns))).collect()
}

/// Results of a case, and what they are called.
type Results<T> = Vec<(&'static str, Vec<T>)>;

/// Runs a case on `target` and compares what `run` reads.
fn check<T: Type>(
    case: &Case,
    target: &Target<'_>,
    unfused: &Results<T>,
    exact: &[Vec<f64>],
    run: impl Fn(&mut Machine<'_>) -> Vec<Buffer>,
) {
    let first = OnceCell::new();
    target.run(case.shift, |machine| {
        let buffers = run(machine);
        let results: Vec<Vec<T>> = buffers.into_iter().map(|buffer| machine.read(buffer)).collect();
        assert!(results.len() == exact.len() && results.len() == unfused.len());
        compare(case, unfused, exact, &results);
        // The same bits in whatever order threads run.
        assert!(first.get_or_init(|| results.clone()) == &results, "{case:?} depends on the order");
    });
}

/// Operands of LoRA: `B`, `A`, `W0` and the gradient to `ΔW`.
fn lora_data<T: Type>(case: &Case) -> [Vec<T>; 4] {
    let &Case { n, k, r, .. } = case;
    [rounded(1, n * r), rounded(2, r * k), rounded(3, n * k), rounded(4, n * k)]
}

/// `ΔW`, `dB` and `dA` by the CPU.
fn lora_exact<T: Type>(case: &Case, data: &[Vec<T>; 4]) -> Vec<Vec<f64>> {
    let &Case { n, k, r, full, .. } = case;
    let [d, u, base, grad] = data.each_ref().map(|values| wide(values));
    let lora: cpu::LoraFactors<&[_], _> = cpu::LoraFactors {
        out_features: n,
        in_features: k,
        rank: r,
        lora_b: &d,
        lora_a: &u,
        scale: f64::from(SCALE),
    };
    let (mut weight, mut lora_b, mut lora_a) = (vec![0.0; n * k], vec![0.0; n * r], vec![0.0; r * k]);
    let grads: cpu::LoraGrads<&mut [_]> = cpu::LoraGrads { lora_b: &mut lora_b, lora_a: &mut lora_a };
    if full {
        cpu::lora_mul_weight(lora, &base, &mut weight).unwrap();
        cpu::lora_mul_weight_backward(lora, &base, &grad, grads).unwrap();
    } else {
        cpu::low_rank_weight(lora, &mut weight).unwrap();
        cpu::low_rank_weight_backward(lora, &grad, grads).unwrap();
    }
    vec![weight, lora_b, lora_a]
}

/// The same with every operation's result rounded to `T`.
fn lora_unfused<T: Type>(case: &Case, data: &[Vec<T>; 4]) -> Results<T> {
    let &Case { n, k, r, full, .. } = case;
    let [d, u, base, grad] = data.each_ref().map(|values| wide(values));
    let scaled = |value| round::<T>(f64::from(SCALE) * round::<T>(value));
    let base = |i: usize| if full { base[i] } else { 1.0 };
    let q: Vec<f64> = grad.iter().enumerate().map(|(i, grad)| round::<T>(grad * base(i))).collect();
    let weight = |n: usize, c: usize| scaled(dot(r, |j| d[n * r + j] * u[j * k + c])) * base(n * k + c);
    vec![
        ("ΔW", table(n, k, weight)),
        ("dB", table(n, r, |n, j| scaled(dot(k, |c| q[n * k + c] * u[j * k + c])))),
        ("dA", table(r, k, |j, c| scaled(dot(n, |n| d[n * r + j] * q[n * k + c])))),
    ]
}

fn low_rank_typed<T: Type>(case: &Case, target: &Target<'_>) {
    let &Case { n, k, r, full, .. } = case;
    let data = lora_data::<T>(case);
    let (exact, unfused) = (lora_exact(case, &data), lora_unfused(case, &data));
    check(case, target, &unfused, &exact, |machine| {
        let [lora_b, lora_a, base, grad] = &data;
        let (lora_b, lora_a) = (machine.input("B", lora_b), machine.input("A", lora_a));
        let base = full.then(|| machine.input("W0", base));
        let grad = machine.input("dΔW", grad);
        let lora = LoraFactors { out_features: n, in_features: k, rank: r, lora_b, lora_a, scale: SCALE };
        let weight = machine.output::<T>("ΔW", n * k);
        let grads =
            LoraGrads { lora_b: machine.output::<T>("dB", n * r), lora_a: machine.output::<T>("dA", r * k) };
        let workspace = machine.output::<f32>("workspace", lora.workspace_len(T::DTYPE));
        machine.launch(&lora.weight(T::DTYPE, base, weight).unwrap());
        machine.launch(&lora.backward(T::DTYPE, base, grad, grads, workspace).unwrap());
        vec![weight, grads.lora_b, grads.lora_a]
    });
}

pub fn low_rank(target: &Target<'_>) {
    for case in cases() {
        low_rank_typed::<f32>(&case, target);
        low_rank_typed::<f16>(&case, target);
        low_rank_typed::<bf16>(&case, target);
    }
}

/// Operands of a prompt: `W0`, `Pd`, `Pu`, `b0`, `δb` and the gradient to `Δb`.
fn prompt_data<T: Type>(case: &Case) -> [Vec<T>; 6] {
    let &Case { n, k, r, .. } = case;
    [rounded(1, n * k), rounded(2, k * r), rounded(3, r), rounded(4, n), rounded(5, n), rounded(6, n)]
}

/// `Δb`, `dPd`, `dPu` and `dδb` by the CPU.
fn prompt_exact<T: Type>(case: &Case, data: &[Vec<T>; 6]) -> Vec<Vec<f64>> {
    let &Case { n, k, r, full, .. } = case;
    let [weight, lora_b, lora_a, bias, delta, grad] = data.each_ref().map(|values| wide(values));
    let prompt: cpu::PromptBias<&[_]> = cpu::PromptBias {
        out_features: n,
        in_features: k,
        rank: r,
        base_weight: &weight,
        base_bias: full.then_some(&bias),
        prompt_down: &lora_b,
        prompt_up: &lora_a,
        delta_bias: Some(&delta),
    };
    let mut results = [n, k * r, r, n].map(|len| vec![0.0; len]);
    let [out, prompt_down, prompt_up, delta_bias] = &mut results;
    prompt.forward(out).unwrap();
    prompt
        .backward(&grad, cpu::PromptGrads { prompt_down, prompt_up, delta_bias: Some(delta_bias) })
        .unwrap();
    results.into()
}

/// The same with every operation's result rounded to `T`.
fn prompt_unfused<T: Type>(case: &Case, data: &[Vec<T>; 6]) -> Results<T> {
    let &Case { n, k, r, full, .. } = case;
    let [weight, lora_b, lora_a, bias, delta, grad] = data.each_ref().map(|values| wide(values));
    let bias = |i: usize| if full { bias[i] } else { 0.0 };
    let p: Vec<f64> = (0..k).map(|c| round::<T>(dot(r, |j| lora_b[c * r + j] * lora_a[j]))).collect();
    let q: Vec<f64> = (0..k).map(|c| round::<T>(dot(n, |n| weight[n * k + c] * grad[n]))).collect();
    let out = |n: usize, _| round::<T>(dot(k, |c| weight[n * k + c] * p[c])) + round::<T>(bias(n) * delta[n]);
    vec![
        ("Δb", table(n, 1, out)),
        ("dPd", table(k, r, |c, j| q[c] * lora_a[j])),
        ("dPu", table(r, 1, |j, _| dot(k, |c| lora_b[c * r + j] * q[c]))),
        ("dδb", table(n, 1, |n, _| bias(n) * grad[n])),
    ]
}

fn prompt_typed<T: Type>(case: &Case, target: &Target<'_>) {
    let &Case { n, k, r, full, .. } = case;
    let data = prompt_data::<T>(case);
    let (exact, unfused) = (prompt_exact(case, &data), prompt_unfused(case, &data));
    check(case, target, &unfused, &exact, |machine| {
        let [weight, lora_b, lora_a, bias, delta, grad] = &data;
        let prompt = PromptBias {
            out_features: n,
            in_features: k,
            rank: r,
            base_weight: machine.input("W0", weight),
            base_bias: full.then(|| machine.input("b0", bias)),
            prompt_down: machine.input("Pd", lora_b),
            prompt_up: machine.input("Pu", lora_a),
            delta_bias: Some(machine.input("δb", delta)),
        };
        let grad = machine.input("dΔb", grad);
        let out = machine.output::<T>("Δb", n);
        let grads = PromptGrads {
            prompt_down: machine.output::<T>("dPd", k * r),
            prompt_up: machine.output::<T>("dPu", r),
            delta_bias: Some(machine.output::<T>("dδb", n)),
        };
        let workspace = machine.output::<f32>("workspace", prompt.workspace_len(T::DTYPE));
        machine.launch(&prompt.forward(T::DTYPE, out).unwrap());
        machine.launch(&prompt.backward(T::DTYPE, grad, grads, workspace).unwrap());
        vec![out, grads.prompt_down, grads.prompt_up, grads.delta_bias.unwrap()]
    });
}

pub fn prompt(target: &Target<'_>) {
    for case in cases() {
        prompt_typed::<f32>(&case, target);
        prompt_typed::<f16>(&case, target);
        prompt_typed::<bf16>(&case, target);
    }
    // More ranks than are staged at once.
    prompt_typed::<f32>(&Case { n: 40, k: 3, r: 8200, full: true, shift: 0 }, target);
}

/// Tensors of one layer of a group: sizes, inputs, and whether it has LoRA mul, LoRA add or none, and a prompt.
struct Member {
    factors: LoraFactors<Buffer>,
    base_weight: Buffer,
    delta_weight_grad: Buffer,
    prompt: PromptBias<Buffer>,
    delta_bias_grad: Buffer,
    kind: usize,
}

impl Member {
    fn new<T: Type>(i: usize, machine: &mut Machine<'_>) -> Self {
        let (n, k, r, p) = [(5, 9, 3, 2), (70, 40, 10, 4), (16, 64, 17, 1), (130, 8, 2, 33)][i % 4];
        let mut input = |seed, len| machine.input("input", &rounded::<T>(8 * i as u32 + seed, len));
        let base_weight = input(0, n * k);
        Self {
            factors: LoraFactors {
                out_features: n,
                in_features: k,
                rank: r,
                lora_b: input(1, n * r),
                lora_a: input(2, r * k),
                scale: SCALE,
            },
            base_weight,
            delta_weight_grad: input(3, n * k),
            prompt: PromptBias {
                out_features: n,
                in_features: k,
                rank: p,
                base_weight,
                base_bias: None,
                prompt_down: input(4, k * p),
                prompt_up: input(5, p),
                delta_bias: None,
            },
            delta_bias_grad: input(6, n),
            kind: i % 3,
        }
    }

    fn has_lora(&self) -> bool {
        self.kind != 1
    }

    fn base_weight(&self) -> Option<Buffer> {
        (self.kind == 0).then_some(self.base_weight)
    }

    fn has_prompt(&self) -> bool {
        self.kind != 2
    }

    fn weight<T: Type>(&self, machine: &mut Machine<'_>) -> AdapterWeight<Buffer> {
        let (factors, base_weight) = (self.factors, self.base_weight());
        let mut output = |len| machine.output::<T>("output", len);
        AdapterWeight {
            lora: self.has_lora().then(|| {
                let out = output(factors.out_features * factors.in_features);
                LoraWeight { factors, base_weight, out }
            }),
            prompt: self.has_prompt().then(|| {
                let prompt = self.prompt;
                PromptWeight { prompt, out: output(prompt.out_features) }
            }),
        }
    }

    fn grads<T: Type>(&self, machine: &mut Machine<'_>) -> AdapterWeightGrads<Buffer> {
        let (factors, base_weight) = (self.factors, self.base_weight());
        let mut output = |buffer: Buffer| Some(machine.output::<T>("output", buffer.len));
        AdapterWeightGrads {
            lora: self.has_lora().then(|| LoraWeightGrads {
                factors,
                base_weight,
                delta_weight_grad: self.delta_weight_grad,
                lora_b: output(factors.lora_b),
                lora_a: output(factors.lora_a),
            }),
            prompt: self.has_prompt().then(|| PromptWeightGrads {
                prompt: self.prompt,
                delta_bias_grad: self.delta_bias_grad,
                prompt_down: output(self.prompt.prompt_down),
                prompt_up: output(self.prompt.prompt_up),
                delta_bias: None,
            }),
        }
    }
}

/// What a group wrote: what was built, and gradients.
fn written<T: Type>(
    weights: &[AdapterWeight<Buffer>],
    grads: &[AdapterWeightGrads<Buffer>],
    machine: &Machine<'_>,
) -> (Vec<Vec<T>>, Vec<Vec<T>>) {
    let built = weights.iter().flat_map(|layer| {
        [layer.lora.map(|lora| lora.out), layer.prompt.map(|prompt| prompt.out)].into_iter().flatten()
    });
    let grads = grads.iter().flat_map(|layer| {
        let lora = layer.lora.map_or([None; 2], |lora| [lora.lora_b, lora.lora_a]);
        let prompt = layer.prompt.map_or([None; 2], |prompt| [prompt.prompt_down, prompt.prompt_up]);
        lora.into_iter().chain(prompt).flatten()
    });
    (built.map(|buffer| machine.read(buffer)).collect(), grads.map(|buffer| machine.read(buffer)).collect())
}

/// More layers than a launch takes, each with the bits that it has alone.
pub fn grouped(target: &Target<'_>) {
    type T = bf16;
    target.run(0, |machine| {
        let members: Vec<Member> = (0..35).map(|i| Member::new::<T>(i, machine)).collect();
        let mut run = |members: &[Member]| {
            let weights: Vec<_> = members.iter().map(|member| member.weight::<T>(machine)).collect();
            let grads: Vec<_> = members.iter().map(|member| member.grads::<T>(machine)).collect();
            let len = AdapterWeightGrads::workspace_len(T::DTYPE, &grads);
            let workspace = machine.output::<f32>("workspace", len);
            machine.launch(&AdapterWeight::plan(T::DTYPE, &weights).unwrap());
            machine.launch(&AdapterWeightGrads::plan(T::DTYPE, &grads, workspace).unwrap());
            written::<T>(&weights, &grads, machine)
        };
        let alone: Vec<_> = members.chunks(1).map(&mut run).collect();
        let (built, grads): (Vec<_>, Vec<_>) = alone.into_iter().unzip();
        let together = run(&members);
        assert!(built.concat() == together.0, "what was built");
        assert!(grads.concat() == together.1, "gradients");
    });
}

/// What a merge has to leave, bitwise.
fn merged<T: Type>(sign: MergeSign, target: &[T], delta: &[T]) -> Vec<T> {
    let pairs = target.iter().zip(delta).map(|(w, d)| (w.widen(), d.widen()));
    let sum = |(w, d): (f32, f32)| match sign {
        MergeSign::Merge => w + d,
        MergeSign::Unmerge => w - d,
    };
    pairs.map(sum).map(|sum| T::round(sum.into())).collect()
}

fn merge_typed<T: Type>(target: &Target<'_>) {
    // Around vectors, and what a block does with one vector per thread and with four.
    for (i, len) in [1, 3, 4, 5, 7, 8, 9, 1023, 1025, 2048, 4096, 4100, 8193].into_iter().enumerate() {
        for sign in [MergeSign::Merge, MergeSign::Unmerge] {
            let (before, delta) = (rounded::<T>(1, len), rounded::<T>(2, len));
            let want = merged(sign, &before, &delta);
            target.run(i % 2, |machine| {
                let (target, delta) = (machine.in_out("target", &before), machine.input("delta", &delta));
                let mut plan = Merge { sign, dtype: T::DTYPE, target, delta }.plan().unwrap();
                if i % 3 == 0 {
                    plan.launches_mut().for_each(|launch| launch.grid[0] = 1);
                }
                machine.launch(&plan);
                assert!(machine.read::<T>(target) == want, "{sign:?} {len} {:?}", T::DTYPE);
            });
        }
    }
}

pub fn merge(target: &Target<'_>) {
    merge_typed::<f32>(target);
    merge_typed::<f16>(target);
    merge_typed::<bf16>(target);
}

/// The safe methods, on half-open views of larger tensors.
pub fn safe_methods(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in cases() {
        lora_methods(opened, &case);
        prompt_methods(opened, &case);
    }
    for sign in [MergeSign::Merge, MergeSign::Unmerge] {
        let (before, delta) = (rounded::<f16>(1, 4100), rounded::<f16>(2, 4100));
        let (mut on_device, change) = (opened.upload(1, &before), opened.upload(1, &delta));
        let (mut view, change) = (on_device.slice_mut(1..), change.slice(1..));
        match sign {
            MergeSign::Merge => device.merge::<f16>(&mut view, &change, stream),
            MergeSign::Unmerge => device.unmerge::<f16>(&mut view, &change, stream),
        }
        .unwrap();
        assert!(opened.download(1, &on_device) == merged(sign, &before, &delta), "{sign:?}");
    }
}

fn compare<T: Type>(case: &Case, unfused: &Results<T>, exact: &[Vec<f64>], results: &[Vec<T>]) {
    for ((result, (name, unfused)), exact) in results.iter().zip(unfused).zip(exact) {
        support::compare(name, case, result, unfused, exact);
    }
}

fn lora_methods(opened: &Opened, case: &Case) {
    let Opened { device, stream } = opened;
    let &Case { n, k, r, full, shift, .. } = case;
    let data = lora_data::<f16>(case);
    let tensors = data.each_ref().map(|values| opened.upload(shift, values));
    let [d, u, base, grad] = tensors.each_ref().map(|tensor| tensor.slice(shift..));
    let (lora_b, lora_a): (&dyn DevicePtr<f16>, &dyn DevicePtr<f16>) = (&d, &u);
    let lora = LoraFactors { out_features: n, in_features: k, rank: r, lora_b, lora_a, scale: SCALE };
    let mut workspace = opened.upload(0, &vec![f32::NAN; lora.workspace_len(f16::DTYPE)]);
    let mut outs = [n * k, n * r, r * k].map(|len| opened.upload(shift, &vec![f16::NAN; len]));
    {
        let [mut weight, mut lora_b, mut lora_a] = outs.each_mut().map(|out| out.slice_mut(shift..));
        let grads = LoraGrads::<&mut dyn DevicePtrMut<f16>> { lora_b: &mut lora_b, lora_a: &mut lora_a };
        if full {
            // As a group of one layer.
            let (base_weight, out): (Option<&dyn DevicePtr<f16>>, &mut dyn DevicePtrMut<f16>) =
                (Some(&base), &mut weight);
            let lora_weight = Some(LoraWeight { factors: lora, base_weight, out });
            device.adapter_weights([AdapterWeight { lora: lora_weight, prompt: None }], stream).unwrap();
            device.lora_mul_weight_backward(lora, &base, &grad, grads, &mut workspace, stream).unwrap();
        } else {
            device.low_rank_weight::<f16>(lora, &mut weight, stream).unwrap();
            device.low_rank_weight_backward(lora, &grad, grads, &mut workspace, stream).unwrap();
        }
    }
    let results = outs.map(|out| opened.download(shift, &out));
    compare(case, &lora_unfused(case, &data), &lora_exact(case, &data), &results);
}

fn prompt_methods(opened: &Opened, case: &Case) {
    let Opened { device, stream } = opened;
    let &Case { n, k, r, full, shift, .. } = case;
    let data = prompt_data::<f16>(case);
    let tensors = data.each_ref().map(|values| opened.upload(shift, values));
    let views = tensors.each_ref().map(|tensor| tensor.slice(shift..));
    let [weight, lora_b, lora_a, bias, delta, grad] =
        views.each_ref().map(|view| view as &dyn DevicePtr<f16>);
    let prompt = PromptBias {
        out_features: n,
        in_features: k,
        rank: r,
        base_weight: weight,
        base_bias: full.then_some(bias),
        prompt_down: lora_b,
        prompt_up: lora_a,
        delta_bias: Some(delta),
    };
    let mut workspace = opened.upload(0, &vec![f32::NAN; prompt.workspace_len(f16::DTYPE)]);
    let mut outs = [n, k * r, r, n].map(|len| opened.upload(shift, &vec![f16::NAN; len]));
    {
        let [mut out, mut lora_b, mut lora_a, mut bias] = outs.each_mut().map(|out| out.slice_mut(shift..));
        device.prompt_bias(&prompt, &mut out, stream).unwrap();
        let grads = PromptGrads::<&mut dyn DevicePtrMut<f16>> {
            prompt_down: &mut lora_b,
            prompt_up: &mut lora_a,
            delta_bias: Some(&mut bias),
        };
        device.prompt_bias_backward(&prompt, grad, grads, &mut workspace, stream).unwrap();
    }
    let results = outs.map(|out| opened.download(shift, &out));
    compare(case, &prompt_unfused(case, &data), &prompt_exact(case, &data), &results);
}
