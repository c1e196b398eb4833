//! What the documentation promises of layers: no noise, merging, a shared input, and a batch in parts.

use crate::data::*;
use crate::operators::*;
use crate::support::*;
use pace_kernels::LinearShape;
use pace_kernels::cpu::{Base, NoisyLinear, NoisyLinearGrads, merge, unmerge};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};

#[test]
fn sigma_zero_is_no_noise() {
    for case in small_cases().into_iter().filter(|case| matches!(case.source, Source::Off)) {
        let data = Data::new(&case);
        let layer = NoisyLinear {
            shape: case.shape,
            noise: Noise::Off,
            base: case.base(&data),
            delta_weight: case.delta_weight.then_some(&data.dw),
            delta_bias: Some(&data.db),
            fold: true,
        };
        let run = |layer: NoisyLinear<'_, f64>| {
            let (mut y, mut dx) = (unwritten(data.dy.len()), unwritten(data.x.len()));
            layer.forward(&data.x, &mut y).unwrap();
            let grads: NoisyLinearGrads<&mut [_]> =
                NoisyLinearGrads { input: Some(&mut dx), ..Default::default() };
            layer.backward(&data.x, &data.dy, grads).unwrap();
            [y, dx]
        };
        for shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            let silent = Generator::new(Key::derive(1, 2, 3), 0.0, shape, 0).unwrap();
            for (got, want) in
                run(NoisyLinear { noise: Noise::Generated(silent), ..layer }).iter().zip(run(layer))
            {
                assert_close(case, got, &want);
            }
        }
    }
}

#[test]
fn merged_evaluation_equals_adapter_evaluation() {
    for case in small_cases().into_iter().filter(|case| case.base && case.delta_weight) {
        let data = Data::new(&case);
        let (mut weight, mut bias) = (data.w0.clone(), data.b0.clone());
        merge(&mut weight, &data.dw).unwrap();
        merge(&mut bias, &data.db).unwrap();
        let with_adapter = Case { source: Source::Off, ..case };
        let merged = Case { delta_weight: false, delta_bias: false, ..with_adapter };
        let [want, got] = [
            dense(&with_adapter, &data),
            dense(&merged, &Data { w0: weight.clone(), b0: bias.clone(), ..data.clone() }),
        ];
        assert_close((case, "y"), &got[0].1, &want[0].1);
        assert_close((case, "dx"), &got[1].1, &want[1].1);
        unmerge(&mut weight, &data.dw).unwrap();
        unmerge(&mut bias, &data.db).unwrap();
        assert_close((case, "W0"), &weight, &data.w0);
        assert_close((case, "b0"), &bias, &data.b0);
    }
}

/// Reading one input from both branches is the same as reading two copies of it; its gradient is the sum of theirs.
#[test]
fn shared_input_equals_duplicated_input() {
    for case in small_cases().into_iter().filter(|case| case.shape.shared_input) {
        let data = Data::new(&case);
        let copies = Case { shape: LinearShape { shared_input: false, ..case.shape }, ..case };
        let copied = Data { x: data.x.repeat(2), ..data.clone() };
        for op in [DENSE, LOW_RANK] {
            for ((name, got), (_, mut want)) in (op.f64)(&case, &data).iter().zip((op.f64)(&copies, &copied))
            {
                if *name == "dx" {
                    let second = want.split_off(data.x.len());
                    merge(&mut want, &second).unwrap();
                }
                assert_close((name, case), got, &want);
            }
        }
    }
}

/// A part of a batch draws what the whole batch draws there, in every path.
#[test]
fn noise_does_not_depend_on_the_split_of_the_batch() {
    for tokens in [1, 48] {
        for noise_shape in [NoiseShape::PerSample, NoiseShape::PerToken] {
            let whole = LinearShape { branches: 1, batch: 5, tokens, ..SMALL };
            let run = |first: usize, batch: usize| {
                let (k, n) = (whole.in_features, whole.out_features);
                let shape = LinearShape { batch, ..whole };
                let generator = Generator::new(Key::derive(1, 2, 3), 0.5, noise_shape, first as u64).unwrap();
                let layer = NoisyLinear {
                    shape,
                    noise: Noise::Generated(generator),
                    base: Some(Base { weight: &uniform(1, n * k), bias: None }),
                    delta_weight: Some(&uniform(2, n * k)),
                    delta_bias: None,
                    fold: true,
                };
                let mut y = unwritten(shape.out_rows() * n);
                let x = uniform(3, whole.in_rows() * k);
                layer.forward(&x[first * tokens * k..][..batch * tokens * k], &mut y).unwrap();
                y
            };
            assert_close((tokens, noise_shape), &[run(0, 2), run(2, 3)].concat(), &run(0, 5));
        }
    }
}
