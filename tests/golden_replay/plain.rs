//! The recorded training runs by the plain formulas: each operation a candle operation of its own, nothing fused. In f32 its
//! distance from the record is what rounding alone costs, the measure for our own layers; in f64 they have to agree with it.

use super::case::Case;
use super::on::{On, values};
use super::training::{Layers, Model, trained};
use super::vit::{Evaluated, Quantity, compare, replay, variant};
use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use libtest_mimic::Failed;
use pace_kernels::Targets;
use pace_kernels::adapter::{DELTA_BIAS, DOWN, PROMPT_DOWN, PROMPT_UP, UP};
use pace_kernels::candle::{Batch, PaceContext, Variant};
use pace_kernels::schedule::sigma_by_block;

/// A noisy layer under `z [R, N]`.
///
/// `frozen` are `W0` and `b0`, `of` finds a trained parameter. The head is all adapter.
pub fn linear<'a>(
    x: &Tensor,
    frozen: Option<(&Tensor, &Tensor)>,
    of: &dyn Fn(&str) -> Option<&'a Tensor>,
    z: Option<&Tensor>,
) -> Result<Tensor, Failed> {
    let product = |weight: &Tensor| Ok::<_, Failed>(x.broadcast_matmul(&weight.t()?)?);
    // One `z` for all tokens of a sample.
    let noisy = |delta: Tensor| {
        let Some(z) = z else { return Ok::<_, Failed>(delta) };
        let z = if delta.rank() == 3 { z.unsqueeze(1)? } else { z.clone() };
        Ok(delta.broadcast_mul(&z)?)
    };
    let Some((weight, bias)) = frozen else {
        let (weight, bias) = of("base_weight").zip(of("base_bias")).ok_or("a head without parameters")?;
        return noisy(product(weight)?.broadcast_add(bias)?);
    };
    let base = product(weight)?.broadcast_add(bias)?;
    let prompt = match of(PROMPT_DOWN).zip(of(PROMPT_UP)) {
        Some((down, up)) => Some(weight.matmul(&down.matmul(up)?)?.squeeze(1)?),
        None => None,
    };
    let factors = of(DOWN).zip(of(UP)).zip(of(DELTA_BIAS));
    let delta = match (factors, prompt) {
        (Some(((lora_b, lora_a), delta_bias)), None) => {
            let s = product(lora_a)?;
            s.broadcast_matmul(&lora_b.t()?)?.broadcast_add(delta_bias)?
        }
        (Some(((lora_b, lora_a), delta_bias)), Some(prompt)) => {
            let delta_bias = (prompt + (bias * delta_bias)?)?;
            product(&(weight * lora_b.matmul(lora_a)?)?)?.broadcast_add(&delta_bias)?
        }
        (None, Some(prompt)) => prompt.broadcast_as(base.shape())?,
        (None, None) => return Err("a layer with the parameters of no adapter".into()),
    };
    Ok((base + noisy(delta)?)?)
}

/// The loss of PACE and its variants; `history` is what PACE-fast remembers, `[samples, C]`.
struct Loss<'a> {
    context: &'a PaceContext,
    variant: Variant,
    lambda: f64,
    history: Option<Tensor>,
}

impl Loss<'_> {
    fn step(
        &mut self,
        step: usize,
        batch: &Batch<'_>,
        model: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Evaluated, Failed> {
        let Targets::Labels(all) = batch.targets else { return Err("the record has labels".into()) };
        let rows = all.len();
        let (branches, used) = match self.variant {
            Variant::Pace => (2, rows),
            Variant::Lazy { interval } if step.is_multiple_of(interval) => (2, rows / 2),
            _ => (1, rows),
        };
        self.context.train(step as u64, branches, 0)?;
        let logits = model(&batch.x.narrow(0, 0, used)?)?;
        let first = logits.narrow(0, 0, used)?;
        let labels: Vec<u32> = all[..used].iter().map(|&label| label as u32).collect();
        let classification = cross_entropy(&first, &Tensor::new(labels, first.device())?)?;
        let other = match self.variant {
            Variant::Fast { samples } => {
                let (_, classes) = first.dims2()?;
                let index: Vec<u32> = batch.index.unwrap_or_default().iter().map(|&i| i as u32).collect();
                let index = Tensor::new(index, first.device())?;
                let history = match self.history.take() {
                    Some(history) => history,
                    None => Tensor::zeros((samples, classes), first.dtype(), first.device())?,
                };
                let before = history.index_select(&index, 0)?;
                let change = (first.detach() - &before)?;
                self.history = Some(history.index_add(&index, &change, 0)?);
                Some(before)
            }
            _ if branches == 2 => Some(logits.narrow(0, used, used)?),
            _ => None,
        };
        let mut loss = classification.clone();
        let mut consistency = 0.0;
        if let Some(other) = other {
            let term = (&first - other)?.sqr()?.sum(D::Minus1)?.mean_all()?;
            consistency = values(&term)?[0];
            loss = (loss + (term * self.lambda)?)?;
        }
        let parts = [values(&loss)?[0], values(&classification)?[0], consistency];
        Ok(Evaluated { values: parts, logits: first.detach(), loss })
    }
}

/// What the plain formulas make of a training run in the precision of `on`.
pub fn training(case: &Case, on: &On) -> Result<Vec<Quantity>, Failed> {
    let context = PaceContext::new(0);
    let trained = trained(case, on)?;
    let model = Model { layers: Layers::Plain, case, on, context: &context, trained: &trained };
    let mut loss =
        Loss { context: &context, variant: variant(case)?, lambda: case.number("lambda_")?, history: None };
    replay(case, on, &context, &trained, &|x, step| model.forward(x, step), &mut |step, batch, model| {
        loss.step(step, batch, model)
    })
}

/// Whether the plain formulas are the recorded ones.
pub fn check(case: &Case) -> Result<(), Failed> {
    let sigmas = sigma_by_block(case.number::<usize>("depth")? + 1, case.number("sigma")?, 1)?;
    case.expect("sigmas_by_block", &sigmas, 1e-15)?;
    compare(&training(case, &On::CPU)?, |_| 1e-8)
}
