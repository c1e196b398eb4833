//! Parameters that travel as one tensor: candle's operations take three tensors at most.

#[cfg(feature = "candle-cuda")]
use super::device::{CudaSlice, CudaView, CudaViewMut};
use candle_core::{Result, Tensor};

/// The lengths of tensors that lie one after the other in a joined one; 0 for one that is absent.
pub(super) struct Joined<const N: usize>([usize; N]);

impl<const N: usize> Joined<N> {
    /// Joins the tensors.
    pub(super) fn new(tensors: [Option<&Tensor>; N]) -> Result<(Self, Tensor)> {
        let flat: Vec<Tensor> =
            tensors.into_iter().flatten().map(Tensor::flatten_all).collect::<Result<_>>()?;
        let lengths = tensors.map(|tensor| tensor.map_or(0, Tensor::elem_count));
        Ok((Self(lengths), Tensor::cat(&flat, 0)?))
    }

    /// The tensors; one that is absent is empty.
    pub(super) fn parts<'a, T>(&self, mut joined: &'a [T]) -> [&'a [T]; N] {
        self.0.map(|length| joined.split_off(..length).unwrap_or_default())
    }

    /// Places for the gradients of those that are there, if there is one for that of the joined tensor.
    pub(super) fn places<'a, T>(&self, joined: Option<&'a mut [T]>) -> [Option<&'a mut [T]>; N] {
        let mut joined = joined.unwrap_or_default();
        self.0.map(|length| joined.split_off_mut(..length).filter(|part| !part.is_empty()))
    }
}

#[cfg(feature = "candle-cuda")]
impl<const N: usize> Joined<N> {
    /// The tensors on a device.
    pub(super) fn views<'a, T>(&self, joined: &CudaView<'a, T>) -> [CudaView<'a, T>; N] {
        let mut end = 0;
        self.0.map(|length| {
            let start = end;
            end += length;
            joined.slice(start..end)
        })
    }

    /// Calls `body` with [`places`](Self::places) on a device.
    pub(super) fn with_places<T, R>(
        &self,
        joined: Option<&mut CudaSlice<T>>,
        body: impl FnOnce([Option<CudaViewMut<'_, T>>; N]) -> R,
    ) -> R {
        split(joined.map(|joined| joined.as_view_mut()), &self.0, Vec::with_capacity(N), |parts| {
            let mut parts = parts.into_iter();
            body(self.0.map(|length| parts.next().filter(|_| length > 0)))
        })
    }
}

/// Calls `body` with `parts` and those of these lengths that `rest` begins with: each part borrows from the rest before it.
#[cfg(feature = "candle-cuda")]
fn split<'a, T, R>(
    rest: Option<CudaViewMut<'a, T>>,
    lengths: &[usize],
    parts: Vec<CudaViewMut<'a, T>>,
    body: impl FnOnce(Vec<CudaViewMut<'_, T>>) -> R,
) -> R {
    let (Some(mut rest), [length, lengths @ ..]) = (rest, lengths) else { return body(parts) };
    let Some((part, rest)) = rest.try_split_at_mut(*length) else { return body(parts) };
    let mut parts: Vec<CudaViewMut<'_, T>> = parts;
    parts.push(part);
    split(Some(rest), lengths, parts, body)
}
