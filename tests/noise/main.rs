//! The noise: the generator's known answers, the accuracy and the distribution of its normals, and that an element's
//! noise depends on its address alone (not on batch splits, channel windows, vector width or language).
//!
//! Every draw is a fixed function of its address, so these tests cannot fail by chance: each statistical check passed
//! once and for all. What its false-alarm rate says is how often an *ideal* generator would fail it, and with that
//! how strict the check is. Checks print what they measured (`cargo test --test noise -- --nocapture`).

mod accuracy;
mod addresses;
mod arguments;
mod cpp_header;
mod distribution;
mod drop_path;
mod independence;
mod instruction_sets;
mod known_answers;
mod specification;
mod support;
