//! The recorded training runs with every noisy layer computed by the CUDA kernels in f32, in the simulator or on a device: a
//! vision transformer of candle's CPU operations around them.

use super::case::Case;
use super::device;
use super::machine::{Machine, Target};
use super::on::On;
use super::plain;
use super::simulate;
use super::vit::{is_trained, tensor, train};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Shape, Tensor, Var};
use libtest_mimic::Failed;
use pace_kernels::LinearShape;
use pace_kernels::adapter::{DELTA_BIAS, DOWN, PROMPT_DOWN, PROMPT_UP, UP};
use pace_kernels::candle::PaceContext;
use pace_kernels::cuda::{
    Base, Buffer, DType, Gpu, LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, NoisyLinear,
    NoisyLinearGrads, PromptBias, PromptGrads, Source,
};
use pace_kernels::noise::NoiseShape;
use std::cell::RefCell;
use std::collections::BTreeMap;

const TYPE: DType = DType::F32;

type Slices<'a> = [&'a [f32]];
type Forward = Box<dyn Fn(&mut Machine<'_>, &Slices<'_>) -> Buffer + Send + Sync>;
type Backward = Box<dyn Fn(&mut Machine<'_>, &Slices<'_>, &[f32]) -> Vec<Buffer> + Send + Sync>;

/// An operator that runs on a machine of its own, forward and backward.
struct Op {
    place: Place,
    shape: Shape,
    forward: Forward,
    backward: Backward,
}

/// What plans are made for, and whether they run there or in the simulator.
#[derive(Clone, Copy)]
pub struct Place {
    gpu: Gpu,
    on_device: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self { gpu: simulate::GPU, on_device: false }
    }
}

impl Op {
    fn run(&self, body: impl Fn(&mut Machine<'_>)) -> candle_core::Result<()> {
        let Place { gpu, on_device } = self.place;
        let opened = on_device.then(device::open).transpose().map_err(candle_core::Error::Msg)?;
        Target { gpu, device: opened.as_ref() }.once(0, body);
        Ok(())
    }

    fn fwd(&self, arguments: &[(&CpuStorage, &Layout)]) -> candle_core::Result<(CpuStorage, Shape)> {
        let slices: Vec<&[f32]> = arguments
            .iter()
            .map(|(storage, layout)| {
                let (start, end) = layout.contiguous_offsets().expect("contiguous arguments");
                Ok(&storage.as_slice::<f32>()?[start..end])
            })
            .collect::<candle_core::Result<_>>()?;
        let out = RefCell::new(Vec::new());
        self.run(|machine| {
            let result = (self.forward)(machine, &slices);
            *out.borrow_mut() = machine.read::<f32>(result);
        })?;
        Ok((CpuStorage::F32(out.into_inner()), self.shape.clone()))
    }

    fn bwd(&self, arguments: &[&Tensor], grad: &Tensor) -> candle_core::Result<Vec<Option<Tensor>>> {
        let values = |tensor: &&Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let owned: Vec<Vec<f32>> = arguments.iter().map(values).collect::<candle_core::Result<_>>()?;
        let slices: Vec<&[f32]> = owned.iter().map(Vec::as_slice).collect();
        let grad = values(&grad)?;
        let out = RefCell::new(Vec::new());
        self.run(|machine| {
            let results = (self.backward)(machine, &slices, &grad);
            *out.borrow_mut() = results.into_iter().map(|result| machine.read::<f32>(result)).collect();
        })?;
        let tensors = out.into_inner().into_iter().zip(arguments);
        tensors.map(|(grad, like)| Tensor::from_vec(grad, like.shape(), like.device()).map(Some)).collect()
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "kernels"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = Op::bwd(self, &[a, b], grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "kernels"
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.fwd(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = Op::bwd(self, &[a, b, c], grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten(), grads.next().flatten()))
    }
}

/// A layer's frozen part and noise, as values.
#[derive(Clone)]
struct Layer {
    shape: LinearShape,
    /// `[R, N]`.
    z: Option<Vec<f32>>,
    base: Option<(Vec<f32>, Vec<f32>)>,
}

impl Layer {
    fn noise(&self, machine: &mut Machine<'_>) -> Source {
        match &self.z {
            Some(z) => Source::Given { z: machine.input("z", z), shape: NoiseShape::PerSample },
            None => Source::Off,
        }
    }

    fn base(&self, machine: &mut Machine<'_>) -> Option<Base<Buffer>> {
        let (weight, bias) = self.base.as_ref()?;
        Some(Base { weight: machine.input("W0", weight), bias: Some(machine.input("b0", bias)) })
    }

    /// `(x, ΔW, Δb)`, or `(x, Δb)`.
    fn dense(&self, machine: &mut Machine<'_>, arguments: &Slices<'_>) -> NoisyLinear<Buffer, Source> {
        let (delta_weight, delta_bias) = match arguments {
            [_, weight, bias] => (Some(machine.input("ΔW", weight)), machine.input("Δb", bias)),
            _ => (None, machine.input("Δb", arguments[1])),
        };
        NoisyLinear {
            shape: self.shape,
            noise: self.noise(machine),
            base: self.base(machine),
            delta_weight,
            delta_bias: Some(delta_bias),
            fold: false,
            allow_tf32: false,
        }
    }

    fn dense_op(self, shape: Shape) -> Op {
        let other = self.clone();
        Op {
            place: Place::default(),
            shape,
            forward: Box::new(move |machine, arguments| {
                let layer = self.dense(machine, arguments);
                let x = machine.input("x", arguments[0]);
                let y = machine.output::<f32>("y", self.shape.out_rows() * self.shape.out_features);
                let workspace = machine.output::<f32>("workspace", layer.workspace_len(&machine.gpu, TYPE));
                machine.launch(&layer.forward(&machine.gpu, TYPE, x, y, workspace).unwrap());
                y
            }),
            backward: Box::new(move |machine, arguments, grad| {
                let layer = other.dense(machine, arguments);
                let (x, dy) = (machine.input("x", arguments[0]), machine.input("dy", grad));
                let grads: Vec<Buffer> = arguments
                    .iter()
                    .map(|argument| machine.output::<f32>("gradient", argument.len()))
                    .collect();
                let wanted = NoisyLinearGrads {
                    input: Some(grads[0]),
                    delta_weight: layer.delta_weight.map(|_| grads[1]),
                    delta_bias: grads.last().copied(),
                };
                let workspace = machine.output::<f32>("workspace", layer.workspace_len(&machine.gpu, TYPE));
                machine.launch(&layer.backward(&machine.gpu, TYPE, x, dy, wanted, workspace).unwrap());
                grads
            }),
        }
    }

    /// `(x, [B | δb], A)`.
    fn low_rank(&self, machine: &mut Machine<'_>, arguments: &Slices<'_>) -> LowRankLinear<Buffer, Source> {
        let rank = arguments[2].len() / self.shape.in_features;
        let (lora_b, bias) = arguments[1].split_at(self.shape.out_features * rank);
        LowRankLinear {
            shape: self.shape,
            noise: self.noise(machine),
            base: self.base(machine),
            rank,
            lora_b: machine.input("B", lora_b),
            lora_a: machine.input("A", arguments[2]),
            delta_bias: Some(machine.input("δb", bias)),
            scale: 1.0,
            allow_tf32: false,
        }
    }

    fn low_rank_op(self, shape: Shape) -> Op {
        let other = self.clone();
        let forward = |layer: &LowRankLinear<Buffer, Source>, machine: &mut Machine<'_>, x: Buffer| {
            let s = machine.output::<f32>("s", layer.shape.in_rows() * layer.rank);
            let y = machine.output::<f32>("y", layer.shape.out_rows() * layer.shape.out_features);
            let workspace = machine.output::<f32>("workspace", layer.workspace_len(&machine.gpu, TYPE));
            machine.launch(&layer.forward(&machine.gpu, TYPE, x, s, y, workspace).unwrap());
            (s, y)
        };
        Op {
            place: Place::default(),
            shape,
            forward: Box::new(move |machine, arguments| {
                let layer = self.low_rank(machine, arguments);
                let x = machine.input("x", arguments[0]);
                forward(&layer, machine, x).1
            }),
            backward: Box::new(move |machine, arguments, grad| {
                let layer = other.low_rank(machine, arguments);
                let (x, dy) = (machine.input("x", arguments[0]), machine.input("dy", grad));
                let (s, _) = forward(&layer, machine, x);
                let n = other.shape.out_features;
                let [dx, lora_b, bias, lora_a] = [arguments[0].len(), n * layer.rank, n, arguments[2].len()]
                    .map(|len| machine.output::<f32>("gradient", len));
                let grads = LowRankGrads {
                    input: Some(dx),
                    lora_b: Some(lora_b),
                    lora_a: Some(lora_a),
                    delta_bias: Some(bias),
                };
                let workspace = machine.output::<f32>("workspace", layer.workspace_len(&machine.gpu, TYPE));
                machine.launch(&layer.backward(&machine.gpu, TYPE, x, s, dy, grads, workspace).unwrap());
                let joined = [machine.read::<f32>(lora_b), machine.read::<f32>(bias)].concat();
                vec![dx, machine.input("joined", &joined), lora_a]
            }),
        }
    }
}

/// `(B, A)` to `W0 ⊙ (B·A)`.
fn lora_mul(base: Vec<f32>, [n, k]: [usize; 2]) -> Op {
    let factors = move |machine: &mut Machine<'_>, arguments: &Slices<'_>, base: &[f32]| {
        let factors = LoraFactors {
            out_features: n,
            in_features: k,
            rank: arguments[0].len() / n,
            lora_b: machine.input("B", arguments[0]),
            lora_a: machine.input("A", arguments[1]),
            scale: 1.0,
        };
        (factors, Some(machine.input("W0", base)))
    };
    let other = base.clone();
    Op {
        place: Place::default(),
        shape: Shape::from((n, k)),
        forward: Box::new(move |machine, arguments| {
            let (factors, base) = factors(machine, arguments, &base);
            let out = machine.output::<f32>("ΔW", n * k);
            machine.launch(&factors.weight(TYPE, base, out).unwrap());
            out
        }),
        backward: Box::new(move |machine, arguments, grad| {
            let (factors, base) = factors(machine, arguments, &other);
            let grad = machine.input("dΔW", grad);
            let [lora_b, lora_a] = [0, 1].map(|i| machine.output::<f32>("gradient", arguments[i].len()));
            let workspace = machine.output::<f32>("workspace", factors.workspace_len(TYPE));
            machine.launch(
                &factors.backward(TYPE, base, grad, LoraGrads { lora_b, lora_a }, workspace).unwrap(),
            );
            vec![lora_b, lora_a]
        }),
    }
}

/// `(Pd, Pu, δb)`, or `(Pd, Pu)`, to `Δb`.
fn prompt(base: (Vec<f32>, Vec<f32>), [n, k]: [usize; 2]) -> Op {
    let prompt =
        move |machine: &mut Machine<'_>, arguments: &Slices<'_>, base: &(Vec<f32>, Vec<f32>)| PromptBias {
            out_features: n,
            in_features: k,
            rank: arguments[1].len(),
            base_weight: machine.input("W0", &base.0),
            base_bias: Some(machine.input("b0", &base.1)),
            prompt_down: machine.input("Pd", arguments[0]),
            prompt_up: machine.input("Pu", arguments[1]),
            delta_bias: arguments.get(2).map(|bias| machine.input("δb", bias)),
        };
    let other = base.clone();
    Op {
        place: Place::default(),
        shape: Shape::from(n),
        forward: Box::new(move |machine, arguments| {
            let prompt = prompt(machine, arguments, &base);
            let out = machine.output::<f32>("Δb", n);
            let workspace = machine.output::<f32>("workspace", prompt.workspace_len(TYPE));
            machine.launch(&prompt.forward(TYPE, out, workspace).unwrap());
            out
        }),
        backward: Box::new(move |machine, arguments, grad| {
            let prompt = prompt(machine, arguments, &other);
            let grad = machine.input("dΔb", grad);
            let out: Vec<Buffer> =
                arguments.iter().map(|argument| machine.output::<f32>("gradient", argument.len())).collect();
            let grads =
                PromptGrads { prompt_down: out[0], prompt_up: out[1], delta_bias: out.get(2).copied() };
            let workspace = machine.output::<f32>("workspace", prompt.workspace_len(TYPE));
            machine.launch(&prompt.backward(TYPE, grad, grads, workspace).unwrap());
            out
        }),
    }
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

    fn place(&self, op: Op) -> Op {
        let Layers::Kernels(place) = self.layers else { return op };
        Op { place, ..op }
    }

    /// A noisy layer in training step `step`, or in evaluation.
    fn linear(&self, name: &str, x: &Tensor, step: Option<usize>) -> Result<Tensor, Failed> {
        if let Layers::Plain = self.layers {
            return self.plain_linear(name, x, step);
        }
        let branches = if step.is_some() { self.context.branches() } else { 1 };
        let of = |parameter: &str| self.trained(&format!("{name}.{parameter}"));
        let head = of("base_weight").zip(of("base_bias"));
        let weight = match head {
            Some((weight, _)) => weight.clone(),
            None => self.frozen(&format!("{name}.base_weight"))?,
        };
        let (n, k) = weight.dims2()?;
        let mut dims = x.dims().to_vec();
        let tokens = dims[1..dims.len() - 1].iter().product();
        let shape = LinearShape {
            branches,
            batch: dims[0] / branches,
            tokens,
            in_features: k,
            out_features: n,
            shared_input: false,
        };
        if let Some(last) = dims.last_mut() {
            *last = n;
        }
        let z = match step {
            Some(step) => self.case.get_if_present::<f32>(&format!("step{step}.z.{name}"))?,
            None => None,
        };
        let (x, dims) = (x.contiguous()?, Shape::from(dims));
        if let Some((weight, bias)) = head {
            return Ok(x.apply_op3(
                weight,
                bias,
                self.place(Layer { shape, z, base: None }.dense_op(dims)),
            )?);
        }
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let base = (values(&weight)?, values(&self.frozen(&format!("{name}.base_bias"))?)?);
        let layer = Layer { shape, z, base: Some(base.clone()) };
        let (factors, bias, prompts) =
            (of(DOWN).zip(of(UP)), of(DELTA_BIAS), of(PROMPT_DOWN).zip(of(PROMPT_UP)));
        Ok(match (factors, bias, prompts) {
            (Some((lora_b, lora_a)), Some(bias), None) => {
                let joined = Tensor::cat(&[&lora_b.flatten_all()?, bias], 0)?;
                x.apply_op3(&joined, lora_a, self.place(layer.low_rank_op(dims)))?
            }
            (Some((lora_b, lora_a)), Some(bias), Some((prompt_down, prompt_up))) => {
                let delta_weight = lora_b.apply_op2(lora_a, self.place(lora_mul(base.0.clone(), [n, k])))?;
                let delta_bias = prompt_down.apply_op3(prompt_up, bias, self.place(prompt(base, [n, k])))?;
                x.apply_op3(&delta_weight, &delta_bias, self.place(layer.dense_op(dims)))?
            }
            (None, None, Some((prompt_down, prompt_up))) => {
                let delta_bias = prompt_down.apply_op2(prompt_up, self.place(prompt(base, [n, k])))?;
                x.apply_op2(&delta_bias, self.place(layer.dense_op(dims)))?
            }
            _ => return Err(format!("`{name}` has the parameters of no adapter").into()),
        })
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
