//! Runs the CUDA kernels of `kernels/*.cu` on a CPU, thread by thread, and checks what they do.
//!
//! The kernels are compiled by the host's C++ compiler; each CUDA thread is a coroutine, and barriers and warp exchanges
//! are where it switches to another. A launch is given as the same grid, block and parameter bytes as on a GPU:
//!
//! ```
//! use pace_simt::{Launch, Memory, Schedule};
//!
//! let mut memory = Memory::new(0);
//! let (x, y) = (memory.input("x", &[1.0f32, 2.0, 3.0]), memory.output::<f32>("y", 3));
//! let params: Vec<u8> = [x.address(), y.address(), 3].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
//! let launch = Launch {
//!     kernel: "copy", grid: [1; 3], cluster: [1; 3], block: [4, 1, 1], shared_bytes: 0, params: &params,
//! };
//! memory.launch(&launch, Schedule::Random(1))?;
//! assert_eq!(memory.read::<f32>(&y)?, [1.0, 2.0, 3.0]);
//! # Ok::<(), pace_simt::Fault>(())
//! ```
//!
//! What it notices, each as a [`Fault`] that names block and thread where there is one: accesses out of bounds, misaligned,
//! to inputs that are only to be read, and of elements that nobody wrote; writes past the ends that went unseen; outputs
//! left unwritten; barriers and warp exchanges that some threads do not reach, or collective operations that not all lanes
//! of a warp do. A barrier or a wait that is missing shows in results that are wrong or differ between [`Schedule`]s; so
//! does shared memory that nobody wrote, which holds NaN. Clusters run one after the other, so it does not show races between
//! blocks of different ones other than by their order.
//!
//! # What kernels of compute capability 9.0a do beside their threads
//!
//! The blocks of a cluster run together. Tensor copies land, stores read and wgmmas execute at random times between their issue
//! and the wait for them, or as late as they may; a [`TensorMap`] stands in the parameters where the driver's would. Noticed
//! as well:
//!
//! * descriptors, tensor maps, boxes and numbers that the hardware or the driver would not take, and tiles that are not aligned
//!   to their swizzle's pattern;
//! * mbarriers used before they are initialised or without `fence_barriers`, with too many arrivals, or overwritten;
//! * when nothing can go on, who waits where, and what each mbarrier lacks: a wrong number of bytes or arrivals, a stage that
//!   nobody releases, a thread that never comes to a barrier;
//! * warpgroups whose threads do not meet at one instruction with the same operands;
//! * accumulators and A registers changed while a wgmma uses them, and changed without a `wgmma_fence` before the next use;
//!   accumulators read meanwhile are NaN;
//! * what threads wrote to shared memory and the async proxy reads without `fence_async_proxy`;
//! * threads that return before their stores have read shared memory or their wgmmas are done, and blocks that leave while
//!   another copies to them or arrives at their barriers.
//!
//! A stage that is released or reused too early, a wrong parity, or a descriptor whose swizzle is not that of the tensor map
//! shows in wrong results, the first not in every schedule. Not modelled: registers that the hardware does not have, the memory
//! order between clusters, and the proxy fence that a thread owes before the async proxy writes what it has read.

mod async_copy;
mod async_hooks;
mod engine;
mod fault;
mod hooks;
mod machine;
mod mbarrier;
mod memory;
mod stuck;
mod tensor_map;
mod tile;
mod wgmma;

pub use fault::{Access, BarrierState, Fault, Thread, Waiting};
pub use machine::{Launch, Schedule, kernels};
pub use memory::{Memory, Tensor};
pub use tensor_map::TensorMap;

/// Whether the sanitizers watch the kernels.
pub const IS_SANITIZED: bool = cfg!(feature = "sanitize");
