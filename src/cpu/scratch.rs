//! Memory for effective weights, packed operands and sums, kept by each thread from one call to the next: getting it anew costs as
//! much as filling it.

use half::bf16;
use std::cell::RefCell;

/// Bytes that a thread keeps of each type, at most.
const MOST_KEPT: usize = 64 << 20;

/// A line of a cache.
#[repr(align(64))]
pub(super) struct Line;

/// A type that threads keep memory of.
pub trait Scratched: Copy + Default + 'static {
    /// Takes from a thread's memories of this type, or adds to them.
    fn kept<R>(body: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R>;
}

macro_rules! scratched {
    ($($type:ty),*) => {$(
        impl Scratched for $type {
            fn kept<R>(body: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R> {
                thread_local! {
                    static KEPT: RefCell<Vec<Vec<$type>>> = const { RefCell::new(Vec::new()) };
                }
                // A thread that is ending keeps nothing any more.
                KEPT.try_with(|kept| body(&mut kept.borrow_mut())).ok()
            }
        }
    )*};
}

scratched!(f32, f64, bf16, u32);

/// Some of the calling thread's memory, for as long as this lives. What is taken and given back while another lives has the same memory
/// each time.
pub(super) struct Scratch<T: Scratched>(Vec<T>);

impl<T: Scratched> Scratch<T> {
    pub(super) fn take() -> Self {
        Self(T::kept(Vec::pop).flatten().unwrap_or_default())
    }

    /// `len` elements of any contents, from a [`Line`]'s first byte on: vectors and tiles that cross one take twice as long.
    pub(super) fn get(&mut self, len: usize) -> &mut [T] {
        let spare = align_of::<Line>() / size_of::<T>();
        if self.0.len() < len + spare {
            self.0.resize(len + spare, T::default());
        }
        let start = self.0.as_ptr().align_offset(align_of::<Line>()).min(spare);
        &mut self.0[start..][..len]
    }
}

impl<T: Scratched> Drop for Scratch<T> {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.0);
        T::kept(|kept| {
            let all = kept.iter().chain([&memory]).map(Vec::capacity).sum::<usize>();
            if all * size_of::<T>() <= MOST_KEPT {
                kept.push(memory);
            }
        });
    }
}
