//! Whatever is in the structs, a call gives a status and a message.

use crate::calls::*;
use crate::support::*;
use pace_kernels::capi::*;
use std::mem::offset_of;
use std::ptr::{null, null_mut};

/// The size that the struct of an operator had in version 1, if it has grown since.
fn first_size(operator: &str) -> Option<u64> {
    match operator {
        "pace_loss" => Some(184),
        "pace_lm_head" | "pace_lm_head_gram" => Some(344),
        _ => None,
    }
}

#[test]
fn null_misaligned_and_foreign_structs_are_refused() {
    for (what, operator, size, _) in OPERATORS {
        let mut words = vec![0u64; 1024];
        let call = |args: *const u8| {
            // SAFETY: null, misaligned, or as many bytes as the first word says: the buffer has 8192.
            unsafe { operator(null(), null_mut(), args) }
        };
        assert_eq!(call(null()), PACE_ERROR_ARGUMENT, "{what}");
        assert!(message().contains("`args` is a null pointer"), "{what}: {}", message());
        words[1] = size as u64;
        assert_eq!(call(words.as_ptr().cast::<u8>().wrapping_add(4)), PACE_ERROR_ARGUMENT, "{what}");
        let first = first_size(what).unwrap_or(size as u64);
        for wrong in [0, 8, first - 8, first + 4, 4097, u64::MAX] {
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
        // On the CPU layers take `bf16`.
        let bf16 = (!what.contains("linear")).then_some(PACE_BF16);
        for dtype in [PACE_F16, 4, u32::MAX].into_iter().chain(bf16) {
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

/// Callers of the first version pass structs that end earlier; what lies behind them in memory is not read.
#[test]
fn structs_of_the_first_version_are_taken() {
    let mut arena = Arena::new(160);
    let mut seen = 0;
    for mut case in cases(&mut arena, SIZES) {
        let name = OPERATORS[case.operator].0;
        let Some(first) = first_size(name) else { continue };
        // The first version's loss had labels and nothing else.
        if name == "pace_loss" && !case.absent.contains(&(offset_of!(PaceLoss, targets) / 8)) {
            continue;
        }
        case.words[0] = first;
        case.words[first as usize / 8..].fill(u64::MAX);
        assert_eq!(call(&case, &case.words), PACE_OK, "{name}: {}", message());
        seen += 1;
    }
    assert_eq!(seen, 3);
}

#[test]
fn whatever_is_in_the_structs_there_is_a_status_and_a_message() {
    let mut arena = Arena::new(160);
    let cases = cases(&mut arena, SIZES);
    assert!(OPERATORS.iter().enumerate().all(|(i, _)| cases.iter().any(|case| case.operator == i)));
    let before = arena.memory.clone();
    let mut random = Random::new(11);
    let mut seen = std::collections::BTreeMap::<PaceStatus, usize>::new();
    for case in &cases {
        assert_eq!(call(case, &case.words), PACE_OK, "{}: {}", OPERATORS[case.operator].0, message());
        arena.memory.copy_from_slice(&before);
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
            assert!(
                status == PACE_OK || arena.memory == before,
                "{} wrote before it refused: {}",
                OPERATORS[case.operator].0,
                message()
            );
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

#[test]
fn sizes_and_noise_of_a_layer_are_refused_before_its_tensors() {
    let mut arena = Arena::new(160);
    let layers =
        cases(&mut arena, SIZES).into_iter().filter(|case| OPERATORS[case.operator].0.contains("linear"));
    let tensors = offset_of!(PaceNoisyLinear, base_weight) / 8;
    let reserved = (offset_of!(PaceNoisyLinear, noise) + offset_of!(PaceNoise, reserved)) / 8;
    let shared_input = (offset_of!(PaceNoisyLinear, shape) + offset_of!(PaceShape, shared_input)) / 8;
    let mut layers_seen = 0;
    for case in layers {
        for at in [reserved, shared_input] {
            let mut words = case.words.clone();
            words[at] |= 2 << 32;
            for word in &mut words[tensors..] {
                *word = if arena.holds(*word) { 0 } else { *word };
            }
            assert_eq!(
                call(&case, &words),
                PACE_ERROR_VALUE,
                "{}: {}",
                OPERATORS[case.operator].0,
                message()
            );
        }
        layers_seen += 1;
    }
    assert_eq!(layers_seen, 6);
}

/// Whether a word is the length of the tensor before it, which may not grow beyond its area.
fn is_length(words: &[u64], at: usize, arena: &Arena) -> bool {
    at > 0 && arena.holds(words[at - 1])
}

#[test]
fn overlap_is_refused() {
    let mut arena = Arena::new(160);
    let case = cases(&mut arena, SIZES).swap_remove(1);
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
