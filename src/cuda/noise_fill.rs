//! `z` written out; plans `kernels/noise_fill.cu`.

use super::borrows::Borrows;
use super::buffer::{Buffer, check_output_shape};
use super::device::Device;
use super::kernel::table;
use super::noise_source::{NoiseSource, Source};
use super::plan::{Launch, Plan};
use super::pointer::Output;
use super::units::Units;
use crate::error::Result;
use crate::noise::{Generator, NoiseShape};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block, at most.
pub const NOISE_FILL_THREADS: usize = 256;
/// Rows that a thread makes of one sample: what depends on sample and channels only is done once for them.
const ROWS: usize = 8;

/// Arguments of a noise fill: `z [R, N]` for [`NoiseShape::PerSample`], `[R, T, N]` for [`NoiseShape::PerToken`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseFill {
    /// Sizes; `in_features` and `shared_input` do not matter.
    pub shape: LinearShape,
    /// Strength, shape and addresses of the noise, and its key.
    pub generator: Generator,
    /// One `u64`: the key to use instead of the generator's, read when the kernel runs.
    pub key: Option<Buffer>,
    /// Output, `f32`.
    pub z: Buffer,
}

/// Parameters of the kernels `noise_fill*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoiseFillParams {
    noise: NoiseSource,
    z: Output<f32>,
    units: Units,
}

impl NoiseFill {
    /// The plan that fills `z`.
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn plan(&self) -> Result<Plan> {
        let shape = check_output_shape(self.shape)?;
        let generator = self.generator;
        let source = match self.key {
            Some(key) => Source::Keyed { generator, key },
            None => Source::Generated(generator),
        };
        let noise = source.plan(&shape)?;
        let (tokens, name) = match self.generator.shape() {
            NoiseShape::PerSample => (1, "[R, N]"),
            NoiseShape::PerToken => (shape.tokens, "[R, T, N]"),
        };
        let sizes = [shape.samples(), tokens, shape.out_features];
        self.z.check("z", name, sizes.iter().product(), 4)?;
        source.check_overlap(&self.z, 4)?;

        Ok(fill(noise, sizes, self.z).into())
    }
}

/// The launch that fills `z [samples, tokens, channels]`. All was checked before.
pub(super) fn fill(noise: NoiseSource, sizes: [usize; 3], z: Buffer) -> Launch {
    let (units, grid, block) = Units::new(sizes, 4, z.is_vector_aligned(), NOISE_FILL_THREADS, ROWS);
    Launch::new(table::NOISE_FILL, grid, block, 0, &NoiseFillParams { noise, z: z.into(), units })
}

impl Device {
    /// Writes `z` of all samples, tokens (for [`NoiseShape::PerToken`]) and channels: `[R, N]` or `[R, T, N]`, bitwise
    /// what [`Generator::fill`] gives.
    ///
    /// `key`, one `u64` (see [`Noise::Keyed`](crate::noise::Noise::Keyed)), replaces the generator's when the kernel runs.
    ///
    /// # Errors
    /// As [`NoiseFill::plan`]; also if an argument belongs to another device, or the launch fails.
    pub fn noise_fill(
        &self,
        shape: LinearShape,
        generator: Generator,
        key: Option<&dyn DevicePtr<u64>>,
        z: &mut dyn DevicePtrMut<f32>,
        stream: &CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let (key, z) = (borrows.optional("key", key)?, borrows.output("z", z)?);
        let plan = NoiseFill { shape, generator, key, z }.plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernel touches.
        unsafe { self.launch(&plan, stream) }
    }
}
