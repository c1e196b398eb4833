//! `adapter_config.json`: what PEFT calls a `LoraConfig`.

use super::PeftAdapter;
use regex::Regex;
use serde_json::{Map, Value, json};

/// What a configuration says about the outputs of layers.
pub(super) struct Config {
    rank: usize,
    alpha: f64,
    pub(super) use_rslora: bool,
    rank_pattern: Patterns<usize>,
    alpha_pattern: Patterns<f64>,
    modules_to_save: Vec<String>,
    pub(super) lora_bias: bool,
    pub(super) base_model: Option<String>,
}

/// Settings that outputs do not depend on, given the tensors: which modules to look for, how training started and went, and where
/// the model came from. `fan_in_fan_out` is how W0 is stored in PyTorch (transposed in GPT-2's `Conv1D`); A and B are not.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// Settings that are read.
const READ: &[&str] = &[
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
];

/// Ways to start that leave W0 as it is. All others take a part of it away.
const STARTS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

impl Config {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let Value::Object(fields) = value else { return Err("expected a JSON object".into()) };
        let field = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let required = |name: &str| field(name).ok_or_else(|| format!("there is no `{name}`"));
        let text = |name: &str| match field(name) {
            Some(value) => {
                value.as_str().map(|text| Some(text.to_owned())).ok_or_else(|| wrong(name, value, "a string"))
            }
            None => Ok(None),
        };
        let flag = |name: &str| match field(name) {
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, value, "true or false")),
            None => Ok(false),
        };

        let peft_type = required("peft_type")?;
        if peft_type != "LORA" {
            return Err(wrong("peft_type", peft_type, "\"LORA\", the only type that is supported"));
        }
        if let Some(bias) = text("bias")?.filter(|bias| bias != "none") {
            return Err(wrong("bias", &bias.into(), "\"none\": biases of the base model are frozen"));
        }
        match field("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(start)) if STARTS.iter().any(|name| start.eq_ignore_ascii_case(name)) => {}
            Some(start) => {
                return Err(wrong(
                    "init_lora_weights",
                    start,
                    "a way to start that leaves the base weight as it is",
                ));
            }
        }
        // Variants of LoRA, of today and of later versions of PEFT, are absent or off.
        let known = |name: &str| READ.contains(&name) || WITHOUT_EFFECT.contains(&name);
        if let Some((name, value)) = fields.iter().find(|(name, value)| !known(name) && !is_off(value)) {
            return Err(wrong(name, value, "it to be off: this setting is not supported"));
        }
        flag("fan_in_fan_out")?;
        Ok(Self {
            rank: rank("r", required("r")?)?,
            alpha: alpha("lora_alpha", required("lora_alpha")?)?,
            use_rslora: flag("use_rslora")?,
            rank_pattern: Patterns::parse("rank_pattern", field("rank_pattern"), rank)?,
            alpha_pattern: Patterns::parse("alpha_pattern", field("alpha_pattern"), alpha)?,
            modules_to_save: strings("modules_to_save", field("modules_to_save"))?,
            lora_bias: flag("lora_bias")?,
            base_model: text("base_model_name_or_path")?.filter(|name| !name.is_empty()),
        })
    }

    /// Rank and scale of a layer.
    pub(super) fn rank_and_scale(&self, path: &str) -> (usize, f64) {
        let rank = self.rank_pattern.get(path).unwrap_or(self.rank);
        let alpha = self.alpha_pattern.get(path).unwrap_or(self.alpha);
        (rank, alpha / divisor(rank, self.use_rslora))
    }

    /// Whether a module is one of `modules_to_save`, or is in one. PEFT compares the ends of paths, without regard to dots.
    pub(super) fn saves(&self, path: &str) -> bool {
        let ends = path.match_indices('.').map(|(i, _)| i).chain([path.len()]);
        ends.into_iter()
            .any(|end| self.modules_to_save.iter().any(|module| path[..end].ends_with(module.as_str())))
    }
}

/// Values for the layers whose module path matches, the first that does; `get_pattern_key` of PEFT.
struct Patterns<T>(Vec<(String, Regex, T)>);

impl<T: Copy> Patterns<T> {
    fn parse(
        field: &str,
        value: Option<&Value>,
        parse: impl Fn(&str, &Value) -> Result<T, String>,
    ) -> Result<Self, String> {
        let Some(value) = value else { return Ok(Self(Vec::new())) };
        let entries = value.as_object().ok_or_else(|| wrong(field, value, "an object"))?;
        let entry = |(key, value): (&String, &Value)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
                // The first line of the message shows the pattern, the last says what is wrong.
                .map_err(|error| {
                    format!(
                        "`{field}`: `{key}` is no pattern: {}",
                        error.to_string().lines().last().unwrap_or_default()
                    )
                })?;
            Ok((key.clone(), regex, parse(&format!("{field}.{key}"), value)?))
        };
        entries.iter().map(entry).collect::<Result<_, String>>().map(Self)
    }

    fn get(&self, path: &str) -> Option<T> {
        // A path that no pattern matches may still be there word by word.
        let first = self.0.iter().find(|(_, regex, _)| regex.is_match(path));
        first.or_else(|| self.0.iter().find(|(key, ..)| key == path)).map(|&(.., value)| value)
    }
}

fn rank(name: &str, value: &Value) -> Result<usize, String> {
    let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0);
    rank.ok_or_else(|| wrong(name, value, "a whole number of at least 1"))
}

fn alpha(name: &str, value: &Value) -> Result<f64, String> {
    value.as_f64().filter(|alpha| alpha.is_finite()).ok_or_else(|| wrong(name, value, "a finite number"))
}

fn strings(name: &str, value: Option<&Value>) -> Result<Vec<String>, String> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let items = value
        .as_array()
        .and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect());
    items.ok_or_else(|| wrong(name, value, "a list of strings"))
}

/// Whether a setting has a value that switches nothing on.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn wrong(name: &str, value: &Value, expected: &str) -> String {
    let value = value.to_string();
    let short: String = value.chars().take(60).collect();
    let more = if short.len() < value.len() { "…" } else { "" };
    format!("`{name}` is {short}{more}, expected {expected}")
}

/// The configuration of an adapter, which has been checked, as a file.
pub(super) fn text(adapter: &PeftAdapter) -> Result<String, String> {
    let mut first = None;
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (path, layer) in &adapter.layers {
        let rank = layer.rank();
        let alpha = number(path, alpha_of(layer.scale, divisor(rank, adapter.use_rslora)))?;
        let (r, lora_alpha) = first.get_or_insert((rank, alpha.clone()));
        // Without the anchor a pattern is for all modules whose path ends so.
        let pattern = format!("^{}", escape(path));
        if rank != *r {
            ranks.insert(pattern.clone(), rank.into());
        }
        if alpha != *lora_alpha {
            alphas.insert(pattern, alpha);
        }
    }
    let Some((r, lora_alpha)) = first else { return Err("there is no layer of LoRA add".into()) };
    // A pattern of whole paths: a list would be for all modules whose path ends so.
    let targets: Vec<_> = adapter.layers.keys().map(|path| escape(path)).collect();
    let heads: Vec<_> = adapter.heads.keys().cloned().collect();
    let mut fields = json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": if heads.is_empty() { Value::Null } else { heads.into() },
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": ranks,
        "target_modules": targets.join("|"),
        "task_type": null,
        "use_rslora": adapter.use_rslora,
    });
    // PEFT before 0.14 does not know the setting.
    if adapter.has_biases() {
        fields["lora_bias"] = true.into();
    }
    serde_json::to_string_pretty(&fields).map(|text| text + "\n").map_err(|error| error.to_string())
}

/// What α is divided by.
fn divisor(rank: usize, use_rslora: bool) -> f64 {
    if use_rslora { (rank as f64).sqrt() } else { rank as f64 }
}

/// The α that gives the scale, as exactly as it can be given: a whole number where there is one.
fn alpha_of(scale: f64, divisor: f64) -> f64 {
    let alpha = scale * divisor;
    let candidates = [alpha.round(), alpha, alpha.next_up(), alpha.next_down()];
    candidates.into_iter().find(|alpha| alpha / divisor == scale).unwrap_or(alpha)
}

/// Whole numbers without a point, as PEFT writes them.
fn number(path: &str, value: f64) -> Result<Value, String> {
    // 2^53: from there on not every whole number is one of `f64`.
    if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
        return Ok((value as i64).into());
    }
    let number = serde_json::Number::from_f64(value);
    number.map(Value::Number).ok_or_else(|| format!("`lora_alpha` of `{path}` is {value}, expected finite"))
}

/// A pattern, in Python's words, that matches `path` alone. All punctuation is escaped, even where that is not needed: a path is
/// then never one of the words that PEFT has a meaning for, such as `all-linear`.
fn escape(path: &str) -> String {
    let mut pattern = String::new();
    for char in path.chars() {
        if char.is_ascii_punctuation() && char != '_' {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern
}
