#![doc = include_str!("../README.md")]
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
// Unit tests are compiled without `capi` and `cuda`, whose tests are in `tests`: that is two thirds of the time. Then not all is used.
#![cfg_attr(test, allow(dead_code, unused_imports))]

pub mod adapter;
#[cfg(feature = "candle")]
pub mod candle;
#[cfg(all(feature = "capi", not(test)))]
pub mod capi;
pub mod cpu;
#[cfg(all(feature = "cuda", any(not(test), feature = "candle-cuda")))]
pub mod cuda;
mod error;
mod loss;
pub mod noise;
mod parallel;
mod real;
pub mod schedule;
mod shape;
mod vector;

pub use error::{Error, Result};
pub use loss::{Divergence, LossSettings, Targets};
pub use real::{Element, Real};
pub use shape::LinearShape;

/// The programs of the guide.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Guide;
