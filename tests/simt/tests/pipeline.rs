//! A warp-specialised GEMM gives the right numbers in every order, and what is wrong with its like is found.

use bytemuck::{Pod, Zeroable};
use half::bf16;
use pace_simt::{BarrierState, Fault, Launch, Memory, Schedule, TensorMap};

const SCHEDULES: u64 = 64;
const STEPS: usize = 5;
const TILES: usize = 3;
const INNER: usize = 64 * STEPS;
/// The last rows of the last tile lie outside.
const ROWS: usize = 64 * TILES - 7;
const BOX: u32 = 64 * 128;
const SHARED_BYTES: u32 = 7 * BOX + 48;
/// Shared address of the first of three full barriers; three empty ones follow.
const FULL: u32 = 1024 + 7 * BOX;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    a: TensorMap,
    b: TensorMap,
    d: TensorMap,
    steps: u32,
    tiles: u32,
    padding: [u32; 14],
}

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..SCHEDULES).map(Schedule::Random).chain([Schedule::InOrder])
}

/// Small whole numbers: sums of products are exact, and results are rounded once.
fn matrix(rows: usize, seed: usize) -> Vec<i32> {
    (0..rows * INNER).map(|i| ((i + seed) * 37 % 101 % 13) as i32 - 6).collect()
}

fn product() -> Vec<u16> {
    let (a, b) = (matrix(ROWS, 0), matrix(64, 5));
    let dot = |i: usize, j: usize| -> i32 { (0..INNER).map(|k| a[i * INNER + k] * b[j * INNER + k]).sum() };
    (0..ROWS * 64).map(|i| bf16::from_f32(dot(i / 64, i % 64) as f32).to_bits()).collect()
}

/// A row-major bf16 matrix in boxes of 64 by 64.
fn map(address: u64, rows: usize, columns: usize) -> TensorMap {
    TensorMap {
        address,
        dims: [columns as u64, rows as u64, 1, 0, 0],
        strides: [2 * columns as u64, 2 * (columns * rows) as u64, 0, 0],
        box_dims: [64, 64, 1, 0, 0],
        swizzle: 128,
        rank: 3,
        element_bytes: 2,
        reserved: [0; 4],
    }
}

fn run_with(kernel: &str, schedule: Schedule, change: impl Fn(&mut Params)) -> Result<Vec<u16>, Fault> {
    let mut memory = Memory::new(0);
    let mut input = |name, rows, seed| {
        let bits: Vec<u16> =
            matrix(rows, seed).iter().map(|&value| bf16::from_f32(value as f32).to_bits()).collect();
        map(memory.input(name, &bits).address(), rows, INNER)
    };
    let (a, b) = (input("a", ROWS, 0), input("b", 64, 5));
    let d = memory.output::<u16>("d", ROWS * 64);
    let mut params = Params {
        a,
        b,
        d: map(d.address(), ROWS, 64),
        steps: STEPS as u32,
        tiles: TILES as u32,
        padding: [0; 14],
    };
    change(&mut params);
    let launch = Launch {
        kernel,
        grid: [2, 1, 1],
        cluster: [1; 3],
        block: [256, 1, 1],
        shared_bytes: SHARED_BYTES,
        params: bytemuck::bytes_of(&params),
    };
    memory.launch(&launch, schedule)?;
    memory.read(&d)
}

fn run(kernel: &str, schedule: Schedule) -> Result<Vec<u16>, Fault> {
    run_with(kernel, schedule, |_| {})
}

/// The faults of a kernel that has one in every order.
fn faults(kernel: &str) -> impl Iterator<Item = Fault> {
    (0..8).map(Schedule::Random).chain([Schedule::InOrder]).map(move |schedule| {
        run(kernel, schedule).err().unwrap_or_else(|| panic!("{kernel} is right in {schedule:?}"))
    })
}

/// In how many random orders a kernel gives wrong results or a fault.
fn wrong(kernel: &str) -> u64 {
    let want = Ok(product());
    (0..SCHEDULES).filter(|&seed| run(kernel, Schedule::Random(seed)) != want).count() as u64
}

#[test]
fn a_right_pipeline_is_right_in_every_order() {
    let want = product();
    for kernel in ["pipeline", "pipeline_a_shared"] {
        for schedule in schedules() {
            let got = run(kernel, schedule).unwrap_or_else(|fault| panic!("{kernel}, {schedule:?}: {fault}"));
            assert!(got == want, "{kernel}, {schedule:?}");
        }
    }
}

#[test]
fn a_wrong_byte_count_hangs_and_names_the_barrier() {
    for fault in faults("pipeline_wrong_bytes") {
        let text = fault.to_string();
        let Fault::Hang(waits) = fault else { panic!("{text}") };
        // Step 4 is the second use of stage 1.
        let want = BarrierState { address: FULL + 8, phase: 1, arrivals: 0, bytes: 16 };
        let consumers = waits.iter().find(|waiting| waiting.barrier == Some(want)).expect(&text);
        assert_eq!((consumers.threads, consumers.first.thread), (128, [128, 0, 0]), "{text}");
        assert!(text.contains("mbarrier at 0xe408 in pipeline.cu:"), "{text}");
    }
}

#[test]
fn a_stage_that_nobody_releases_hangs_at_its_empty_barrier() {
    for fault in faults("pipeline_no_release") {
        let Fault::Hang(waits) = &fault else { panic!("{fault}") };
        let empty = waits.iter().find_map(|waiting| {
            waiting.barrier.filter(|barrier| barrier.address == FULL + 24 && barrier.arrivals == 4)
        });
        assert!(empty.is_some(), "{fault}");
    }
}

#[test]
fn registers_that_a_wgmma_still_uses_are_not_touched() {
    let check = |kernel: &str, changed: &str| {
        for fault in faults(kernel) {
            let Fault::RegistersInFlight { thread, place, registers } = &fault else {
                panic!("{kernel}: {fault}")
            };
            assert!(place.starts_with("pipeline.cu:") && *registers == changed, "{fault}");
            assert_eq!(thread.thread, [128, 0, 0]);
        }
    };
    check("pipeline_weak_wait", "A registers");
    check("pipeline_written_in_flight", "accumulators");
    assert_eq!(wrong("pipeline_read_in_flight"), SCHEDULES);
    // A wait does not cover what no group has.
    assert_eq!(wrong("pipeline_not_committed"), SCHEDULES);
    for fault in faults("pipeline_overlapping") {
        let is_found = matches!(&fault, Fault::Instruction { why, .. } if why.contains("overlap"));
        assert!(is_found, "{fault}");
    }
}

#[test]
fn wgmma_needs_fences_where_registers_were_touched() {
    for (kernel, touched) in [
        ("pipeline_no_wgmma_fence", "A registers"),
        ("pipeline_no_fence_at_all", "registers"),
        ("pipeline_accumulator_touched", "accumulators"),
    ] {
        for fault in faults(kernel) {
            let is_found =
                matches!(&fault, Fault::MissingWgmmaFence { registers, .. } if *registers == touched);
            assert!(is_found, "{kernel}: {fault}");
        }
    }
}

#[test]
fn a_store_needs_a_fence_after_what_threads_wrote() {
    for fault in faults("pipeline_no_fence_before_store") {
        let Fault::MissingProxyFence { thread, address, writer, .. } = &fault else { panic!("{fault}") };
        assert_eq!((thread.thread, *address), ([128, 0, 0], 1024 + 6 * BOX), "{fault}");
        assert!(writer.is_some_and(|writer| writer.thread[0] >= 128), "{fault}");
    }
}

#[test]
fn races_show_in_some_orders() {
    // Not in all: these need the other side to be quick, or slow.
    for kernel in ["pipeline_early_release", "pipeline_staging_reused"] {
        let count = wrong(kernel);
        assert!(count > 0, "{kernel}: {count}");
    }
    for kernel in ["pipeline_wrong_parity", "pipeline_wrong_swizzle"] {
        assert_eq!(wrong(kernel), SCHEDULES, "{kernel}");
    }
}

#[test]
fn mbarriers_are_used_as_they_have_to_be() {
    for (kernel, what) in [
        ("pipeline_no_fence_barriers", "without fence_barriers"),
        ("pipeline_no_init", "used before it is initialised"),
        ("pipeline_too_many_arrivals", "too many arrivals in phase 0"),
        ("pipeline_overwritten_barrier", "overwritten by data"),
    ] {
        for fault in faults(kernel) {
            assert!(matches!(&fault, Fault::Mbarrier { why, .. } if why.contains(what)), "{kernel}: {fault}");
        }
    }
}

#[test]
fn warpgroups_stay_together() {
    for (kernel, what) in [
        ("pipeline_one_warp_leaves", "has returned"),
        ("pipeline_other_descriptor", "brings other descriptors or flags"),
    ] {
        for fault in faults(kernel) {
            let Fault::WarpgroupDivergence { waiting, other, otherwise, .. } = &fault else {
                panic!("{fault}")
            };
            assert_eq!((waiting.thread, other.thread, &**otherwise), ([128, 0, 0], [160, 0, 0], what));
        }
    }
}

#[test]
fn nobody_returns_before_the_end() {
    for (kernel, what) in [
        ("pipeline_store_not_awaited", "before its stores have read shared memory"),
        ("pipeline_wgmma_not_awaited", "was waited for"),
    ] {
        for fault in faults(kernel) {
            assert!(
                matches!(&fault, Fault::EndedEarly { why, .. } if why.contains(what)),
                "{kernel}: {fault}"
            );
        }
    }
}

#[test]
fn boxes_and_maps_are_what_the_hardware_takes() {
    for fault in faults("pipeline_misaligned") {
        let is_found =
            matches!(&fault, Fault::Instruction { why, .. } if why.contains("no multiple of 1024"));
        assert!(is_found, "{fault}");
    }
    for (change, what) in [
        ((|map| map.rank = 2) as fn(&mut TensorMap), "rank 2"),
        (|map| map.address += 8, "no multiple of 16"),
        (|map| map.dims[1] = 0, "dimension of 0"),
        (|map| map.strides[0] += 8, "stride of"),
        (|map| map.box_dims[1] = 257, "257 elements"),
        (|map| map.box_dims[0] = 72, "rows of 144 bytes"),
        (|map| map.swizzle = 16, "no tensor map"),
    ] {
        let fault = run_with("pipeline", Schedule::InOrder, |params| change(&mut params.a)).unwrap_err();
        assert!(matches!(&fault, Fault::Instruction { why, .. } if why.contains(what)), "{fault}");
    }
    // Rows beyond the tensor's end are read as what they would be in memory: not there.
    let fault = run_with("pipeline", Schedule::InOrder, |params| params.a.dims[1] += 1).unwrap_err();
    assert!(matches!(&fault, Fault::OutOfBounds { tensor, .. } if tensor == "a"), "{fault}");
    let swap = |params: &mut Params| params.d.address = params.b.address;
    let fault = run_with("pipeline", Schedule::InOrder, swap).unwrap_err();
    assert!(matches!(&fault, Fault::OutOfBounds { .. } | Fault::WriteToInput { .. }), "{fault}");
}

#[test]
fn pairs_of_blocks_that_share_an_operand_are_right_in_every_order() {
    const ROWS: usize = 3 * 256 - 33;
    let (a, b) = (matrix(ROWS, 3), matrix(64, 5));
    let bits = |values: &[i32]| -> Vec<u16> {
        values.iter().map(|&value| bf16::from_f32(value as f32).to_bits()).collect()
    };
    let dot = |i: usize, j: usize| -> i32 { (0..INNER).map(|k| a[i * INNER + k] * b[j * INNER + k]).sum() };
    let want = bits(&(0..ROWS * 64).map(|i| dot(i / 64, i % 64)).collect::<Vec<_>>());
    for schedule in schedules() {
        let mut memory = Memory::new(0);
        let d = memory.output::<u16>("d", ROWS * 64);
        let mut params = Params {
            a: map(memory.input("a", &bits(&a)).address(), ROWS, INNER),
            b: map(memory.input("b", &bits(&b)).address(), 64, INNER),
            d: map(d.address(), ROWS, 64),
            steps: STEPS as u32,
            tiles: 3,
            padding: [0; 14],
        };
        params.b.box_dims[1] = 32;
        let launch = Launch {
            kernel: "pair_pipeline",
            grid: [4, 1, 1],
            cluster: [2, 1, 1],
            block: [384, 1, 1],
            shared_bytes: 8 * BOX + 32,
            params: bytemuck::bytes_of(&params),
        };
        memory.launch(&launch, schedule).unwrap_or_else(|fault| panic!("{schedule:?}: {fault}"));
        assert!(memory.read::<u16>(&d).unwrap() == want, "{schedule:?}");
    }
}
