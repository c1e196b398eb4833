//! GEMMs of `bf16` by AMX, on one thread: one `TDPBF16PS` multiplies 16 rows of A and 16 columns of B, for 32 of the reduction.
//!
//! A tile of C takes four of the eight registers, two of A and two of B the others, so that each operand is used twice. The
//! instructions are written as text: their intrinsics are not in stable Rust.
//!
//! * *A* is packed by rows, once for all columns, or read where it lies if there are few columns; [`ROWS`] rows of [`DEPTH`] stay in
//!   the L1 cache.
//! * *B* is packed in panels of [`PANEL`] columns, word by word; panels come from the L2 cache. Tasks that multiply with the same B
//!   can have it packed once for all of them.
//! * *C* is computed in tiles, which wait in memory while there is more of the reduction.

use super::super::matmul::{MatMut, MatRef, Par};
use super::super::rows::blocks;
use super::super::scratch::{Line, Scratch};
use super::pack::{LANES, PANEL, pack_panels, pack_rows, store};
use crate::parallel;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, __m512};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of a tile of C; it has [`PANEL`] columns.
const ROWS: usize = 2 * LANES;
/// Most of the reduction for which a tile is computed at a time: its rows of A have 16 KiB, a third of an L1 cache.
const DEPTH: usize = 256;
/// Most of the reduction for which B goes through the L2 cache at a time.
const PART: usize = 2048;
/// Columns of B that go through it at a time: at most 1 MiB, half of an L2 cache.
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
pub struct Unit(());

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

    /// Rows or columns of `a` are contiguous.
    pub(super) fn left<'a>(self, a: MatRef<'_, bf16>, scratch: &'a mut Scratch<u32>) -> Left<'a> {
        let out = scratch.get(Left::len(a.nrows(), a.ncols()));
        // SAFETY: as above.
        unsafe { Left::pack(a, out) }
    }

    /// Rows or columns of `b` are contiguous.
    pub(super) fn right<'a>(self, b: MatRef<'_, bf16>, scratch: &'a mut Scratch<u32>, par: Par) -> Right<'a> {
        let out = scratch.get(Right::len(b.nrows(), b.ncols()));
        // SAFETY: as above.
        unsafe { Right::pack(b, out, par) }
    }

    /// `c = left·right`, or `c += left·right`; rows of `c` are contiguous.
    pub(super) fn multiply(self, c: MatMut<'_, f32>, add: bool, left: Left<'_>, right: Right<'_>) {
        // SAFETY: as above.
        unsafe { multiply(&self.registers(), c, add, 1.0, left, right) }
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

/// Equal parts of `total` of at most `most`, in multiples of `unit`.
fn even(total: usize, most: usize, unit: usize) -> usize {
    let total = total.max(1);
    total.div_ceil(total.div_ceil(most)).next_multiple_of(unit)
}

/// How much of a reduction of `k` one tile has at a time.
fn depth(k: usize) -> usize {
    even(k, DEPTH, 2 * LANES)
}

/// Rows of A as tiles take them.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Packed: for each [`depth`] of the reduction, rows of as many numbers, up to whole tiles.
    Packed { rows: usize, k: usize, words: &'a [u32] },
    /// Where they lie, by rows.
    InPlace(MatRef<'a, bf16>),
}

/// Columns of B as tiles take them: for each [`depth`] of the reduction, panels of as many numbers.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    k: usize,
    /// Columns that are packed, and those that are meant.
    packed: usize,
    columns: (usize, usize),
    words: &'a [u32],
}

impl<'a> Left<'a> {
    /// Words that so much is packed in.
    fn len(rows: usize, k: usize) -> usize {
        k.div_ceil(depth(k)) * rows.next_multiple_of(ROWS) * depth(k) / 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pack(a: MatRef<'_, bf16>, out: &'a mut [u32]) -> Self {
        let (rows, k) = (a.nrows(), a.ncols());
        let (words, out) = (depth(k) / 2, &mut out[..Self::len(rows, k)]);
        let parts = out.chunks_exact_mut(rows.next_multiple_of(ROWS) * words);
        for (part, out) in blocks(k, 2 * words).zip(parts) {
            pack_rows(a.subcols(part.start, part.len()), out, words);
        }
        Self::Packed { rows, k, words: out }
    }

    /// Rows, and the length of the reduction.
    fn size(&self) -> (usize, usize) {
        match *self {
            Self::Packed { rows, k, .. } => (rows, k),
            Self::InPlace(a) => (a.nrows(), a.ncols()),
        }
    }
}

impl<'a> Right<'a> {
    /// Words that so much is packed in.
    fn len(k: usize, columns: usize) -> usize {
        k.div_ceil(depth(k)) * columns.next_multiple_of(PANEL) * depth(k) / 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pack(b: MatRef<'_, bf16>, out: &'a mut [u32], par: Par) -> Self {
        let (k, columns) = (b.nrows(), b.ncols());
        let (words, out) = (depth(k) / 2, &mut out[..Self::len(k, columns)]);
        let parts = out.chunks_exact_mut(columns.next_multiple_of(PANEL) * words);
        let tasks = blocks(k, 2 * words).zip(parts).flat_map(|(part, out)| {
            let b = b.subrows(part.start, part.len());
            let blocks = blocks(columns, COLUMNS).zip(out.chunks_mut(COLUMNS * words));
            blocks.map(move |(columns, out)| (b.subcols(columns.start, columns.len()), out))
        });
        match par {
            Par::Seq => tasks.for_each(|(b, out)| pack_panels(b, out, words)),
            _ => parallel::for_each(tasks.collect::<Vec<_>>().into_iter(), |(b, out)| {
                pack_panels(b, out, words)
            }),
        }
        Self { k, packed: columns, columns: (0, columns), words: out }
    }

    /// Some of these columns, from a panel's first on.
    pub(super) fn columns(self, columns: Range<usize>) -> Self {
        let (start, end) = (self.columns.0 + columns.start, self.columns.0 + columns.end);
        assert!(start.is_multiple_of(PANEL) && start <= end && end <= self.columns.1, "columns of panels");
        Self { columns: (start, end), ..self }
    }
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
    let part = even(k, PART, 2 * LANES);
    let in_place = n <= FEW && a.col_stride() == 1;
    let block = if in_place { m } else { m.min(even(m, PACKED / part, ROWS)) };
    let of_a = if in_place { 0 } else { Left::len(block, part) };
    let mut scratch = Scratch::take();
    let (of_a, of_b) = scratch.get(of_a + Right::len(part, n.min(COLUMNS))).split_at_mut(of_a);
    for part in blocks(k, part) {
        let (a, b) = (a.subcols(part.start, part.len()), b.subrows(part.start, part.len()));
        for rows in blocks(m, block) {
            let a = a.subrows(rows.start, rows.len());
            let left = if in_place { Left::InPlace(a) } else { Left::pack(a, of_a) };
            for columns in blocks(n, COLUMNS) {
                let right = Right::pack(b.subcols(columns.start, columns.len()), of_b, Par::Seq);
                let c = c.as_mut().submatrix_mut(rows.start, columns.start, rows.len(), columns.len());
                multiply(registers, c, add || part.start > 0, scale, left, right);
            }
        }
    }
}

/// `c = scale·a·b`, or `c += scale·a·b`; rows of `c` are contiguous.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn multiply(
    registers: &Registers,
    mut c: MatMut<'_, f32>,
    add: bool,
    scale: f32,
    left: Left<'_>,
    right: Right<'_>,
) {
    let (m, k) = left.size();
    let n = right.columns.1 - right.columns.0;
    assert!(c.nrows() == m && c.ncols() == n && right.k == k, "shapes agree");
    assert!(c.col_stride() == 1, "rows of c are contiguous");
    assert!(right.words.len() == Right::len(k, right.packed), "all that is packed is there");
    assert!(!matches!(left, Left::Packed { words, .. } if words.len() != Left::len(m, k)), "and here");
    let (depth, depths) = (depth(k), k.div_ceil(depth(k)));
    let words = depth / 2;
    // Words of one depth of B, and of A.
    let of_b = right.packed.next_multiple_of(PANEL) * words;
    let of_a = m.next_multiple_of(ROWS) * words;
    let mut scratch = Scratch::take();
    // For tiles that wait, and for rows that are read where they lie but are less than a tile's.
    let (tiles, spare) = scratch.get(COLUMNS * ROWS + ROWS * words).split_at_mut(COLUMNS * ROWS);
    // Whether tiles of C can wait, and stay, where they belong: a row that crosses a cache line takes twice as long. They do not begin
    // with what is there: sums would have another order than elsewhere, and bits would depend on where C lies.
    let fits = scale == 1.0 && c.as_ptr().cast::<Line>().is_aligned() && c.row_stride() % LANES as isize == 0;
    // What of B stays in the L2 cache.
    for part in blocks(depths, depths.div_ceil(depths.div_ceil(PART / DEPTH))) {
        for columns in blocks(n, COLUMNS) {
            let first_panel = (right.columns.0 + columns.start) * words;
            for rows in blocks(m, ROWS) {
                for at in part.clone() {
                    let reduction = at * depth..k.min((at + 1) * depth);
                    let steps = reduction.len().div_ceil(2 * LANES);
                    let (a, stride) = match left {
                        Left::Packed { words: packed, .. } => {
                            (packed[at * of_a + rows.start * words..].as_ptr().cast(), depth as isize)
                        }
                        Left::InPlace(a) => {
                            let a = a.submatrix(rows.start, reduction.start, rows.len(), reduction.len());
                            // All rows of a tile are read, and all of each step.
                            if rows.len() == ROWS && reduction.len().is_multiple_of(2 * LANES) {
                                (a.as_ptr(), a.row_stride())
                            } else {
                                pack_rows(a, spare, words);
                                (spare.as_ptr().cast(), depth as isize)
                            }
                        }
                    };
                    let panels = right.words[at * of_b + first_panel..].chunks_exact(PANEL * words);
                    for ((panel, b), tile) in
                        blocks(columns.len(), PANEL).zip(panels).zip(tiles.chunks_exact_mut(ROWS * PANEL))
                    {
                        let (row, column) = (rows.start, columns.start + panel.start);
                        let mut c = c.as_mut().submatrix_mut(row, column, rows.len(), panel.len());
                        let add = add || part.start > 0;
                        let in_place = fits && !add && rows.len() == ROWS && panel.len() == PANEL;
                        let (out, out_stride) = match in_place {
                            true => (c.as_ptr_mut(), c.row_stride()),
                            false => (tile.as_mut_ptr().cast(), PANEL as isize),
                        };
                        // SAFETY: `out` has rows of a tile, and those of a tile that waits are aligned. A has its rows of `steps`
                        // steps, in its own memory or packed, where there is room for all rows of a tile; `b` is a packed panel of
                        // as many.
                        unsafe {
                            registers.multiply(
                                out,
                                out_stride,
                                at > part.start,
                                steps,
                                a,
                                stride,
                                b.as_ptr(),
                            );
                        }
                        if at + 1 == part.end && !in_place {
                            // SAFETY: two vectors are as many numbers as a row of a tile, which was written.
                            let sums = unsafe { &*tile.as_ptr().cast::<[[__m512; 2]; ROWS]>() };
                            store(c.as_mut(), add, scale, sums);
                        }
                    }
                }
            }
        }
    }
}

impl Registers {
    /// `c = a·b` or `c += a·b` for a tile of C and `32·steps` of the reduction, at least 32.
    ///
    /// # Safety
    /// `c` has [`ROWS`] rows of [`PANEL`] numbers, `c_stride` numbers apart, and they are written already if `add`. `a` has as many
    /// rows of `16·steps` words, `a_stride` numbers apart, `b` is a panel of as many words, and `steps` is not 0.
    #[expect(clippy::too_many_arguments, reason = "three operands and their sizes")]
    unsafe fn multiply(
        &self,
        c: *mut f32,
        c_stride: isize,
        add: bool,
        steps: usize,
        a: *const bf16,
        a_stride: isize,
        b: *const u32,
    ) {
        debug_assert!(steps > 0);
        // In bytes.
        let (c_stride, a_stride) = (4 * c_stride, 2 * a_stride);
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
                "tileloadd tmm0, [{c0} + {c_stride}*1]",
                "tileloadd tmm1, [{c0} + {c_stride}*1 + 64]",
                "tileloadd tmm2, [{c1} + {c_stride}*1]",
                "tileloadd tmm3, [{c1} + {c_stride}*1 + 64]",
                "3:",
                // B of the next step, which no cache guesses in time; prefetching never faults.
                ".irp line, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "prefetcht0 [{b} + 2048 + 64*\\line]",
                ".endr",
                "tileloadd tmm4, [{a0} + {a_stride}*1]",
                "tileloadd tmm6, [{b} + {b_stride}*1]",
                "tileloadd tmm7, [{b} + {b_stride}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {a_stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{c0} + {c_stride}*1], tmm0",
                "tilestored [{c0} + {c_stride}*1 + 64], tmm1",
                "tilestored [{c1} + {c_stride}*1], tmm2",
                "tilestored [{c1} + {c_stride}*1 + 64], tmm3",
                add = in(reg) u32::from(add),
                c0 = in(reg) c,
                c1 = in(reg) c.byte_offset(LANES as isize * c_stride),
                c_stride = in(reg) c_stride,
                a0 = inout(reg) a => _,
                a1 = inout(reg) a.byte_offset(LANES as isize * a_stride) => _,
                a_stride = in(reg) a_stride,
                b = inout(reg) b => _,
                b_stride = in(reg) 4 * PANEL,
                steps = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
