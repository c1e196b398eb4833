//! The figures as a table and as JSON.

use crate::gpu::Gpu;
use crate::references::{COPY, PRODUCT};
use crate::{Case, Fallible};
use serde_json::{Value, json};

/// A case and its median.
pub struct Row {
    pub case: Case,
    pub seconds: f64,
}

/// What the table says of a row. Absent is what a row does not have, or what it would be compared with.
struct Figures {
    microseconds: f64,
    gb_per_s: f64,
    tflop_per_s: Option<f64>,
    percent_of_copy: Option<f64>,
    percent_of_cublaslt: Option<f64>,
}

impl Figures {
    fn new(row: &Row, rows: &[Row]) -> Self {
        let Row { case, seconds } = row;
        let gb_per_s = |row: &Row| row.case.bytes as f64 / row.seconds / 1e9;
        let copy = rows.iter().find(|row| row.case.operator == COPY);
        let product = rows.iter().find(|row| {
            let reference = &row.case;
            reference.operator == PRODUCT && reference.dtype == case.dtype && reference.shape == case.shape
        });
        Self {
            microseconds: seconds * 1e6,
            gb_per_s: gb_per_s(row),
            tflop_per_s: (case.flop > 0).then(|| case.flop as f64 / seconds / 1e12),
            percent_of_copy: copy.map(|copy| 100.0 * gb_per_s(row) / gb_per_s(copy)),
            percent_of_cublaslt: product
                .filter(|_| case.against_product)
                .map(|product| 100.0 * product.seconds / seconds),
        }
    }
}

/// Prints the table in Markdown.
pub fn print(rows: &[Row]) {
    println!("\n| operator | family | type | shape | µs | GB/s | TFLOP/s | % of copy | % of cuBLASLt |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for row in rows {
        let figures = Figures::new(row, rows);
        let optional = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.1}"));
        println!(
            "| {} | {} | {} | {} | {:.2} | {:.0} | {} | {} | {} |",
            row.case.operator,
            row.case.family,
            row.case.dtype,
            row.case.shape,
            figures.microseconds,
            figures.gb_per_s,
            optional(figures.tflop_per_s),
            optional(figures.percent_of_copy),
            optional(figures.percent_of_cublaslt),
        );
    }
}

/// The same, to compare runs by.
pub fn json(gpu: &Gpu, rows: &[Row]) -> Fallible<String> {
    let results: Vec<Value> = rows
        .iter()
        .map(|row| {
            let figures = Figures::new(row, rows);
            json!({
                "operator": row.case.operator,
                "family": row.case.family,
                "type": row.case.dtype,
                "shape": row.case.shape,
                "microseconds": figures.microseconds,
                "gb_per_s": figures.gb_per_s,
                "tflop_per_s": figures.tflop_per_s,
                "percent_of_copy": figures.percent_of_copy,
                "percent_of_cublaslt": figures.percent_of_cublaslt,
            })
        })
        .collect();
    Ok(serde_json::to_string_pretty(&json!({ "device": gpu.describe()?, "results": results }))?)
}
