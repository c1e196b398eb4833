//! The CUDA operators on device 0, at the sizes of a ViT-B, beside a copy and a GEMM by cuBLASLt.
//!
//! Criterion measures; times come from the device's clock. Afterwards one table in Markdown has every operator, also as
//! JSON in the file that `PACE_BENCH_JSON` names. Without a device the program says so and does nothing.

#[path = "../common/mod.rs"]
mod common;
mod drop_path;
mod gpu;
mod lm_head;
mod loss;
mod low_rank_linear;
mod noise_fill;
mod noisy_epilogue;
mod noisy_linear;
mod norms;
mod references;
mod report;
mod weights;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use gpu::{Batch, Gpu};
use pace_kernels::LinearShape;
use pace_kernels::cuda::{Device, Family};
use report::Row;
use std::time::Duration;

/// Anything that fails ends the run: figures after an error mean nothing.
pub type Fallible<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Launches an operator once, on a set of buffers that it owns.
pub type Launch = Box<dyn FnMut(&Gpu) -> Fallible>;

/// Makes a set of buffers.
pub type Set = Box<dyn Fn(&Gpu) -> Fallible<Launch>>;

/// What to measure.
pub struct Case {
    /// Operator and pass.
    pub operator: &'static str,
    /// The family that computes it, where there are several.
    pub family: &'static str,
    /// Type of the tensors.
    pub dtype: &'static str,
    pub shape: String,
    /// Bytes that have to move at least: each input read once, each output written once.
    pub bytes: usize,
    /// Operations of the GEMMs that a layer with merged weights and no noise would have, so that figures compare with a
    /// plain GEMM's; 0 where there are none.
    pub flop: usize,
    /// Whether to compare with cuBLASLt's GEMM of the same type and shape.
    pub against_product: bool,
    pub set: Set,
}

/// The layers of a ViT-B, or those in `PACE_BENCH_LAYERS`: samples of each of two branches, tokens, in- and out-features,
/// as in `64x197x768x3072,16x577x1024x1024`.
pub fn layers() -> Fallible<Vec<LinearShape>> {
    let Ok(list) = std::env::var("PACE_BENCH_LAYERS") else {
        return Ok(common::VIT_B.map(layer).to_vec());
    };
    let shape = |entry: &str| {
        let sizes: Vec<usize> = entry.split('x').map(str::parse).collect::<Result<_, _>>()?;
        match sizes[..] {
            [batch, tokens, in_features, out_features] => {
                Ok(LinearShape { branches: 2, batch, tokens, in_features, out_features, shared_input: false })
            }
            _ => Err(format!("PACE_BENCH_LAYERS: {entry} has not four sizes").into()),
        }
    };
    list.split(',').map(shape).collect()
}

/// A layer of a ViT-B on 2×64 images of 197 tokens.
pub fn layer((in_features, out_features): (usize, usize)) -> LinearShape {
    LinearShape { branches: 2, batch: 64, tokens: 197, in_features, out_features, shared_input: false }
}

/// The device, set to each family that it has, or to the one that `PACE_BENCH_FAMILY` names.
fn families(device: &Device) -> Fallible<Vec<Device>> {
    if let Ok(name) = std::env::var("PACE_BENCH_FAMILY") {
        return Ok(vec![device.with_family(name.parse()?)?]);
    }
    Family::ALL
        .into_iter()
        .filter(|family| family.is_available(device.gpu()))
        .map(|family| Ok(device.with_family(family)?))
        .collect()
}

/// The name of the family that a device is set to.
pub fn family(device: &Device) -> &'static str {
    device.gpu().family.map_or("–", Family::name)
}

/// Times that criterion takes of each case.
const SAMPLES: usize = 20;

fn main() -> Fallible {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(why) => {
            println!("no CUDA device: {why}");
            return Ok(());
        }
    };
    let gpu = Gpu::new(device)?;
    println!("{}", gpu.describe()?);
    let shapes = layers()?;
    let layers = families(&gpu.device)?.into_iter().flat_map(|device| {
        noisy_linear::cases(&device, &shapes).into_iter().chain(low_rank_linear::cases(&device, &shapes))
    });
    let cases = [
        references::cases(&gpu, &shapes)?,
        noise_fill::cases(),
        noisy_epilogue::cases(),
        loss::cases(),
        lm_head::cases(),
        drop_path::cases(),
        weights::cases(),
        norms::cases(),
        layers.collect(),
    ];

    let mut criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    let mut group = criterion.benchmark_group("cuda");
    group.sampling_mode(SamplingMode::Flat);
    let mut rows = Vec::new();
    for case in cases.into_iter().flatten() {
        group.throughput(match case.flop {
            0 => Throughput::Bytes(case.bytes as u64),
            flop => Throughput::Elements(flop as u64),
        });
        let parameter = format!("{} {} {}", case.family, case.dtype, case.shape);
        let id = BenchmarkId::new(case.operator, &parameter);
        // Criterion comes back for every sample, and not at all if the case is filtered out.
        let mut batch = None;
        let mut seconds = Vec::new();
        group.bench_function(id, |bencher| {
            let batch = batch.get_or_insert_with(|| {
                Batch::new(&gpu, &case)
                    .unwrap_or_else(|error| panic!("{} {parameter}: {error}", case.operator))
            });
            bencher.iter_custom(|iterations| {
                let elapsed = batch
                    .time(&gpu, iterations)
                    .unwrap_or_else(|error| panic!("{} {parameter}: {error}", case.operator));
                seconds.push(elapsed.as_secs_f64() / iterations as f64);
                elapsed
            });
        });
        // Samples come last, after those of the warm-up.
        let mut samples = seconds.split_off(seconds.len().saturating_sub(SAMPLES));
        samples.sort_by(f64::total_cmp);
        if let Some(&median) = samples.get(samples.len() / 2) {
            rows.push(Row { case, seconds: median });
        }
    }
    group.finish();
    criterion.final_summary();
    report::print(&rows);
    if let Some(path) = std::env::var_os("PACE_BENCH_JSON") {
        std::fs::write(path, report::json(&gpu, &rows)?)?;
    }
    Ok(())
}
