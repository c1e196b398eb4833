//! What every noisy layer on the CPU shares: `z` by rows, the blocked forward pass, and tiles of `e = z⊙g`.

use super::Base;
use super::matmul::{
    Accum, MatMut, MatRef, Par, all_threads, gemm, inner_threads, mat, mat_mut, row_chunks_mut,
};
use super::scratch::Scratch;
use crate::error::Result;
use crate::noise::{Noise, NoiseShape, check_samples};
use crate::parallel;
use crate::real::{Element, Real};
use crate::shape::{LinearShape, length};
use crate::vector::{zip1, zip2, zip4};
use num_traits::Zero;
use std::ops::Range;

/// Output channels that are handled while a tile of them stays in the L2 cache.
pub(super) const CHANNEL_BLOCK: usize = 256;
/// Most input rows in one task; of 16-bit types, whose rows are half as long, twice as many.
const MAX_ROWS: usize = 128;
/// Fewest input rows for which a task of its own is worth while.
const MIN_ROWS: usize = 16;

/// Rows per task, so that every thread of the pool gets as many tasks as the others.
fn rows_per_task<T: Element>(rows: usize) -> usize {
    even(rows, if T::ROUNDS { 2 * MAX_ROWS } else { MAX_ROWS }).max(MIN_ROWS)
}

/// The size of equal parts of at most `most`, as many for each thread.
fn even(total: usize, most: usize) -> usize {
    let threads = rayon::current_num_threads();
    total.div_ceil(total.div_ceil(threads * most) * threads)
}

/// The blocks of at most `size` that make up `0..total`.
pub(super) fn blocks(total: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(size).map(move |start| start..total.min(start + size))
}

/// `z` of a layer, row by row, from whichever source.
#[derive(Clone, Copy)]
pub(super) struct Z<'a, T> {
    noise: Noise<&'a [T]>,
    shape: LinearShape,
}

impl<'a, T: Real> Z<'a, T> {
    /// Checks sizes and noise.
    pub(super) fn new(noise: Noise<&'a [T]>, shape: LinearShape) -> Result<Self> {
        shape.check()?;
        match noise {
            Noise::Off => {}
            Noise::Generated(generator) => check_samples(generator.first_sample(), shape.batch)?,
            Noise::Given { z, shape: NoiseShape::PerSample } => {
                length("z", "[R, N]", z, shape.samples() * shape.out_features)?;
            }
            Noise::Given { z, shape: NoiseShape::PerToken } => {
                length("z", "[R, T, N]", z, shape.out_rows() * shape.out_features)?;
            }
        }
        Ok(Self { noise, shape })
    }

    pub(super) fn is_off(&self) -> bool {
        matches!(self.noise, Noise::Off)
    }

    /// Whether all tokens of a sample share their `z`.
    pub(super) fn per_sample(&self) -> bool {
        let noise = self.noise;
        match noise {
            Noise::Off => true,
            Noise::Generated(generator) => generator.shape() == NoiseShape::PerSample,
            Noise::Given { shape, .. } => shape == NoiseShape::PerSample,
        }
    }

    /// Writes `z` of the given channels of output row `row` (counted over branches, samples, tokens).
    pub(super) fn fill(&self, row: usize, channels: Range<usize>, out: &mut [T]) {
        let (sample, token) = (row / self.shape.tokens, row % self.shape.tokens);
        let noise = self.noise;
        match noise {
            Noise::Off => out.fill(T::one()),
            Noise::Generated(generator) => generator.fill(
                (sample / self.shape.batch) as u8,
                (sample % self.shape.batch) as u64,
                token as u32,
                channels.start as u32,
                out,
            ),
            Noise::Given { z, shape } => {
                let row = if shape == NoiseShape::PerSample { sample } else { row };
                let n = self.shape.out_features;
                out.copy_from_slice(&z[row * n + channels.start..row * n + channels.end]);
            }
        }
    }

    /// Calls `body(rows, their z)` for every run of output rows in `rows` that share their `z`, in order.
    pub(super) fn for_runs(
        &self,
        rows: Range<usize>,
        channels: Range<usize>,
        z: &mut Vec<T>,
        mut body: impl FnMut(Range<usize>, &[T]),
    ) {
        z.resize(channels.len(), T::one());
        let mut start = rows.start;
        while start < rows.end {
            let end = match self.is_off() {
                true => rows.end,
                false if self.per_sample() => {
                    rows.end.min((start / self.shape.tokens + 1) * self.shape.tokens)
                }
                false => start + 1,
            };
            self.fill(start, channels.clone(), z);
            body(start..end, z);
            start = end;
        }
    }

    /// `tile [rows, channels] = Σ z⊙g` over the output rows that belong to the input rows `rows`
    /// (one each, or one per branch when the input is shared).
    pub(super) fn gradient_tile<G: Element<Real = T>, E: Element<Real = T>>(
        &self,
        g: &[G],
        rows: Range<usize>,
        channels: Range<usize>,
        scratch: &mut Vec<T>,
        tile: &mut [E],
    ) {
        if E::ROUNDS && self.shape.fan_out() > 1 {
            // Branches that are alike cancel: their sum is rounded, not each of them.
            let mut memory = Scratch::<T>::take();
            let sums = memory.get(tile.len());
            self.gradient_tile(g, rows, channels, scratch, sums);
            zip1(tile, sums, |out, sum: T| *out = E::from_real(sum));
            return;
        }
        let (n, width) = (self.shape.out_features, channels.len());
        for branch in 0..self.shape.fan_out() {
            let offset = branch * self.shape.in_rows();
            let output = rows.start + offset..rows.end + offset;
            self.for_runs(output.clone(), channels.clone(), scratch, |run, z| {
                for row in run {
                    let out = &mut tile[(row - output.start) * width..][..width];
                    let g = &g[row * n + channels.start..][..width];
                    match branch {
                        0 => zip2(out, g, z, |out, g, z| *out = E::from_real(z * g.to_real())),
                        _ => {
                            zip2(out, g, z, |out, g, z| *out = E::from_real(out.to_real() + z * g.to_real()))
                        }
                    }
                }
            });
        }
    }
}

/// Output rows of one task: its first input row and its part of `y` for each branch that it fans out to.
struct Task<'a, T> {
    first_row: usize,
    out: Vec<&'a mut [T]>,
}

fn tasks<'a, T>(shape: &LinearShape, rows: usize, y: &'a mut [T]) -> Vec<Task<'a, T>> {
    let n = shape.out_features;
    let mut tasks: Vec<Task<'a, T>> = Vec::new();
    for branch in y.chunks_mut(shape.in_rows() * n) {
        for (i, out) in branch.chunks_mut(rows * n).enumerate() {
            match tasks.get_mut(i) {
                Some(task) => task.out.push(out),
                None => tasks.push(Task { first_row: i * rows, out: vec![out] }),
            }
        }
    }
    tasks
}

/// Computes `x·ΔWᵀ` of some input rows and channels into a tile.
pub(super) type AdapterProduct<'f, T> = dyn Fn(Range<usize>, Range<usize>, MatMut<'_, T>, Par) + Sync + 'f;

/// `y = base(x) + z ⊙ (adapter(x) + Δb)` in tiles of rows × channels; no adapter stands for ΔW = 0.
pub(super) fn forward<T: Element>(
    z: &Z<'_, T::Real>,
    base: Option<Base<&[T]>>,
    adapter: Option<&AdapterProduct<'_, T::Real>>,
    delta_bias: Option<&[T]>,
    x: &[T],
    y: &mut [T],
) {
    let shape = z.shape;
    let (k, n) = (shape.in_features, shape.out_features);
    let mut memory = [const { Vec::new() }; 2];
    let [base_memory, delta_memory] = &mut memory;
    let base_bias = base.and_then(|base| base.bias).map(|bias| T::reals(bias, base_memory));
    let delta_bias = delta_bias.map(|bias| T::reals(bias, delta_memory));
    let mut tasks = tasks(&shape, rows_per_task::<T>(shape.in_rows()), y);
    let par = inner_threads(tasks.len());
    parallel::for_each_init(tasks.iter_mut(), Buffers::default, |buffers, task| {
        let rows = task.out[0].len() / n;
        let first = task.first_row;
        let x = mat(&x[first * k..][..rows * k], rows, k);
        for channels in blocks(n, CHANNEL_BLOCK) {
            let width = channels.len();
            let size = rows * width;
            buffers.base.resize(size, T::Real::zero());
            match base {
                Some(base) => {
                    let weight = mat(&base.weight[channels.start * k..channels.end * k], width, k);
                    let tile = mat_mut(&mut buffers.base, rows, width);
                    gemm(tile, Accum::Replace, x, weight.transpose(), par);
                }
                None => buffers.base.fill(T::Real::zero()),
            }
            if let Some(adapter) = adapter {
                buffers.adapter.resize(size, T::Real::zero());
                let tile = mat_mut(&mut buffers.adapter, rows, width);
                adapter(first..first + rows, channels.clone(), tile, par);
            }
            let biases =
                [&base_bias, &delta_bias].map(|bias| bias.as_ref().map(|bias| &bias[channels.clone()]));
            epilogue(z, biases, first, channels, buffers, adapter.is_some(), &mut task.out);
        }
    });
}

/// Buffers of one thread: tiles of `x·W0ᵀ` and `x·ΔWᵀ`, and of its channels `z` and the bias under it.
struct Buffers<R> {
    base: Vec<R>,
    adapter: Vec<R>,
    z: Vec<R>,
    bias: Vec<R>,
}

impl<R> Default for Buffers<R> {
    fn default() -> Self {
        Self { base: Vec::new(), adapter: Vec::new(), z: Vec::new(), bias: Vec::new() }
    }
}

/// `y = base + b0 + z ⊙ (adapter + Δb)` for a tile of each branch; `biases` are those of its channels.
fn epilogue<T: Element>(
    z: &Z<'_, T::Real>,
    [base_bias, delta_bias]: [Option<&[T::Real]>; 2],
    first_row: usize,
    channels: Range<usize>,
    buffers: &mut Buffers<T::Real>,
    has_adapter: bool,
    out: &mut [&mut [T]],
) {
    let (n, width) = (z.shape.out_features, channels.len());
    let rows = out[0].len() / n;
    let Buffers { base, adapter, z: z_row, bias } = buffers;
    bias.resize(width, T::Real::zero());
    for (branch, out) in out.iter_mut().enumerate() {
        let offset = branch * z.shape.in_rows() + first_row;
        z.for_runs(offset..offset + rows, channels.clone(), z_row, |run, z| {
            match base_bias {
                Some(base) => bias.copy_from_slice(base),
                None => bias.fill(T::Real::zero()),
            }
            if let Some(delta) = delta_bias {
                zip2(bias, z, delta, |bias, z, delta| *bias += z * delta);
            }
            for row in run {
                let local = row - offset;
                let tile = local * width..(local + 1) * width;
                let y = &mut out[local * n + channels.start..local * n + channels.end];
                let base = &base[tile.clone()];
                match has_adapter {
                    true => zip4(y, [base, bias, z, &adapter[tile]], |y, base, bias, z, a| {
                        *y = T::from_real(base + (bias + z * a));
                    }),
                    false => zip2(y, base, bias, |y, base, bias| *y = T::from_real(base + bias)),
                }
            }
        });
    }
}

/// `dx = Σ g·W0`, or zero without a base term; the sum goes over the branches that share the input.
pub(super) fn base_gradient<T: Element>(
    shape: &LinearShape,
    base: Option<Base<&[T]>>,
    g: &[T],
    mut dx: MatMut<'_, T::Real>,
) {
    let (m, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let Some(base) = base else { return dx.fill(T::Real::zero()) };
    let weight = mat(base.weight, n, k);
    if shape.fan_out() == 1 {
        return gemm(dx, Accum::Replace, mat(g, m, n), weight, all_threads());
    }
    let rows = rows_per_task::<T>(m);
    let par = inner_threads(m.div_ceil(rows));
    parallel::for_each_init(row_chunks_mut(dx, rows).enumerate(), Vec::new, |sum, (i, dx)| {
        let count = dx.nrows();
        let g = sum_branches(shape, g, i * rows, count, sum);
        gemm(dx, Accum::Replace, mat(g, count, n), weight, par);
    });
}

/// `out [input rows, C] += e·weight [N, C]`, with `e = Σ z⊙g` over the branches that share the input.
pub(super) fn project_gradient<T: Element>(
    z: &Z<'_, T::Real>,
    g: &[T],
    weight: MatRef<'_, T>,
    out: MatMut<'_, T::Real>,
) {
    let n = weight.nrows();
    let rows = rows_per_task::<T>(z.shape.in_rows());
    let par = inner_threads(z.shape.in_rows().div_ceil(rows));
    parallel::for_each_init(
        row_chunks_mut(out, rows).enumerate(),
        || (Vec::<T>::new(), Vec::new()),
        |(tile, scratch), (i, out)| {
            let (first, count) = (i * rows, out.nrows());
            tile.resize(count * n, T::default());
            z.gradient_tile(g, first..first + count, 0..n, scratch, tile);
            gemm(out, Accum::Add, mat(tile, count, n), weight, par);
        },
    );
}

/// The rows of `g` that belong to some input rows, added up over the branches if these share the input.
fn sum_branches<'a, T: Element>(
    shape: &LinearShape,
    g: &'a [T],
    first_row: usize,
    rows: usize,
    sum: &'a mut Vec<T>,
) -> &'a [T] {
    let n = shape.out_features;
    let part = |branch: usize| &g[(branch * shape.in_rows() + first_row) * n..][..rows * n];
    if shape.fan_out() == 1 {
        return part(0);
    }
    sum.clear();
    sum.extend(part(0).iter().zip(part(1)).map(|(&a, &b)| T::from_real(a.to_real() + b.to_real())));
    sum
}

/// Channels per task, so that every thread of the pool gets as many tasks as the others; whole vectors.
fn channel_block(channels: usize) -> usize {
    even(channels, CHANNEL_BLOCK).next_multiple_of(16)
}

/// Calls `body(input rows, channels, e tile, sum, first tile?)` for every tile of `e = Σ z⊙g`: channel blocks in parallel, the
/// rows of each in order. `sum [channels, width]` is what is written to these channels of `out`.
pub(super) fn for_channel_blocks<T: Element>(
    z: &Z<'_, T::Real>,
    g: &[T],
    width: usize,
    out: &mut [T],
    body: impl Fn(Range<usize>, Range<usize>, &[T], MatMut<'_, T::Real>, bool, Par) + Sync,
) {
    /// Rows of `e` that are held at once.
    const ROWS: usize = 512;
    let n = z.shape.out_features;
    let block = channel_block(n);
    let par = inner_threads(n.div_ceil(block));
    parallel::for_each_init(
        out.chunks_mut(block * width).enumerate(),
        || (Vec::<T>::new(), Vec::new()),
        |(tile, scratch), (i, out)| {
            let channels = i * block..n.min((i + 1) * block);
            T::write(mat_mut(out, channels.len(), width), Par::Seq, |mut sum| {
                for rows in blocks(z.shape.in_rows(), ROWS) {
                    tile.resize(rows.len() * channels.len(), T::default());
                    z.gradient_tile(g, rows.clone(), channels.clone(), scratch, tile);
                    let first = rows.start == 0;
                    body(rows, channels.clone(), tile, sum.as_mut(), first, par);
                }
            });
        },
    );
}

/// `dΔb = Σ z⊙g` over all output rows: channel blocks in parallel, the rows of each in order.
pub(super) fn delta_bias<T: Element>(z: &Z<'_, T::Real>, g: &[T], out: &mut [T]) {
    /// Additions to a sum before it is added to the next: rounding errors grow with the length of a chain.
    const CHAIN: usize = 32;
    let n = z.shape.out_features;
    let block = channel_block(n);
    parallel::for_each_init(
        out.chunks_mut(block).enumerate(),
        || (<[Vec<T::Real>; 3]>::default(), Vec::new()),
        |(sums, scratch), (i, out)| {
            let channels = i * block..i * block + out.len();
            for sum in &mut *sums {
                sum.clear();
                sum.resize(channels.len(), T::Real::zero());
            }
            let [sum, part, total] = sums;
            let mut parts = 0;
            z.for_runs(0..z.shape.out_rows(), channels.clone(), scratch, |run, z| {
                for rows in blocks(run.len(), CHAIN) {
                    sum.fill(T::Real::zero());
                    for row in rows {
                        zip1(sum, &g[(run.start + row) * n..][channels.clone()], |sum, g| {
                            *sum += g.to_real()
                        });
                    }
                    zip2(part, z, sum, |part, z, sum| *part += z * sum);
                    parts += 1;
                    if parts % CHAIN == 0 {
                        zip1(total, part, |total, part: T::Real| *total += part);
                        part.fill(T::Real::zero());
                    }
                }
            });
            zip2(out, total, part, |out, total, part| *out = T::from_real(total + part));
        },
    );
}
