//! Adapter files of PEFT: round trips, recorded ones, bad ones, and PEFT itself.

use crate::on::On;
use crate::support::*;
use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::vit::{Vit, VitConfig, read_weights};
use pace_kernels::candle::{Injector, PaceContext, PaceLinear, PeftAdapter, PeftLayer};
use pace_kernels::noise::NoiseShape;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const MODEL: VitConfig = VitConfig { drop_path: 0.0, ..CONFIG };
const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// A new folder for one test.
pub fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("peft_{name}"));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// What PEFT has recorded, beside `reference.py`.
pub fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/candle/peft/recorded")
}

/// Every bit of an adapter, in an order of its own.
pub fn bits(adapter: &PeftAdapter) -> Vec<(String, DType, Vec<usize>, Vec<u64>)> {
    let mut all = Vec::new();
    let mut put = |name: String, tensor: &Tensor| {
        let bits = values(tensor).into_iter().map(f64::to_bits).collect();
        all.push((name, tensor.dtype(), tensor.dims().to_vec(), bits));
    };
    for (name, layer) in &adapter.layers {
        put(format!("{name}.a"), &layer.lora_a);
        put(format!("{name}.b"), &layer.lora_b);
        layer.bias.iter().for_each(|bias| put(format!("{name}.bias"), bias));
        put(format!("{name}.scale"), &Tensor::new(layer.scale, &CPU).unwrap());
    }
    for (name, head) in &adapter.heads {
        put(format!("{name}.weight"), head.weight());
        head.bias().iter().for_each(|bias| put(format!("{name}.bias"), bias));
    }
    all
}

fn lora(name: &str, out: usize, inp: usize, rank: usize, scale: f64) -> PeftLayer {
    PeftLayer {
        lora_a: random(&format!("{name}.a"), &[rank, inp]),
        lora_b: random(&format!("{name}.b"), &[out, rank]),
        bias: None,
        scale,
    }
}

/// A model of the recorded base with an adapter.
fn model(on: &On, adapter: &PeftAdapter, sigmas: &[f64], vars: &VarMap) -> Result<(Vit, PaceContext)> {
    let context = PaceContext::new(8);
    let base = read_weights(&recorded().join("model.safetensors")).unwrap();
    let base = VarBuilder::from_tensors(base, on.dtype, &on.device);
    let mut injector = Injector::from_peft(&context, adapter, sigmas, vars, on.builder(vars, 1))?;
    Ok((Vit::with_adapters(&MODEL, base, &mut injector)?, context))
}

pub fn adapters_round_trip_through_a_folder() -> Result<()> {
    let folder = folder("round_trip").join("deeper");
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let mut adapter = PeftAdapter { base_model: Some("org/model \"1\"".into()), ..Default::default() };
        // Whole α, α that has no exact decimal form, negative, zero; names that are patterns.
        for (i, (name, rank, scale)) in [
            ("a.b", 2, 1.0),
            ("a.b.c", 3, 7.0 / 3.0),
            ("all-linear", 5, 16.0 / 5.0),
            ("x.0.(y|z)*\\d", 1, -0.3),
            ("x.1.y", 4, 0.0),
            ("ü.\"q\"", 49, 1.0 / 49.0),
            ("tiny", 7, 3.0e-300),
        ]
        .into_iter()
        .enumerate()
        {
            let mut layer = lora(name, 6 + i, 4, rank, scale);
            layer.bias = (dtype != DType::F32).then(|| random(&format!("{name}.bias"), &[6 + i]));
            for tensor in [&mut layer.lora_a, &mut layer.lora_b].into_iter().chain(&mut layer.bias) {
                *tensor = tensor.to_dtype(dtype)?;
            }
            adapter.layers.insert(name.into(), layer);
        }
        let weight = random("head", &[3, 8]).to_dtype(dtype)?;
        adapter.heads.insert("head".into(), Linear::new(weight.clone(), Some(random("bias", &[3]))));
        adapter.heads.insert("net.classifier".into(), Linear::new(weight, None));
        // The second time over files that are there.
        for _ in 0..2 {
            adapter.write(&folder).unwrap();
            let again = PeftAdapter::read(&folder).unwrap();
            for (again, expected) in bits(&again).into_iter().zip(bits(&adapter)) {
                assert_eq!(again, expected);
            }
            assert_eq!(bits(&again).len(), bits(&adapter).len());
            assert_eq!(again.base_model, adapter.base_model);
        }
        let mut files: Vec<_> = std::fs::read_dir(&folder)?.map(|entry| entry.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files, [CONFIG_FILE, WEIGHTS_FILE], "nothing is left over");
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join(CONFIG_FILE))?).unwrap();
        assert_eq!(config["lora_alpha"].to_string(), "2", "a whole number, without a point");
        assert_eq!(config["modules_to_save"], json!(["head", "net.classifier"]));
        assert_eq!(config.get("lora_bias").is_some(), dtype != DType::F32);
    }
    // α/√r, and a scale that is no α/r.
    for (use_rslora, scales, within) in
        [(true, [16.0 / 3f64.sqrt(), 7.5 / 5f64.sqrt()], 0.0), (false, [0.1, 16.0 / 5f64.sqrt()], 1e-15)]
    {
        let mut adapter = PeftAdapter { use_rslora, ..Default::default() };
        for (name, rank, scale) in [("a", 3, scales[0]), ("b", 5, scales[1])] {
            adapter.layers.insert(name.into(), lora(name, 6, 4, rank, scale));
        }
        adapter.write(&folder).unwrap();
        let again = PeftAdapter::read(&folder).unwrap();
        assert_eq!(again.use_rslora, use_rslora);
        for (again, layer) in again.layers.values().zip(adapter.layers.values()) {
            assert!((again.scale - layer.scale).abs() <= within * layer.scale, "{}", layer.scale);
        }
    }
    Ok(())
}

/// Layer to file to layer.
pub fn adapters_of_layers_are_those_layers() -> Result<()> {
    let (context, vars) = (PaceContext::new(3), VarMap::new());
    let layer = layer(&On::CPU, Adapter::LoraAdd, 0.7, NoiseShape::PerSample, &context, &vars);
    let mut injector = Injector::new(&context, Adapter::LoraAdd, 2, &[0.0], On::CPU.builder(&vars, 0));
    let base = || Linear::new(random("weight", &[6, 4]), Some(random("bias", &[6])));
    let head = injector.wrap_head("head", 0, base())?;
    let adapter = PeftAdapter::from_layers([&layer, &head])?;
    let before = bits(&adapter);
    // A later step of training does not reach the adapter.
    for var in vars.all_vars() {
        var.set(&(var.as_tensor() + 1.0)?)?;
    }
    assert_eq!(bits(&adapter), before);
    let adapter = PeftAdapter::from_layers([&layer, &head])?;
    assert_ne!(bits(&adapter), before);
    assert_eq!(adapter.layers["layer"].scale, 1.5);
    // PEFT multiplies its bias by the scale.
    let delta_bias = vars.data().lock().unwrap()["layer.delta_b"].as_tensor().clone();
    let bias = adapter.layers["layer"].bias.as_ref().unwrap();
    assert!(largest_difference(&(bias * 1.5)?, &delta_bias) < 1e-15);

    let (x, again_vars) = (random("x", &[5, 4]), VarMap::new());
    let builder = On::CPU.builder(&again_vars, 9);
    // A prefix is the caller's, and not a part of the module path.
    let mut injector =
        Injector::from_peft(&context, &adapter, &[0.7], &again_vars, builder.pp("student"))?.with_scale(9.0);
    assert!(injector.finish().is_err());
    let again = injector.wrap("layer", 0, base())?;
    assert!(injector.finish().unwrap_err().to_string().contains("`head`"), "the head is still missing");
    // Its values come from the file, whatever the model's own head is.
    let other = Linear::new(random("other", &[6, 4]), Some(random("other.bias", &[6])));
    let again_head = injector.wrap_head("head", 0, other)?;
    injector.finish()?;
    assert!(largest_difference(&layer.forward(&x)?, &again.forward(&x)?) < 1e-14);
    assert_eq!(values(&head.forward(&x)?), values(&again_head.forward(&x)?));
    assert!(again_vars.data().lock().unwrap().keys().all(|name| name.starts_with("student.")));
    assert_eq!(again_vars.all_vars().len(), 5, "A, B, δb, and the head's weight and bias");
    // All are trained, under noise too.
    context.train(0, 1, 0)?;
    let grads = (again.forward(&x)?.sum_all()? + again_head.forward(&x)?.sqr()?.sum_all()?)?.backward()?;
    assert!(again_vars.all_vars().iter().all(|var| grads.get(var).is_some()));
    Ok(())
}

/// The outputs that PEFT gave for an adapter of its own: ranks and α by pattern, α/√r, biases, a classifier.
pub fn recorded_adapters_compute_the_same(on: &On) -> Result<()> {
    compare_with_record(on, &recorded())
}

fn compare_with_record(on: &On, folder: &Path) -> Result<()> {
    let adapter = PeftAdapter::read(folder.join("adapter")).unwrap();
    let mut file = read_weights(&folder.join("model.safetensors")).unwrap();
    let (x, logits) = (on.place(&file.remove("x").unwrap())?, file.remove("logits").unwrap());
    let (context, vars) = (PaceContext::new(8), VarMap::new());
    let sigmas = [0.5, 0.4, 0.3];
    let mut injector = Injector::from_peft(&context, &adapter, &sigmas, &vars, on.builder(&vars, 1))?;
    let base = VarBuilder::from_tensors(file, on.dtype, &on.device);
    let vit = Vit::with_adapters(&MODEL, base, &mut injector)?;
    let got = vit.forward(&x)?;
    assert!(largest_difference(&got, &logits) < on.tolerance(1e-12, 2e-4), "{:?}", values(&got));
    let ranks: HashMap<_, _> =
        adapter.layers.iter().map(|(name, layer)| (name.as_str(), layer.lora_a.dims()[0])).collect();
    let expected = [
        ("blocks.0.attn.qkv", 4),
        ("blocks.0.mlp.fc1", 2),
        ("blocks.1.attn.proj", 4),
        ("blocks.1.attn.qkv", 3),
        ("blocks.1.mlp.fc1", 2),
    ];
    assert_eq!(ranks, expected.into_iter().collect());
    assert_eq!(vars.all_vars().len(), 3 * 5 + 2);
    if on.dtype == DType::F64 {
        // And back: factors and head are the same bits, biases within a rounding.
        let back = PeftAdapter::from_layers(vit.layers())?;
        assert_eq!(
            back.layers.keys().chain(back.heads.keys()).collect::<Vec<_>>(),
            adapter.layers.keys().chain(adapter.heads.keys()).collect::<Vec<_>>()
        );
        for (back, layer) in back.layers.values().zip(adapter.layers.values()) {
            assert_eq!(values(&back.lora_a), values(&layer.lora_a));
            assert_eq!(values(&back.lora_b), values(&layer.lora_b));
            assert_eq!(back.scale, layer.scale);
            let [back, bias] = [back, layer].map(|layer| layer.bias.as_ref().unwrap());
            assert!(largest_difference(back, bias) < 1e-15);
        }
    }
    Ok(())
}

/// No noise and no gradients where the adapter has nothing; branches part where the first noise is.
pub fn layers_that_an_adapter_lacks_stay_as_they_are(on: &On) -> Result<()> {
    let adapter = PeftAdapter::read(recorded().join("adapter")).unwrap();
    let images = on.random("images", &[3, 3, 8, 8]);
    // All of them; none in block 0 before fc1; none before the projection of block 1; a frozen head.
    let keep =
        [&["blocks", "head"][..], &["fc1", "head"], &["blocks.1.attn.proj", "head"], &["blocks.1.mlp.fc1"]];
    for keep in keep {
        let mut adapter = adapter.clone();
        let kept = |name: &String| keep.iter().any(|part| name.contains(part));
        adapter.layers.retain(|name, _| kept(name));
        adapter.heads.retain(|name, _| kept(name));
        let vars = VarMap::new();
        let (model, context) = model(on, &adapter, &[0.9, 0.8, 0.7], &vars)?;
        context.train(4, 2, 0)?;
        for layer in model.layers() {
            let known = adapter.layers.contains_key(layer.name()) || layer.name() == "head";
            assert_eq!(layer.is_noisy(), known, "{}", layer.name());
            if layer.is_noisy() {
                let width = layer.merged()?.weight().dim(0)?;
                let z = (on.random(layer.name(), &[6, width]) * 0.5)? + 1.0;
                context.set_noise(layer.name(), Some(z?));
            }
        }
        let late = model.forward(&images)?;
        let grads = late.sqr()?.sum_all()?.backward()?;
        assert_eq!(vars.all_vars().len(), 3 * adapter.layers.len() + 2 * adapter.heads.len());
        for var in vars.all_vars() {
            assert!(values(grads.get(&var).expect("gradient")).iter().any(|&v| v != 0.0));
        }
        context.train(4, 1, 0)?;
        let doubled = model.forward(&Tensor::cat(&[&images, &images], 0)?)?;
        assert!(largest_difference(&late, &doubled) < on.tolerance(1e-12, 1e-3), "{keep:?}");
    }
    Ok(())
}

/// A folder with these files: the settings over those of a good one, and the tensors.
fn write(folder: &Path, settings: &Value, tensors: &[(&str, Tensor)]) {
    let mut config = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4 });
    for (name, value) in settings.as_object().unwrap() {
        match value.as_str() {
            Some("absent") => drop(config.as_object_mut().unwrap().remove(name)),
            _ => config[name] = value.clone(),
        }
    }
    let tensors: HashMap<_, _> =
        tensors.iter().map(|(name, tensor)| (format!("base_model.model.{name}"), tensor.clone())).collect();
    std::fs::write(folder.join(CONFIG_FILE), config.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, folder.join(WEIGHTS_FILE)).unwrap();
}

fn good_tensors() -> Vec<(&'static str, Tensor)> {
    vec![("l.lora_A.weight", random("a", &[2, 4])), ("l.lora_B.weight", random("b", &[6, 2]))]
}

pub fn patterns_are_those_of_peft() -> Result<()> {
    let folder = folder("patterns");
    let scale = |path: &str, settings: Value| {
        let (a, b) = (format!("{path}.lora_A.weight"), format!("{path}.lora_B.weight"));
        write(&folder, &settings, &[(&a, random("a", &[2, 4])), (&b, random("b", &[6, 2]))]);
        PeftAdapter::read(&folder).map(|adapter| adapter.layers[path].scale)
    };
    let by_alpha = |path: &str, patterns: Value| scale(path, json!({ "alpha_pattern": patterns })).unwrap();
    for (path, pattern, matches) in [
        ("layers.10.q", "q", true),
        ("layers.10.q", "10.q", true),
        ("layers.10.q", "0.q", false),
        ("layers.10.q", "layers.10", false),
        ("layers.10.q", r"layers\.\d+\.(q|v)", true),
        ("layers.10.q", "^layers.10.q", true),
        ("model.layers.10.q", "^layers.10.q", false),
        ("model.layers.10.q", "layers.10.q", true),
        ("layers.10.q", "v|q", true),
        ("layers.10.q", r".*\.q", true),
        // A name that does not match itself is looked up all the same.
        ("layers.a+b", "layers.a+b", true),
    ] {
        let expected = if matches { 5.0 } else { 2.0 };
        assert_eq!(by_alpha(path, json!({ pattern: 10 })), expected, "{path} {pattern}");
    }
    // The first counts, in the order of the file.
    assert_eq!(by_alpha("a.q", json!({ "q": 6, "a.q": 8 })), 3.0);
    assert_eq!(by_alpha("a.q", json!({ "a.q": 8, "q": 6 })), 4.0);
    assert_eq!(scale("a", json!({ "use_rslora": true })).unwrap(), 4.0 / 2f64.sqrt());
    assert_eq!(scale("a", json!({ "r": 8, "rank_pattern": { "a": 2 }, "lora_alpha": -1.5 })).unwrap(), -0.75);
    assert_eq!(scale("a", json!({ "rank_pattern": null, "alpha_pattern": {} })).unwrap(), 2.0);
    Ok(())
}

pub fn bad_configurations_are_errors_that_name_the_setting() -> Result<()> {
    let folder = folder("bad_configurations");
    let read = |settings: Value| {
        write(&folder, &settings, &good_tensors());
        PeftAdapter::read(&folder)
    };
    let huge = u64::MAX;
    for (settings, expected) in [
        (json!({ "peft_type": "absent" }), "no `peft_type`"),
        (json!({ "peft_type": "LOHA" }), "`peft_type` is \"LOHA\""),
        (json!({ "peft_type": ["LORA"] }), "`peft_type`"),
        (json!({ "r": "absent" }), "no `r`"),
        (json!({ "r": null }), "no `r`"),
        (json!({ "r": 0 }), "`r` is 0"),
        (json!({ "r": -3 }), "`r` is -3"),
        (json!({ "r": 2.0 }), "`r` is 2.0"),
        (json!({ "r": "2" }), "`r` is \"2\""),
        (json!({ "r": true }), "`r` is true"),
        (json!({ "r": huge }), "the rank by adapter_config.json is 18446744073709551615"),
        (json!({ "r": 3 }), "`base_model.model.l.lora_A.weight` is [2, 4], but the rank"),
        (json!({ "lora_alpha": "absent" }), "no `lora_alpha`"),
        (json!({ "lora_alpha": "16" }), "`lora_alpha` is \"16\""),
        (json!({ "lora_alpha": [1] }), "`lora_alpha` is [1]"),
        (json!({ "use_rslora": 1 }), "`use_rslora` is 1"),
        (json!({ "fan_in_fan_out": "no" }), "`fan_in_fan_out`"),
        (json!({ "lora_bias": "yes" }), "`lora_bias`"),
        (json!({ "lora_bias": true }), "no tensor `base_model.model.l.lora_B.bias`"),
        (json!({ "rank_pattern": [3] }), "`rank_pattern` is [3]"),
        (json!({ "rank_pattern": { "x": 0 } }), "`rank_pattern.x` is 0"),
        (json!({ "rank_pattern": { "l": 4 } }), "the rank by adapter_config.json is 4"),
        (json!({ "alpha_pattern": { "x": "1" } }), "`alpha_pattern.x` is \"1\""),
        (json!({ "alpha_pattern": { "x(": 1 } }), "`alpha_pattern`: `x(` is no pattern"),
        (json!({ "alpha_pattern": { "(?=x)": 1 } }), "`(?=x)` is no pattern"),
        (json!({ "alpha_pattern": { "((a{1000}){1000}){1000}": 1 } }), "is no pattern"),
        (json!({ "modules_to_save": "head" }), "`modules_to_save` is \"head\""),
        (json!({ "modules_to_save": [1] }), "`modules_to_save` is [1]"),
        (json!({ "bias": "lora_only" }), "`bias` is \"lora_only\""),
        (json!({ "bias": 1 }), "`bias` is 1"),
        (json!({ "base_model_name_or_path": 1 }), "`base_model_name_or_path` is 1"),
        (json!({ "use_dora": true }), "`use_dora` is true"),
        (json!({ "use_qalora": true }), "`use_qalora` is true"),
        (json!({ "init_lora_weights": "pissa_niter_4" }), "`init_lora_weights` is \"pissa_niter_4\""),
        (json!({ "init_lora_weights": 1 }), "`init_lora_weights` is 1"),
        (json!({ "target_parameters": ["experts.up"] }), "`target_parameters`"),
        (json!({ "trainable_token_indices": [1, 2] }), "`trainable_token_indices`"),
        (json!({ "layer_replication": [[0, 4], [2, 5]] }), "`layer_replication`"),
        (json!({ "kasa_config": { "beta": 1 } }), "`kasa_config`"),
        (json!({ "of_a_later_version": "x".repeat(1000) }), "`of_a_later_version` is \"xxx"),
    ] {
        let error = read(settings.clone()).expect_err(&settings.to_string()).to_string();
        let path = folder.display().to_string();
        assert!(error.starts_with("weights: ") && error.contains(&path), "{error}");
        assert!(error.contains(expected) && error.len() < path.len() + 300, "{settings}: {error}");
    }
    // What changes no output, and variants that are off.
    for settings in [
        json!({ "lora_dropout": 0.1, "fan_in_fan_out": true, "inference_mode": false, "task_type": "SEQ_CLS" }),
        json!({ "init_lora_weights": "gaussian", "target_modules": ["l"], "modules_to_save": ["classifier"] }),
        json!({ "use_dora": false, "kasa_config": null, "of_a_later_version": {}, "target_parameters": [] }),
    ] {
        assert!(read(settings.clone()).is_ok(), "{settings}");
    }
    // Numbers that JSON can say and f64 cannot, what Python alone takes for JSON, and what is none.
    for (text, expected) in [
        (r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}"#, "number out of range"),
        (r#"{"peft_type": "LORA", "r": 1e300, "lora_alpha": 4}"#, "`r` is 1e+300"),
        (r#"{"peft_type": "LORA", "r": 99999999999999999999999, "lora_alpha": 4}"#, "`r`"),
        (r#"{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}"#, "line 1"),
        (r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 1"#, "EOF"),
        ("[]", "expected a JSON object"),
        ("", "EOF"),
        ("\u{feff}{}", "line 1"),
    ] {
        write(&folder, &json!({}), &good_tensors());
        std::fs::write(folder.join(CONFIG_FILE), text)?;
        let error = PeftAdapter::read(&folder).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(CONFIG_FILE), "{text}: {error}");
    }
    std::fs::write(folder.join(CONFIG_FILE), "[".repeat(100_000))?;
    assert!(PeftAdapter::read(&folder).is_err(), "deep");
    Ok(())
}

pub fn bad_tensors_are_errors_that_name_the_tensor() -> Result<()> {
    let folder = folder("bad_tensors");
    let read = |settings: Value, change: &[(&'static str, Option<Tensor>)]| {
        let mut tensors: HashMap<_, _> = good_tensors().into_iter().collect();
        for (name, tensor) in change {
            match tensor {
                Some(tensor) => drop(tensors.insert(name, tensor.clone())),
                None => drop(tensors.remove(name)),
            }
        }
        write(&folder, &settings, &tensors.into_iter().collect::<Vec<_>>());
        PeftAdapter::read(&folder)
    };
    let some = |dims: &[usize]| Some(random("some", dims));
    let (a, b, bias) = ("l.lora_A.weight", "l.lora_B.weight", "l.lora_B.bias");
    for (change, expected) in [
        (&[(a, None)][..], "no tensor `base_model.model.l.lora_A.weight`"),
        (&[(b, None)], "no tensor `base_model.model.l.lora_B.weight`"),
        (&[(a, None), (b, None)], "no layer of LoRA add"),
        (&[(a, some(&[2, 4, 1, 1]))], "lora_A.weight` is [2, 4, 1, 1]"),
        (&[(a, some(&[8]))], "lora_A.weight` is [8]"),
        (&[(a, some(&[3, 4]))], "lora_B.weight` is [6, 2], expected [N, 3]"),
        (&[(a, some(&[3, 4])), (b, some(&[6, 3]))], "the rank by adapter_config.json is 2"),
        (&[(a, some(&[0, 4])), (b, some(&[6, 0]))], "is [0, 4]"),
        (&[(a, some(&[2, 0]))], "is [2, 0]"),
        (&[(b, some(&[0, 2]))], "is [0, 2]"),
        (&[(a, Some(random("some", &[2, 4]).to_dtype(DType::I64)?))], "I64"),
        (&[(bias, some(&[6]))], "`lora_bias` is false"),
        (&[("l.lora_magnitude_vector", some(&[6]))], "lora_magnitude_vector"),
        (&[("l.lora_magnitude_vector.weight", some(&[6]))], "no place for tensor"),
        (&[("e.lora_embedding_A", some(&[2, 9]))], "`base_model.model.e.lora_embedding_A`"),
        (&[("l.lora_A.bias", some(&[2]))], "no place for tensor `base_model.model.l.lora_A.bias`"),
        (&[("l.lora_A.default.weight", some(&[2, 4]))], "no place for tensor"),
        (&[("prompt_embeddings", some(&[2, 4]))], "no place for tensor"),
        (&[("weight", some(&[2, 4]))], "no place for tensor"),
        (&[("lora_A.weight", some(&[2, 4]))], "no place for tensor"),
        (&[("l.bias", some(&[6]))], "`base_model.model.l.bias` belongs to no module in `modules_to_save`"),
        (&[("head.weight", some(&[3, 6]))], "`base_model.model.head.weight` belongs to no module"),
    ] {
        let error = read(json!({}), change).expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains(WEIGHTS_FILE), "{expected}: {error}");
    }
    let error = read(json!({ "lora_bias": true }), &[(bias, some(&[5]))]).unwrap_err().to_string();
    assert!(error.contains("`base_model.model.l.lora_B.bias` is [5], expected [6]"), "{error}");

    let saves = json!({ "modules_to_save": ["head"] });
    for (change, expected) in [
        (&[("head.bias", some(&[3]))][..], "no tensor `base_model.model.head.weight`"),
        (&[("head.weight", some(&[3, 6, 1, 1]))], "head.weight` is [3, 6, 1, 1]"),
        (&[("head.weight", some(&[3]))], "head.weight` is [3]"),
        (&[("head.weight", some(&[3, 6])), ("head.bias", some(&[4]))], "head.bias` is [4], expected [3]"),
        (&[("head.running_mean", some(&[3]))], "no place for tensor `base_model.model.head.running_mean`"),
        (
            &[
                ("ahead.lora_A.weight", some(&[2, 4])),
                ("ahead.lora_B.weight", some(&[6, 2])),
                ("head.weight", some(&[3, 6])),
            ],
            "part of the head",
        ),
    ] {
        let error = read(saves.clone(), change).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // In a module that was saved.
    let adapter = read(saves, &[("net.head.dense.weight", some(&[3, 6]))]).unwrap();
    assert!(adapter.heads.contains_key("net.head.dense"));
    // A tensor without PEFT's prefix.
    let tensors: HashMap<_, _> = good_tensors().into_iter().collect();
    candle_core::safetensors::save(&tensors, folder.join(WEIGHTS_FILE))?;
    assert!(
        PeftAdapter::read(&folder).unwrap_err().to_string().contains("no place for tensor `l.lora_A.weight`")
    );
    Ok(())
}

pub fn damaged_files_are_errors() -> Result<()> {
    let folder = folder("damaged");
    // A file that is truncated and written again is flushed by some file systems; a new one is not.
    let put = |path: &Path, bytes: &[u8]| {
        let _ = std::fs::remove_file(path);
        std::fs::write(path, bytes)
    };
    assert!(PeftAdapter::read(folder.join("not there")).unwrap_err().to_string().contains(CONFIG_FILE));
    write(&folder, &json!({}), &good_tensors());
    let path = folder.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path)?;
    std::fs::remove_file(&path)?;
    assert!(PeftAdapter::read(&folder).unwrap_err().to_string().contains(WEIGHTS_FILE));
    for length in 0..bytes.len() {
        put(&path, &bytes[..length])?;
        assert!(PeftAdapter::read(&folder).is_err(), "{length} bytes");
    }
    // A flipped bit in the header is an error, or another name for the same tensor, or other bounds; it never panics.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut errors = 0;
    for bit in 0..8 * header {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        put(&path, &bytes)?;
        errors += usize::from(PeftAdapter::read(&folder).is_err());
    }
    assert!(errors > 7 * header, "{errors} of {}", 8 * header);

    put(&path, &bytes)?;
    let config = std::fs::read(folder.join(CONFIG_FILE))?;
    for bit in 0..8 * config.len() {
        let mut config = config.clone();
        config[bit / 8] ^= 1 << (bit % 8);
        put(&folder.join(CONFIG_FILE), &config)?;
        // `r` may become another number, which the tensors do not have.
        if let Ok(adapter) = PeftAdapter::read(&folder) {
            assert_eq!(adapter.layers["l"].lora_a.dims(), [2, 4]);
        }
    }
    Ok(())
}

pub fn what_peft_cannot_hold_is_an_error() -> Result<()> {
    let (context, base) =
        (PaceContext::new(0), || Linear::new(random("weight", &[6, 4]), Some(random("bias", &[6]))));
    let wrapped = |adapter, name: &str, scale: f64| {
        let builder = On::CPU.builder(&VarMap::new(), 0);
        Injector::new(&context, adapter, 2, &[0.0], builder).with_scale(scale).wrap(name, 0, base()).unwrap()
    };
    let error =
        |layers: &[&PaceLinear]| PeftAdapter::from_layers(layers.iter().copied()).unwrap_err().to_string();
    let good = wrapped(Adapter::LoraAdd, "l", 1.0);
    assert!(PeftAdapter::from_layers([&good]).is_ok());
    for adapter in [Adapter::LoraMulVptAdd, Adapter::VptAdd] {
        let error = error(&[&good, &wrapped(adapter, "m", 1.0)]);
        assert!(error.contains("`m`") && error.contains(adapter.name()), "{error}");
    }
    let mut injector =
        Injector::new(&context, Adapter::LoraAdd, 2, &[0.0], On::CPU.builder(&VarMap::new(), 0));
    let dense = injector.wrap_dense("d", 0, base(), random("dense", &[6, 4]), None)?;
    assert!(error(&[&good, &dense]).contains("`d`"));
    let head = injector.wrap_head("h", 0, base())?;
    assert!(error(&[]).contains("no layer") && error(&[&head]).contains("no layer"));
    assert!(error(&[&good, &good]).contains("`l`"));
    assert!(error(&[&wrapped(Adapter::LoraAdd, "l", f64::NAN)]).contains("scale"));
    assert!(error(&[&good, &wrapped(Adapter::LoraAdd, "a.h.b", 1.0), &head]).contains("`a.h.b`"));

    // A δb that no scale can give back.
    let vars = VarMap::new();
    for name in ["delta_W_down", "delta_W_up", "delta_b"] {
        let dims: &[usize] = match name {
            "delta_W_down" => &[6, 2],
            "delta_W_up" => &[2, 4],
            _ => &[6],
        };
        vars.data().lock().unwrap().insert(format!("l.{name}"), Var::from_tensor(&random(name, dims))?);
    }
    for scale in [0.0, 1e-320, 1e308] {
        let builder = VarBuilder::from_varmap(&vars, DType::F64, &CPU);
        let mut injector = Injector::new(&context, Adapter::LoraAdd, 2, &[0.0], builder).with_scale(scale);
        let layer = injector.wrap("l", 0, base())?;
        match PeftAdapter::from_layers([&layer]) {
            Ok(adapter) => assert!(scale == 1e308 && adapter.layers["l"].bias.is_some()),
            Err(error) => assert!(scale < 1.0 && error.to_string().contains("δb"), "{error}"),
        }
    }

    // What a caller has put together by hand.
    let adapter =
        |layer: PeftLayer| PeftAdapter { layers: [("l".into(), layer)].into(), ..Default::default() };
    let folder = folder("cannot_hold");
    for (layer, expected) in [
        (PeftLayer { lora_b: random("b", &[6, 3]), ..lora("l", 6, 4, 2, 1.0) }, "lora_B.weight"),
        (PeftLayer { lora_a: random("a", &[2, 4, 1]), ..lora("l", 6, 4, 2, 1.0) }, "lora_A.weight"),
        (PeftLayer { bias: Some(random("b", &[5])), ..lora("l", 6, 4, 2, 1.0) }, "lora_B.bias"),
        (lora("l", 6, 4, 2, f64::INFINITY), "scale"),
        (lora("l", 6, 4, 2, f64::MAX), "lora_alpha"),
    ] {
        let error = adapter(layer).write(&folder).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(PeftAdapter::default().write(&folder).is_err());
    assert_eq!(std::fs::read_dir(&folder)?.count(), 0, "nothing was written");
    std::fs::write(folder.join("file"), "")?;
    let good = adapter(lora("l", 6, 4, 2, 1.0));
    assert!(good.write(folder.join("file")).unwrap_err().to_string().contains("file"));

    // Injectors: a builder over other variables, layers of other sizes, a bias too many or too few.
    let vars = VarMap::new();
    let other = On::CPU.builder(&VarMap::new(), 0);
    assert!(Injector::from_peft(&context, &good, &[0.0], &vars, other).is_err());
    let mut with_head = good.clone();
    with_head.heads.insert("h".into(), Linear::new(random("h", &[6, 4]), None));
    let mut injector = Injector::from_peft(&context, &with_head, &[0.0], &vars, On::CPU.builder(&vars, 0))?;
    let narrow = || Linear::new(random("weight", &[6, 3]), None);
    assert!(injector.wrap("l", 0, narrow()).is_err() && injector.wrap_head("h", 0, narrow()).is_err());
    assert!(injector.wrap_head("h", 0, base()).unwrap_err().to_string().contains("bias"));
    assert!(injector.wrap("l", 1, base()).is_err() && injector.wrap("unknown", 1, base()).is_err(), "no σ");
    // A model that has no such layer.
    let error = model(&On::CPU, &good, &[0.0; 3], &VarMap::new()).unwrap_err().to_string();
    assert!(error.contains("`l`"), "{error}");
    Ok(())
}

/// A folder of this crate in PEFT, and in one go a new record of PEFT in this crate.
pub fn peft_loads_what_is_written(python: &str) -> Result<()> {
    let folder = folder("python");
    let base = recorded().join("model.safetensors");
    // Of two ranks, with a scale of each kind of layer; a name's end, `proj`, is also that of layers without LoRA.
    let mut adapter = PeftAdapter::default();
    for (name, out, rank, scale) in [
        ("blocks.0.attn.qkv", 36, 2, 2.5),
        ("blocks.1.attn.proj", 12, 3, 1.0 / 3.0),
        ("blocks.1.mlp.fc1", 24, 2, 1.7),
    ] {
        let mut layer = lora(name, out, 12, rank, scale);
        layer.bias = (rank == 3).then(|| random(name, &[out]));
        adapter.layers.insert(name.into(), layer);
    }
    adapter.heads.insert("head".into(), Linear::new(random("head", &[5, 12]), Some(random("bias", &[5]))));
    // As a model has it after training.
    let (trained, _) = model(&On::CPU, &adapter, &[0.5; 3], &VarMap::new())?;
    PeftAdapter::from_layers(trained.layers())?.write(folder.join("written")).unwrap();

    let result = folder.join("result.safetensors");
    let mut command = Command::new(python);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/candle/peft/reference.py"))
        .args(["--seed", "2", "--record"])
        .arg(folder.join("record"))
        .arg("--load")
        .arg(folder.join("written"))
        .arg("--model")
        .arg(&base)
        .arg("--result")
        .arg(&result)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let output = command.output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let x = On::CPU.place(&read_weights(&base).unwrap()["x"])?;
    let logits = &read_weights(&result).unwrap()["logits"];
    assert!(largest_difference(&trained.forward(&x)?, logits) < 1e-12, "{:?}", values(logits));
    let bytes = std::fs::read(&result)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let targets = header.metadata().as_ref().unwrap()["targets"].clone();
    assert_eq!(
        targets,
        serde_json::to_string(&adapter.layers.keys().collect::<Vec<_>>()).unwrap().replace(',', ", ")
    );
    compare_with_record(&On::CPU, &folder.join("record"))
}
