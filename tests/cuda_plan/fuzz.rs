//! Plans of random sizes, up to the largest there are, over tensors that fit them or not: a plan or an error, never a panic.

use pace_kernels::cuda::{
    Base, Buffer, DType, Direction, DropPath, Family, FpDistance, Gpu, GradNorm, LmHead, LmHeadOutputs, Lora,
    LoraFactors, LoraGrads, LoraMulLinear, LoraMulLinearGrads, Loss, LossStatus, LowRankGrads, LowRankLinear,
    MaskSource, Merge, MergeSign, NoiseFill, NoisyEpilogue, NoisyLinear, NoisyLinearGrads, Partner, Prompt,
    PromptBias, PromptGrads, Source,
};
use pace_kernels::noise::{Generator, Key, NoiseShape};
use pace_kernels::{Divergence, LinearShape, LossSettings, Targets};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// A source of arguments.
struct Arguments<'a> {
    random: &'a mut dyn Rng,
    address: u64,
    /// Of 64, how many sizes and tensors are wild.
    wild: u32,
}

impl Arguments<'_> {
    fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }

    fn is_wild(&mut self) -> bool {
        self.random.random_range(0..64) < self.wild
    }

    fn size(&mut self) -> usize {
        if !self.is_wild() {
            return 1 + self.below(48);
        }
        const HOSTILE: [usize; 10] = [
            0,
            1 << 16,
            1 << 24,
            1 << 31,
            (1 << 31) + 1,
            1 << 32,
            1 << 40,
            1 << 61,
            usize::MAX - 1,
            usize::MAX,
        ];
        match self.below(12) {
            i if i < HOSTILE.len() => HOSTILE[i],
            _ => self.random.random::<u64>() as usize >> self.below(64),
        }
    }

    /// A tensor of these sizes, as far as there are so many elements; or another.
    fn tensor(&mut self, sizes: &[usize]) -> Buffer {
        let mut len = sizes.iter().fold(1usize, |len, &size| len.saturating_mul(size));
        let mut address = self.address;
        self.address =
            self.address.wrapping_add((len as u64).saturating_mul(8).saturating_add(4096) & 0xffff_ffff_f000);
        if self.is_wild() {
            match self.below(6) {
                0 => len = self.below(100),
                1 => len = len.wrapping_sub(1),
                2 => address = 0,
                3 => address |= 1,
                4 => address = u64::MAX - self.below(4096) as u64,
                _ => address = self.random.random(),
            }
        }
        Buffer { address, len }
    }

    fn maybe(&mut self, sizes: &[usize]) -> Option<Buffer> {
        (self.below(3) > 0).then(|| self.tensor(sizes))
    }

    fn shape(&mut self) -> LinearShape {
        LinearShape {
            branches: if self.is_wild() { self.size() } else { 1 + self.below(2) },
            batch: self.size(),
            tokens: self.size(),
            in_features: self.size(),
            out_features: self.size(),
            shared_input: self.below(2) == 0,
        }
    }

    fn generator(&mut self) -> Generator {
        let shape = if self.below(2) == 0 { NoiseShape::PerToken } else { NoiseShape::PerSample };
        let first = if self.is_wild() { (1 << 56) - 1 } else { 7 };
        Generator::new(Key([1, 2]), 0.5, shape, first).unwrap()
    }

    fn noise(&mut self, shape: &LinearShape) -> Source {
        let generator = self.generator();
        let noise_shape = generator.shape();
        let tokens = if noise_shape == NoiseShape::PerToken { shape.tokens } else { 1 };
        match self.below(4) {
            0 => Source::Off,
            1 => Source::Generated(generator),
            2 => Source::Keyed { generator, key: self.tensor(&[1]) },
            _ => Source::Given {
                z: self.tensor(&[shape.samples(), tokens, shape.out_features]),
                shape: noise_shape,
            },
        }
    }

    fn loss_settings(&mut self, classes: usize) -> LossSettings {
        let divergence = match self.below(6) {
            0 => Divergence::SquaredDifference,
            1 => Divergence::MeanSquaredDifference,
            2 => Divergence::CenteredSquaredDifference,
            3 => Divergence::SymmetricKl,
            4 => Divergence::Kl { temperature: 2.0, detach_target: self.below(2) == 0 },
            _ => Divergence::JensenShannon,
        };
        LossSettings {
            divergence,
            ignore_label: (self.below(2) == 0).then_some(-100),
            labelled_only: self.below(4) == 0,
            both_branches: self.below(4) == 0,
            denominator: (self.below(4) == 0).then_some(3.0),
            ..LossSettings::new(classes, 0.5)
        }
    }

    fn dtype(&mut self) -> DType {
        [DType::F32, DType::F16, DType::BF16][self.below(3)]
    }

    fn gpu(&mut self) -> Gpu {
        let gpu = [Gpu::A100, Gpu::RTX_4090, Gpu::H100][self.below(3)];
        match self.below(4) {
            3 => Gpu::H100,
            i => gpu.with_family(Family::ALL[i]),
        }
    }

    fn base(&mut self, n: usize, k: usize) -> Base<Buffer> {
        Base { weight: self.tensor(&[n, k]), bias: self.maybe(&[n]) }
    }

    fn workspace(&mut self, len: usize) -> Buffer {
        self.tensor(&[len])
    }
}

/// Plans both passes of a layer; how many there were.
fn a_layer(a: &mut Arguments<'_>) -> usize {
    let shape = a.shape();
    let (noise, gpu, dtype) = (a.noise(&shape), a.gpu(), a.dtype());
    let (k, n, r, p) = (shape.in_features, shape.out_features, a.size(), a.size());
    let (x, y, dy) =
        (a.tensor(&[shape.in_rows(), k]), a.tensor(&[shape.out_rows(), n]), a.tensor(&[shape.out_rows(), n]));
    let (input, delta_bias) = (a.maybe(&[shape.in_rows(), k]), a.maybe(&[n]));
    let (grad_a, grad_b, grad_bias) = (a.maybe(&[r, k]), a.maybe(&[n, r]), a.maybe(&[n]));
    let (lora_a, lora_b) = (a.tensor(&[r, k]), a.tensor(&[n, r]));
    let (fold, allow_tf32) = (a.below(2) == 0, a.below(2) == 0);
    let plans = match a.below(3) {
        0 => {
            let base = (a.below(4) > 0).then(|| a.base(n, k));
            let layer = NoisyLinear {
                shape,
                noise,
                base,
                delta_weight: a.maybe(&[n, k]),
                delta_bias,
                fold,
                allow_tf32,
            };
            let workspace = a.workspace(layer.workspace_len(&gpu, dtype));
            let grads = NoisyLinearGrads { input, delta_weight: a.maybe(&[n, k]), delta_bias: grad_bias };
            [
                layer.forward(&gpu, dtype, x, y, workspace),
                layer.backward(&gpu, dtype, x, dy, grads, workspace),
            ]
        }
        1 => {
            let base = (a.below(4) > 0).then(|| a.base(n, k));
            let layer = LowRankLinear {
                shape,
                noise,
                base,
                rank: r,
                lora_b,
                lora_a,
                delta_bias,
                scale: 1.5,
                allow_tf32,
            };
            let (workspace, s) =
                (a.workspace(layer.workspace_len(&gpu, dtype)), a.tensor(&[shape.in_rows(), r]));
            let grads = LowRankGrads { input, lora_b: grad_b, lora_a: grad_a, delta_bias: grad_bias };
            [
                layer.forward(&gpu, dtype, x, s, y, workspace),
                layer.backward(&gpu, dtype, x, s, dy, grads, workspace),
            ]
        }
        _ => {
            let lora = (a.below(3) > 0).then_some(Lora { rank: r, lora_a, lora_b, scale: 1.5 });
            let prompt =
                (a.below(3) > 0).then(|| Prompt { rank: p, down: a.tensor(&[k, p]), up: a.tensor(&[p]) });
            let (grad_down, grad_up) = (a.maybe(&[k, p]), a.maybe(&[p]));
            let base = a.base(n, k);
            let layer = LoraMulLinear { shape, noise, base, lora, prompt, delta_bias, fold, allow_tf32 };
            let workspace = a.workspace(layer.workspace_len(&gpu, dtype));
            let grads = LoraMulLinearGrads {
                input,
                lora_a: grad_a.filter(|_| lora.is_some()),
                lora_b: grad_b.filter(|_| lora.is_some()),
                prompt_down: grad_down.filter(|_| prompt.is_some()),
                prompt_up: grad_up.filter(|_| prompt.is_some()),
                delta_bias: grad_bias,
            };
            [
                layer.forward(&gpu, dtype, x, y, workspace),
                layer.backward(&gpu, dtype, Some(x), dy, grads, workspace),
            ]
        }
    };
    plans.into_iter().filter(|plan| plan.is_ok()).count()
}

/// The same for what builds weights.
fn a_weight(a: &mut Arguments<'_>) -> usize {
    let (n, k, r, dtype) = (a.size(), a.size(), a.size(), a.dtype());
    let plans = if a.below(2) == 0 {
        let lora = LoraFactors {
            out_features: n,
            in_features: k,
            rank: r,
            lora_b: a.tensor(&[n, r]),
            lora_a: a.tensor(&[r, k]),
            scale: 1.5,
        };
        let (base, out, dout) = (a.maybe(&[n, k]), a.tensor(&[n, k]), a.tensor(&[n, k]));
        let grads = LoraGrads { lora_b: a.tensor(&[n, r]), lora_a: a.tensor(&[r, k]) };
        let workspace = a.workspace(lora.workspace_len(dtype));
        [lora.weight(dtype, base, out), lora.backward(dtype, base, dout, grads, workspace)]
    } else {
        let prompt = PromptBias {
            out_features: n,
            in_features: k,
            rank: r,
            base_weight: a.tensor(&[n, k]),
            base_bias: a.maybe(&[n]),
            prompt_down: a.tensor(&[k, r]),
            prompt_up: a.tensor(&[r]),
            delta_bias: a.maybe(&[n]),
        };
        let (out, dout) = (a.tensor(&[n]), a.tensor(&[n]));
        let grads = PromptGrads {
            prompt_down: a.tensor(&[k, r]),
            prompt_up: a.tensor(&[r]),
            delta_bias: a.maybe(&[n]),
        };
        let workspace = a.workspace(prompt.workspace_len(dtype));
        [prompt.forward(dtype, out), prompt.backward(dtype, dout, grads, workspace)]
    };
    plans.into_iter().filter(|plan| plan.is_ok()).count()
}

/// The same for losses.
fn a_loss(a: &mut Arguments<'_>) -> usize {
    let (batch, classes, dtype) = (a.size(), a.size(), a.dtype());
    let settings = a.loss_settings(classes);
    let row = [batch, classes];
    let partner = match a.below(4) {
        0 => Partner::None,
        1 => Partner::OtherBranch,
        2 => Partner::Difference,
        _ => {
            let samples = a.size();
            Partner::History { table: a.tensor(&[samples, classes]), index: a.tensor(&[batch]) }
        }
    };
    let branches = if matches!(partner, Partner::OtherBranch | Partner::Difference) { 2 } else { 1 };
    let logits = [branches, batch, classes];
    let loss = Loss {
        settings,
        dtype,
        logits: a.tensor(&logits),
        targets: match a.below(4) {
            0 => Targets::Probabilities(a.tensor(&row)),
            1 => Targets::Values(a.tensor(&row)),
            _ => Targets::Labels(a.tensor(&[batch])),
        },
        class_weights: (a.below(4) == 0).then(|| a.tensor(&[classes])),
        counted: (a.below(4) == 0).then(|| a.tensor(&[batch, 2])),
        partner,
        gradient: a.maybe(&logits),
        values: a.tensor(&[3]),
        status: a.tensor(&[LossStatus::WORDS]),
        accumulate: a.below(4) == 0,
        first_row: if a.is_wild() { a.size() } else { 0 },
        workspace: a.workspace(settings.workspace_len(batch)),
    };
    usize::from(loss.plan().is_ok())
}

/// The same for the head of a language model, and for its Gram matrix.
fn a_head(a: &mut Arguments<'_>) -> usize {
    let (tokens, hidden_size, classes, rank, dtype, gpu) =
        (a.size(), a.size(), a.size(), a.size(), a.dtype(), a.gpu());
    let branches = if a.is_wild() { a.size() } else { 1 + a.below(2) };
    let (lora_a, lora_b) = (a.tensor(&[rank, hidden_size]), a.tensor(&[classes, rank]));
    let (labels, weight) = (a.tensor(&[tokens]), a.tensor(&[classes, hidden_size]));
    let head = LmHead {
        branches,
        bias: a.maybe(&[classes]),
        lora: (a.below(3) == 0).then_some(Lora { rank, lora_a, lora_b, scale: 0.5 }),
        class_weights: (a.below(4) == 0).then(|| a.tensor(&[classes])),
        gram: a.maybe(&[hidden_size, hidden_size]),
        soft_cap: (a.below(4) == 0).then_some(30.0),
        chunk_rows: (a.below(2) == 0).then(|| a.size()),
        allow_tf32: a.below(2) == 0,
        ..LmHead::new(a.loss_settings(classes), tokens, hidden_size, labels, weight)
    };
    let rows = [branches, tokens, hidden_size];
    let trained = a.maybe(&[classes, hidden_size]);
    let outputs = LmHeadOutputs {
        hidden: a.maybe(&rows),
        weight: trained,
        bias: a.maybe(&[classes]).filter(|_| head.bias.is_some()),
        lora_b: a.maybe(&[classes, rank]).filter(|_| head.lora.is_some()),
        lora_a: a.maybe(&[rank, hidden_size]).filter(|_| head.lora.is_some()),
        values: a.tensor(&[3]),
        status: a.tensor(&[LossStatus::WORDS]),
        workspace: a.workspace(head.workspace_len(&gpu, dtype, trained.is_some())),
    };
    let hidden = a.tensor(&rows);
    let (gram, workspace) =
        (a.tensor(&[hidden_size, hidden_size]), a.workspace(head.gram_workspace_len(&gpu)));
    let plans = [head.plan(&gpu, dtype, hidden, outputs), head.gram(&gpu, dtype, gram, workspace)];
    plans.into_iter().filter(|plan| plan.is_ok()).count()
}

/// The same for all others.
fn another(a: &mut Arguments<'_>) -> usize {
    let dtype = a.dtype();
    let direction = if a.below(2) == 0 { Direction::Forward } else { Direction::Backward };
    let plan = match a.below(6) {
        0 => {
            let shape = a.shape();
            let (noise, sizes) = (a.noise(&shape), [shape.out_rows(), shape.out_features]);
            let (input, output) = (a.tensor(&sizes), a.tensor(&sizes));
            NoisyEpilogue { shape, noise, direction, dtype, input, output }.plan()
        }
        1 => {
            let (branches, batch, features) = (1 + a.below(2), a.size(), a.size());
            let sizes = [branches, batch, features];
            let mask = MaskSource::Given(a.tensor(&[batch]));
            let (input, output) = (a.tensor(&sizes), a.tensor(&sizes));
            DropPath { branches, batch, features, mask, direction, dtype, input, output }.plan()
        }
        2 => {
            let (samples, features) = (a.size(), a.size());
            let workspace = a.workspace(FpDistance::workspace_len(samples, features));
            let [fine_tuned, pre_trained] = [(); 2].map(|()| a.tensor(&[samples, features]));
            let distance = a.tensor(&[1]);
            FpDistance { samples, features, dtype, fine_tuned, pre_trained, distance, workspace }.plan()
        }
        3 => {
            let gradients: Vec<Buffer> = (0..a.below(70))
                .map(|_| {
                    let len = a.size();
                    a.tensor(&[len])
                })
                .collect();
            let workspace =
                a.workspace(GradNorm::workspace_len(gradients.iter().map(|gradient| gradient.len)));
            let norm = a.tensor(&[1]);
            GradNorm { dtype, gradients: &gradients, norm, workspace }.plan()
        }
        4 => {
            let (shape, generator) = (a.shape(), a.generator());
            let tokens = if generator.shape() == NoiseShape::PerToken { shape.tokens } else { 1 };
            let key = (a.below(2) == 0).then(|| a.tensor(&[1]));
            let z = a.tensor(&[shape.samples(), tokens, shape.out_features]);
            NoiseFill { shape, generator, key, z }.plan()
        }
        _ => {
            let len = a.size();
            Merge { sign: MergeSign::Merge, dtype, target: a.tensor(&[len]), delta: a.tensor(&[len]) }.plan()
        }
    };
    usize::from(plan.is_ok())
}

/// Plans of a random operator, and how many there were; of 64 sizes and tensors `wild` are.
pub fn an_operator(random: &mut dyn Rng, kind: usize, wild: u32) -> usize {
    let mut a = Arguments { random, address: 1 << 20, wild };
    match kind % 6 {
        0 | 1 => a_layer(&mut a),
        2 => a_weight(&mut a),
        3 => a_loss(&mut a),
        4 => a_head(&mut a),
        _ => another(&mut a),
    }
}

#[test]
fn sizes_up_to_the_largest_give_a_plan_or_an_error() {
    let calls = std::env::var("PACE_FUZZ_CALLS")
        .map_or(30_000, |calls| calls.parse().expect("PACE_FUZZ_CALLS is a number"));
    let mut random = StdRng::seed_from_u64(1);
    let planned: usize = (0..calls).map(|i| an_operator(&mut random, i / 4, [0, 2, 8, 40][i % 4])).sum();
    println!("{calls} calls, {planned} plans");
    assert!(planned > calls / 4, "{planned} plans");
}
