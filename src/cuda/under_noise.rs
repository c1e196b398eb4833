//! Where a layer's GEMMs by a library meet the noise: what the dense and the low-rank layer share.

use super::buffer::{Address, Buffer, DType};
use super::gemm::{Arena, Gemm};
use super::layer::Pass;
use super::layer_epilogue;
use super::noise_source::NoiseSource;
use super::plan::Plan;
use crate::shape::LinearShape;

/// Takes what either pass needs besides the library's workspace: two tensors of the size of the output (base and adapter, or `e` and
/// the sum of `g`), the second only where branches share their input, copies of both biases, and partial sums.
pub(super) fn reserve(arena: &mut Arena, shape: &LinearShape, dtype: DType) {
    let tensor = tensor_bytes(shape, dtype);
    arena.take(tensor);
    if shape.fan_out() > 1 {
        arena.take(tensor);
    }
    for _ in 0..2 {
        arena.take(bias_bytes(shape, dtype));
    }
    arena.take(layer_epilogue::Backward::workspace_bytes(shape, dtype));
}

fn tensor_bytes(shape: &LinearShape, dtype: DType) -> usize {
    shape.in_rows().saturating_mul(shape.out_features).saturating_mul(dtype.bytes())
}

fn bias_bytes(shape: &LinearShape, dtype: DType) -> usize {
    shape.out_features.saturating_mul(dtype.bytes())
}

/// The terms of a layer's output `y = base + z⊙(adapter + bias)`.
pub(super) struct Outputs {
    /// Writes `[rows of x, N]` to `y`, with the base's bias.
    pub(super) base: Option<Gemm>,
    /// Writes `[rows of x, N]` to `y`.
    pub(super) adapter: Option<Gemm>,
    /// `Δb [N]`.
    pub(super) bias: Option<Buffer>,
    pub(super) y: Buffer,
}

impl Outputs {
    pub(super) fn plan(self, shape: &LinearShape, pass: &Pass, arena: &mut Arena) -> Plan {
        let Self { base, adapter, bias, y } = self;
        let mut plan = Plan::default();
        let base = base.map(|gemm| with_aligned_bias(gemm, shape, pass, arena, &mut plan));
        let is_shared = shape.fan_out() > 1;
        let bare = adapter.is_none() && bias.is_none();
        if !is_shared && (bare || (pass.noise == NoiseSource::OFF && adapter.is_some())) {
            // No noise on anything: the GEMMs add up in y.
            let accumulates = base.is_some();
            let adapter = adapter.map(|gemm| {
                let gemm = gemm.with_bias(bias.map(Into::into));
                with_aligned_bias(gemm, shape, pass, arena, &mut plan)
            });
            base.into_iter().for_each(|gemm| plan.push(gemm));
            if let Some(gemm) = adapter {
                plan.push(if accumulates { gemm.accumulated() } else { gemm });
            }
            return plan;
        }
        let tensor = tensor_bytes(shape, pass.arithmetic.dtype);
        // One of them may lie in y, where a thread of the epilogue reads what it then overwrites.
        let mut y_is_free = !is_shared;
        let mut place = |gemm: Option<Gemm>| {
            gemm.map(|gemm| {
                let d = if y_is_free { y.into() } else { arena.take(tensor) };
                y_is_free = false;
                plan.push(Gemm { d, ..gemm });
                d
            })
        };
        let (base, a) = (place(base), place(adapter));
        plan.push(layer_epilogue::Forward { base, a, bias, y }.plan(shape, pass));
        plan
    }
}

/// The GEMM with a copy of its bias, if that does not start at a multiple of 16 bytes: the library's kernels load vectors of it and
/// fault, and for a bias no alignment can be stated when they are chosen.
fn with_aligned_bias(
    gemm: Gemm,
    shape: &LinearShape,
    pass: &Pass,
    arena: &mut Arena,
    plan: &mut Plan,
) -> Gemm {
    let Some(bias) = gemm.bias.filter(|bias| !bias.is_vector_aligned()) else { return gemm };
    let len = shape.out_features;
    let copy = arena.take(bias_bytes(shape, pass.arithmetic.dtype));
    let [bias, y] = [bias, copy].map(|address| Buffer { address: address.0, len });
    // A layer of one row that has nothing but a bias.
    let row = LinearShape { branches: 1, batch: 1, tokens: 1, shared_input: false, ..*shape };
    let pass = Pass { noise: NoiseSource::OFF, ..*pass };
    plan.push(layer_epilogue::Forward { base: None, a: None, bias: Some(bias), y }.plan(&row, &pass));
    gemm.with_bias(Some(copy))
}

/// The steps that make the gradients to a layer's terms from `dy`, and where these are: to the base (`g`) and to the adapter
/// (`e = z⊙g`), each `[rows of x, N]`, summed over branches that share their input. Also the gradient to the bias.
pub(super) fn gradients(
    shape: &LinearShape,
    pass: &Pass,
    arena: &mut Arena,
    dy: Buffer,
    needs_g: bool,
    needs_e: bool,
    bias: Option<Buffer>,
) -> (Plan, Address, Address) {
    let dtype = pass.arithmetic.dtype;
    let is_shared = shape.fan_out() > 1;
    let tensor = tensor_bytes(shape, dtype);
    let sum = (is_shared && needs_g).then(|| arena.take(tensor));
    let e = (needs_e && (is_shared || pass.noise != NoiseSource::OFF)).then(|| arena.take(tensor));
    let bias = bias.map(|bias| (bias, arena.take(layer_epilogue::Backward::workspace_bytes(shape, dtype))));
    let places = (sum.unwrap_or(dy.into()), e.unwrap_or(dy.into()));
    let plan = match (sum, e, bias) {
        (None, None, None) => Plan::default(),
        _ => layer_epilogue::Backward { dy, e, sum, bias }.plan(shape, pass),
    };
    (plan, places.0, places.1)
}
