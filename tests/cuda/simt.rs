//! Carrying out plans in the simulator.

use pace_kernels::cuda::{Buffer, KERNELS, Kernel, Launch, Params};
use pace_simt::{Memory, Schedule, Tensor};
use std::collections::BTreeSet;

/// Random orders that small launches run in.
const SCHEDULES: u64 = 32;
/// Launches of up to so many threads are small.
const SMALL: u32 = 4096;

/// The orders to run a launch in: fewer for a large one.
pub fn schedules<P>(launch: &Launch<P>) -> impl Iterator<Item = Schedule> {
    let threads: u32 = launch.grid.iter().chain(&launch.block).product();
    let seeds = if threads <= SMALL { SCHEDULES } else { 1 };
    (0..seeds).map(Schedule::Random).chain([Schedule::InOrder])
}

pub fn run<P: Params>(memory: &mut Memory, launch: &Launch<P>, schedule: Schedule) {
    let plan = pace_simt::Launch {
        kernel: launch.kernel.name,
        grid: launch.grid,
        block: launch.block,
        shared_bytes: launch.shared_bytes,
        params: bytemuck::bytes_of(&launch.params),
    };
    memory.launch(&plan, schedule).unwrap_or_else(|fault| panic!("{fault}\n{launch:?}"));
}

pub fn buffer(tensor: &Tensor) -> Buffer {
    Buffer { address: tensor.address(), len: tensor.len() }
}

/// `KERNELS` names what the files in `kernels/` define, no more and no less, and the simulator has all of it.
pub fn every_kernel_is_listed() {
    let listed: BTreeSet<(String, String)> =
        KERNELS.iter().map(|&Kernel { file, name }| (file.to_owned(), name.to_owned())).collect();
    assert_eq!(listed.len(), KERNELS.len());
    let mut defined = BTreeSet::new();
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let source = std::fs::read_to_string(&path).unwrap();
            let names =
                source.split("\nPACE_KERNEL(").skip(1).map(|rest| rest.split(',').next().unwrap().to_owned());
            defined.extend(names.map(|name| (stem.clone(), name)));
        }
    }
    assert_eq!(listed, defined);
    let simulated: BTreeSet<&str> = pace_simt::kernels().collect();
    for (_, name) in &listed {
        assert!(simulated.contains(name.as_str()), "the simulator has no kernel {name}");
    }
}
