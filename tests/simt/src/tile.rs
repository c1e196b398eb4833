//! wgmma's operands in shared memory, as their descriptors say, and its arithmetic.

use crate::engine::{Engine, Who};
use crate::fault::Fault;
use crate::hooks::WARP;
use crate::tensor_map::{CHUNK, swizzled};

/// Rows of A and D.
pub const ROWS: usize = 64;
/// The inner dimension.
pub const K: usize = 16;
/// Elements of A in a thread's registers.
pub const A_ELEMENTS: usize = 8;
/// Columns of B that are multiplied together.
const COLUMNS: usize = 8;
/// Elements of 16 bytes.
const ELEMENTS: usize = CHUNK / 2;

/// An operand: its descriptor, and whether its other index than K is the one along memory.
pub struct Tile {
    pub descriptor: u64,
    pub is_transposed: bool,
    pub is_bf16: bool,
}

/// A 16-bit value, exactly.
pub fn decode(bits: u16, is_bf16: bool) -> f64 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(bits >> 10 & 31), u32::from(bits & 1023));
    let magnitude = match (is_bf16, exponent) {
        (true, _) => return f64::from(f32::from_bits(u32::from(bits) << 16)),
        // Multiples of 2^-24.
        (false, 0) => (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        (false, 31) => 0x7F80_0000 | fraction << 13,
        (false, _) => (exponent + 112) << 23 | fraction << 13,
    };
    f64::from(f32::from_bits(sign | magnitude))
}

/// Truncated, not rounded, as tensor cores do.
#[inline(always)]
fn cut(value: f64) -> f32 {
    let result = value as f32;
    let is_larger = f64::from(result).abs() > value.abs();
    f32::from_bits(result.to_bits() - u32::from(is_larger))
}

/// Where element (k, column) of B lies for `multiply`: 8 columns beside each other, for each k.
pub fn b_at(k: usize, column: usize) -> usize {
    column / COLUMNS * (K * COLUMNS) + k * COLUMNS + column % COLUMNS
}

/// d = a @ b, plus d if `accumulate`: products are summed in f64, the accumulator last, and truncated once.
///
/// `d` is by thread: lane 4 g + t of warp w has `d[4 j + 2 h + i]` = D[16 w + g + 8 h][8 j + 2 t + i].
pub fn multiply(a: &[[f64; K]; ROWS], b: &[f64], d: &mut [f32], accumulate: bool) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has these instructions.
        return unsafe { multiply_avx2(a, b, d, accumulate) };
    }
    multiply_plain(a, b, d, accumulate);
}

/// The same numbers: products are exact, and sums in the same order.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2(a: &[[f64; K]; ROWS], b: &[f64], d: &mut [f32], accumulate: bool) {
    multiply_plain(a, b, d, accumulate);
}

#[inline(always)]
fn multiply_plain(a: &[[f64; K]; ROWS], b: &[f64], d: &mut [f32], accumulate: bool) {
    let each = b.len() / K / 2;
    for (row, a) in a.iter().enumerate() {
        let (first, half) = (row / 16 * WARP + row % 8 * 4, row / 8 % 2);
        for (chunk, b) in b.chunks_exact(K * COLUMNS).enumerate() {
            let mut sums = [0.0; COLUMNS];
            for (a, b) in a.iter().zip(b.as_chunks::<COLUMNS>().0) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
            for (t, sums) in sums.as_chunks::<2>().0.iter().enumerate() {
                let d = &mut d[(first + t) * each + 4 * chunk + 2 * half..][..2];
                for (d, sum) in d.iter_mut().zip(sums) {
                    *d = cut(if accumulate { sum + f64::from(*d) } else { *sum });
                }
            }
        }
    }
}

impl Tile {
    /// Bytes of the swizzle's span.
    fn span(&self) -> u32 {
        [0, 128, 64, 32][(self.descriptor >> 62) as usize]
    }

    /// Bits `first` to `first + 13` in units of 16 bytes.
    fn field(&self, first: u32) -> u32 {
        (self.descriptor >> first & 0x3FFF) as u32 * CHUNK as u32
    }

    /// What is wrong with the descriptor.
    fn check(&self) -> Result<(), String> {
        let (start, span) = (self.field(0), self.span());
        if self.descriptor >> 49 & 7 != 0 {
            return Err("a descriptor with a base offset".into());
        }
        if self.descriptor & 0x3FF1_C000_C000_C000 != 0 {
            return Err(format!("a descriptor {:#x} with bits that mean nothing", self.descriptor));
        }
        // A part of a tile may start at some 16 bytes of the first row, not in another row of the pattern.
        if span > 0 && start % (8 * span) >= span {
            return Err(format!(
                "a descriptor of {start:#x}, in the middle of a pattern of {} bytes",
                8 * span
            ));
        }
        Ok(())
    }

    /// Distance from the start to element (8 `chunk`, k) of a transposed operand, before swizzling.
    fn transposed_offset(&self, chunk: u32, k: u32) -> u32 {
        let (leading, stride, span) = (self.field(16), self.field(32), self.span());
        match span / CHUNK as u32 {
            0 => k % 8 * 16 + k / 8 * leading + chunk * stride,
            width => chunk % width * 16 + chunk / width * leading + k % 8 * span + k / 8 * stride,
        }
    }

    /// Distance from the start to element (row, 8 `chunk`) of an operand that is not transposed, before swizzling.
    fn offset(&self, row: u32, chunk: u32) -> u32 {
        let (leading, stride, span) = (self.field(16), self.field(32), self.span());
        match span {
            0 => row % 8 * 16 + row / 8 * stride + chunk * leading,
            _ => row % 8 * span + row / 8 * stride + chunk * 16,
        }
    }
}

impl Engine {
    /// Reads a tile `[rows, K]`, and gives `put` each row, k and value.
    pub fn read_tile(
        &mut self,
        block: usize,
        who: Who,
        tile: &Tile,
        rows: usize,
        mut put: impl FnMut(usize, usize, f64),
    ) -> Result<(), Fault> {
        tile.check().map_err(|why| who.instruction(why))?;
        let mut read = |offset: u32| {
            let address = swizzled(tile.field(0) + offset, tile.span());
            let bytes = self.read_async(block, who, address)?;
            let element =
                |i: usize| decode(u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]), tile.is_bf16);
            Ok::<[f64; ELEMENTS], Fault>(std::array::from_fn(element))
        };
        if tile.is_transposed {
            for k in 0..K {
                for chunk in 0..rows / ELEMENTS {
                    let values = read(tile.transposed_offset(chunk as u32, k as u32))?;
                    (0..ELEMENTS).for_each(|i| put(chunk * ELEMENTS + i, k, values[i]));
                }
            }
        } else {
            for row in 0..rows {
                for chunk in 0..K / ELEMENTS {
                    let values = read(tile.offset(row as u32, chunk as u32))?;
                    (0..ELEMENTS).for_each(|i| put(row, chunk * ELEMENTS + i, values[i]));
                }
            }
        }
        Ok(())
    }
}
