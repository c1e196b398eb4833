//! Plans of the family for Hopper: which kernels compute what, and what goes to other families.

use pace_kernels::LinearShape;
use pace_kernels::cuda::{
    Base, Buffer, DType, Family, Gpu, Launch, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads,
    Plan, Source, Step,
};
use pace_kernels::noise::NoiseShape::{self, PerSample, PerToken};

use crate::support::generator;

const VIT: LinearShape = LinearShape {
    branches: 2,
    batch: 64,
    tokens: 197,
    in_features: 768,
    out_features: 3072,
    shared_input: false,
};
const HOPPER: Gpu = Gpu::H100.with_family(Family::Sm90);

/// Tensors one behind the other, each at a multiple of 256 bytes.
struct Tensors(u64);

impl Tensors {
    fn take(&mut self, len: usize) -> Buffer {
        let address = self.0;
        self.0 += (len as u64 * 4).next_multiple_of(256);
        Buffer { address, len }
    }
}

/// What a test changes.
#[derive(Clone, Copy)]
struct Case {
    gpu: Gpu,
    shape: LinearShape,
    dtype: DType,
    noise: Option<NoiseShape>,
    fold: bool,
    rank: usize,
    has_base: bool,
    /// Added to the address of x.
    shift: u64,
}

const CASE: Case = Case {
    gpu: HOPPER,
    shape: VIT,
    dtype: DType::BF16,
    noise: Some(PerSample),
    fold: false,
    rank: 16,
    has_base: true,
    shift: 0,
};

impl Case {
    fn tensors(&self, tensors: &mut Tensors) -> (Buffer, Buffer, Source, Option<Base<Buffer>>) {
        let LinearShape { in_features: k, out_features: n, .. } = self.shape;
        let mut x = tensors.take(self.shape.in_rows() * k + 8);
        x = Buffer { address: x.address + self.shift, len: x.len - 8 };
        let y = tensors.take(self.shape.out_rows() * n);
        let noise = self.noise.map_or(Source::Off, |shape| Source::Generated(generator(shape, 0)));
        (x, y, noise, self.has_base.then(|| Base { weight: tensors.take(n * k), bias: None }))
    }

    /// Both passes of the dense layer.
    fn dense(&self) -> [Plan; 2] {
        let mut tensors = Tensors(1 << 20);
        let (x, y, noise, base) = self.tensors(&mut tensors);
        let (len, n) = (self.shape.in_features * self.shape.out_features, self.shape.out_features);
        let [delta, grad] = [len; 2].map(|len| tensors.take(len));
        let [delta_bias, bias_grad] = [n; 2].map(|len| Some(tensors.take(len)));
        let (fold, allow_tf32) = (self.fold, false);
        let (shape, delta_weight) = (self.shape, Some(delta));
        let layer = NoisyLinear { shape, noise, base, delta_weight, delta_bias, fold, allow_tf32 };
        let workspace = tensors.take(layer.workspace_len(&self.gpu, self.dtype));
        let dx = tensors.take(x.len);
        let grads = NoisyLinearGrads { input: Some(dx), delta_weight: Some(grad), delta_bias: bias_grad };
        [
            layer.forward(&self.gpu, self.dtype, x, y, workspace).unwrap(),
            layer.backward(&self.gpu, self.dtype, x, y, grads, workspace).unwrap(),
        ]
    }

    /// Both passes of the low-rank layer.
    fn low_rank(&self) -> [Plan; 2] {
        let mut tensors = Tensors(1 << 20);
        let (x, y, noise, base) = self.tensors(&mut tensors);
        let (shape, rank) = (self.shape, self.rank);
        let [lora_b, lora_b_grad] = [shape.out_features * rank; 2].map(|len| tensors.take(len));
        let [lora_a, lora_a_grad] = [shape.in_features * rank; 2].map(|len| tensors.take(len));
        let s = tensors.take(shape.in_rows() * rank);
        let (delta_bias, scale, allow_tf32) = (None, 1.0, false);
        let layer = LowRankLinear { shape, noise, base, rank, lora_b, lora_a, delta_bias, scale, allow_tf32 };
        let workspace = tensors.take(layer.workspace_len(&self.gpu, self.dtype));
        let input = Some(tensors.take(x.len));
        let (lora_b, lora_a) = (Some(lora_b_grad), Some(lora_a_grad));
        let grads = LowRankGrads { input, lora_b, lora_a, delta_bias: None };
        [
            layer.forward(&self.gpu, self.dtype, x, s, y, workspace).unwrap(),
            layer.backward(&self.gpu, self.dtype, x, s, y, grads, workspace).unwrap(),
        ]
    }
}

/// The names of a plan's kernels, `GEMM` for those of the library.
fn names(plan: &Plan) -> Vec<&str> {
    let steps = plan.steps().iter();
    steps
        .map(|step| match step {
            Step::Launch(launch) => launch.kernel.name,
            _ => "GEMM",
        })
        .collect()
}

fn is_sm90(plan: &Plan) -> bool {
    plan.launches().any(|launch| launch.kernel.file.starts_with("sm90/"))
}

#[test]
fn kernels_are_chosen_by_rank_tokens_and_noise() {
    let [forward, backward] = CASE.low_rank();
    assert_eq!(names(&forward), ["sm90_low_rank_linear_16_bf16"]);
    let factors = ["noise_fill", "sm90_low_rank_factors_16_bf16", "partial_sums_bf16", "partial_sums_bf16"];
    let rest = ["sm90_low_rank_input_16_bf16", "sm90_low_rank_product_16_bf16", "partial_sums_bf16"];
    assert_eq!(names(&backward), [&factors[..], &rest].concat());
    let [forward, backward] = Case { rank: 17, dtype: DType::F16, ..CASE }.low_rank();
    assert_eq!(names(&forward), ["sm90_low_rank_linear_32_f16"]);
    assert_eq!(names(&backward)[1], "sm90_low_rank_factors_32_f16");
    let [_, backward] = Case { noise: None, ..CASE }.low_rank();
    assert_eq!(names(&backward)[0], "sm90_low_rank_factors_16_bf16");
    // A draw for each token, or few tokens: the portable kernel.
    for case in
        [Case { noise: Some(PerToken), ..CASE }, Case { shape: LinearShape { tokens: 31, ..VIT }, ..CASE }]
    {
        let [_, backward] = case.low_rank();
        assert_eq!(names(&backward)[0], "low_rank_factors_16_bf16");
        assert!(is_sm90(&backward));
    }
    let [_, backward] = Case { fold: true, ..CASE }.dense();
    let gradients = ["sm90_weight_gradient_bf16", "sm90_weight_sums_bf16"];
    assert_eq!(names(&backward), [&["noise_fill", "sm90_folded_input_200_bf16"][..], &gradients].concat());

    let exact = |case: Case| names(&case.dense()[0])[0].to_owned();
    assert_eq!(exact(CASE), "sm90_noisy_linear_exact_bf16");
    assert_eq!(exact(Case { noise: Some(PerToken), ..CASE }), "sm90_noisy_linear_exact_any_bf16");
    assert_eq!(exact(Case { noise: None, ..CASE }), "sm90_noisy_linear_exact_bf16");
    // 128 rows may be of five samples.
    let few = Case { shape: LinearShape { tokens: 42, ..VIT }, ..CASE };
    assert_eq!(exact(few), "sm90_noisy_linear_exact_any_bf16");
    assert_eq!(
        exact(Case { shape: LinearShape { tokens: 43, ..VIT }, ..CASE }),
        "sm90_noisy_linear_exact_bf16"
    );

    for (tokens, unit) in [
        (197, 200),
        (198, 200),
        (196, 200),
        (577, 200),
        (1024, 200),
        (257, 136),
        (261, 136),
        (256, 136),
        (49, 64),
        (64, 64),
    ] {
        let folded = Case { fold: true, shape: LinearShape { tokens, ..VIT }, ..CASE };
        let [forward, backward] = folded.dense();
        assert_eq!(names(&forward), ["noise_fill", &format!("sm90_folded_linear_{unit}_bf16")], "{tokens}");
        assert_eq!(
            names(&backward)[..2],
            ["noise_fill", &format!("sm90_folded_input_{unit}_bf16")],
            "{tokens}"
        );
    }
    // More waste than tokens, or a draw for each token: not folded.
    for case in
        [Case { shape: LinearShape { tokens: 31, ..VIT }, ..CASE }, Case { noise: Some(PerToken), ..CASE }]
    {
        let [forward, backward] = Case { fold: true, ..case }.dense();
        assert_eq!(names(&forward), ["sm90_noisy_linear_exact_any_bf16"]);
        assert!(!is_sm90(&backward), "{:?}", names(&backward));
    }
}

#[test]
fn what_the_kernels_do_not_support_goes_to_another_family() {
    let cases = [
        Case { dtype: DType::F32, ..CASE },
        Case { shape: LinearShape { in_features: 764, ..VIT }, ..CASE },
        Case { shape: LinearShape { out_features: 1001, ..VIT }, ..CASE },
        Case { has_base: false, ..CASE },
        Case { shift: 8, ..CASE },
    ];
    for case in cases {
        let gpus = [case.gpu, Gpu { has_cublaslt: false, ..case.gpu }];
        for case in gpus.map(|gpu| Case { gpu, fold: true, ..case }) {
            for plan in case.dense().iter().chain(&case.low_rank()) {
                assert!(!is_sm90(plan), "{:?}", names(plan));
            }
        }
    }
    for case in [
        Case { rank: 33, ..CASE },
        Case { noise: Some(PerToken), ..CASE },
        Case { shape: LinearShape { tokens: 42, ..VIT }, ..CASE },
    ] {
        assert!(!is_sm90(&case.low_rank()[0]));
    }
}

#[test]
fn what_was_measured_is_the_default() {
    let unforced = Case { gpu: Gpu::H100, fold: true, ..CASE };
    assert!(unforced.low_rank().iter().chain(&unforced.dense()).all(is_sm90));
    let per_token = Case { noise: Some(PerToken), ..unforced };
    let older = Case { gpu: Gpu { has_sm90: false, ..Gpu::H100 }, ..unforced };
    for case in [per_token, older] {
        assert!(case.low_rank().iter().chain(&case.dense()).all(|plan| !is_sm90(plan)));
    }
    // Backward passes with short samples or little to do; forward passes without a tile for every cluster are exact.
    let passes = |shape: LinearShape| {
        let case = Case { shape, ..unforced };
        [case.dense(), case.low_rank()].map(|passes| passes.map(|plan| is_sm90(&plan)))
    };
    let of = |batch, tokens, in_features, out_features| LinearShape {
        batch,
        tokens,
        in_features,
        out_features,
        ..VIT
    };
    assert_eq!(passes(of(64, 49, 1024, 4096)), [[true, false], [true, true]]);
    assert_eq!(passes(of(8, 577, 1024, 1024)), [[true, false], [true, true]]);
    assert_eq!(passes(of(16, 197, 768, 3072)), [[true, true], [true, true]]);
    assert_eq!(passes(of(2, 1024, 4096, 4096)), [[true, true], [true, true]]);
    let few = |batch| {
        let [forward, _] = Case { shape: of(batch, 197, 768, 768), ..unforced }.dense();
        names(&forward).last().unwrap().to_string()
    };
    assert_eq!([few(4), few(64)], ["sm90_noisy_linear_exact_bf16", "sm90_folded_linear_200_bf16"]);
}

/// What a device or the driver would refuse.
#[test]
fn launches_are_what_a_device_takes() {
    let shapes =
        [VIT, LinearShape { shared_input: true, ..VIT }, LinearShape { tokens: 49, in_features: 104, ..VIT }];
    let mut seen = 0;
    for (shape, rank, fold) in shapes.into_iter().flat_map(|shape| [(shape, 10, false), (shape, 32, true)]) {
        let case = Case { shape, rank, fold, ..CASE };
        for plan in case.dense().iter().chain(&case.low_rank()) {
            // The sums of partial sums are a plain kernel.
            let is_wgmma = |launch: &&Launch| {
                launch.kernel.file.starts_with("sm90/") && !launch.kernel.name.contains("sums")
            };
            for launch in plan.launches().filter(is_wgmma) {
                seen += 1;
                assert!(launch.shared_bytes <= HOPPER.max_shared_bytes, "{launch:?}");
                assert!(launch.grid[0].is_multiple_of(launch.cluster[0]), "{launch:?}");
                assert!(launch.grid[0] <= HOPPER.multiprocessors, "{launch:?}");
                assert_eq!(launch.params.align(), 64);
                assert!(launch.params.bytes().len().is_multiple_of(64));
                assert!(!launch.params.maps().is_empty());
                for &(offset, map) in launch.params.maps() {
                    assert!(offset.is_multiple_of(64) && offset + 128 <= launch.params.bytes().len());
                    assert!(map.address.is_multiple_of(16) && map.rank == 3);
                    assert!(map.strides.iter().all(|stride| stride.is_multiple_of(16)));
                    assert!(map.box_dims.iter().all(|&size| (1..=256).contains(&size)));
                    let row = map.box_dims[0] as usize * map.dtype.bytes();
                    assert!(row.is_multiple_of(16) && (row <= 128 || map.swizzle == 0));
                    assert!(map.swizzle == 0 || map.swizzle as usize == row);
                }
            }
        }
    }
    assert_eq!(seen, 3 * (5 + 7));
}
