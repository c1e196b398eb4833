//! Loss with its gradient, 64 samples: two branches, or one branch and its rows of the history table; then other divergences of two
//! branches, each with a criterion of both.

use crate::gpu::Gpu;
use crate::{Case, Launch};
use pace_kernels::cuda::{Consistency, LossInputs, LossOutputs, LossStatus};
use pace_kernels::{Divergence, LossSettings, Targets};

const BATCH: usize = 64;

/// Divergences that the kernels of the paper's loss do not have.
const OTHERS: [(&str, Divergence); 4] = [
    ("loss centred", Divergence::CenteredSquaredDifference),
    ("loss R-Drop", Divergence::SymmetricKl),
    ("loss KL", Divergence::Kl { temperature: 2.0, detach_target: false }),
    ("loss Jensen-Shannon", Divergence::JensenShannon),
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for classes in [100, 1000, 32768] {
        let paper = LossSettings::new(classes, 1.0);
        cases.push(case("loss two branches", paper, false));
        cases.push(case("loss history", paper, true));
        for (operator, divergence) in OTHERS {
            cases.push(case(operator, LossSettings { divergence, both_branches: true, ..paper }, false));
        }
    }
    cases
}

fn case(operator: &'static str, settings: LossSettings, history: bool) -> Case {
    let classes = settings.classes;
    let len = if history { 1 } else { 2 } * BATCH * classes;
    let labels: Vec<i64> = (0..BATCH).map(|i| (i * 7 % classes) as i64).collect();
    let rows: Vec<i64> = (0..BATCH as i64).rev().collect();
    Case {
        operator,
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
                    ..LossOutputs::new(&mut values, &mut status, &mut workspace)
                };
                let inputs = LossInputs::new(&logits, Targets::Labels(&labels as _));
                Ok(gpu.device.loss::<f32>(&settings, inputs, consistency, outputs, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}
