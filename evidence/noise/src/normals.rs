//! Tests of the normals.

use crate::finding::Finding;
use crate::generator::Generator;
use crate::stream::{Axis, Stream};
use crate::wide::{self, Loop, widest};
use realfft::num_complex::Complex;
use realfft::{RealFftPlanner, RealToComplex};
use statrs::distribution::{ChiSquared, ContinuousCDF, Normal};
use std::marker::PhantomData;
use std::sync::Arc;

/// Walks whose four words per call are those of one address, so that they are what the library makes normals of.
pub const AXES: [Axis; 16] = [
    Axis::Channel,
    Axis::ChannelHigh,
    Axis::Token,
    Axis::Sample,
    Axis::SampleHigh,
    Axis::Branch,
    Axis::Layer,
    Axis::Step,
    Axis::Seed,
    Axis::PerToken,
    Axis::PerSample,
    Axis::Transposed,
    Axis::Columns,
    Axis::SmallKeys,
    Axis::FewBits,
    Axis::PairSeed,
];

/// Draws that tests are given at a time, and the length of the Fourier transforms.
const CHUNK: usize = 1 << 14;

struct Transform<'a, G>(&'a [u32], &'a mut [f32], PhantomData<G>);

impl<G: Generator> Loop for Transform<'_, G> {
    #[inline(always)]
    fn run(self) {
        for (words, out) in self.0.as_chunks::<64>().0.iter().zip(self.1.as_chunks_mut::<64>().0) {
            let mut block = [[0f32; 4]; 16];
            for (words, normals) in words.as_chunks::<4>().0.iter().zip(&mut block) {
                *normals = G::normals(*words);
            }
            out.copy_from_slice(block.as_flattened());
        }
    }
}

/// The highest order of the moments.
const ORDERS: usize = 8;

/// Sums of the Hermite polynomials He₁ … He₈: moments about the known mean 0 and variance 1.
struct Moments {
    sums: [f64; ORDERS],
    draws: f64,
}

struct Hermite<'a>(&'a [f32], [f64; ORDERS]);

impl Loop for &mut Hermite<'_> {
    #[inline(always)]
    fn run(self) {
        const LANES: usize = 8;
        let mut sums = [[0f64; LANES]; ORDERS];
        for block in self.0.as_chunks::<LANES>().0 {
            let n = block.map(f64::from);
            let (mut before, mut he) = ([1.0; LANES], n);
            for (k, sums) in sums.iter_mut().enumerate() {
                for lane in 0..LANES {
                    sums[lane] += he[lane];
                    let next = n[lane] * he[lane] - (k + 1) as f64 * before[lane];
                    (before[lane], he[lane]) = (he[lane], next);
                }
            }
        }
        self.1 = sums.map(|lanes| lanes.iter().sum());
    }
}

impl Moments {
    fn feed(&mut self, draws: &[f32]) {
        let mut hermite = Hermite(draws, [0.0; ORDERS]);
        widest(&mut hermite);
        for (sum, part) in self.sums.iter_mut().zip(hermite.1) {
            *sum += part;
        }
        self.draws += draws.len() as f64;
    }

    fn findings(&self, out: &mut Vec<Finding>) {
        // The mean of Heₖ(n) is 0 with variance k!/N. The law of large orders is far from normal where N is small:
        // its fourth cumulant multiplies the tail beyond 6 by up to exp(54·(3^2k/N)), small while 3^2k·54 < N.
        let mut factorial = 1.0;
        for (k, sum) in (1..).zip(self.sums) {
            factorial *= f64::from(k);
            if 54.0 * 9f64.powi(k) < self.draws {
                out.push(Finding::normal(format!("moment {k}"), sum / (self.draws * factorial).sqrt()));
            }
        }
    }
}

/// Cells of width 2⁻¹² over [−8, 8).
const CELLS: usize = 1 << 16;
const CELLS_PER_UNIT: f32 = 4096.0;
/// Equiprobable bins, but for the rounding of their edges to those of cells.
const BINS: usize = 1024;

/// The distribution function against that of the normal.
struct Histogram(Vec<u32>);

impl Histogram {
    fn feed(&mut self, draws: &[f32]) {
        for n in draws {
            self.0[(n * CELLS_PER_UNIT + (CELLS / 2) as f32).floor() as usize] += 1;
        }
    }

    fn findings(&self, out: &mut Vec<Finding>) {
        let law = Normal::standard();
        let edge = |cell: usize| (cell as f64 - (CELLS / 2) as f64) / f64::from(CELLS_PER_UNIT);
        let cdf: Vec<_> = (0..=CELLS).map(|cell| law.cdf(edge(cell))).collect();
        let draws = self.0.iter().map(|&n| f64::from(n)).sum::<f64>();

        let (mut below, mut distance) = (0.0, 0f64);
        for (&n, cdf) in self.0.iter().zip(&cdf[1..]) {
            below += f64::from(n);
            distance = distance.max((below / draws - cdf).abs());
        }
        // Massart's form of the Dvoretzky–Kiefer–Wolfowitz inequality.
        let upper = (2.0 * (-2.0 * draws * distance * distance).exp()).min(1.0);
        out.push(Finding { test: "Kolmogorov-Smirnov".into(), lower: 1.0, upper, uniform: false });

        let edges = (0..=BINS).map(|bin| cdf.partition_point(|&p| p < bin as f64 / BINS as f64).min(CELLS));
        let edges: Vec<_> = edges.collect();
        let cells = edges.windows(2).map(|edge| {
            let observed = self.0[edge[0]..edge[1]].iter().map(|&n| f64::from(n)).sum();
            (observed, draws * (cdf[edge[1]] - cdf[edge[0]]))
        });
        out.push(Finding::chi_squared("histogram", cells));

        for t in [3.0, 4.0, 5.0, 5.5, 6.0] {
            let cell = CELLS / 2 - (t * f64::from(CELLS_PER_UNIT)) as usize;
            let mean = draws * law.cdf(-t);
            for (side, tail) in [("below -", &self.0[..cell]), ("above ", &self.0[CELLS - cell..])] {
                let count = tail.iter().map(|&n| u64::from(n)).sum();
                out.push(Finding::poisson(format!("{side}{t}"), count, mean));
            }
        }
    }
}

/// Power of each frequency in blocks of draws, and from it the circular correlation at each distance.
struct Spectrum {
    name: &'static str,
    fft: Arc<dyn RealToComplex<f32>>,
    block: Vec<f32>,
    frequencies: Vec<Complex<f32>>,
    power: Vec<f64>,
    blocks: f64,
}

impl Spectrum {
    fn new(name: &'static str) -> Self {
        let fft = RealFftPlanner::new().plan_fft_forward(CHUNK);
        let (block, frequencies) = (fft.make_input_vec(), fft.make_output_vec());
        Self { name, power: vec![0.0; frequencies.len()], fft, block, frequencies, blocks: 0.0 }
    }

    /// A chunk of values with mean 0 and variance 1.
    fn feed(&mut self, values: impl Iterator<Item = f32>) {
        for (to, from) in self.block.iter_mut().zip(values) {
            *to = from;
        }
        self.fft.process(&mut self.block, &mut self.frequencies).expect("lengths are the plan's");
        for (power, frequency) in self.power.iter_mut().zip(&self.frequencies) {
            *power += f64::from(frequency.norm_sqr());
        }
        self.blocks += 1.0;
    }

    fn findings(&self, out: &mut Vec<Finding>) {
        // Without the first and the last frequency, whose power has another law. Twice a power over CHUNK is χ² with two
        // degrees of freedom; the largest and the least are judged by that law, which is far from normal for few blocks.
        let inner: Vec<_> = self.power[1..CHUNK / 2].iter().map(|power| power / CHUNK as f64).collect();
        let (name, count) = (self.name, inner.len());
        let sum: f64 = inner.iter().map(|power| (power - self.blocks).powi(2) / self.blocks).sum();
        // Each term has variance 2 + 6/blocks.
        let deviation = (count as f64 * (2.0 + 6.0 / self.blocks)).sqrt();
        out.push(Finding::normal(format!("spectrum of {name}"), (sum - count as f64) / deviation));
        let (least, largest) =
            inner.iter().fold((f64::MAX, 0f64), |(l, h), &power| (l.min(power), h.max(power)));
        let law = ChiSquared::new(2.0 * self.blocks).expect("degrees of freedom");
        let upper = (count as f64 * (law.cdf(2.0 * least) + law.sf(2.0 * largest))).min(1.0);
        out.push(Finding { test: format!("extreme frequency of {name}"), lower: 1.0, upper, uniform: false });

        // The inverse transform of the power is the sum of products at each distance.
        let mut planner = RealFftPlanner::<f64>::new();
        let inverse = planner.plan_fft_inverse(CHUNK);
        let mut power: Vec<_> = self.power.iter().map(|&power| Complex::new(power, 0.0)).collect();
        let mut products = inverse.make_output_vec();
        inverse.process(&mut power, &mut products).expect("lengths are the plan's");
        let deviation = (self.blocks * CHUNK as f64).sqrt() * CHUNK as f64;
        let distances = &products[1..CHUNK / 2];
        let largest = distances.iter().fold(0f64, |largest, sum| largest.max((sum / deviation).abs()));
        out.push(Finding::largest(format!("largest correlation of {name}"), largest, distances.len()));
    }
}

/// All tests on the first `1 << log2_draws` normals of a walk; spectra see one chunk of `spectra`.
pub fn run<G: Generator>(axis: Axis, log2_draws: u32, spectra: u64) -> Vec<Finding> {
    let mut stream = Stream::<G>::new(axis);
    let (mut words, mut draws) = (vec![0; CHUNK], vec![0f32; CHUNK]);
    let mut moments = Moments { sums: [0.0; ORDERS], draws: 0.0 };
    let mut histogram = Histogram(vec![0; CELLS]);
    let (mut plain, mut squares) = (Spectrum::new("draws"), Spectrum::new("squares"));
    for chunk in 0..(1u64 << log2_draws) / CHUNK as u64 {
        stream.read(&mut words);
        wide::run::<G>(Transform::<G>(&words, &mut draws, PhantomData));
        moments.feed(&draws);
        histogram.feed(&draws);
        if chunk % spectra == 0 {
            plain.feed(draws.iter().copied());
            // The variance of n² is 2.
            squares.feed(draws.iter().map(|n| (n * n - 1.0) * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
    let mut findings = Vec::new();
    moments.findings(&mut findings);
    histogram.findings(&mut findings);
    plain.findings(&mut findings);
    squares.findings(&mut findings);
    findings
}
