//! Statistical tests of the noise: its raw words along every axis of the address, and its normals.
//!
//! The long form is the program, the short one `tests/battery.rs`. Streams are fixed functions of the generator, so a test
//! that passed passes for ever; what its false-alarm rate says is how often an ideal generator would fail it.

pub mod finding;
pub mod generator;
pub mod normals;
pub mod stream;
mod wide;
pub mod words;
