//! Wrong arguments give the typed error that names them, before any output is touched; nothing panics or allocates
//! by a size that no slice backs.

use Dim::{Batch, Branches, Features, In, Out, Rank, Samples, Tokens};
use pace_kernels::adapter::{Adapter, Init, Parameter};
use pace_kernels::cpu::{
    Base, Consistency, LoraFactors, LoraGrads, Loss, LowRankGrads, LowRankLinear, NoisyLinear,
    NoisyLinearGrads, PromptBias, PromptGrads, fp_distance, lora_mul_weight, lora_mul_weight_backward,
    low_rank_weight, low_rank_weight_backward, merge, noisy_epilogue, noisy_epilogue_backward,
    shared_drop_path, shared_drop_path_backward, unmerge,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape, drop_path_mask};
use pace_kernels::schedule::{LazySchedule, sigma_by_block};
use pace_kernels::{Error, LinearShape, Result};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What lies in outputs beforehand.
const UNTOUCHED: f64 = 1234.5;
/// Every tensor of this many elements overflows the address space.
const OVERFLOWS: [usize; 4] = [1 << 60, 1 << 63, usize::MAX - 1, usize::MAX];
const NOT_FINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// NaN differs from itself, so errors are compared as text.
fn assert_error<T: std::fmt::Debug>(result: Result<T>, want: Error) {
    assert_eq!(format!("{result:?}"), format!("{:?}", Err::<T, _>(want)));
}

fn value(argument: &'static str, expected: &'static str, got: f64) -> Error {
    Error::Value { argument, expected, got }
}

fn size(argument: &'static str, expected: &'static str, got: usize) -> Error {
    Error::Size { argument, expected, got }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dim {
    Branches,
    Batch,
    Tokens,
    In,
    Out,
    Rank,
    Features,
    Samples,
}

impl Dim {
    fn argument(self) -> &'static str {
        match self {
            Branches => "branches",
            Batch => "batch",
            Tokens => "tokens",
            In => "in_features",
            Out => "out_features",
            Rank => "rank",
            Features => "features",
            Samples => "samples",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Dense,
    DenseBackward,
    LowRank,
    LowRankBackward,
    Epilogue,
    EpilogueBackward,
    LoraAdd,
    LoraAddBackward,
    LoraMul,
    LoraMulBackward,
    Prompt,
    PromptBackward,
    DropPath,
    DropPathBackward,
    FpDistance,
}
use Op::*;

const OPS: [Op; 15] = [
    Dense,
    DenseBackward,
    LowRank,
    LowRankBackward,
    Epilogue,
    EpilogueBackward,
    LoraAdd,
    LoraAddBackward,
    LoraMul,
    LoraMulBackward,
    Prompt,
    PromptBackward,
    DropPath,
    DropPathBackward,
    FpDistance,
];

impl Op {
    /// The sizes that the caller states; the length of the DropPath mask states the batch.
    fn sizes(self) -> &'static [Dim] {
        match self {
            Dense | DenseBackward => &[Branches, Batch, Tokens, In, Out],
            LowRank | LowRankBackward => &[Branches, Batch, Tokens, In, Out, Rank],
            Epilogue | EpilogueBackward => &[Branches, Batch, Tokens, Out],
            LoraAdd | LoraAddBackward | LoraMul | LoraMulBackward | Prompt | PromptBackward => {
                &[In, Out, Rank]
            }
            DropPath | DropPathBackward => &[Branches, Features],
            FpDistance => &[Samples, Features],
        }
    }

    fn is_layer(self) -> bool {
        self.sizes().contains(&Tokens)
    }

    fn has_scale(self) -> bool {
        self.sizes().contains(&Rank) && !matches!(self, Prompt | PromptBackward)
    }
}

/// A call of one operator, in a form that can be corrupted piece by piece.
#[derive(Debug, Clone)]
struct Call {
    op: Op,
    /// By `Dim`.
    sizes: [usize; 8],
    shared_input: bool,
    /// Bits that choose what is optional.
    options: u32,
    scale: f64,
    first_sample: u64,
    /// Elements of each tensor that is there.
    lengths: BTreeMap<&'static str, usize>,
}

impl Call {
    /// A correct call.
    fn new(op: Op, sizes: [usize; 8], shared_input: bool, options: u32) -> Self {
        let mut call =
            Self { op, sizes, shared_input, options, scale: 1.5, first_sample: 3, lengths: BTreeMap::new() };
        call.sizes[Branches as usize] = call.size(Branches).clamp(1, 2);
        call.lengths =
            call.tensors().into_iter().map(|(name, dims)| (name, call.elements(&dims).unwrap())).collect();
        call
    }

    fn size(&self, dim: Dim) -> usize {
        self.sizes[dim as usize]
    }

    fn elements(&self, dims: &[Dim]) -> Option<usize> {
        dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(self.size(dim)))
    }

    fn has(&self, bit: u32) -> bool {
        self.options >> bit & 1 == 1
    }

    fn has_base(&self) -> bool {
        self.has(0) || !self.has(1)
    }

    /// The shape of `z` if it is given.
    fn given(&self) -> Option<NoiseShape> {
        let shape = if self.has(5) { NoiseShape::PerSample } else { NoiseShape::PerToken };
        (self.has(6) && self.has(7)).then_some(shape)
    }

    fn generated(&self) -> bool {
        self.has(6) && !self.has(7)
    }

    /// Every tensor that is there, with its dimensions.
    fn tensors(&self) -> Vec<(&'static str, Vec<Dim>)> {
        let x = if self.shared_input { vec![Batch, Tokens, In] } else { vec![Branches, Batch, Tokens, In] };
        let y = vec![Branches, Batch, Tokens, Out];
        let features = vec![Branches, Batch, Features];
        let mut all: Vec<(bool, &'static str, Vec<Dim>)> = Vec::new();
        let layer = self.op.is_layer();
        all.push((layer && self.given() == Some(NoiseShape::PerSample), "z", vec![Branches, Batch, Out]));
        all.push((layer && self.given() == Some(NoiseShape::PerToken), "z", y.clone()));
        if matches!(self.op, Dense | DenseBackward | LowRank | LowRankBackward) {
            all.push((self.has_base(), "base.weight", vec![Out, In]));
            all.push((self.has_base() && self.has(2), "base.bias", vec![Out]));
            all.push((self.has(3), "delta_bias", vec![Out]));
            all.push((true, "x", x.clone()));
        }
        match self.op {
            Dense | DenseBackward => all.push((self.has(1), "delta_weight", vec![Out, In])),
            LowRank | LowRankBackward | LoraAdd | LoraAddBackward | LoraMul | LoraMulBackward => {
                all.push((true, "lora_b", vec![Out, Rank]));
                all.push((true, "lora_a", vec![Rank, In]));
            }
            Prompt | PromptBackward => {
                all.push((true, "base_weight", vec![Out, In]));
                all.push((self.has(2), "base_bias", vec![Out]));
                all.push((self.has(3), "delta_bias", vec![Out]));
                all.push((true, "prompt_down", vec![In, Rank]));
                all.push((true, "prompt_up", vec![Rank]));
            }
            _ => {}
        }
        match self.op {
            Dense | LowRank => all.push((true, "y", y)),
            DenseBackward | LowRankBackward => {
                all.push((true, "dy", y));
                all.push((self.has(8), "grads.input", x));
                all.push((self.has(9), "grads.delta_bias", vec![Out]));
                if self.op == DenseBackward {
                    all.push((self.has(1) && self.has(10), "grads.delta_weight", vec![Out, In]));
                } else {
                    all.push((self.has(10), "grads.lora_b", vec![Out, Rank]));
                    all.push((self.has(11), "grads.lora_a", vec![Rank, In]));
                }
            }
            Epilogue => all.extend([(true, "a", y.clone()), (true, "y", y)]),
            EpilogueBackward => all.extend([(true, "dy", y.clone()), (true, "da", y)]),
            LoraAdd | LoraMul => all.push((true, "out", vec![Out, In])),
            LoraAddBackward | LoraMulBackward => {
                all.push((true, "delta_weight_grad", vec![Out, In]));
                all.push((true, "grads.lora_b", vec![Out, Rank]));
                all.push((true, "grads.lora_a", vec![Rank, In]));
            }
            Prompt => all.push((true, "out", vec![Out])),
            PromptBackward => {
                all.push((true, "delta_bias_grad", vec![Out]));
                all.push((true, "grads.prompt_down", vec![In, Rank]));
                all.push((true, "grads.prompt_up", vec![Rank]));
                all.push((self.has(9), "grads.delta_bias", vec![Out]));
            }
            DropPath => all.extend([(true, "x", features.clone()), (true, "y", features)]),
            DropPathBackward => all.extend([(true, "dy", features.clone()), (true, "dx", features)]),
            FpDistance => {
                all.push((true, "fine_tuned", vec![Samples, Features]));
                all.push((true, "pre_trained", vec![Samples, Features]));
            }
        }
        if matches!(self.op, LoraMul | LoraMulBackward) {
            all.push((true, "base_weight", vec![Out, In]));
        }
        all.into_iter().filter(|tensor| tensor.0).map(|(_, name, dims)| (name, dims)).collect()
    }

    /// Runs the operator; on an error, checks that no output was written.
    fn run(&self) -> Result<()> {
        let inputs: BTreeMap<_, _> =
            self.lengths.iter().map(|(&name, &len)| (name, vec![0.5; len])).collect();
        let optional = |name| inputs.get(name).map(|tensor| &tensor[..]);
        let input = |name| &inputs[name][..];
        let output = |name| self.lengths.get(name).map_or(Vec::new(), |&len| vec![UNTOUCHED; len]);
        let asked = |name, buffer| self.lengths.contains_key(name).then_some(buffer);

        let shape = LinearShape {
            branches: self.size(Branches),
            batch: self.size(Batch),
            tokens: self.size(Tokens),
            in_features: self.size(In),
            out_features: self.size(Out),
            shared_input: self.shared_input,
        };
        let noise = match self.given() {
            Some(shape) => Noise::Given { z: optional("z").unwrap_or(&[]), shape },
            None if self.generated() => {
                let shape = if self.has(5) { NoiseShape::PerSample } else { NoiseShape::PerToken };
                Noise::Generated(Generator::new(Key([1, 2]), 0.5, shape, self.first_sample).unwrap())
            }
            None => Noise::Off,
        };
        let base = optional("base.weight").map(|weight| Base { weight, bias: optional("base.bias") });
        let dense = NoisyLinear {
            shape,
            noise,
            base,
            delta_weight: optional("delta_weight"),
            delta_bias: optional("delta_bias"),
        };
        let (out_features, in_features, rank) = (self.size(Out), self.size(In), self.size(Rank));
        let low_rank = || LowRankLinear {
            shape,
            noise,
            base,
            rank,
            lora_b: input("lora_b"),
            lora_a: input("lora_a"),
            delta_bias: optional("delta_bias"),
            scale: self.scale,
        };
        let lora = || LoraFactors {
            out_features,
            in_features,
            rank,
            lora_b: input("lora_b"),
            lora_a: input("lora_a"),
            scale: self.scale,
        };
        let prompt = || PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: input("base_weight"),
            base_bias: optional("base_bias"),
            prompt_down: input("prompt_down"),
            prompt_up: input("prompt_up"),
            delta_bias: optional("delta_bias"),
        };
        let (branches, features) = (self.size(Branches), self.size(Features));
        let mask = || vec![1.0; self.size(Batch)];

        let [mut o1, mut o2, mut o3, mut o4] = match self.op {
            Dense | LowRank | Epilogue | DropPath => ["y", "", "", ""],
            DenseBackward => ["grads.input", "grads.delta_weight", "grads.delta_bias", ""],
            LowRankBackward => ["grads.input", "grads.lora_b", "grads.lora_a", "grads.delta_bias"],
            EpilogueBackward => ["da", "", "", ""],
            LoraAdd | LoraMul | Prompt => ["out", "", "", ""],
            LoraAddBackward | LoraMulBackward => ["grads.lora_b", "grads.lora_a", "", ""],
            PromptBackward => ["grads.prompt_down", "grads.prompt_up", "grads.delta_bias", ""],
            DropPathBackward => ["dx", "", "", ""],
            FpDistance => [""; 4],
        }
        .map(output);
        let result = match self.op {
            Dense => dense.forward(input("x"), &mut o1),
            DenseBackward => {
                let grads = NoisyLinearGrads {
                    input: asked("grads.input", &mut o1[..]),
                    delta_weight: asked("grads.delta_weight", &mut o2[..]),
                    delta_bias: asked("grads.delta_bias", &mut o3[..]),
                };
                dense.backward(input("x"), input("dy"), grads)
            }
            LowRank => low_rank().forward(input("x"), &mut o1),
            LowRankBackward => {
                let grads = LowRankGrads {
                    input: asked("grads.input", &mut o1[..]),
                    lora_b: asked("grads.lora_b", &mut o2[..]),
                    lora_a: asked("grads.lora_a", &mut o3[..]),
                    delta_bias: asked("grads.delta_bias", &mut o4[..]),
                };
                low_rank().backward(input("x"), input("dy"), grads)
            }
            Epilogue => noisy_epilogue(shape, noise, input("a"), &mut o1),
            EpilogueBackward => noisy_epilogue_backward(shape, noise, input("dy"), &mut o1),
            LoraAdd => low_rank_weight(lora(), &mut o1),
            LoraMul => lora_mul_weight(lora(), input("base_weight"), &mut o1),
            LoraAddBackward => {
                let grads = LoraGrads { lora_b: &mut o1, lora_a: &mut o2 };
                low_rank_weight_backward(lora(), input("delta_weight_grad"), grads)
            }
            LoraMulBackward => {
                let grads = LoraGrads { lora_b: &mut o1, lora_a: &mut o2 };
                lora_mul_weight_backward(lora(), input("base_weight"), input("delta_weight_grad"), grads)
            }
            Prompt => prompt().forward(&mut o1),
            PromptBackward => {
                let grads = PromptGrads {
                    prompt_down: &mut o1,
                    prompt_up: &mut o2,
                    delta_bias: asked("grads.delta_bias", &mut o3[..]),
                };
                prompt().backward(input("delta_bias_grad"), grads)
            }
            DropPath => shared_drop_path(branches, features, &mask(), input("x"), &mut o1),
            DropPathBackward => shared_drop_path_backward(branches, features, &mask(), input("dy"), &mut o1),
            FpDistance => {
                fp_distance(self.size(Samples), features, input("fine_tuned"), input("pre_trained")).map(drop)
            }
        };
        let written = [o1, o2, o3, o4].concat().iter().any(|&v| v != UNTOUCHED);
        assert!(result.is_ok() || !written, "{result:?}, but outputs were written: {self:?}");
        result
    }

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

fn any_size() -> impl Strategy<Value = usize> {
    let hostile = [0, 0, 1, 2, 255, 1 << 16, 1 << 31, 1 << 32, (1 << 32) - 2, 1 << 40, 1 << 59];
    prop_oneof![6 => 1usize..5, 1 => (0..hostile.len()).prop_map(move |i| hostile[i]), 1 => any::<usize>()]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

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
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(50_000) })]

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

/// A call of the loss, in a form that can be corrupted piece by piece.
#[derive(Debug, Clone)]
struct LossCall {
    classes: usize,
    labels: Vec<i64>,
    lambda: f64,
    label_smoothing: f64,
    ignore_label: Option<i64>,
    two_branches: bool,
    logits: usize,
    gradient: Option<usize>,
    /// Elements of the table, and the index.
    history: Option<(usize, Vec<i64>)>,
}

impl LossCall {
    /// Runs the loss; on an error, checks that neither the gradient nor the history was written.
    fn run(&self) -> Result<()> {
        let &Self { classes, ref labels, lambda, label_smoothing, ignore_label, .. } = self;
        let loss = Loss { classes, labels, lambda, label_smoothing, ignore_label };
        let logits = vec![0.5; self.logits];
        let mut gradient = self.gradient.map(|len| vec![UNTOUCHED; len]);
        let mut table = vec![UNTOUCHED; self.history.as_ref().map_or(0, |history| history.0)];
        let consistency = match &self.history {
            Some((_, index)) => Consistency::History { table: &mut table, index },
            None if self.two_branches => Consistency::TwoBranch,
            None => Consistency::None,
        };
        let result = loss.evaluate(&logits, consistency, gradient.as_deref_mut()).map(drop);
        let mut outputs = gradient.iter().flatten().chain(&table);
        assert!(result.is_ok() || outputs.all(|&v| v == UNTOUCHED), "{result:?}, but outputs were written");
        result
    }

    fn check(&self, corrupt: impl FnOnce(&mut Self), want: Error) {
        let mut call = self.clone();
        corrupt(&mut call);
        assert_error(call.run(), want);
    }

    fn check_corruptions(&self, seed: usize) {
        self.run().unwrap_or_else(|error| panic!("{error} for a correct call {self:?}"));
        let (classes, batch, logits) = (self.classes, self.labels.len(), self.logits);
        let shape = if self.two_branches { "[2B, C]" } else { "[B, C]" };
        let length = |argument, shape, expected, got| Error::Length { argument, shape, expected, got };

        self.check(|c| c.classes = 0, size("classes", "at least 1", 0));
        self.check(|c| c.labels.clear(), size("labels.len()", "at least 1", 0));
        for huge in OVERFLOWS {
            self.check(|c| c.classes = huge, Error::Overflow { argument: "logits", shape });
        }
        for more in [classes + 1, 2 * classes, 1 << 40] {
            self.check(|c| c.classes = more, length("logits", shape, logits / classes * more, logits));
        }
        for wrong in [0, logits - 1, logits + 1, logits * 2] {
            self.check(|c| c.logits = wrong, length("logits", shape, logits, wrong));
            self.check(|c| c.gradient = Some(wrong), length("gradient", shape, logits, wrong));
        }
        for bad in [-1.0, -f64::MIN_POSITIVE].into_iter().chain(NOT_FINITE) {
            self.check(|c| c.lambda = bad, value("lambda", "finite and not negative", bad));
        }
        for bad in [-0.1, 1.0 + f64::EPSILON].into_iter().chain(NOT_FINITE) {
            self.check(|c| c.label_smoothing = bad, value("label_smoothing", "in [0, 1]", bad));
        }
        let position = seed % batch;
        for label in [-1, classes as i64, i64::MIN, i64::MAX] {
            self.check(|c| c.labels[position] = label, Error::Label { position, label, classes });
        }
        if let Some(label) = self.ignore_label
            && let Some(position) = self.labels.iter().position(|&l| l == label)
        {
            self.check(|c| c.ignore_label = None, Error::Label { position, label, classes });
        }
        let Some((table, index)) = &self.history else { return };
        let rows = table / classes;
        fn history(call: &mut LossCall) -> &mut (usize, Vec<i64>) {
            call.history.as_mut().unwrap()
        }
        for bad in [-1, rows as i64, i64::MIN, i64::MAX] {
            self.check(|c| history(c).1[position] = bad, Error::Index { position, index: bad, rows });
        }
        if position > 0 {
            let repeated = index[seed % position];
            let want = Error::DuplicateIndex { position, index: repeated };
            self.check(|c| history(c).1[position] = repeated, want);
        }
        self.check(|c| history(c).1.push(0), length("index", "[B]", batch, batch + 1));
        self.check(|c| history(c).1.clear(), length("index", "[B]", batch, 0));
        let allowed = "a multiple of the number of classes, and not 0";
        self.check(|c| history(c).0 = 0, size("history.len()", allowed, 0));
        if classes > 1 {
            self.check(|c| history(c).0 += 1, size("history.len()", allowed, table + 1));
        }
    }
}

fn loss_call() -> impl Strategy<Value = LossCall> {
    let sizes = (1usize..6, 1usize..6, 0usize..3, any::<bool>(), any::<bool>());
    (sizes, any::<[u8; 6]>(), 0.0..10.0, 0.0..=1.0).prop_map(
        |((classes, batch, partner, ignore, gradient), draws, lambda, label_smoothing)| {
            let label = |i: usize| match draws[i] as usize {
                draw if ignore && draw % 4 == 0 => -100,
                draw => (draw % classes) as i64,
            };
            let two_branches = partner == 1;
            let logits = if two_branches { 2 } else { 1 } * batch * classes;
            let rows = batch + draws[5] as usize % 3;
            let index = (0..batch).map(|i| ((i + draws[0] as usize) % rows) as i64).collect();
            LossCall {
                classes,
                labels: (0..batch).map(label).collect(),
                lambda,
                label_smoothing,
                ignore_label: ignore.then_some(-100),
                two_branches,
                logits,
                gradient: gradient.then_some(logits),
                history: (partner == 2).then_some((rows * classes, index)),
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn one_corruption_of_the_loss_gives_its_error(call in loss_call(), seed: usize) {
        call.check_corruptions(seed);
    }

    #[test]
    fn garbage_loss_is_refused(
        classes in any_size(),
        labels in prop::collection::vec(prop_oneof![0i64..3, any::<i64>()], 0..4),
        lambda in prop::num::f64::ANY,
        label_smoothing in prop_oneof![0.0..1.0, prop::num::f64::ANY],
        ignore_label: Option<i64>,
        two_branches: bool,
        logits in 0usize..20,
        gradient in prop::option::of(0usize..20),
        history in prop::option::of((0usize..20, prop::collection::vec(-1i64..5, 0..4))),
    ) {
        let call = LossCall {
            classes, labels, lambda, label_smoothing, ignore_label, two_branches, logits, gradient, history,
        };
        if call.run().is_ok() {
            prop_assert!(lambda.is_finite() && lambda >= 0.0 && (0.0..=1.0).contains(&label_smoothing));
            prop_assert!(call.gradient.is_none_or(|len| len == logits));
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
    let headless = NoisyLinear { shape, noise: Noise::Off, base: None, delta_weight: None, delta_bias: None };
    let want =
        Error::Argument { argument: "delta_weight", problem: "is required when there is no base term" };
    assert_error(headless.forward(&[1.0, 2.0], &mut [0.0]), want);
    let frozen = NoisyLinear { base: Some(Base { weight: &[1.0, 2.0], bias: None }), ..headless };
    let grads = NoisyLinearGrads { delta_weight: Some(&mut [0.0; 2]), ..Default::default() };
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

#[test]
fn noise_settings() {
    let generator = |sigma, first| Generator::new(Key([0, 0]), sigma, NoiseShape::PerSample, first).map(drop);
    for sigma in [-1.0, -f32::MIN_POSITIVE, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_error(generator(sigma, 0), value("sigma", "finite and not negative", sigma.into()));
    }
    const SAMPLES: &str = "at most 2^56 with the batch added";
    generator(f32::MAX, (1 << 56) - 1).unwrap();
    for first in [1 << 56, u64::MAX] {
        assert_error(generator(0.0, first), value("first_sample", SAMPLES, first as f64));
    }
    let mask = |probability, first| {
        let mut mask = [UNTOUCHED; 2];
        let result = drop_path_mask(Key([0, 0]), probability, first, &mut mask);
        assert!(result.is_ok() || mask == [UNTOUCHED; 2]);
        result
    };
    for probability in [-0.1, 1.0, 2.0].into_iter().chain(NOT_FINITE) {
        assert_error(mask(probability, 0), value("drop_probability", "in [0, 1)", probability));
    }
    mask(1.0 - f64::EPSILON, (1 << 56) - 2).unwrap();
    for first in [(1 << 56) - 1, u64::MAX - 1, u64::MAX] {
        assert_error(mask(0.0, first), value("first_sample", SAMPLES, first as f64));
    }
}

#[test]
fn schedules() {
    for blocks in [0, (1 << 20) + 1, 1 << 40, usize::MAX] {
        assert_error(sigma_by_block(blocks, 1.0, 0), size("blocks", "1 to 2^20", blocks));
    }
    for sigma in [-1.0].into_iter().chain(NOT_FINITE) {
        assert_error(sigma_by_block(2, sigma, 0), value("sigma", "finite and not negative", sigma));
    }
    for first_noisy in [2, usize::MAX] {
        assert_error(
            sigma_by_block(2, 1.0, first_noisy),
            size("first_noisy", "less than `blocks`", first_noisy),
        );
    }
    assert_error(LazySchedule::new(0), size("interval", "at least 1", 0));
    let lazy = LazySchedule::new(3).unwrap();
    for batch in [0, 1] {
        let want = size("batch", "at least 2 (the lazy variant halves it)", batch);
        assert_error(lazy.two_branch_samples(3, batch), want);
    }
    assert_error(lazy.two_branch_samples(4, 0), size("batch", "at least 1", 0));
    assert_eq!(lazy.two_branch_samples(usize::MAX, usize::MAX), Ok(Some(usize::MAX / 2)));
    assert_eq!(lazy.two_branch_samples(0, 7), Ok(Some(3)));
    assert_eq!(lazy.two_branch_samples(1, 7), Ok(None));
}

#[test]
fn adapter_parameters() {
    for adapter in Adapter::ALL {
        for (argument, [n, k, r]) in
            [("out_features", [0, 1, 1]), ("in_features", [1, 0, 1]), ("rank", [1, 1, 0])]
        {
            assert_error(adapter.parameters(n, k, r), size(argument, "at least 1", 0));
        }
        let want = Error::Overflow { argument: "adapter", shape: "[N + K, r]" };
        for huge in OVERFLOWS {
            for [n, k, r] in [[huge, 1, 1], [1, huge, 1], [1, 1, huge], [huge, huge, huge]] {
                assert_error(adapter.parameters(n, k, r), want.clone());
            }
        }
    }
    let mut rng = rand::rng();
    for parameter in Adapter::LoraMulVptAdd.parameters(3, 4, 2).unwrap() {
        let len = parameter.len();
        for got in [0, len - 1, len + 1] {
            let want =
                Error::Length { argument: parameter.name, shape: "[rows, columns]", expected: len, got };
            assert_error(parameter.initialize(&mut rng, &mut vec![0.0; got]), want);
        }
    }
    let huge =
        Parameter { name: "p", rows: usize::MAX, columns: Some(usize::MAX), init: Init::XavierUniform };
    assert!(huge.xavier_bound() > 0.0);
    let want = Error::Length { argument: "p", shape: "[rows, columns]", expected: usize::MAX, got: 1 };
    assert_error(huge.initialize(&mut rng, &mut [0.0]), want);
}

/// A message names the argument, what was expected and what was given.
#[test]
fn messages() {
    let messages = [
        (
            Error::Length { argument: "base.bias", shape: "[N]", expected: 3, got: 2 },
            "`base.bias` has 2 elements, but its shape [N] needs 3",
        ),
        (size("branches", "1 or 2", 3), "`branches` is 3, expected 1 or 2"),
        (
            Error::Overflow { argument: "x", shape: "[M, K]" },
            "the size of `x` overflows: its shape is [M, K]",
        ),
        (
            value("lambda", "finite and not negative", f64::NAN),
            "`lambda` is NaN, expected finite and not negative",
        ),
        (
            Error::Label { position: 4, label: -7, classes: 10 },
            "`labels[4]` is -7, expected 0..10 or the ignored label",
        ),
        (
            Error::Index { position: 1, index: 9, rows: 5 },
            "`index[1]` is 9, expected 0..5 (the rows of `history`)",
        ),
        (
            Error::DuplicateIndex { position: 1, index: 9 },
            "`index[1]` repeats 9: each history row may occur once in a batch",
        ),
        (Error::Argument { argument: "mask", problem: "is required" }, "`mask` is required"),
    ];
    for (error, message) in messages {
        assert_eq!(error.to_string(), message);
    }
}
