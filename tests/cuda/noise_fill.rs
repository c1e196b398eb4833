//! `z` written out, against `noise::Generator::fill`, bit for bit.

use crate::device::Opened;
use crate::machine::Target;
use crate::output_shape;
use pace_kernels::LinearShape;
use pace_kernels::cuda::cudarc::driver::DevicePtrMut;
use pace_kernels::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pace_kernels::cuda::{BorrowedTensor, NoiseFill};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, NoiseShape};

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    generator: Generator,
    /// Elements past an aligned address at which `z` starts.
    shift: usize,
}

/// Every channel count around the group of four and the block of 32 groups, and rows around the block's.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [
        (1, 1, 1, 1),
        (1, 1, 1, 4),
        (2, 1, 3, 2),
        (2, 3, 5, 3),
        (1, 2, 7, 5),
        (2, 2, 2, 7),
        (2, 5, 3, 8),
        (2, 3, 65, 9),
        (2, 4, 17, 12),
        (1, 3, 9, 127),
        (2, 2, 5, 128),
        (2, 9, 3, 129),
        (2, 1, 197, 36),
    ];
    for (branches, batch, tokens, channels) in sizes {
        for (noise, first_sample, shift) in [
            (PerSample, 0, 0),
            (PerSample, (1 << 32) - 2, 1),
            (PerToken, (1 << 56) - 9, 0),
            (PerToken, 12345, 3),
            (PerToken, 0, 2),
        ] {
            let shape = output_shape(branches, batch, tokens, channels);
            cases.push(Case {
                shape,
                generator: generator(noise, Key::derive(7, 3, 2), first_sample),
                shift,
            });
        }
    }
    cases
}

fn generator(shape: NoiseShape, key: Key, first_sample: u64) -> Generator {
    Generator::new(key, 0.37, shape, first_sample).unwrap()
}

impl Case {
    fn len(&self) -> usize {
        let rows = match self.generator.shape() {
            PerSample => self.shape.samples(),
            PerToken => self.shape.out_rows(),
        };
        rows * self.shape.out_features
    }

    fn want(&self) -> Vec<u32> {
        let mut z = vec![0f32; self.len()];
        let tokens = if self.generator.shape() == PerSample { 1 } else { self.shape.tokens };
        for (row, z) in z.chunks_mut(self.shape.out_features).enumerate() {
            let (sample, token) = (row / tokens, row % tokens);
            let (branch, sample) = (sample / self.shape.batch, sample % self.shape.batch);
            self.generator.fill(branch as u8, sample as u64, token as u32, 0, z);
        }
        z.into_iter().map(f32::to_bits).collect()
    }
}

pub fn test(target: &Target<'_>) {
    for case in cases() {
        let want = case.want();
        // A grid of one row of blocks strides over all rows.
        for one_row in [false, true] {
            target.run(case.shift, |machine| {
                let z = machine.output::<f32>("z", case.len());
                let Case { shape, generator, .. } = case;
                let mut plan = NoiseFill { shape, generator, key: None, z }.plan().unwrap();
                if one_row {
                    plan.launches_mut().for_each(|launch| launch.grid[1] = 1);
                }
                machine.launch(&plan);
                assert!(machine.read::<u32>(z) == want, "{case:?}");
            });
        }
    }
}

/// The key of each replay comes from memory; that of the generator plays no part.
pub fn key_in_memory(target: &Target<'_>) {
    let case = cases()[10];
    let Case { shape, generator, .. } = case;
    target.run(case.shift, |machine| {
        let key = machine.in_out("key", &[0u64]);
        let z = machine.output::<f32>("z", case.len());
        let launch = NoiseFill { shape, generator, key: Some(key), z }.plan().unwrap();
        for fresh in [Key::derive(1, 0, 0), Key::derive(1, 1, 0)] {
            machine.write(key, &[u64::from(fresh)]);
            machine.launch(&launch);
            let generator = self::generator(generator.shape(), fresh, generator.first_sample());
            assert!(machine.read::<u32>(z) == Case { generator, ..case }.want());
        }
    });
}

/// The safe method.
pub fn safe_method(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in cases() {
        let mut z = opened.upload(case.shift, &vec![f32::NAN; case.len()]);
        device.noise_fill(case.shape, case.generator, None, &mut z.slice_mut(case.shift..), stream).unwrap();
        let z: Vec<u32> = opened.download(case.shift, &z).into_iter().map(f32::to_bits).collect();
        assert!(z == case.want(), "{case:?}");
    }
}

/// A captured fill gives the noise of the key that lies in memory when it is replayed.
pub fn in_a_graph(opened: &Opened) {
    let Opened { device, stream } = opened;
    let Case { shape, generator, .. } = cases()[10];
    let case = Case { shape, generator, shift: 0 };
    let mut key = opened.upload(0, &[0u64]);
    let mut z = opened.upload(0, &vec![f32::NAN; case.len()]);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    device.noise_fill(shape, generator, Some(&key), &mut z, stream).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
    for fresh in [Key::derive(1, 0, 0), Key::derive(1, 1, 0)] {
        stream.memcpy_htod(&[u64::from(fresh)], &mut key).unwrap();
        graph.launch().unwrap();
        let got: Vec<u32> = opened.download(0, &z).into_iter().map(f32::to_bits).collect();
        let generator = self::generator(generator.shape(), fresh, generator.first_sample());
        assert!(got == Case { generator, ..case }.want());
    }
}

/// A stream and a tensor of which the crate knows the addresses only.
pub fn foreign_memory(opened: &Opened) {
    let Opened { device, stream } = opened;
    let Case { shape, generator, .. } = cases()[10];
    let case = Case { shape, generator, shift: 0 };
    let mut z = opened.upload(0, &vec![f32::NAN; case.len()]);
    let address = z.device_ptr_mut(stream).0;
    // SAFETY: the stream is of this context and outlives the wrapper, and all work is on it.
    let foreign = unsafe { device.context().wrap_borrowed_stream(stream.cu_stream()) };
    // SAFETY: the memory is that of `z`, which is alive and not used until the work is done.
    let mut borrowed = unsafe { BorrowedTensor::<f32>::new(address, case.len(), &foreign) };
    device.noise_fill(shape, generator, None, &mut borrowed, &foreign).unwrap();
    let got: Vec<u32> = opened.download(0, &z).into_iter().map(f32::to_bits).collect();
    assert!(got == case.want());
}
