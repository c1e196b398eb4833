//! Norms for the paper's plots, on one thread; criterion's B/s count what is read.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{fp_distance, grad_norm};

fn norms(c: &mut Criterion) {
    let mut group = c.benchmark_group("norms");
    // The factors of a rank-10 adapter on a ViT-B block's largest layer, and on all 48 of a ViT-B.
    for (layers, len) in [(1, 10 * (768 + 3072)), (48, 10 * (768 + 3072))] {
        let gradients: Vec<_> = (0..layers).map(|_| common::values(len)).collect();
        let gradients: Vec<_> = gradients.iter().map(Vec::as_slice).collect();
        group.throughput(Throughput::Bytes(4 * (layers * len) as u64));
        group
            .bench_function(BenchmarkId::new("gradient", layers * len), |b| b.iter(|| grad_norm(&gradients)));
    }
    let (samples, features) = (64, 768);
    let (a, b) = (common::values(samples * features), common::values(samples * features));
    group.throughput(Throughput::Bytes(8 * a.len() as u64));
    group.bench_function(BenchmarkId::new("FP-distance", format!("{samples}x{features}")), |bench| {
        bench.iter(|| fp_distance(samples, features, &a, &b));
    });
}

criterion_group! { name = benches; config = common::criterion(); targets = norms }
criterion_main!(benches);
