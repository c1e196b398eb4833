//! The head of a language model with its loss.

use super::call::*;
use super::loss::LossFields;
use super::types::*;
use super::{Failure, PACE_ERROR_VALUE, PaceDevice, PaceStatus, Result};
use crate::cpu::{LmHead, LmHeadGrads, Lora};
use crate::cuda::{DType, Gpu, Plan};
use crate::loss::LossSettings;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Evaluate {}
enum Gram {}

fn settings(args: &PaceLmHead) -> Result<LossSettings> {
    if args.reserved != 0 {
        return Err(Failure::new(PACE_ERROR_VALUE, "`reserved` is not 0"));
    }
    LossFields {
        classes: args.classes,
        lambda: args.lambda,
        divergence: args.divergence,
        temperature: args.temperature,
        flags: args.flags,
        label_smoothing: args.label_smoothing,
        has_ignore_label: args.has_ignore_label,
        ignore_label: args.ignore_label,
        denominator: args.denominator,
    }
    .settings()
}

/// A head on host tensors; `gram`: whether it takes the Gram matrix that the caller has.
fn head<'a, T: Real>(args: &PaceLmHead, host: &mut Host<'a, T>, takes_gram: bool) -> Result<LmHead<'a, T>> {
    let lora = match (host.optional("lora_b", args.lora_b)?, host.optional("lora_a", args.lora_a)?) {
        (None, None) => None,
        (Some(lora_b), Some(lora_a)) => Some(Lora {
            rank: size("rank", args.rank)?,
            lora_a,
            lora_b,
            scale: T::from_f64(check_scale(args.scale)?),
        }),
        _ => return Err(Failure::argument("lora_b", "and `lora_a` go together")),
    };
    let chunk_rows = size("chunk_rows", args.chunk_rows)?;
    Ok(LmHead {
        settings: settings(args)?,
        hidden_size: size("hidden_size", args.hidden_size)?,
        branches: size("branches", args.branches)?,
        labels: if takes_gram { host.slice("labels", args.labels)? } else { &[] },
        weight: host.input("weight", args.weight)?,
        bias: host.optional("bias", args.bias)?,
        lora,
        logit_scale: args.logit_scale,
        soft_cap: (args.soft_cap != 0.0).then_some(args.soft_cap),
        gram: if takes_gram { host.optional("gram", args.gram)? } else { None },
        chunk_rows: (chunk_rows != 0).then_some(chunk_rows),
        class_weights: host.optional("class_weights", args.class_weights)?,
    })
}

fn not_on_cuda<T>() -> Result<T> {
    Err(Failure::new(
        PACE_ERROR_VALUE,
        "the head of a language model runs on the CPU only: `device` has to be NULL; on CUDA multiply chunks with a library and \
         call `pace_loss`",
    ))
}

impl Operator<PaceLmHead> for Evaluate {
    fn on_cpu<T: Real>(args: &PaceLmHead, host: &mut Host<'_, T>) -> Result<()> {
        let head = head(args, host, true)?;
        let hidden = host.input("hidden", args.hidden)?;
        let grads = LmHeadGrads {
            hidden: host.optional_output("grad_hidden", args.grad_hidden)?,
            weight: host.optional_output("grad_weight", args.grad_weight)?,
            bias: host.optional_output("grad_bias", args.grad_bias)?,
            lora_b: host.optional_output("grad_lora_b", args.grad_lora_b)?,
            lora_a: host.optional_output("grad_lora_a", args.grad_lora_a)?,
        };
        let values = host.output("values", args.values)?;
        crate::shape::length("values", "[3]", values, 3)?;
        let cpu::LossValues { total, classification, consistency } = head.evaluate(hidden, grads)?;
        values.copy_from_slice(&[total, classification, consistency].map(T::from_f64));
        Ok(())
    }

    fn plan(_: &PaceLmHead, _: &Gpu, _: DType) -> Result<Plan> {
        not_on_cuda()
    }
}

impl Operator<PaceLmHead> for Gram {
    fn on_cpu<T: Real>(args: &PaceLmHead, host: &mut Host<'_, T>) -> Result<()> {
        let gram = host.output("gram", args.gram)?;
        Ok(head(args, host, false)?.gram(gram)?)
    }

    fn plan(_: &PaceLmHead, _: &Gpu, _: DType) -> Result<Plan> {
        not_on_cuda()
    }
}

/// Computes the loss of a language model's head and the gradients that are wanted, with the logits of some rows in memory at a time. On
/// an error nothing is written. CPU only.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lm_head(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLmHead,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Evaluate, _>(device, stream, args) }
}

/// Computes `gram = WᵀW` of `weight [classes, hidden_size]`, once for a weight that does not change. `labels` and outputs are not
/// looked at. CPU only.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lm_head_gram(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLmHead,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Gram, _>(device, stream, args) }
}
