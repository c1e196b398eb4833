//! The head of a language model with its loss, hidden size 512, a vocabulary of 32768, 1024 tokens in each branch: what a second
//! branch costs beside the cross-entropy of one. Elements are multiplications of one GEMM over all logits of a branch.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pace_kernels::cpu::{LmHead, LmHeadGrads};
use pace_kernels::{Divergence, LossSettings};

const TOKENS: usize = 1024;
const HIDDEN: usize = 512;
const VOCABULARY: usize = 32768;

fn lm_head(c: &mut Criterion) {
    let mut group = c.benchmark_group("lm_head");
    group.throughput(Throughput::Elements((TOKENS * HIDDEN * VOCABULARY) as u64));
    let labels: Vec<i64> = (0..TOKENS).map(|i| (i * 7919 % VOCABULARY) as i64).collect();
    let hidden = common::values(2 * TOKENS * HIDDEN);
    let weight = common::values(VOCABULARY * HIDDEN);
    let mut gram = vec![0.0; HIDDEN * HIDDEN];
    let head = LmHead::new(LossSettings::new(VOCABULARY, 0.1), HIDDEN, &labels, &weight);
    head.gram(&mut gram).expect("the shapes agree");
    let mut grad_hidden = vec![0.0; hidden.len()];
    let mut grad_weight = vec![0.0; weight.len()];
    let with = |divergence| LmHead { settings: LossSettings { divergence, ..head.settings }, ..head };
    let one = LmHead { branches: 1, ..head };
    let squared = LmHead { gram: Some(&gram), ..head };
    for (trained, name) in [(false, "frozen"), (true, "trained")] {
        let kinds = [
            ("cross-entropy of one branch", one),
            ("squared difference", if trained { head } else { squared }),
            ("symmetric KL", with(Divergence::SymmetricKl)),
            ("Jensen-Shannon", with(Divergence::JensenShannon)),
        ];
        for (kind, head) in kinds {
            let rows = head.branches * TOKENS * HIDDEN;
            group.bench_function(BenchmarkId::new(kind, name), |b| {
                b.iter(|| {
                    let grads = LmHeadGrads {
                        hidden: Some(&mut grad_hidden[..rows]),
                        weight: trained.then_some(&mut grad_weight[..]),
                        ..LmHeadGrads::default()
                    };
                    head.evaluate(&hidden[..rows], grads)
                });
            });
        }
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = lm_head }
criterion_main!(benches);
