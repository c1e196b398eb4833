//! Shared DropPath; criterion's B/s count the tensor read and the tensor written.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::shared_drop_path;
use pace_kernels::noise::{Key, drop_path_mask};

fn drop_path(c: &mut Criterion) {
    let mut group = c.benchmark_group("drop_path");
    for (batch, tokens, features) in [(4, 197, 768), (40, 50, 64)] {
        let mut mask = vec![0f32; batch];
        drop_path_mask(Key::derive(1, 0, 0), 0.1, 0, &mut mask).expect("a probability");
        let x = common::values(2 * batch * tokens * features);
        let mut y = vec![0.0; x.len()];
        group.throughput(Throughput::Bytes(8 * x.len() as u64));
        group.bench_function(
            BenchmarkId::from_parameter(format!("{}x{tokens} {features}", 2 * batch)),
            |b| {
                b.iter(|| shared_drop_path(2, tokens * features, &mask, &x, &mut y));
            },
        );
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = drop_path }
criterion_main!(benches);
