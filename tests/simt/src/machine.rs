//! The scheduler: the threads of a cluster's blocks as coroutines, and where they wait for each other.

use crate::engine::{Engine, WARPGROUP};
use crate::fault::Fault;
use crate::hooks::{
    CURRENT, Context, Coordinates, EngineCell, SHARED, WARP, Wait, WarpgroupOperation, Yield,
};
use crate::memory::{Memory, Region};
use crate::tensor_map::TensorMap;
use bytemuck::Zeroable;
use corosensei::stack::{DefaultStack, Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;

struct Kernel {
    name: &'static str,
    run: unsafe extern "C" fn(*const u8),
    bytes: extern "C" fn() -> usize,
    cluster: extern "C" fn() -> u32,
}

// `KERNELS`, by build.rs.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The names of all kernels.
pub fn kernels() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.name)
}

/// What to launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Name of the kernel.
    pub kernel: &'a str,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x, y, z; 1 without clusters.
    pub cluster: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The bytes of the kernel's parameter struct.
    pub params: &'a [u8],
}

/// In which order clusters, and the threads of a cluster between two switch points, run, and when what is asynchronous happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// By their numbers; copies and wgmmas as late as they may.
    InOrder,
    /// At random, from this seed; each copy and wgmma as soon or as late as it may, or in between.
    Random(u64),
}

/// SplitMix64.
pub struct Dice(Option<u64>);

impl Dice {
    fn next(&mut self) -> Option<u64> {
        let state = self.0.as_mut()?;
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Some(z ^ (z >> 31))
    }

    /// A number below `below`; 0 when in order.
    pub fn roll(&mut self, below: usize) -> usize {
        // The upper half of the product: every switch of threads comes here, and divisions take long.
        self.next().map_or(0, |z| ((u128::from(z) * below as u128) >> 64) as usize)
    }

    /// Dice of one's own.
    fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

/// Stack of one thread; the kernels keep little there, but a sanitizer puts red zones around it.
const STACK: usize = if crate::IS_SANITIZED { 128 << 10 } else { 64 << 10 };
/// What every device since compute capability 8.0 allows.
const MAX_THREADS: u32 = 1024;
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
/// Of 9.0; plans are checked against what their device allows where they are made.
const MAX_SHARED: u32 = 227 << 10;
/// Alignment of shared memory, so that every swizzle's pattern starts there.
const SHARED_ALIGNMENT: usize = 1024;
/// Blocks of a cluster that every device with clusters allows.
const MAX_CLUSTER: u32 = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum State {
    Runnable,
    Waits(Wait),
    Done,
}

thread_local! {
    /// Stacks of threads that have ended.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// The stack of a thread. Lanes take turns at the same places of their stacks, so these start at different distances from
/// the end of a page: at the same one they would fight for the same lines of the CPU's cache.
struct LaneStack {
    memory: DefaultStack,
    /// Bytes at its base that are not used.
    skipped: usize,
}

impl LaneStack {
    fn new(thread: usize) -> Self {
        let memory = STACKS.with_borrow_mut(Vec::pop);
        let memory = memory.unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
        Self { memory, skipped: thread % WARP * 128 }
    }
}

// SAFETY: it is a part of another stack, with the same limit and guard page; what is skipped is less than a page of many,
// and a multiple of the alignment.
unsafe impl Stack for LaneStack {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.memory.base().get() - self.skipped).expect("above the limit")
    }

    fn limit(&self) -> StackPointer {
        self.memory.limit()
    }
}

impl Memory {
    /// Runs a launch to its end.
    ///
    /// # Errors
    /// The first [`Fault`] found; memory is then in an undefined state.
    pub fn launch(&mut self, launch: &Launch<'_>, schedule: Schedule) -> Result<(), Fault> {
        let Launch { grid, cluster, block, shared_bytes, params, .. } = *launch;
        let kernel = checked(launch)?;
        // The compiler may assume that the struct is aligned; no struct's alignment is larger than a tensor map's.
        let mut aligned = vec![TensorMap::zeroed(); params.len().div_ceil(size_of::<TensorMap>())];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let start = aligned.as_ptr() as usize;

        let mut dice = Dice(match schedule {
            Schedule::InOrder => None,
            Schedule::Random(seed) => Some(seed),
        });
        let size = cluster.iter().product::<u32>() as usize;
        let shared: Vec<Region> =
            (0..size).map(|_| Region::new(SHARED_ALIGNMENT, 0, shared_bytes as usize)).collect();
        let mut clusters: VecDeque<[u32; 3]> =
            indices(std::array::from_fn(|i| grid[i] / cluster[i])).collect();
        while let Some(index) = clusters.swap_remove_front(dice.roll(clusters.len().max(1))) {
            shared.iter().for_each(Region::poison);
            let blocks: Vec<([u32; 3], *mut u8)> = indices(cluster)
                .map(|within| std::array::from_fn(|i| index[i] * cluster[i] + within[i]))
                .zip(shared.iter().map(Region::data))
                .collect();
            let params = start..start + params.len();
            let engine =
                Engine::new(&raw const *self, params, block, &blocks, shared_bytes as usize, dice.fork());
            let engine = EngineCell { is_used: Cell::new(false), engine: RefCell::new(engine) };
            let mut elected = 0;
            let threads = blocks.iter().flat_map(|&(block_index, shared)| {
                indices(block).enumerate().map(move |(i, thread)| (i, block_index, shared, thread))
            });
            let contexts: Vec<Context> = threads
                .enumerate()
                .map(|(index, (in_block, block_index, shared, thread))| {
                    if in_block % WARP == 0 {
                        elected = dice.roll(WARP) as u32;
                    }
                    Context {
                        coordinates: Coordinates {
                            thread,
                            block: block_index,
                            block_dim: block,
                            grid_dim: grid,
                        },
                        index,
                        elected,
                        engine: &raw const engine,
                        memory: &raw const *self,
                        shared,
                        shared_bytes: shared_bytes as usize,
                        yielder: Cell::new(std::ptr::null()),
                        given: Cell::new(0),
                        source: Cell::new(0),
                        received: Cell::new(None),
                        operands: Cell::new(std::ptr::null_mut()),
                        copies: RefCell::new(VecDeque::new()),
                        dice: RefCell::new(dice.fork()),
                    }
                })
                .collect();
            Cluster::new(&contexts, &engine, kernel.run, aligned.as_ptr().cast(), &mut dice)
                .run(&mut dice)?;
            shared.iter().try_for_each(|shared| shared.check(SHARED))?;
        }
        self.check()
    }
}

/// The kernel of a launch that a device would take.
fn checked(launch: &Launch<'_>) -> Result<&'static Kernel, Fault> {
    let Launch { kernel, grid, cluster, block, shared_bytes, params } = *launch;
    let kernel = KERNELS
        .iter()
        .find(|known| known.name == kernel)
        .ok_or_else(|| Fault::UnknownKernel(kernel.to_owned()))?;
    let expected = (kernel.bytes)();
    if params.len() != expected {
        return Err(Fault::ParamsSize { expected, got: params.len() });
    }
    let within = |sizes: [u32; 3], limits: [u32; 3]| (0..3).all(|i| (1..=limits[i]).contains(&sizes[i]));
    let threads = block.iter().try_fold(1u32, |product, &size| product.checked_mul(size));
    if !within(grid, MAX_GRID)
        || !within(block, MAX_BLOCK)
        || threads.is_none_or(|threads| threads > MAX_THREADS)
        || shared_bytes > MAX_SHARED
    {
        return Err(Fault::Geometry { grid, block, shared_bytes });
    }
    let declared = (kernel.cluster)();
    if cluster != [declared, 1, 1]
        || declared > MAX_CLUSTER
        || (0..3).any(|i| !grid[i].is_multiple_of(cluster[i]))
    {
        return Err(Fault::Cluster { declared, cluster, grid });
    }
    // Whole warps, so that the next block's begin with a warp.
    if declared > 1 && threads.is_some_and(|threads| !threads.is_multiple_of(WARP as u32)) {
        return Err(Fault::Geometry { grid, block, shared_bytes });
    }
    Ok(kernel)
}

/// Every index of a grid or block, x fastest.
fn indices([x, y, z]: [u32; 3]) -> impl Iterator<Item = [u32; 3]> {
    (0..z).flat_map(move |k| (0..y).flat_map(move |j| (0..x).map(move |i| [i, j, k])))
}

/// Threads at a named barrier.
#[derive(Default)]
struct NamedBarrier {
    /// How many it is of.
    threads: u16,
    arrived: Vec<usize>,
}

/// The threads of a cluster's blocks on their way.
struct Cluster<'a> {
    contexts: &'a [Context],
    engine: &'a EngineCell,
    coroutines: Vec<Coroutine<(), Yield, (), LaneStack>>,
    states: Vec<State>,
    runnable: Vec<usize>,
    /// Whether a warp runs until it has to wait, far ahead of the others, or all keep pace.
    is_warp_by_warp: bool,
    /// Whether those whose mbarrier's phase has completed go on after all others.
    is_woken_last: bool,
    /// How many threads of each warp are runnable.
    running: Vec<usize>,
    per_block: usize,
    /// How many threads of each block wait at its barrier.
    at_barrier: Vec<usize>,
    at_cluster_barrier: usize,
    /// 16 of each block.
    named: Vec<NamedBarrier>,
}

impl<'a> Cluster<'a> {
    fn new(
        contexts: &'a [Context],
        engine: &'a EngineCell,
        run: unsafe extern "C" fn(*const u8),
        params: *const u8,
        dice: &mut Dice,
    ) -> Self {
        let start = |(thread, context): (usize, &Context)| {
            let context: *const Context = context;
            Coroutine::with_stack(LaneStack::new(thread), move |yielder, ()| {
                // SAFETY: the contexts outlive the coroutines, which `Cluster` ends.
                unsafe { &*context }.yielder.set(yielder);
                // SAFETY: the parameters outlive the launch and have the kernel's size and alignment.
                unsafe { run(params) };
            })
        };
        let per_block = engine.engine.borrow().per_block;
        let blocks = contexts.len() / per_block;
        Self {
            contexts,
            engine,
            coroutines: contexts.iter().enumerate().map(start).collect(),
            states: vec![State::Runnable; contexts.len()],
            // The last is taken first when in order.
            runnable: (0..contexts.len()).rev().collect(),
            is_warp_by_warp: dice.roll(2) == 1,
            is_woken_last: dice.roll(2) == 1,
            running: contexts.chunks(WARP).map(<[Context]>::len).collect(),
            per_block,
            at_barrier: vec![0; blocks],
            at_cluster_barrier: 0,
            named: Vec::new(),
        }
    }

    /// Runs all threads to their end.
    fn run(mut self, dice: &mut Dice) -> Result<(), Fault> {
        // Not always the same warp first.
        self.runnable.rotate_left(WARP * dice.roll(self.running.len()));
        loop {
            while !self.runnable.is_empty() {
                let last = self.runnable.len() - 1;
                // Those of the last one's warp are the last, as a rule.
                let choice =
                    if self.is_warp_by_warp { self.running[self.runnable[last] / WARP] } else { last + 1 };
                let i = self.runnable.swap_remove(last - dice.roll(choice));
                CURRENT.set(&raw const self.contexts[i]);
                let state = match self.coroutines[i].resume(()) {
                    CoroutineResult::Yield(Yield::Wait(wait)) => State::Waits(wait),
                    CoroutineResult::Yield(Yield::Fault(fault)) => return Err(*fault),
                    CoroutineResult::Return(()) => State::Done,
                };
                self.states[i] = state;
                self.running[i / WARP] -= 1;
                self.arrive(i, state, dice)?;
                if self.engine.is_used.get() {
                    self.engine.engine.borrow_mut().tick()?;
                    self.wake();
                }
            }
            if self.states.iter().all(|&state| state == State::Done) {
                return self.engine.engine.borrow_mut().finish();
            }
            if !self.engine.engine.borrow_mut().force()? {
                return Err(crate::stuck::explain(&self.states, self.contexts, &self.engine.engine.borrow()));
            }
            self.wake();
        }
    }

    /// A thread has come to where it waits: lets those go on that waited for it.
    fn arrive(&mut self, i: usize, state: State, dice: &mut Dice) -> Result<(), Fault> {
        let warp = i / WARP;
        match state {
            // A lane that is not the last of those that all have to come lets nobody go on.
            State::Waits(Wait::Exchange(_, u32::MAX) | Wait::Collective(..)) => {
                if self.running[warp] == 0 {
                    self.release_warp(warp * WARP);
                }
            }
            State::Waits(Wait::Exchange(..)) => self.release_warp(warp * WARP),
            State::Waits(Wait::Barrier(_)) => self.arrive_at_barrier(i / self.per_block, dice),
            State::Waits(Wait::Warpgroup(..)) => self.release_warpgroup(i)?,
            State::Waits(Wait::Named(_, id, threads)) => self.arrive_at_named(i, id.into(), threads)?,
            State::Waits(Wait::Cluster(_)) => {
                self.at_cluster_barrier += 1;
                if self.at_cluster_barrier == self.states.len() {
                    self.at_cluster_barrier = 0;
                    (0..self.states.len()).rev().for_each(|i| self.resume(i));
                }
            }
            State::Waits(Wait::Mbarrier(..)) | State::Runnable => {}
            State::Done => {
                self.release_warp(warp * WARP);
                self.engine.engine.borrow_mut().end_thread(i)?;
                if self.engine.is_used.get() && self.per_block.is_multiple_of(WARPGROUP) {
                    self.release_warpgroup(i)?;
                }
            }
        }
        Ok(())
    }

    fn arrive_at_barrier(&mut self, block: usize, dice: &mut Dice) {
        self.at_barrier[block] += 1;
        if self.at_barrier[block] < self.per_block {
            return;
        }
        let threads = block * self.per_block..(block + 1) * self.per_block;
        // Threads at different barriers never go on.
        if self.states[threads.clone()].iter().all(|&state| state == self.states[threads.start]) {
            self.at_barrier[block] = 0;
            let is_alone = self.runnable.is_empty();
            threads.rev().for_each(|i| self.resume(i));
            if is_alone {
                // Not always the same warp first.
                self.runnable.rotate_left(WARP * dice.roll(self.per_block.div_ceil(WARP)));
            }
        }
    }

    fn arrive_at_named(&mut self, i: usize, id: usize, threads: u16) -> Result<(), Fault> {
        self.named.resize_with(16 * self.at_barrier.len(), NamedBarrier::default);
        let barrier = &mut self.named[i / self.per_block * 16 + id];
        if barrier.arrived.is_empty() {
            barrier.threads = threads;
        }
        let place = match self.states[i] {
            State::Waits(Wait::Named(place, ..)) => place,
            _ => unreachable!("the thread waits there"),
        };
        let wrong = |why: String| Err(self.contexts[i].at(place).instruction(why));
        if barrier.threads != threads {
            return wrong(format!(
                "named barrier {id} of {threads} threads, for others of {}",
                barrier.threads
            ));
        }
        barrier.arrived.push(i);
        if barrier.arrived.len() < usize::from(threads) {
            return Ok(());
        }
        let mut arrived = std::mem::take(&mut barrier.arrived);
        arrived.sort_unstable();
        if arrived.chunks(WARP).any(|lanes| lanes[0] % WARP != 0 || lanes[WARP - 1] != lanes[0] + WARP - 1) {
            return wrong(format!("named barrier {id} without all lanes of a warp"));
        }
        arrived.into_iter().rev().for_each(|i| self.resume(i));
        Ok(())
    }

    /// Lets threads go on whose mbarriers have completed a phase.
    fn wake(&mut self) {
        let mut woken = std::mem::take(&mut self.engine.engine.borrow_mut().woken);
        let count = woken.len();
        woken.drain(..).for_each(|i| self.resume(i));
        if self.is_woken_last {
            self.runnable.rotate_right(count);
        }
        // Its memory serves again.
        self.engine.engine.borrow_mut().woken = woken;
    }

    /// Lets the threads of a warpgroup go on if all have come to one instruction.
    fn release_warpgroup(&mut self, i: usize) -> Result<(), Fault> {
        let first = i / WARPGROUP * WARPGROUP;
        if self.running[first / WARP..][..WARPGROUP / WARP].iter().any(|&running| running > 0) {
            return Ok(());
        }
        let states = &self.states[first..first + WARPGROUP];
        let waits = |state: &State| matches!(state, State::Waits(Wait::Warpgroup(..)));
        let Some(waiting) = states.iter().position(waits) else { return Ok(()) };
        let State::Waits(Wait::Warpgroup(place, operation)) = states[waiting] else { return Ok(()) };
        if let Some(other) = states.iter().position(|&state| state != states[waiting]) {
            // Those that wait for something else may still come.
            return match states.iter().all(|state| waits(state) || *state == State::Done) {
                false => Ok(()),
                true => Err(Fault::WarpgroupDivergence {
                    waiting: self.contexts[first + waiting].thread(),
                    place: place.to_string(),
                    other: self.contexts[first + other].thread(),
                    otherwise: crate::stuck::otherwise(states[other]),
                }),
            };
        }
        let who = self.contexts[first].at(place);
        {
            let engine = &mut *self.engine.engine.borrow_mut();
            match operation {
                WarpgroupOperation::Fence => engine.wgmma_fence(first),
                WarpgroupOperation::Commit => engine.wgmma_commit(first),
                WarpgroupOperation::Wait(pending) => engine.wgmma_wait(who, pending)?,
                WarpgroupOperation::SetRegisters(count) => engine.set_registers(first, who, count),
                WarpgroupOperation::Wgmma => {
                    let operands = |context: &Context| {
                        // SAFETY: it points to a thread's operands, which waits.
                        unsafe { *context.operands.get().cast::<crate::wgmma::Operands>() }
                    };
                    let threads = &self.contexts[first..first + WARPGROUP];
                    engine.wgmma(who, &threads.iter().map(operands).collect::<Vec<_>>())?;
                }
            }
        }
        (first..first + WARPGROUP).rev().for_each(|i| self.resume(i));
        Ok(())
    }

    /// Lets the lanes of the warp that starts at thread `first` go on if all that they wait for have come.
    fn release_warp(&mut self, first: usize) {
        let lanes = first..self.states.len().min(first + WARP);
        let waits = |state: &State| matches!(state, State::Waits(Wait::Exchange(..) | Wait::Collective(..)));
        match self.states[lanes.clone()].iter().copied().find(waits) {
            Some(state @ State::Waits(Wait::Collective(_, operation))) => {
                // If a lane has returned, the others wait in vain.
                if self.states[lanes.clone()].iter().any(|&other| other != state) {
                    return;
                }
                let operands: [*mut c_void; WARP] =
                    std::array::from_fn(|lane| self.contexts[first + lane].operands.get());
                // SAFETY: each points to the operands of this operation on the stack of a thread that waits.
                unsafe { (operation.0)(operands.as_ptr()) };
                lanes.for_each(|i| self.resume(i));
            }
            Some(state @ State::Waits(Wait::Exchange(_, mask))) => {
                let takes_part = |i: usize, other| mask >> (i - first) & 1 == 1 && other != State::Done;
                let mut values = [None; WARP];
                for i in lanes.clone().filter(|&i| takes_part(i, self.states[i])) {
                    if self.states[i] != state {
                        return;
                    }
                    values[i - first] = Some(self.contexts[i].given.get());
                }
                for i in lanes {
                    if takes_part(i, self.states[i]) {
                        let source = self.contexts[i].source.get() as usize;
                        self.contexts[i].received.set(values.get(source).copied().flatten());
                        self.resume(i);
                    }
                }
            }
            _ => {}
        }
    }

    fn resume(&mut self, i: usize) {
        self.states[i] = State::Runnable;
        self.running[i / WARP] += 1;
        self.runnable.push(i);
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        CURRENT.set(std::ptr::null());
        for mut coroutine in self.coroutines.drain(..) {
            if coroutine.started() && !coroutine.done() {
                // SAFETY: what lies on the stack of a kernel has no destructors, and nobody refers to it any more.
                unsafe { coroutine.force_reset() };
            }
            // One that never ran still holds what it would have captured: dropping it is enough.
            if coroutine.done() {
                STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack().memory));
            }
        }
    }
}
