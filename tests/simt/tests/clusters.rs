//! Blocks of a cluster that work together, and barriers of every kind.

use bytemuck::{Pod, Zeroable};
use pace_simt::{Fault, Launch, Memory, Schedule, TensorMap};

const SCHEDULES: u64 = 64;
const TILES: usize = 40;
const COLUMNS: usize = 64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    x: TensorMap,
    y: u64,
    tiles: u32,
    padding: [u32; 13],
}

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..SCHEDULES).map(Schedule::Random).chain([Schedule::InOrder])
}

fn x(i: usize) -> f32 {
    (i * 37 % 101) as f32
}

fn sums() -> Vec<f32> {
    let sum = |tile: usize, column: usize| (0..8).map(|row| x((tile * 8 + row) * COLUMNS + column)).sum();
    let block: Vec<f32> = (0..TILES * COLUMNS).map(|i| sum(i / COLUMNS, i % COLUMNS)).collect();
    [block.clone(), block].concat()
}

fn run_as(
    kernel: &str,
    schedule: Schedule,
    grid: [u32; 3],
    cluster: [u32; 3],
    shared_bytes: u32,
) -> Result<Vec<f32>, Fault> {
    let mut memory = Memory::new(0);
    let values: Vec<f32> = (0..TILES * 8 * COLUMNS).map(x).collect();
    let input = memory.input("x", &values);
    let y = memory.output::<f32>("y", 2 * TILES * COLUMNS);
    let map = TensorMap {
        address: input.address(),
        dims: [COLUMNS as u64, 8 * TILES as u64, 1, 0, 0],
        strides: [4 * COLUMNS as u64, 4 * values.len() as u64, 0, 0],
        box_dims: [32, 8, 1, 0, 0],
        swizzle: 0,
        rank: 3,
        element_bytes: 4,
        reserved: [0; 4],
    };
    let params = Params { x: map, y: y.address(), tiles: TILES as u32, padding: [0; 13] };
    let params = bytemuck::bytes_of(&params);
    memory.launch(&Launch { kernel, grid, cluster, block: [64, 1, 1], shared_bytes, params }, schedule)?;
    memory.read(&y)
}

fn run(kernel: &str, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    run_as(kernel, schedule, [2, 1, 1], [2, 1, 1], 2 * 2048 + 32)
}

#[test]
fn a_pair_that_fetches_for_each_other_is_right_in_every_order() {
    let want = sums();
    for schedule in schedules() {
        let got = run("pair", schedule).unwrap_or_else(|fault| panic!("{schedule:?}: {fault}"));
        assert!(got == want, "{schedule:?}");
    }
}

#[test]
fn a_block_that_leaves_early_is_found() {
    let found: Vec<Fault> = schedules().filter_map(|schedule| run("pair_leaves", schedule).err()).collect();
    let is_found = |fault: &Fault| matches!(fault, Fault::EndedEarly { .. });
    assert!(found.iter().all(is_found), "{found:?}");
    assert!(found.len() > 8, "{} orders", found.len());
}

#[test]
fn a_stage_released_without_the_other_block_is_found() {
    let want = Ok(sums());
    let wrong = schedules().filter(|&schedule| run("pair_own_arrivals_only", schedule) != want).count();
    assert!(wrong > 8, "{wrong} orders");
}

#[test]
fn barriers_of_other_blocks_are_used_after_a_barrier_of_the_cluster() {
    let found: Vec<Fault> =
        schedules().filter_map(|schedule| run("pair_no_cluster_barrier", schedule).err()).collect();
    let is_early =
        |fault: &Fault| matches!(fault, Fault::Mbarrier { why, .. } if why.contains("before it is"));
    assert!(found.iter().any(is_early), "{found:?}");
    let fault = run("pair_rank_outside", Schedule::InOrder).unwrap_err();
    assert!(
        matches!(&fault, Fault::Instruction { why, .. } if why == "arrives at block 2 of its cluster"),
        "{fault}"
    );
}

#[test]
fn a_thread_that_returns_keeps_its_cluster_waiting() {
    for schedule in schedules() {
        let fault = run("pair_returns", schedule).unwrap_err();
        let Fault::Hang(waits) = &fault else { panic!("{fault}") };
        let counts: Vec<usize> = waits.iter().map(|waiting| waiting.threads).collect();
        assert_eq!(counts, [64, 63], "{fault}");
        assert!(waits[0].what.starts_with("waits at the barrier of the cluster in clusters.cu:"), "{fault}");
    }
}

#[test]
fn clusters_are_those_that_the_kernel_declares() {
    for (kernel, declared, grid, cluster) in [
        ("pair", 2, [2, 1, 1], [1, 1, 1]),
        ("pair", 2, [3, 1, 1], [2, 1, 1]),
        ("pair", 2, [2, 2, 1], [2, 2, 1]),
        ("copy_box_in", 1, [2, 1, 1], [2, 1, 1]),
    ] {
        let found = run_as(kernel, Schedule::InOrder, grid, cluster, 8192);
        let want = Fault::Cluster { declared, cluster, grid };
        match kernel {
            "pair" => assert_eq!(found, Err(want)),
            // Its parameters are others.
            _ => assert!(matches!(found, Err(Fault::Cluster { .. } | Fault::ParamsSize { .. }))),
        }
    }
    assert!(run_as("pair", Schedule::InOrder, [2, 1, 1], [2, 1, 1], 227 << 10).is_ok());
    let found = run_as("pair", Schedule::InOrder, [2, 1, 1], [2, 1, 1], (227 << 10) + 1);
    assert!(matches!(found, Err(Fault::Geometry { .. })));
}

fn named(mode: u64, schedule: Schedule) -> Result<Vec<f32>, Fault> {
    let mut memory = Memory::new(0);
    let y = memory.output::<f32>("y", 256);
    let params: Vec<u8> = [y.address(), mode].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel: "named_barriers",
        grid: [1; 3],
        cluster: [1; 3],
        block: [128, 1, 1],
        shared_bytes: 512,
        params: &params,
    };
    memory.launch(&launch, schedule)?;
    memory.read(&y)
}

#[test]
fn named_barriers_are_of_as_many_threads_as_they_say() {
    for schedule in schedules() {
        let got = named(0, schedule).unwrap();
        let want = (0..128).map(|thread| (thread ^ 32) as f32);
        assert!(got[..128].iter().copied().eq(want), "{schedule:?}");
        let want = (0..128).map(|thread| (2 * ((thread ^ 32) & !1) + 1) as f32);
        assert!(got[128..].iter().copied().eq(want), "{schedule:?}");
        let Fault::Hang(waits) = named(1, schedule).unwrap_err() else { panic!("no hang") };
        assert_eq!((waits.len(), waits[0].threads, waits[0].first.thread), (1, 63, [64, 0, 0]));
    }
}

#[test]
fn barriers_and_registers_are_what_the_hardware_takes() {
    for (mode, what) in [
        (2, "named barrier 2 of"),
        (3, "named barrier 16 of 64 threads"),
        (4, "named barrier 1 of 48 threads"),
        (5, "setmaxnreg to 20 registers"),
        (9, "setmaxnreg to 256 registers waits"),
    ] {
        for schedule in schedules() {
            let fault = named(mode, schedule).unwrap_err();
            assert!(
                matches!(&fault, Fault::Instruction { why, .. } if why.starts_with(what)),
                "{mode}: {fault}"
            );
        }
    }
    let fault = |mode| named(mode, Schedule::InOrder).unwrap_err();
    assert!(matches!(fault(6), Fault::Mbarrier { why, .. } if why == "used before it is initialised"));
    assert!(matches!(fault(7), Fault::Misaligned { tensor, .. } if tensor == "shared memory"));
    assert!(matches!(fault(8), Fault::Mbarrier { why, .. } if why == "initialised again"));
}
