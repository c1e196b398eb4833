//! The head of a language model with its loss; plans GEMMs of cuBLASLt, `kernels/lm_head.cu` and the kernels of the loss.

use super::borrows::Borrows;
use super::buffer::{Address, Buffer, DType, Element, check_disjoint, in_bytes, rows_are_aligned};
use super::device::Device;
use super::gemm::{Arena, Gemms, Workspace};
use super::gpu::Gpu;
use super::kernel::{WARP, table};
use super::layer::Arithmetic;
use super::loss::{Loss, Partner};
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::cpu::{Lora, check_scale};
use crate::error::{Error, Result};
use crate::loss::{Divergence, LossSettings, Targets, check_lambda};
use crate::shape::{nonzero, product};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block.
pub const LM_HEAD_THREADS: usize = 256;
/// Blocks that add to one sum, at most.
const MAX_BLOCKS: usize = 1024;
/// Bytes of workspace that chunks are made for.
const WORKSPACE: usize = 288_000_000;
/// Rows of a chunk are a multiple of this, where there are more: tiles of a GEMM.
const ROWS: usize = 128;
/// What `ΔhᵀΔh` is multiplied by before it is rounded to 16 bits: `f16` has few bits for small numbers.
const MOMENT_SCALE: f32 = 1024.0;

/// A linear layer from hidden states to a vocabulary, and the loss of its logits: forward and backward in one plan, with the logits of
/// some rows in memory at a time. What [`cpu::LmHead`](crate::cpu::LmHead) computes, whose documentation has the formulas.
///
/// `T` are tensors of one type, [`Buffer`] for planning or `cudarc`'s (see [`Device::lm_head`]); `I` labels; `F` tensors of `f32`.
///
/// Logits and their gradients take the same memory, of the type of `h`; every GEMM adds up in `f32`. Squared differences go by the
/// Gram matrix `G = WᵀW`, unless they are centred or there is LoRA or a soft cap: then, as for the other divergences, the difference
/// `Δh·Wᵀ` is computed instead. `G` is in `f32`; in 16 bits it and `Δh` are multiplied as sums of two `bf16` numbers, 16 bits in all.
///
/// A gradient below 6e-8 is nothing in `f16`, and those to logits are divided by the number of tokens: give a `denominator` that has the
/// loss scale in it, or use `bf16`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHead<T, I, F> {
    /// What the loss is made of; `classes` is the size of the vocabulary `V`.
    pub settings: LossSettings,
    /// `M`: tokens of a branch.
    pub tokens: usize,
    /// `H`.
    pub hidden_size: usize,
    /// 2, or 1 for the criterion alone.
    pub branches: usize,
    /// The token after each hidden state, `i64 [M]`: in `0..V` or the ignored label.
    pub labels: I,
    /// `W [V, H]`.
    pub weight: T,
    /// `b [V]`, at a multiple of 16 bytes; not with a `logit_scale`.
    pub bias: Option<T>,
    /// LoRA on `W`, without noise.
    pub lora: Option<Lora<T, f32>>,
    /// `[V]`: weights of the classes in the cross-entropy, finite and not negative, which is not checked; `None`: all 1.
    pub class_weights: Option<F>,
    /// `G [H, H]` from [`gram`](Self::gram), for a `W` that does not change; `None`: computed by each plan that needs it.
    pub gram: Option<F>,
    /// `a`, not 0; 1 in most models.
    pub logit_scale: f64,
    /// `cap`, more than 0.
    pub soft_cap: Option<f64>,
    /// Rows of a branch whose logits are in memory at a time; `None`: as many as fit in 288 MB with all else.
    pub chunk_rows: Option<usize>,
    /// Whether `f32` is multiplied as TF32 (10 fraction bits); never by the Gram matrix.
    pub allow_tf32: bool,
}

/// What an [`LmHead`] writes; gradients are overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHeadOutputs<T, F, S, W> {
    /// `dh`, of the shape and type of `h`.
    pub hidden: Option<T>,
    /// `dW [V, H]`, in `f32` whatever the type of `W`: chunks are added to it.
    pub weight: Option<F>,
    /// `db [V]`, `f32`.
    pub bias: Option<F>,
    /// `dB [V, r]` of the LoRA, `f32`.
    pub lora_b: Option<F>,
    /// `dA [r, H]` of the LoRA, `f32`.
    pub lora_a: Option<F>,
    /// `f32 [3]`: total, criterion, consistency.
    pub values: F,
    /// `u64 [9]`: what [`LossStatus::new`](super::LossStatus::new) takes.
    pub status: S,
    /// `u32`, at least [`LmHead::workspace_len`]. The first word must be zero before the launch and is again after it; contents of the
    /// others are ignored.
    pub workspace: W,
}

/// The head as plans have it.
type Head = LmHead<Buffer, Buffer, Buffer>;
type Outputs = LmHeadOutputs<Buffer, Buffer, Buffer, Buffer>;

/// Rows of both branches.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadRows {
    first: Input<Void>,
    second: Input<Void>,
    labels: Input<i64>,
    ignore_label: i64,
    has_ignore_label: u32,
    labelled_only: u32,
    /// What labels are below.
    classes: u32,
    count: u32,
    columns: u32,
    /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
    aligned: u32,
}

/// Parameters of the kernels `lm_head_difference*` and `lm_head_parts*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadDifferenceParams {
    rows: LmHeadRows,
    high: Output<Void>,
    /// Null: not wanted.
    low: Output<Void>,
}

/// Parameters of the kernels `lm_head_split*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadSplitParams {
    matrix: Input<f32>,
    high: Output<Void>,
    /// Null: not wanted.
    low: Output<Void>,
    /// Another factor; null: none.
    weight: Input<f32>,
    factor: f32,
    rows: u32,
    columns: u32,
    aligned: u32,
}

/// Parameters of the kernels `lm_head_pull*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadPullParams {
    rows: LmHeadRows,
    product: Input<f32>,
    /// Null: gradients are not wanted.
    to_first: Output<Void>,
    to_second: Output<Void>,
    values: Output<f32>,
    workspace: Output<u32>,
    /// 1 over what the sum of distances is divided by; null: it is `inverse`.
    weight: Input<f32>,
    inverse: f32,
    /// What the gradient of a distance is multiplied by, with lambda, before `weight`.
    pull: f32,
    /// And the distance.
    scale: f32,
    lambda: f32,
}

/// Parameters of the kernels `lm_head_bias*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadBiasParams {
    gradient: Input<Void>,
    bias: Output<f32>,
    rows: u32,
    columns: u32,
    factor: f32,
    accumulate: u32,
    aligned: u64,
}

/// Parameters of the kernel `lm_head_weight`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadWeightParams {
    labels: Input<i64>,
    weight: Output<f32>,
    ignore_label: i64,
    has_ignore_label: u32,
    classes: u32,
    rows: u64,
}

/// The workspace, cut up.
#[derive(Debug, Clone, Copy)]
struct Places {
    /// Rows of a branch in a chunk.
    rows: usize,
    library: Workspace,
    /// Logits of the branches that have them, then their gradients.
    logits: Address,
    /// `Δh`; in parts where it meets the Gram matrix.
    delta: [Address; 2],
    /// `Δh·G`, `f32`.
    product: Address,
    /// `G` in parts; at the end `ΔhᵀΔh`, rounded.
    gram_parts: [Address; 2],
    /// `G` if it is not given, `f32`.
    gram: Address,
    /// `ΔhᵀΔh`, `f32`.
    moment: Address,
    /// `h·Aᵀ` and `dl·B` of one branch.
    low_rank: [Address; 2],
    /// 1 over the number of labels, `f32`.
    weight: Address,
}

impl<T, I, F> LmHead<T, I, F> {
    /// Whether the Gram matrix stands for the logits of branch 1; `trains`: whether there is a gradient to the weight.
    fn has_gram(&self, trains: bool) -> bool {
        self.branches == 2
            && self.soft_cap.is_none()
            && self.lora.is_none()
            && self.settings.divergence != Divergence::CenteredSquaredDifference
            && self.settings.takes_gram(self.tokens, self.hidden_size, self.gram.is_some(), trains)
    }

    /// The `u32` elements of workspace; `trains`: whether there is a gradient to the weight. 0 for sizes that are refused.
    pub fn workspace_len(&self, gpu: &Gpu, dtype: DType, trains: bool) -> usize {
        if self.check_sizes().is_err() {
            return 0;
        }
        self.len_for(gpu, dtype, trains, self.rows(gpu, dtype, trains))
    }

    /// The same for chunks of so many rows.
    fn len_for(&self, gpu: &Gpu, dtype: DType, trains: bool, rows: usize) -> usize {
        let rest = Arena::len_of(|arena| {
            self.places(gpu, dtype, trains, rows, arena);
        });
        self.words(rows).saturating_add(rest)
    }

    /// The beginning of the workspace, where the word lies that has to be zero: the loss's part, or what a sum over blocks needs.
    fn words(&self, rows: usize) -> usize {
        self.settings.workspace_len(rows).max(1 + MAX_BLOCKS)
    }

    /// The `u32` elements of workspace for the Gram matrix alone.
    pub fn gram_workspace_len(&self, gpu: &Gpu) -> usize {
        Arena::len_of(|arena| {
            self.gram_workspace(gpu, arena);
        })
    }

    /// Behind the head's word that has to be zero, so that one workspace does for both.
    fn gram_workspace(&self, gpu: &Gpu, arena: &mut Arena) -> Workspace {
        arena.take(4);
        arena.take_workspace(gpu, self.hidden_size.saturating_mul(self.hidden_size))
    }

    fn check_sizes(&self) -> Result<()> {
        self.check_weight_sizes()?;
        check_size("tokens", self.tokens)?;
        check_size("rank", self.lora.as_ref().map_or(1, |lora| lora.rank))?;
        if !(1..=2).contains(&self.branches) {
            return Err(Error::Size { argument: "branches", expected: "1 or 2", got: self.branches });
        }
        self.chunk_rows.map_or(Ok(()), |rows| nonzero("chunk_rows", rows))
    }

    fn check_weight_sizes(&self) -> Result<()> {
        check_size("classes", self.settings.classes)?;
        check_size("hidden_size", self.hidden_size)
    }

    /// Rows of a branch in a chunk.
    fn rows(&self, gpu: &Gpu, dtype: DType, trains: bool) -> usize {
        let fitting = || {
            let bytes = |rows| self.len_for(gpu, dtype, trains, rows).saturating_mul(4);
            let fixed = bytes(0);
            let each = bytes(ROWS).saturating_sub(fixed).max(1);
            let most = (WORKSPACE.saturating_sub(fixed) / each).max(1).saturating_mul(ROWS);
            // All chunks about the same.
            self.tokens.div_ceil(self.tokens.div_ceil(most)).next_multiple_of(ROWS)
        };
        self.chunk_rows.unwrap_or_else(fitting).min(self.tokens)
    }

    fn places(&self, gpu: &Gpu, dtype: DType, trains: bool, rows: usize, arena: &mut Arena) -> Places {
        let (v, h, bytes) = (self.settings.classes, self.hidden_size, dtype.bytes());
        let has_gram = self.has_gram(trains);
        let matrix =
            |rows: usize, columns: usize, bytes: usize| rows.saturating_mul(columns).saturating_mul(bytes);
        let mut take_if =
            |is_needed: bool, bytes: usize| if is_needed { arena.take(bytes) } else { Address::NONE };
        let weight = take_if(has_gram, 4);
        let has_logits = if has_gram { 1 } else { self.branches };
        let logits = take_if(true, matrix(has_logits * rows, v, bytes));
        let in_parts = has_gram && dtype != DType::F32;
        let has_delta = self.branches == 2 && self.soft_cap.is_none();
        let delta = [has_delta, in_parts].map(|is_needed| take_if(is_needed, matrix(rows, h, bytes)));
        let product = take_if(has_gram, matrix(rows, h, 4));
        let rank = self.lora.as_ref().map_or(0, |lora| lora.rank);
        let low_rank = [rank > 0; 2].map(|is_needed| take_if(is_needed, matrix(rows, rank, bytes)));
        let gram_parts = [in_parts; 2].map(|is_needed| take_if(is_needed, matrix(h, h, bytes)));
        let gram = take_if(has_gram && self.gram.is_none(), matrix(h, h, 4));
        // In parts, the Gram matrix is not needed any more.
        let moment = match in_parts && self.gram.is_none() {
            true => gram,
            false => take_if(has_gram && trains, matrix(h, h, 4)),
        };
        let largest = matrix(rows, v.max(h), 1).max(if trains { matrix(v, h, 1) } else { 0 });
        let library = arena.take_workspace(gpu, largest.max(matrix(h, h, usize::from(has_gram))));
        Places { rows, library, logits, delta, product, gram_parts, gram, moment, low_rank, weight }
    }
}

/// Checks a size of a GEMM, which a library indexes with 32 bits.
fn check_size(argument: &'static str, got: usize) -> Result<()> {
    nonzero(argument, got)?;
    match i32::try_from(got) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::Size { argument, expected: "below 2^31", got }),
    }
}

/// `count` rows of a tensor from row `start` on.
fn part(of: Buffer, start: usize, count: usize, columns: usize, bytes: usize) -> Buffer {
    Buffer { address: of.address + (start * columns * bytes) as u64, len: count * columns }
}

impl Head {
    /// The plan that computes `G [H, H]`, `f32`, once for a `W` that does not change. `workspace`, `u32`, has at least
    /// [`gram_workspace_len`](Self::gram_workspace_len) elements; contents are ignored, and the first word stays.
    ///
    /// # Errors
    /// If a size is zero or too large, or a buffer has the wrong length, is not aligned to its element or overlaps an output.
    pub fn gram(&self, gpu: &Gpu, dtype: DType, gram: Buffer, workspace: Buffer) -> Result<Plan> {
        self.check_weight_sizes()?;
        let (v, h) = (self.settings.classes, self.hidden_size);
        self.weight.check("weight", "[V, H]", product("weight", "[V, H]", &[v, h])?, dtype.bytes())?;
        gram.check("gram", "[H, H]", product("gram", "[H, H]", &[h, h])?, 4)?;
        let workspace = workspace.check_workspace(self.gram_workspace_len(gpu))?;
        let outputs = [in_bytes("gram", gram, 4), in_bytes("workspace", workspace, 4)];
        check_disjoint(&[in_bytes("weight", self.weight, dtype.bytes())], &outputs, 1)?;
        let library = self.gram_workspace(gpu, &mut Arena::new(workspace.into()));
        let gemms = Gemms::new(Arithmetic { dtype, allow_tf32: false }, library);
        let (weight, gram) = (self.weight.into(), gram.into());
        Ok(Plan::from(gemms.transposed_times([h, h, v], weight, weight, gram).in_f32()))
    }

    /// The plan that computes the loss of `hidden` (`[2M, H]`, or `[M, H]` for one branch), and the gradients that are wanted.
    ///
    /// Labels lie on the device: what is wrong with them counts as ignored, and the status tells, as of a [`Loss`].
    ///
    /// # Errors
    /// If a size is zero or too large, a setting is out of range, a buffer has the wrong length, is not aligned to its element or
    /// overlaps an output, or a gradient to what is absent is asked for.
    pub fn plan(&self, gpu: &Gpu, dtype: DType, hidden: Buffer, outputs: Outputs) -> Result<Plan> {
        self.check(dtype, hidden, &outputs)?;
        let trains = outputs.weight.is_some() || outputs.lora_a.is_some() || outputs.lora_b.is_some();
        let workspace = outputs.workspace.check_workspace(self.workspace_len(gpu, dtype, trains))?;
        self.check_disjoint(dtype, hidden, &Outputs { workspace, ..outputs })?;
        let rows = self.rows(gpu, dtype, trains);
        let words = Buffer { len: self.words(rows), ..workspace };
        let mut arena = Arena::new(Address::from(workspace).offset(4 * words.len));
        let places = self.places(gpu, dtype, trains, rows, &mut arena);
        let gemms = |dtype, allow_tf32| Gemms::new(Arithmetic { dtype, allow_tf32 }, places.library);
        let pass = Pass {
            head: self,
            dtype,
            hidden,
            outputs,
            words,
            places,
            has_gram: self.has_gram(trains),
            gemms: gemms(dtype, self.allow_tf32),
            gram_gemms: gemms(if dtype == DType::F32 { DType::F32 } else { DType::BF16 }, false),
        };
        pass.plan()
    }

    fn check(&self, dtype: DType, hidden: Buffer, outputs: &Outputs) -> Result<()> {
        self.check_sizes()?;
        let (v, h, m, bytes) = (self.settings.classes, self.hidden_size, self.tokens, dtype.bytes());
        let rows = product("hidden", "[branches·M, H]", &[self.branches, m, h])?;
        let matrix = product("weight", "[V, H]", &[v, h])?;
        hidden.check("hidden", "[branches·M, H]", rows, bytes)?;
        self.labels.check("labels", "[M]", m, 8)?;
        self.weight.check("weight", "[V, H]", matrix, bytes)?;
        if let Some(bias) = self.bias {
            bias.check("bias", "[V]", v, bytes)?;
            let refused = |argument, problem| Err(Error::Argument { argument, problem });
            if !bias.is_vector_aligned() {
                return refused("bias", "does not start at a multiple of 16 bytes");
            }
            if self.logit_scale != 1.0 {
                return refused("logit_scale", "is not 1, and there is a bias");
            }
        }
        if let Some(gram) = self.gram {
            gram.check("gram", "[H, H]", product("gram", "[H, H]", &[h, h])?, 4)?;
        }
        if let Some(Lora { rank, lora_a, lora_b, scale }) = self.lora {
            lora_b.check("lora_b", "[V, r]", product("lora_b", "[V, r]", &[v, rank])?, bytes)?;
            lora_a.check("lora_a", "[r, H]", product("lora_a", "[r, H]", &[rank, h])?, bytes)?;
            check_scale(scale)?;
        }
        let in_range = |value: f64| (value as f32).is_normal();
        if !in_range(self.logit_scale) || !in_range(self.logit_scale * self.logit_scale) {
            let expected = "not 0, and its square in the range of f32";
            return Err(Error::Value { argument: "logit_scale", expected, got: self.logit_scale });
        }
        if let Some(got) = self.soft_cap.filter(|&cap| !(cap > 0.0 && in_range(cap))) {
            return Err(Error::Value {
                argument: "soft_cap",
                expected: "more than 0, and in the range of f32",
                got,
            });
        }
        let (is_lora, rank) = (self.lora.is_some(), self.lora.map_or(0, |lora| lora.rank));
        for (argument, shape, grad, expected, bytes, is_there) in [
            ("grads.hidden", "[branches·M, H]", outputs.hidden, rows, bytes, true),
            ("grads.weight", "[V, H]", outputs.weight, matrix, 4, true),
            ("grads.bias", "[V]", outputs.bias, v, 4, self.bias.is_some()),
            ("grads.lora_b", "[V, r]", outputs.lora_b, v * rank, 4, is_lora),
            ("grads.lora_a", "[r, H]", outputs.lora_a, rank * h, 4, is_lora),
        ] {
            let Some(grad) = grad else { continue };
            if !is_there {
                return Err(Error::Argument {
                    argument,
                    problem: "is asked for without what it is the gradient to",
                });
            }
            grad.check(argument, shape, expected, bytes)?;
        }
        Ok(())
    }

    /// Checks that outputs share no memory with each other or with what is read; the loss checks values and status.
    fn check_disjoint(&self, dtype: DType, hidden: Buffer, outputs: &Outputs) -> Result<()> {
        let bytes = dtype.bytes();
        let named =
            |argument, buffer: Option<Buffer>, bytes| buffer.map(|buffer| in_bytes(argument, buffer, bytes));
        let lora = self.lora;
        let inputs: Vec<_> = [
            named("hidden", Some(hidden), bytes),
            named("labels", Some(self.labels), 8),
            named("weight", Some(self.weight), bytes),
            named("bias", self.bias, bytes),
            named("lora_b", lora.map(|lora| lora.lora_b), bytes),
            named("lora_a", lora.map(|lora| lora.lora_a), bytes),
            named("class_weights", self.class_weights, 4),
            named("gram", self.gram, 4),
        ]
        .into_iter()
        .flatten()
        .collect();
        let outputs: Vec<_> = [
            named("grads.hidden", outputs.hidden, bytes),
            named("grads.weight", outputs.weight, 4),
            named("grads.bias", outputs.bias, 4),
            named("grads.lora_b", outputs.lora_b, 4),
            named("grads.lora_a", outputs.lora_a, 4),
            named("values", Some(outputs.values), 4),
            named("status", Some(outputs.status), 8),
            named("workspace", Some(outputs.workspace), 4),
        ]
        .into_iter()
        .flatten()
        .collect();
        check_disjoint(&inputs, &outputs, 1)
    }
}

/// Steps of one plan.
struct Pass<'a> {
    head: &'a Head,
    dtype: DType,
    hidden: Buffer,
    outputs: Outputs,
    words: Buffer,
    places: Places,
    has_gram: bool,
    gemms: Gemms,
    /// Of products with the Gram matrix.
    gram_gemms: Gemms,
}

impl Pass<'_> {
    fn plan(&self) -> Result<Plan> {
        let mut plan = Plan::default();
        if self.has_gram {
            self.prepare_gram(&mut plan)?;
        }
        for start in (0..self.head.tokens).step_by(self.places.rows) {
            self.chunk(start, self.places.rows.min(self.head.tokens - start), &mut plan)?;
        }
        if let (true, Some(to)) = (self.has_gram, self.outputs.weight) {
            self.add_weight(to, &mut plan)?;
        }
        Ok(plan)
    }

    /// Rows of a branch, from row `start` of it on.
    fn branch(&self, of: Buffer, branch: usize, start: usize, count: usize) -> Address {
        let rows = branch * self.head.tokens + start;
        part(of, rows, count, self.head.hidden_size, self.dtype.bytes()).into()
    }

    /// What a gradient of a distance is divided by: where the number of labels lies, or 1 over what is known.
    fn divisor(&self) -> (Address, f32) {
        let LossSettings { labelled_only, denominator, .. } = self.head.settings;
        match denominator {
            None if labelled_only => (self.places.weight, 0.0),
            None => (Address::NONE, (1.0 / self.head.tokens as f64) as f32),
            Some(denominator) => (Address::NONE, (1.0 / denominator) as f32),
        }
    }

    /// What a distance is multiplied by, and its gradient.
    fn factors(&self) -> (f64, f64) {
        let LossSettings { divergence, lambda, classes, .. } = self.head.settings;
        let square = self.head.logit_scale * self.head.logit_scale;
        let factor = match divergence {
            Divergence::MeanSquaredDifference => square / classes as f64,
            _ => square,
        };
        (factor, 2.0 * lambda * factor)
    }

    /// The Gram matrix, as it is multiplied, and the number of labels.
    fn prepare_gram(&self, plan: &mut Plan) -> Result<()> {
        let Pass { head, places, .. } = self;
        let (v, h) = (head.settings.classes, head.hidden_size);
        check_lambda(f64::from(self.factors().1 as f32 * MOMENT_SCALE))?;
        let (ignore_label, has_ignore_label) = self.ignored();
        if self.divisor().0 != Address::NONE {
            let params = LmHeadWeightParams {
                labels: head.labels.into(),
                weight: places.weight.into(),
                ignore_label,
                has_ignore_label,
                classes: v as u32,
                rows: head.tokens as u64,
            };
            plan.push(Launch::new(table::LM_HEAD_WEIGHT, [1; 3], BLOCK, SHARED_BYTES, &params));
        }
        let gram = match head.gram {
            Some(gram) => gram.into(),
            None => {
                let gemms = Gemms::new(Arithmetic { dtype: self.dtype, allow_tf32: false }, places.library);
                let weight = head.weight.into();
                plan.push(gemms.transposed_times([h, h, v], weight, weight, places.gram).in_f32());
                places.gram
            }
        };
        if self.dtype != DType::F32 {
            self.split(gram, places.gram_parts, DType::BF16, (1.0, Address::NONE), plan)?;
        }
        Ok(())
    }

    /// The Gram matrix as it is multiplied.
    fn gram(&self) -> [Address; 2] {
        match self.dtype {
            DType::F32 => [self.head.gram.map_or(self.places.gram, Into::into), Address::NONE],
            DType::F16 | DType::BF16 => self.places.gram_parts,
        }
    }

    /// A matrix `[H, H]` in parts of a type, times a factor and what lies at an address, if any.
    fn split(
        &self,
        matrix: Address,
        [high, low]: [Address; 2],
        dtype: DType,
        (factor, weight): (f32, Address),
        plan: &mut Plan,
    ) -> Result<()> {
        let h = self.head.hidden_size;
        let params = LmHeadSplitParams {
            matrix: matrix.into(),
            high: high.into(),
            low: low.into(),
            weight: weight.into(),
            factor,
            rows: h as u32,
            columns: h as u32,
            aligned: rows_are_aligned(dtype, h, &[matrix, high, low]).into(),
        };
        let blocks = blocks(dtype, h, h)?;
        plan.push(Launch::new(table::LM_HEAD_SPLIT.choose(dtype), [blocks, 1, 1], BLOCK, 0, &params));
        Ok(())
    }

    fn ignored(&self) -> (i64, u32) {
        let ignore_label = self.head.settings.ignore_label;
        (ignore_label.unwrap_or_default(), ignore_label.is_some().into())
    }

    /// Rows of both branches, for a kernel that has other tensors of their shape.
    fn rows(&self, start: usize, count: usize, others: &[Address]) -> LmHeadRows {
        let Pass { head, hidden, .. } = self;
        let [first, second] = [0, 1].map(|branch| self.branch(*hidden, branch, start, count));
        let tensors = [&[first, second], others].concat();
        let (ignore_label, has_ignore_label) = self.ignored();
        LmHeadRows {
            first: first.into(),
            second: second.into(),
            labels: part(head.labels, start, count, 1, 8).into(),
            ignore_label,
            has_ignore_label,
            labelled_only: head.settings.labelled_only.into(),
            classes: head.settings.classes as u32,
            count: count as u32,
            columns: head.hidden_size as u32,
            aligned: rows_are_aligned(self.dtype, head.hidden_size, &tensors).into(),
        }
    }

    /// All of some rows: logits, loss, gradients.
    fn chunk(&self, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, hidden, outputs, places, has_gram, .. } = self;
        let v = head.settings.classes;
        if head.branches == 2 && head.soft_cap.is_none() {
            self.difference(start, count, plan)?;
        }
        let branches = if *has_gram { 1 } else { head.branches };
        self.logits(self.branch(*hidden, 0, start, count), places.logits, true, count, plan);
        if branches == 2 {
            let logits = places.logits.offset(count * v * dtype.bytes());
            match head.soft_cap {
                Some(_) => self.logits(self.branch(*hidden, 1, start, count), logits, true, count, plan),
                None => self.logits(places.delta[0], logits, false, count, plan),
            }
        }
        let logits = Buffer { address: places.logits.0, len: branches * count * v };
        let wants = [outputs.hidden, outputs.weight, outputs.bias, outputs.lora_b, outputs.lora_a];
        let wants_gradient = wants.iter().any(Option::is_some);
        let loss = Loss {
            settings: head.settings,
            dtype: *dtype,
            logits,
            targets: Targets::Labels(part(head.labels, start, count, 1, 8)),
            class_weights: head.class_weights,
            counted: head.settings.denominator.is_none().then_some(head.labels),
            partner: match (branches, head.soft_cap) {
                (1, _) => Partner::None,
                (_, None) => Partner::Difference,
                (_, Some(_)) => Partner::OtherBranch,
            },
            gradient: wants_gradient.then_some(logits),
            values: outputs.values,
            status: outputs.status,
            accumulate: start > 0,
            first_row: start,
            workspace: self.words,
        };
        plan.append(loss.plan_capped(head.soft_cap.map(|cap| cap as f32))?);
        if wants_gradient {
            for branch in 0..branches {
                self.backward(branch, start, count, plan)?;
            }
        }
        if *has_gram {
            self.pull(start, count, plan)?;
        }
        Ok(())
    }

    /// `Δh`: in parts for the Gram matrix, or rounded for logits.
    fn difference(&self, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let [high, low] = self.places.delta;
        let kernel = match table::LM_HEAD_PARTS.choose(self.dtype) {
            Some(kernel) if self.has_gram => kernel,
            _ => table::LM_HEAD_DIFFERENCE.choose(self.dtype),
        };
        let rows = self.rows(start, count, &[high, low]);
        let blocks = blocks(self.dtype, count, self.head.hidden_size)?;
        let params = LmHeadDifferenceParams { rows, high: high.into(), low: low.into() };
        plan.push(Launch::new(kernel, [blocks, 1, 1], BLOCK, 0, &params));
        Ok(())
    }

    /// `a·(x·(W + s·B·A)ᵀ + b)`.
    fn logits(&self, x: Address, logits: Address, has_bias: bool, count: usize, plan: &mut Plan) {
        let Pass { head, places, gemms, .. } = self;
        let (v, h, a) = (head.settings.classes, head.hidden_size, head.logit_scale as f32);
        let gemm = gemms.times_transposed([count, v, h], x, head.weight.into(), logits).scaled(a);
        plan.push(gemm.with_bias(head.bias.filter(|_| has_bias).map(Into::into)));
        if let Some(Lora { rank: r, lora_a, lora_b, scale }) = head.lora {
            let s = places.low_rank[0];
            plan.push(gemms.times_transposed([count, r, h], x, lora_a.into(), s));
            let gemm = gemms.times_transposed([count, v, r], s, lora_b.into(), logits);
            plan.push(gemm.scaled(a * scale).accumulated());
        }
    }

    /// From the gradient to a branch's logits, which lies in their place.
    fn backward(&self, branch: usize, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, outputs, places, gemms, .. } = self;
        let (v, h, a) = (head.settings.classes, head.hidden_size, head.logit_scale as f32);
        let x = self.branch(self.hidden, branch, start, count);
        let dl = places.logits.offset(branch * count * v * dtype.bytes());
        let dh = outputs.hidden.map(|dh| self.branch(dh, branch, start, count));
        let is_first = branch == 0 && start == 0;
        // Into `f32`, over all rows.
        let add = |gemm: super::Gemm| if is_first { gemm.in_f32() } else { gemm.in_f32().accumulated() };
        if let Some(dh) = dh {
            plan.push(gemms.times([count, h, v], dl, head.weight.into(), dh).scaled(a));
        }
        if let Some(dw) = outputs.weight {
            plan.push(add(gemms.transposed_times([v, h, count], dl, x, dw.into()).scaled(a)));
        }
        if let Some(db) = outputs.bias {
            let params = LmHeadBiasParams {
                gradient: dl.into(),
                bias: db.into(),
                rows: count as u32,
                columns: v as u32,
                factor: a,
                accumulate: (!is_first).into(),
                aligned: rows_are_aligned(*dtype, v, &[dl]).into(),
            };
            let blocks = blocks(*dtype, 1, v)?;
            plan.push(Launch::new(table::LM_HEAD_BIAS.choose(*dtype), [blocks, 1, 1], BLOCK, 0, &params));
        }
        let Some(Lora { rank: r, lora_a, lora_b, scale }) = head.lora else { return Ok(()) };
        let [s, ds] = places.low_rank;
        if dh.is_some() || outputs.lora_a.is_some() {
            plan.push(gemms.times([count, r, v], dl, lora_b.into(), ds).scaled(a * scale));
        }
        if let Some(dh) = dh {
            plan.push(gemms.times([count, h, r], ds, lora_a.into(), dh).accumulated());
        }
        if let Some(to) = outputs.lora_a {
            plan.push(add(gemms.transposed_times([r, h, count], ds, x, to.into())));
        }
        if let Some(to) = outputs.lora_b {
            plan.push(gemms.times_transposed([count, r, h], x, lora_a.into(), s));
            plan.push(add(gemms.transposed_times([v, r, count], dl, s, to.into()).scaled(a * scale)));
        }
        Ok(())
    }

    /// The squared difference of some rows by the Gram matrix: its value and gradients.
    fn pull(&self, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, outputs, places, gram_gemms: gemms, .. } = self;
        let h = head.hidden_size;
        let ([high, low], [gram_high, gram_low]) = (places.delta, self.gram());
        // What is left out is the product of both smaller parts.
        for (i, (delta, gram)) in
            [(high, gram_high), (low, gram_high), (high, gram_low)].into_iter().enumerate()
        {
            if delta != Address::NONE && gram != Address::NONE {
                let gemm = gemms.times([count, h, h], delta, gram, places.product).in_f32();
                plan.push(if i == 0 { gemm } else { gemm.accumulated() });
            }
        }
        if outputs.weight.is_some() {
            // `bf16` alone has too few bits for a sum that is rounded to `f16`.
            let parts = [(high, high), (high, low), (low, high)];
            let parts = if *dtype == DType::F16 { &parts[..] } else { &parts[..1] };
            for (i, &(left, right)) in parts.iter().enumerate() {
                let gemm = gemms.transposed_times([h, h, count], left, right, places.moment).in_f32();
                plan.push(if start == 0 && i == 0 { gemm } else { gemm.accumulated() });
            }
        }
        let gradients = [0, 1].map(|branch| match outputs.hidden {
            Some(dh) => self.branch(dh, branch, start, count),
            None => Address::NONE,
        });
        let rows = self.rows(start, count, &[gradients[0], gradients[1], places.product]);
        let (weight, inverse) = self.divisor();
        let (factor, pull) = self.factors();
        let params = LmHeadPullParams {
            rows,
            product: places.product.into(),
            to_first: gradients[0].into(),
            to_second: gradients[1].into(),
            values: outputs.values.into(),
            workspace: self.words.into(),
            weight: weight.into(),
            inverse,
            pull: pull as f32,
            scale: factor as f32,
            lambda: head.settings.lambda as f32,
        };
        let blocks = blocks(*dtype, count, h)?.min(MAX_BLOCKS as u32);
        plan.push(Launch::new(
            table::LM_HEAD_PULL.choose(*dtype),
            [blocks, 1, 1],
            BLOCK,
            SHARED_BYTES,
            &params,
        ));
        Ok(())
    }

    /// `dW += 2λ/D'·W·ΔhᵀΔh`.
    fn add_weight(&self, to: Buffer, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, places, .. } = self;
        let (v, h) = (head.settings.classes, head.hidden_size);
        let (weight, inverse) = self.divisor();
        let known = if weight == Address::NONE { inverse } else { 1.0 };
        let factor = self.factors().1 as f32 * known * MOMENT_SCALE;
        let rounded = match dtype {
            DType::F32 => places.moment,
            DType::F16 | DType::BF16 => places.gram_parts[0],
        };
        self.split(places.moment, [rounded, Address::NONE], *dtype, (factor, weight), plan)?;
        let gemm = self.gemms.times([v, h, h], head.weight.into(), rounded, to.into());
        plan.push(gemm.scaled(1.0 / MOMENT_SCALE).in_f32().accumulated());
        Ok(())
    }
}

const BLOCK: [u32; 3] = [LM_HEAD_THREADS as u32, 1, 1];
/// For a sum over a block, and a word more.
const SHARED_BYTES: usize = 4 * (LM_HEAD_THREADS / WARP + 1);

/// Blocks of a kernel whose threads have a vector of a matrix each.
fn blocks(dtype: DType, rows: usize, columns: usize) -> Result<u32> {
    let blocks = rows.saturating_mul(columns.div_ceil(16 / dtype.bytes())).div_ceil(LM_HEAD_THREADS);
    match i32::try_from(blocks) {
        Ok(blocks) => Ok(blocks as u32),
        Err(_) => Err(Error::Overflow { argument: "hidden", shape: "a grid of its vectors" }),
    }
}

impl Device {
    /// The loss of `hidden` (`[2M, H]`, or `[M, H]` for one branch) through a head, and the gradients that are wanted.
    ///
    /// # Errors
    /// As [`LmHead::plan`]; also if an argument belongs to another device, or a step fails.
    pub fn lm_head<'a, T: Element>(
        &'a self,
        head: &LmHead<&'a dyn DevicePtr<T>, &'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>,
        hidden: &'a dyn DevicePtr<T>,
        outputs: LmHeadOutputs<
            &'a mut dyn DevicePtrMut<T>,
            &'a mut dyn DevicePtrMut<f32>,
            &'a mut dyn DevicePtrMut<u64>,
            &'a mut dyn DevicePtrMut<u32>,
        >,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let borrowed = head.borrow(&mut borrows)?;
        let hidden = borrows.input("hidden", hidden)?;
        let outputs = Outputs {
            hidden: borrows.optional_output("grads.hidden", outputs.hidden)?,
            weight: borrows.optional_output("grads.weight", outputs.weight)?,
            bias: borrows.optional_output("grads.bias", outputs.bias)?,
            lora_b: borrows.optional_output("grads.lora_b", outputs.lora_b)?,
            lora_a: borrows.optional_output("grads.lora_a", outputs.lora_a)?,
            values: borrows.output("values", outputs.values)?,
            status: borrows.output("status", outputs.status)?,
            workspace: borrows.output("workspace", outputs.workspace)?,
        };
        let plan = borrowed.plan(self.gpu(), T::DTYPE, hidden, outputs)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the steps touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// The Gram matrix `G [H, H]` of a head's weight, once for a `W` that does not change. `workspace` has at least
    /// [`LmHead::gram_workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`LmHead::gram`]; also if an argument belongs to another device, or a step fails.
    pub fn lm_head_gram<'a, T: Element>(
        &'a self,
        head: &LmHead<&'a dyn DevicePtr<T>, &'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>,
        gram: &'a mut dyn DevicePtrMut<f32>,
        workspace: &'a mut dyn DevicePtrMut<u32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let borrowed = head.borrow(&mut borrows)?;
        let (gram, workspace) = (borrows.output("gram", gram)?, borrows.output("workspace", workspace)?);
        let plan = borrowed.gram(self.gpu(), T::DTYPE, gram, workspace)?;
        // SAFETY: as in `lm_head`.
        unsafe { self.launch(&plan, stream) }
    }
}

impl<'a, T> LmHead<&'a dyn DevicePtr<T>, &'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<Head> {
        let lora = match self.lora {
            None => None,
            Some(Lora { rank, lora_a, lora_b, scale }) => Some(Lora {
                rank,
                lora_a: borrows.input("lora_a", lora_a)?,
                lora_b: borrows.input("lora_b", lora_b)?,
                scale,
            }),
        };
        Ok(Head {
            settings: self.settings,
            tokens: self.tokens,
            hidden_size: self.hidden_size,
            branches: self.branches,
            labels: borrows.input("labels", self.labels)?,
            weight: borrows.input("weight", self.weight)?,
            bias: borrows.optional("bias", self.bias)?,
            lora,
            class_weights: borrows.optional("class_weights", self.class_weights)?,
            gram: borrows.optional("gram", self.gram)?,
            logit_scale: self.logit_scale,
            soft_cap: self.soft_cap,
            chunk_rows: self.chunk_rows,
            allow_tf32: self.allow_tf32,
        })
    }
}
