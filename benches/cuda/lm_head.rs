//! The head of a language model with its loss: Llama 3's, 8192 tokens in each branch. The rows of one branch are what the others are to be
//! compared with.

use crate::gpu::{Gpu, Value};
use crate::{Case, Launch};
use half::bf16;
use pace_kernels::cuda::{Element, LmHead, LmHeadOutputs, LossStatus};
use pace_kernels::{Divergence, LossSettings};
use std::rc::Rc;

const TOKENS: usize = 8192;
const HIDDEN_SIZE: usize = 4096;
const CLASSES: usize = 128_256;

pub fn cases() -> Vec<Case> {
    let (squared, kl) = (Divergence::SquaredDifference, Divergence::SymmetricKl);
    vec![
        case("head, one branch, frozen", squared, 1, false),
        case("head, squared difference, frozen", squared, 2, false),
        case("head, symmetric KL, frozen", kl, 2, false),
        case("head, one branch, trained", squared, 1, true),
        case("head, squared difference, trained", squared, 2, true),
        case("head, symmetric KL, trained", kl, 2, true),
    ]
}

fn case(operator: &'static str, divergence: Divergence, branches: usize, trains: bool) -> Case {
    let settings = LossSettings { divergence, ..LossSettings::new(CLASSES, 0.1) };
    let (rows, matrix) = (branches * TOKENS * HIDDEN_SIZE, CLASSES * HIDDEN_SIZE);
    let labels: Rc<[i64]> = (0..TOKENS).map(|i| (i * 7 % CLASSES) as i64).collect();
    Case {
        operator,
        family: "cublaslt",
        dtype: bf16::NAME,
        shape: format!("{TOKENS}x{HIDDEN_SIZE}x{CLASSES}"),
        bytes: 2 * (2 * rows + matrix) + if trains { 4 * matrix } else { 0 },
        // Of logits and gradients of one branch.
        flop: 2 * TOKENS * HIDDEN_SIZE * CLASSES * if trains { 3 } else { 2 },
        against_product: false,
        set: Box::new(move |gpu| {
            let (hidden, weight) = (gpu.values::<bf16>(rows)?, gpu.values::<bf16>(matrix)?);
            let labels = gpu.upload(&labels)?;
            let mut gram = gpu.zeros::<f32>(HIDDEN_SIZE * HIDDEN_SIZE)?;
            let (mut dh, mut values) = (gpu.zeros::<bf16>(rows)?, gpu.zeros::<f32>(3)?);
            let mut dw = gpu.zeros::<f32>(if trains { matrix } else { 1 })?;
            let mut status = gpu.zeros::<u64>(LossStatus::WORDS)?;
            let gram_is_given = (!trains).then_some(());
            let scalars = LmHead {
                branches,
                gram: gram_is_given,
                ..LmHead::new(settings, TOKENS, HIDDEN_SIZE, (), ())
            };
            let len = scalars.workspace_len(gpu.device.gpu(), bf16::DTYPE, trains);
            let mut workspace = gpu.zeros::<u32>(len.max(scalars.gram_workspace_len(gpu.device.gpu())))?;
            let mut is_first = true;
            let launch: Launch = Box::new(move |gpu: &Gpu| {
                let head = LmHead::new(settings, TOKENS, HIDDEN_SIZE, &labels as _, &weight as _);
                let mut head = LmHead { branches, ..head };
                // Once for a weight that does not change.
                if std::mem::take(&mut is_first) {
                    gpu.device.lm_head_gram::<bf16>(&head, &mut gram, &mut workspace, &gpu.stream)?;
                }
                head.gram = (!trains).then_some(&gram as _);
                let outputs = LmHeadOutputs {
                    hidden: Some(&mut dh as _),
                    weight: trains.then_some(&mut dw as _),
                    bias: None,
                    lora_b: None,
                    lora_a: None,
                    values: &mut values as _,
                    status: &mut status as _,
                    workspace: &mut workspace as _,
                };
                Ok(gpu.device.lm_head::<bf16>(&head, &hidden, outputs, &gpu.stream)?)
            });
            Ok(launch)
        }),
    }
}
