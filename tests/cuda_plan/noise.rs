//! Noise fill and noisy epilogue: geometry, and wrong arguments.

use crate::support::*;
use pace_kernels::cuda::{DType, Direction, NoiseFill, NoisyEpilogue, Source};
use pace_kernels::noise::NoiseShape::{PerSample, PerToken};
use pace_kernels::{Error, LinearShape};

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

#[test]
fn right_arguments_give_the_documented_geometry() {
    let plan = fill().plan().unwrap();
    let launch = only(&plan);
    // 6 groups in 8 of x, 5 tokens in 8 of y, 6 units in two times 4 of z.
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("noise_fill", [1, 2, 1], [8, 8, 4]));
    let plan = epilogue().plan().unwrap();
    let launch = only(&plan);
    // 3 columns in 4 of x, 5 tokens in 8 of y, 6 units in 8 of z.
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("noisy_epilogue_f16", [1, 1, 1], [4, 8, 8]));
    for (dtype, direction, name) in [
        (DType::F32, Direction::Forward, "noisy_epilogue_f32"),
        (DType::BF16, Direction::Forward, "noisy_epilogue_bf16"),
        (DType::F32, Direction::Backward, "noisy_epilogue_backward_f32"),
        (DType::F16, Direction::Backward, "noisy_epilogue_backward_f16"),
        (DType::BF16, Direction::Backward, "noisy_epilogue_backward_bf16"),
    ] {
        let operator = NoisyEpilogue { dtype, direction, output: buffer(1 << 20, M * 24), ..epilogue() };
        assert_eq!(only(&operator.plan().unwrap()).kernel.name, name);
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
                for (grid, block) in [only(&z), only(&y)].map(|launch| (launch.grid, launch.block)) {
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
