//! The linear layers: kernels, and wrong arguments, which every family refuses with the same error.

use crate::support::*;
use pace_kernels::cuda::{
    Base, Buffer, DType, Family, Gpu, Lora, LoraFactors, LoraMulLinear, LoraMulLinearGrads, LowRankGrads,
    LowRankLinear, NoisyLinear, NoisyLinearGrads, Plan, Prompt, PromptBias, Source,
};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::{Error, LinearShape, Result};

/// A layer of 7 in-features whose tensors are far from each other: tensor i begins at i MiB.
const LAYER: LinearShape = LinearShape { in_features: 7, ..SHAPE };

fn tensor(i: u64, len: usize) -> Buffer {
    buffer(i << 20, len)
}

fn layer_noise() -> Source {
    Source::Keyed { generator: generator(PerSample, 0), key: tensor(9, 1) }
}

fn base() -> Base<Buffer> {
    Base { weight: tensor(1, 24 * 7), bias: Some(tensor(2, 24)) }
}

fn noisy_linear() -> NoisyLinear<Buffer, Source> {
    NoisyLinear {
        shape: LAYER,
        noise: layer_noise(),
        base: Some(base()),
        delta_weight: Some(tensor(3, 24 * 7)),
        delta_bias: Some(tensor(4, 24)),
        fold: false,
        allow_tf32: false,
    }
}

fn low_rank_linear() -> LowRankLinear<Buffer, Source> {
    LowRankLinear {
        shape: LAYER,
        noise: layer_noise(),
        base: Some(base()),
        rank: 5,
        lora_b: tensor(3, 24 * 5),
        lora_a: tensor(4, 5 * 7),
        delta_bias: Some(tensor(5, 24)),
        scale: 1.0,
        allow_tf32: false,
    }
}

fn lora_mul_linear() -> LoraMulLinear<Buffer, Source> {
    LoraMulLinear {
        shape: LAYER,
        noise: layer_noise(),
        base: base(),
        lora: Some(Lora { rank: 5, lora_a: tensor(3, 5 * 7), lora_b: tensor(4, 24 * 5), scale: 1.0 }),
        prompt: Some(Prompt { rank: 3, down: tensor(5, 7 * 3), up: tensor(6, 3) }),
        delta_bias: Some(tensor(7, 24)),
        fold: false,
        allow_tf32: false,
    }
}

/// The shared input, the output and its gradient, and more than enough of a workspace.
const X: Buffer = Buffer { address: 10 << 20, len: 15 * 7 };
const Y: Buffer = Buffer { address: 11 << 20, len: M * 24 };
const DY: Buffer = Buffer { address: 12 << 20, len: M * 24 };
const S: Buffer = Buffer { address: 13 << 20, len: 15 * 5 };
const WORKSPACE: Buffer = Buffer { address: 20 << 20, len: 1 << 16 };

/// What the same layer is planned for, a device that runs every family: the errors must not depend on it.
fn gpus() -> [Gpu; Family::ALL.len()] {
    Family::ALL.map(|family| Gpu::H100.with_family(family))
}

/// Checks that a plan is refused with this error, whatever it is made for.
fn assert_refused(plan: impl Fn(&Gpu, DType) -> Result<Plan>, want: &Error) {
    for gpu in gpus() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_error(plan(&gpu, dtype), want);
        }
    }
}

#[test]
fn linear_layers_choose_their_kernels() {
    let gpu = Gpu::H100.with_family(Family::Sm80);
    let name = |layer: NoisyLinear<Buffer, Source>, dtype| {
        only(&layer.forward(&gpu, dtype, X, Y, WORKSPACE).unwrap()).kernel.name
    };
    assert_eq!(name(noisy_linear(), DType::F32), "noisy_linear_two_f32");
    assert_eq!(name(NoisyLinear { allow_tf32: true, ..noisy_linear() }, DType::F32), "noisy_linear_two_tf32");
    assert_eq!(name(NoisyLinear { base: None, ..noisy_linear() }, DType::F16), "noisy_linear_one_f16");
    assert_eq!(
        name(NoisyLinear { delta_weight: None, ..noisy_linear() }, DType::BF16),
        "noisy_linear_one_bf16"
    );
    // Folding pays where a sample's tokens fill tiles, each sample has its own input, and z is per sample.
    for (shape, noise, folds) in [
        (LAYER, Source::Off, false),
        (LinearShape { shared_input: false, ..LAYER }, Source::Off, true),
        (LinearShape { shared_input: false, ..LAYER }, layer_noise(), false),
        (LinearShape { shared_input: false, tokens: 197, ..LAYER }, layer_noise(), true),
        (
            LinearShape { shared_input: false, tokens: 197, ..LAYER },
            Source::Generated(generator(PerToken, 0)),
            false,
        ),
    ] {
        let layer = NoisyLinear { shape, noise, fold: true, ..noisy_linear() };
        let (x, y) = (tensor(100, shape.in_rows() * 7), tensor(200, shape.out_rows() * 24));
        let plan = layer.forward(&gpu, DType::BF16, x, y, WORKSPACE).unwrap();
        assert_eq!(
            only(&plan).kernel.name,
            if folds { "noisy_linear_folded_bf16" } else { "noisy_linear_two_bf16" },
            "{shape:?}"
        );
    }
    let names = |layer: LowRankLinear<Buffer, Source>| {
        let s = tensor(13, 15 * layer.rank);
        let plan = layer.forward(&gpu, DType::F32, X, s, Y, WORKSPACE).unwrap();
        assert_eq!(plan.launches().count(), plan.steps().len());
        plan.launches().map(|launch| launch.kernel.name).collect::<Vec<_>>()
    };
    let rank = |rank| LowRankLinear {
        rank,
        lora_b: tensor(3, 24 * rank),
        lora_a: tensor(4, rank * 7),
        ..low_rank_linear()
    };
    assert_eq!(names(rank(16)), ["low_rank_linear_16_f32"]);
    assert_eq!(names(rank(17)), ["low_rank_linear_32_f32"]);
    assert_eq!(names(rank(33)), ["noisy_linear_one_f32", "noisy_linear_two_f32"]);
    assert_eq!(names(LowRankLinear { base: None, ..rank(4) }), ["noisy_linear_one_f32"; 2]);
}

#[test]
fn wrong_arguments_of_linear_layers_are_refused() {
    let (null, misaligned) = (NULL, MISALIGNED);
    let dense = |layer: NoisyLinear<Buffer, Source>, x, y, want: Error| {
        assert_refused(|gpu, dtype| layer.forward(gpu, dtype, x, y, WORKSPACE), &want);
    };
    let low = |layer: LowRankLinear<Buffer, Source>, x, s, y, want: Error| {
        assert_refused(|gpu, dtype| layer.forward(gpu, dtype, x, s, y, WORKSPACE), &want);
    };
    // Sizes.
    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    for (shape, want) in [
        (LinearShape { batch: 0, ..LAYER }, zero("batch")),
        (LinearShape { in_features: 0, ..LAYER }, zero("in_features")),
        (
            LinearShape { batch: 1 << 30, tokens: 2, ..LAYER },
            Error::Size { argument: "branches * batch * tokens", expected: "at most 2^31", got: 1 << 32 },
        ),
        (
            LinearShape { in_features: (1 << 31) + 1, ..LAYER },
            Error::Size { argument: "in_features", expected: "at most 2^31", got: (1 << 31) + 1 },
        ),
    ] {
        dense(NoisyLinear { shape, ..noisy_linear() }, X, Y, want.clone());
        low(LowRankLinear { shape, ..low_rank_linear() }, X, S, Y, want);
    }
    low(LowRankLinear { rank: 0, ..low_rank_linear() }, X, S, Y, zero("rank"));
    let rank = (1 << 31) + 1;
    let large = Error::Size { argument: "rank", expected: "at most 2^31", got: rank };
    low(LowRankLinear { rank, ..low_rank_linear() }, X, S, Y, large);
    for scale in [f32::NAN, f32::INFINITY] {
        let layer = LowRankLinear { scale, ..low_rank_linear() };
        for gpu in &gpus() {
            match layer.forward(gpu, DType::F32, X, S, Y, WORKSPACE) {
                Err(Error::Value { argument: "scale", expected: "finite", .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    // Operands.
    for (weight, want) in [
        (tensor(1, 24 * 7 - 1), length("base.weight", "[N, K]", 24 * 7, 24 * 7 - 1)),
        (buffer(0, 24 * 7), argument("base.weight", null)),
        (buffer(4097, 24 * 7), argument("base.weight", misaligned)),
    ] {
        let base = Some(Base { weight, bias: None });
        dense(NoisyLinear { base, ..noisy_linear() }, X, Y, want.clone());
        low(LowRankLinear { base, ..low_rank_linear() }, X, S, Y, want);
    }
    let base = Some(Base { bias: Some(tensor(2, 7)), ..base() });
    let want = || length("base.bias", "[N]", 24, 7);
    dense(NoisyLinear { base, ..noisy_linear() }, X, Y, want());
    low(LowRankLinear { base, ..low_rank_linear() }, X, S, Y, want());
    let want = length("delta_weight", "[N, K]", 24 * 7, 7);
    dense(NoisyLinear { delta_weight: Some(tensor(3, 7)), ..noisy_linear() }, X, Y, want);
    let delta_bias = Some(tensor(4, 25));
    let want = || length("delta_bias", "[N]", 24, 25);
    dense(NoisyLinear { delta_bias, ..noisy_linear() }, X, Y, want());
    low(LowRankLinear { delta_bias, ..low_rank_linear() }, X, S, Y, want());
    let want = argument("delta_weight", "is required when there is no base term");
    dense(NoisyLinear { base: None, delta_weight: None, ..noisy_linear() }, X, Y, want);
    let want = length("lora_b", "[N, r]", 24 * 5, 5);
    low(LowRankLinear { lora_b: tensor(3, 5), ..low_rank_linear() }, X, S, Y, want);
    let want = length("lora_a", "[r, K]", 5 * 7, 5);
    low(LowRankLinear { lora_a: tensor(4, 5), ..low_rank_linear() }, X, S, Y, want);
    // Inputs and outputs: lengths, and what overlaps.
    let overlap = |what| argument(what, "overlaps an output");
    for (x, y, want) in [
        (tensor(10, M * 7), Y, length("x", "[B·T, K]", 15 * 7, M * 7)),
        (X, tensor(11, 24), length("y", "[M, N]", M * 24, 24)),
        (X, Buffer { address: X.address, ..Y }, overlap("x")),
        (X, Buffer { address: (1 << 20) - 8, ..Y }, overlap("base.weight")),
        (X, Buffer { address: (9 << 20) - 8, ..Y }, argument("key", "overlaps the output")),
    ] {
        dense(noisy_linear(), x, y, want.clone());
        low(low_rank_linear(), x, S, y, want);
    }
    low(low_rank_linear(), X, tensor(13, 5), Y, length("s", "[B·T, r]", 75, 5));
    low(
        low_rank_linear(),
        X,
        Buffer { address: Y.address, ..S },
        Y,
        argument("y", "overlaps another output"),
    );
    low(low_rank_linear(), X, Buffer { address: 4 << 20, ..S }, Y, overlap("lora_a"));
}

#[test]
fn wrong_gradients_of_linear_layers_are_refused() {
    let dense = |grads, want: Error| {
        assert_refused(|gpu, dtype| noisy_linear().backward(gpu, dtype, X, DY, grads, WORKSPACE), &want);
    };
    let low = |grads, want: Error| {
        let layer = low_rank_linear();
        assert_refused(|gpu, dtype| layer.backward(gpu, dtype, X, S, DY, grads, WORKSPACE), &want);
    };
    let none = NoisyLinearGrads::default;
    let no = LowRankGrads::default;
    for (dx, want) in [
        (tensor(14, 3), length("grads.input", "[B·T, K]", 15 * 7, 3)),
        (Buffer { len: 15 * 7, ..DY }, argument("dy", "overlaps an output")),
        (Buffer { len: 15 * 7, ..X }, argument("x", "overlaps an output")),
        (tensor(1, 15 * 7), argument("base.weight", "overlaps an output")),
        (buffer((9 << 20) - 8, 15 * 7), argument("key", "overlaps the output")),
    ] {
        dense(NoisyLinearGrads { input: Some(dx), ..none() }, want.clone());
        low(LowRankGrads { input: Some(dx), ..no() }, want);
    }
    low(LowRankGrads { input: Some(tensor(13, 15 * 7)), ..no() }, argument("s", "overlaps an output"));
    let want = length("grads.delta_weight", "[N, K]", 24 * 7, 3);
    dense(NoisyLinearGrads { delta_weight: Some(tensor(14, 3)), ..none() }, want);
    let want = || length("grads.delta_bias", "[N]", 24, 3);
    dense(NoisyLinearGrads { delta_bias: Some(tensor(14, 3)), ..none() }, want());
    low(LowRankGrads { delta_bias: Some(tensor(14, 3)), ..no() }, want());
    let want = length("grads.lora_b", "[N, r]", 24 * 5, 3);
    low(LowRankGrads { lora_b: Some(tensor(14, 3)), ..no() }, want);
    let want = length("grads.lora_a", "[r, K]", 5 * 7, 3);
    low(LowRankGrads { lora_a: Some(tensor(14, 3)), ..no() }, want);
    // Gradients over each other.
    let (dx, bias) = (Some(tensor(14, 15 * 7)), Some(buffer((14 << 20) + 4, 24)));
    let want = || argument("grads.delta_bias", "overlaps another output");
    dense(NoisyLinearGrads { input: dx, delta_bias: bias, ..none() }, want());
    low(LowRankGrads { input: dx, delta_bias: bias, ..no() }, want());
    let layer = NoisyLinear { delta_weight: None, ..noisy_linear() };
    let grads = NoisyLinearGrads { delta_weight: Some(tensor(14, 24 * 7)), ..none() };
    let want = argument("grads.delta_weight", "is asked for, but the layer has no `delta_weight`");
    assert_refused(|gpu, dtype| layer.backward(gpu, dtype, X, DY, grads, WORKSPACE), &want);
}

/// Lengths come from the caller: none panics. One that reaches over an output is refused for that.
#[test]
fn any_length_of_a_tensor_is_refused_with_an_error() {
    let layer = lora_mul_linear();
    let grads = LoraMulLinearGrads { lora_a: Some(tensor(14, 5 * 7)), ..LoraMulLinearGrads::default() };
    for len in [0, 1, (1 << 63) - 1, 1 << 63, usize::MAX] {
        let refused =
            |argument: &'static str, shape, expected, plan: &dyn Fn(&Gpu, DType) -> Result<Plan>| {
                let overlap = Error::Argument { argument, problem: "overlaps an output" };
                let want = if len > 1 { overlap } else { length(argument, shape, expected, len) };
                assert_refused(plan, &want);
            };
        let of_length = |tensor: Buffer| Buffer { len, ..tensor };
        let x = of_length(X);
        refused("x", "[B·T, K]", X.len, &|gpu, dtype| layer.forward(gpu, dtype, x, Y, WORKSPACE));
        refused("x", "[B·T, K]", X.len, &|gpu, dtype| {
            layer.backward(gpu, dtype, Some(x), DY, grads, WORKSPACE)
        });
        let lora = layer.lora.map(|lora| Lora { lora_a: of_length(lora.lora_a), ..lora });
        let wrong = LoraMulLinear { lora, ..layer };
        refused("lora_a", "[r, K]", 35, &|gpu, dtype| wrong.forward(gpu, dtype, X, Y, WORKSPACE));
    }
    assert!(layer.forward(&Gpu::H100, DType::BF16, X, Y, WORKSPACE).is_ok());
}

#[test]
fn wrong_workspaces_of_linear_layers_are_refused() {
    let refused = |dtype: DType, needed: usize, plan: &dyn Fn(Buffer) -> Result<Plan>| {
        let want = |got| length("workspace", "[workspace_len()]", needed, got);
        assert_error(plan(Buffer { len: needed - 1, ..WORKSPACE }), &want(needed - 1));
        assert_error(plan(buffer(0, 0)), &want(0));
        assert_error(plan(buffer(0, needed)), &argument("workspace", NULL));
        assert_error(plan(buffer(4097, needed)), &argument("workspace", MISALIGNED));
        assert_error(plan(buffer(4098, needed)), &argument("workspace", MISALIGNED));
        let end = u64::MAX - 4 * needed as u64;
        assert_error(plan(buffer(end.next_multiple_of(4), needed)), &argument("workspace", ENDLESS));
        // By one word at either end.
        let before = |address| address - 4 * (needed as u64 - 1);
        for (name, tensor) in [("x", X), ("base.bias", tensor(2, 24)), ("delta_bias", tensor(6, 24))] {
            let end = tensor.address + (tensor.len * dtype.bytes()) as u64;
            for start in [before(tensor.address), (end - 1) / 4 * 4] {
                assert_error(plan(buffer(start, needed)), &argument(name, "overlaps an output"));
            }
            assert!(plan(buffer(end.next_multiple_of(4), needed)).is_ok(), "{name}");
            assert!(plan(buffer(before(tensor.address) - 4, needed)).is_ok(), "{name}");
        }
        let start = before(9 << 20);
        assert_error(plan(buffer(start, needed)), &argument("key", "overlaps the output"));
        assert_error(plan(buffer(17 << 20, needed)), &argument("workspace", "overlaps another output"));
        // The last there is.
        assert!(plan(buffer((end - 4) / 4 * 4, needed)).is_ok());
        // Longer is fine, and only what is needed is used.
        let exact = plan(Buffer { len: needed, ..WORKSPACE }).unwrap();
        assert_eq!(plan(Buffer { len: usize::MAX, ..WORKSPACE }).unwrap(), exact);
    };
    let dense = NoisyLinear { delta_bias: Some(tensor(6, 24)), ..noisy_linear() };
    let low = LowRankLinear { delta_bias: Some(tensor(6, 24)), ..low_rank_linear() };
    let (dx, y) = (tensor(17, 15 * 7), tensor(17, M * 24));
    for dtype in [DType::F32, DType::BF16] {
        for gpu in &gpus() {
            let needed = dense.workspace_len(gpu, dtype);
            if needed > 0 {
                let grads = NoisyLinearGrads { input: Some(dx), ..NoisyLinearGrads::default() };
                refused(dtype, needed, &|workspace| dense.forward(gpu, dtype, X, y, workspace));
                refused(dtype, needed, &|workspace| dense.backward(gpu, dtype, X, DY, grads, workspace));
            } else {
                // Where none is needed, any will do.
                let (inside, last) = (buffer(y.address + 8, 9), buffer(u64::MAX - 3, 9));
                let weight = Some(tensor(18, 24 * 7));
                let grads = NoisyLinearGrads { delta_weight: weight, ..NoisyLinearGrads::default() };
                for workspace in [buffer(0, 0), buffer(1, 0), Buffer { len: 9, ..X }, inside, last] {
                    dense.forward(gpu, dtype, X, y, workspace).unwrap();
                    dense.backward(gpu, dtype, X, DY, grads, workspace).unwrap();
                }
            }
            let needed = low.workspace_len(gpu, dtype);
            let (lora_b, lora_a) = (Some(tensor(21, 24 * 5)), Some(tensor(22, 5 * 7)));
            let grads = LowRankGrads { input: Some(dx), lora_b, lora_a, delta_bias: None };
            refused(dtype, needed, &|workspace| low.forward(gpu, dtype, X, S, y, workspace));
            refused(dtype, needed, &|workspace| low.backward(gpu, dtype, X, S, DY, grads, workspace));
        }
    }
}

/// What is asked before anything is checked: no size panics, and those that are refused need nothing or more than there is.
#[test]
fn workspaces_of_any_size() {
    let sizes = [0, 1, 7, 1 << 20, 1 << 31, 1 << 40, usize::MAX / 2, usize::MAX];
    for dtype in [DType::F32, DType::BF16] {
        for a in sizes {
            for b in sizes {
                for c in sizes {
                    for gpu in &gpus() {
                        layer_workspaces(gpu, dtype, [a, b, c]);
                    }
                    let weight = tensor(3, 1);
                    let (out_features, in_features, rank) = (a, b, c);
                    let (lora_b, lora_a, scale) = (weight, weight, 1.0);
                    LoraFactors { out_features, in_features, rank, lora_b, lora_a, scale }
                        .workspace_len(dtype);
                    let (base_weight, prompt_down, prompt_up) = (weight, weight, weight);
                    let (base_bias, delta_bias) = (None, None);
                    PromptBias {
                        out_features,
                        in_features,
                        rank,
                        base_weight,
                        base_bias,
                        prompt_down,
                        prompt_up,
                        delta_bias,
                    }
                    .workspace_len(dtype);
                }
            }
        }
    }
}

fn layer_workspaces(gpu: &Gpu, dtype: DType, [a, b, c]: [usize; 3]) {
    for (rank, shared_input) in [(a, true), (b, false), (c, true)] {
        let shape =
            LinearShape { batch: a, tokens: 1, in_features: b, out_features: c, shared_input, ..LAYER };
        let dense = NoisyLinear { shape, ..noisy_linear() };
        let low = LowRankLinear { shape, rank, ..low_rank_linear() };
        let lens = (dense.workspace_len(gpu, dtype), low.workspace_len(gpu, dtype));
        let refused = |size| size == 0 || size > 1 << 31;
        let rows = a.saturating_mul(2);
        let memory =
            |left: usize, right| left.checked_mul(right).is_none_or(|size| size > isize::MAX as usize / 8);
        if [rows, b, c].into_iter().any(refused) || memory(rows, b) || memory(rows, c) || memory(b, c) {
            assert_eq!(lens, (0, 0), "{low:?}");
        }
        if refused(rank) {
            assert_eq!(lens.1, 0, "{low:?}");
        }
        dense.forward(gpu, dtype, X, Y, WORKSPACE).unwrap_err();
        low.forward(gpu, dtype, X, S, Y, WORKSPACE).unwrap_err();
        dense.backward(gpu, dtype, X, DY, NoisyLinearGrads::default(), WORKSPACE).unwrap_err();
        low.backward(gpu, dtype, X, S, DY, LowRankGrads::default(), WORKSPACE).unwrap_err();
    }
}
