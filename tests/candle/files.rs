//! Damaged files: thousands of them, each an error of the crate's own or a load of all that is in the file.

use crate::peft::{bits, folder, recorded};
use candle_core::Result;
use pace_kernels::Error;
use pace_kernels::candle::PeftAdapter;
use pace_kernels::candle::vit::read_weights;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, Value, json};
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn below(random: &mut StdRng, n: usize) -> usize {
    random.random_range(0..n)
}

fn choose<T: Clone>(random: &mut StdRng, from: &[T]) -> T {
    from[below(random, from.len())].clone()
}

/// How many files; `PACE_FUZZ_CALLS` says another number.
fn files() -> usize {
    std::env::var("PACE_FUZZ_CALLS").map_or(1500, |calls| calls.parse().expect("PACE_FUZZ_CALLS is a number"))
}

/// Bytes that were cut off, added, or turned over.
fn damaged(random: &mut StdRng, bytes: &[u8], within: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    match below(random, 5) {
        0 => bytes.truncate(below(random, within)),
        1 => bytes.extend((0..below(random, 9)).map(|_| 7)),
        2 => drop(bytes.drain(below(random, within / 2)..within / 2)),
        _ => {
            for _ in 0..=below(random, 4) {
                bytes[below(random, within)] ^= 1 << below(random, 8);
            }
        }
    }
    bytes
}

/// A safetensors file whose header says something else.
fn with_other_header(random: &mut StdRng, bytes: &[u8]) -> Vec<u8> {
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
    let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
    let name = choose(random, &names);
    let huge = [0, 1, 3, 1 << 20, 1 << 40, 1 << 62, u64::MAX];
    match below(random, 9) {
        0 => {
            let types = ["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "f32"];
            header[&name]["dtype"] = choose(random, &types).into();
        }
        1 => {
            let dims: Vec<u64> = (0..below(random, 4)).map(|_| choose(random, &huge)).collect();
            header[&name]["shape"] = dims.into();
        }
        2 => header[&name]["data_offsets"] = json!([choose(random, &huge), choose(random, &huge)]),
        3 => header[&name]["data_offsets"] = header[&choose(random, &names)]["data_offsets"].clone(),
        4 => drop(header.remove(&name)),
        5 => {
            let tensor = header.remove(&name).unwrap();
            let other = [
                "",
                "weight",
                "base_model.model.",
                "base_model.model..lora_A.weight",
                "base_model.model.x.lora_A.weight",
            ];
            header.insert(choose(random, &other).into(), tensor);
        }
        6 => drop(header.insert(format!("{name}.more"), header[&name].clone())),
        7 => header[&name] = choose(random, &[Value::Null, json!([]), json!({}), json!("F32"), json!(-1)]),
        _ => {
            header[&name]["shape"] =
                choose(random, &[json!([-1]), json!([1.5]), json!("3"), json!([[2]]), Value::Null])
        }
    }
    let mut text = serde_json::to_string(&header).unwrap();
    if below(random, 8) == 0 {
        // The same name twice.
        let tensor = header.values().next_back().unwrap();
        text.insert_str(text.len() - 1, &format!(",\"{name}\":{tensor}"));
    }
    let length = if below(random, 8) == 0 { choose(random, &huge) } else { text.len() as u64 };
    [&length.to_le_bytes()[..], text.as_bytes(), &bytes[end..]].concat()
}

fn a_value(random: &mut StdRng) -> Value {
    let values = [
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(3),
        json!(u64::MAX),
        json!(1e300),
        json!(0.5),
        json!(""),
        json!("LORA"),
        json!("none"),
        json!("("),
        json!("a{1000000000}"),
        json!("(x+x+)+y"),
        json!([]),
        json!(["head", 3]),
        json!({}),
        json!({"": 1}),
        json!({"(": 2}),
        json!({".*": -3}),
        json!({".*": 1e308}),
        json!([[[[]]]]),
        json!("\u{0}\u{fffd}"),
    ];
    choose(random, &values)
}

fn other_config(random: &mut StdRng, bytes: &[u8]) -> Vec<u8> {
    let mut config: Map<String, Value> = serde_json::from_slice(bytes).unwrap();
    let names: Vec<String> = config.keys().cloned().collect();
    for _ in 0..=below(random, 2) {
        let name = choose(random, &names);
        match below(random, 4) {
            0 => drop(config.remove(&name)),
            _ => drop(config.insert(name, a_value(random))),
        }
    }
    match below(random, 10) {
        0 => "[".repeat(100_000).into_bytes(),
        _ => serde_json::to_vec(&config).unwrap(),
    }
}

/// Tensors that a file's header names.
fn named(bytes: &[u8]) -> usize {
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
    header.keys().filter(|name| *name != "__metadata__").count()
}

/// What was read, or an error of weights that says which file.
fn checked<T>(result: pace_kernels::Result<T>, path: &Path) -> Option<T> {
    match result {
        Ok(read) => Some(read),
        Err(error @ Error::Weights(_)) => {
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            None
        }
        Err(other) => panic!("{other:?}"),
    }
}

pub fn files_with_anything_in_them_are_read_whole_or_refused() -> Result<()> {
    let mut random = StdRng::seed_from_u64(5);
    let folder = folder("fuzz");
    let mut cases: Vec<_> =
        std::fs::read_dir(recorded()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.join(WEIGHTS).exists());
    cases.sort();
    assert!(!cases.is_empty());
    let (mut read, mut refused) = (0, 0);
    for i in 0..files() {
        let case = &cases[i % cases.len()];
        let (mut config, mut weights) =
            (std::fs::read(case.join(CONFIG)).unwrap(), std::fs::read(case.join(WEIGHTS)).unwrap());
        let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        match below(&mut random, 6) {
            0 => weights = damaged(&mut random, &weights, header),
            1 => weights = damaged(&mut random, &weights, weights.len()),
            2 | 3 => weights = with_other_header(&mut random, &weights),
            4 => config = damaged(&mut random, &config, config.len()),
            _ => config = other_config(&mut random, &config),
        }
        std::fs::write(folder.join(CONFIG), &config).unwrap();
        std::fs::write(folder.join(WEIGHTS), &weights).unwrap();
        if let Some(tensors) = checked(read_weights(&folder.join(WEIGHTS)), &folder) {
            assert_eq!(tensors.len(), named(&weights), "{}", String::from_utf8_lossy(&weights[8..header]));
        }
        match checked(PeftAdapter::read(&folder), &folder) {
            // Beside its tensors a layer has a scale.
            Some(adapter) => {
                assert_eq!(bits(&adapter).len() - adapter.layers.len(), named(&weights));
                read += 1;
            }
            None => refused += 1,
        }
    }
    println!("{read} read, {refused} refused");
    assert!(read > 0 && refused > read, "{read} read, {refused} refused");
    Ok(())
}
