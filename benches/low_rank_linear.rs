//! Low-rank noisy layer (LoRA add), rank 10; criterion's elem/s are FLOP/s.
//!
//! Operations are counted as one GEMM per pass, the frozen layer's, so that the figures compare with a plain
//! GEMM's.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{Base, LowRankGrads, LowRankLinear};

const RANK: usize = 10;

fn low_rank_linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("low_rank_linear");
    for shape in common::layers() {
        let (k, n) = (shape.in_features, shape.out_features);
        let (weight, bias) = (common::values(n * k), common::values(n));
        let (lora_b, lora_a, delta_bias) =
            (common::values(n * RANK), common::values(RANK * k), common::values(n));
        let layer = LowRankLinear {
            shape,
            noise: common::noise(),
            base: Some(Base { weight: &weight, bias: Some(&bias) }),
            rank: RANK,
            lora_b: &lora_b,
            lora_a: &lora_a,
            delta_bias: Some(&delta_bias),
            scale: 1.0,
        };
        let (x, dy) = (common::values(shape.in_rows() * k), common::values(shape.out_rows() * n));
        let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
        let (mut dd, mut du, mut db) = (vec![0.0; n * RANK], vec![0.0; RANK * k], vec![0.0; n]);

        group.throughput(Throughput::Elements(common::product_flop(&shape)));
        group.bench_function(BenchmarkId::new("forward", common::name(&shape)), |b| {
            b.iter(|| layer.forward(&x, &mut y));
        });
        group.bench_function(BenchmarkId::new("backward", common::name(&shape)), |b| {
            b.iter(|| {
                let grads: LowRankGrads<&mut [_]> = LowRankGrads {
                    input: Some(&mut dx),
                    lora_b: Some(&mut dd),
                    lora_a: Some(&mut du),
                    delta_bias: Some(&mut db),
                };
                layer.backward(&x, &dy, grads)
            });
        });
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = low_rank_linear }
criterion_main!(benches);
