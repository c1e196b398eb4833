//! Squared differences of a head's branches by the Gram matrix of its weight.
//!
//! With LoRA the weight is `W + s·B·A`, and its Gram matrix `G + Cᵀ·A + Aᵀ·C` with `C = s·BᵀW + s²/2·BᵀB·A`. Small matrices are in `f32`,
//! and multiplied with tensors of 16 bits as sums of two such numbers.

use super::MAX_BLOCKS;
use super::params::*;
use super::pass::{BLOCK, Pass, SHARED_BYTES, launch, vector_blocks};
use crate::cpu::Lora;
use crate::cuda::buffer::{Address, DType, rows_are_aligned};
use crate::cuda::kernel::table;
use crate::cuda::loss::how;
use crate::cuda::plan::{Launch, Plan};
use crate::error::{Error, Result};
use crate::loss::LossSettings;

impl Pass<'_> {
    /// Values and gradients of the squared difference. The cross-entropy is added to them.
    pub(super) fn by_gram(&self, plan: &mut Plan) -> Result<()> {
        let (_, pull) = self.factors();
        if !(pull as f32).is_finite() {
            let expected = "in the range of f32 with `logit_scale` and `denominator`";
            return Err(Error::Value { argument: "lambda", expected, got: self.head.settings.lambda });
        }
        self.prepare_gram(plan)?;
        for (start, count) in self.chunks(self.places.gram.rows) {
            self.pull(start, count, plan)?;
        }
        if self.trains() { self.write_moment(plan) } else { Ok(()) }
    }

    /// Where 1 over the number of labels lies, if that is what sums are divided by.
    fn weight(&self) -> Address {
        let LossSettings { labelled_only, denominator, .. } = self.head.settings;
        if labelled_only && denominator.is_none() { self.places.weight } else { Address::NONE }
    }

    /// What a distance is multiplied by, and its gradient; divided by what is known.
    fn factors(&self) -> (f64, f64) {
        let LossSettings { divergence, lambda, classes, denominator, .. } = self.head.settings;
        let (_, of_value, of_gradient) = how(divergence, classes);
        let divisor = match denominator {
            Some(denominator) => denominator,
            None if self.weight() != Address::NONE => 1.0,
            None => self.head.tokens as f64,
        };
        let square = self.head.logit_scale * self.head.logit_scale / divisor;
        (of_value * square, lambda * of_gradient * square)
    }

    /// The Gram matrix as it is multiplied, and the number of labels.
    fn prepare_gram(&self, plan: &mut Plan) -> Result<()> {
        let Pass { head, places, exact: gemms, .. } = self;
        let (v, h) = (head.settings.classes, head.hidden_size);
        if self.weight() != Address::NONE {
            let (ignore_label, has_ignore_label) = self.ignored();
            let params = LmHeadWeightParams {
                labels: head.labels.into(),
                weight: places.weight.into(),
                ignore_label,
                has_ignore_label,
                classes: v as u32,
                rows: head.tokens as u64,
            };
            plan.push(Launch::new(table::LM_HEAD_WEIGHT, [1; 3], BLOCK, SHARED_BYTES, &params));
        }
        let (weight, places) = (head.weight.into(), &places.gram);
        match head.gram {
            None => plan.push(gemms.transposed_times([h, h, v], weight, weight, places.matrix).in_f32()),
            // What LoRA adds is not the caller's.
            Some(gram) if head.lora.is_some() => {
                self.split(gram.into(), [places.matrix, Address::NONE], [h, h], DType::F32, ONE, plan)?;
            }
            Some(_) => {}
        }
        if let Some(lora) = head.lora {
            self.add_lora(lora, plan)?;
        }
        if self.dtype != DType::F32 {
            self.split(self.matrix(), places.parts, [h, h], DType::BF16, ONE, plan)?;
        }
        Ok(())
    }

    /// The Gram matrix in `f32`.
    fn matrix(&self) -> Address {
        match self.head.gram {
            Some(gram) if self.head.lora.is_none() => gram.into(),
            _ => self.places.gram.matrix,
        }
    }

    /// Adds what LoRA makes of the Gram matrix.
    fn add_lora(&self, lora: Lora<super::Buffer, f32>, plan: &mut Plan) -> Result<()> {
        let Pass { head, places, exact: gemms, .. } = self;
        let (v, h, r) = (head.settings.classes, head.hidden_size, lora.rank);
        let (places, matrix) = (&places.gram.lora, places.gram.matrix);
        let (a, b) = (lora.lora_a.into(), lora.lora_b.into());
        let cross = gemms.transposed_times([r, h, v], b, head.weight.into(), places.cross);
        plan.push(cross.scaled(lora.scale).in_f32());
        plan.push(gemms.transposed_times([r, r, v], b, b, places.square).in_f32());
        self.in_parts(places.square, places.square_parts, [r, r], plan)?;
        self.add_half_square(lora, plan);
        for part in self.in_parts(places.cross, places.cross_parts, [r, h], plan)? {
            plan.push(gemms.transposed_times([h, h, r], part, a, matrix).in_f32().accumulated());
            plan.push(gemms.transposed_times([h, h, r], a, part, matrix).in_f32().accumulated());
        }
        Ok(())
    }

    /// `cross += s²/2·BᵀB·A`.
    fn add_half_square(&self, lora: Lora<super::Buffer, f32>, plan: &mut Plan) {
        let (h, r, places) = (self.head.hidden_size, lora.rank, &self.places.gram.lora);
        let parts = match self.dtype {
            DType::F32 => [places.square, Address::NONE],
            DType::F16 | DType::BF16 => places.square_parts,
        };
        for part in parts.into_iter().filter(|&part| part != Address::NONE) {
            let gemm = self.exact.times([r, h, r], part, lora.lora_a.into(), places.cross);
            plan.push(gemm.scaled(0.5 * lora.scale * lora.scale).in_f32().accumulated());
        }
    }

    /// A matrix in `f32` as it is multiplied with tensors: in parts of their type, or as it is.
    fn in_parts(
        &self,
        matrix: Address,
        parts: [Address; 2],
        sizes: [usize; 2],
        plan: &mut Plan,
    ) -> Result<Vec<Address>> {
        let parts = match self.dtype {
            DType::F32 => [matrix, Address::NONE],
            DType::F16 | DType::BF16 => {
                self.split(matrix, parts, sizes, self.dtype, ONE, plan)?;
                parts
            }
        };
        Ok(parts.into_iter().filter(|&part| part != Address::NONE).collect())
    }

    /// The same, rounded.
    fn rounded(&self, matrix: Address, to: Address, sizes: [usize; 2], plan: &mut Plan) -> Result<Address> {
        if self.dtype == DType::F32 {
            return Ok(matrix);
        }
        self.split(matrix, [to, Address::NONE], sizes, self.dtype, ONE, plan)?;
        Ok(to)
    }

    /// A matrix in `f32` times a factor and what lies at an address, if any: as it is, or in parts of `bf16`. There are no others: tensors
    /// of `f16` have no Gram matrix, or one of whose products nothing but the values is left.
    fn split(
        &self,
        matrix: Address,
        [high, low]: [Address; 2],
        [rows, columns]: [usize; 2],
        dtype: DType,
        (factor, weight): (f32, Address),
        plan: &mut Plan,
    ) -> Result<()> {
        let params = LmHeadSplitParams {
            matrix: matrix.into(),
            high: high.into(),
            low: low.into(),
            weight: weight.into(),
            factor,
            rows: rows as u32,
            columns: columns as u32,
            aligned: rows_are_aligned(dtype, columns, &[matrix, high, low]).into(),
        };
        let kernel = if dtype == DType::F32 { table::LM_HEAD_SCALE } else { table::LM_HEAD_SPLIT };
        plan.push(launch(kernel, vector_blocks(dtype, rows, columns)?, &params));
        Ok(())
    }

    /// The squared difference of some rows: its value and gradients.
    fn pull(&self, start: usize, count: usize, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, outputs, places, gram_gemms: gemms, .. } = self;
        let (h, places) = (head.hidden_size, &places.gram);
        let [high, low] = places.delta;
        let kernel = table::LM_HEAD_PARTS.choose(*dtype).unwrap_or(table::LM_HEAD_DIFFERENCE.choose(*dtype));
        self.difference(kernel, places.delta, start, count, plan)?;
        let is_wide = *dtype == DType::F32;
        let [gram_high, gram_low] = if is_wide { [self.matrix(), Address::NONE] } else { places.parts };
        // What is left out is the product of both smaller parts.
        let products = [(high, gram_high), (low, gram_high), (high, gram_low)];
        let products = if is_wide { &products[..1] } else { &products[..] };
        for (i, &(delta, gram)) in products.iter().enumerate() {
            let gemm = gemms.times([count, h, h], delta, gram, places.product).in_f32();
            plan.push(if i == 0 { gemm } else { gemm.accumulated() });
        }
        if self.trains() {
            let gemm = gemms.transposed_times([h, h, count], high, high, places.moment).in_f32();
            plan.push(if start == 0 { gemm } else { gemm.accumulated() });
        }
        let [to_first, to_second] = [0, 1].map(|branch| match outputs.hidden {
            Some(dh) => self.branch(dh, branch, start, count),
            None => Address::NONE,
        });
        let (scale, pull) = self.factors();
        let params = LmHeadPullParams {
            rows: self.rows(start, count, &[to_first, to_second, places.product]),
            product: places.product.into(),
            to_first: to_first.into(),
            to_second: to_second.into(),
            values: outputs.values.into(),
            status: outputs.status.into(),
            workspace: self.words.into(),
            weight: self.weight().into(),
            scale: scale as f32,
            pull: pull as f32,
            lambda: head.settings.lambda as f32,
            is_first: (start == 0).into(),
        };
        let blocks = vector_blocks(*dtype, count, h)?.min(MAX_BLOCKS as u32);
        let kernel = table::LM_HEAD_PULL.choose(*dtype);
        plan.push(Launch::new(kernel, [blocks, 1, 1], BLOCK, SHARED_BYTES, &params));
        Ok(())
    }

    /// What all rows together give to the gradients of the weight, `dW = R`, and of the LoRA, `dB = s·R·Aᵀ` and `dA = s·Bᵀ·R`, where
    /// `R = 2λ/D'·(W + s·B·A)·ΔhᵀΔh`.
    fn write_moment(&self, plan: &mut Plan) -> Result<()> {
        let Pass { head, dtype, outputs, places, exact: gemms, .. } = self;
        let (v, h, places) = (head.settings.classes, head.hidden_size, &places.gram);
        let moment = if *dtype == DType::F32 { places.moment } else { places.parts[0] };
        let factor = (self.factors().1 as f32, self.weight());
        self.split(places.moment, [moment, Address::NONE], [h, h], *dtype, factor, plan)?;
        if let Some(to) = outputs.weight {
            plan.push(gemms.times([v, h, h], head.weight.into(), moment, to.into()).in_f32());
        }
        let Some(lora) = head.lora else { return Ok(()) };
        let (r, s, places) = (lora.rank, lora.scale, &places.lora);
        if let Some(to) = outputs.lora_a {
            // The other half: s·BᵀW + s²·BᵀB·A.
            self.add_half_square(lora, plan);
            let left = self.rounded(places.cross, places.cross_parts[0], [r, h], plan)?;
            plan.push(gemms.times([r, h, h], left, moment, to.into()).in_f32());
        }
        if let Some(to) = outputs.weight {
            plan.push(gemms.times([r, h, h], lora.lora_a.into(), moment, places.cross).in_f32());
            let low = self.rounded(places.cross, places.cross_parts[0], [r, h], plan)?;
            let gemm = gemms.times([v, h, r], lora.lora_b.into(), low, to.into());
            plan.push(gemm.scaled(s).in_f32().accumulated());
        }
        if let Some(to) = outputs.lora_b {
            plan.push(gemms.times_transposed([h, r, h], moment, lora.lora_a.into(), places.right).in_f32());
            let right = self.rounded(places.right, places.right_rounded, [h, r], plan)?;
            plan.push(gemms.times([v, r, h], head.weight.into(), right, to.into()).scaled(s).in_f32());
            plan.push(gemms.times([r, r, h], lora.lora_a.into(), right, places.square).in_f32());
            let low = self.rounded(places.square, places.square_parts[0], [r, r], plan)?;
            let gemm = gemms.times([v, r, r], lora.lora_b.into(), low, to.into());
            plan.push(gemm.scaled(s * s).in_f32().accumulated());
        }
        Ok(())
    }
}

/// No factor.
const ONE: (f32, Address) = (1.0, Address::NONE);
