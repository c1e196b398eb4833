//! Replays adapters and whole training runs through the candle layers.

use super::case::Case;
use super::on::{On, values};
use super::operators::{adapter_kind, noise_shape, shape};
use super::plain;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use libtest_mimic::Failed;
use pace_kernels::Targets;
use pace_kernels::adapter::{Adapter, DELTA_BIAS, PROMPT_DOWN};
use pace_kernels::candle::vit::{Vit, VitConfig};
use pace_kernels::candle::{Batch, Injector, Objective, PaceContext, Variant, grad_norm};
use pace_kernels::schedule::sigma_by_block;
use std::collections::BTreeMap;

pub fn tensor(case: &Case, on: &On, name: &str) -> Result<Tensor, Failed> {
    let shape = &case.tensor(name)?.shape[..];
    Ok(on.place(&Tensor::from_vec(case.floats(name)?.to_vec(), shape, &Device::Cpu)?)?)
}

fn expect(case: &Case, name: &str, got: &Tensor, tolerance: f64) -> Result<(), Failed> {
    case.expect(name, &values(got)?, tolerance)
}

fn builder(vars: &VarMap, on: &On) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, on.dtype, &on.device)
}

/// Adds a variable to a map and returns it.
fn insert(vars: &VarMap, name: &str, value: &Tensor) -> Result<Var, Failed> {
    let var = Var::from_tensor(value)?;
    vars.data().lock().map_err(|e| e.to_string())?.insert(name.to_owned(), var.clone());
    Ok(var)
}

/// One adapter: forward, backward and evaluation of a [`PaceLinear`](pace_kernels::candle::PaceLinear).
pub fn adapter(case: &Case, on: &On) -> Result<(), Failed> {
    let tolerance = on.tolerance(1e-10, 1e-5);
    let shape = shape(case)?;
    let kind = adapter_kind(case)?;
    let vars = VarMap::new();
    let mut trained = BTreeMap::new();
    let parameters = match kind {
        Some(adapter) => adapter.parameters(shape.out_features, shape.in_features, case.number("rank")?)?,
        None => vec![],
    };
    for parameter in &parameters {
        let var = insert(&vars, &format!("layer.{}", parameter.name), &tensor(case, on, parameter.name)?)?;
        trained.insert(parameter.name, var);
    }
    let (mut weight, mut bias) = (tensor(case, on, "base_weight")?, None);
    if case.has("base_bias") {
        bias = Some(tensor(case, on, "base_bias")?);
    }
    if kind.is_none() {
        let var = Var::from_tensor(&weight)?;
        weight = var.as_tensor().clone();
        trained.insert("base_weight", var);
        if let Some(bias) = &mut bias {
            let var = Var::from_tensor(bias)?;
            *bias = var.as_tensor().clone();
            trained.insert("base_bias", var);
        }
    }
    let context = PaceContext::new(0);
    let sigma = [case.number("sigma")?];
    let mut injector = Injector::new(
        &context,
        kind.unwrap_or(Adapter::LoraAdd),
        case.number("rank")?,
        &sigma,
        builder(&vars, on),
    )
    .with_noise_shape(noise_shape(case)?);
    let linear = Linear::new(weight, bias);
    let layer = match kind {
        Some(_) => injector.wrap("layer", 0, linear)?,
        None => injector.wrap_head("layer", 0, linear)?,
    };

    let x = Var::from_tensor(&tensor(case, on, "x")?)?;
    expect(case, "y_eval", &layer.forward(&x)?, tolerance)?;
    expect(case, "y_eval", &layer.merged()?.forward(&x)?, tolerance)?;
    context.train(0, shape.branches, 0)?;
    if case.has("noise_z") {
        context.set_noise("layer", Some(tensor(case, on, "noise_z")?));
    }
    let y = layer.forward(&x)?;
    expect(case, "y", &y, tolerance)?;
    let grads = (y * tensor(case, on, "dy")?)?.sum_all()?.backward()?;
    let gradient = |var: &Var| grads.get(var).ok_or("a variable has no gradient");
    expect(case, "dx", gradient(&x)?, tolerance)?;
    for (name, var) in &trained {
        let recorded = format!("grad_{name}");
        // δb of a prompt adapter without b0 has no effect, and no gradient in the official code.
        let without_effect =
            *name == DELTA_BIAS && trained.contains_key(PROMPT_DOWN) && !case.has("base_bias");
        if !without_effect || case.has(&recorded) {
            expect(case, &recorded, gradient(var)?, tolerance)?;
        }
    }
    Ok(())
}

/// Our name of a recorded parameter: the official wrapper calls a frozen layer's tensors `base_weight` and `base_bias`.
fn our_name(recorded: &str) -> String {
    recorded.replace("base_weight", "weight").replace("base_bias", "bias")
}

/// Whether a recorded parameter is trained: every tensor of an adapter, and the head.
pub fn is_trained(recorded: &str) -> bool {
    recorded.contains("delta") || recorded.starts_with("head")
}

/// A whole training run of a small vision transformer, step by step.
pub fn training(case: &Case, on: &On) -> Result<(), Failed> {
    let adapter = Adapter::from_name(case.text("adapter")?).ok_or("unknown adapter")?;
    let embed_dim: usize = case.number("embed_dim")?;
    let config = VitConfig {
        image_size: case.number("image")?,
        patch_size: case.number("patch")?,
        channels: 3,
        classes: case.number("classes")?,
        embed_dim,
        depth: case.number("depth")?,
        heads: case.number("heads")?,
        mlp_dim: embed_dim * case.number::<usize>("mlp_ratio")?,
        layer_norm_eps: case.number("layernorm_eps")?,
        drop_path: case.number("drop_path")?,
    };
    let sigmas = sigma_by_block(config.depth + 1, case.number("sigma")?, 1)?;

    let (frozen, vars) = (VarMap::new(), VarMap::new());
    let mut trained = BTreeMap::new();
    for recorded in case.names().filter_map(|name| name.strip_prefix("init.")) {
        let value = tensor(case, on, &format!("init.{recorded}"))?;
        if is_trained(recorded) {
            trained.insert(recorded.to_owned(), insert(&vars, &our_name(recorded), &value)?);
        } else {
            insert(&frozen, &our_name(recorded), &value)?;
        }
    }
    let context = PaceContext::new(0);
    let mut injector = Injector::new(&context, adapter, case.number("rank")?, &sigmas, builder(&vars, on));
    let model = Vit::with_adapters(&config, builder(&frozen, on), &mut injector)?;

    train(case, on, &context, &trained, &|x, _| Ok(model.forward(x)?))
}

/// A model of a training run: inputs, and the step if it is in training, to logits.
pub type Model<'a> = dyn Fn(&Tensor, Option<usize>) -> Result<Tensor, Failed> + 'a;

/// A training step before the optimizer: from its number, the batch and the model to the loss.
pub type Step<'a> = dyn FnMut(usize, &Batch<'_>, &dyn Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Evaluated, Failed>
    + 'a;

/// What a step came to: total, classification and consistency, logits of the first branch, and what to differentiate.
pub struct Evaluated {
    pub values: [f64; 3],
    pub logits: Tensor,
    pub loss: Tensor,
}

/// Some numbers of a training run beside the recorded ones.
#[derive(Clone)]
pub struct Quantity {
    pub name: String,
    pub got: Vec<f64>,
    pub expected: Vec<f64>,
}

impl Quantity {
    fn new(name: impl Into<String>, got: Vec<f64>, expected: &[f64]) -> Self {
        Self { name: name.into(), got, expected: expected.to_vec() }
    }

    /// What is compared together: one step's logits and losses with those of the others. A single number may be right by chance.
    fn kind(&self) -> &str {
        self.name
            .split_once('.')
            .filter(|(step, _)| step.starts_with("step"))
            .map_or(&self.name, |(_, kind)| kind)
    }

    /// Without what only shifts the keys of attention.
    ///
    /// The softmax of `q·(k + c)` over the keys `k` does not depend on a `c` that all keys have in common, and `z` is one for all
    /// tokens of a sample. So the gradient of these elements is nothing but rounding, which AdamW scales up to whole steps: in f32
    /// they walk at random. The prompts shift the keys too, but the same numbers shift queries and values.
    fn without_key_biases(mut self) -> Self {
        if self.name.ends_with("attn.qkv.delta_b") {
            for values in [&mut self.got, &mut self.expected] {
                let third = values.len() / 3;
                values.drain(third..2 * third);
            }
        }
        self
    }

    /// The largest difference, in units of the largest recorded value.
    fn error(&self) -> f64 {
        if self.got.len() != self.expected.len() {
            return f64::INFINITY;
        }
        let scale = self.expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
        let differences = self.got.iter().zip(&self.expected).map(|(got, expected)| (got - expected).abs());
        // A NaN is the largest.
        let error = differences.fold(0.0, |max, d| if d.is_nan() { f64::INFINITY } else { f64::max(max, d) });
        if scale == 0.0 { error } else { error / scale }
    }
}

pub fn variant(case: &Case) -> Result<Variant, Failed> {
    Ok(match case.text("mode")? {
        "pace" => Variant::Pace,
        "lazy" => Variant::Lazy { interval: case.number("lazy_interval").unwrap_or(2) },
        "fast" => {
            let mut samples = 0;
            for step in 0..case.tensor("grad_norm")?.shape[0] {
                let index = case.integers(&format!("step{step}.index"))?;
                samples = index.iter().fold(samples, |samples, &i| samples.max(i as usize + 1));
            }
            Variant::Fast { samples }
        }
        other => return Err(format!("unknown mode `{other}`").into()),
    })
}

/// Trains a model step by step, and notes everything that is recorded.
pub fn replay(
    case: &Case,
    on: &On,
    context: &PaceContext,
    trained: &BTreeMap<String, Var>,
    model: &Model<'_>,
    evaluate: &mut Step<'_>,
) -> Result<Vec<Quantity>, Failed> {
    let steps = case.tensor("grad_norm")?.shape[0];
    let (beta1, beta2) = case.text("betas")?.split_once(',').ok_or("`betas` is not a pair")?;
    let parameters = ParamsAdamW {
        lr: case.number("lr")?,
        beta1: beta1.parse()?,
        beta2: beta2.parse()?,
        eps: case.number("eps")?,
        weight_decay: case.number("weight_decay")?,
    };
    let mut optimizer = AdamW::new(trained.values().cloned().collect(), parameters)?;

    let (losses, norms) = (case.floats("losses_total_cls_pace")?, case.floats("grad_norm")?);
    let mut quantities = Vec::new();
    for step in 0..steps {
        let prefix = format!("step{step}.");
        let noise = format!("{prefix}z.");
        let layers: Vec<_> = case.names().filter_map(|name| name.strip_prefix(&noise)).collect();
        for layer in layers {
            context.set_noise(layer, Some(tensor(case, on, &format!("{noise}{layer}"))?));
        }
        let x = tensor(case, on, &format!("{prefix}x"))?;
        let batch = Batch {
            x: &x,
            targets: Targets::Labels(case.integers(&format!("{prefix}labels"))?),
            index: Some(case.integers(&format!("{prefix}index"))?),
            first_sample: 0,
        };
        let out = evaluate(step, &batch, &|x| {
            model(x, Some(step))
                .map_err(|e| candle_core::Error::Msg(e.message().unwrap_or_default().to_owned()))
        })?;
        let logits = format!("{prefix}logits");
        let recorded = case.floats(&logits)?;
        quantities.push(Quantity::new(logits, values(&out.logits)?, recorded));
        for (i, name) in ["total", "cls", "pace"].into_iter().enumerate() {
            // Without a consistency term the official code reports none.
            let recorded = losses[3 * step + i];
            let recorded = if recorded.is_nan() { 0.0 } else { recorded };
            quantities.push(Quantity::new(format!("{prefix}{name}"), vec![out.values[i]], &[recorded]));
        }
        let grads = out.loss.backward()?;
        let norm = grad_norm(trained.values(), &grads)?;
        quantities.push(Quantity::new(format!("{prefix}grad_norm"), vec![norm], &norms[step..=step]));
        optimizer.step(&grads)?;
    }
    for (name, var) in trained {
        let name = format!("final.{name}");
        let recorded = case.floats(&name)?;
        quantities.push(Quantity::new(name, values(var)?, recorded));
    }
    context.evaluate();
    let logits = values(&model(&tensor(case, on, "eval.x")?, None)?)?;
    quantities.push(Quantity::new("eval.logits", logits, case.floats("eval.logits")?));
    Ok(quantities)
}

/// Trains a model with our loss, and compares everything with the record: in f64 to 1e-8; in f32 it is no further away than twice
/// the plain formulas in f32, and one rounding.
pub fn train(
    case: &Case,
    on: &On,
    context: &PaceContext,
    trained: &BTreeMap<String, Var>,
    model: &Model<'_>,
) -> Result<(), Failed> {
    let sigmas = sigma_by_block(case.number::<usize>("depth")? + 1, case.number("sigma")?, 1)?;
    case.expect("sigmas_by_block", &sigmas, 1e-15)?;
    let mut objective = Objective::new(context, variant(case)?, case.number("lambda_")?)?;
    let ours = replay(case, on, context, trained, model, &mut |step, batch, model| {
        let out = objective.step(step as u64, batch, model)?;
        let values = [out.values.total, out.values.classification, out.values.consistency];
        Ok(Evaluated { values, logits: out.logits, loss: out.loss })
    })?;
    if on.dtype == DType::F64 {
        return compare(&ours, |_| 1e-8);
    }
    // Where a gradient happens to be next to nothing, AdamW makes much of its rounding, and one run may be lucky.
    let mut plain = errors(&plain::training(case, &On::CPU_F32)?);
    for seed in 1..8 {
        for (kind, error) in errors(&plain::training(&case.inputs_rounded(seed), &On::CPU_F32)?) {
            let largest = plain.entry(kind).or_default();
            *largest = error.max(*largest);
        }
    }
    let ours: Vec<_> = ours.into_iter().map(Quantity::without_key_biases).collect();
    compare(&ours, |kind| 2.0 * plain[kind] + f64::from(f32::EPSILON))
}

/// The largest error of each kind of quantity.
fn errors(quantities: &[Quantity]) -> BTreeMap<String, f64> {
    let mut errors = BTreeMap::new();
    for quantity in quantities {
        let quantity = quantity.clone().without_key_biases();
        let largest = errors.entry(quantity.kind().to_owned()).or_default();
        *largest = quantity.error().max(*largest);
    }
    errors
}

/// Fails at the first quantity with an error beyond what its kind is allowed.
pub fn compare(quantities: &[Quantity], allowed: impl Fn(&str) -> f64) -> Result<(), Failed> {
    for quantity in quantities {
        let (error, allowed) = (quantity.error(), allowed(quantity.kind()));
        if error > allowed {
            return Err(format!(
                "`{}`: error {error:.2e} of the largest value, allowed {allowed:.2e}",
                quantity.name
            )
            .into());
        }
    }
    Ok(())
}
