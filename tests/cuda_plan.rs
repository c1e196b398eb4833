//! Plans refuse wrong arguments with the error that names them, and opening a device never panics.

use pace_kernels::cuda::{
    Base, Buffer, DType, Device, Direction, LowRankGrads, LowRankLinear, NoiseFill, NoisyEpilogue,
    NoisyLinear, NoisyLinearGrads, Plan, Source,
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
        noise: Source::Generated { generator: generator(PerSample, 0), key: None },
        direction: Direction::Forward,
        dtype: DType::F16,
        input: buffer(4096, M * 24),
        output: buffer(8192, M * 24),
    }
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
    let plan = fill().plan().unwrap();
    // 6 groups in 8 of x, 30 rows in 32 of y.
    assert_eq!((plan.kernel.name, plan.grid, plan.block), ("noise_fill", [1, 1, 1], [8, 32, 1]));
    let plan = epilogue().plan().unwrap();
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
        assert_eq!(operator.plan().unwrap().kernel.name, name);
    }
    // Blocks have at most 1024 threads and 64 along z, and grids at most 65535 rows, whatever the shape.
    for channels in [1, 4, 5, 8, 33, 768, 3072, 1 << 20] {
        for tokens in [1, 2, 7, 8, 197, 4096] {
            for batch in [1, 64, 1 << 10, 1 << 18] {
                let shape = LinearShape { batch, tokens, out_features: channels, ..SHAPE };
                let len = shape.out_rows() * channels;
                let z = NoiseFill { shape, z: buffer(1 << 40, len), ..fill() }.plan().unwrap();
                let (input, output) = (buffer(1 << 56, len), buffer(1 << 57, len));
                let y = NoisyEpilogue { shape, input, output, ..epilogue() }.plan().unwrap();
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
    assert_error(
        NoisyEpilogue { noise: Source::Generated { generator, key: None }, ..epilogue() }.plan(),
        &want,
    );
}

#[test]
fn wrong_buffers_are_refused() {
    let (null, misaligned) = ("is a null pointer", "does not start at a multiple of its element size");
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
    Source::Generated { generator: generator(PerSample, 0), key: Some(tensor(9, 1)) }
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
        down: tensor(3, 24 * 5),
        up: tensor(4, 5 * 7),
        delta_bias: Some(tensor(5, 24)),
        scale: 1.0,
        allow_tf32: false,
    }
}

/// The shared input, the output and its gradient, and more than enough of a workspace.
const X: Buffer = Buffer { address: 10 << 20, len: 15 * 7 };
const Y: Buffer = Buffer { address: 11 << 20, len: M * 24 };
const DY: Buffer = Buffer { address: 12 << 20, len: M * 24 };
const S: Buffer = Buffer { address: 13 << 20, len: 15 * 5 };
const WORKSPACE: Buffer = Buffer { address: 20 << 20, len: 1 << 16 };

#[test]
fn linear_layers_choose_their_kernels() {
    let name = |layer: NoisyLinear<Buffer, Source>, dtype| layer.forward(dtype, X, Y).unwrap().kernel.name;
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
            Source::Generated { generator: generator(PerToken, 0), key: None },
            false,
        ),
    ] {
        let layer = NoisyLinear { shape, noise, fold: true, ..noisy_linear() };
        let (x, y) = (tensor(100, shape.in_rows() * 7), tensor(200, shape.out_rows() * 24));
        let name = layer.forward(DType::BF16, x, y).unwrap().kernel.name;
        assert_eq!(
            name,
            if folds { "noisy_linear_folded_bf16" } else { "noisy_linear_two_bf16" },
            "{shape:?}"
        );
    }
    let names = |layer: LowRankLinear<Buffer, Source>| {
        let mut names = Vec::new();
        let s = tensor(13, 15 * layer.rank);
        let plan = layer.forward(DType::F32, X, s, Y).unwrap();
        plan.for_each(&mut |launch| {
            names.push(launch.kernel.name);
            Ok(())
        })
        .unwrap();
        names
    };
    let rank = |rank| LowRankLinear {
        rank,
        down: tensor(3, 24 * rank),
        up: tensor(4, rank * 7),
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
        assert_error(layer.forward(DType::F32, x, y), &want);
    };
    let low = |layer: LowRankLinear<Buffer, Source>, x, s, y, want: Error| {
        assert_error(layer.forward(DType::F32, x, s, y), &want);
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
    let overflow = Error::Overflow { argument: "down", shape: "[N, r]" };
    low(LowRankLinear { rank: usize::MAX / 2, ..low_rank_linear() }, X, S, Y, overflow);
    for scale in [f32::NAN, f32::INFINITY] {
        let layer = LowRankLinear { scale, ..low_rank_linear() };
        match layer.forward(DType::F32, X, S, Y) {
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
    let want = length("down", "[N, r]", 24 * 5, 5);
    low(LowRankLinear { down: tensor(3, 5), ..low_rank_linear() }, X, S, Y, want);
    let want = length("up", "[r, K]", 5 * 7, 5);
    low(LowRankLinear { up: tensor(4, 5), ..low_rank_linear() }, X, S, Y, want);
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
    low(low_rank_linear(), X, Buffer { address: 4 << 20, ..S }, Y, overlap("up"));
}

#[test]
fn wrong_gradients_of_linear_layers_are_refused() {
    let dense = |grads, workspace, want: Error| {
        assert_error(noisy_linear().backward(DType::F32, X, DY, grads, workspace), &want);
    };
    let low = |grads, workspace, want: Error| {
        assert_error(low_rank_linear().backward(DType::F32, X, S, DY, grads, workspace), &want);
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
    let want = length("grads.down", "[N, r]", 24 * 5, 3);
    low(LowRankGrads { down: Some(tensor(14, 3)), ..no() }, WORKSPACE, want);
    let want = length("grads.up", "[r, K]", 5 * 7, 3);
    low(LowRankGrads { up: Some(tensor(14, 3)), ..no() }, WORKSPACE, want);
    let layer = NoisyLinear { delta_weight: None, ..noisy_linear() };
    let grads = NoisyLinearGrads { delta_weight: Some(tensor(14, 24 * 7)), ..none() };
    let want = argument("grads.delta_weight", "is asked for, but the layer has no `delta_weight`");
    assert_error(layer.backward(DType::F32, X, DY, grads, WORKSPACE), &want);
    // Workspaces that are too small, absent or misaligned. Where none is needed, any will do.
    let needed = low_rank_linear().workspace_len(DType::F32);
    let want = |got| length("workspace", "[workspace_len()]", needed, got);
    low(no(), Buffer { len: needed - 1, ..WORKSPACE }, want(needed - 1));
    low(no(), buffer(0, 0), want(0));
    low(no(), buffer(0, needed), argument("workspace", "is a null pointer"));
    let misaligned = "does not start at a multiple of its element size";
    low(no(), Buffer { address: 4097, ..WORKSPACE }, argument("workspace", misaligned));
    assert_eq!(noisy_linear().workspace_len(), 0);
    noisy_linear().backward(DType::F32, X, DY, none(), buffer(0, 0)).unwrap();
}
