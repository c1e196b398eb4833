//! Device 0, if there is one.

use crate::machine::Target;
use pace_kernels::Error;
use pace_kernels::cuda::Device;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use std::sync::Arc;

/// A device, and a stream for the test's work.
pub struct Opened {
    pub device: Device,
    pub stream: Arc<CudaStream>,
}

/// Opens device 0, or says why there is none. A device that is there and fails is no reason to skip a test.
pub fn open() -> Result<Opened, String> {
    let device = match Device::open(0) {
        Err(error @ (Error::Driver { .. } | Error::OtherDevice { .. })) => panic!("{error}"),
        opened => opened.map_err(|error| error.to_string())?,
    };
    // SAFETY: every test uses one stream for all its work, so there is nothing to track; a graph could not be captured
    // with tracking on.
    unsafe { device.context().disable_event_tracking() };
    let stream = device.context().new_stream().unwrap();
    Ok(Opened { device, stream })
}

impl Opened {
    /// The device, with the families that it chooses.
    pub fn target(&self) -> Target<'_> {
        Target { gpu: *self.device.gpu(), device: Some(self) }
    }

    /// A copy of `values` in device memory, behind `shift` elements of no meaning.
    pub fn upload<T: DeviceRepr + Copy>(&self, shift: usize, values: &[T]) -> CudaSlice<T> {
        let shifted: Vec<T> = values[..1].repeat(shift).iter().chain(values).copied().collect();
        self.stream.clone_htod(&shifted).unwrap()
    }

    /// What lies in device memory, without its first `shift` elements.
    pub fn download<T: DeviceRepr + Copy + Default>(&self, shift: usize, tensor: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(tensor).unwrap()[shift..].to_vec()
    }
}
