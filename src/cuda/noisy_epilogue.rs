//! Noisy epilogue after a GEMM of the caller's own; plans `kernels/noisy_epilogue.cu`.

use super::borrows::{Borrows, Noise};
use super::buffer::{Buffer, DType, Direction, Element, check_output_shape};
use super::device::Device;
use super::kernel::table;
use super::noise_source::{NoiseSource, Source};
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use super::units::Units;
use crate::error::{Error, Result};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block, at most.
pub const NOISY_EPILOGUE_THREADS: usize = 256;
/// Tokens that one thread handles with one draw of the noise, times the bytes of an element: in 16-bit types it draws for twice
/// the channels.
const TOKENS_TIMES_BYTES: usize = 32;

/// Arguments of a noisy epilogue over `[M, N]` tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoisyEpilogue {
    /// Sizes; `in_features` and `shared_input` do not matter.
    pub shape: LinearShape,
    /// Where `z` comes from.
    pub noise: Source,
    /// Which way.
    pub direction: Direction,
    /// Type of both tensors.
    pub dtype: DType,
    /// `a`, or `dy`.
    pub input: Buffer,
    /// `y`, or `da`.
    pub output: Buffer,
}

/// Parameters of the kernels `noisy_epilogue*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoisyEpilogueParams {
    noise: NoiseSource,
    /// a, dy.
    input: Input<Void>,
    /// y, da.
    output: Output<Void>,
    units: Units,
}

impl NoisyEpilogue {
    /// The plan that computes the output.
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn plan(&self) -> Result<Plan> {
        let shape = check_output_shape(self.shape)?;
        let noise = self.noise.plan(&shape)?;
        let (m, n, bytes) = (shape.out_rows(), shape.out_features, self.dtype.bytes());
        let (input, output, kernels) = match self.direction {
            Direction::Forward => ("a", "y", table::NOISY_EPILOGUE),
            Direction::Backward => ("dy", "da", table::NOISY_EPILOGUE_BACKWARD),
        };
        self.input.check(input, "[M, N]", m * n, bytes)?;
        self.output.check(output, "[M, N]", m * n, bytes)?;
        if self.input.overlaps(bytes, &self.output, bytes) {
            return Err(Error::Argument { argument: input, problem: "overlaps the output" });
        }
        self.noise.check_overlap(&self.output, bytes)?;

        let aligned = self.input.is_vector_aligned()
            && self.output.is_vector_aligned()
            && self.noise.is_vector_aligned();
        let sizes = [shape.samples(), shape.tokens, n];
        let (units, grid, block) =
            Units::new(sizes, 16 / bytes, aligned, NOISY_EPILOGUE_THREADS, TOKENS_TIMES_BYTES / bytes);
        let params =
            NoisyEpilogueParams { noise, input: self.input.into(), output: self.output.into(), units };
        Ok(Launch::new(kernels.choose(self.dtype), grid, block, 0, &params).into())
    }
}

impl Device {
    /// `y [M, N] += z ⊙ a [M, N]`: adds the perturbed adapter output to the base output that lies in `y`.
    ///
    /// Of `shape`, `in_features` does not matter and `shared_input` neither: `a` has all `M` rows.
    ///
    /// # Errors
    /// As [`NoisyEpilogue::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn noisy_epilogue<T: Element>(
        &self,
        shape: LinearShape,
        noise: Noise<'_>,
        a: &dyn DevicePtr<T>,
        y: &mut dyn DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.epilogue(shape, noise, Direction::Forward, ("a", a), ("y", y), stream)
    }

    /// `da [M, N] = z ⊙ dy [M, N]`: the gradient of [`Device::noisy_epilogue`] to `a`. That to `y` is `dy` itself.
    ///
    /// # Errors
    /// As [`Device::noisy_epilogue`].
    pub fn noisy_epilogue_backward<T: Element>(
        &self,
        shape: LinearShape,
        noise: Noise<'_>,
        dy: &dyn DevicePtr<T>,
        da: &mut dyn DevicePtrMut<T>,
        stream: &CudaStream,
    ) -> Result<()> {
        self.epilogue(shape, noise, Direction::Backward, ("dy", dy), ("da", da), stream)
    }

    fn epilogue<T: Element>(
        &self,
        shape: LinearShape,
        noise: Noise<'_>,
        direction: Direction,
        input: (&'static str, &dyn DevicePtr<T>),
        output: (&'static str, &mut dyn DevicePtrMut<T>),
        stream: &CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let noise = borrows.noise(&noise)?;
        let (input, output) = (borrows.input(input.0, input.1)?, borrows.output(output.0, output.1)?);
        let plan = NoisyEpilogue { shape, noise, direction, dtype: T::DTYPE, input, output }.plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernel touches.
        unsafe { self.launch(&plan, stream) }
    }
}
