//! Adapter files of Hugging Face's PEFT, which hold LoRA add: `ΔW = scale·B·A`, `Δb = scale·b`.
//!
//! The format is what `peft/utils/save_and_load.py` and `peft/tuners/lora` of PEFT 0.21 read and write.

mod config;

use self::config::Config;
use super::injector::{Change, Injector};
use super::layers::{PaceContext, PaceLinear, Saved};
use super::ops::wrap;
use super::vit::read_weights;
use crate::adapter::{Adapter, DELTA_BIAS, DOWN, UP};
use crate::error::Error;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Before the module path in every tensor's name: PEFT's own wrappers around the model.
const PREFIX: &str = "base_model.model.";
const LORA_A: &str = "lora_A.weight";
const LORA_B: &str = "lora_B.weight";
const LORA_BIAS: &str = "lora_B.bias";
const WEIGHT: &str = "weight";
const BIAS: &str = "bias";
/// What a file can hold of a module; `lora_B.bias` before the `bias` that it ends with.
const PARTS: [&str; 5] = [LORA_A, LORA_B, LORA_BIAS, WEIGHT, BIAS];

/// A LoRA adapter as Hugging Face's [PEFT](https://huggingface.co/docs/peft) keeps it: a folder with `adapter_config.json` and
/// `adapter_model.safetensors`.
///
/// Layers have the name of their module in the PyTorch model, such as `blocks.0.attn.qkv`: wrap yours under the same names.
/// [`vit`](super::vit) has those of timm.
///
/// * [`read`](Self::read) and [`Injector::from_peft`] make a model of this crate from what PEFT has trained.
/// * [`from_layers`](Self::from_layers) and [`write`](Self::write) write what `peft.PeftModel.from_pretrained` loads.
///
/// What decides over the outputs is read and written. What concerns training alone is not kept: dropout, the way to start, the
/// noise of PACE. What LoRA add cannot express is an error that names it: DoRA and other variants, adapters that have changed
/// W0 (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), biases of the base model, embeddings, convolutions; and on writing LoRA mul, prompts
/// and a dense ΔW.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Linear, VarMap};
/// use pace_kernels::adapter::Adapter;
/// use pace_kernels::candle::{Injector, PaceContext, PeftAdapter, seeded_builder};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (device, context) = (Device::Cpu, PaceContext::new(7));
/// let pre_trained = || Tensor::ones((3, 8), DType::F32, &device).map(|weight| Linear::new(weight, None));
/// let vb = seeded_builder(&VarMap::new(), 42, DType::F32, &device);
/// let mut injector = Injector::new(&context, Adapter::LoraAdd, 2, &[0.5], vb).with_scale(4.0);
/// let layer = injector.wrap("encoder.fc", 0, pre_trained()?)?;
/// // … training …
/// let folder = std::env::temp_dir().join(format!("pace-peft-{}", std::process::id()));
/// PeftAdapter::from_layers([&layer])?.write(&folder)?;
///
/// let (adapter, vars) = (PeftAdapter::read(&folder)?, VarMap::new());
/// let vb = seeded_builder(&vars, 42, DType::F32, &device);
/// let mut injector = Injector::from_peft(&context, &adapter, &[0.5], &vars, vb)?;
/// let again = injector.wrap("encoder.fc", 0, pre_trained()?)?;
/// injector.finish()?; // every layer of the adapter has found its place
///
/// let x = Tensor::ones((4, 8), DType::F32, &device)?;
/// assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, again.forward(&x)?.to_vec2::<f32>()?);
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct PeftAdapter {
    /// LoRA, by the layer's module path.
    pub layers: BTreeMap<String, PeftLayer>,
    /// Linear layers that were trained as a whole (`modules_to_save`), such as the classifier, by module path: `W [N, K]`,
    /// `b [N]`.
    pub heads: BTreeMap<String, Linear>,
    /// Whether files hold α = scale·√r (`use_rslora`) in place of α = scale·r.
    pub use_rslora: bool,
    /// The model that the adapter belongs to, as on the Hub (`base_model_name_or_path`). Nothing here depends on it.
    pub base_model: Option<String>,
}

/// LoRA of one layer: `ΔW = scale·B·A`, `Δb = scale·bias`.
#[derive(Debug, Clone)]
pub struct PeftLayer {
    /// `A [r, K]`.
    pub lora_a: Tensor,
    /// `B [N, r]`.
    pub lora_b: Tensor,
    /// `lora_B.bias [N]`. Unlike `δb` of LoRA add, it is still to be multiplied by the scale.
    pub bias: Option<Tensor>,
    /// α/r or α/√r of a file.
    pub scale: f64,
}

impl PeftAdapter {
    /// Reads a folder. Tensors are on the CPU and of the file's element types.
    ///
    /// # Errors
    /// [`Error::Weights`], with the path, if a file is missing, truncated or of another format, if a setting or a tensor is missing,
    /// has another type, range or shape than it should, or cannot be expressed as LoRA add.
    pub fn read(folder: impl AsRef<Path>) -> crate::Result<Self> {
        let path = folder.as_ref().join(CONFIG);
        let at = |path: &Path, problem: String| Error::Weights(format!("{}: {problem}", path.display()));
        let bytes = std::fs::read(&path).map_err(|error| at(&path, error.to_string()))?;
        let config = Config::parse(&bytes).map_err(|problem| at(&path, problem))?;
        let path = folder.as_ref().join(WEIGHTS);
        Self::collect(&config, read_weights(&path)?).map_err(|problem| at(&path, problem))
    }

    /// Puts the tensors of a file in their places.
    fn collect(config: &Config, tensors: HashMap<String, Tensor>) -> crate::Result<Self, String> {
        let mut modules: BTreeMap<String, [Option<Tensor>; PARTS.len()]> = BTreeMap::new();
        let tensors: BTreeMap<_, _> = tensors.into_iter().collect();
        for (key, tensor) in tensors {
            let (path, part) = place(&key).ok_or_else(|| {
                format!(
                    "there is no place for tensor `{key}`: only LoRA on linear layers (`{PREFIX}<layer>.{LORA_A}`, \
                     `.{LORA_B}`, `.{LORA_BIAS}`) and whole linear layers (`.{WEIGHT}`, `.{BIAS}`) are supported"
                )
            })?;
            if PARTS[part] == LORA_BIAS && !config.lora_bias {
                return Err(format!("`{key}` is there, but `lora_bias` is false in {CONFIG}"));
            }
            if [WEIGHT, BIAS].contains(&PARTS[part]) && !config.saves(path) {
                return Err(format!("`{key}` belongs to no module in `modules_to_save` of {CONFIG}"));
            }
            modules.entry(path.to_owned()).or_default()[part] = Some(tensor);
        }
        let mut adapter =
            Self { base_model: config.base_model.clone(), use_rslora: config.use_rslora, ..Self::default() };
        for (path, [lora_a, lora_b, lora_bias, weight, bias]) in modules {
            let need = |part: Option<Tensor>, name| {
                part.ok_or_else(|| format!("there is no tensor `{PREFIX}{path}.{name}`"))
            };
            if weight.is_some() || bias.is_some() {
                adapter.heads.insert(path.clone(), Linear::new(need(weight, WEIGHT)?, bias));
            }
            if lora_a.is_none() && lora_b.is_none() && lora_bias.is_none() {
                continue;
            }
            let (lora_a, lora_b) = (need(lora_a, LORA_A)?, need(lora_b, LORA_B)?);
            let bias = config.lora_bias.then(|| need(lora_bias, LORA_BIAS)).transpose()?;
            let (rank, scale) = config.rank_and_scale(&path);
            let layer = PeftLayer { lora_a, lora_b, bias, scale };
            layer.check(&path)?;
            if layer.rank() != rank {
                return Err(format!(
                    "`{PREFIX}{path}.{LORA_A}` is {:?}, but the rank by {CONFIG} is {rank}",
                    layer.lora_a.dims()
                ));
            }
            adapter.layers.insert(path, layer);
        }
        adapter.check()?;
        Ok(adapter)
    }

    /// The adapters and heads of a model as they are now, copied to the CPU. Frozen layers are left out.
    ///
    /// Values are those of the layers to the last bit, but for δb: a file holds δb/scale, so that it comes back within a rounding,
    /// and exactly if the scale is a power of two. Where all δb are zero, the file has none.
    ///
    /// # Errors
    /// If two layers have one name, a layer's adapter is not LoRA add, or there is no LoRA at all; if a scale is not finite, or a δb
    /// cannot be divided by it.
    pub fn from_layers<'a>(layers: impl IntoIterator<Item = &'a PaceLinear>) -> Result<Self> {
        let mut adapter = Self::default();
        for layer in layers {
            let name = layer.name();
            if adapter.layers.contains_key(name) || adapter.heads.contains_key(name) {
                return wrap(Err(Error::Weights(format!("two layers have the name `{name}`"))));
            }
            match layer.saved() {
                Saved::Lora { lora_b, lora_a, delta_bias, scale } => {
                    let bias = undo_scale(name, &snapshot(delta_bias)?, scale)?;
                    let (lora_a, lora_b) = (snapshot(lora_a)?, snapshot(lora_b)?);
                    adapter.layers.insert(name.to_owned(), PeftLayer { lora_a, lora_b, bias, scale });
                }
                Saved::Head { weight, bias } => {
                    let head = Linear::new(snapshot(weight)?, bias.map(snapshot).transpose()?);
                    adapter.heads.insert(name.to_owned(), head);
                }
                Saved::Nothing => {}
                Saved::Other(kind) => {
                    return wrap(Err(Error::Weights(format!(
                        "`{name}` has {kind}, and a PEFT adapter can express LoRA add only"
                    ))));
                }
            }
        }
        wrap(adapter.check().map_err(Error::Weights))?;
        Ok(adapter)
    }

    /// Writes the folder, which is made if it is not there. Each file is replaced as a whole: a reader sees the old one or the
    /// new one. Tensors come back to the last bit, a scale that is no α/r (or α/√r) of `f64` within a rounding.
    ///
    /// # Errors
    /// [`Error::Weights`] if a tensor has another shape than it should, there is no LoRA, a scale is not finite, or a layer has a
    /// name that PEFT would take for a part of a head; or if the folder cannot be written to.
    pub fn write(&self, folder: impl AsRef<Path>) -> crate::Result<()> {
        let folder = folder.as_ref();
        self.check().map_err(Error::Weights)?;
        let config = config::text(self).map_err(Error::Weights)?;
        let at = |error: &dyn std::fmt::Display| Error::Weights(format!("{}: {error}", folder.display()));
        let tensors = self.tensors().map_err(|error| at(&error))?;
        std::fs::create_dir_all(folder).map_err(|error| at(&error))?;
        // The weights first: a folder that is new is complete once it has a configuration.
        replace(folder, WEIGHTS, |path| candle_core::safetensors::save(&tensors, path))
            .and_then(|()| replace(folder, CONFIG, |path| Ok(std::fs::write(path, config)?)))
            .map_err(|error| at(&error))
    }

    /// The tensors of a file, by name.
    fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        let mut put = |path: &str, name: &str, tensor: &Tensor| -> Result<()> {
            tensors.insert(format!("{PREFIX}{path}.{name}"), snapshot(tensor)?);
            Ok(())
        };
        for (path, layer) in &self.layers {
            put(path, LORA_A, &layer.lora_a)?;
            put(path, LORA_B, &layer.lora_b)?;
            // Either every layer of a file has a bias or none.
            match &layer.bias {
                Some(bias) => put(path, LORA_BIAS, bias)?,
                None if self.has_biases() => {
                    let zeros = Tensor::zeros(layer.lora_b.dim(0)?, layer.lora_b.dtype(), &Device::Cpu)?;
                    put(path, LORA_BIAS, &zeros)?;
                }
                None => {}
            }
        }
        for (path, head) in &self.heads {
            put(path, WEIGHT, head.weight())?;
            if let Some(bias) = head.bias() {
                put(path, BIAS, bias)?;
            }
        }
        Ok(tensors)
    }

    fn has_biases(&self) -> bool {
        self.layers.values().any(|layer| layer.bias.is_some())
    }

    /// Checks what PEFT and the layers need.
    fn check(&self) -> crate::Result<(), String> {
        if self.layers.is_empty() {
            return Err("there is no layer of LoRA add".into());
        }
        for (path, layer) in &self.layers {
            layer.check(path)?;
            // PEFT looks for heads by the end of a path, and puts no LoRA on them or what is in them.
            let inside =
                |head: &str| path.ends_with(head) || format!(".{path}.").contains(&format!(".{head}."));
            if let Some(head) = self.heads.keys().find(|head| inside(head)) {
                return Err(format!("PEFT would take the layer `{path}` for a part of the head `{head}`"));
            }
        }
        for (path, head) in &self.heads {
            let name = |name| format!("{PREFIX}{path}.{name}");
            let [out, _] = sizes(&name(WEIGHT), head.weight(), "[N, K]")?;
            if let Some(bias) = head.bias() {
                let [got] = sizes(&name(BIAS), bias, "[N]")?;
                if got != out {
                    return Err(format!("`{}` is [{got}], expected [{out}]", name(BIAS)));
                }
            }
        }
        Ok(())
    }
}

impl PeftLayer {
    /// Of a layer that has been checked.
    fn rank(&self) -> usize {
        self.lora_a.dims().first().copied().unwrap_or_default()
    }

    /// Checks the shapes and the scale.
    fn check(&self, path: &str) -> crate::Result<(), String> {
        let name = |name| format!("{PREFIX}{path}.{name}");
        let [rank, _] = sizes(&name(LORA_A), &self.lora_a, "[r, K]")?;
        let [out, got] = sizes(&name(LORA_B), &self.lora_b, "[N, r]")?;
        if got != rank {
            return Err(format!("`{}` is [{out}, {got}], expected [N, {rank}]", name(LORA_B)));
        }
        if let Some(bias) = &self.bias {
            let [got] = sizes(&name(LORA_BIAS), bias, "[N]")?;
            if got != out {
                return Err(format!("`{}` is [{got}], expected [{out}]", name(LORA_BIAS)));
            }
        }
        if !self.scale.is_finite() {
            return Err(format!("the scale of `{path}` is {}, expected finite", self.scale));
        }
        Ok(())
    }
}

impl<'a> Injector<'a> {
    /// An injector of a PEFT adapter: LoRA add with the ranks, scales and values of the file, on the layers that the file has.
    /// All other layers stay frozen and without noise.
    ///
    /// `context` and `sigma_by_block` are as for [`new`](Self::new). The values go to `vars`, as variables under the names of
    /// checkpoints (`<layer>.delta_W_down` …, `<head>.weight`), which replace those of the same name; `builder` is one over `vars`,
    /// and says their element type and device. Each layer gets a δb to train, zero if the file has none.
    ///
    /// Wrap every linear layer under its module path, the head too, then call [`finish`](Self::finish): it finds layers of the
    /// adapter that the model lacks.
    ///
    /// # Errors
    /// If `builder` does not read from `vars`, or a tensor cannot be converted.
    pub fn from_peft(
        context: &PaceContext,
        adapter: &PeftAdapter,
        sigma_by_block: &[f64],
        vars: &VarMap,
        builder: VarBuilder<'a>,
    ) -> Result<Self> {
        wrap(adapter.check().map_err(Error::Weights))?;
        let mut changes = Vec::new();
        let put = |path: &str, name: &str, tensor: &Tensor| -> Result<()> {
            let prefixed = builder.pp(path).pp(name).prefix();
            let var = Var::from_tensor(&tensor.to_dtype(builder.dtype())?.to_device(builder.device())?)?;
            vars.data().lock().unwrap_or_else(PoisonError::into_inner).insert(prefixed, var);
            match builder.pp(path).contains_tensor(name) {
                true => Ok(()),
                false => candle_core::bail!("`builder` does not read from `vars`"),
            }
        };
        for (path, layer) in &adapter.layers {
            // In the precision of the scale, and before any rounding to the layer's own.
            let delta_bias = match &layer.bias {
                Some(bias) => (bias.to_dtype(DType::F64)? * layer.scale)?,
                None => Tensor::zeros(layer.lora_b.dim(0)?, DType::F64, &Device::Cpu)?,
            };
            put(path, DOWN, &layer.lora_b)?;
            put(path, UP, &layer.lora_a)?;
            put(path, DELTA_BIAS, &delta_bias)?;
            changes.push((path.clone(), Change::Lora { rank: layer.rank(), scale: layer.scale }));
        }
        for (path, head) in &adapter.heads {
            put(path, WEIGHT, head.weight())?;
            if let Some(bias) = head.bias() {
                put(path, BIAS, bias)?;
            }
            changes.push((path.clone(), Change::Head { has_bias: head.bias().is_some() }));
        }
        // Every layer has a rank of its own.
        Ok(Self::new(context, Adapter::LoraAdd, 1, sigma_by_block, builder).with_changes(changes))
    }
}

/// The module path of a tensor, and which of the parts it is.
fn place(key: &str) -> Option<(&str, usize)> {
    let name = key.strip_prefix(PREFIX)?;
    let strip = |part| name.strip_suffix(part)?.strip_suffix('.');
    let (part, path) = PARTS.iter().enumerate().find_map(|(i, part)| Some((i, strip(part)?)))?;
    // In a path it is a part of a variant: `lora_magnitude_vector` of DoRA, for one.
    let variant = path.split('.').any(|module| module.is_empty() || module.starts_with("lora_"));
    (!variant).then_some((path, part))
}

/// The sizes of a tensor that has as many as `shape` says, none of them zero.
fn sizes<const N: usize>(name: &str, tensor: &Tensor, shape: &str) -> crate::Result<[usize; N], String> {
    match <[usize; N]>::try_from(tensor.dims()) {
        Ok(sizes) if !sizes.contains(&0) && is_float(tensor.dtype()) => Ok(sizes),
        _ => Err(format!(
            "`{name}` is {:?} of {:?}, expected {shape} of a linear layer, in floating point",
            tensor.dims(),
            tensor.dtype()
        )),
    }
}

/// Whether layers can have tensors of this type; candle counts smaller ones among the floats.
fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

/// A copy on the CPU that later training does not change.
fn snapshot(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().to_device(&Device::Cpu)?.copy()
}

/// PEFT's bias for a δb, or `None` if it is zero.
fn undo_scale(name: &str, delta_bias: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let values = delta_bias.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    if values.iter().all(|&value| value == 0.0) {
        return Ok(None);
    }
    let bias = (delta_bias.to_dtype(DType::F64)? / scale)?.to_dtype(delta_bias.dtype())?;
    let divided = bias.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    // What was finite stays so, and what was not zero too.
    if divided
        .iter()
        .zip(&values)
        .any(|(new, old)| old.is_finite() && (!new.is_finite() || (*new == 0.0) != (*old == 0.0)))
    {
        return wrap(Err(Error::Weights(format!(
            "`{name}`: δb divided by the scale, {scale}, which is what PEFT holds, is out of range"
        ))));
    }
    Ok(Some(bias))
}

/// Writes a file beside its place, then moves it there.
fn replace(folder: &Path, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = folder.join(format!(".{name}.{}.{number}", std::process::id()));
    let moved = write(&part).and_then(|()| {
        // Else a crash of the machine could leave a file in its place that is empty.
        std::fs::File::open(&part)?.sync_all()?;
        Ok(std::fs::rename(&part, folder.join(name))?)
    });
    if moved.is_err() {
        // It may never have been made.
        let _ = std::fs::remove_file(&part);
    }
    moved
}
