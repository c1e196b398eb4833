//! The head of a language model with its loss; plans GEMMs of cuBLASLt, `kernels/lm_head.cu` and the kernels of the loss.

mod gram;
mod params;
mod pass;
mod workspace;

use super::borrows::Borrows;
use super::buffer::{Address, Buffer, DType, Element, check_disjoint, in_bytes};
use super::device::Device;
use super::gemm::{Arena, Gemms, Workspace};
use super::gpu::Gpu;
use super::layer::Arithmetic;
use super::loss::{LOSS_STATUS_WORDS, MAX_BATCH, MAX_CLASSES};
use super::plan::Plan;
use crate::cpu::{Lora, check_scale};
use crate::error::{Error, Result};
use crate::loss::{Divergence, LossSettings};
use crate::shape::{nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use pass::Pass;

/// Blocks that add to one sum, at most.
const MAX_BLOCKS: usize = 1024;
/// Chunks, at most: a plan lists all of their steps.
const MAX_CHUNKS: usize = 1 << 17;

/// A linear layer from hidden states to a vocabulary, and the loss of its logits: forward and backward in one plan, with the logits of
/// some rows in memory at a time. What [`cpu::LmHead`](crate::cpu::LmHead) computes, whose documentation has the formulas.
///
/// `T` are tensors of one type, [`Buffer`] for planning or `cudarc`'s (see [`Device::lm_head`]); `I` labels; `F` tensors of `f32`.
///
/// Logits and their gradients take the same memory, of the type of `h`; every GEMM adds up in `f32`. Squared differences go by the
/// Gram matrix `G = WᵀW`, which is in `f32`; in 16 bits it and `Δh` are multiplied as sums of two `bf16` numbers, 16 bits in all. Where they
/// are centred, the criterion is of both branches, there is a soft cap, there are so few tokens that `G` is more work, or a head in `f16`
/// is trained or has LoRA, the difference `Δh·Wᵀ` is computed instead, as for the other divergences.
///
/// A gradient below 6e-8 is nothing in `f16`, and those to logits are divided by the number of tokens: give a `denominator` that has the
/// loss scale in it, or use `bf16`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHead<T, I, F> {
    /// What the loss is made of; `classes` is the size of the vocabulary `V`.
    pub settings: LossSettings,
    /// `M`: tokens of a branch, at most 2^24.
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
    /// LoRA is no part of it.
    pub gram: Option<F>,
    /// `a`, not 0; 1 in most models.
    pub logit_scale: f64,
    /// `cap`, more than 0.
    pub soft_cap: Option<f64>,
    /// Rows of a branch whose logits are in memory at a time; `None`: as many as fit in 250 MB. At least `M` / 2^17.
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

/// A head over `cudarc`'s tensors.
pub type LmHeadOnDevice<'a, T> = LmHead<&'a dyn DevicePtr<T>, &'a dyn DevicePtr<i64>, &'a dyn DevicePtr<f32>>;

/// What it writes there.
pub type LmHeadDeviceOutputs<'a, T> = LmHeadOutputs<
    &'a mut dyn DevicePtrMut<T>,
    &'a mut dyn DevicePtrMut<f32>,
    &'a mut dyn DevicePtrMut<u64>,
    &'a mut dyn DevicePtrMut<u32>,
>;

/// The head as plans have it.
type Head = LmHead<Buffer, Buffer, Buffer>;
type Outputs = LmHeadOutputs<Buffer, Buffer, Buffer, Buffer>;

impl<T, I, F> LmHead<T, I, F> {
    /// Two branches under a weight alone.
    pub fn new(settings: LossSettings, tokens: usize, hidden_size: usize, labels: I, weight: T) -> Self {
        Self {
            settings,
            tokens,
            hidden_size,
            branches: 2,
            labels,
            weight,
            bias: None,
            lora: None,
            class_weights: None,
            gram: None,
            logit_scale: 1.0,
            soft_cap: None,
            chunk_rows: None,
            allow_tf32: false,
        }
    }

    /// Whether the Gram matrix stands for the logits of branch 1.
    fn has_gram(&self, dtype: DType, trains_weight: bool) -> bool {
        // Sums over the vocabulary or the tokens that are rounded to `f16` may be too large for it.
        let fits = dtype != DType::F16 || !trains_weight && self.lora.is_none();
        fits && self.branches == 2
            && self.soft_cap.is_none()
            && self.settings.divergence != Divergence::CenteredSquaredDifference
            && self.settings.takes_gram(self.tokens, self.hidden_size, self.gram.is_some(), trains_weight)
    }

    /// The `u32` elements of workspace; `trains_weight`: whether there is a gradient to `W`. 0 for sizes that are refused.
    pub fn workspace_len(&self, gpu: &Gpu, dtype: DType, trains_weight: bool) -> usize {
        match self.check_sizes() {
            Ok(()) => self.len(gpu, dtype, trains_weight),
            Err(_) => 0,
        }
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
        nonzero("tokens", self.tokens)?;
        if self.tokens > MAX_BATCH {
            return Err(Error::Size { argument: "tokens", expected: "at most 2^24", got: self.tokens });
        }
        check_size("rank", self.lora.as_ref().map_or(1, |lora| lora.rank))?;
        if !(1..=2).contains(&self.branches) {
            return Err(Error::Size { argument: "branches", expected: "1 or 2", got: self.branches });
        }
        let Some(rows) = self.chunk_rows else { return Ok(()) };
        nonzero("chunk_rows", rows)?;
        if self.tokens.div_ceil(rows) > MAX_CHUNKS {
            return Err(Error::Size { argument: "chunk_rows", expected: "at least M / 2^17", got: rows });
        }
        Ok(())
    }

    fn check_weight_sizes(&self) -> Result<()> {
        let LossSettings { classes, .. } = self.settings;
        nonzero("classes", classes)?;
        if classes > MAX_CLASSES {
            return Err(Error::Size { argument: "classes", expected: "at most 2^30", got: classes });
        }
        check_size("hidden_size", self.hidden_size)
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
    /// Labels lie on the device: what is wrong with them counts as ignored, and the status tells, as of a [`Loss`](super::Loss).
    ///
    /// # Errors
    /// If a size is zero or too large, a setting is out of range, a buffer has the wrong length, is not aligned to its element or
    /// overlaps an output, or a gradient to what is absent is asked for.
    pub fn plan(&self, gpu: &Gpu, dtype: DType, hidden: Buffer, outputs: Outputs) -> Result<Plan> {
        self.check(dtype, hidden, &outputs)?;
        let trains_weight = outputs.weight.is_some();
        let workspace = outputs.workspace.check_workspace(self.workspace_len(gpu, dtype, trains_weight))?;
        self.check_disjoint(dtype, hidden, &Outputs { workspace, ..outputs })?;
        let words = Buffer { len: self.words(self.rows(dtype, trains_weight)), ..workspace };
        let mut arena = Arena::new(Address::from(workspace).offset(4 * words.len));
        let places = self.places(gpu, dtype, trains_weight, &mut arena);
        let gemms = |dtype, allow_tf32| Gemms::new(Arithmetic { dtype, allow_tf32 }, places.library);
        let pass = Pass {
            head: self,
            dtype,
            hidden,
            outputs,
            words,
            places,
            has_gram: self.has_gram(dtype, trains_weight),
            gemms: gemms(dtype, self.allow_tf32),
            exact: gemms(dtype, false),
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
        if let Some(weights) = self.class_weights {
            weights.check("class_weights", "[V]", v, 4)?;
        }
        outputs.values.check("values", "[3]", 3, 4)?;
        outputs.status.check("status", "[9]", LOSS_STATUS_WORDS, 8)?;
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

impl Device {
    /// The loss of `hidden` (`[2M, H]`, or `[M, H]` for one branch) through a head, and the gradients that are wanted.
    ///
    /// # Errors
    /// As [`LmHead::plan`]; also if an argument belongs to another device, or a step fails.
    pub fn lm_head<'a, T: Element>(
        &'a self,
        head: &LmHeadOnDevice<'a, T>,
        hidden: &'a dyn DevicePtr<T>,
        outputs: LmHeadDeviceOutputs<'a, T>,
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
        head: &LmHeadOnDevice<'a, T>,
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

impl<'a, T> LmHeadOnDevice<'a, T> {
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
