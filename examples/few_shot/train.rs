//! Training: the source model on MNIST, and the compared methods on a few shots.

use crate::data::{Images, Random, augment_affine};
use crate::report::{EpochPoint, Run};
use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use pace_kernels::adapter::Adapter;
use pace_kernels::candle::vit::{Vit, VitConfig};
use pace_kernels::candle::{Batch, Injector, Objective, PaceContext, Variant, grad_norm, seeded_builder};
use pace_kernels::cpu::fp_distance;
use pace_kernels::schedule::sigma_by_block;
use rayon::prelude::*;
use std::collections::HashMap;
use std::time::Instant;

const DEVICE: Device = Device::Cpu;
/// Streams of [`Random`] besides those of the data module.
const EPOCH_ORDER: u32 = 3;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The head alone, on frozen features.
    LinearProbe,
    /// LoRA mul + VPT add without noise: the baseline.
    Baseline,
    /// The baseline with noisy adapters and plain cross-entropy.
    NoiseOnly,
    Pace,
    PaceFast,
    PaceLazy,
}

impl Method {
    pub const ALL: [Self; 6] =
        [Self::LinearProbe, Self::Baseline, Self::NoiseOnly, Self::Pace, Self::PaceFast, Self::PaceLazy];

    pub fn name(self) -> &'static str {
        match self {
            Self::LinearProbe => "linear probe",
            Self::Baseline => "LoRA mul + VPT add",
            Self::NoiseOnly => "noise only",
            Self::Pace => "PACE",
            Self::PaceFast => "PACE-fast",
            Self::PaceLazy => "PACE-lazy",
        }
    }

    pub fn has_sigma(self) -> bool {
        !matches!(self, Self::LinearProbe | Self::Baseline)
    }

    pub fn has_lambda(self) -> bool {
        self.has_sigma() && self != Self::NoiseOnly
    }

    fn variant(self, samples: usize) -> Variant {
        match self {
            Self::LinearProbe | Self::Baseline | Self::NoiseOnly => Variant::CrossEntropy,
            Self::Pace => Variant::Pace,
            Self::PaceFast => Variant::Fast { samples },
            Self::PaceLazy => Variant::Lazy { interval: 2 },
        }
    }
}

/// The two hyperparameters of the paper that are searched; zero where a method has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    pub lambda: f64,
    pub sigma: f64,
}

/// How every method is trained.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    pub epochs: usize,
    pub batch: usize,
    pub rank: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Epochs from one measurement of gradient norm and FP-distance to the next.
    pub measure_every: usize,
}

/// A pre-trained model.
pub struct Source {
    pub weights: HashMap<String, Tensor>,
    pub config: VitConfig,
}

/// One training run to do.
pub struct Job<'a> {
    pub source: &'a Source,
    pub recipe: Recipe,
    pub method: Method,
    pub strength: Strength,
    pub shots: usize,
    pub seed: u64,
    pub train: Images,
    pub validation: Images,
    pub test: Option<&'a Images>,
}

/// Images `[n, channels, height, width]` from 0…1 to the −1…1 that timm's vision transformers expect.
fn images(images: &Images, range: std::ops::Range<usize>) -> Result<Tensor> {
    let size = images.channels * images.height * images.width;
    let pixels: Vec<f32> =
        images.pixels[range.start * size..range.end * size].iter().map(|v| 2.0 * v - 1.0).collect();
    Tensor::from_vec(pixels, (range.len(), images.channels, images.height, images.width), &DEVICE)
}

/// Share of images that `classify` labels correctly; NaN for no images.
fn accuracy(set: &Images, classify: impl Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
    const BATCH: usize = 128;
    let mut right = 0;
    for start in (0..set.len()).step_by(BATCH) {
        let end = set.len().min(start + BATCH);
        let predicted = classify(&images(set, start..end)?)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        right += predicted.iter().zip(&set.labels[start..end]).filter(|(a, b)| a == b).count();
    }
    Ok(right as f64 / set.len() as f64)
}

/// Accuracy of the source model as it is.
pub fn unadapted_accuracy(source: &Source, set: &Images) -> Result<f64> {
    let vars = VarBuilder::from_tensors(source.weights.clone(), DType::F32, &DEVICE);
    let model = Vit::new(&source.config, vars)?;
    accuracy(set, |x| model.forward(x))
}

/// The cosine schedule: from `peak` at the first of `steps` steps to zero after the last.
fn cosine(peak: f64, step: usize, steps: usize) -> f64 {
    peak * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos())
}

/// The batches of an epoch: indices in the epoch's own order. PACE-lazy halves its batches, so a single sample that is
/// left over joins the batch before it.
fn batches(samples: usize, size: usize, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..samples).collect();
    Random::new(seed, EPOCH_ORDER, epoch as u32).shuffle(&mut order);
    let mut batches: Vec<_> = order.chunks(size).map(<[usize]>::to_vec).collect();
    if let [.., last, single] = &mut batches[..]
        && single.len() == 1
    {
        last.append(single);
        batches.pop();
    }
    batches
}

/// Variables by name, those that `keep` accepts; a map's own order would differ from run to run.
fn sorted(vars: &VarMap, keep: impl Fn(&str) -> bool) -> Result<Vec<Var>> {
    let vars = vars.data().lock().map_err(|error| candle_core::Error::Msg(error.to_string()))?;
    let mut named: Vec<_> = vars.iter().filter(|(name, _)| keep(name)).collect();
    named.sort_by_key(|(name, _)| *name);
    Ok(named.into_iter().map(|(_, var)| var.clone()).collect())
}

impl Job<'_> {
    /// Trains and evaluates.
    pub fn run(&self) -> Result<Run> {
        let config = VitConfig { classes: self.train.classes, ..self.source.config };
        let frozen = VarBuilder::from_tensors(self.source.weights.clone(), DType::F32, &DEVICE);
        let context = PaceContext::new(self.seed);
        let sigmas =
            sigma_by_block(config.depth + 1, self.strength.sigma, 1).map_err(candle_core::Error::wrap)?;
        let vars = VarMap::new();
        let trained = seeded_builder(&vars, self.seed, DType::F32, &DEVICE);
        let mut injector =
            Injector::new(&context, Adapter::LoraMulVptAdd, self.recipe.rank, &sigmas, trained);
        // The head is the injector's: it starts anew, whatever the source model was trained on.
        let model = Vit::with_adapters(&config, frozen, &mut injector)?;
        // A linear probe trains the head alone, on features that never change.
        let probe = self.method == Method::LinearProbe;
        let vars = sorted(&vars, |name| !probe || name.starts_with("head."))?;
        let prepare = |set: &Images| {
            let pixels = images(set, 0..set.len())?;
            if probe { Ok(model.features(&pixels)?.detach()) } else { Ok::<_, candle_core::Error>(pixels) }
        };
        let features = |x: &Tensor| if probe { Ok(x.clone()) } else { model.features(x) };
        let logits = |x: &Tensor| if probe { model.classify(x) } else { model.forward(x) };
        let start = Instant::now();
        let inputs = prepare(&self.train)?;
        // A linear probe's features are part of its training.
        let mut seconds = start.elapsed().as_secs_f64();
        let unseen = prepare(&self.validation)?;
        // Adapters start as the identity: these are the source model's features.
        let source = features(&unseen)?.detach();

        let Recipe { epochs, batch, learning_rate, weight_decay, .. } = self.recipe;
        let parameters = ParamsAdamW { lr: learning_rate, weight_decay, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        let mut optimizer = AdamW::new(vars.clone(), parameters)?;
        let mut objective =
            Objective::new(&context, self.method.variant(self.train.len()), self.strength.lambda)?;
        let mut history = Vec::new();
        let steps = epochs * batches(self.train.len(), batch, self.seed, 0).len();
        let mut step = 0;
        for epoch in 1..=epochs {
            let start = Instant::now();
            let mut losses = Vec::new();
            for samples in batches(self.train.len(), batch, self.seed, epoch) {
                let index: Vec<i64> = samples.iter().map(|&i| i as i64).collect();
                let labels: Vec<i64> = samples.iter().map(|&i| self.train.labels[i].into()).collect();
                let x = inputs.index_select(&Tensor::new(&index[..], &DEVICE)?, 0)?;
                let batch = Batch { index: Some(&index), ..Batch::new(&x, &labels) };
                let out = objective.step(step as u64, &batch, logits)?;
                optimizer.set_learning_rate(cosine(learning_rate, step, steps));
                optimizer.backward_step(&out.loss)?;
                losses.push(out.values.total);
                step += 1;
            }
            seconds += start.elapsed().as_secs_f64();
            context.evaluate();
            if epoch == 1 || epoch == epochs || epoch % self.recipe.measure_every == 0 {
                let features = features(&unseen)?;
                let (gradient_norm, fp_distance) =
                    self.measure(&vars, &source, &features, &model.classify(&features)?)?;
                let loss = losses.iter().sum::<f64>() / losses.len() as f64;
                history.push(EpochPoint { epoch, loss, gradient_norm, fp_distance });
            }
        }
        let validation_accuracy = accuracy(&self.validation, |x| model.forward(x))?;
        let accuracy = self.test.map_or(Ok(f64::NAN), |test| accuracy(test, |x| model.forward(x)))?;
        Ok(Run {
            method: self.method.name().to_owned(),
            shots: self.shots,
            seed: self.seed,
            lambda: self.strength.lambda,
            sigma: self.strength.sigma,
            validation_accuracy,
            accuracy,
            train_seconds: seconds,
            history,
        })
    }

    /// Gradient norm of the plain cross-entropy and FP-distance of the features, of the model as evaluation sees it, so
    /// that all methods are measured alike. On the validation images: on the few that are trained on, the
    /// cross-entropy and its gradient only tell how far they have been driven to zero.
    fn measure(
        &self,
        vars: &[Var],
        source: &Tensor,
        features: &Tensor,
        logits: &Tensor,
    ) -> Result<(f64, f64)> {
        let labels = Tensor::new(&self.validation.labels[..], &DEVICE)?;
        let grads = candle_nn::loss::cross_entropy(logits, &labels)?.backward()?;
        let (rows, width) = features.dims2()?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let distance = fp_distance(rows, width, &values(features)?, &values(source)?);
        Ok((grad_norm(vars, &grads)?, distance.map_err(candle_core::Error::wrap)?))
    }
}

/// The source model's sizes: a vision transformer that fits MNIST.
pub const MNIST_VIT: VitConfig = VitConfig {
    image_size: 28,
    patch_size: 4,
    channels: 1,
    classes: 10,
    embed_dim: 64,
    depth: 6,
    heads: 4,
    mlp_dim: 256,
    layer_norm_eps: 1e-6,
    drop_path: 0.0,
};

/// Pre-trains the source model on all but the last `held_out` of some shuffled images; the held-out accuracy after
/// every epoch goes to `report`.
pub fn pretrain(
    set: &Images,
    held_out: usize,
    epochs: usize,
    mut report: impl FnMut(usize, f64, f64),
) -> Result<VarMap> {
    const SEED: u64 = 0;
    const BATCH: usize = 64;
    const LEARNING_RATE: f64 = 2e-3;
    let mut order: Vec<usize> = (0..set.len()).collect();
    Random::new(SEED, EPOCH_ORDER, 0).shuffle(&mut order);
    let (train, test) = order.split_at(set.len() - held_out);
    let (train, test) = (set.subset(train), set.subset(test));
    let vars = VarMap::new();
    let model = Vit::new(&MNIST_VIT, seeded_builder(&vars, SEED, DType::F32, &DEVICE))?;
    let parameters =
        ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0.05, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    let mut optimizer = AdamW::new(sorted(&vars, |_| true)?, parameters)?;
    let steps = epochs * train.len().div_ceil(BATCH);
    let warm_up = steps / 20;
    let mut step = 0;
    for epoch in 1..=epochs {
        let mut loss_sum = 0.0;
        for samples in batches(train.len(), BATCH, SEED, epoch) {
            let augmented: Vec<f32> = samples
                .par_iter()
                .flat_map_iter(|&i| {
                    let seed = (epoch * train.len() + i) as u64;
                    augment_affine(train.image(i), train.height, train.width, train.channels, seed)
                })
                .collect();
            let batch = Images { pixels: augmented, ..train.subset(&samples) };
            let logits = model.forward(&images(&batch, 0..batch.len())?)?;
            let loss = candle_nn::loss::cross_entropy(&logits, &Tensor::new(&batch.labels[..], &DEVICE)?)?;
            let rate = if step < warm_up {
                LEARNING_RATE * (step + 1) as f64 / warm_up as f64
            } else {
                cosine(LEARNING_RATE, step - warm_up, steps - warm_up)
            };
            optimizer.set_learning_rate(rate);
            optimizer.backward_step(&loss)?;
            loss_sum += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;
            step += 1;
        }
        report(epoch, loss_sum / train.len() as f64, accuracy(&test, |x| model.forward(x))?);
    }
    Ok(vars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_batch_is_a_single_sample() {
        for (samples, sizes) in
            [(40, vec![40]), (64, vec![64]), (65, vec![65]), (66, vec![64, 2]), (129, vec![64, 65])]
        {
            let batches = batches(samples, 64, 7, 1);
            assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), sizes);
            let mut all = batches.concat();
            all.sort();
            assert!(all.into_iter().eq(0..samples));
        }
    }
}
