//! Nothing but the test in `tests/header.rs`.
