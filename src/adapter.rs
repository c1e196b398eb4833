//! The paper's adapters: which parameters each trains, under which official names, and how they start.

use crate::error::{Error, Result};
use crate::shape::{nonzero, product};
use rand::{Rng, RngExt};

/// An adapter on a frozen linear layer (paper section 3.4 and the official code's `residual_adapters`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Adapter {
    /// `ΔW = B·A`, `Δb = δb`.
    LoraAdd,
    /// `ΔW = W0 ⊙ (B·A)`, `Δb = W0·(Pd·Pu) + b0⊙δb`: the paper's main adapter.
    LoraMulVptAdd,
    /// `ΔW = 0`, `Δb = W0·(Pd·Pu)`.
    VptAdd,
}

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// Zero: the adapter starts as the identity.
    Zeros,
    /// Uniform in `±√(6/(rows + columns))` (Glorot and Bengio 2010).
    XavierUniform,
}

/// One trained tensor of an adapter, `[rows, columns]`, or `[rows]` if `columns` is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// Name in the official checkpoints.
    pub name: &'static str,
    /// First dimension.
    pub rows: usize,
    /// Second dimension.
    pub columns: Option<usize>,
    /// How it starts.
    pub init: Init,
}

/// `B [N, r]`.
pub const DOWN: &str = "delta_W_down";
/// `A [r, K]`.
pub const UP: &str = "delta_W_up";
/// `δb [N]`.
pub const DELTA_BIAS: &str = "delta_b";
/// `Pd [K, r]`.
pub const PROMPT_DOWN: &str = "delta_prompt_down";
/// `Pu [r, 1]`.
pub const PROMPT_UP: &str = "delta_prompt_up";

impl Adapter {
    /// Every adapter.
    pub const ALL: [Self; 3] = [Self::LoraAdd, Self::LoraMulVptAdd, Self::VptAdd];

    /// Its name on the official code's command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoraAdd => "LoRAadd",
            Self::LoraMulVptAdd => "LoRAmul_VPTadd",
            Self::VptAdd => "VPTadd",
        }
    }

    /// The adapter with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|adapter| adapter.name() == name)
    }

    /// The parameters of this adapter on a layer `[out_features, in_features]`.
    ///
    /// # Errors
    /// If a size is zero or overflows.
    pub fn parameters(self, out_features: usize, in_features: usize, rank: usize) -> Result<Vec<Parameter>> {
        nonzero("out_features", out_features)?;
        nonzero("in_features", in_features)?;
        nonzero("rank", rank)?;
        product("adapter", "[N + K, r]", &[out_features.saturating_add(in_features), rank])?;
        let parameter = |name, rows, columns, init| Parameter { name, rows, columns, init };
        let lora = [
            parameter(DOWN, out_features, Some(rank), Init::Zeros),
            parameter(UP, rank, Some(in_features), Init::XavierUniform),
            parameter(DELTA_BIAS, out_features, None, Init::Zeros),
        ];
        let prompt = [
            parameter(PROMPT_DOWN, in_features, Some(rank), Init::Zeros),
            parameter(PROMPT_UP, rank, Some(1), Init::XavierUniform),
        ];
        Ok(match self {
            Self::LoraAdd => lora.to_vec(),
            Self::LoraMulVptAdd => [&lora[..], &prompt].concat(),
            Self::VptAdd => prompt.to_vec(),
        })
    }
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows.saturating_mul(self.columns.unwrap_or(1))
    }

    /// Whether there are no elements; never, for an adapter's parameter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The half width of the Xavier-uniform interval.
    pub fn xavier_bound(&self) -> f64 {
        (6.0 / (self.rows as f64 + self.columns.unwrap_or(1) as f64)).sqrt()
    }

    /// Writes starting values.
    ///
    /// # Errors
    /// If `out` does not have [`len`](Self::len) elements.
    pub fn initialize(&self, rng: &mut impl Rng, out: &mut [f32]) -> Result<()> {
        if out.len() != self.len() {
            return Err(Error::Length {
                argument: self.name,
                shape: "[rows, columns]",
                expected: self.len(),
                got: out.len(),
            });
        }
        match self.init {
            Init::Zeros => out.fill(0.0),
            Init::XavierUniform => {
                let bound = self.xavier_bound() as f32;
                out.fill_with(|| rng.random_range(-bound..=bound));
            }
        }
        Ok(())
    }
}
