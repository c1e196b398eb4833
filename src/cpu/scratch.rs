//! Memory for effective weights, packed operands and sums, kept by each thread from one call to the next: getting it anew costs as
//! much as filling it.

use half::bf16;
use std::cell::RefCell;

/// Bytes that a thread keeps of each type, at most.
const MOST_KEPT: usize = 64 << 20;

/// A type that threads keep memory of.
pub trait Scratched: Copy + Default + 'static {
    /// Exchanges a thread's memory of this type with another; a call within a call finds it empty.
    fn exchange(other: &mut Vec<Self>);
}

macro_rules! scratched {
    ($($type:ty),*) => {$(
        impl Scratched for $type {
            fn exchange(other: &mut Vec<Self>) {
                thread_local! {
                    static KEPT: RefCell<Vec<$type>> = const { RefCell::new(Vec::new()) };
                }
                // A thread that is ending keeps nothing any more.
                let _ = KEPT.try_with(|kept| std::mem::swap(&mut *kept.borrow_mut(), other));
            }
        }
    )*};
}

scratched!(f32, f64, bf16, u32);

/// The calling thread's memory, for as long as this lives.
pub(super) struct Scratch<T: Scratched>(Vec<T>);

impl<T: Scratched> Scratch<T> {
    pub(super) fn take() -> Self {
        let mut memory = Vec::new();
        T::exchange(&mut memory);
        Self(memory)
    }

    /// `len` elements of any contents.
    pub(super) fn get(&mut self, len: usize) -> &mut [T] {
        if self.0.len() < len {
            self.0.resize(len, T::default());
        }
        &mut self.0[..len]
    }
}

impl<T: Scratched> Drop for Scratch<T> {
    fn drop(&mut self) {
        if self.0.capacity() * size_of::<T>() <= MOST_KEPT {
            T::exchange(&mut self.0);
        }
    }
}
