//! Builders of ΔW and Δb, and merging.

use super::call::*;
use super::types::*;
use super::{Failure, PaceDevice, PaceStatus, Result};
use crate::cuda::{self, DType, Gpu, LoraFactors, LoraGrads, MergeSign, Plan, PromptBias, PromptGrads};
use crate::shape::nonzero;
use crate::{Real, cpu};
use std::ffi::c_void;

enum Forward {}
enum Backward {}

fn sizes(out_features: u64, in_features: u64, rank: u64) -> Result<[usize; 3]> {
    let sizes = [("out_features", out_features), ("in_features", in_features), ("rank", rank)];
    let mut checked = [0; 3];
    for (checked, (name, value)) in checked.iter_mut().zip(sizes) {
        *checked = size(name, value)?;
        nonzero(name, *checked)?;
    }
    Ok(checked)
}

fn factors<M: Memory>(memory: &mut M, args: &PaceLowRankWeight) -> Result<LoraFactors<M::Tensor>> {
    check_flags(args.flags, 0)?;
    let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
    Ok(LoraFactors {
        out_features,
        in_features,
        rank,
        lora_b: memory.input("lora_b", args.lora_b)?,
        lora_a: memory.input("lora_a", args.lora_a)?,
        scale: check_scale(args.scale)? as f32,
    })
}

fn lora_grads<M: Memory>(memory: &mut M, args: &PaceLowRankWeight) -> Result<LoraGrads<M::TensorMut>> {
    Ok(LoraGrads {
        lora_b: memory.output("grad_lora_b", args.grad_lora_b)?,
        lora_a: memory.output("grad_lora_a", args.grad_lora_a)?,
    })
}

/// The same factors on the CPU, whose scale has the tensors' precision.
fn factors_on_cpu<'a, T: Real>(
    host: &mut Host<'a, T>,
    args: &PaceLowRankWeight,
) -> Result<LoraFactors<&'a [T], T>> {
    let LoraFactors { out_features, in_features, rank, lora_b, lora_a, .. } = factors(host, args)?;
    Ok(LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale: T::from_f64(args.scale) })
}

impl Operator<PaceLowRankWeight> for Forward {
    fn on_cpu<T: Real>(args: &PaceLowRankWeight, host: &mut Host<'_, T>) -> Result<()> {
        let lora = factors_on_cpu(host, args)?;
        let (base, out) = (host.optional("base_weight", args.base_weight)?, host.output("out", args.out)?);
        Ok(match base {
            None => cpu::low_rank_weight(lora, out),
            Some(base) => cpu::lora_mul_weight(lora, base, out),
        }?)
    }

    fn plan(args: &PaceLowRankWeight, _: &Gpu, dtype: DType) -> Result<Plan> {
        let lora = factors(&mut OnDevice, args)?;
        Ok(lora.weight(dtype, optional_buffer(args.base_weight), buffer(args.out))?)
    }
}

impl Operator<PaceLowRankWeight> for Backward {
    fn on_cpu<T: Real>(args: &PaceLowRankWeight, host: &mut Host<'_, T>) -> Result<()> {
        let lora = factors_on_cpu(host, args)?;
        let base = host.optional("base_weight", args.base_weight)?;
        let (dout, grads) = (host.input("dout", args.dout)?, lora_grads(host, args)?);
        Ok(match base {
            None => cpu::low_rank_weight_backward(lora, dout, grads),
            Some(base) => cpu::lora_mul_weight_backward(lora, base, dout, grads),
        }?)
    }

    fn plan(args: &PaceLowRankWeight, _: &Gpu, dtype: DType) -> Result<Plan> {
        let (lora, grads) = (factors(&mut OnDevice, args)?, lora_grads(&mut OnDevice, args)?);
        let workspace = workspace_buffer(args.workspace, 4, lora.workspace_len(dtype))?;
        let (base, dout) = (optional_buffer(args.base_weight), buffer(args.dout));
        Ok(lora.backward(dtype, base, dout, grads, workspace)?)
    }
}

/// Computes `out` from the factors.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_weight_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLowRankWeight,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes the factors' gradients from `dout`: with `Q = scale·dout` (`⊙ W0` for LoRA mul), `dB = Q·Aᵀ`, `dA = Bᵀ·Q`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_weight_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceLowRankWeight,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// The bytes of workspace that the backward pass needs; the tensors of `args` and its scale are ignored.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_low_rank_weight_workspace(
    device: *const PaceDevice,
    args: *const PaceLowRankWeight,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, _, dtype| {
            let lora = factors(&mut OnDevice, &PaceLowRankWeight { scale: 1.0, ..*args })?;
            Ok(lora.workspace_len(dtype).saturating_mul(4))
        })
    }
}

fn prompt<M: Memory>(memory: &mut M, args: &PacePromptBias) -> Result<PromptBias<M::Tensor>> {
    check_flags(args.flags, 0)?;
    let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
    Ok(PromptBias {
        out_features,
        in_features,
        rank,
        base_weight: memory.input("base_weight", args.base_weight)?,
        base_bias: memory.optional("base_bias", args.base_bias)?,
        prompt_down: memory.input("prompt_down", args.prompt_down)?,
        prompt_up: memory.input("prompt_up", args.prompt_up)?,
        delta_bias: memory.optional("delta_bias", args.delta_bias)?,
    })
}

fn prompt_grads<M: Memory>(memory: &mut M, args: &PacePromptBias) -> Result<PromptGrads<M::TensorMut>> {
    Ok(PromptGrads {
        prompt_down: memory.output("grad_prompt_down", args.grad_prompt_down)?,
        prompt_up: memory.output("grad_prompt_up", args.grad_prompt_up)?,
        delta_bias: memory.optional_output("grad_delta_bias", args.grad_delta_bias)?,
    })
}

impl Operator<PacePromptBias> for Forward {
    fn on_cpu<T: Real>(args: &PacePromptBias, host: &mut Host<'_, T>) -> Result<()> {
        let prompt = prompt(host, args)?;
        Ok(prompt.forward(host.output("out", args.out)?)?)
    }

    fn plan(args: &PacePromptBias, _: &Gpu, dtype: DType) -> Result<Plan> {
        let prompt = prompt(&mut OnDevice, args)?;
        Ok(prompt.forward(dtype, buffer(args.out))?)
    }
}

impl Operator<PacePromptBias> for Backward {
    fn on_cpu<T: Real>(args: &PacePromptBias, host: &mut Host<'_, T>) -> Result<()> {
        let prompt = prompt(host, args)?;
        let dout = host.input("dout", args.dout)?;
        Ok(prompt.backward(dout, prompt_grads(host, args)?)?)
    }

    fn plan(args: &PacePromptBias, _: &Gpu, dtype: DType) -> Result<Plan> {
        let (prompt, grads) = (prompt(&mut OnDevice, args)?, prompt_grads(&mut OnDevice, args)?);
        let workspace = workspace_buffer(args.workspace, 4, prompt.workspace_len(dtype))?;
        Ok(prompt.backward(dtype, buffer(args.dout), grads, workspace)?)
    }
}

/// Computes `out = W0·(Pd·Pu) + b0⊙δb`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_prompt_bias_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PacePromptBias,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes gradients from `dout`: `q = W0ᵀ·dout`, `dPd = q·Puᵀ`, `dPu = Pdᵀ·q`, `dδb = b0⊙dout`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_prompt_bias_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PacePromptBias,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// The bytes of workspace that the backward pass needs; the tensors of `args` are ignored.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_prompt_bias_workspace(
    device: *const PaceDevice,
    args: *const PacePromptBias,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, _, dtype| {
            Ok(prompt(&mut OnDevice, args)?.workspace_len(dtype).saturating_mul(4))
        })
    }
}

enum In {}
enum Out {}

fn merge_on_cpu<T: Real>(
    args: &PaceMerge,
    host: &mut Host<'_, T>,
    apply: fn(&mut [T], &[T]) -> crate::Result<()>,
) -> Result<()> {
    check_flags(args.flags, 0)?;
    Ok(apply(host.output("target", args.target)?, host.input("delta", args.delta)?)?)
}

fn merge_plan(args: &PaceMerge, sign: MergeSign, dtype: DType) -> Result<Plan> {
    check_flags(args.flags, 0)?;
    let (target, delta) = (buffer(args.target), buffer(args.delta));
    if target.address == 0 {
        // A plan does nothing for empty tensors; in C a forgotten one is as empty.
        return Err(Failure::argument("target", "is a null pointer"));
    }
    Ok(cuda::Merge { sign, dtype, target, delta }.plan()?)
}

impl Operator<PaceMerge> for In {
    fn on_cpu<T: Real>(args: &PaceMerge, host: &mut Host<'_, T>) -> Result<()> {
        merge_on_cpu(args, host, cpu::merge)
    }

    fn plan(args: &PaceMerge, _: &Gpu, dtype: DType) -> Result<Plan> {
        merge_plan(args, MergeSign::Merge, dtype)
    }
}

impl Operator<PaceMerge> for Out {
    fn on_cpu<T: Real>(args: &PaceMerge, host: &mut Host<'_, T>) -> Result<()> {
        merge_on_cpu(args, host, cpu::unmerge)
    }

    fn plan(args: &PaceMerge, _: &Gpu, dtype: DType) -> Result<Plan> {
        merge_plan(args, MergeSign::Unmerge, dtype)
    }
}

/// `target += delta`: folds an adapter into its layer, weight or bias.
///
/// # Safety
/// As `pace_noisy_linear_forward`; `target` is an input as well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_merge(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceMerge,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<In, _>(device, stream, args) }
}

/// `target -= delta`: takes a merged adapter out again, up to rounding.
///
/// # Safety
/// As `pace_merge`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_unmerge(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceMerge,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Out, _>(device, stream, args) }
}
