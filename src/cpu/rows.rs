//! What every noisy layer on the CPU shares: `z` by rows, the blocked forward pass, and tiles of `e = z⊙g`.

use super::Base;
use super::matmul::{
    Accum, MatMut, MatRef, Par, all_threads, gemm, inner_threads, mat, mat_mut, row_chunks_mut,
};
use super::scratch::{Scratch, Scratched};
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

/// Rows per task, so that every thread of the pool gets about as many tasks as the others.
fn rows_per_task<T: Element>(rows: usize) -> usize {
    /// Rows of a tile of a GEMM in 16 bits: 197 rows are as much work as 224.
    const TILE: usize = 32;
    match T::ROUNDS {
        true => (even(rows, 2 * MAX_ROWS) / TILE * TILE).max(TILE),
        false => even(rows, MAX_ROWS).max(MIN_ROWS),
    }
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

/// The product that an adapter adds to that of the frozen layer, `left·right`; without `left`, what is multiplied with a whole ΔW:
/// `x` in the forward pass, `e = Σ z⊙g` in the backward pass.
#[derive(Clone, Copy)]
pub(super) struct Term<'a, T> {
    /// `[input rows, q]`.
    pub left: Option<&'a [T]>,
    /// `[q, N]` or `[q, K]`.
    pub right: MatRef<'a, T>,
}

impl<'a, T: Element> Term<'a, T> {
    /// Rows of `left`, if it is there.
    fn rows(&self, first: usize, count: usize) -> Option<MatRef<'a, T>> {
        let q = self.right.nrows();
        self.left.map(|left| mat(&left[first * q..][..count * q], count, q))
    }

    /// The same of the backward pass; `e` is made in this memory.
    fn gradient_rows<'s>(
        &self,
        z: &Z<'_, T::Real>,
        g: &[T],
        first: usize,
        count: usize,
        (e, z_row): &'s mut (Vec<T>, Vec<T::Real>),
    ) -> MatRef<'s, T>
    where
        'a: 's,
    {
        let n = z.shape.out_features;
        self.rows(first, count).unwrap_or_else(|| {
            e.resize(count * n, T::default());
            z.gradient_tile(g, first..first + count, 0..n, z_row, e);
            mat(e, count, n)
        })
    }
}

/// Columns of a weight with so many rows that are prepared for GEMMs at a time, for all tasks: 4 Mi numbers, which stay in an L3 cache.
fn prepared(rows: usize) -> usize {
    ((1 << 22) / rows).max(CHANNEL_BLOCK) / CHANNEL_BLOCK * CHANNEL_BLOCK
}

/// `y = base(x) + z ⊙ (adapter(x) + Δb)` in tiles of rows × channels; no adapter stands for ΔW = 0.
pub(super) fn forward<T: Element>(
    z: &Z<'_, T::Real>,
    base: Option<Base<&[T]>>,
    adapter: Option<Term<'_, T>>,
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
    let [mut base_memory, mut adapter_memory] = <[T::Memory; 2]>::default();
    for part in blocks(n, prepared(k)) {
        let weight = base.map(|base| {
            let weight = mat(&base.weight[part.start * k..part.end * k], part.len(), k);
            T::right(weight.transpose(), &mut base_memory, all_threads())
        });
        let adapter = adapter.map(|term| {
            let right = term.right.subcols(part.start, part.len());
            (term, T::right(right, &mut adapter_memory, all_threads()))
        });
        let init = || (Buffers::default(), <[T::Memory; 2]>::default());
        parallel::for_each_init(tasks.iter_mut(), init, |(buffers, memory), task| {
            let rows = task.out[0].len() / n;
            let first = task.first_row;
            let [x_memory, left_memory] = memory;
            let x = T::left(mat(&x[first * k..][..rows * k], rows, k), x_memory);
            let adapter = adapter.map(|(term, right)| {
                (term.rows(first, rows).map_or(x, |left| T::left(left, left_memory)), right)
            });
            for channels in blocks(part.len(), CHANNEL_BLOCK) {
                let width = channels.len();
                let size = rows * width;
                let tile = buffers.base.get(size);
                match weight {
                    Some(weight) => {
                        let tile = mat_mut(tile, rows, width);
                        T::product(tile, Accum::Replace, x, weight, channels.clone(), par);
                    }
                    None => tile.fill(T::Real::zero()),
                }
                if let Some((left, right)) = adapter {
                    let tile = mat_mut(buffers.adapter.get(size), rows, width);
                    T::product(tile, Accum::Replace, left, right, channels.clone(), par);
                }
                let channels = part.start + channels.start..part.start + channels.end;
                let biases =
                    [&base_bias, &delta_bias].map(|bias| bias.as_ref().map(|bias| &bias[channels.clone()]));
                epilogue(z, biases, first, channels, buffers, adapter.is_some(), &mut task.out);
            }
        });
    }
}

/// Buffers of one thread: tiles of `x·W0ᵀ` and `x·ΔWᵀ`, and of its channels `z` and the bias under it.
struct Buffers<R: Scratched> {
    base: Scratch<R>,
    adapter: Scratch<R>,
    z: Vec<R>,
    bias: Vec<R>,
}

impl<R: Scratched> Default for Buffers<R> {
    fn default() -> Self {
        Self { base: Scratch::take(), adapter: Scratch::take(), z: Vec::new(), bias: Vec::new() }
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
    let (base, adapter) =
        (&*base.get(rows * width), &*adapter.get(if has_adapter { rows * width } else { 0 }));
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

/// `dx = g·W0 + left·right`, with `g` summed over the branches that share the input.
pub(super) fn input_gradient<T: Element>(
    z: &Z<'_, T::Real>,
    base: Option<Base<&[T]>>,
    adapter: Option<Term<'_, T>>,
    g: &[T],
    dx: &mut [T],
) {
    let (m, k) = (z.shape.in_rows(), z.shape.in_features);
    let dx = mat_mut(dx, m, k);
    match T::packs() {
        true => input_gradient_in_tiles(z, base, adapter, g, dx),
        false => T::write(dx, all_threads(), |dx| input_gradient_in_place(z, base, adapter, g, dx)),
    }
}

/// [`input_gradient`] with weights that are packed for all tasks: in tiles of rows × columns, complete and rounded while they are in
/// the L2 cache.
fn input_gradient_in_tiles<T: Element>(
    z: &Z<'_, T::Real>,
    base: Option<Base<&[T]>>,
    adapter: Option<Term<'_, T>>,
    g: &[T],
    mut dx: MatMut<'_, T>,
) {
    let shape = z.shape;
    let (m, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let rows = rows_per_task::<T>(m);
    let par = inner_threads(m.div_ceil(rows));
    let [mut base_memory, mut adapter_memory] = <[T::Memory; 2]>::default();
    for part in blocks(k, prepared(n)) {
        let weight = base.map(|base| {
            T::right(mat(base.weight, n, k).subcols(part.start, part.len()), &mut base_memory, all_threads())
        });
        let adapter = adapter.map(|term| {
            (term, T::right(term.right.subcols(part.start, part.len()), &mut adapter_memory, all_threads()))
        });
        let dx = row_chunks_mut(dx.as_mut().subcols_mut(part.start, part.len()), rows).enumerate();
        let init = || (Vec::new(), Default::default(), <[T::Memory; 2]>::default());
        parallel::for_each_init(dx, init, |(sum, e, [g_memory, left_memory]), (i, mut dx)| {
            let (first, count) = (i * rows, dx.nrows());
            let weight = weight.map(|weight| {
                let g = sum_branches(&shape, g, first, count, sum);
                (T::left(mat(g, count, n), g_memory), weight)
            });
            let adapter = adapter.map(|(term, right)| {
                (T::left(term.gradient_rows(z, g, first, count, e), left_memory), right)
            });
            for columns in blocks(part.len(), CHANNEL_BLOCK) {
                let dx = dx.as_mut().subcols_mut(columns.start, columns.len());
                T::write(dx, Par::Seq, |mut dx| {
                    let mut accum = Accum::Replace;
                    for (left, right) in [weight, adapter].into_iter().flatten() {
                        T::product(dx.as_mut(), accum, left, right, columns.clone(), par);
                        accum = Accum::Add;
                    }
                });
            }
        });
    }
}

/// [`input_gradient`] where GEMMs pack for themselves: by such as are as large as they can be.
fn input_gradient_in_place<T: Element>(
    z: &Z<'_, T::Real>,
    base: Option<Base<&[T]>>,
    adapter: Option<Term<'_, T>>,
    g: &[T],
    mut dx: MatMut<'_, T::Real>,
) {
    let shape = z.shape;
    let (m, k, n) = (shape.in_rows(), shape.in_features, shape.out_features);
    let rows = rows_per_task::<T>(m);
    let par = inner_threads(m.div_ceil(rows));
    match base.map(|base| mat(base.weight, n, k)) {
        None => dx.fill(T::Real::zero()),
        Some(weight) if shape.fan_out() == 1 => {
            gemm(dx.as_mut(), Accum::Replace, mat(g, m, n), weight, all_threads());
        }
        Some(weight) => {
            let dx = row_chunks_mut(dx.as_mut(), rows).enumerate();
            parallel::for_each_init(dx, Vec::new, |sum, (i, dx)| {
                let count = dx.nrows();
                let g = sum_branches(&shape, g, i * rows, count, sum);
                gemm(dx, Accum::Replace, mat(g, count, n), weight, par);
            });
        }
    }
    let Some(term) = adapter else { return };
    let dx = row_chunks_mut(dx, rows).enumerate();
    parallel::for_each_init(dx, Default::default, |e, (i, dx)| {
        let left = term.gradient_rows(z, g, i * rows, dx.nrows(), e);
        gemm(dx, Accum::Add, left, term.right, par);
    });
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
