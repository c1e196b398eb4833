//! The C interface on a device, here the simulator: every operator gives what it gives on the CPU.

use crate::simulate;
use crate::support::distance;
use crate::uniform;
use bytemuck::Pod;
use pace_kernels::capi::*;
use pace_kernels::cuda::{Gpu, Plan};
use pace_simt::{Memory, Schedule, Tensor};
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

/// Launches in the simulator, with threads in their order.
struct Simulator(Arc<Mutex<Memory>>);

impl Launcher for Simulator {
    fn gpu(&self) -> &Gpu {
        &simulate::GPU
    }

    unsafe fn launch(&self, plan: &Plan, _: *mut c_void) -> pace_kernels::Result<()> {
        simulate::run(plan, &mut self.0.lock().unwrap(), Schedule::InOrder, &mut Default::default());
        Ok(())
    }
}

/// Where tensors lie and an operator runs.
enum Place {
    Cpu(Vec<Vec<u64>>),
    Device { handle: PaceDevice, memory: Arc<Mutex<Memory>> },
}

/// What an operator has written.
enum Output {
    Cpu { at: usize, len: usize },
    Device(Tensor),
}

impl Place {
    fn device() -> Self {
        let memory = Arc::new(Mutex::new(Memory::new(0)));
        Self::Device { handle: PaceDevice::new(Simulator(memory.clone())), memory }
    }

    fn handle(&self) -> *const PaceDevice {
        match self {
            Self::Cpu(_) => null(),
            Self::Device { handle, .. } => handle,
        }
    }

    fn keep<T: Pod>(&mut self, values: &[T], output: bool) -> (PaceTensor, Output) {
        match self {
            Self::Cpu(memory) => {
                let mut words = vec![0u64; size_of_val(values).div_ceil(8).max(1)];
                bytemuck::cast_slice_mut::<_, u8>(&mut words)[..size_of_val(values)]
                    .copy_from_slice(bytemuck::cast_slice(values));
                memory.push(words);
                let data = memory.last_mut().unwrap().as_mut_ptr().cast();
                let output = Output::Cpu { at: memory.len() - 1, len: values.len() };
                (PaceTensor { data, len: values.len() as u64 }, output)
            }
            Self::Device { memory, .. } => {
                let mut memory = memory.lock().unwrap();
                let tensor =
                    if output { memory.in_out("output", values) } else { memory.input("input", values) };
                let data = tensor.address() as *mut c_void;
                (PaceTensor { data, len: values.len() as u64 }, Output::Device(tensor))
            }
        }
    }

    fn read<T: Pod>(&self, output: &Output) -> Vec<T> {
        match (self, output) {
            (Self::Cpu(memory), Output::Cpu { at, len }) => bytemuck::cast_slice::<_, u8>(&memory[*at])
                [..len * size_of::<T>()]
                .chunks(size_of::<T>())
                .map(bytemuck::pod_read_unaligned)
                .collect(),
            (Self::Device { memory, .. }, Output::Device(tensor)) => {
                memory.lock().unwrap().read(tensor).unwrap()
            }
            _ => unreachable!("an output is of its place"),
        }
    }
}

/// Tensors of one call, and what it has to write.
struct Tensors<'a> {
    place: &'a mut Place,
    seed: u32,
    outputs: Vec<(&'static str, Output, bool)>,
}

impl Tensors<'_> {
    fn input(&mut self, len: usize) -> PaceTensor {
        self.seed += 1;
        self.place.keep(&uniform(self.seed, len), false).0
    }

    fn integers<T: Pod>(&mut self, values: &[T]) -> PaceTensor {
        self.place.keep(values, false).0
    }

    fn in_out(&mut self, name: &'static str, len: usize) -> PaceTensor {
        self.seed += 1;
        let (tensor, output) = self.place.keep(&uniform(self.seed, len), true);
        self.outputs.push((name, output, false));
        tensor
    }

    fn output(&mut self, name: &'static str, len: usize) -> PaceTensor {
        let (tensor, output) = self.place.keep(&vec![f32::NAN; len], true);
        self.outputs.push((name, output, false));
        tensor
    }

    fn wide_output(&mut self, name: &'static str) -> PaceTensor {
        let (tensor, output) = self.place.keep(&[f64::NAN], true);
        self.outputs.push((name, output, true));
        tensor
    }

    /// As many bytes as the query says; none on the CPU.
    fn workspace<A>(&mut self, query: Workspace<A>, args: &A) -> PaceTensor {
        let mut bytes = u64::MAX;
        // SAFETY: the struct and the place for the number are live.
        check(unsafe { query(self.place.handle(), args, &mut bytes) });
        assert!(matches!(self.place, Place::Device { .. }) || bytes == 0);
        if bytes == 0 {
            return PaceTensor { data: null_mut(), len: 0 };
        }
        // Zeros, as a loss asks for.
        let (tensor, _) = self.place.keep(&vec![0u64; (bytes as usize).div_ceil(8)], true);
        PaceTensor { len: bytes, ..tensor }
    }

    /// Gradient-norm lists are in host memory.
    fn on_device(&self) -> bool {
        matches!(self.place, Place::Device { .. })
    }
}

type Workspace<A> = unsafe extern "C" fn(*const PaceDevice, *const A, *mut u64) -> PaceStatus;
type Operator<A> = unsafe extern "C" fn(*const PaceDevice, *mut c_void, *const A) -> PaceStatus;

pub fn check(status: PaceStatus) {
    // SAFETY: strings of the library.
    let [name, message] =
        unsafe { [pace_status_name(status), pace_last_error()].map(|text| CStr::from_ptr(text)) };
    assert_eq!(status, PACE_OK, "{name:?}: {message:?}");
}

pub fn zeroed<A: Copy>() -> A {
    // SAFETY: the structs of the interface are numbers and raw pointers, and each begins with its size.
    unsafe {
        let mut args: A = MaybeUninit::zeroed().assume_init();
        (&raw mut args).cast::<u64>().write(size_of::<A>() as u64);
        args
    }
}

/// Runs operators one after the other over the same struct, on the CPU and in the simulator.
fn same<A>(build: impl Fn(&mut Tensors<'_>) -> A, operators: &[Operator<A>]) {
    let run = |mut place: Place| {
        let mut tensors = Tensors { place: &mut place, seed: 0, outputs: Vec::new() };
        let args = build(&mut tensors);
        let outputs = tensors.outputs;
        for operator in operators {
            // SAFETY: every tensor of the struct is live and of its length.
            check(unsafe { operator(place.handle(), null_mut(), &args) });
        }
        let read = |(name, output, wide): (&'static str, Output, bool)| {
            let floats = |place: &Place| place.read::<f32>(&output).into_iter().map(f64::from).collect();
            (name, if wide { place.read::<f64>(&output) } else { floats(&place) })
        };
        outputs.into_iter().map(read).collect::<Vec<(&str, Vec<f64>)>>()
    };
    let (cpu, device) = (run(Place::Cpu(Vec::new())), run(Place::device()));
    assert!(!cpu.is_empty());
    for ((name, cpu), (_, device)) in cpu.iter().zip(&device) {
        let largest = cpu.iter().fold(0f64, |largest, value| largest.max(value.abs()));
        let error = distance(cpu, device);
        assert!(error <= 1e-5 * largest, "{name}: {error:e} of {largest:e}");
    }
}

fn shape() -> PaceShape {
    PaceShape { branches: 2, batch: 3, tokens: 5, in_features: 7, out_features: 9, shared_input: 1 }
}

const R: usize = 6;
const M: usize = 30;
const K: usize = 7;
const N: usize = 9;

/// Generated noise whose key comes from memory; the one in the struct is another.
fn noise(tensors: &mut Tensors<'_>) -> PaceNoise {
    let key = tensors.integers(&[pace_key(1, 2, 3)]);
    PaceNoise {
        kind: PACE_NOISE_GENERATED,
        shape: PACE_PER_TOKEN,
        key: 1,
        key_address: key.data.cast(),
        first_sample: 11,
        sigma: 0.7,
        reserved: 0,
        z: PaceTensor { data: null_mut(), len: 0 },
    }
}

pub fn noisy_linear() {
    let build = |flags: u32, shared_input: u64| {
        move |t: &mut Tensors<'_>| {
            let rows = if shared_input == 1 { M / 2 } else { M };
            let mut args = PaceNoisyLinear {
                flags,
                shape: PaceShape { shared_input, ..shape() },
                noise: PaceNoise { shape: PACE_PER_SAMPLE, ..noise(t) },
                base_weight: t.input(N * K),
                base_bias: t.input(N),
                delta_weight: t.input(N * K),
                delta_bias: t.input(N),
                x: t.input(rows * K),
                y: t.output("y", M * N),
                dy: t.input(M * N),
                grad_input: t.output("dx", rows * K),
                grad_delta_weight: t.output("dΔW", N * K),
                grad_delta_bias: t.output("dΔb", N),
                ..zeroed()
            };
            args.workspace = t.workspace(pace_noisy_linear_workspace, &args);
            args
        }
    };
    for (flags, shared) in [(0, 1), (0, 0), (PACE_EXACT, 0)] {
        same(build(flags, shared), &[pace_noisy_linear_forward, pace_noisy_linear_backward]);
    }
}

pub fn lora_mul_linear() {
    let (rank, prompt_rank) = (3, 2);
    let build = |with_prompt: bool| {
        move |t: &mut Tensors<'_>| {
            let mut args = PaceLoraMulLinear {
                shape: shape(),
                noise: noise(t),
                rank: rank as u64,
                scale: 0.5,
                base_weight: t.input(N * K),
                base_bias: t.input(N),
                lora_a: t.input(rank * K),
                lora_b: t.input(N * rank),
                delta_bias: t.input(N),
                x: t.input(M / 2 * K),
                y: t.output("y", M * N),
                dy: t.input(M * N),
                grad_input: t.output("dx", M / 2 * K),
                grad_lora_a: t.output("dA", rank * K),
                grad_lora_b: t.output("dB", N * rank),
                grad_delta_bias: t.output("dδb", N),
                ..zeroed()
            };
            if with_prompt {
                args.prompt_rank = prompt_rank as u64;
                args.prompt_down = t.input(K * prompt_rank);
                args.prompt_up = t.input(prompt_rank);
                args.grad_prompt_down = t.output("dPd", K * prompt_rank);
                args.grad_prompt_up = t.output("dPu", prompt_rank);
            }
            args.workspace = t.workspace(pace_lora_mul_linear_workspace, &args);
            args
        }
    };
    same(build(true), &[pace_lora_mul_linear_forward, pace_lora_mul_linear_backward]);
    same(build(false), &[pace_lora_mul_linear_forward, pace_lora_mul_linear_backward]);
}

pub fn low_rank_linear() {
    let build = |t: &mut Tensors<'_>| {
        let (rank, z) = (4, t.input(R * N));
        let mut args = PaceLowRankLinear {
            shape: shape(),
            noise: PaceNoise { kind: PACE_NOISE_GIVEN, shape: PACE_PER_SAMPLE, z, ..noise(t) },
            rank: rank as u64,
            scale: -1.5,
            base_weight: t.input(N * K),
            base_bias: t.input(N),
            lora_b: t.input(N * rank),
            lora_a: t.input(rank * K),
            delta_bias: t.input(N),
            x: t.input(M / 2 * K),
            y: t.output("y", M * N),
            dy: t.input(M * N),
            grad_input: t.output("dx", M / 2 * K),
            grad_lora_b: t.output("dB", N * rank),
            grad_lora_a: t.output("dA", rank * K),
            grad_delta_bias: t.output("dδb", N),
            ..zeroed()
        };
        args.s = t.place.keep(&vec![0f32; M / 2 * rank], true).0;
        args.workspace = t.workspace(pace_low_rank_linear_workspace, &args);
        args
    };
    same(build, &[pace_low_rank_linear_forward, pace_low_rank_linear_backward]);
}

pub fn noise_and_epilogue() {
    let build = |t: &mut Tensors<'_>| PaceNoiseFill {
        shape: shape(),
        noise: noise(t),
        z: t.output("z", M * N),
        ..zeroed()
    };
    same(build, &[pace_noise_fill]);
    let build = |t: &mut Tensors<'_>| PaceNoisyEpilogue {
        shape: shape(),
        noise: noise(t),
        a: t.input(M * N),
        y: t.in_out("y", M * N),
        dy: t.input(M * N),
        da: t.output("da", M * N),
        ..zeroed()
    };
    same(build, &[pace_noisy_epilogue_forward, pace_noisy_epilogue_backward]);
}

pub fn weights() {
    let rank = 4;
    let weight = |lora_mul: bool| {
        move |t: &mut Tensors<'_>| {
            let mut args = PaceLowRankWeight {
                out_features: N as u64,
                in_features: K as u64,
                rank: rank as u64,
                scale: 0.5,
                lora_b: t.input(N * rank),
                lora_a: t.input(rank * K),
                out: t.output("ΔW", N * K),
                dout: t.input(N * K),
                grad_lora_b: t.output("dB", N * rank),
                grad_lora_a: t.output("dA", rank * K),
                ..zeroed()
            };
            if lora_mul {
                args.base_weight = t.input(N * K);
            }
            args.workspace = t.workspace(pace_low_rank_weight_workspace, &args);
            args
        }
    };
    for lora_mul in [false, true] {
        same(weight(lora_mul), &[pace_low_rank_weight_forward, pace_low_rank_weight_backward]);
    }
    let prompt = |t: &mut Tensors<'_>| {
        let mut args = PacePromptBias {
            out_features: N as u64,
            in_features: K as u64,
            rank: rank as u64,
            base_weight: t.input(N * K),
            base_bias: t.input(N),
            prompt_down: t.input(K * rank),
            prompt_up: t.input(rank),
            delta_bias: t.input(N),
            out: t.output("Δb", N),
            dout: t.input(N),
            grad_prompt_down: t.output("dPd", K * rank),
            grad_prompt_up: t.output("dPu", rank),
            grad_delta_bias: t.output("dδb", N),
            ..zeroed()
        };
        args.workspace = t.workspace(pace_prompt_bias_workspace, &args);
        args
    };
    same(prompt, &[pace_prompt_bias_forward, pace_prompt_bias_backward]);
    for operator in [pace_merge, pace_unmerge] {
        same(|t| PaceMerge { target: t.in_out("target", 40), delta: t.input(40), ..zeroed() }, &[operator]);
    }
}

pub fn loss() {
    let (batch, classes) = (5, 11);
    for consistency in [PACE_CONSISTENCY_NONE, PACE_CONSISTENCY_TWO_BRANCH, PACE_CONSISTENCY_HISTORY] {
        let build = |t: &mut Tensors<'_>| {
            let rows = if consistency == PACE_CONSISTENCY_TWO_BRANCH { 2 * batch } else { batch };
            let mut args = PaceLoss {
                consistency,
                classes: classes as u64,
                lambda: 0.7,
                label_smoothing: 0.1,
                has_ignore_label: 1,
                ignore_label: -100,
                logits: t.input(rows * classes),
                labels: t.integers(&[3i64, -100, 0, 10, 7]),
                gradient: t.output("gradient", rows * classes),
                values: t.output("values", 3),
                ..zeroed()
            };
            if consistency == PACE_CONSISTENCY_HISTORY {
                args.history = t.in_out("history", 8 * classes);
                args.index = t.integers(&[7i64, 2, 0, 5, 1]);
            }
            if t.on_device() {
                args.status = t.place.keep(&[9u64; 9], true).0;
            }
            args.workspace = t.workspace(pace_loss_workspace, &args);
            args
        };
        same(build, &[pace_loss]);
    }
}

pub fn lm_head() {
    let (tokens, hidden_size, classes, rank) = (5, 6, 11, 2);
    for (divergence, has_lora) in [
        (PACE_DIVERGENCE_SQUARED_DIFFERENCE, false),
        (PACE_DIVERGENCE_SQUARED_DIFFERENCE, true),
        (PACE_DIVERGENCE_SYMMETRIC_KL, true),
    ] {
        let build = |t: &mut Tensors<'_>| {
            let mut args = PaceLmHead {
                divergence,
                hidden_size: hidden_size as u64,
                classes: classes as u64,
                branches: 2,
                chunk_rows: 3,
                flags: PACE_LOSS_LABELLED_ONLY,
                lambda: 0.7,
                label_smoothing: 0.1,
                has_ignore_label: 1,
                ignore_label: -100,
                logit_scale: 1.0,
                hidden: t.input(2 * tokens * hidden_size),
                labels: t.integers(&[3i64, -100, 0, 10, 7]),
                weight: t.input(classes * hidden_size),
                bias: t.input(classes),
                // Written by the first operator, read by the second.
                gram: t.output("gram", hidden_size * hidden_size),
                class_weights: t.integers(&[0.5f32; 11]),
                grad_hidden: t.output("grad_hidden", 2 * tokens * hidden_size),
                grad_weight: t.output("grad_weight", classes * hidden_size),
                grad_bias: t.output("grad_bias", classes),
                values: t.output("values", 3),
                ..zeroed()
            };
            if has_lora {
                args.rank = rank as u64;
                args.scale = 0.5;
                args.lora_b = t.input(classes * rank);
                args.lora_a = t.input(rank * hidden_size);
                args.grad_lora_b = t.output("grad_lora_b", classes * rank);
                args.grad_lora_a = t.output("grad_lora_a", rank * hidden_size);
            }
            if t.on_device() {
                args.status = t.place.keep(&[9u64; 9], true).0;
            }
            args.workspace = t.workspace(pace_lm_head_workspace, &args);
            args
        };
        // The Gram matrix leaves the head's part of the workspace alone.
        same(build, &[pace_lm_head_gram, pace_lm_head]);
    }
}

pub fn drop_path() {
    let build = |given: bool| {
        move |t: &mut Tensors<'_>| {
            let key = t.integers(&[pace_key(4, 0, 0)]);
            let mut args = PaceDropPath {
                branches: 2,
                batch: 6,
                features: 10,
                key: 1,
                key_address: key.data.cast(),
                drop_probability: 0.4,
                first_sample: 3,
                x: t.input(120),
                y: t.output("y", 120),
                dy: t.input(120),
                dx: t.output("dx", 120),
                ..zeroed()
            };
            if given {
                args.mask = t.integers(&[1f32, 0.0, 0.0, 1.0, 1.0, 0.0]);
            }
            args
        }
    };
    for given in [false, true] {
        same(build(given), &[pace_drop_path_forward, pace_drop_path_backward]);
    }
}

pub fn norms() {
    let lists = Mutex::new(Vec::new());
    let build = |t: &mut Tensors<'_>| {
        let list = Box::new([t.input(100), t.input(7)]);
        let mut args =
            PaceGradNorm { gradients: list.as_ptr(), count: 2, norm: t.wide_output("norm"), ..zeroed() };
        args.workspace = t.workspace(pace_grad_norm_workspace, &args);
        lists.lock().unwrap().push(list);
        args
    };
    same(build, &[pace_grad_norm]);
    let build = |t: &mut Tensors<'_>| {
        let mut args = PaceFpDistance {
            samples: 4,
            features: 25,
            fine_tuned: t.input(100),
            pre_trained: t.input(100),
            distance: t.wide_output("distance"),
            ..zeroed()
        };
        args.workspace = t.workspace(pace_fp_distance_workspace, &args);
        args
    };
    same(build, &[pace_fp_distance]);
}

/// What is wrong with a call on a device is found before anything is launched.
pub fn errors() {
    let place = Place::device();
    let call = |args: &PaceMerge| {
        // SAFETY: nothing is launched.
        unsafe { pace_merge(place.handle(), null_mut(), args) }
    };
    let tensor = |address: usize, len: u64| PaceTensor { data: address as *mut c_void, len };
    let args = PaceMerge { target: tensor(4096, 4), delta: tensor(8192, 4), ..zeroed() };
    assert_eq!(call(&PaceMerge { dtype: PACE_F64, ..args }), PACE_ERROR_DTYPE);
    assert_eq!(call(&PaceMerge { dtype: 9, ..args }), PACE_ERROR_DTYPE);
    assert_eq!(call(&PaceMerge { flags: 1, ..args }), PACE_ERROR_VALUE);
    assert_eq!(call(&PaceMerge { delta: tensor(8192, 5), ..args }), PACE_ERROR_LENGTH);
    assert_eq!(call(&PaceMerge { target: tensor(4098, 4), ..args }), PACE_ERROR_ARGUMENT);
    assert_eq!(call(&PaceMerge { target: tensor(0, 4), ..args }), PACE_ERROR_ARGUMENT);
    assert_eq!(call(&PaceMerge { delta: tensor(4100, 4), ..args }), PACE_ERROR_ARGUMENT);
    assert_eq!(call(&PaceMerge { size: 47, ..args }), PACE_ERROR_VERSION);
    assert_eq!(call(&PaceMerge { delta: tensor(0, 0), ..args }), PACE_ERROR_ARGUMENT);

    // What a zeroed struct has forgotten.
    let mut weight: PaceLowRankWeight = zeroed();
    let mut bytes = 7;
    let query = |args: &PaceLowRankWeight, bytes: &mut u64| {
        // SAFETY: the struct and the place for the number are live.
        unsafe { pace_low_rank_weight_workspace(place.handle(), args, bytes) }
    };
    (weight.in_features, weight.out_features, weight.scale) = (40, 30, 1.0);
    assert_eq!((query(&weight, &mut bytes), bytes), (PACE_ERROR_SIZE, 7));
    weight.rank = 2;
    assert_eq!(query(&weight, &mut bytes), PACE_OK);
    // A query needs no more than sizes.
    let mut same = 0;
    assert_eq!(query(&PaceLowRankWeight { scale: 0.0, ..weight }, &mut same), PACE_OK);
    assert_eq!(same, bytes);
    let mut layer: PaceLoraMulLinear = zeroed();
    layer.shape =
        PaceShape { branches: 1, batch: 2, tokens: 3, in_features: 40, out_features: 30, ..layer.shape };
    (layer.lora_a, layer.lora_b, layer.rank) = (tensor(4096, 80), tensor(8192, 60), 2);
    // SAFETY: the struct and the place for the number are live.
    let status = unsafe { pace_lora_mul_linear_workspace(place.handle(), &layer, &mut same) };
    assert!(status == PACE_OK && same > 0, "{status}");
    weight.workspace = tensor(4096, bytes - 1);
    let backward = |args: &PaceLowRankWeight| {
        // SAFETY: nothing is launched.
        let status = unsafe { pace_low_rank_weight_backward(place.handle(), null_mut(), args) };
        // SAFETY: a string of the library.
        (status, unsafe { CStr::from_ptr(pace_last_error()) }.to_str().unwrap().to_owned())
    };
    let (status, message) = backward(&weight);
    assert_eq!(status, PACE_ERROR_LENGTH);
    let expected = format!("`workspace` has {} bytes, expected at least {bytes}", bytes - 1);
    assert!(message.starts_with(&expected), "{message}");
    let (status, message) = backward(&PaceLowRankWeight { scale: 0.0, ..weight });
    assert_eq!(status, PACE_ERROR_VALUE);
    assert!(message.starts_with("`scale` is 0"), "{message}");
}
