//! What a loss found wrong with labels and indices.

use crate::error::{Error, Result};

/// One kind of wrong element among the labels or indices of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finding {
    /// How many there are; the rest is zero if there are none.
    pub count: u64,
    /// Position of the first.
    pub position: u64,
    /// What stands there.
    pub value: i64,
}

/// What a loss found wrong with data that only the device has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LossStatus {
    /// Labels that are neither a class nor the ignored label. They count as ignored.
    pub labels: Finding,
    /// Indices that are not a row of the history table. Their samples have no consistency term.
    pub indices: Finding,
    /// Indices that an earlier sample of the batch has as well. Their samples have no consistency term, and the table keeps
    /// the logits of the first.
    pub repeated: Finding,
}

impl LossStatus {
    /// Length of the status in device memory.
    pub const WORDS: usize = super::LOSS_STATUS_WORDS;

    /// The status from what was downloaded.
    pub fn new(words: [u64; Self::WORDS]) -> Self {
        let finding =
            |i: usize| Finding { count: words[i], position: words[i + 1], value: words[i + 2].cast_signed() };
        Self { labels: finding(0), indices: finding(3), repeated: finding(6) }
    }

    /// The error that the CPU operator would have given, for a loss over that many classes and rows of history.
    ///
    /// # Errors
    /// [`Error::Label`] for the first wrong label; if there is none, [`Error::Index`] or [`Error::DuplicateIndex`] for the
    /// first wrong index.
    pub fn check(&self, classes: usize, rows: usize) -> Result<()> {
        let at = |finding: Finding| finding.position as usize;
        let Self { labels, indices, repeated } = *self;
        if labels.count > 0 {
            return Err(Error::Label { position: at(labels), label: labels.value, classes });
        }
        if indices.count > 0 && (repeated.count == 0 || indices.position < repeated.position) {
            return Err(Error::Index { position: at(indices), index: indices.value, rows });
        }
        if repeated.count > 0 {
            return Err(Error::DuplicateIndex { position: at(repeated), index: repeated.value });
        }
        Ok(())
    }
}
