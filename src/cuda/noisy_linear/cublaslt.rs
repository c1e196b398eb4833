//! The dense layer by GEMMs of cuBLASLt, with our epilogues between them.

use super::{Layer, Passes};
use crate::cpu::NoisyLinearGrads;
use crate::cuda::buffer::{Buffer, DType};
use crate::cuda::gemm::{Arena, Gemms, Workspace};
use crate::cuda::gpu::Gpu;
use crate::cuda::layer::Pass;
use crate::cuda::plan::Plan;
use crate::cuda::under_noise::{self, Outputs};
use crate::error::Result;
use crate::shape::LinearShape;

pub(super) const PASSES: Passes = Passes { workspace_len, forward, backward };

/// The library's part of the workspace; the largest GEMM's output is y or ΔW.
fn gemm_workspace(arena: &mut Arena, gpu: &Gpu, shape: &LinearShape) -> Workspace {
    let LinearShape { in_features: k, out_features: n, .. } = *shape;
    arena.take_workspace(gpu, shape.in_rows().saturating_mul(k.max(n)).max(k.saturating_mul(n)))
}

fn workspace_len(gpu: &Gpu, shape: &LinearShape, dtype: DType) -> usize {
    Arena::len_of(|arena| {
        gemm_workspace(arena, gpu, shape);
        under_noise::reserve(arena, shape, dtype);
    })
}

/// Two GEMMs, and `y = base + z⊙(adapter + Δb)` where there is noise.
fn forward(layer: &Layer, pass: &Pass, x: Buffer, y: Buffer) -> Result<Plan> {
    let shape = &layer.shape;
    let mut arena = Arena::new(pass.workspace.into());
    let gemms = Gemms::new(pass.arithmetic, gemm_workspace(&mut arena, &pass.gpu, shape));
    let sizes = [shape.in_rows(), shape.out_features, shape.in_features];
    let gemm = |weight: Buffer| gemms.times_transposed(sizes, x.into(), weight.into(), y.into());
    let outputs = Outputs {
        base: layer.base.map(|base| gemm(base.weight).with_bias(base.bias.map(Into::into))),
        adapter: layer.delta_weight.map(gemm),
        bias: layer.delta_bias,
        y,
    };
    Ok(outputs.plan(shape, pass, &mut arena))
}

/// `e = z⊙g`, and a GEMM for each term of the gradients.
fn backward(
    layer: &Layer,
    pass: &Pass,
    [x, dy]: [Buffer; 2],
    grads: NoisyLinearGrads<Buffer>,
) -> Result<Plan> {
    let shape = &layer.shape;
    let mut arena = Arena::new(pass.workspace.into());
    let gemms = Gemms::new(pass.arithmetic, gemm_workspace(&mut arena, &pass.gpu, shape));
    let (rows, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let base = layer.base.filter(|_| grads.input.is_some());
    let needs_e = grads.delta_weight.is_some() || (grads.input.is_some() && layer.delta_weight.is_some());
    let (mut plan, g, e) =
        under_noise::gradients(shape, pass, &mut arena, dy, base.is_some(), needs_e, grads.delta_bias);
    if let Some(dx) = grads.input {
        let terms = [base.map(|base| (g, base.weight)), layer.delta_weight.map(|weight| (e, weight))];
        for (i, (gradient, weight)) in terms.into_iter().flatten().enumerate() {
            let gemm = gemms.times([rows, k, n], gradient, weight.into(), dx.into());
            plan.push(if i == 0 { gemm } else { gemm.accumulated() });
        }
    }
    if let Some(dw) = grads.delta_weight {
        plan.push(gemms.transposed_times([n, k, rows], e, x.into(), dw.into()));
    }
    Ok(plan)
}
