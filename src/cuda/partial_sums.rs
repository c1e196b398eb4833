//! Sums of partial results in their order; plans `kernels/partial_sums.cu`.

use super::buffer::{Address, Buffer, DType};
use super::kernel::table;
use super::plan::Launch;
use super::pointer::{Input, Output, Void};
use bytemuck::{Pod, Zeroable};

/// Blocks that keep a large device busy, two for each of an H200's 132 multiprocessors: sums are split to have as many. One number
/// for all devices, so that all add up in the same order.
pub(super) const SPLIT_BLOCKS: usize = 264;
/// Threads of a block.
pub const PARTIAL_SUMS_THREADS: usize = 256;
/// Elements of one thread.
const WIDTH: usize = 4;
/// Parts that a thread adds at least, where there are more threads than elements need.
const MIN_RUN: usize = 4;
const MAX_GROUPS: usize = 16;

/// Parameters of the kernels `partial_sums*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct PartialSumsParams {
    partial: Input<f32>,
    out: Output<Void>,
    length: u64,
    /// Rows of `partial` start at multiples of 16 bytes and hold whole vectors.
    aligned: u64,
    parts: u32,
    /// Threads that share the parts, a power of two.
    groups: u32,
}

/// The launch that adds up `partial [parts, out.len()]`, `f32` at this address. Both were checked before.
pub(super) fn partial_sums(partial: Address, parts: usize, out: Buffer, dtype: DType) -> Launch {
    let groups = (parts / MIN_RUN + 1).next_power_of_two().div_ceil(2).min(MAX_GROUPS);
    Launch::new(
        table::PARTIAL_SUMS.choose(dtype),
        [out.len.div_ceil(PARTIAL_SUMS_THREADS / groups * WIDTH) as u32, 1, 1],
        [PARTIAL_SUMS_THREADS as u32, 1, 1],
        if groups > 1 { PARTIAL_SUMS_THREADS * WIDTH * 4 } else { 0 },
        &PartialSumsParams {
            partial: partial.into(),
            out: out.into(),
            length: out.len as u64,
            parts: parts as u32,
            aligned: u64::from(out.len.is_multiple_of(WIDTH) && partial.is_vector_aligned()),
            groups: groups as u32,
        },
    )
}
