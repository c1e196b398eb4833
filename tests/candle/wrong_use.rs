//! Wrong use and wrong sizes are errors, not panics.

use crate::on::On;
use crate::support::*;
use candle_core::{DType, Module, Result};
use candle_nn::{Linear, VarMap};
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::vit::{Vit, VitConfig};
use pace_kernels::candle::{Batch, Injector, Objective, PaceContext, Variant};
use pace_kernels::noise::NoiseShape;

pub fn wrong_use_is_an_error(on: &On) -> Result<()> {
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
    for (z, what) in [(&[4, 5], "wrong z"), (&[6, 4], "transposed z")] {
        context.set_noise("layer", Some(on.random("z", z)));
        assert!(layer.forward(&on.random("x", &[4, 4])).is_err(), "{what}");
    }
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

pub fn wrong_sizes_are_errors() -> Result<()> {
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
