//! Noise generation on one thread; criterion's B/s count the f32 values of z that are written.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::noise::NoiseShape;

fn noise(c: &mut Criterion) {
    let mut group = c.benchmark_group("noise/fill");
    let generator = common::generator(NoiseShape::PerSample);
    for channels in [10, 64, 768, 3072, 16384] {
        let mut z = vec![0f32; channels];
        group.throughput(Throughput::Bytes(4 * channels as u64));
        group.bench_function(BenchmarkId::from_parameter(channels), |b| {
            b.iter(|| generator.fill(0, 1, 0, 0, &mut z));
        });
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = noise }
criterion_main!(benches);
