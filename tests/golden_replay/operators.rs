//! Replays single operators on the CPU.

use super::case::Case;
use libtest_mimic::Failed;
use pace_kernels::adapter::{self, Adapter};
use pace_kernels::cpu::{self, Base, Consistency, LoraFactors, LoraGrads, Loss, PromptBias, PromptGrads};
use pace_kernels::noise::{Noise, NoiseShape};
use pace_kernels::schedule::LazySchedule;
use pace_kernels::{LinearShape, LossSettings, Real, Targets};

/// The bound of a precision.
fn tolerance<T: Real>() -> f64 {
    if size_of::<T>() == 8 { 1e-10 } else { 1e-5 }
}

/// Sizes of an adapter case.
pub fn shape(case: &Case) -> Result<LinearShape, Failed> {
    let (x, y) = (&case.tensor("x")?.shape, &case.tensor("dy")?.shape);
    let batch: usize = case.number("batch_per_branch")?;
    Ok(LinearShape {
        branches: x[0] / batch,
        batch,
        tokens: x[1..x.len() - 1].iter().product(),
        in_features: x[x.len() - 1],
        out_features: y[y.len() - 1],
        shared_input: false,
    })
}

pub fn noise_shape(case: &Case) -> Result<NoiseShape, Failed> {
    match case.text("noise_shape")? {
        "BC" => Ok(NoiseShape::PerSample),
        "BTC" => Ok(NoiseShape::PerToken),
        other => Err(format!("unknown noise shape `{other}`").into()),
    }
}

/// The adapter of a case; `None` is the noisy head.
pub fn adapter_kind(case: &Case) -> Result<Option<Adapter>, Failed> {
    let name = case.text("adapter")?.trim_end_matches("_Linear");
    match Adapter::from_name(name) {
        Some(adapter) => Ok(Some(adapter)),
        None if name == "HeadLinear" => Ok(None),
        None => Err(format!("unknown adapter `{name}`").into()),
    }
}

/// Forward, backward and evaluation of one adapter.
pub fn adapter<T: Real>(case: &Case) -> Result<(), Failed> {
    let shape = shape(case)?;
    let kind = adapter_kind(case)?;
    let z: Option<Vec<T>> = case.get_if_present("noise_z")?;
    if z.is_none() && case.number::<f64>("sigma")? != 0.0 {
        return Err("sigma is not 0, but there is no `noise_z`".into());
    }
    let noise: Noise<&[T]> = match &z {
        Some(z) => Noise::Given { z, shape: noise_shape(case)? },
        None => Noise::Off,
    };
    match kind {
        Some(Adapter::LoraAdd) => low_rank(case, shape, noise),
        _ => dense(case, shape, noise, kind),
    }
}

fn low_rank<T: Real>(case: &Case, shape: LinearShape, noise: Noise<&'_ [T]>) -> Result<(), Failed> {
    let (k, n, rank) = (shape.in_features, shape.out_features, case.number("rank")?);
    let (weight, bias) = (case.get::<T>("base_weight")?, case.get_if_present::<T>("base_bias")?);
    let (lora_b, lora_a) = (case.get::<T>(adapter::DOWN)?, case.get::<T>(adapter::UP)?);
    let delta_bias = case.get::<T>(adapter::DELTA_BIAS)?;
    let (x, dy) = (case.get::<T>("x")?, case.get::<T>("dy")?);
    let layer = cpu::LowRankLinear {
        shape,
        noise,
        base: Some(Base { weight: &weight, bias: bias.as_deref() }),
        rank,
        lora_b: &lora_b,
        lora_a: &lora_a,
        delta_bias: Some(&delta_bias),
        scale: T::one(),
    };
    let tolerance = tolerance::<T>();
    let mut y = vec![T::zero(); dy.len()];
    layer.forward(&x, &mut y)?;
    case.expect("y", &y, tolerance)?;
    cpu::LowRankLinear { noise: Noise::Off, ..layer }.forward(&x, &mut y)?;
    case.expect("y_eval", &y, tolerance)?;

    let mut dx = vec![T::zero(); x.len()];
    let (mut dd, mut du, mut db) = (vec![T::zero(); n * rank], vec![T::zero(); rank * k], vec![T::zero(); n]);
    let grads: cpu::LowRankGrads<&mut [_]> = cpu::LowRankGrads {
        input: Some(&mut dx),
        lora_b: Some(&mut dd),
        lora_a: Some(&mut du),
        delta_bias: Some(&mut db),
    };
    layer.backward(&x, &dy, grads)?;
    case.expect("dx", &dx, tolerance)?;
    case.expect("grad_delta_W_down", &dd, tolerance)?;
    case.expect("grad_delta_W_up", &du, tolerance)?;
    case.expect("grad_delta_b", &db, tolerance)
}

/// LoRA mul + VPT add, VPT add, and the noisy head (`kind` is `None`).
fn dense<T: Real>(
    case: &Case,
    shape: LinearShape,
    noise: Noise<&'_ [T]>,
    kind: Option<Adapter>,
) -> Result<(), Failed> {
    let (k, n, rank) = (shape.in_features, shape.out_features, case.number("rank")?);
    let (weight, bias) = (case.get::<T>("base_weight")?, case.get_if_present::<T>("base_bias")?);
    let (x, dy) = (case.get::<T>("x")?, case.get::<T>("dy")?);
    let tolerance = tolerance::<T>();
    let lora = kind == Some(Adapter::LoraMulVptAdd);

    let (lora_b, lora_a) =
        if lora { (case.get::<T>(adapter::DOWN)?, case.get::<T>(adapter::UP)?) } else { (vec![], vec![]) };
    let factors: LoraFactors<&[_], _> = LoraFactors {
        out_features: n,
        in_features: k,
        rank,
        lora_b: &lora_b,
        lora_a: &lora_a,
        scale: T::one(),
    };
    let mut delta_weight = vec![T::zero(); n * k];
    if lora {
        cpu::lora_mul_weight(factors, &weight, &mut delta_weight)?;
    }

    let (prompt_down, prompt_up) = if kind.is_some() {
        (case.get::<T>(adapter::PROMPT_DOWN)?, case.get::<T>(adapter::PROMPT_UP)?)
    } else {
        (vec![], vec![])
    };
    let delta_b = if lora { Some(case.get::<T>(adapter::DELTA_BIAS)?) } else { None };
    let prompt: PromptBias<&[_]> = PromptBias {
        out_features: n,
        in_features: k,
        rank,
        base_weight: &weight,
        base_bias: bias.as_deref(),
        prompt_down: &prompt_down,
        prompt_up: &prompt_up,
        delta_bias: delta_b.as_deref(),
    };
    let mut delta_bias = vec![T::zero(); n];
    if kind.is_some() {
        prompt.forward(&mut delta_bias)?;
    }

    let base: Base<&[_]> = Base { weight: &weight, bias: bias.as_deref() };
    let layer = match kind {
        None => cpu::NoisyLinear {
            shape,
            noise,
            base: None,
            delta_weight: Some(&weight),
            delta_bias: bias.as_deref(),
            fold: true,
        },
        Some(_) => cpu::NoisyLinear {
            shape,
            noise,
            base: Some(base),
            delta_weight: lora.then_some(&delta_weight),
            delta_bias: Some(&delta_bias),
            fold: true,
        },
    };
    let mut y = vec![T::zero(); dy.len()];
    layer.forward(&x, &mut y)?;
    case.expect("y", &y, tolerance)?;
    cpu::NoisyLinear { noise: Noise::Off, ..layer }.forward(&x, &mut y)?;
    case.expect("y_eval", &y, tolerance)?;

    let mut dx = vec![T::zero(); x.len()];
    let (mut dw, mut db) = (vec![T::zero(); n * k], vec![T::zero(); n]);
    let grads: cpu::NoisyLinearGrads<&mut [_]> = cpu::NoisyLinearGrads {
        input: Some(&mut dx),
        delta_weight: layer.delta_weight.map(|_| &mut dw[..]),
        delta_bias: Some(&mut db),
    };
    layer.backward(&x, &dy, grads)?;
    case.expect("dx", &dx, tolerance)?;
    if kind.is_none() {
        case.expect("grad_base_weight", &dw, tolerance)?;
        if bias.is_some() {
            case.expect("grad_base_bias", &db, tolerance)?;
        }
        return Ok(());
    }
    if lora {
        let (mut dd, mut du) = (vec![T::zero(); n * rank], vec![T::zero(); rank * k]);
        cpu::lora_mul_weight_backward(factors, &weight, &dw, LoraGrads { lora_b: &mut dd, lora_a: &mut du })?;
        case.expect("grad_delta_W_down", &dd, tolerance)?;
        case.expect("grad_delta_W_up", &du, tolerance)?;
    }
    let (mut dpd, mut dpu, mut ddb) = (vec![T::zero(); k * rank], vec![T::zero(); rank], vec![T::zero(); n]);
    let grads: PromptGrads<&mut [_]> =
        PromptGrads { prompt_down: &mut dpd, prompt_up: &mut dpu, delta_bias: lora.then_some(&mut ddb[..]) };
    prompt.backward(&db, grads)?;
    case.expect("grad_delta_prompt_down", &dpd, tolerance)?;
    case.expect("grad_delta_prompt_up", &dpu, tolerance)?;
    // Without b0, δb has no effect, and no gradient in the official code.
    if lora && (bias.is_some() || case.has("grad_delta_b")) {
        case.expect("grad_delta_b", &ddb, tolerance)?;
    }
    Ok(())
}

/// One of the three variants of the loss.
pub fn loss<T: Real>(case: &Case) -> Result<(), Failed> {
    let (classes, batch): (usize, usize) = (case.number("classes")?, case.number("batch")?);
    let mut labels = case.integers("labels")?;
    let logits: Vec<T> = case.get("logits")?;
    let mut history: Option<Vec<T>> = case.get_if_present("history_before")?;
    let consistency = match case.text("mode")? {
        "pace" => Consistency::TwoBranch,
        "lazy" => {
            let schedule = LazySchedule::new(case.number("lazy_interval")?)?;
            match schedule.two_branch_samples(case.number("iteration")?, batch)? {
                Some(half) => {
                    labels = &labels[..half];
                    Consistency::TwoBranch
                }
                None => Consistency::None,
            }
        }
        "fast" => Consistency::History {
            table: history.as_mut().ok_or("there is no `history_before`")?,
            index: case.integers("index")?,
        },
        other => return Err(format!("unknown mode `{other}`").into()),
    };
    let with_consistency = !matches!(consistency, Consistency::None);
    let settings = LossSettings::new(classes, case.number("lambda_")?);
    let loss = Loss { settings, targets: Targets::Labels(labels), class_weights: None };
    let mut gradient = vec![T::zero(); logits.len()];
    let values = loss.evaluate(&logits, consistency, Some(&mut gradient))?;
    let tolerance = tolerance::<T>();
    case.expect("total_loss", &[values.total], tolerance)?;
    case.expect("cls_loss", &[values.classification], tolerance)?;
    if with_consistency {
        case.expect("pace_loss", &[values.consistency], tolerance)?;
    }
    if let Some(history) = &history {
        case.expect("history_after", history, tolerance)?;
    }
    case.expect("dlogits", &gradient, tolerance)
}

/// DropPath with a given mask.
pub fn drop_path<T: Real>(case: &Case) -> Result<(), Failed> {
    let x_shape = &case.tensor("x")?.shape;
    let batch: usize = case.number("batch_per_branch")?;
    let (branches, features) = (x_shape[0] / batch, x_shape[1..].iter().product());
    let mask: Vec<T> = case.get("mask")?;
    let mut out = vec![T::zero(); branches * batch * features];
    cpu::shared_drop_path(branches, features, &mask, &case.get::<T>("x")?, &mut out)?;
    case.expect("y", &out, tolerance::<T>())?;
    cpu::shared_drop_path_backward(branches, features, &mask, &case.get::<T>("dy")?, &mut out)?;
    case.expect("dx", &out, tolerance::<T>())
}
