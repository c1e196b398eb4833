//! Pointers in kernels' parameter structs. `kernels/params.h` has them as plain C++ pointers.

use super::buffer::{Address, Buffer};
use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;

/// Elements of the tensors' own type, which the kernel knows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Void;

macro_rules! pointer {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct $name<T>(u64, PhantomData<T>);

        impl<T> $name<T> {
            /// No tensor.
            #[allow(dead_code)] // one of the two kinds
            pub(super) const NULL: Self = Self(0, PhantomData);
        }

        // SAFETY: an address is an integer, in whatever it points to.
        unsafe impl<T: Copy + 'static> Zeroable for $name<T> {}
        // SAFETY: transparent over a `u64`: no padding, any bits are a value.
        unsafe impl<T: Copy + 'static> Pod for $name<T> {}

        impl<T> From<Address> for $name<T> {
            fn from(address: Address) -> Self {
                Self(address.0, PhantomData)
            }
        }

        impl<T> From<Buffer> for $name<T> {
            fn from(buffer: Buffer) -> Self {
                Address::from(buffer).into()
            }
        }

        impl<T> From<Option<Buffer>> for $name<T> {
            fn from(buffer: Option<Buffer>) -> Self {
                Address::from(buffer).into()
            }
        }
    };
}

/// Where the device puts an encoded tensor map (see [`Launch::with_maps`](super::plan::Launch)). `kernels/storage.cuh` has it,
/// aligned to 64 bytes: in a parameter struct these come first.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub struct TensorMapSlot([u64; 16]);

pointer! {
    /// `const T *`.
    Input
}

pointer! {
    /// `T *`.
    Output
}
