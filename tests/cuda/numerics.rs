//! The errors that the tests meet, in units in the last place: the tables of `docs/numerics.md` for the CUDA kernels.
//!
//! `PACE_NUMERICS=docs/numerics.md cargo test --test cuda -- simt::` writes the simulator's, `-- device::` those of device 0.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

/// A format of numbers: what a unit in the last place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    F32,
    Tf32,
    F16,
    Bf16,
}

impl Format {
    const ALL: [Self; 4] = [Self::F32, Self::Tf32, Self::F16, Self::Bf16];

    /// Bits of the significand, and the exponent of the least normal number.
    fn unit(self) -> (i32, i32) {
        match self {
            Self::F32 => (24, -126),
            Self::Tf32 => (11, -126),
            Self::F16 => (11, -14),
            Self::Bf16 => (8, -126),
        }
    }
}

/// The largest error of any element, and the largest mean of any tensor.
#[derive(Default, Clone, Copy)]
struct Error {
    largest: f64,
    mean: f64,
}

#[derive(Default, Clone, Copy)]
struct Errors {
    got: Error,
    unfused: Option<Error>,
}

/// Where a test runs, the operator, the family and the result.
type Row = (&'static str, String, String, String);

static ROWS: Mutex<BTreeMap<Row, BTreeMap<Format, Errors>>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// The test that this thread runs, as in `simt::sm90::noisy_linear::f16`.
    static TEST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What is recorded by this thread from here on belongs to this test.
pub fn begin(test: &str) {
    TEST.with_borrow_mut(|name| test.clone_into(name));
}

/// Records the error of a result against `exact`, and that of code that is not fused.
pub fn record(format: Format, result: &str, got: &[f64], unfused: Option<&[f64]>, exact: &[f64]) {
    let Some(row) = TEST.with_borrow(|test| row(test, result)) else { return };
    // Of nothing no error is a share.
    if exact.iter().all(|&value| value == 0.0) {
        return;
    }
    let got = error(format, got, exact);
    let unfused = unfused.map(|unfused| error(format, unfused, exact));
    let mut rows = ROWS.lock().unwrap();
    let errors = rows.entry(row).or_default().entry(format).or_default();
    errors.got.raise(got);
    if let Some(unfused) = unfused {
        errors.unfused.get_or_insert_default().raise(unfused);
    }
}

/// The row of a test's result.
fn row(test: &str, result: &str) -> Option<Row> {
    let (place, test) = test.split_once("::")?;
    let place = ["simt", "device"].into_iter().find(|name| *name == place)?;
    let parts: Vec<&str> = test.split("::").collect();
    let family = pace_kernels::cuda::Family::ALL.into_iter().find(|family| family.name() == parts[0]);
    let operator = parts[usize::from(family.is_some())];
    let family = family.map_or("", |family| family.name());
    Some((place, operator.to_owned(), result.to_owned(), family.to_owned()))
}

/// The error in units of the format at the size of the exact value, which counts as at least the root mean square of all.
fn error(format: Format, got: &[f64], exact: &[f64]) -> Error {
    let (digits, least) = format.unit();
    let typical = (exact.iter().map(|value| value * value).sum::<f64>() / exact.len() as f64).sqrt();
    let units = got.iter().zip(exact).map(|(got, exact)| {
        let size = exact.abs().max(typical).max(2f64.powi(least));
        (got - exact).abs() / 2f64.powi(exponent(size) + 1 - digits)
    });
    let (mut largest, mut sum) = (0f64, 0.0);
    for units in units {
        // NaN is kept.
        largest = if units <= largest { largest } else { units };
        sum += units;
    }
    Error { largest, mean: sum / exact.len() as f64 }
}

/// `e` of a normal number from 2ᵉ to 2ᵉ⁺¹.
fn exponent(size: f64) -> i32 {
    (size.to_bits() >> 52 & 0x7ff) as i32 - 1023
}

impl Error {
    fn raise(&mut self, other: Self) {
        self.largest = self.largest.max(other.largest);
        self.mean = self.mean.max(other.mean);
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = |value: f64| match value {
            0.0 => "0".to_owned(),
            ..10.0 => format!("{value:.2}"),
            ..100.0 => format!("{value:.1}"),
            _ => format!("{value:.0}"),
        };
        write!(f, "{} / {}", digits(self.largest), digits(self.mean))
    }
}

/// Writes the tables of what has been recorded into the document that `PACE_NUMERICS` names.
pub fn write() {
    let Some(path) = std::env::var_os("PACE_NUMERICS") else { return };
    let rows = ROWS.lock().unwrap();
    for place in ["simt", "device"] {
        let mut table = String::from(
            "| operator | result | family | f32 | tf32 | f16 | bf16 |\n|---|---|---|---|---|---|---|\n",
        );
        let rows: Vec<_> = rows.iter().filter(|(row, _)| row.0 == place).collect();
        if rows.is_empty() {
            continue;
        }
        for ((_, operator, result, family), errors) in rows {
            write!(table, "| {operator} | {result} | {family} |").unwrap();
            for format in Format::ALL {
                match errors.get(&format) {
                    Some(Errors { got, unfused: Some(unfused) }) => {
                        write!(table, " {got} ({unfused}) |").unwrap()
                    }
                    Some(Errors { got, unfused: None }) => write!(table, " {got} |").unwrap(),
                    None => table.push_str(" |"),
                }
            }
            table.push('\n');
        }
        let document = std::fs::read_to_string(&path).expect("PACE_NUMERICS is a document");
        let begin = format!("<!-- CUDA {place} -->\n");
        let start = document.find(&begin).expect("the document has a place for the table") + begin.len();
        let end = start + document[start..].find("<!-- end -->").expect("the table has an end");
        std::fs::write(&path, format!("{}{table}{}", &document[..start], &document[end..])).unwrap();
    }
}
