//! Known answers: of Philox, and of keys, normals, noise and masks, which must never change.

use crate::support::*;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Key, drop_path_mask, normals, philox4x32_10};

/// The three known answers that Random123 ships for philox4x32-10.
#[test]
fn philox_known_answers() {
    let known = [
        ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
        (
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        ),
    ];
    for (counter, key, expected) in known {
        assert_eq!(philox4x32_10(counter, key), expected, "counter {counter:x?}, key {key:x?}");
    }
}

/// An independent implementation agrees on 2²² words: consecutive blocks, across the carries of the counter's words.
#[test]
fn philox_agrees_with_rand_philox() {
    const BLOCKS: usize = 1 << 16;
    let mut random = Words(1);
    for start_high in [0u128, 0xffff_ffff, u128::MAX >> 32, 0x0123_4567_89ab_cdef_0246_8ace] {
        for key in [[0, 0], [0, 1], [u32::MAX; 2], [random.next(), random.next()]] {
            // Starts half the blocks below a carry out of the lowest word.
            let start = (start_high << 32).wrapping_add((1 << 32) - BLOCKS as u128 / 2);
            let mut theirs = vec![0; 4 * BLOCKS];
            rand_philox::Philox::new(key, start).fill_u32(&mut theirs);
            for (block, theirs) in theirs.chunks_exact(4).enumerate() {
                let c = start.wrapping_add(block as u128);
                let counter = [c as u32, (c >> 32) as u32, (c >> 64) as u32, (c >> 96) as u32];
                assert_eq!(philox4x32_10(counter, key), theirs, "counter {counter:x?}, key {key:x?}");
            }
        }
    }
}

const KEYS: [(u64, u64, u32, [u32; 2]); 5] = [
    (0, 0, 0, [0x1c29_b9b5, 0x8124_1429]),
    (1, 2, 3, [0xe816_7543, 0x3f8d_cd11]),
    (42, 0, 11, [0xda3b_94c7, 0x08ea_8d78]),
    (0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 0xdead_beef, [0xedb4_58e1, 0x0e6f_f7e2]),
    (u64::MAX, u64::MAX, u32::MAX, [0x1a99_a8b5, 0xc145_effb]),
];

const NORMALS: [([u32; 4], [u32; 4]); 6] = [
    // u = 1, hence a radius of 0, at angles whose cosine and sine are positive.
    ([u32::MAX, 0x1234_5678, u32::MAX, 1], [0, 0, 0, 0]),
    ([0, 0x1234_5678, 1, 0x9abc_def0], [0x40c0_360f, 0x4038_2f2d, 0xc0a6_3454, 0xc07f_fd3d]),
    (
        [0x1234_5678, 0x5abc_def0, 0xb504_f332, 0xdead_beef],
        [0xbfb3_9380, 0x3fe9_2f38, 0x3f11_be1f, 0xbf1b_840e],
    ),
    (
        [0xb504_f333, 0x1fff_ffff, 0xffff_fffe, 0x2000_0000],
        [0x3f16_b560, 0x3f16_b55e, 0x377f_ffff, 0x377f_ffff],
    ),
    (
        [0x7fff_ffff, 0x5fff_ffff, 0x8000_0000, 0x6000_0001],
        [0xbf55_224b, 0x3f55_224d, 0xbf55_224c, 0x3f55_224c],
    ),
    (
        [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        [0x3f7d_bb31, 0xbf6c_b6b0, 0xbf1e_1b9f, 0xbef6_d1b1],
    ),
];

const ZERO_BC: Address = Address { shape: PerSample, ..ORIGIN };
const ONE_TWO_THREE: Address = Address { seed: 1, step: 2, layer: 3, branch: 1, sample: 12345, ..ORIGIN };

/// Address, σ, channel, bits of z.
const Z: [(Address, f32, u32, u32); 14] = [
    (ZERO_BC, 1.0, 0, 0x3f75_65b0),
    (ZERO_BC, 1.0, 1, 0x3fb9_f459),
    (ZERO_BC, 1.0, 2, 0x3ffd_5268),
    (ZERO_BC, 1.0, 3, 0x3e8b_efa8),
    (ZERO_BC, 1.0, 4, 0x3f45_7b79),
    (Address { branch: 1, ..ZERO_BC }, 1.0, 0, 0x3d8b_23a0),
    (Address { sample: 1, ..ZERO_BC }, 1.0, 0, 0x3fe4_f36f),
    (ORIGIN, 1.0, 0, 0x405e_6b98),
    (Address { token: 1, ..ORIGIN }, 1.0, 0, 0x3d0e_24b0),
    (Address { shape: PerSample, ..ONE_TWO_THREE }, 0.5, 767, 0x3f8d_5de2),
    (Address { token: 196, ..ONE_TWO_THREE }, 0.5, 767, 0x3f9c_99e4),
    (Address { seed: 42, layer: 11, sample: (1 << 32) + 5, token: 7, ..ORIGIN }, 0.25, 3071, 0x3fca_aa59),
    (
        Address {
            seed: 0x0123_4567_89ab_cdef,
            step: 0xfedc_ba98_7654_3210,
            layer: 0xdead_beef,
            branch: 255,
            sample: (1 << 56) - 1,
            ..ZERO_BC
        },
        2.0,
        u32::MAX,
        0x4094_a704,
    ),
    (
        Address {
            seed: u64::MAX,
            step: u64::MAX,
            layer: u32::MAX,
            shape: PerToken,
            branch: 2,
            sample: 0x00ab_cdef_0123_4567,
            token: u32::MAX - 2,
        },
        0.0078125,
        1_000_003,
        0x3f7b_2500,
    ),
];

/// Bit i: whether sample i survives under the key of (1, 2, 3) and a probability of ½.
const MASK: u32 = 0x8125_4796;

/// FNV-1a (64 bits, over little-endian bytes) of the normals of [`calls`].
const CALLS_HASH: u64 = 0x65a0_b7a3_7890_f9c2;

/// Key, normals and z of fixed inputs as bit patterns: a change of the noise changes trained models, so it must not
/// happen unnoticed. `docs/noise.md` lists the same values.
#[test]
fn pinned_values() {
    for (seed, step, layer, key) in KEYS {
        assert_eq!(Key::derive(seed, step, layer).0, key, "seed {seed:#x}, step {step:#x}, layer {layer:#x}");
    }
    for (words, expected) in NORMALS {
        assert_eq!(bits(normals(words)), expected, "words {words:x?}: {:?}", normals(words));
    }
    let hash = calls()
        .into_iter()
        .flat_map(|words| bits(normals(words)))
        .flat_map(u32::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    assert_eq!(hash, CALLS_HASH, "{hash:#x}");
    for (address, sigma, channel, expected) in Z {
        let z = address.z(sigma, channel, 1)[0];
        assert_eq!(
            z.to_bits(),
            expected,
            "{address:?}, σ {sigma}, channel {channel}: {z:?} {:#x}",
            z.to_bits()
        );
    }
    let mut mask = [0f32; 32];
    drop_path_mask(Key::derive(1, 2, 3), 0.5, 0, &mut mask).unwrap();
    let mask = mask.iter().rev().fold(0, |bits, &keep| bits << 1 | keep as u32);
    assert_eq!(mask, MASK, "{mask:#x}");
}
