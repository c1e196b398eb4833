//! Device memory of other libraries.

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop, sys};
use std::marker::PhantomData;
use std::sync::Arc;

/// A tensor that something else owns (PyTorch, a C program), for the operators of [`Device`](super::Device) and `cudarc`'s.
///
/// It is never freed here, and nothing is synchronised: order the work on it with that of its owner, as on one stream. A
/// stream of the owner's comes in by [`CudaContext::wrap_borrowed_stream`](cudarc::driver::CudaContext::wrap_borrowed_stream)
/// of [`Device::context`](super::Device::context).
#[derive(Debug)]
pub struct BorrowedTensor<T> {
    address: sys::CUdeviceptr,
    len: usize,
    stream: Arc<CudaStream>,
    element: PhantomData<T>,
}

impl<T> BorrowedTensor<T> {
    /// The `len` elements from `address` on, used on `stream`.
    ///
    /// # Safety
    /// They must be memory of the stream's context, hold values of `T` (or be written before they are read), and stay so until
    /// all work that this tensor was passed to has run. While it exists, nothing else may touch the memory in conflict with
    /// that work.
    pub unsafe fn new(address: u64, len: usize, stream: &Arc<CudaStream>) -> Self {
        Self { address, len, stream: stream.clone(), element: PhantomData }
    }
}

impl<T> DeviceSlice<T> for BorrowedTensor<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T> DevicePtr<T> for BorrowedTensor<T> {
    fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

impl<T> DevicePtrMut<T> for BorrowedTensor<T> {
    fn device_ptr_mut<'a>(&'a mut self, _: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}
