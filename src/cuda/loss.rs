//! The training loss and its gradient to the logits; plans `kernels/loss.cu`.

use super::borrows::Borrows;
use super::buffer::{Buffer, DType, Element, Named, check_disjoint};
use super::device::Device;
use super::kernel::{Kernels, WARP, table};
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::cpu::rows as rows_of;
use crate::error::{Error, Result};
use crate::loss::{LossSettings, Targets, check_lambda};
use crate::shape::{nonzero, product};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// What a thread holds of a row.
pub const LOSS_ELEMENTS: usize = 8;
/// Threads that share a row or a slice of one, at most; then they are the block.
pub const LOSS_GROUP: usize = 512;
/// Elements of a slice, at most.
const MAX_SLICE: usize = LOSS_GROUP * LOSS_ELEMENTS;
/// Threads of a block of several groups, at most.
const THREADS: usize = 256;
/// A batch is spread over so many blocks before a block gets several samples.
const SPREAD: usize = 64;
/// Blocks, at most, unless a row alone needs more: each of them counts the labels of the whole batch.
const MAX_BLOCKS: usize = 1024;
/// Words of shared memory for each warp of a block; one more is for all of them.
pub const LOSS_SHARED_WORDS: usize = 9;
/// Samples, at most: the kernels count them in `f32`.
const MAX_BATCH: usize = 1 << 24;
const MAX_CLASSES: usize = 1 << 30;
/// Words of the workspace: the counter of finished blocks, then for each sample its record, then for each of its slices.
const TICKET_WORDS: usize = 1;
const RECORD_WORDS: usize = 3;
const SUMMARY_WORDS: usize = 4;

impl LossSettings {
    /// Words of workspace for a batch of that many samples.
    pub fn workspace_len(&self, batch: usize) -> usize {
        let summaries = match self.slices() {
            1 => 0,
            slices => slices.saturating_mul(SUMMARY_WORDS),
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

/// Arguments of a loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// What it is made of.
    pub settings: LossSettings,
    /// Type of the logits and of their gradient.
    pub dtype: DType,
    /// `[2B, C]` for [`Partner::OtherBranch`], otherwise `[B, C]`.
    pub logits: Buffer,
    /// What branch 0 is trained on: labels `i64`; probabilities and values `f32`.
    pub targets: Targets<Buffer, Buffer>,
    /// `[C]`, `f32`: weights of the classes in the cross-entropy; `None`: all 1.
    pub class_weights: Option<Buffer>,
    /// What branch 0 is kept consistent with.
    pub partner: Partner,
    /// Output: the gradient of the total, of the logits' shape and type.
    pub gradient: Option<Buffer>,
    /// Output, `f32 [3]`: total, classification, consistency.
    pub values: Buffer,
    /// Output, `u64 [9]`: what [`LossStatus::new`] takes.
    pub status: Buffer,
    /// `u32`, at least [`LossSettings::workspace_len`]. The first word must be zero before the launch and is again after it;
    /// contents of the others are ignored.
    pub workspace: Buffer,
}

const NOT_YET: Error =
    Error::Argument { argument: "settings", problem: "ask for a loss that CUDA does not have yet" };

/// Parameters of the kernels `loss*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LossParams {
    logits: Input<Void>,
    labels: Input<i64>,
    /// Null: none.
    history: Output<f32>,
    index: Input<i64>,
    /// Null: not wanted.
    gradient: Output<Void>,
    values: Output<f32>,
    status: Output<u64>,
    workspace: Output<u32>,
    history_rows: u64,
    ignore_label: i64,
    has_ignore_label: u32,
    two_branches: u32,
    /// Samples `B`, below 2^24: counts and positions are exact in f32.
    batch: u32,
    /// Classes `C`.
    classes: u32,
    /// Elements of a slice; the last may have fewer.
    slice: u32,
    /// Slices of a row.
    slices: u32,
    /// Threads of a group.
    group: u32,
    /// Rows and slices of every tensor start at multiples of 16 bytes and hold whole vectors.
    aligned: u32,
    lambda: f32,
    /// Label smoothing `s`.
    smoothing: f32,
    /// `s / C`.
    spread: f32,
    /// `2 lambda / B`.
    pull: f32,
}

impl Loss {
    /// The plan that computes everything: one launch up to 4096 classes, two above.
    ///
    /// # Errors
    /// If a size is zero or too large, λ or the smoothing is out of range, or a buffer has the wrong length, is not aligned
    /// to its element or overlaps an output.
    pub fn plan(&self) -> Result<Plan> {
        let LossSettings { classes, lambda, label_smoothing, ignore_label, .. } = self.settings;
        let Targets::Labels(labels) = self.targets else {
            return Err(NOT_YET);
        };
        if self.settings
            != (LossSettings { label_smoothing, ignore_label, ..LossSettings::new(classes, lambda) })
            || self.class_weights.is_some()
            || self.partner == Partner::Difference
        {
            return Err(NOT_YET);
        }
        let (batch, bytes) = (labels.len, self.dtype.bytes());
        let history_rows = self.check()?;
        let (history, index) = match self.partner {
            Partner::History { table, index } => (Some(table), Some(index)),
            _ => (None, None),
        };

        let (slice, slices) = (self.settings.slice(), self.settings.slices());
        let group = match slices {
            1 => classes.div_ceil(LOSS_ELEMENTS).next_power_of_two().max(WARP),
            _ => LOSS_GROUP,
        };
        let groups = (batch / SPREAD).clamp(1, (THREADS / group).max(1));
        let threads = groups * group;
        let aligned = classes.is_multiple_of(16 / bytes)
            && [Some(self.logits), self.gradient, history].iter().flatten().all(Buffer::is_vector_aligned);
        let params = LossParams {
            logits: self.logits.into(),
            labels: labels.into(),
            history: history.into(),
            index: index.into(),
            gradient: self.gradient.into(),
            values: self.values.into(),
            status: self.status.into(),
            workspace: self.workspace.into(),
            history_rows: history_rows as u64,
            ignore_label: ignore_label.unwrap_or_default(),
            has_ignore_label: ignore_label.is_some().into(),
            two_branches: (self.partner == Partner::OtherBranch).into(),
            batch: batch as u32,
            classes: classes as u32,
            slice: slice as u32,
            slices: slices as u32,
            group: group as u32,
            aligned: aligned.into(),
            lambda: lambda as f32,
            smoothing: label_smoothing as f32,
            spread: (label_smoothing / classes as f64) as f32,
            pull: (2.0 * lambda / batch as f64) as f32,
        };
        let launch = |kernels: Kernels, columns: usize| {
            let rows = batch.div_ceil(groups).min((MAX_BLOCKS / columns).max(1));
            let (grid, block) = ([columns as u32, rows as u32, 1], [threads as u32, 1, 1]);
            let shared = 4 * (LOSS_SHARED_WORDS * threads / WARP + 1);
            Launch::new(kernels.choose(self.dtype), grid, block, shared, &params)
        };
        if slices == 1 {
            return Ok(launch(table::LOSS, 1).into());
        }
        // Without something to write for every element, one block per row combines what the first launch found.
        let writes = self.gradient.is_some() || history.is_some();
        let mut plan = Plan::from(launch(table::LOSS_SCAN, slices));
        plan.push(launch(table::LOSS_APPLY, if writes { slices } else { 1 }));
        Ok(plan)
    }

    /// Checks everything and gives the rows of the history table, 0 without one.
    fn check(&self) -> Result<usize> {
        let LossSettings { classes, lambda, .. } = self.settings;
        self.settings.check(&self.targets, self.class_weights.is_some())?;
        let Targets::Labels(labels) = self.targets else { return Err(NOT_YET) };
        let batch = labels.len;
        nonzero("labels.len()", batch)?;
        if classes > MAX_CLASSES {
            return Err(Error::Size { argument: "classes", expected: "at most 2^30", got: classes });
        }
        if batch > MAX_BATCH {
            return Err(Error::Size { argument: "labels.len()", expected: "at most 2^24", got: batch });
        }
        // As the kernels have it.
        check_lambda(f64::from((2.0 * lambda) as f32))?;

        let bytes = self.dtype.bytes();
        let (shape, rows) = match self.partner {
            Partner::OtherBranch | Partner::Difference => ("[2B, C]", 2 * batch),
            Partner::None | Partner::History { .. } => ("[B, C]", batch),
        };
        let len = product("logits", shape, &[rows, classes])?;
        self.logits.check("logits", shape, len, bytes)?;
        labels.check("labels", "[B]", batch, 8)?;
        if let Some(gradient) = self.gradient {
            gradient.check("gradient", shape, len, bytes)?;
        }
        self.values.check("values", "[3]", 3, 4)?;
        self.status.check("status", "[9]", LossStatus::WORDS, 8)?;
        let workspace = self.workspace.check_workspace(self.settings.workspace_len(batch))?;
        let (table, index) = match self.partner {
            Partner::History { table, index } => (Some(table), Some(index)),
            _ => (None, None),
        };
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
        let inputs = [
            Some(in_bytes("logits", self.logits, bytes)),
            Some(in_bytes("labels", labels, 8)),
            index.map(|index| in_bytes("index", index, 8)),
        ];
        let [inputs, outputs] =
            [&inputs[..], &outputs].map(|named| named.iter().copied().flatten().collect::<Vec<_>>());
        check_disjoint(&inputs, &outputs, 1)?;
        Ok(history)
    }
}

/// A tensor and its name for `check_disjoint`, in bytes: elements differ in size.
fn in_bytes(argument: &'static str, buffer: Buffer, bytes: usize) -> Named {
    (argument, Buffer { len: buffer.len * bytes, ..buffer })
}

/// One kind of wrong element among the labels or indices of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finding {
    /// How many there are; the rest is zero if there are none.
    pub count: u64,
    /// Position of the first.
    pub position: u64,
    /// What stands there.
    pub value: i64,
}

/// What a loss found wrong with data that only the device has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LossStatus {
    /// Labels that are neither a class nor the ignored label. They count as ignored.
    pub labels: Finding,
    /// Indices that are not a row of the history table. Their samples have no consistency term.
    pub indices: Finding,
    /// Indices that an earlier sample of the batch has as well. Their samples have no consistency term, and the table keeps
    /// the logits of the first.
    pub repeated: Finding,
}

impl LossStatus {
    /// Length of the status in device memory.
    pub const WORDS: usize = 9;

    /// The status from what was downloaded.
    pub fn new(words: [u64; Self::WORDS]) -> Self {
        let finding =
            |i: usize| Finding { count: words[i], position: words[i + 1], value: words[i + 2].cast_signed() };
        Self { labels: finding(0), indices: finding(3), repeated: finding(6) }
    }

    /// The error that the CPU operator would have given, for a loss over that many classes and rows of history.
    ///
    /// # Errors
    /// [`Error::Label`] for the first wrong label; if there is none, [`Error::Index`] or [`Error::DuplicateIndex`] for the
    /// first wrong index.
    pub fn check(&self, classes: usize, rows: usize) -> Result<()> {
        let at = |finding: Finding| finding.position as usize;
        let Self { labels, indices, repeated } = *self;
        if labels.count > 0 {
            return Err(Error::Label { position: at(labels), label: labels.value, classes });
        }
        if indices.count > 0 && (repeated.count == 0 || indices.position < repeated.position) {
            return Err(Error::Index { position: at(indices), index: indices.value, rows });
        }
        if repeated.count > 0 {
            return Err(Error::DuplicateIndex { position: at(repeated), index: repeated.value });
        }
        Ok(())
    }
}

/// What the logits of branch 0 are kept consistent with.
pub enum Consistency<'a> {
    /// Nothing: plain cross-entropy over logits `[B, C]` (the lazy variant's full-batch iterations).
    None,
    /// The other branch: logits `[2B, C]`; the gradient flows into both.
    TwoBranch,
    /// PACE-fast: the logits `[B, C]` that the same training samples had last time. Read, then overwritten.
    History {
        /// `H [n, C]`, zeros at the start.
        table: &'a mut dyn DevicePtrMut<f32>,
        /// The row of each sample, `[B]`; no row twice.
        index: &'a dyn DevicePtr<i64>,
    },
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
}

impl Device {
    /// The loss of `logits`, and its gradient if it is wanted: [`cpu::Loss`](crate::cpu::Loss) in `f32` arithmetic.
    ///
    /// `logits` are `[2B, C]` for [`Consistency::TwoBranch`], otherwise `[B, C]`; `labels` are `[B]`, each in `0..C` or the
    /// ignored label. Labels and indices lie on the device, so what is wrong with them is not an error of this call, and
    /// nothing is read or written out of bounds because of it: a wrong label counts as ignored; for an index that is no row
    /// of the table, or that of an earlier sample (found by comparing all of the batch), there is no consistency term and
    /// the table is left alone. Download the status when it suits, and ask [`LossStatus::check`].
    ///
    /// # Errors
    /// As [`Loss::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn loss<'a, T: Element>(
        &'a self,
        settings: &LossSettings,
        logits: &'a dyn DevicePtr<T>,
        targets: Targets<&'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>,
        consistency: Consistency<'a>,
        outputs: LossOutputs<'a, T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let plan = Loss {
            settings: *settings,
            dtype: T::DTYPE,
            logits: borrows.input("logits", logits)?,
            targets: match targets {
                Targets::Labels(labels) => Targets::Labels(borrows.input("labels", labels)?),
                Targets::Probabilities(all) => Targets::Probabilities(borrows.input("probabilities", all)?),
                Targets::Values(all) => Targets::Values(borrows.input("values", all)?),
            },
            class_weights: None,
            partner: match consistency {
                Consistency::None => Partner::None,
                Consistency::TwoBranch => Partner::OtherBranch,
                Consistency::History { table, index } => Partner::History {
                    table: borrows.output("history", table)?,
                    index: borrows.input("index", index)?,
                },
            },
            gradient: borrows.optional_output("gradient", outputs.gradient)?,
            values: borrows.output("values", outputs.values)?,
            status: borrows.output("status", outputs.status)?,
            workspace: borrows.output("workspace", outputs.workspace)?,
        }
        .plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }
}
