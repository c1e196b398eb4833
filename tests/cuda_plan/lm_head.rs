//! The head of a language model: its memory, and wrong arguments.

use crate::support::*;
use pace_kernels::cuda::{Buffer, DType, Gpu, LmHead, LmHeadOutputs, Lora, LossStatus, Plan, Step};
use pace_kernels::{Divergence, Error, LossSettings};

const M: usize = 6;
const H: usize = 16;
const V: usize = 24;
const RANK: usize = 2;

type Head = LmHead<Buffer, Buffer, Buffer>;
type Outputs = LmHeadOutputs<Buffer, Buffer, Buffer, Buffer>;

/// A tensor far from all others.
fn place(i: u64, len: usize) -> Buffer {
    buffer(i << 44, len)
}

fn head() -> Head {
    LmHead {
        settings: LossSettings { ignore_label: Some(-100), ..LossSettings::new(V, 0.5) },
        tokens: M,
        hidden_size: H,
        branches: 2,
        labels: place(1, M),
        weight: place(2, V * H),
        bias: Some(place(3, V)),
        lora: Some(Lora { rank: RANK, lora_a: place(4, RANK * H), lora_b: place(5, V * RANK), scale: 0.5 }),
        class_weights: Some(place(6, V)),
        gram: Some(place(7, H * H)),
        logit_scale: 1.0,
        soft_cap: None,
        chunk_rows: Some(4),
        allow_tf32: false,
    }
}

fn outputs(head: &Head) -> Outputs {
    LmHeadOutputs {
        hidden: Some(place(9, 2 * M * H)),
        weight: Some(place(10, V * H)),
        bias: Some(place(11, V)),
        lora_b: Some(place(12, V * RANK)),
        lora_a: Some(place(13, RANK * H)),
        values: place(14, 3),
        status: place(15, LossStatus::WORDS),
        workspace: place(16, head.workspace_len(&Gpu::H100, DType::BF16, true)),
    }
}

fn plan(head: Head, change: impl FnOnce(&mut Outputs)) -> Result<Plan, Error> {
    let mut outputs = outputs(&head);
    change(&mut outputs);
    head.plan(&Gpu::H100, DType::BF16, place(8, 2 * M * H), outputs)
}

/// Llama 3: beside what is given and wanted there are 0.3 GB at most, and GEMMs have enough rows.
#[test]
fn a_large_head_takes_little_memory() {
    let llama = Head {
        settings: LossSettings::new(128256, 0.1),
        tokens: 8192,
        hidden_size: 4096,
        bias: None,
        lora: None,
        chunk_rows: None,
        ..head()
    };
    let kl = LossSettings { divergence: Divergence::SymmetricKl, ..llama.settings };
    let lora = head().lora.map(|lora| Lora { rank: 16, ..lora });
    for (name, head, trains_weight, least) in [
        ("frozen", llama, false, 896),
        ("frozen, Gram matrix each time", Head { gram: None, ..llama }, false, 896),
        ("LoRA", Head { lora, ..llama }, false, 896),
        ("trained", Head { gram: None, ..llama }, true, 896),
        ("symmetric KL", Head { settings: kl, ..llama }, false, 384),
        ("one branch", Head { branches: 1, ..llama }, false, 896),
    ] {
        let bytes = 4 * head.workspace_len(&Gpu::H100, DType::BF16, trains_weight);
        assert!(bytes <= 300_000_000, "{name}: {bytes}");
        let [h, m, r] = [4096, 8192, 16];
        let v = 128256;
        let head = Head {
            labels: place(1, m),
            weight: place(2, v * h),
            class_weights: None,
            gram: head.gram.map(|_| place(7, h * h)),
            lora: head.lora.map(|lora| Lora { lora_a: place(4, r * h), lora_b: place(5, v * r), ..lora }),
            ..head
        };
        let rows = head.branches * m * h;
        let outputs = Outputs {
            hidden: Some(place(9, rows)),
            weight: trains_weight.then(|| place(10, v * h)),
            bias: None,
            lora_b: head.lora.map(|_| place(12, v * r)),
            lora_a: head.lora.map(|_| place(13, r * h)),
            workspace: place(16, bytes / 4),
            ..outputs(&super::lm_head::head())
        };
        let plan = head.plan(&Gpu::H100, DType::BF16, place(8, rows), outputs).unwrap();
        let logits = plan.steps().iter().find_map(|step| match step {
            Step::Gemm(gemm) if gemm.n == v => Some(gemm.m),
            _ => None,
        });
        assert!(logits.is_some_and(|rows| rows >= least && rows % 128 == 0), "{name}: {logits:?}");
        let end = 16 << 44 | bytes as u64;
        for step in plan.steps() {
            let Step::Gemm(gemm) = step else { continue };
            assert!(gemm.workspace.address.0 + gemm.workspace.bytes as u64 <= end, "{name}: {gemm:?}");
        }
    }
}

#[test]
fn a_change_of_the_workspace_would_be_seen() {
    let mut outputs = outputs(&head());
    let needed = outputs.workspace.len;
    outputs.workspace.len -= 1;
    let got = head().plan(&Gpu::H100, DType::BF16, place(8, 2 * M * H), outputs);
    assert_error(got, &length("workspace", "[workspace_len()]", needed, needed - 1));
    // Sizes that are refused need none.
    assert_eq!(Head { branches: 3, ..head() }.workspace_len(&Gpu::H100, DType::BF16, true), 0);
}

#[test]
fn wrong_sizes_and_settings_are_refused() {
    assert!(plan(head(), |_| {}).is_ok());
    let wrong = |head: Head, want: Error| {
        assert_error(plan(head, |outputs| outputs.workspace = place(16, 1 << 30)), &want)
    };
    let size = |argument, expected, got| Error::Size { argument, expected, got };
    let settings = head().settings;
    wrong(
        Head { settings: LossSettings { classes: 0, ..settings }, ..head() },
        size("classes", "at least 1", 0),
    );
    wrong(Head { hidden_size: 0, ..head() }, size("hidden_size", "at least 1", 0));
    wrong(Head { hidden_size: 1 << 31, ..head() }, size("hidden_size", "below 2^31", 1 << 31));
    wrong(Head { tokens: 0, ..head() }, size("tokens", "at least 1", 0));
    let many = (1 << 24) + 1;
    wrong(Head { tokens: many, ..head() }, size("tokens", "at most 2^24", many));
    let many = (1 << 30) + 1;
    let wide = LossSettings { classes: many, ..settings };
    wrong(Head { settings: wide, ..head() }, size("classes", "at most 2^30", many));
    wrong(Head { branches: 3, ..head() }, size("branches", "1 or 2", 3));
    wrong(Head { chunk_rows: Some(0), ..head() }, size("chunk_rows", "at least 1", 0));
    // A plan lists the steps of all chunks: these would be many gigabytes.
    let many = Head { tokens: 1 << 24, chunk_rows: Some(127), ..head() };
    wrong(many, size("chunk_rows", "at least M / 2^17", 127));
    wrong(
        Head { lora: head().lora.map(|lora| Lora { rank: 0, ..lora }), ..head() },
        size("rank", "at least 1", 0),
    );
    for got in [0.0, f64::INFINITY, 1e30, 1e-30] {
        let expected = "not 0, and its square in the range of f32";
        let want = Error::Value { argument: "logit_scale", expected, got };
        wrong(Head { logit_scale: got, bias: None, ..head() }, want);
    }
    for got in [0.0, -1.0, f64::INFINITY, 1e39] {
        let want =
            Error::Value { argument: "soft_cap", expected: "more than 0, and in the range of f32", got };
        wrong(Head { soft_cap: Some(got), ..head() }, want);
    }
    let scale = f32::INFINITY;
    let want = Error::Value { argument: "scale", expected: "finite", got: f64::INFINITY };
    wrong(Head { lora: head().lora.map(|lora| Lora { scale, ..lora }), ..head() }, want);
    // What the settings come to together.
    let expected = "in the range of f32 with `logit_scale` and `denominator`";
    let want = Error::Value { argument: "lambda", expected, got: 0.5 };
    let small = LossSettings { denominator: Some(0.1), ..settings };
    let scaled = Head { logit_scale: 1e19, bias: None, settings: small, ..head() };
    assert_error(plan(scaled, |outputs| outputs.bias = None), &want);
    wrong(Head { logit_scale: 2.0, ..head() }, argument("logit_scale", "is not 1, and there is a bias"));
    let bias = Some(buffer(place(3, V).address + 8, V));
    wrong(Head { bias, ..head() }, argument("bias", "does not start at a multiple of 16 bytes"));
}

/// Each tensor in turn.
#[test]
fn wrong_tensors_are_refused() {
    type Change = fn(&mut Head, &mut Outputs, &mut Buffer, Buffer);
    let tensors: [(&'static str, &'static str, usize, u64, Change); 16] = [
        ("hidden", "[branches·M, H]", 2 * M * H, 2, |_, _, hidden, b| *hidden = b),
        ("labels", "[M]", M, 8, |head, _, _, b| head.labels = b),
        ("weight", "[V, H]", V * H, 2, |head, _, _, b| head.weight = b),
        ("bias", "[V]", V, 2, |head, _, _, b| head.bias = Some(b)),
        ("lora_b", "[V, r]", V * RANK, 2, |head, _, _, b| head.lora.as_mut().unwrap().lora_b = b),
        ("lora_a", "[r, H]", RANK * H, 2, |head, _, _, b| head.lora.as_mut().unwrap().lora_a = b),
        ("class_weights", "[V]", V, 4, |head, _, _, b| head.class_weights = Some(b)),
        ("gram", "[H, H]", H * H, 4, |head, _, _, b| head.gram = Some(b)),
        ("grads.hidden", "[branches·M, H]", 2 * M * H, 2, |_, outputs, _, b| outputs.hidden = Some(b)),
        ("grads.weight", "[V, H]", V * H, 4, |_, outputs, _, b| outputs.weight = Some(b)),
        ("grads.bias", "[V]", V, 4, |_, outputs, _, b| outputs.bias = Some(b)),
        ("grads.lora_b", "[V, r]", V * RANK, 4, |_, outputs, _, b| outputs.lora_b = Some(b)),
        ("grads.lora_a", "[r, H]", RANK * H, 4, |_, outputs, _, b| outputs.lora_a = Some(b)),
        ("values", "[3]", 3, 4, |_, outputs, _, b| outputs.values = b),
        ("status", "[9]", LossStatus::WORDS, 8, |_, outputs, _, b| outputs.status = b),
        ("workspace", "[workspace_len()]", 0, 4, |_, outputs, _, b| outputs.workspace = b),
    ];
    let with = |change: Change, b: Buffer| {
        let (mut head, mut hidden) = (head(), place(8, 2 * M * H));
        let mut outputs = outputs(&head);
        change(&mut head, &mut outputs, &mut hidden, b);
        head.plan(&Gpu::H100, DType::BF16, hidden, outputs)
    };
    let workspace_len = outputs(&head()).workspace.len;
    for (i, (name, shape, len, bytes, change)) in tensors.into_iter().enumerate() {
        let len = if name == "workspace" { workspace_len } else { len };
        let address = 99 << 44;
        assert!(with(change, buffer(address, len)).is_ok(), "{name}");
        assert_error(with(change, buffer(0, len)), &argument(name, NULL));
        assert_error(with(change, buffer(address + bytes / 2, len)), &argument(name, MISALIGNED));
        let end = 0u64.wrapping_sub(bytes * len as u64);
        assert_error(with(change, buffer(end, len)), &argument(name, ENDLESS));
        if name != "workspace" {
            for got in [len + 1, usize::MAX] {
                assert_error(with(change, buffer(address, got)), &length(name, shape, len, got));
            }
        }
        // On the first of the outputs: hidden states' gradient, or on the weight's.
        let other = if name == "grads.hidden" { 10 } else { 9 };
        let got = with(change, buffer(place(other, 0).address, len));
        assert!(matches!(got, Err(Error::Argument { .. })), "{i} {name}: {got:?}");
    }
}

/// Gradients to what is not there.
#[test]
fn gradients_to_nothing_are_refused() {
    const PROBLEM: &str = "is asked for without what it is the gradient to";
    let bare = Head { bias: None, lora: None, ..head() };
    let only = |bias, lora_b, lora_a| {
        plan(bare, |outputs| {
            *outputs = Outputs { bias, lora_b, lora_a, ..*outputs };
        })
    };
    let all = outputs(&head());
    assert!(only(None, None, None).is_ok());
    assert_error(only(all.bias, None, None), &argument("grads.bias", PROBLEM));
    assert_error(only(None, all.lora_b, None), &argument("grads.lora_b", PROBLEM));
    assert_error(only(None, None, all.lora_a), &argument("grads.lora_a", PROBLEM));
}

#[test]
fn a_gram_matrix_is_one_product_of_exact_numbers() {
    let head = Head { allow_tf32: true, ..head() };
    let workspace = place(16, head.gram_workspace_len(&Gpu::H100));
    let plan = head.gram(&Gpu::H100, DType::F32, place(7, H * H), workspace).unwrap();
    let [Step::Gemm(gemm)] = plan.steps() else { panic!("{plan:?}") };
    assert_eq!(([gemm.m, gemm.n, gemm.k], gemm.output, gemm.allow_tf32), ([H, H, V], DType::F32, false));
    let wrong = |gram, workspace| head.gram(&Gpu::H100, DType::F32, gram, workspace);
    assert_error(wrong(place(7, H), workspace), &length("gram", "[H, H]", H * H, H));
    assert_error(wrong(place(2, H * H), workspace), &argument("weight", "overlaps an output"));
    let short = buffer(workspace.address, workspace.len - 1);
    let want = length("workspace", "[workspace_len()]", workspace.len, workspace.len - 1);
    assert_error(wrong(place(7, H * H), short), &want);
}
