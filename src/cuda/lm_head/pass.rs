//! The steps of a head's plan: logits, loss and gradients of some rows after others.

use super::params::*;
use super::workspace::Places;
use super::{Head, Outputs, part};
use crate::cpu::Lora;
use crate::cuda::buffer::{Address, Buffer, DType, rows_are_aligned};
use crate::cuda::gemm::{Gemm, Gemms};
use crate::cuda::kernel::{Kernel, WARP, table};
use crate::cuda::loss::{Loss, Partner};
use crate::cuda::plan::{Launch, Plan};
use crate::error::{Error, Result};
use crate::loss::Targets;
use bytemuck::Pod;

/// Steps of one plan.
pub(super) struct Pass<'a> {
    pub(super) head: &'a Head,
    pub(super) dtype: DType,
    pub(super) hidden: Buffer,
    pub(super) outputs: Outputs,
    pub(super) words: Buffer,
    pub(super) places: Places,
    pub(super) has_gram: bool,
    pub(super) gemms: Gemms,
    /// The same, never as TF32.
    pub(super) exact: Gemms,
    /// Of `Δh` and the Gram matrix.
    pub(super) gram_gemms: Gemms,
}

impl Pass<'_> {
    pub(super) fn plan(&self) -> Result<Plan> {
        let mut plan = Plan::default();
        if self.has_gram {
            self.by_gram(&mut plan)?;
        }
        for (start, count) in self.chunks(self.places.logits.rows) {
            self.chunk(start, count, &mut plan)?;
        }
        Ok(plan)
    }

    /// The first row and the number of rows of each chunk.
    pub(super) fn chunks(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let tokens = self.head.tokens;
        (0..tokens).step_by(rows).map(move |start| (start, rows.min(tokens - start)))
    }

    /// Whether there are gradients to the weight or the LoRA.
    pub(super) fn trains(&self) -> bool {
        let Outputs { weight, lora_b, lora_a, .. } = self.outputs;
        [weight, lora_b, lora_a].iter().any(Option::is_some)
    }

    /// Rows of a branch, from row `start` of it on.
    pub(super) fn branch(&self, of: Buffer, branch: usize, start: usize, count: usize) -> Address {
        let rows = branch * self.head.tokens + start;
        part(of, rows, count, self.head.hidden_size, self.dtype.bytes()).into()
    }

    pub(super) fn ignored(&self) -> (i64, u32) {
        let ignore_label = self.head.settings.ignore_label;
        (ignore_label.unwrap_or_default(), ignore_label.is_some().into())
    }

    /// Rows of both branches, for a kernel that has other tensors of their shape.
    pub(super) fn rows(&self, start: usize, count: usize, others: &[Address]) -> LmHeadRows {
        let Pass { head, hidden, .. } = self;
        let [first, second] = [0, 1].map(|branch| self.branch(*hidden, branch, start, count));
        let tensors = [&[first, second], others].concat();
        let (ignore_label, has_ignore_label) = self.ignored();
        LmHeadRows {
            first: first.into(),
            second: second.into(),
            labels: part(head.labels, start, count, 1, 8).into(),
            ignore_label,
            has_ignore_label,
            labelled_only: head.settings.labelled_only.into(),
            classes: head.settings.classes as u32,
            count: count as u32,
            columns: head.hidden_size as u32,
            aligned: rows_are_aligned(self.dtype, head.hidden_size, &tensors).into(),
        }
    }

    /// All of some rows: logits, loss, gradients.
    fn chunk(&self, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, hidden, outputs, places, has_gram, .. } = self;
        let (v, places) = (head.settings.classes, &places.logits);
        let branches = if *has_gram { 1 } else { head.branches };
        self.logits(self.branch(*hidden, 0, start, count), places.logits, true, count, plan);
        if branches == 2 {
            let logits = places.logits.offset(count * v * dtype.bytes());
            match head.soft_cap {
                Some(_) => self.logits(self.branch(*hidden, 1, start, count), logits, true, count, plan),
                None => {
                    let kernel = table::LM_HEAD_DIFFERENCE.choose(*dtype);
                    self.difference(kernel, [places.delta, Address::NONE], start, count, plan)?;
                    self.logits(places.delta, logits, false, count, plan);
                }
            }
        }
        let logits = Buffer { address: places.logits.0, len: branches * count * v };
        let wants_gradient = self.trains() || outputs.hidden.is_some() || outputs.bias.is_some();
        let loss = Loss {
            settings: head.settings,
            dtype: *dtype,
            logits,
            targets: Targets::Labels(part(head.labels, start, count, 1, 8)),
            class_weights: head.class_weights,
            counted: head.settings.denominator.is_none().then_some(head.labels),
            partner: match (branches, head.soft_cap) {
                (1, _) => Partner::None,
                (_, None) => Partner::Difference,
                (_, Some(_)) => Partner::OtherBranch,
            },
            gradient: wants_gradient.then_some(logits),
            values: outputs.values,
            status: outputs.status,
            accumulate: start > 0 || *has_gram,
            first_row: start,
            workspace: self.words,
        };
        plan.append(loss.plan_capped(head.soft_cap.map(|cap| cap as f32))?);
        if wants_gradient {
            for branch in 0..branches {
                self.backward(branch, start, count, plan)?;
            }
        }
        Ok(())
    }

    /// `Δh` of some rows.
    pub(super) fn difference(
        &self,
        kernel: Kernel,
        [high, low]: [Address; 2],
        start: usize,
        count: usize,
        plan: &mut Plan,
    ) -> Result<()> {
        let rows = self.rows(start, count, &[high, low]);
        let params = LmHeadDifferenceParams { rows, high: high.into(), low: low.into() };
        plan.push(launch(kernel, vector_blocks(self.dtype, count, self.head.hidden_size)?, &params));
        Ok(())
    }

    /// `a·(x·(W + s·B·A)ᵀ + b)`.
    fn logits(&self, x: Address, logits: Address, has_bias: bool, count: usize, plan: &mut Plan) {
        let Pass { head, places, gemms, .. } = self;
        let (v, h, a) = (head.settings.classes, head.hidden_size, head.logit_scale as f32);
        let gemm = gemms.times_transposed([count, v, h], x, head.weight.into(), logits).scaled(a);
        plan.push(gemm.with_bias(head.bias.filter(|_| has_bias).map(Into::into)));
        if let Some(Lora { rank: r, lora_a, lora_b, scale }) = head.lora {
            let s = places.logits.low_rank[0];
            plan.push(gemms.times_transposed([count, r, h], x, lora_a.into(), s));
            let gemm = gemms.times_transposed([count, v, r], s, lora_b.into(), logits);
            plan.push(gemm.scaled(a * scale).accumulated());
        }
    }

    /// From the gradient to a branch's logits, which lies in their place.
    fn backward(&self, branch: usize, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, outputs, places, gemms, .. } = self;
        let (v, h, a) = (head.settings.classes, head.hidden_size, head.logit_scale as f32);
        let x = self.branch(self.hidden, branch, start, count);
        let dl = places.logits.logits.offset(branch * count * v * dtype.bytes());
        let dh = outputs.hidden.map(|dh| self.branch(dh, branch, start, count));
        let is_first = branch == 0 && start == 0;
        // Into `f32`, over all rows, and what the Gram matrix has given.
        let writes = is_first && !self.has_gram;
        let add = |gemm: Gemm| if writes { gemm.in_f32() } else { gemm.in_f32().accumulated() };
        if let Some(dh) = dh {
            let gemm = gemms.times([count, h, v], dl, head.weight.into(), dh).scaled(a);
            plan.push(if self.has_gram { gemm.accumulated() } else { gemm });
        }
        if let Some(dw) = outputs.weight {
            plan.push(add(gemms.transposed_times([v, h, count], dl, x, dw.into()).scaled(a)));
        }
        if let Some(db) = outputs.bias {
            let params = LmHeadBiasParams {
                gradient: dl.into(),
                bias: db.into(),
                rows: count as u32,
                columns: v as u32,
                factor: a,
                accumulate: (!is_first).into(),
                aligned: rows_are_aligned(*dtype, v, &[dl]).into(),
            };
            plan.push(launch(table::LM_HEAD_BIAS.choose(*dtype), vector_blocks(*dtype, 1, v)?, &params));
        }
        let Some(Lora { rank: r, lora_a, lora_b, scale }) = head.lora else { return Ok(()) };
        let [s, ds] = places.logits.low_rank;
        if dh.is_some() || outputs.lora_a.is_some() {
            plan.push(gemms.times([count, r, v], dl, lora_b.into(), ds).scaled(a * scale));
        }
        if let Some(dh) = dh {
            plan.push(gemms.times([count, h, r], ds, lora_a.into(), dh).accumulated());
        }
        if let Some(to) = outputs.lora_a {
            plan.push(add(gemms.transposed_times([r, h, count], ds, x, to.into())));
        }
        if let Some(to) = outputs.lora_b {
            plan.push(gemms.times_transposed([count, r, h], x, lora_a.into(), s));
            plan.push(add(gemms.transposed_times([v, r, count], dl, s, to.into()).scaled(a * scale)));
        }
        Ok(())
    }
}

pub(super) const BLOCK: [u32; 3] = [LM_HEAD_THREADS as u32, 1, 1];
/// For a sum over a block, and a word more.
pub(super) const SHARED_BYTES: usize = 4 * (LM_HEAD_THREADS / WARP + 1);

/// A launch whose threads have a vector each.
pub(super) fn launch(kernel: Kernel, blocks: u32, params: &impl Pod) -> Launch {
    Launch::new(kernel, [blocks, 1, 1], BLOCK, 0, params)
}

/// Blocks of a kernel whose threads have a vector of a matrix each.
pub(super) fn vector_blocks(dtype: DType, rows: usize, columns: usize) -> Result<u32> {
    let blocks = rows.saturating_mul(columns.div_ceil(16 / dtype.bytes())).div_ceil(LM_HEAD_THREADS);
    match i32::try_from(blocks) {
        Ok(blocks) => Ok(blocks as u32),
        Err(_) => Err(Error::Overflow { argument: "hidden", shape: "a grid of its vectors" }),
    }
}
