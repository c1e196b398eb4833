//! Parameters of the kernels of `kernels/lm_head.cu`.

use super::super::pointer::{Input, Output, Void};
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
pub const LM_HEAD_THREADS: usize = 256;

/// Rows of both branches.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadRows {
    pub(super) first: Input<Void>,
    pub(super) second: Input<Void>,
    pub(super) labels: Input<i64>,
    pub(super) ignore_label: i64,
    pub(super) has_ignore_label: u32,
    pub(super) labelled_only: u32,
    /// What labels are below.
    pub(super) classes: u32,
    pub(super) count: u32,
    pub(super) columns: u32,
    /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
    pub(super) aligned: u32,
}

/// Parameters of the kernels `lm_head_difference*` and `lm_head_parts*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadDifferenceParams {
    pub(super) rows: LmHeadRows,
    pub(super) high: Output<Void>,
    /// Null: not wanted.
    pub(super) low: Output<Void>,
}

/// Parameters of the kernels `lm_head_scale` and `lm_head_split`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadSplitParams {
    pub(super) matrix: Input<f32>,
    pub(super) high: Output<Void>,
    /// Null: not wanted.
    pub(super) low: Output<Void>,
    /// Another factor; null: none.
    pub(super) weight: Input<f32>,
    pub(super) factor: f32,
    pub(super) rows: u32,
    pub(super) columns: u32,
    pub(super) aligned: u32,
}

/// Parameters of the kernels `lm_head_pull*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadPullParams {
    pub(super) rows: LmHeadRows,
    pub(super) product: Input<f32>,
    /// Null: gradients are not wanted.
    pub(super) to_first: Output<Void>,
    pub(super) to_second: Output<Void>,
    pub(super) values: Output<f32>,
    pub(super) status: Output<u64>,
    pub(super) workspace: Output<u32>,
    /// Another factor of both below; null: none.
    pub(super) weight: Input<f32>,
    /// What a distance is multiplied by.
    pub(super) scale: f32,
    /// And its gradient, with lambda.
    pub(super) pull: f32,
    pub(super) lambda: f32,
    /// Whether values and status are set, rather than added to.
    pub(super) is_first: u32,
}

/// Parameters of the kernels `lm_head_bias*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadBiasParams {
    pub(super) gradient: Input<Void>,
    pub(super) bias: Output<f32>,
    pub(super) rows: u32,
    pub(super) columns: u32,
    pub(super) factor: f32,
    pub(super) accumulate: u32,
    pub(super) aligned: u64,
}

/// Parameters of the kernel `lm_head_weight`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LmHeadWeightParams {
    pub(super) labels: Input<i64>,
    pub(super) weight: Output<f32>,
    pub(super) ignore_label: i64,
    pub(super) has_ignore_label: u32,
    pub(super) classes: u32,
    pub(super) rows: u64,
}
