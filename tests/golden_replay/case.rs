//! One recorded case: its tensors and settings, and a record of what has been looked at.

use libtest_mimic::Failed;
use pace_kernels::Real;
use pace_kernels::noise::philox4x32_10;
use safetensors::{Dtype, SafeTensors};
use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::str::FromStr;

/// A tensor of a case, widened to the type that holds it exactly.
#[derive(Clone)]
pub struct Recorded {
    pub shape: Vec<usize>,
    pub values: Values,
}

#[derive(Clone)]
pub enum Values {
    Float(Vec<f64>),
    Integer(Vec<i64>),
}

pub struct Case {
    settings: HashMap<String, String>,
    tensors: HashMap<String, Recorded>,
    unused: RefCell<BTreeSet<String>>,
}

impl Case {
    pub fn read(path: &Path) -> Result<Self, Failed> {
        let bytes = std::fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let settings = header.metadata().clone().unwrap_or_default();
        let mut tensors = HashMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes)?.iter() {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F64 => Values::Float(bytemuck::pod_collect_to_vec(data)),
                Dtype::I64 => Values::Integer(bytemuck::pod_collect_to_vec(data)),
                other => return Err(format!("tensor `{name}` has type {other:?}").into()),
            };
            tensors.insert(name.to_owned(), Recorded { shape: view.shape().to_vec(), values });
        }
        let unused = RefCell::new(tensors.keys().cloned().collect());
        Ok(Self { settings, tensors, unused })
    }

    pub fn text(&self, setting: &str) -> Result<&str, Failed> {
        let value = self.settings.get(setting);
        Ok(value.ok_or_else(|| format!("the header has no `{setting}`"))?)
    }

    pub fn number<N: FromStr>(&self, setting: &str) -> Result<N, Failed> {
        let text = self.text(setting)?;
        text.parse().map_err(|_| format!("`{setting}` is not a number: {text}").into())
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Result<&Recorded, Failed> {
        self.unused.borrow_mut().remove(name);
        Ok(self.tensors.get(name).ok_or_else(|| format!("there is no tensor `{name}`"))?)
    }

    pub fn floats(&self, name: &str) -> Result<&[f64], Failed> {
        match &self.tensor(name)?.values {
            Values::Float(values) => Ok(values),
            Values::Integer(_) => Err(format!("`{name}` holds integers").into()),
        }
    }

    pub fn integers(&self, name: &str) -> Result<&[i64], Failed> {
        match &self.tensor(name)?.values {
            Values::Integer(values) => Ok(values),
            Values::Float(_) => Err(format!("`{name}` holds floats").into()),
        }
    }

    /// A float tensor in the precision of the check.
    pub fn get<T: Real>(&self, name: &str) -> Result<Vec<T>, Failed> {
        Ok(self.floats(name)?.iter().map(|&v| T::from_f64(v)).collect())
    }

    /// The same, if the case has it.
    pub fn get_if_present<T: Real>(&self, name: &str) -> Result<Option<Vec<T>>, Failed> {
        if self.has(name) { self.get(name).map(Some) } else { Ok(None) }
    }

    /// The case with the inputs of a training run rounded to `f32`, up or down by chance.
    pub fn inputs_rounded(&self, seed: u32) -> Self {
        let mut tensors = self.tensors.clone();
        for (name, tensor) in &mut tensors {
            let Values::Float(values) = &mut tensor.values else { continue };
            if !(name.starts_with("init.") || name.ends_with(".x") || name.contains(".z.")) {
                continue;
            }
            for (i, value) in values.iter_mut().enumerate() {
                let nearest = *value as f32;
                let [chance, ..] = philox4x32_10([i as u32, 0, 0, 0], [seed, 0]);
                let rounded = match f64::from(nearest).total_cmp(value) {
                    Ordering::Less if chance % 2 == 0 => nearest.next_up(),
                    Ordering::Greater if chance % 2 == 0 => nearest.next_down(),
                    _ => nearest,
                };
                *value = rounded.into();
            }
        }
        Self { settings: self.settings.clone(), tensors, unused: RefCell::default() }
    }

    /// Compares a result with a recorded tensor: largest difference over largest magnitude.
    pub fn expect<T: Real>(&self, name: &str, got: &[T], tolerance: f64) -> Result<(), Failed> {
        let got: Vec<f64> = got.iter().map(|&v| Real::to_f64(v)).collect();
        close(name, &got, self.floats(name)?, tolerance)
    }

    /// Fails if some tensor of the case was never looked at.
    pub fn all_tensors_used(&self) -> Result<(), Failed> {
        let unused = self.unused.borrow();
        if unused.is_empty() { Ok(()) } else { Err(format!("not checked: {unused:?}").into()) }
    }
}

/// Largest difference over largest magnitude (absolute where everything expected is zero) within `tolerance`.
fn close(name: &str, got: &[f64], expected: &[f64], tolerance: f64) -> Result<(), Failed> {
    if got.len() != expected.len() {
        return Err(format!("`{name}`: {} values, expected {}", got.len(), expected.len()).into());
    }
    let scale = expected.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    let scale = if scale == 0.0 { 1.0 } else { scale };
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / scale;
        // A NaN must fail too.
        if error > tolerance || error.is_nan() {
            return Err(format!(
                "`{name}`[{i}] is {got}, expected {expected}: error {error:.3e} of the largest value, allowed {tolerance:.0e}"
            )
            .into());
        }
    }
    Ok(())
}
