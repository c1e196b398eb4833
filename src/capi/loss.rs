//! The training loss.

use super::call::*;
use super::types::*;
use super::{Failure, PACE_ERROR_VALUE, PaceDevice, PaceStatus, Result, run};
use crate::cuda::{self, DType, Gpu, LossStatus, Partner, Plan};
use crate::loss::{Divergence, LossSettings, Targets};
use crate::shape::nonzero;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Evaluate {}

/// The fields of a struct that a loss is made of.
pub(super) struct LossFields {
    pub classes: u64,
    pub lambda: f64,
    pub divergence: u32,
    pub temperature: f64,
    pub flags: u32,
    pub label_smoothing: f64,
    pub has_ignore_label: u64,
    pub ignore_label: i64,
    pub denominator: f64,
}

impl LossFields {
    pub(super) fn settings(self) -> Result<LossSettings> {
        const FLAGS: u32 = PACE_LOSS_BOTH_BRANCHES | PACE_LOSS_LABELLED_ONLY | PACE_LOSS_DETACH_TARGET;
        check_flags(self.flags, FLAGS)?;
        let has = |flag: u32| self.flags & flag != 0;
        let (temperature, detach_target) = (self.temperature, has(PACE_LOSS_DETACH_TARGET));
        if detach_target && self.divergence != PACE_DIVERGENCE_KL {
            let text = "`flags` has PACE_LOSS_DETACH_TARGET, which is for PACE_DIVERGENCE_KL";
            return Err(Failure::new(PACE_ERROR_VALUE, text));
        }
        let divergence = match self.divergence {
            PACE_DIVERGENCE_SQUARED_DIFFERENCE => Divergence::SquaredDifference,
            PACE_DIVERGENCE_MEAN_SQUARED_DIFFERENCE => Divergence::MeanSquaredDifference,
            PACE_DIVERGENCE_CENTERED_SQUARED_DIFFERENCE => Divergence::CenteredSquaredDifference,
            PACE_DIVERGENCE_SYMMETRIC_KL => Divergence::SymmetricKl,
            PACE_DIVERGENCE_KL => Divergence::Kl { temperature, detach_target },
            PACE_DIVERGENCE_JENSEN_SHANNON => Divergence::JensenShannon,
            other => {
                return Err(Failure::new(
                    PACE_ERROR_VALUE,
                    format!("`divergence` is {other}, expected 0 to 5"),
                ));
            }
        };
        Ok(LossSettings {
            classes: size("classes", self.classes)?,
            lambda: self.lambda,
            divergence,
            label_smoothing: self.label_smoothing,
            ignore_label: flag("has_ignore_label", self.has_ignore_label)?.then_some(self.ignore_label),
            labelled_only: has(PACE_LOSS_LABELLED_ONLY),
            both_branches: has(PACE_LOSS_BOTH_BRANCHES),
            denominator: (self.denominator != 0.0).then_some(self.denominator),
        })
    }
}

fn settings(args: &PaceLoss) -> Result<LossSettings> {
    if args.reserved != 0 {
        return Err(Failure::new(PACE_ERROR_VALUE, "`reserved` is not 0"));
    }
    let &PaceLoss { classes, lambda, divergence, temperature, flags, label_smoothing, .. } = args;
    let &PaceLoss { has_ignore_label, ignore_label, denominator, .. } = args;
    LossFields {
        classes,
        lambda,
        divergence,
        temperature,
        flags,
        label_smoothing,
        has_ignore_label,
        ignore_label,
        denominator,
    }
    .settings()
}

/// Samples of the batch.
fn batch(args: &PaceLoss, settings: &LossSettings) -> Result<usize> {
    nonzero("classes", settings.classes)?;
    let (argument, batch) = match args.targets_kind {
        PACE_TARGETS_LABELS => ("labels.len", size("labels.len", args.labels.len)?),
        PACE_TARGETS_PROBABILITIES | PACE_TARGETS_VALUES => {
            ("targets.len", size("targets.len", args.targets.len)? / settings.classes)
        }
        other => return Err(bad_targets(other)),
    };
    nonzero(argument, batch)?;
    Ok(batch)
}

fn bad_consistency(value: u32) -> Failure {
    Failure::new(PACE_ERROR_VALUE, format!("`consistency` is {value}, expected 0 to 3"))
}

fn bad_targets(kind: u32) -> Failure {
    Failure::new(PACE_ERROR_VALUE, format!("`targets_kind` is {kind}, expected 0, 1 or 2"))
}

impl Operator<PaceLoss> for Evaluate {
    fn on_cpu<T: Real>(args: &PaceLoss, host: &mut Host<'_, T>) -> Result<()> {
        let settings = settings(args)?;
        let consistency = match args.consistency {
            PACE_CONSISTENCY_NONE => cpu::Consistency::None,
            PACE_CONSISTENCY_TWO_BRANCH => cpu::Consistency::TwoBranch,
            PACE_CONSISTENCY_DIFFERENCE => cpu::Consistency::Difference,
            PACE_CONSISTENCY_HISTORY => cpu::Consistency::History {
                table: host.output("history", args.history)?,
                index: host.slice("index", args.index)?,
            },
            other => return Err(bad_consistency(other)),
        };
        let targets = match args.targets_kind {
            PACE_TARGETS_LABELS => Targets::Labels(host.slice("labels", args.labels)?),
            PACE_TARGETS_PROBABILITIES => Targets::Probabilities(host.input("targets", args.targets)?),
            PACE_TARGETS_VALUES => Targets::Values(host.input("targets", args.targets)?),
            other => return Err(bad_targets(other)),
        };
        let class_weights = host.optional("class_weights", args.class_weights)?;
        let logits = host.input("logits", args.logits)?;
        let gradient = host.optional_output("gradient", args.gradient)?;
        let values = host.output("values", args.values)?;
        crate::shape::length("values", "[3]", values, 3)?;
        let loss = cpu::Loss { settings, targets, class_weights };
        let result = loss.evaluate(logits, consistency, gradient)?;
        values.copy_from_slice(&[result.total, result.classification, result.consistency].map(T::from_f64));
        Ok(())
    }

    fn plan(args: &PaceLoss, _: &Gpu, dtype: DType) -> Result<Plan> {
        let partner = match args.consistency {
            PACE_CONSISTENCY_NONE => Partner::None,
            PACE_CONSISTENCY_TWO_BRANCH => Partner::OtherBranch,
            PACE_CONSISTENCY_DIFFERENCE => Partner::Difference,
            PACE_CONSISTENCY_HISTORY => {
                Partner::History { table: buffer(args.history), index: buffer(args.index) }
            }
            other => return Err(bad_consistency(other)),
        };
        let settings = settings(args)?;
        let targets = match args.targets_kind {
            PACE_TARGETS_LABELS => Targets::Labels(buffer(args.labels)),
            PACE_TARGETS_PROBABILITIES => Targets::Probabilities(buffer(args.targets)),
            PACE_TARGETS_VALUES => Targets::Values(buffer(args.targets)),
            other => return Err(bad_targets(other)),
        };
        let batch = batch(args, &settings)?;
        let loss = cuda::Loss {
            settings,
            dtype,
            logits: buffer(args.logits),
            targets,
            class_weights: optional_buffer(args.class_weights),
            counted: None,
            partner,
            gradient: optional_buffer(args.gradient),
            values: buffer(args.values),
            status: buffer(args.status),
            accumulate: false,
            first_row: 0,
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

/// The bytes of workspace that a loss needs; of the tensors of `args`, only the length of the labels or the targets matters.
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
            let settings = settings(args)?;
            Ok(settings.workspace_len(batch(args, &settings)?).saturating_mul(4))
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
