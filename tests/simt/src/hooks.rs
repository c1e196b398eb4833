//! What kernels call: where a thread is, its accesses to memory, its asynchronous copies, and where it waits for others.

use crate::engine::{Engine, Who};
use crate::fault::{Access, Fault, Thread};
use crate::machine::Dice;
use crate::memory::Memory;
use corosensei::Yielder;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};

pub const WARP: usize = 32;
/// What faults call it.
pub const SHARED: &str = "shared memory";

/// A line of a kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub file: *const c_char,
    pub line: u32,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: `__FILE__` is a string that lives as long as the program.
        let file = unsafe { CStr::from_ptr(self.file) }.to_string_lossy();
        write!(f, "{}:{}", file.rsplit('/').next().unwrap_or_default(), self.line)
    }
}

/// What a warp does together: sees what each lane brought, and writes there what each lane gets.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Collective(pub unsafe extern "C" fn(*const *mut c_void));

impl PartialEq for Collective {
    fn eq(&self, other: &Self) -> bool {
        // The linker may merge two that do the same: no harm.
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for Collective {}

/// What a warpgroup does together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum WarpgroupOperation {
    Fence,
    Wgmma,
    Commit,
    /// Until no more than so many groups are under way.
    Wait(u32),
    /// So many for each thread.
    SetRegisters(u32),
}

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// All threads of its block.
    Barrier(Place),
    /// Some lanes of its warp.
    Exchange(Place, u32),
    /// All lanes of its warp, for this operation.
    Collective(Place, Collective),
    /// All threads of its warpgroup.
    Warpgroup(Place, WarpgroupOperation),
    /// So many threads at the named barrier of this number.
    Named(Place, u16, u16),
    /// All threads of its cluster.
    Cluster(Place),
    /// The phase of the mbarrier at this address.
    Mbarrier(Place, u32),
}

/// Why a thread gave way.
pub enum Yield {
    Wait(Wait),
    /// Boxed, to keep the others small: they are what threads hand over at every switch.
    Fault(Box<Fault>),
}

/// `pace_simt_coordinates` of simt.h.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Coordinates {
    pub thread: [u32; 3],
    pub block: [u32; 3],
    pub block_dim: [u32; 3],
    pub grid_dim: [u32; 3],
}

/// What the hooks know of the thread that runs.
pub struct Context {
    pub coordinates: Coordinates,
    /// The thread's number in its cluster.
    pub index: usize,
    /// The lane of its warp that `elect` chooses.
    pub elected: u32,
    pub engine: *const EngineCell,
    pub memory: *const Memory,
    pub shared: *mut u8,
    pub shared_bytes: usize,
    pub yielder: Cell<*const Yielder<(), Yield>>,
    /// What it gives to an exchange, the lane whose gift it takes, and what that was if the lane took part.
    pub given: Cell<u64>,
    pub source: Cell<u32>,
    pub received: Cell<Option<u64>>,
    /// What it brings to a collective operation.
    pub operands: Cell<*mut c_void>,
    /// Asynchronous copies that have not arrived, by group; the last group is open.
    pub copies: RefCell<VecDeque<Vec<Copy>>>,
    /// Which of them arrive at once.
    pub dice: RefCell<Dice>,
}

/// An asynchronous copy to shared memory: `bytes` from global memory, the rest of 16 zeros.
pub struct Copy {
    to: *mut u8,
    from: *const u8,
    bytes: usize,
}

impl Copy {
    const SIZE: usize = 16;

    fn carry_out(&self) {
        // SAFETY: the ends were checked when the copy was issued, and both memories outlive the launch.
        unsafe {
            self.to.copy_from_nonoverlapping(self.from, self.bytes);
            self.to.add(self.bytes).write_bytes(0, Self::SIZE - self.bytes);
        }
    }
}

impl Context {
    pub fn thread(&self) -> Thread {
        Thread { block: self.coordinates.block, thread: self.coordinates.thread }
    }

    fn give_way(&self, why: Yield) {
        // SAFETY: set when the coroutine started, which has not ended: it is the one that calls this.
        unsafe { &*self.yielder.get() }.suspend(why);
    }

    pub fn wait(&self, what: Wait) {
        self.give_way(Yield::Wait(what));
    }

    /// Ends the launch. The scheduler never resumes a thread that reports a fault.
    pub fn fail(&self, fault: Fault) -> ! {
        self.give_way(Yield::Fault(Box::new(fault)));
        unreachable!("a failed thread is not resumed");
    }
}

/// The engine, and whether the launch has used it: a look that every switch of threads affords.
pub struct EngineCell {
    pub is_used: Cell<bool>,
    pub engine: RefCell<Engine>,
}

impl Context {
    pub fn at(&self, place: Place) -> Who {
        Who { index: self.index, thread: self.thread(), place }
    }

    /// Number among the threads of its block.
    pub fn index_in_block(&self) -> u32 {
        let [x, y, z] = self.coordinates.thread;
        let [width, height, _] = self.coordinates.block_dim;
        x + width * (y + height * z)
    }

    /// What the engine does with the thread's request, which is given the thread's block.
    pub fn ask<T>(&self, request: impl FnOnce(&mut Engine, usize) -> Result<T, Fault>) -> T {
        // SAFETY: the engine outlives the cluster's threads.
        let cell = unsafe { &*self.engine };
        cell.is_used.set(true);
        let answer = {
            let engine = &mut *cell.engine.borrow_mut();
            let block = self.index / engine.per_block;
            request(engine, block)
        };
        // No borrow lasts until another thread runs.
        answer.unwrap_or_else(|fault| self.fail(fault))
    }
}

thread_local! {
    pub static CURRENT: Cell<*const Context> = const { Cell::new(std::ptr::null()) };
}

/// The thread that runs.
pub fn current() -> &'static Context {
    // SAFETY: hooks are only called by kernels, which the scheduler only runs with this set; the reference is gone before
    // the block ends.
    unsafe { &*CURRENT.get() }
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_thread() -> *const Coordinates {
    &raw const current().coordinates
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_shared() -> *mut u8 {
    current().shared
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_barrier(file: *const c_char, line: u32) {
    current().wait(Wait::Barrier(Place { file, line }));
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_exchange(file: *const c_char, line: u32, mask: u32, source: u32, value: u64) -> u64 {
    let (context, place) = (current(), Place { file, line });
    let inactive = |lane: u32| {
        context.fail(Fault::InactiveLane { thread: context.thread(), place: place.to_string(), lane })
    };
    let own = context.index_in_block() % WARP as u32;
    if mask >> own & 1 == 0 {
        inactive(own);
    }
    context.given.set(value);
    context.source.set(source);
    context.wait(Wait::Exchange(place, mask));
    context.received.get().unwrap_or_else(|| inactive(source))
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_collective(
    file: *const c_char,
    line: u32,
    operation: Collective,
    operands: *mut c_void,
) {
    let (context, place) = (current(), Place { file, line });
    let last = context.coordinates.block_dim.iter().product::<u32>() % WARP as u32;
    if last != 0 {
        let thread = context.thread();
        context.fail(Fault::InactiveLane { thread, place: place.to_string(), lane: last });
    }
    context.operands.set(operands);
    context.wait(Wait::Collective(place, operation));
}

/// Checks that `bytes` bytes of shared memory, a power of two, lie inside it and are aligned to their number.
#[unsafe(no_mangle)]
extern "C" fn pace_simt_shared_access(address: *const c_void, bytes: usize) {
    let context = current();
    let offset = (address as usize).wrapping_sub(context.shared as usize) as i64;
    let inside = offset >= 0 && offset as usize + bytes <= context.shared_bytes;
    if !inside || offset as usize & (bytes - 1) != 0 {
        let access = Access { offset, bytes, is_write: false };
        let (thread, tensor) = (context.thread(), SHARED.to_owned());
        context.fail(match inside {
            true => Fault::Misaligned { thread, access, tensor },
            false => Fault::OutOfBounds { thread, access, tensor },
        });
    }
}

/// Notes a copy of 16 bytes to shared memory, of which `bytes` come from global memory.
#[unsafe(no_mangle)]
extern "C" fn pace_simt_copy_async(to: *mut c_void, from: *const c_void, bytes: usize) {
    pace_simt_shared_access(to, Copy::SIZE);
    if bytes > 0 {
        pace_simt_access(from, Copy::SIZE, false);
    }
    let copy = Copy { to: to.cast(), from: from.cast(), bytes };
    let context = current();
    // At once: it overwrites what others still read. Late: who does not wait for it does not find it.
    if context.dice.borrow_mut().roll(2) == 1 {
        copy.carry_out();
        return;
    }
    let mut copies = context.copies.borrow_mut();
    if copies.is_empty() {
        copies.push_back(Vec::new());
    }
    copies.back_mut().expect("a group is open").push(copy);
}

/// Closes the open group of copies.
#[unsafe(no_mangle)]
extern "C" fn pace_simt_commit_copies() {
    let mut copies = current().copies.borrow_mut();
    if copies.is_empty() {
        copies.push_back(Vec::new());
    }
    copies.push_back(Vec::new());
}

/// Carries out what is left of all but the last `pending` closed groups: a kernel that does not wait does not find it.
#[unsafe(no_mangle)]
extern "C" fn pace_simt_wait_for_copies(pending: u32) {
    let mut copies = current().copies.borrow_mut();
    while copies.len() > pending as usize + 1 {
        copies.pop_front().expect("it is not empty").iter().for_each(Copy::carry_out);
    }
}

#[unsafe(no_mangle)]
extern "C" fn pace_simt_access(address: *const c_void, bytes: usize, is_write: bool) {
    let context = current();
    // SAFETY: the memory outlives the launch.
    let memory = unsafe { &*context.memory };
    if let Err(fault) = memory.access(context.thread(), address as usize, bytes, is_write) {
        context.fail(fault);
    }
}
