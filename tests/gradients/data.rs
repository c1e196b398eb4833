//! What the operators are given: a configuration, and every tensor that any of them reads.

use crate::reference;
use pace_kernels::cpu::Base;
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape, philox4x32_10};
use pace_kernels::{LinearShape, Real};

/// `len` numbers in `[-1, 1)` that are exact in `f32`.
pub fn uniform(seed: u32, len: usize) -> Vec<f64> {
    let word = |i: usize| philox4x32_10([i as u32, 0, 0, 0], [seed, 1])[0];
    (0..len).map(|i| f64::from(word(i) as i32 >> 8) / f64::from(1 << 23)).collect()
}

pub fn cast<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}

/// An output before an operator ran: every element has to be overwritten.
pub fn unwritten<T: Real>(len: usize) -> Vec<T> {
    vec![T::from_f64(f64::NAN); len]
}

#[derive(Debug, Clone, Copy)]
pub enum Source {
    Off,
    Generated(NoiseShape),
    Given(NoiseShape),
}

pub const SOURCES: [Source; 5] = [
    Source::Off,
    Source::Generated(NoiseShape::PerSample),
    Source::Generated(NoiseShape::PerToken),
    Source::Given(NoiseShape::PerSample),
    Source::Given(NoiseShape::PerToken),
];

/// One configuration; each operator uses what concerns it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub shape: LinearShape,
    pub source: Source,
    pub rank: usize,
    pub scale: f64,
    pub base: bool,
    pub base_bias: bool,
    pub delta_weight: bool,
    pub delta_bias: bool,
}

/// Every tensor that any operator reads.
#[derive(Clone)]
pub struct Data<T> {
    pub x: Vec<T>,
    /// `[M, N]`: an adapter's output, what lies in `y` before, and the gradient that comes in.
    pub a: Vec<T>,
    pub y: Vec<T>,
    pub dy: Vec<T>,
    pub z: Vec<T>,
    pub w0: Vec<T>,
    pub b0: Vec<T>,
    pub dw: Vec<T>,
    pub db: Vec<T>,
    pub lora_b: Vec<T>,
    pub lora_a: Vec<T>,
    pub prompt_down: Vec<T>,
    pub prompt_up: Vec<T>,
    /// `[N]`, the gradient that comes into a bias.
    pub g: Vec<T>,
    pub mask: Vec<T>,
}

pub type Field = fn(&mut Data<f64>) -> &mut Vec<f64>;
pub const FIELDS: [(&str, Field); 15] = [
    ("x", |d| &mut d.x),
    ("a", |d| &mut d.a),
    ("y", |d| &mut d.y),
    ("dy", |d| &mut d.dy),
    ("z", |d| &mut d.z),
    ("w0", |d| &mut d.w0),
    ("b0", |d| &mut d.b0),
    ("dw", |d| &mut d.dw),
    ("db", |d| &mut d.db),
    ("lora_b", |d| &mut d.lora_b),
    ("lora_a", |d| &mut d.lora_a),
    ("prompt_down", |d| &mut d.prompt_down),
    ("prompt_up", |d| &mut d.prompt_up),
    ("g", |d| &mut d.g),
    ("mask", |d| &mut d.mask),
];

impl Data<f64> {
    pub fn new(case: &Case) -> Self {
        let LinearShape { in_features: k, out_features: n, batch, .. } = case.shape;
        let (m, r) = (case.shape.out_rows(), case.rank);
        let z_rows = match case.source {
            Source::Given(NoiseShape::PerSample) => case.shape.samples(),
            Source::Given(NoiseShape::PerToken) => m,
            Source::Off | Source::Generated(_) => 0,
        };
        let mut mask: Vec<f64> = uniform(14, batch).iter().map(|&u| f64::from(u > 0.0)).collect();
        mask[0] = 1.0;
        Self {
            x: uniform(0, case.shape.in_rows() * k),
            a: uniform(1, m * n),
            y: uniform(2, m * n),
            dy: uniform(3, m * n),
            z: uniform(4, z_rows * n),
            w0: uniform(5, n * k),
            b0: uniform(6, n),
            dw: uniform(7, n * k),
            db: uniform(8, n),
            lora_b: uniform(9, n * r),
            lora_a: uniform(10, r * k),
            prompt_down: uniform(11, k * r),
            prompt_up: uniform(12, r),
            g: uniform(13, n),
            mask,
        }
    }

    pub fn cast<T: Real>(&self) -> Data<T> {
        Data {
            x: cast(&self.x),
            a: cast(&self.a),
            y: cast(&self.y),
            dy: cast(&self.dy),
            z: cast(&self.z),
            w0: cast(&self.w0),
            b0: cast(&self.b0),
            dw: cast(&self.dw),
            db: cast(&self.db),
            lora_b: cast(&self.lora_b),
            lora_a: cast(&self.lora_a),
            prompt_down: cast(&self.prompt_down),
            prompt_up: cast(&self.prompt_up),
            g: cast(&self.g),
            mask: cast(&self.mask),
        }
    }
}

impl Case {
    fn generator(&self, shape: NoiseShape) -> Generator {
        Generator::new(Key::derive(7, 3, 2), 0.5, shape, (1 << 32) - 1).unwrap()
    }

    pub fn noise<'a, T>(&self, z: &'a [T]) -> Noise<&'a [T]> {
        match self.source {
            Source::Off => Noise::Off,
            Source::Generated(shape) => Noise::Generated(self.generator(shape)),
            Source::Given(shape) => Noise::Given { z, shape },
        }
    }

    pub fn base<'a, T>(&self, d: &'a Data<T>) -> Option<Base<&'a [T]>> {
        self.base.then_some(Base { weight: &d.w0, bias: self.base_bias.then_some(&d.b0) })
    }

    /// `z` written out for every output element.
    pub fn z(&self, z: &[f64]) -> Vec<f64> {
        let LinearShape { batch, tokens, out_features: n, .. } = self.shape;
        let mut out = vec![1.0; self.shape.out_rows() * n];
        for (row, out) in out.chunks_mut(n).enumerate() {
            let (sample, token) = (row / tokens, row % tokens);
            match self.source {
                Source::Off => {}
                Source::Generated(shape) => {
                    let (branch, sample) = (sample / batch, sample % batch);
                    self.generator(shape).fill(branch as u8, sample as u64, token as u32, 0, out);
                }
                Source::Given(NoiseShape::PerSample) => out.copy_from_slice(&z[sample * n..][..n]),
                Source::Given(NoiseShape::PerToken) => out.copy_from_slice(&z[row * n..][..n]),
            }
        }
        out
    }

    pub fn factors(&self) -> reference::Factors {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        reference::Factors { n, k, r: self.rank, scale: self.scale }
    }

    pub fn layer<'a>(
        &self,
        d: &'a Data<f64>,
        z: &'a [f64],
        delta_weight: Option<&'a [f64]>,
    ) -> reference::Layer<'a> {
        reference::Layer {
            shape: self.shape,
            z,
            base_weight: self.base.then_some(&d.w0),
            base_bias: (self.base && self.base_bias).then_some(&d.b0),
            delta_weight,
            delta_bias: self.delta_bias.then_some(&d.db),
        }
    }
}
