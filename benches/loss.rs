//! Loss with its gradient, 64 samples; criterion's B/s count the logits and gradients of both branches, or, with a
//! history, of the one branch and its rows of the table, read and written.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{Consistency, Loss};
use pace_kernels::{LossSettings, Targets};

const BATCH: usize = 64;

fn loss(c: &mut Criterion) {
    let mut group = c.benchmark_group("loss");
    for classes in [10, 100, 1000] {
        let labels: Vec<i64> = (0..BATCH).map(|i| (i % classes) as i64).collect();
        let index: Vec<i64> = (0..BATCH as i64).rev().collect();
        let settings = LossSettings::new(classes, 1.0);
        let loss = Loss { settings, targets: Targets::Labels(&labels), class_weights: None };
        let one_branch = BATCH * classes;
        let logits = common::values(2 * one_branch);
        let mut gradient = vec![0.0; logits.len()];
        let mut table = common::values(one_branch);
        group.throughput(Throughput::Bytes(16 * one_branch as u64));
        group.bench_function(BenchmarkId::new("two branches", classes), |b| {
            b.iter(|| loss.evaluate(&logits, Consistency::TwoBranch, Some(&mut gradient)));
        });
        group.bench_function(BenchmarkId::new("history", classes), |b| {
            b.iter(|| {
                let history = Consistency::History { table: &mut table, index: &index };
                loss.evaluate(&logits[..one_branch], history, Some(&mut gradient[..one_branch]))
            });
        });
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = loss }
criterion_main!(benches);
