//! Shapes and inputs that the benchmarks share.

// Every benchmark is a crate of its own and uses its own part of this.
#![allow(dead_code)]

use criterion::Criterion;
use pace_kernels::LinearShape;
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use std::time::Duration;

/// Few samples and short windows: the whole suite takes minutes. For decisions, repeat on a quiet machine.
///
/// The main thread becomes one of the pool's (`RAYON_NUM_THREADS`), as in a training loop that runs inside its pool:
/// a call from outside costs a handover between threads, tens of microseconds.
pub fn criterion() -> Criterion {
    let pool = rayon::ThreadPoolBuilder::new().use_current_thread();
    pool.build_global().expect("each benchmark program builds its pool once");
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args()
}

/// In- and out-features of the linear layers of a ViT-B.
pub const VIT_B: [(usize, usize); 4] = [(768, 768), (768, 2304), (768, 3072), (3072, 768)];

/// Layers to measure: those of a ViT-B on 2×4 images of 197 tokens, and those of a model that trains in seconds on a
/// CPU (2×40 images of 50 tokens; its head sees one token per image).
pub fn layers() -> Vec<LinearShape> {
    let layer = |batch, tokens, in_features, out_features| LinearShape {
        branches: 2,
        batch,
        tokens,
        in_features,
        out_features,
        shared_input: false,
    };
    let mut layers: Vec<_> = VIT_B.iter().map(|&(k, n)| layer(4, 197, k, n)).collect();
    layers.extend([layer(40, 50, 64, 192), layer(40, 1, 64, 10)]);
    layers
}

/// `R×T K→N`.
pub fn name(shape: &LinearShape) -> String {
    format!("{}x{} {}->{}", shape.samples(), shape.tokens, shape.in_features, shape.out_features)
}

/// Operations of one GEMM over all token rows.
pub fn product_flop(shape: &LinearShape) -> u64 {
    2 * (shape.out_rows() * shape.in_features * shape.out_features) as u64
}

/// `len` numbers in ±½ without a pattern that a multiplication could profit from.
pub fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) % 8191) as f32 / 8191.0 - 0.5).collect()
}

pub fn generator(shape: NoiseShape) -> Generator {
    Generator::new(Key::derive(1, 0, 0), 1.0, shape, 0).expect("σ is finite")
}

/// The official default: one draw per (sample, channel).
pub fn noise() -> Noise<&'static [f32]> {
    Noise::Generated(generator(NoiseShape::PerSample))
}
