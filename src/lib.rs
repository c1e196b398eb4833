#![doc = include_str!("../README.md")]
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod adapter;
#[cfg(feature = "candle")]
pub mod candle;
#[cfg(feature = "capi")]
pub mod capi;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod loss;
pub mod noise;
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
