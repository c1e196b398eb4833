//! Devices: opening one, and launching plans on it.

use super::buffer::DType;
use super::cublaslt::{self, CublasLt};
use super::gpu::{Family, Gpu, OLDEST};
use super::kernel::KERNELS;
use super::plan::{Launch, Plan, Step, TensorMap};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError};
use cudarc::driver::{result, sys};
use cudarc::nvrtc::Ptx;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

// `FATBINS` and `WHY_NOT_BUILT`, by build.rs.
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// An NVIDIA device with all kernels loaded.
///
/// It is a handle on the device's primary context, which `cudarc`, candle and PyTorch use as well: streams and tensors of
/// theirs can be passed to its operators.
#[derive(Debug, Clone)]
pub struct Device {
    context: Arc<CudaContext>,
    functions: Arc<HashMap<&'static str, CudaFunction>>,
    /// Or why there is none.
    cublaslt: Arc<std::result::Result<CublasLt, String>>,
    gpu: Gpu,
}

impl Device {
    /// Opens device number `ordinal` (from 0) and loads the kernels, so that no launch has to. Later calls give the same device;
    /// the kernels stay loaded until the process ends.
    ///
    /// The environment variable `PACE_FAMILY`, if it is set, forces a family as [`with_family`](Self::with_family) does, for programs
    /// that open no device themselves: to measure one, also through C and PyTorch.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], [`Error::DeviceTooOld`], [`Error::KernelsNotBuilt`] as their names say;
    /// [`Error::Argument`] or [`Error::NoFamily`] if `PACE_FAMILY` names no family, or one that does not run here; [`Error::Driver`]
    /// for anything else that the driver reports.
    pub fn open(ordinal: usize) -> Result<Self> {
        // Once loaded, kernels stay: a captured graph, or work that is under way, may need them longer than any handle lives.
        static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
        // A panic elsewhere cannot leave the map half changed.
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = opened.get(&ordinal) {
            return Ok(device.clone());
        }
        let device = Self::load(ordinal)?;
        opened.insert(ordinal, device.clone());
        Ok(device)
    }

    fn load(ordinal: usize) -> Result<Self> {
        probe_driver()?;
        let count = match CudaContext::device_count() {
            Ok(count) => count as usize,
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            Err(error) => return Err(driver_error("count the devices", error)),
        };
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(|error| driver_error("open the device", error))?;
        let mut gpu = Self::describe(&context).map_err(|error| driver_error("describe the device", error))?;
        if gpu.capability < OLDEST {
            let (major, minor) = gpu.capability;
            return Err(Error::DeviceTooOld { ordinal, major, minor });
        }
        if FATBINS.is_empty() {
            return Err(Error::KernelsNotBuilt { why: WHY_NOT_BUILT });
        }
        let functions = load_kernels(&context, &gpu)?;
        // The library makes its handle for the current context.
        context.bind_to_thread().map_err(|error| driver_error("make the device current", error))?;
        let cublaslt = cublaslt::probe().and_then(|()| CublasLt::new().map_err(|error| error.to_string()));
        gpu.has_cublaslt = cublaslt.is_ok();
        let device = Self { context, functions: Arc::new(functions), cublaslt: Arc::new(cublaslt), gpu };
        match std::env::var_os("PACE_FAMILY") {
            Some(name) => device.with_family(name.to_string_lossy().parse()?),
            None => Ok(device),
        }
    }

    fn describe(context: &CudaContext) -> std::result::Result<Gpu, DriverError> {
        use sys::CUdevice_attribute as Attribute;
        let attribute = |attribute| context.attribute(attribute).map(i32::unsigned_abs);
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Gpu {
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            max_shared_bytes: shared,
            has_cublaslt: false,
            has_sm90: FATBINS.iter().any(|&(_, only, _)| only == Some((9, 0))),
            family: None,
        })
    }

    /// What plans for this device are made from.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether this device has a cuBLASLt library, or why not; without one, [`select`](super::select()) falls back to kernels of this
    /// crate.
    ///
    /// # Errors
    /// What the loader or the library says.
    pub fn cublaslt(&self) -> std::result::Result<(), &str> {
        match &*self.cublaslt {
            Ok(_) => Ok(()),
            Err(why) => Err(why),
        }
    }

    /// The same device with each linear layer computed by this family, if it takes the layer's sizes.
    ///
    /// # Errors
    /// [`Error::NoFamily`] if the family does not run here.
    pub fn with_family(&self, family: Family) -> Result<Self> {
        if !family.is_available(&self.gpu) {
            let why = match (family, self.cublaslt()) {
                (Family::CublasLt, Err(why)) => why.to_owned(),
                _ => format!("its compute capability is {}.{}", self.gpu.capability.0, self.gpu.capability.1),
            };
            return Err(Error::NoFamily { family: family.name(), ordinal: self.context.ordinal(), why });
        }
        Ok(Self { gpu: self.gpu.with_family(family), ..self.clone() })
    }

    /// The device's primary context; streams and tensors are made from it.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Carries out a plan on `stream` without waiting for it.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the stream is not of this device's primary context; [`Error::Driver`] if a kernel cannot be
    /// launched, [`Error::KernelsNotBuilt`] if it is not there for this device; [`Error::Library`] if cuBLASLt is missing or
    /// refuses a GEMM.
    ///
    /// # Safety
    /// Every buffer that the plan was made from must be device memory of this context with at least the stated number of
    /// elements, initialised unless it is an output, and must stay so and not be touched in conflict until the launch has
    /// run. The plan must be unchanged since an operator made it.
    pub unsafe fn launch(&self, plan: &Plan, stream: &CudaStream) -> Result<()> {
        self.check_context("stream", stream.context())?;
        // SAFETY: the caller's promise; the stream is one of this context.
        unsafe { self.launch_on(plan, stream.cu_stream()) }
    }

    /// [`launch`](Self::launch) on a stream as the driver knows it.
    ///
    /// # Safety
    /// As [`launch`](Self::launch); also, the stream must be the default one (null) or alive and of this context.
    pub(crate) unsafe fn launch_on(&self, plan: &Plan, stream: sys::CUstream) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| driver_error("make the device current", error))?;
        plan.steps().iter().try_for_each(|step| match step {
            // SAFETY: the caller's promise.
            Step::Launch(launch) => unsafe { self.launch_kernel(launch, stream) },
            Step::Gemm(gemm) => match &*self.cublaslt {
                // SAFETY: the caller's promise; this device's context is current.
                Ok(library) => unsafe { library.run(gemm, stream) },
                Err(why) => Err(Error::Library { action: "be loaded", status: why.clone() }),
            },
        })
    }

    /// # Safety
    /// As [`launch_on`](Self::launch_on) for a plan of this step.
    unsafe fn launch_kernel(&self, launch: &Launch, stream: sys::CUstream) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, ref params, .. } = *launch;
        let function =
            self.functions.get(kernel.name).ok_or(Error::KernelsNotBuilt { why: WHY_NOT_BUILT })?;
        let [grid, block] = [grid, block].map(|[x, y, z]| (x, y, z));
        let mut encoded;
        let mut bytes = params.bytes();
        if !params.maps().is_empty() {
            encoded = bytes.to_vec();
            for (offset, map) in params.maps() {
                encoded[*offset..][..size_of::<sys::CUtensorMap>()].copy_from_slice(&encode(map)?);
            }
            bytes = &encoded;
        }
        // The driver copies the parameters before it returns; it only reads through this pointer.
        let mut arguments = [bytes.as_ptr().cast_mut().cast()];
        // SAFETY: the function is a kernel of this context, whose only argument is the struct with these bytes: both sides have it
        // from one definition. The rest is the caller's promise.
        let launched = unsafe {
            result::launch_kernel(function.cu_function(), grid, block, shared_bytes, stream, &mut arguments)
        };
        launched.map_err(|error| driver_error("launch a kernel", error))
    }

    /// Checks that `stream` can work on a tensor of the stream `own`.
    pub(super) fn check_streams(
        &self,
        argument: &'static str,
        own: &CudaStream,
        stream: &CudaStream,
    ) -> Result<()> {
        // Before cudarc records anything on them.
        self.check_context("stream", stream.context())?;
        self.check_context(argument, own.context())?;
        // cudarc lets streams wait for each other if one context object has made them all, and frees memory by the same account.
        if !Arc::ptr_eq(own.context(), stream.context()) && own.cu_stream() != stream.cu_stream() {
            return Err(Error::Argument {
                argument,
                problem: "is of another `CudaContext` object than the stream, so nothing would order their work",
            });
        }
        Ok(())
    }

    fn check_context(&self, argument: &'static str, context: &CudaContext) -> Result<()> {
        if *context == *self.context {
            return Ok(());
        }
        Err(Error::OtherDevice { argument, expected: self.context.ordinal(), got: context.ordinal() })
    }
}

/// Loads every kernel that the device can run.
fn load_kernels(context: &Arc<CudaContext>, gpu: &Gpu) -> Result<HashMap<&'static str, CudaFunction>> {
    let mut functions = HashMap::new();
    for &(file, only, image) in FATBINS {
        if only.is_some_and(|capability| capability != gpu.capability) {
            continue;
        }
        let module = context
            .load_module(Ptx::from_binary(image.to_vec()))
            .map_err(|error| driver_error("load the kernels", error))?;
        for kernel in KERNELS.iter().filter(|kernel| kernel.file == file) {
            let function = module
                .load_function(kernel.name)
                .map_err(|error| driver_error("find a kernel that was just loaded", error))?;
            allow_all_shared_memory(&function, gpu)
                .map_err(|error| driver_error("raise the limit of shared memory", error))?;
            functions.insert(kernel.name, function);
        }
    }
    Ok(functions)
}

/// Lets launches of a kernel ask for all shared memory of a block that the kernel does not have already.
fn allow_all_shared_memory(function: &CudaFunction, gpu: &Gpu) -> std::result::Result<(), DriverError> {
    use sys::CUfunction_attribute as Attribute;
    let its_own = function.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
    let rest = gpu.max_shared_bytes as i32 - its_own;
    function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, rest)
}

/// The driver's form of a tensor map.
fn encode(map: &TensorMap) -> Result<[u8; size_of::<sys::CUtensorMap>()]> {
    use sys::CUtensorMapSwizzle_enum as Swizzle;
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    let kind = match map.dtype {
        DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match map.swizzle {
        32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let element_strides = [1u32; 5];
    // SAFETY: every pointer is to as many values as the rank says, or more; the driver checks what they are.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            kind,
            map.rank,
            map.address as *mut std::ffi::c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.box_dims.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map_err(|error| driver_error("encode a tensor map", error))?;
    let mut bytes = [0; size_of::<sys::CUtensorMap>()];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(encoded.opaque) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(bytes)
}

/// Runs something that makes a context current on this thread, and makes the one current again that was before.
///
/// There must be a driver.
#[cfg(feature = "capi")]
pub(crate) fn keeping_context<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    // An error here is a driver that nothing has initialised yet: no context is current.
    let before = result::ctx::get_current().ok().flatten().unwrap_or(std::ptr::null_mut());
    let done = body();
    // SAFETY: null, or the context that was current a moment ago.
    let restored = unsafe { result::ctx::set_current(before) };
    // The body's error tells more than one that comes of it.
    let done = done?;
    restored.map_err(|error| driver_error("restore the current context", error))?;
    Ok(done)
}

/// Whether there is a driver with all functions that are called here: `cudarc` panics where there is none.
pub(crate) fn probe_driver() -> Result<()> {
    const LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    const FUNCTIONS: [&str; 17] = [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuCtxGetCurrent",
        "cuCtxSetCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuModuleUnload",
        "cuFuncGetAttribute",
        "cuFuncSetAttribute",
        "cuLaunchKernel",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuTensorMapEncodeTiled",
    ];
    let mut problem = String::new();
    for &name in LIBRARIES {
        // SAFETY: the driver's initialisers have no requirements; this is how every CUDA program loads it.
        match unsafe { libloading::Library::new(name) } {
            Ok(library) => {
                for function in FUNCTIONS {
                    // SAFETY: the symbol is only looked up, never called or read.
                    unsafe { library.get::<*const ()>(function) }
                        .map_err(|_| Error::NoDriver(format!("{name} has no function {function}")))?;
                }
                return Ok(());
            }
            // The message is in what caused it.
            Err(error) if problem.is_empty() => {
                problem =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            }
            Err(_) => {}
        }
    }
    Err(Error::NoDriver(problem))
}

fn driver_error(action: &'static str, DriverError(status): DriverError) -> Error {
    Error::Driver { action, status: format!("{status:?}") }
}
