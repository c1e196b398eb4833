//! Layers and operators: gradients, noise, and DropPath.

use crate::on::On;
use crate::support::*;
use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::{Injector, PaceContext, PaceLinear, noisy_add};
use pace_kernels::noise::{Generator, Key, NoiseShape};

pub fn layer_gradients_match_finite_differences() -> Result<()> {
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

pub fn layers_are_those_of_the_cpu(on: &On) -> Result<()> {
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
pub fn gradients_do_not_depend_on_each_other(on: &On) -> Result<()> {
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

pub fn noise_is_new_every_step_and_the_same_for_split_batches(on: &On) -> Result<()> {
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

pub fn drop_path_is_shared_by_the_branches(on: &On) -> Result<()> {
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

pub fn noisy_add_is_the_layers_epilogue(on: &On) -> Result<()> {
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
