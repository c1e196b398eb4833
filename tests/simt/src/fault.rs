//! What the simulator can find wrong.

use std::fmt;

/// A thread by its place in the launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread {
    /// `blockIdx`.
    pub block: [u32; 3],
    /// `threadIdx`.
    pub thread: [u32; 3],
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {:?} thread {:?}", self.block, self.thread)
    }
}

/// One access to global memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Bytes from the start of the nearest tensor; negative before it.
    pub offset: i64,
    /// Bytes accessed.
    pub bytes: usize,
    /// Whether it writes.
    pub is_write: bool,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_write { "writes" } else { "reads" };
        write!(f, "{what} {} bytes at byte {}", self.bytes, self.offset)
    }
}

/// What is wrong with a launch or with what it left behind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// There is no kernel of this name.
    #[error("there is no kernel `{0}`")]
    UnknownKernel(String),
    /// The parameters do not have the size of the kernel's struct.
    #[error("the parameters have {got} bytes, the kernel's struct has {expected}")]
    ParamsSize {
        /// Bytes of the struct.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// No GPU would accept the launch.
    #[error(
        "no device can launch a grid of {grid:?} blocks of {block:?} threads with {shared_bytes} bytes shared"
    )]
    Geometry {
        /// Blocks.
        grid: [u32; 3],
        /// Threads.
        block: [u32; 3],
        /// Dynamic shared memory.
        shared_bytes: u32,
    },
    /// An access outside every tensor.
    #[error("{thread} {access} of `{tensor}`, out of its bounds")]
    OutOfBounds {
        /// Who.
        thread: Thread,
        /// What.
        access: Access,
        /// The nearest tensor.
        tensor: String,
    },
    /// An address that is not a multiple of the access's size.
    #[error("{thread} {access} of `{tensor}`, misaligned")]
    Misaligned {
        /// Who.
        thread: Thread,
        /// What.
        access: Access,
        /// The tensor.
        tensor: String,
    },
    /// A write to an input.
    #[error("{thread} {access} of `{tensor}`, an input")]
    WriteToInput {
        /// Who.
        thread: Thread,
        /// What.
        access: Access,
        /// The tensor.
        tensor: String,
    },
    /// A read of something that nobody wrote.
    #[error("{thread} {access} of `{tensor}`, which nobody has written")]
    ReadBeforeWrite {
        /// Who.
        thread: Thread,
        /// What.
        access: Access,
        /// The tensor.
        tensor: String,
    },
    /// A write beside a tensor, or into an input, that no check saw.
    #[error("something changed byte {offset} of `{tensor}`, outside what may be written")]
    Corrupted {
        /// The tensor, or `shared memory`.
        tensor: String,
        /// Bytes from its start.
        offset: i64,
    },
    /// An output element that nobody wrote.
    #[error("element {element} of `{tensor}` was never written")]
    Unwritten {
        /// The tensor.
        tensor: String,
        /// Index of the first such element.
        element: usize,
    },
    /// Threads of a block that do not meet at one barrier.
    #[error("barrier divergence: {waiting} waits at {place}, but {other} {otherwise}")]
    BarrierDivergence {
        /// Who waits.
        waiting: Thread,
        /// File and line of the barrier.
        place: String,
        /// Who does not come.
        other: Thread,
        /// What it does instead.
        otherwise: String,
    },
    /// Lanes of a warp that do not meet at one exchange.
    #[error("warp divergence: {waiting} waits at {place} for lanes {mask:#010x}, but {other} {otherwise}")]
    WarpDivergence {
        /// Who waits.
        waiting: Thread,
        /// File and line of the exchange.
        place: String,
        /// The lanes that have to come.
        mask: u32,
        /// Who does not come.
        other: Thread,
        /// What it does instead.
        otherwise: String,
    },
    /// An exchange with a lane that takes no part in it.
    #[error("{thread} at {place} involves lane {lane}, which takes no part")]
    InactiveLane {
        /// Who.
        thread: Thread,
        /// File and line of the exchange.
        place: String,
        /// The lane: the source, or the thread's own if its mask leaves it out.
        lane: u32,
    },
    /// Clusters that are not those that the kernel declares, or a grid that is no multiple of them.
    #[error(
        "the kernel has clusters of {declared} blocks along x; the launch, of {cluster:?} in a grid of {grid:?}"
    )]
    Cluster {
        /// What the kernel declares.
        declared: u32,
        /// What the launch has.
        cluster: [u32; 3],
        /// Blocks.
        grid: [u32; 3],
    },
    /// An instruction that the hardware would not take so, or a tensor map that the driver would not encode.
    #[error("{thread} at {place}: {why}")]
    Instruction {
        /// Who.
        thread: Thread,
        /// File and line.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// An mbarrier that is not used as it has to be.
    #[error("{thread} at {place}, mbarrier at {address:#x}: {why}")]
    Mbarrier {
        /// Who.
        thread: Thread,
        /// File and line.
        place: String,
        /// Its shared address.
        address: u32,
        /// What is wrong.
        why: String,
    },
    /// The threads of a warpgroup that do not meet at one instruction.
    #[error("warpgroup divergence: {waiting} is at {place}, but {other} {otherwise}")]
    WarpgroupDivergence {
        /// Who is there.
        waiting: Thread,
        /// File and line of the instruction.
        place: String,
        /// Who is not.
        other: Thread,
        /// What it does instead.
        otherwise: String,
    },
    /// Registers that a wgmma still uses were changed.
    #[error("{thread} changed {registers} of the wgmma at {place} before it was waited for")]
    RegistersInFlight {
        /// Who.
        thread: Thread,
        /// File and line of the wgmma.
        place: String,
        /// Which: `accumulators` or `A registers`.
        registers: &'static str,
    },
    /// Registers changed, or never ordered, and then used by a wgmma without a `wgmma_fence` in between.
    #[error("{thread}: no wgmma_fence between a change of {registers} and the wgmma at {place}")]
    MissingWgmmaFence {
        /// Who.
        thread: Thread,
        /// File and line of the wgmma.
        place: String,
        /// Which: `accumulators`, `A registers`, or `registers` where there was no fence at all.
        registers: &'static str,
    },
    /// The async proxy reads what threads have written and not made visible to it.
    #[error(
        "{thread} at {place} makes the async proxy read shared address {address:#x}, written by {} \
         and not fenced by fence_async_proxy", writer.map_or("somebody".to_owned(), |writer| writer.to_string())
    )]
    MissingProxyFence {
        /// Who lets it read.
        thread: Thread,
        /// File and line.
        place: String,
        /// The first such byte.
        address: u32,
        /// Who wrote there, if that is known.
        writer: Option<Thread>,
    },
    /// A thread or its block returns while something still uses its registers or shared memory, or is used afterwards.
    #[error("{thread} {why}")]
    EndedEarly {
        /// Who: the thread that returns, or that uses a block which has returned.
        thread: Thread,
        /// What is still under way.
        why: String,
    },
    /// Nothing can go on.
    #[error("nothing can go on:{}", .0.iter().map(|waiting| format!("\n  {waiting}")).collect::<String>())]
    Hang(Vec<Waiting>),
}

/// Threads of a block that wait at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The first of them.
    pub first: Thread,
    /// How many.
    pub threads: usize,
    /// What they do.
    pub what: String,
    /// The mbarrier that they wait for.
    pub barrier: Option<BarrierState>,
}

/// How far an mbarrier has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarrierState {
    /// Its shared address.
    pub address: u32,
    /// Phases that have completed.
    pub phase: u32,
    /// Arrivals that the phase waits for.
    pub arrivals: u32,
    /// Bytes that it waits for.
    pub bytes: i64,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, one of {}, {}", self.first, self.threads, self.what)?;
        let Some(BarrierState { address, phase, arrivals, bytes }) = self.barrier else { return Ok(()) };
        write!(f, ": mbarrier at {address:#x} in phase {phase} lacks {arrivals} arrivals and {bytes} bytes")
    }
}
