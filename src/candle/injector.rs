//! How noisy layers get into a model.

use super::layers::{PaceContext, PaceLinear, Parameters, SharedDropPath};
use super::ops::{FrozenLinear, wrap};
use crate::adapter::{self, Adapter, Init, Parameter};
use crate::noise::NoiseShape;
use candle_core::{Result, Tensor};
use candle_nn::{Linear, VarBuilder};
use std::collections::{BTreeMap, HashMap};

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
