//! An element's noise depends on its address alone, not on batch splits, windows of channels or the type of the output.

use crate::support::*;
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, drop_path_mask, normals, philox4x32_10};

/// The address → counter map, written out once more: `fill` is `1 + σ·n` of the documented counter, bit for bit.
#[test]
fn fill_is_the_documented_function_of_the_address() {
    const CHANNELS: usize = 515;
    let mut random = Words(3);
    for i in 0..1 << 13 {
        // Every field has small values, large values, and its largest.
        let seed = u64::from(random.next()) << 32 | u64::from(random.next());
        let address = Address {
            seed: [0, u64::MAX, seed][i % 3],
            step: [7, 1 << 40 | seed >> 60][i % 2],
            layer: [i as u32, u32::MAX][i / 2 % 2],
            shape: [PerSample, PerToken][i / 4 % 2],
            branch: [0, 1, 255, random.next() as u8][i / 8 % 4],
            sample: [i as u64, (1 << 56) - 1, seed >> 8, 1 << 32][i / 32 % 4],
            token: [i as u32 % 197, random.next()][i / 128 % 2],
        };
        let first_channel =
            [0, 1, 2, 3, 64, 770, u32::MAX - 4 * CHANNELS as u32, random.next() >> 1][i / 256 % 8];
        let sigma = [1.0, 0.5, 1e-3, 0.0, 2.5][i % 5];

        let key = address.key().0;
        for (i, z) in address.z(sigma, first_channel, CHANNELS).into_iter().enumerate() {
            let channel = first_channel + i as u32;
            let counter = [
                channel / 4,
                if address.shape == PerToken { address.token } else { u32::MAX },
                address.sample as u32,
                (address.sample >> 32) as u32 | u32::from(address.branch) << 24,
            ];
            let n = normals(philox4x32_10(counter, key))[channel as usize % 4];
            let expected = sigma.mul_add(n, 1.0);
            assert_eq!(
                z.to_bits(),
                expected.to_bits(),
                "{address:?}, channel {channel}: {z}, not {expected}"
            );
        }
    }
}

/// One batch of 8 draws what its pieces draw, wherever it is cut.
#[test]
fn batch_splits_do_not_change_the_noise() {
    const BATCH: u64 = 8;
    let key = Key::derive(1, 2, 3);
    let draw = |shape, first_sample, samples: u64| {
        let generator = Generator::new(key, 1.0, shape, first_sample).unwrap();
        let mut z = Vec::new();
        for sample in 0..samples {
            for branch in 0..2 {
                for token in 0..3 {
                    let mut row = [0f32; 37];
                    generator.fill(branch, sample, token, 0, &mut row);
                    z.push(bits(row));
                }
            }
        }
        z
    };
    // The last one crosses from one 32-bit word of the sample number into the next.
    for first_sample in [0, 1000, (1 << 32) - 3] {
        for shape in [PerSample, PerToken] {
            let whole = draw(shape, first_sample, BATCH);
            for cut in 0..=BATCH {
                let mut pieces = draw(shape, first_sample, cut);
                pieces.extend(draw(shape, first_sample + cut, BATCH - cut));
                assert_eq!(pieces, whole, "{shape:?} from {first_sample}, cut at {cut}");
            }
        }
    }
}

/// Any window of channels, aligned to the generator's groups of 4 or not, is that part of the whole row.
#[test]
fn channel_windows_do_not_change_the_noise() {
    for shape in [PerSample, PerToken] {
        for start in [0, 3, 4095, 1 << 20] {
            let address = Address { shape, ..ORIGIN };
            let row = address.z(1.0, start, 300);
            for first in 0..80 {
                for len in (0..80).chain([127, 128, 129, 200]) {
                    let window = address.z(1.0, start + first as u32, len);
                    let same = window.iter().zip(&row[first..]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same && window.len() == len, "{shape:?}: {len} channels from {start} + {first}");
                }
            }
        }
    }
}

#[test]
fn f64_output_holds_the_same_values() {
    let generator = Generator::new(Key::derive(4, 5, 6), 0.7, PerToken, 9).unwrap();
    let (mut single, mut double) = ([0f32; 999], [0f64; 999]);
    generator.fill(1, 2, 3, 5, &mut single);
    generator.fill(1, 2, 3, 5, &mut double);
    assert_eq!(single.map(f64::from).map(f64::to_bits), double.map(f64::to_bits));

    let (mut single, mut double) = ([2f32; 999], [2f64; 999]);
    drop_path_mask(generator.key(), 0.3, 9, &mut single).unwrap();
    drop_path_mask(generator.key(), 0.3, 9, &mut double).unwrap();
    assert_eq!(single.map(f64::from), double);
}

/// BC noise is one draw per sample; BTC noise differs by token. Both differ by every other part of the address.
#[test]
fn which_elements_share_a_draw() {
    let row = |address: Address| address.z(1.0, 0, 64);
    for shape in [PerSample, PerToken] {
        let base = Address { shape, ..ORIGIN };
        for token in [1, 2, 196, 1 << 31, u32::MAX - 2] {
            let same = row(Address { token, ..base }) == row(base);
            assert_eq!(same, shape == PerSample, "{shape:?}, token {token}");
        }
        for other in [
            Address { seed: 1, ..base },
            Address { step: 1, ..base },
            Address { layer: 1, ..base },
            Address { branch: 1, ..base },
            Address { sample: 1, ..base },
            Address { sample: 1 << 32, ..base },
        ] {
            assert!(row(other).iter().zip(row(base)).all(|(a, b)| *a != b), "{other:?}");
        }
    }
    assert_ne!(row(Address { shape: PerSample, ..ORIGIN }), row(ORIGIN));
}
