//! The transform of words into normals by the vector instructions that the processor has.

use crate::support::*;
use pace_kernels::noise::normals;

/// The transform of many calls, for the compiler to vectorise at the caller's instruction set.
#[inline(always)]
fn normals_loop(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    for (words, out) in words.iter().zip(out) {
        *out = normals(*words);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512cd,avx512dq,avx512bw,avx512vl,avx2,fma")]
fn normals_avx512(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    normals_loop(words, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,lzcnt")]
fn normals_avx2(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    normals_loop(words, out);
}

/// A way to compute many calls.
pub type Transform = fn(&[[u32; 4]], &mut [[f32; 4]]);

/// The ways that this machine has, the narrowest first.
pub fn paths() -> Vec<(&'static str, Transform)> {
    let mut paths: Vec<(&'static str, Transform)> = vec![("portable", |words, out| normals_loop(words, out))];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("lzcnt")
        {
            // SAFETY: the processor has every feature that the function enables.
            paths.push(("AVX2", |words, out| unsafe { normals_avx2(words, out) }));
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
        {
            // SAFETY: the processor has every feature that the function enables (AVX-512 includes AVX2).
            paths.push(("AVX-512", |words, out| unsafe { normals_avx512(words, out) }));
        }
    }
    paths
}

/// The transform of many calls by the widest vectors.
pub fn normals_into(words: &[[u32; 4]], out: &mut [[f32; 4]]) {
    paths().last().unwrap().1(words, out);
}

/// Vectorised or not, the transform gives the same bits: random words and every pair of edge words.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    let words = calls();
    let paths = paths();
    let mut expected = vec![[0.0; 4]; words.len()];
    paths[0].1(&words, &mut expected);
    for (name, path) in &paths[1..] {
        let mut got = vec![[0.0; 4]; words.len()];
        path(&words, &mut got);
        for ((words, expected), got) in words.iter().zip(&expected).zip(&got) {
            assert_eq!(bits(*got), bits(*expected), "{name} at {words:x?}: {got:?}, portable {expected:?}");
        }
    }
    println!("{} calls by {:?}", words.len(), paths.iter().map(|p| p.0).collect::<Vec<_>>());
}
