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
    #[error("`labels[{position}]` is {label}, expected 0 to {} or the ignored label", .classes.saturating_sub(1))]
    Label {
        /// Position in `labels`.
        position: usize,
        /// The label given.
        label: i64,
        /// Number of classes.
        classes: usize,
    },
    /// A history index is out of range.
    #[error("`index[{position}]` is {index}, expected 0 to {} (the rows of `history`)", .rows.saturating_sub(1))]
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
    /// There is no CUDA driver on this machine.
    #[cfg(feature = "cuda")]
    #[error("no CUDA driver: {0}; install NVIDIA's driver, or use the operators in `cpu`")]
    NoDriver(String),
    /// The CUDA driver has no device of this number.
    #[cfg(feature = "cuda")]
    #[error("there is no CUDA device {ordinal}: the driver shows {count} (see CUDA_VISIBLE_DEVICES)")]
    NoDevice {
        /// The number asked for, from 0.
        ordinal: usize,
        /// Devices that there are.
        count: usize,
    },
    /// The kernels do not run on this generation of devices.
    #[cfg(feature = "cuda")]
    #[error("CUDA device {ordinal} has compute capability {major}.{minor}, expected 8.0 (Ampere) or newer")]
    DeviceTooOld {
        /// The device.
        ordinal: usize,
        /// Its compute capability.
        major: u32,
        /// Its compute capability, behind the point.
        minor: u32,
    },
    /// This build of the crate has no kernels in it.
    #[cfg(feature = "cuda")]
    #[error(
        "this build has no CUDA kernels: {why}; set CUDA_HOME to a CUDA toolkit and build again \
         (PACE_REQUIRE_NVCC=1 makes a missing one an error)"
    )]
    KernelsNotBuilt {
        /// Why the build left them out.
        why: &'static str,
    },
    /// A stream or a tensor belongs to another device or context than the operator's.
    #[cfg(feature = "cuda")]
    #[error(
        "`{argument}` belongs to CUDA device {got} or another context of it, expected the primary one of {expected}"
    )]
    OtherDevice {
        /// Name of the argument.
        argument: &'static str,
        /// The operator's device.
        expected: usize,
        /// The argument's device.
        got: usize,
    },
    /// A call of the CUDA driver failed.
    #[cfg(feature = "cuda")]
    #[error("the CUDA driver could not {action}: {status}")]
    Driver {
        /// What was tried.
        action: &'static str,
        /// The driver's name for what went wrong.
        status: String,
    },
    /// A call of cuBLASLt failed.
    #[cfg(feature = "cuda")]
    #[error("cuBLASLt could not {action}: {status}")]
    Library {
        /// What was tried.
        action: &'static str,
        /// The library's name for what went wrong.
        status: String,
    },
    /// A family of kernels was asked for that does not run on the device.
    #[cfg(feature = "cuda")]
    #[error("the family `{family}` does not run on CUDA device {ordinal}: {why}")]
    NoFamily {
        /// Its name.
        family: &'static str,
        /// The device, from 0.
        ordinal: usize,
        /// What it lacks.
        why: String,
    },
    /// A weight file does not hold what the model needs.
    #[error("weights: {0}")]
    Weights(String),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
