//! A layer with the paper's main adapter, from its own parameters, against the CPU operator in f64 and against the operators that
//! it is made of.

use crate::machine::{Machine, Target};
use crate::support::{Type, Z, check_results, rounded, shape, wide};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cpu;
use pace_kernels::cuda::{self, Base, Buffer, Family, Launch, Lora, LoraMulLinearGrads, Prompt, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    z: Z,
    rank: Option<usize>,
    prompt_rank: Option<usize>,
    biases: bool,
    fold: bool,
    shift: usize,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, z) in
        [Z::Off, Z::Generated(PerSample), Z::Keyed(PerToken), Z::Given(PerSample)].into_iter().enumerate()
    {
        for (j, (rank, prompt_rank)) in
            [(Some(3), Some(2)), (Some(5), None), (None, Some(1))].into_iter().enumerate()
        {
            let shape = [shape(2, 2, 3, 17, 9, false), shape(2, 1, 5, 16, 24, true)][(i + j) % 2];
            let (biases, fold) = ((i + j) % 3 != 0, false);
            cases.push(Case { shape, z, rank, prompt_rank, biases, fold, shift: j % 2 });
        }
    }
    // Samples that fill tiles, and no noise.
    for (shape, z) in [
        (shape(2, 1, 90, 16, 24, false), Z::Generated(PerSample)),
        (shape(1, 2, 197, 40, 16, false), Z::Given(PerSample)),
        (shape(1, 3, 7, 17, 9, false), Z::Off),
    ] {
        let (rank, prompt_rank) = (Some(3), Some(2));
        cases.push(Case { shape, z, rank, prompt_rank, biases: true, fold: true, shift: 0 });
    }
    cases
}

struct Data<T> {
    x: Vec<T>,
    dy: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    lora_a: Vec<T>,
    lora_b: Vec<T>,
    prompt_down: Vec<T>,
    prompt_up: Vec<T>,
    delta_bias: Vec<T>,
}

const SCALE: f32 = 0.5;

impl<T: Type> Data<T> {
    fn new(case: &Case) -> Self {
        let (shape, k, n) = (&case.shape, case.shape.in_features, case.shape.out_features);
        let (r, p) = (case.rank.unwrap_or(0), case.prompt_rank.unwrap_or(0));
        Self {
            x: rounded(21, shape.in_rows() * k),
            dy: rounded(22, shape.out_rows() * n),
            weight: rounded(23, n * k),
            bias: rounded(24, n),
            lora_a: rounded(25, r * k),
            lora_b: rounded(26, n * r),
            prompt_down: rounded(27, k * p),
            prompt_up: rounded(28, p),
            delta_bias: rounded(29, n),
        }
    }

    fn layer(&self, case: &Case, machine: &mut Machine<'_>) -> cuda::LoraMulLinear<Buffer, Source> {
        cuda::LoraMulLinear {
            shape: case.shape,
            noise: case.z.source(&case.shape, machine),
            base: Base {
                weight: machine.input("W0", &self.weight),
                bias: case.biases.then(|| machine.input("b0", &self.bias)),
            },
            lora: case.rank.map(|rank| Lora {
                rank,
                lora_a: machine.input("A", &self.lora_a),
                lora_b: machine.input("B", &self.lora_b),
                scale: SCALE,
            }),
            prompt: case.prompt_rank.map(|rank| Prompt {
                rank,
                down: machine.input("Pd", &self.prompt_down),
                up: machine.input("Pu", &self.prompt_up),
            }),
            delta_bias: case.biases.then(|| machine.input("δb", &self.delta_bias)),
            fold: case.fold,
            allow_tf32: false,
        }
    }
}

const NAMES: [&str; 7] = ["y", "dx", "dA", "dB", "dPd", "dPu", "dδb"];

type Results<T> = [Vec<T>; 7];

/// The gradients that the case has.
fn wanted(case: &Case) -> [bool; 6] {
    let (lora, prompt) = (case.rank.is_some(), case.prompt_rank.is_some());
    [true, lora, lora, prompt, prompt, case.biases]
}

fn on_cpu<T: Type, R: pace_kernels::Real + 'static>(case: &Case, data: &Data<T>) -> Results<R> {
    let real = |values: &[T]| wide(values).into_iter().map(R::from_f64).collect::<Vec<R>>();
    let tensors = [
        &data.x,
        &data.dy,
        &data.weight,
        &data.bias,
        &data.lora_a,
        &data.lora_b,
        &data.prompt_down,
        &data.prompt_up,
        &data.delta_bias,
    ]
    .map(|values| real(values));
    let [x, dy, weight, bias, lora_a, lora_b, down, up, delta_bias] = &tensors;
    let given: Vec<R> = case.z.given(&case.shape).into_iter().map(|z| R::from_f64(z.into())).collect();
    let layer = cpu::LoraMulLinear {
        shape: case.shape,
        noise: case.z.on_cpu(&given),
        base: cpu::Base { weight, bias: case.biases.then_some(bias) },
        lora: case.rank.map(|rank| Lora {
            rank,
            lora_a: &lora_a[..],
            lora_b: &lora_b[..],
            scale: R::from_f64(SCALE.into()),
        }),
        prompt: case.prompt_rank.map(|rank| Prompt { rank, down: &down[..], up: &up[..] }),
        delta_bias: case.biases.then_some(delta_bias),
        fold: false,
    };
    let mut y = vec![R::from_f64(0.0); dy.len()];
    layer.forward(x, &mut y).unwrap();
    let lens = [x.len(), lora_a.len(), lora_b.len(), down.len(), up.len(), delta_bias.len()];
    let mut grads = lens.map(|len| vec![R::from_f64(0.0); len]);
    let wanted = wanted(case);
    let [dx, da, db, dd, du, dbias] = &mut grads;
    layer
        .backward(
            Some(x),
            dy,
            LoraMulLinearGrads {
                input: Some(dx),
                lora_a: wanted[1].then_some(da),
                lora_b: wanted[2].then_some(db),
                prompt_down: wanted[3].then_some(dd),
                prompt_up: wanted[4].then_some(du),
                delta_bias: wanted[5].then_some(dbias),
            },
        )
        .unwrap();
    if !wanted[5] {
        grads[5].clear();
    }
    let [dx, da, db, dd, du, dbias] = grads;
    [y, dx, da, db, dd, du, dbias]
}

fn run<T: Type>(case: &Case, data: &Data<T>, machine: &mut Machine<'_>) -> Results<T> {
    let (layer, gpu) = (data.layer(case, machine), machine.gpu);
    let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
    let y = machine.output::<T>("y", data.dy.len());
    let workspace = machine.output::<f32>("workspace", layer.workspace_len(&gpu, T::DTYPE));
    let forward = layer.forward(&gpu, T::DTYPE, x, y, workspace).unwrap();
    if gpu.family == Some(Family::Sm80) {
        let is_folded = |launch: &Launch| launch.kernel.name.contains("folded");
        assert_eq!(forward.launches().any(is_folded), case.fold, "{case:?}");
    }
    machine.launch(&forward);
    let likes = [&data.x, &data.lora_a, &data.lora_b, &data.prompt_down, &data.prompt_up, &data.delta_bias];
    let mut grads = [None; 6];
    for (i, is_wanted) in wanted(case).into_iter().enumerate() {
        grads[i] = is_wanted.then(|| machine.output::<T>(NAMES[i + 1], likes[i].len()));
    }
    let [input, lora_a, lora_b, prompt_down, prompt_up, delta_bias] = grads;
    let targets = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
    machine.launch(&layer.backward(&gpu, T::DTYPE, lora_a.map(|_| x), dy, targets, workspace).unwrap());
    let [dx, da, db, dd, du, dbias] = grads;
    [Some(y), dx, da, db, dd, du, dbias]
        .map(|buffer| buffer.map_or(Vec::new(), |buffer| machine.read::<T>(buffer)))
}

pub fn f32(target: &Target<'_>) {
    for case in cases() {
        let data = Data::<f32>::new(&case);
        let exact: Results<f64> = on_cpu(&case, &data);
        let unfused: Results<f32> = on_cpu(&case, &data);
        check_results(target, (&case, case.shift), NAMES, &unfused, &exact, |machine| {
            run(&case, &data, machine)
        });
    }
}

/// A 16-bit ΔW and Δb are rounded between the operators, so results are compared with those operators one after the other.
pub fn bf16(target: &Target<'_>) {
    for case in cases() {
        let data = Data::<bf16>::new(&case);
        target.run(case.shift, |machine| {
            let got = run(&case, &data, machine);
            let want = one_by_one(&case, &data, machine);
            for (i, name) in NAMES.iter().enumerate() {
                assert!(got[i] == want[i], "{name} of {case:?}");
            }
        });
    }
}

fn one_by_one(case: &Case, data: &Data<bf16>, machine: &mut Machine<'_>) -> Results<bf16> {
    const TYPE: cuda::DType = cuda::DType::BF16;
    let (layer, gpu) = (data.layer(case, machine), machine.gpu);
    let LinearShape { in_features: k, out_features: n, .. } = case.shape;
    let factors = layer.lora.map(|lora| cuda::LoraFactors {
        out_features: n,
        in_features: k,
        rank: lora.rank,
        lora_b: lora.lora_b,
        lora_a: lora.lora_a,
        scale: lora.scale,
    });
    let delta_weight = factors.map(|factors| {
        let out = machine.output::<bf16>("ΔW", n * k);
        machine.launch(&factors.weight(TYPE, Some(layer.base.weight), out).unwrap());
        out
    });
    let prompt = layer.prompt.map(|prompt| cuda::PromptBias {
        out_features: n,
        in_features: k,
        rank: prompt.rank,
        base_weight: layer.base.weight,
        base_bias: layer.base.bias,
        prompt_down: prompt.down,
        prompt_up: prompt.up,
        delta_bias: layer.delta_bias,
    });
    let delta_bias = match prompt {
        Some(prompt) => {
            let out = machine.output::<bf16>("Δb", n);
            machine.launch(&prompt.forward(TYPE, out).unwrap());
            Some(out)
        }
        None => layer.delta_bias,
    };
    let dense = cuda::NoisyLinear {
        shape: layer.shape,
        noise: layer.noise,
        base: Some(layer.base),
        delta_weight,
        delta_bias,
        fold: case.fold,
        allow_tf32: false,
    };
    let (x, dy) = (machine.input("x", &data.x), machine.input("dy", &data.dy));
    let y = machine.output::<bf16>("y", data.dy.len());
    let workspace = machine.output::<f32>("workspace", dense.workspace_len(&gpu, TYPE));
    machine.launch(&dense.forward(&gpu, TYPE, x, y, workspace).unwrap());
    let input = machine.output::<bf16>("dx", data.x.len());
    let dw = delta_weight.map(|_| machine.output::<bf16>("dΔW", n * k));
    let db = machine.output::<bf16>("dΔb", n);
    let grads = cuda::NoisyLinearGrads { input: Some(input), delta_weight: dw, delta_bias: Some(db) };
    machine.launch(&dense.backward(&gpu, TYPE, x, dy, grads, workspace).unwrap());
    let mut results = Results::<bf16>::default();
    results[0] = machine.read(y);
    results[1] = machine.read(input);
    if let (Some(factors), Some(dw)) = (factors, dw) {
        let lora_a = machine.output::<bf16>("dA", data.lora_a.len());
        let lora_b = machine.output::<bf16>("dB", data.lora_b.len());
        let workspace = machine.output::<f32>("workspace of dA", factors.workspace_len(TYPE));
        let grads = cuda::LoraGrads { lora_b, lora_a };
        machine.launch(&factors.backward(TYPE, Some(layer.base.weight), dw, grads, workspace).unwrap());
        results[2] = machine.read(lora_a);
        results[3] = machine.read(lora_b);
    }
    results[6] = if case.biases { machine.read(db) } else { Vec::new() };
    if let Some(prompt) = prompt {
        let workspace = machine.output::<f32>("workspace of dPd", prompt.workspace_len(TYPE));
        let prompt_down = machine.output::<bf16>("dPd", data.prompt_down.len());
        let prompt_up = machine.output::<bf16>("dPu", data.prompt_up.len());
        let delta_bias = case.biases.then(|| machine.output::<bf16>("dδb", n));
        let grads = cuda::PromptGrads { prompt_down, prompt_up, delta_bias };
        machine.launch(&prompt.backward(TYPE, db, grads, workspace).unwrap());
        results[4] = machine.read(prompt_down);
        results[5] = machine.read(prompt_up);
        results[6] = delta_bias.map_or(Vec::new(), |bias| machine.read(bias));
    }
    results
}
