//! Every operator but the loss: tensors and sizes that do not fit each other, and what one operator alone refuses.

use crate::call::Dim::{self, Batch, Branches, In, Out, Rank, Tokens};
use crate::call::Op::{DropPath, DropPathBackward};
use crate::call::{Call, OPS, Op};
use crate::support::*;
use pace_kernels::cpu::{
    Base, NoisyLinear, NoisyLinearGrads, merge, noisy_epilogue, shared_drop_path, unmerge,
};
use pace_kernels::noise::Noise;
use pace_kernels::{Error, LinearShape};
use proptest::prelude::*;
use std::collections::BTreeMap;

impl Call {
    fn with_size(&self, dim: Dim, size: usize) -> Self {
        let mut call = self.clone();
        call.sizes[dim as usize] = size;
        call
    }

    /// Whether the tensor that an error names depends on a size.
    fn depends(&self, argument: &str, dim: Dim) -> bool {
        let dims = match argument {
            "weight" => vec![Out, In],
            "x·Aᵀ" => vec![Branches, Batch, Tokens, Rank],
            // A layer refuses sizes whose unshared input would overflow, so that one check serves both.
            "x" | "y" if self.op.is_layer() => {
                vec![Branches, Batch, Tokens, if argument == "x" { In } else { Out }]
            }
            _ => self.tensors().into_iter().find(|(name, _)| *name == argument).unwrap().1,
        };
        dims.contains(&dim)
    }

    /// Corrupts each tensor's length, each size and each setting in turn.
    fn check_corruptions(&self, seed: usize) {
        self.run().unwrap_or_else(|error| panic!("{error} for a correct call {self:?}"));
        for (&name, &expected) in &self.lengths {
            for got in [0, expected - 1, expected + 1, 2 * expected, seed % 64] {
                let mut call = self.clone();
                call.lengths.insert(name, got);
                match call.run() {
                    Err(Error::Length { argument, shape, expected: e, got: g }) => {
                        assert_eq!((argument, e, g), (name, expected, got), "{call:?}");
                        assert!(shape.starts_with('['));
                    }
                    Ok(()) if got == expected => {}
                    other => panic!("{other:?} for {call:?}"),
                }
            }
        }
        for &dim in self.op.sizes() {
            let argument = dim.argument();
            let allowed = if dim == Branches { "1 or 2" } else { "at least 1" };
            assert_error(self.with_size(dim, 0).run(), size(argument, allowed, 0));
            for huge in OVERFLOWS {
                let call = self.with_size(dim, huge);
                match (dim, call.run().unwrap_err()) {
                    (Branches, error) => assert_eq!(error, size(argument, allowed, huge)),
                    (Tokens | Out, Error::Size { argument: a, got, .. }) if call.op.is_layer() => {
                        assert_eq!((a, got), (argument, huge));
                    }
                    (_, Error::Overflow { argument, shape }) => {
                        assert!(call.depends(argument, dim), "`{argument}` {shape} for {call:?}");
                    }
                    (_, other) => panic!("{other:?} for {call:?}"),
                }
            }
            let right = self.size(dim);
            let wrong =
                if dim == Branches { [3 - right; 3] } else { [right + 1, 2 * right, (1 << 31) - seed % 8] };
            for wrong in wrong {
                let call = self.with_size(dim, wrong);
                match call.run().unwrap_err() {
                    Error::Length { argument, expected, got, .. } => {
                        assert!(call.depends(argument, dim), "`{argument}` for {call:?}");
                        let (_, dims) =
                            call.tensors().into_iter().find(|(name, _)| *name == argument).unwrap();
                        assert_eq!(Some(expected), call.elements(&dims), "{call:?}");
                        assert_eq!(got, call.lengths[argument], "{call:?}");
                    }
                    other => panic!("{other:?} for {call:?}"),
                }
            }
        }
        // Two sizes that are possible each, but not together.
        let layer_sizes: Vec<Dim> =
            [Batch, Tokens, In, Out].into_iter().filter(|dim| self.op.sizes().contains(dim)).collect();
        for (i, &first) in layer_sizes.iter().enumerate().filter(|_| self.op.is_layer()) {
            for &second in &layer_sizes[..i] {
                match self.with_size(first, 1 << 31).with_size(second, 1 << 31).run().unwrap_err() {
                    Error::Overflow { argument, .. } => {
                        assert!(
                            self.depends(argument, first) && self.depends(argument, second),
                            "{argument}"
                        );
                    }
                    other => panic!("{other:?} for {first:?} and {second:?} of {self:?}"),
                }
            }
        }
        if self.op.has_scale() {
            for scale in NOT_FINITE {
                assert_error(Self { scale, ..self.clone() }.run(), value("scale", "finite", scale));
            }
        }
        if self.op.is_layer() && self.generated() && self.size(Batch) > 1 {
            let first_sample = (1 << 56) - 1;
            let got = first_sample as f64;
            assert_error(
                Self { first_sample, ..self.clone() }.run(),
                value("first_sample", "at most 2^56 with the batch added", got),
            );
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    (0..OPS.len()).prop_map(|i| OPS[i])
}

proptest! {
    #![proptest_config(cases(3000))]

    #[test]
    fn one_corruption_gives_its_error(
        op in op(),
        sizes in prop::array::uniform8(1usize..5),
        shared_input: bool,
        options: u32,
        seed: usize,
    ) {
        Call::new(op, sizes, shared_input, options).check_corruptions(seed);
    }
}

proptest! {
    #![proptest_config(cases(50_000))]

    /// Sizes and lengths that have nothing to do with each other: an error unless they happen to fit, never a panic.
    #[test]
    fn garbage_is_refused(
        op in op(),
        sizes in prop::array::uniform8(any_size()),
        shared_input: bool,
        options: u32,
        lengths in prop::collection::vec(0usize..40, 16),
        fitting in any::<u32>(),
        scale in prop::num::f64::ANY,
        first_sample in 0..1u64 << 56,
    ) {
        let mut call = Call { op, sizes, shared_input, options, scale, first_sample, lengths: BTreeMap::new() };
        if matches!(op, DropPath | DropPathBackward) {
            call.sizes[Batch as usize] %= 40; // The mask exists, so its length is an honest one.
        }
        let tensors = call.tensors();
        for (i, ((name, dims), random)) in tensors.iter().zip(lengths).enumerate() {
            let fits = call.elements(dims).filter(|&len| len <= 1024 && fitting >> (2 * i) & 3 != 0);
            call.lengths.insert(name, fits.unwrap_or(random));
        }
        if call.run().is_ok() {
            for (name, dims) in tensors {
                prop_assert_eq!(call.elements(&dims), Some(call.lengths[name]), "{}", name);
            }
            prop_assert!(op.sizes().iter().all(|&dim| call.size(dim) > 0));
            prop_assert!(!op.has_scale() || scale.is_finite());
        }
    }
}

#[test]
fn parts_that_a_dense_layer_does_not_have() {
    let shape = LinearShape {
        branches: 1,
        batch: 1,
        tokens: 1,
        in_features: 2,
        out_features: 1,
        shared_input: false,
    };
    let headless = NoisyLinear {
        shape,
        noise: Noise::Off,
        base: None,
        delta_weight: None,
        delta_bias: None,
        fold: true,
    };
    let want =
        Error::Argument { argument: "delta_weight", problem: "is required when there is no base term" };
    assert_error(headless.forward(&[1.0, 2.0], &mut [0.0]), want);
    let frozen = NoisyLinear { base: Some(Base { weight: &[1.0, 2.0], bias: None }), ..headless };
    let grads: NoisyLinearGrads<&mut [_]> =
        NoisyLinearGrads { delta_weight: Some(&mut [0.0; 2]), ..Default::default() };
    let want = Error::Argument {
        argument: "grads.delta_weight",
        problem: "is asked for, but the layer has no `delta_weight`",
    };
    assert_error(frozen.backward(&[1.0, 2.0], &[1.0], grads), want);
}

#[test]
fn empty_mask() {
    let want = size("mask.len()", "at least 1", 0);
    assert_error(shared_drop_path::<f32>(1, 1, &[], &[], &mut []), want);
}

/// The epilogue reads no input features, so their number is not looked at.
#[test]
fn epilogue_has_no_in_features() {
    for in_features in [0, 1, usize::MAX] {
        let shape = LinearShape {
            branches: 1,
            batch: 1,
            tokens: 1,
            in_features,
            out_features: 2,
            shared_input: true,
        };
        noisy_epilogue(shape, Noise::Off, &[1.0, 2.0], &mut [0.0; 2]).unwrap();
    }
}

/// The counts of any shape can be asked for; an operator then refuses the impossible ones.
#[test]
fn counts_of_impossible_shapes_saturate() {
    let huge = usize::MAX;
    for shared_input in [false, true] {
        let shape = LinearShape {
            branches: huge,
            batch: huge,
            tokens: huge,
            in_features: huge,
            out_features: huge,
            shared_input,
        };
        assert_eq!((shape.samples(), shape.out_rows(), shape.in_rows()), (huge, huge, huge));
    }
}

#[test]
fn merging_needs_equal_lengths() {
    for merge in [merge::<f64>, unmerge] {
        let mut target = [1.0; 3];
        let want = Error::Length { argument: "delta", shape: "[target.len()]", expected: 3, got: 2 };
        assert_error(merge(&mut target, &[1.0; 2]), want);
        assert_eq!(target, [1.0; 3]);
    }
}
