//! Gradient norm and FP-distance; plans `kernels/norms.cu`.

use super::borrows::Borrows;
use super::buffer::{Address, Buffer, DType, Element, Named, check_disjoint};
use super::device::Device;
use super::kernel::{Kernel, WARP, table};
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::error::{Error, Result};
use crate::shape::{nonzero, product};
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block.
pub const NORMS_THREADS: usize = 256;
/// Threads of the block that adds up.
pub const NORM_TOTAL_THREADS: usize = 1024;
/// Elements of a block.
pub const NORMS_CHUNK: usize = 4096;
/// Tensors of a launch.
pub const NORMS_TENSORS: usize = 128;
/// Bytes of `f64`.
const WIDE: usize = 8;

/// Arguments of a gradient norm, `norm = √(Σ g²)` over all elements of all tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradNorm<'a> {
    /// Type of the gradients.
    pub dtype: DType,
    /// Tensors of any shape; none, and empty ones, are allowed.
    pub gradients: &'a [Buffer],
    /// `f64`, `[1]`.
    pub norm: Buffer,
    /// `f64`, at least [`GradNorm::workspace_len`] elements.
    pub workspace: Buffer,
}

/// Arguments of an FP-distance, `mean_i ‖f(θ; x_i) − f(θ0; x_i)‖²` (paper section 3.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FpDistance {
    /// Samples that the mean is over.
    pub samples: usize,
    /// Outputs of a sample.
    pub features: usize,
    /// Type of both outputs.
    pub dtype: DType,
    /// `f(θ; x)`, `[samples, features]`.
    pub fine_tuned: Buffer,
    /// `f(θ0; x)`, `[samples, features]`.
    pub pre_trained: Buffer,
    /// `f64`, `[1]`.
    pub distance: Buffer,
    /// `f64`, at least [`FpDistance::workspace_len`] elements.
    pub workspace: Buffer,
}

/// Parameters of the kernels `grad_norm*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct GradNormParams {
    tensors: [Input<Void>; NORMS_TENSORS],
    /// None is zero.
    lengths: [u64; NORMS_TENSORS],
    /// Of the launch's first chunk.
    partial: Output<f64>,
    /// Of each tensor, counted from the launch's first.
    first_chunk: [u32; NORMS_TENSORS],
    /// Tensors that there are.
    count: u64,
}

/// Parameters of the kernels `fp_distance*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct FpDistanceParams {
    fine_tuned: Input<Void>,
    pre_trained: Input<Void>,
    partial: Output<f64>,
    length: u64,
    /// Both tensors start at multiples of 16 bytes.
    aligned: u64,
}

/// Parameters of the kernels `norm_total*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NormTotalParams {
    partial: Input<f64>,
    out: Output<f64>,
    divisor: f64,
    parts: u32,
    /// Whether the root is asked for, instead of the quotient.
    root: u32,
}

/// Checks the outputs against each other and the inputs, and the number of partial sums.
fn check(dtype: DType, inputs: &[Named], out: Named, workspace: Buffer, parts: usize) -> Result<()> {
    if i32::try_from(parts).is_err() {
        return Err(Error::Overflow { argument: "workspace", shape: "[workspace_len()]" });
    }
    out.1.check(out.0, "[1]", 1, WIDE)?;
    let workspace = workspace.check_workspace_of(parts, WIDE)?;
    // In elements of the inputs.
    let wide = |buffer: Buffer| Buffer { len: buffer.len * (WIDE / dtype.bytes()), ..buffer };
    let outputs = [(out.0, wide(out.1)), ("workspace", wide(workspace))];
    check_disjoint(inputs, &outputs, dtype.bytes())
}

/// The launch that adds up `parts` partial sums and takes the root, or the quotient by `divisor`.
fn total(partial: Buffer, parts: usize, out: Buffer, divisor: Option<usize>) -> Launch {
    let params = NormTotalParams {
        partial: partial.into(),
        out: out.into(),
        divisor: divisor.map_or(1.0, |divisor| divisor as f64),
        parts: parts as u32,
        root: u32::from(divisor.is_none()),
    };
    Launch::new(
        table::NORM_TOTAL,
        [1, 1, 1],
        [NORM_TOTAL_THREADS as u32, 1, 1],
        NORM_TOTAL_THREADS / WARP * WIDE,
        &params,
    )
}

/// A launch that has a block for each of `chunks` chunks.
fn chunked(kernel: Kernel, chunks: u32, params: &impl Pod) -> Launch {
    Launch::new(kernel, [chunks, 1, 1], [NORMS_THREADS as u32, 1, 1], NORMS_THREADS / WARP * WIDE, params)
}

impl GradNorm<'_> {
    /// The `f64` elements of workspace for tensors of these lengths; saturates.
    pub fn workspace_len(lengths: impl IntoIterator<Item = usize>) -> usize {
        lengths.into_iter().fold(0, |sum, length| sum.saturating_add(length.div_ceil(NORMS_CHUNK)))
    }

    /// The plan that computes the norm: a launch for each 128 tensors that are not empty, and one for the total.
    ///
    /// # Errors
    /// If a buffer is not aligned to its element or overlaps an output, there are more than 2³¹ chunks of 4096 elements,
    /// the norm has not one element or the workspace is too small.
    pub fn plan(&self) -> Result<Plan> {
        let &Self { dtype, gradients, norm, workspace } = self;
        let full: Vec<Named> = gradients
            .iter()
            .filter(|gradient| gradient.len > 0)
            .map(|&gradient| ("gradients", gradient))
            .collect();
        for (argument, gradient) in &full {
            let length = product(argument, "any", &[gradient.len])?;
            gradient.check(argument, "any", length, dtype.bytes())?;
        }
        let parts = Self::workspace_len(full.iter().map(|(_, gradient)| gradient.len));
        check(dtype, &full, ("norm", norm), workspace, parts)?;

        let mut partial = Address::from(workspace);
        let mut plan = Plan::default();
        for tensors in full.chunks(NORMS_TENSORS) {
            let (partial_sums, count) = (partial.into(), tensors.len() as u64);
            let mut params = GradNormParams { partial: partial_sums, count, ..GradNormParams::zeroed() };
            let mut chunks = 0;
            for (i, (_, gradient)) in tensors.iter().enumerate() {
                params.tensors[i] = (*gradient).into();
                params.lengths[i] = gradient.len as u64;
                params.first_chunk[i] = chunks;
                chunks += gradient.len.div_ceil(NORMS_CHUNK) as u32;
            }
            partial = partial.offset(chunks as usize * WIDE);
            plan.push(chunked(table::GRAD_NORM.choose(dtype), chunks, &params));
        }
        plan.push(total(workspace, parts, norm, None));
        Ok(plan)
    }
}

impl FpDistance {
    /// The `f64` elements of workspace for outputs `[samples, features]`; saturates for sizes that are refused.
    pub fn workspace_len(samples: usize, features: usize) -> usize {
        samples.saturating_mul(features).div_ceil(NORMS_CHUNK)
    }

    /// The plan that computes the distance.
    ///
    /// # Errors
    /// If a size is zero or they are too large, a buffer has the wrong length, is not aligned to its element or overlaps an
    /// output, or the workspace is too small.
    pub fn plan(&self) -> Result<Plan> {
        let &Self { samples, features, dtype, fine_tuned, pre_trained, distance, workspace } = self;
        nonzero("samples", samples)?;
        nonzero("features", features)?;
        let shape = "[samples, features]";
        let length = product("fine_tuned", shape, &[samples, features])?;
        let inputs = [("fine_tuned", fine_tuned), ("pre_trained", pre_trained)];
        for (argument, input) in inputs {
            input.check(argument, shape, length, dtype.bytes())?;
        }
        let parts = Self::workspace_len(samples, features);
        check(dtype, &inputs, ("distance", distance), workspace, parts)?;
        let params = FpDistanceParams {
            fine_tuned: fine_tuned.into(),
            pre_trained: pre_trained.into(),
            partial: workspace.into(),
            length: length as u64,
            aligned: u64::from(fine_tuned.is_vector_aligned() && pre_trained.is_vector_aligned()),
        };
        let mut plan = Plan::from(chunked(table::FP_DISTANCE.choose(dtype), parts as u32, &params));
        plan.push(total(workspace, parts, distance, Some(samples)));
        Ok(plan)
    }
}

impl Device {
    /// Euclidean norm of all gradients together, `√(Σ g²)`, accumulated in `f64`, into `norm [1]`. `workspace` has at least
    /// [`GradNorm::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`GradNorm::plan`]; also if an argument belongs to another device, or a launch fails.
    pub fn grad_norm<'a, T: Element>(
        &'a self,
        gradients: &[&'a dyn DevicePtr<T>],
        norm: &'a mut dyn DevicePtrMut<f64>,
        workspace: &'a mut dyn DevicePtrMut<f64>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let gradients = gradients
            .iter()
            .map(|&gradient| borrows.input("gradients", gradient))
            .collect::<Result<Vec<_>>>()?;
        let (norm, workspace) = (borrows.output("norm", norm)?, borrows.output("workspace", workspace)?);
        let plan = GradNorm { dtype: T::DTYPE, gradients: &gradients, norm, workspace }.plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// FP-distance of a fine-tuned model to its pre-trained self, `mean_i ‖f(θ; x_i) − f(θ0; x_i)‖²` (paper section 3.2),
    /// from both models' outputs `[samples, features]`, into `distance [1]`. `workspace` has at least
    /// [`FpDistance::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`FpDistance::plan`]; also if an argument belongs to another device, or a launch fails.
    #[allow(clippy::too_many_arguments)] // two sizes and what the formula has
    pub fn fp_distance<T: Element>(
        &self,
        samples: usize,
        features: usize,
        fine_tuned: &dyn DevicePtr<T>,
        pre_trained: &dyn DevicePtr<T>,
        distance: &mut dyn DevicePtrMut<f64>,
        workspace: &mut dyn DevicePtrMut<f64>,
        stream: &CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let fine_tuned = borrows.input("fine_tuned", fine_tuned)?;
        let pre_trained = borrows.input("pre_trained", pre_trained)?;
        let distance = borrows.output("distance", distance)?;
        let workspace = borrows.output("workspace", workspace)?;
        let dtype = T::DTYPE;
        let plan =
            FpDistance { samples, features, dtype, fine_tuned, pre_trained, distance, workspace }.plan()?;
        // SAFETY: as in `grad_norm`.
        unsafe { self.launch(&plan, stream) }
    }
}
