//! Handles of CUDA devices.

use super::{Failure, PaceStatus, Result, run};
use crate::cuda::cudarc::driver::sys::CUstream;
use crate::cuda::{Device, Gpu, Plan, keeping_context, probe_driver};
use std::ffi::c_void;

/// Something that carries out plans: a device, or in tests a simulator.
pub trait Launcher: Send + Sync {
    /// What plans for it are made from.
    fn gpu(&self) -> &Gpu;

    /// Launches everything in the plan on a `CUstream`.
    ///
    /// # Errors
    /// If a launch fails.
    ///
    /// # Safety
    /// As [`Device::launch`]; the stream must be NULL or a live stream of the launcher's context.
    unsafe fn launch(&self, plan: &Plan, stream: *mut c_void) -> crate::Result<()>;
}

impl Launcher for Device {
    fn gpu(&self) -> &Gpu {
        self.gpu()
    }

    unsafe fn launch(&self, plan: &Plan, stream: *mut c_void) -> crate::Result<()> {
        // The CUDA runtime takes the current context for the current device: a caller with several would notice.
        // SAFETY: the caller's promise is this function's.
        keeping_context(|| unsafe { self.launch_on(plan, stream as CUstream) })
    }
}

/// An open CUDA device. It may be used from any thread, and by many at a time.
pub struct PaceDevice {
    launcher: Box<dyn Launcher>,
}

impl std::fmt::Debug for PaceDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PaceDevice")
    }
}

impl PaceDevice {
    /// A device of the C interface that launches through something else than the CUDA driver.
    pub fn new(launcher: impl Launcher + 'static) -> Self {
        Self { launcher: Box::new(launcher) }
    }

    pub(super) fn gpu(&self) -> &Gpu {
        self.launcher.gpu()
    }

    /// # Safety
    /// As [`Launcher::launch`].
    pub(super) unsafe fn launch(&self, plan: &Plan, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise is this function's.
        Ok(unsafe { self.launcher.launch(plan, stream) }?)
    }
}

/// Opens device number `ordinal` (from 0) through its primary context and loads the kernels, which takes a moment and is not
/// allowed while a stream is being captured. Later calls for the same device are quick. `*device` is closed with
/// `pace_device_close`; it is NULL after an error.
///
/// # Safety
/// `device` is NULL (an error) or points to a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_device_open(ordinal: u32, device: *mut *mut PaceDevice) -> PaceStatus {
    run(|| {
        if device.is_null() || !device.is_aligned() {
            return Err(Failure::argument("device", "is a null or misaligned pointer"));
        }
        // SAFETY: the caller's promise, checked for what can be checked.
        unsafe { device.write(std::ptr::null_mut()) };
        // `keeping_context` needs a driver.
        probe_driver()?;
        let opened = PaceDevice::new(keeping_context(|| Device::open(ordinal as usize))?);
        // SAFETY: as above.
        unsafe { device.write(Box::into_raw(Box::new(opened))) };
        Ok(())
    })
}

/// Frees the handle of a device; NULL is fine. Work that was launched goes on. Kernels and primary context stay until the process
/// ends: do not reset the device (`cudaDeviceReset`) and open it again.
///
/// # Safety
/// `device` came from `pace_device_open`, is not in use by any thread, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_device_close(device: *mut PaceDevice) {
    run(|| {
        if !device.is_null() {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(device) });
        }
        Ok(())
    });
}
