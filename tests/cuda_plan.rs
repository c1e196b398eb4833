//! Plans refuse wrong arguments with the error that names them, and opening a device never panics.

use pace_kernels::cuda::{
    Base, Buffer, DType, Device, Direction, DropPath, Family, Finding, FpDistance, Gpu, GradNorm, Launch,
    LoraFactors, LoraGrads, Loss, LossSettings, LossStatus, LowRankGrads, LowRankLinear, MaskSource, Merge,
    MergeSign, NoiseFill, NoisyEpilogue, NoisyLinear, NoisyLinearGrads, Partner, Plan, PromptBias,
    PromptGrads, Source,
};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::noise::{Generator, Key, NoiseShape};
use pace_kernels::{Error, LinearShape};

const SHAPE: LinearShape =
    LinearShape { branches: 2, batch: 3, tokens: 5, in_features: 0, out_features: 24, shared_input: true };
/// Samples and token rows of `SHAPE`.
const R: usize = 6;
const M: usize = 30;

fn generator(shape: NoiseShape, first_sample: u64) -> Generator {
    Generator::new(Key::derive(1, 2, 3), 0.5, shape, first_sample).unwrap()
}

fn buffer(address: u64, len: usize) -> Buffer {
    Buffer { address, len }
}

fn fill() -> NoiseFill {
    NoiseFill { shape: SHAPE, generator: generator(PerToken, 0), key: None, z: buffer(4096, M * 24) }
}

fn epilogue() -> NoisyEpilogue {
    NoisyEpilogue {
        shape: SHAPE,
        noise: Source::Generated(generator(PerSample, 0)),
        direction: Direction::Forward,
        dtype: DType::F16,
        input: buffer(4096, M * 24),
        output: buffer(8192, M * 24),
    }
}

/// Classes, samples and remembered samples of `loss`.
const C: usize = 24;
const B: usize = 6;
const ROWS: usize = 10;
const SETTINGS: LossSettings =
    LossSettings { classes: C, lambda: 0.5, label_smoothing: 0.1, ignore_label: None };

/// Its tensors lie at multiples of 4096, in their order here.
fn loss() -> Loss {
    Loss {
        settings: SETTINGS,
        dtype: DType::F16,
        logits: buffer(4096, B * C),
        labels: buffer(2 * 4096, B),
        partner: Partner::History { table: buffer(3 * 4096, ROWS * C), index: buffer(4 * 4096, B) },
        gradient: Some(buffer(5 * 4096, B * C)),
        values: buffer(6 * 4096, 3),
        status: buffer(7 * 4096, LossStatus::WORDS),
        workspace: buffer(8 * 4096, SETTINGS.workspace_len(B)),
    }
}

const NULL: &str = "is a null pointer";
const MISALIGNED: &str = "does not start at a multiple of its element size";

/// The only launch of a plan.
fn only(plan: Plan) -> Launch {
    let [launch] = launches(&plan);
    assert_eq!(plan.steps().len(), 1);
    launch
}

/// The launches of a plan, as many as are expected.
fn launches<const N: usize>(plan: &Plan) -> [Launch; N] {
    let launches: Vec<Launch> = plan.launches().cloned().collect();
    launches.try_into().unwrap_or_else(|launches| panic!("{launches:?}"))
}

fn assert_error<T: std::fmt::Debug>(result: Result<T, Error>, want: &Error) {
    match result {
        Err(got) => assert_eq!(got, *want),
        Ok(plan) => panic!("{plan:?} instead of {want}"),
    }
}

fn argument(argument: &'static str, problem: &'static str) -> Error {
    Error::Argument { argument, problem }
}

fn length(argument: &'static str, shape: &'static str, expected: usize, got: usize) -> Error {
    Error::Length { argument, shape, expected, got }
}

#[test]
fn right_arguments_give_the_documented_geometry() {
    let plan = only(fill().plan().unwrap());
    // 6 groups in 8 of x, 30 rows in 32 of y.
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("noise_fill", [1, 1, 1], [8, 32, 1]));
    let plan = only(epilogue().plan().unwrap());
    // 3 columns in 4 of x, 5 tokens in 8 of y, 6 units in 8 of z.
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("noisy_epilogue_f16", [1, 1, 1], [4, 8, 8]));
    for (dtype, direction, name) in [
        (DType::F32, Direction::Forward, "noisy_epilogue_f32"),
        (DType::BF16, Direction::Forward, "noisy_epilogue_bf16"),
        (DType::F32, Direction::Backward, "noisy_epilogue_backward_f32"),
        (DType::F16, Direction::Backward, "noisy_epilogue_backward_f16"),
        (DType::BF16, Direction::Backward, "noisy_epilogue_backward_bf16"),
    ] {
        let operator = NoisyEpilogue { dtype, direction, output: buffer(1 << 20, M * 24), ..epilogue() };
        assert_eq!(only(operator.plan().unwrap()).kernel.name, name);
    }
    // Blocks have at most 1024 threads and 64 along z, and grids at most 65535 rows, whatever the shape.
    for channels in [1, 4, 5, 8, 33, 768, 3072, 1 << 20] {
        for tokens in [1, 2, 7, 8, 197, 4096] {
            for batch in [1, 64, 1 << 10, 1 << 18] {
                let shape = LinearShape { batch, tokens, out_features: channels, ..SHAPE };
                let len = shape.out_rows() * channels;
                let z = only(NoiseFill { shape, z: buffer(1 << 40, len), ..fill() }.plan().unwrap());
                let (input, output) = (buffer(1 << 56, len), buffer(1 << 57, len));
                let y = only(NoisyEpilogue { shape, input, output, ..epilogue() }.plan().unwrap());
                for (grid, block) in [(z.grid, z.block), (y.grid, y.block)] {
                    assert!(block.iter().product::<u32>() <= 256 && block[2] <= 64, "{shape:?}: {block:?}");
                    assert!(grid.iter().all(|&size| size > 0) && grid[1] <= 65535, "{shape:?}: {grid:?}");
                }
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    let cases = [
        (
            LinearShape { branches: 3, ..SHAPE },
            Error::Size { argument: "branches", expected: "1 or 2", got: 3 },
        ),
        (LinearShape { batch: 0, ..SHAPE }, zero("batch")),
        (LinearShape { tokens: 0, ..SHAPE }, zero("tokens")),
        (LinearShape { out_features: 0, ..SHAPE }, zero("out_features")),
        (LinearShape { batch: usize::MAX, ..SHAPE }, Error::Overflow { argument: "x", shape: "[M, K]" }),
        (
            LinearShape { batch: 1 << 30, tokens: 2, ..SHAPE },
            Error::Size { argument: "branches * batch * tokens", expected: "at most 2^31", got: 1 << 32 },
        ),
    ];
    for (shape, want) in cases {
        assert_error(NoiseFill { shape, ..fill() }.plan(), &want);
        assert_error(NoisyEpilogue { shape, ..epilogue() }.plan(), &want);
    }
    let want = Error::Value {
        argument: "first_sample",
        expected: "at most 2^56 with the batch added",
        got: ((1u64 << 56) - 2) as f64,
    };
    let generator = generator(PerSample, (1 << 56) - 2);
    assert_error(NoiseFill { generator, ..fill() }.plan(), &want);
    assert_error(NoisyEpilogue { noise: Source::Generated(generator), ..epilogue() }.plan(), &want);
}

#[test]
fn wrong_buffers_are_refused() {
    let (null, misaligned) = (NULL, MISALIGNED);
    let fills = [
        (buffer(4096, M * 24 - 1), length("z", "[R, T, N]", M * 24, M * 24 - 1)),
        (buffer(0, M * 24), argument("z", null)),
        (buffer(4098, M * 24), argument("z", misaligned)),
    ];
    for (z, want) in fills {
        assert_error(NoiseFill { z, ..fill() }.plan(), &want);
    }
    let per_sample = NoiseFill { generator: generator(PerSample, 0), ..fill() };
    assert_error(per_sample.plan(), &length("z", "[R, N]", R * 24, M * 24));
    for (key, want) in [
        (buffer(256, 2), length("key", "[1]", 1, 2)),
        (buffer(0, 1), argument("key", null)),
        (buffer(260, 1), argument("key", misaligned)),
        (buffer(4096 + 4 * (M * 24 - 2) as u64, 1), argument("key", "overlaps the output")),
    ] {
        assert_error(NoiseFill { key: Some(key), ..fill() }.plan(), &want);
    }

    let bytes = 2 * (M * 24) as u64;
    let directions = [(Direction::Forward, "a", "y"), (Direction::Backward, "dy", "da")];
    for (direction, input, output) in directions {
        let operator = NoisyEpilogue { direction, ..epilogue() };
        let wrong =
            |buffer, want: Error| assert_error(NoisyEpilogue { input: buffer, ..operator }.plan(), &want);
        wrong(buffer(4096, 1), length(input, "[M, N]", M * 24, 1));
        wrong(buffer(0, M * 24), argument(input, null));
        wrong(buffer(4097, M * 24), argument(input, misaligned));
        for overlapping in [8192, 8192 + bytes - 2, 8192 - bytes + 2] {
            wrong(buffer(overlapping, M * 24), argument(input, "overlaps the output"));
        }
        for beside in [8192 + bytes, 8192 - bytes] {
            assert!(NoisyEpilogue { input: buffer(beside, M * 24), ..operator }.plan().is_ok());
        }
        let wrong =
            |buffer, want: Error| assert_error(NoisyEpilogue { output: buffer, ..operator }.plan(), &want);
        wrong(buffer(8192, M), length(output, "[M, N]", M * 24, M));
        wrong(buffer(0, M * 24), argument(output, null));
        wrong(buffer(8193, M * 24), argument(output, misaligned));
    }
    for (z, shape, want) in [
        (buffer(256, M * 24), PerSample, length("z", "[R, N]", R * 24, M * 24)),
        (buffer(256, R * 24), PerToken, length("z", "[R, T, N]", M * 24, R * 24)),
        (buffer(258, R * 24), PerSample, argument("z", misaligned)),
        (buffer(8192, R * 24), PerSample, argument("z", "overlaps the output")),
    ] {
        assert_error(NoisyEpilogue { noise: Source::Given { z, shape }, ..epilogue() }.plan(), &want);
    }
}

fn drop_path() -> DropPath {
    DropPath {
        branches: 2,
        batch: 3,
        features: 1000,
        mask: MaskSource::Given(buffer(256, 3)),
        direction: Direction::Forward,
        dtype: DType::BF16,
        input: buffer(1 << 16, 6000),
        output: buffer(1 << 17, 6000),
    }
}

#[test]
fn drop_path_plans() {
    let plan = only(drop_path().plan().unwrap());
    // 125 vectors: four per thread, 32 threads on a row, 8 rows side by side.
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("drop_path_bf16", [1, 1, 1], [256, 1, 1]));
    // As many blocks as suit every device; of a large sample as many as it needs.
    for (batch, features, grid) in
        [(128, 151_296, [19, 53, 1]), (65536, 1000, [1, 1024, 1]), (1, 1 << 24, [2048, 1, 1])]
    {
        let total = 2 * batch * features;
        let mask = MaskSource::Given(buffer(1 << 20, batch));
        let (input, output) = (buffer(1 << 40, total), buffer(1 << 41, total));
        let operator = DropPath { batch, features, mask, input, output, ..drop_path() };
        assert_eq!(only(operator.plan().unwrap()).grid, grid);
    }

    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    let shape = "[branches·B, features]";
    let refused = |operator: DropPath, want: Error| assert_error(operator.plan(), &want);
    refused(
        DropPath { branches: 3, ..drop_path() },
        Error::Size { argument: "branches", expected: "1 or 2", got: 3 },
    );
    refused(DropPath { batch: 0, ..drop_path() }, zero("batch"));
    refused(DropPath { features: 0, ..drop_path() }, zero("features"));
    refused(
        DropPath { features: usize::MAX, ..drop_path() },
        Error::Overflow { argument: "x", shape: "[branches·B, features]" },
    );
    let large = |argument| Error::Size { argument, expected: "at most 2^31", got: (1 << 31) + 2 };
    refused(DropPath { batch: (1 << 30) + 1, features: 1, ..drop_path() }, large("branches * batch"));
    refused(DropPath { batch: 1, features: (1 << 31) + 2, ..drop_path() }, large("features"));
    for (direction, input, output) in [(Direction::Forward, "x", "y"), (Direction::Backward, "dy", "dx")] {
        let operator = DropPath { direction, ..drop_path() };
        let wrong = |input, want| refused(DropPath { input, ..operator }, want);
        wrong(buffer(1 << 16, 5999), length(input, shape, 6000, 5999));
        wrong(buffer(0, 6000), argument(input, NULL));
        wrong(buffer(1 << 17, 6000), argument(input, "overlaps the output"));
        let wrong = |output, want| refused(DropPath { output, ..operator }, want);
        wrong(buffer(1 << 17, 1), length(output, shape, 6000, 1));
        wrong(buffer((1 << 17) + 1, 6000), argument(output, MISALIGNED));
    }
    let wrong = |mask, want| refused(DropPath { mask, ..drop_path() }, want);
    wrong(MaskSource::Given(buffer(256, 6)), length("mask", "[B]", 3, 6));
    wrong(MaskSource::Given(buffer(258, 3)), argument("mask", MISALIGNED));
    wrong(MaskSource::Given(buffer(1 << 17, 3)), argument("mask", "overlaps the output"));
    let generated = |drop_probability, first_sample, key_address| MaskSource::Generated {
        key: Key([1, 2]),
        key_address,
        drop_probability,
        first_sample,
    };
    for got in [1.0, -0.1, f64::INFINITY] {
        let want = Error::Value { argument: "drop_probability", expected: "in [0, 1)", got };
        wrong(generated(got, 0, None), want);
    }
    let want = Error::Value {
        argument: "first_sample",
        expected: "at most 2^56 with the batch added",
        got: ((1u64 << 56) - 2) as f64,
    };
    wrong(generated(0.1, (1 << 56) - 2, None), want);
    wrong(generated(0.1, 0, Some(buffer(256, 2))), length("key", "[1]", 1, 2));
    wrong(generated(0.1, 0, Some(buffer(1 << 17, 1))), argument("key", "overlaps the output"));
}

const ENDLESS: &str = "reaches past the end of the address space";

/// Rank 3 under a weight [40, 520]: three strips of 256 columns and three parts of 16 rows.
const LORA: LoraFactors<Buffer> = LoraFactors {
    out_features: 40,
    in_features: 520,
    rank: 3,
    lora_b: Buffer { address: 1 << 16, len: 120 },
    lora_a: Buffer { address: 1 << 17, len: 1560 },
    scale: 0.5,
};
const WEIGHT: Buffer = Buffer { address: 1 << 20, len: 40 * 520 };
const LORA_GRADS: LoraGrads<Buffer> = LoraGrads {
    lora_b: Buffer { address: 1 << 21, len: 120 },
    lora_a: Buffer { address: 1 << 22, len: 1560 },
};
/// Of `LORA`'s gradients, in the 16-bit types.
const LORA_WORKSPACE: Buffer = Buffer { address: 1 << 23, len: 3 * 1560 + 3 * 120 };

#[test]
fn low_rank_plans() {
    let out = buffer(1 << 24, 40 * 520);
    let plan = only(LORA.weight(DType::F16, None, out).unwrap());
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("low_rank_weight_f16", [3, 3, 1], [128, 1, 1]));
    assert_eq!(only(LORA.weight(DType::F32, Some(WEIGHT), out).unwrap()).grid, [5, 3, 1]);
    let workspace = buffer(1 << 23, LORA.workspace_len(DType::BF16));
    assert_eq!(workspace, LORA_WORKSPACE);
    let plan = LORA.backward(DType::BF16, Some(WEIGHT), out, LORA_GRADS, workspace).unwrap();
    let [partials, lora_b, lora_a] = launches(&plan);
    assert_eq!((partials.kernel.name, partials.grid), ("low_rank_weight_backward_bf16", [3, 3, 1]));
    assert_eq!((lora_b.kernel.name, lora_b.grid, lora_a.grid), ("partial_sums_bf16", [1, 1, 1], [2, 1, 1]));
    // Parts have at most 128 rows; grids at most 65535.
    for (out_features, grid) in [(1 << 20, 8192), (1 << 24, 65535)] {
        let lora_b = buffer(1 << 40, 3 * out_features);
        let lora_a = buffer(1 << 50, 3);
        let lora = LoraFactors { out_features, in_features: 1, lora_b, lora_a, ..LORA };
        let grads = LoraGrads { lora_b: buffer(1 << 41, 3 * out_features), lora_a: buffer(1 << 51, 3) };
        let workspace = buffer(1 << 42, lora.workspace_len(DType::F16));
        let grad = buffer(1 << 43, out_features);
        let plan = lora.backward(DType::F16, None, grad, grads, workspace).unwrap();
        assert_eq!(launches::<3>(&plan)[0].grid, [1, grid, 1]);
        assert_eq!(only(lora.weight(DType::F16, None, grad).unwrap()).grid, [1, 65535, 1]);
    }

    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    let large = |argument| Error::Size { argument, expected: "at most 2^31", got: (1 << 31) + 1 };
    for (lora, want) in [
        (LoraFactors { out_features: 0, ..LORA }, zero("out_features")),
        (LoraFactors { in_features: 0, ..LORA }, zero("in_features")),
        (LoraFactors { rank: 0, ..LORA }, zero("rank")),
        (LoraFactors { out_features: (1 << 31) + 1, ..LORA }, large("out_features")),
        (LoraFactors { rank: (1 << 31) + 1, ..LORA }, large("rank")),
        (
            LoraFactors { out_features: 1 << 31, in_features: 1 << 31, ..LORA },
            Error::Overflow { argument: "weight", shape: "[N, K]" },
        ),
        (
            LoraFactors { in_features: 1 << 21, rank: 1 << 20, lora_b: buffer(256, 40 << 20), ..LORA },
            Error::Overflow { argument: "lora_a", shape: "[r, K]" },
        ),
        (LoraFactors { lora_b: buffer(1 << 16, 119), ..LORA }, length("lora_b", "[N, r]", 120, 119)),
        (LoraFactors { lora_a: buffer(1 << 16, 1), ..LORA }, length("lora_a", "[r, K]", 1560, 1)),
        (LoraFactors { lora_a: buffer(1, 1560), ..LORA }, argument("lora_a", MISALIGNED)),
        (LoraFactors { lora_b: buffer(u64::MAX - 237, 120), ..LORA }, argument("lora_b", ENDLESS)),
        (
            LoraFactors { scale: f32::INFINITY, ..LORA },
            Error::Value { argument: "scale", expected: "finite", got: f64::INFINITY },
        ),
        (LoraFactors { lora_a: out, ..LORA }, length("lora_a", "[r, K]", 1560, 40 * 520)),
        (
            LoraFactors { lora_a: buffer((1 << 24) + 64, 1560), ..LORA },
            argument("lora_a", "overlaps an output"),
        ),
    ] {
        assert_error(lora.weight(DType::F16, None, out), &want);
        let grads = LoraGrads { lora_b: buffer((1 << 24) + 2, 120), ..LORA_GRADS };
        assert_error(lora.backward(DType::F16, None, WEIGHT, grads, LORA_WORKSPACE), &want);
    }
    let wrong = |base, out, want| assert_error(LORA.weight(DType::F16, base, out), &want);
    wrong(Some(buffer(1 << 20, 7)), out, length("base_weight", "[N, K]", 20800, 7));
    wrong(Some(out), out, argument("base_weight", "overlaps an output"));
    wrong(None, buffer(0, 20800), argument("out", NULL));
    wrong(None, buffer(1 << 24, 20801), length("out", "[N, K]", 20800, 20801));
    let wrong = |grad, grads, workspace, want| {
        assert_error(LORA.backward(DType::F16, Some(WEIGHT), grad, grads, workspace), &want);
    };
    wrong(buffer(1 << 24, 1), LORA_GRADS, LORA_WORKSPACE, length("delta_weight_grad", "[N, K]", 20800, 1));
    let grads = LoraGrads { lora_b: buffer(1 << 21, 1), ..LORA_GRADS };
    wrong(out, grads, LORA_WORKSPACE, length("grads.lora_b", "[N, r]", 120, 1));
    let grads = LoraGrads { lora_a: buffer((1 << 22) + 1, 1560), ..LORA_GRADS };
    wrong(out, grads, LORA_WORKSPACE, argument("grads.lora_a", MISALIGNED));
    let grads = LoraGrads { lora_b: buffer(1 << 22, 120), ..LORA_GRADS };
    wrong(out, grads, LORA_WORKSPACE, argument("grads.lora_a", "overlaps another output"));
    wrong(out, LORA_GRADS, buffer(1 << 23, 5039), length("workspace", "[workspace_len()]", 5040, 5039));
    wrong(out, LORA_GRADS, buffer((1 << 24) - 4, 5040), argument("delta_weight_grad", "overlaps an output"));
    wrong(out, LORA_GRADS, buffer((1 << 22) - 4, 5040), argument("workspace", "overlaps another output"));
    // Partial sums of a weight that can be addressed need not be.
    let lora = LoraFactors { out_features: 1 << 31, in_features: 1 << 28, rank: 1 << 9, ..LORA };
    assert_eq!(lora.workspace_len(DType::F16), (1 << 24 << 28 << 9) + (1 << 20 << 31 << 9));
}

fn prompt() -> PromptBias<Buffer> {
    PromptBias {
        out_features: 40,
        in_features: 520,
        rank: 3,
        base_weight: WEIGHT,
        base_bias: Some(buffer(1 << 12, 40)),
        prompt_down: buffer(1 << 16, 1560),
        prompt_up: buffer(1 << 10, 3),
        delta_bias: Some(buffer(1 << 13, 40)),
    }
}

#[test]
fn prompt_plans() {
    let grads = PromptGrads {
        prompt_down: buffer(1 << 21, 1560),
        prompt_up: buffer(1 << 22, 3),
        delta_bias: Some(buffer(1 << 25, 40)),
    };
    let out = buffer(1 << 24, 40);
    // Three parts of q and q itself, and nine parts of dPu.
    let len = 4 * 520 + 9 * 3;
    assert_eq!(prompt().workspace_len(DType::F16), len);
    let workspace = buffer(1 << 23, len);
    let [product, bias] = launches(&prompt().forward(DType::F16, out, workspace).unwrap());
    assert_eq!((product.kernel.name, product.grid), ("prompt_bias_product_f16", [65, 1, 1]));
    assert_eq!((bias.kernel.name, bias.grid), ("prompt_bias_f16", [5, 1, 1]));
    let plan = prompt().backward(DType::F16, out, grads, workspace).unwrap();
    let [columns, column_sums, factors, factor_sums] = launches(&plan);
    assert_eq!((columns.kernel.name, columns.grid), ("prompt_bias_columns_f16", [3, 3, 1]));
    assert_eq!((factors.kernel.name, factors.grid), ("prompt_bias_grads_f16", [9, 1, 1]));
    let names = [column_sums, factor_sums].map(|sums| sums.kernel.name);
    assert_eq!(names, ["partial_sums_f32", "partial_sums_f16"]);

    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    for (prompt, want) in [
        (PromptBias { out_features: 0, ..prompt() }, zero("out_features")),
        (PromptBias { rank: 0, ..prompt() }, zero("rank")),
        (PromptBias { base_weight: out, ..prompt() }, length("base_weight", "[N, K]", 20800, 40)),
        (PromptBias { base_bias: Some(buffer(256, 41)), ..prompt() }, length("base_bias", "[N]", 40, 41)),
        (PromptBias { prompt_down: buffer(256, 3), ..prompt() }, length("prompt_down", "[K, r]", 1560, 3)),
        (PromptBias { prompt_up: buffer(0, 3), ..prompt() }, argument("prompt_up", NULL)),
        (PromptBias { delta_bias: Some(buffer(257, 40)), ..prompt() }, argument("delta_bias", MISALIGNED)),
        (
            PromptBias { prompt_up: buffer((1 << 23) + 8, 3), ..prompt() },
            argument("prompt_up", "overlaps an output"),
        ),
    ] {
        assert_error(prompt.forward(DType::F16, out, workspace), &want);
        assert_error(prompt.backward(DType::F16, out, grads, workspace), &want);
    }
    let wrong = |out, workspace, want| assert_error(prompt().forward(DType::F16, out, workspace), &want);
    wrong(buffer(1 << 24, 39), workspace, length("out", "[N]", 40, 39));
    wrong(buffer(1 << 13, 40), workspace, argument("delta_bias", "overlaps an output"));
    wrong(out, buffer(1 << 23, len - 1), length("workspace", "[workspace_len()]", len, len - 1));
    wrong(out, buffer((1 << 23) + 2, len), argument("workspace", MISALIGNED));
    wrong(out, buffer((1 << 24) - 4, len), argument("workspace", "overlaps another output"));
    let wrong =
        |grad, grads, want| assert_error(prompt().backward(DType::F16, grad, grads, workspace), &want);
    wrong(buffer(1 << 24, 1), grads, length("delta_bias_grad", "[N]", 40, 1));
    let prompt_down = buffer(1 << 21, 1);
    wrong(out, PromptGrads { prompt_down, ..grads }, length("grads.prompt_down", "[K, r]", 1560, 1));
    let prompt_up = buffer(1 << 22, 4);
    wrong(out, PromptGrads { prompt_up, ..grads }, length("grads.prompt_up", "[r]", 3, 4));
    let delta_bias = Some(buffer(1 << 25, 4));
    wrong(out, PromptGrads { delta_bias, ..grads }, length("grads.delta_bias", "[N]", 40, 4));
    let delta_bias = Some(out);
    wrong(out, PromptGrads { delta_bias, ..grads }, argument("delta_bias_grad", "overlaps an output"));
}

#[test]
fn merge_plans() {
    let merge = Merge {
        sign: MergeSign::Unmerge,
        dtype: DType::BF16,
        target: buffer(1 << 16, 9000),
        delta: buffer(1 << 17, 9000),
    };
    let plan = only(merge.plan().unwrap());
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("merge_bf16", [2, 1, 1], [256, 1, 1]));
    let (target, delta) = (buffer(1 << 40, 1 << 34), buffer(1 << 41, 1 << 34));
    assert_eq!(only(Merge { target, delta, ..merge }.plan().unwrap()).grid, [2048, 1, 1]);
    let empty = buffer(0, 0);
    assert_eq!(Merge { target: empty, delta: empty, ..merge }.plan(), Ok(Plan::default()));
    let refused = |merge: Merge, want| assert_error(merge.plan(), &want);
    refused(Merge { delta: empty, ..merge }, length("delta", "[target.len()]", 9000, 0));
    refused(Merge { target: empty, ..merge }, length("delta", "[target.len()]", 0, 9000));
    refused(Merge { target: buffer(0, 9000), ..merge }, argument("target", NULL));
    refused(Merge { target: buffer(1 << 17, 9000), ..merge }, argument("delta", "overlaps an output"));
    let target = buffer(1 << 16, usize::MAX);
    refused(Merge { target, ..merge }, Error::Overflow { argument: "target", shape: "any" });
}

#[test]
fn norm_plans() {
    let gradients = [buffer(1 << 16, 16385), buffer(0, 0), buffer(1 << 20, 5)];
    let norm = buffer(1 << 8, 1);
    let workspace = buffer(1 << 10, 3);
    let operator = GradNorm { dtype: DType::F16, gradients: &gradients, norm, workspace };
    assert_eq!(GradNorm::workspace_len([16385, 0, 5]), 3);
    let [sums, total] = launches(&operator.plan().unwrap());
    assert_eq!((sums.kernel.name, sums.grid), ("grad_norm_f16", [3, 1, 1]));
    assert_eq!((total.kernel.name, total.grid), ("norm_total", [1, 1, 1]));
    let empty = GradNorm { gradients: &[], workspace: buffer(0, 0), ..operator };
    assert_eq!(only(empty.plan().unwrap()).kernel.name, "norm_total");
    let refused = |operator: GradNorm<'_>, want| assert_error(operator.plan(), &want);
    let with = |gradients: &[Buffer], want| refused(GradNorm { gradients, ..operator }, want);
    with(&[gradients[0], buffer(0, 3)], argument("gradients", NULL));
    with(&[buffer(1, 3)], argument("gradients", MISALIGNED));
    with(&[buffer(u64::MAX - 1, 3)], argument("gradients", ENDLESS));
    with(&[buffer(2, usize::MAX)], Error::Overflow { argument: "gradients", shape: "any" });
    let endless = Error::Overflow { argument: "workspace", shape: "[workspace_len()]" };
    with(&[buffer(2, 1 << 45)], endless.clone());
    with(&[buffer((1 << 10) + 4, 2)], argument("gradients", "overlaps an output"));
    refused(GradNorm { norm: buffer(1 << 8, 2), ..operator }, length("norm", "[1]", 1, 2));
    refused(GradNorm { norm: buffer(260, 1), ..operator }, argument("norm", MISALIGNED));
    refused(
        GradNorm { norm: buffer((1 << 10) + 16, 1), ..operator },
        argument("workspace", "overlaps another output"),
    );
    let shape = "[workspace_len()]";
    refused(GradNorm { workspace: buffer(1 << 10, 2), ..operator }, length("workspace", shape, 3, 2));
    refused(GradNorm { workspace: buffer((1 << 10) + 4, 3), ..operator }, argument("workspace", MISALIGNED));

    let operator = FpDistance {
        samples: 10,
        features: 2000,
        dtype: DType::F32,
        fine_tuned: buffer(1 << 20, 20_000),
        pre_trained: buffer(1 << 21, 20_000),
        distance: norm,
        workspace,
    };
    assert_eq!(FpDistance::workspace_len(10, 2000), 2);
    let [sums, _] = launches(&operator.plan().unwrap());
    assert_eq!((sums.kernel.name, sums.grid), ("fp_distance_f32", [2, 1, 1]));
    let shape = "[samples, features]";
    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    for (operator, want) in [
        (FpDistance { samples: 0, ..operator }, zero("samples")),
        (FpDistance { features: 0, ..operator }, zero("features")),
        (FpDistance { features: usize::MAX, ..operator }, Error::Overflow { argument: "fine_tuned", shape }),
        (FpDistance { fine_tuned: norm, ..operator }, length("fine_tuned", shape, 20_000, 1)),
        (FpDistance { pre_trained: buffer(2, 20_000), ..operator }, argument("pre_trained", MISALIGNED)),
        (
            FpDistance { distance: buffer((1 << 21) + 8, 1), ..operator },
            argument("pre_trained", "overlaps an output"),
        ),
        (FpDistance { distance: buffer(0, 1), ..operator }, argument("distance", NULL)),
        (
            FpDistance { workspace: buffer(1 << 10, 1), ..operator },
            length("workspace", "[workspace_len()]", 2, 1),
        ),
    ] {
        assert_error(operator.plan(), &want);
    }
    let (samples, features) = (1 << 23, 1 << 22);
    let [fine_tuned, pre_trained] = [1 << 50, 1 << 51].map(|address| buffer(address, 1 << 45));
    assert_error(FpDistance { samples, features, fine_tuned, pre_trained, ..operator }.plan(), &endless);
}

#[test]
fn a_loss_has_the_documented_geometry() {
    // A warp per sample of up to 256 classes; a block per sample while the batch is small.
    let launch = only(loss().plan().unwrap());
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("loss_f16", [1, 6, 1], [32, 1, 1]));
    // Two slices of 2056 and 2048 classes.
    let settings = LossSettings { classes: 4104, ..SETTINGS };
    let wide = Loss {
        settings,
        logits: buffer(1 << 20, B * 4104),
        partner: Partner::None,
        gradient: Some(buffer(1 << 21, B * 4104)),
        workspace: buffer(1 << 22, settings.workspace_len(B)),
        ..loss()
    };
    let [first, launch] = launches(&wide.plan().unwrap());
    assert_eq!((first.kernel.name, first.grid, first.block), ("loss_scan_f16", [2, 6, 1], [512, 1, 1]));
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("loss_apply_f16", [2, 6, 1], [512, 1, 1]));
    // Only what combines the slices is left.
    let [_, launch] = launches(&Loss { gradient: None, ..wide }.plan().unwrap());
    assert_eq!(launch.grid, [1, 6, 1]);
    // Whatever the sizes, blocks have at most 512 threads, and grids at most 65535 rows.
    for classes in [1, 33, 256, 257, 4096, 4097, 50257, 1 << 20, 1 << 30] {
        for batch in [1, 63, 64, 130, 1 << 12, 1 << 24] {
            let settings = LossSettings { classes, ..SETTINGS };
            let operator = Loss {
                settings,
                logits: buffer(1 << 60, 2 * batch * classes),
                labels: buffer(1 << 61, batch),
                partner: Partner::OtherBranch,
                gradient: Some(buffer(1 << 62, 2 * batch * classes)),
                workspace: buffer(1 << 63, settings.workspace_len(batch)),
                ..loss()
            };
            let plan = operator.plan().unwrap();
            for launch in plan.launches() {
                let ([x, y, _], [threads, ..]) = (launch.grid, launch.block);
                assert!(x > 0 && (1..=65535).contains(&y), "{classes} {batch}: {launch:?}");
                assert!((32..=512).contains(&threads) && threads % 32 == 0, "{classes} {batch}: {launch:?}");
            }
        }
    }
}

#[test]
fn wrong_arguments_of_a_loss_are_refused() {
    let wrong = |operator: Loss, want: Error| assert_error(operator.plan(), &want);
    let size = |argument, expected, got| Error::Size { argument, expected, got };
    let settings = |settings, want| wrong(Loss { settings, ..loss() }, want);
    settings(LossSettings { classes: 0, ..SETTINGS }, size("classes", "at least 1", 0));
    let classes = (1 << 30) + 1;
    settings(LossSettings { classes, ..SETTINGS }, size("classes", "at most 2^30", classes));
    for lambda in [-0.5, f64::INFINITY, f64::NEG_INFINITY, 1e39] {
        let got = if lambda == 1e39 { f64::INFINITY } else { lambda };
        let want = Error::Value { argument: "lambda", expected: "finite and not negative", got };
        settings(LossSettings { lambda, ..SETTINGS }, want);
    }
    for label_smoothing in [-0.1, 1.1, f64::INFINITY] {
        let want = Error::Value { argument: "label_smoothing", expected: "in [0, 1]", got: label_smoothing };
        settings(LossSettings { label_smoothing, ..SETTINGS }, want);
    }
    for operator in [
        LossSettings { lambda: f64::NAN, ..SETTINGS },
        LossSettings { label_smoothing: f64::NAN, ..SETTINGS },
    ] {
        assert!(matches!(Loss { settings: operator, ..loss() }.plan(), Err(Error::Value { .. })));
    }
    wrong(Loss { labels: buffer(8192, 0), ..loss() }, size("labels.len()", "at least 1", 0));
    let batch = (1 << 24) + 1;
    wrong(Loss { labels: buffer(8192, batch), ..loss() }, size("labels.len()", "at most 2^24", batch));

    // Each tensor in turn: what it is called, its shape and length, the bytes of an element, and the loss with another one.
    type With = fn(Buffer) -> Loss;
    let needed = SETTINGS.workspace_len(B);
    let tensors: [(&'static str, &'static str, usize, u64, With); 8] = [
        ("logits", "[B, C]", B * C, 2, |logits| Loss { logits, ..loss() }),
        ("labels", "[B]", B, 8, |labels| Loss { labels, ..loss() }),
        ("history", "[n, C]", ROWS * C, 4, |table| {
            let index = buffer(4 * 4096, B);
            Loss { partner: Partner::History { table, index }, ..loss() }
        }),
        ("index", "[B]", B, 8, |index| {
            let table = buffer(3 * 4096, ROWS * C);
            Loss { partner: Partner::History { table, index }, ..loss() }
        }),
        ("gradient", "[B, C]", B * C, 2, |gradient| Loss { gradient: Some(gradient), ..loss() }),
        ("values", "[3]", 3, 4, |values| Loss { values, ..loss() }),
        ("status", "[9]", LossStatus::WORDS, 8, |status| Loss { status, ..loss() }),
        ("workspace", "[workspace_len()]", needed, 4, |workspace| Loss { workspace, ..loss() }),
    ];
    for (i, (name, shape, len, bytes, with)) in tensors.into_iter().enumerate() {
        let address = 4096 * (i as u64 + 1);
        assert_eq!(with(buffer(address, len)), loss(), "{name}");
        wrong(with(buffer(0, len)), argument(name, NULL));
        wrong(with(buffer(address + bytes / 2, len)), argument(name, MISALIGNED));
        match name {
            "history" => {
                let expected = "a multiple of the number of classes, and not 0";
                for got in [0, 1, len - 1, len + 1] {
                    wrong(with(buffer(address, got)), size("history.len()", expected, got));
                }
                let want = Error::Overflow { argument: "history", shape: "[n, C]" };
                wrong(with(buffer(address, usize::MAX - usize::MAX % C)), want);
            }
            // Another length is another batch.
            "labels" => wrong(with(buffer(address, B + 1)), length("logits", "[B, C]", (B + 1) * C, B * C)),
            // More is fine.
            "workspace" => {
                wrong(with(buffer(address, len - 1)), length(name, shape, len, len - 1));
                assert!(with(buffer(address, usize::MAX)).plan().is_ok());
            }
            _ => {
                for got in [0, len - 1, len + 1, usize::MAX] {
                    wrong(with(buffer(address, got)), length(name, shape, len, got));
                }
            }
        }
        // No output may touch anything else, by one element at either end; inputs may touch inputs.
        let input = |name| ["logits", "labels", "index"].contains(&name);
        for (j, &(other, _, other_len, other_bytes, _)) in tensors.iter().enumerate().filter(|&(j, _)| j != i)
        {
            // Addresses are multiples of 8 as well as of the element.
            let (start, end) =
                (4096 * (j as u64 + 1), 4096 * (j as u64 + 1) + other_bytes * other_len as u64);
            let behind = (end - 1) / 8 * 8;
            let before = (start - bytes * len as u64) / 8 * 8 + 8;
            for at in [behind, before] {
                let moved = with(buffer(at, len));
                match moved.plan() {
                    Ok(_) => assert!(input(name) && input(other), "{name} over {other}"),
                    Err(Error::Argument { argument, problem }) => {
                        let outputs = !input(name) && !input(other);
                        assert_eq!(
                            problem,
                            if outputs { "overlaps another output" } else { "overlaps an output" }
                        );
                        // With an input it is the one that is named.
                        assert!([name, other].contains(&argument) && (outputs || input(argument)));
                    }
                    Err(error) => panic!("{name} over {other}: {error}"),
                }
            }
        }
    }
    // The length saturates for sizes that no plan accepts.
    for classes in [0, usize::MAX] {
        let settings = LossSettings { classes, ..SETTINGS };
        assert_eq!(settings.workspace_len(usize::MAX), usize::MAX);
    }
    let both = Loss { partner: Partner::OtherBranch, ..loss() };
    wrong(both, length("logits", "[2B, C]", 2 * B * C, B * C));
    let both = Loss { logits: buffer(4096, 2 * B * C), ..both };
    wrong(both, length("gradient", "[2B, C]", 2 * B * C, B * C));
    let huge = LossSettings { classes: 1 << 30, ..SETTINGS };
    let huge =
        Loss { settings: huge, labels: buffer(8192, 1 << 24), logits: buffer(4096, usize::MAX), ..both };
    assert!(matches!(huge.plan(), Err(Error::Length { argument: "logits", .. })));
}

#[test]
fn a_status_becomes_the_error_of_the_first_wrong_element() {
    let words = [2, 5, (-7i64).cast_unsigned(), 1, 3, 99, 4, 1, 8];
    let status = LossStatus::new(words);
    let finding = |count, position, value| Finding { count, position, value };
    let [labels, indices, repeated] = [finding(2, 5, -7), finding(1, 3, 99), finding(4, 1, 8)];
    assert_eq!(status, LossStatus { labels, indices, repeated });
    let none = Finding::default();
    let check = |status: LossStatus| status.check(C, ROWS);
    assert_eq!(check(LossStatus::default()), Ok(()));
    assert_eq!(check(status), Err(Error::Label { position: 5, label: -7, classes: C }));
    let duplicate = Err(Error::DuplicateIndex { position: 1, index: 8 });
    assert_eq!(check(LossStatus { labels: none, ..status }), duplicate);
    assert_eq!(check(LossStatus { labels: none, indices: none, repeated }), duplicate);
    let index = Err(Error::Index { position: 3, index: 99, rows: ROWS });
    let later = finding(1, 4, 8);
    assert_eq!(check(LossStatus { labels: none, indices, repeated: later }), index);
    assert_eq!(check(LossStatus { labels: none, indices, repeated: none }), index);
}

#[test]
fn opening_a_device_gives_one_or_a_typed_error() {
    for ordinal in [0, 1 << 20, usize::MAX] {
        match Device::open(ordinal) {
            Ok(device) => assert_eq!(device.context().ordinal(), ordinal),
            Err(Error::NoDevice { ordinal: named, count }) => assert!(named == ordinal && count <= ordinal),
            Err(
                error @ (Error::NoDriver(_) | Error::KernelsNotBuilt { .. } | Error::DeviceTooOld { .. }),
            ) => {
                assert!(!error.to_string().is_empty());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

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

/// A device whose layers our kernels compute, and one whose layers cuBLASLt computes.
const SM80: Gpu = Gpu::A100.with_family(Family::Sm80);
const GPUS: [Gpu; 2] = [SM80, Gpu::A100.with_family(Family::CublasLt)];

/// The shared input, the output and its gradient, and more than enough of a workspace.
const X: Buffer = Buffer { address: 10 << 20, len: 15 * 7 };
const Y: Buffer = Buffer { address: 11 << 20, len: M * 24 };
const DY: Buffer = Buffer { address: 12 << 20, len: M * 24 };
const S: Buffer = Buffer { address: 13 << 20, len: 15 * 5 };
const WORKSPACE: Buffer = Buffer { address: 20 << 20, len: 1 << 18 };

#[test]
fn linear_layers_choose_their_kernels() {
    let name = |layer: NoisyLinear<Buffer, Source>, dtype| {
        only(layer.forward(&SM80, dtype, X, Y, WORKSPACE).unwrap()).kernel.name
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
        let workspace = buffer(1 << 40, 1 << 30);
        let name = only(layer.forward(&SM80, DType::BF16, x, y, workspace).unwrap()).kernel.name;
        assert_eq!(
            name,
            if folds { "noisy_linear_folded_bf16" } else { "noisy_linear_two_bf16" },
            "{shape:?}"
        );
    }
    let names = |layer: LowRankLinear<Buffer, Source>| {
        let s = tensor(13, 15 * layer.rank);
        let plan = layer.forward(&SM80, DType::F32, X, s, Y, WORKSPACE).unwrap();
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
    let (null, misaligned) = ("is a null pointer", "does not start at a multiple of its element size");
    let dense = |layer: NoisyLinear<Buffer, Source>, x, y, want: Error| {
        for gpu in GPUS {
            assert_error(layer.forward(&gpu, DType::F32, x, y, WORKSPACE), &want);
        }
    };
    let low = |layer: LowRankLinear<Buffer, Source>, x, s, y, want: Error| {
        for gpu in GPUS {
            assert_error(layer.forward(&gpu, DType::F32, x, s, y, WORKSPACE), &want);
        }
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
        match layer.forward(&SM80, DType::F32, X, S, Y, WORKSPACE) {
            Err(Error::Value { argument: "scale", expected: "finite", .. }) => {}
            other => panic!("{other:?}"),
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
    let dense = |grads, workspace, want: Error| {
        for gpu in GPUS {
            assert_error(noisy_linear().backward(&gpu, DType::F32, X, DY, grads, workspace), &want);
        }
    };
    let low = |grads, workspace, want: Error| {
        for gpu in GPUS {
            assert_error(low_rank_linear().backward(&gpu, DType::F32, X, S, DY, grads, workspace), &want);
        }
    };
    let none = NoisyLinearGrads::default;
    let no = LowRankGrads::default;
    for (dx, want) in [
        (tensor(14, 3), length("grads.input", "[B·T, K]", 15 * 7, 3)),
        (Buffer { len: 15 * 7, ..DY }, argument("dy", "overlaps an output")),
        (Buffer { len: 15 * 7, ..WORKSPACE }, argument("workspace", "overlaps another output")),
    ] {
        // The small dense layer needs no workspace.
        if want != argument("workspace", "overlaps another output") {
            dense(NoisyLinearGrads { input: Some(dx), ..none() }, WORKSPACE, want.clone());
        }
        low(LowRankGrads { input: Some(dx), ..no() }, WORKSPACE, want);
    }
    let want = length("grads.delta_weight", "[N, K]", 24 * 7, 3);
    dense(NoisyLinearGrads { delta_weight: Some(tensor(14, 3)), ..none() }, WORKSPACE, want);
    let want = || length("grads.delta_bias", "[N]", 24, 3);
    dense(NoisyLinearGrads { delta_bias: Some(tensor(14, 3)), ..none() }, WORKSPACE, want());
    low(LowRankGrads { delta_bias: Some(tensor(14, 3)), ..no() }, WORKSPACE, want());
    let want = length("grads.lora_b", "[N, r]", 24 * 5, 3);
    low(LowRankGrads { lora_b: Some(tensor(14, 3)), ..no() }, WORKSPACE, want);
    let want = length("grads.lora_a", "[r, K]", 5 * 7, 3);
    low(LowRankGrads { lora_a: Some(tensor(14, 3)), ..no() }, WORKSPACE, want);
    let layer = NoisyLinear { delta_weight: None, ..noisy_linear() };
    let grads = NoisyLinearGrads { delta_weight: Some(tensor(14, 24 * 7)), ..none() };
    let want = argument("grads.delta_weight", "is asked for, but the layer has no `delta_weight`");
    assert_error(layer.backward(&SM80, DType::F32, X, DY, grads, WORKSPACE), &want);
    // Workspaces that are too small, absent or misaligned. Where none is needed, any will do.
    let misaligned = "does not start at a multiple of its element size";
    for gpu in GPUS {
        let low = |workspace, want: Error| {
            assert_error(low_rank_linear().backward(&gpu, DType::F32, X, S, DY, no(), workspace), &want);
        };
        let needed = low_rank_linear().workspace_len(&gpu, DType::F32);
        let want = |got| length("workspace", "[workspace_len()]", needed, got);
        low(Buffer { len: needed - 1, ..WORKSPACE }, want(needed - 1));
        low(buffer(0, 0), want(0));
        low(buffer(0, needed), argument("workspace", "is a null pointer"));
        low(Buffer { address: 4097, ..WORKSPACE }, argument("workspace", misaligned));
    }
    assert_eq!(noisy_linear().workspace_len(&SM80, DType::F32), 0);
    noisy_linear().backward(&SM80, DType::F32, X, DY, none(), buffer(0, 0)).unwrap();
}

/// What is asked before anything is checked: no size panics, and those that are refused need nothing or more than there is.
#[test]
fn workspaces_of_any_size() {
    let sizes = [0, 1, 7, 1 << 20, 1 << 31, 1 << 40, usize::MAX / 2, usize::MAX];
    for dtype in [DType::F32, DType::BF16] {
        for a in sizes {
            for b in sizes {
                for c in sizes {
                    let shape = LinearShape { batch: a, tokens: 1, in_features: b, out_features: c, ..LAYER };
                    let dense = NoisyLinear { shape, ..noisy_linear() };
                    let low = LowRankLinear { shape, rank: a, ..low_rank_linear() };
                    if a == 0 || b == 0 || c == 0 {
                        for gpu in GPUS {
                            let lens = (dense.workspace_len(&gpu, dtype), low.workspace_len(&gpu, dtype));
                            assert_eq!(lens, (0, 0));
                        }
                    }
                    for gpu in GPUS {
                        dense
                            .backward(&gpu, dtype, X, DY, NoisyLinearGrads::default(), WORKSPACE)
                            .unwrap_err();
                        low.backward(&gpu, dtype, X, S, DY, LowRankGrads::default(), WORKSPACE).unwrap_err();
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
