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
//! does shared memory that nobody wrote, which holds NaN. Blocks run one after the other, so it does not show races between
//! blocks other than by their order.

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
