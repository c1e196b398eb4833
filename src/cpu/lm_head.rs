//! The head of a language model with its loss, without the logits of all tokens in memory.

use super::lora_mul_linear::Lora;
use super::loss::{Consistency, Loss, LossValues};
use super::matmul::*;
use crate::error::{Error, Result};
use crate::loss::{Divergence, LossSettings, Targets};
use crate::real::Real;
use crate::shape::{length, nonzero, product};
use crate::vector::zip1;

/// Logits of a branch that are in memory at a time, about: enough rows for a GEMM to be worth reading the weight.
const CHUNK: usize = 1 << 22;

/// A linear layer from hidden states to a vocabulary, and the [`Loss`] of its logits: forward and backward in one call.
///
/// With `h [2M, H]` (branch 0 first) the logits are `l = a·(h·Wᵀ + b)`, or `cap·tanh(l/cap)`; they exist for some rows at a time. No
/// noise is in the head: it is frozen, trained in full, or carries LoRA.
///
/// Squared differences need no logits of branch 1: with `Δh = h0 − h1` and the Gram matrix `G = WᵀW`
///
/// ```text
/// Σ_c (l0_c − l1_c)² = a² Δh·G·Δhᵀ      dh0 += 2λ/D' a² Δh·G      dh1 = −2λ/D' a² Δh·G      dW += 2λ/D' a² W·(ΔhᵀΔh)
/// ```
///
/// so the second branch costs `2MH²` operations where its logits would cost `4MHV`. (For few tokens computing `G` costs more than it
/// saves, and is left.) Divergences of probabilities, the criterion of
/// both branches and soft-capped logits take the logits of both; uncapped differences are computed as `Δh·Wᵀ`, which keeps the digits
/// that a difference of two logits loses.
#[derive(Debug, Clone, Copy)]
pub struct LmHead<'a, T> {
    /// What the loss is made of; `classes` is the size of the vocabulary `V`.
    pub settings: LossSettings,
    /// `H`.
    pub hidden_size: usize,
    /// 2, or 1 for the criterion alone.
    pub branches: usize,
    /// The token after each hidden state, `[M]`: in `0..V` or the ignored label.
    pub labels: &'a [i64],
    /// `W [V, H]`.
    pub weight: &'a [T],
    /// `b [V]`.
    pub bias: Option<&'a [T]>,
    /// LoRA on `W`, without noise.
    pub lora: Option<Lora<&'a [T], T>>,
    /// `a`, not 0; 1 in most models (Cohere, Granite have others).
    pub logit_scale: f64,
    /// `cap`, more than 0 (Gemma 2 has 30).
    pub soft_cap: Option<f64>,
    /// `G = WᵀW [H, H]` from [`gram`](Self::gram), for a `W` that does not change; `None`: computed at each call that needs it. LoRA
    /// is no part of it.
    pub gram: Option<&'a [T]>,
    /// Rows of a branch whose logits are in memory at a time; `None`: as many as are fast.
    pub chunk_rows: Option<usize>,
    /// Weights of the tokens in the cross-entropy, `[V]`, finite and not negative; `None`: all 1.
    pub class_weights: Option<&'a [T]>,
}

/// Where the gradients of an [`LmHead`] go; each is overwritten, `None` is not computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHeadGrads<B> {
    /// `dh`, of the shape of `h`.
    pub hidden: Option<B>,
    /// `dW [V, H]`.
    pub weight: Option<B>,
    /// `db [V]`.
    pub bias: Option<B>,
    /// `dB [V, r]` of the LoRA.
    pub lora_b: Option<B>,
    /// `dA [r, H]` of the LoRA.
    pub lora_a: Option<B>,
}

impl<B> Default for LmHeadGrads<B> {
    fn default() -> Self {
        Self { hidden: None, weight: None, bias: None, lora_b: None, lora_a: None }
    }
}

impl<'a, T> LmHead<'a, T> {
    /// The head of two branches whose logits are `h·Wᵀ`, with nothing else to it.
    pub const fn new(settings: LossSettings, hidden_size: usize, labels: &'a [i64], weight: &'a [T]) -> Self {
        Self {
            settings,
            hidden_size,
            branches: 2,
            labels,
            weight,
            bias: None,
            lora: None,
            logit_scale: 1.0,
            soft_cap: None,
            gram: None,
            chunk_rows: None,
            class_weights: None,
        }
    }
}

impl<T: Real> LmHead<'_, T> {
    /// `G [H, H]`, once for a `W` that does not change.
    ///
    /// # Errors
    /// If a slice has another length than its shape.
    #[inline(never)]
    pub fn gram(&self, gram: &mut [T]) -> Result<()> {
        let h = self.hidden_size;
        self.check_weight()?;
        length("gram", "[H, H]", gram, product("gram", "[H, H]", &[h, h])?)?;
        let w = mat(self.weight, self.settings.classes, h);
        gemm(mat_mut(gram, h, h), Accum::Replace, w.transpose(), w, all_threads());
        Ok(())
    }

    fn check_weight(&self) -> Result<()> {
        let (v, h) = (self.settings.classes, self.hidden_size);
        nonzero("classes", v)?;
        nonzero("hidden_size", h)?;
        length("weight", "[V, H]", self.weight, product("weight", "[V, H]", &[v, h])?)
    }

    fn check(&self, hidden: &[T], grads: &LmHeadGrads<&mut [T]>) -> Result<()> {
        let (v, h, m) = (self.settings.classes, self.hidden_size, self.labels.len());
        self.check_weight()?;
        let loss = self.loss(self.labels);
        loss.check_sizes()?;
        if !(1..=2).contains(&self.branches) {
            return Err(Error::Size { argument: "branches", expected: "1 or 2", got: self.branches });
        }
        let rows = product("hidden", "[branches·M, H]", &[self.branches, m, h])?;
        length("hidden", "[branches·M, H]", hidden, rows)?;
        loss.check_contents()?;
        if let Some(bias) = self.bias {
            length("bias", "[V]", bias, v)?;
        }
        if let Some(gram) = self.gram {
            length("gram", "[H, H]", gram, product("gram", "[H, H]", &[h, h])?)?;
        }
        if let Some(Lora { rank, lora_a, lora_b, scale }) = self.lora {
            nonzero("rank", rank)?;
            length("lora_b", "[V, r]", lora_b, product("lora_b", "[V, r]", &[v, rank])?)?;
            length("lora_a", "[r, H]", lora_a, product("lora_a", "[r, H]", &[rank, h])?)?;
            super::low_rank_linear::check_scale(scale)?;
        }
        // As they are multiplied with.
        let rounded = |value: f64| T::from_f64(value).to_f64();
        if !rounded(self.logit_scale).is_finite() || rounded(self.logit_scale) == 0.0 {
            let (argument, expected) = ("logit_scale", "finite and not 0");
            return Err(Error::Value { argument, expected, got: self.logit_scale });
        }
        if let Some(got) = self.soft_cap.filter(|&cap| !(rounded(cap).is_finite() && rounded(cap) > 0.0)) {
            return Err(Error::Value { argument: "soft_cap", expected: "finite and more than 0", got });
        }
        if let Some(rows) = self.chunk_rows {
            nonzero("chunk_rows", rows)?;
        }
        let rank = self.lora.map(|lora| lora.rank);
        for (argument, shape, grad, expected, is_there) in [
            ("grads.hidden", "[branches·M, H]", &grads.hidden, rows, true),
            ("grads.weight", "[V, H]", &grads.weight, v * h, true),
            ("grads.bias", "[V]", &grads.bias, v, self.bias.is_some()),
            ("grads.lora_b", "[V, r]", &grads.lora_b, v * rank.unwrap_or(0), rank.is_some()),
            ("grads.lora_a", "[r, H]", &grads.lora_a, rank.unwrap_or(0) * h, rank.is_some()),
        ] {
            let Some(grad) = grad else { continue };
            if !is_there {
                return Err(Error::Argument {
                    argument,
                    problem: "is asked for without what it is the gradient to",
                });
            }
            length(argument, shape, grad, expected)?;
        }
        Ok(())
    }

    /// The loss of some rows.
    fn loss<'b>(&'b self, labels: &'b [i64]) -> Loss<'b, T> {
        Loss { settings: self.settings, targets: Targets::Labels(labels), class_weights: self.class_weights }
    }

    /// Whether the Gram matrix stands for the logits of branch 1; `trains_weight`: whether there is a gradient to it.
    fn has_gram(&self, trains_weight: bool) -> bool {
        self.branches == 2
            && self.soft_cap.is_none()
            && self.settings.takes_gram(
                self.labels.len(),
                self.hidden_size,
                self.gram.is_some(),
                trains_weight,
            )
    }

    /// Computes the loss of `hidden` (`[2M, H]`, or `[M, H]` for one branch), and the gradients that are wanted.
    ///
    /// On an error nothing is written.
    ///
    /// # Errors
    /// If a size is zero or overflows, a slice has another length than its shape, a setting or a class weight is out of range, a label
    /// is neither a token nor the ignored one, or a gradient to what is absent is asked for.
    #[inline(never)]
    pub fn evaluate(&self, hidden: &[T], grads: LmHeadGrads<&mut [T]>) -> Result<LossValues> {
        self.check(hidden, &grads)?;
        let (v, h, m) = (self.settings.classes, self.hidden_size, self.labels.len());
        let denominators = self.loss(self.labels).denominators(m);
        let mut pass = Pass::new(self, grads, denominators);
        let rows = self.chunk_rows.unwrap_or(CHUNK.div_ceil(v).next_multiple_of(16)).min(m);
        let (first, second) = hidden.split_at(m * h);
        let mut sums = (0.0, 0.0);
        for start in (0..m).step_by(rows) {
            let at = start..m.min(start + rows);
            let h0 = &first[at.start * h..at.end * h];
            let h1 = (self.branches == 2).then(|| &second[at.start * h..at.end * h]);
            let found = pass.chunk(at, h0, h1);
            sums = (sums.0 + found.0, sums.1 + found.1);
        }
        pass.finish();
        Ok(self.loss(self.labels).values(sums, denominators))
    }
}

/// One call: what it writes to, and what it holds between chunks.
struct Pass<'a, T> {
    head: &'a LmHead<'a, T>,
    grads: LmHeadGrads<&'a mut [T]>,
    denominators: (f64, f64),
    /// `a`.
    scale: T,
    gram: Option<Gram<T>>,
    /// Of both branches one behind the other, `[2·rows, V]` or `[rows, V]`.
    logits: Vec<T>,
    gradient: Vec<T>,
    /// `Δh` of a chunk, and `Δh·G`.
    delta: Vec<T>,
    product: Vec<T>,
}

/// The Gram matrix of the whole weight, LoRA included, and what its gradients need.
struct Gram<T> {
    /// `[H, H]`, of `W + s·B·A`, centred if the divergence is.
    matrix: Vec<T>,
    /// What a squared difference of uncentred logits is multiplied by: a², or a²/V.
    factor: f64,
    /// Column means of `W [H]` and `B [r]`, for centred differences.
    means: Option<[Vec<T>; 2]>,
    /// `WᵀB [H, r]` and `BᵀB [r, r]`, centred if the divergence is.
    lora: Option<[Vec<T>; 2]>,
    /// `ΔhᵀΔh [H, H]` of all chunks, for gradients to the weight.
    outer: Option<Vec<T>>,
}

fn zeros<T: Real>(len: usize) -> Vec<T> {
    vec![T::zero(); len]
}

impl<'a, T: Real> Pass<'a, T> {
    fn new(head: &'a LmHead<'a, T>, grads: LmHeadGrads<&'a mut [T]>, denominators: (f64, f64)) -> Self {
        let trains = grads.weight.is_some() || grads.lora_a.is_some() || grads.lora_b.is_some();
        let gram = head.has_gram(grads.weight.is_some()).then(|| Gram::new(head, trains));
        let mut pass = Self {
            head,
            grads,
            denominators,
            scale: T::from_f64(head.logit_scale),
            gram,
            logits: Vec::new(),
            gradient: Vec::new(),
            delta: Vec::new(),
            product: Vec::new(),
        };
        // Chunks add to these.
        let LmHeadGrads { weight, bias, lora_b, lora_a, .. } = &mut pass.grads;
        for grad in [weight, bias, lora_b, lora_a].into_iter().flatten() {
            grad.fill(T::zero());
        }
        pass
    }

    fn wants_gradients(&self) -> bool {
        let LmHeadGrads { hidden, weight, bias, lora_b, lora_a } = &self.grads;
        [hidden, weight, bias, lora_b, lora_a].iter().any(|grad| grad.is_some())
    }

    /// Sums of criterion and divergence of some rows; writes or adds to their gradients.
    fn chunk(&mut self, at: std::ops::Range<usize>, h0: &[T], h1: Option<&[T]>) -> (f64, f64) {
        let (v, h, rows) = (self.head.settings.classes, self.head.hidden_size, at.len());
        let labels = &self.head.labels[at.clone()];
        if let Some(h1) = h1 {
            self.delta.resize(rows * h, T::zero());
            for (i, delta) in self.delta[..rows * h].chunks_mut(h).enumerate() {
                if self.head.settings.labelled_only && Some(labels[i]) == self.head.settings.ignore_label {
                    delta.fill(T::zero());
                    continue;
                }
                let (h0, h1) = (&h0[i * h..][..h], &h1[i * h..][..h]);
                delta.iter_mut().zip(h0).zip(h1).for_each(|((delta, &a), &b)| *delta = a - b);
            }
        }
        // The logits, and with them the second branch unless the Gram matrix stands for it.
        let has_second = h1.is_some() && self.gram.is_none();
        let parts = if has_second { 2 } else { 1 };
        let mut logits = std::mem::take(&mut self.logits);
        let mut gradient = std::mem::take(&mut self.gradient);
        logits.resize(parts * rows * v, T::zero());
        gradient.resize(if self.wants_gradients() { parts * rows * v } else { 0 }, T::zero());
        let (first, second) = logits.split_at_mut(rows * v);
        self.logits(h0, first, true);
        let capped = self.head.soft_cap.map(T::from_f64);
        let consistency = match (h1, capped) {
            (Some(h1), Some(_)) if has_second => {
                self.logits(h1, second, true);
                Consistency::TwoBranch
            }
            (Some(_), None) if has_second => {
                self.logits(&self.delta[..rows * h], second, false);
                Consistency::Difference
            }
            _ => Consistency::None,
        };
        if let Some(cap) = capped {
            soft_cap(&mut logits, cap);
        }
        let wanted = (!gradient.is_empty()).then_some(&mut gradient[..]);
        let mut sums = self.head.loss(labels).sums(&logits, &consistency, wanted, self.denominators);
        if let Some(cap) = capped {
            // d cap·tanh(x/cap) = 1 − (l/cap)².
            zip1(&mut gradient, &logits[..], |g, l| *g *= T::one() - l / cap * (l / cap));
        }
        if !gradient.is_empty() {
            let (first, second) = gradient.split_at(rows * v);
            self.backward(h0, first, at.start);
            if let (Some(h1), true) = (h1, has_second) {
                self.backward(h1, second, self.head.labels.len() + at.start);
            }
        }
        (self.logits, self.gradient) = (logits, gradient);
        if h1.is_some() && self.gram.is_some() {
            sums.1 = self.squared_difference(at);
        }
        sums
    }

    /// `a·(h·(W + s·B·A)ᵀ + b)`.
    fn logits(&self, hidden: &[T], logits: &mut [T], has_bias: bool) {
        let LmHead { settings, hidden_size: h, weight, bias, lora, .. } = *self.head;
        let v = settings.classes;
        let rows = hidden.len() / h;
        let (x, w) = (mat(hidden, rows, h), mat(weight, v, h));
        let par = all_threads();
        gemm_scaled(mat_mut(logits, rows, v), Accum::Replace, self.scale, x, w.transpose(), par);
        if let Some(Lora { rank: r, lora_a, lora_b, scale }) = lora {
            let mut s = zeros(rows * r);
            gemm(mat_mut(&mut s, rows, r), Accum::Replace, x, mat(lora_a, r, h).transpose(), par);
            let (s, b) = (mat(&s, rows, r), mat(lora_b, v, r));
            gemm_scaled(mat_mut(logits, rows, v), Accum::Add, self.scale * scale, s, b.transpose(), par);
        }
        if let (Some(bias), true) = (bias, has_bias) {
            for row in logits.chunks_mut(v) {
                zip1(row, bias, |l, b| *l += self.scale * b);
            }
        }
    }

    /// Gradients from those to the logits of some rows; `row`: the first of them in `h`.
    fn backward(&mut self, hidden: &[T], dl: &[T], row: usize) {
        let LmHead { settings, hidden_size: h, weight, lora, .. } = *self.head;
        let v = settings.classes;
        let rows = hidden.len() / h;
        let (a, par) = (self.scale, all_threads());
        let (x, w, e) = (mat(hidden, rows, h), mat(weight, v, h), mat(dl, rows, v));
        let LmHeadGrads { hidden: dh, weight: dw, bias: db, lora_b, lora_a } = &mut self.grads;
        let mut dh = dh.as_mut().map(|dh| &mut dh[row * h..][..rows * h]);
        if let Some(dh) = &mut dh {
            gemm_scaled(mat_mut(dh, rows, h), Accum::Replace, a, e, w, par);
        }
        if let Some(dw) = dw {
            gemm_scaled(mat_mut(dw, v, h), Accum::Add, a, e.transpose(), x, par);
        }
        if let Some(db) = db {
            for row in dl.chunks(v) {
                zip1(db, row, |db, dl| *db += a * dl);
            }
        }
        let Some(Lora { rank: r, lora_a: factor_a, lora_b: factor_b, scale }) = lora else { return };
        let (factor_a, factor_b) = (mat(factor_a, r, h), mat(factor_b, v, r));
        if dh.is_some() || lora_a.is_some() {
            let mut ds = zeros(rows * r);
            gemm_scaled(mat_mut(&mut ds, rows, r), Accum::Replace, a * scale, e, factor_b, par);
            let ds = mat(&ds, rows, r);
            if let Some(dh) = dh {
                gemm(mat_mut(dh, rows, h), Accum::Add, ds, factor_a, par);
            }
            if let Some(lora_a) = lora_a {
                gemm(mat_mut(lora_a, r, h), Accum::Add, ds.transpose(), x, par);
            }
        }
        if let Some(lora_b) = lora_b {
            let mut s = zeros(rows * r);
            gemm(mat_mut(&mut s, rows, r), Accum::Replace, x, factor_a.transpose(), par);
            gemm_scaled(mat_mut(lora_b, v, r), Accum::Add, a * scale, e.transpose(), mat(&s, rows, r), par);
        }
    }

    /// What a squared difference weighs in gradients: `2λ/D'`, and what it is scaled by.
    fn pull(&self, factor: f64) -> T {
        let weight =
            if self.denominators.1 == 0.0 { 0.0 } else { self.head.settings.lambda / self.denominators.1 };
        T::from_f64(2.0 * weight * factor)
    }

    /// `Σ Δh·G·Δhᵀ` over some rows, and the gradients of their distance.
    fn squared_difference(&mut self, at: std::ops::Range<usize>) -> f64 {
        let (h, m, rows) = (self.head.hidden_size, self.head.labels.len(), at.len());
        let Some(gram) = &mut self.gram else { return 0.0 };
        let delta = &self.delta[..rows * h];
        self.product.resize(rows * h, T::zero());
        let product = &mut self.product[..rows * h];
        let x = mat(delta, rows, h);
        gemm(mat_mut(product, rows, h), Accum::Replace, x, mat(&gram.matrix, h, h), all_threads());
        if let Some(outer) = &mut gram.outer {
            gemm(mat_mut(outer, h, h), Accum::Add, x.transpose(), x, all_threads());
        }
        let factor = gram.factor;
        let pull = self.pull(factor);
        let (delta, product) = (&self.delta[..rows * h], &self.product[..rows * h]);
        if let Some(dh) = &mut self.grads.hidden {
            let (first, second) = dh.split_at_mut(m * h);
            zip1(&mut first[at.start * h..at.end * h], product, |g, q| *g += pull * q);
            zip1(&mut second[at.start * h..at.end * h], product, |g, q| *g = -pull * q);
        }
        factor * delta.iter().zip(product).map(|(d, q)| d.to_f64() * q.to_f64()).sum::<f64>()
    }

    /// Adds what all chunks together give to the gradients of the weight.
    fn finish(&mut self) {
        let Some(Gram { factor, means, lora: products, outer: Some(outer), .. }) = &self.gram else { return };
        let LmHead { settings, hidden_size: h, lora, .. } = *self.head;
        let v = settings.classes;
        let (pull, par) = (self.pull(*factor), all_threads());
        let s = mat(outer, h, h);
        let LmHeadGrads { weight: dw, lora_b, lora_a, .. } = &mut self.grads;
        if let Some(dw) = dw {
            add_weight(mat_mut(dw, v, h), pull, self.head, means.as_ref(), s);
        }
        let (Some(Lora { rank: r, lora_a: factor_a, scale, .. }), Some([cross, square])) = (lora, products)
        else {
            return;
        };
        let factor_a = mat(factor_a, r, h);
        if let Some(lora_b) = lora_b {
            // d(s·B·A)·Aᵀ.
            let mut right = zeros(h * r);
            gemm(mat_mut(&mut right, h, r), Accum::Replace, s, factor_a.transpose(), par);
            add_weight(mat_mut(lora_b, v, r), pull * scale, self.head, means.as_ref(), mat(&right, h, r));
        }
        if let Some(lora_a) = lora_a {
            // s·Bᵀ·(W + s·B·A) = s·(crossᵀ + s·square·A).
            let mut left: Vec<T> = zeros(r * h);
            transpose(cross, &mut left, h);
            gemm_scaled(mat_mut(&mut left, r, h), Accum::Add, scale, mat(square, r, r), factor_a, par);
            gemm_scaled(mat_mut(lora_a, r, h), Accum::Add, pull * scale, mat(&left, r, h), s, par);
        }
    }
}

/// `out += factor·P·(W + s·B·A)·right`, where `P` centres the columns if there are means.
fn add_weight<T: Real>(
    mut out: MatMut<'_, T>,
    factor: T,
    head: &LmHead<'_, T>,
    means: Option<&[Vec<T>; 2]>,
    right: MatRef<'_, T>,
) {
    let LmHead { settings, hidden_size: h, weight, lora, .. } = *head;
    let (v, columns, par) = (settings.classes, right.ncols(), all_threads());
    gemm_scaled(out.as_mut(), Accum::Add, factor, mat(weight, v, h), right, par);
    let mut low = None;
    if let Some(Lora { rank: r, lora_a, lora_b, scale }) = lora {
        let mut of_a = zeros(r * columns);
        gemm_scaled(mat_mut(&mut of_a, r, columns), Accum::Replace, scale, mat(lora_a, r, h), right, par);
        gemm_scaled(out.as_mut(), Accum::Add, factor, mat(lora_b, v, r), mat(&of_a, r, columns), par);
        low = Some((r, of_a));
    }
    let Some([of_weight, of_b]) = means else { return };
    let mut mean = zeros(columns);
    gemm(mat_mut(&mut mean, 1, columns), Accum::Replace, mat(of_weight, 1, h), right, par);
    if let Some((r, of_a)) = low {
        gemm(mat_mut(&mut mean, 1, columns), Accum::Add, mat(of_b, 1, r), mat(&of_a, r, columns), par);
    }
    for i in 0..v {
        for (j, &mean) in mean.iter().enumerate() {
            out[(i, j)] -= factor * mean;
        }
    }
}

impl<T: Real> Gram<T> {
    fn new(head: &LmHead<'_, T>, of_weight: bool) -> Self {
        let LmHead { settings, hidden_size: h, weight, lora, .. } = *head;
        let (v, par) = (settings.classes, all_threads());
        let w = mat(weight, v, h);
        let mut matrix = match head.gram {
            Some(gram) => gram.to_vec(),
            None => {
                let mut gram = zeros(h * h);
                gemm(mat_mut(&mut gram, h, h), Accum::Replace, w.transpose(), w, par);
                gram
            }
        };
        let factor = match settings.divergence {
            Divergence::MeanSquaredDifference => head.logit_scale * head.logit_scale / v as f64,
            _ => head.logit_scale * head.logit_scale,
        };
        let means = (settings.divergence == Divergence::CenteredSquaredDifference).then(|| {
            let of_b = lora.map_or(Vec::new(), |lora| column_means(lora.lora_b, lora.rank));
            [column_means(weight, h), of_b]
        });
        let minus = -T::from_f64(v as f64);
        if let Some([mean, _]) = &means {
            gemm_scaled(mat_mut(&mut matrix, h, h), Accum::Add, minus, mat(mean, h, 1), mat(mean, 1, h), par);
        }
        let lora = lora.map(|Lora { rank: r, lora_a, lora_b, scale }| {
            let (a, b) = (mat(lora_a, r, h), mat(lora_b, v, r));
            let (mut cross, mut square) = (zeros(h * r), zeros(r * r));
            gemm(mat_mut(&mut cross, h, r), Accum::Replace, w.transpose(), b, par);
            gemm(mat_mut(&mut square, r, r), Accum::Replace, b.transpose(), b, par);
            if let Some([of_weight, of_b]) = &means {
                let row = mat(of_b, 1, r);
                gemm_scaled(mat_mut(&mut cross, h, r), Accum::Add, minus, mat(of_weight, h, 1), row, par);
                gemm_scaled(mat_mut(&mut square, r, r), Accum::Add, minus, mat(of_b, r, 1), row, par);
            }
            // G + s·(cross·A + Aᵀ·crossᵀ) + s²·Aᵀ·square·A.
            let crossed = mat(&cross, h, r);
            gemm_scaled(mat_mut(&mut matrix, h, h), Accum::Add, scale, crossed, a, par);
            gemm_scaled(
                mat_mut(&mut matrix, h, h),
                Accum::Add,
                scale,
                a.transpose(),
                crossed.transpose(),
                par,
            );
            let mut right = zeros(r * h);
            gemm(mat_mut(&mut right, r, h), Accum::Replace, mat(&square, r, r), a, par);
            let right = mat(&right, r, h);
            gemm_scaled(mat_mut(&mut matrix, h, h), Accum::Add, scale * scale, a.transpose(), right, par);
            [cross, square]
        });
        Self { matrix, factor, means, lora, outer: of_weight.then(|| zeros(h * h)) }
    }
}

/// Means of the columns of a row-major matrix.
fn column_means<T: Real>(matrix: &[T], columns: usize) -> Vec<T> {
    let mut sums = vec![0.0; columns];
    for row in matrix.chunks_exact(columns) {
        zip1(&mut sums, row, |sum, value| *sum += value.to_f64());
    }
    let rows = (matrix.len() / columns) as f64;
    sums.into_iter().map(|sum| T::from_f64(sum / rows)).collect()
}

/// `cap·tanh(l/cap)` in place.
fn soft_cap<T: Real>(logits: &mut [T], cap: T) {
    for l in logits {
        *l = T::from_f64((*l / cap).to_f64().tanh()) * cap;
    }
}
