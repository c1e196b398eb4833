//! What goes between a library's GEMMs in a layer under noise; plans `kernels/layer_epilogue.cu`.

use super::buffer::{Address, Buffer, DType, grid, rows_are_aligned};
use super::kernel::table;
use super::layer::Pass;
use super::noise_source::NoiseSource;
use super::partial_sums::partial_sums;
use super::plan::{Launch, Plan};
use super::pointer::{Input, Output, Void};
use crate::shape::LinearShape;
use bytemuck::{Pod, Zeroable};

/// Threads of a block.
pub const LAYER_EPILOGUE_THREADS: usize = 256;
/// Columns of 16 bytes in a block, at most: a warp touches up to 512 adjacent bytes.
const COLUMNS: usize = 32;
/// Token rows that one thread handles, at least: enough to make the noise of a sample worth its while.
const ROWS: usize = 8;
/// Blocks, at most: eight for each of an H200's 132 multiprocessors. One number for all devices, so that all
/// add up in the same order.
const BLOCKS: usize = 1056;

/// Parameters of the kernels `layer_epilogue*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct LayerEpilogueParams {
    noise: NoiseSource,
    /// May be null.
    base: Input<Void>,
    /// a, or null; g.
    input: Input<Void>,
    /// May be null.
    bias: Input<Void>,
    /// y; e, or null.
    output: Output<Void>,
    /// May be null.
    sum: Output<Void>,
    /// Partial sums, or null.
    bias_sums: Output<f32>,
    /// Of base, a, e.
    rows: u32,
    /// Tokens per sample `T`.
    tokens: u32,
    /// Out-features `N`.
    channels: u32,
    /// That share each row.
    branches: u32,
    /// Rows of a block.
    part: u32,
    /// Rows of every tensor start at multiples of 16 bytes and hold whole vectors.
    aligned: u32,
}

/// Sizes of the blocks.
struct Tiles {
    grid: [u32; 3],
    block: [u32; 3],
    /// Token rows of a block.
    part: usize,
}

impl Tiles {
    fn new(rows: usize, channels: usize, dtype: DType) -> Self {
        let columns = channels.div_ceil(16 / dtype.bytes());
        let x = columns.next_power_of_two().min(COLUMNS);
        let y = LAYER_EPILOGUE_THREADS / x;
        let columns = columns.div_ceil(x);
        let part = rows.div_ceil((BLOCKS / columns).max(1)).max((y * ROWS).min(rows));
        Self { grid: grid(columns, rows.div_ceil(part)), block: [x as u32, y as u32, 1], part }
    }

    fn parts(&self) -> usize {
        self.grid[1] as usize
    }
}

/// `y [M, N] = base + z ⊙ (a + bias)`. Branches that share their input share the rows of `base` and `a` too, each `[rows of x, N]`.
pub(super) struct Forward {
    /// `None` is zero. May be `y` itself unless branches share it, as `a` may.
    pub(super) base: Option<Address>,
    pub(super) a: Option<Address>,
    /// `[N]`.
    pub(super) bias: Option<Buffer>,
    pub(super) y: Buffer,
}

impl Forward {
    pub(super) fn plan(&self, shape: &LinearShape, pass: &Pass) -> Launch {
        let dtype = pass.arithmetic.dtype;
        let (rows, channels) = (shape.in_rows(), shape.out_features);
        let tiles = Tiles::new(rows, channels, dtype);
        let [base, input] = [self.base, self.a].map(|address| address.unwrap_or(Address::NONE));
        let (bias, output) = (Address::from(self.bias), Address::from(self.y));
        let params = LayerEpilogueParams {
            base: base.into(),
            input: input.into(),
            bias: bias.into(),
            output: output.into(),
            aligned: is_aligned(shape, pass, &[base, input, bias, output]),
            ..params(shape, pass, &tiles)
        };
        Launch::new(table::LAYER_EPILOGUE.choose(dtype), tiles.grid, tiles.block, 0, &params)
    }
}

/// With `g = dy [M, N]`: `e = Σ_branches z⊙g` and `sum = Σ_branches g`, each `[rows of x, N]`, over branches that share their
/// input, and the gradient to the bias, `Σ_rows e`.
pub(super) struct Backward {
    pub(super) dy: Buffer,
    pub(super) e: Option<Address>,
    pub(super) sum: Option<Address>,
    /// `[N]`, and memory for [`Backward::workspace_bytes`].
    pub(super) bias: Option<(Buffer, Address)>,
}

impl Backward {
    /// For partial sums of the bias's gradient.
    pub(super) fn workspace_bytes(shape: &LinearShape, dtype: DType) -> usize {
        let tiles = Tiles::new(shape.in_rows().max(1), shape.out_features, dtype);
        tiles.parts().saturating_mul(shape.out_features).saturating_mul(4)
    }

    pub(super) fn plan(&self, shape: &LinearShape, pass: &Pass) -> Plan {
        let dtype = pass.arithmetic.dtype;
        let (rows, channels) = (shape.in_rows(), shape.out_features);
        let tiles = Tiles::new(rows, channels, dtype);
        let input = Address::from(self.dy);
        let [output, sum] = [self.e, self.sum].map(|address| address.unwrap_or(Address::NONE));
        let bias_sums = self.bias.map_or(Address::NONE, |(_, partial)| partial);
        let params = LayerEpilogueParams {
            input: input.into(),
            output: output.into(),
            sum: sum.into(),
            bias_sums: bias_sums.into(),
            aligned: is_aligned(shape, pass, &[input, output, sum]),
            ..params(shape, pass, &tiles)
        };
        // A thread's sums of the channels of its column.
        let shared = if self.bias.is_some() { LAYER_EPILOGUE_THREADS * 16 / dtype.bytes() * 4 } else { 0 };
        let mut plan = Plan::from(Launch::new(
            table::LAYER_EPILOGUE_BACKWARD.choose(dtype),
            tiles.grid,
            tiles.block,
            shared,
            &params,
        ));
        if let Some((bias, partial)) = self.bias {
            plan.push(partial_sums(partial, tiles.parts(), bias, dtype));
        }
        plan
    }
}

fn is_aligned(shape: &LinearShape, pass: &Pass, tensors: &[Address]) -> u32 {
    let rows = rows_are_aligned(pass.arithmetic.dtype, shape.out_features, tensors);
    u32::from(rows && pass.noise.is_aligned())
}

/// What both directions have.
fn params(shape: &LinearShape, pass: &Pass, tiles: &Tiles) -> LayerEpilogueParams {
    LayerEpilogueParams {
        noise: pass.noise,
        rows: shape.in_rows() as u32,
        tokens: shape.tokens as u32,
        channels: shape.out_features as u32,
        branches: shape.fan_out() as u32,
        part: tiles.part as u32,
        ..LayerEpilogueParams::zeroed()
    }
}
