//! Plans of the linear layers by cuBLASLt: the steps of every way through the planning, and the memory that they take.

use crate::cublaslt::*;
use crate::support::*;
use pace_kernels::cuda::{
    Base, Buffer, DType, Gemm, Gpu, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, Plan, Source,
    Step,
};
use pace_kernels::noise::NoiseShape::PerSample;
use pace_kernels::{Error, LinearShape};

type Dense = NoisyLinear<Buffer, Source>;
type LowRank = LowRankLinear<Buffer, Source>;

/// A layer that has everything.
fn dense(shape: LinearShape) -> Dense {
    let (k, n) = (shape.in_features, shape.out_features);
    NoisyLinear {
        shape,
        noise: Source::Generated(generator(PerSample, 0)),
        base: bases(&shape)[2],
        delta_weight: Some(place(5, n * k)),
        delta_bias: Some(place(6, n)),
        fold: false,
        allow_tf32: false,
    }
}

fn low_rank(shape: LinearShape) -> LowRank {
    let (k, n) = (shape.in_features, shape.out_features);
    LowRankLinear {
        shape,
        noise: Source::Generated(generator(PerSample, 0)),
        base: bases(&shape)[2],
        rank: RANK,
        lora_b: place(7, n * RANK),
        lora_a: place(8, RANK * k),
        delta_bias: Some(place(6, n)),
        scale: SCALE,
        allow_tf32: false,
    }
}

fn gemms(plan: &Plan) -> impl Iterator<Item = &Gemm> {
    plan.steps().iter().filter_map(|step| match step {
        Step::Gemm(gemm) => Some(gemm),
        _ => None,
    })
}

/// `[m, n, k]` of GEMMs come last; `t0` and so on lie in the workspace.
#[test]
fn dense_layers_take_the_documented_steps() {
    let forward = |layer: Dense, want: &[&str]| {
        let (_, machine) = dense_forward(&GPUS[0], DType::BF16, &layer);
        assert_eq!(machine.trace, want, "{layer:?}");
    };
    let (off, small, shared) = (Source::Off, dense(SMALL), dense(SHARED));
    // Without noise the GEMMs add up in y.
    let sum = ["y = x@W' + b [30, 24, 7]", "y += x@dW' + db [30, 24, 7]"];
    forward(NoisyLinear { noise: off, ..small }, &sum);
    forward(NoisyLinear { noise: off, base: None, ..small }, &["y = x@dW' + db [30, 24, 7]"]);
    forward(NoisyLinear { delta_weight: None, delta_bias: None, ..small }, &sum[..1]);
    // With noise an epilogue does, and one of the terms lies in y.
    forward(small, &[sum[0], "t0 = x@dW' [30, 24, 7]", "y = y + z*(t0 + db)"]);
    forward(NoisyLinear { base: None, ..small }, &["y = x@dW' [30, 24, 7]", "y = 0 + z*(y + db)"]);
    forward(NoisyLinear { delta_weight: None, ..small }, &[sum[0], "y = y + z*(0 + db)"]);
    // Branches share the GEMMs' rows with their input.
    let terms = ["t0 = x@W' + b [15, 24, 7]", "t1 = x@dW' [15, 24, 7]"];
    forward(shared, &[terms[0], terms[1], "y = t0 + z*(t1 + db)"]);
    forward(NoisyLinear { noise: off, ..shared }, &[terms[0], terms[1], "y = t0 + (t1 + db)"]);
}

#[test]
fn dense_gradients_take_the_documented_steps() {
    let backward = |layer: Dense, wanted, want: &[&str]| {
        let (_, machine) = dense_backward(&GPUS[0], DType::BF16, &layer, wanted);
        assert_eq!(machine.trace, want, "{layer:?}");
    };
    let (off, small, shared) = (Source::Off, dense(SMALL), dense(SHARED));
    backward(small, [false; 3], &[]);
    let products = ["dx = g@W [30, 7, 24]", "dx += g@dW [30, 7, 24]", "ddW = g'@x [24, 7, 30]"];
    backward(NoisyLinear { noise: off, ..small }, [true, true, false], &products);
    backward(NoisyLinear { delta_weight: None, ..small }, [true, false, false], &products[..1]);
    // The gradient of the bias alone has no GEMM.
    let bias = ["t0 = parts of Σr z*g", "ddb = Σ t0"];
    backward(small, [false, false, true], &bias);
    let products = ["dx += t0@dW [30, 7, 24]", "ddW = t0'@x [24, 7, 30]"];
    let want = ["t0 = z*g, t1 = parts of Σr z*g", "ddb = Σ t1", "dx = g@W [30, 7, 24]"];
    backward(small, [true; 3], &[&want[..], &products].concat());
    backward(
        NoisyLinear { base: None, ..small },
        [true, false, false],
        &["t0 = z*g", "dx = t0@dW [30, 7, 24]"],
    );
    backward(
        shared,
        [true; 3],
        &[
            "t0 = Σb g, t1 = Σb z*g, t2 = parts of Σr Σb z*g",
            "ddb = Σ t2",
            "dx = t0@W [15, 7, 24]",
            "dx += t1@dW [15, 7, 24]",
            "ddW = t1'@x [24, 7, 15]",
        ],
    );
}

#[test]
fn low_rank_layers_take_the_documented_steps() {
    let forward = |layer: LowRank, want: &[&str]| {
        let (_, machine) = low_rank_forward(&GPUS[0], DType::BF16, &layer);
        assert_eq!(machine.trace, want, "{layer:?}");
    };
    let (off, small, shared) = (Source::Off, low_rank(SMALL), low_rank(SHARED));
    let [s, base] = ["s = 0.5 x@A' [30, 4, 7]", "y = x@W' + b [30, 24, 7]"];
    forward(LowRankLinear { noise: off, ..small }, &[s, base, "y += s@B' + db [30, 24, 4]"]);
    forward(LowRankLinear { noise: off, base: None, ..small }, &[s, "y = s@B' + db [30, 24, 4]"]);
    forward(small, &[s, base, "t0 = s@B' [30, 24, 4]", "y = y + z*(t0 + db)"]);
    forward(LowRankLinear { base: None, ..small }, &[s, "y = s@B' [30, 24, 4]", "y = 0 + z*(y + db)"]);
    forward(
        shared,
        &[
            "s = 0.5 x@A' [15, 4, 7]",
            "t0 = x@W' + b [15, 24, 7]",
            "t1 = s@B' [15, 24, 4]",
            "y = t0 + z*(t1 + db)",
        ],
    );
}

#[test]
fn low_rank_gradients_take_the_documented_steps() {
    let backward = |layer: LowRank, wanted, want: &[&str]| {
        let (_, machine) = low_rank_backward(&GPUS[0], DType::BF16, &layer, wanted);
        assert_eq!(machine.trace, want, "{layer:?}");
    };
    let (off, small, shared) = (Source::Off, low_rank(SMALL), low_rank(SHARED));
    backward(small, [false; 4], &[]);
    backward(small, [false, false, false, true], &["t0 = parts of Σr z*g", "ddb = Σ t0"]);
    backward(small, [false, true, false, false], &["t0 = z*g", "dB = t0'@s [24, 4, 30]"]);
    backward(
        LowRankLinear { noise: off, ..small },
        [true, true, true, false],
        &[
            "t0 = 0.5 g@B [30, 4, 24]",
            "dx = g@W [30, 7, 24]",
            "dx += t0@A [30, 7, 4]",
            "dB = g'@s [24, 4, 30]",
            "dA = t0'@x [4, 7, 30]",
        ],
    );
    backward(
        small,
        [true; 4],
        &[
            "t0 = z*g, t1 = parts of Σr z*g",
            "ddb = Σ t1",
            "t2 = 0.5 t0@B [30, 4, 24]",
            "dx = g@W [30, 7, 24]",
            "dx += t2@A [30, 7, 4]",
            "dB = t0'@s [24, 4, 30]",
            "dA = t2'@x [4, 7, 30]",
        ],
    );
    backward(
        shared,
        [true; 4],
        &[
            "t0 = Σb g, t1 = Σb z*g, t2 = parts of Σr Σb z*g",
            "ddb = Σ t2",
            "t3 = 0.5 t1@B [15, 4, 24]",
            "dx = t0@W [15, 7, 24]",
            "dx += t3@A [15, 7, 4]",
            "dB = t1'@s [24, 4, 15]",
            "dA = t3'@x [4, 7, 15]",
        ],
    );
}

/// The GEMMs of a pass have the same memory, one after the other: as much as NVIDIA recommends for the device, or what the partial
/// sums of a small output need.
#[test]
fn gemms_have_the_memory_that_they_can_use() {
    // x's and dx's rows by 24, the larger of K and N, in up to 16 parts of f32.
    let of = |elements: usize| elements * 64 + (64 << 10);
    for gpu in &GPUS {
        assert_gemm_memory(gpu, SMALL, [of(30 * 24); 2]);
        assert_gemm_memory(gpu, SHARED, [of(15 * 24); 2]);
    }
    // The gradients of the adapter are what is largest where rows are few.
    let few = LinearShape { branches: 1, batch: 1, tokens: 1, ..SMALL };
    assert_gemm_memory(&GPUS[0], few, [of(7 * 24), of(4 * 24)]);
    assert_gemm_memory(&GPUS[0], LARGE, [4 << 20; 2]);
    assert_gemm_memory(&GPUS[1], LARGE, [32 << 20; 2]);
}

fn assert_gemm_memory(gpu: &Gpu, shape: LinearShape, [dense_bytes, low_rank_bytes]: [usize; 2]) {
    let dtype = DType::F32;
    let (dense, low) = (dense(shape), low_rank(shape));
    let (dense, dense_grads) =
        (dense_forward(gpu, dtype, &dense).0, dense_backward(gpu, dtype, &dense, [true; 3]).0);
    let (low, low_grads) =
        (low_rank_forward(gpu, dtype, &low).0, low_rank_backward(gpu, dtype, &low, [true; 4]).0);
    for (plan, count, bytes) in [
        (&dense, 2, dense_bytes),
        (&dense_grads, 3, dense_bytes),
        (&low, 3, low_rank_bytes),
        (&low_grads, 5, low_rank_bytes),
    ] {
        assert_eq!(gemms(plan).count(), count);
        for gemm in gemms(plan) {
            // At the first multiple of 256 in the workspace.
            assert_eq!(
                (gemm.workspace.address.0, gemm.workspace.bytes),
                (60 << 40 | 256, bytes),
                "{gpu:?} {shape:?}"
            );
        }
    }
}

/// Epilogues load vectors where all that they touch starts at a multiple of 16 bytes (the machine compares), and not otherwise.
#[test]
fn tensors_may_start_anywhere() {
    let gpu = &GPUS[0];
    for dtype in [DType::F32, DType::BF16] {
        for moved in ["nothing", "y", "db", "z", "g"] {
            let at = |name, tensor: Buffer| match name == moved {
                true => buffer(tensor.address + 4, tensor.len),
                false => tensor,
            };
            let [x, _, y, dy] = activations(&SMALL);
            let noise = Source::Given { z: at("z", place(2, 6 * 24)), shape: PerSample };
            let layer = NoisyLinear { noise, delta_bias: Some(at("db", place(6, 24))), ..dense(SMALL) };
            let workspace = exact(layer.workspace_len(gpu, dtype));
            let mut machine = dense_machine(&layer, dtype, workspace);
            let y = at("y", y);
            machine.output("y", y, [30, 24]);
            machine.run(&layer.forward(gpu, dtype, x, y, workspace).unwrap());
            assert_eq!(machine.trace.last().unwrap(), "y = y + z*(t0 + db)");
            let (dy, grads) = (at("g", dy), dense_grads(&SMALL, [false, true, false]));
            machine.input("g", dy, [30, 24]);
            machine.output("ddW", grads.delta_weight.unwrap(), [24, 7]);
            machine.run(&layer.backward(gpu, dtype, x, dy, grads, workspace).unwrap());
            assert_eq!(machine.trace.last().unwrap(), "ddW = t0'@x [24, 7, 30]");
        }
    }
}

/// The library faults on a bias that does not start at a multiple of 16 bytes: it gets a copy. Epilogues take any.
#[test]
fn biases_may_start_anywhere() {
    let [x, _, y, _] = activations(&SMALL);
    let copies = ["t0 = 0 + (0 + b)", "t1 = 0 + (0 + db)"];
    for dtype in [DType::F32, DType::BF16] {
        for (noise, want) in [
            (Source::Off, [copies[0], copies[1], "y = x@W' + t0 [30, 24, 7]", "y += x@dW' + t1 [30, 24, 7]"]),
            (
                Source::Generated(generator(PerSample, 0)),
                [copies[0], "y = x@W' + t0 [30, 24, 7]", "t1 = x@dW' [30, 24, 7]", "y = y + z*(t1 + db)"],
            ),
        ] {
            let moved = |tensor: Buffer| buffer(tensor.address + 4, tensor.len);
            let mut layer = NoisyLinear { noise, delta_bias: Some(moved(place(6, 24))), ..dense(SMALL) };
            layer.base = layer.base.map(|base| Base { bias: base.bias.map(moved), ..base });
            // One token row: the output is no larger than a bias.
            for shape in [SMALL, LinearShape { branches: 1, batch: 1, tokens: 1, ..SMALL }] {
                let layer = Dense { shape, ..layer };
                let len = layer.workspace_len(&GPUS[0], dtype);
                let (x, y) =
                    (buffer(x.address, shape.out_rows() * 7), buffer(y.address, shape.out_rows() * 24));
                let mut machine = dense_machine(&layer, dtype, exact(len));
                machine.output("y", y, [shape.out_rows(), 24]);
                machine.run(&layer.forward(&GPUS[0], dtype, x, y, exact(len)).unwrap());
                let want = want.map(|step| step.replace("[30", &format!("[{}", shape.out_rows())));
                assert_eq!(machine.trace, want);
            }
        }
    }
}

/// A workspace of the stated length suffices wherever it starts, and both passes stay inside it (the machine sees to that). Nothing
/// of a plan depends on the bytes before the first multiple of 256.
#[test]
fn workspaces_may_start_anywhere() {
    for start in (0..512).step_by(4).map(|offset| 60u64 << 40 | offset) {
        for shape in [SMALL, SHARED] {
            let (dense, [x, _, y, dy]) = (dense(shape), activations(&shape));
            let len = dense.workspace_len(&GPUS[0], DType::F32);
            let end = start + 4 * len as u64;
            let workspace = buffer(start, len);
            let grads = dense_grads(&shape, [true; 3]);
            let plan = dense.backward(&GPUS[0], DType::F32, x, dy, grads, workspace).unwrap();
            let plans = [dense.forward(&GPUS[0], DType::F32, x, y, workspace).unwrap(), plan];
            let library = plans.iter().flat_map(gemms).map(|gemm| gemm.workspace);
            for memory in library {
                assert!(memory.address.0 >= start && memory.address.0 + (memory.bytes as u64) < end);
                assert!(memory.address.0 < start + 256 && memory.address.0.is_multiple_of(256));
            }
            // The same places relative to the first multiple of 256.
            let shifted = buffer(start.next_multiple_of(256), len);
            let aligned = dense.backward(&GPUS[0], DType::F32, x, dy, grads, shifted).unwrap();
            assert_eq!(plans[1], aligned, "{start:#x}");
        }
    }
}

/// Lengths for sizes that fit no memory saturate, and plans refuse them.
#[test]
fn workspaces_of_huge_layers_saturate() {
    // The largest sizes that the library takes.
    let most = i32::MAX as usize;
    let huge = LinearShape { branches: 1, batch: most, tokens: 1, in_features: 1, ..SMALL };
    let wide = LinearShape { out_features: 1 << 28, ..huge };
    for gpu in &GPUS {
        // The library's part is nothing beside the tensor of almost 2^59 elements.
        let layer = NoisyLinear { shape: wide, ..dense(SMALL) };
        let len = layer.workspace_len(gpu, DType::F32);
        assert!((most << 28..(1 << 59) + (1 << 40)).contains(&len), "{len:#x}");
        let (x, y) = (place(10, most), buffer(1 << 20, most << 28));
        let too_short = length("workspace", "[workspace_len()]", len, 1 << 40);
        assert_error(layer.forward(gpu, DType::F32, x, y, place(20, 1 << 40)), &too_short);

        let rank = most;
        let layer = LowRankLinear { shape: huge, rank, ..low_rank(SMALL) };
        assert_eq!(layer.workspace_len(gpu, DType::F32), usize::MAX.div_ceil(4));
        let refused = Error::Overflow { argument: "s", shape: "[M, r]" };
        let [x, s, y] = [place(10, most), place(11, 1 << 20), place(12, 1 << 20)];
        assert_error(layer.forward(gpu, DType::F32, x, s, y, place(20, usize::MAX)), &refused);
        let grads = LowRankGrads::default();
        assert_error(layer.backward(gpu, DType::F32, x, s, y, grads, place(20, usize::MAX)), &refused);

        // Sizes that no layer has need nothing.
        for shape in [
            LinearShape { branches: 3, ..SMALL },
            LinearShape { tokens: 0, ..SMALL },
            LinearShape { out_features: 0, ..SMALL },
            LinearShape { in_features: (1 << 31) + 1, ..SMALL },
            LinearShape { batch: usize::MAX, ..SMALL },
            LinearShape { out_features: 1 << 31, in_features: 1 << 31, ..SMALL },
        ] {
            let (dense, low) =
                (NoisyLinear { shape, ..dense(SMALL) }, LowRankLinear { shape, ..low_rank(SMALL) });
            let lens = [dense.workspace_len(gpu, DType::F16), low.workspace_len(gpu, DType::F16)];
            assert_eq!(lens, [0; 2], "{shape:?}");
            let [x, s, y, dy] = activations(&SMALL);
            let grads = NoisyLinearGrads::default();
            assert!(dense.backward(gpu, DType::F16, x, dy, grads, exact(1 << 20)).is_err());
            assert!(low.forward(gpu, DType::F16, x, s, y, exact(1 << 20)).is_err());
        }
        for rank in [0, (1 << 31) + 1, usize::MAX] {
            assert_eq!(LowRankLinear { rank, ..low_rank(SMALL) }.workspace_len(gpu, DType::F16), 0);
        }
    }
}
