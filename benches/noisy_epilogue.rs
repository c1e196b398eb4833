//! Noisy epilogue; criterion's B/s count what must move: forward reads two tensors and writes one, backward one each.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{noisy_epilogue, noisy_epilogue_backward};
use pace_kernels::noise::{Noise, NoiseShape};

fn epilogue(c: &mut Criterion) {
    let mut group = c.benchmark_group("noisy_epilogue");
    // In-features do not matter here: one layer of each width.
    for shape in common::layers().into_iter().filter(|shape| shape.in_features <= 768) {
        let len = shape.out_rows() * shape.out_features;
        let (a, mut y) = (common::values(len), common::values(len));
        for (kind, noise) in [("BC", NoiseShape::PerSample), ("BTC", NoiseShape::PerToken)] {
            let noise = Noise::Generated(common::generator(noise));
            let id = |pass| {
                let rows = format!("{}x{}", shape.samples(), shape.tokens);
                BenchmarkId::new(format!("{kind} {pass}"), format!("{rows} {}", shape.out_features))
            };
            group.throughput(Throughput::Bytes(12 * len as u64));
            group.bench_function(id("forward"), |b| b.iter(|| noisy_epilogue(shape, noise, &a, &mut y)));
            group.throughput(Throughput::Bytes(8 * len as u64));
            group.bench_function(id("backward"), |b| {
                b.iter(|| noisy_epilogue_backward(shape, noise, &a, &mut y));
            });
        }
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = epilogue }
criterion_main!(benches);
