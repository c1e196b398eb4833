//! The low-rank layer by GEMMs of cuBLASLt, with our epilogues between them.

use super::{Layer, Passes};
use crate::cpu::LowRankGrads;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gemm::{Arena, Gemms, Workspace};
use crate::cuda::gpu::Gpu;
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::under_noise::{self, Outputs};
use crate::error::Result;
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// The library's part of the workspace, for the largest GEMM's output.
fn gemm_workspace(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape, rank: usize) -> Workspace {
    let LinearShape { in_features: k, out_features: n, .. } = *shape;
    let rows = shape.in_rows().saturating_mul(k.max(n).max(rank));
    arena.take_workspace(gpu, rows.max(rank.saturating_mul(k.max(n))))
}

fn ds_bytes(shape: &LinearShape, rank: usize, dtype: DType) -> usize {
    shape.in_rows().saturating_mul(rank).saturating_mul(dtype.bytes())
}

fn workspace_len(gpu: &Gpu, shape: &LinearShape, rank: usize, dtype: DType) -> usize {
    Arena::len_of(|arena| {
        gemm_workspace(arena, gpu, shape, rank);
        arena.take(ds_bytes(shape, rank, dtype));
        under_noise::reserve(arena, shape, dtype);
    })
}

/// `s = scale·x·Aᵀ`, two GEMMs for base and adapter, and `y = base + z⊙(adapter + δb)` where there is noise.
fn forward(layer: &Layer, pass: &Pass, x: Buffer, s: Buffer, y: Buffer) -> Result<Plan> {
    let (shape, r) = (&layer.shape, layer.rank);
    let (rows, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let mut arena = Arena::new(pass.workspace.into());
    let gemms = Gemms::new(pass.arithmetic, gemm_workspace(&mut arena, &pass.gpu, shape, r));
    let low = gemms.times_transposed([rows, r, k], x.into(), layer.lora_a.into(), s.into());
    let mut plan = Plan::from(low.scaled(layer.scale));
    let outputs = Outputs {
        base: layer.base.map(|base| {
            let gemm = gemms.times_transposed([rows, n, k], x.into(), base.weight.into(), y.into());
            gemm.with_bias(base.bias.map(Into::into))
        }),
        adapter: Some(gemms.times_transposed([rows, n, r], s.into(), layer.lora_b.into(), y.into())),
        bias: layer.delta_bias,
        y,
    };
    plan.append(outputs.plan(shape, pass, &mut arena));
    Ok(plan)
}

/// `e = z⊙g`, and a GEMM for each term of the gradients.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, s, dy]: [Buffer; 3],
    grads: LowRankGrads<Buffer>,
) -> Result<Plan> {
    let (shape, r, dtype) = (&layer.shape, layer.rank, pass.arithmetic.dtype);
    let (rows, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let mut arena = Arena::new(pass.workspace.into());
    let gemms = Gemms::new(pass.arithmetic, gemm_workspace(&mut arena, &pass.gpu, shape, r));
    let ds = arena.take(ds_bytes(shape, r, dtype));
    let base = layer.base.filter(|_| grads.input.is_some());
    let needs_ds = grads.input.is_some() || grads.lora_a.is_some();
    let needs_e = needs_ds || grads.lora_b.is_some();
    let (mut plan, g, e) =
        under_noise::gradients(shape, pass, &mut arena, dy, base.is_some(), needs_e, grads.delta_bias);
    if needs_ds {
        plan.push(gemms.times([rows, r, n], e, layer.lora_b.into(), ds).scaled(layer.scale));
    }
    if let Some(dx) = grads.input {
        if let Some(base) = base {
            plan.push(gemms.times([rows, k, n], g, base.weight.into(), dx.into()));
        }
        let gemm = gemms.times([rows, k, r], ds, layer.lora_a.into(), dx.into());
        plan.push(if base.is_some() { gemm.accumulated() } else { gemm });
    }
    if let Some(lora_b) = grads.lora_b {
        plan.push(gemms.transposed_times([n, r, rows], e, s.into(), lora_b.into()));
    }
    if let Some(lora_a) = grads.lora_a {
        plan.push(gemms.transposed_times([r, k, rows], ds, x.into(), lora_a.into()));
    }
    Ok(plan)
}
