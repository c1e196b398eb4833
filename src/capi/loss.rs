//! The training loss.

use super::call::*;
use super::types::*;
use super::{Failure, PACE_ERROR_VALUE, PaceDevice, PaceStatus, Result, run};
use crate::cuda::{self, DType, Gpu, LossSettings, LossStatus, Partner, Plan};
use crate::shape::nonzero;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Evaluate {}

fn settings(args: &PaceLoss) -> Result<LossSettings> {
    Ok(LossSettings {
        classes: size("classes", args.classes)?,
        lambda: args.lambda,
        label_smoothing: args.label_smoothing,
        ignore_label: flag("has_ignore_label", args.has_ignore_label)?.then_some(args.ignore_label),
    })
}

fn bad_consistency(value: u32) -> Failure {
    Failure::new(PACE_ERROR_VALUE, format!("`consistency` is {value}, expected 0, 1 or 2"))
}

impl Operator<PaceLoss> for Evaluate {
    fn on_cpu<T: Real>(args: &PaceLoss, host: &mut Host<'_, T>) -> Result<()> {
        let LossSettings { classes, lambda, label_smoothing, ignore_label } = settings(args)?;
        let consistency = match args.consistency {
            PACE_CONSISTENCY_NONE => cpu::Consistency::None,
            PACE_CONSISTENCY_TWO_BRANCH => cpu::Consistency::TwoBranch,
            PACE_CONSISTENCY_HISTORY => cpu::Consistency::History {
                table: host.output("history", args.history)?,
                index: host.slice("index", args.index)?,
            },
            other => return Err(bad_consistency(other)),
        };
        let (labels, logits) = (host.slice("labels", args.labels)?, host.input("logits", args.logits)?);
        let gradient = host.optional_output("gradient", args.gradient)?;
        let values = host.output("values", args.values)?;
        crate::shape::length("values", "[3]", values, 3)?;
        let loss = cpu::Loss { classes, labels, lambda, label_smoothing, ignore_label };
        let result = loss.evaluate(logits, consistency, gradient)?;
        values.copy_from_slice(&[result.total, result.classification, result.consistency].map(T::from_f64));
        Ok(())
    }

    fn plan(args: &PaceLoss, _: &Gpu, dtype: DType) -> Result<Plan> {
        let partner = match args.consistency {
            PACE_CONSISTENCY_NONE => Partner::None,
            PACE_CONSISTENCY_TWO_BRANCH => Partner::OtherBranch,
            PACE_CONSISTENCY_HISTORY => {
                Partner::History { table: buffer(args.history), index: buffer(args.index) }
            }
            other => return Err(bad_consistency(other)),
        };
        let settings = settings(args)?;
        let batch = size("labels.len", args.labels.len)?;
        let loss = cuda::Loss {
            settings,
            dtype,
            logits: buffer(args.logits),
            labels: buffer(args.labels),
            partner,
            gradient: optional_buffer(args.gradient),
            values: buffer(args.values),
            status: buffer(args.status),
            workspace: workspace_buffer(args.workspace, 4, settings.workspace_len(batch))?,
        };
        Ok(loss.plan()?)
    }
}

/// Computes the loss and, if wanted, its gradient to the logits, in one pass. On an error on the CPU nothing is written, the
/// history included; on CUDA wrong labels count as ignored, samples with wrong indices have no consistency term, and `status`
/// tells.
///
/// # Safety
/// As `pace_noisy_linear_forward`; the history is an input as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_loss(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLoss,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Evaluate, _>(device, stream, args) }
}

/// The bytes of workspace that a loss needs; of the tensors of `args`, only the length of the labels matters.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_loss_workspace(
    device: *const PaceDevice,
    args: *const PaceLoss,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, _, _| {
            let (settings, batch) = (settings(args)?, size("labels.len", args.labels.len)?);
            nonzero("classes", settings.classes)?;
            nonzero("labels.len", batch)?;
            Ok(settings.workspace_len(batch).saturating_mul(4))
        })
    }
}

/// The error that the CPU would have given for what a loss on CUDA found, from a host copy of its `status`.
///
/// # Safety
/// `words` is NULL or points to 9 words.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_loss_status(words: *const u64, classes: u64, history_rows: u64) -> PaceStatus {
    run(|| {
        let tensor = PaceTensor { data: words.cast_mut().cast(), len: LossStatus::WORDS as u64 };
        // SAFETY: the caller's promise.
        let words = unsafe { Host::<u64>::new() }.slice("words", tensor)?;
        let words = words.try_into().expect("the slice has that many words");
        Ok(LossStatus::new(words).check(size("classes", classes)?, size("history_rows", history_rows)?)?)
    })
}
