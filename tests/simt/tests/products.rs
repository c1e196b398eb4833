//! The simulator notices what is wrong with a product: its fragments, its copies, its barriers and who takes part.

use half::f16;
use pace_simt::{Access, Fault, Launch, Memory, Schedule, Thread};

const SCHEDULES: u64 = 32;
const INNER: usize = 128;
/// Of three stages of two parts.
const SHARED_BYTES: u32 = 3 * 2 * 512;

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..SCHEDULES).map(Schedule::Random).chain([Schedule::InOrder])
}

/// Small whole numbers, whose products a float sums exactly.
fn matrix(seed: usize) -> Vec<i32> {
    (0..16 * INNER).map(|i| ((i + seed) * 37 % 101 % 13) as i32 - 6).collect()
}

/// a times b transposed.
fn product() -> Vec<f32> {
    let (a, b) = (matrix(0), matrix(5));
    let dot = |i: usize, j: usize| -> i32 { (0..INNER).map(|k| a[i * INNER + k] * b[j * INNER + k]).sum() };
    (0..256).map(|i| dot(i / 16, i % 16) as f32).collect()
}

/// What a kernel of `kernels/products.cu` makes of the two.
fn run(kernel: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let mut memory = Memory::new(0);
    let mut input = |name, seed| {
        let bits: Vec<u16> =
            matrix(seed).iter().map(|&value| f16::from_f32(value as f32).to_bits()).collect();
        memory.input(name, &bits)
    };
    let (a, b) = (input("a", 0), input("b", 5));
    let y = memory.output::<f32>("y", 256);
    let params: Vec<u8> =
        [a.address(), b.address(), y.address()].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel,
        grid: [1; 3],
        cluster: [1; 3],
        block: [64, 1, 1],
        shared_bytes: SHARED_BYTES,
        params: &params,
    };
    memory.launch(&launch, schedule)?;
    memory.read(&y)
}

/// In how many random orders a kernel gives wrong results, and whether it does in order.
fn wrong(kernel: &str) -> (u64, bool) {
    let want = product();
    // NaN is wrong, too.
    let is_wrong = |&schedule: &Schedule| run(kernel, schedule).unwrap() != want;
    let random = (0..SCHEDULES).map(Schedule::Random).filter(is_wrong).count() as u64;
    (random, is_wrong(&Schedule::InOrder))
}

fn thread(x: u32) -> Thread {
    Thread { block: [0; 3], thread: [x, 0, 0] }
}

#[test]
fn a_right_product_is_right_in_every_order() {
    assert_eq!(wrong("product"), (0, false));
}

#[test]
fn swapped_rows_of_a_fragment_swap_rows_of_the_result() {
    let want = product();
    let swapped: Vec<f32> = (0..256).map(|i| want[i ^ 16]).collect();
    assert_ne!(swapped, want);
    for schedule in schedules() {
        assert_eq!(run("product_rows_swapped", schedule).unwrap(), swapped);
    }
}

#[test]
fn copies_that_nobody_waits_for_are_missing() {
    assert_eq!(wrong("product_no_wait"), (SCHEDULES, true));
}

#[test]
fn a_missing_barrier_between_copy_and_use_gives_wrong_results() {
    let (random, in_order) = wrong("product_no_barrier_before_use");
    assert!(random > SCHEDULES / 2 && in_order, "{random} random orders, {in_order}");
}

#[test]
fn a_missing_barrier_between_use_and_the_next_copy_gives_results_that_differ() {
    let (random, in_order) = wrong("product_no_barrier_after_use");
    assert!(random > SCHEDULES / 4 && !in_order, "{random} random orders, {in_order}");
}

#[test]
fn shared_memory_that_nobody_wrote_is_not_a_number() {
    // The thread that copies nothing should have brought half of row 1 of a's tiles.
    for schedule in schedules() {
        let got = run("product_chunk_not_copied", schedule).unwrap();
        for (i, (got, want)) in got.iter().zip(product()).enumerate() {
            assert!(if i / 16 == 1 { got.is_nan() } else { *got == want }, "{i}: {got}, not {want}");
        }
    }
}

#[test]
fn a_collective_needs_the_whole_warp() {
    let found = |kernel: &str, schedule| match run(kernel, schedule) {
        Err(Fault::WarpDivergence { waiting, place, mask, other, otherwise }) => {
            assert!(place.starts_with("products.cu:"), "{place}");
            assert_eq!(mask, u32::MAX);
            (waiting, other, place, otherwise)
        }
        other => panic!("{kernel}: not a divergent warp, {other:?}"),
    };
    for schedule in schedules() {
        for (kernel, waiting, leaves) in
            [("product_lane_leaves", 32, 37), ("product_first_lane_leaves", 33, 32)]
        {
            let (waits, other, _, otherwise) = found(kernel, schedule);
            assert_eq!((waits, other, &*otherwise), (thread(waiting), thread(leaves), "has returned"));
        }
        for (kernel, is_same_place) in [("product_other_place", false), ("product_other_operation", true)] {
            let (waits, other, place, otherwise) = found(kernel, schedule);
            assert_eq!((waits, other), (thread(32), thread(37)));
            let elsewhere = otherwise
                .strip_prefix("waits at ")
                .and_then(|rest| rest.strip_suffix(" for another operation of the whole warp"))
                .unwrap_or_else(|| panic!("{otherwise}"));
            assert_eq!(elsewhere == place, is_same_place, "{place}, {elsewhere}");
        }
    }
}

#[test]
fn rows_of_fragments_lie_in_shared_memory_and_are_aligned() {
    for schedule in schedules() {
        let access = |offset| Access { offset, bytes: 16, is_write: false };
        let (thread, tensor) = (thread(40), "shared memory".to_owned());
        let outside =
            Fault::OutOfBounds { thread, access: access(SHARED_BYTES.into()), tensor: tensor.clone() };
        assert_eq!(run("product_out_of_bounds", schedule), Err(outside));
        let misaligned = Fault::Misaligned { thread, access: access(8), tensor };
        assert_eq!(run("product_misaligned", schedule), Err(misaligned));
    }
}
