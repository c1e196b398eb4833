//! The training loss and its gradient to the logits; plans `kernels/loss.cu` and `kernels/loss_general.cu`.

mod params;
mod status;

use super::borrows::Borrows;
use super::buffer::{Buffer, DType, Element, check_disjoint, in_bytes};
use super::device::Device;
use super::kernel::{Kernel, Kernels, WARP, table};
use super::plan::{Launch, Plan};
use crate::cpu::rows as rows_of;
use crate::error::{Error, Result};
use crate::loss::{Divergence, LossSettings, Targets, check_lambda};
use crate::shape::{nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
pub use params::*;
pub use status::{Finding, LossStatus};

/// Elements of a slice, at most.
const MAX_SLICE: usize = LOSS_GROUP * LOSS_ELEMENTS;
/// Threads of a block of several groups, at most.
const THREADS: usize = 256;
/// A batch is spread over so many blocks before a block gets several samples.
const SPREAD: usize = 64;
/// Blocks, at most, unless a row alone needs more, where each of them counts the labels of the whole batch.
const MAX_BLOCKS: usize = 1024;
/// Samples, at most: the kernels count them in `f32`.
pub(super) const MAX_BATCH: usize = 1 << 24;
pub(super) const MAX_CLASSES: usize = 1 << 30;
/// Blocks along the second dimension of a grid, at most.
const MAX_ROWS: usize = 65_535;
/// Words of the workspace: the counter of finished blocks, then for each sample its record, then for each of its slices, then again for
/// each sample what its slices add up to.
const TICKET_WORDS: usize = 1;
const RECORD_WORDS: usize = 3;

impl LossSettings {
    /// Words of workspace for a batch of that many samples, whatever its targets and class weights.
    pub fn workspace_len(&self, batch: usize) -> usize {
        let summaries = match self.slices() {
            1 => 0,
            slices => {
                slices.saturating_mul(LOSS_GENERAL_SUMMARY_WORDS).saturating_add(LOSS_GENERAL_KNOWN_WORDS)
            }
        };
        batch.saturating_mul(summaries.saturating_add(RECORD_WORDS)).saturating_add(TICKET_WORDS)
    }

    /// Elements of a slice; the last slice of a row may have fewer.
    fn slice(&self) -> usize {
        if self.classes <= MAX_SLICE {
            return self.classes;
        }
        // Whole vectors of every type, and about the same for all.
        self.classes.div_ceil(self.classes.div_ceil(MAX_SLICE)).next_multiple_of(8)
    }

    fn slices(&self) -> usize {
        self.classes.div_ceil(self.slice().max(1))
    }
}

/// What the logits of branch 0 are kept consistent with, for planning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Partner {
    /// Nothing: plain cross-entropy over logits `[B, C]`.
    None,
    /// The other branch: logits `[2B, C]`; the gradient flows into both.
    OtherBranch,
    /// The other branch, given as the difference `l0 − l1` in the second half of the logits `[2B, C]`. The gradient is to both.
    Difference,
    /// PACE-fast: the logits `[B, C]` that the same training samples had last time. Read, then overwritten.
    History {
        /// `H [n, C]`, `f32`.
        table: Buffer,
        /// The row of each sample, `[B]`, `i64`.
        index: Buffer,
    },
}

impl Partner {
    fn is_two_branches(&self) -> bool {
        matches!(self, Self::OtherBranch | Self::Difference)
    }

    /// The history table and the index.
    fn history(&self) -> (Option<Buffer>, Option<Buffer>) {
        match *self {
            Self::History { table, index } => (Some(table), Some(index)),
            _ => (None, None),
        }
    }
}

/// Arguments of a loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// What it is made of.
    pub settings: LossSettings,
    /// Type of the logits and of their gradient.
    pub dtype: DType,
    /// `[2B, C]` for [`Partner::OtherBranch`] and [`Partner::Difference`], otherwise `[B, C]`.
    pub logits: Buffer,
    /// What branch 0 is trained on: labels `i64`; probabilities and values `f32`.
    pub targets: Targets<Buffer, Buffer>,
    /// `[C]`, `f32`: weights of the classes in the cross-entropy; `None`: all 1.
    pub class_weights: Option<Buffer>,
    /// Labels `i64` of the whole batch, if the targets are a part of them: what the sums are divided by is counted there.
    pub counted: Option<Buffer>,
    /// What branch 0 is kept consistent with.
    pub partner: Partner,
    /// Output: the gradient of the total, of the logits' shape and type. It may be the memory of the logits, which it then replaces.
    pub gradient: Option<Buffer>,
    /// Output, `f32 [3]`: total, classification, consistency.
    pub values: Buffer,
    /// Output, `u64 [9]`: what [`LossStatus::new`] takes.
    pub status: Buffer,
    /// Whether values and counts of the status are added to what is there, for the parts of a batch one after the other; of wrong
    /// elements the first one stays. Needs a denominator, given or counted. An index is repeated if the same part has it twice.
    pub accumulate: bool,
    /// Position of the first sample in the whole batch: where the status counts from.
    pub first_row: usize,
    /// `u32`, at least [`LossSettings::workspace_len`]. The first word must be zero before the launch and is again after it;
    /// contents of the others are ignored.
    pub workspace: Buffer,
}

/// How a divergence is computed: the kernels' number of it, what it is multiplied by, and what its gradient is.
pub(super) fn how(divergence: Divergence, classes: usize) -> (u32, f64, f64) {
    match divergence {
        Divergence::SquaredDifference => (LOSS_SQUARED_DIFFERENCE, 1.0, 2.0),
        Divergence::MeanSquaredDifference => {
            (LOSS_SQUARED_DIFFERENCE, 1.0 / classes as f64, 2.0 / classes as f64)
        }
        Divergence::CenteredSquaredDifference => (LOSS_CENTERED_SQUARED_DIFFERENCE, 1.0, 2.0),
        Divergence::SymmetricKl => (LOSS_SYMMETRIC_KL, 0.5, 0.5),
        Divergence::Kl { temperature, .. } => (LOSS_KL, temperature * temperature, temperature),
        Divergence::JensenShannon => (LOSS_JENSEN_SHANNON, 0.5, 0.5),
    }
}

impl Loss {
    /// The plan that computes everything: one launch up to 4096 classes, two to five above.
    ///
    /// Probabilities and class weights are not checked: finite and not negative.
    ///
    /// # Errors
    /// If a size is zero or too large, a setting is out of range or has no meaning for the targets, or a buffer has the wrong length,
    /// is not aligned to its element or overlaps an output.
    pub fn plan(&self) -> Result<Plan> {
        self.plan_capped(None)
    }

    /// The same of logits `x` before a soft cap, `l = cap·tanh(x/cap)`, with the gradient to `x`; not of a difference, nor a history.
    pub(super) fn plan_capped(&self, soft_cap: Option<f32>) -> Result<Plan> {
        let batch = self.batch()?;
        let params = self.params(batch, self.check(batch)?, soft_cap);
        let (group, slices) = (params.group as usize, params.slices as usize);
        let groups = (batch / SPREAD).clamp(1, (THREADS / group).max(1));
        let launch = |kernel: Kernel, grid: [usize; 3], threads: usize| {
            let shared = 4 * (LOSS_SHARED_WORDS * threads / WARP + 1);
            Launch::new(kernel, grid.map(|blocks| blocks as u32), [threads as u32, 1, 1], shared, &params)
        };
        let counting = |kernels: Kernels, columns: usize| {
            let rows = batch.div_ceil(groups).min((MAX_BLOCKS / columns).max(1));
            launch(kernels.choose(self.dtype), [columns, rows, 1], groups * group)
        };
        // A block for each slice of each row.
        let parts = |kernels: Kernels, columns: usize| {
            let layers = batch.div_ceil(MAX_ROWS);
            launch(kernels.choose(self.dtype), [columns, batch.div_ceil(layers), layers], LOSS_GROUP)
        };
        // A warp for each row.
        let combine = |kernel: Kernel| {
            let blocks = batch.div_ceil(LOSS_GROUP / WARP).min(MAX_BLOCKS);
            launch(kernel, [1, blocks, 1], LOSS_GROUP)
        };
        // Without something to write for every element, one block per row writes what the launches before found.
        let writes = self.gradient.is_some() || matches!(self.partner, Partner::History { .. });
        let columns = if writes { slices } else { 1 };
        let mut plan = Plan::default();
        match (self.is_plain() && soft_cap.is_none(), slices) {
            (true, 1) => plan.push(counting(table::LOSS, 1)),
            (true, _) => {
                plan.push(counting(table::LOSS_SCAN, slices));
                plan.push(counting(table::LOSS_APPLY, columns));
            }
            (false, 1) => plan.push(counting(table::LOSS_GENERAL, 1)),
            (false, _) => {
                plan.push(parts(table::LOSS_GENERAL_SCAN, slices));
                plan.push(combine(table::LOSS_GENERAL_ROWS));
                // Those of the others are sums over slices that know the whole row, as they have no chain rule.
                let without_chain = [LOSS_CENTERED_SQUARED_DIFFERENCE, LOSS_JENSEN_SHANNON];
                if self.partner != Partner::None && without_chain.contains(&params.divergence) {
                    plan.push(parts(table::LOSS_GENERAL_SUMS, slices));
                    plan.push(combine(table::LOSS_GENERAL_DIVERGENCE));
                }
                plan.push(parts(table::LOSS_GENERAL_APPLY, columns));
            }
        }
        Ok(plan)
    }

    /// Whether it is the paper's loss but for factors, which `loss.cu` computes; all else is for `loss_general.cu`.
    fn is_plain(&self) -> bool {
        let is_square = matches!(
            self.settings.divergence,
            Divergence::SquaredDifference | Divergence::MeanSquaredDifference
        );
        (is_square || self.partner == Partner::None)
            && matches!(self.targets, Targets::Labels(_))
            && self.class_weights.is_none()
            && self.partner != Partner::Difference
            && !(self.settings.both_branches && self.partner == Partner::OtherBranch)
    }

    /// Samples of the batch.
    fn batch(&self) -> Result<usize> {
        let LossSettings { classes, .. } = self.settings;
        self.settings.check(&self.targets, self.class_weights.is_some())?;
        let (argument, batch) = match self.targets {
            Targets::Labels(labels) => ("labels.len()", labels.len),
            Targets::Probabilities(all) => {
                ("probabilities.len() / C", rows_of("probabilities.len()", all.len, classes)?)
            }
            Targets::Values(all) => ("values.len() / C", rows_of("values.len()", all.len, classes)?),
        };
        nonzero(argument, batch)?;
        if classes > MAX_CLASSES {
            return Err(Error::Size { argument: "classes", expected: "at most 2^30", got: classes });
        }
        check_batch(argument, batch)?;
        if let Some(labels) = self.counted {
            nonzero("counted.len()", labels.len)?;
            check_batch("counted.len()", labels.len)?;
        }
        Ok(batch)
    }

    /// What is divided by, as far as it is known: the gradient of the divergence.
    fn pull(&self, batch: usize) -> f64 {
        let LossSettings { classes, lambda, divergence, labelled_only, denominator, .. } = self.settings;
        let (_, _, of_gradient) = how(divergence, classes);
        let divisor = match (denominator, labelled_only) {
            (Some(denominator), _) => denominator,
            // The kernels count.
            (None, true) => 1.0,
            (None, false) => self.counted.map_or(batch, |labels| labels.len) as f64,
        };
        of_gradient * lambda / divisor
    }

    /// The parameters; `history_rows`: rows of the history table.
    fn params(&self, batch: usize, history_rows: usize, soft_cap: Option<f32>) -> LossParams {
        let LossSettings { classes, lambda, divergence, label_smoothing, ignore_label, .. } = self.settings;
        let (history, index) = self.partner.history();
        let (labels, targets, criterion) = match self.targets {
            Targets::Labels(labels) => (Some(labels), None, LOSS_LABELS),
            Targets::Probabilities(all) => (None, Some(all), LOSS_PROBABILITIES),
            Targets::Values(all) => (None, Some(all), LOSS_VALUES),
        };
        let counted = self.counted.or(labels);
        let (slice, slices) = (self.settings.slice(), self.settings.slices());
        let group = match slices {
            1 => classes.div_ceil(LOSS_ELEMENTS).next_power_of_two().max(WARP),
            _ => LOSS_GROUP,
        };
        let tensors = [Some(self.logits), self.gradient, history, targets, self.class_weights];
        let aligned = classes.is_multiple_of(16 / self.dtype.bytes())
            && tensors.iter().flatten().all(Buffer::is_vector_aligned);
        let (number, scale, _) = how(divergence, classes);
        let (temperature, detach_target) = match divergence {
            Divergence::Kl { temperature, detach_target } => (temperature, detach_target),
            _ => (1.0, false),
        };
        let two_branches = self.partner.is_two_branches();
        LossParams {
            logits: self.logits.into(),
            labels: labels.into(),
            counted: counted.into(),
            targets: targets.into(),
            class_weights: self.class_weights.into(),
            history: history.into(),
            index: index.into(),
            gradient: self.gradient.into(),
            values: self.values.into(),
            status: self.status.into(),
            workspace: self.workspace.into(),
            history_rows: history_rows as u64,
            ignore_label: ignore_label.unwrap_or_default(),
            first_row: self.first_row as u64,
            has_ignore_label: ignore_label.is_some().into(),
            two_branches: two_branches.into(),
            labelled_only: self.settings.labelled_only.into(),
            pull_per_label: (self.settings.labelled_only && self.settings.denominator.is_none()).into(),
            accumulate: self.accumulate.into(),
            criterion,
            divergence: number,
            both_branches: (self.settings.both_branches && two_branches).into(),
            is_difference: (self.partner == Partner::Difference).into(),
            detach_target: detach_target.into(),
            batch: batch as u32,
            counted_len: counted.map_or(batch, |labels| labels.len) as u32,
            classes: classes as u32,
            slice: slice as u32,
            slices: slices as u32,
            group: group as u32,
            aligned: aligned.into(),
            lambda: lambda as f32,
            smoothing: label_smoothing as f32,
            spread: (label_smoothing / classes as f64) as f32,
            pull: self.pull(batch) as f32,
            scale: scale as f32,
            denominator: self.settings.denominator.unwrap_or_default() as f32,
            inverse_temperature: (1.0 / temperature) as f32,
            soft_cap: soft_cap.unwrap_or_default(),
        }
    }

    /// Checks everything but the settings and the size of the batch, and gives the rows of the history table, 0 without one.
    fn check(&self, batch: usize) -> Result<usize> {
        let classes = self.settings.classes;
        self.check_numbers(batch)?;
        let bytes = self.dtype.bytes();
        let (shape, rows) = match self.partner.is_two_branches() {
            true => ("[2B, C]", 2 * batch),
            false => ("[B, C]", batch),
        };
        let len = product("logits", shape, &[rows, classes])?;
        self.logits.check("logits", shape, len, bytes)?;
        let targets = match self.targets {
            Targets::Labels(labels) => {
                labels.check("labels", "[B]", batch, 8)?;
                in_bytes("labels", labels, 8)
            }
            Targets::Probabilities(all) => {
                all.check("probabilities", "[B, C]", batch * classes, 4)?;
                in_bytes("probabilities", all, 4)
            }
            Targets::Values(all) => {
                all.check("values", "[B, C]", batch * classes, 4)?;
                in_bytes("values", all, 4)
            }
        };
        if let Some(weights) = self.class_weights {
            weights.check("class_weights", "[C]", classes, 4)?;
        }
        if let Some(labels) = self.counted {
            labels.check("counted", "[n]", labels.len, 8)?;
        }
        if let Some(gradient) = self.gradient {
            gradient.check("gradient", shape, len, bytes)?;
        }
        self.values.check("values", "[3]", 3, 4)?;
        self.status.check("status", "[9]", LossStatus::WORDS, 8)?;
        let workspace = self.workspace.check_workspace(self.settings.workspace_len(batch))?;
        let (table, index) = self.partner.history();
        let mut history = 0;
        if let Some(index) = index {
            index.check("index", "[B]", batch, 8)?;
        }
        if let Some(table) = table {
            history = rows_of("history.len()", product("history", "[n, C]", &[table.len])?, classes)?;
            table.check("history", "[n, C]", table.len, 4)?;
        }
        let outputs = [
            self.gradient.map(|gradient| in_bytes("gradient", gradient, bytes)),
            table.map(|table| in_bytes("history", table, 4)),
            Some(in_bytes("values", self.values, 4)),
            Some(in_bytes("status", self.status, 8)),
            Some(in_bytes("workspace", workspace, 4)),
        ];
        // In place of the logits, the gradient overwrites what has been read.
        let logits = Some(self.logits).filter(|logits| self.gradient != Some(*logits));
        let inputs = [
            logits.map(|logits| in_bytes("logits", logits, bytes)),
            Some(targets),
            self.class_weights.map(|weights| in_bytes("class_weights", weights, 4)),
            self.counted.map(|labels| in_bytes("counted", labels, 8)),
            index.map(|index| in_bytes("index", index, 8)),
        ];
        let [inputs, outputs] =
            [&inputs[..], &outputs].map(|named| named.iter().copied().flatten().collect::<Vec<_>>());
        check_disjoint(&inputs, &outputs, 1)?;
        Ok(history)
    }

    /// Whether the settings are numbers to the kernels as well, and which of them may stand together.
    fn check_numbers(&self, batch: usize) -> Result<()> {
        let LossSettings { lambda, denominator, .. } = self.settings;
        self.settings.check_history(matches!(self.partner, Partner::History { .. }))?;
        if let Some(got) = denominator.filter(|&value| !(value as f32).is_normal()) {
            return Err(Error::Value { argument: "denominator", expected: "in the range of f32", got });
        }
        for factor in [2.0 * lambda, self.pull(batch)] {
            check_lambda(f64::from(factor as f32))?;
        }
        let problem = |argument, problem| Err(Error::Argument { argument, problem });
        if self.counted.is_some() && denominator.is_some() {
            return problem("counted", "is not counted, as there is a denominator");
        }
        if self.counted.is_some() && !matches!(self.targets, Targets::Labels(_)) {
            return problem("counted", "are labels, and the targets are not");
        }
        if self.accumulate && self.counted.is_none() && denominator.is_none() {
            return problem("accumulate", "needs a denominator, given or counted");
        }
        Ok(())
    }
}

/// Checks a number of labels.
fn check_batch(argument: &'static str, got: usize) -> Result<()> {
    if got > MAX_BATCH {
        return Err(Error::Size { argument, expected: "at most 2^24", got });
    }
    Ok(())
}

/// What the logits of branch 0 are kept consistent with.
pub enum Consistency<'a> {
    /// Nothing: plain cross-entropy over logits `[B, C]` (the lazy variant's full-batch iterations).
    None,
    /// The other branch: logits `[2B, C]`; the gradient flows into both.
    TwoBranch,
    /// The other branch, given as the difference `l0 − l1` in the second half of the logits `[2B, C]`. The gradient is to both.
    Difference,
    /// PACE-fast: the logits `[B, C]` that the same training samples had last time. Read, then overwritten.
    History {
        /// `H [n, C]`, zeros at the start.
        table: &'a mut dyn DevicePtrMut<f32>,
        /// The row of each sample, `[B]`; no row twice.
        index: &'a dyn DevicePtr<i64>,
    },
}

/// What [`Device::loss`] reads.
#[derive(Clone, Copy)]
pub struct LossInputs<'a, T> {
    /// `[2B, C]` for [`Consistency::TwoBranch`] and [`Consistency::Difference`], otherwise `[B, C]`.
    pub logits: &'a dyn DevicePtr<T>,
    /// Labels `[B]`, each in `0..C` or the ignored label; probabilities or values `[B, C]`, finite, which is not checked.
    pub targets: Targets<&'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>,
    /// Weights of the classes in the cross-entropy `[C]`, finite and not negative, which is not checked; `None`: all 1.
    pub class_weights: Option<&'a dyn DevicePtr<f32>>,
    /// Labels of the whole batch, if the targets are a part of them: see [`Loss::counted`].
    pub counted: Option<&'a dyn DevicePtr<i64>>,
    /// Position of the first sample in the whole batch.
    pub first_row: usize,
}

impl<'a, T> LossInputs<'a, T> {
    /// Of a whole batch, without class weights.
    pub fn new(
        logits: &'a dyn DevicePtr<T>,
        targets: Targets<&'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>,
    ) -> Self {
        Self { logits, targets, class_weights: None, counted: None, first_row: 0 }
    }
}

/// Where [`Device::loss`] writes.
pub struct LossOutputs<'a, T> {
    /// The gradient of the total, of the logits' shape, if it is wanted.
    pub gradient: Option<&'a mut dyn DevicePtrMut<T>>,
    /// `[3]`: total, classification, consistency, as [`LossValues`](crate::cpu::LossValues) has them.
    pub values: &'a mut dyn DevicePtrMut<f32>,
    /// `[9]`, [`LossStatus::WORDS`]: what [`LossStatus::new`] takes.
    pub status: &'a mut dyn DevicePtrMut<u64>,
    /// At least [`LossSettings::workspace_len`] words. The first must be zero before the first call, or values and status mean
    /// nothing; every call leaves it zero. Allocate zeros once, and use them for one stream.
    pub workspace: &'a mut dyn DevicePtrMut<u32>,
    /// Whether values and status are added to what is there: see [`Loss::accumulate`].
    pub accumulate: bool,
}

impl<'a, T> LossOutputs<'a, T> {
    /// Of a whole batch, without a gradient.
    pub fn new(
        values: &'a mut dyn DevicePtrMut<f32>,
        status: &'a mut dyn DevicePtrMut<u64>,
        workspace: &'a mut dyn DevicePtrMut<u32>,
    ) -> Self {
        Self { gradient: None, values, status, workspace, accumulate: false }
    }
}

impl Device {
    /// The loss of logits, and its gradient if it is wanted: [`cpu::Loss`](crate::cpu::Loss) in `f32` arithmetic.
    ///
    /// Labels and indices lie on the device, so what is wrong with them is not an error of this call, and
    /// nothing is read or written out of bounds because of it: a wrong label counts as ignored; for an index that is no row
    /// of the table, or that of an earlier sample (found by comparing all of the batch), there is no consistency term and
    /// the table is left alone. Download the status when it suits, and ask [`LossStatus::check`].
    ///
    /// # Errors
    /// As [`Loss::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn loss<'a, T: Element>(
        &'a self,
        settings: &LossSettings,
        inputs: LossInputs<'a, T>,
        consistency: Consistency<'a>,
        outputs: LossOutputs<'a, T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let plan = Loss {
            settings: *settings,
            dtype: T::DTYPE,
            logits: borrows.input("logits", inputs.logits)?,
            targets: match inputs.targets {
                Targets::Labels(labels) => Targets::Labels(borrows.input("labels", labels)?),
                Targets::Probabilities(all) => Targets::Probabilities(borrows.input("probabilities", all)?),
                Targets::Values(all) => Targets::Values(borrows.input("values", all)?),
            },
            class_weights: borrows.optional("class_weights", inputs.class_weights)?,
            counted: borrows.optional("counted", inputs.counted)?,
            partner: match consistency {
                Consistency::None => Partner::None,
                Consistency::TwoBranch => Partner::OtherBranch,
                Consistency::Difference => Partner::Difference,
                Consistency::History { table, index } => Partner::History {
                    table: borrows.output("history", table)?,
                    index: borrows.input("index", index)?,
                },
            },
            gradient: borrows.optional_output("gradient", outputs.gradient)?,
            values: borrows.output("values", outputs.values)?,
            status: borrows.output("status", outputs.status)?,
            accumulate: outputs.accumulate,
            first_row: inputs.first_row,
            workspace: borrows.output("workspace", outputs.workspace)?,
        }
        .plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }
}
