//! The recorded training runs with every noisy layer computed by the CUDA kernels in f32, in the simulator or on a device: a
//! vision transformer of candle's CPU operations around them.

use super::case::Case;
use super::device;
use super::machine::{Machine, Target};
use super::on::On;
use super::plain;
use super::vit::{is_trained, tensor, train};
use candle_core::{CpuStorage, CustomOp2, D, Layout, Shape, Tensor, Var};
use libtest_mimic::Failed;
use pace_kernels::LinearShape;
use pace_kernels::adapter::{DELTA_BIAS, DOWN, PROMPT_DOWN, PROMPT_UP, UP};
use pace_kernels::candle::PaceContext;
use pace_kernels::cuda::{
    Base, Buffer, DType, Gpu, Lora, LoraMulLinear, LoraMulLinearGrads, LowRankGrads, LowRankLinear,
    NoisyLinear, NoisyLinearGrads, Prompt, Source,
};
use pace_kernels::noise::NoiseShape;
use std::cell::RefCell;
use std::collections::BTreeMap;

const TYPE: DType = DType::F32;

/// What plans are made for, and whether they run there or in the simulator.
#[derive(Clone, Copy)]
pub struct Place {
    gpu: Gpu,
    on_device: bool,
}

/// What is trained in a layer, and in which order it is joined.
#[derive(Clone, Copy)]
enum Adapter {
    /// `[W, b]`, all of the head.
    Head,
    /// `[B, A, δb]` of this rank.
    LoraAdd(usize),
    /// `[B, A, δb, Pd, Pu]` of these ranks.
    LoraMulVptAdd(usize, usize),
    /// `[Pd, Pu]` of this rank.
    VptAdd(usize),
}

enum Operator {
    Dense(NoisyLinear<Buffer, Source>),
    LowRank(LowRankLinear<Buffer, Source>),
    LoraMul(LoraMulLinear<Buffer, Source>),
}

/// A noisy layer that the kernels compute, on `x` and all that it trains as one tensor.
struct Layer {
    place: Place,
    shape: LinearShape,
    /// `[R, N]`.
    z: Option<Vec<f32>>,
    /// `W0` and `b0`; not of the head.
    base: Option<(Vec<f32>, Vec<f32>)>,
    adapter: Adapter,
}

impl Layer {
    /// Runs `body` on a machine of its own.
    fn run<R>(&self, body: impl Fn(&mut Machine<'_>) -> R) -> candle_core::Result<R> {
        let Place { gpu, on_device } = self.place;
        let opened = on_device.then(device::open).transpose().map_err(candle_core::Error::Msg)?;
        let result = RefCell::new(None);
        Target { gpu, device: opened.as_ref() }.once(0, |machine| *result.borrow_mut() = Some(body(machine)));
        Ok(result.into_inner().expect("it ran once"))
    }

    /// The lengths of the joined parameters.
    fn lengths(&self) -> Vec<usize> {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        match self.adapter {
            Adapter::Head => vec![n * k, n],
            Adapter::LoraAdd(r) => vec![n * r, r * k, n],
            Adapter::LoraMulVptAdd(r, p) => vec![n * r, r * k, n, k * p, p],
            Adapter::VptAdd(p) => vec![k * p, p],
        }
    }

    fn operator(&self, machine: &mut Machine<'_>, mut parameters: &[f32]) -> Operator {
        let shape = self.shape;
        let noise = match &self.z {
            Some(z) => Source::Given { z: machine.input("z", z), shape: NoiseShape::PerSample },
            None => Source::Off,
        };
        let base = self.base.as_ref().map(|(weight, bias)| Base {
            weight: machine.input("W0", weight),
            bias: Some(machine.input("b0", bias)),
        });
        let mut next = |length| {
            let part = parameters.split_off(..length).expect("as long as its parts");
            machine.input("parameter", part)
        };
        let parts: Vec<Buffer> = self.lengths().into_iter().map(&mut next).collect();
        let lora = |rank| Lora { rank, lora_b: parts[0], lora_a: parts[1], scale: 1.0 };
        let prompt = |rank, [down, up]: [Buffer; 2]| Some(Prompt { rank, down, up });
        let lora_mul = |lora, prompt, delta_bias| {
            let base = base.expect("all but the head have one");
            Operator::LoraMul(LoraMulLinear {
                shape,
                noise,
                base,
                lora,
                prompt,
                delta_bias,
                fold: true,
                allow_tf32: false,
            })
        };
        match self.adapter {
            Adapter::Head => Operator::Dense(NoisyLinear {
                shape,
                noise,
                base,
                delta_weight: Some(parts[0]),
                delta_bias: Some(parts[1]),
                fold: false,
                allow_tf32: false,
            }),
            Adapter::LoraAdd(rank) => Operator::LowRank(LowRankLinear {
                shape,
                noise,
                base,
                rank,
                lora_b: parts[0],
                lora_a: parts[1],
                delta_bias: Some(parts[2]),
                scale: 1.0,
                allow_tf32: false,
            }),
            Adapter::LoraMulVptAdd(r, p) => {
                lora_mul(Some(lora(r)), prompt(p, [parts[3], parts[4]]), Some(parts[2]))
            }
            Adapter::VptAdd(p) => lora_mul(None, prompt(p, [parts[0], parts[1]]), None),
        }
    }

    /// `y`, and `s` of LoRA add.
    fn forward(&self, machine: &mut Machine<'_>, operator: &Operator, x: Buffer) -> (Buffer, Option<Buffer>) {
        let gpu = machine.gpu;
        let y = machine.output::<f32>("y", self.shape.out_rows() * self.shape.out_features);
        let workspace = machine.output::<f32>("workspace", operator.workspace_len(&gpu));
        let mut s = None;
        let plan = match operator {
            Operator::Dense(layer) => layer.forward(&gpu, TYPE, x, y, workspace),
            Operator::LoraMul(layer) => layer.forward(&gpu, TYPE, x, y, workspace),
            Operator::LowRank(layer) => {
                let place = s.insert(machine.output::<f32>("s", self.shape.in_rows() * layer.rank));
                layer.forward(&gpu, TYPE, x, *place, y, workspace)
            }
        };
        machine.launch(&plan.unwrap());
        (y, s)
    }

    /// The gradients of `x` and of the joined parameters.
    fn backward(&self, machine: &mut Machine<'_>, [x, parameters, dy]: [&[f32]; 3]) -> [Vec<f32>; 2] {
        let (gpu, operator) = (machine.gpu, self.operator(machine, parameters));
        let dx = machine.output::<f32>("dx", x.len());
        let (x, dy) = (machine.input("x", x), machine.input("dy", dy));
        let parts: Vec<Buffer> =
            self.lengths().into_iter().map(|length| machine.output::<f32>("gradient", length)).collect();
        let part = |i: usize| parts.get(i).copied();
        let workspace = machine.output::<f32>("workspace", operator.workspace_len(&gpu));
        let input = Some(dx);
        let plan = match &operator {
            Operator::Dense(layer) => {
                let grads = NoisyLinearGrads { input, delta_weight: part(0), delta_bias: part(1) };
                layer.backward(&gpu, TYPE, x, dy, grads, workspace)
            }
            Operator::LowRank(layer) => {
                let s = self.forward(machine, &operator, x).1.expect("LoRA add has an `s`");
                let grads = LowRankGrads { input, lora_b: part(0), lora_a: part(1), delta_bias: part(2) };
                layer.backward(&gpu, TYPE, x, s, dy, grads, workspace)
            }
            Operator::LoraMul(layer) => {
                let [lora_b, lora_a, delta_bias, prompt_down, prompt_up] = match self.adapter {
                    Adapter::VptAdd(_) => [None, None, None, part(0), part(1)],
                    _ => [0, 1, 2, 3, 4].map(part),
                };
                let grads = LoraMulLinearGrads { input, lora_a, lora_b, prompt_down, prompt_up, delta_bias };
                layer.backward(&gpu, TYPE, Some(x), dy, grads, workspace)
            }
        };
        machine.launch(&plan.unwrap());
        let joined: Vec<f32> = parts.iter().flat_map(|&part| machine.read::<f32>(part)).collect();
        [machine.read(dx), joined]
    }
}

impl Operator {
    fn workspace_len(&self, gpu: &Gpu) -> usize {
        match self {
            Self::Dense(layer) => layer.workspace_len(gpu, TYPE),
            Self::LowRank(layer) => layer.workspace_len(gpu, TYPE),
            Self::LoraMul(layer) => layer.workspace_len(gpu, TYPE),
        }
    }
}

/// The library's operations run where candle's tensors are, never in the simulator.
impl CustomOp2 for Layer {
    fn name(&self) -> &'static str {
        "kernels"
    }
    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        parameters: &CpuStorage,
        parameters_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let [x, parameters] = [(x, x_layout), (parameters, parameters_layout)].map(|(storage, layout)| {
            let (start, end) = layout.contiguous_offsets().expect("contiguous arguments");
            storage.as_slice::<f32>().map(|values| &values[start..end])
        });
        let (x, parameters) = (x?, parameters?);
        let y = self.run(|machine| {
            let operator = self.operator(machine, parameters);
            let x = machine.input("x", x);
            let (y, _) = self.forward(machine, &operator, x);
            machine.read::<f32>(y)
        })?;
        let (_, dims) = x_layout.dims().split_last().expect("rows of features");
        Ok((CpuStorage::F32(y), Shape::from([dims, &[self.shape.out_features]].concat())))
    }
    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = [x, parameters, grad].map(values);
        let (a, b, c) = (a?, b?, c?);
        let [dx, joined] = self.run(|machine| self.backward(machine, [&a, &b, &c]))?;
        let [dx, joined] = [(dx, x), (joined, parameters)]
            .map(|(values, like)| Tensor::from_vec(values, like.shape(), like.device()));
        Ok((Some(dx?), Some(joined?)))
    }
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// What computes the noisy layers.
#[derive(Clone, Copy)]
pub enum Layers {
    /// candle, operation by operation.
    Plain,
    /// The kernels.
    Kernels(Place),
}

/// The recorded transformer.
pub struct Model<'a> {
    pub layers: Layers,
    pub case: &'a Case,
    pub on: &'a On,
    pub context: &'a PaceContext,
    pub trained: &'a BTreeMap<String, Var>,
}

impl Model<'_> {
    fn frozen(&self, name: &str) -> Result<Tensor, Failed> {
        tensor(self.case, self.on, &format!("init.{name}"))
    }

    fn trained(&self, name: &str) -> Option<&Tensor> {
        self.trained.get(name).map(Var::as_tensor)
    }

    /// A noisy layer in training step `step`, or in evaluation.
    fn linear(&self, name: &str, x: &Tensor, step: Option<usize>) -> Result<Tensor, Failed> {
        let Layers::Kernels(place) = self.layers else { return self.plain_linear(name, x, step) };
        let branches = if step.is_some() { self.context.branches() } else { 1 };
        let of = |parameter: &str| self.trained(&format!("{name}.{parameter}"));
        let (lora_b, lora_a, delta_bias) = (of(DOWN), of(UP), of(DELTA_BIAS));
        let all =
            [of("base_weight"), of("base_bias"), lora_b, lora_a, delta_bias, of(PROMPT_DOWN), of(PROMPT_UP)];
        let columns = |tensor: &Tensor| tensor.dim(1);
        let adapter = match (of("base_weight"), lora_b, of(PROMPT_DOWN)) {
            (Some(_), None, None) => Adapter::Head,
            (None, Some(lora_b), None) => Adapter::LoraAdd(columns(lora_b)?),
            (None, Some(lora_b), Some(down)) => Adapter::LoraMulVptAdd(columns(lora_b)?, columns(down)?),
            (None, None, Some(down)) => Adapter::VptAdd(columns(down)?),
            _ => return Err(format!("`{name}` has the parameters of no adapter").into()),
        };
        let frozen = |parameter: &str| self.frozen(&format!("{name}.{parameter}"));
        let (base, (out_features, in_features)) = match of("base_weight") {
            Some(weight) => (None, weight.dims2()?),
            None => {
                let weight = frozen("base_weight")?;
                (Some((values(&weight)?, values(&frozen("base_bias")?)?)), weight.dims2()?)
            }
        };
        let dims = x.dims();
        let shape = LinearShape {
            branches,
            batch: dims[0] / branches,
            tokens: dims[1..dims.len() - 1].iter().product(),
            in_features,
            out_features,
            shared_input: false,
        };
        let z = match step {
            Some(step) => self.case.get_if_present::<f32>(&format!("step{step}.z.{name}"))?,
            None => None,
        };
        let flat =
            all.into_iter().flatten().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        let parameters = Tensor::cat(&flat, 0)?;
        Ok(x.contiguous()?.apply_op2(&parameters, Layer { place, shape, z, base, adapter })?)
    }

    fn plain_linear(&self, name: &str, x: &Tensor, step: Option<usize>) -> Result<Tensor, Failed> {
        let of = |parameter: &str| self.trained(&format!("{name}.{parameter}"));
        let frozen = match of("base_weight") {
            Some(_) => None,
            None => Some((
                self.frozen(&format!("{name}.base_weight"))?,
                self.frozen(&format!("{name}.base_bias"))?,
            )),
        };
        let z = step.map(|step| format!("step{step}.z.{name}")).filter(|z| self.case.has(z));
        let z = z.map(|z| tensor(self.case, self.on, &z)).transpose()?;
        plain::linear(x, frozen.as_ref().map(|(weight, bias)| (weight, bias)), &of, z.as_ref())
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor, Failed> {
        let epsilon: f64 = self.case.number("layernorm_eps")?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
        let scaled =
            centred.broadcast_div(&deviation)?.broadcast_mul(&self.frozen(&format!("{name}.weight"))?)?;
        Ok(scaled.broadcast_add(&self.frozen(&format!("{name}.bias"))?)?)
    }

    fn attention(&self, qkv: &Tensor) -> Result<Tensor, Failed> {
        let heads: usize = self.case.number("heads")?;
        let (rows, tokens, width) = qkv.dims3()?;
        let size = width / 3 / heads;
        let parts = qkv.reshape((rows, tokens, 3, heads, size))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let part = |i: usize| parts.narrow(0, i, 1)?.squeeze(0);
        let scores = (part(0)?.matmul(&part(1)?.transpose(2, 3)?.contiguous()?)? * (size as f64).powf(-0.5))?;
        let powers = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?;
        Ok(weights.matmul(&part(2)?)?.transpose(1, 2)?.reshape((rows, tokens, heads * size))?)
    }

    pub fn forward(&self, images: &Tensor, step: Option<usize>) -> Result<Tensor, Failed> {
        let images = if step.is_some() { self.context.branch(images)? } else { images.clone() };
        let (rows, channels, side, _) = images.dims4()?;
        let (p, depth): (usize, usize) = (self.case.number("patch")?, self.case.number("depth")?);
        let patches = images
            .reshape((rows, channels, side / p, p, side / p, p))?
            .permute((0, 2, 4, 1, 3, 5))?
            .reshape((rows, (side / p) * (side / p), channels * p * p))?;
        let weight = self.frozen("patch_embed.proj.weight")?;
        let width = weight.dim(0)?;
        let patches = patches
            .broadcast_matmul(&weight.reshape((width, ()))?.t()?)?
            .broadcast_add(&self.frozen("patch_embed.proj.bias")?)?;
        let cls = self.frozen("cls_token")?.broadcast_as((rows, 1, width))?;
        let mut x = Tensor::cat(&[&cls, &patches], 1)?.broadcast_add(&self.frozen("pos_embed")?)?;
        for block in 0..depth {
            let name = |layer: &str| format!("blocks.{block}.{layer}");
            let qkv = self.linear(&name("attn.qkv"), &self.norm(&name("norm1"), &x)?, step)?;
            x = (&x + self.linear(&name("attn.proj"), &self.attention(&qkv)?, step)?)?;
            let hidden = self.linear(&name("mlp.fc1"), &self.norm(&name("norm2"), &x)?, step)?;
            x = (&x + self.linear(&name("mlp.fc2"), &gelu(&hidden)?, step)?)?;
        }
        self.linear("head", &self.norm("norm", &x.narrow(1, 0, 1)?.squeeze(1)?)?, step)
    }
}

/// candle's own GELU has a derivative of six digits.
fn gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    (x * 0.5)? * ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?
}

/// The trained parameters at the start: every tensor of an adapter, and the head.
pub fn trained(case: &Case, on: &On) -> Result<BTreeMap<String, Var>, Failed> {
    let mut trained = BTreeMap::new();
    for recorded in case.names().filter_map(|name| name.strip_prefix("init.")).filter(|name| is_trained(name))
    {
        let value = tensor(case, on, &format!("init.{recorded}"))?;
        trained.insert(recorded.to_owned(), Var::from_tensor(&value)?);
    }
    Ok(trained)
}

/// One training run.
pub fn training(case: &Case, target: &Target<'_>) -> Result<(), Failed> {
    let (on, context) = (On::CPU_F32, PaceContext::new(0));
    let trained = trained(case, &on)?;
    let layers = Layers::Kernels(Place { gpu: target.gpu, on_device: target.device.is_some() });
    let model = Model { layers, case, on: &on, context: &context, trained: &trained };
    train(case, &on, &context, &trained, &|x, step| model.forward(x, step))
}
