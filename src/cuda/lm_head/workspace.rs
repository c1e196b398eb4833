//! How much workspace a head takes, and what lies where in it.

use super::{LmHead, MAX_BLOCKS};
use crate::cuda::buffer::{Address, DType};
use crate::cuda::gemm::{Arena, Workspace};
use crate::cuda::gpu::Gpu;

/// Bytes that the logits of a chunk and all that grows with them may take.
const BUDGET: usize = 250_000_000;
/// Rows of a chunk are a multiple of this, where there are more: tiles of a GEMM.
const ROWS: usize = 128;
/// Rows of a branch that meet the Gram matrix at a time.
const GRAM_ROWS: usize = 2048;

/// The workspace behind its first words, cut up. What is not needed has no address. What the Gram matrix needs comes first, and then
/// the logits take its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) library: Workspace,
    /// 1 over the number of labels, `f32`.
    pub(super) weight: Address,
    pub(super) logits: LogitPlaces,
    pub(super) gram: GramPlaces,
}

/// What chunks of logits need.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogitPlaces {
    /// Rows of a branch in a chunk.
    pub(super) rows: usize,
    /// Logits of the branches that have them, then their gradients.
    pub(super) logits: Address,
    /// `Δh`, rounded.
    pub(super) delta: Address,
    /// `h·Aᵀ` and `dl·B` of one branch.
    pub(super) low_rank: [Address; 2],
}

/// What the Gram matrix needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct GramPlaces {
    /// Rows of a branch in a chunk.
    pub(super) rows: usize,
    /// `Δh` in parts.
    pub(super) delta: [Address; 2],
    /// `Δh·G`, `f32`.
    pub(super) product: Address,
    /// `G` if it is not given as it is multiplied, `f32`.
    pub(super) matrix: Address,
    /// `G` in parts; at the end `ΔhᵀΔh`, rounded.
    pub(super) parts: [Address; 2],
    /// `ΔhᵀΔh`, `f32`.
    pub(super) moment: Address,
    pub(super) lora: GramLora,
}

/// What LoRA adds to that: matrices in `f32`, and in parts of the type of tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct GramLora {
    /// `BᵀB [r, r]`; later another of this shape.
    pub(super) square: Address,
    pub(super) square_parts: [Address; 2],
    /// `BᵀW [r, H]`, and what is added to it.
    pub(super) cross: Address,
    pub(super) cross_parts: [Address; 2],
    /// `[H, r]`.
    pub(super) right: Address,
    pub(super) right_rounded: Address,
}

fn bytes(rows: usize, columns: usize, bytes: usize) -> usize {
    rows.saturating_mul(columns).saturating_mul(bytes)
}

/// Takes what is needed.
fn take_if(arena: &mut Arena, is_needed: bool, bytes: usize) -> Address {
    if is_needed { arena.take(bytes) } else { Address::NONE }
}

impl<T, I, F> LmHead<T, I, F> {
    /// The `u32` elements of workspace.
    pub(super) fn len(&self, gpu: &Gpu, dtype: DType, trains_weight: bool) -> usize {
        let rest = Arena::len_of(|arena| {
            self.places(gpu, dtype, trains_weight, arena);
        });
        self.words(self.rows(dtype, trains_weight)).saturating_add(rest)
    }

    /// The beginning of the workspace, where the word lies that has to be zero: the loss's part, or what a sum over blocks needs.
    pub(super) fn words(&self, rows: usize) -> usize {
        self.settings.workspace_len(rows).max(1 + MAX_BLOCKS)
    }

    /// Rows of a branch in a chunk of logits.
    pub(super) fn rows(&self, dtype: DType, trains_weight: bool) -> usize {
        let fitting = || {
            let words = |rows| {
                let rest = Arena::len_of(|arena| {
                    self.logit_places(dtype, trains_weight, rows, arena);
                });
                self.words(rows).saturating_add(rest)
            };
            let most = (BUDGET / 4 / words(ROWS)).max(1).saturating_mul(ROWS);
            // All chunks about the same.
            self.tokens.div_ceil(self.tokens.div_ceil(most)).next_multiple_of(ROWS)
        };
        self.chunk_rows.unwrap_or_else(fitting).min(self.tokens)
    }

    /// What lies where behind the first words.
    pub(super) fn places(&self, gpu: &Gpu, dtype: DType, trains_weight: bool, arena: &mut Arena) -> Places {
        let (v, h, rows) = (self.settings.classes, self.hidden_size, self.rows(dtype, trains_weight));
        let has_gram = self.has_gram(dtype, trains_weight);
        let weight = take_if(arena, has_gram, 4);
        let largest = bytes(rows, v.max(h), 1).max(bytes(v, h, usize::from(trains_weight)));
        let library = arena.take_workspace(gpu, largest.max(bytes(h, h, usize::from(has_gram))));
        let mut of_gram = *arena;
        let logits = self.logit_places(dtype, trains_weight, rows, arena);
        let gram = self.gram_places(dtype, trains_weight, &mut of_gram);
        *arena = arena.after_both(of_gram);
        Places { library, weight, logits, gram }
    }

    fn logit_places(&self, dtype: DType, trains_weight: bool, rows: usize, arena: &mut Arena) -> LogitPlaces {
        let (v, h, size) = (self.settings.classes, self.hidden_size, dtype.bytes());
        let has_gram = self.has_gram(dtype, trains_weight);
        let branches = if has_gram { 1 } else { self.branches };
        let logits = arena.take(bytes(branches.saturating_mul(rows), v, size));
        let delta = take_if(arena, branches == 2 && self.soft_cap.is_none(), bytes(rows, h, size));
        let rank = self.lora.as_ref().map_or(0, |lora| lora.rank);
        let low_rank = [rank > 0; 2].map(|is_needed| take_if(arena, is_needed, bytes(rows, rank, size)));
        LogitPlaces { rows, logits, delta, low_rank }
    }

    fn gram_places(&self, dtype: DType, trains_weight: bool, arena: &mut Arena) -> GramPlaces {
        let (h, size) = (self.hidden_size, dtype.bytes());
        let rows = self.chunk_rows.unwrap_or(GRAM_ROWS).min(self.tokens);
        let has_gram = self.has_gram(dtype, trains_weight);
        let has_lora = has_gram && self.lora.is_some();
        let in_parts = has_gram && dtype != DType::F32;
        let delta = [has_gram, in_parts].map(|is_needed| take_if(arena, is_needed, bytes(rows, h, size)));
        let product = take_if(arena, has_gram, bytes(rows, h, 4));
        let parts = [in_parts; 2].map(|is_needed| take_if(arena, is_needed, bytes(h, h, size)));
        let has_matrix = has_gram && (self.gram.is_none() || has_lora);
        let matrix = take_if(arena, has_matrix, bytes(h, h, 4));
        // Once it is in parts, the Gram matrix is not needed any more.
        let moment = match in_parts && has_matrix {
            true => matrix,
            false => take_if(arena, has_gram && (trains_weight || has_lora), bytes(h, h, 4)),
        };
        let rank = self.lora.as_ref().map_or(0, |lora| lora.rank);
        let mut pair = |size: usize| {
            let of_lora = [has_lora, has_lora && dtype != DType::F32];
            of_lora.map(|is_needed| take_if(arena, is_needed, size))
        };
        let square_parts = pair(bytes(rank, rank, size));
        let cross_parts = pair(bytes(rank, h, size));
        let square = take_if(arena, has_lora, bytes(rank, rank, 4));
        let cross = take_if(arena, has_lora, bytes(rank, h, 4));
        let right = take_if(arena, has_lora, bytes(h, rank, 4));
        let right_rounded = take_if(arena, has_lora, bytes(h, rank, size));
        let lora = GramLora { square, square_parts, cross, cross_parts, right, right_rounded };
        GramPlaces { rows, delta, product, matrix, parts, moment, lora }
    }
}
