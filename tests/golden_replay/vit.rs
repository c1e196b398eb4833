//! Replays adapters and whole training runs through the candle layers.

use super::case::{Case, close};
use super::on::{On, values};
use super::operators::{adapter_kind, noise_shape, shape};
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use libtest_mimic::Failed;
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

    // Trained: every tensor of an adapter, and the head.
    let (frozen, vars) = (VarMap::new(), VarMap::new());
    let mut trained = BTreeMap::new();
    for recorded in case.names().filter_map(|name| name.strip_prefix("init.")) {
        let value = tensor(case, on, &format!("init.{recorded}"))?;
        if recorded.contains("delta") || recorded.starts_with("head") {
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

/// Trains a model, and compares with the record at each step.
pub fn train(
    case: &Case,
    on: &On,
    context: &PaceContext,
    trained: &BTreeMap<String, Var>,
    model: &Model<'_>,
) -> Result<(), Failed> {
    let tolerance = on.tolerance(1e-8, 1e-4);
    let sigmas = sigma_by_block(case.number::<usize>("depth")? + 1, case.number("sigma")?, 1)?;
    case.expect("sigmas_by_block", &sigmas, 1e-15)?;
    let steps = case.tensor("grad_norm")?.shape[0];
    let all_index: Vec<i64> = (0..steps)
        .map(|step| case.integers(&format!("step{step}.index")))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    let samples = all_index.iter().max().map_or(0, |&max| max as usize + 1);
    let variant = match case.text("mode")? {
        "pace" => Variant::Pace,
        "lazy" => Variant::Lazy { interval: case.number("lazy_interval").unwrap_or(2) },
        "fast" => Variant::Fast { samples },
        other => return Err(format!("unknown mode `{other}`").into()),
    };
    let mut objective = Objective::new(context, variant, case.number("lambda_")?)?;
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
            labels: case.integers(&format!("{prefix}labels"))?,
            index: Some(case.integers(&format!("{prefix}index"))?),
            first_sample: 0,
        };
        let out = objective.step(step as u64, &batch, |x| {
            model(x, Some(step))
                .map_err(|e| candle_core::Error::Msg(e.message().unwrap_or_default().to_owned()))
        })?;
        expect(case, &format!("{prefix}logits"), &out.logits, tolerance)?;
        let [total, cls, pace] = losses[3 * step..][..3] else { unreachable!("three were taken") };
        close("total", &[out.values.total], &[total], tolerance)?;
        close("cls", &[out.values.classification], &[cls], tolerance)?;
        // Without a consistency term the official code reports none.
        if !pace.is_nan() {
            close("pace", &[out.values.consistency], &[pace], tolerance)?;
        } else if out.values.consistency != 0.0 {
            return Err("a consistency term where none was recorded".into());
        }
        let grads = out.loss.backward()?;
        close("grad_norm", &[grad_norm(trained.values(), &grads)?], &[norms[step]], tolerance)?;
        optimizer.step(&grads)?;
    }
    // Attention does not depend on the keys' bias: its gradient is rounding, which AdamW scales up.
    let final_tolerance = on.tolerance(tolerance, 1e-2);
    for (name, var) in trained {
        expect(case, &format!("final.{name}"), var, final_tolerance)?;
    }
    context.evaluate();
    expect(case, "eval.logits", &model(&tensor(case, on, "eval.x")?, None)?, tolerance)
}
