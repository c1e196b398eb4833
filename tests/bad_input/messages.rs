//! What errors say.

use crate::support::*;
use pace_kernels::Error;

/// A message names the argument, what was expected and what was given.
#[test]
fn messages() {
    let messages = [
        (
            Error::Length { argument: "base.bias", shape: "[N]", expected: 3, got: 2 },
            "`base.bias` has 2 elements, but its shape [N] needs 3",
        ),
        (size("branches", "1 or 2", 3), "`branches` is 3, expected 1 or 2"),
        (
            Error::Overflow { argument: "x", shape: "[M, K]" },
            "the size of `x` overflows: its shape is [M, K]",
        ),
        (
            value("lambda", "finite and not negative", f64::NAN),
            "`lambda` is NaN, expected finite and not negative",
        ),
        (
            Error::Label { position: 4, label: -7, classes: 10 },
            "`labels[4]` is -7, expected 0 to 9 or the ignored label",
        ),
        (
            Error::Index { position: 1, index: 9, rows: 5 },
            "`index[1]` is 9, expected 0 to 4 (the rows of `history`)",
        ),
        (
            Error::DuplicateIndex { position: 1, index: 9 },
            "`index[1]` repeats 9: each history row may occur once in a batch",
        ),
        (Error::Argument { argument: "mask", problem: "is required" }, "`mask` is required"),
    ];
    for (error, message) in messages {
        assert_eq!(error.to_string(), message);
    }
}
