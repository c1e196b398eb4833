//! Builders of ΔW and Δb, and merging.

use super::call::*;
use super::types::*;
use super::{Failure, PaceDevice, PaceStatus, Result};
use crate::cuda::{self, Buffer, DType, Gpu, MergeSign, Plan};
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

fn factors(args: &PaceLowRankWeight) -> Result<cuda::LoraFactors<Buffer>> {
    check_flags(args.flags, 0)?;
    let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
    Ok(cuda::LoraFactors {
        out_features,
        in_features,
        rank,
        lora_b: buffer(args.lora_b),
        lora_a: buffer(args.lora_a),
        scale: check_scale(args.scale)? as f32,
    })
}

unsafe fn factors_on_cpu<'a, T: Real>(
    host: &mut Host,
    args: &PaceLowRankWeight,
) -> Result<(cpu::LoraFactors<'a, T>, Option<&'a [T]>)> {
    check_flags(args.flags, 0)?;
    // SAFETY: the caller's promise.
    unsafe {
        let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
        let lora = cpu::LoraFactors {
            out_features,
            in_features,
            rank,
            lora_b: host.input("lora_b", args.lora_b)?,
            lora_a: host.input("lora_a", args.lora_a)?,
            scale: T::from_f64(check_scale(args.scale)?),
        };
        Ok((lora, host.optional("base_weight", args.base_weight)?))
    }
}

impl Operator<PaceLowRankWeight> for Forward {
    unsafe fn on_cpu<T: Real>(args: &PaceLowRankWeight) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        let (lora, base, out) = unsafe {
            let (lora, base) = factors_on_cpu::<T>(&mut host, args)?;
            (lora, base, host.output("out", args.out)?)
        };
        let done = match base {
            None => cpu::low_rank_weight(lora, out),
            Some(base) => cpu::lora_mul_weight(lora, base, out),
        };
        Ok(done?)
    }

    fn plan(args: &PaceLowRankWeight, _: &Gpu, dtype: DType) -> Result<Plan> {
        Ok(factors(args)?.weight(dtype, optional_buffer(args.base_weight), buffer(args.out))?)
    }
}

impl Operator<PaceLowRankWeight> for Backward {
    unsafe fn on_cpu<T: Real>(args: &PaceLowRankWeight) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        let (lora, base, dout, grads) = unsafe {
            let (lora, base) = factors_on_cpu::<T>(&mut host, args)?;
            let dout = host.input("dout", args.dout)?;
            let lora_b = host.output("grad_lora_b", args.grad_lora_b)?;
            (
                lora,
                base,
                dout,
                cpu::LoraGrads { lora_b, lora_a: host.output("grad_lora_a", args.grad_lora_a)? },
            )
        };
        let done = match base {
            None => cpu::low_rank_weight_backward(lora, dout, grads),
            Some(base) => cpu::lora_mul_weight_backward(lora, base, dout, grads),
        };
        Ok(done?)
    }

    fn plan(args: &PaceLowRankWeight, _: &Gpu, dtype: DType) -> Result<Plan> {
        let grads = cuda::LoraGrads { lora_b: buffer(args.grad_lora_b), lora_a: buffer(args.grad_lora_a) };
        let (base, dout) = (optional_buffer(args.base_weight), buffer(args.dout));
        let lora = factors(args)?;
        let workspace = workspace_buffer(args.workspace, 4, lora.workspace_len(dtype))?;
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

/// The bytes of workspace that the backward pass needs; the tensors of `args` do not matter.
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
            Ok(factors(args)?.workspace_len(dtype).saturating_mul(4))
        })
    }
}

fn prompt(args: &PacePromptBias) -> Result<cuda::PromptBias<Buffer>> {
    check_flags(args.flags, 0)?;
    let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
    Ok(cuda::PromptBias {
        out_features,
        in_features,
        rank,
        base_weight: buffer(args.base_weight),
        base_bias: optional_buffer(args.base_bias),
        prompt_down: buffer(args.prompt_down),
        prompt_up: buffer(args.prompt_up),
        delta_bias: optional_buffer(args.delta_bias),
    })
}

unsafe fn prompt_on_cpu<'a, T: Real>(
    host: &mut Host,
    args: &PacePromptBias,
) -> Result<cpu::PromptBias<'a, T>> {
    check_flags(args.flags, 0)?;
    // SAFETY: the caller's promise.
    unsafe {
        let [out_features, in_features, rank] = sizes(args.out_features, args.in_features, args.rank)?;
        Ok(cpu::PromptBias {
            out_features,
            in_features,
            rank,
            base_weight: host.input("base_weight", args.base_weight)?,
            base_bias: host.optional("base_bias", args.base_bias)?,
            prompt_down: host.input("prompt_down", args.prompt_down)?,
            prompt_up: host.input("prompt_up", args.prompt_up)?,
            delta_bias: host.optional("delta_bias", args.delta_bias)?,
        })
    }
}

impl Operator<PacePromptBias> for Forward {
    unsafe fn on_cpu<T: Real>(args: &PacePromptBias) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        unsafe {
            let prompt = prompt_on_cpu::<T>(&mut host, args)?;
            Ok(prompt.forward(host.output("out", args.out)?)?)
        }
    }

    fn plan(args: &PacePromptBias, _: &Gpu, dtype: DType) -> Result<Plan> {
        let prompt = prompt(args)?;
        let workspace = workspace_buffer(args.workspace, 4, prompt.workspace_len(dtype))?;
        Ok(prompt.forward(dtype, buffer(args.out), workspace)?)
    }
}

impl Operator<PacePromptBias> for Backward {
    unsafe fn on_cpu<T: Real>(args: &PacePromptBias) -> Result<()> {
        let mut host = Host::default();
        // SAFETY: the caller's promise.
        unsafe {
            let prompt = prompt_on_cpu::<T>(&mut host, args)?;
            let dout = host.input("dout", args.dout)?;
            let grads = cpu::PromptGrads {
                prompt_down: host.output("grad_prompt_down", args.grad_prompt_down)?,
                prompt_up: host.output("grad_prompt_up", args.grad_prompt_up)?,
                delta_bias: host.optional_output("grad_delta_bias", args.grad_delta_bias)?,
            };
            Ok(prompt.backward(dout, grads)?)
        }
    }

    fn plan(args: &PacePromptBias, _: &Gpu, dtype: DType) -> Result<Plan> {
        let grads = cuda::PromptGrads {
            prompt_down: buffer(args.grad_prompt_down),
            prompt_up: buffer(args.grad_prompt_up),
            delta_bias: optional_buffer(args.grad_delta_bias),
        };
        let prompt = prompt(args)?;
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

/// The bytes of workspace that either pass needs; the tensors of `args` do not matter.
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
            Ok(prompt(args)?.workspace_len(dtype).saturating_mul(4))
        })
    }
}

enum In {}
enum Out {}

unsafe fn merge_on_cpu<T: Real>(
    args: &PaceMerge,
    apply: fn(&mut [T], &[T]) -> crate::Result<()>,
) -> Result<()> {
    check_flags(args.flags, 0)?;
    let mut host = Host::default();
    // SAFETY: the caller's promise.
    let (target, delta) = unsafe { (host.output("target", args.target)?, host.input("delta", args.delta)?) };
    Ok(apply(target, delta)?)
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
    unsafe fn on_cpu<T: Real>(args: &PaceMerge) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { merge_on_cpu::<T>(args, cpu::merge) }
    }

    fn plan(args: &PaceMerge, _: &Gpu, dtype: DType) -> Result<Plan> {
        merge_plan(args, MergeSign::Merge, dtype)
    }
}

impl Operator<PaceMerge> for Out {
    unsafe fn on_cpu<T: Real>(args: &PaceMerge) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { merge_on_cpu::<T>(args, cpu::unmerge) }
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
