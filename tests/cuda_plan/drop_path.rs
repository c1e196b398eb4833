//! DropPath: geometry, and wrong arguments.

use crate::support::*;
use pace_kernels::Error;
use pace_kernels::cuda::{DType, Direction, DropPath, MaskSource};
use pace_kernels::noise::Key;

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
    let plan = drop_path().plan().unwrap();
    let launch = only(&plan);
    // 125 vectors: two per thread, 64 threads on a row, 4 rows side by side.
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("drop_path_bf16", [2, 1, 1], [256, 1, 1]));
    // As many blocks as suit every device.
    for (batch, features, grid) in [
        (2, 151_296, [148, 1, 1]),
        (64, 151_296, [660, 1, 1]),
        (65536, 1000, [660, 1, 1]),
        (1, 1 << 24, [660, 1, 1]),
    ] {
        let total = 2 * batch * features;
        let mask = MaskSource::Given(buffer(1 << 20, batch));
        let (input, output) = (buffer(1 << 40, total), buffer(1 << 41, total));
        let operator = DropPath { batch, features, mask, input, output, ..drop_path() };
        assert_eq!(only(&operator.plan().unwrap()).grid, grid);
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
