//! Plans as plain values: what they launch and multiply, and which wrong arguments they refuse with which error. Nothing here needs a
//! device or compiled kernels.

mod cublaslt;
mod cublaslt_steps;
mod drop_path;
mod fuzz;
mod gpu;
mod layers;
mod lm_head;
mod loss;
mod noise;
mod norms;
mod select;
mod sm90;
mod support;
mod symbolic;
mod weights;

use pace_kernels::Error;
use pace_kernels::cuda::Device;

#[test]
fn opening_a_device_gives_one_or_a_typed_error() {
    for ordinal in [0, 1 << 20, usize::MAX] {
        match Device::open(ordinal) {
            Ok(device) => assert_eq!(device.context().ordinal(), ordinal),
            Err(Error::NoDevice { ordinal: named, count }) => assert!(named == ordinal && count <= ordinal),
            Err(
                error @ (Error::NoDriver(_) | Error::KernelsNotBuilt { .. } | Error::DeviceTooOld { .. }),
            ) => {
                assert!(!error.to_string().is_empty());
            }
            Err(error) => panic!("{error}"),
        }
    }
}
