//! The formulas of the method in plain `f64` loops. Slow, and kept free of every trick that the crate uses.

use pace_kernels::LinearShape;

/// `a [m, k] · b [k, n]`.
pub fn matmul(m: usize, k: usize, n: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for p in 0..k {
            let row = c[i * n..][..n].iter_mut().zip(&b[p * n..][..n]);
            row.for_each(|(c, b)| *c += a[i * k + p] * b);
        }
    }
    c
}

/// `aᵀ [cols, rows]` of `a [rows, cols]`.
pub fn transpose(rows: usize, cols: usize, a: &[f64]) -> Vec<f64> {
    (0..rows * cols).map(|i| a[(i % rows) * cols + i / rows]).collect()
}

fn hadamard(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn sum_rows(width: usize, a: &[f64]) -> Vec<f64> {
    (0..width).map(|c| a.iter().skip(c).step_by(width).sum()).collect()
}

/// `y = x·W0ᵀ + b0 + z ⊙ (x·ΔWᵀ + Δb)`, every absent part zero.
pub struct Layer<'a> {
    pub shape: LinearShape,
    /// One value per output element, `[M, N]`.
    pub z: &'a [f64],
    pub base_weight: Option<&'a [f64]>,
    pub base_bias: Option<&'a [f64]>,
    pub delta_weight: Option<&'a [f64]>,
    pub delta_bias: Option<&'a [f64]>,
}

/// Gradients of a [`Layer`].
pub struct LayerGrads {
    pub input: Vec<f64>,
    pub delta_weight: Vec<f64>,
    pub delta_bias: Vec<f64>,
}

impl Layer<'_> {
    /// The input rows of all branches: a shared input is written out once per branch.
    fn rows(&self, x: &[f64]) -> Vec<f64> {
        x.repeat(if self.shape.shared_input { self.shape.branches } else { 1 })
    }

    pub fn forward(&self, x: &[f64]) -> Vec<f64> {
        let (m, k, n) = (self.shape.out_rows(), self.shape.in_features, self.shape.out_features);
        let x = self.rows(x);
        let term = |weight: Option<&[f64]>, bias: Option<&[f64]>| {
            let mut y = weight.map_or(vec![0.0; m * n], |w| matmul(m, k, n, &x, &transpose(n, k, w)));
            for (i, y) in y.iter_mut().enumerate() {
                *y += bias.map_or(0.0, |bias| bias[i % n]);
            }
            y
        };
        let base = term(self.base_weight, self.base_bias);
        let adapter = term(self.delta_weight, self.delta_bias);
        (0..m * n).map(|i| base[i] + self.z[i] * adapter[i]).collect()
    }

    pub fn backward(&self, x: &[f64], dy: &[f64]) -> LayerGrads {
        let (m, k, n) = (self.shape.out_rows(), self.shape.in_features, self.shape.out_features);
        let e = hadamard(self.z, dy);
        let through =
            |g: &[f64], weight: Option<&[f64]>| weight.map_or(vec![0.0; m * k], |w| matmul(m, n, k, g, w));
        let (base, adapter) = (through(dy, self.base_weight), through(&e, self.delta_weight));
        let dx: Vec<f64> = base.iter().zip(adapter).map(|(a, b)| a + b).collect();
        let input = if self.shape.shared_input { sum_rows(self.shape.in_rows() * k, &dx) } else { dx };
        let delta_weight = matmul(n, m, k, &transpose(m, n, &e), &self.rows(x));
        LayerGrads { input, delta_weight, delta_bias: sum_rows(n, &e) }
    }
}

/// Sizes of the factors `D [n, r]`, `U [r, k]`.
#[derive(Debug, Clone, Copy)]
pub struct Factors {
    pub n: usize,
    pub k: usize,
    pub r: usize,
    pub scale: f64,
}

impl Factors {
    /// `ΔW = mask ⊙ (scale·B·A)`; LoRA mul has `mask = W0`, LoRA add has none.
    pub fn weight(&self, lora_b: &[f64], lora_a: &[f64], mask: Option<&[f64]>) -> Vec<f64> {
        let product = matmul(self.n, self.r, self.k, lora_b, lora_a);
        (0..product.len()).map(|i| product[i] * self.scale * mask.map_or(1.0, |mask| mask[i])).collect()
    }

    /// `dB = scale·Q·Aᵀ` and `dA = scale·Bᵀ·Q` with `Q = mask ⊙ dΔW`.
    pub fn backward(
        &self,
        lora_b: &[f64],
        lora_a: &[f64],
        mask: Option<&[f64]>,
        delta_weight_grad: &[f64],
    ) -> (Vec<f64>, Vec<f64>) {
        let Self { n, k, r, scale } = *self;
        let q: Vec<f64> =
            (0..n * k).map(|i| scale * delta_weight_grad[i] * mask.map_or(1.0, |mask| mask[i])).collect();
        (matmul(n, k, r, &q, &transpose(r, k, lora_a)), matmul(r, n, k, &transpose(n, r, lora_b), &q))
    }
}

/// `Δb = W0·(Pd·Pu) + b0⊙δb`.
pub fn prompt_bias(
    [n, k, r]: [usize; 3],
    base_weight: &[f64],
    prompt_down: &[f64],
    prompt_up: &[f64],
    biases: Option<(&[f64], &[f64])>,
) -> Vec<f64> {
    let mut out = matmul(n, k, 1, base_weight, &matmul(k, r, 1, prompt_down, prompt_up));
    if let Some((base, delta)) = biases {
        out.iter_mut().zip(hadamard(base, delta)).for_each(|(out, product)| *out += product);
    }
    out
}

/// `dPd = q·Puᵀ` and `dPu = Pdᵀ·q` with `q = W0ᵀ·dΔb`.
pub fn prompt_backward(
    [n, k, r]: [usize; 3],
    base_weight: &[f64],
    prompt_down: &[f64],
    prompt_up: &[f64],
    delta_bias_grad: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let q = matmul(k, n, 1, &transpose(n, k, base_weight), delta_bias_grad);
    (matmul(k, 1, r, &q, prompt_up), matmul(r, k, 1, &transpose(k, r, prompt_down), &q))
}

/// `x ⊙ mask / (mean(mask) + 1e-12)` with the mask of a sample used in every branch.
pub fn drop_path(features: usize, mask: &[f64], x: &[f64]) -> Vec<f64> {
    let mean = mask.iter().sum::<f64>() / mask.len() as f64;
    (0..x.len()).map(|i| x[i] * mask[i / features % mask.len()] / (mean + 1e-12)).collect()
}

/// Settings of the loss.
#[derive(Debug, Clone, Copy)]
pub struct Loss<'a> {
    pub classes: usize,
    pub labels: &'a [i64],
    pub lambda: f64,
    pub label_smoothing: f64,
    pub ignore_label: Option<i64>,
}

impl Loss<'_> {
    /// `([total, cls, pace], gradient to the logits [B, C], gradient to the partner [B, C])`.
    pub fn evaluate(&self, logits: &[f64], partner: Option<&[f64]>) -> ([f64; 3], Vec<f64>, Vec<f64>) {
        let (c, b) = (self.classes, self.labels.len());
        let counts = |label: &i64| Some(*label) != self.ignore_label;
        let labelled = self.labels.iter().filter(|label| counts(label)).count() as f64;
        let (mut cls, mut pace) = (0.0, 0.0);
        let (mut gradient, mut partner_gradient) = (vec![0.0; b * c], vec![0.0; b * c]);
        for (i, label) in self.labels.iter().enumerate() {
            let row = &logits[i * c..][..c];
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = row.iter().map(|l| (l - max).exp()).sum();
            for j in (0..c).filter(|_| counts(label)) {
                let log_probability = row[j] - max - sum.ln();
                let hard = if j as i64 == *label { 1.0 - self.label_smoothing } else { 0.0 };
                let target = hard + self.label_smoothing / c as f64;
                cls -= target * log_probability / labelled;
                gradient[i * c + j] = (log_probability.exp() - target) / labelled;
            }
            for at in i * c..(i + 1) * c {
                let difference = partner.map_or(0.0, |partner| logits[at] - partner[at]);
                pace += difference * difference / b as f64;
                gradient[at] += 2.0 * self.lambda * difference / b as f64;
                partner_gradient[at] = -2.0 * self.lambda * difference / b as f64;
            }
        }
        ([cls + self.lambda * pace, cls, pace], gradient, partner_gradient)
    }
}
