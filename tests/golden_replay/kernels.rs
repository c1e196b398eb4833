//! Replays single operators with the CUDA kernels, in the simulator or on a device, in f32.

use super::case::Case;
use super::machine::{Machine, Target};
use super::operators::{adapter_kind, noise_shape, shape};
use libtest_mimic::Failed;
use pace_kernels::adapter::{self, Adapter};
use pace_kernels::cuda::{
    Base, Buffer, DType, Direction, DropPath, LoraFactors, LoraGrads, Loss, LossStatus, LowRankGrads,
    LowRankLinear, MaskSource, NoisyLinear, NoisyLinearGrads, Partner, PromptBias, PromptGrads, Source,
};
use pace_kernels::schedule::LazySchedule;
use pace_kernels::{LinearShape, LossSettings, Targets};
use std::cell::RefCell;

const TYPE: DType = DType::F32;
const TOLERANCE: f64 = 1e-5;

/// Runs a check until it fails.
fn on(target: &Target<'_>, check: impl Fn(&mut Machine<'_>) -> Result<(), Failed>) -> Result<(), Failed> {
    let result = RefCell::new(Ok(()));
    target.run(0, |machine| {
        if result.borrow().is_ok() {
            *result.borrow_mut() = check(machine);
        }
    });
    result.into_inner()
}

/// A machine with the tensors of a case.
struct Bench<'a, 'b> {
    case: &'a Case,
    machine: &'a mut Machine<'b>,
}

impl Bench<'_, '_> {
    fn input(&mut self, name: &str) -> Result<Buffer, Failed> {
        Ok(self.machine.input(name, &self.case.get::<f32>(name)?))
    }

    fn input_if_present(&mut self, name: &str) -> Result<Option<Buffer>, Failed> {
        if self.case.has(name) { self.input(name).map(Some) } else { Ok(None) }
    }

    fn output(&mut self, name: &str, len: usize) -> Buffer {
        self.machine.output::<f32>(name, len)
    }

    fn expect(&self, name: &str, got: Buffer) -> Result<(), Failed> {
        self.case.expect(name, &self.machine.read::<f32>(got), TOLERANCE)
    }
}

/// Forward, backward and evaluation of one adapter.
pub fn adapter(case: &Case, target: &Target<'_>) -> Result<(), Failed> {
    let shape = shape(case)?;
    let kind = adapter_kind(case)?;
    on(target, |machine| {
        let mut bench = Bench { case, machine };
        let noise = match bench.input_if_present("noise_z")? {
            Some(z) => Source::Given { z, shape: noise_shape(case)? },
            None if case.number::<f64>("sigma")? != 0.0 => {
                return Err("sigma is not 0, but there is no `noise_z`".into());
            }
            None => Source::Off,
        };
        match kind {
            Some(Adapter::LoraAdd) => low_rank(&mut bench, shape, noise),
            _ => dense(&mut bench, shape, noise, kind),
        }
    })
}

fn low_rank(bench: &mut Bench<'_, '_>, shape: LinearShape, noise: Source) -> Result<(), Failed> {
    let (k, n, rank) = (shape.in_features, shape.out_features, bench.case.number("rank")?);
    let layer = LowRankLinear {
        shape,
        noise,
        base: Some(Base { weight: bench.input("base_weight")?, bias: bench.input_if_present("base_bias")? }),
        rank,
        lora_b: bench.input(adapter::DOWN)?,
        lora_a: bench.input(adapter::UP)?,
        delta_bias: Some(bench.input(adapter::DELTA_BIAS)?),
        scale: 1.0,
        allow_tf32: false,
    };
    let (x, dy) = (bench.input("x")?, bench.input("dy")?);
    let s = bench.output("s", shape.in_rows() * rank);
    let gpu = bench.machine.gpu;
    let workspace = bench.output("workspace", layer.workspace_len(&gpu, TYPE));
    for (name, noise) in [("y", noise), ("y_eval", Source::Off)] {
        let y = bench.output(name, dy.len);
        bench.machine.launch(&LowRankLinear { noise, ..layer }.forward(&gpu, TYPE, x, s, y, workspace)?);
        bench.expect(name, y)?;
    }
    let [dx, dd, du, db] = [("dx", x.len), ("dB", n * rank), ("dA", rank * k), ("dδb", n)]
        .map(|(name, len)| bench.output(name, len));
    let grads = LowRankGrads { input: Some(dx), lora_b: Some(dd), lora_a: Some(du), delta_bias: Some(db) };
    bench.machine.launch(&layer.backward(&gpu, TYPE, x, s, dy, grads, workspace)?);
    bench.expect("dx", dx)?;
    bench.expect("grad_delta_W_down", dd)?;
    bench.expect("grad_delta_W_up", du)?;
    bench.expect("grad_delta_b", db)
}

/// LoRA mul + VPT add, VPT add, and the noisy head (`kind` is `None`).
fn dense(
    bench: &mut Bench<'_, '_>,
    shape: LinearShape,
    noise: Source,
    kind: Option<Adapter>,
) -> Result<(), Failed> {
    let (k, n, rank) = (shape.in_features, shape.out_features, bench.case.number("rank")?);
    let (weight, bias) = (bench.input("base_weight")?, bench.input_if_present("base_bias")?);
    let (x, dy) = (bench.input("x")?, bench.input("dy")?);
    let lora = kind == Some(Adapter::LoraMulVptAdd);

    let factors = match lora {
        true => Some(LoraFactors {
            out_features: n,
            in_features: k,
            rank,
            lora_b: bench.input(adapter::DOWN)?,
            lora_a: bench.input(adapter::UP)?,
            scale: 1.0,
        }),
        false => None,
    };
    let delta_weight = bench.output("ΔW", n * k);
    if let Some(factors) = factors {
        bench.machine.launch(&factors.weight(TYPE, Some(weight), delta_weight)?);
    }
    let prompt = match kind {
        Some(_) => Some(PromptBias {
            out_features: n,
            in_features: k,
            rank,
            base_weight: weight,
            base_bias: bias,
            prompt_down: bench.input(adapter::PROMPT_DOWN)?,
            prompt_up: bench.input(adapter::PROMPT_UP)?,
            delta_bias: if lora { Some(bench.input(adapter::DELTA_BIAS)?) } else { None },
        }),
        None => None,
    };
    let delta_bias = bench.output("Δb", n);
    if let Some(prompt) = prompt {
        bench.machine.launch(&prompt.forward(TYPE, delta_bias)?);
    }

    let layer = NoisyLinear {
        shape,
        noise,
        base: kind.map(|_| Base { weight, bias }),
        delta_weight: match kind {
            None => Some(weight),
            Some(_) => lora.then_some(delta_weight),
        },
        delta_bias: if kind.is_some() { Some(delta_bias) } else { bias },
        fold: false,
        allow_tf32: false,
    };
    let gpu = bench.machine.gpu;
    let workspace = bench.output("workspace", layer.workspace_len(&gpu, TYPE));
    for (name, noise) in [("y", noise), ("y_eval", Source::Off)] {
        let y = bench.output(name, dy.len);
        bench.machine.launch(&NoisyLinear { noise, ..layer }.forward(&gpu, TYPE, x, y, workspace)?);
        bench.expect(name, y)?;
    }

    let [dx, dw, db] = [("dx", x.len), ("dΔW", n * k), ("dΔb", n)].map(|(name, len)| bench.output(name, len));
    let grads = NoisyLinearGrads {
        input: Some(dx),
        delta_weight: layer.delta_weight.map(|_| dw),
        delta_bias: Some(db),
    };
    bench.machine.launch(&layer.backward(&gpu, TYPE, x, dy, grads, workspace)?);
    bench.expect("dx", dx)?;
    let Some(prompt) = prompt else {
        bench.expect("grad_base_weight", dw)?;
        return if bias.is_some() { bench.expect("grad_base_bias", db) } else { Ok(()) };
    };
    if let Some(factors) = factors {
        let grads = LoraGrads { lora_b: bench.output("dB", n * rank), lora_a: bench.output("dA", rank * k) };
        let workspace = bench.output("workspace of dB and dA", factors.workspace_len(TYPE));
        bench.machine.launch(&factors.backward(TYPE, Some(weight), dw, grads, workspace)?);
        bench.expect("grad_delta_W_down", grads.lora_b)?;
        bench.expect("grad_delta_W_up", grads.lora_a)?;
    }
    let grads = PromptGrads {
        prompt_down: bench.output("dPd", k * rank),
        prompt_up: bench.output("dPu", rank),
        delta_bias: lora.then(|| bench.output("dδb", n)),
    };
    let workspace = bench.output("workspace of dPd and dPu", prompt.workspace_len(TYPE));
    bench.machine.launch(&prompt.backward(TYPE, db, grads, workspace)?);
    bench.expect("grad_delta_prompt_down", grads.prompt_down)?;
    bench.expect("grad_delta_prompt_up", grads.prompt_up)?;
    match grads.delta_bias {
        // Without b0, δb has no effect, and no gradient in the official code.
        Some(db) if bias.is_some() || bench.case.has("grad_delta_b") => bench.expect("grad_delta_b", db),
        _ => Ok(()),
    }
}

/// One of the three variants of the loss.
pub fn loss(case: &Case, target: &Target<'_>) -> Result<(), Failed> {
    let (classes, batch): (usize, usize) = (case.number("classes")?, case.number("batch")?);
    on(target, |machine| {
        let mut labels = case.integers("labels")?;
        let partner = match case.text("mode")? {
            "pace" => Partner::OtherBranch,
            "lazy" => {
                let schedule = LazySchedule::new(case.number("lazy_interval")?)?;
                match schedule.two_branch_samples(case.number("iteration")?, batch)? {
                    Some(half) => {
                        labels = &labels[..half];
                        Partner::OtherBranch
                    }
                    None => Partner::None,
                }
            }
            "fast" => Partner::History {
                table: machine.in_out("history", &case.get::<f32>("history_before")?),
                index: machine.input("index", case.integers("index")?),
            },
            other => return Err(format!("unknown mode `{other}`").into()),
        };
        let settings = LossSettings::new(classes, case.number("lambda_")?);
        let logits = machine.input("logits", &case.get::<f32>("logits")?);
        let gradient = machine.output::<f32>("gradient", logits.len);
        let loss = Loss {
            settings,
            dtype: TYPE,
            logits,
            targets: Targets::Labels(machine.input("labels", labels)),
            class_weights: None,
            counted: None,
            partner,
            gradient: Some(gradient),
            values: machine.output::<f32>("values", 3),
            status: machine.output::<u64>("status", LossStatus::WORDS),
            accumulate: false,
            first_row: 0,
            workspace: machine.in_out("workspace", &vec![0u32; settings.workspace_len(labels.len())]),
        };
        machine.launch(&loss.plan()?);
        let status = machine.read::<u64>(loss.status);
        let status: [u64; LossStatus::WORDS] =
            status.try_into().map_err(|_| "the status has another length")?;
        LossStatus::new(status).check(classes, usize::MAX)?;
        let values = machine.read::<f32>(loss.values);
        case.expect("total_loss", &values[..1], TOLERANCE)?;
        case.expect("cls_loss", &values[1..2], TOLERANCE)?;
        if partner != Partner::None {
            case.expect("pace_loss", &values[2..], TOLERANCE)?;
        }
        if let Partner::History { table, .. } = partner {
            case.expect("history_after", &machine.read::<f32>(table), TOLERANCE)?;
        }
        case.expect("dlogits", &machine.read::<f32>(gradient), TOLERANCE)
    })
}

/// DropPath with a given mask.
pub fn drop_path(case: &Case, target: &Target<'_>) -> Result<(), Failed> {
    let x_shape = &case.tensor("x")?.shape;
    let batch: usize = case.number("batch_per_branch")?;
    let (branches, features) = (x_shape[0] / batch, x_shape[1..].iter().product());
    on(target, |machine| {
        let mask = MaskSource::Given(machine.input("mask", &case.get::<f32>("mask")?));
        for (direction, from, to) in [(Direction::Forward, "x", "y"), (Direction::Backward, "dy", "dx")] {
            let input = machine.input(from, &case.get::<f32>(from)?);
            let output = machine.output::<f32>(to, input.len);
            let operator =
                DropPath { branches, batch, features, mask, direction, dtype: TYPE, input, output };
            machine.launch(&operator.plan()?);
            case.expect(to, &machine.read::<f32>(output), TOLERANCE)?;
        }
        Ok(())
    })
}
