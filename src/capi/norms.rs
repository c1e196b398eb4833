//! What the paper plots: gradient norm and FP-distance.

use super::call::*;
use super::types::*;
use super::{Failure, PACE_ERROR_SIZE, PaceDevice, PaceStatus, Result};
use crate::cuda::{self, Buffer, DType, Gpu, Plan};
use crate::{Real, cpu, shape};
use std::ffi::c_void;

enum Compute {}

/// The list of gradients, which is in host memory; more than any model has is a forgotten number.
fn gradients<'a, T>(host: &mut Host<'a, T>, args: &PaceGradNorm) -> Result<&'a [PaceTensor]> {
    const MAX: u64 = 1 << 24;
    if args.count == 0 {
        return Ok(&[]);
    }
    if args.count > MAX {
        return Err(Failure::new(
            PACE_ERROR_SIZE,
            format!("`count` is {}, expected at most 2^24", args.count),
        ));
    }
    host.slice("gradients", PaceTensor { data: args.gradients.cast_mut().cast(), len: args.count })
}

impl Operator<PaceGradNorm> for Compute {
    fn on_cpu<T: Real>(args: &PaceGradNorm, host: &mut Host<'_, T>) -> Result<()> {
        check_flags(args.flags, 0)?;
        let (list, norm) = (gradients(host, args)?, host.slice_mut("norm", args.norm)?);
        shape::length("norm", "[1]", norm, 1)?;
        let tensors = list.iter().filter(|tensor| tensor.len > 0);
        let tensors = tensors.map(|&tensor| host.input("gradients", tensor));
        norm[0] = cpu::grad_norm(&tensors.collect::<Result<Vec<_>>>()?);
        Ok(())
    }

    fn plan(args: &PaceGradNorm, _: &Gpu, dtype: DType) -> Result<Plan> {
        check_flags(args.flags, 0)?;
        // SAFETY: the list is in host memory, by the promise of whoever called the exported function.
        let list = gradients(&mut unsafe { Host::<()>::new() }, args)?;
        let gradients: Vec<Buffer> = list.iter().copied().map(buffer).collect();
        let needed = cuda::GradNorm::workspace_len(gradients.iter().map(|gradient| gradient.len));
        let (norm, workspace) = (buffer(args.norm), workspace_buffer(args.workspace, 8, needed)?);
        Ok(cuda::GradNorm { dtype, gradients: &gradients, norm, workspace }.plan()?)
    }
}

/// Computes the norm, accumulated in double precision.
///
/// # Safety
/// As `pace_noisy_linear_forward`; `gradients` points to `count` tensors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_grad_norm(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceGradNorm,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Compute, _>(device, stream, args) }
}

/// The bytes of workspace that a norm needs; of the gradients, only their lengths matter.
///
/// # Safety
/// As `pace_noisy_linear_workspace`; `gradients` points to `count` tensors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_grad_norm_workspace(
    device: *const PaceDevice,
    args: *const PaceGradNorm,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, _, _| {
            let list = gradients(&mut Host::<()>::new(), args)?;
            let lengths = list.iter().map(|tensor| size("gradients.len", tensor.len));
            Ok(cuda::GradNorm::workspace_len(lengths.collect::<Result<Vec<_>>>()?).saturating_mul(8))
        })
    }
}

impl Operator<PaceFpDistance> for Compute {
    fn on_cpu<T: Real>(args: &PaceFpDistance, host: &mut Host<'_, T>) -> Result<()> {
        check_flags(args.flags, 0)?;
        let (samples, features) = (size("samples", args.samples)?, size("features", args.features)?);
        let fine_tuned = host.input("fine_tuned", args.fine_tuned)?;
        let pre_trained = host.input("pre_trained", args.pre_trained)?;
        let distance = host.slice_mut("distance", args.distance)?;
        shape::length("distance", "[1]", distance, 1)?;
        distance[0] = cpu::fp_distance(samples, features, fine_tuned, pre_trained)?;
        Ok(())
    }

    fn plan(args: &PaceFpDistance, _: &Gpu, dtype: DType) -> Result<Plan> {
        check_flags(args.flags, 0)?;
        let (samples, features) = (size("samples", args.samples)?, size("features", args.features)?);
        let needed = cuda::FpDistance::workspace_len(samples, features);
        let distance = cuda::FpDistance {
            samples,
            features,
            dtype,
            fine_tuned: buffer(args.fine_tuned),
            pre_trained: buffer(args.pre_trained),
            distance: buffer(args.distance),
            workspace: workspace_buffer(args.workspace, 8, needed)?,
        };
        Ok(distance.plan()?)
    }
}

/// Computes the distance, accumulated in double precision.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_fp_distance(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceFpDistance,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Compute, _>(device, stream, args) }
}

/// The bytes of workspace that a distance needs; the tensors of `args` are ignored.
///
/// # Safety
/// As `pace_noisy_linear_workspace`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_fp_distance_workspace(
    device: *const PaceDevice,
    args: *const PaceFpDistance,
    bytes: *mut u64,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe {
        workspace(device, args, bytes, |args, _, _| {
            let len = cuda::FpDistance::workspace_len(
                size("samples", args.samples)?,
                size("features", args.features)?,
            );
            Ok(len.saturating_mul(8))
        })
    }
}
