//! Files of weights: a round trip, and bad ones.

use crate::support::*;
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use pace_kernels::candle::seeded_builder;
use pace_kernels::candle::vit::{Vit, VitConfig, read_weights};
use std::collections::HashMap;

pub fn weights_round_trip_through_a_file() -> Result<()> {
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

pub fn bad_weight_files_are_errors_that_say_what_is_missing() -> Result<()> {
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
