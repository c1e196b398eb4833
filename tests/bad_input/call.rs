//! A call of any operator but the loss, in a form that can be corrupted piece by piece.

use crate::support::UNTOUCHED;
use Dim::{Batch, Branches, Features, In, Out, Rank, Samples, Tokens};
use Op::*;
use pace_kernels::cpu::{
    Base, LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, PromptBias,
    PromptGrads, fp_distance, lora_mul_weight, lora_mul_weight_backward, low_rank_weight,
    low_rank_weight_backward, noisy_epilogue, noisy_epilogue_backward, shared_drop_path,
    shared_drop_path_backward,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use pace_kernels::{LinearShape, Result};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
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
    pub fn argument(self) -> &'static str {
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
pub enum Op {
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
pub const OPS: [Op; 15] = [
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
    pub fn sizes(self) -> &'static [Dim] {
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

    pub fn is_layer(self) -> bool {
        self.sizes().contains(&Tokens)
    }

    pub fn has_scale(self) -> bool {
        self.sizes().contains(&Rank) && !matches!(self, Prompt | PromptBackward)
    }
}

/// A call of one operator, in a form that can be corrupted piece by piece.
#[derive(Debug, Clone)]
pub struct Call {
    pub op: Op,
    /// By `Dim`.
    pub sizes: [usize; 8],
    pub shared_input: bool,
    /// Bits that choose what is optional.
    pub options: u32,
    pub scale: f64,
    pub first_sample: u64,
    /// Elements of each tensor that is there.
    pub lengths: BTreeMap<&'static str, usize>,
}

impl Call {
    /// A correct call.
    pub fn new(op: Op, sizes: [usize; 8], shared_input: bool, options: u32) -> Self {
        let mut call =
            Self { op, sizes, shared_input, options, scale: 1.5, first_sample: 3, lengths: BTreeMap::new() };
        call.sizes[Branches as usize] = call.size(Branches).clamp(1, 2);
        call.lengths =
            call.tensors().into_iter().map(|(name, dims)| (name, call.elements(&dims).unwrap())).collect();
        call
    }

    pub fn size(&self, dim: Dim) -> usize {
        self.sizes[dim as usize]
    }

    pub fn elements(&self, dims: &[Dim]) -> Option<usize> {
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

    pub fn generated(&self) -> bool {
        self.has(6) && !self.has(7)
    }

    /// Every tensor that is there, with its dimensions.
    pub fn tensors(&self) -> Vec<(&'static str, Vec<Dim>)> {
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
    pub fn run(&self) -> Result<()> {
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
            fold: true,
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
                let grads: NoisyLinearGrads<&mut [_]> = NoisyLinearGrads {
                    input: asked("grads.input", &mut o1[..]),
                    delta_weight: asked("grads.delta_weight", &mut o2[..]),
                    delta_bias: asked("grads.delta_bias", &mut o3[..]),
                };
                dense.backward(input("x"), input("dy"), grads)
            }
            LowRank => low_rank().forward(input("x"), &mut o1),
            LowRankBackward => {
                let grads: LowRankGrads<&mut [_]> = LowRankGrads {
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
                let grads: LoraGrads<&mut [_]> = LoraGrads { lora_b: &mut o1, lora_a: &mut o2 };
                low_rank_weight_backward(lora(), input("delta_weight_grad"), grads)
            }
            LoraMulBackward => {
                let grads: LoraGrads<&mut [_]> = LoraGrads { lora_b: &mut o1, lora_a: &mut o2 };
                lora_mul_weight_backward(lora(), input("base_weight"), input("delta_weight_grad"), grads)
            }
            Prompt => prompt().forward(&mut o1),
            PromptBackward => {
                let grads: PromptGrads<&mut [_]> = PromptGrads {
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
}
