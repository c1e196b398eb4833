//! The masks of DropPath: whatever the split of a batch, and as often as their probability says.

use crate::support::*;
use pace_kernels::noise::{Key, drop_path_mask};

#[test]
fn drop_path_masks_do_not_depend_on_the_split() {
    let key = Key::derive(1, 2, 3);
    for first_sample in [0, 77, (1 << 32) - 3] {
        let mut whole = [2f32; 16];
        drop_path_mask(key, 0.5, first_sample, &mut whole).unwrap();
        for cut in 0..=16 {
            let mut pieces = [2f32; 16];
            let (left, right) = pieces.split_at_mut(cut);
            drop_path_mask(key, 0.5, first_sample, left).unwrap();
            drop_path_mask(key, 0.5, first_sample + cut as u64, right).unwrap();
            assert_eq!(pieces, whole, "from {first_sample}, cut at {cut}");
        }
    }
}

/// The frequency of survivors, and of pairs of survivors of neighbouring samples, steps, layers and seeds.
#[test]
fn drop_path_frequency_is_one_minus_the_probability() {
    const SAMPLES: usize = 1 << 21;
    let draw = |key, probability| {
        let mut mask = vec![2f32; SAMPLES];
        drop_path_mask(key, probability, 0, &mut mask).unwrap();
        assert!(mask.iter().all(|&keep| keep == 0.0 || keep == 1.0));
        mask
    };
    assert!(draw(Key::derive(0, 0, 0), 0.0).iter().all(|&keep| keep == 1.0));
    for probability in [1e-4, 0.1, 0.25, 0.5, 0.9, 0.9999] {
        let keep = 1.0 - probability;
        let mask = draw(Key::derive(5, 6, 7), probability);
        let survivors = mask.iter().sum::<f32>();
        let what = format!("survivors, p = {probability}");
        check_count(&what, survivors.into(), SAMPLES as f64, keep);
        println!("{what}: {survivors} of {SAMPLES}, expected {:.1}", keep * SAMPLES as f64);

        let mut shifted = mask.clone();
        shifted.rotate_left(1);
        let neighbours = [
            ("samples", shifted),
            ("seeds", draw(Key::derive(6, 6, 7), probability)),
            ("steps", draw(Key::derive(5, 7, 7), probability)),
            ("layers", draw(Key::derive(5, 6, 8), probability)),
        ];
        for (name, other) in neighbours {
            // Each pair of neighbouring samples overlaps the next; every other pair is disjoint from the rest.
            let step = if name == "samples" { 2 } else { 1 };
            let pairs = SAMPLES / step;
            let both: f32 = mask.iter().zip(other).step_by(step).map(|(a, b)| a * b).sum();
            let what = format!("both of two {name}, p = {probability}");
            check_count(&what, both.into(), pairs as f64, keep * keep);
            println!("{what}: {both} of {pairs}, expected {:.1}", keep * keep * pairs as f64);
        }
    }
}
