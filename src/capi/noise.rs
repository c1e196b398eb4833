//! Keys, noise written out, DropPath, and σ over the depth of a model.

use super::call::*;
use super::types::*;
use super::{Failure, PACE_ERROR_DTYPE, PACE_ERROR_VALUE, PaceDevice, PaceStatus, Result, run};
use crate::cuda::{self, DType, Direction, Gpu, MaskSource, Plan};
use crate::noise::{self, Key, NoiseShape};
use crate::parallel;
use crate::{Real, cpu, schedule, shape};
use std::ffi::c_void;

/// The key of layer `layer` at step `step` of the run seeded with `seed`.
#[unsafe(no_mangle)]
pub extern "C" fn pace_key(seed: u64, step: u64, layer: u32) -> u64 {
    Key::derive(seed, step, layer).into()
}

/// Writes the σ of every block to `out`, which has `blocks` elements: zero before `first_noisy`, then
/// `sigma·(blocks − k)/(blocks − first_noisy)`; the classification head is the last block.
///
/// # Safety
/// `out` is NULL or has room for `blocks` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_sigma_by_block(
    blocks: u64,
    sigma: f64,
    first_noisy: u64,
    out: *mut f64,
) -> PaceStatus {
    run(|| {
        let sigmas =
            schedule::sigma_by_block(size("blocks", blocks)?, sigma, size("first_noisy", first_noisy)?)?;
        let tensor = PaceTensor { data: out.cast(), len: blocks };
        // SAFETY: the caller's promise.
        unsafe { Host::new() }.output("out", tensor)?.copy_from_slice(&sigmas);
        Ok(())
    })
}

enum Fill {}

impl Operator<PaceNoiseFill> for Fill {
    fn on_cpu<T: Real>(args: &PaceNoiseFill, host: &mut Host<'_, T>) -> Result<()> {
        check_flags(args.flags, 0)?;
        check_generated(args)?;
        let shape = linear_shape(&PaceShape { in_features: 1, shared_input: 0, ..args.shape })?;
        shape.check()?;
        let (key, z) = (host.key(args.noise.key, args.noise.key_address)?, host.output("z", args.z)?);
        let generator = generator(&args.noise, key)?;
        noise::check_samples(generator.first_sample(), shape.batch)?;
        let (name, tokens) = match generator.shape() {
            NoiseShape::PerSample => ("[R, N]", 1),
            NoiseShape::PerToken => ("[R, T, N]", shape.tokens),
        };
        let channels = shape.out_features;
        shape::length("z", name, z, shape.samples() * tokens * channels)?;
        let rows = parallel::rows(channels);
        parallel::for_each(z.chunks_mut(rows * channels).enumerate(), |(i, z)| {
            for (row, z) in (i * rows..).zip(z.chunks_mut(channels)) {
                let (sample, token) = (row / tokens, row % tokens);
                let (branch, sample) = (sample / shape.batch, sample % shape.batch);
                generator.fill(branch as u8, sample as u64, token as u32, 0, z);
            }
        });
        Ok(())
    }

    fn plan(args: &PaceNoiseFill, _: &Gpu, dtype: DType) -> Result<Plan> {
        check_flags(args.flags, 0)?;
        check_generated(args)?;
        if dtype != DType::F32 {
            return Err(Failure::new(
                PACE_ERROR_DTYPE,
                "`dtype` is another than PACE_F32, which noise on CUDA is",
            ));
        }
        let fill = cuda::NoiseFill {
            shape: linear_shape(&PaceShape { in_features: 1, shared_input: 0, ..args.shape })?,
            generator: generator(&args.noise, key(args.noise.key))?,
            key: key_buffer(args.noise.key_address),
            z: buffer(args.z),
        };
        Ok(fill.plan()?)
    }
}

fn check_generated(args: &PaceNoiseFill) -> Result<()> {
    match args.noise.kind {
        PACE_NOISE_GENERATED => Ok(()),
        kind => Err(Failure::new(
            PACE_ERROR_VALUE,
            format!("`noise.kind` is {kind}, expected PACE_NOISE_GENERATED"),
        )),
    }
}

/// Writes `z = 1 + σ·n` out, as the operators use it.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_noise_fill(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceNoiseFill,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Fill, _>(device, stream, args) }
}

enum Forward {}
enum Backward {}

/// `shared_drop_path` or its backward pass: branches, features, mask, input, output.
type DropPathOperator<T> = fn(usize, usize, &[T], &[T], &mut [T]) -> crate::Result<()>;

fn drop_path_on_cpu<T: Real>(
    args: &PaceDropPath,
    host: &mut Host<'_, T>,
    input: (&'static str, PaceTensor),
    output: (&'static str, PaceTensor),
    apply: DropPathOperator<T>,
) -> Result<()> {
    check_flags(args.flags, 0)?;
    let input_name = input.0;
    let (branches, batch) = (size("branches", args.branches)?, size("batch", args.batch)?);
    let given = host.optional("mask", args.mask)?;
    let key = host.key(args.key, args.key_address)?;
    let (input, output) = (host.input(input.0, input.1)?, host.output(output.0, output.1)?);
    let generated;
    let mask = match given {
        Some(mask) => {
            shape::length("mask", "[B]", mask, batch)?;
            mask
        }
        None => {
            // Before as many elements are allocated: the input has more.
            if batch > input.len() {
                let (argument, shape) = (input_name, "[branches·B, features]");
                return Err(
                    crate::Error::Length { argument, shape, expected: batch, got: input.len() }.into()
                );
            }
            let mut mask = vec![T::zero(); batch];
            noise::drop_path_mask(key, args.drop_probability, args.first_sample, &mut mask)?;
            generated = mask;
            &generated
        }
    };
    Ok(apply(branches, size("features", args.features)?, mask, input, output)?)
}

fn drop_path_plan(
    args: &PaceDropPath,
    direction: Direction,
    (input, output): (PaceTensor, PaceTensor),
    dtype: DType,
) -> Result<Plan> {
    check_flags(args.flags, 0)?;
    let mask = match optional_buffer(args.mask) {
        Some(mask) => MaskSource::Given(mask),
        None => MaskSource::Generated {
            key: key(args.key),
            key_address: key_buffer(args.key_address),
            drop_probability: args.drop_probability,
            first_sample: args.first_sample,
        },
    };
    let drop_path = cuda::DropPath {
        branches: size("branches", args.branches)?,
        batch: size("batch", args.batch)?,
        features: size("features", args.features)?,
        mask,
        direction,
        dtype,
        input: buffer(input),
        output: buffer(output),
    };
    Ok(drop_path.plan()?)
}

impl Operator<PaceDropPath> for Forward {
    fn on_cpu<T: Real>(args: &PaceDropPath, host: &mut Host<'_, T>) -> Result<()> {
        drop_path_on_cpu(args, host, ("x", args.x), ("y", args.y), cpu::shared_drop_path)
    }

    fn plan(args: &PaceDropPath, _: &Gpu, dtype: DType) -> Result<Plan> {
        drop_path_plan(args, Direction::Forward, (args.x, args.y), dtype)
    }
}

impl Operator<PaceDropPath> for Backward {
    fn on_cpu<T: Real>(args: &PaceDropPath, host: &mut Host<'_, T>) -> Result<()> {
        drop_path_on_cpu(args, host, ("dy", args.dy), ("dx", args.dx), cpu::shared_drop_path_backward)
    }

    fn plan(args: &PaceDropPath, _: &Gpu, dtype: DType) -> Result<Plan> {
        drop_path_plan(args, Direction::Backward, (args.dy, args.dx), dtype)
    }
}

/// Computes `y` from `x`.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_drop_path_forward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceDropPath,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Forward, _>(device, stream, args) }
}

/// Computes `dx` from `dy`, with the same mask.
///
/// # Safety
/// As `pace_noisy_linear_forward`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_drop_path_backward(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const PaceDropPath,
) -> PaceStatus {
    // SAFETY: the caller's promise.
    unsafe { call::<Backward, _>(device, stream, args) }
}

/// Writes a DropPath mask to host memory: 1 with probability `1 − drop_probability`, else 0, one for each of the samples from
/// `first_sample` on. `dtype` is `PACE_F32` or `PACE_F64`.
///
/// # Safety
/// The mask is NULL or memory of its length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pace_drop_path_mask(
    dtype: u32,
    key: u64,
    drop_probability: f64,
    first_sample: u64,
    mask: PaceTensor,
) -> PaceStatus {
    /// # Safety
    /// As of the function around it.
    unsafe fn write<T: Real>(key: u64, probability: f64, first: u64, mask: PaceTensor) -> Result<()> {
        // SAFETY: the caller's promise.
        let mask = unsafe { Host::<T>::new() }.output("mask", mask)?;
        Ok(noise::drop_path_mask(super::call::key(key), probability, first, mask)?)
    }
    // SAFETY: the caller's promise.
    run(|| unsafe {
        match dtype {
            PACE_F32 => write::<f32>(key, drop_probability, first_sample, mask),
            PACE_F64 => write::<f64>(key, drop_probability, first_sample, mask),
            _ => Err(Failure::new(
                PACE_ERROR_DTYPE,
                "`dtype` is another than PACE_F32 and PACE_F64, which a mask is",
            )),
        }
    })
}
