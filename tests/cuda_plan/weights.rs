//! Weights of adapters, the prompt's bias and merging: geometry, and wrong arguments.

use crate::support::*;
use pace_kernels::Error;
use pace_kernels::cuda::{
    AdapterWeight, AdapterWeightGrads, Buffer, DType, LoraFactors, LoraGrads, LoraWeight, LoraWeightGrads,
    Merge, MergeSign, Plan, PromptBias, PromptGrads, PromptWeight,
};

/// Rank 3 under a weight [40, 520]: nine strips of 64 columns, and one part.
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
const LORA_WORKSPACE: Buffer = Buffer { address: 1 << 23, len: 1560 + 9 * 120 };

#[test]
fn low_rank_plans() {
    let out = buffer(1 << 24, 40 * 520);
    let plan = LORA.weight(DType::F16, None, out).unwrap();
    let launch = only(&plan);
    assert_eq!(
        (launch.kernel.name, launch.grid, launch.block, launch.shared_bytes),
        ("adapter_weights_f16", [9, 1, 1], [256, 1, 1], 0)
    );
    assert_eq!(only(&LORA.weight(DType::F32, Some(WEIGHT), out).unwrap()).grid, [17, 1, 1]);
    let workspace = buffer(1 << 23, LORA.workspace_len(DType::BF16));
    assert_eq!(workspace, LORA_WORKSPACE);
    let plan = LORA.backward(DType::BF16, Some(WEIGHT), out, LORA_GRADS, workspace).unwrap();
    let [partials, sums] = launches(&plan);
    assert_eq!((partials.kernel.name, partials.grid), ("weight_gradients_bf16", [9, 1, 1]));
    // 128 sums of dA and of dB per block.
    assert_eq!((sums.kernel.name, sums.grid), ("weight_gradient_sums_bf16", [13 + 1, 1, 1]));
    // As many parts as keep a large device busy, and tiles of 64 rows.
    for (out_features, parts, tiles) in [(200, 4, 4), (1 << 20, 264, 1 << 14), (1 << 24, 264, 1 << 18)] {
        let lora_b = buffer(1 << 40, 3 * out_features);
        let lora_a = buffer(1 << 50, 3);
        let lora = LoraFactors { out_features, in_features: 1, lora_b, lora_a, ..LORA };
        let grads = LoraGrads { lora_b: buffer(1 << 41, 3 * out_features), lora_a: buffer(1 << 51, 3) };
        let workspace = buffer(1 << 42, lora.workspace_len(DType::F16));
        let grad = buffer(1 << 43, out_features);
        let plan = lora.backward(DType::F16, None, grad, grads, workspace).unwrap();
        let [partials, _] = launches(&plan);
        assert_eq!(partials.grid, [parts, 1, 1]);
        assert_eq!(only(&lora.weight(DType::F16, None, grad).unwrap()).grid, [tiles, 1, 1]);
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
        // More than any device has memory for, or a grid can count.
        (
            LoraFactors { out_features: 1 << 21, in_features: 1 << 20, ..LORA },
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
    wrong(out, LORA_GRADS, buffer(1 << 23, 2639), length("workspace", "[workspace_len()]", 2640, 2639));
    wrong(out, LORA_GRADS, buffer((1 << 24) - 4, 2640), argument("delta_weight_grad", "overlaps an output"));
    wrong(out, LORA_GRADS, buffer((1 << 22) - 4, 2640), argument("workspace", "overlaps another output"));
    // Partial sums of a weight that can be addressed need not be.
    let lora = LoraFactors { out_features: 1 << 31, in_features: 1 << 28, rank: 1 << 9, ..LORA };
    assert_eq!(lora.workspace_len(DType::F16), (1 << 28 << 9) + (1 << 22 << 31 << 9));
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
    // One part of q, and nine of dPu, up to a whole vector.
    let len = 520 + 28;
    assert_eq!(prompt().workspace_len(DType::F16), len);
    let workspace = buffer(1 << 23, len);
    let plan = prompt().forward(DType::F16, out).unwrap();
    let bias = only(&plan);
    assert_eq!(
        (bias.kernel.name, bias.grid, bias.shared_bytes),
        ("adapter_weights_f16", [3, 1, 1], 40 << 10)
    );
    let plan = prompt().backward(DType::F16, out, grads, workspace).unwrap();
    let [partials, sums] = launches(&plan);
    assert_eq!((partials.kernel.name, partials.grid), ("weight_gradients_f16", [9, 1, 1]));
    // 128 sums of q per block, and one for dPu.
    assert_eq!((sums.kernel.name, sums.grid), ("weight_gradient_sums_f16", [5 + 1, 1, 1]));

    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    for (prompt, want) in [
        (PromptBias { out_features: 0, ..prompt() }, zero("out_features")),
        (PromptBias { rank: 0, ..prompt() }, zero("rank")),
        (PromptBias { base_weight: out, ..prompt() }, length("base_weight", "[N, K]", 20800, 40)),
        (PromptBias { base_bias: Some(buffer(256, 41)), ..prompt() }, length("base_bias", "[N]", 40, 41)),
        (PromptBias { prompt_down: buffer(256, 3), ..prompt() }, length("prompt_down", "[K, r]", 1560, 3)),
        (PromptBias { prompt_up: buffer(0, 3), ..prompt() }, argument("prompt_up", NULL)),
        (PromptBias { delta_bias: Some(buffer(257, 40)), ..prompt() }, argument("delta_bias", MISALIGNED)),
    ] {
        assert_error(prompt.forward(DType::F16, out), &want);
        assert_error(prompt.backward(DType::F16, out, grads, workspace), &want);
    }
    let wrong = |out, want| assert_error(prompt().forward(DType::F16, out), &want);
    wrong(buffer(1 << 24, 39), length("out", "[N]", 40, 39));
    wrong(buffer(1 << 13, 40), argument("delta_bias", "overlaps an output"));
    let wrong = |workspace, want| assert_error(prompt().backward(DType::F16, out, grads, workspace), &want);
    wrong(buffer(1 << 23, len - 1), length("workspace", "[workspace_len()]", len, len - 1));
    wrong(buffer((1 << 23) + 2, len), argument("workspace", MISALIGNED));
    wrong(buffer((1 << 22) - 4, len), argument("workspace", "overlaps another output"));
    wrong(buffer((1 << 16) - 4, len), argument("prompt_down", "overlaps an output"));
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
fn groups() {
    let lora = |i: u64| LoraWeight {
        factors: LORA,
        base_weight: Some(WEIGHT),
        out: buffer((1 << 24) + (i << 20), 40 * 520),
    };
    let alone = |i: u64| AdapterWeight { lora: Some(lora(i)), prompt: None };
    let bias = PromptWeight { prompt: prompt(), out: buffer(1 << 28, 40) };
    let mut layers: Vec<_> = (0..33).map(alone).collect();
    layers[32].prompt = Some(bias);
    let plan = AdapterWeight::plan(DType::F16, &layers).unwrap();
    let [first, second] = launches(&plan);
    assert_eq!(
        (first.kernel.name, first.grid, first.shared_bytes),
        ("adapter_weights_f16", [32 * 9, 1, 1], 0)
    );
    assert_eq!((second.grid, second.shared_bytes), ([9 + 3, 1, 1], 40 << 10));
    assert_eq!(AdapterWeight::plan(DType::F16, &[]), Ok(Plan::default()));
    // Layers that ask for nothing, alone, before others and behind a full launch.
    let nothing = AdapterWeight { lora: None, prompt: None };
    assert_eq!(AdapterWeight::plan(DType::F16, &[nothing]), Ok(Plan::default()));
    let mut some: Vec<_> = (0..32).map(alone).collect();
    some.insert(0, nothing);
    some.push(nothing);
    assert_eq!(only(&AdapterWeight::plan(DType::F16, &some).unwrap()).grid, [32 * 9, 1, 1]);
    let wrong = |layers: &[AdapterWeight<Buffer>], want| {
        assert_error(AdapterWeight::plan(DType::F16, layers), &want);
    };
    wrong(&[alone(1), alone(1)], argument("out", "overlaps another output"));
    let other = argument("prompt", "has another base weight than its layer's LoRA");
    let added = LoraWeight { base_weight: None, ..lora(0) };
    wrong(&[AdapterWeight { lora: Some(added), prompt: Some(bias) }], other);
    let out = buffer(1 << 24, 7);
    let short = LoraWeight { out, ..lora(0) };
    wrong(&[AdapterWeight { lora: Some(short), prompt: None }], length("out", "[N, K]", 20800, 7));
    wrong(
        &[AdapterWeight { lora: None, prompt: Some(PromptWeight { out, ..bias }) }],
        length("out", "[N]", 40, 7),
    );

    let grads = |i: u64| AdapterWeightGrads {
        lora: Some(LoraWeightGrads {
            factors: LORA,
            base_weight: Some(WEIGHT),
            delta_weight_grad: buffer(1 << 24, 40 * 520),
            lora_b: Some(buffer((1 << 28) + (i << 10), 120)),
            lora_a: None,
        }),
        prompt: None,
    };
    let layers: Vec<_> = (0..17).map(grads).collect();
    let len = AdapterWeightGrads::workspace_len(DType::BF16, &layers);
    assert_eq!(len, 17 * LORA_WORKSPACE.len);
    let plan = |workspace| AdapterWeightGrads::plan(DType::BF16, &layers, workspace);
    let steps = plan(buffer(1 << 30, len)).unwrap();
    let [partials, last, sums, last_sums] = launches(&steps);
    assert_eq!((partials.grid, last.grid), ([16 * 9, 1, 1], [9, 1, 1]));
    assert_eq!((sums.grid, last_sums.grid), ([16 * 14, 1, 1], [14, 1, 1]));
    assert_error(plan(buffer(1 << 30, len - 1)), &length("workspace", "[workspace_len()]", len, len - 1));
    assert_error(plan(buffer(1 << 24, len)), &argument("delta_weight_grad", "overlaps an output"));
}

#[test]
fn merge_plans() {
    let merge = Merge {
        sign: MergeSign::Unmerge,
        dtype: DType::BF16,
        target: buffer(1 << 16, 9000),
        delta: buffer(1 << 17, 9000),
    };
    let plan = merge.plan().unwrap();
    let launch = only(&plan);
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("merge_bf16", [2, 1, 1], [256, 1, 1]));
    let (target, delta) = (buffer(1 << 40, 1 << 34), buffer(1 << 41, 1 << 34));
    assert_eq!(only(&Merge { target, delta, ..merge }.plan().unwrap()).grid, [2048, 1, 1]);
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
