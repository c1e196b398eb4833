//! Loss with its gradient, 64 samples: two branches, or one branch and its rows of the history table.

use crate::gpu::Gpu;
use crate::{Case, Launch};
use pace_kernels::cuda::{Consistency, LossInputs, LossOutputs, LossStatus};
use pace_kernels::{LossSettings, Targets};

const BATCH: usize = 64;

pub fn cases() -> Vec<Case> {
    [100, 1000, 32768].into_iter().flat_map(|classes| [case(classes, false), case(classes, true)]).collect()
}

fn case(classes: usize, history: bool) -> Case {
    let settings = LossSettings::new(classes, 1.0);
    let len = if history { 1 } else { 2 } * BATCH * classes;
    let labels: Vec<i64> = (0..BATCH).map(|i| (i * 7 % classes) as i64).collect();
    let rows: Vec<i64> = (0..BATCH as i64).rev().collect();
    Case {
        operator: if history { "loss history" } else { "loss two branches" },
        family: "–",
        dtype: "f32",
        shape: format!("{BATCH}x{classes}"),
        // Logits and gradient of both branches; or of one, and its rows of the table, read and written.
        bytes: 16 * BATCH * classes,
        flop: 0,
        against_product: false,
        set: Box::new(move |gpu| {
            let (logits, labels) = (gpu.values::<f32>(len)?, gpu.upload(&labels)?);
            let mut table = history.then(|| gpu.values::<f32>(len)).transpose()?;
            let index = gpu.upload(&rows)?;
            let (mut gradient, mut values) = (gpu.zeros::<f32>(len)?, gpu.zeros::<f32>(3)?);
            let mut status = gpu.zeros::<u64>(LossStatus::WORDS)?;
            let mut workspace = gpu.zeros::<u32>(settings.workspace_len(BATCH))?;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let consistency = match &mut table {
                    Some(table) => Consistency::History { table, index: &index },
                    None => Consistency::TwoBranch,
                };
                let outputs = LossOutputs {
                    gradient: Some(&mut gradient),
                    values: &mut values,
                    status: &mut status,
                    workspace: &mut workspace,
                    accumulate: false,
                };
                let inputs = LossInputs::new(&logits, Targets::Labels(&labels as _));
                Ok(gpu.device.loss::<f32>(&settings, inputs, consistency, outputs, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}
