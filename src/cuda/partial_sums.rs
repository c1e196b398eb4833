//! Sums of partial results in their order; plans `kernels/partial_sums.cu`.

use super::kernel::table;
use super::launch::{Buffer, DType, Launch, params};

const THREADS: usize = 256;
/// Elements of one thread.
const WIDTH: usize = 4;
/// Parts that a thread adds at least, where there are more threads than elements need.
const MIN_RUN: usize = 4;
const MAX_GROUPS: usize = 16;

params! {
    /// `pace::PartialSumsParams` of the kernels.
    PartialSumsParams, 40 bytes {
        0 partial: u64,
        8 out: u64,
        16 length: u64,
        24 parts: u32,
        28 aligned: u32,
        32 groups: u32,
        36 reserved: u32,
    }
}

/// The launch that adds up `partial [parts, out.len()]`, `f32` at this address. Both were checked before.
pub(super) fn partial_sums(
    partial: u64,
    parts: usize,
    out: Buffer,
    dtype: DType,
) -> Launch<PartialSumsParams> {
    let groups = (parts / MIN_RUN + 1).next_power_of_two().div_ceil(2).min(MAX_GROUPS);
    Launch {
        kernel: table::PARTIAL_SUMS.choose(dtype),
        grid: [out.len.div_ceil(THREADS / groups * WIDTH) as u32, 1, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: if groups > 1 { (THREADS * WIDTH * 4) as u32 } else { 0 },
        params: PartialSumsParams {
            partial,
            out: out.address,
            length: out.len as u64,
            parts: parts as u32,
            aligned: u32::from(out.len.is_multiple_of(WIDTH) && partial.is_multiple_of(16)),
            groups: groups as u32,
            reserved: 0,
        },
    }
}
