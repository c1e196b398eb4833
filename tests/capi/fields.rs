//! The fields of the structs, as the header has them, and what follows from a wrong one.

use pace_kernels::capi::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    U32,
    F32,
    U64,
    I64,
    F64,
    /// `data` and `len`; a pointer without a length has one that the operator knows.
    Tensor,
    Pointer,
}

/// A field of a struct; those of the structs in it have no prefix, as messages may leave it out, but for the noise's `z`: a struct
/// may have another.
#[derive(Debug, Clone)]
pub struct Field {
    pub name: &'static str,
    /// Offset in bytes.
    pub at: usize,
    pub kind: Kind,
}

/// The fields of a struct of the header.
pub fn fields(of: &str) -> Vec<Field> {
    let mut fields = Vec::new();
    add(of, &mut 0, &mut fields);
    fields
}

fn add(of: &str, at: &mut usize, fields: &mut Vec<Field>) {
    const HEADER: &str = include_str!("../../include/pace_kernels.h");
    let (_, body) = HEADER.split_once(&format!("typedef struct {of} {{")).unwrap();
    let (body, _) = body.split_once('}').unwrap();
    for line in body.lines().map(str::trim).filter(|line| line.ends_with(';') && !line.starts_with("//")) {
        let (ty, name) = line.trim_end_matches(';').rsplit_once(' ').unwrap();
        let (kind, bytes) = match ty.trim_start_matches("const ").trim_start_matches("struct ") {
            nested @ ("PaceShape" | "PaceNoise") => {
                add(nested, at, fields);
                continue;
            }
            // The list of gradients, and then its length: as a tensor.
            "PaceTensor" if name == "*gradients" => (Kind::Tensor, 8),
            "uint64_t" if name == "count" => {
                *at += 8;
                continue;
            }
            "PaceTensor" => (Kind::Tensor, 16),
            _ if name.starts_with('*') => (Kind::Pointer, 8),
            "uint32_t" => (Kind::U32, 4),
            "float" => (Kind::F32, 4),
            "uint64_t" => (Kind::U64, 8),
            "int64_t" => (Kind::I64, 8),
            "double" => (Kind::F64, 8),
            other => panic!("{other}"),
        };
        let name = match (of, name.trim_start_matches('*')) {
            ("PaceNoise", "z") => "noise.z",
            (_, name) => name,
        };
        fields.push(Field { name, at: *at, kind });
        *at += bytes;
    }
}

/// The size of an element on the CPU.
pub fn element_size(field: &str, dtype: u32) -> usize {
    match field {
        "labels" | "index" | "norm" | "distance" | "status" | "key_address" => 8,
        "gradients" => size_of::<PaceTensor>(),
        "workspace" => 1,
        _ if dtype == PACE_F64 => 8,
        "z" | "noise.z" | "history" | "targets" | "mask" | "class_weights" | "values" => 4,
        _ if dtype == PACE_F32 => 4,
        _ => 2,
    }
}

/// What an operator writes, and whether all of it is overwritten whatever was there.
pub fn outputs(operator: &str) -> &'static [(&'static str, bool)] {
    match operator {
        "pace_noise_fill" => &[("z", true)],
        "pace_noisy_linear_forward" | "pace_low_rank_linear_forward" | "pace_lora_mul_linear_forward" => {
            &[("y", true)]
        }
        "pace_drop_path_forward" => &[("y", true)],
        "pace_drop_path_backward" => &[("dx", true)],
        // In place.
        "pace_noisy_epilogue_forward" => &[("y", false)],
        "pace_noisy_epilogue_backward" => &[("da", true)],
        "pace_low_rank_weight_forward" | "pace_prompt_bias_forward" => &[("out", true)],
        "pace_merge" | "pace_unmerge" => &[("target", false)],
        // The history keeps the rows of other samples.
        "pace_loss" => &[("gradient", true), ("values", true), ("history", false)],
        "pace_lm_head_gram" => &[("gram", true)],
        "pace_grad_norm" => &[("norm", true)],
        "pace_fp_distance" => &[("distance", true)],
        _ => &[
            ("grad_input", true),
            ("grad_delta_weight", true),
            ("grad_delta_bias", true),
            ("grad_lora_a", true),
            ("grad_lora_b", true),
            ("grad_prompt_down", true),
            ("grad_prompt_up", true),
            ("grad_hidden", true),
            ("grad_weight", true),
            ("grad_bias", true),
            ("values", true),
        ],
    }
}

/// Arguments that are wrong if the first one is: tensors whose shape has a size, and what only goes with another.
const FOLLOWERS: &[(&str, &str)] = &[
    ("branches", "x y dy dx a da z x·Aᵀ grad_input hidden grad_hidden flags divergence"),
    ("batch", "x y dy dx a da z x·Aᵀ grad_input mask first_sample"),
    ("tokens", "x y dy a da z x·Aᵀ grad_input"),
    (
        "in_features",
        "x grad_input weight base_weight delta_weight grad_delta_weight lora_a grad_lora_a prompt_down grad_prompt_down out dout",
    ),
    (
        "out_features",
        "y dy a da z weight base_weight base_bias delta_weight delta_bias grad_delta_weight grad_delta_bias lora_b grad_lora_b out dout",
    ),
    ("shared_input", "x x·Aᵀ grad_input"),
    (
        "rank",
        "x·Aᵀ lora_a lora_b grad_lora_a grad_lora_b prompt_down prompt_up grad_prompt_down grad_prompt_up",
    ),
    ("prompt_rank", "prompt_down prompt_up grad_prompt_down grad_prompt_up"),
    (
        "classes",
        "logits gradient history index labels targets probabilities values class_weights weight bias lora_b grad_weight grad_bias grad_lora_b gram",
    ),
    ("hidden_size", "hidden grad_hidden weight grad_weight lora_a grad_lora_a gram"),
    ("samples", "fine_tuned pre_trained"),
    ("features", "fine_tuned pre_trained x y dy dx"),
    ("labels", "logits gradient index hidden grad_hidden"),
    ("targets", "logits gradient index probabilities values"),
    ("history", "index"),
    ("shape", "z"),
    ("consistency", "logits gradient history index flags"),
    ("targets_kind", "labels targets flags label_smoothing class_weights divergence logits"),
    ("divergence", "flags temperature"),
    ("has_ignore_label", "labels"),
    ("ignore_label", "labels"),
    ("mask", "batch"),
    ("base_weight", "base_bias delta_weight"),
    ("delta_weight", "grad_delta_weight"),
    ("lora_a", "lora_b grad_lora_a grad_lora_b"),
    ("lora_b", "lora_a grad_lora_a grad_lora_b"),
    ("bias", "grad_bias"),
    ("prompt_down", "lora_a grad_prompt_down grad_prompt_up prompt_up"),
    ("prompt_up", "prompt_down"),
    ("target", "delta"),
];

/// Whether an argument may be wrong because another one was changed.
pub fn follows(changed: &str, named: &str) -> bool {
    let changed = changed.trim_start_matches("noise.");
    changed == named
        || FOLLOWERS
            .iter()
            .any(|&(first, then)| first == changed && then.split(' ').any(|name| name == named))
}
