//! GEMMs of `bf16` by AMX, on one thread: one `TDPBF16PS` multiplies 16 rows of A and 16 columns of B, for 32 of the reduction.
//!
//! A tile of C takes four of the eight registers, two of A and two of B the others, so that each operand is used twice. The
//! instructions are written as text: their intrinsics are not in stable Rust.
//!
//! * *A* is packed by rows, once for all columns, or read where it lies if there are few columns; [`ROWS`] rows of [`DEPTH`] stay in
//!   the L1 cache.
//! * *B* is packed in panels of [`PANEL`] columns, word by word; it stays in the L2 cache, from where panels come.
//! * *C* is computed in tiles, which wait in memory while there is more of the reduction.

use super::super::matmul::{MatMut, MatRef};
use super::super::rows::blocks;
use super::super::scratch::Scratch;
use super::pack::{LANES, PANEL, pack_panels, pack_rows, store};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, __m512};
use std::marker::PhantomData;

/// Rows of a tile of C; it has [`PANEL`] columns.
const ROWS: usize = 2 * LANES;
/// Most of the reduction for which a tile is computed at a time: its rows of A have 32 KiB.
const DEPTH: usize = 512;
/// Most of the reduction for which operands are packed at a time.
const PART: usize = 2048;
/// Columns of B that are packed at a time: at most 1 MiB, half of an L2 cache.
const COLUMNS: usize = 256;
/// Numbers of A that are packed at a time, about: 4 MiB.
const PACKED: usize = 1 << 21;
/// Columns for which packing A would take longer than reading it where it lies.
const FEW: usize = 2 * PANEL;

/// Whether the processor has AMX, for `bf16`.
pub(super) fn is_there() -> bool {
    // SAFETY: every x86-64 processor has the instruction. (It is safe from Rust 1.94 on.)
    #[allow(unused_unsafe)]
    let cpuid = |leaf| unsafe { __cpuid_count(leaf, 0) };
    let leaves = cpuid(0).eax;
    let features = if leaves >= 7 { cpuid(7).edx } else { 0 };
    features & (1 << 24) != 0 && features & (1 << 22) != 0
}

/// That the processor has the instructions, and that the system lets this process use them.
#[derive(Clone, Copy)]
pub(super) struct Unit(());

impl Unit {
    pub(super) fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_there()
            && is_allowed();
        has_all.then_some(Self(()))
    }

    /// `c = scale·a·b`, or `c += scale·a·b`; rows of `c` are contiguous, of `a` and `b` rows or columns.
    pub(super) fn gemm(
        self,
        c: MatMut<'_, f32>,
        add: bool,
        scale: f32,
        a: MatRef<'_, bf16>,
        b: MatRef<'_, bf16>,
    ) {
        // SAFETY: the processor has every feature that `gemm` enables, or there would be no `self`.
        unsafe { gemm(&self.registers(), c, add, scale, a, b) }
    }

    /// Sets up the registers of this thread, until they are dropped.
    fn registers(self) -> Registers {
        /// 16 rows of 64 bytes for each of the eight, by palette 1.
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(64);
        rows[..8].fill(LANES as u8);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: there are the instructions, and 64 bytes in their layout.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const configuration,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly),
            );
        };
        Registers(PhantomData)
    }
}

/// Asks the system, which saves the registers of processes that have asked.
#[cfg(target_os = "linux")]
fn is_allowed() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call reads and writes no memory of this process.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_allowed() -> bool {
    false
}

/// The registers of this thread, set up.
struct Registers(PhantomData<*const ()>);

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: there are the instructions. Registers that are in use would be saved at each change of threads.
        unsafe {
            asm!("tilerelease", out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nomem, nostack, preserves_flags))
        };
    }
}

/// A tile of C, by rows.
#[repr(align(64))]
struct Tile(#[expect(dead_code, reason = "read as vectors")] [[f32; PANEL]; ROWS]);

/// Equal parts of `total` of at most `most`, in multiples of `unit`.
fn even(total: usize, most: usize, unit: usize) -> usize {
    let total = total.max(1);
    total.div_ceil(total.div_ceil(most)).next_multiple_of(unit)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn gemm(
    registers: &Registers,
    mut c: MatMut<'_, f32>,
    add: bool,
    scale: f32,
    a: MatRef<'_, bf16>,
    b: MatRef<'_, bf16>,
) {
    let (m, n, k) = (c.nrows(), c.ncols(), a.ncols());
    assert!(a.nrows() == m && b.nrows() == k && b.ncols() == n, "shapes agree");
    assert!(c.col_stride() == 1, "rows of c are contiguous");
    // How much of the reduction is packed at a time, and how much of that one tile has; rows that are packed at a time.
    let part = even(k, PART, 2 * LANES);
    let depth = even(part, DEPTH, 2 * LANES);
    let direct = n <= FEW && a.col_stride() == 1;
    let block = even(m, if direct { usize::MAX } else { PACKED / part }, ROWS);
    let (words, depths) = (depth / 2, part.div_ceil(depth));
    let panels = n.min(COLUMNS).div_ceil(PANEL);
    // Words for tiles that wait, and for one depth of A and of B.
    let of_c = if depths == 1 { 1 } else { panels } * ROWS * PANEL;
    let of_a = if direct { ROWS } else { block } * words;
    let of_b = panels * PANEL * words;
    let mut scratch = Scratch::<u32>::take();
    let memory = scratch.get(of_c + depths * (of_a + of_b) + LANES);
    // A load that crosses a cache line takes twice as long.
    let aligned = memory.as_ptr().align_offset(align_of::<Tile>()).min(LANES);
    let (tiles, packed) = memory[aligned..].split_at_mut(of_c);
    let (packed_a, packed_b) = packed.split_at_mut(depths * of_a);
    for part in blocks(k, part) {
        let a = a.subcols(part.start, part.len());
        let b = b.subrows(part.start, part.len());
        let add = add || part.start > 0;
        for rows in blocks(m, block) {
            let a = a.subrows(rows.start, rows.len());
            if !direct {
                for (depth, packed) in blocks(part.len(), depth).zip(packed_a.chunks_exact_mut(of_a)) {
                    pack_rows(a.subcols(depth.start, depth.len()), packed, words);
                }
            }
            for columns in blocks(n, COLUMNS) {
                let b = b.subcols(columns.start, columns.len());
                for (depth, packed) in blocks(part.len(), depth).zip(packed_b.chunks_exact_mut(of_b)) {
                    pack_panels(b.subrows(depth.start, depth.len()), packed, words);
                }
                for tile_rows in blocks(rows.len(), ROWS) {
                    let packed = packed_a.chunks_exact_mut(of_a).zip(packed_b.chunks_exact(of_b));
                    for (depth, (packed_a, packed_b)) in blocks(part.len(), depth).zip(packed) {
                        let steps = depth.len().div_ceil(2 * LANES);
                        let (first, count) = (tile_rows.start, tile_rows.len());
                        let in_place = a.submatrix(first, depth.start, count, depth.len());
                        // All rows of a tile are read, and all of each step.
                        let is_whole = count == ROWS && depth.len().is_multiple_of(2 * LANES);
                        let (a, stride) = if direct && is_whole {
                            (in_place.as_ptr(), in_place.row_stride())
                        } else if direct {
                            pack_rows(in_place, packed_a, words);
                            (packed_a.as_ptr().cast(), 2 * words as isize)
                        } else {
                            (packed_a[first * words..].as_ptr().cast(), 2 * words as isize)
                        };
                        let panels = packed_b.chunks_exact(PANEL * words);
                        for (at, (panel, b)) in blocks(columns.len(), PANEL).zip(panels).enumerate() {
                            let tile =
                                &mut tiles[if depths == 1 { 0 } else { at } * ROWS * PANEL..][..ROWS * PANEL];
                            let tile = tile.as_mut_ptr().cast::<Tile>();
                            // SAFETY: a tile's memory, as aligned as one. A has its rows of `steps` steps, in its own memory or
                            // packed, where there is room for all rows of a tile; `b` is a packed panel of as many.
                            let sums = unsafe {
                                registers.multiply(tile, depth.start > 0, steps, a, stride, b.as_ptr());
                                // Two vectors are as many numbers as a row.
                                &*tile.cast::<[[__m512; 2]; ROWS]>()
                            };
                            if depth.end == part.len() {
                                let (row, column) = (rows.start + first, columns.start + panel.start);
                                let c = c.as_mut().submatrix_mut(row, column, count, panel.len());
                                store(c, add, scale, sums);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Registers {
    /// `tile = a·b` or `tile += a·b` for `32·steps` of the reduction, at least 32.
    ///
    /// # Safety
    /// `tile` is memory of a tile, and has one if `add`. `a` has [`ROWS`] rows of `16·steps` words, `stride` numbers apart, `b` is a
    /// panel of as many words, and `steps` is not 0.
    unsafe fn multiply(
        &self,
        tile: *mut Tile,
        add: bool,
        steps: usize,
        a: *const bf16,
        stride: isize,
        b: *const u32,
    ) {
        debug_assert!(steps > 0);
        let stride = 2 * stride;
        // SAFETY: the caller's promise; the registers are set up, and nothing else uses them.
        unsafe {
            asm!(
                "test {add:e}, {add:e}",
                "jnz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {columns}*1]",
                "tileloadd tmm1, [{c} + {columns}*1 + 64]",
                "tileloadd tmm2, [{c} + {columns}*1 + 2048]",
                "tileloadd tmm3, [{c} + {columns}*1 + 2112]",
                "3:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b} + {columns}*1]",
                "tileloadd tmm7, [{b} + {columns}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{c} + {columns}*1], tmm0",
                "tilestored [{c} + {columns}*1 + 64], tmm1",
                "tilestored [{c} + {columns}*1 + 2048], tmm2",
                "tilestored [{c} + {columns}*1 + 2112], tmm3",
                add = in(reg) u32::from(add),
                a0 = inout(reg) a => _,
                a1 = inout(reg) a.byte_offset(LANES as isize * stride) => _,
                stride = in(reg) stride,
                b = inout(reg) b => _,
                c = in(reg) tile,
                columns = in(reg) 4 * PANEL,
                steps = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
