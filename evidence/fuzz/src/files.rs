//! Files that candle reads: a load of all that is in them or an error of weights that names the file. An input is PEFT's configuration,
//! a byte that UTF-8 never has, and the safetensors file.

#![no_main]

use candle_core::Tensor;
use pace_kernels::Error;
use pace_kernels::candle::PeftAdapter;
use pace_kernels::candle::vit::{VitConfig, read_weights};
use std::path::PathBuf;
use std::sync::LazyLock;

const END_OF_CONFIG: u8 = 0xff;

/// A folder of this process's own.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("pace-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
});

/// What was read, if it was.
fn checked<T>(result: pace_kernels::Result<T>) -> Option<T> {
    match result {
        Ok(read) => Some(read),
        Err(Error::Weights(why)) => {
            assert!(why.contains(&FOLDER.display().to_string()), "{why}");
            None
        }
        Err(other) => panic!("{other:?}"),
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |&byte| byte == END_OF_CONFIG);
    let (config, weights) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    std::fs::write(FOLDER.join("adapter_config.json"), config).unwrap();
    let file = FOLDER.join("adapter_model.safetensors");
    std::fs::write(&file, weights).unwrap();
    if let Some(tensors) = checked(read_weights(&file)) {
        assert!(tensors.values().map(bytes).sum::<usize>() <= weights.len());
        let _ = VitConfig::infer(&tensors, None);
        let _ = VitConfig::infer(&tensors, Some(3));
    }
    if let Some(adapter) = checked(PeftAdapter::read(&*FOLDER)) {
        // What was read can be written, and is read again as it is.
        let copy = FOLDER.join("copy");
        if adapter.write(&copy).is_ok() {
            let again = PeftAdapter::read(&copy).unwrap();
            assert!(
                again.layers.keys().eq(adapter.layers.keys()) && again.heads.keys().eq(adapter.heads.keys())
            );
            for (name, layer) in &adapter.layers {
                assert!(
                    again.layers[name].scale.to_bits() == layer.scale.to_bits(),
                    "{name}: {}",
                    layer.scale
                );
            }
        }
    }
});
