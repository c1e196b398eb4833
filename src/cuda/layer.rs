//! What the linear layers share: checks of their tensors, and what is left of the arguments once they are checked.

use super::buffer::{Buffer, DType, Named};
use super::gpu::Gpu;
use super::kernel::{GemmKernels, Kernel};
use super::noise_source::{NoiseSource, Source};
use crate::cpu::Base;
use crate::error::{Error, Result};
use crate::shape::LinearShape;

/// Every case of tensors that are aligned or not, in the forward and in the backward pass: what a workspace has to do for.
pub(super) const EVERY_PASS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

/// How numbers are multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arithmetic {
    pub(super) dtype: DType,
    /// Whether `f32` is multiplied as TF32.
    pub(super) allow_tf32: bool,
}

impl Arithmetic {
    /// The kernel that multiplies so.
    pub(super) fn choose(self, kernels: GemmKernels) -> Kernel {
        kernels.choose(self.dtype, self.allow_tf32)
    }
}

/// What one pass of a layer runs with, checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    pub(super) gpu: Gpu,
    pub(super) arithmetic: Arithmetic,
    pub(super) noise: NoiseSource,
    /// As long as the family asks for.
    pub(super) workspace: Buffer,
}

impl Pass {
    /// Checks the noise and the workspace.
    pub(super) fn new(
        gpu: &Gpu,
        arithmetic: Arithmetic,
        shape: &LinearShape,
        source: &Source,
        workspace: Buffer,
    ) -> Result<Self> {
        let noise = source.plan(shape)?;
        Ok(Self { gpu: *gpu, arithmetic, noise, workspace })
    }
}

/// Checks `x` (or its gradient) against the sizes of its layer.
pub(super) fn check_input(
    argument: &'static str,
    buffer: &Buffer,
    shape: &LinearShape,
    dtype: DType,
) -> Result<()> {
    let name = if shape.shared_input { "[B·T, K]" } else { "[M, K]" };
    buffer.check(argument, name, shape.in_rows() * shape.in_features, dtype.bytes())
}

/// Checks a base term against the sizes of its layer.
pub(super) fn check_base(base: Option<Base<Buffer>>, shape: &LinearShape, dtype: DType) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let (k, n) = (shape.in_features, shape.out_features);
    base.weight.check("base.weight", "[N, K]", n * k, dtype.bytes())?;
    base.bias.map_or(Ok(()), |bias| bias.check("base.bias", "[N]", n, dtype.bytes()))
}

/// A grid of so many blocks along x, for tiles of the argument.
pub(super) fn blocks(argument: &'static str, sizes: &[usize]) -> Result<[u32; 3]> {
    let count = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    match count.and_then(|count| i32::try_from(count).ok()) {
        Some(count) => Ok([count as u32, 1, 1]),
        None => Err(Error::Overflow { argument, shape: "a grid of its tiles" }),
    }
}

/// A base term's tensors.
pub(super) fn named_base(base: Option<Base<Buffer>>) -> impl Iterator<Item = Named> {
    let weight = base.map(|base| ("base.weight", base.weight));
    let bias = base.and_then(|base| base.bias).map(|bias| ("base.bias", bias));
    weight.into_iter().chain(bias)
}
