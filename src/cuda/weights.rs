//! Weight builders of the paper's adapters, their gradients, and merging; plans `kernels/weights.cu`.
//!
//! The table of adapters is that of the CPU operators: LoRA add is [`LoraFactors::weight`] without a base weight, LoRA mul
//! with one, VPT add is [`PromptBias`].

use super::device::{Borrows, Device};
use super::kernel::{Kernel, Kernels, table};
use super::launch::{
    Buffer, DType, Element, Launch, MAX_ROWS, Named, Plan, RawLaunch, address, check_disjoint, grid, params,
};
use super::noisy_linear::aligned;
use super::partial_sums::{PartialSumsParams, partial_sums};
use crate::cpu::check_scale;
use crate::error::{Error, Result};
use crate::shape::{nonzero, product};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

const WARP: usize = 32;
/// Warps of a block that shares rows, and the rows of such a block.
const WARPS: usize = 4;
const TILE: usize = 16;
/// Inner sizes of a chunk, forward and backward.
const RANKS: usize = 16;
const BACKWARD_RANKS: usize = 8;
/// Most rows of a partial sum over rows.
const MAX_PART: usize = 128;
/// Most elements of a factor.
const MAX_FACTOR: usize = 1 << 36;
/// Blocks that keep a large device busy.
const BLOCKS: usize = 264;
/// Threads of a block of the other kernels.
const THREADS: usize = 256;
/// In-features of a partial sum of `dPu`.
const PROMPT_PART: usize = 64;
/// Vectors of one thread in a merge, and the blocks that are enough for every device.
const VECTORS: usize = 4;
const MERGE_BLOCKS: usize = 2048;

/// The trained factors of a low-rank weight `[N, K]`: `D [N, r]`, `U [r, K]`, and a scale on their product.
///
/// `B` are the tensors, all of one type: [`Buffer`] for planning, or `cudarc`'s (see [`Device::low_rank_weight`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraFactors<B> {
    /// Out-features `N`.
    pub out_features: usize,
    /// In-features `K`.
    pub in_features: usize,
    /// Rank `r`.
    pub rank: usize,
    /// `D [N, r]`.
    pub down: B,
    /// `U [r, K]`.
    pub up: B,
    /// Factor on `D·U`; 1 in the paper.
    pub scale: f32,
}

/// Where the gradients of [`LoraFactors`] go; both are overwritten.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraGrads<B> {
    /// `dD [N, r]`.
    pub down: B,
    /// `dU [r, K]`.
    pub up: B,
}

/// The prompt adapter's bias `Δb [N] = W0·(Pd·Pu) + b0⊙δb` (VPT add; the second term belongs to LoRA mul).
///
/// `B` are the tensors, as in [`LoraFactors`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptBias<B> {
    /// Out-features `N`.
    pub out_features: usize,
    /// In-features `K`.
    pub in_features: usize,
    /// Rank `r`.
    pub rank: usize,
    /// `W0 [N, K]`.
    pub base_weight: B,
    /// `b0 [N]`; without it the second term is zero.
    pub base_bias: Option<B>,
    /// `Pd [K, r]`.
    pub prompt_down: B,
    /// `Pu [r]`.
    pub prompt_up: B,
    /// `δb [N]`; without it the second term is zero.
    pub delta_bias: Option<B>,
}

/// Where the gradients of [`PromptBias`] go; each is overwritten.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptGrads<B> {
    /// `dPd [K, r] = q·Puᵀ` with `q = W0ᵀ·dΔb`.
    pub prompt_down: B,
    /// `dPu [r] = Pdᵀ·q`.
    pub prompt_up: B,
    /// `dδb [N] = b0 ⊙ dΔb` (zero without `b0`); `None` is not computed.
    pub delta_bias: Option<B>,
}

/// Which way a difference goes into a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeSign {
    /// `target += delta`.
    Merge,
    /// `target −= delta`.
    Unmerge,
}

/// Arguments of a merge over tensors of any shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// Which way.
    pub sign: MergeSign,
    /// Type of both tensors.
    pub dtype: DType,
    /// `W0` or `b0`, changed in place.
    pub target: Buffer,
    /// `ΔW` or `Δb`.
    pub delta: Buffer,
}

params! {
    /// `pace::LowRankWeightParams` of the kernels.
    LowRankWeightParams, 56 bytes {
        0 down: u64,
        8 up: u64,
        16 base: u64,
        24 out: u64,
        32 rows: u32,
        36 columns: u32,
        40 rank: u32,
        44 scale: f32,
        48 aligned: u32,
        52 reserved: u32,
    }
}

params! {
    /// `pace::LowRankBackwardParams` of the kernels.
    LowRankBackwardParams, 72 bytes {
        0 grad: u64,
        8 base: u64,
        16 down: u64,
        24 up: u64,
        32 up_partial: u64,
        40 down_partial: u64,
        48 rows: u32,
        52 columns: u32,
        56 rank: u32,
        60 scale: f32,
        64 part: u32,
        68 aligned: u32,
    }
}

params! {
    /// `pace::PromptBiasParams` of the kernels.
    PromptBiasParams, 56 bytes {
        0 matrix: u64,
        8 vector: u64,
        16 base_bias: u64,
        24 delta_bias: u64,
        32 out: u64,
        40 rows: u32,
        44 columns: u32,
        48 aligned: u32,
        52 reserved: u32,
    }
}

params! {
    /// `pace::PromptGradsParams` of the kernels.
    PromptGradsParams, 88 bytes {
        0 q: u64,
        8 down: u64,
        16 up: u64,
        24 grad: u64,
        32 base_bias: u64,
        40 down_grad: u64,
        48 up_partial: u64,
        56 delta_bias: u64,
        64 columns: u32,
        68 rank: u32,
        72 rows: u32,
        76 part: u32,
        80 width: u32,
        84 reserved: u32,
    }
}

params! {
    /// `pace::MergeParams` of the kernels.
    MergeParams, 32 bytes {
        0 target: u64,
        8 delta: u64,
        16 length: u64,
        24 sign: f32,
        28 aligned: u32,
    }
}

/// What the gradients of a low-rank weight launch.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraBackward {
    /// Partial sums of both.
    pub partials: Launch<LowRankBackwardParams>,
    /// Their sums, `dD` and `dU`.
    pub sums: (Launch<PartialSumsParams>, Launch<PartialSumsParams>),
}

impl Plan for LoraBackward {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.partials.for_each(run)?;
        self.sums.for_each(run)
    }
}

/// What the gradients of a prompt's bias launch.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptBackward {
    /// Partial sums of `q`, and their sums.
    pub columns: (Launch<LowRankBackwardParams>, Launch<PartialSumsParams>),
    /// `dPd`, `dδb` and partial sums of `dPu`, and their sums.
    pub grads: (Launch<PromptGradsParams>, Launch<PartialSumsParams>),
}

impl Plan for PromptBackward {
    fn for_each(&self, run: &mut dyn FnMut(RawLaunch<'_>) -> Result<()>) -> Result<()> {
        self.columns.for_each(run)?;
        self.grads.for_each(run)
    }
}

/// Checks the sizes of a weight `[N, K]` and a rank.
fn check_sizes(n: usize, k: usize, r: usize) -> Result<()> {
    for (argument, got) in [("out_features", n), ("in_features", k), ("rank", r)] {
        nonzero(argument, got)?;
        if got > MAX_ROWS {
            return Err(Error::Size { argument, expected: "at most 2^31", got });
        }
    }
    product("weight", "[N, K]", &[n, k]).map(drop)
}

/// Product of the sizes of a factor, few enough for a grid that covers it along x.
fn factor(argument: &'static str, shape: &'static str, sizes: [usize; 2]) -> Result<usize> {
    match product(argument, shape, &sizes)? {
        len if len > MAX_FACTOR => Err(Error::Overflow { argument, shape }),
        len => Ok(len),
    }
}

/// Fours of `f32` in the 16 bytes of a lane.
fn fours(dtype: DType) -> usize {
    4 / dtype.bytes()
}

/// Partial sums of a weight `[N, K]`.
struct Parts {
    /// Along K: 16 bytes for each lane of a warp.
    strips: usize,
    /// Along N.
    parts: usize,
    /// Rows of a part.
    part: usize,
}

impl Parts {
    fn new(n: usize, k: usize, dtype: DType) -> Self {
        let strips = k.div_ceil(WARP * 16 / dtype.bytes()).max(1);
        let rows = n.div_ceil((BLOCKS / strips).max(1)).clamp(1, MAX_PART);
        let part = rows.next_multiple_of(TILE);
        Self { strips, parts: n.div_ceil(part), part }
    }

    /// The launch for these partial sums, `ranks` of a chunk at a time.
    fn launch(
        &self,
        kernel: Kernel,
        dtype: DType,
        ranks: usize,
        params: LowRankBackwardParams,
    ) -> Launch<LowRankBackwardParams> {
        Launch {
            kernel,
            grid: grid(self.strips, self.parts),
            block: [(WARPS * WARP) as u32, 1, 1],
            // Sums of the warps, and the left factor of a part.
            shared_bytes: (ranks * (WARPS * fours(dtype) * WARP * 16 + self.part * 4)) as u32,
            params: LowRankBackwardParams { part: self.part as u32, ..params },
        }
    }
}

/// Checks a workspace of `needed` elements, a number that saturates.
fn check_workspace(workspace: Buffer, needed: usize) -> Result<Buffer> {
    workspace.check_workspace(product("workspace", "[workspace_len()]", &[needed])?)
}

impl<B> LoraFactors<B> {
    /// The `f32` elements of workspace that [`backward`](Self::backward) needs; saturates for sizes that are refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        let Parts { strips, parts, .. } = Parts::new(n, k, dtype);
        let [up, down] = [(parts, k), (strips, n)].map(|(a, b)| a.saturating_mul(b).saturating_mul(r));
        up.saturating_add(down)
    }
}

impl LoraFactors<Buffer> {
    fn check(&self, dtype: DType, base_weight: Option<Buffer>) -> Result<Vec<Named>> {
        let &Self { out_features: n, in_features: k, rank: r, down, up, scale } = self;
        check_sizes(n, k, r)?;
        down.check("down", "[N, r]", factor("down", "[N, r]", [n, r])?, dtype.bytes())?;
        up.check("up", "[r, K]", factor("up", "[r, K]", [r, k])?, dtype.bytes())?;
        check_scale(scale)?;
        let mut inputs = vec![("down", down), ("up", up)];
        if let Some(base) = base_weight {
            base.check("base_weight", "[N, K]", n * k, dtype.bytes())?;
            inputs.push(("base_weight", base));
        }
        Ok(inputs)
    }

    /// The launch that computes `out [N, K] = scale·D·U` (LoRA add), or `W0 ⊙ (scale·D·U)` with a `base_weight`
    /// `W0 [N, K]` (LoRA mul).
    ///
    /// # Errors
    /// If a size is zero or too large, `scale` is not finite, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn weight(
        &self,
        dtype: DType,
        base_weight: Option<Buffer>,
        out: Buffer,
    ) -> Result<Launch<LowRankWeightParams>> {
        let inputs = self.check(dtype, base_weight)?;
        let &Self { out_features: n, in_features: k, rank, down, up, scale } = self;
        out.check("out", "[N, K]", n * k, dtype.bytes())?;
        check_disjoint(&inputs, &[("out", out)], dtype.bytes(), None)?;
        let base = address(base_weight);
        Ok(Launch {
            kernel: table::LOW_RANK_WEIGHT.choose(dtype),
            grid: grid(k.div_ceil(WARP * 16 / dtype.bytes()), n.div_ceil(TILE)),
            block: [(WARPS * WARP) as u32, 1, 1],
            // A chunk of U and of D.
            shared_bytes: (RANKS * (fours(dtype) * WARP * 16 + TILE * 4)) as u32,
            params: LowRankWeightParams {
                down: down.address,
                up: up.address,
                base,
                out: out.address,
                rows: n as u32,
                columns: k as u32,
                rank: rank as u32,
                scale,
                aligned: u32::from(aligned(dtype, k, &[up.address, base, out.address])),
                reserved: 0,
            },
        })
    }

    /// The launches that compute `dD = scale·Q·Uᵀ` and `dU = scale·Dᵀ·Q` from the gradient of [`weight`](Self::weight)'s
    /// output, `delta_weight_grad [N, K]`: `Q` is that, or with a `base_weight` its product with `W0`.
    ///
    /// # Errors
    /// As [`weight`](Self::weight); also if the workspace is too small.
    pub fn backward(
        &self,
        dtype: DType,
        base_weight: Option<Buffer>,
        delta_weight_grad: Buffer,
        grads: LoraGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<LoraBackward> {
        let mut inputs = self.check(dtype, base_weight)?;
        let (&Self { out_features: n, in_features: k, rank: r, down, up, scale }, bytes) =
            (self, dtype.bytes());
        delta_weight_grad.check("delta_weight_grad", "[N, K]", n * k, bytes)?;
        inputs.push(("delta_weight_grad", delta_weight_grad));
        grads.down.check("grads.down", "[N, r]", n * r, bytes)?;
        grads.up.check("grads.up", "[r, K]", r * k, bytes)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        let outputs = [
            ("grads.down", grads.down),
            ("grads.up", grads.up),
            ("workspace", workspace.in_elements_of(bytes)),
        ];
        check_disjoint(&inputs, &outputs, bytes, None)?;

        let parts = Parts::new(n, k, dtype);
        let up_partial = workspace.address;
        let down_partial = up_partial + (parts.parts * r * k * 4) as u64;
        let (grad, base) = (delta_weight_grad.address, address(base_weight));
        let params = LowRankBackwardParams {
            grad,
            base,
            down: down.address,
            up: up.address,
            up_partial,
            down_partial,
            rows: n as u32,
            columns: k as u32,
            rank: r as u32,
            scale,
            part: 0,
            aligned: u32::from(aligned(dtype, k, &[grad, base, up.address, up_partial])),
        };
        Ok(LoraBackward {
            partials: parts.launch(
                table::LOW_RANK_WEIGHT_BACKWARD.choose(dtype),
                dtype,
                BACKWARD_RANKS,
                params,
            ),
            sums: (
                partial_sums(down_partial, parts.strips, grads.down, dtype),
                partial_sums(up_partial, parts.parts, grads.up, dtype),
            ),
        })
    }
}

impl<B> PromptBias<B> {
    /// The `f32` elements of workspace that [`forward`](Self::forward) and [`backward`](Self::backward) need; saturates for
    /// sizes that are refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        let columns = Parts::new(n, k, dtype).parts.saturating_add(1).saturating_mul(k);
        columns.saturating_add(k.div_ceil(PROMPT_PART).saturating_mul(r))
    }
}

impl PromptBias<Buffer> {
    fn check(&self, dtype: DType) -> Result<Vec<Named>> {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        check_sizes(n, k, r)?;
        let prompt = factor("prompt_down", "[K, r]", [k, r])?;
        let needed = [
            ("base_weight", "[N, K]", Some(self.base_weight), n * k),
            ("prompt_down", "[K, r]", Some(self.prompt_down), prompt),
            ("prompt_up", "[r]", Some(self.prompt_up), r),
            ("base_bias", "[N]", self.base_bias, n),
            ("delta_bias", "[N]", self.delta_bias, n),
        ];
        let mut inputs = Vec::new();
        for (argument, shape, buffer, len) in needed {
            if let Some(buffer) = buffer {
                buffer.check(argument, shape, len, dtype.bytes())?;
                inputs.push((argument, buffer));
            }
        }
        Ok(inputs)
    }

    /// The launches that compute `Δb [N]`.
    ///
    /// # Errors
    /// If a size is zero or too large, a buffer has the wrong length, is not aligned to its element or overlaps an output,
    /// or the workspace is too small.
    pub fn forward(
        &self,
        dtype: DType,
        out: Buffer,
        workspace: Buffer,
    ) -> Result<(Launch<PromptBiasParams>, Launch<PromptBiasParams>)> {
        let inputs = self.check(dtype)?;
        let (&Self { out_features: n, in_features: k, rank: r, .. }, bytes) = (self, dtype.bytes());
        out.check("out", "[N]", n, bytes)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        let outputs = [("out", out), ("workspace", workspace.in_elements_of(bytes))];
        check_disjoint(&inputs, &outputs, bytes, None)?;
        // A matrix, its sizes, a vector, and where their product goes.
        let launch =
            |kernels: Kernels, matrix: Buffer, (rows, columns): (usize, usize), vector, out, biases| {
                let [base_bias, delta_bias] = biases;
                Launch {
                    kernel: kernels.choose(dtype),
                    grid: [rows.div_ceil(THREADS / WARP) as u32, 1, 1],
                    block: [THREADS as u32, 1, 1],
                    shared_bytes: 0,
                    params: PromptBiasParams {
                        matrix: matrix.address,
                        vector,
                        base_bias: address(base_bias),
                        delta_bias: address(delta_bias),
                        out,
                        rows: rows as u32,
                        columns: columns as u32,
                        aligned: u32::from(aligned(dtype, columns, &[matrix.address, vector])),
                        reserved: 0,
                    },
                }
            };
        let prompt = workspace.address;
        let biases = [self.base_bias, self.delta_bias];
        Ok((
            launch(
                table::PROMPT_BIAS_PRODUCT,
                self.prompt_down,
                (k, r),
                self.prompt_up.address,
                prompt,
                [None; 2],
            ),
            launch(table::PROMPT_BIAS, self.base_weight, (n, k), prompt, out.address, biases),
        ))
    }

    /// The launches that compute gradients from `dΔb [N]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(
        &self,
        dtype: DType,
        delta_bias_grad: Buffer,
        grads: PromptGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<PromptBackward> {
        let mut inputs = self.check(dtype)?;
        let (&Self { out_features: n, in_features: k, rank: r, .. }, bytes) = (self, dtype.bytes());
        delta_bias_grad.check("delta_bias_grad", "[N]", n, bytes)?;
        inputs.push(("delta_bias_grad", delta_bias_grad));
        grads.prompt_down.check("grads.prompt_down", "[K, r]", k * r, bytes)?;
        grads.prompt_up.check("grads.prompt_up", "[r]", r, bytes)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        let mut outputs = vec![
            ("grads.prompt_down", grads.prompt_down),
            ("grads.prompt_up", grads.prompt_up),
            ("workspace", workspace.in_elements_of(bytes)),
        ];
        if let Some(bias) = grads.delta_bias {
            bias.check("grads.delta_bias", "[N]", n, bytes)?;
            outputs.push(("grads.delta_bias", bias));
        }
        check_disjoint(&inputs, &outputs, bytes, None)?;

        let parts = Parts::new(n, k, dtype);
        let partial = workspace.address;
        let q = Buffer { address: partial + (parts.parts * k * 4) as u64, len: k };
        let up_partial = q.address + (k * 4) as u64;
        let (weight, blocks) = (self.base_weight.address, k.div_ceil(PROMPT_PART));
        let params = LowRankBackwardParams {
            grad: weight,
            down: delta_bias_grad.address,
            up_partial: partial,
            rows: n as u32,
            columns: k as u32,
            rank: 1,
            scale: 1.0,
            aligned: u32::from(aligned(dtype, k, &[weight, partial])),
            ..bytemuck::Zeroable::zeroed()
        };
        Ok(PromptBackward {
            columns: (
                parts.launch(table::PROMPT_BIAS_COLUMNS.choose(dtype), dtype, 1, params),
                partial_sums(partial, parts.parts, q, DType::F32),
            ),
            grads: (
                Launch {
                    kernel: table::PROMPT_BIAS_GRADS.choose(dtype),
                    grid: [blocks as u32, 1, 1],
                    block: [THREADS as u32, 1, 1],
                    shared_bytes: (THREADS * 4) as u32,
                    params: PromptGradsParams {
                        q: q.address,
                        down: self.prompt_down.address,
                        up: self.prompt_up.address,
                        grad: delta_bias_grad.address,
                        base_bias: address(self.base_bias),
                        down_grad: grads.prompt_down.address,
                        up_partial,
                        delta_bias: address(grads.delta_bias),
                        columns: k as u32,
                        rank: r as u32,
                        rows: n as u32,
                        part: PROMPT_PART as u32,
                        width: r.next_power_of_two().min(THREADS) as u32,
                        reserved: 0,
                    },
                },
                partial_sums(up_partial, blocks, grads.prompt_up, dtype),
            ),
        })
    }
}

impl Merge {
    /// The launch that changes the target; none for empty tensors.
    ///
    /// # Errors
    /// If the tensors differ in length, overlap, or are not aligned to their elements.
    pub fn plan(&self) -> Result<Option<Launch<MergeParams>>> {
        let &Self { sign, dtype, target, delta } = self;
        let (length, bytes) = (product("target", "any", &[target.len])?, dtype.bytes());
        if delta.len == 0 && length == 0 {
            return Ok(None);
        }
        delta.check("delta", "[target.len()]", length, bytes)?;
        target.check("target", "any", length, bytes)?;
        check_disjoint(&[("delta", delta)], &[("target", target)], bytes, None)?;
        let blocks = length.div_ceil(THREADS * VECTORS * 16 / bytes).min(MERGE_BLOCKS);
        Ok(Some(Launch {
            kernel: table::MERGE.choose(dtype),
            grid: [blocks as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: MergeParams {
                target: target.address,
                delta: delta.address,
                length: length as u64,
                sign: match sign {
                    MergeSign::Merge => 1.0,
                    MergeSign::Unmerge => -1.0,
                },
                aligned: u32::from(target.is_vector_aligned() && delta.is_vector_aligned()),
            },
        }))
    }
}

impl<'a, T> LoraFactors<&'a dyn DevicePtr<T>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LoraFactors<Buffer>> {
        let LoraFactors { out_features, in_features, rank, down, up, scale } = *self;
        let (down, up) = (borrows.input("down", down)?, borrows.input("up", up)?);
        Ok(LoraFactors { out_features, in_features, rank, down, up, scale })
    }
}

impl<'a, T> PromptBias<&'a dyn DevicePtr<T>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<PromptBias<Buffer>> {
        let PromptBias { out_features, in_features, rank, .. } = *self;
        Ok(PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: borrows.input("base_weight", self.base_weight)?,
            base_bias: borrows.optional("base_bias", self.base_bias)?,
            prompt_down: borrows.input("prompt_down", self.prompt_down)?,
            prompt_up: borrows.input("prompt_up", self.prompt_up)?,
            delta_bias: borrows.optional("delta_bias", self.delta_bias)?,
        })
    }
}

impl Device {
    /// `out [N, K] = scale·D·U`: LoRA add.
    ///
    /// # Errors
    /// As [`LoraFactors::weight`]; also if an argument belongs to another device, or the launch fails.
    pub fn low_rank_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_weight(lora, None, out, stream)
    }

    /// `dD = scale·dΔW·Uᵀ`, `dU = scale·Dᵀ·dΔW`: gradients of [`Device::low_rank_weight`]. `workspace` has at least
    /// [`LoraFactors::workspace_len`] elements; what it holds does not matter.
    ///
    /// # Errors
    /// As [`LoraFactors::backward`]; also if an argument belongs to another device, or a launch fails.
    pub fn low_rank_weight_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_backward(lora, None, delta_weight_grad, grads, workspace, stream)
    }

    /// `out [N, K] = W0 ⊙ (scale·D·U)`: LoRA mul, the paper's main adapter. `base_weight` is `W0 [N, K]`.
    ///
    /// # Errors
    /// As [`Device::low_rank_weight`].
    pub fn lora_mul_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: &'a dyn DevicePtr<T>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_weight(lora, Some(base_weight), out, stream)
    }

    /// `dD = scale·Q·Uᵀ`, `dU = scale·Dᵀ·Q` with `Q = dΔW ⊙ W0`: gradients of [`Device::lora_mul_weight`].
    ///
    /// # Errors
    /// As [`Device::low_rank_weight_backward`].
    pub fn lora_mul_weight_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: &'a dyn DevicePtr<T>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        self.lora_backward(lora, Some(base_weight), delta_weight_grad, grads, workspace, stream)
    }

    fn lora_weight<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: Option<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let lora = lora.borrow(&mut borrows)?;
        let base_weight = borrows.optional("base_weight", base_weight)?;
        let plan = lora.weight(T::DTYPE, base_weight, borrows.output("out", out)?)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    fn lora_backward<'a, T: Element>(
        &'a self,
        lora: LoraFactors<&'a dyn DevicePtr<T>>,
        base_weight: Option<&'a dyn DevicePtr<T>>,
        delta_weight_grad: &'a dyn DevicePtr<T>,
        grads: LoraGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let lora = lora.borrow(&mut borrows)?;
        let base_weight = borrows.optional("base_weight", base_weight)?;
        let delta_weight_grad = borrows.input("delta_weight_grad", delta_weight_grad)?;
        let grads = LoraGrads {
            down: borrows.output("grads.down", grads.down)?,
            up: borrows.output("grads.up", grads.up)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = lora.backward(T::DTYPE, base_weight, delta_weight_grad, grads, workspace)?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }

    /// `out [N] = W0·(Pd·Pu) + b0⊙δb`. `workspace` has at least [`PromptBias::workspace_len`] elements; what it holds does
    /// not matter.
    ///
    /// # Errors
    /// As [`PromptBias::forward`]; also if an argument belongs to another device, or a launch fails.
    pub fn prompt_bias<'a, T: Element>(
        &'a self,
        prompt: &PromptBias<&'a dyn DevicePtr<T>>,
        out: &'a mut dyn DevicePtrMut<T>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let (out, workspace) = (borrows.output("out", out)?, borrows.output("workspace", workspace)?);
        let plan = prompt.forward(T::DTYPE, out, workspace)?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }

    /// Gradients of [`Device::prompt_bias`] from `delta_bias_grad`, `dΔb [N]`; `workspace` as there.
    ///
    /// # Errors
    /// As [`PromptBias::backward`]; also if an argument belongs to another device, or a launch fails.
    pub fn prompt_bias_backward<'a, T: Element>(
        &'a self,
        prompt: &PromptBias<&'a dyn DevicePtr<T>>,
        delta_bias_grad: &'a dyn DevicePtr<T>,
        grads: PromptGrads<&'a mut dyn DevicePtrMut<T>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let delta_bias_grad = borrows.input("delta_bias_grad", delta_bias_grad)?;
        let grads = PromptGrads {
            prompt_down: borrows.output("grads.prompt_down", grads.prompt_down)?,
            prompt_up: borrows.output("grads.prompt_up", grads.prompt_up)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = prompt.backward(T::DTYPE, delta_bias_grad, grads, workspace)?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }

    /// `target += delta`: folds an adapter into its frozen layer for inference. For `W0 += ΔW` and `b0 += Δb` alike.
    ///
    /// # Errors
    /// As [`Merge::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn merge<T: Element>(
        &self,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.merged(MergeSign::Merge, target, delta, stream)
    }

    /// `target −= delta`: takes a [`merge`](Self::merge)d adapter out again, up to rounding.
    ///
    /// # Errors
    /// As [`Device::merge`].
    pub fn unmerge<T: Element>(
        &self,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.merged(MergeSign::Unmerge, target, delta, stream)
    }

    fn merged<T: Element>(
        &self,
        sign: MergeSign,
        target: &mut dyn DevicePtrMut<T>,
        delta: &dyn DevicePtr<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        let mut borrows = self.borrows(stream);
        let (target, delta) = (borrows.output("target", target)?, borrows.input("delta", delta)?);
        let plan = Merge { sign, dtype: T::DTYPE, target, delta }.plan()?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }
}
