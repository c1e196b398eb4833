//! Units of work of kernels that keep a sample's noise in registers: a run of its tokens.

use super::buffer::grid;
use bytemuck::{Pod, Zeroable};

/// Columns of 16 bytes in a block: a warp touches up to 512 adjacent bytes.
const COLUMNS: usize = 32;
/// Tokens side by side in a block.
const TOKENS: usize = 8;
/// Largest z dimension of a block.
const MAX_BLOCK_Z: usize = 64;

/// A tensor `[samples, tokens, channels]`, cut into units: runs of at most `chunk` tokens of one sample.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct Units {
    /// Sample rows `R`.
    samples: u32,
    /// Tokens per sample `T`; 1 if a row per sample is all there is.
    tokens: u32,
    /// Out-features `N`.
    channels: u32,
    /// Tokens per unit.
    chunk: u32,
    /// Units per sample.
    chunks: u32,
    /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
    aligned: u32,
}

impl Units {
    /// Units, grid and block for vectors of `width` channels: a block's x dimension covers vectors, y tokens and z units, and
    /// has at most `threads` threads; a thread has about `each` tokens of a unit.
    pub(super) fn new(
        [samples, tokens, channels]: [usize; 3],
        width: usize,
        aligned: bool,
        threads: usize,
        each: usize,
    ) -> (Self, [u32; 3], [u32; 3]) {
        let columns = channels.div_ceil(width);
        let x = columns.next_power_of_two().min(COLUMNS);
        let y = tokens.next_power_of_two().min(TOKENS);
        let z = (threads / (x * y)).min(MAX_BLOCK_Z);
        let chunks = tokens.div_ceil(y * each);
        let units = Self {
            samples: samples as u32,
            tokens: tokens as u32,
            channels: channels as u32,
            chunk: tokens.div_ceil(chunks) as u32,
            chunks: chunks as u32,
            aligned: u32::from(aligned && channels.is_multiple_of(width)),
        };
        let grid = grid(columns.div_ceil(x), (samples * chunks).div_ceil(z));
        (units, grid, [x as u32, y as u32, z as u32])
    }
}
