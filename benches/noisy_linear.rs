//! Dense noisy layer, with ΔW and without (VPT add); criterion's elem/s are FLOP/s.
//!
//! Operations are counted as one GEMM for a forward pass or for dx and one for dΔW: what a layer without noise and
//! with merged weights needs. So the figures compare with a plain GEMM's.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{Base, NoisyLinear, NoisyLinearGrads};

fn noisy_linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("noisy_linear");
    for shape in common::layers() {
        let (k, n) = (shape.in_features, shape.out_features);
        let (weight, delta) = (common::values(n * k), common::values(n * k));
        let (bias, delta_bias) = (common::values(n), common::values(n));
        let dense = NoisyLinear {
            shape,
            noise: common::noise(),
            base: Some(Base { weight: &weight, bias: Some(&bias) }),
            delta_weight: Some(&delta),
            delta_bias: Some(&delta_bias),
            fold: true,
        };
        let prompt = NoisyLinear { delta_weight: None, ..dense };
        let (x, dy) = (common::values(shape.in_rows() * k), common::values(shape.out_rows() * n));
        let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
        let (mut dw, mut db) = (vec![0.0; n * k], vec![0.0; n]);
        let flop = common::product_flop(&shape);

        group.throughput(Throughput::Elements(flop));
        for (kind, layer) in [("dense", &dense), ("prompt", &prompt)] {
            group.bench_function(BenchmarkId::new(format!("{kind} forward"), common::name(&shape)), |b| {
                b.iter(|| layer.forward(&x, &mut y));
            });
        }
        group.bench_function(BenchmarkId::new("prompt backward", common::name(&shape)), |b| {
            b.iter(|| {
                let grads: NoisyLinearGrads<&mut [_]> =
                    NoisyLinearGrads { input: Some(&mut dx), delta_bias: Some(&mut db), delta_weight: None };
                prompt.backward(&x, &dy, grads)
            });
        });
        group.throughput(Throughput::Elements(2 * flop));
        group.bench_function(BenchmarkId::new("dense backward", common::name(&shape)), |b| {
            b.iter(|| {
                let grads: NoisyLinearGrads<&mut [_]> = NoisyLinearGrads {
                    input: Some(&mut dx),
                    delta_weight: Some(&mut dw),
                    delta_bias: Some(&mut db),
                };
                dense.backward(&x, &dy, grads)
            });
        });
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = noisy_linear }
criterion_main!(benches);
