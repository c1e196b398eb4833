//! What the kernels of the loss get, and the constants that they share with its plans.

use crate::cuda::pointer::{Input, Output, Void};
use bytemuck::{Pod, Zeroable};

/// What a thread holds of a row.
pub const LOSS_ELEMENTS: usize = 8;
/// Threads that share a row or a slice of one, at most; then they are the block.
pub const LOSS_GROUP: usize = 512;
/// Words of shared memory for each warp of a block; one more is for all of them.
pub const LOSS_SHARED_WORDS: usize = 34;
/// Of a slice, where the loss is not the paper's; more than what the paper's needs.
pub const LOSS_GENERAL_SUMMARY_WORDS: usize = 22;
/// Of a row of more slices, there.
pub const LOSS_GENERAL_KNOWN_WORDS: usize = 35;
/// Words of the status.
pub const LOSS_STATUS_WORDS: usize = 9;

/// What the criterion is of.
pub const LOSS_LABELS: u32 = 0;
pub const LOSS_PROBABILITIES: u32 = 1;
pub const LOSS_VALUES: u32 = 2;

/// The divergences: those of differences of logits, those among them that need their mean, and those of probabilities.
pub const LOSS_SQUARED_DIFFERENCE: u32 = 0;
pub const LOSS_CENTERED_SQUARED_DIFFERENCE: u32 = 1;
pub const LOSS_SYMMETRIC_KL: u32 = 2;
pub const LOSS_KL: u32 = 3;
pub const LOSS_JENSEN_SHANNON: u32 = 4;

/// Parameters of the kernels `loss*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LossParams {
    pub(super) logits: Input<Void>,
    /// Null: the targets are others.
    pub(super) labels: Input<i64>,
    /// Labels that are counted: those above, or more.
    pub(super) counted: Input<i64>,
    /// Probabilities or values.
    pub(super) targets: Input<f32>,
    /// Null: all 1.
    pub(super) class_weights: Input<f32>,
    /// Null: none.
    pub(super) history: Output<f32>,
    pub(super) index: Input<i64>,
    /// Null: not wanted.
    pub(super) gradient: Output<Void>,
    pub(super) values: Output<f32>,
    pub(super) status: Output<u64>,
    pub(super) workspace: Output<u32>,
    pub(super) history_rows: u64,
    pub(super) ignore_label: i64,
    pub(super) first_row: u64,
    /// Rows and slices of every tensor start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u64,
    pub(super) has_ignore_label: u32,
    pub(super) two_branches: u32,
    pub(super) labelled_only: u32,
    /// Whether `pull` is still to be divided by the number of labels: they alone take part, and there is no denominator.
    pub(super) pull_per_label: u32,
    pub(super) accumulate: u32,
    /// `LOSS_LABELS`, `LOSS_PROBABILITIES` or `LOSS_VALUES`.
    pub(super) criterion: u32,
    /// `LOSS_SQUARED_DIFFERENCE` and so on; the mean of squares differs from their sum by `scale` alone.
    pub(super) divergence: u32,
    /// Whether the criterion is of both branches.
    pub(super) both_branches: u32,
    /// Whether the second half of the logits is their difference.
    pub(super) is_difference: u32,
    pub(super) detach_target: u32,
    /// Samples `B`, below 2^24: counts and positions are exact in f32.
    pub(super) batch: u32,
    /// Labels that are counted; samples, where there are none.
    pub(super) counted_len: u32,
    /// Classes `C`.
    pub(super) classes: u32,
    /// Elements of a slice; the last may have fewer.
    pub(super) slice: u32,
    /// Slices of a row.
    pub(super) slices: u32,
    /// Threads of a group.
    pub(super) group: u32,
    pub(super) lambda: f32,
    /// Label smoothing `s`.
    pub(super) smoothing: f32,
    /// `s / C`.
    pub(super) spread: f32,
    /// What the divergence's gradient is multiplied by, such as `2 lambda / B`.
    pub(super) pull: f32,
    /// What the divergence is multiplied by: 1, `1 / C`, 1/2, `T^2`.
    pub(super) scale: f32,
    /// What both sums are divided by; 0: it is counted.
    pub(super) denominator: f32,
    /// `1 / T`.
    pub(super) inverse_temperature: f32,
    /// What logits are capped at, of `loss_general*`; 0: they are not.
    pub(super) soft_cap: f32,
}
