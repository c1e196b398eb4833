//! What `cargo rustc --lib --features capi --crate-type cdylib,staticlib` makes for users, without compiling the crate again.

pub use pace_kernels::capi;
