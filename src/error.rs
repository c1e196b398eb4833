//! The one error type of the crate.

/// What can be wrong with the arguments of an operator, or with the outside world.
///
/// Every message names the argument, says what was expected and what was given.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A slice does not have the number of elements that the shape asks for.
    #[error("`{argument}` has {got} elements, but its shape {shape} needs {expected}")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// The expected shape in words, for example `[M, K]`.
        shape: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A size is zero, odd, or otherwise impossible.
    #[error("`{argument}` is {got}, expected {expected}")]
    Size {
        /// Name of the argument.
        argument: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// The size given.
        got: usize,
    },
    /// The number of elements of a tensor does not fit the machine's address space.
    #[error("the size of `{argument}` overflows: its shape is {shape}")]
    Overflow {
        /// Name of the tensor.
        argument: &'static str,
        /// The shape in words.
        shape: &'static str,
    },
    /// A scalar setting is outside its range (or not finite).
    #[error("`{argument}` is {got}, expected {expected}")]
    Value {
        /// Name of the argument.
        argument: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// The value given.
        got: f64,
    },
    /// A class label is neither in `0..classes` nor the ignored label.
    #[error("`labels[{position}]` is {label}, expected 0..{classes} or the ignored label")]
    Label {
        /// Position in `labels`.
        position: usize,
        /// The label given.
        label: i64,
        /// Number of classes.
        classes: usize,
    },
    /// A history index is out of range.
    #[error("`index[{position}]` is {index}, expected 0..{rows} (the rows of `history`)")]
    Index {
        /// Position in `index`.
        position: usize,
        /// The index given.
        index: i64,
        /// Rows of the history table.
        rows: usize,
    },
    /// Two samples of one batch name the same history row, so the row to keep would be a matter of chance.
    #[error("`index[{position}]` repeats {index}: each history row may occur once in a batch")]
    DuplicateIndex {
        /// Position of the second occurrence.
        position: usize,
        /// The repeated index.
        index: i64,
    },
    /// An argument is needed in this configuration and absent, or present and not allowed.
    #[error("`{argument}` {problem}")]
    Argument {
        /// Name of the argument.
        argument: &'static str,
        /// What is wrong with its presence.
        problem: &'static str,
    },
    /// A weight file does not hold what the model needs.
    #[error("weights: {0}")]
    Weights(String),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
