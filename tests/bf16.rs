//! Layers in `bf16` against the same layers in `f64`, and against their formula, on numbers that `bf16` holds exactly.

use half::bf16;
use pace_kernels::cpu::{
    Base, Lora, LoraMulLinear, LoraMulLinearGrads, LowRankGrads, LowRankLinear, NoisyLinear,
    NoisyLinearGrads, Prompt,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape, philox4x32_10};
use pace_kernels::{Element, LinearShape, Real};

const RANK: usize = 5;

/// Numbers between −1 and 1 that `bf16` holds exactly.
fn values<T: Element>(seed: usize, len: usize) -> Vec<T> {
    let word = |i: usize| philox4x32_10([i as u32, 0, 0, 0], [seed as u32, 1])[0];
    let value = |i: usize| bf16::from_f32(word(i) as i32 as f32 / 2f32.powi(31)).to_f32();
    (0..len).map(|i| T::from_real(T::Real::from_f32(value(i)))).collect()
}

fn wide<T: Element>(values: Vec<T>) -> Vec<f64> {
    values.into_iter().map(|value| value.to_real().to_f64()).collect()
}

/// What a layer is run with.
#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    noise: Option<NoiseShape>,
    fold: bool,
    base: bool,
}

/// Outputs and gradients of all layers, by name.
fn run<T: Element>(case: Case) -> Vec<(&'static str, Vec<f64>)> {
    let Case { shape, fold, .. } = case;
    let (m, k, n, r) = (shape.out_rows(), shape.in_features, shape.out_features, RANK);
    let noise = match case.noise {
        Some(shape) => Noise::Generated(Generator::new(Key::derive(1, 2, 3), 0.7, shape, 5).unwrap()),
        None => Noise::Off,
    };
    let [weight, bias, delta, delta_bias, x, dy, lora_b, lora_a, down, up] =
        [n * k, n, n * k, n, shape.in_rows() * k, m * n, n * r, r * k, k * r, r]
            .map(|len| values::<T>(len, len));
    let base = Base { weight: &weight[..], bias: Some(&bias[..]) };
    // Contents are ignored: what is not written is found.
    let nan = |len: usize| vec![T::from_real(T::Real::from_f32(f32::NAN)); len];
    let mut out = Vec::new();

    let layer = NoisyLinear {
        shape,
        noise,
        base: case.base.then_some(base),
        delta_weight: Some(&delta),
        delta_bias: Some(&delta_bias),
        fold,
    };
    let (mut y, mut dx, mut dw, mut db) = (nan(m * n), nan(x.len()), nan(n * k), nan(n));
    layer.forward(&x, &mut y).unwrap();
    let grads: NoisyLinearGrads<&mut [_]> =
        NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: Some(&mut db) };
    layer.backward(&x, &dy, grads).unwrap();
    out.extend([("dense y", y), ("dense dx", dx), ("dΔW", dw), ("dΔb", db)]);

    let layer = LowRankLinear {
        shape,
        noise,
        base: case.base.then_some(base),
        rank: r,
        lora_b: &lora_b,
        lora_a: &lora_a,
        delta_bias: Some(&delta_bias),
        scale: T::Real::from_f32(0.5),
    };
    let (mut y, mut dx, mut db, mut da, mut dbias) =
        (nan(m * n), nan(x.len()), nan(n * r), nan(r * k), nan(n));
    layer.forward(&x, &mut y).unwrap();
    let grads: LowRankGrads<&mut [_]> = LowRankGrads {
        input: Some(&mut dx),
        lora_b: Some(&mut db),
        lora_a: Some(&mut da),
        delta_bias: Some(&mut dbias),
    };
    layer.backward(&x, &dy, grads).unwrap();
    out.extend([("LoRA add y", y), ("LoRA add dx", dx), ("LoRA add dB", db), ("LoRA add dA", da)]);
    out.push(("LoRA add dδb", dbias));

    let layer = LoraMulLinear {
        shape,
        noise,
        base,
        lora: Some(Lora { rank: r, lora_a: &lora_a[..], lora_b: &lora_b[..], scale: T::Real::from_f32(0.5) }),
        prompt: Some(Prompt { rank: r, down: &down[..], up: &up[..] }),
        delta_bias: Some(&delta_bias),
        fold,
    };
    let (mut y, mut dx, mut db, mut da) = (nan(m * n), nan(x.len()), nan(n * r), nan(r * k));
    let (mut dp, mut du, mut dbias) = (nan(k * r), nan(r), nan(n));
    layer.forward(&x, &mut y).unwrap();
    let grads: LoraMulLinearGrads<&mut [_]> = LoraMulLinearGrads {
        input: Some(&mut dx),
        lora_a: Some(&mut da),
        lora_b: Some(&mut db),
        prompt_down: Some(&mut dp),
        prompt_up: Some(&mut du),
        delta_bias: Some(&mut dbias),
    };
    layer.backward(Some(&x), &dy, grads).unwrap();
    out.extend([("LoRA mul y", y), ("LoRA mul dx", dx), ("LoRA mul dA", da), ("LoRA mul dB", db)]);
    out.extend([("dPd", dp), ("dPu", du), ("LoRA mul dδb", dbias)]);
    out.into_iter().map(|(name, values)| (name, wide(values))).collect()
}

#[test]
fn layers_in_bf16_are_those_in_f64_but_for_rounding() {
    let shape = |batch, tokens, in_features, out_features, shared_input| LinearShape {
        branches: 2,
        batch,
        tokens,
        in_features,
        out_features,
        shared_input,
    };
    let (sample, token) = (Some(NoiseShape::PerSample), Some(NoiseShape::PerToken));
    let many = shape(3, 40, 70, 333, false);
    let cases = [
        // Folded, and not: by choice, by few tokens, without noise, by the kind of noise, by a shared input.
        Case { shape: many, noise: sample, fold: true, base: true },
        Case { shape: many, noise: sample, fold: false, base: true },
        Case { shape: shape(2, 1, 33, 50, false), noise: sample, fold: true, base: true },
        Case { shape: many, noise: None, fold: true, base: true },
        Case { shape: many, noise: token, fold: true, base: true },
        Case { shape: shape(2, 40, 64, 96, true), noise: sample, fold: true, base: true },
        // Without a base; odd sizes; deeper and wider than a block of a GEMM.
        Case { shape: many, noise: sample, fold: true, base: false },
        Case { shape: shape(1, 33, 1, 1, false), noise: sample, fold: true, base: true },
        Case { shape: shape(1, 130, 1101, 67, false), noise: sample, fold: true, base: true },
        Case { shape: shape(1, 35, 67, 1101, false), noise: sample, fold: true, base: true },
    ];
    for case in cases {
        // Base and adapter may cancel: their sum is as exact as they are.
        let without_base = run::<f64>(Case { base: false, ..case });
        for (((name, got), (_, want)), (_, terms)) in
            run::<bf16>(case).into_iter().zip(run::<f64>(case)).zip(without_base)
        {
            let largest = want.iter().chain(&terms).fold(0f64, |largest, value| largest.max(value.abs()));
            for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
                // A result is rounded once, and what it is made of once or twice before.
                let error = (got - want).abs();
                assert!(error <= 2f64.powi(-7) * largest, "{name} [{i}] of {case:?}: {got:e}, not {want:e}");
            }
        }
    }
}

/// Two branches that share their input and are alike but for the noise: what is left of their sum is not lost.
#[test]
fn branches_that_cancel_are_rounded_once() {
    let shape =
        LinearShape { branches: 2, batch: 1, tokens: 1, in_features: 1, out_features: 1, shared_input: true };
    // Half of bf16's last place above 1.
    let z = [1.0 + 1.0 / 256.0, 1.0];
    let one = [bf16::ONE];
    let layer = NoisyLinear {
        shape,
        noise: Noise::Given { z: &z[..], shape: NoiseShape::PerSample },
        base: None,
        delta_weight: Some(&one),
        delta_bias: None,
        fold: false,
    };
    let (mut dx, mut dw) = ([bf16::NAN], [bf16::NAN]);
    let grads: NoisyLinearGrads<&mut [_]> =
        NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: None };
    layer.backward(&one, &[bf16::ONE, bf16::NEG_ONE], grads).unwrap();
    assert_eq!((dx[0].to_f32(), dw[0].to_f32()), (1.0 / 256.0, 1.0 / 256.0));
}

/// Weights so large that they are prepared in parts, of channels and of columns: some of each, by the formula.
fn large_weights_are_used_whole<T: Element>(bound: f64) {
    let (k, n, tokens) = (16500, 300, 3);
    let shape =
        LinearShape { branches: 2, batch: 1, tokens, in_features: k, out_features: n, shared_input: false };
    let m = shape.out_rows();
    let [weight, delta, x, dy] = [n * k, n * k, m * k, m * n].map(|len| values::<T>(len, len));
    let delta: Vec<T> = delta.into_iter().rev().collect();
    let z: Vec<T::Real> = values::<T>(9, 2 * n).into_iter().map(Element::to_real).collect();
    let layer = NoisyLinear {
        shape,
        noise: Noise::Given { z: &z[..], shape: NoiseShape::PerSample },
        base: Some(Base { weight: &weight[..], bias: None }),
        delta_weight: Some(&delta),
        delta_bias: None,
        fold: false,
    };
    let (mut y, mut dx) = (vec![T::default(); m * n], vec![T::default(); m * k]);
    layer.forward(&x, &mut y).unwrap();
    layer.backward(&x, &dy, NoisyLinearGrads { input: Some(&mut dx), ..Default::default() }).unwrap();
    let [weight, delta, x, dy, y, dx] = [weight, delta, x, dy, y, dx].map(wide);
    let effective = |row: usize, channel: usize, column: usize| {
        let z = z[row / tokens * n + channel].to_f64();
        weight[channel * k + column] + z * delta[channel * k + column]
    };
    for row in 0..m {
        for channel in [0, 255, 256, 299] {
            let want: f64 = (0..k).map(|column| x[row * k + column] * effective(row, channel, column)).sum();
            let got = y[row * n + channel];
            assert!((got - want).abs() <= bound * 100.0, "y of {row}, {channel}: {got}, not {want}");
        }
        for column in [0, 255, 256, 13823, 13824, 16499] {
            let want: f64 =
                (0..n).map(|channel| dy[row * n + channel] * effective(row, channel, column)).sum();
            let got = dx[row * k + column];
            assert!((got - want).abs() <= bound * 10.0, "dx of {row}, {column}: {got}, not {want}");
        }
    }
}

#[test]
fn large_weights_are_used_whole_in_bf16() {
    large_weights_are_used_whole::<bf16>(2f64.powi(-7));
}

#[test]
fn large_weights_are_used_whole_in_f32() {
    large_weights_are_used_whole::<f32>(2f64.powi(-17));
}
