//! Few-shot fine-tuning of a small vision transformer, from MNIST to Optdigits.

mod data;
mod report;

fn main() {}
