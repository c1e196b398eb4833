//! A pre-norm vision transformer in timm's layout (`vit_*_patch*`), with or without PACE adapters.
//!
//! Tensor names and shapes are those of timm's safetensors files: `patch_embed.proj`, `cls_token`, `pos_embed`,
//! `blocks.{i}.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}`, `norm`, `head`. The class token is pooled.

mod ops;

use super::injector::Injector;
use super::layers::{PaceContext, PaceLinear, SharedDropPath};
use super::ops::wrap;
use crate::adapter::Adapter;
use crate::error::Error;
use crate::noise::check_drop_probability;
use crate::schedule::MAX_BLOCKS;
use crate::shape::{nonzero, product};
use candle_core::{Device, Module, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder};
use std::collections::HashMap;

/// Sizes of a vision transformer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VitConfig {
    /// Height and width of the images, in pixels.
    pub image_size: usize,
    /// Height and width of a patch, in pixels.
    pub patch_size: usize,
    /// Colour channels.
    pub channels: usize,
    /// Outputs of the head.
    pub classes: usize,
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the MLP's hidden layer.
    pub mlp_dim: usize,
    /// Added to the variance in every layer norm; 1e-6 in timm.
    pub layer_norm_eps: f64,
    /// DropPath probability of the last block; earlier ones get linearly less. Used with adapters only.
    pub drop_path: f64,
}

impl VitConfig {
    /// The sizes of a timm vision transformer, from the shapes of its tensors.
    ///
    /// The number of heads leaves no trace in the shapes: `None` takes timm's usual 64 channels per head.
    ///
    /// # Errors
    /// [`Error::Weights`] if a tensor is missing, does not have the rank it should, or is not part of the model.
    pub fn infer(weights: &HashMap<String, Tensor>, heads: Option<usize>) -> crate::Result<Self> {
        let dims = |name: &str, rank: usize| {
            let tensor =
                weights.get(name).ok_or_else(|| Error::Weights(format!("there is no tensor `{name}`")))?;
            let dims = tensor.dims().to_vec();
            if dims.len() == rank && dims.iter().all(|&dim| dim > 0) {
                Ok(dims)
            } else {
                Err(Error::Weights(format!("`{name}` is {dims:?}, expected {rank} sizes, none of them 0")))
            }
        };
        let patch = dims("patch_embed.proj.weight", 4)?;
        let (embed_dim, channels, patch_size) = (patch[0], patch[1], patch[2]);
        if patch[3] != patch_size {
            return Err(Error::Weights(format!(
                "`patch_embed.proj.weight` is {patch:?}: not a square patch"
            )));
        }
        let tokens = dims("pos_embed", 3)?[1];
        let side = (tokens - 1).isqrt();
        if side == 0 || side * side + 1 != tokens {
            return Err(Error::Weights(format!(
                "`pos_embed` has {tokens} positions, expected a square number of patches and a class token"
            )));
        }
        let depth = (0..).take_while(|i| weights.contains_key(&format!("blocks.{i}.norm1.weight"))).count();
        let mlp_dim = dims("blocks.0.mlp.fc1.weight", 2)?[0];
        let classes = match weights.get("head.weight") {
            Some(_) => dims("head.weight", 2)?[0],
            None => 0,
        };
        let heads = heads.unwrap_or((embed_dim / 64).max(1));
        if heads == 0 || embed_dim % heads != 0 {
            return Err(Error::Weights(format!("{embed_dim} channels do not divide into {heads} heads")));
        }
        // A layer that this model lacks (LayerScale, a distillation token …) would be left out without a word.
        let known = |name: &str| match name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
            Some((block, layer)) => {
                block.parse::<usize>().is_ok_and(|i| i < depth) && in_layers(layer, &BLOCK_LAYERS)
            }
            None => TOKENS.contains(&name) || in_layers(name, &OUTER_LAYERS),
        };
        if let Some(name) = weights.keys().filter(|name| !known(name)).min() {
            return Err(Error::Weights(format!(
                "there is no place for tensor `{name}`: only plain vision transformers, with a class token that is \
                 pooled, are supported"
            )));
        }
        Ok(Self {
            image_size: side * patch_size,
            patch_size,
            channels,
            classes,
            embed_dim,
            depth,
            heads,
            mlp_dim,
            layer_norm_eps: 1e-6,
            drop_path: 0.0,
        })
    }

    /// Checks that the sizes divide, and that no tensor of the model overflows the address space.
    fn check(&self) -> crate::Result<()> {
        let Self { image_size, patch_size, channels, classes, embed_dim, depth, heads, mlp_dim, .. } = *self;
        for (argument, size) in [
            ("image_size", image_size),
            ("channels", channels),
            ("embed_dim", embed_dim),
            ("mlp_dim", mlp_dim),
        ] {
            nonzero(argument, size)?;
        }
        for (argument, expected, whole, part) in [
            ("patch_size", "a divisor of `image_size`", image_size, patch_size),
            ("heads", "a divisor of `embed_dim`", embed_dim, heads),
        ] {
            if part == 0 || whole % part != 0 {
                return Err(Error::Size { argument, expected, got: part });
            }
        }
        // σ is known for `depth + 1` blocks.
        if depth >= MAX_BLOCKS {
            return Err(Error::Size { argument: "depth", expected: "less than 2^20", got: depth });
        }
        let side = image_size / patch_size;
        product("images", "[channels, size, size]", &[channels, image_size, image_size])?;
        product(
            "patch_embed.proj.weight",
            "[C, channels, p, p]",
            &[embed_dim, channels, patch_size, patch_size],
        )?;
        product("pos_embed", "[1, patches + 1, C]", &[side, side, embed_dim])?;
        product("attn.qkv.weight", "[3·C, C]", &[3, embed_dim, embed_dim])?;
        product("mlp.fc1.weight", "[mlp_dim, C]", &[mlp_dim, embed_dim])?;
        product("head.weight", "[classes, C]", &[classes, embed_dim])?;
        if self.layer_norm_eps.is_finite() && self.layer_norm_eps >= 0.0 {
            check_drop_probability(self.drop_path)
        } else {
            Err(Error::Value {
                argument: "layer_norm_eps",
                expected: "finite and not negative",
                got: self.layer_norm_eps,
            })
        }
    }

    fn tokens(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }
}

/// Tensors that are no layer's.
const TOKENS: [&str; 2] = ["cls_token", "pos_embed"];
/// Layers before and after the blocks, and those of a block.
const OUTER_LAYERS: [&str; 3] = ["patch_embed.proj", "norm", "head"];
const BLOCK_LAYERS: [&str; 6] = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"];

/// Whether a tensor is weight or bias of one of `layers`.
fn in_layers(name: &str, layers: &[&str]) -> bool {
    let layer = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
    layer.is_some_and(|layer| layers.contains(&layer))
}

/// Reads a safetensors file into CPU tensors.
///
/// # Errors
/// [`Error::Weights`] if the file cannot be read, or is truncated or of another format.
pub fn read_weights(path: &std::path::Path) -> crate::Result<HashMap<String, Tensor>> {
    let context = |error: &dyn std::fmt::Display| Error::Weights(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| context(&error))?;
    candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| context(&error))
}

/// Layer norm over a token's channels.
#[derive(Debug, Clone)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.epsilon)
    }
}

/// One pre-norm block: attention, then MLP, each with a residual connection.
#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    qkv: PaceLinear,
    proj: PaceLinear,
    norm2: LayerNorm,
    fc1: PaceLinear,
    fc2: PaceLinear,
    drop_path: SharedDropPath,
    heads: usize,
}

impl Block {
    /// The linear layers, in the order of the forward pass.
    fn layers(&self) -> [&PaceLinear; 4] {
        [&self.qkv, &self.proj, &self.fc1, &self.fc2]
    }

    fn is_noisy(&self) -> bool {
        self.layers().into_iter().any(PaceLinear::is_noisy)
    }

    /// `x` holds `branches` copies of the batch; with `part`, it holds one and the branches part in this block.
    fn forward(&self, x: &Tensor, branches: usize, part: Option<&PaceContext>) -> Result<(Tensor, usize)> {
        let hidden = self.norm1.forward(x)?;
        let (qkv, x, branches) = match part {
            Some(context) => (self.qkv.forward_branching(&hidden)?, context.branch(x)?, context.branches()),
            None => (self.qkv.forward(&hidden)?, x.clone(), branches),
        };
        let drop = |out: Tensor| self.drop_path.forward_rows(&out, branches);
        let x = (x + drop(self.proj.forward(&ops::attention(&qkv, self.heads)?)?)?)?;
        let hidden = ops::gelu(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        let x = (&x + drop(self.fc2.forward(&hidden)?)?)?;
        Ok((x, branches))
    }
}

/// A vision transformer.
#[derive(Debug, Clone)]
pub struct Vit {
    config: VitConfig,
    patch: Linear,
    cls_token: Tensor,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: PaceLinear,
    context: PaceContext,
}

const SMALL: Init = Init::Randn { mean: 0.0, stdev: 0.02 };

/// The start of linear weights: uniform in `±√(6/(in + out))`, as in the original ViT.
fn xavier_uniform(out: usize, inp: usize) -> Init {
    let bound = (6.0 / (out + inp) as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

fn linear(inp: usize, out: usize, vars: VarBuilder<'_>) -> Result<Linear> {
    // Some timm models have no bias on qkv; a builder that makes new variables makes one.
    let weight = vars.get_with_hints((out, inp), "weight", xavier_uniform(out, inp))?;
    let bias = match vars.get_with_hints(out, "bias", Init::Const(0.0)) {
        Err(error) if vars.contains_tensor("bias") => return Err(error),
        bias => bias.ok(),
    };
    Ok(Linear::new(weight, bias))
}

fn layer_norm(config: &VitConfig, vars: VarBuilder<'_>) -> Result<LayerNorm> {
    let weight = vars.get_with_hints(config.embed_dim, "weight", Init::Const(1.0))?;
    let bias = vars.get_with_hints(config.embed_dim, "bias", Init::Const(0.0))?;
    Ok(LayerNorm { weight, bias, epsilon: config.layer_norm_eps })
}

impl Vit {
    /// The model with all weights from `vars`: to pre-train, or to run.
    ///
    /// # Errors
    /// If a weight is missing or has another shape, or a setting in `config` is out of its range.
    pub fn new(config: &VitConfig, vars: VarBuilder<'_>) -> Result<Self> {
        wrap(config.check())?;
        // Without adapters every layer is what a head is to them: trained as a whole, here without noise.
        let sigmas = vec![0.0; config.depth + 1];
        let mut injector = Injector::new(&PaceContext::new(0), Adapter::VptAdd, 1, &sigmas, vars.clone());
        Self::build(config, vars, &mut injector, false)
    }

    /// The model with frozen weights from `vars`, wrapped by `injector`: an adapter on every linear layer, block by
    /// block, and the head (the last block), which is trained, from the injector's own variables.
    ///
    /// # Errors
    /// As [`new`](Self::new), or if the injector does not know σ for `depth + 1` blocks, or comes from a PEFT adapter that has
    /// a layer which this model lacks.
    pub fn with_adapters(
        config: &VitConfig,
        vars: VarBuilder<'_>,
        injector: &mut Injector<'_>,
    ) -> Result<Self> {
        wrap(config.check())?;
        Self::build(config, vars, injector, true)
    }

    fn build(
        config: &VitConfig,
        vars: VarBuilder<'_>,
        injector: &mut Injector<'_>,
        adapters: bool,
    ) -> Result<Self> {
        let VitConfig { patch_size, channels, embed_dim, depth, heads, mlp_dim, .. } = *config;
        let patch_weight = vars.pp("patch_embed.proj").get_with_hints(
            (embed_dim, channels, patch_size, patch_size),
            "weight",
            xavier_uniform(embed_dim, channels * patch_size * patch_size),
        )?;
        let patch_bias = vars.pp("patch_embed.proj").get_with_hints(embed_dim, "bias", Init::Const(0.0))?;
        let patch = Linear::new(patch_weight.reshape((embed_dim, ()))?, Some(patch_bias));
        let mut blocks = Vec::new();
        for i in 0..depth {
            let prefix = format!("blocks.{i}");
            let vars = vars.pp(&prefix);
            let mut any = |name: &str, inp: usize, out: usize| {
                let linear = linear(inp, out, vars.pp(name))?;
                let name = format!("{prefix}.{name}");
                if adapters { injector.wrap(&name, i, linear) } else { injector.wrap_head(&name, i, linear) }
            };
            let qkv = any("attn.qkv", embed_dim, 3 * embed_dim)?;
            let proj = any("attn.proj", embed_dim, embed_dim)?;
            let fc1 = any("mlp.fc1", embed_dim, mlp_dim)?;
            let fc2 = any("mlp.fc2", mlp_dim, embed_dim)?;
            let rate = config.drop_path * i as f64 / depth.saturating_sub(1).max(1) as f64;
            let drop_path = injector.drop_path(rate)?;
            let (norm1, norm2) =
                (layer_norm(config, vars.pp("norm1"))?, layer_norm(config, vars.pp("norm2"))?);
            blocks.push(Block { norm1, qkv, proj, norm2, fc1, fc2, drop_path, heads });
        }
        let head = match injector.trained_linear("head", config.classes, embed_dim)? {
            Some(head) => head,
            // A PEFT adapter without a head was trained on that of the model.
            None if injector.has_changes() => linear(embed_dim, config.classes, vars.pp("head"))?,
            None => linear(embed_dim, config.classes, injector.vars().pp("head"))?,
        };
        let head = injector.wrap_head("head", depth, head)?;
        injector.finish()?;
        Ok(Self {
            config: *config,
            patch,
            cls_token: vars.get_with_hints((1, 1, embed_dim), "cls_token", SMALL)?,
            pos_embed: vars.get_with_hints((1, config.tokens(), embed_dim), "pos_embed", SMALL)?,
            blocks,
            norm: layer_norm(config, vars.pp("norm"))?,
            head,
            context: injector.context().clone(),
        })
    }

    /// Whether rows that hold `branches` copies of the batch still have to part.
    fn parts(&self, branches: usize) -> bool {
        branches < self.context.branches()
    }

    /// The linear layers, block by block in the order of the forward pass, and the head.
    pub fn layers(&self) -> impl Iterator<Item = &PaceLinear> {
        self.blocks.iter().flat_map(Block::layers).chain([&self.head])
    }

    /// The sizes.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Images `[B, channels, size, size]` to the pooled features `[rows, C]` before the head, and the branches they hold.
    ///
    /// Branches stay together until the first noisy block: before it, `B` rows do the work of `branches·B`.
    fn pooled(&self, images: &Tensor) -> Result<(Tensor, usize)> {
        let (batch, channels, height, width) = images.dims4()?;
        let VitConfig { image_size, patch_size: p, embed_dim, .. } = self.config;
        if (channels, height, width) != (self.config.channels, image_size, image_size) {
            candle_core::bail!(
                "images are {:?}, expected [B, {}, {image_size}, {image_size}]",
                images.dims(),
                self.config.channels
            );
        }
        let side = image_size / p;
        let patches = images
            .reshape((batch, channels, side, p, side, p))?
            .permute((0, 2, 4, 1, 3, 5))?
            .reshape((batch, side * side, channels * p * p))?;
        let cls = self.cls_token.broadcast_as((batch, 1, embed_dim))?;
        let mut x =
            Tensor::cat(&[&cls, &self.patch.forward(&patches)?], 1)?.broadcast_add(&self.pos_embed)?;
        let mut branches = 1;
        for block in &self.blocks {
            let part = (self.parts(branches) && block.is_noisy()).then_some(&self.context);
            (x, branches) = block.forward(&x, branches, part)?;
        }
        // The norm is per token: only the class token's is needed.
        Ok((self.norm.forward(&x.narrow(1, 0, 1)?.squeeze(1)?)?, branches))
    }

    /// Images `[B, channels, size, size]` to the pooled features before the head, `[branches·B, C]`.
    ///
    /// # Errors
    /// If the images have another shape.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let (features, branches) = self.pooled(images)?;
        if self.parts(branches) { self.context.branch(&features) } else { Ok(features) }
    }

    /// Features as [`features`](Self::features) returns them to logits.
    ///
    /// # Errors
    /// If the features have another width.
    pub fn classify(&self, features: &Tensor) -> Result<Tensor> {
        self.head.forward(features)
    }
}

impl Module for Vit {
    /// Images `[B, channels, size, size]` to logits `[branches·B, classes]`, branch 0 first.
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let (features, branches) = self.pooled(images)?;
        if self.parts(branches) {
            self.head.forward_branching(&features)
        } else {
            self.head.forward(&features)
        }
    }
}
