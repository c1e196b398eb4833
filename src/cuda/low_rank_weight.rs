//! The weight of a low-rank adapter and its gradients; plans `kernels/weights.cu`.
//!
//! LoRA add is [`LoraFactors::weight`] without a base weight, LoRA mul with one.

use super::borrows::Borrows;
use super::buffer::{
    Address, Buffer, DType, Element, MAX_ROWS, Named, check_disjoint, grid, rows_are_aligned,
};
use super::device::Device;
use super::kernel::{Kernel, WARP, table};
use super::partial_sums::{SPLIT_BLOCKS, partial_sums};
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::cpu::{LoraFactors, LoraGrads, check_scale};
use crate::error::{Error, Result};
use crate::shape::{nonzero, product};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Warps of a block that shares rows, and the rows of such a block.
pub const WEIGHT_WARPS: usize = 4;
pub const WEIGHT_ROWS: usize = 16;
/// Inner sizes of a chunk, forward and backward.
pub const WEIGHT_RANKS: usize = 16;
pub const WEIGHT_BACKWARD_RANKS: usize = 8;
/// Most rows of a partial sum over rows.
const MAX_PART: usize = 128;
/// Most elements of a factor.
const MAX_FACTOR: usize = 1 << 36;

/// Parameters of the kernels `low_rank_weight*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LowRankWeightParams {
    lora_b: Input<Void>,
    lora_a: Input<Void>,
    /// W0, or null.
    base: Input<Void>,
    out: Output<Void>,
    /// Out-features `N`.
    rows: u32,
    /// In-features `K`.
    columns: u32,
    rank: u32,
    scale: f32,
    /// Rows of A, W0 and the output start at multiples of 16 bytes and hold whole vectors.
    aligned: u64,
}

/// Parameters of the kernels `low_rank_weight_backward*` and `prompt_bias_columns*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LowRankBackwardParams {
    /// `grad_Wd`.
    pub(super) grad: Input<Void>,
    /// W0, or null.
    pub(super) base: Input<Void>,
    pub(super) lora_b: Input<Void>,
    pub(super) lora_a: Input<Void>,
    /// [parts, r, K].
    pub(super) a_partial: Output<f32>,
    /// [strips, N, r].
    pub(super) b_partial: Output<f32>,
    /// Out-features `N`.
    pub(super) rows: u32,
    /// In-features `K`.
    pub(super) columns: u32,
    pub(super) rank: u32,
    pub(super) scale: f32,
    /// Rows of a part, at most MAX_PART.
    pub(super) part: u32,
    /// Rows of the gradient, W0, A and `a_partial` start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
}

/// Checks the sizes of a weight `[N, K]` and a rank.
pub(super) fn check_sizes(n: usize, k: usize, r: usize) -> Result<()> {
    for (argument, got) in [("out_features", n), ("in_features", k), ("rank", r)] {
        nonzero(argument, got)?;
        if got > MAX_ROWS {
            return Err(Error::Size { argument, expected: "at most 2^31", got });
        }
    }
    product("weight", "[N, K]", &[n, k]).map(drop)
}

/// Product of the sizes of a factor, few enough for a grid that covers it along x.
pub(super) fn factor(argument: &'static str, shape: &'static str, sizes: [usize; 2]) -> Result<usize> {
    let len = product(argument, shape, &sizes)?;
    if len > MAX_FACTOR {
        return Err(Error::Overflow { argument, shape });
    }
    Ok(len)
}

/// Fours of `f32` in the 16 bytes of a lane.
fn fours(dtype: DType) -> usize {
    4 / dtype.bytes()
}

/// Partial sums of a weight `[N, K]`.
pub(super) struct Parts {
    /// Along K: 16 bytes for each lane of a warp.
    strips: usize,
    /// Along N.
    pub(super) parts: usize,
    /// Rows of a part.
    part: usize,
}

impl Parts {
    pub(super) fn new(n: usize, k: usize, dtype: DType) -> Self {
        let strips = k.div_ceil(WARP * 16 / dtype.bytes()).max(1);
        let rows = n.div_ceil((SPLIT_BLOCKS / strips).max(1)).clamp(1, MAX_PART);
        let part = rows.next_multiple_of(WEIGHT_ROWS);
        Self { strips, parts: n.div_ceil(part), part }
    }

    /// The launch for these partial sums, `ranks` of a chunk at a time.
    pub(super) fn launch(
        &self,
        kernel: Kernel,
        dtype: DType,
        ranks: usize,
        params: LowRankBackwardParams,
    ) -> Launch {
        // Sums of the warps, and the left factor of a part.
        let shared = ranks * (WEIGHT_WARPS * fours(dtype) * WARP * 16 + self.part * 4);
        let params = LowRankBackwardParams { part: self.part as u32, ..params };
        let (grid, block) = (grid(self.strips, self.parts), [(WEIGHT_WARPS * WARP) as u32, 1, 1]);
        Launch::new(kernel, grid, block, shared, &params)
    }
}

/// Checks a workspace of `needed` elements, a number that saturates.
pub(super) fn check_workspace(workspace: Buffer, needed: usize) -> Result<Buffer> {
    workspace.check_workspace(product("workspace", "[workspace_len()]", &[needed])?)
}

impl<B> LoraFactors<B> {
    /// The `f32` elements of workspace that the backward pass on CUDA needs; saturates for sizes that are refused.
    pub fn workspace_len(&self, dtype: DType) -> usize {
        let &Self { out_features: n, in_features: k, rank: r, .. } = self;
        let Parts { strips, parts, .. } = Parts::new(n, k, dtype);
        let [lora_a, lora_b] = [(parts, k), (strips, n)].map(|(a, b)| a.saturating_mul(b).saturating_mul(r));
        lora_a.saturating_add(lora_b)
    }
}

impl LoraFactors<Buffer> {
    fn check(&self, dtype: DType, base_weight: Option<Buffer>) -> Result<Vec<Named>> {
        let &Self { out_features: n, in_features: k, rank: r, lora_b, lora_a, scale } = self;
        check_sizes(n, k, r)?;
        lora_b.check("lora_b", "[N, r]", factor("lora_b", "[N, r]", [n, r])?, dtype.bytes())?;
        lora_a.check("lora_a", "[r, K]", factor("lora_a", "[r, K]", [r, k])?, dtype.bytes())?;
        check_scale(scale)?;
        let mut inputs = vec![("lora_b", lora_b), ("lora_a", lora_a)];
        if let Some(base) = base_weight {
            base.check("base_weight", "[N, K]", n * k, dtype.bytes())?;
            inputs.push(("base_weight", base));
        }
        Ok(inputs)
    }

    /// The plan that computes `out [N, K] = scale·B·A` (LoRA add), or `W0 ⊙ (scale·B·A)` with a `base_weight`
    /// `W0 [N, K]` (LoRA mul).
    ///
    /// # Errors
    /// If a size is zero or too large, `scale` is not finite, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn weight(&self, dtype: DType, base_weight: Option<Buffer>, out: Buffer) -> Result<Plan> {
        let inputs = self.check(dtype, base_weight)?;
        let &Self { out_features: n, in_features: k, rank, lora_b, lora_a, scale } = self;
        out.check("out", "[N, K]", n * k, dtype.bytes())?;
        check_disjoint(&inputs, &[("out", out)], dtype.bytes())?;
        let (base, target) = (Address::from(base_weight), Address::from(out));
        let params = LowRankWeightParams {
            lora_b: lora_b.into(),
            lora_a: lora_a.into(),
            base: base.into(),
            out: target.into(),
            rows: n as u32,
            columns: k as u32,
            rank: rank as u32,
            scale,
            aligned: u64::from(rows_are_aligned(dtype, k, &[lora_a.into(), base, target])),
        };
        let grid = grid(k.div_ceil(WARP * 16 / dtype.bytes()), n.div_ceil(WEIGHT_ROWS));
        // A chunk of A and of B.
        let shared = WEIGHT_RANKS * (fours(dtype) * WARP * 16 + WEIGHT_ROWS * 4);
        Ok(Launch::new(
            table::LOW_RANK_WEIGHT.choose(dtype),
            grid,
            [(WEIGHT_WARPS * WARP) as u32, 1, 1],
            shared,
            &params,
        )
        .into())
    }

    /// The plan that computes `dB = scale·Q·Aᵀ` and `dA = scale·Bᵀ·Q` from the gradient of [`weight`](Self::weight)'s
    /// output, `delta_weight_grad [N, K]`: `Q` is that, or with a `base_weight` times `W0`, element by element.
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
    ) -> Result<Plan> {
        let mut inputs = self.check(dtype, base_weight)?;
        let (&Self { out_features: n, in_features: k, rank: r, lora_b, lora_a, scale }, bytes) =
            (self, dtype.bytes());
        delta_weight_grad.check("delta_weight_grad", "[N, K]", n * k, bytes)?;
        inputs.push(("delta_weight_grad", delta_weight_grad));
        grads.lora_b.check("grads.lora_b", "[N, r]", n * r, bytes)?;
        grads.lora_a.check("grads.lora_a", "[r, K]", r * k, bytes)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        let outputs = [
            ("grads.lora_b", grads.lora_b),
            ("grads.lora_a", grads.lora_a),
            ("workspace", workspace.in_elements_of(bytes)),
        ];
        check_disjoint(&inputs, &outputs, bytes)?;

        let parts = Parts::new(n, k, dtype);
        let a_partial = Address::from(workspace);
        let b_partial = a_partial.offset(parts.parts * r * k * 4);
        let (grad, base) = (Address::from(delta_weight_grad), Address::from(base_weight));
        let params = LowRankBackwardParams {
            grad: grad.into(),
            base: base.into(),
            lora_b: lora_b.into(),
            lora_a: lora_a.into(),
            a_partial: a_partial.into(),
            b_partial: b_partial.into(),
            rows: n as u32,
            columns: k as u32,
            rank: r as u32,
            scale,
            part: 0,
            aligned: u32::from(rows_are_aligned(dtype, k, &[grad, base, lora_a.into(), a_partial])),
        };
        let kernel = table::LOW_RANK_WEIGHT_BACKWARD.choose(dtype);
        let mut plan = Plan::from(parts.launch(kernel, dtype, WEIGHT_BACKWARD_RANKS, params));
        plan.push(partial_sums(b_partial, parts.strips, grads.lora_b, dtype));
        plan.push(partial_sums(a_partial, parts.parts, grads.lora_a, dtype));
        Ok(plan)
    }
}

impl<'a, T> LoraFactors<&'a dyn DevicePtr<T>> {
    fn borrow(&self, borrows: &mut Borrows<'a>) -> Result<LoraFactors<Buffer>> {
        let LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale } = *self;
        let (lora_b, lora_a) = (borrows.input("lora_b", lora_b)?, borrows.input("lora_a", lora_a)?);
        Ok(LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale })
    }
}

impl Device {
    /// `out [N, K] = scale·B·A`: LoRA add.
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

    /// `dB = scale·dΔW·Aᵀ`, `dA = scale·Bᵀ·dΔW`: gradients of [`Device::low_rank_weight`]. `workspace` has at least
    /// [`LoraFactors::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As `LoraFactors::backward`; also if an argument belongs to another device, or a launch fails.
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

    /// `out [N, K] = W0 ⊙ (scale·B·A)`: LoRA mul, the paper's main adapter. `base_weight` is `W0 [N, K]`.
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

    /// `dB = scale·Q·Aᵀ`, `dA = scale·Bᵀ·Q` with `Q = dΔW ⊙ W0`: gradients of [`Device::lora_mul_weight`].
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
        let mut borrows = Borrows::new(self, stream);
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
        let mut borrows = Borrows::new(self, stream);
        let lora = lora.borrow(&mut borrows)?;
        let base_weight = borrows.optional("base_weight", base_weight)?;
        let delta_weight_grad = borrows.input("delta_weight_grad", delta_weight_grad)?;
        let grads = LoraGrads {
            lora_b: borrows.output("grads.lora_b", grads.lora_b)?,
            lora_a: borrows.output("grads.lora_a", grads.lora_a)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = lora.backward(T::DTYPE, base_weight, delta_weight_grad, grads, workspace)?;
        // SAFETY: as in `lora_weight`.
        unsafe { self.launch(&plan, stream) }
    }
}
