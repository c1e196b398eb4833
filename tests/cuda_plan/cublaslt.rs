//! Plans of the linear layers by cuBLASLt compute what the layers promise, whatever the layer has and whichever gradients are wanted.

use crate::support::*;
use crate::symbolic::{self, Machine, Sum, sum};
use pace_kernels::LinearShape;
use pace_kernels::cuda::{
    Base, Buffer, DType, Family, Gpu, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, Plan,
    Source, Step,
};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};

/// What differs between devices is the memory of the library's GEMMs.
pub const GPUS: [Gpu; 2] = [Gpu::A100.with_family(Family::CublasLt), Gpu::H100.with_family(Family::CublasLt)];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
pub const SCALE: f32 = 0.5;

/// No two sizes of a matrix are the same, so that none can stand in for another.
pub const SMALL: LinearShape =
    LinearShape { branches: 2, batch: 3, tokens: 5, in_features: 7, out_features: 24, shared_input: false };
pub const SHARED: LinearShape = LinearShape { shared_input: true, ..SMALL };
/// With several parts of the sum over rows, and GEMMs that could have more memory than they get.
pub const LARGE: LinearShape =
    LinearShape { batch: 64, tokens: 197, in_features: 768, out_features: 3072, ..SHARED };
const SHAPES: [LinearShape; 6] = [
    SMALL,
    SHARED,
    LinearShape { branches: 1, ..SMALL },
    LinearShape { branches: 1, out_features: 23, ..SHARED },
    LinearShape { shared_input: false, ..LARGE },
    LARGE,
];
pub const RANK: usize = 4;

/// A tensor far from all others.
pub fn place(i: u64, len: usize) -> Buffer {
    buffer(i << 40, len)
}

/// Every source of noise, for a shape.
fn sources(shape: &LinearShape) -> [Source; 6] {
    let (r, m, n) = (shape.samples(), shape.out_rows(), shape.out_features);
    [
        Source::Off,
        Source::Generated(generator(PerSample, 9)),
        Source::Generated(generator(PerToken, 0)),
        Source::Keyed { generator: generator(PerToken, 3), key: place(1, 1) },
        Source::Given { z: place(2, r * n), shape: PerSample },
        Source::Given { z: place(2, m * n), shape: PerToken },
    ]
}

pub fn bases(shape: &LinearShape) -> [Option<Base<Buffer>>; 3] {
    let (k, n) = (shape.in_features, shape.out_features);
    let weight = place(3, n * k);
    [None, Some(Base { weight, bias: None }), Some(Base { weight, bias: Some(place(4, n)) })]
}

/// A workspace of this length; the start is a multiple of 4 bytes only, where alignment costs the most.
pub fn exact(len: usize) -> Buffer {
    buffer(60 << 40 | 4, len)
}

fn dense_layers(shape: LinearShape) -> impl Iterator<Item = NoisyLinear<Buffer, Source>> {
    let (k, n) = (shape.in_features, shape.out_features);
    let terms = [None, Some(())];
    sources(&shape)
        .into_iter()
        .flat_map(move |noise| {
            bases(&shape).into_iter().flat_map(move |base| {
                terms.into_iter().flat_map(move |weight| {
                    terms.into_iter().map(move |bias| NoisyLinear {
                        shape,
                        noise,
                        base,
                        delta_weight: weight.map(|()| place(5, n * k)),
                        delta_bias: bias.map(|()| place(6, n)),
                        fold: true,
                        allow_tf32: bias.is_some(),
                    })
                })
            })
        })
        .filter(|layer| layer.base.is_some() || layer.delta_weight.is_some())
}

fn low_rank_layers(shape: LinearShape, rank: usize) -> impl Iterator<Item = LowRankLinear<Buffer, Source>> {
    let (k, n) = (shape.in_features, shape.out_features);
    sources(&shape).into_iter().flat_map(move |noise| {
        bases(&shape).into_iter().flat_map(move |base| {
            [None, Some(place(6, n))].into_iter().map(move |delta_bias| LowRankLinear {
                shape,
                noise,
                base,
                rank,
                lora_b: place(7, n * rank),
                lora_a: place(8, rank * k),
                delta_bias,
                scale: SCALE,
                allow_tf32: delta_bias.is_none(),
            })
        })
    })
}

pub fn dense_grads(shape: &LinearShape, [input, weight, bias]: [bool; 3]) -> NoisyLinearGrads<Buffer> {
    let (k, n) = (shape.in_features, shape.out_features);
    NoisyLinearGrads {
        input: input.then(|| place(20, shape.in_rows() * k)),
        delta_weight: weight.then(|| place(21, n * k)),
        delta_bias: bias.then(|| place(22, n)),
    }
}

pub fn low_rank_grads(shape: &LinearShape, [input, lora_b, lora_a, bias]: [bool; 4]) -> LowRankGrads<Buffer> {
    let (k, n) = (shape.in_features, shape.out_features);
    LowRankGrads {
        input: input.then(|| place(20, shape.in_rows() * k)),
        lora_b: lora_b.then(|| place(23, n * RANK)),
        lora_a: lora_a.then(|| place(24, RANK * k)),
        delta_bias: bias.then(|| place(22, n)),
    }
}

fn choices<const COUNT: usize>() -> impl Iterator<Item = [bool; COUNT]> {
    (0..1 << COUNT).map(|bits: u32| std::array::from_fn(|i| bits >> i & 1 == 1))
}

/// `x`, `s`, `y` and `dy`.
pub fn activations(shape: &LinearShape) -> [Buffer; 4] {
    let (rows, k, n, m) = (shape.in_rows(), shape.in_features, shape.out_features, shape.out_rows());
    [place(10, rows * k), place(11, rows * RANK), place(12, m * n), place(13, m * n)]
}

fn add_base(machine: &mut Machine, base: Option<Base<Buffer>>, shape: &LinearShape) {
    let (k, n) = (shape.in_features, shape.out_features);
    if let Some(base) = base {
        machine.input("W", base.weight, [n, k]);
        base.bias.into_iter().for_each(|bias| machine.input("b", bias, [1, n]));
    }
}

/// A machine with the inputs of a dense layer and its `x`.
pub fn dense_machine(layer: &NoisyLinear<Buffer, Source>, dtype: DType, workspace: Buffer) -> Machine {
    let shape = &layer.shape;
    let (k, n) = (shape.in_features, shape.out_features);
    let mut machine = Machine::new(*shape, dtype, layer.allow_tf32, layer.noise, workspace);
    add_base(&mut machine, layer.base, shape);
    layer.delta_weight.into_iter().for_each(|weight| machine.input("dW", weight, [n, k]));
    layer.delta_bias.into_iter().for_each(|bias| machine.input("db", bias, [1, n]));
    machine.input("x", activations(shape)[0], [shape.in_rows(), k]);
    machine
}

fn low_rank_machine(layer: &LowRankLinear<Buffer, Source>, dtype: DType, workspace: Buffer) -> Machine {
    let shape = &layer.shape;
    let (k, n) = (shape.in_features, shape.out_features);
    let mut machine = Machine::new(*shape, dtype, layer.allow_tf32, layer.noise, workspace);
    add_base(&mut machine, layer.base, shape);
    machine.input("B", layer.lora_b, [n, RANK]);
    machine.input("A", layer.lora_a, [RANK, k]);
    layer.delta_bias.into_iter().for_each(|bias| machine.input("db", bias, [1, n]));
    machine.input("x", activations(shape)[0], [shape.in_rows(), k]);
    machine
}

/// The machine after a forward pass; `y` is its output.
pub fn dense_forward(gpu: &Gpu, dtype: DType, layer: &NoisyLinear<Buffer, Source>) -> (Plan, Machine) {
    let [x, _, y, _] = activations(&layer.shape);
    let workspace = exact(layer.workspace_len(gpu, dtype));
    let plan = layer.forward(gpu, dtype, x, y, workspace).unwrap();
    let mut machine = dense_machine(layer, dtype, workspace);
    machine.output("y", y, [layer.shape.out_rows(), layer.shape.out_features]);
    machine.run(&plan);
    (plan, machine)
}

pub fn dense_backward(
    gpu: &Gpu,
    dtype: DType,
    layer: &NoisyLinear<Buffer, Source>,
    wanted: [bool; 3],
) -> (Plan, Machine) {
    let shape = &layer.shape;
    let (k, n) = (shape.in_features, shape.out_features);
    let [x, _, _, dy] = activations(shape);
    let workspace = exact(layer.workspace_len(gpu, dtype));
    let grads = dense_grads(shape, wanted);
    let plan = layer.backward(gpu, dtype, x, dy, grads, workspace).unwrap();
    let mut machine = dense_machine(layer, dtype, workspace);
    machine.input("g", dy, [shape.out_rows(), n]);
    grads.input.into_iter().for_each(|dx| machine.output("dx", dx, [shape.in_rows(), k]));
    grads.delta_weight.into_iter().for_each(|weight| machine.output("ddW", weight, [n, k]));
    grads.delta_bias.into_iter().for_each(|bias| machine.output("ddb", bias, [1, n]));
    machine.run(&plan);
    (plan, machine)
}

pub fn low_rank_forward(gpu: &Gpu, dtype: DType, layer: &LowRankLinear<Buffer, Source>) -> (Plan, Machine) {
    let shape = &layer.shape;
    let [x, s, y, _] = activations(shape);
    let workspace = exact(layer.workspace_len(gpu, dtype));
    let plan = layer.forward(gpu, dtype, x, s, y, workspace).unwrap();
    let mut machine = low_rank_machine(layer, dtype, workspace);
    machine.output("s", s, [shape.in_rows(), RANK]);
    machine.output("y", y, [shape.out_rows(), shape.out_features]);
    machine.run(&plan);
    (plan, machine)
}

pub fn low_rank_backward(
    gpu: &Gpu,
    dtype: DType,
    layer: &LowRankLinear<Buffer, Source>,
    wanted: [bool; 4],
) -> (Plan, Machine) {
    let shape = &layer.shape;
    let (k, n) = (shape.in_features, shape.out_features);
    let [x, s, _, dy] = activations(shape);
    let workspace = exact(layer.workspace_len(gpu, dtype));
    let grads = low_rank_grads(shape, wanted);
    let plan = layer.backward(gpu, dtype, x, s, dy, grads, workspace).unwrap();
    let mut machine = low_rank_machine(layer, dtype, workspace);
    machine.input("s", s, [shape.in_rows(), RANK]);
    machine.input("g", dy, [shape.out_rows(), n]);
    grads.input.into_iter().for_each(|dx| machine.output("dx", dx, [shape.in_rows(), k]));
    grads.lora_b.into_iter().for_each(|lora_b| machine.output("dB", lora_b, [n, RANK]));
    grads.lora_a.into_iter().for_each(|lora_a| machine.output("dA", lora_a, [RANK, k]));
    grads.delta_bias.into_iter().for_each(|bias| machine.output("ddb", bias, [1, n]));
    machine.run(&plan);
    (plan, machine)
}

/// How many GEMMs a plan has, and the launches.
fn counts(plan: &Plan) -> (usize, usize) {
    let gemms = plan.steps().iter().filter(|step| matches!(step, Step::Gemm(_))).count();
    assert_eq!(gemms + plan.launches().count(), plan.steps().len());
    (gemms, plan.launches().count())
}

fn is_shared(shape: &LinearShape) -> bool {
    shape.shared_input && shape.branches == 2
}

/// `z*(term)`, or the term where there is no noise.
fn noisy(noise: Source, term: &str) -> String {
    if noise == Source::Off { term.to_owned() } else { format!("z*({term})") }
}

fn over_branches(shape: &LinearShape, term: &str) -> String {
    if is_shared(shape) { format!("Σb({term})") } else { term.to_owned() }
}

/// The gradients to the base and to the adapter: `g`, and `e = z*g`.
fn output_gradients(shape: &LinearShape, noise: Source) -> [String; 2] {
    [over_branches(shape, "g"), over_branches(shape, &noisy(noise, "g"))]
}

fn product(left: &str, right: &str) -> String {
    symbolic::product((left, false), (right, false))
}

fn transposed_product(left: &str, right: &str) -> String {
    symbolic::product((left, true), (right, false))
}

/// The base's terms of `y`.
fn base_terms(base: Option<Base<Buffer>>) -> Vec<(f32, String)> {
    let weight = base.map(|_| (1.0, "x@W'".to_owned()));
    let bias = base.and_then(|base| base.bias).map(|_| (1.0, "b".to_owned()));
    weight.into_iter().chain(bias).collect()
}

fn assert_value(machine: &Machine, name: &str, want: &Sum, what: &dyn std::fmt::Debug) {
    assert_eq!(machine.value(name), want, "{name} of {what:?}: {:#?}", machine.trace);
}

fn count(terms: impl IntoIterator<Item = bool>) -> usize {
    terms.into_iter().filter(|&term| term).count()
}

#[test]
fn dense_layers_compute_their_formula() {
    for (gpu, dtype, shape) in runs() {
        for layer in dense_layers(shape) {
            let (plan, machine) = dense_forward(&gpu, dtype, &layer);
            let (weight, bias) = (layer.delta_weight.is_some(), layer.delta_bias.is_some());
            let adapter = [weight.then_some("x@dW'"), bias.then_some("db")].into_iter().flatten();
            let adapter = adapter.map(|term| (1.0, noisy(layer.noise, term)));
            let want = sum(base_terms(layer.base).into_iter().chain(adapter));
            assert_value(&machine, "y", &want, &layer);

            // Only a bias under GEMMs that cannot add it, noise on something, and branches that part need an epilogue.
            let is_noisy = layer.noise != Source::Off && (weight || bias);
            let epilogue = is_shared(&shape) || is_noisy || (bias && !weight);
            let gemms = count([layer.base.is_some(), weight]);
            assert_eq!(counts(&plan), (gemms, usize::from(epilogue)), "{:?}", machine.trace);
        }
    }
}

#[test]
fn dense_gradients_are_those_of_the_formula() {
    for (gpu, dtype, shape) in runs() {
        for layer in dense_layers(shape) {
            let has_weight = layer.delta_weight.is_some();
            for wanted in choices::<3>().filter(|&[_, weight, _]| has_weight || !weight) {
                let [input, weight, bias] = wanted;
                let (plan, machine) = dense_backward(&gpu, dtype, &layer, wanted);
                let [g, e] = &output_gradients(&shape, layer.noise);
                if input {
                    let base = layer.base.map(|_| (1.0, product(g, "W")));
                    let adapter = has_weight.then(|| (1.0, product(e, "dW")));
                    let want = sum(base.into_iter().chain(adapter));
                    assert_value(&machine, "dx", &want, &layer);
                }
                if weight {
                    assert_value(&machine, "ddW", &sum([(1.0, transposed_product(e, "x"))]), &layer);
                }
                if bias {
                    assert_value(&machine, "ddb", &sum([(1.0, format!("Σr({e})"))]), &layer);
                }
                let needs_g = input && layer.base.is_some();
                let needs_e = weight || (input && has_weight);
                let makes = (is_shared(&shape) && (needs_g || needs_e))
                    || (layer.noise != Source::Off && needs_e)
                    || bias;
                let gemms = count([needs_g, input && has_weight, weight]);
                assert_eq!(counts(&plan), (gemms, count([makes, bias])), "{:?}", machine.trace);
            }
        }
    }
}

#[test]
fn low_rank_layers_compute_their_formula() {
    for (gpu, dtype, shape) in runs() {
        for layer in low_rank_layers(shape, RANK) {
            let (plan, machine) = low_rank_forward(&gpu, dtype, &layer);
            assert_value(&machine, "s", &sum([(SCALE, "x@A'")]), &layer);
            let adapter = (SCALE, noisy(layer.noise, "x@A'@B'"));
            let bias = layer.delta_bias.map(|_| (1.0, noisy(layer.noise, "db")));
            let want = sum(base_terms(layer.base).into_iter().chain([adapter]).chain(bias));
            assert_value(&machine, "y", &want, &layer);
            let epilogue = is_shared(&shape) || layer.noise != Source::Off;
            let gemms = 2 + usize::from(layer.base.is_some());
            assert_eq!(counts(&plan), (gemms, usize::from(epilogue)), "{:?}", machine.trace);
        }
    }
}

#[test]
fn low_rank_gradients_are_those_of_the_formula() {
    for (gpu, dtype, shape) in runs() {
        for layer in low_rank_layers(shape, RANK) {
            for wanted in choices::<4>() {
                let [input, lora_b, lora_a, bias] = wanted;
                let (plan, machine) = low_rank_backward(&gpu, dtype, &layer, wanted);
                let [g, e] = &output_gradients(&shape, layer.noise);
                let ds = product(e, "B");
                if input {
                    let base = layer.base.map(|_| (1.0, product(g, "W")));
                    let want = sum(base.into_iter().chain([(SCALE, product(&ds, "A"))]));
                    assert_value(&machine, "dx", &want, &layer);
                }
                if lora_b {
                    assert_value(&machine, "dB", &sum([(1.0, transposed_product(e, "s"))]), &layer);
                }
                if lora_a {
                    assert_value(&machine, "dA", &sum([(SCALE, transposed_product(&ds, "x"))]), &layer);
                }
                if bias {
                    assert_value(&machine, "ddb", &sum([(1.0, format!("Σr({e})"))]), &layer);
                }
                let needs_g = input && layer.base.is_some();
                let needs_e = input || lora_b || lora_a;
                let makes = (needs_e && (is_shared(&shape) || layer.noise != Source::Off)) || bias;
                let gemms = count([input || lora_a, needs_g, input, lora_b, lora_a]);
                assert_eq!(counts(&plan), (gemms, count([makes, bias])), "{:?}", machine.trace);
            }
        }
    }
}

/// Every shape in every type, on every device.
fn runs() -> impl Iterator<Item = (Gpu, DType, LinearShape)> {
    SHAPES.into_iter().flat_map(|shape| {
        DTYPES.into_iter().flat_map(move |dtype| GPUS.into_iter().map(move |gpu| (gpu, dtype, shape)))
    })
}
