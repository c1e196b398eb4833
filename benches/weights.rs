//! Weight builders and their gradients, rank 10; criterion's B/s count each `[N, K]` tensor that is read or written.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{
    LoraFactors, LoraGrads, PromptBias, PromptGrads, lora_mul_weight, lora_mul_weight_backward,
    low_rank_weight, low_rank_weight_backward, merge,
};

const RANK: usize = 10;

fn weights(c: &mut Criterion) {
    let mut group = c.benchmark_group("weights");
    for (k, n) in common::VIT_B.into_iter().chain([(64, 192)]) {
        let bytes = 4 * (n * k) as u64;
        let (weight, grad, bias) = (common::values(n * k), common::values(n * k), common::values(n));
        let (lora_b, lora_a) = (common::values(n * RANK), common::values(RANK * k));
        let (prompt_down, prompt_up) = (common::values(k * RANK), common::values(RANK));
        let (mut out, mut out_bias) = (vec![0.0; n * k], vec![0.0; n]);
        let (mut dd, mut du) = (vec![0.0; n * RANK], vec![0.0; RANK * k]);
        let (mut dpd, mut dpu, mut ddb) = (vec![0.0; k * RANK], vec![0.0; RANK], vec![0.0; n]);
        let lora: LoraFactors<&[_], _> = LoraFactors {
            out_features: n,
            in_features: k,
            rank: RANK,
            lora_b: &lora_b,
            lora_a: &lora_a,
            scale: 1.0,
        };
        let prompt: PromptBias<&[_]> = PromptBias {
            out_features: n,
            in_features: k,
            rank: RANK,
            base_weight: &weight,
            base_bias: Some(&bias),
            prompt_down: &prompt_down,
            prompt_up: &prompt_up,
            delta_bias: Some(&bias),
        };
        let id = |op| BenchmarkId::new(op, format!("{k}->{n}"));

        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(id("low rank"), |b| b.iter(|| low_rank_weight(lora, &mut out)));
        group.bench_function(id("low rank backward"), |b| {
            b.iter(|| low_rank_weight_backward(lora, &grad, LoraGrads { lora_b: &mut dd, lora_a: &mut du }));
        });
        group.bench_function(id("prompt"), |b| b.iter(|| prompt.forward(&mut out_bias)));
        group.bench_function(id("prompt backward"), |b| {
            b.iter(|| {
                let grads: PromptGrads<&mut [_]> =
                    PromptGrads { prompt_down: &mut dpd, prompt_up: &mut dpu, delta_bias: Some(&mut ddb) };
                prompt.backward(&bias, grads)
            });
        });
        group.throughput(Throughput::Bytes(2 * bytes));
        group.bench_function(id("LoRA mul"), |b| b.iter(|| lora_mul_weight(lora, &weight, &mut out)));
        group.bench_function(id("LoRA mul backward"), |b| {
            b.iter(|| {
                lora_mul_weight_backward(lora, &weight, &grad, LoraGrads { lora_b: &mut dd, lora_a: &mut du })
            });
        });
        group.throughput(Throughput::Bytes(3 * bytes));
        group.bench_function(id("merge"), |b| b.iter(|| merge(&mut out, &grad)));
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = weights }
criterion_main!(benches);
