//! Few-shot fine-tuning of a small vision transformer: PACE and its variants against the same adapters without it.
//!
//! A ViT that was pre-trained on MNIST learns the UCI Optdigits scans from a few images per class. Run with `--help`.

mod charts;
mod data;
mod progress;
mod report;
mod train;

use data::{Images, few_shot_split};
use pace_kernels::candle::vit::{VitConfig, read_weights};
use progress::Progress;
use report::Run;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use train::{Job, Method, Recipe, Source, Strength};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const HELP: &str = "\
Few-shot fine-tuning of a small vision transformer with PACE.

USAGE: cargo run --release -p few-shot -- [OPTIONS]

Without options: MNIST to Optdigits, 4 shots per class, about 2 minutes on 2 cores.

    --full              1, 2, 4, 8 and 16 shots per class
    --shots N           shots per class, up to 19 (may be repeated)
    --seeds N           runs per method, with different shots (default 4)
    --epochs N          epochs (default 100 of fine-tuning, 60 of pre-training)
    --rank N            rank of the adapters (default 8)
    --search            choose lambda and sigma on the validation images first, for every method
    --weights FILE      another vision transformer in timm's layout (safetensors), pixels from -1 to 1; a small one:
                        a run holds the activations of all its validation images
    --heads N           its number of attention heads, if not one per 64 channels
    --data FOLDER       other images (png, jpeg), one sub-folder of more than 40 per class
    --out FOLDER        where results go (default results/few_shot)
    --pretrain          train the source model anew (writes source.safetensors to the output folder) and stop
    --help              this text
";

/// The source model of the default run, as `--pretrain` makes it.
const CHECKPOINT: &[u8] = include_bytes!("mnist_vit.safetensors");
/// λ and σ of every method, as `--search` chose them.
const SELECTED: &str = include_str!("selected.json");
/// λ and σ to choose from: the paper's ranges.
const LAMBDAS: [f64; 6] = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
const SIGMAS: [f64; 5] = [0.1, 0.5, 1.0, 1.5, 2.0];

/// Images per class that are kept for shots and validation; all others are only ever tested on.
const DEVELOPMENT: usize = 40;
/// Of these, images per class to validate on.
const VALIDATION: usize = 20;
/// What these leave for shots, one image apart: `few_shot_split` keeps a rest.
const MOST_SHOTS: usize = DEVELOPMENT - VALIDATION - 1;
/// The split into development and test images is the same in every run.
const SPLIT_SEED: u64 = 0;
/// A search draws its shots with other seeds than the runs that are reported.
const SEARCH_SEEDS: [u64; 2] = [1000, 1001];
/// Shots that a search uses, whatever numbers are run afterwards.
const SEARCH_SHOTS: usize = 4;

struct Options {
    shots: Vec<usize>,
    seeds: u64,
    epochs: Option<usize>,
    rank: usize,
    search: bool,
    weights: Option<PathBuf>,
    heads: Option<usize>,
    data: Option<PathBuf>,
    out: PathBuf,
    pretrain: bool,
}

impl Options {
    /// `None` if only help was asked for.
    fn parse() -> Result<Option<Self>> {
        use lexopt::prelude::*;
        let mut options = Self {
            shots: vec![],
            seeds: 4,
            epochs: None,
            rank: 8,
            search: false,
            weights: None,
            heads: None,
            data: None,
            out: "results/few_shot".into(),
            pretrain: false,
        };
        let mut full = false;
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("full") => full = true,
                Long("shots") => options.shots.push(number("shots", parser.value()?, MOST_SHOTS)?),
                Long("seeds") => options.seeds = number("seeds", parser.value()?, 1_000)? as u64,
                Long("epochs") => options.epochs = Some(number("epochs", parser.value()?, 100_000)?),
                Long("rank") => options.rank = number("rank", parser.value()?, 1_000)?,
                Long("search") => options.search = true,
                Long("weights") => options.weights = Some(parser.value()?.into()),
                Long("heads") => options.heads = Some(number("heads", parser.value()?, 1_000)?),
                Long("data") => options.data = Some(parser.value()?.into()),
                Long("out") => options.out = parser.value()?.into(),
                Long("pretrain") => options.pretrain = true,
                Short('h') | Long("help") => return Ok(None),
                other => return Err(other.unexpected().into()),
            }
        }
        if full {
            options.shots.extend([1, 2, 4, 8, 16]);
        } else if options.shots.is_empty() {
            options.shots.push(4);
        }
        options.shots.sort_unstable();
        options.shots.dedup();
        Ok(Some(options))
    }
}

/// A whole number from 1 to `most`.
fn number(option: &str, value: std::ffi::OsString, most: usize) -> Result<usize> {
    let text = value.to_string_lossy();
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("--{option} `{text}`: expected a whole number from 1 to {most}").into()),
    }
}

fn main() -> std::process::ExitCode {
    // candle's own threads would stand in the way of the runs side by side: it serialises its callers.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: no other thread has been started yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    let outcome = match Options::parse() {
        Ok(Some(options)) if options.pretrain => pretrain(&options),
        Ok(Some(options)) => compare(&options),
        Ok(None) => {
            print!("{HELP}");
            Ok(())
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Trains the source model.
fn pretrain(options: &Options) -> Result<()> {
    let epochs = options.epochs.unwrap_or(60);
    create_folder(&options.out)?;
    let mut progress = Progress::new("pre-training", epochs as u64);
    let vars = train::pretrain(&data::load_mnist(), 500, epochs, |epoch, loss, accuracy| {
        progress.step(format!("epoch {epoch}: loss {loss:.4}, held-out accuracy {:.1} %", 100.0 * accuracy));
    })?;
    progress.finish();
    let path = options.out.join("source.safetensors");
    let heads = train::MNIST_VIT.heads.to_string();
    let metadata =
        HashMap::from([("num_heads".to_owned(), heads), ("data".to_owned(), "MNIST, 4,500 images".into())]);
    let vars = vars.data().lock().map_err(|error| error.to_string())?;
    safetensors::serialize_to_file(
        vars.iter().map(|(name, var)| (name, var.as_tensor())),
        Some(metadata),
        &path,
    )?;
    println!("wrote {}", path.display());
    Ok(())
}

/// The source model: the one shipped, or the user's.
fn source(options: &Options) -> Result<Source> {
    let (weights, file) = match &options.weights {
        Some(path) => (read_weights(path)?, std::fs::read(path)?),
        None => {
            let weights = candle_core::safetensors::load_buffer(CHECKPOINT, &candle_core::Device::Cpu)?;
            (weights, CHECKPOINT.to_vec())
        }
    };
    // `--pretrain` notes the number of heads, which leaves no trace in the shapes.
    let (_, header) = safetensors::SafeTensors::read_metadata(&file)?;
    let recorded = header.metadata().as_ref().and_then(|metadata| metadata.get("num_heads")?.parse().ok());
    let config = VitConfig::infer(&weights, options.heads.or(recorded))?;
    Ok(Source { weights, config })
}

/// Runs every method on every number of shots and seed, and reports.
fn compare(options: &Options) -> Result<()> {
    let start = Instant::now();
    let source = source(options)?;
    let config = &source.config;
    let set = match &options.data {
        Some(folder) => data::load_folder(folder, config.image_size, config.channels)?,
        None => data::load_optdigits(),
    };
    if set.classes < 2 {
        return Err(format!("the images have {} class, expected two or more", set.classes).into());
    }
    let sizes = |channels, side| format!("{channels} channels and {side}×{side} pixels");
    if (set.channels, set.height) != (config.channels, config.image_size) {
        return Err(format!(
            "the model takes images of {}, but Optdigits has {}: give others with --data",
            sizes(config.channels, config.image_size),
            sizes(set.channels, set.height)
        )
        .into());
    }
    let split = few_shot_split(&set.labels, set.classes, DEVELOPMENT, 0, SPLIT_SEED).map_err(|error| {
        let data::Error::TooFewImages { class, images, .. } = error else { return error.to_string() };
        format!(
            "class `{}` has {images} images, expected more than {DEVELOPMENT}: {VALIDATION} to validate on, up to \
             {MOST_SHOTS} to train on, and some to test on",
            set.class_names[class]
        )
    })?;
    let (development, test) = (set.subset(&split.train), set.subset(&split.test));
    println!(
        "{} classes: {} images for shots and validation, {} for testing only",
        set.classes,
        development.len(),
        test.len()
    );
    // The classes of other images may be in another order than the head's.
    if options.data.is_none() && source.config.classes == set.classes {
        println!(
            "test accuracy of the source model as it is: {:.1} %",
            100.0 * train::unadapted_accuracy(&source, &test)?
        );
    }
    let recipe = Recipe {
        epochs: options.epochs.unwrap_or(100),
        batch: 64,
        rank: options.rank,
        learning_rate: 3e-3,
        weight_decay: 1e-4,
        measure_every: 20,
    };
    create_folder(&options.out)?;
    let bench = Bench { source: &source, recipe, development: &development };
    let strengths = if options.search { bench.search(&options.out)? } else { read_strengths(SELECTED)? };

    if !options.search && (options.weights.is_some() || options.data.is_some()) {
        println!("sigma and lambda as chosen for MNIST to Optdigits; --search chooses them for this task");
    }
    for (method, strength) in Method::ALL.iter().zip(&strengths).filter(|(method, _)| method.has_sigma()) {
        println!("{:<12} sigma {}, lambda {}", method.name(), strength.sigma, strength.lambda);
    }

    let mut jobs = Vec::new();
    for &shots in &options.shots {
        for seed in 0..options.seeds {
            for (&method, &strength) in Method::ALL.iter().zip(&strengths) {
                jobs.push(bench.job(method, strength, shots, seed, Some(&test))?);
            }
        }
    }
    let runs = run_all("fine-tuning", &jobs)?;
    let baseline = Method::Baseline.name();
    print!("{}", report::table(&report::summarise(&runs, baseline), baseline));
    let settings = json!({
        "source": options.weights.as_ref().map_or("shipped MNIST checkpoint".into(), |path| path.display().to_string()),
        "data": options.data.as_ref().map_or("Optdigits".into(), |path| path.display().to_string()),
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "rank": recipe.rank,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "seeds": options.seeds,
        "development_per_class": DEVELOPMENT,
        "validation_per_class": VALIDATION,
        "test_images": test.len(),
        "strengths": strengths_json(&strengths),
    });
    let written = report::write(&options.out, settings, &runs, baseline)?;
    println!("{:.0} s in all; wrote", start.elapsed().as_secs_f64());
    for path in written {
        println!("  {}", path.display());
    }
    Ok(())
}

/// What all runs have in common.
struct Bench<'a> {
    source: &'a Source,
    recipe: Recipe,
    development: &'a Images,
}

impl<'a> Bench<'a> {
    fn job(
        &self,
        method: Method,
        strength: Strength,
        shots: usize,
        seed: u64,
        test: Option<&'a Images>,
    ) -> Result<Job<'a>> {
        let set = self.development;
        let split = few_shot_split(&set.labels, set.classes, shots, VALIDATION, seed)?;
        Ok(Job {
            source: self.source,
            recipe: self.recipe,
            method,
            strength,
            shots,
            seed,
            train: set.subset(&split.train),
            validation: set.subset(&split.validation),
            test,
        })
    }

    /// For every method, the λ and σ with the best mean validation accuracy; no test image is looked at.
    fn search(&self, out: &Path) -> Result<Vec<Strength>> {
        let mut candidates = Vec::new();
        for method in Method::ALL {
            let sigmas = if method.has_sigma() { &SIGMAS[..] } else { &[0.0] };
            let lambdas = if method.has_lambda() { &LAMBDAS[..] } else { &[0.0] };
            for &sigma in sigmas {
                candidates.extend(lambdas.iter().map(|&lambda| (method, Strength { lambda, sigma })));
            }
        }
        let mut jobs = Vec::new();
        for &(method, strength) in &candidates {
            for seed in SEARCH_SEEDS {
                jobs.push(self.job(method, strength, SEARCH_SHOTS, seed, None)?);
            }
        }
        let runs = run_all("search", &jobs)?;
        let scores: Vec<f64> = runs
            .chunks(SEARCH_SEEDS.len())
            .map(|runs| runs.iter().map(|run| run.validation_accuracy).sum::<f64>() / runs.len() as f64)
            .collect();
        let mut best = Vec::new();
        let mut grid = Vec::new();
        for method in Method::ALL {
            let mut scored: Vec<_> = candidates.iter().zip(&scores).filter(|(c, _)| c.0 == method).collect();
            for ((_, Strength { lambda, sigma }), score) in &scored {
                grid.push(json!({"method": method.name(), "lambda": lambda, "sigma": sigma, "validation_accuracy": score}));
            }
            // The first of equals: the weaker setting.
            scored.sort_by(|a, b| b.1.total_cmp(a.1));
            let ((_, strength), score) = scored[0];
            println!(
                "{:<20} lambda {:<5} sigma {:<4} validation accuracy {:.2} %",
                method.name(),
                strength.lambda,
                strength.sigma,
                100.0 * score
            );
            best.push(*strength);
        }
        let chosen = json!({"strengths": strengths_json(&best), "grid": grid});
        let path = out.join("selected.json");
        std::fs::write(&path, serde_json::to_string_pretty(&chosen)? + "\n")?;
        println!("wrote {}", path.display());
        Ok(best)
    }
}

fn strengths_json(strengths: &[Strength]) -> Value {
    let entries = Method::ALL.iter().zip(strengths).map(|(method, strength)| {
        (method.name().to_owned(), json!({"lambda": strength.lambda, "sigma": strength.sigma}))
    });
    Value::Object(entries.collect())
}

/// Reads what a search wrote.
fn read_strengths(text: &str) -> Result<Vec<Strength>> {
    let all: Value = serde_json::from_str(text)?;
    let read = |method: &Method| {
        let entry = &all["strengths"][method.name()];
        Some(Strength { lambda: entry["lambda"].as_f64()?, sigma: entry["sigma"].as_f64()? })
    };
    Method::ALL
        .iter()
        .map(|method| {
            read(method).ok_or_else(|| format!("no lambda and sigma for `{}`", method.name()).into())
        })
        .collect()
}

/// Runs jobs side by side, one thread each: small models gain nothing from more. Results in the order of the jobs.
fn run_all(label: &str, jobs: &[Job<'_>]) -> Result<Vec<Run>> {
    let next = AtomicUsize::new(0);
    let progress = Mutex::new(Progress::new(label, jobs.len() as u64));
    let results: Vec<Mutex<Option<candle_core::Result<Run>>>> =
        jobs.iter().map(|_| Mutex::new(None)).collect();
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    std::thread::scope(|scope| -> Result<()> {
        for _ in 0..workers {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            let (next, progress, results) = (&next, &progress, &results);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { break };
                    let run = pool.install(|| job.run());
                    if let Ok(mut progress) = progress.lock() {
                        progress.step(format!(
                            "{}, {} shots, seed {}",
                            job.method.name(),
                            job.shots,
                            job.seed
                        ));
                    }
                    if let Ok(mut result) = results[i].lock() {
                        *result = Some(run);
                    }
                }
            });
        }
        Ok(())
    })?;
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    results
        .into_iter()
        .map(|result| match result.into_inner() {
            Ok(Some(run)) => Ok(run?),
            _ => Err("a training run did not finish".into()),
        })
        .collect()
}
