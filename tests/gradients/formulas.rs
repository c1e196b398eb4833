//! Layers and builders of weights against plain loops and finite differences, whatever the sizes and options.

use crate::data::*;
use crate::operators::*;
use crate::support::*;
use pace_kernels::noise::{NoiseShape, philox4x32_10};
use pace_kernels::{LinearShape, Real};

/// What an operator should give, and by how much rounding may move each element: the result of the same operator on
/// the magnitudes of its inputs, which is the sum of the magnitudes of the element's terms.
struct Expected {
    values: Outputs<f64>,
    magnitudes: Outputs<f64>,
}

impl Expected {
    fn new(op: &Op, case: &Case, data: &Data<f64>) -> Self {
        let mut magnitudes = Data { z: case.z(&data.z), ..data.clone() };
        for (_, field) in FIELDS {
            field(&mut magnitudes).iter_mut().for_each(|v| *v = v.abs());
        }
        let positive = Case { source: Source::Given(NoiseShape::PerToken), scale: case.scale.abs(), ..*case };
        let magnitudes = (op.reference)(&positive, &magnitudes);
        Self { values: (op.reference)(case, data), magnitudes }
    }
}

/// In pools of one and of four threads: the bits repeat from run to run, and the values are the reference's.
fn check_runs<T: Real>(case: &Case, expected: &Expected, run: impl Fn() -> Outputs<T> + Sync) {
    let tolerance = 16.0 * if size_of::<T>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON };
    for pool in POOLS.iter() {
        let [first, second] = [(); 2].map(|()| pool.install(&run));
        assert_eq!(first.len(), expected.values.len());
        let expected = expected.values.iter().zip(&expected.magnitudes);
        for (((name, got), (_, again)), ((_, want), (_, magnitudes))) in
            first.iter().zip(&second).zip(expected)
        {
            let what = (std::any::type_name::<T>(), pool.current_num_threads(), name, case);
            let same = got.iter().zip(again).all(|(a, b)| a.to_f64().to_bits() == b.to_f64().to_bits());
            assert!(same, "not reproducible: {what:?}");
            assert_within(what, got, want, |i| tolerance * magnitudes[i]);
        }
    }
}

fn check(op: &Op, cases: &[Case]) {
    for case in cases {
        let data = Data::new(case);
        let expected = Expected::new(op, case, &data);
        check_runs(case, &expected, || (op.f64)(case, &data));
        let data = data.cast();
        check_runs(case, &expected, || (op.f32)(case, &data));
    }
}

/// Sizes on both sides of every internal edge: the folding threshold, channel blocks, vector tails.
const TOKENS: [usize; 6] = [1, 3, 31, 32, 50, 197];
const OUT_FEATURES: [usize; 7] = [1, 5, 16, 255, 256, 257, 600];
const IN_FEATURES: [usize; 3] = [1, 7, 64];
const RANKS: [usize; 4] = [1, 4, 10, 70];

/// Everything optional is drawn, by the number of the case.
fn case(number: usize, shape: LinearShape, source: Source) -> Case {
    let draw = philox4x32_10([number as u32, 0, 0, 0], [1, 2]);
    let bit = |i: u32| draw[0] >> i & 1 == 1;
    let (base, delta_weight) =
        [(true, true), (true, true), (true, false), (false, true)][draw[1] as usize % 4];
    Case {
        shape: LinearShape { batch: draw[2] as usize % 3 + 1, ..shape },
        source,
        rank: RANKS[draw[3] as usize % 4],
        scale: if bit(0) { 1.0 } else { -1.75 },
        base,
        base_bias: bit(1),
        delta_weight,
        delta_bias: bit(2),
    }
}

fn layer_cases(branches: usize, shared_input: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for tokens in TOKENS {
        for out_features in OUT_FEATURES {
            for in_features in IN_FEATURES {
                let shape =
                    LinearShape { branches, batch: 1, tokens, in_features, out_features, shared_input };
                for source in SOURCES {
                    cases.push(case(cases.len(), shape, source));
                }
            }
        }
    }
    // More input rows than the weight gradients take at a time, and more tasks than they have partial sums.
    for source in SOURCES {
        let shape =
            LinearShape { branches, batch: 1, tokens: 197, in_features: 3, out_features: 17, shared_input };
        let case = case(cases.len(), shape, source);
        cases.push(Case { shape: LinearShape { batch: 43, ..shape }, ..case });
    }
    cases
}

macro_rules! layer_tests {
    ($($name:ident: $op:ident, $branches:literal, $shared:literal;)*) => {
        $(#[test]
        fn $name() {
            check(&$op, &layer_cases($branches, $shared));
        })*
    };
}

layer_tests! {
    dense_one_branch: DENSE, 1, false;
    dense_one_branch_shared: DENSE, 1, true;
    dense_two_branches: DENSE, 2, false;
    dense_two_branches_shared: DENSE, 2, true;
    low_rank_one_branch: LOW_RANK, 1, false;
    low_rank_one_branch_shared: LOW_RANK, 1, true;
    low_rank_two_branches: LOW_RANK, 2, false;
    low_rank_two_branches_shared: LOW_RANK, 2, true;
    epilogue_one_branch: EPILOGUE, 1, false;
    epilogue_two_branches: EPILOGUE, 2, true;
    drop_path_one_branch: DROP_PATH, 1, false;
    drop_path_two_branches: DROP_PATH, 2, false;
}

#[test]
fn weight_builders() {
    let mut cases = Vec::new();
    for out_features in OUT_FEATURES {
        for in_features in [1, 7, 64, 300] {
            for rank in RANKS {
                for (base_bias, delta_bias) in [(true, true), (true, false), (false, true), (false, false)] {
                    let shape = LinearShape { out_features, in_features, ..SMALL };
                    let case = case(cases.len(), shape, Source::Off);
                    cases.push(Case { rank, base_bias, delta_bias, ..case });
                }
            }
        }
    }
    // More channels than the partial sums of a gradient take in blocks of the usual size.
    let shape = LinearShape { out_features: 13_000, in_features: 3, ..SMALL };
    cases.push(Case { rank: 2, ..case(0, shape, Source::Off) });
    for op in &WEIGHTS {
        check(op, &cases);
    }
}

#[test]
fn gradients_are_derivatives() {
    for case in &small_cases() {
        for op in [DENSE, LOW_RANK, EPILOGUE, DROP_PATH].iter().chain(&WEIGHTS) {
            let data = Data::new(case);
            let outputs = (op.f64)(case, &data);
            for (name, field) in op.gradients {
                let Some((_, gradient)) = outputs.iter().find(|output| output.0 == *name) else { continue };
                let mut moved = data.clone();
                let at = field(&mut moved).clone();
                // Every operator is linear in each input, so a wide step costs no accuracy.
                check_differences((name, case), &at, gradient, 0.25, |values| {
                    field(&mut moved).copy_from_slice(values);
                    let result = &(op.f64)(case, &moved)[0].1;
                    result.iter().zip((op.incoming)(&data)).map(|(y, g)| y * g).sum()
                });
            }
        }
    }
}

/// NaN and infinities in any input reach exactly the outputs that depend on it, as in the plain loops.
#[test]
fn non_finite_inputs_show() {
    let silent = small_cases().into_iter().take(3).map(|case| Case { scale: 0.0, ..case });
    for case in &small_cases().into_iter().chain(silent).collect::<Vec<_>>() {
        for op in [DENSE, LOW_RANK, EPILOGUE, DROP_PATH].iter().chain(&WEIGHTS) {
            for (name, field) in FIELDS {
                let mut data = Data::new(case);
                let len = field(&mut data).len();
                for (position, poison) in
                    [(0, f64::NAN), (len / 2, f64::INFINITY), (len.wrapping_sub(1), f64::NEG_INFINITY)]
                {
                    let Some(value) = field(&mut data).get_mut(position) else { continue };
                    let healthy = std::mem::replace(value, poison);
                    let want = (op.reference)(case, &data);
                    let got = (op.f64)(case, &data);
                    let single = (op.f32)(case, &data.cast());
                    field(&mut data)[position] = healthy;
                    for ((want, got), single) in want.iter().zip(got).zip(single) {
                        for i in 0..want.1.len() {
                            let finite =
                                [want.1[i].is_finite(), got.1[i].is_finite(), single.1[i].is_finite()];
                            let what = (poison, name, position, want.0, i, case);
                            assert!(
                                finite.iter().all(|&f| f == finite[0]),
                                "[want, f64, f32] {finite:?} {what:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
