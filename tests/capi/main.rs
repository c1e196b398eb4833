//! The C interface: its header, programs that use it, and calls with anything in them.

mod abi;
mod calls;
mod fields;
mod fuzz;
#[cfg(target_os = "linux")]
mod guarded;
mod header;
#[path = "../common/installed.rs"]
mod installed;
mod programs;
mod support;
