//! The C interface: its header, programs that use it, and calls with anything in them.

mod abi;
mod calls;
mod fuzz;
mod header;
#[path = "../common/installed.rs"]
mod installed;
mod programs;
mod support;
