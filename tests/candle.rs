//! The door to candle: gradients, branches, variants, weight files, and errors instead of panics. What depends on the
//! device runs on the CPU and on CUDA device 0, and is reported as ignored, with the reason, where there is none.

#[path = "common/on.rs"]
mod on;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use on::On;
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::vit::{Vit, VitConfig, read_weights};
use pace_kernels::candle::{
    Batch, Injector, Objective, PaceContext, PaceLinear, Variant, grad_norm, noisy_add, seeded_builder,
};
use pace_kernels::noise::{Generator, Key, NoiseShape};
use pace_kernels::schedule::sigma_by_block;
use std::collections::{BTreeMap, HashMap};

const CPU: Device = Device::Cpu;

type Test = fn(&On) -> Result<()>;
type CpuTest = fn() -> Result<()>;

/// Tests of what a device computes.
const TESTS: &[(&str, Test)] = &[
    ("layers_are_those_of_the_cpu", layers_are_those_of_the_cpu),
    ("gradients_do_not_depend_on_each_other", gradients_do_not_depend_on_each_other),
    ("training_steps_are_those_of_the_cpu", training_steps_are_those_of_the_cpu),
    ("noise_is_new_every_step", noise_is_new_every_step_and_the_same_for_split_batches),
    ("parting_late_equals_a_doubled_batch", parting_late_equals_a_doubled_batch),
    ("drop_path_is_shared_by_the_branches", drop_path_is_shared_by_the_branches),
    ("variants_use_the_rows_they_should", variants_use_the_rows_they_should),
    ("noisy_add_is_the_layers_epilogue", noisy_add_is_the_layers_epilogue),
    ("wrong_use_is_an_error", wrong_use_is_an_error),
];

/// Tests that need double precision, or are about files.
const CPU_TESTS: &[(&str, CpuTest)] = &[
    ("layer_gradients_match_finite_differences", layer_gradients_match_finite_differences),
    ("weights_round_trip_through_a_file", weights_round_trip_through_a_file),
    ("bad_weight_files_are_errors", bad_weight_files_are_errors_that_say_what_is_missing),
    ("wrong_sizes_are_errors", wrong_sizes_are_errors),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for &(name, test) in CPU_TESTS {
        trials.push(Trial::test(name, move || Ok(test()?)));
    }
    for &(name, test) in TESTS {
        trials.push(Trial::test(format!("cpu_f64::{name}"), move || Ok(test(&On::CPU)?)));
        trials.push(Trial::test(format!("cpu_f32::{name}"), move || Ok(test(&On::CPU_F32)?)));
        trials.push(on_cuda(format!("cuda_f32::{name}"), DType::F32, test));
    }
    for (dtype, name) in [(DType::F16, "f16"), (DType::BF16, "bf16")] {
        let name = format!("cuda_{name}::layers_are_those_of_the_cpu");
        trials.push(on_cuda(name, dtype, layers_are_those_of_the_cpu));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn on_cuda(name: String, dtype: DType, test: Test) -> Trial {
    Trial::ignorable_test(name, move || match On::cuda(dtype) {
        Ok(on) => test(&on).map(|()| Completion::Completed).map_err(Failed::from),
        Err(why) => Ok(Completion::ignored_with(why)),
    })
}

/// Standard normals, the same in every run.
fn random(name: &str, shape: &[usize]) -> Tensor {
    let init = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
    seeded_builder(&VarMap::new(), 5, DType::F64, &CPU).get_with_hints(shape, name, init).unwrap().detach()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    on::values(tensor).unwrap()
}

impl On {
    fn random(&self, name: &str, shape: &[usize]) -> Tensor {
        self.place(&random(name, shape)).unwrap()
    }

    fn builder(&self, vars: &VarMap, seed: u64) -> VarBuilder<'static> {
        seeded_builder(vars, seed, self.dtype, &self.device)
    }
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// An adapted layer whose factors are all random, not zero as at the start.
fn layer(
    on: &On,
    adapter: Adapter,
    sigma: f64,
    shape: NoiseShape,
    context: &PaceContext,
    vars: &VarMap,
) -> PaceLinear {
    let (out, inp, rank) = (6, 4, 2);
    for parameter in adapter.parameters(out, inp, rank).unwrap() {
        let dims: Vec<usize> = std::iter::once(parameter.rows).chain(parameter.columns).collect();
        let var = Var::from_tensor(&on.random(parameter.name, &dims)).unwrap();
        vars.data().lock().unwrap().insert(format!("layer.{}", parameter.name), var);
    }
    let vb = VarBuilder::from_varmap(vars, on.dtype, &on.device);
    let base = Linear::new(on.random("weight", &[out, inp]), Some(on.random("bias", &[out])));
    Injector::new(context, adapter, rank, &[sigma], vb)
        .with_noise_shape(shape)
        .with_scale(1.5)
        .wrap("layer", 0, base)
        .unwrap()
}

const CONFIG: VitConfig = VitConfig {
    image_size: 8,
    patch_size: 4,
    channels: 3,
    classes: 5,
    embed_dim: 12,
    depth: 2,
    heads: 3,
    mlp_dim: 24,
    layer_norm_eps: 1e-6,
    drop_path: 0.3,
};

/// A transformer with adapters that have left the identity.
fn vit(on: &On, context: &PaceContext, config: &VitConfig, sigmas: &[f64]) -> (Vit, VarMap) {
    let (frozen, vars) = (VarMap::new(), VarMap::new());
    let mut injector = Injector::new(context, Adapter::LoraMulVptAdd, 2, sigmas, on.builder(&vars, 1));
    let model = Vit::with_adapters(config, on.builder(&frozen, 2), &mut injector).unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        var.set(&(on.random(name, var.dims()) * 0.3).unwrap()).unwrap();
    }
    (model, vars)
}

fn layer_gradients_match_finite_differences() -> Result<()> {
    for adapter in Adapter::ALL {
        for shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            for branching in [false, true] {
                let (context, vars) = (PaceContext::new(3), VarMap::new());
                let layer = layer(&On::CPU, adapter, 0.7, shape, &context, &vars);
                context.train(11, 2, 5)?;
                let x = Var::from_tensor(&random("x", &[4, 3, 4]))?;
                let weights = random("w", &[if branching { 8 } else { 4 }, 3, 6]);
                let value = || -> Result<Tensor> {
                    let y = if branching { layer.forward_branching(&x)? } else { layer.forward(&x)? };
                    (y * &weights)?.sum_all()
                };
                let grads = value()?.backward()?;
                let mut all: Vec<Var> = vars.all_vars();
                all.push(x.clone());
                for var in all {
                    let got = values(grads.get(&var).expect("every parameter takes part"));
                    let start = var.as_tensor().copy()?;
                    for (i, got) in got.iter().enumerate() {
                        let moved = |step: f64| -> Result<f64> {
                            let mut v = values(&start);
                            v[i] += step;
                            var.set(&Tensor::from_vec(v, start.shape(), &CPU)?)?;
                            value()?.to_scalar::<f64>()
                        };
                        let expected = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
                        assert!(
                            (got - expected).abs() < 1e-7 * (1.0 + expected.abs()),
                            "{adapter:?}: {got} {expected}"
                        );
                    }
                    var.set(&start)?;
                }
            }
        }
    }
    Ok(())
}

/// Compares what `run` gives in a place with what it gives on the CPU in double precision.
fn compare(on: &On, run: impl Fn(&On) -> Result<Vec<Vec<f64>>>) -> Result<()> {
    let (got, expected) = (run(on)?, run(&On::CPU)?);
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(1.0f64, |max, v| max.max(v.abs()));
        for (got, expected) in got.iter().zip(expected) {
            let error = (got - expected).abs() / largest;
            assert!(error < on.tolerance(1e-12, 1e-4), "result {i}: {got}, expected {expected}");
        }
    }
    Ok(())
}

/// The gradients of all variables, by name.
fn gradients(vars: &VarMap, grads: &GradStore) -> Vec<Vec<f64>> {
    let vars: BTreeMap<_, _> = vars.data().lock().unwrap().clone().into_iter().collect();
    vars.iter().map(|(name, var)| values(grads.get(var).expect(name))).collect()
}

fn layers_are_those_of_the_cpu(on: &On) -> Result<()> {
    for adapter in Adapter::ALL {
        for shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            for branching in [false, true] {
                compare(on, |on| {
                    let (context, vars) = (PaceContext::new(3), VarMap::new());
                    let layer = layer(on, adapter, 0.7, shape, &context, &vars);
                    context.train(11, 2, 5)?;
                    let x = Var::from_tensor(&on.random("x", &[4, 3, 4]))?;
                    let y = if branching { layer.forward_branching(&x)? } else { layer.forward(&x)? };
                    let grads = (&y * on.random("w", y.dims()))?.sum_all()?.backward()?;
                    let mut results = gradients(&vars, &grads);
                    results.extend([values(&y), values(grads.get(&x).expect("gradient"))]);
                    context.evaluate();
                    results.push(values(&layer.forward(&x)?));
                    results.push(values(&layer.merged()?.forward(&x)?));
                    Ok(results)
                })?;
            }
        }
    }
    Ok(())
}

/// An input or an adapter without gradients changes nothing for the other.
fn gradients_do_not_depend_on_each_other(on: &On) -> Result<()> {
    for adapter in Adapter::ALL {
        let (context, vars) = (PaceContext::new(3), VarMap::new());
        let trained = layer(on, adapter, 0.7, NoiseShape::PerSample, &context, &vars);
        let tensors = vars.data().lock().unwrap().iter().map(|(k, v)| (k.clone(), v.detach())).collect();
        let builder = VarBuilder::from_tensors(tensors, on.dtype, &on.device);
        let base = Linear::new(on.random("weight", &[6, 4]), Some(on.random("bias", &[6])));
        let frozen =
            Injector::new(&context, adapter, 2, &[0.7], builder).with_scale(1.5).wrap("layer", 0, base)?;
        context.train(11, 2, 5)?;
        let x = Var::from_tensor(&on.random("x", &[4, 3, 4]))?;
        let run = |layer: &PaceLinear, x: &Tensor| layer.forward(x)?.sqr()?.sum_all()?.backward();
        let both = run(&trained, &x)?;
        let (input, parameters) = (run(&frozen, &x)?, run(&trained, &x.detach())?);
        let same = |got: &GradStore, var: &Var| {
            let [got, expected] = [got, &both].map(|grads| grads.get(var).expect("gradient"));
            assert!(largest_difference(got, expected) < on.tolerance(1e-12, 1e-4), "{adapter:?}");
        };
        same(&input, &x);
        vars.all_vars().iter().for_each(|var| same(&parameters, var));
    }
    Ok(())
}

fn training_steps_are_those_of_the_cpu(on: &On) -> Result<()> {
    for variant in [Variant::CrossEntropy, Variant::Pace, Variant::Fast { samples: 4 }] {
        compare(on, |on| {
            let context = PaceContext::new(0);
            let (model, vars) = vit(on, &context, &CONFIG, &sigma_by_block(3, 1.0, 1).unwrap());
            let images = on.random("images", &[3, 3, 8, 8]);
            let batch = Batch { index: Some(&[3, 0, 1]), ..Batch::new(&images, &[0, -1, 4]) };
            let mut objective = Objective::new(&context, variant, 0.5)?;
            (objective.label_smoothing, objective.ignore_label) = (0.1, Some(-1));
            let mut results = Vec::new();
            for step in 0..2 {
                let out = objective.step(step, &batch, |x| model.forward(x))?;
                let grads = out.loss.backward()?;
                results.push(vec![out.values.total, out.values.classification, out.values.consistency]);
                results.push(vec![grad_norm(&vars.all_vars(), &grads)?]);
                results.extend([values(&out.loss), values(&out.logits)]);
                results.extend(gradients(&vars, &grads));
            }
            Ok(results)
        })?;
    }
    Ok(())
}

fn noise_is_new_every_step_and_the_same_for_split_batches(on: &On) -> Result<()> {
    let context = PaceContext::new(3);
    let layer = layer(on, Adapter::LoraAdd, 0.7, NoiseShape::PerSample, &context, &VarMap::new());
    let x = on.random("x", &[6, 4]);
    let run = |step, first, x: &Tensor| {
        context.train(step, 1, first)?;
        layer.forward(x)
    };
    let whole = run(0, 0, &x)?;
    assert_eq!(values(&whole), values(&run(0, 0, &x)?));
    assert_ne!(values(&whole), values(&run(1, 0, &x)?));
    let parts = [run(0, 0, &x.narrow(0, 0, 2)?)?, run(0, 2, &x.narrow(0, 2, 4)?)?];
    assert!(largest_difference(&whole, &Tensor::cat(&parts, 0)?) < on.tolerance(1e-14, 1e-4));
    context.evaluate();
    assert!(
        largest_difference(&layer.forward(&x)?, &layer.merged()?.forward(&x)?) < on.tolerance(1e-14, 1e-4)
    );
    assert_ne!(values(&whole), values(&layer.forward(&x)?));
    Ok(())
}

fn parting_late_equals_a_doubled_batch(on: &On) -> Result<()> {
    let images = on.random("images", &[3, 3, 8, 8]);
    // Noise from block 1 on, from block 0 on, in the head alone, and nowhere.
    for sigmas in [[0.0, 0.9, 0.5], [0.8, 0.6, 0.3], [0.0, 0.0, 0.5], [0.0; 3]] {
        let context = PaceContext::new(8);
        let model = vit(on, &context, &VitConfig { drop_path: 0.0, ..CONFIG }, &sigmas).0;
        context.train(4, 2, 0)?;
        let late = model.forward(&images)?;
        assert_eq!(late.dims(), [6, CONFIG.classes]);
        assert_eq!(model.features(&images)?.dims(), [6, CONFIG.embed_dim]);

        // One branch over the doubled batch, every layer given the noise that its two branches would have drawn.
        let widths = [("attn.qkv", 36), ("attn.proj", 12), ("mlp.fc1", 24), ("mlp.fc2", 12)];
        let mut layers: Vec<(String, u32, usize, f64)> = Vec::new();
        for block in 0..2 {
            for (i, (name, width)) in widths.into_iter().enumerate() {
                // A block's fifth number is its DropPath's.
                layers.push((
                    format!("blocks.{block}.{name}"),
                    5 * block + i as u32,
                    width,
                    sigmas[block as usize],
                ));
            }
        }
        layers.push(("head".into(), 10, CONFIG.classes, sigmas[2]));
        for (name, layer, width, sigma) in layers {
            let noise =
                Generator::new(Key::derive(8, 4, layer), sigma as f32, NoiseShape::PerSample, 0).unwrap();
            let mut z = vec![0.0f64; 6 * width];
            for (row, z) in z.chunks_mut(width).enumerate() {
                noise.fill((row / 3) as u8, (row % 3) as u64, 0, 0, z);
            }
            context.set_noise(&name, Some(on.place(&Tensor::from_vec(z, (6, width), &CPU)?)?));
        }
        context.train(4, 1, 0)?;
        let doubled = model.forward(&Tensor::cat(&[&images, &images], 0)?)?;
        assert!(largest_difference(&late, &doubled) < on.tolerance(1e-12, 1e-4));
        let differ = largest_difference(&late.narrow(0, 0, 3)?, &late.narrow(0, 3, 3)?) > 1e-3;
        assert_eq!(differ, sigmas.iter().any(|&sigma| sigma > 0.0));
    }
    Ok(())
}

fn drop_path_is_shared_by_the_branches(on: &On) -> Result<()> {
    let context = PaceContext::new(8);
    let vb = on.builder(&VarMap::new(), 0);
    let drop_path = Injector::new(&context, Adapter::VptAdd, 1, &[], vb).drop_path(0.5)?;
    let x = Var::from_tensor(&Tensor::ones((8, 3), on.dtype, &on.device)?)?;
    assert_eq!(values(&drop_path.forward_rows(&x, 2)?), vec![1.0; 24], "evaluation");
    context.train(0, 2, 0)?;
    let y = drop_path.forward_rows(&x, 2)?;
    assert_eq!(largest_difference(&y.narrow(0, 0, 4)?, &y.narrow(0, 4, 4)?), 0.0);
    let grads = y.sum_all()?.backward()?;
    assert_eq!(values(grads.get(&x).expect("gradient")), values(&y));
    // Dropped or scaled by the mask's own mean: the mean stays.
    let y = values(&y);
    assert!(y.contains(&0.0) && (y.iter().sum::<f64>() / 24.0 - 1.0).abs() < on.tolerance(1e-9, 1e-6));
    assert!(drop_path.forward_rows(&x, 3).is_err());
    Ok(())
}

fn variants_use_the_rows_they_should(on: &On) -> Result<()> {
    let context = PaceContext::new(0);
    let (model, vars) = vit(on, &context, &CONFIG, &sigma_by_block(3, 1.0, 1).unwrap());
    let images = on.random("images", &[5, 3, 8, 8]);
    let labels = [0, 1, 2, 3, 4];
    let index = [2, 0, 1, 6, 5];
    let batch = Batch { index: Some(&index), ..Batch::new(&images, &labels) };
    for (variant, step, rows, consistent) in [
        (Variant::CrossEntropy, 0, 5, false),
        (Variant::Pace, 0, 5, true),
        (Variant::Lazy { interval: 3 }, 6, 2, true),
        (Variant::Lazy { interval: 3 }, 7, 5, false),
        (Variant::Fast { samples: 7 }, 0, 5, true),
    ] {
        let mut objective = Objective::new(&context, variant, 0.5)?;
        let out = objective.step(step, &batch, |x| model.forward(x))?;
        assert_eq!(out.logits.dims(), [rows, 5], "{variant:?}");
        assert_eq!(out.values.consistency > 0.0, consistent, "{variant:?}");
        let grads = out.loss.backward()?;
        let missing = vars.all_vars().iter().filter(|var| grads.get(var).is_none()).count();
        assert_eq!(missing, 0, "{variant:?}");
    }
    // PACE-fast remembers: the second time, the same logits are their own target.
    let mut objective = Objective::new(&context, Variant::Fast { samples: 7 }, 0.5)?;
    let first = objective.step(0, &batch, |x| model.forward(x))?;
    assert!(first.values.consistency > 0.0);
    let again = objective.step(0, &batch, |x| model.forward(x))?;
    assert_eq!(again.values.consistency, 0.0);
    Ok(())
}

fn noisy_add_is_the_layers_epilogue(on: &On) -> Result<()> {
    let (base, a) =
        (Var::from_tensor(&on.random("b", &[4, 3, 5]))?, Var::from_tensor(&on.random("a", &[4, 3, 5]))?);
    let generator = Generator::new(Key::derive(1, 2, 3), 0.5, NoiseShape::PerSample, 0).unwrap();
    let y = noisy_add(&base, &a, Some(generator), 2)?;
    let z = ((&y - base.as_tensor())? / a.as_tensor())?;
    // Tokens of a sample share z, branches do not.
    assert!(largest_difference(&z.narrow(1, 0, 1)?, &z.narrow(1, 2, 1)?) < on.tolerance(1e-12, 1e-4));
    assert!(largest_difference(&z.narrow(0, 0, 2)?, &z.narrow(0, 2, 2)?) > 1e-3);
    let grads = y.sum_all()?.backward()?;
    assert!(largest_difference(grads.get(&a).expect("gradient"), &z) < on.tolerance(1e-9, 1e-4));
    assert_eq!(values(grads.get(&base).expect("gradient")), vec![1.0; 60]);
    assert!(noisy_add(&base, &on.random("c", &[4, 3, 6]), None, 2).is_err());
    assert!(noisy_add(&base, &a, None, 3).is_err());
    assert!(noisy_add(&base, &a, None, 0).is_err());
    Ok(())
}

fn weights_round_trip_through_a_file() -> Result<()> {
    let vars = VarMap::new();
    let model = Vit::new(&CONFIG, seeded_builder(&vars, 2, DType::F32, &CPU))?;
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("vit.safetensors");
    vars.save(&path)?;
    let weights = read_weights(&path).unwrap();
    let config = VitConfig::infer(&weights, Some(3)).unwrap();
    assert_eq!(config, VitConfig { drop_path: 0.0, ..CONFIG });
    let again = Vit::new(&config, VarBuilder::from_tensors(weights, DType::F32, &CPU))?;
    let images = random("images", &[2, 3, 8, 8]).to_dtype(DType::F32)?;
    assert_eq!(values(&model.forward(&images)?), values(&again.forward(&images)?));
    // The same seed gives the same start, another seed another.
    let other = |seed| -> Result<Vec<f64>> {
        let model = Vit::new(&CONFIG, seeded_builder(&VarMap::new(), seed, DType::F32, &CPU))?;
        Ok(values(&model.forward(&images)?))
    };
    assert_eq!(other(2)?, values(&model.forward(&images)?));
    assert_ne!(other(3)?, other(2)?);
    Ok(())
}

fn bad_weight_files_are_errors_that_say_what_is_missing() -> Result<()> {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let vars = VarMap::new();
    Vit::new(&CONFIG, seeded_builder(&vars, 2, DType::F32, &CPU)).unwrap();
    let good = folder.join("good.safetensors");
    vars.save(&good).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    for (name, bytes) in [
        ("empty", &[][..]),
        ("short_header", &bytes[..40]),
        ("truncated", &bytes[..bytes.len() - 1]),
        ("foreign", b"PK\x03\x04 not a safetensors file, but long enough to look at"),
        ("huge_header", &[0xff; 64]),
    ] {
        let error = read_weights(&write(name, bytes)).unwrap_err().to_string();
        assert!(error.starts_with("weights: ") && error.contains(name), "{error}");
    }
    assert!(read_weights(&folder.join("not there")).is_err());

    let weights = read_weights(&good).unwrap();
    let infer = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut weights = weights.clone();
        change(&mut weights);
        VitConfig::infer(&weights, Some(3)).unwrap_err().to_string()
    };
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &CPU).unwrap();
    for (change, expected) in [
        (
            &(|w: &mut HashMap<_, _>| w.clear()) as &dyn Fn(&mut HashMap<String, Tensor>),
            "patch_embed.proj.weight",
        ),
        (&|w| drop(w.remove("pos_embed")), "pos_embed"),
        (&|w| drop(w.insert("pos_embed".into(), zeros(&[1, 4, 12]))), "square number"),
        (&|w| drop(w.insert("pos_embed".into(), zeros(&[12]))), "expected 3 sizes"),
        (&|w| drop(w.insert("patch_embed.proj.weight".into(), zeros(&[12, 3, 4, 2]))), "not a square patch"),
        (&|w| drop(w.remove("blocks.0.mlp.fc1.weight")), "blocks.0.mlp.fc1.weight"),
        (&|w| w.retain(|name, _| !name.starts_with("blocks.")), "blocks.0.mlp.fc1.weight"),
        (&|w| drop(w.insert("blocks.1.ls1.gamma".into(), zeros(&[12]))), "blocks.1.ls1.gamma"),
        (&|w| drop(w.insert("blocks.3.norm1.weight".into(), zeros(&[12]))), "blocks.3.norm1.weight"),
        (&|w| drop(w.insert("dist_token".into(), zeros(&[1, 1, 12]))), "dist_token"),
    ] {
        let error = infer(change);
        assert!(error.contains(expected), "{error}");
    }
    // A bias may be absent; one of another shape is an error.
    let build = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut weights = weights.clone();
        change(&mut weights);
        Vit::new(&CONFIG, VarBuilder::from_tensors(weights, DType::F32, &CPU)).map(|_| ())
    };
    assert!(build(&|w| drop(w.remove("blocks.0.attn.qkv.bias"))).is_ok());
    let error = build(&|w| drop(w.insert("blocks.0.attn.qkv.bias".into(), zeros(&[35])))).unwrap_err();
    assert!(error.to_string().contains("blocks.0.attn.qkv.bias"), "{error}");
    assert!(VitConfig::infer(&weights, Some(5)).unwrap_err().to_string().contains("5 heads"));
    assert!(VitConfig::infer(&weights, Some(0)).is_err());
    Ok(())
}

fn wrong_use_is_an_error(on: &On) -> Result<()> {
    let context = PaceContext::new(0);
    let layer = layer(on, Adapter::LoraMulVptAdd, 1.0, NoiseShape::PerSample, &context, &VarMap::new());
    let other = if on.dtype == DType::F64 { DType::F32 } else { DType::F64 };
    context.train(0, 2, 0)?;
    assert!(layer.forward(&on.random("x", &[3, 4])).is_err(), "odd rows");
    assert!(layer.forward(&on.random("x", &[4, 5])).is_err(), "wrong features");
    assert!(layer.forward(&on.random("x", &[4])).is_err(), "no rows");
    assert!(layer.forward(&on.random("x", &[2, 4]).narrow(0, 0, 0)?).is_err(), "empty batch");
    assert!(layer.forward(&on.random("x", &[4, 4]).to_dtype(other)?).is_err(), "mixed types");
    assert!(layer.forward(&on.random("x", &[4, 4]).to_dtype(DType::F16)?).is_err(), "half");
    context.set_noise("layer", Some(on.random("z", &[4, 5])));
    assert!(layer.forward(&on.random("x", &[4, 4])).is_err(), "wrong z");
    context.set_noise("layer", None);
    assert!(layer.forward(&on.random("x", &[4, 4])).is_ok());
    for branches in [0, 3] {
        assert!(context.train(0, branches, 0).is_err());
    }
    context.train(0, 2, u64::MAX)?;
    assert!(layer.forward(&on.random("x", &[4, 4])).is_err(), "sample number");

    let vb = || on.builder(&VarMap::new(), 0);
    let base = || Linear::new(on.random("weight", &[6, 4]), None);
    assert!(
        Injector::new(&context, Adapter::LoraAdd, 0, &[1.0], vb()).wrap("l", 0, base()).is_err(),
        "rank 0"
    );
    assert!(
        Injector::new(&context, Adapter::LoraAdd, 1, &[1.0], vb()).wrap("l", 1, base()).is_err(),
        "no sigma"
    );
    for sigma in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(Injector::new(&context, Adapter::LoraAdd, 1, &[sigma], vb()).wrap("l", 0, base()).is_err());
    }
    let mut injector = Injector::new(&context, Adapter::LoraAdd, 1, &[1.0], vb());
    assert!(injector.drop_path(1.0).is_err() && injector.drop_path(f64::NAN).is_err());
    assert!(injector.wrap_dense("l", 0, base(), on.random("d", &[6, 5]), None).is_err(), "wrong ΔW");
    assert!(injector.wrap_dense("l", 0, base(), on.random("d", &[6, 4]), None).is_ok());
    let mut dense =
        |bias| injector.wrap_dense("l", 0, base(), on.random("d", &[6, 4]), Some(on.random("b", bias)));
    assert!(dense(&[6]).is_ok() && dense(&[4]).is_err() && dense(&[1, 6]).is_err(), "Δb");

    for lambda in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(Objective::new(&context, Variant::Pace, lambda).is_err());
    }
    assert!(Objective::new(&context, Variant::Lazy { interval: 0 }, 1.0).is_err());
    assert!(Objective::new(&context, Variant::Fast { samples: 0 }, 1.0).is_err());
    let x = on.random("x", &[2, 4]);
    let step = |variant, labels: &[i64], index: Option<&[i64]>| {
        let batch = Batch { index, ..Batch::new(&x, labels) };
        Objective::new(&context, variant, 1.0)?.step(0, &batch, |x| layer.forward_branching(x)).map(|_| ())
    };
    assert!(step(Variant::Pace, &[0, 5], None).is_ok());
    assert!(step(Variant::Pace, &[0, 6], None).is_err(), "label");
    assert!(step(Variant::Pace, &[0], None).is_err(), "labels");
    assert!(step(Variant::Fast { samples: 2 }, &[0, 1], None).is_err(), "no index");
    assert!(step(Variant::Fast { samples: 2 }, &[0, 1], Some(&[0, 2])).is_err(), "index");
    assert!(step(Variant::Fast { samples: 2 }, &[0, 1], Some(&[1, 1])).is_err(), "repeated");
    assert!(step(Variant::Fast { samples: 2 }, &[0, 1], Some(&[1, 0])).is_ok());
    // Sizes that overflow, and a size that fits the address space but no machine.
    for samples in [usize::MAX, 1 << 57] {
        assert!(step(Variant::Fast { samples }, &[0, 1], Some(&[1, 0])).is_err(), "history");
    }
    for rank in [usize::MAX, 1 << 55] {
        assert!(Injector::new(&context, Adapter::LoraAdd, rank, &[1.0], vb()).wrap("l", 0, base()).is_err());
    }
    let batch = Batch::new(&x, &[0, 1]);
    assert!(
        Objective::new(&context, Variant::Pace, 1.0)?.step(0, &batch, |x| layer.forward(x)).is_err(),
        "not parted"
    );

    let model = vit(on, &PaceContext::new(0), &CONFIG, &[0.0; 3]).0;
    assert!(model.forward(&on.random("i", &[2, 3, 8, 9])).is_err());
    assert!(model.forward(&on.random("i", &[2, 1, 8, 8])).is_err());
    Ok(())
}

fn wrong_sizes_are_errors() -> Result<()> {
    let context = PaceContext::new(0);
    let vb = || On::CPU.builder(&VarMap::new(), 0);
    for (config, argument) in [
        (VitConfig { heads: 5, ..CONFIG }, "heads"),
        (VitConfig { heads: 0, ..CONFIG }, "heads"),
        (VitConfig { patch_size: 0, ..CONFIG }, "patch_size"),
        (VitConfig { patch_size: 3, ..CONFIG }, "patch_size"),
        (VitConfig { image_size: 0, ..CONFIG }, "image_size"),
        (VitConfig { image_size: usize::MAX, patch_size: 1, ..CONFIG }, "images"),
        (VitConfig { channels: usize::MAX, ..CONFIG }, "images"),
        (VitConfig { embed_dim: 1 << 31, heads: 1, ..CONFIG }, "attn.qkv"),
        (VitConfig { embed_dim: usize::MAX, heads: 1, ..CONFIG }, "patch_embed"),
        (VitConfig { depth: usize::MAX, ..CONFIG }, "depth"),
        (VitConfig { mlp_dim: 0, ..CONFIG }, "mlp_dim"),
        (VitConfig { mlp_dim: usize::MAX, ..CONFIG }, "mlp.fc1"),
        (VitConfig { classes: usize::MAX, ..CONFIG }, "head"),
        (VitConfig { layer_norm_eps: f64::NAN, ..CONFIG }, "layer_norm_eps"),
        (VitConfig { layer_norm_eps: -1.0, ..CONFIG }, "layer_norm_eps"),
        (VitConfig { drop_path: 1.0, ..CONFIG }, "drop_probability"),
    ] {
        let mut injector = Injector::new(&context, Adapter::LoraAdd, 1, &[0.0; 3], vb());
        for model in [Vit::new(&config, vb()), Vit::with_adapters(&config, vb(), &mut injector)] {
            let error = model.unwrap_err().to_string();
            assert!(error.contains(argument), "{error}");
        }
    }
    Ok(())
}
