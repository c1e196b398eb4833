//! The head of a language model with its loss.

use super::call::*;
use super::loss::LossFields;
use super::types::*;
use super::{Failure, PaceDevice, PaceStatus, Result};
use crate::cpu::{LmHead, LmHeadGrads, Lora};
use crate::cuda::{self, Buffer, DType, Gpu, LmHeadOutputs, Plan};
use crate::loss::LossSettings;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Evaluate {}
enum Gram {}

fn settings(args: &PaceLmHead) -> Result<LossSettings> {
    check_flags_of("gemm_flags", args.gemm_flags, PACE_ALLOW_TF32)?;
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
        _ => return Err(uneven_lora()),
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

fn uneven_lora() -> Failure {
    Failure::argument("lora_b", "and `lora_a` go together")
}

type OnCuda = cuda::LmHead<Buffer, Buffer, Buffer>;

/// A head on device tensors.
fn head_on_cuda(args: &PaceLmHead) -> Result<OnCuda> {
    let lora = match (optional_buffer(args.lora_b), optional_buffer(args.lora_a)) {
        (None, None) => None,
        (Some(lora_b), Some(lora_a)) => Some(Lora {
            rank: size("rank", args.rank)?,
            lora_a,
            lora_b,
            scale: check_scale(args.scale)? as f32,
        }),
        _ => return Err(uneven_lora()),
    };
    let chunk_rows = size("chunk_rows", args.chunk_rows)?;
    Ok(OnCuda {
        settings: settings(args)?,
        tokens: size("labels.len", args.labels.len)?,
        hidden_size: size("hidden_size", args.hidden_size)?,
        branches: size("branches", args.branches)?,
        labels: buffer(args.labels),
        weight: buffer(args.weight),
        bias: optional_buffer(args.bias),
        lora,
        class_weights: optional_buffer(args.class_weights),
        gram: optional_buffer(args.gram),
        logit_scale: args.logit_scale,
        soft_cap: (args.soft_cap != 0.0).then_some(args.soft_cap),
        chunk_rows: (chunk_rows != 0).then_some(chunk_rows),
        allow_tf32: args.gemm_flags & PACE_ALLOW_TF32 != 0,
    })
}

/// The elements of workspace that a head needs.
fn workspace_len(args: &PaceLmHead, gpu: &Gpu, dtype: DType) -> Result<usize> {
    let trains_weight = optional_buffer(args.grad_weight).is_some();
    Ok(head_on_cuda(args)?.workspace_len(gpu, dtype, trains_weight))
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

    fn plan(args: &PaceLmHead, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let outputs = LmHeadOutputs {
            hidden: optional_buffer(args.grad_hidden),
            weight: optional_buffer(args.grad_weight),
            bias: optional_buffer(args.grad_bias),
            lora_b: optional_buffer(args.grad_lora_b),
            lora_a: optional_buffer(args.grad_lora_a),
            values: buffer(args.values),
            status: buffer(args.status),
            workspace: workspace_buffer(args.workspace, 4, workspace_len(args, gpu, dtype)?)?,
        };
        Ok(head_on_cuda(args)?.plan(gpu, dtype, buffer(args.hidden), outputs)?)
    }
}

impl Operator<PaceLmHead> for Gram {
    fn on_cpu<T: Real>(args: &PaceLmHead, host: &mut Host<'_, T>) -> Result<()> {
        let gram = host.output("gram", args.gram)?;
        Ok(head(args, host, false)?.gram(gram)?)
    }

    fn plan(args: &PaceLmHead, gpu: &Gpu, dtype: DType) -> Result<Plan> {
        let head = head_on_cuda(args)?;
        let workspace = workspace_buffer(args.workspace, 4, head.gram_workspace_len(gpu))?;
        Ok(head.gram(gpu, dtype, buffer(args.gram), workspace)?)
    }
}

/// Computes the loss of a language model's head and the gradients that are wanted, with the logits of some rows in memory at a time. On
/// an error on the CPU nothing is written; on CUDA wrong labels count as ignored, and `status` tells (`pace_loss_status`).
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

/// The bytes of workspace that a head needs; of the tensors of `args`, the length of the labels matters, and which are there.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lm_head_workspace(
    device: *const PaceDevice,
    args: *const PaceLmHead,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, gpu, dtype| {
            Ok(workspace_len(args, gpu, dtype)?.saturating_mul(4))
        })
    }
}

/// Computes `gram = WᵀW` of `weight [classes, hidden_size]`, once for a weight that does not change. `labels` and outputs are not
/// looked at. `workspace` is that of `pace_lm_head_gram_workspace`; contents are ignored.
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

/// The bytes of workspace that a Gram matrix needs.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_lm_head_gram_workspace(
    device: *const PaceDevice,
    args: *const PaceLmHead,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, gpu, _| {
            Ok(head_on_cuda(args)?.gram_workspace_len(gpu).saturating_mul(4))
        })
    }
}
