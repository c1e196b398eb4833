//! `cudarc`'s tensors as buffers of a plan, and the guards that keep them in use until after the launch.

use super::buffer::Buffer;
use super::device::Device;
use super::noise_source::Source;
use crate::cpu::Base;
use crate::error::Result;
use crate::noise;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

/// Where a layer's `z` comes from, as tensors in device memory: a given `z` is of `f32`.
pub type Noise<'a> = noise::Noise<&'a dyn DevicePtr<f32>, &'a dyn DevicePtr<u64>>;

/// Tensors that are in use until this is dropped, after the launch.
pub(super) struct Borrows<'a> {
    device: &'a Device,
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Borrows<'a> {
    /// For work on `stream`.
    pub(super) fn new(device: &'a Device, stream: &'a CudaStream) -> Self {
        Self { device, stream, guards: Vec::new() }
    }

    /// A tensor to read.
    pub(super) fn input<T>(
        &mut self,
        argument: &'static str,
        tensor: &'a dyn DevicePtr<T>,
    ) -> Result<Buffer> {
        self.device.check_streams(argument, tensor.stream(), self.stream)?;
        let len = tensor.len();
        let (address, guard) = tensor.device_ptr(self.stream);
        self.guards.push(guard);
        Ok(Buffer { address, len })
    }

    pub(super) fn optional<T>(
        &mut self,
        argument: &'static str,
        tensor: Option<&'a dyn DevicePtr<T>>,
    ) -> Result<Option<Buffer>> {
        tensor.map(|tensor| self.input(argument, tensor)).transpose()
    }

    pub(super) fn base<T>(
        &mut self,
        base: Option<Base<&'a dyn DevicePtr<T>>>,
    ) -> Result<Option<Base<Buffer>>> {
        let Some(base) = base else { return Ok(None) };
        let weight = self.input("base.weight", base.weight)?;
        Ok(Some(Base { weight, bias: self.optional("base.bias", base.bias)? }))
    }

    /// A tensor to write.
    pub(super) fn output<T>(
        &mut self,
        argument: &'static str,
        tensor: &'a mut dyn DevicePtrMut<T>,
    ) -> Result<Buffer> {
        self.device.check_streams(argument, tensor.stream(), self.stream)?;
        let len = tensor.len();
        let (address, guard) = tensor.device_ptr_mut(self.stream);
        self.guards.push(guard);
        Ok(Buffer { address, len })
    }

    pub(super) fn optional_output<T>(
        &mut self,
        argument: &'static str,
        tensor: Option<&'a mut dyn DevicePtrMut<T>>,
    ) -> Result<Option<Buffer>> {
        tensor.map(|tensor| self.output(argument, tensor)).transpose()
    }

    pub(super) fn noise(&mut self, noise: &Noise<'a>) -> Result<Source> {
        use noise::Noise;
        Ok(match *noise {
            Noise::Off => Noise::Off,
            Noise::Generated(generator) => Noise::Generated(generator),
            Noise::Keyed { generator, key } => Noise::Keyed { generator, key: self.input("key", key)? },
            Noise::Given { z, shape } => Noise::Given { z: self.input("z", z)?, shape },
        })
    }
}
