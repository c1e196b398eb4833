//! The simulator runs right kernels right, and notices what is wrong with the others.

use pace_simt::{Access, Fault, Launch, Memory, Schedule, Tensor, Thread};

/// Enough to meet every order of a small launch that matters.
const SCHEDULES: u64 = 32;

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..SCHEDULES).map(Schedule::Random).chain([Schedule::InOrder])
}

/// Runs a kernel of `kernels/faults.cu` on `x = 1, 2, …, n` and an unwritten `y [n]`.
fn run(kernel: &str, n: usize, grid: u32, block: u32, schedule: Schedule) -> Result<(Memory, Tensor), Fault> {
    let x: Vec<f32> = (1..=n).map(|i| i as f32).collect();
    let mut memory = Memory::new(0);
    let (x, y) = (memory.input("x", &x), memory.output::<f32>("y", n));
    let params: Vec<u8> =
        [x.address(), y.address(), n as u64].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel,
        grid: [grid, 1, 1],
        cluster: [1; 3],
        block: [block, 1, 1],
        shared_bytes: 4 * block,
        params: &params,
    };
    memory.launch(&launch, schedule)?;
    Ok((memory, y))
}

/// The results of a launch whose threads all have work to do.
fn results(kernel: &str, grid: u32, block: u32, schedule: Schedule) -> Vec<f32> {
    let (memory, y) = run(kernel, (grid * block) as usize, grid, block, schedule).unwrap();
    memory.read(&y).unwrap()
}

fn fault(kernel: &str, n: usize, block: u32, schedule: Schedule) -> Fault {
    match run(kernel, n, 1, block, schedule) {
        Err(fault) => fault,
        Ok((memory, y)) => memory.read::<f32>(&y).expect_err("the kernel has a fault"),
    }
}

fn thread(x: u32) -> Thread {
    Thread { block: [0; 3], thread: [x, 0, 0] }
}

#[test]
fn right_kernels_give_right_results_in_every_order() {
    for schedule in schedules() {
        assert_eq!(results("copy", 3, 64, schedule), (1..=192).map(|i| i as f32).collect::<Vec<_>>());
        let sums: Vec<f32> = [2080.0, 6176.0].iter().flat_map(|&sum| [sum; 64]).collect();
        assert_eq!(results("sum_of_block", 2, 64, schedule), sums);
        let sums: Vec<f32> = [528.0, 1552.0, 2576.0].iter().flat_map(|&sum| [sum; 32]).collect();
        assert_eq!(results("sum_of_warp", 1, 96, schedule), sums);
        // Lanes 0..8 hold 1..=8: the next lane's value, or one's own at the end, plus that of lane 2.
        let groups = results("shuffle_groups", 1, 32, schedule);
        assert_eq!(groups[..8], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 11.0]);
        assert_eq!(groups[24..], [53.0, 54.0, 55.0, 56.0, 57.0, 58.0, 59.0, 59.0]);
    }
}

#[test]
fn a_missing_barrier_changes_results_with_the_order() {
    let want = results("sum_of_block", 1, 64, Schedule::InOrder);
    let wrong = |&schedule: &Schedule| {
        let got = results("sum_without_barrier", 1, 64, schedule);
        got.iter().zip(&want).any(|(got, want)| got.to_bits() != want.to_bits())
    };
    assert_eq!(schedules().filter(wrong).count() as u64, SCHEDULES + 1);
}

#[test]
fn accesses_out_of_bounds_name_block_thread_and_tensor() {
    for schedule in schedules() {
        let access = Access { offset: 40, bytes: 4, is_write: true };
        let want = Fault::OutOfBounds { thread: thread(10), access, tensor: "y".into() };
        assert_eq!(fault("copy_off_by_one", 10, 16, schedule), want);
        assert_eq!(
            want.to_string(),
            "block [0, 0, 0] thread [10, 0, 0] writes 4 bytes at byte 40 of `y`, out of its bounds"
        );
        let access = Access { offset: 40, bytes: 4, is_write: false };
        let want = Fault::OutOfBounds { thread: thread(9), access, tensor: "x".into() };
        assert_eq!(fault("copy_reads_past_the_end", 10, 16, schedule), want);
    }
}

#[test]
#[cfg_attr(feature = "sanitize", ignore = "the sanitizer is faster: see sanitize.rs")]
fn writes_that_go_around_the_checks_are_found_afterwards() {
    let corrupted = |tensor: &str, offset| Fault::Corrupted { tensor: tensor.into(), offset };
    // The lowest byte of 1.0 is zero, as is no byte of the red zone.
    assert_eq!(fault("copy_unseen_write", 10, 16, Schedule::InOrder), corrupted("y", 40));
    let found = fault("copy_unseen_write_to_input", 10, 16, Schedule::InOrder);
    assert!(matches!(&found, Fault::Corrupted { tensor, .. } if tensor == "x"), "{found}");
    assert_eq!(fault("sum_past_shared_memory", 16, 16, Schedule::InOrder), corrupted("shared memory", 64));
}

#[test]
fn inputs_are_not_written_and_outputs_not_read() {
    let access = |is_write| Access { offset: 0, bytes: 4, is_write };
    assert_eq!(
        fault("copy_writes_to_input", 10, 16, Schedule::InOrder),
        Fault::WriteToInput { thread: thread(0), access: access(true), tensor: "x".into() }
    );
    assert_eq!(
        fault("copy_reads_output", 10, 16, Schedule::InOrder),
        Fault::ReadBeforeWrite { thread: thread(0), access: access(false), tensor: "y".into() }
    );
}

#[test]
fn a_tail_that_nobody_writes_is_found() {
    for n in [5, 6, 7, 9, 39] {
        let want = Fault::Unwritten { tensor: "y".into(), element: n / 4 * 4 };
        assert_eq!(fault("copy_without_tail", n, 16, Schedule::InOrder), want);
    }
    assert!(run("copy_without_tail", 40, 1, 16, Schedule::InOrder).is_ok());
}

#[test]
fn misaligned_vectors_are_found() {
    let mut memory = Memory::new(1);
    let (x, y) = (memory.input("x", &[0f32; 4]), memory.output::<f32>("y", 4));
    let params: Vec<u8> = [x.address(), y.address(), 4].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel: "copy_without_tail",
        grid: [1; 3],
        cluster: [1; 3],
        block: [1; 3],
        shared_bytes: 0,
        params: &params,
    };
    assert_eq!(
        memory.launch(&launch, Schedule::InOrder),
        Err(Fault::Misaligned {
            thread: thread(0),
            access: Access { offset: 0, bytes: 16, is_write: false },
            tensor: "x".into()
        })
    );
}

#[test]
fn divergent_barriers_name_both_threads() {
    for schedule in schedules() {
        let Fault::BarrierDivergence { waiting, place, other, otherwise } =
            fault("barrier_in_a_branch", 16, 16, schedule)
        else {
            panic!("not a divergent barrier");
        };
        assert_eq!((waiting, other), (thread(0), thread(5)));
        assert!(
            place.starts_with("faults.cu:") && otherwise.starts_with("waits at the barrier in faults.cu:")
        );
        let Fault::BarrierDivergence { waiting, other, otherwise, .. } =
            fault("return_before_a_barrier", 10, 16, schedule)
        else {
            panic!("not a divergent barrier");
        };
        assert_eq!((waiting, other, &*otherwise), (thread(0), thread(10), "has returned"));
    }
}

#[test]
fn divergent_warps_are_found() {
    for schedule in schedules() {
        let Fault::WarpDivergence { waiting, mask, other, otherwise, .. } =
            fault("shuffle_in_a_branch", 64, 64, schedule)
        else {
            panic!("not a divergent warp");
        };
        assert_eq!((waiting, mask, other), (thread(0), u32::MAX, thread(7)));
        assert!(otherwise.starts_with("waits at the barrier"), "{otherwise}");
        let found = fault("shuffle_from_a_missing_lane", 32, 32, schedule);
        assert!(matches!(found, Fault::InactiveLane { lane: 16..32, .. }), "{found}");
    }
}

#[test]
fn launches_that_no_device_takes_are_refused() {
    let mut memory = Memory::new(0);
    let launch = |kernel: &'static str, grid, block, shared_bytes, params: &'static [u8]| Launch {
        kernel,
        grid,
        cluster: [1; 3],
        block,
        shared_bytes,
        params,
    };
    let mut refused = |launch: Launch<'_>| memory.launch(&launch, Schedule::InOrder).unwrap_err();
    let params = &[0; 24];
    assert_eq!(refused(launch("none", [1; 3], [1; 3], 0, params)), Fault::UnknownKernel("none".into()));
    let size = Fault::ParamsSize { expected: 24, got: 8 };
    assert_eq!(refused(launch("copy", [1; 3], [1; 3], 0, &[0; 8])), size);
    for (grid, block, shared_bytes) in [
        ([0, 1, 1], [1; 3], 0),
        ([1, 65536, 1], [1; 3], 0),
        ([1; 3], [1025, 1, 1], 0),
        ([1; 3], [1, 1, 65], 0),
        ([1; 3], [32, 33, 1], 0),
        ([1; 3], [1; 3], 1 << 20),
    ] {
        let fault = refused(launch("copy", grid, block, shared_bytes, params));
        assert_eq!(fault, Fault::Geometry { grid, block, shared_bytes });
    }
}
