//! Plans of all operators over sizes up to the largest: those of `tests/cuda_plan/fuzz.rs`, by the fuzzer's choice.

#![no_main]
// The test uses all of it.
#![allow(dead_code, unused_imports)]

#[path = "../../../tests/cuda_plan/fuzz.rs"]
mod fuzz;

use rand::TryRng;
use std::convert::Infallible;

/// A choice a byte, in the high bits, which a range is taken from; zeros when there are no more.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }
}

impl TryRng for Choices<'_> {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from(self.next()) << 24)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok((0..8).fold(0, |word, _| word << 8 | u64::from(self.next())))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        bytes.fill_with(|| self.next());
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|choices: &[u8]| {
    let mut choices = Choices(choices);
    let (kind, wild) = (choices.next(), choices.next());
    fuzz::an_operator(&mut choices, kind.into(), u32::from(wild) % 64);
});
