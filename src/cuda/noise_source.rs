//! Where a kernel's `z` comes from; mirrors `kernels/noise_source.cuh`.

use super::buffer::{Buffer, Named};
use crate::error::{Error, Result};
use crate::noise::{NoiseShape, check_samples};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};
use std::mem::offset_of;

/// Where a layer's `z` comes from, for planning: a given `z` is of `f32`.
pub type Source = crate::noise::Noise<Buffer, Buffer>;

/// `pace::NoiseSource` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct NoiseSource {
    given: u64,
    key_address: u64,
    key: [u32; 2],
    first_sample: u64,
    batch: u32,
    kind: u32,
    sigma: f32,
    reserved: u32,
}

const _: () = assert!(
    size_of::<NoiseSource>() == 48
        && align_of::<NoiseSource>() == 8
        && offset_of!(NoiseSource, key_address) == 8
        && offset_of!(NoiseSource, key) == 16
        && offset_of!(NoiseSource, first_sample) == 24
        && offset_of!(NoiseSource, batch) == 32
        && offset_of!(NoiseSource, kind) == 36
        && offset_of!(NoiseSource, sigma) == 40
);

/// `pace::NoiseKind`.
const OFF: u32 = 0;
const PER_SAMPLE: u32 = 1;
const PER_TOKEN: u32 = 2;
const GIVEN_PER_SAMPLE: u32 = 3;
const GIVEN_PER_TOKEN: u32 = 4;

impl NoiseSource {
    /// No noise.
    pub(super) const OFF: Self = Self {
        given: 0,
        key_address: 0,
        key: [0, 0],
        first_sample: 0,
        batch: 1,
        kind: OFF,
        sigma: 0.0,
        reserved: 0,
    };
}

impl Source {
    /// Checks the source against a shape that is already checked, and lays it out for a kernel.
    pub(super) fn plan(&self, shape: &LinearShape) -> Result<NoiseSource> {
        // `batch` fits: the shape has at most 2^31 rows.
        let mut source = NoiseSource { batch: shape.batch as u32, ..NoiseSource::OFF };
        match *self {
            Source::Off => return Ok(NoiseSource::OFF),
            Source::Generated(generator) | Source::Keyed { generator, .. } => {
                check_samples(generator.first_sample(), shape.batch)?;
                if let Source::Keyed { key, .. } = self {
                    key.check("key", "[1]", 1, 8)?;
                    source.key_address = key.address;
                }
                source.key = generator.key().0;
                source.sigma = generator.sigma();
                source.first_sample = generator.first_sample();
                source.kind = match generator.shape() {
                    NoiseShape::PerSample => PER_SAMPLE,
                    NoiseShape::PerToken => PER_TOKEN,
                };
            }
            Source::Given { z, shape: NoiseShape::PerSample } => {
                z.check("z", "[R, N]", shape.samples() * shape.out_features, 4)?;
                source.given = z.address;
                source.kind = GIVEN_PER_SAMPLE;
            }
            Source::Given { z, shape: NoiseShape::PerToken } => {
                z.check("z", "[R, T, N]", shape.out_rows() * shape.out_features, 4)?;
                source.given = z.address;
                source.kind = GIVEN_PER_TOKEN;
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

    /// Whether 16-byte loads of a given `z` work, where rows hold whole vectors.
    pub(super) fn is_vector_aligned(&self) -> bool {
        match self {
            Source::Given { z, .. } => z.is_vector_aligned(),
            Source::Off | Source::Generated(_) | Source::Keyed { .. } => true,
        }
    }
}
