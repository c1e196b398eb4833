//! Tiles of C by AMX: one `TDPBF16PS` multiplies 16 rows of A and 16 columns of B, for 32 of the reduction.
//!
//! A tile of C takes four of the eight registers, two of A and two of B the others, so that each operand is used twice. The
//! instructions are written as text: their intrinsics are not in stable Rust.

use super::avx512::{LANES, PANEL};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile of C; it has [`PANEL`] columns.
pub(super) const ROWS: usize = 2 * LANES;

/// Whether a process can use AMX.
#[derive(Clone, Copy)]
pub(super) enum Support {
    /// The processor has none, or not for `bf16`.
    Absent,
    /// The system keeps it to itself.
    Refused,
    Usable(Amx),
}

impl Support {
    pub(super) fn detect() -> Self {
        static SUPPORT: OnceLock<Support> = OnceLock::new();
        *SUPPORT.get_or_init(|| match is_there() {
            false => Self::Absent,
            true if is_allowed() => Self::Usable(Amx(())),
            true => Self::Refused,
        })
    }
}

/// That the processor has the instructions, and that the system lets this process use them.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// Sets up the registers of this thread, until they are dropped.
    pub(super) fn registers(self) -> Registers {
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

/// Whether the processor has AMX-TILE and AMX-BF16.
fn is_there() -> bool {
    // SAFETY: every x86-64 processor has the instruction. (It is safe from Rust 1.94 on.)
    #[allow(unused_unsafe)]
    let cpuid = |leaf| unsafe { __cpuid_count(leaf, 0) };
    let leaves = cpuid(0).eax;
    let features = if leaves >= 7 { cpuid(7).edx } else { 0 };
    features & (1 << 24) != 0 && features & (1 << 22) != 0
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
pub(super) struct Registers(PhantomData<*const ()>);

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
pub(super) struct Tile(pub(super) [[f32; PANEL]; ROWS]);

impl Registers {
    /// `tile = a·b` for `32·steps` of the reduction, at least 32.
    ///
    /// # Safety
    /// `a` has [`ROWS`] rows of `16·steps` words, `stride` numbers apart, `b` is a panel of as many words, and `steps` is not 0.
    pub(super) unsafe fn multiply(
        &self,
        tile: &mut Tile,
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
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
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
                "jnz 2b",
                "tilestored [{c} + {columns}*1], tmm0",
                "tilestored [{c} + {columns}*1 + 64], tmm1",
                "tilestored [{c} + {columns}*1 + 2048], tmm2",
                "tilestored [{c} + {columns}*1 + 2112], tmm3",
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
