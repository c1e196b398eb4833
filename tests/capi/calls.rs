//! A right call of every operator, as words that can be replaced, over memory of the test's own.

use crate::support::*;
use pace_kernels::capi::*;
use std::ffi::c_void;
use std::mem::{offset_of, size_of};
use std::ptr::{null, null_mut};

/// Every operator under one signature, with its name, and the size and the name of its struct.
pub type Operator = unsafe extern "C" fn(*const PaceDevice, *mut c_void, *const u8) -> PaceStatus;

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
            stringify!($args),
        ),)*]
    };
}

pub const OPERATORS: [(&str, Operator, usize, &str); 22] = operators! {
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
    pace_lm_head: PaceLmHead,
    pace_lm_head_gram: PaceLmHead,
    pace_drop_path_forward: PaceDropPath,
    pace_drop_path_backward: PaceDropPath,
    pace_grad_norm: PaceGradNorm,
    pace_fp_distance: PaceFpDistance,
};

/// A right call of every operator, as bytes, over memory of the test's own; and where in it are pointers.
pub struct Case {
    pub operator: usize,
    pub words: Vec<u64>,
    /// Words that are pointers and null: the fuzzer leaves them.
    pub absent: Vec<usize>,
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
pub struct Arena {
    pub memory: Vec<u64>,
    used: usize,
}

/// Bytes of an area: the largest length that the fuzzer asks for, of the widest type.
pub const AREA: usize = 4096;

impl Arena {
    pub fn new(areas: usize) -> Self {
        let mut random = Random::new(3);
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
    pub fn holds(&self, word: u64) -> bool {
        let memory = self.memory.as_ptr_range();
        (memory.start as u64..memory.end as u64).contains(&word)
    }

    /// Numbers from 0 to 1, whichever way they are read.
    fn probabilities(&mut self, len: u64) -> PaceTensor {
        let tensor = self.tensor(len);
        let start = self.used - AREA / 8;
        self.memory[start..self.used].fill(0x3e80_0000_3e80_0000);
        tensor
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

const ABSENT: PaceTensor = PaceTensor { data: std::ptr::null_mut(), len: 0 };

/// Sizes of right calls; tensors of that many elements fit an area.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub shape: PaceShape,
    pub rank: u64,
    pub prompt_rank: u64,
    /// Samples of a loss, tokens of a head.
    pub samples: u64,
    /// At least as many as samples: these are the labels.
    pub classes: u64,
    pub features: u64,
}

pub const SIZES: Sizes =
    Sizes { shape: shape(), rank: 2, prompt_rank: 2, samples: 3, classes: 7, features: 5 };

/// They take the place of those that were made before in this memory.
pub fn cases(arena: &mut Arena, sizes: Sizes) -> Vec<Case> {
    let Sizes { shape, rank: r, prompt_rank: p, samples: b, classes: c, features: h } = sizes;
    let (n, k, samples) = (shape.out_features, shape.in_features, shape.branches * shape.batch);
    let m = samples * shape.tokens;
    let in_rows = if shape.shared_input == 1 { shape.batch * shape.tokens } else { m };
    arena.used = 0;
    // Zeros, for a list of tensors that may get longer.
    let list = arena.tensor(0);
    let spare = arena.tensor(0);
    assert_eq!(list.data as usize + AREA, spare.data as usize);
    arena.memory[..2 * AREA / 8].fill(0);
    let noise =
        PaceNoise { key_address: arena.tensor(1).data.cast(), z: arena.tensor(samples * n), ..noise() };
    let workspace = arena.tensor(0);
    let layer = PaceNoisyLinear {
        shape,
        noise,
        workspace,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        delta_weight: arena.tensor(n * k),
        delta_bias: arena.tensor(n),
        x: arena.tensor(in_rows * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(in_rows * k),
        grad_delta_weight: arena.tensor(n * k),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let low_rank = PaceLowRankLinear {
        shape,
        noise: PaceNoise { kind: PACE_NOISE_GIVEN, ..noise },
        s: arena.tensor(in_rows * r),
        workspace,
        rank: r,
        scale: 1.0,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        lora_b: arena.tensor(n * r),
        lora_a: arena.tensor(r * k),
        delta_bias: arena.tensor(n),
        x: arena.tensor(in_rows * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(in_rows * k),
        grad_lora_b: arena.tensor(n * r),
        grad_lora_a: arena.tensor(r * k),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let lora_mul = PaceLoraMulLinear {
        shape,
        noise,
        workspace,
        rank: r,
        prompt_rank: p,
        scale: 1.0,
        base_weight: arena.tensor(n * k),
        base_bias: arena.tensor(n),
        lora_a: arena.tensor(r * k),
        lora_b: arena.tensor(n * r),
        prompt_down: arena.tensor(k * p),
        prompt_up: arena.tensor(p),
        delta_bias: arena.tensor(n),
        x: arena.tensor(in_rows * k),
        y: arena.tensor(m * n),
        dy: arena.tensor(m * n),
        grad_input: arena.tensor(in_rows * k),
        grad_lora_a: arena.tensor(r * k),
        grad_lora_b: arena.tensor(n * r),
        grad_prompt_down: arena.tensor(k * p),
        grad_prompt_up: arena.tensor(p),
        grad_delta_bias: arena.tensor(n),
        ..zeroed()
    };
    let epilogue = PaceNoisyEpilogue {
        shape,
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
        classes: c,
        lambda: 0.5,
        logits: arena.tensor(b * c),
        labels: arena.integers(b),
        history: arena.tensor((b + 2) * c),
        index: arena.integers(b),
        gradient: arena.tensor(b * c),
        values: arena.tensor(3),
        status: arena.tensor(9),
        workspace,
        ..zeroed()
    };
    let divergence = PaceLoss {
        consistency: PACE_CONSISTENCY_TWO_BRANCH,
        divergence: PACE_DIVERGENCE_KL,
        targets_kind: PACE_TARGETS_PROBABILITIES,
        flags: PACE_LOSS_BOTH_BRANCHES | PACE_LOSS_DETACH_TARGET,
        temperature: 2.0,
        denominator: 5.0,
        logits: arena.tensor(2 * b * c),
        labels: ABSENT,
        targets: arena.probabilities(b * c),
        class_weights: arena.probabilities(c),
        history: ABSENT,
        index: ABSENT,
        gradient: arena.tensor(2 * b * c),
        ..loss
    };
    let lm_head = PaceLmHead {
        divergence: PACE_DIVERGENCE_CENTERED_SQUARED_DIFFERENCE,
        hidden_size: h,
        classes: c,
        branches: 2,
        rank: r,
        chunk_rows: 2,
        lambda: 0.5,
        logit_scale: 1.0,
        scale: 1.0,
        hidden: arena.tensor(2 * b * h),
        labels: arena.integers(b),
        weight: arena.tensor(c * h),
        bias: arena.tensor(c),
        lora_b: arena.tensor(c * r),
        lora_a: arena.tensor(r * h),
        gram: arena.tensor(h * h),
        grad_hidden: arena.tensor(2 * b * h),
        grad_weight: arena.tensor(c * h),
        grad_bias: arena.tensor(c),
        grad_lora_b: arena.tensor(c * r),
        grad_lora_a: arena.tensor(r * h),
        values: arena.tensor(3),
        class_weights: arena.probabilities(c),
        gemm_flags: PACE_ALLOW_TF32,
        ..zeroed()
    };
    let drop_path = PaceDropPath {
        branches: 2,
        batch: b,
        features: h,
        key: 1,
        key_address: arena.tensor(1).data.cast(),
        drop_probability: 0.3,
        x: arena.tensor(2 * b * h),
        y: arena.tensor(2 * b * h),
        dy: arena.tensor(2 * b * h),
        dx: arena.tensor(2 * b * h),
        ..zeroed()
    };
    let gradients = [arena.tensor(9), arena.tensor(0), arena.tensor(4)];
    // SAFETY: an area has room for three tensors and is aligned to 8.
    unsafe { list.data.cast::<[PaceTensor; 3]>().write(gradients) };
    let norm =
        PaceGradNorm { gradients: list.data.cast(), count: 3, norm: arena.tensor(1), workspace, ..zeroed() };
    let distance = PaceFpDistance {
        samples: b,
        features: h,
        fine_tuned: arena.tensor(b * h),
        pre_trained: arena.tensor(b * h),
        distance: arena.tensor(1),
        workspace,
        ..zeroed()
    };
    let merge = PaceMerge { target: arena.tensor(9), delta: arena.tensor(9), ..zeroed() };
    let fill = PaceNoiseFill { shape, noise, z: arena.tensor(samples * n), ..zeroed() };
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
        words("pace_loss", divergence).absent(&[
            offset_of!(PaceLoss, labels),
            offset_of!(PaceLoss, history),
            offset_of!(PaceLoss, index),
        ]),
        words("pace_lm_head", lm_head),
        words("pace_lm_head_gram", lm_head),
        words("pace_loss", loss)
            .absent(&[offset_of!(PaceLoss, targets), offset_of!(PaceLoss, class_weights)]),
        words("pace_drop_path_forward", drop_path).absent(&[offset_of!(PaceDropPath, mask)]),
        words("pace_drop_path_backward", drop_path).absent(&[offset_of!(PaceDropPath, mask)]),
        words("pace_grad_norm", norm),
        words("pace_fp_distance", distance),
    ]
}

pub fn call(case: &Case, words: &[u64]) -> PaceStatus {
    // SAFETY: pointers are null, misaligned inside an area, or an area, which is larger than any length that is passed with it.
    unsafe { OPERATORS[case.operator].1(null(), null_mut(), words.as_ptr().cast()) }
}
