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
}
