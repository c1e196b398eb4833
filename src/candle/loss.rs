//! One training step of PACE and its variants.

#[cfg(feature = "candle-cuda")]
mod cuda;

use super::layers::PaceContext;
use super::ops::{Element, scalar, with_slices, wrap};
use crate::cpu::{Consistency, Loss, LossValues};
use crate::loss::{Divergence, LossSettings, Targets};
use crate::schedule::LazySchedule;
use candle_core::{DType, Error, Result, Tensor};

/// What a training step minimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Cross-entropy alone. With σ > 0 in the layers this is "noise only".
    CrossEntropy,
    /// PACE: two branches at every step.
    Pace,
    /// PACE-lazy: at every `interval`-th step two branches of half the batch, else one branch of the whole.
    Lazy {
        /// Steps from one use of the consistency term to the next.
        interval: usize,
    },
    /// PACE-fast: one branch, kept consistent with the logits that each sample had last time.
    Fast {
        /// Samples of the training set.
        samples: usize,
    },
}

/// One batch.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Inputs, one row per sample.
    pub x: &'a Tensor,
    /// What it is trained on: labels `[B]`, or a tensor `[B, C]` of probabilities or values.
    pub targets: Targets<&'a [i64], &'a Tensor>,
    /// Which training samples these are, `[B]`; needed by [`Variant::Fast`] only.
    pub index: Option<&'a [i64]>,
    /// Number of the first sample in the global batch; not 0 where a batch is split over processes.
    pub first_sample: u64,
}

impl<'a> Batch<'a> {
    /// A whole batch with labels, without an index.
    pub fn new(x: &'a Tensor, labels: &'a [i64]) -> Self {
        Self { x, targets: Targets::Labels(labels), index: None, first_sample: 0 }
    }
}

/// What the loss of one step is made of; tensors lie beside the logits.
struct Terms<'a> {
    settings: LossSettings,
    targets: Targets<&'a [i64], Tensor>,
    class_weights: Option<Vec<f64>>,
}

/// The result of one [`Objective::step`].
#[derive(Debug)]
pub struct Step {
    /// The scalar to call `backward` on.
    pub loss: Tensor,
    /// Its value and parts.
    pub values: LossValues,
    /// Logits of branch 0.
    pub logits: Tensor,
}

/// Evaluates training steps of one [`Variant`]; holds the history of PACE-fast.
#[derive(Debug)]
pub struct Objective {
    context: PaceContext,
    variant: Variant,
    lambda: f64,
    /// What the consistency term measures.
    pub divergence: Divergence,
    /// Share of the target spread evenly over all classes.
    pub label_smoothing: f64,
    /// Samples with this label take no part in the cross-entropy.
    pub ignore_label: Option<i64>,
    /// Whether those samples take no part in the consistency either.
    pub labelled_only: bool,
    /// Whether the criterion is the mean of that of both branches.
    pub both_branches: bool,
    /// Weights of the classes in the cross-entropy, `[C]`; `None`: all 1.
    pub class_weights: Option<Vec<f64>>,
    history: Option<History>,
}

/// The logits that every training sample had last time: in the precision of the model, on a device in `f32`.
#[derive(Debug)]
enum History {
    F32(Vec<f32>),
    F64(Vec<f64>),
    #[cfg(feature = "candle-cuda")]
    Device(candle_core::cuda_backend::cudarc::driver::CudaSlice<f32>),
}

/// A model's element type, with its kind of history.
trait Remembered: Element {
    fn table(history: &mut History) -> Option<&mut Vec<Self>>;
    fn history(table: Vec<Self>) -> History;
}

impl Remembered for f32 {
    fn table(history: &mut History) -> Option<&mut Vec<f32>> {
        if let History::F32(table) = history { Some(table) } else { None }
    }
    fn history(table: Vec<f32>) -> History {
        History::F32(table)
    }
}

impl Remembered for f64 {
    fn table(history: &mut History) -> Option<&mut Vec<f64>> {
        if let History::F64(table) = history { Some(table) } else { None }
    }
    fn history(table: Vec<f64>) -> History {
        History::F64(table)
    }
}

impl Objective {
    /// An objective with consistency strength `lambda` for the model whose noisy layers share `context`.
    ///
    /// # Errors
    /// If `lambda` is negative or not finite, or a size in `variant` is zero.
    pub fn new(context: &PaceContext, variant: Variant, lambda: f64) -> Result<Self> {
        wrap(crate::loss::check_lambda(lambda))?;
        match variant {
            Variant::Lazy { interval } => wrap(LazySchedule::new(interval).map(|_| ()))?,
            Variant::Fast { samples } => wrap(crate::shape::nonzero("samples", samples))?,
            Variant::CrossEntropy | Variant::Pace => {}
        }
        let context = context.clone();
        Ok(Self {
            context,
            variant,
            lambda,
            divergence: Divergence::default(),
            label_smoothing: 0.0,
            ignore_label: None,
            labelled_only: false,
            both_branches: false,
            class_weights: None,
            history: None,
        })
    }

    /// Runs `model` on the batch, under the noise of step `step`, and evaluates the loss.
    ///
    /// `model` gets `B` rows and returns logits `[B, C]`, or `[2B, C]` (branch 0 first) while the context has two
    /// branches: it lets them part where the noise begins ([`forward_branching`]) or at its input
    /// ([`PaceContext::branch`]). The context stays in training; [`PaceContext::evaluate`] ends it.
    ///
    /// [`forward_branching`]: super::PaceLinear::forward_branching
    ///
    /// # Errors
    /// If the model fails, its logits have another shape, or a label or index is out of range. With CUDA logits the device
    /// finds the last: the history of [`Variant::Fast`] then has the logits of the samples that nothing was wrong with.
    pub fn step(
        &mut self,
        step: u64,
        batch: &Batch<'_>,
        model: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Step> {
        let rows = batch.x.dim(0)?;
        let targets = match batch.targets {
            Targets::Labels(labels) => labels.len(),
            Targets::Probabilities(all) | Targets::Values(all) => all.dim(0)?,
        };
        if targets != rows {
            let name = if matches!(batch.targets, Targets::Labels(_)) { "labels" } else { "targets" };
            candle_core::bail!("`{name}` has {targets} elements, but the batch {rows} rows");
        }
        let samples = match self.variant {
            Variant::CrossEntropy | Variant::Fast { .. } => None,
            Variant::Pace => Some(rows),
            Variant::Lazy { interval } => {
                let schedule = wrap(LazySchedule::new(interval))?;
                wrap(schedule.two_branch_samples(usize::try_from(step).unwrap_or(usize::MAX), rows))?
            }
        };
        let used = samples.unwrap_or(rows);
        let branches = if samples.is_some() { 2 } else { 1 };
        self.context.train(step, branches, batch.first_sample)?;
        let logits = model(&batch.x.narrow(0, 0, used)?)?.contiguous()?;
        let (logit_rows, classes) = logits.dims2()?;
        if logit_rows != branches * used {
            candle_core::bail!(
                "the model returned {logit_rows} rows of logits, expected {}",
                branches * used
            );
        }
        let settings = LossSettings {
            divergence: self.divergence,
            label_smoothing: self.label_smoothing,
            ignore_label: self.ignore_label,
            labelled_only: self.labelled_only,
            both_branches: self.both_branches,
            ..LossSettings::new(classes, self.lambda)
        };
        let floats = |all: &Tensor| {
            let (_, columns) = all.dims2()?;
            if columns != classes {
                candle_core::bail!("`targets` has {columns} columns, but the logits {classes}");
            }
            all.narrow(0, 0, used)?.to_device(logits.device())?.contiguous()
        };
        let targets = match batch.targets {
            Targets::Labels(labels) => Targets::Labels(&labels[..used]),
            Targets::Probabilities(all) => Targets::Probabilities(floats(all)?),
            Targets::Values(all) => Targets::Values(floats(all)?),
        };
        let terms = Terms { settings, targets, class_weights: self.class_weights.clone() };
        let (values, gradient) = match (logits.device(), logits.dtype()) {
            #[cfg(feature = "candle-cuda")]
            (candle_core::Device::Cuda(device), _) => {
                self.evaluate_on_device(device, terms, &logits, batch.index, branches)?
            }
            (_, DType::F32) => self.evaluate::<f32>(terms, &logits, batch.index, branches)?,
            (_, DType::F64) => self.evaluate::<f64>(terms, &logits, batch.index, branches)?,
            (_, other) => candle_core::bail!("logits are {other:?}, expected F32 or F64"),
        };
        let loss = scalar(&logits, values.total, gradient)?;
        Ok(Step { loss, values, logits: logits.narrow(0, 0, used)?.detach() })
    }

    /// The loss of some logits, and its gradient to them.
    fn evaluate<T: Remembered>(
        &mut self,
        terms: Terms<'_>,
        logits: &Tensor,
        index: Option<&[i64]>,
        branches: usize,
    ) -> Result<(LossValues, Tensor)> {
        let consistency = match (self.variant, branches) {
            (Variant::Fast { samples }, _) => {
                let (index, elements) = remembered(samples, terms.settings.classes, index)?;
                if self.history.is_none() {
                    let mut table = Vec::new();
                    if table.try_reserve_exact(elements).is_err() {
                        candle_core::bail!("there is no memory for the history of {samples} samples");
                    }
                    table.resize(elements, T::zero());
                    self.history = Some(T::history(table));
                }
                let table = self
                    .history
                    .as_mut()
                    .and_then(T::table)
                    .filter(|table| table.len() == elements)
                    .ok_or_else(other_logits)?;
                Consistency::History { table, index }
            }
            (_, 2) => Consistency::TwoBranch,
            _ => Consistency::None,
        };
        let mut gradient = vec![T::zero(); logits.elem_count()];
        let class_weights: Option<Vec<T>> =
            terms.class_weights.map(|all| all.into_iter().map(crate::Real::from_f64).collect());
        let floats = match &terms.targets {
            Targets::Labels(_) => None,
            Targets::Probabilities(all) | Targets::Values(all) => Some(all.to_dtype(logits.dtype())?),
        };
        let tensors: Vec<&Tensor> = [logits].into_iter().chain(&floats).collect();
        let values = with_slices::<T, _>("pace_loss", &tensors, |slices| {
            let targets = match &terms.targets {
                Targets::Labels(labels) => Targets::Labels(*labels),
                Targets::Probabilities(_) => Targets::Probabilities(slices[1]),
                Targets::Values(_) => Targets::Values(slices[1]),
            };
            let loss = Loss { settings: terms.settings, targets, class_weights: class_weights.as_deref() };
            wrap(loss.evaluate(slices[0], consistency, Some(&mut gradient)))
        })?;
        Ok((values, Tensor::from_vec(gradient, logits.shape(), logits.device())?))
    }

    /// The same for CUDA logits.
    #[cfg(feature = "candle-cuda")]
    fn evaluate_on_device(
        &mut self,
        device: &candle_core::CudaDevice,
        terms: Terms<'_>,
        logits: &Tensor,
        index: Option<&[i64]>,
        branches: usize,
    ) -> Result<(LossValues, Tensor)> {
        let partner = match (self.variant, branches) {
            (Variant::Fast { samples }, _) => {
                let (index, elements) = remembered(samples, terms.settings.classes, index)?;
                if self.history.is_none() {
                    self.history = Some(History::Device(device.alloc_zeros(elements)?));
                }
                match &mut self.history {
                    Some(History::Device(table)) if table.len() == elements => {
                        cuda::Partner::History { table, index }
                    }
                    _ => return Err(other_logits()),
                }
            }
            (_, 2) => cuda::Partner::OtherBranch,
            _ => cuda::Partner::None,
        };
        cuda::evaluate(device, terms, logits, partner)
    }
}

/// The index that the fast variant needs, and the elements of its history.
fn remembered(samples: usize, classes: usize, index: Option<&[i64]>) -> Result<(&[i64], usize)> {
    let index = index.ok_or_else(|| {
        Error::wrap(crate::Error::Argument { argument: "index", problem: "is required by the fast variant" })
    })?;
    Ok((index, wrap(crate::shape::product("history", "[n, C]", &[samples, classes]))?))
}

fn other_logits() -> Error {
    Error::Msg("the logits' type, classes or device changed between steps".into())
}
