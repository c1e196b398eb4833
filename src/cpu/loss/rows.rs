//! Rows of logits, read and written in chunks. What is added up over a row has a partial sum for each place in a chunk: that fixes the
//! order, whatever the vectors of a processor.

use crate::real::Real;

/// Elements of a chunk.
pub(super) const LANES: usize = 16;
pub(super) type Lanes = [f64; LANES];

/// A row, whose last chunk may be padded.
#[derive(Clone, Copy)]
pub(super) struct Row<'a, T> {
    pub all: &'a [T],
    whole: &'a [[T; LANES]],
    last: [T; LANES],
}

impl<'a, T: Real> Row<'a, T> {
    #[inline(always)]
    pub fn new(all: &'a [T], pad: f64) -> Self {
        let (whole, rest) = all.as_chunks();
        let mut last = [T::from_f64(pad); LANES];
        last[..rest.len()].copy_from_slice(rest);
        Self { all, whole, last }
    }

    #[inline(always)]
    pub fn chunks(&self) -> usize {
        self.all.len().div_ceil(LANES)
    }

    /// Read where it is: a copy of each chunk would cost as much as an exponential.
    #[inline(always)]
    pub fn chunk(&self, i: usize) -> &[T; LANES] {
        self.whole.get(i).unwrap_or(&self.last)
    }
}

/// A row that is read and written.
pub(super) struct RowMut<'a, T> {
    whole: &'a mut [[T; LANES]],
    rest: &'a mut [T],
    last: [T; LANES],
}

impl<'a, T: Real> RowMut<'a, T> {
    #[inline(always)]
    pub fn new(all: &'a mut [T]) -> Self {
        let (whole, rest) = all.as_chunks_mut();
        let mut last = [T::zero(); LANES];
        last[..rest.len()].copy_from_slice(rest);
        Self { whole, rest, last }
    }

    /// An empty row has every chunk as well, and forgets what is written to it.
    #[inline(always)]
    pub fn chunk(&mut self, i: usize) -> &mut [T; LANES] {
        self.whole.get_mut(i).unwrap_or(&mut self.last)
    }

    /// Writes the last chunk as far as the row goes.
    #[inline(always)]
    pub fn finish(self) {
        self.rest.copy_from_slice(&self.last[..self.rest.len()]);
    }
}

/// `add` over the elements of rows of one length, for each lane by itself and from `start` on.
#[inline(always)]
pub(super) fn fold<T: Real, const N: usize>(
    rows: [&[T]; N],
    start: f64,
    add: impl Fn(f64, [f64; N]) -> f64,
) -> Lanes {
    let mut lanes = [start; LANES];
    let chunks = rows.map(|row| row.as_chunks::<LANES>());
    for i in 0..chunks[0].0.len() {
        let chunk = chunks.map(|(whole, _)| &whole[i]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum = add(*sum, chunk.map(|chunk| chunk[lane].to_f64()));
        }
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(chunks[0].1.len()) {
        *sum = add(*sum, chunks.map(|(_, rest)| rest[lane].to_f64()));
    }
    lanes
}

/// All lanes in one number: the upper half to the lower half, until one is left.
#[inline(always)]
pub(super) fn reduce(mut lanes: Lanes, add: impl Fn(f64, f64) -> f64) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, &high) in low.iter_mut().zip(&*high) {
            *low = add(*low, high);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(super) fn total(lanes: Lanes) -> f64 {
    reduce(lanes, |a, b| a + b)
}

/// `l − m`; nothing for a class that both mask by −∞.
#[inline(always)]
pub(super) fn difference(l: f64, m: f64) -> f64 {
    if l == m { 0.0 } else { l - m }
}

/// The greater number; NaN in `b` is passed over.
#[inline(always)]
pub(super) fn greater(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}
