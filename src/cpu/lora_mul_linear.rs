//! A layer with the paper's main adapter (LoRA mul, VPT add, or both), from the adapter's own parameters.

use super::scratch::Scratch;
use super::{
    Base, LoraFactors, LoraGrads, NoisyLinear, NoisyLinearGrads, PromptBias, PromptGrads, lora_mul_weight,
    lora_mul_weight_backward,
};
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::real::Element;
use crate::shape::{LinearShape, length};

/// `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)` with `ΔW = W0 ⊙ (scale·B·A)` and `Δb = W0·(Pd·Pu) + b0⊙δb`; paper equation 8.
///
/// ΔW and Δb are built for each pass and not kept. The same as [`lora_mul_weight`], [`PromptBias`] and [`NoisyLinear`] one after the
/// other.
#[derive(Debug, Clone, Copy)]
pub struct LoraMulLinear<'a, T: Element> {
    /// Sizes.
    pub shape: LinearShape,
    /// Source of `z`.
    pub noise: Noise<&'a [T::Real]>,
    /// The frozen layer.
    pub base: Base<&'a [T]>,
    /// LoRA mul; `None` is no ΔW.
    pub lora: Option<Lora<&'a [T], T::Real>>,
    /// VPT add; without it `Δb = δb`.
    pub prompt: Option<Prompt<&'a [T]>>,
    /// `δb [N]`; `None` is zero.
    pub delta_bias: Option<&'a [T]>,
    /// As in [`NoisyLinear`].
    pub fold: bool,
}

/// Factors of a low-rank weight; `B` are the tensors, `S` is the type of the scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora<B, S> {
    /// Rank `r`.
    pub rank: usize,
    /// `A [r, K]`.
    pub lora_a: B,
    /// `B [N, r]`.
    pub lora_b: B,
    /// Factor on `B·A`; 1 in the paper.
    pub scale: S,
}

/// Factors of a prompt; `B` are the tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prompt<B> {
    /// Rank `p`.
    pub rank: usize,
    /// `Pd [K, p]`.
    pub down: B,
    /// `Pu [p]`.
    pub up: B,
}

/// Where the gradients of a [`LoraMulLinear`] go; each is overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraMulLinearGrads<B> {
    /// `dx`, of the shape of `x`.
    pub input: Option<B>,
    /// `dA [r, K]`.
    pub lora_a: Option<B>,
    /// `dB [N, r]`.
    pub lora_b: Option<B>,
    /// `dPd [K, p]`.
    pub prompt_down: Option<B>,
    /// `dPu [p]`.
    pub prompt_up: Option<B>,
    /// `dδb [N]`.
    pub delta_bias: Option<B>,
}

impl<B> Default for LoraMulLinearGrads<B> {
    fn default() -> Self {
        Self { input: None, lora_a: None, lora_b: None, prompt_down: None, prompt_up: None, delta_bias: None }
    }
}

impl<B: Copy, S> Lora<B, S> {
    /// The same as arguments of the operator that builds ΔW for a layer of these sizes.
    pub(crate) fn factors(self, shape: &LinearShape) -> LoraFactors<B, S> {
        let &LinearShape { in_features, out_features, .. } = shape;
        let Self { rank, lora_a, lora_b, scale } = self;
        LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale }
    }
}

impl<B: Copy> Prompt<B> {
    /// The same as arguments of the operator that builds Δb for a layer of these sizes.
    pub(crate) fn bias(self, shape: &LinearShape, base: Base<B>, delta_bias: Option<B>) -> PromptBias<B> {
        PromptBias {
            out_features: shape.out_features,
            in_features: shape.in_features,
            rank: self.rank,
            base_weight: base.weight,
            base_bias: base.bias,
            prompt_down: self.down,
            prompt_up: self.up,
            delta_bias,
        }
    }
}

/// Checks that there is an adapter.
pub(crate) fn check_adapter(has_lora: bool, has_prompt: bool) -> Result<()> {
    if has_lora || has_prompt {
        return Ok(());
    }
    Err(Error::Argument { argument: "lora_a", problem: "is required when there is no prompt" })
}

impl<B> LoraMulLinearGrads<B> {
    /// Checks that nothing is asked for that the layer does not have.
    pub(crate) fn check(&self, has_lora: bool, has_prompt: bool) -> Result<()> {
        let asked = [
            ("grads.lora_a", self.lora_a.is_some() && !has_lora),
            ("grads.lora_b", self.lora_b.is_some() && !has_lora),
            ("grads.prompt_down", self.prompt_down.is_some() && !has_prompt),
            ("grads.prompt_up", self.prompt_up.is_some() && !has_prompt),
        ];
        match asked.into_iter().find(|&(_, is_wrong)| is_wrong) {
            Some((argument, _)) => {
                Err(Error::Argument { argument, problem: "is asked for, but the layer has no such factor" })
            }
            None => Ok(()),
        }
    }
}

impl<'a, T: Element> LoraMulLinear<'a, T> {
    /// Checks the sizes that memory is allocated for (what holds for a slice that exists can be allocated again), and the factors.
    fn check(&self) -> Result<()> {
        check_adapter(self.lora.is_some(), self.prompt.is_some())?;
        self.shape.check()?;
        let LinearShape { in_features, out_features, .. } = self.shape;
        length("base.weight", "[N, K]", self.base.weight, out_features * in_features)?;
        self.lora.map_or(Ok(()), |lora| lora.factors(&self.shape).check())?;
        self.prompt.map_or(Ok(()), |prompt| prompt.bias(&self.shape, self.base, self.delta_bias).check())
    }

    /// Calls `body` with the layer whose ΔW and Δb are these. Of a ΔW that is not needed only the length counts.
    fn dense<R>(&self, needs_weight: bool, body: impl FnOnce(&NoisyLinear<'_, T>) -> Result<R>) -> Result<R> {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let mut scratch = Scratch::take();
        let weight = scratch.get(if self.lora.is_some() { n * k } else { 0 });
        if let Some(lora) = self.lora.filter(|_| needs_weight) {
            lora_mul_weight(lora.factors(&self.shape), self.base.weight, weight)?;
        }
        let mut bias = vec![T::default(); if self.prompt.is_some() { n } else { 0 }];
        if let Some(prompt) = self.prompt {
            prompt.bias(&self.shape, self.base, self.delta_bias).forward(&mut bias)?;
        }
        body(&NoisyLinear {
            shape: self.shape,
            noise: self.noise,
            base: Some(self.base),
            delta_weight: self.lora.map(|_| &*weight),
            delta_bias: if self.prompt.is_some() { Some(&bias) } else { self.delta_bias },
            fold: self.fold,
        })
    }

    /// Computes `y [M, N]` from `x` (`[M, K]`, or `[B·T, K]` if the input is shared).
    ///
    /// # Errors
    /// If there is neither LoRA nor a prompt, a size is zero or too large, a slice has another length than its shape, or `scale` is not finite.
    #[inline(never)]
    pub fn forward(&self, x: &[T], y: &mut [T]) -> Result<()> {
        self.check()?;
        self.dense(true, |layer| layer.forward(x, y))
    }

    /// Computes gradients from `x` and `dy = ∂L/∂y [M, N]`, with the noise of the forward pass recomputed: those of
    /// [`NoisyLinear`], [`lora_mul_weight`] and [`PromptBias`]. Only those to A and B need `x`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); also if a gradient is asked for whose factor the layer does not have.
    #[inline(never)]
    pub fn backward(&self, x: Option<&[T]>, dy: &[T], grads: LoraMulLinearGrads<&mut [T]>) -> Result<()> {
        self.check()?;
        grads.check(self.lora.is_some(), self.prompt.is_some())?;
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias } = grads;
        let with_lora = lora_a.is_some() || lora_b.is_some();
        let with_prompt =
            self.prompt.is_some() && (prompt_down.is_some() || prompt_up.is_some() || delta_bias.is_some());
        // Both factors' gradients come together; one that was not asked for is dropped.
        let mut spare = [const { Vec::new() }; 4];
        let [spare_a, spare_b, spare_down, spare_up] = &mut spare;
        let (own_bias, prompt_bias) = if with_prompt { (None, delta_bias) } else { (delta_bias, None) };
        // All is checked before anything is written.
        let lora = match self.lora.filter(|_| with_lora) {
            Some(lora) => {
                let lora_a = or_spare(lora_a, spare_a, lora.lora_a.len());
                let grads = LoraGrads { lora_b: or_spare(lora_b, spare_b, lora.lora_b.len()), lora_a };
                let factors = lora.factors(&self.shape);
                factors.check_grads(&grads)?;
                Some((factors, grads))
            }
            None => None,
        };
        let prompt = match self.prompt.filter(|_| with_prompt) {
            Some(prompt) => {
                let prompt_down = or_spare(prompt_down, spare_down, prompt.down.len());
                let prompt_up = or_spare(prompt_up, spare_up, prompt.up.len());
                let grads = PromptGrads { prompt_down, prompt_up, delta_bias: prompt_bias };
                let prompt = prompt.bias(&self.shape, self.base, self.delta_bias);
                prompt.check_grads(&grads)?;
                Some((prompt, grads))
            }
            None => None,
        };
        let mut scratch = Scratch::take();
        let dw = scratch.get(if with_lora { n * k } else { 0 });
        let mut db = vec![T::default(); if with_prompt { n } else { 0 }];
        // Δb has no part in any gradient.
        Self { prompt: None, ..*self }.dense(input.is_some(), |layer| {
            let delta_weight = with_lora.then_some(&mut *dw);
            let delta_bias = if with_prompt { Some(&mut db[..]) } else { own_bias };
            layer.backward_from(x, dy, NoisyLinearGrads { input, delta_weight, delta_bias })
        })?;
        if let Some((factors, grads)) = lora {
            lora_mul_weight_backward(factors, self.base.weight, dw, grads)?;
        }
        if let Some((prompt, grads)) = prompt {
            prompt.backward(&db, grads)?;
        }
        Ok(())
    }
}

fn or_spare<'s, T: Element>(wanted: Option<&'s mut [T]>, spare: &'s mut Vec<T>, len: usize) -> &'s mut [T] {
    match wanted {
        Some(wanted) => wanted,
        None => {
            spare.clear();
            spare.resize(len, T::default());
            spare
        }
    }
}
