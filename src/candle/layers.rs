//! Noisy layers, the state they share, and how they get into a model.

use super::ops::{
    DropPathKernel, FrozenLinear, Layer, LayerNoise, apply1, lora_mul_linear, low_rank_linear, noisy_linear,
    wrap,
};
use crate::adapter::{self, Adapter, Init, Parameter};
use crate::cpu::{Lora, Prompt};
use crate::noise::{Generator, Key, NoiseShape};
use crate::shape::LinearShape;
use candle_core::{Module, Result, Tensor};
use candle_nn::{Linear, VarBuilder};
use std::collections::{BTreeMap, HashMap};
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

    /// Replaces the noise of the layer `name` in training by `z`, `[R, N]` or `[R, T, N]`; `None` gives it back.
    ///
    /// `z` is where the layer's tensors are and of their type; on CUDA it is rounded to `F32`. A layer with σ = 0 has no
    /// noise to replace.
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
    name: String,
    layer: u32,
    context: PaceContext,
    sigma: f32,
    noise_shape: NoiseShape,
    scale: f64,
    exact: bool,
    base: FrozenLinear,
    parameters: Parameters,
}

/// What is trained; names and shapes in [`adapter`].
#[derive(Debug, Clone)]
enum Parameters {
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

/// How a PEFT adapter changes one layer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Lora {
        rank: usize,
        scale: f64,
    },
    /// The whole layer was trained.
    Head {
        has_bias: bool,
    },
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
            let noise = match state.given.get(&self.name) {
                Some(z) => LayerNoise::Given(z.contiguous()?, self.noise_shape),
                None => LayerNoise::Generated(wrap(Generator::new(
                    Key::derive(state.seed, step, self.layer),
                    self.sigma,
                    self.noise_shape,
                    state.first_sample,
                ))?),
            };
            Ok((shape(state.branches, batch), noise))
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
    layer: u32,
    context: PaceContext,
    probability: f64,
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

/// Puts adapters and noise on the linear layers of a model while it is built.
///
/// Call [`wrap`](Self::wrap) on every frozen [`Linear`] where the model's constructor makes it, and
/// [`wrap_head`](Self::wrap_head) on the classification head.
pub struct Injector<'a> {
    context: PaceContext,
    adapter: Adapter,
    rank: usize,
    sigma_by_block: Vec<f64>,
    noise_shape: NoiseShape,
    scale: f64,
    exact: bool,
    vars: VarBuilder<'a>,
    layers: u32,
    /// Of a PEFT adapter, in place of one rank and scale for all: by layer, and whether the layer was met.
    changes: Option<BTreeMap<String, (Change, bool)>>,
}

impl<'a> Injector<'a> {
    /// An injector of `adapter` with rank `rank`, σ by block ([`sigma_by_block`](crate::schedule::sigma_by_block)),
    /// and the adapters' parameters from `vars`, under the layer's name and the official parameter names.
    pub fn new(
        context: &PaceContext,
        adapter: Adapter,
        rank: usize,
        sigma_by_block: &[f64],
        vars: VarBuilder<'a>,
    ) -> Self {
        Self {
            context: context.clone(),
            adapter,
            rank,
            sigma_by_block: sigma_by_block.to_vec(),
            noise_shape: NoiseShape::PerSample,
            scale: 1.0,
            exact: false,
            vars,
            layers: 0,
            changes: None,
        }
    }

    /// The same with the layers that `changes` has, each in its way, and all others as they are.
    pub(super) fn with_changes(mut self, changes: impl IntoIterator<Item = (String, Change)>) -> Self {
        self.changes = Some(changes.into_iter().map(|(name, change)| (name, (change, false))).collect());
        self
    }

    /// The same with noise per token (`BTC`) or per sample (`BC`, the default).
    pub fn with_noise_shape(mut self, shape: NoiseShape) -> Self {
        self.noise_shape = shape;
        self
    }

    /// The same with a factor on `B·A` (the α/r of common LoRA code) other than the 1 of the official code. Layers of a PEFT
    /// adapter keep theirs.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }

    /// The same with GEMMs of `W0` and of ΔW, each as given, in both passes, if `exact`: for 16-bit types on CUDA.
    ///
    /// Otherwise a layer under noise may be one GEMM with `W0 + z⊙ΔW`, made in `f32` and rounded once. In `bf16` that attenuates,
    /// in the forward pass of training, LoRA mul whose rms(ΔW/W0) stays below about 1e-3 over a whole training (a learning rate of
    /// 1e-4 or less, and few steps): be exact then. `f16` keeps three bits more. Layers without noise, and evaluation, do not round
    /// so.
    pub fn with_exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// The builder that the trained parameters come from.
    pub fn vars(&self) -> &VarBuilder<'a> {
        &self.vars
    }

    /// The context that the layers will share.
    pub fn context(&self) -> &PaceContext {
        &self.context
    }

    /// Wraps the frozen layer `name` of block `block` with the adapter.
    ///
    /// From a PEFT adapter, it is what the file says of `name`, its module path: LoRA, or a module that was trained as a whole,
    /// with its weight and bias in place of those of `linear`. A layer that the file does not have stays frozen and without
    /// noise.
    ///
    /// # Errors
    /// If the block has no σ, the rank is zero, or a parameter in `vars` has another shape.
    pub fn wrap(&mut self, name: &str, block: usize, linear: Linear) -> Result<PaceLinear> {
        match self.change(name) {
            Some(Change::Lora { rank, scale }) => self.adapted(name, block, &linear, rank, scale),
            Some(Change::Head { .. }) => self.trained(name, block, linear),
            None if self.has_changes() => self.layer(name, block, &linear, Parameters::Frozen, true),
            None => self.adapted(name, block, &linear, self.rank, self.scale),
        }
    }

    /// [`wrap`](Self::wrap), with an adapter.
    fn adapted(
        &mut self,
        name: &str,
        block: usize,
        linear: &Linear,
        rank: usize,
        scale: f64,
    ) -> Result<PaceLinear> {
        let (out_features, in_features) = linear.weight().dims2()?;
        let vars = self.vars.pp(name);
        let mut made = HashMap::new();
        for parameter in wrap(self.adapter.parameters(out_features, in_features, rank))? {
            made.insert(parameter.name, variable(&vars, &parameter)?);
        }
        let mut take = |name: &str| {
            made.remove(name).ok_or_else(|| candle_core::Error::Msg(format!("`{name}` was not made")))
        };
        let parameters = match self.adapter {
            Adapter::LoraAdd => Parameters::LoraAdd {
                lora_b: take(adapter::DOWN)?,
                lora_a: take(adapter::UP)?,
                delta_bias: take(adapter::DELTA_BIAS)?,
            },
            Adapter::LoraMulVptAdd => Parameters::LoraMulVptAdd {
                lora_b: take(adapter::DOWN)?,
                lora_a: take(adapter::UP)?,
                delta_bias: take(adapter::DELTA_BIAS)?,
                prompt_down: take(adapter::PROMPT_DOWN)?,
                prompt_up: take(adapter::PROMPT_UP)?,
            },
            Adapter::VptAdd => Parameters::VptAdd {
                prompt_down: take(adapter::PROMPT_DOWN)?,
                prompt_up: take(adapter::PROMPT_UP)?,
            },
        };
        Ok(PaceLinear { scale, ..self.layer(name, block, linear, parameters, true)? })
    }

    /// Wraps the head: no adapter, but its whole output `x·Wᵀ + b` is perturbed, and its weight and bias are trained.
    ///
    /// From a PEFT adapter that has `name`, it is what [`wrap`](Self::wrap) makes of it.
    ///
    /// # Errors
    /// If the block has no σ.
    pub fn wrap_head(&mut self, name: &str, block: usize, linear: Linear) -> Result<PaceLinear> {
        match self.change(name) {
            Some(Change::Lora { rank, scale }) => self.adapted(name, block, &linear, rank, scale),
            Some(Change::Head { .. }) => self.trained(name, block, linear),
            None => self.layer(name, block, &linear, Parameters::Head, false),
        }
    }

    /// A layer that a PEFT adapter holds as a whole, in place of `linear`.
    fn trained(&mut self, name: &str, block: usize, linear: Linear) -> Result<PaceLinear> {
        let (out_features, in_features) = linear.weight().dims2()?;
        let Some(trained) = self.trained_linear(name, out_features, in_features)? else {
            candle_core::bail!("`{name}` is not in the PEFT adapter");
        };
        if trained.bias().is_some() != linear.bias().is_some() {
            let (adapter, model) = match trained.bias() {
                Some(_) => ("has a bias", "none"),
                None => ("has no bias", "one"),
            };
            candle_core::bail!("`{name}` {adapter} in the PEFT adapter, but {model} in the model");
        }
        self.layer(name, block, &trained, Parameters::Head, false)
    }

    /// The layer `name`, if a PEFT adapter holds it as a whole.
    pub(super) fn trained_linear(&self, name: &str, out: usize, inp: usize) -> Result<Option<Linear>> {
        let change = self.changes.as_ref().and_then(|changes| changes.get(name));
        let Some((Change::Head { has_bias }, _)) = change else { return Ok(None) };
        let vars = self.vars.pp(name);
        let bias = has_bias.then(|| vars.get(out, "bias")).transpose()?;
        Ok(Some(Linear::new(vars.get((out, inp), "weight")?, bias)))
    }

    /// Whether a PEFT adapter decides what becomes of each layer.
    pub(super) fn has_changes(&self) -> bool {
        self.changes.is_some()
    }

    /// What a PEFT adapter says of the layer `name`, which was met with this.
    fn change(&mut self, name: &str) -> Option<Change> {
        let (change, met) = self.changes.as_mut()?.get_mut(name)?;
        *met = true;
        Some(*change)
    }

    /// Checks, when the model has been built, that it has every layer of the PEFT adapter. The models of this crate do so.
    ///
    /// # Errors
    /// If a layer of the adapter was not wrapped; without a PEFT adapter, never.
    pub fn finish(&self) -> Result<()> {
        let mut changes = self.changes.iter().flatten();
        match changes.find(|(_, (_, met))| !met) {
            Some((name, _)) => {
                candle_core::bail!("the PEFT adapter has `{name}`, but the model has no such layer")
            }
            None => Ok(()),
        }
    }

    /// Wraps the frozen layer `name` with a ΔW `[N, K]` and Δb `[N]` of the caller's making (GLoRA, HiRA, BOFT, …).
    ///
    /// # Errors
    /// If the block has no σ or the shapes do not fit.
    pub fn wrap_dense(
        &mut self,
        name: &str,
        block: usize,
        linear: Linear,
        weight: Tensor,
        bias: Option<Tensor>,
    ) -> Result<PaceLinear> {
        if weight.shape() != linear.weight().shape() {
            candle_core::bail!(
                "`{name}`: ΔW is {:?}, expected {:?}",
                weight.shape(),
                linear.weight().shape()
            );
        }
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != [weight.dims()[0]]) {
            candle_core::bail!("`{name}`: Δb is {:?}, expected [{}]", bias.shape(), weight.dims()[0]);
        }
        self.layer(name, block, &linear, Parameters::Dense { weight, bias }, true)
    }

    /// DropPath with its own noise stream; `probability` 0 is the identity.
    ///
    /// # Errors
    /// If `probability` is not in `[0, 1)`.
    pub fn drop_path(&mut self, probability: f64) -> Result<SharedDropPath> {
        wrap(crate::noise::check_drop_probability(probability))?;
        Ok(SharedDropPath { layer: self.next_layer(), context: self.context.clone(), probability })
    }

    fn next_layer(&mut self) -> u32 {
        self.layers += 1;
        self.layers - 1
    }

    fn layer(
        &mut self,
        name: &str,
        block: usize,
        linear: &Linear,
        parameters: Parameters,
        frozen: bool,
    ) -> Result<PaceLinear> {
        let Some(&sigma) = self.sigma_by_block.get(block) else {
            candle_core::bail!(
                "`{name}` is in block {block}, but σ is known for {}",
                self.sigma_by_block.len()
            );
        };
        wrap(crate::noise::check_sigma(sigma))?;
        // Noise is on what is trained.
        let sigma = if matches!(parameters, Parameters::Frozen) { 0.0 } else { sigma };
        let hold = |tensor: &Tensor| {
            let tensor = tensor.contiguous()?;
            Ok::<_, candle_core::Error>(if frozen { tensor.detach() } else { tensor })
        };
        Ok(PaceLinear {
            name: name.to_owned(),
            layer: self.next_layer(),
            context: self.context.clone(),
            sigma: sigma as f32,
            noise_shape: self.noise_shape,
            scale: self.scale,
            exact: self.exact,
            base: FrozenLinear { weight: hold(linear.weight())?, bias: linear.bias().map(hold).transpose()? },
            parameters,
        })
    }
}

/// An adapter's parameter out of a builder.
fn variable(vars: &VarBuilder<'_>, parameter: &Parameter) -> Result<Tensor> {
    let init = match parameter.init {
        Init::Zeros => candle_nn::Init::Const(0.0),
        Init::XavierUniform => {
            let bound = parameter.xavier_bound();
            candle_nn::Init::Uniform { lo: -bound, up: bound }
        }
    };
    match parameter.columns {
        Some(columns) => vars.get_with_hints((parameter.rows, columns), parameter.name, init),
        None => vars.get_with_hints(parameter.rows, parameter.name, init),
    }
}
