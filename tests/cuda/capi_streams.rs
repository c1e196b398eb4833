//! Threads with streams of their own on one handle of a device: each gets what it would get alone.

use crate::capi::{check, zeroed};
use crate::{simulate, uniform};
use pace_kernels::capi::*;
use pace_kernels::cuda::{Gpu, Plan};
use pace_simt::{Memory, Schedule, Tensor};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

const STREAMS: usize = 6;

/// A device in the simulator whose streams do not wait for each other; stream n has the n-th memory.
struct Streams(Arc<Vec<Mutex<Memory>>>);

impl Launcher for Streams {
    fn gpu(&self) -> &Gpu {
        &simulate::GPU
    }

    unsafe fn launch(&self, plan: &Plan, stream: *mut c_void) -> pace_kernels::Result<()> {
        simulate::run(plan, &mut self.0[stream.addr()].lock().unwrap(), Schedule::InOrder);
        Ok(())
    }
}

/// A layer's outputs after steps of both directions on one stream, beside wrong calls.
fn steps(device: &PaceDevice, memory: &Mutex<Memory>, stream: usize) -> Vec<Vec<f32>> {
    let shape =
        PaceShape { branches: 2, batch: 3, tokens: 5, in_features: 7, out_features: 9, shared_input: 1 };
    let (out, inputs, weights) = (2 * 3 * 5 * 9, 3 * 5 * 7, 9 * 7);
    let tensor =
        |data: &Tensor, len: usize| PaceTensor { data: data.address() as *mut c_void, len: len as u64 };
    let seed = 10 * stream as u32;
    let input =
        |number, len| tensor(&memory.lock().unwrap().input("input", &uniform(seed + number, len)), len);
    let output = |len| memory.lock().unwrap().in_out("output", &vec![f32::NAN; len]);
    let outputs = [(out, output(out)), (inputs, output(inputs)), (weights, output(weights))];
    let [y, grad_input, grad_delta_weight] = outputs.each_ref().map(|(len, data)| tensor(data, *len));
    let mut args = PaceNoisyLinear {
        shape,
        noise: PaceNoise { kind: PACE_NOISE_GENERATED, sigma: 0.5, ..absent_noise() },
        base_weight: input(1, weights),
        delta_weight: input(2, weights),
        x: input(3, inputs),
        dy: input(4, out),
        y,
        grad_input,
        grad_delta_weight,
        ..zeroed()
    };
    let mut bytes = 0;
    // SAFETY: the struct and the place for the number are live.
    check(unsafe { pace_noisy_linear_workspace(device, &args, &mut bytes) });
    let workspace = memory.lock().unwrap().in_out("workspace", &vec![0u64; bytes.div_ceil(8) as usize]);
    args.workspace = tensor(&workspace, bytes as usize);
    let mut written = Vec::new();
    for step in 0..3 {
        args.noise.key = pace_key(stream as u64, step, 0);
        for direction in [pace_noisy_linear_forward, pace_noisy_linear_backward] {
            // SAFETY: every tensor of the struct is live and of its length.
            check(unsafe { direction(device, stream as *mut c_void, &args) });
            let wrong = PaceNoisyLinear { x: PaceTensor { len: 1000 + stream as u64, ..args.x }, ..args };
            // SAFETY: as above; the length is refused.
            let status = unsafe { direction(device, stream as *mut c_void, &wrong) };
            assert_eq!(status, PACE_ERROR_LENGTH);
            // SAFETY: a string of the library.
            let message = unsafe { std::ffi::CStr::from_ptr(pace_last_error()) }.to_str().unwrap();
            assert!(message.contains(&format!("has {} elements", 1000 + stream)), "{message}");
        }
        let memory = memory.lock().unwrap();
        written.extend(outputs.iter().map(|(_, tensor)| memory.read(tensor).unwrap()));
    }
    written
}

fn absent_noise() -> PaceNoise {
    PaceNoise {
        kind: PACE_NOISE_OFF,
        shape: PACE_PER_SAMPLE,
        key: 0,
        key_address: std::ptr::null(),
        first_sample: 0,
        sigma: 0.0,
        reserved: 0,
        z: PaceTensor { data: null_mut(), len: 0 },
    }
}

pub fn streams() {
    let open = || {
        let memories: Arc<Vec<_>> = Arc::new((0..STREAMS).map(|_| Mutex::new(Memory::new(0))).collect());
        (PaceDevice::new(Streams(memories.clone())), memories)
    };
    let (device, memories) = open();
    let alone: Vec<_> = (0..STREAMS).map(|stream| steps(&device, &memories[stream], stream)).collect();
    let (device, memories) = open();
    let start = Barrier::new(STREAMS);
    let together: Vec<_> = thread::scope(|scope| {
        let run = |stream| {
            let (device, memories, start) = (&device, &memories, &start);
            scope.spawn(move || {
                start.wait();
                steps(device, &memories[stream], stream)
            })
        };
        let threads: Vec<_> = (0..STREAMS).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(alone.iter().flatten().flatten().all(|value| value.is_finite()));
    assert_ne!(alone[0], alone[1]);
    assert!(together == alone, "a thread's results depend on the others");
}
