//! What planning knows of a device: a plain value.

use crate::error::{Error, Result};

/// The oldest compute capability that the kernels run on.
pub(super) const OLDEST: (u32, u32) = (8, 0);

/// What a plan depends on besides its arguments. [`Device::gpu`](super::Device::gpu) gives that of an open device; any other value
/// plans for a device that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Shared memory that a block may have if it asks for it, in bytes.
    pub max_shared_bytes: u32,
    /// Whether a cuBLASLt library was found at run time.
    pub has_cublaslt: bool,
    /// Whether the kernels of [`Family::Sm90`] were built.
    pub has_sm90: bool,
    /// The family that computes each layer that it takes, instead of the one that was measured to be the fastest. It has to be
    /// available on the device ([`Family::is_available`]): plans do not check that.
    pub family: Option<Family>,
}

impl Gpu {
    /// An A100 with 40 GiB.
    pub const A100: Self = Self::new((8, 0), 108, 40 << 20, 163 << 10);
    /// A GeForce RTX 4090.
    pub const RTX_4090: Self = Self::new((8, 9), 128, 72 << 20, 99 << 10);
    /// An H100 SXM or H200.
    pub const H100: Self = Self::new((9, 0), 132, 50 << 20, 227 << 10);

    const fn new(
        capability: (u32, u32),
        multiprocessors: u32,
        l2_bytes: usize,
        max_shared_bytes: u32,
    ) -> Self {
        let (has_cublaslt, has_sm90) = (true, true);
        Self { capability, multiprocessors, l2_bytes, max_shared_bytes, has_cublaslt, has_sm90, family: None }
    }

    /// The same device with each layer computed by this family, if it takes the layer's sizes. Does not check that the family is
    /// available.
    ///
    /// ```
    /// use pace_kernels::cuda::{Family, Gpu};
    /// assert_eq!(Gpu::H100.with_family(Family::Sm80).family, Some(Family::Sm80));
    /// ```
    #[must_use]
    pub const fn with_family(self, family: Family) -> Self {
        Self { family: Some(family), ..self }
    }
}

/// A family of implementations of the linear layers. Their results differ in rounding only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Our portable tensor-core kernels (`kernels/sm80`), for compute capability 8.0 and up: each pass is one kernel or few.
    Sm80,
    /// Our kernels for Hopper (`kernels/sm90`), of compute capability 9.0: 16-bit types, `wgmma` and TMA.
    Sm90,
    /// GEMMs of NVIDIA's cuBLASLt, with our noise, epilogue and sum kernels between them.
    CublasLt,
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 3] = [Self::Sm80, Self::Sm90, Self::CublasLt];

    /// Its name: `sm80`, `sm90`, `cublaslt`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm80",
            Self::Sm90 => "sm90",
            Self::CublasLt => "cublaslt",
        }
    }

    /// Whether it runs on a device.
    pub fn is_available(self, gpu: &Gpu) -> bool {
        match self {
            Self::Sm80 => gpu.capability >= OLDEST,
            Self::Sm90 => gpu.capability == (9, 0) && gpu.has_sm90,
            Self::CublasLt => gpu.has_cublaslt,
        }
    }
}

impl std::str::FromStr for Family {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let problem = "is no family, expected `sm80`, `sm90` or `cublaslt`";
        Self::ALL
            .into_iter()
            .find(|family| family.name() == name)
            .ok_or(Error::Argument { argument: "family", problem })
    }
}
