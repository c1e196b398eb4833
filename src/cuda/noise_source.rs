//! Where a kernel's `z` comes from.

use super::buffer::{Buffer, Named};
use super::pointer::Input;
use crate::error::{Error, Result};
use crate::noise::{NoiseShape, check_samples};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};

/// Where a layer's `z` comes from, for planning: a given `z` is of `f32`.
pub type Source = crate::noise::Noise<Buffer, Buffer>;

/// Where a kernel's `z` comes from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoiseSource {
    /// z of the caller; null if generated.
    given: Input<f32>,
    /// The key, read when the kernel runs; null: `key` is the key.
    key_address: Input<u64>,
    key: [u32; 2],
    /// Number of the batch's sample 0 in the global batch.
    first_sample: u64,
    /// Samples per branch.
    batch: u32,
    /// One of the `NOISE_` constants.
    kind: u32,
    sigma: f32,
    /// Rows of a given z start at multiples of 16 bytes and hold whole vectors.
    aligned: u32,
}

/// No noise, `z = 1`.
pub const NOISE_OFF: u32 = 0;
/// Generated, one draw per sample (BC).
pub const NOISE_PER_SAMPLE: u32 = 1;
/// Generated, one draw per token (BTC).
pub const NOISE_PER_TOKEN: u32 = 2;
/// `z [R, N]` of the caller.
pub const NOISE_GIVEN_PER_SAMPLE: u32 = 3;
/// `z [R, T, N]` of the caller.
pub const NOISE_GIVEN_PER_TOKEN: u32 = 4;

impl NoiseSource {
    /// No noise.
    pub(super) const OFF: Self = Self {
        given: Input::NULL,
        key_address: Input::NULL,
        key: [0, 0],
        first_sample: 0,
        batch: 1,
        kind: NOISE_OFF,
        sigma: 0.0,
        aligned: 1,
    };

    /// Whether rows of a given `z` can be loaded in vectors of 16 bytes.
    pub(super) fn is_aligned(&self) -> bool {
        self.aligned != 0
    }
}

impl Source {
    /// Checks the source against a shape that is already checked, and lays it out for a kernel.
    pub(super) fn plan(&self, shape: &LinearShape) -> Result<NoiseSource> {
        // `batch` fits: the shape has at most 2^31 rows.
        let aligned = shape.out_features.is_multiple_of(4) && self.is_vector_aligned();
        let mut source =
            NoiseSource { batch: shape.batch as u32, aligned: u32::from(aligned), ..NoiseSource::OFF };
        match *self {
            Source::Off => return Ok(NoiseSource::OFF),
            Source::Generated(generator) | Source::Keyed { generator, .. } => {
                check_samples(generator.first_sample(), shape.batch)?;
                if let Source::Keyed { key, .. } = self {
                    key.check("key", "[1]", 1, 8)?;
                    source.key_address = (*key).into();
                }
                source.key = generator.key().0;
                source.sigma = generator.sigma();
                source.first_sample = generator.first_sample();
                source.kind = match generator.shape() {
                    NoiseShape::PerSample => NOISE_PER_SAMPLE,
                    NoiseShape::PerToken => NOISE_PER_TOKEN,
                };
            }
            Source::Given { z, shape: NoiseShape::PerSample } => {
                z.check("z", "[R, N]", shape.samples() * shape.out_features, 4)?;
                source.given = z.into();
                source.kind = NOISE_GIVEN_PER_SAMPLE;
            }
            Source::Given { z, shape: NoiseShape::PerToken } => {
                z.check("z", "[R, T, N]", shape.out_rows() * shape.out_features, 4)?;
                source.given = z.into();
                source.kind = NOISE_GIVEN_PER_TOKEN;
            }
        }
        Ok(source)
    }

    /// Checks that nothing which the source reads lies in `output`, whose elements have `bytes` bytes.
    pub(super) fn check_overlap(&self, output: &Buffer, bytes: usize) -> Result<()> {
        let (argument, overlaps) = match self {
            Source::Keyed { key, .. } => ("key", key.overlaps(8, output, bytes)),
            Source::Given { z, .. } => ("z", z.overlaps(4, output, bytes)),
            Source::Off | Source::Generated(_) => return Ok(()),
        };
        if overlaps {
            return Err(Error::Argument { argument, problem: "overlaps the output" });
        }
        Ok(())
    }

    /// The same for all outputs, after they were checked against each other.
    pub(super) fn check_disjoint(&self, outputs: &[Named], bytes: usize) -> Result<()> {
        outputs.iter().try_for_each(|(_, output)| self.check_overlap(output, bytes))
    }

    /// Whether a given `z` starts at a multiple of 16 bytes.
    pub(super) fn is_vector_aligned(&self) -> bool {
        match self {
            Source::Given { z, .. } => z.is_vector_aligned(),
            Source::Off | Source::Generated(_) | Source::Keyed { .. } => true,
        }
    }
}
