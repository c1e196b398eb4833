//! The prompt adapter's bias (VPT add) and its gradients; plans `kernels/weights.cu`.

use super::borrows::Borrows;
use super::buffer::{Address, Buffer, DType, Element, Named, check_disjoint, rows_are_aligned};
use super::device::Device;
use super::kernel::{Kernels, WARP, table};
use super::low_rank_weight::{LowRankBackwardParams, Parts, check_sizes, check_workspace, factor};
use super::partial_sums::partial_sums;
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::cpu::{PromptBias, PromptGrads};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block.
pub const PROMPT_THREADS: usize = 256;
/// In-features of a partial sum of `dPu`.
const PROMPT_PART: usize = 64;

/// Parameters of the kernels `prompt_bias*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct PromptBiasParams {
    /// [rows, columns].
    matrix: Input<Void>,
    /// [columns].
    vector: Input<Void>,
    /// [rows], or null.
    base_bias: Input<Void>,
    /// [rows], or null.
    delta_bias: Input<Void>,
    /// [rows].
    out: Output<Void>,
    rows: u32,
    columns: u32,
    /// The vector and rows of the matrix start at multiples of 16 bytes, and the rows hold whole vectors.
    aligned: u64,
}

/// Parameters of the kernels `prompt_bias_grads*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct PromptGradsParams {
    /// `q [K]`.
    q: Input<f32>,
    /// Pd `[K, r]`.
    prompt_down: Input<Void>,
    /// Pu `[r]`.
    prompt_up: Input<Void>,
    /// `grad_bd [N]`.
    grad: Input<Void>,
    /// b0 `[N]`; null is zero.
    base_bias: Input<Void>,
    /// `grad_Pd [K, r]`.
    prompt_down_grad: Output<Void>,
    /// Partial sums of `grad_Pu`, `[parts, r]`.
    prompt_up_partial: Output<f32>,
    /// `grad_delta_bias [N]`, or null.
    delta_bias: Output<Void>,
    /// Out-features `N`.
    rows: u64,
    /// In-features `K`.
    columns: u32,
    rank: u32,
    /// In-features of a block.
    part: u32,
    /// Threads side by side along r: a power of two, not less than r or the whole block.
    width: u32,
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

    /// The plan that computes `Δb [N]`.
    ///
    /// # Errors
    /// If a size is zero or too large, a buffer has the wrong length, is not aligned to its element or overlaps an output,
    /// or the workspace is too small.
    pub fn forward(&self, dtype: DType, out: Buffer, workspace: Buffer) -> Result<Plan> {
        let inputs = self.check(dtype)?;
        let (&Self { out_features: n, in_features: k, rank: r, .. }, bytes) = (self, dtype.bytes());
        out.check("out", "[N]", n, bytes)?;
        let workspace = check_workspace(workspace, self.workspace_len(dtype))?;
        let outputs = [("out", out), ("workspace", workspace.in_elements_of(bytes))];
        check_disjoint(&inputs, &outputs, bytes)?;
        // `matrix @ vector`, into `out`.
        let launch = |kernels: Kernels,
                      matrix: Buffer,
                      (rows, columns): (usize, usize),
                      vector: Address,
                      out: Address,
                      biases| {
            let [base_bias, delta_bias]: [Option<Buffer>; 2] = biases;
            let params = PromptBiasParams {
                matrix: matrix.into(),
                vector: vector.into(),
                base_bias: base_bias.into(),
                delta_bias: delta_bias.into(),
                out: out.into(),
                rows: rows as u32,
                columns: columns as u32,
                aligned: u64::from(rows_are_aligned(dtype, columns, &[matrix.into(), vector])),
            };
            let grid = [rows.div_ceil(PROMPT_THREADS / WARP) as u32, 1, 1];
            Launch::new(kernels.choose(dtype), grid, [PROMPT_THREADS as u32, 1, 1], 0, &params)
        };
        let prompt = Address::from(workspace);
        let biases = [self.base_bias, self.delta_bias];
        let vector = self.prompt_up.into();
        let mut plan = Plan::from(launch(
            table::PROMPT_BIAS_PRODUCT,
            self.prompt_down,
            (k, r),
            vector,
            prompt,
            [None; 2],
        ));
        plan.push(launch(table::PROMPT_BIAS, self.base_weight, (n, k), prompt, out.into(), biases));
        Ok(plan)
    }

    /// The plan that computes gradients from `dΔb [N]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(
        &self,
        dtype: DType,
        delta_bias_grad: Buffer,
        grads: PromptGrads<Buffer>,
        workspace: Buffer,
    ) -> Result<Plan> {
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
        check_disjoint(&inputs, &outputs, bytes)?;

        let parts = Parts::new(n, k, dtype);
        let partial = Address::from(workspace);
        let q = Buffer { address: partial.offset(parts.parts * k * 4).0, len: k };
        let prompt_up_partial = Address::from(q).offset(k * 4);
        let (weight, blocks) = (Address::from(self.base_weight), k.div_ceil(PROMPT_PART));
        let columns = LowRankBackwardParams {
            grad: weight.into(),
            lora_b: delta_bias_grad.into(),
            a_partial: partial.into(),
            rows: n as u32,
            columns: k as u32,
            rank: 1,
            scale: 1.0,
            aligned: u32::from(rows_are_aligned(dtype, k, &[weight, partial])),
            ..LowRankBackwardParams::zeroed()
        };
        let params = PromptGradsParams {
            q: q.into(),
            prompt_down: self.prompt_down.into(),
            prompt_up: self.prompt_up.into(),
            grad: delta_bias_grad.into(),
            base_bias: self.base_bias.into(),
            prompt_down_grad: grads.prompt_down.into(),
            prompt_up_partial: prompt_up_partial.into(),
            delta_bias: grads.delta_bias.into(),
            columns: k as u32,
            rank: r as u32,
            rows: n as u64,
            part: PROMPT_PART as u32,
            width: r.next_power_of_two().min(PROMPT_THREADS) as u32,
        };
        let (grid, block) = ([blocks as u32, 1, 1], [PROMPT_THREADS as u32, 1, 1]);
        let mut plan = Plan::from(parts.launch(table::PROMPT_BIAS_COLUMNS.choose(dtype), dtype, 1, columns));
        plan.push(partial_sums(partial, parts.parts, q, DType::F32));
        plan.push(Launch::new(
            table::PROMPT_BIAS_GRADS.choose(dtype),
            grid,
            block,
            PROMPT_THREADS * 4,
            &params,
        ));
        plan.push(partial_sums(prompt_up_partial, blocks, grads.prompt_up, dtype));
        Ok(plan)
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
    /// `out [N] = W0·(Pd·Pu) + b0⊙δb`. `workspace` has at least [`PromptBias::workspace_len`] elements; contents are
    /// ignored.
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
        let mut borrows = Borrows::new(self, stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let (out, workspace) = (borrows.output("out", out)?, borrows.output("workspace", workspace)?);
        let plan = prompt.forward(T::DTYPE, out, workspace)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
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
        let mut borrows = Borrows::new(self, stream);
        let prompt = prompt.borrow(&mut borrows)?;
        let delta_bias_grad = borrows.input("delta_bias_grad", delta_bias_grad)?;
        let grads = PromptGrads {
            prompt_down: borrows.output("grads.prompt_down", grads.prompt_down)?,
            prompt_up: borrows.output("grads.prompt_up", grads.prompt_up)?,
            delta_bias: borrows.optional_output("grads.delta_bias", grads.delta_bias)?,
        };
        let workspace = borrows.output("workspace", workspace)?;
        let plan = prompt.backward(T::DTYPE, delta_bias_grad, grads, workspace)?;
        // SAFETY: as in `prompt_bias`.
        unsafe { self.launch(&plan, stream) }
    }
}
