//! NVIDIA's cuBLASLt, loaded at run time: carries out the [`Gemm`] steps of plans.

use super::buffer::{Address, DType};
use super::gemm::Gemm;
use crate::error::{Error, Result};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// A handle of the library for one device, and what it chose for each kind of GEMM. Like the device, it stays until the process ends.
#[derive(Debug)]
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    prepared: Mutex<HashMap<Key, Prepared>>,
}

// SAFETY: the library allows one handle to be used by any thread and by many at a time.
unsafe impl Send for CublasLt {}
// SAFETY: as above; what is kept beside it is behind a lock.
unsafe impl Sync for CublasLt {}

/// Kinds of GEMMs that are kept, at most: for callers whose batch size never stays the same.
const MOST_PREPARED: usize = 1024;

/// Everything that the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dtype: DType,
    output: DType,
    allow_tf32: bool,
    sizes: [usize; 3],
    transposed: [bool; 2],
    has_bias: bool,
    accumulates: bool,
    /// Powers of two that the addresses of A, B and D are multiples of, at most 256.
    alignments: [u32; 3],
    workspace_bytes: usize,
}

impl Key {
    fn of(gemm: &Gemm) -> Self {
        let alignment = |address: Address| 1 << address.0.trailing_zeros().min(8);
        Self {
            dtype: gemm.dtype,
            output: gemm.output,
            allow_tf32: gemm.allow_tf32,
            sizes: [gemm.m, gemm.n, gemm.k],
            transposed: [gemm.a.is_transposed, gemm.b.is_transposed],
            has_bias: gemm.bias.is_some(),
            accumulates: gemm.beta != 0.0,
            alignments: [gemm.a.address, gemm.b.address, gemm.d].map(alignment),
            workspace_bytes: gemm.workspace.bytes,
        }
    }
}

/// The library's description of a GEMM, and its choice of an algorithm.
#[derive(Debug)]
struct Prepared {
    operation: Operation,
    /// Of its first and second operand and its output.
    layouts: [Layout; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptions are plain memory of the library, not tied to a thread.
unsafe impl Send for Prepared {}

#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by the library and not used again. An error would mean that it was none of the library's.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as for an operation.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as for an operation.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// candle has `cudarc` link the library: without it this program would not have started.
#[cfg(feature = "candle-cuda")]
pub(super) fn probe() -> std::result::Result<(), String> {
    Ok(())
}

/// Whether there is a library with all functions that are called here, or why not: `cudarc` panics where there is none.
#[cfg(not(feature = "candle-cuda"))]
pub(super) fn probe() -> std::result::Result<(), String> {
    const FUNCTIONS: [&str; 11] = [
        "cublasLtCreate",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
    ];
    for name in cudarc::get_lib_name_candidates("cublasLt") {
        // SAFETY: the library's initialisers have no requirements; this is how every CUDA program loads it.
        let Ok(library) = (unsafe { libloading::Library::new(&name) }) else { continue };
        for function in FUNCTIONS {
            // SAFETY: the symbol is only looked up, never called or read.
            if unsafe { library.get::<*const ()>(function) }.is_err() {
                return Err(format!("{name} has no function {function}"));
            }
        }
        return Ok(());
    }
    Err("the loader finds no cuBLASLt library (libcublasLt.so.13 or .12; see LD_LIBRARY_PATH)".into())
}

impl CublasLt {
    /// A handle for the device whose context is current. [`probe`] has found the library.
    pub(super) fn new() -> Result<Self> {
        let handle = result::create_handle().map_err(|error| failure("start", error))?;
        Ok(Self { handle, prepared: Mutex::default() })
    }

    /// Queues a GEMM on a stream.
    ///
    /// # Safety
    /// The context of this handle is current and the stream is one of it; operands and workspace are device memory there with at
    /// least the sizes that the GEMM states, and stay so until it has run.
    pub(super) unsafe fn run(&self, gemm: &Gemm, stream: CUstream) -> Result<()> {
        // A panic elsewhere cannot leave an entry half made.
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Key::of(gemm);
        if prepared.len() >= MOST_PREPARED && !prepared.contains_key(&key) {
            prepared.clear();
        }
        let prepared = match prepared.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.prepare(&key)?),
        };
        if let Some(bias) = gemm.bias {
            prepared
                .operation
                .set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let [first, second, output] = &prepared.layouts;
        // The library is column-major: it computes Dᵀ = Bᵀ·Aᵀ.
        // SAFETY: the descriptions were made for these sizes; the rest is the caller's promise. Scalars are read before the
        // call returns.
        let queued = unsafe {
            result::matmul(
                self.handle,
                prepared.operation.0,
                (&raw const gemm.alpha).cast(),
                (&raw const gemm.beta).cast(),
                gemm.b.address.0 as *const c_void,
                first.0,
                gemm.a.address.0 as *const c_void,
                second.0,
                gemm.d.0 as *const c_void,
                output.0,
                gemm.d.0 as *mut c_void,
                output.0,
                &raw const prepared.algorithm,
                gemm.workspace.address.0 as *mut c_void,
                gemm.workspace.bytes,
                stream.cast(),
            )
        };
        queued.map_err(|error| failure("multiply matrices", error))
    }

    fn prepare(&self, key: &Key) -> Result<Prepared> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let [m, n, k] = key.sizes;
        let compute = match (key.dtype, key.allow_tf32) {
            (DType::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let operation = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
            .map(Operation)
            .map_err(|error| failure("describe a GEMM", error))?;
        // `cublasOperation_t`, which the bindings lack: CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        let transposed = |yes: bool| i32::from(yes);
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed(key.transposed[1]))?;
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &transposed(key.transposed[0]))?;
        if key.has_bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        // A row-major matrix is the transpose of a column-major one with the same leading dimension.
        let layout = |dtype: DType, rows: usize, columns: usize| {
            let kind = match dtype {
                DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
                DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
                DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            };
            let made = result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64);
            made.map(Layout).map_err(|error| failure("describe a matrix", error))
        };
        let operand = |rows, columns, transposed| match transposed {
            true => layout(key.dtype, columns, rows),
            false => layout(key.dtype, rows, columns),
        };
        let [a, b] = key.transposed;
        let layouts = [operand(k, n, b)?, operand(m, k, a)?, layout(key.output, m, n)?];
        let algorithm = self.choose(key, &operation, &layouts)?;
        Ok(Prepared { operation, layouts, algorithm })
    }

    /// The library's first choice of an algorithm.
    fn choose(
        &self,
        key: &Key,
        operation: &Operation,
        [first, second, output]: &[Layout; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        // Sums that are split go on in f32: the others round in between.
        const REDUCTIONS: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let preference = result::create_matmul_pref()
            .map(Preference)
            .map_err(|error| failure("state a preference", error))?;
        let [a, b, d] = key.alignments;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(key.workspace_bytes as u64))?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTIONS)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &d)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &d)?;
        // SAFETY: all descriptions are alive and were made by the library.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                operation.0,
                first.0,
                second.0,
                output.0,
                output.0,
                preference.0,
            )
        };
        Ok(found.map_err(|error| failure("choose an algorithm", error))?.algo)
    }
}

impl Operation {
    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the library copies as many bytes as it is told, which the value has.
        unsafe {
            result::set_matmul_desc_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(|error| failure("describe a GEMM", error))
    }
}

impl Preference {
    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<()> {
        // SAFETY: as for an operation.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(|error| failure("state a preference", error))
    }
}

fn failure(action: &'static str, CublasError(status): CublasError) -> Error {
    Error::Library { action, status: format!("{status:?}") }
}
