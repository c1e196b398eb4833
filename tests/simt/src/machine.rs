//! The scheduler: a block's threads as coroutines, and where they wait for each other.

use crate::fault::Fault;
use crate::hooks::{CURRENT, Collective, Context, Coordinates, Place, SHARED, WARP, Wait};
use crate::memory::{Memory, Region};
use corosensei::stack::{DefaultStack, Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::rc::Rc;

struct Kernel {
    name: &'static str,
    run: unsafe extern "C" fn(*const u8),
    bytes: extern "C" fn() -> usize,
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
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The bytes of the kernel's parameter struct.
    pub params: &'a [u8],
}

/// In which order blocks, and the threads of a block between two switch points, run, and when asynchronous copies arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// By their numbers; copies as late as they may.
    InOrder,
    /// At random, from this seed; each copy as soon or as late as it may.
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
const STACK: usize = if crate::IS_SANITIZED { 256 << 10 } else { 64 << 10 };
/// What every device since compute capability 8.0 allows.
const MAX_THREADS: u32 = 1024;
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];
const MAX_SHARED: u32 = 99 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Runnable,
    Barrier(Place),
    /// Waits for some lanes of its warp.
    Exchange(Place, u32),
    /// Waits for all lanes of its warp, for this operation.
    Collective(Place, Collective),
    Done,
}

impl State {
    /// What a thread in this state does instead of joining the others.
    fn otherwise(self) -> String {
        match self {
            State::Runnable => "runs".into(),
            State::Barrier(place) => format!("waits at the barrier in {place}"),
            State::Exchange(place, mask) => format!("waits at {place} for lanes {mask:#010x}"),
            State::Collective(place, _) => {
                format!("waits at {place} for another operation of the whole warp")
            }
            State::Done => "has returned".into(),
        }
    }
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
        let Launch { kernel, grid, block, shared_bytes, params } = *launch;
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
        // The compiler may assume that the struct is aligned.
        let mut aligned = vec![0u128; params.len().div_ceil(16)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);

        let mut dice = Dice(match schedule {
            Schedule::InOrder => None,
            Schedule::Random(seed) => Some(seed),
        });
        let nothing = Rc::new([None; WARP]);
        let shared = Region::new(0, shared_bytes as usize);
        let mut blocks: VecDeque<[u32; 3]> = indices(grid).collect();
        while let Some(index) = blocks.swap_remove_front(dice.roll(blocks.len().max(1))) {
            shared.poison();
            let contexts: Vec<Context> = indices(block)
                .map(|thread| Context {
                    coordinates: Coordinates { thread, block: index, block_dim: block, grid_dim: grid },
                    memory: &raw const *self,
                    shared: shared.data(),
                    shared_bytes: shared_bytes as usize,
                    yielder: Cell::new(std::ptr::null()),
                    given: Cell::new(0),
                    received: RefCell::new(nothing.clone()),
                    operands: Cell::new(std::ptr::null_mut()),
                    copies: RefCell::new(VecDeque::new()),
                    dice: RefCell::new(dice.fork()),
                })
                .collect();
            Block::new(&contexts, kernel.run, aligned.as_ptr().cast(), &mut dice).run(&mut dice)?;
            shared.check(SHARED)?;
        }
        self.check()
    }
}

/// Every index of a grid or block, x fastest.
fn indices([x, y, z]: [u32; 3]) -> impl Iterator<Item = [u32; 3]> {
    (0..z).flat_map(move |k| (0..y).flat_map(move |j| (0..x).map(move |i| [i, j, k])))
}

/// A block's threads on their way.
struct Block<'a> {
    contexts: &'a [Context],
    coroutines: Vec<Coroutine<(), Wait, (), LaneStack>>,
    states: Vec<State>,
    runnable: Vec<usize>,
    /// Whether a warp runs until it has to wait, far ahead of the others, or all keep pace.
    is_warp_by_warp: bool,
    /// How many threads of each warp are runnable.
    running: Vec<usize>,
}

impl<'a> Block<'a> {
    fn new(
        contexts: &'a [Context],
        run: unsafe extern "C" fn(*const u8),
        params: *const u8,
        dice: &mut Dice,
    ) -> Self {
        let start = |(thread, context): (usize, &Context)| {
            let context: *const Context = context;
            Coroutine::with_stack(LaneStack::new(thread), move |yielder, ()| {
                // SAFETY: the contexts outlive the coroutines, which `Block` ends.
                unsafe { &*context }.yielder.set(yielder);
                // SAFETY: the parameters outlive the launch and have the kernel's size and alignment.
                unsafe { run(params) };
            })
        };
        Self {
            contexts,
            coroutines: contexts.iter().enumerate().map(start).collect(),
            states: vec![State::Runnable; contexts.len()],
            // The last is taken first when in order.
            runnable: (0..contexts.len()).rev().collect(),
            is_warp_by_warp: dice.roll(2) == 1,
            running: contexts.chunks(WARP).map(<[Context]>::len).collect(),
        }
    }

    /// Runs all threads to their end.
    fn run(mut self, dice: &mut Dice) -> Result<(), Fault> {
        loop {
            // All wait at a barrier or are about to start. Not always the same warp first.
            self.runnable.rotate_left(WARP * dice.roll(self.running.len()));
            while !self.runnable.is_empty() {
                let last = self.runnable.len() - 1;
                // Those of the last one's warp are the last.
                let choice =
                    if self.is_warp_by_warp { self.running[self.runnable[last] / WARP] } else { last + 1 };
                let i = self.runnable.swap_remove(last - dice.roll(choice));
                CURRENT.set(&raw const self.contexts[i]);
                let state = match self.coroutines[i].resume(()) {
                    CoroutineResult::Yield(Wait::Barrier(place)) => State::Barrier(place),
                    CoroutineResult::Yield(Wait::Exchange(place, mask)) => State::Exchange(place, mask),
                    CoroutineResult::Yield(Wait::Collective(place, operation)) => {
                        State::Collective(place, operation)
                    }
                    CoroutineResult::Yield(Wait::Fault(fault)) => return Err(*fault),
                    CoroutineResult::Return(()) => State::Done,
                };
                self.states[i] = state;
                self.running[i / WARP] -= 1;
                // A lane that is not the last of those that all have to come lets nobody go on.
                let may_release = match state {
                    State::Barrier(_) => false,
                    State::Exchange(_, u32::MAX) | State::Collective(..) => self.running[i / WARP] == 0,
                    State::Exchange(..) | State::Done | State::Runnable => true,
                };
                if may_release {
                    self.release_warp(i / WARP * WARP);
                }
            }
            if self.states.iter().all(|&state| state == State::Done) {
                return Ok(());
            }
            self.release_barrier()?;
        }
    }

    /// Lets the lanes of the warp that starts at thread `first` go on if all that they wait for have come.
    fn release_warp(&mut self, first: usize) {
        let lanes = first..self.states.len().min(first + WARP);
        let waits = |state: &State| matches!(state, State::Exchange(..) | State::Collective(..));
        match self.states[lanes.clone()].iter().copied().find(waits) {
            Some(state @ State::Collective(_, operation)) => {
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
            Some(state @ State::Exchange(_, mask)) => {
                let takes_part = |i: usize, other| mask >> (i - first) & 1 == 1 && other != State::Done;
                let mut values = [None; WARP];
                for i in lanes.clone().filter(|&i| takes_part(i, self.states[i])) {
                    if self.states[i] != state {
                        return;
                    }
                    values[i - first] = Some(self.contexts[i].given.get());
                }
                let values = Rc::new(values);
                for i in lanes {
                    if takes_part(i, self.states[i]) {
                        self.contexts[i].received.replace(values.clone());
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

    /// Lets all threads go on if they wait at one barrier; nothing is runnable.
    fn release_barrier(&mut self) -> Result<(), Fault> {
        let thread = |i: usize| self.contexts[i].thread();
        let waiting = |i: &usize| self.states[*i] != State::Done;
        let exchanging = |i: &usize| matches!(self.states[*i], State::Exchange(..) | State::Collective(..));
        // A warp that is stuck explains a barrier that is not reached, not the other way round.
        let all = 0..self.states.len();
        let first = all
            .clone()
            .find(exchanging)
            .or_else(|| all.clone().find(waiting))
            .expect("a thread has not ended");
        match self.states[first] {
            state @ (State::Exchange(place, _) | State::Collective(place, _)) => {
                let mask = match state {
                    State::Exchange(_, mask) => mask,
                    _ => u32::MAX,
                };
                let lanes = first / WARP * WARP..self.states.len().min(first / WARP * WARP + WARP);
                let mut missing = lanes.filter(|i| mask >> (i % WARP) & 1 == 1 && self.states[*i] != state);
                let running = missing.clone().find(|&i| self.states[i] != State::Done);
                let other = running
                    .or_else(|| missing.next())
                    .expect("an exchange is released as soon as its lanes have come");
                Err(Fault::WarpDivergence {
                    waiting: thread(first),
                    place: place.to_string(),
                    mask,
                    other: thread(other),
                    otherwise: self.states[other].otherwise(),
                })
            }
            State::Barrier(place) => {
                if let Some(other) = all.clone().find(|&i| self.states[i] != State::Barrier(place)) {
                    return Err(Fault::BarrierDivergence {
                        waiting: thread(first),
                        place: place.to_string(),
                        other: thread(other),
                        otherwise: self.states[other].otherwise(),
                    });
                }
                all.rev().for_each(|i| self.resume(i));
                Ok(())
            }
            State::Runnable | State::Done => unreachable!("the thread waits"),
        }
    }
}

impl Drop for Block<'_> {
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
