//! The device, its buffers, and how a case is timed.

use crate::{Case, Fallible, Launch, common};
use half::bf16;
use pace_kernels::cuda::cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use pace_kernels::cuda::cudarc::driver::{
    CudaEvent, CudaGraph, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits,
};
use pace_kernels::cuda::{Device, Element};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

/// Device 0, and a stream for all work.
pub struct Gpu {
    pub device: Device,
    pub stream: Arc<CudaStream>,
    pub l2_bytes: usize,
    allocated: Cell<usize>,
    f32s: CudaSlice<f32>,
    bf16s: CudaSlice<bf16>,
}

/// Elements of the largest buffer that is filled with values: `y` of the widest layer.
const MOST_VALUES: usize = 2 * 64 * 197 * 3072;

/// Types of the tensors that are measured.
pub trait Value: Element + DeviceRepr + ValidAsZeroBits {
    const NAME: &'static str;
    /// [`MOST_VALUES`] numbers on the device, to copy from, again and again for longer tensors.
    fn values(gpu: &Gpu) -> &CudaSlice<Self>
    where
        Self: Sized;
}

impl Value for f32 {
    const NAME: &'static str = "f32";
    fn values(gpu: &Gpu) -> &CudaSlice<Self> {
        &gpu.f32s
    }
}

impl Value for bf16 {
    const NAME: &'static str = "bf16";
    fn values(gpu: &Gpu) -> &CudaSlice<Self> {
        &gpu.bf16s
    }
}

impl Gpu {
    pub fn new(device: Device) -> Fallible<Self> {
        let context = device.context();
        // SAFETY: everything runs on one stream, so there is nothing to track; a graph could not be captured with tracking
        // on.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let l2 = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let values = common::values(MOST_VALUES);
        let f32s = stream.clone_htod(&values)?;
        let rounded: Vec<_> = values.into_iter().map(bf16::from_f32).collect();
        let bf16s = stream.clone_htod(&rounded)?;
        Ok(Self { device, stream, l2_bytes: usize::try_from(l2)?, allocated: Cell::new(0), f32s, bf16s })
    }

    /// Name and what matters for the figures.
    pub fn describe(&self) -> Fallible<String> {
        let context = self.device.context();
        let (major, minor) = context.compute_capability()?;
        Ok(format!("{}, sm_{major}{minor}, {} MiB of L2", context.name()?, self.l2_bytes >> 20))
    }

    /// `len` numbers in ±½: what a GEMM takes depends on how many bits flip, so zeros would flatter it.
    pub fn values<T: Value>(&self, len: usize) -> Fallible<CudaSlice<T>> {
        self.count::<T>(len);
        let mut values = self.stream.alloc_zeros(len)?;
        for start in (0..len).step_by(MOST_VALUES) {
            let end = len.min(start + MOST_VALUES);
            self.stream
                .memcpy_dtod(&T::values(self).slice(..end - start), &mut values.slice_mut(start..end))?;
        }
        Ok(values)
    }

    /// `len` zeros, for outputs.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Fallible<CudaSlice<T>> {
        self.count::<T>(len);
        Ok(self.stream.alloc_zeros(len)?)
    }

    /// A copy of numbers from the host.
    pub fn upload(&self, values: &[i64]) -> Fallible<CudaSlice<i64>> {
        self.count::<i64>(values.len());
        Ok(self.stream.clone_htod(values)?)
    }

    fn count<T>(&self, len: usize) {
        self.allocated.set(self.allocated.get() + len * size_of::<T>());
    }
}

/// Launches in a batch, at least: the start of a graph costs some microseconds.
const MIN_LAUNCHES: usize = 16;
/// Operations of a launch next to which that is nothing.
const LONG: usize = 1 << 40;

/// Many launches as one graph, so that the host's work is not measured. They take turns on sets of buffers of three times
/// the L2 cache in all: a set is no longer in the cache when it comes up again.
pub struct Batch {
    graph: CudaGraph,
    launches: u64,
    start: CudaEvent,
    end: CudaEvent,
    /// They own the buffers that the graph works on.
    _sets: Vec<Launch>,
}

impl Batch {
    pub fn new(gpu: &Gpu, case: &Case) -> Fallible<Self> {
        let before = gpu.allocated.get();
        let mut sets = vec![(case.set)(gpu)?];
        let bytes = gpu.allocated.get() - before;
        let count = (3 * gpu.l2_bytes).div_ceil(bytes).max(2);
        while sets.len() < count {
            sets.push((case.set)(gpu)?);
        }
        // Before anything is captured, libraries load what they need.
        for launch in &mut sets {
            launch(gpu)?;
        }
        gpu.stream.synchronize()?;

        let least = if case.flop > LONG { 1 } else { MIN_LAUNCHES };
        let launches = least.next_multiple_of(count);
        // Relaxed: no other thread is at work, and a library may ask the driver things in between.
        gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        for i in 0..launches {
            sets[i % count](gpu)?;
        }
        let graph = gpu.stream.end_capture(CUgraphInstantiate_flags(0))?.ok_or("nothing was captured")?;
        // Without flags, cudarc's events do not know the time.
        let event = || gpu.device.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self { graph, launches: launches as u64, start: event()?, end: event()?, _sets: sets })
    }

    /// What `iterations` launches take, extrapolated from whole batches.
    pub fn time(&self, gpu: &Gpu, iterations: u64) -> Fallible<Duration> {
        let replays = iterations.div_ceil(self.launches);
        // Keeps the device busy until the host has queued what is timed.
        self.graph.launch()?;
        self.start.record(&gpu.stream)?;
        for _ in 0..replays {
            self.graph.launch()?;
        }
        self.end.record(&gpu.stream)?;
        let seconds = f64::from(self.start.elapsed_ms(&self.end)?) / 1e3;
        Ok(Duration::from_secs_f64(seconds * iterations as f64 / (replays * self.launches) as f64))
    }
}
