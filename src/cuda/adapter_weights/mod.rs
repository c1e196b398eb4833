//! ΔW and Δb of any number of layers in one launch, and their gradients in two; plans `kernels/weights.cu` and
//! `kernels/weight_gradients.cu`.

mod params;

use crate::cpu::{LoraFactors, PromptBias};
use crate::cuda::borrows::Borrows;
use crate::cuda::buffer::{
    Address, Buffer, DType, Element, MAX_ROWS, Named, check_disjoint, rows_are_aligned,
};
use crate::cuda::device::Device;
use crate::cuda::kernel::{Kernels, WARP, table};
use crate::cuda::low_rank_weight::check_workspace;
use crate::cuda::partial_sums::SPLIT_BLOCKS;
use crate::cuda::plan::{Launch, Plan};
use crate::error::{Error, Result};
use bytemuck::Zeroable;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
pub use params::*;

/// Bytes of a strip along K: a vector for each of a warp's 8 groups of lanes.
const STRIP_BYTES: usize = 128;
/// Ranks that are accumulated at a time.
const RANKS: usize = 16;
/// Rows of a part are a multiple of this, and at least so many that each warp has some.
const PART_STEP: usize = 8;
const MIN_PART: usize = 64;
/// Most blocks of a launch.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// ΔW of a layer to build: `out [N, K] = scale·B·A`, times W0 for LoRA mul.
///
/// `B` are the tensors, all of one type, and `M` those that are written: [`Buffer`] for planning, or `cudarc`'s (see
/// [`Device::adapter_weights`]).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraWeight<B, M = B> {
    /// Sizes, factors and scale.
    pub factors: LoraFactors<B>,
    /// `W0 [N, K]`: LoRA mul. `None` is LoRA add.
    pub base_weight: Option<B>,
    /// `ΔW [N, K]`.
    pub out: M,
}

/// Δb of a layer to build: `out [N] = W0·(Pd·Pu) + b0⊙δb`. Tensors as in [`LoraWeight`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptWeight<B, M = B> {
    /// Sizes, the frozen layer and the prompt.
    pub prompt: PromptBias<B>,
    /// `Δb [N]`.
    pub out: M,
}

/// What to build for one layer. If both, of the same sizes and W0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterWeight<B, M = B> {
    /// ΔW.
    pub lora: Option<LoraWeight<B, M>>,
    /// Δb.
    pub prompt: Option<PromptWeight<B, M>>,
}

/// Gradients of LoRA's factors. Tensors as in [`LoraWeight`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraWeightGrads<B, M = B> {
    /// Sizes, factors and scale.
    pub factors: LoraFactors<B>,
    /// `W0 [N, K]`: LoRA mul. `None` is LoRA add.
    pub base_weight: Option<B>,
    /// `dΔW [N, K]`.
    pub delta_weight_grad: B,
    /// `dB [N, r]`, if it is wanted.
    pub lora_b: Option<M>,
    /// `dA [r, K]`, if it is wanted.
    pub lora_a: Option<M>,
}

/// Gradients of a prompt. Tensors as in [`LoraWeight`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PromptWeightGrads<B, M = B> {
    /// Sizes, the frozen layer and the prompt.
    pub prompt: PromptBias<B>,
    /// `dΔb [N]`.
    pub delta_bias_grad: B,
    /// `dPd [K, r]`, if it is wanted.
    pub prompt_down: Option<M>,
    /// `dPu [r]`, if it is wanted.
    pub prompt_up: Option<M>,
    /// `dδb [N]`, if it is wanted.
    pub delta_bias: Option<M>,
}

/// Gradients of one layer's adapter. If both, of the same sizes and W0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterWeightGrads<B, M = B> {
    /// Those from dΔW.
    pub lora: Option<LoraWeightGrads<B, M>>,
    /// Those from dΔb.
    pub prompt: Option<PromptWeightGrads<B, M>>,
}

impl AdapterWeight<Buffer> {
    fn params(&self, dtype: DType) -> WeightLayer {
        let mut layer = WeightLayer::zeroed();
        let mut vectors = [Address::NONE; 3];
        if let Some(PromptWeight { prompt, out }) = self.prompt {
            vectors[0] = prompt.base_weight.into();
            layer = WeightLayer {
                base: prompt.base_weight.into(),
                prompt_down: prompt.prompt_down.into(),
                prompt_up: prompt.prompt_up.into(),
                base_bias: prompt.base_bias.into(),
                delta_bias: prompt.delta_bias.into(),
                bias: out.into(),
                rows: prompt.out_features as u32,
                columns: prompt.in_features as u32,
                prompt_rank: prompt.rank as u32,
                ..layer
            };
        }
        if let Some(LoraWeight { factors, base_weight: base, out }) = self.lora {
            vectors = [base.into(), factors.lora_a.into(), out.into()];
            layer = WeightLayer {
                base: base.into(),
                lora_b: factors.lora_b.into(),
                lora_a: factors.lora_a.into(),
                weight: out.into(),
                rows: factors.out_features as u32,
                columns: factors.in_features as u32,
                rank: factors.rank as u32,
                scale: factors.scale,
                ..layer
            };
        }
        layer.aligned = u32::from(rows_are_aligned(dtype, layer.columns as usize, &vectors));
        layer
    }

    fn blocks(&self, dtype: DType) -> usize {
        let weight = self.lora.map_or(0, |lora| {
            let LoraFactors { out_features: n, in_features: k, .. } = lora.factors;
            strips(k, dtype) * n.div_ceil(WEIGHT_ROWS)
        });
        weight + self.prompt.map_or(0, |prompt| prompt.prompt.out_features.div_ceil(BIAS_TILE_ROWS))
    }
}

/// Strips along K.
fn strips(k: usize, dtype: DType) -> usize {
    k.div_ceil(STRIP_BYTES / dtype.bytes())
}

/// Splits layers with these numbers of blocks into launches; gives the range of each, the first block of each layer in it, and all
/// blocks.
fn launches<const N: usize>(blocks: &[usize]) -> Vec<(std::ops::Range<usize>, [u32; N], u32)> {
    let mut launches: Vec<(std::ops::Range<usize>, [u32; N], u32)> = Vec::new();
    for (i, &blocks) in blocks.iter().enumerate() {
        match launches.last_mut() {
            Some((range, first, all)) if range.len() < N && *all as usize + blocks <= MAX_BLOCKS => {
                first[range.len()] = *all;
                *all += blocks as u32;
                range.end += 1;
            }
            // A layer that asks for nothing begins no launch.
            _ if blocks == 0 => {}
            _ => launches.push((i..i + 1, [0; N], blocks as u32)),
        }
    }
    launches
}

/// The plan that builds ΔW and Δb of these layers, all of which was checked before.
pub(in crate::cuda) fn build(dtype: DType, layers: &[AdapterWeight<Buffer>]) -> Plan {
    let blocks: Vec<usize> = layers.iter().map(|layer| layer.blocks(dtype)).collect();
    let mut plan = Plan::default();
    for (range, first_block, blocks) in launches::<WEIGHT_LAYERS>(&blocks) {
        let layers = &layers[range];
        let mut params = AdapterWeightsParams {
            layers: [WeightLayer::zeroed(); WEIGHT_LAYERS],
            first_block,
            count: layers.len() as u64,
        };
        for (params, layer) in params.layers.iter_mut().zip(layers) {
            *params = layer.params(dtype);
        }
        let has_prompt = layers.iter().any(|layer| layer.prompt.is_some());
        let shared = if has_prompt { PROMPT_COLUMNS * 4 + PROMPT_BYTES } else { 0 };
        let kernel = table::ADAPTER_WEIGHTS.choose(dtype);
        plan.push(Launch::new(kernel, [blocks, 1, 1], [WEIGHT_THREADS as u32, 1, 1], shared, &params));
    }
    plan
}

/// Checks outputs that are asked for, of these shapes and lengths; gives them with their names.
fn check_outputs<const N: usize>(
    dtype: DType,
    outputs: [(&'static str, &'static str, Option<Buffer>, usize); N],
) -> Result<Vec<Named>> {
    let mut checked = Vec::new();
    for (name, shape, buffer, len) in outputs {
        if let Some(buffer) = buffer {
            buffer.check(name, shape, len, dtype.bytes())?;
            checked.push((name, buffer));
        }
    }
    Ok(checked)
}

impl LoraWeightGrads<Buffer> {
    /// Checks where the gradients of factors go that were checked.
    pub(in crate::cuda) fn check_outputs(&self, dtype: DType) -> Result<Vec<Named>> {
        let LoraFactors { out_features: n, in_features: k, rank: r, .. } = self.factors;
        let outputs =
            [("grads.lora_b", "[N, r]", self.lora_b, n * r), ("grads.lora_a", "[r, K]", self.lora_a, r * k)];
        check_outputs(dtype, outputs)
    }
}

impl PromptWeightGrads<Buffer> {
    /// Checks where the gradients of a prompt go that was checked.
    pub(in crate::cuda) fn check_outputs(&self, dtype: DType) -> Result<Vec<Named>> {
        let PromptBias { out_features: n, in_features: k, rank: r, .. } = self.prompt;
        let outputs = [
            ("grads.prompt_down", "[K, r]", self.prompt_down, k * r),
            ("grads.prompt_up", "[r]", self.prompt_up, r),
            ("grads.delta_bias", "[N]", self.delta_bias, n),
        ];
        check_outputs(dtype, outputs)
    }
}

/// Partial sums of the gradients of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::cuda) struct Partial {
    n: usize,
    k: usize,
    rank: usize,
    prompt_rank: usize,
    strips: usize,
    parts: usize,
    /// Rows of a part.
    part: usize,
}

impl Partial {
    /// Of a weight `[N, K]`; a rank of 0 is absent.
    pub(in crate::cuda) fn new(n: usize, k: usize, rank: usize, prompt_rank: usize, dtype: DType) -> Self {
        let strips = strips(k, dtype).max(1);
        let rows = n.div_ceil((SPLIT_BLOCKS / strips).max(1));
        let part = rows.clamp(MIN_PART, MAX_ROWS).next_multiple_of(PART_STEP);
        Self { n, k, rank, prompt_rank, strips, parts: n.div_ceil(part), part }
    }

    /// Elements of the sums for A, B, q and Pu.
    fn lens(&self) -> [usize; 4] {
        let product = |sizes: [usize; 3]| sizes.into_iter().fold(1, usize::saturating_mul);
        let q = if self.prompt_rank == 0 { 0 } else { product([self.parts, self.k, 1]) };
        [
            product([self.parts, self.rank, self.k]),
            product([self.strips, self.n, self.rank]),
            q,
            product([self.parts, self.strips, self.prompt_rank]),
        ]
        // Each starts at a vector.
        .map(|len| len.checked_next_multiple_of(4).unwrap_or(usize::MAX))
    }

    /// Elements of all; saturates.
    pub(in crate::cuda) fn len(&self) -> usize {
        self.lens().into_iter().fold(0, usize::saturating_add)
    }

    /// Blocks that add up.
    fn sum_blocks(&self) -> usize {
        let prompt_columns = if self.prompt_rank == 0 { 0 } else { self.k };
        [self.rank * self.k, self.rank * self.n, prompt_columns, self.prompt_rank]
            .into_iter()
            .map(|len| len.div_ceil(WEIGHT_SUM_LENGTH))
            .sum()
    }
}

impl<B: Copy, M: Copy> AdapterWeightGrads<B, M> {
    fn partial(&self, dtype: DType) -> Partial {
        let lora = self.lora.map(|lora| lora.factors);
        let prompt = self.prompt.map(|prompt| prompt.prompt);
        let (n, k) = lora
            .map(|lora| (lora.out_features, lora.in_features))
            .or(prompt.map(|prompt| (prompt.out_features, prompt.in_features)))
            .unwrap_or_default();
        let ranks = (lora.map_or(0, |lora| lora.rank), prompt.map_or(0, |prompt| prompt.rank));
        Partial::new(n, k, ranks.0, ranks.1, dtype)
    }
}

impl AdapterWeightGrads<Buffer> {
    /// `at`: its part of the workspace.
    fn params(&self, dtype: DType, at: Address) -> WeightGradientLayer {
        let partial = self.partial(dtype);
        let [a, b, q, _] = partial.lens().map(|len| len * 4);
        let mut layer = WeightGradientLayer {
            a_partial: at.into(),
            b_partial: at.offset(a).into(),
            q_partial: at.offset(a + b).into(),
            up_partial: at.offset(a + b + q).into(),
            rows: partial.n as u32,
            columns: partial.k as u32,
            rank: partial.rank as u32,
            prompt_rank: partial.prompt_rank as u32,
            part: partial.part as u32,
            ..WeightGradientLayer::zeroed()
        };
        let mut vectors = [Address::NONE; 4];
        if let Some(PromptWeightGrads { prompt, delta_bias_grad, prompt_down, prompt_up, delta_bias }) =
            self.prompt
        {
            vectors[0] = prompt.base_weight.into();
            layer = WeightGradientLayer {
                base: prompt.base_weight.into(),
                bias_grad: delta_bias_grad.into(),
                prompt_down: prompt.prompt_down.into(),
                prompt_up: prompt.prompt_up.into(),
                base_bias: prompt.base_bias.into(),
                grad_prompt_down: prompt_down.into(),
                grad_prompt_up: prompt_up.into(),
                grad_delta_bias: delta_bias.into(),
                ..layer
            };
        }
        if let Some(LoraWeightGrads { factors, base_weight: base, delta_weight_grad: grad, lora_b, lora_a }) =
            self.lora
        {
            vectors = [base.into(), grad.into(), factors.lora_a.into(), at];
            layer = WeightGradientLayer {
                grad: grad.into(),
                base: base.into(),
                lora_b: factors.lora_b.into(),
                lora_a: factors.lora_a.into(),
                grad_lora_b: lora_b.into(),
                grad_lora_a: lora_a.into(),
                scale: factors.scale,
                ..layer
            };
        }
        layer.aligned = u32::from(rows_are_aligned(dtype, partial.k, &vectors));
        layer
    }
}

/// The plan that computes the gradients of these layers, all of which was checked before: partial sums, and their sums.
/// `workspace` has at least as many elements as [`AdapterWeightGrads::workspace_len`] says.
pub(in crate::cuda) fn gradients(
    dtype: DType,
    layers: &[AdapterWeightGrads<Buffer>],
    workspace: Address,
) -> Plan {
    let partials: Vec<Partial> = layers.iter().map(|layer| layer.partial(dtype)).collect();
    let blocks: Vec<usize> = partials.iter().map(|partial| partial.strips * partial.parts).collect();
    let sums: Vec<usize> = partials.iter().map(Partial::sum_blocks).collect();
    let mut end = workspace;
    let mut places = Vec::new();
    for partial in &partials {
        places.push(end);
        end = end.offset(partial.len() * 4);
    }
    let has_lora = layers.iter().any(|layer| layer.lora.is_some());
    // A warp's sums for A, or for q.
    let columns = STRIP_BYTES / dtype.bytes();
    let floats = if has_lora { RANKS * (columns + 4) } else { columns };
    let shared = WEIGHT_GRADIENT_THREADS / WARP * floats * 4;
    let mut plan = Plan::default();
    let mut push = |kernels: Kernels, blocks: &[usize], threads: usize, shared: usize| {
        for (range, first_block, blocks) in launches::<WEIGHT_GRADIENT_LAYERS>(blocks) {
            let (layers, places) = (&layers[range.clone()], &places[range]);
            let mut params = WeightGradientsParams {
                layers: [WeightGradientLayer::zeroed(); WEIGHT_GRADIENT_LAYERS],
                first_block,
                count: layers.len() as u64,
            };
            for (params, (layer, &place)) in params.layers.iter_mut().zip(layers.iter().zip(places)) {
                *params = layer.params(dtype, place);
            }
            let (grid, block) = ([blocks, 1, 1], [threads as u32, 1, 1]);
            plan.push(Launch::new(kernels.choose(dtype), grid, block, shared, &params));
        }
    };
    push(table::WEIGHT_GRADIENTS, &blocks, WEIGHT_GRADIENT_THREADS, shared);
    push(table::WEIGHT_GRADIENT_SUMS, &sums, WEIGHT_SUM_THREADS, WEIGHT_SUM_THREADS * 16);
    plan
}

/// Checks that a layer's prompt has the sizes and the W0 of its LoRA.
fn check_layer(
    lora: Option<(LoraFactors<Buffer>, Option<Buffer>)>,
    prompt: Option<PromptBias<Buffer>>,
) -> Result<()> {
    let (Some((factors, base)), Some(prompt)) = (lora, prompt) else {
        return Ok(());
    };
    let sizes = [factors.out_features, factors.in_features];
    if base != Some(prompt.base_weight) || sizes != [prompt.out_features, prompt.in_features] {
        return Err(Error::Argument {
            argument: "prompt",
            problem: "has another base weight than its layer's LoRA",
        });
    }
    Ok(())
}

impl AdapterWeight<Buffer> {
    /// The plan that builds ΔW and Δb of these layers: a launch for each 32.
    ///
    /// # Errors
    /// As [`LoraFactors::weight`] and [`PromptBias::forward`]; also if a layer's LoRA and prompt have different sizes or base
    /// weights.
    pub fn plan(dtype: DType, layers: &[Self]) -> Result<Plan> {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for layer in layers {
            check_layer(
                layer.lora.map(|lora| (lora.factors, lora.base_weight)),
                layer.prompt.map(|prompt| prompt.prompt),
            )?;
            if let Some(LoraWeight { factors, base_weight, out }) = layer.lora {
                inputs.extend(factors.check(dtype, base_weight)?);
                out.check("out", "[N, K]", factors.out_features * factors.in_features, dtype.bytes())?;
                outputs.push(("out", out));
            }
            if let Some(PromptWeight { prompt, out }) = layer.prompt {
                inputs.extend(prompt.check(dtype)?);
                out.check("out", "[N]", prompt.out_features, dtype.bytes())?;
                outputs.push(("out", out));
            }
        }
        check_disjoint(&inputs, &outputs, dtype.bytes())?;
        Ok(build(dtype, layers))
    }
}

impl<B: Copy, M: Copy> AdapterWeightGrads<B, M> {
    /// The `f32` elements of workspace that the gradients of these layers need; saturates for sizes that are refused.
    pub fn workspace_len(dtype: DType, layers: &[Self]) -> usize {
        layers.iter().fold(0, |len, layer| len.saturating_add(layer.partial(dtype).len()))
    }
}

impl AdapterWeightGrads<Buffer> {
    /// The plan that computes the gradients of these layers: two launches for each 16.
    ///
    /// # Errors
    /// As [`Device::low_rank_weight_backward`] and [`PromptBias::backward`]; also if a layer's LoRA and prompt have different sizes or base
    /// weights.
    pub fn plan(dtype: DType, layers: &[Self], workspace: Buffer) -> Result<Plan> {
        let bytes = dtype.bytes();
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for layer in layers {
            check_layer(
                layer.lora.map(|lora| (lora.factors, lora.base_weight)),
                layer.prompt.map(|prompt| prompt.prompt),
            )?;
            if let Some(lora) = layer.lora {
                let LoraFactors { out_features: n, in_features: k, .. } = lora.factors;
                inputs.extend(lora.factors.check(dtype, lora.base_weight)?);
                lora.delta_weight_grad.check("delta_weight_grad", "[N, K]", n * k, bytes)?;
                inputs.push(("delta_weight_grad", lora.delta_weight_grad));
                outputs.extend(lora.check_outputs(dtype)?);
            }
            if let Some(prompt) = layer.prompt {
                inputs.extend(prompt.prompt.check(dtype)?);
                prompt.delta_bias_grad.check("delta_bias_grad", "[N]", prompt.prompt.out_features, bytes)?;
                inputs.push(("delta_bias_grad", prompt.delta_bias_grad));
                outputs.extend(prompt.check_outputs(dtype)?);
            }
        }
        let workspace = check_workspace(workspace, Self::workspace_len(dtype, layers))?;
        outputs.push(("workspace", workspace.in_elements_of(bytes)));
        check_disjoint(&inputs, &outputs, bytes)?;
        Ok(gradients(dtype, layers, workspace.into()))
    }
}

impl Device {
    /// Builds ΔW and Δb of many layers in a launch for each 32.
    ///
    /// # Errors
    /// As [`AdapterWeight::plan`]; also if an argument belongs to another device, or a launch fails.
    pub fn adapter_weights<'a, T: Element>(
        &'a self,
        layers: impl IntoIterator<Item = AdapterWeight<&'a dyn DevicePtr<T>, &'a mut dyn DevicePtrMut<T>>>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let mut borrowed = Vec::new();
        for AdapterWeight { lora, prompt } in layers {
            let lora = match lora {
                Some(LoraWeight { factors, base_weight, out }) => Some(LoraWeight {
                    factors: factors.borrow(&mut borrows)?,
                    base_weight: borrows.optional("base_weight", base_weight)?,
                    out: borrows.output("out", out)?,
                }),
                None => None,
            };
            let prompt = match prompt {
                Some(PromptWeight { prompt, out }) => Some(PromptWeight {
                    prompt: prompt.borrow(&mut borrows)?,
                    out: borrows.output("out", out)?,
                }),
                None => None,
            };
            borrowed.push(AdapterWeight { lora, prompt });
        }
        let plan = AdapterWeight::plan(T::DTYPE, &borrowed)?;
        // SAFETY: the plan's addresses are those of live device tensors of this context, whose guards outlive the launch,
        // and the plan checked their lengths against what the kernels touch.
        unsafe { self.launch(&plan, stream) }
    }

    /// Gradients of the factors of many layers, in two launches for each 16. `workspace` has at least
    /// [`AdapterWeightGrads::workspace_len`] elements; contents are ignored.
    ///
    /// # Errors
    /// As [`AdapterWeightGrads::plan`]; also if an argument belongs to another device, or a launch fails.
    pub fn adapter_weight_grads<'a, T: Element>(
        &'a self,
        layers: impl IntoIterator<Item = AdapterWeightGrads<&'a dyn DevicePtr<T>, &'a mut dyn DevicePtrMut<T>>>,
        workspace: &'a mut dyn DevicePtrMut<f32>,
        stream: &'a CudaStream,
    ) -> Result<()> {
        let mut borrows = Borrows::new(self, stream);
        let mut borrowed = Vec::new();
        for AdapterWeightGrads { lora, prompt } in layers {
            let lora = match lora {
                Some(lora) => Some(LoraWeightGrads {
                    factors: lora.factors.borrow(&mut borrows)?,
                    base_weight: borrows.optional("base_weight", lora.base_weight)?,
                    delta_weight_grad: borrows.input("delta_weight_grad", lora.delta_weight_grad)?,
                    lora_b: borrows.optional_output("grads.lora_b", lora.lora_b)?,
                    lora_a: borrows.optional_output("grads.lora_a", lora.lora_a)?,
                }),
                None => None,
            };
            let prompt = match prompt {
                Some(prompt) => Some(PromptWeightGrads {
                    prompt: prompt.prompt.borrow(&mut borrows)?,
                    delta_bias_grad: borrows.input("delta_bias_grad", prompt.delta_bias_grad)?,
                    prompt_down: borrows.optional_output("grads.prompt_down", prompt.prompt_down)?,
                    prompt_up: borrows.optional_output("grads.prompt_up", prompt.prompt_up)?,
                    delta_bias: borrows.optional_output("grads.delta_bias", prompt.delta_bias)?,
                }),
                None => None,
            };
            borrowed.push(AdapterWeightGrads { lora, prompt });
        }
        let workspace = borrows.output("workspace", workspace)?;
        let plan = AdapterWeightGrads::plan(T::DTYPE, &borrowed, workspace)?;
        // SAFETY: as in `adapter_weights`.
        unsafe { self.launch(&plan, stream) }
    }
}
