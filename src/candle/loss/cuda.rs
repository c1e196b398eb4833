//! The loss of CUDA logits.

use super::Terms;
use crate::candle::cuda::{Element, Gpu, by_dtype, with_views};
use crate::candle::ops::wrap;
use crate::cpu::LossValues;
use crate::cuda::{Consistency, LossInputs, LossOutputs, LossStatus};
use crate::loss::Targets;
use crate::shape::{length, nonzero};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, DType, Result, Tensor};

/// What the logits of branch 0 are kept consistent with; labels and indices are the host's.
pub(super) enum Partner<'a> {
    None,
    OtherBranch,
    History { table: &'a mut CudaSlice<f32>, index: &'a [i64] },
}

/// The loss of some logits, and its gradient to them. Waits for the device.
pub(super) fn evaluate(
    device: &CudaDevice,
    terms: Terms<'_>,
    logits: &Tensor,
    partner: Partner<'_>,
) -> Result<(LossValues, Tensor)> {
    by_dtype!("pace_loss", logits.dtype(), T => evaluate_as::<T>(&Gpu::of(device)?, terms, logits, partner))
}

fn evaluate_as<T: Element>(
    gpu: &Gpu,
    terms: Terms<'_>,
    logits: &Tensor,
    partner: Partner<'_>,
) -> Result<(LossValues, Tensor)> {
    let Terms { settings, targets, class_weights } = terms;
    let classes = settings.classes;
    wrap(nonzero("classes", classes))?;
    let batch = match &targets {
        Targets::Labels(labels) => labels.len(),
        Targets::Probabilities(all) | Targets::Values(all) => all.dim(0)?,
    };
    wrap(nonzero("labels.len()", batch))?;
    let two_branches = matches!(partner, Partner::OtherBranch);
    let (mut history, mut rows) = (None, 0);
    if let Partner::History { table, index } = partner {
        wrap(length("index", "[B]", index, batch))?;
        rows = table.len() / classes;
        history = Some((table, gpu.candle.clone_htod(index)?));
    }
    let workspace_len = settings.workspace_len(batch);
    let labels = match &targets {
        Targets::Labels(labels) => Some(gpu.candle.clone_htod(*labels)?),
        _ => None,
    };
    let floats = match &targets {
        Targets::Labels(_) => None,
        Targets::Probabilities(all) | Targets::Values(all) => Some(all.to_dtype(DType::F32)?),
    };
    let class_weights: Option<Vec<f32>> =
        class_weights.map(|all| all.iter().map(|&weight| weight as f32).collect());
    let class_weights = class_weights.map(|all| gpu.candle.clone_htod(&all)).transpose()?;
    let mut gradient = gpu.alloc::<T>(logits.elem_count())?;
    let mut values = gpu.alloc::<f32>(3)?;
    let mut status = gpu.alloc::<u64>(LossStatus::WORDS)?;
    let mut workspace = gpu.candle.alloc_zeros::<u32>(workspace_len)?;
    let floats: Vec<&Tensor> = floats.iter().collect();
    with_views::<f32, _>("pace_loss", &floats, |floats| {
        with_views::<T, _>("pace_loss", &[logits], |views| {
            let targets: Targets<&dyn DevicePtr<i64>, &dyn DevicePtr<f32>> = match (&targets, &labels) {
                (Targets::Labels(_), Some(labels)) => Targets::Labels(labels),
                (Targets::Values(_), _) => Targets::Values(&floats[0]),
                _ => Targets::Probabilities(&floats[0]),
            };
            let consistency = match &mut history {
                Some((table, index)) => Consistency::History { table: *table, index },
                None if two_branches => Consistency::TwoBranch,
                None => Consistency::None,
            };
            let outputs = LossOutputs {
                gradient: Some(&mut gradient),
                ..LossOutputs::new(&mut values, &mut status, &mut workspace)
            };
            wrap(gpu.operators.loss(
                &settings,
                LossInputs {
                    class_weights: class_weights.as_ref().map(|all| all as _),
                    ..LossInputs::new(&views[0], targets)
                },
                consistency,
                outputs,
                &gpu.stream,
            ))
        })
    })?;
    // The copies wait for the device.
    let (status, values) = (gpu.candle.clone_dtoh(&status)?, gpu.candle.clone_dtoh(&values)?);
    let (Ok(status), &[total, classification, consistency]) = (status.try_into(), &values[..]) else {
        candle_core::bail!("pace_loss: the device gave back less than it was asked for");
    };
    wrap(LossStatus::new(status).check(classes, rows))?;
    let [total, classification, consistency] = [total, classification, consistency].map(f64::from);
    Ok((LossValues { total, classification, consistency }, gpu.tensor(gradient, logits.shape())))
}
