//! What is tested: the noise of the library at an address, and generators that are like it but for one fault.

use pace_kernels::noise::{normals, philox4x32_10};

/// Where one Philox call, four channels, is used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Address {
    pub seed: u64,
    pub step: u64,
    pub layer: u32,
    pub branch: u32,
    pub sample: u64,
    pub token: u32,
    /// `channel / 4`, below 2³⁰.
    pub group: u32,
}

/// The parts of the noise. What a generator does not say is the library's.
///
/// `key` and `counter` write the library's functions again, because those are not inlined into vector loops; a test
/// compares them.
pub trait Generator {
    /// Whether its streams are long, so that compiling for wide vectors pays.
    const IS_LONG: bool = false;

    #[inline(always)]
    fn words(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        philox4x32_10(counter, key)
    }

    #[inline(always)]
    fn key(seed: u64, step: u64, layer: u32) -> [u32; 2] {
        let counter = [step as u32, (step >> 32) as u32, layer, 0x5041_4345];
        let [first, second, ..] = philox4x32_10(counter, [seed as u32, (seed >> 32) as u32]);
        [first, second]
    }

    #[inline(always)]
    fn counter(a: Address) -> [u32; 4] {
        [a.group, a.token, a.sample as u32, (a.sample >> 32) as u32 & 0x00FF_FFFF | a.branch << 24]
    }

    #[inline(always)]
    fn normals(words: [u32; 4]) -> [f32; 4] {
        normals(words)
    }

    #[inline(always)]
    fn at(a: Address) -> [u32; 4] {
        Self::words(Self::counter(a), Self::key(a.seed, a.step, a.layer))
    }
}

/// The library's noise.
pub struct Library;

impl Generator for Library {
    const IS_LONG: bool = true;
}
