//! What the runs found: a table per number of shots, charts, and everything in `results.json`.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::charts::{self, Axis, Series};

/// The state of training after an epoch; NaN for what was not measured.
pub struct EpochPoint {
    pub epoch: usize,
    pub loss: f64,
    pub gradient_norm: f64,
    pub fp_distance: f64,
}

/// One training run and its result.
pub struct Run {
    pub method: String,
    pub shots: usize,
    pub seed: u64,
    /// Hyperparameters chosen on the validation images; zero where the method has none.
    pub lambda: f64,
    pub sigma: f64,
    /// Accuracies from 0 to 1.
    pub validation_accuracy: f64,
    pub accuracy: f64,
    pub train_seconds: f64,
    pub history: Vec<EpochPoint>,
}

impl Run {
    /// A value after the last epoch.
    fn last(&self, value: fn(&EpochPoint) -> f64) -> f64 {
        self.history.last().map_or(f64::NAN, value)
    }
}

/// A method at one number of shots, over seeds. NaN stands for what cannot be known, such as the spread of one run.
pub struct Summary<'a> {
    pub method: &'a str,
    pub shots: usize,
    pub seeds: usize,
    pub accuracy_mean: f64,
    /// Sample standard deviation.
    pub accuracy_std: f64,
    /// Mean accuracy above the baseline's on the same seeds; `None` for the baseline.
    pub difference: Option<Difference>,
    /// Means over seeds, after the last epoch.
    pub gradient_norm: f64,
    pub fp_distance: f64,
    pub train_seconds: f64,
}

pub struct Difference {
    pub mean: f64,
    /// Half the width of the 95 % interval of Student's t.
    pub half_width: f64,
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// NaN for fewer than two values.
fn sample_std(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

/// The `t` for which Student's t distribution has 95 % of its mass between `−t` and `t`; NaN for no freedom.
fn student_t_95(degrees_of_freedom: usize) -> f64 {
    if degrees_of_freedom == 0 {
        return f64::NAN;
    }
    let root = (degrees_of_freedom as f64).sqrt();
    // The mass is a finite sum in θ = atan(t/√ν) (Abramowitz and Stegun 26.7.3 and 26.7.4) that grows with θ.
    let mass = |theta: f64| {
        let (sin, cos) = theta.sin_cos();
        let odd = degrees_of_freedom % 2 == 1;
        let mut term = if odd { cos } else { 1.0 };
        let mut sum = if degrees_of_freedom == 1 { 0.0 } else { term };
        for k in (if odd { 3 } else { 2 }..degrees_of_freedom).step_by(2) {
            term *= cos * cos * (k - 1) as f64 / k as f64;
            sum += term;
        }
        if odd { (theta + sin * sum) * std::f64::consts::FRAC_2_PI } else { sin * sum }
    };
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if mass(middle) < 0.95 {
            low = middle;
        } else {
            high = middle;
        }
    }
    root * low.tan()
}

/// Distinct items in order of first appearance.
fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

fn shot_counts(runs: &[Run]) -> Vec<usize> {
    let mut shots = distinct(runs.iter().map(|run| run.shots));
    shots.sort();
    shots
}

fn methods(runs: &[Run]) -> Vec<&str> {
    distinct(runs.iter().map(|run| run.method.as_str()))
}

fn select<'a>(runs: &'a [Run], shots: usize, method: &str) -> Vec<&'a Run> {
    runs.iter().filter(|run| run.shots == shots && run.method == method).collect()
}

/// By number of shots, then by method in the order in which the methods first ran.
pub fn summarise<'a>(runs: &'a [Run], baseline: &str) -> Vec<Summary<'a>> {
    let mut summaries = Vec::new();
    for shots in shot_counts(runs) {
        let references = select(runs, shots, baseline);
        for method in methods(runs) {
            let runs = select(runs, shots, method);
            if runs.is_empty() {
                continue;
            }
            let mean_of =
                |value: fn(&Run) -> f64| mean(&runs.iter().map(|run| value(run)).collect::<Vec<_>>());
            let accuracies: Vec<_> = runs.iter().map(|run| run.accuracy).collect();
            let differences: Vec<_> = runs
                .iter()
                .filter_map(|run| {
                    let reference = references.iter().find(|reference| reference.seed == run.seed)?;
                    Some(run.accuracy - reference.accuracy)
                })
                .collect();
            let pairs = differences.len();
            summaries.push(Summary {
                method,
                shots,
                seeds: runs.len(),
                accuracy_mean: mean(&accuracies),
                accuracy_std: sample_std(&accuracies),
                difference: (method != baseline).then(|| Difference {
                    mean: mean(&differences),
                    half_width: student_t_95(pairs.saturating_sub(1)) * sample_std(&differences)
                        / (pairs as f64).sqrt(),
                }),
                gradient_norm: mean_of(|run| run.last(|point| point.gradient_norm)),
                fp_distance: mean_of(|run| run.last(|point| point.fp_distance)),
                train_seconds: mean_of(|run| run.train_seconds),
            });
        }
    }
    summaries
}

/// The summaries as text: one table per number of shots.
pub fn table(summaries: &[Summary], baseline: &str) -> String {
    let method_width = summaries.iter().map(|s| s.method.chars().count()).max().unwrap_or(0);
    let mut text = format!(
        "Accuracy on the test images in %, mean ± standard deviation over seeds. Difference to \"{baseline}\" in points on\n\
         the same seeds, with a 95 % interval (Student's t). Gradient norm: of the cross-entropy, to all that the method\n\
         trains (a linear probe has the head alone). FP-distance: mean squared distance of the features to the source\n\
         model's. Both after the last epoch, on validation images, without noise. Seconds: training alone, per run.\n"
    );
    for shots in distinct(summaries.iter().map(|s| s.shots)) {
        let rows: Vec<_> = summaries.iter().filter(|s| s.shots == shots).collect();
        let seeds = rows.iter().map(|s| s.seeds).max().unwrap_or(0);
        let (shot_s, seed_s) = (plural(shots), plural(seeds));
        writeln!(text, "\n{shots} shot{shot_s} per class, {seeds} seed{seed_s}").expect(INFALLIBLE);
        let mut row = |cells: [&str; 6]| {
            let [method, accuracy, difference, gradient, distance, seconds] = cells;
            writeln!(
                text,
                "{method:method_width$}  {accuracy:>12}  {difference:>21}  {gradient:>13}  {distance:>11}  {seconds:>7}"
            )
            .expect(INFALLIBLE);
        };
        row(["method", "accuracy", "difference", "gradient norm", "FP-distance", "seconds"]);
        for s in rows {
            let difference = s.difference.as_ref().map_or(String::new(), |d| {
                let [low, high] = [d.mean - d.half_width, d.mean + d.half_width];
                let [mean, low, high] =
                    [d.mean, low, high].map(|v| number(100.0 * v, |v| format!("{v:+.1}")));
                format!("{mean} [{low}, {high}]")
            });
            let percent = |v: f64| number(100.0 * v, |v| format!("{v:.1}"));
            row([
                s.method,
                &format!("{} ± {}", percent(s.accuracy_mean), percent(s.accuracy_std)),
                &difference,
                &number(s.gradient_norm, significant),
                &number(s.fp_distance, significant),
                &number(s.train_seconds, |v| format!("{v:.1}")),
            ]);
        }
    }
    text
}

const INFALLIBLE: &str = "writing to a String cannot fail";

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// A dash for what is not known.
fn number(value: f64, format: fn(f64) -> String) -> String {
    if value.is_finite() { format(value) } else { "–".into() }
}

fn significant(value: f64) -> String {
    match value.abs() {
        0.0 | 0.01..1000.0 => format!("{value:.3}"),
        _ => format!("{value:.2e}"),
    }
}

fn json(settings: Value, runs: &[Run], baseline: &str) -> Value {
    let runs_json: Vec<_> = runs
        .iter()
        .map(|run| {
            let history: Vec<_> = run
                .history
                .iter()
                .map(|point| {
                    json!({
                        "epoch": point.epoch,
                        "loss": point.loss,
                        "gradient_norm": point.gradient_norm,
                        "fp_distance": point.fp_distance,
                    })
                })
                .collect();
            json!({
                "method": run.method,
                "shots": run.shots,
                "seed": run.seed,
                "lambda": run.lambda,
                "sigma": run.sigma,
                "validation_accuracy": run.validation_accuracy,
                "accuracy": run.accuracy,
                "train_seconds": run.train_seconds,
                "history": history,
            })
        })
        .collect();
    let summaries: Vec<_> = summarise(runs, baseline)
        .iter()
        .map(|s| {
            json!({
                "method": s.method,
                "shots": s.shots,
                "seeds": s.seeds,
                "accuracy_mean": s.accuracy_mean,
                "accuracy_std": s.accuracy_std,
                "difference_mean": s.difference.as_ref().map(|d| d.mean),
                "difference_95_half_width": s.difference.as_ref().map(|d| d.half_width),
                "gradient_norm": s.gradient_norm,
                "fp_distance": s.fp_distance,
                "train_seconds": s.train_seconds,
            })
        })
        .collect();
    json!({ "settings": settings, "baseline": baseline, "summary": summaries, "runs": runs_json })
}

/// Writes `results.json` and the charts into `directory`, which is made if need be; returns what was written.
///
/// Values that are not known are `null` in the JSON. The chart of accuracy over shots needs two numbers of shots.
pub fn write(
    directory: &Path,
    settings: Value,
    runs: &[Run],
    baseline: &str,
) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    fs::create_dir_all(directory)?;
    let results = directory.join("results.json");
    fs::write(&results, format!("{:#}\n", json(settings, runs, baseline)))?;
    let mut written = vec![results];

    let shot_counts = shot_counts(runs);
    for &shots in &shot_counts {
        for (name, label, value) in [
            ("gradient_norm", "Gradient norm", (|p| p.gradient_norm) as fn(&EpochPoint) -> f64),
            ("fp_distance", "FP-distance", |p| p.fp_distance),
        ] {
            let path = directory.join(format!("{name}_{shots}_shot.svg"));
            if history_chart(&path, label, runs, shots, value)? {
                written.push(path);
            }
        }
    }
    if shot_counts.len() > 1 {
        let path = directory.join("accuracy.svg");
        accuracy_chart(&path, runs, baseline, &shot_counts)?;
        written.push(path);
    }
    Ok(written)
}

/// A value over epochs, one line per method, mean over seeds. False if nothing is known of it.
fn history_chart(
    path: &Path,
    label: &str,
    runs: &[Run],
    shots: usize,
    value: fn(&EpochPoint) -> f64,
) -> Result<bool, Box<dyn Error>> {
    let mut most_seeds = 0;
    let mut series = Vec::new();
    for (number, name) in methods(runs).into_iter().enumerate() {
        let runs = select(runs, shots, name);
        most_seeds = most_seeds.max(runs.len());
        let history = || runs.iter().flat_map(|run| &run.history);
        let mut epochs = distinct(history().map(|point| point.epoch));
        epochs.sort();
        let points: Vec<_> = epochs
            .into_iter()
            .map(|epoch| {
                let values: Vec<_> = history().filter(|point| point.epoch == epoch).map(value).collect();
                (epoch as f64, mean(&values))
            })
            .filter(|point| point.1.is_finite())
            .collect();
        if !points.is_empty() {
            series.push(Series { name, number, points, deviations: Vec::new() });
        }
    }
    if series.is_empty() {
        return Ok(false);
    }
    let points = || series.iter().flat_map(|s| &s.points);
    let title = format!(
        "{label} on validation images, {shots} shot{} per class, mean over {most_seeds} seed{}",
        plural(shots),
        plural(most_seeds)
    );
    let x = Axis::linear("Epoch", points().map(|p| p.0), 1.0);
    let y = Axis::magnitude(label, points().map(|p| p.1));
    charts::draw(path, &title, x, y, &series)?;
    Ok(true)
}

/// Accuracy over shots, one line per method.
fn accuracy_chart(
    path: &Path,
    runs: &[Run],
    baseline: &str,
    shot_counts: &[usize],
) -> Result<(), Box<dyn Error>> {
    let summaries = summarise(runs, baseline);
    let methods = methods(runs);
    let series: Vec<_> = methods
        .iter()
        .enumerate()
        .map(|(number, &name)| {
            let of_method = || summaries.iter().filter(|s| s.method == name);
            // Side by side, so that the error bars do not cover each other.
            let offset = 0.06 * (number as f64 - (methods.len() - 1) as f64 / 2.0);
            let place = |shots| shot_counts.iter().position(|&count| count == shots).unwrap_or(0) as f64;
            Series {
                name,
                number,
                points: of_method().map(|s| (place(s.shots) + offset, 100.0 * s.accuracy_mean)).collect(),
                // One seed has no spread.
                deviations: of_method()
                    .map(|s| if s.seeds > 1 { 100.0 * s.accuracy_std } else { 0.0 })
                    .collect(),
            }
        })
        .collect();
    let ends = series.iter().flat_map(|s| {
        s.points
            .iter()
            .zip(&s.deviations)
            .flat_map(|(point, deviation)| [point.1 - deviation, point.1 + deviation])
    });
    let x = Axis::categories("Shots per class", shot_counts.iter().map(usize::to_string));
    let y = Axis::linear("Accuracy, %", ends, 0.0);
    charts::draw(path, "Test accuracy, mean ± standard deviation over seeds", x, y, &series)
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHODS: [&str; 6] =
        ["linear probe", "LoRA mul + VPT add", "LoRA mul + VPT add, noise", "PACE", "PACE-fast", "PACE-lazy"];
    const BASELINE: &str = METHODS[1];

    /// Made-up results.
    fn runs(shot_counts: &[usize], seeds: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        for &shots in shot_counts {
            for seed in 0..seeds {
                for (number, method) in METHODS.into_iter().enumerate() {
                    let wobble = 0.01 * ((seed as usize * 7 + number * 3 + shots) % 5) as f64;
                    let history = (0..30).map(|epoch| EpochPoint {
                        epoch,
                        loss: 2.3 / (1 + epoch) as f64,
                        gradient_norm: (3.0 - 0.3 * number as f64) * (-0.12 * epoch as f64).exp() + wobble,
                        fp_distance: if number == 0 { f64::NAN } else { epoch as f64 / number as f64 },
                    });
                    runs.push(Run {
                        method: method.into(),
                        shots,
                        seed,
                        lambda: if number > 2 { 0.5 } else { 0.0 },
                        sigma: 1.0,
                        validation_accuracy: 0.8,
                        accuracy: 0.62 + 0.07 * (shots as f64).log2() + 0.008 * number as f64 + wobble,
                        train_seconds: 12.5 + number as f64,
                        history: history.collect(),
                    });
                }
            }
        }
        runs
    }

    #[test]
    fn student_t_matches_tables() {
        for (degrees_of_freedom, t) in [
            (1, 12.7062),
            (2, 4.3027),
            (3, 3.1824),
            (4, 2.7764),
            (5, 2.5706),
            (9, 2.2622),
            (10, 2.2281),
            (30, 2.0423),
            (120, 1.9799),
        ] {
            let got = student_t_95(degrees_of_freedom);
            assert!((got - t).abs() < 6e-5, "{degrees_of_freedom}: {got}, expected {t}");
        }
        assert!(student_t_95(0).is_nan());
    }

    #[test]
    fn differences_are_paired_by_seed() {
        let run = |method: &str, seed, accuracy| Run {
            method: method.into(),
            shots: 1,
            seed,
            lambda: 0.0,
            sigma: 0.0,
            validation_accuracy: 0.0,
            accuracy,
            train_seconds: 1.0,
            history: Vec::new(),
        };
        // The seeds come in different orders, and one has no counterpart.
        let runs = [
            run("base", 0, 0.5),
            run("base", 1, 0.7),
            run("base", 2, 0.6),
            run("new", 2, 0.63),
            run("new", 9, 0.0),
            run("new", 0, 0.51),
            run("new", 1, 0.72),
        ];
        let summaries = summarise(&runs, "base");
        assert_eq!(summaries.len(), 2);
        assert!(summaries[0].difference.is_none());
        assert!((summaries[0].accuracy_std - 0.1).abs() < 1e-12);
        // Differences 0.01, 0.02, 0.03: mean 0.02, standard deviation 0.01, t(2) = 4.3027.
        let difference = summaries[1].difference.as_ref().unwrap();
        assert!((difference.mean - 0.02).abs() < 1e-12);
        assert!((difference.half_width - 4.3027 * 0.01 / 3f64.sqrt()).abs() < 1e-6);
        assert!(summaries[1].gradient_norm.is_nan());
    }

    #[test]
    fn table_shows_every_method_per_shot() {
        let runs = runs(&[4, 1], 3);
        let table = table(&summarise(&runs, BASELINE), BASELINE);
        assert!(table.find("1 shot per class, 3 seeds").unwrap() < table.find("4 shots per class").unwrap());
        for method in METHODS {
            assert_eq!(table.lines().filter(|line| line.starts_with(&format!("{method}  "))).count(), 2);
        }
        assert!(table.contains(" ± ") && table.contains("–"), "{table}");
        let widths: Vec<_> = table
            .lines()
            .filter(|line| line.contains('±'))
            .skip(1)
            .map(|line| line.chars().count())
            .collect();
        assert!(widths.iter().all(|&width| width == widths[0]), "{table}");
    }

    #[test]
    fn one_seed_has_no_interval() {
        let runs = runs(&[2], 1);
        let table = table(&summarise(&runs, BASELINE), BASELINE);
        assert!(table.contains("[–, –]"), "{table}");
    }

    #[test]
    fn report_is_complete() {
        let directory = std::env::temp_dir().join(format!("few_shot_report_{}", std::process::id()));
        let written = write(&directory, json!({ "epochs": 30 }), &runs(&[1, 4], 3), BASELINE).unwrap();
        let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
        let results: Value = serde_json::from_str(&text("results.json")).unwrap();
        let charts = ["accuracy.svg", "gradient_norm_1_shot.svg", "fp_distance_4_shot.svg"].map(text);
        fs::remove_dir_all(&directory).unwrap();

        assert_eq!(written.len(), 6);
        assert_eq!(results["settings"]["epochs"], 30);
        assert_eq!(results["runs"].as_array().unwrap().len(), 36);
        assert_eq!(results["runs"][0]["history"].as_array().unwrap().len(), 30);
        assert_eq!(results["runs"][0]["history"][3]["fp_distance"], Value::Null);
        assert_eq!(results["summary"].as_array().unwrap().len(), 12);
        for chart in &charts {
            assert!(chart.trim_end().ends_with("</svg>") && chart.contains("PACE-lazy"));
        }
        // The linear probe has no FP-distance here.
        assert!(charts[1].contains("linear probe") && !charts[2].contains("linear probe"));
    }
}
