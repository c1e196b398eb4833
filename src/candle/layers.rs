//! Noisy layers and the state they share.

use super::ops::{
    DropPathKernel, FrozenLinear, Layer, LayerNoise, apply1, lora_mul_linear, low_rank_linear, noisy_linear,
    wrap,
};
use crate::adapter::Adapter;
use crate::cpu::{Lora, Prompt};
use crate::noise::{Generator, Key, NoiseShape};
use crate::shape::LinearShape;
use candle_core::{Module, Result, Tensor};
use candle_nn::Linear;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// What all noisy layers of one model share; clones are handles to the same state.
///
/// Starts in evaluation: no noise, one branch.
#[derive(Debug, Clone)]
pub struct PaceContext(Arc<RwLock<State>>);

#[derive(Debug)]
struct State {
    seed: u64,
    /// Of the step in training; `None` is evaluation.
    step: Option<u64>,
    branches: usize,
    first_sample: u64,
    given: HashMap<String, Tensor>,
}

impl PaceContext {
    /// The context of a run that draws its noise from `seed`.
    pub fn new(seed: u64) -> Self {
        let state = State { seed, step: None, branches: 1, first_sample: 0, given: HashMap::new() };
        Self(Arc::new(RwLock::new(state)))
    }

    /// Turns to training step `step` with one or two branches; `first_sample` is the batch's place in the global one.
    ///
    /// # Errors
    /// If `branches` is not 1 or 2.
    pub fn train(&self, step: u64, branches: usize, first_sample: u64) -> Result<()> {
        if !(1..=2).contains(&branches) {
            candle_core::bail!("`branches` is {branches}, expected 1 or 2");
        }
        self.change(|state| {
            state.step = Some(step);
            state.branches = branches;
            state.first_sample = first_sample;
        });
        Ok(())
    }

    /// Turns to evaluation: no noise, one branch.
    pub fn evaluate(&self) {
        self.change(|state| {
            state.step = None;
            state.branches = 1;
        });
    }

    /// Branches of the current step.
    pub fn branches(&self) -> usize {
        self.read(|state| state.branches)
    }

    /// Replaces the noise of the layer `name` in training by `z`, `[R, N]` (or `[R, 1, N]`) or `[R, T, N]`; `None` gives it back.
    ///
    /// `z` is where the layer's tensors are and of their type, and takes no gradient; on CUDA it is rounded to `F32`. A layer
    /// with σ = 0 has no noise to replace.
    pub fn set_noise(&self, name: &str, z: Option<Tensor>) {
        self.change(|state| match z {
            Some(z) => state.given.insert(name.to_owned(), z),
            None => state.given.remove(name),
        });
    }

    /// One copy of the rows of `x` per branch: for models that let the branches part at their input.
    ///
    /// # Errors
    /// If `x` is a scalar.
    pub fn branch(&self, x: &Tensor) -> Result<Tensor> {
        match self.branches() {
            1 => Ok(x.clone()),
            _ => Tensor::cat(&[x, x], 0),
        }
    }

    fn read<R>(&self, body: impl FnOnce(&State) -> R) -> R {
        // A panic elsewhere cannot leave the state half changed.
        body(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change<R>(&self, body: impl FnOnce(&mut State) -> R) -> R {
        body(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A linear layer with a noisy adapter: frozen base, trained adapter, `z` from the context.
#[derive(Debug, Clone)]
pub struct PaceLinear {
    pub(super) name: String,
    pub(super) layer: u32,
    pub(super) context: PaceContext,
    pub(super) sigma: f32,
    pub(super) noise_shape: NoiseShape,
    pub(super) scale: f64,
    pub(super) exact: bool,
    pub(super) base: FrozenLinear,
    pub(super) parameters: Parameters,
}

/// What is trained; names and shapes in [`adapter`](crate::adapter).
#[derive(Debug, Clone)]
pub(super) enum Parameters {
    LoraAdd {
        lora_b: Tensor,
        lora_a: Tensor,
        delta_bias: Tensor,
    },
    LoraMulVptAdd {
        lora_b: Tensor,
        lora_a: Tensor,
        delta_bias: Tensor,
        prompt_down: Tensor,
        prompt_up: Tensor,
    },
    VptAdd {
        prompt_down: Tensor,
        prompt_up: Tensor,
    },
    /// ΔW and Δb of the caller's own making.
    Dense {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    /// The base itself, under noise: its weight and bias take gradients.
    Head,
    /// Nothing, and no noise: a layer that a PEFT adapter leaves as it is.
    Frozen,
}

/// What an adapter file holds of a layer.
pub(super) enum Saved<'a> {
    Lora {
        lora_b: &'a Tensor,
        lora_a: &'a Tensor,
        delta_bias: &'a Tensor,
        scale: f64,
    },
    Head {
        weight: &'a Tensor,
        bias: Option<&'a Tensor>,
    },
    Nothing,
    /// It has parameters that are not those of LoRA add.
    Other(&'static str),
}

impl PaceLinear {
    /// Whether the layer perturbs its adapter in training; if not, its branches stay equal.
    pub fn is_noisy(&self) -> bool {
        self.sigma > 0.0
    }

    /// The name that it was wrapped under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets the branches part: `B` rows in, `branches·B` differently perturbed rows out.
    ///
    /// The rows that both branches share go through the GEMMs once. In evaluation, or with one branch, it is
    /// [`forward`](Module::forward).
    ///
    /// # Errors
    /// If the features of `x` do not fit the layer.
    pub fn forward_branching(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true)
    }

    /// The plain layer with the adapter folded in, `W0 + ΔW` and `b0 + Δb`: what evaluation computes.
    ///
    /// # Errors
    /// None in practice; candle's operations return results.
    pub fn merged(&self) -> Result<Linear> {
        let FrozenLinear { weight, bias } = &self.base;
        let low_rank = |lora_b: &Tensor, lora_a: &Tensor| lora_b.matmul(lora_a)? * self.scale;
        let prompted = |down: &Tensor, up: &Tensor| weight.matmul(&down.matmul(up)?)?.squeeze(1);
        let (delta_weight, delta_bias) = match &self.parameters {
            Parameters::LoraAdd { lora_b, lora_a, delta_bias } => {
                (Some(low_rank(lora_b, lora_a)?), Some(delta_bias.clone()))
            }
            Parameters::LoraMulVptAdd { lora_b, lora_a, delta_bias, prompt_down, prompt_up } => {
                let mut prompted = prompted(prompt_down, prompt_up)?;
                if let Some(bias) = bias {
                    prompted = (prompted + (bias * delta_bias)?)?;
                }
                (Some((weight * low_rank(lora_b, lora_a)?)?), Some(prompted))
            }
            Parameters::VptAdd { prompt_down, prompt_up } => (None, Some(prompted(prompt_down, prompt_up)?)),
            Parameters::Dense { weight, bias } => (Some(weight.clone()), bias.clone()),
            Parameters::Head | Parameters::Frozen => (None, None),
        };
        let weight = delta_weight.map_or(Ok(weight.clone()), |delta| weight + delta)?;
        let bias = match (bias, delta_bias) {
            (Some(bias), Some(delta)) => Some((bias + delta)?),
            (bias, delta) => delta.or_else(|| bias.clone()),
        };
        Ok(Linear::new(weight.detach(), bias.map(|bias| bias.detach())))
    }

    /// What an adapter file holds of this layer.
    pub(super) fn saved(&self) -> Saved<'_> {
        match &self.parameters {
            Parameters::LoraAdd { lora_b, lora_a, delta_bias } => {
                Saved::Lora { lora_b, lora_a, delta_bias, scale: self.scale }
            }
            Parameters::LoraMulVptAdd { .. } => Saved::Other(Adapter::LoraMulVptAdd.name()),
            Parameters::VptAdd { .. } => Saved::Other(Adapter::VptAdd.name()),
            Parameters::Dense { .. } => Saved::Other("a dense ΔW"),
            Parameters::Head => Saved::Head { weight: &self.base.weight, bias: self.base.bias.as_ref() },
            Parameters::Frozen => Saved::Nothing,
        }
    }

    /// Sizes and noise of one call.
    fn plan(&self, x: &Tensor, branching: bool) -> Result<(LinearShape, LayerNoise)> {
        let dims = x.dims();
        let [rows, middle @ .., in_features] = dims else {
            candle_core::bail!("`{}` needs [rows, …, features], got {dims:?}", self.name);
        };
        let (out_features, expected) = self.base.weight.dims2()?;
        if *in_features != expected {
            candle_core::bail!("`{}` has {expected} in-features, got {dims:?}", self.name);
        }
        let shape = |branches, batch| LinearShape {
            branches,
            batch,
            tokens: middle.iter().product(),
            in_features: expected,
            out_features,
            shared_input: branching && branches > 1,
        };
        self.context.read(|state| {
            let Some(step) = state.step.filter(|_| self.is_noisy()) else {
                // Without noise the branches are just rows.
                let branches = if branching { state.branches } else { 1 };
                return Ok((shape(branches, *rows), LayerNoise::Off));
            };
            let batch = if branching { *rows } else { rows / state.branches };
            if !branching && rows % state.branches != 0 {
                candle_core::bail!(
                    "`{}`: {rows} rows do not divide into {} branches",
                    self.name,
                    state.branches
                );
            }
            let shape = shape(state.branches, batch);
            let noise = match state.given.get(&self.name) {
                Some(z) => {
                    // As many elements in another order would be the noise of others.
                    let (rows, dims) = (shape.samples(), z.dims());
                    if dims.first() != Some(&rows) || dims.last() != Some(&out_features) {
                        candle_core::bail!(
                            "`{}`: z is {dims:?}, expected [{rows}, …, {out_features}]",
                            self.name
                        );
                    }
                    LayerNoise::Given(z.contiguous()?, self.noise_shape)
                }
                None => LayerNoise::Generated(wrap(Generator::new(
                    Key::derive(state.seed, step, self.layer),
                    self.sigma,
                    self.noise_shape,
                    state.first_sample,
                ))?),
            };
            Ok((shape, noise))
        })
    }

    fn run(&self, x: &Tensor, branching: bool) -> Result<Tensor> {
        let (shape, noise) = self.plan(x, branching)?;
        let base = match self.parameters {
            Parameters::Head | Parameters::Frozen => None,
            _ => Some(self.base.clone()),
        };
        let layer = Layer { shape, noise, base, exact: self.exact };
        match &self.parameters {
            Parameters::LoraAdd { lora_b, lora_a, delta_bias } => {
                low_rank_linear(layer, x, lora_b, lora_a, delta_bias, self.scale)
            }
            Parameters::LoraMulVptAdd { lora_b, lora_a, delta_bias, prompt_down: down, prompt_up: up } => {
                let lora = Lora { rank: lora_a.dim(0)?, lora_a, lora_b, scale: self.scale };
                let prompt = Prompt { rank: down.dim(1)?, down, up };
                lora_mul_linear(layer, x, Some(lora), Some(prompt), Some(delta_bias))
            }
            Parameters::VptAdd { prompt_down: down, prompt_up: up } => {
                lora_mul_linear(layer, x, None, Some(Prompt { rank: down.dim(1)?, down, up }), None)
            }
            Parameters::Dense { weight, bias } => noisy_linear(layer, x, weight, bias.as_ref()),
            Parameters::Head | Parameters::Frozen => {
                noisy_linear(layer, x, &self.base.weight, self.base.bias.as_ref())
            }
        }
    }
}

impl Module for PaceLinear {
    /// Rows of all branches in, as many out.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false)
    }
}

/// DropPath that drops the same samples in both branches, and divides its mask by the mask's own mean.
#[derive(Debug, Clone)]
pub struct SharedDropPath {
    pub(super) layer: u32,
    pub(super) context: PaceContext,
    pub(super) probability: f64,
}

impl SharedDropPath {
    /// Drops samples among rows that hold `branches` copies of the batch: 1 before the branches part.
    ///
    /// # Errors
    /// If the rows do not divide into the branches.
    pub fn forward_rows(&self, x: &Tensor, branches: usize) -> Result<Tensor> {
        let planned = self.context.read(|state| {
            let step = state.step.filter(|_| self.probability > 0.0)?;
            Some((Key::derive(state.seed, step, self.layer), state.first_sample))
        });
        let Some((key, first_sample)) = planned else { return Ok(x.clone()) };
        let rows = x.dim(0)?;
        if rows == 0 || branches == 0 || rows % branches != 0 {
            candle_core::bail!("DropPath: {rows} rows do not divide into {branches} branches");
        }
        let (batch, features, probability) = (rows / branches, x.elem_count() / rows, self.probability);
        apply1(DropPathKernel { branches, batch, features, key, probability, first_sample }, x)
    }
}
