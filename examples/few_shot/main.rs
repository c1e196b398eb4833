//! Few-shot fine-tuning of a small vision transformer, from MNIST to Optdigits.

mod charts;
mod data;
mod progress;
mod report;

fn main() {}
