//! Carries out plans in the simulator: launches by `pace_simt`, and GEMMs by a twin of the library.

use crate::schedules;
use half::{bf16, f16};
use pace_kernels::cuda::{DType, Gemm, Gpu, Matrix, Plan, Step};
use pace_simt::{Fault, Launch, Memory, Schedule, TensorMap};
use std::collections::BTreeSet;

/// What the simulator stands for: any device that has a library. Small workspaces keep it quick.
pub const GPU: Gpu = Gpu::A100;

/// What was launched.
#[derive(Default)]
pub struct Launched {
    pub threads: usize,
    pub kernels: BTreeSet<&'static str>,
}

/// Carries out a plan, and adds what it launches.
///
/// # Panics
/// At the first fault.
pub fn run(plan: &Plan, memory: &mut Memory, schedule: Schedule, launched: &mut Launched) {
    for step in plan.steps() {
        match step {
            Step::Launch(launch) => {
                launched.kernels.insert(launch.kernel.name);
                launched.threads += launch.grid.iter().chain(&launch.block).product::<u32>() as usize;
                let simulated = Launch {
                    kernel: launch.kernel.name,
                    grid: launch.grid,
                    cluster: launch.cluster,
                    block: launch.block,
                    shared_bytes: launch.shared_bytes,
                    params: &params(launch),
                };
                if schedule != Schedule::InOrder {
                    schedules::count_launch(launch.kernel.name);
                }
                memory
                    .launch(&simulated, schedule)
                    .unwrap_or_else(|fault| panic!("{}: {fault}", launch.kernel.name));
            }
            Step::Gemm(gemm) => {
                multiply(gemm, memory).unwrap_or_else(|fault| panic!("{gemm:?}: {fault}"));
            }
            other => panic!("the simulator does not know {other:?}"),
        }
    }
}

/// The parameters, with tensor maps as the simulator takes them.
fn params(launch: &pace_kernels::cuda::Launch) -> Vec<u8> {
    let mut bytes = launch.params.bytes().to_vec();
    for &(offset, map) in launch.params.maps() {
        let map = TensorMap {
            address: map.address,
            dims: map.dims,
            strides: map.strides,
            box_dims: map.box_dims,
            swizzle: map.swizzle,
            rank: map.rank,
            element_bytes: map.dtype.bytes() as u32,
            reserved: [0; 4],
        };
        bytes[offset..][..size_of::<TensorMap>()].copy_from_slice(bytemuck::bytes_of(&map));
    }
    bytes
}

/// The library's part: sums in f64, rounded once.
fn multiply(gemm: &Gemm, memory: &mut Memory) -> Result<(), Fault> {
    assert!(
        gemm.m > 0 && gemm.n > 0 && gemm.k > 0 && gemm.workspace.address.0.is_multiple_of(256),
        "{gemm:?}"
    );
    // It may write what it likes there, and asks for nothing.
    let poison = vec![f32::NAN; gemm.workspace.bytes / 4];
    memory.library_write(gemm.workspace.address.0, &poison)?;
    let a = matrix(memory, gemm, gemm.a, gemm.m, gemm.k)?;
    let b = matrix(memory, gemm, gemm.b, gemm.k, gemm.n)?;
    let bias = match gemm.bias {
        // The library loads vectors of it, wherever it is.
        Some(bias) => {
            assert!(bias.0.is_multiple_of(16), "{gemm:?}");
            read(memory, gemm.output, bias.0, gemm.n)?
        }
        None => vec![0.0; gemm.n],
    };
    let before = match gemm.beta {
        0.0 => vec![0.0; gemm.m * gemm.n],
        _ => read(memory, gemm.output, gemm.d.0, gemm.m * gemm.n)?,
    };
    let mut d = Vec::with_capacity(gemm.m * gemm.n);
    let mut sums = vec![0.0; gemm.n];
    for (i, a) in a.chunks_exact(gemm.k).enumerate() {
        sums.fill(0.0);
        for (a, b) in a.iter().zip(b.chunks_exact(gemm.n)) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
        }
        let (alpha, beta) = (f64::from(gemm.alpha), f64::from(gemm.beta));
        d.extend((0..gemm.n).map(|j| alpha * sums[j] + beta * before[i * gemm.n + j] + bias[j]));
    }
    match gemm.output {
        DType::F32 => memory.library_write(gemm.d.0, &d.iter().map(|&d| d as f32).collect::<Vec<_>>()),
        DType::F16 => {
            memory.library_write(gemm.d.0, &d.iter().map(|&d| f16::from_f64(d)).collect::<Vec<_>>())
        }
        DType::BF16 => {
            memory.library_write(gemm.d.0, &d.iter().map(|&d| bf16::from_f64(d)).collect::<Vec<_>>())
        }
    }
}

/// A row-major `[rows, columns]` operand.
fn matrix(
    memory: &Memory,
    gemm: &Gemm,
    from: Matrix,
    rows: usize,
    columns: usize,
) -> Result<Vec<f64>, Fault> {
    let mut values = read(memory, gemm.dtype, from.address.0, rows * columns)?;
    if gemm.dtype == DType::F32 && gemm.allow_tf32 {
        for value in &mut values {
            // Half an ulp of 10 fraction bits up, then cut off.
            *value = f64::from(f32::from_bits(((*value as f32).to_bits() + 0x1000) & 0xffff_e000));
        }
    }
    match from.is_transposed {
        true => Ok((0..rows * columns).map(|i| values[i % columns * rows + i / columns]).collect()),
        false => Ok(values),
    }
}

fn read(memory: &Memory, dtype: DType, address: u64, len: usize) -> Result<Vec<f64>, Fault> {
    Ok(match dtype {
        DType::F32 => memory.library_read::<f32>(address, len)?.into_iter().map(f64::from).collect(),
        DType::F16 => memory.library_read::<f16>(address, len)?.into_iter().map(f64::from).collect(),
        DType::BF16 => memory.library_read::<bf16>(address, len)?.into_iter().map(f64::from).collect(),
    })
}
