//! The C interface: every operator, on host memory and on device memory, for callers in C, C++, Python and anything else.
//!
//! `include/pace_kernels.h` is generated from here; `docs/embedding.md` shows how to build and link the library.
//!
//! An operator takes a device (`NULL` for the CPU), a stream (a `CUstream`, or `NULL` for the default one) and a struct of
//! arguments. Structs are zeroed, their `size` set to `sizeof`, and filled in: what stays zero is absent or off. A struct of an
//! older header is accepted, and one of a newer header as long as what this library does not know is zero.
//!
//! Every function gives a status; `PACE_OK` is 0. For any other, [`pace_last_error`] tells this thread in words what was wrong,
//! and which argument; nothing was written then, unless the status is `PACE_ERROR_DRIVER` or `PACE_ERROR_INTERNAL`. No panic
//! leaves the library; a lack of host memory ends the process, as in any Rust program. Every function may be called from any
//! thread. In a process that was forked after a CPU operator has run they are a `PACE_ERROR_FORKED`: their threads are not in it.
//!
//! On CUDA nothing waits, and nothing is allocated: `pace_*_workspace` tells how many bytes of device memory an operator
//! needs besides its tensors. To capture a layer in a CUDA graph, run it once on the same tensors before: cuBLASLt loads its
//! kernels when they are first used. Devices are used through their primary context, as PyTorch and the CUDA runtime do; the thread's
//! current context stays what it was.

// SAFETY of every `#[unsafe(no_mangle)]` here: all names begin with `pace_`, and a linker refuses two of one name.

mod call;
mod device;
mod linear;
mod lm_head;
mod lora;
mod loss;
mod noise;
mod norms;
mod process;
mod types;
mod weights;

pub use device::*;
pub use linear::*;
pub use lm_head::*;
pub use lora::*;
pub use loss::*;
pub use noise::*;
pub use norms::*;
pub use types::*;
pub use weights::*;

use crate::error::Error;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a function gives back: `PACE_OK`, or what kind of thing was wrong.
pub type PaceStatus = i32;

/// Done.
pub const PACE_OK: PaceStatus = 0;
/// A pointer is NULL, misaligned or overlaps an output, or an argument is needed and absent, or present and not allowed.
pub const PACE_ERROR_ARGUMENT: PaceStatus = 1;
/// A tensor does not have the number of elements that the sizes ask for.
pub const PACE_ERROR_LENGTH: PaceStatus = 2;
/// A size is zero or too large.
pub const PACE_ERROR_SIZE: PaceStatus = 3;
/// A number is out of its range, not finite, or not one of the constants.
pub const PACE_ERROR_VALUE: PaceStatus = 4;
/// A label is neither a class nor the ignored label.
pub const PACE_ERROR_LABEL: PaceStatus = 5;
/// A history index is out of range or occurs twice.
pub const PACE_ERROR_INDEX: PaceStatus = 6;
/// The operator does not take this type of tensors there.
pub const PACE_ERROR_DTYPE: PaceStatus = 7;
/// `size` is not that of a struct which this library understands.
pub const PACE_ERROR_VERSION: PaceStatus = 8;
/// A CPU operator in a process that was forked from one which had used them.
pub const PACE_ERROR_FORKED: PaceStatus = 9;
/// There is no CUDA driver.
pub const PACE_ERROR_NO_DRIVER: PaceStatus = 16;
/// There is no CUDA device of this number.
pub const PACE_ERROR_NO_DEVICE: PaceStatus = 17;
/// The device is older than compute capability 8.0.
pub const PACE_ERROR_DEVICE_TOO_OLD: PaceStatus = 18;
/// The library was built without nvcc.
pub const PACE_ERROR_KERNELS_NOT_BUILT: PaceStatus = 19;
/// A call of the CUDA driver or of cuBLASLt failed.
pub const PACE_ERROR_DRIVER: PaceStatus = 20;
/// A fault of the library.
pub const PACE_ERROR_INTERNAL: PaceStatus = 32;

/// Grows with every change that an old caller could notice.
pub const PACE_ABI_VERSION: u32 = 3;

/// Why a call did nothing.
#[derive(Debug)]
struct Failure {
    status: PaceStatus,
    message: String,
}

impl Failure {
    fn new(status: PaceStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn argument(name: &str, problem: &str) -> Self {
        Self::new(PACE_ERROR_ARGUMENT, format!("`{name}` {problem}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            // No elements: it was forgotten.
            Error::Argument { .. } | Error::Length { got: 0, .. } => PACE_ERROR_ARGUMENT,
            Error::Length { .. } => PACE_ERROR_LENGTH,
            Error::Size { .. } | Error::Overflow { .. } => PACE_ERROR_SIZE,
            Error::Value { .. } => PACE_ERROR_VALUE,
            Error::Label { .. } => PACE_ERROR_LABEL,
            Error::Index { .. } | Error::DuplicateIndex { .. } => PACE_ERROR_INDEX,
            Error::NoDriver(_) => PACE_ERROR_NO_DRIVER,
            Error::NoDevice { .. } => PACE_ERROR_NO_DEVICE,
            Error::DeviceTooOld { .. } => PACE_ERROR_DEVICE_TOO_OLD,
            Error::KernelsNotBuilt { .. } => PACE_ERROR_KERNELS_NOT_BUILT,
            Error::Driver { .. }
            | Error::Library { .. }
            | Error::NoFamily { .. }
            | Error::OtherDevice { .. } => PACE_ERROR_DRIVER,
            Error::Weights(_) => PACE_ERROR_INTERNAL,
        };
        // The Rust interface's names of arguments, where they are others here.
        const NAMES: [(&str, &str); 10] = [
            ("`base.", "`base_"),
            ("`grads.", "`grad_"),
            ("`delta_weight_grad`", "`dout`"),
            ("`delta_bias_grad`", "`dout`"),
            ("`labels.len()`", "`labels.len`"),
            ("`mask.len()`", "`batch`"),
            ("`history.len()`", "`history.len`"),
            ("`key`", "`key_address`"),
            ("`both_branches`", "PACE_LOSS_BOTH_BRANCHES of `flags`"),
            ("`labelled_only`", "PACE_LOSS_LABELLED_ONLY of `flags`"),
        ];
        let rename = |message: String, &(rust, c): &(&str, &str)| message.replace(rust, c);
        Self::new(status, NAMES.iter().fold(error.to_string(), rename))
    }
}

type Result<T, E = Failure> = std::result::Result<T, E>;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of an exported function: its error is kept for [`pace_last_error`], and a panic becomes one.
fn run(body: impl FnOnce() -> Result<()>) -> PaceStatus {
    // What a panic leaves behind is the caller's output memory only, whose contents are then unspecified.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Failure::new(
            PACE_ERROR_INTERNAL,
            format!("this is a fault of pace-kernels, please report it: {text}"),
        ))
    });
    let Err(Failure { status, message }) = result else { return PACE_OK };
    // A message holds no NUL: it is made of names and numbers.
    let message = CString::new(message.replace('\0', "?")).unwrap_or_default();
    // No error is kept while the thread's storage is being destroyed.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    status
}

/// What was wrong with the last call on this thread that did not give `PACE_OK`; empty if there was none. The text is valid until
/// the next such call on the same thread, or its end.
#[unsafe(no_mangle)]
pub extern "C" fn pace_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The constant's name of a status, for messages; `"unknown"` for any other number.
#[unsafe(no_mangle)]
pub extern "C" fn pace_status_name(status: PaceStatus) -> *const c_char {
    let name: &CStr = match status {
        PACE_OK => c"PACE_OK",
        PACE_ERROR_ARGUMENT => c"PACE_ERROR_ARGUMENT",
        PACE_ERROR_LENGTH => c"PACE_ERROR_LENGTH",
        PACE_ERROR_SIZE => c"PACE_ERROR_SIZE",
        PACE_ERROR_VALUE => c"PACE_ERROR_VALUE",
        PACE_ERROR_LABEL => c"PACE_ERROR_LABEL",
        PACE_ERROR_INDEX => c"PACE_ERROR_INDEX",
        PACE_ERROR_DTYPE => c"PACE_ERROR_DTYPE",
        PACE_ERROR_VERSION => c"PACE_ERROR_VERSION",
        PACE_ERROR_FORKED => c"PACE_ERROR_FORKED",
        PACE_ERROR_NO_DRIVER => c"PACE_ERROR_NO_DRIVER",
        PACE_ERROR_NO_DEVICE => c"PACE_ERROR_NO_DEVICE",
        PACE_ERROR_DEVICE_TOO_OLD => c"PACE_ERROR_DEVICE_TOO_OLD",
        PACE_ERROR_KERNELS_NOT_BUILT => c"PACE_ERROR_KERNELS_NOT_BUILT",
        PACE_ERROR_DRIVER => c"PACE_ERROR_DRIVER",
        PACE_ERROR_INTERNAL => c"PACE_ERROR_INTERNAL",
        _ => c"unknown",
    };
    name.as_ptr()
}

/// The library's `PACE_ABI_VERSION`. Compare it with that of the header.
#[unsafe(no_mangle)]
pub extern "C" fn pace_abi_version() -> u32 {
    PACE_ABI_VERSION
}

/// The library's version, for example `"0.1.0"`.
#[unsafe(no_mangle)]
pub extern "C" fn pace_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Sets how many threads the CPU operators use, instead of one for each core (or `RAYON_NUM_THREADS`). The calling thread is one of
/// them, if there are several: call this on the thread that will call the operators. Only before the first operator has run:
/// later it is a `PACE_ERROR_VALUE`. A process that is forked after that has no such threads, and its operators
/// are a `PACE_ERROR_FORKED`: start processes before, or afresh.
#[unsafe(no_mangle)]
pub extern "C" fn pace_set_threads(threads: u64) -> PaceStatus {
    run(|| {
        let count = usize::try_from(threads).ok().filter(|count| (1..=1 << 12).contains(count));
        let count = count.ok_or_else(|| {
            Failure::new(PACE_ERROR_VALUE, format!("`threads` is {threads}, expected 1 to 4096"))
        })?;
        process::check_threads()?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count);
        // The caller works instead of waking another and waiting. If it were the only one, calls from elsewhere would hang.
        let built = if count > 1 { pool.use_current_thread().build_global() } else { pool.build_global() };
        built
            .map_err(|error| Failure::new(PACE_ERROR_VALUE, format!("the threads could not be set: {error}")))
    })
}

/// `sgemm` of a BLAS as Fortran declares it, with 32-bit integers.
pub type PaceSgemm = Option<
    unsafe extern "C" fn(
        transa: *const c_char,
        transb: *const c_char,
        m: *const i32,
        n: *const i32,
        k: *const i32,
        alpha: *const f32,
        a: *const f32,
        lda: *const i32,
        b: *const f32,
        ldb: *const i32,
        beta: *const f32,
        c: *mut f32,
        ldc: *const i32,
    ),
>;

/// `dgemm` of the same BLAS.
pub type PaceDgemm = Option<
    unsafe extern "C" fn(
        transa: *const c_char,
        transb: *const c_char,
        m: *const i32,
        n: *const i32,
        k: *const i32,
        alpha: *const f64,
        a: *const f64,
        lda: *const i32,
        b: *const f64,
        ldb: *const i32,
        beta: *const f64,
        c: *mut f64,
        ldc: *const i32,
    ),
>;

/// `MKL_Set_Num_Threads_Local`: sets how many threads GEMMs on the calling thread use, and gives the number before.
pub type PaceSetNumThreads = Option<unsafe extern "C" fn(threads: i32) -> i32>;

/// Registers a BLAS for the CPU operators' large GEMMs, once and until the process ends; otherwise they use the library's own.
/// It is called from many threads at a time, and each GEMM is to run on the calling thread alone:
/// `set_num_threads_local` is for a BLAS that has threads of its own, and may be NULL.
///
/// # Safety
/// The functions are what their names say, and stay.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_set_blas(
    sgemm: PaceSgemm,
    dgemm: PaceDgemm,
    set_num_threads_local: PaceSetNumThreads,
) -> PaceStatus {
    run(|| {
        let sgemm = sgemm.ok_or_else(|| Failure::argument("sgemm", "is a null pointer"))?;
        let dgemm = dgemm.ok_or_else(|| Failure::argument("dgemm", "is a null pointer"))?;
        // SAFETY: the caller's promise.
        Ok(unsafe { crate::cpu::set_blas(crate::cpu::Blas { sgemm, dgemm, set_num_threads_local }) }?)
    })
}

/// `GOMP_parallel`: calls `work(data)` on the calling thread and on others of its team, `threads` in all or fewer, and returns when
/// all have returned.
pub type PaceOpenMp = Option<
    unsafe extern "C" fn(
        work: unsafe extern "C" fn(data: *mut c_void),
        data: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    ),
>;

/// Runs the CPU operators on the threads of an OpenMP runtime, once and until the process ends; otherwise they have threads of their
/// own. For a program whose own loops run there: threads of OpenMP wait for the next loop without sleeping, for milliseconds, and
/// others would share cores with them. `pace_set_threads` still says how many there are.
///
/// # Safety
/// The function is `GOMP_parallel` of libgomp, of LLVM's or of Intel's OpenMP, or does the same, and stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_set_openmp(parallel: PaceOpenMp) -> PaceStatus {
    run(|| {
        let parallel = parallel.ok_or_else(|| Failure::argument("parallel", "is a null pointer"))?;
        // SAFETY: the caller's promise.
        Ok(unsafe { crate::cpu::set_openmp(parallel) }?)
    })
}
