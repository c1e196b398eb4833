//! Training steps of a transformer: losses and gradients, the two branches, and the variants of the method.

use crate::on::On;
use crate::support::*;
use candle_core::{Module, Result, Tensor};
use pace_kernels::candle::vit::VitConfig;
use pace_kernels::candle::{Batch, Objective, PaceContext, Variant, grad_norm};
use pace_kernels::noise::{Generator, Key, NoiseShape};
use pace_kernels::schedule::sigma_by_block;
use pace_kernels::{Divergence, LossSettings, Targets};

pub fn training_steps_are_those_of_the_cpu(on: &On) -> Result<()> {
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

pub fn parting_late_equals_a_doubled_batch(on: &On) -> Result<()> {
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

pub fn variants_use_the_rows_they_should(on: &On) -> Result<()> {
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

/// The choices of a loss are those of `cpu::Loss`: value and gradient of the same logits.
pub fn other_losses_are_those_of_the_cpu(on: &On) -> Result<()> {
    let context = PaceContext::new(0);
    let logits = on.random("logits", &[6, 5]);
    let shares = candle_nn::ops::softmax(&on.random("shares", &[3, 5]), 1)?;
    let numbers = on.random("numbers", &[3, 5]);
    let labels = [4, -1, 2];
    let weights = [0.5, 2.0, 0.0, 1.0, 3.0];
    let divergence = Divergence::Kl { temperature: 2.0, detach_target: false };
    for (targets, divergence, class_weights) in [
        (Targets::Labels(&labels[..]), Divergence::SymmetricKl, Some(&weights[..])),
        (Targets::Probabilities(&shares), divergence, Some(&weights[..])),
        (Targets::Values(&numbers), Divergence::MeanSquaredDifference, None),
    ] {
        let (ignore_label, labelled_only) = (Some(-1), matches!(targets, Targets::Labels(_)));
        let mut objective = Objective::new(&context, Variant::Pace, 0.5)?;
        (objective.divergence, objective.ignore_label) = (divergence, ignore_label);
        (objective.labelled_only, objective.both_branches) = (labelled_only, true);
        objective.class_weights = class_weights.map(<[f64]>::to_vec);
        let var = candle_core::Var::from_tensor(&logits)?;
        let x = on.random("x", &[3, 1]);
        let batch = Batch { targets, ..Batch::new(&x, &labels) };
        let step = objective.step(0, &batch, |_| Ok(var.as_tensor().clone()))?;
        let (all, shares, numbers) = (values(&logits), values(&shares), values(&numbers));
        let loss = pace_kernels::cpu::Loss {
            settings: LossSettings {
                divergence,
                ignore_label,
                labelled_only,
                both_branches: true,
                ..LossSettings::new(5, 0.5)
            },
            targets: match targets {
                Targets::Labels(labels) => Targets::Labels(labels),
                Targets::Probabilities(_) => Targets::Probabilities(&shares[..]),
                Targets::Values(_) => Targets::Values(&numbers[..]),
            },
            class_weights,
        };
        let mut want = vec![0.0; 30];
        let want_values =
            loss.evaluate(&all, pace_kernels::cpu::Consistency::TwoBranch, Some(&mut want)).unwrap();
        let got = values(step.loss.backward()?.get(&var).unwrap());
        let close = |got: f64, want: f64| (got - want).abs() <= on.tolerance(1e-12, 1e-5);
        assert!(close(step.values.total, want_values.total), "{:?}, {want_values:?}", step.values);
        assert!(got.iter().zip(&want).all(|(&got, &want)| close(got, want)), "{got:?}, {want:?}");
    }
    // Targets that do not fit.
    let x = on.random("x", &[3, 1]);
    let narrow = on.random("narrow", &[3, 4]);
    let batch = Batch { targets: Targets::Values(&narrow), ..Batch::new(&x, &labels) };
    let error =
        Objective::new(&context, Variant::Pace, 0.5)?.step(0, &batch, |_| Ok(logits.clone())).unwrap_err();
    assert!(error.to_string().contains("`targets` has 4 columns"), "{error}");
    let batch = Batch { targets: Targets::Values(&logits), ..batch };
    let error =
        Objective::new(&context, Variant::Pace, 0.5)?.step(0, &batch, |_| Ok(logits.clone())).unwrap_err();
    assert!(error.to_string().contains("`targets` has 6 elements"), "{error}");
    Ok(())
}
