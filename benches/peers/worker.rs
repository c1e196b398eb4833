//! This crate's side of `peers.py`: runs one operator per request from standard input.
//!
//! Requests are `run OP` (answer: seconds of the forward and of the backward pass), `check OP` (writes outputs and gradients next to the inputs) and
//! `memory OP` (answer: bytes); the arguments are the directory of the inputs, then sizes, rank and threads.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use pace_kernels::LinearShape;
use pace_kernels::cpu::{
    Base, LoraFactors, LoraGrads, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, PromptBias,
    PromptGrads, lora_mul_weight, lora_mul_weight_backward,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use std::error::Error;
use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// The same as `SIGMA` in `runners.py`.
const SIGMA: f32 = 1.0;

struct Layer {
    dir: PathBuf,
    shape: LinearShape,
    rank: usize,
    threads: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    lora_b: Vec<f32>,
    lora_a: Vec<f32>,
    delta_bias: Vec<f32>,
    prompt_down: Vec<f32>,
    prompt_up: Vec<f32>,
}

/// An iteration: names and values of its outputs, and when the forward pass was over.
struct Iteration {
    forward_end: Instant,
    outputs: Vec<(&'static str, Vec<f32>)>,
}

impl Layer {
    fn read(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let dir = PathBuf::from(args.next().ok_or("missing directory")?);
        let sizes = args.map(|arg| arg.parse()).collect::<Result<Vec<usize>, _>>()?;
        let &[branches, batch, tokens, in_features, out_features, rank, threads] = &sizes[..] else {
            return Err("expected branches, batch, tokens, in-features, out-features, rank, threads".into());
        };
        let shape = LinearShape { branches, batch, tokens, in_features, out_features, shared_input: false };
        let get = |name| floats(&dir, name);
        Ok(Self {
            shape,
            rank,
            threads,
            x: get("x")?,
            dy: get("dy")?,
            weight: get("weight")?,
            bias: get("bias")?,
            lora_b: get("lora_b")?,
            lora_a: get("lora_a")?,
            delta_bias: get("delta_bias")?,
            prompt_down: get("prompt_down")?,
            prompt_up: get("prompt_up")?,
            dir,
        })
    }

    fn base(&self) -> Base<&[f32]> {
        Base { weight: &self.weight, bias: Some(&self.bias) }
    }

    /// Forward and backward of one operator; everything that it returns is allocated here, as a trainer would.
    fn step(&self, op: &str, noise: Noise<&'_ [f32]>) -> Result<Iteration> {
        match op {
            "frozen" => Ok(self.frozen()),
            "lora_add" => self.lora_add(noise),
            "lora_mul_vpt" => self.lora_mul_vpt(noise),
            other => Err(format!("no operator `{other}`").into()),
        }
    }

    /// The frozen layer alone: two GEMMs of the library that the operators use.
    fn frozen(&self) -> Iteration {
        let (m, k, n) = (self.shape.out_rows(), self.shape.in_features, self.shape.out_features);
        let weight = MatRef::from_row_major_slice(&self.weight, n, k);
        let mut y = vec![0.0; m * n];
        y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(&self.bias));
        let par = if self.threads > 1 { Par::rayon(self.threads) } else { Par::Seq };
        let product = |out: &mut [f32], accum, a: &[f32], b: MatRef<'_, f32>| {
            let out = MatMut::from_row_major_slice_mut(out, m, b.ncols());
            matmul(out, accum, MatRef::from_row_major_slice(a, m, b.nrows()), b, 1.0, par);
        };
        product(&mut y, Accum::Add, &self.x, weight.transpose());
        let forward_end = Instant::now();
        let mut dx = vec![0.0; m * k];
        product(&mut dx, Accum::Replace, &self.dy, weight);
        Iteration { forward_end, outputs: vec![("y", y), ("dx", dx)] }
    }

    fn lora_add(&self, noise: Noise<&'_ [f32]>) -> Result<Iteration> {
        let layer = LowRankLinear {
            shape: self.shape,
            noise,
            base: Some(self.base()),
            rank: self.rank,
            lora_b: &self.lora_b,
            lora_a: &self.lora_a,
            delta_bias: Some(&self.delta_bias),
            scale: 1.0,
        };
        let mut y = vec![0.0; self.dy.len()];
        layer.forward(&self.x, &mut y)?;
        let forward_end = Instant::now();
        let mut dx = vec![0.0; self.x.len()];
        let mut lora_b = vec![0.0; self.lora_b.len()];
        let mut lora_a = vec![0.0; self.lora_a.len()];
        let mut delta_bias = vec![0.0; self.delta_bias.len()];
        let grads: LowRankGrads<&mut [_]> = LowRankGrads {
            input: Some(&mut dx),
            lora_b: Some(&mut lora_b),
            lora_a: Some(&mut lora_a),
            delta_bias: Some(&mut delta_bias),
        };
        layer.backward(&self.x, &self.dy, grads)?;
        let outputs =
            vec![("y", y), ("dx", dx), ("lora_b", lora_b), ("lora_a", lora_a), ("delta_bias", delta_bias)];
        Ok(Iteration { forward_end, outputs })
    }

    fn lora_mul_vpt(&self, noise: Noise<&'_ [f32]>) -> Result<Iteration> {
        let (k, n) = (self.shape.in_features, self.shape.out_features);
        let lora: LoraFactors<&[_], _> = LoraFactors {
            out_features: n,
            in_features: k,
            rank: self.rank,
            lora_b: &self.lora_b,
            lora_a: &self.lora_a,
            scale: 1.0,
        };
        let prompt: PromptBias<&[_]> = PromptBias {
            out_features: n,
            in_features: k,
            rank: self.rank,
            base_weight: &self.weight,
            base_bias: Some(&self.bias),
            prompt_down: &self.prompt_down,
            prompt_up: &self.prompt_up,
            delta_bias: Some(&self.delta_bias),
        };
        let mut delta_weight = vec![0.0; n * k];
        let mut delta_bias = vec![0.0; n];
        lora_mul_weight(lora, &self.weight, &mut delta_weight)?;
        prompt.forward(&mut delta_bias)?;
        let layer = NoisyLinear {
            shape: self.shape,
            noise,
            base: Some(self.base()),
            delta_weight: Some(&delta_weight),
            delta_bias: Some(&delta_bias),
            fold: true,
        };
        let mut y = vec![0.0; self.dy.len()];
        layer.forward(&self.x, &mut y)?;
        let forward_end = Instant::now();
        let mut dx = vec![0.0; self.x.len()];
        let mut weight_grad = vec![0.0; n * k];
        let mut bias_grad = vec![0.0; n];
        let grads: NoisyLinearGrads<&mut [_]> = NoisyLinearGrads {
            input: Some(&mut dx),
            delta_weight: Some(&mut weight_grad),
            delta_bias: Some(&mut bias_grad),
        };
        layer.backward(&self.x, &self.dy, grads)?;
        let mut lora_b = vec![0.0; self.lora_b.len()];
        let mut lora_a = vec![0.0; self.lora_a.len()];
        let grads: LoraGrads<&mut [_]> = LoraGrads { lora_b: &mut lora_b, lora_a: &mut lora_a };
        lora_mul_weight_backward(lora, &self.weight, &weight_grad, grads)?;
        let mut prompt_down = vec![0.0; self.prompt_down.len()];
        let mut prompt_up = vec![0.0; self.prompt_up.len()];
        let mut own_bias = vec![0.0; n];
        let grads: PromptGrads<&mut [_]> = PromptGrads {
            prompt_down: &mut prompt_down,
            prompt_up: &mut prompt_up,
            delta_bias: Some(&mut own_bias),
        };
        prompt.backward(&bias_grad, grads)?;
        let outputs = vec![
            ("y", y),
            ("dx", dx),
            ("lora_b", lora_b),
            ("lora_a", lora_a),
            ("delta_bias", own_bias),
            ("prompt_down", prompt_down),
            ("prompt_up", prompt_up),
        ];
        Ok(Iteration { forward_end, outputs })
    }

    /// Fresh noise, as at step `step` of a run.
    fn noise(step: u64) -> Result<Noise<&'static [f32]>> {
        Ok(Noise::Generated(Generator::new(Key::derive(0, step, 1), SIGMA, NoiseShape::PerSample, 0)?))
    }

    fn answer(&self, command: &str, op: &str, step: u64) -> Result<String> {
        match command {
            "run" => {
                let start = Instant::now();
                let iteration = self.step(op, Self::noise(step)?)?;
                let end = Instant::now();
                let forward = iteration.forward_end - start;
                let backward = end - iteration.forward_end;
                Ok(format!("{} {}", forward.as_secs_f64(), backward.as_secs_f64()))
            }
            "check" => {
                let z = floats(&self.dir, "z")?;
                let noise: Noise<&[f32]> = Noise::Given { z: &z, shape: NoiseShape::PerSample };
                for (name, values) in self.step(op, noise)?.outputs {
                    let path = self.dir.join(format!("{op}.{name}.ours.f32"));
                    fs::write(path, bytemuck::cast_slice(&values))?;
                }
                Ok("ok".into())
            }
            "memory" => {
                self.step(op, Self::noise(step)?)?;
                fs::write("/proc/self/clear_refs", "5")?;
                let before = status("VmRSS")?;
                let iteration = self.step(op, Self::noise(step)?)?;
                let peak = status("VmHWM")?.saturating_sub(before);
                drop(iteration);
                Ok(peak.to_string())
            }
            other => Err(format!("no command `{other}`").into()),
        }
    }
}

fn floats(dir: &Path, name: &str) -> Result<Vec<f32>> {
    let bytes = fs::read(dir.join(format!("{name}.f32")))?;
    Ok(bytes.as_chunks().0.iter().map(|&b| f32::from_ne_bytes(b)).collect())
}

/// A size of this process, in bytes, as the kernel reports it.
fn status(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    let kilobytes: u64 = line.split_whitespace().nth(1).ok_or("no value")?.parse()?;
    Ok(kilobytes * 1024)
}

fn main() -> Result<()> {
    let layer = Layer::read(std::env::args().skip(1))?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(layer.threads).build()?;
    for (step, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line?;
        let (command, op) = line.split_once(' ').ok_or("expected `COMMAND OPERATOR`")?;
        // The whole iteration belongs to the pool, as in a training loop.
        let answer = pool.install(|| layer.answer(command, op, step as u64).map_err(|e| e.to_string()))?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
