//! Calls with anything in them: a status and a message, never a crash. And right ones: what the Rust interface computes.

use pace_kernels::capi::*;
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use pace_kernels::{LinearShape, cpu};
use std::ffi::{CStr, c_void};
use std::mem::{MaybeUninit, offset_of, size_of};
use std::ptr::{null, null_mut};

/// A struct that is all zeros but for its size.
fn zeroed<A: Copy>() -> A {
    // SAFETY: the structs of the interface are numbers and raw pointers.
    let mut args: A = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: each begins with its size.
    unsafe { (&raw mut args).cast::<u64>().write(size_of::<A>() as u64) };
    args
}

fn tensor<T>(values: &mut [T]) -> PaceTensor {
    PaceTensor { data: values.as_mut_ptr().cast(), len: values.len() as u64 }
}

fn message() -> String {
    // SAFETY: the library gives a string that lives until the next error.
    unsafe { CStr::from_ptr(pace_last_error()) }.to_str().unwrap().to_owned()
}

fn name(status: PaceStatus) -> String {
    // SAFETY: a constant string.
    unsafe { CStr::from_ptr(pace_status_name(status)) }.to_str().unwrap().to_owned()
}

/// Numbers in [-1, 1) and choices among a few, from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

const SHAPE: LinearShape =
    LinearShape { branches: 2, batch: 2, tokens: 3, in_features: 5, out_features: 4, shared_input: true };

fn shape() -> PaceShape {
    PaceShape { branches: 2, batch: 2, tokens: 3, in_features: 5, out_features: 4, shared_input: 1 }
}

fn noise() -> PaceNoise {
    let (kind, key) = (PACE_NOISE_GENERATED, pace_key(1, 2, 3));
    PaceNoise { kind, key, sigma: 0.5, first_sample: 6, ..zeroed_noise() }
}

fn zeroed_noise() -> PaceNoise {
    // SAFETY: numbers and raw pointers.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn generator() -> Generator {
    Generator::new(Key::derive(1, 2, 3), 0.5, NoiseShape::PerSample, 6).unwrap()
}

#[test]
fn a_layer_gives_what_the_rust_interface_gives() {
    let mut random = Random(1);
    let [mut weight, mut bias, mut delta, mut x, mut dy] = [20, 4, 20, 30, 48].map(|len| random.floats(len));
    let layer = cpu::NoisyLinear {
        shape: SHAPE,
        noise: Noise::Generated(generator()),
        base: Some(cpu::Base { weight: &weight.clone(), bias: Some(&bias.clone()) }),
        delta_weight: Some(&delta.clone()),
        delta_bias: None,
    };
    let (mut y, mut dx, mut dw) = (vec![0.0; 48], vec![0.0; 30], vec![0.0; 20]);
    layer.forward(&x, &mut y).unwrap();
    let grads: cpu::NoisyLinearGrads<&mut [_]> =
        cpu::NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: None };
    layer.backward(&x, &dy, grads).unwrap();

    let (mut y2, mut dx2, mut dw2) = (vec![f32::NAN; 48], vec![f32::NAN; 30], vec![f32::NAN; 20]);
    // The key from memory stands before the one in the struct.
    let key = pace_key(1, 2, 3);
    let args = PaceNoisyLinear {
        shape: shape(),
        noise: PaceNoise { key: 0, key_address: &key, ..noise() },
        base_weight: tensor(&mut weight),
        base_bias: tensor(&mut bias),
        delta_weight: tensor(&mut delta),
        x: tensor(&mut x),
        y: tensor(&mut y2),
        dy: tensor(&mut dy),
        grad_input: tensor(&mut dx2),
        grad_delta_weight: tensor(&mut dw2),
        ..zeroed()
    };
    // SAFETY: all tensors are live and of their length.
    unsafe {
        assert_eq!(pace_noisy_linear_forward(null(), null_mut(), &args), PACE_OK, "{}", message());
        assert_eq!(pace_noisy_linear_backward(null(), null_mut(), &args), PACE_OK, "{}", message());
    }
    assert_eq!((y, dx, dw), (y2, dx2, dw2));
}

#[test]
fn noise_is_that_of_the_generator() {
    let mut z = vec![0f64; 16];
    let args =
        PaceNoiseFill { dtype: PACE_F64, shape: shape(), noise: noise(), z: tensor(&mut z), ..zeroed() };
    // SAFETY: all tensors are live and of their length.
    assert_eq!(unsafe { pace_noise_fill(null(), null_mut(), &args) }, PACE_OK, "{}", message());
    for (row, z) in z.chunks(4).enumerate() {
        let mut expected = [0f64; 4];
        generator().fill(row as u8 / 2, row as u64 % 2, 0, 0, &mut expected);
        assert_eq!(z, expected);
    }
}

/// Every operator under one signature, with its name and the size of its struct.
type Operator = unsafe extern "C" fn(*const PaceDevice, *mut c_void, *const u8) -> PaceStatus;

macro_rules! operators {
    ($($function:ident: $args:ty,)*) => {
        [$((
            stringify!($function),
            {
                unsafe extern "C" fn call(d: *const PaceDevice, s: *mut c_void, a: *const u8) -> PaceStatus {
                    // SAFETY: the caller's promise.
                    unsafe { $function(d, s, a.cast::<$args>()) }
                }
                call as Operator
            },
            size_of::<$args>(),
        ),)*]
    };
}

const OPERATORS: [(&str, Operator, usize); 20] = operators! {
    pace_noise_fill: PaceNoiseFill,
    pace_noisy_linear_forward: PaceNoisyLinear,
    pace_noisy_linear_backward: PaceNoisyLinear,
    pace_low_rank_linear_forward: PaceLowRankLinear,
    pace_low_rank_linear_backward: PaceLowRankLinear,
    pace_lora_mul_linear_forward: PaceLoraMulLinear,
    pace_lora_mul_linear_backward: PaceLoraMulLinear,
    pace_noisy_epilogue_forward: PaceNoisyEpilogue,
    pace_noisy_epilogue_backward: PaceNoisyEpilogue,
    pace_low_rank_weight_forward: PaceLowRankWeight,
    pace_low_rank_weight_backward: PaceLowRankWeight,
    pace_prompt_bias_forward: PacePromptBias,
    pace_prompt_bias_backward: PacePromptBias,
    pace_merge: PaceMerge,
    pace_unmerge: PaceMerge,
    pace_loss: PaceLoss,
    pace_drop_path_forward: PaceDropPath,
    pace_drop_path_backward: PaceDropPath,
    pace_grad_norm: PaceGradNorm,
    pace_fp_distance: PaceFpDistance,
};

#[test]
fn null_misaligned_and_foreign_structs_are_refused() {
    for (what, operator, size) in OPERATORS {
        let mut words = vec![0u64; 1024];
        let call = |args: *const u8| {
            // SAFETY: null, misaligned, or as many bytes as the first word says: the buffer has 8192.
            unsafe { operator(null(), null_mut(), args) }
        };
        assert_eq!(call(null()), PACE_ERROR_ARGUMENT, "{what}");
        assert!(message().contains("`args` is a null pointer"), "{what}: {}", message());
        words[1] = size as u64;
        assert_eq!(call(words.as_ptr().cast::<u8>().wrapping_add(4)), PACE_ERROR_ARGUMENT, "{what}");
        for wrong in [0, 8, size as u64 - 8, 4097, u64::MAX] {
            words[0] = wrong;
            assert_eq!(call(words.as_ptr().cast()), PACE_ERROR_VERSION, "{what}: {wrong}");
        }
        // A newer struct is taken if what this library does not know is zero.
        words[0] = size as u64 + 16;
        let status = call(words.as_ptr().cast());
        assert!(status != PACE_ERROR_VERSION, "{what}: {}", message());
        words[size / 8 + 1] = 1;
        assert_eq!(call(words.as_ptr().cast()), PACE_ERROR_VERSION, "{what}");
        words[size / 8 + 1] = 0;

        // The types that there are not.
        words[0] = size as u64;
        for dtype in [PACE_F16, PACE_BF16, 4, u32::MAX] {
            words[1] = u64::from(dtype);
            assert_eq!(call(words.as_ptr().cast()), PACE_ERROR_DTYPE, "{what}: {dtype}");
        }
        words[1] = 0;
        // SAFETY: as above.
        let status = unsafe { operator(null(), words.as_mut_ptr().cast(), words.as_ptr().cast()) };
        assert_eq!(status, PACE_ERROR_ARGUMENT, "{what}");
        assert!(message().contains("`stream` needs a device"), "{what}: {}", message());
    }
}

/// A right call of every operator, as bytes, over memory of the test's own; and where in it are pointers.
struct Case {
    operator: usize,
    words: Vec<u64>,
    /// Words that are pointers and null: the fuzzer leaves them.
    absent: Vec<usize>,
}

impl Case {
    fn absent(self, offsets: &[usize]) -> Self {
        Self { absent: offsets.iter().map(|offset| offset / 8).collect(), ..self }
    }
}

fn words<A: Copy>(operator: &str, args: A) -> Case {
    let operator = OPERATORS.iter().position(|&(name, ..)| name == operator).unwrap();
    assert_eq!(OPERATORS[operator].2, size_of::<A>());
    // SAFETY: the structs have no padding: all fields lie at multiples of their size, and the total is one of 8.
    let words =
        unsafe { std::slice::from_raw_parts((&raw const args).cast::<u64>(), size_of::<A>() / 8) }.to_vec();
    Case { operator, words, absent: Vec::new() }
}

/// Memory that tensors of a case lie in: each has an area of its own, with more room than it needs.
struct Arena {
    memory: Vec<u64>,
    used: usize,
}

/// Bytes of an area: the largest length that the fuzzer asks for, of the widest type.
const AREA: usize = 4096;

impl Arena {
    fn new(areas: usize) -> Self {
        let mut random = Random(3);
        // Floats of modest size whichever way they are read, and small integers as 64 bits are rare: those are written.
        let memory = (0..areas * AREA / 8).map(|_| {
            let f = |r: &mut Random| u64::from((r.below(200) as f32 / 100.0 - 1.0).to_bits());
            f(&mut random) | f(&mut random) << 32
        });
        Self { memory: memory.collect(), used: 0 }
    }

    fn tensor(&mut self, len: u64) -> PaceTensor {
        let start = self.used;
        self.used += AREA / 8;
        PaceTensor { data: self.memory[start..self.used].as_mut_ptr().cast(), len }
    }

    /// Whether a word is the address of something in here.
    fn holds(&self, word: u64) -> bool {
        let memory = self.memory.as_ptr_range();
        (memory.start as u64..memory.end as u64).contains(&word)
    }

    fn integers(&mut self, len: u64) -> PaceTensor {
        let tensor = self.tensor(len);
        let start = self.used - AREA / 8;
        for (i, word) in self.memory[start..self.used].iter_mut().enumerate() {
            *word = i as u64;
        }
        tensor
    }
}

fn cases(arena: &mut Arena) -> Vec<Case> {
    let (n, k, r, m) = (4, 5, 2, 12);
    // Zeros, for a list of tensors that may get longer.
    let list = arena.tensor(0);
    let spare = arena.tensor(0);
    assert_eq!(list.data as usize + AREA, spare.data as usize);
    arena.memory[..2 * AREA / 8].fill(0);
    let noise = PaceNoise { key_address: arena.tensor(1).data.cast(), z: arena.tensor(4 * n), ..noise() };
    let workspace = arena.tensor(0);
    let layer = PaceNoisyLinear {
        shape: shape(),
        noise,
        workspace,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        delta_weight: arena.tensor(n * k),
        delta_bias: arena.tensor(n),
        x: arena.tensor(m / 2 * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(m / 2 * k),
        grad_delta_weight: arena.tensor(n * k),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let low_rank = PaceLowRankLinear {
        shape: shape(),
        noise: PaceNoise { kind: PACE_NOISE_GIVEN, ..noise },
        s: arena.tensor(m / 2 * r),
        workspace,
        rank: r,
        scale: 1.0,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        lora_b: arena.tensor(n * r),
        lora_a: arena.tensor(r * k),
        delta_bias: arena.tensor(n),
        x: arena.tensor(m / 2 * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(m / 2 * k),
        grad_lora_b: arena.tensor(n * r),
        grad_lora_a: arena.tensor(r * k),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let lora_mul = PaceLoraMulLinear {
        shape: shape(),
        noise,
        workspace,
        rank: r,
        prompt_rank: r,
        scale: 1.0,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        lora_a: arena.tensor(r * k),
        lora_b: arena.tensor(n * r),
        prompt_down: arena.tensor(k * r),
        prompt_up: arena.tensor(r),
        delta_bias: arena.tensor(n),
        x: arena.tensor(m / 2 * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(m / 2 * k),
        grad_lora_a: arena.tensor(r * k),
        grad_lora_b: arena.tensor(n * r),
        grad_prompt_down: arena.tensor(k * r),
        grad_prompt_up: arena.tensor(r),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let epilogue = PaceNoisyEpilogue {
        shape: shape(),
        noise,
        a: arena.tensor(m * n),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        da: arena.tensor(m * n),
        ..zeroed()
    };
    let weight = PaceLowRankWeight {
        out_features: n,
        in_features: k,
        rank: r,
        scale: 1.0,
        lora_b: arena.tensor(n * r),
        lora_a: arena.tensor(r * k),
        base_weight: arena.tensor(n * k),
        out: arena.tensor(n * k),
        dout: arena.tensor(n * k),
        grad_lora_b: arena.tensor(n * r),
        grad_lora_a: arena.tensor(r * k),
        workspace,
        ..zeroed()
    };
    let prompt = PacePromptBias {
        out_features: n,
        in_features: k,
        rank: r,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        prompt_down: arena.tensor(k * r),
        prompt_up: arena.tensor(r),
        delta_bias: arena.tensor(n),
        out: arena.tensor(n),
        dout: arena.tensor(n),
        grad_prompt_down: arena.tensor(k * r),
        grad_prompt_up: arena.tensor(r),
        grad_delta_bias: arena.tensor(n),
        workspace,
        ..zeroed()
    };
    let loss = PaceLoss {
        consistency: PACE_CONSISTENCY_HISTORY,
        classes: 7,
        lambda: 0.5,
        logits: arena.tensor(3 * 7),
        labels: arena.integers(3),
        history: arena.tensor(5 * 7),
        index: arena.integers(3),
        gradient: arena.tensor(3 * 7),
        values: arena.tensor(3),
        status: arena.tensor(9),
        workspace,
        ..zeroed()
    };
    let drop_path = PaceDropPath {
        branches: 2,
        batch: 3,
        features: 6,
        key: 1,
        key_address: arena.tensor(1).data.cast(),
        drop_probability: 0.3,
        x: arena.tensor(36),
        y: arena.tensor(36),
        dy: arena.tensor(36),
        dx: arena.tensor(36),
        ..zeroed()
    };
    let gradients = [arena.tensor(9), arena.tensor(0), arena.tensor(4)];
    // SAFETY: an area has room for three tensors and is aligned to 8.
    unsafe { list.data.cast::<[PaceTensor; 3]>().write(gradients) };
    let norm =
        PaceGradNorm { gradients: list.data.cast(), count: 3, norm: arena.tensor(1), workspace, ..zeroed() };
    let distance = PaceFpDistance {
        samples: 3,
        features: 4,
        fine_tuned: arena.tensor(12),
        pre_trained: arena.tensor(12),
        distance: arena.tensor(1),
        workspace,
        ..zeroed()
    };
    let merge = PaceMerge { target: arena.tensor(9), delta: arena.tensor(9), ..zeroed() };
    let fill = PaceNoiseFill { shape: shape(), noise, z: arena.tensor(16), ..zeroed() };
    vec![
        words("pace_noise_fill", fill),
        words("pace_noisy_linear_forward", layer),
        words("pace_noisy_linear_backward", layer),
        words("pace_low_rank_linear_forward", low_rank),
        words("pace_low_rank_linear_backward", low_rank),
        words("pace_lora_mul_linear_forward", lora_mul),
        words("pace_lora_mul_linear_backward", lora_mul),
        words("pace_noisy_epilogue_forward", epilogue),
        words("pace_noisy_epilogue_backward", epilogue),
        words("pace_low_rank_weight_forward", weight),
        words("pace_low_rank_weight_backward", weight),
        words("pace_prompt_bias_forward", prompt),
        words("pace_prompt_bias_backward", prompt),
        words("pace_merge", merge),
        words("pace_unmerge", merge),
        words("pace_loss", loss),
        words("pace_drop_path_forward", drop_path).absent(&[offset_of!(PaceDropPath, mask)]),
        words("pace_drop_path_backward", drop_path).absent(&[offset_of!(PaceDropPath, mask)]),
        words("pace_grad_norm", norm),
        words("pace_fp_distance", distance),
    ]
}

fn call(case: &Case, words: &[u64]) -> PaceStatus {
    // SAFETY: pointers are null, misaligned inside an area, or an area, which is larger than any length that is passed with it.
    unsafe { OPERATORS[case.operator].1(null(), null_mut(), words.as_ptr().cast()) }
}

#[test]
fn whatever_is_in_the_structs_there_is_a_status_and_a_message() {
    let mut arena = Arena::new(130);
    let cases = cases(&mut arena);
    assert_eq!(cases.len(), OPERATORS.len());
    let before = arena.memory.clone();
    let mut random = Random(11);
    let mut seen = std::collections::BTreeMap::<PaceStatus, usize>::new();
    for case in &cases {
        assert_eq!(call(case, &case.words), PACE_OK, "{}: {}", OPERATORS[case.operator].0, message());
        for _ in 0..3000 {
            let mut words = case.words.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(case.words.len() as u64) as usize;
                if case.absent.contains(&at) {
                    continue;
                }
                words[at] = match (arena.holds(case.words[at]), random.below(4)) {
                    // The start of the struct's list of tensors may not become another: its contents would be wild pointers.
                    (true, _) if OPERATORS[case.operator].0 == "pace_grad_norm" && at == 2 => 0,
                    (true, 0) => 0,
                    (true, 1) => case.words[at] + 1 + random.below(7),
                    // Another area, or the same twice.
                    (true, _) => {
                        let pointers: Vec<u64> =
                            words.iter().copied().filter(|&word| arena.holds(word)).collect();
                        pointers[random.below(pointers.len() as u64) as usize]
                    }
                    // The size, and numbers that may be lengths of tensors: these stay within an area.
                    (false, 0) => random.below(AREA as u64 / 8 - 8),
                    (false, 1) => words[at] ^ (1 << random.below(9)),
                    (false, 2) if !is_length(&case.words, at, &arena) => random.next(),
                    (false, _) => 0,
                };
            }
            // The struct has to be as long as it says.
            if words[0] > words.len() as u64 * 8 && words[0] <= 4096 {
                words.resize(words[0] as usize / 8 + 1, 0);
            }
            let status = call(case, &words);
            *seen.entry(status).or_default() += 1;
            assert!(name(status) != "unknown" && status != PACE_ERROR_INTERNAL, "{status}: {}", message());
            assert!(status == PACE_OK || !message().is_empty());
            // An output may have been sent to where another tensor lies.
            arena.memory.copy_from_slice(&before);
        }
        // Whatever went before, a right call still works.
        assert_eq!(call(case, &case.words), PACE_OK, "{}: {}", OPERATORS[case.operator].0, message());
    }
    // The fuzzer reaches all kinds of errors that a CPU can have.
    for status in [
        PACE_OK,
        PACE_ERROR_ARGUMENT,
        PACE_ERROR_LENGTH,
        PACE_ERROR_SIZE,
        PACE_ERROR_VALUE,
        PACE_ERROR_LABEL,
        PACE_ERROR_INDEX,
        PACE_ERROR_DTYPE,
        PACE_ERROR_VERSION,
    ] {
        assert!(seen.contains_key(&status), "{} was never seen in {seen:?}", name(status));
    }
}

/// Whether a word is the length of the tensor before it, which may not grow beyond its area.
fn is_length(words: &[u64], at: usize, arena: &Arena) -> bool {
    at > 0 && arena.holds(words[at - 1])
}

#[test]
fn overlap_is_refused() {
    let mut arena = Arena::new(130);
    let case = cases(&mut arena).swap_remove(1);
    let is_pointer =
        |&i: &usize| arena.holds(case.words[i]) && i * 8 >= offset_of!(PaceNoisyLinear, base_weight);
    let pointers: Vec<usize> = (0..case.words.len()).filter(is_pointer).collect();
    let mut refused = 0;
    for &at in &pointers {
        for &to in &pointers {
            let mut words = case.words.clone();
            words[to] = words[at];
            if call(&case, &words) == PACE_ERROR_ARGUMENT && message().contains("overlaps") {
                refused += 1;
            }
        }
    }
    // The output against each of five inputs, both ways round.
    assert_eq!(refused, 10);
}

#[test]
fn errors_belong_to_their_thread() {
    // SAFETY: null arguments are allowed.
    assert_eq!(unsafe { pace_merge(null(), null_mut(), null()) }, PACE_ERROR_ARGUMENT);
    let before = message();
    std::thread::spawn(|| {
        assert_eq!(message(), "");
        // SAFETY: a null place is allowed.
        assert_eq!(unsafe { pace_sigma_by_block(3, -1.0, 0, null_mut()) }, PACE_ERROR_VALUE);
        assert!(message().contains("sigma"));
    })
    .join()
    .unwrap();
    assert_eq!(message(), before);
}

#[test]
fn a_device_that_is_not_there_is_an_error_and_null() {
    let mut device = std::ptr::dangling_mut::<PaceDevice>();
    // SAFETY: a place for a pointer; and null.
    unsafe {
        let status = pace_device_open(u32::MAX, &mut device);
        assert!(status >= PACE_ERROR_NO_DRIVER && device.is_null(), "{}", message());
        assert_eq!(pace_device_open(0, null_mut()), PACE_ERROR_ARGUMENT);
        pace_device_close(null_mut());
    }
}

#[test]
fn small_functions() {
    assert_eq!(pace_abi_version(), PACE_ABI_VERSION);
    assert_eq!(pace_key(1, 2, 3), u64::from(Key::derive(1, 2, 3)));
    let mut sigmas = [0.0; 4];
    // SAFETY: room for four numbers; masks of their length; nine words.
    unsafe {
        assert_eq!(pace_sigma_by_block(4, 1.2, 1, sigmas.as_mut_ptr()), PACE_OK);
        assert_eq!(sigmas.to_vec(), pace_kernels::schedule::sigma_by_block(4, 1.2, 1).unwrap());
        let (mut mask, mut expected) = ([9f32; 40], [0f32; 40]);
        assert_eq!(pace_drop_path_mask(PACE_F32, 5, 0.4, 7, tensor(&mut mask)), PACE_OK);
        pace_kernels::noise::drop_path_mask(Key([5, 0]), 0.4, 7, &mut expected).unwrap();
        assert_eq!(mask, expected);
        assert_eq!(pace_drop_path_mask(PACE_F16, 5, 0.4, 7, tensor(&mut mask)), PACE_ERROR_DTYPE);
        assert_eq!(pace_loss_status([0; 9].as_ptr(), 3, 0), PACE_OK);
        assert_eq!(pace_loss_status([1, 2, 9, 0, 0, 0, 0, 0, 0].as_ptr(), 3, 0), PACE_ERROR_LABEL);
        assert_eq!(message(), "`labels[2]` is 9, expected 0..3 or the ignored label");
        assert_eq!(pace_loss_status(null(), 3, 0), PACE_ERROR_ARGUMENT);
    }
}
