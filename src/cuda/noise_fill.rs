//! `z` written out; plans `kernels/noise_fill.cu`.

use super::device::Device;
use super::kernel::table;
use super::launch::{Buffer, Launch, check_output_shape, grid, params};
use super::noise_source::{NoiseSource, Source};
use crate::error::Result;
use crate::noise::{Generator, NoiseShape};
use crate::shape::LinearShape;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

/// Threads of a block, at most.
const THREADS: usize = 256;
/// Channel groups of a block: a warp writes up to 512 adjacent bytes.
const GROUPS: usize = 32;

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

params! {
    /// `pace::NoiseFillParams` of the kernel.
    NoiseFillParams, 72 bytes {
        0 noise: NoiseSource,
        48 z: u64,
        56 rows: u32,
        60 tokens: u32,
        64 channels: u32,
        68 aligned: u32,
    }
}

impl NoiseFill {
    /// The launch that fills `z`.
    ///
    /// # Errors
    /// If a size is zero or too large, the samples reach 2⁵⁶, or a buffer has the wrong length, is not aligned to its
    /// element or overlaps the output.
    pub fn plan(&self) -> Result<Launch<NoiseFillParams>> {
        let shape = check_output_shape(self.shape)?;
        let source = Source::Generated { generator: self.generator, key: self.key };
        let noise = source.plan(&shape)?;
        let (rows, tokens, name) = match self.generator.shape() {
            NoiseShape::PerSample => (shape.samples(), 1, "[R, N]"),
            NoiseShape::PerToken => (shape.out_rows(), shape.tokens, "[R, T, N]"),
        };
        let channels = shape.out_features;
        self.z.check("z", name, rows * channels, 4)?;
        source.check_overlap(&self.z, 4)?;

        let groups = channels.div_ceil(4);
        let x = groups.next_power_of_two().min(GROUPS);
        let y = THREADS / x;
        Ok(Launch {
            kernel: table::NOISE_FILL,
            grid: grid(groups.div_ceil(x), rows.div_ceil(y)),
            block: [x as u32, y as u32, 1],
            shared_bytes: 0,
            params: NoiseFillParams {
                noise,
                z: self.z.address,
                rows: rows as u32,
                tokens: tokens as u32,
                channels: channels as u32,
                aligned: u32::from(channels.is_multiple_of(4) && self.z.is_vector_aligned()),
            },
        })
    }
}

impl Device {
    /// Writes `z` of all samples, tokens (for [`NoiseShape::PerToken`]) and channels: `[R, N]` or `[R, T, N]`, bitwise
    /// what [`Generator::fill`] gives.
    ///
    /// `key`, one `u64` (see [`Noise::Generated`](super::Noise::Generated)), replaces the generator's when the kernel runs.
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
        let (key, _key) = key.map(|key| self.input("key", key, stream)).transpose()?.unzip();
        let (z, _z) = self.output("z", z, stream)?;
        let plan = NoiseFill { shape, generator, key, z }.plan()?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernel touches.
        unsafe { self.launch(&plan, stream) }
    }
}
