//! What the tests share: structs that are zero but for their size, tensors, messages and random numbers.

use pace_kernels::capi::*;
use pace_kernels::noise::{Generator, Key, NoiseShape};
use std::ffi::CStr;
use std::mem::{MaybeUninit, size_of};

/// A struct that is all zeros but for its size.
pub fn zeroed<A: Copy>() -> A {
    // SAFETY: the structs of the interface are numbers and raw pointers.
    let mut args: A = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: each begins with its size.
    unsafe { (&raw mut args).cast::<u64>().write(size_of::<A>() as u64) };
    args
}

pub fn tensor<T>(values: &mut [T]) -> PaceTensor {
    PaceTensor { data: values.as_mut_ptr().cast(), len: values.len() as u64 }
}

pub fn message() -> String {
    // SAFETY: the library gives a string that lives until the next error.
    unsafe { CStr::from_ptr(pace_last_error()) }.to_str().unwrap().to_owned()
}

pub fn name(status: PaceStatus) -> String {
    // SAFETY: a constant string.
    unsafe { CStr::from_ptr(pace_status_name(status)) }.to_str().unwrap().to_owned()
}

/// Numbers in [-1, 1) and choices among a few, from a seed.
pub struct Random {
    state: u64,
    /// What a fuzzer that looks at coverage chose, from the last to the first; the seed has the rest.
    chosen: Vec<u8>,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self::led_by(&[], seed)
    }

    pub fn led_by(choices: &[u8], seed: u64) -> Self {
        Self { state: seed, chosen: choices.iter().rev().copied().collect() }
    }

    pub fn next(&mut self) -> u64 {
        if let Some(start) = self.chosen.len().checked_sub(8) {
            return self.chosen.drain(start..).rev().fold(0, |word, byte| word << 8 | u64::from(byte));
        }
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        let chosen = if n <= 256 { self.chosen.pop().map(u64::from) } else { None };
        chosen.unwrap_or_else(|| self.next()) % n
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

pub const fn shape() -> PaceShape {
    PaceShape { branches: 2, batch: 2, tokens: 3, in_features: 5, out_features: 4, shared_input: 1 }
}

pub fn noise() -> PaceNoise {
    let (kind, key) = (PACE_NOISE_GENERATED, pace_key(1, 2, 3));
    PaceNoise { kind, key, sigma: 0.5, first_sample: 6, ..zeroed_noise() }
}

pub fn zeroed_noise() -> PaceNoise {
    // SAFETY: numbers and raw pointers.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

pub fn generator() -> Generator {
    Generator::new(Key::derive(1, 2, 3), 0.5, NoiseShape::PerSample, 6).unwrap()
}
