//! Streams of raw words: walks through the addresses of the noise.

use crate::generator::{Address, Generator};
use crate::wide::{self, Loop};
use std::marker::PhantomData;
use std::sync::LazyLock;

macro_rules! axes {
    ($($name:ident $walk:literal)*) => {
        /// How a stream walks through the addresses.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Axis { $(#[doc = $walk] $name,)* }

        impl Axis {
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The walk in words: the index that moves fastest comes last.
            pub fn walk(self) -> &'static str {
                match self { $(Self::$name => $walk,)* }
            }
        }
    };
}

axes! {
    Channel "token, channel"
    ChannelHigh "token bit-reversed, channels 2^20 apart"
    Token "channel, token"
    TokenHigh "channel, sample, tokens 2^20 apart"
    Sample "sample"
    SampleHigh "sample, samples 2^44 apart"
    Branch "sample, all 256 branches"
    Layer "step, layer"
    LayerHigh "channel, step, layers 2^20 apart"
    Step "step"
    StepHigh "step, steps 2^52 apart"
    Seed "seed"
    SeedHigh "seed, seeds 2^52 apart"
    PerToken "BTC in training: step, 12 layers, 2 branches, 64 samples, 197 tokens, 768 channels"
    PerSample "BC in training: step, 12 layers, 2 branches, 64 samples, 768 channels"
    Transposed "BTC transposed: step, 768 channels, 64 samples, 197 tokens"
    Columns "BC transposed: step, 12 layers, 768 channels, 2 branches, 64 samples"
    SmallKeys "channel, 16 seeds, 16 steps, 16 layers"
    FewBits "seeds with at most 3 bits set, counters with at most 3 bits set"
    Places "the four words of 4096 calls: all first words, all second words, ..."
    PairSeed "seeds that differ in one of 64 bits, call by call"
    PairStep "steps n and n + 1, call by call"
    PairBranch "branches 0 and 1, call by call"
    PairLayer "layers l and l + 1, call by call"
    XorSeed "xor of seeds that differ in one of 64 bits"
    XorStep "xor of steps n and n + 1"
    XorBranch "xor of branches 0 and 1"
    XorLayer "xor of layers l and l + 1"
    XorSample "xor of samples s and s + 1"
    XorAddress "xor of counters that differ in one of the 114 upper bits"
    Keys "keys of 12 layers, by step"
    DropPath "words of the DropPath mask, by sample"
}

/// Calls in a row of most streams.
const ROW: u32 = 1 << 12;
/// Groups of four channels in a row of 768.
const GROUPS: u32 = 192;
const TOKENS: u32 = 197;
const GROUP_MASK: u32 = (1 << 30) - 1;
/// The token that stands for all of them in BC noise.
const PER_SAMPLE: u32 = u32::MAX;
const DROP_PATH: u32 = u32::MAX - 1;

/// Every set of at most three of `bits` bits.
fn few_bits(bits: u32) -> impl Iterator<Item = u128> {
    let bit = move |i: u32| if i == bits { 0 } else { 1u128 << i };
    // Ascending, where the last index, `bits`, stands for no bit and may repeat.
    (0..=bits).flat_map(move |a| {
        (if a == bits { a } else { a + 1 }..=bits).flat_map(move |b| {
            (if b == bits { b } else { b + 1 }..=bits).map(move |c| bit(a) | bit(b) | bit(c))
        })
    })
}

static FEW_BIT_COUNTERS: LazyLock<Vec<[u32; 4]>> = LazyLock::new(|| {
    // The upper two bits of the group are no address.
    few_bits(126)
        .map(|set| {
            let set = set & u128::from(GROUP_MASK) | set >> 30 << 32;
            std::array::from_fn(|word| (set >> (32 * word)) as u32)
        })
        .collect()
});
static FEW_BIT_SEEDS: LazyLock<Vec<u64>> = LazyLock::new(|| few_bits(64).map(|set| set as u64).collect());

/// Writes the words of calls 0, 1, … sixteen side by side.
///
/// A macro, because a closure would be compiled once for all processors instead of in each variant of [`widest`].
macro_rules! calls {
    ($out:expr, $calls:expr, |$i:ident| $words:expr) => {{
        const LANES: usize = 16;
        let out: &mut Vec<u32> = $out;
        out.clear();
        let calls: u32 = $calls;
        for first in (0..calls).step_by(LANES) {
            let block: [_; LANES] = {
                let mut block = [Default::default(); LANES];
                for (lane, words) in block.iter_mut().enumerate() {
                    let $i = first + lane as u32;
                    *words = $words;
                }
                block
            };
            let n = LANES.min((calls - first) as usize);
            out.extend_from_slice(block[..n].as_flattened());
        }
    }};
}

#[inline(always)]
fn xor(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
    std::array::from_fn(|i| a[i] ^ b[i])
}

#[inline(always)]
fn eight(a: [u32; 4], b: [u32; 4]) -> [u32; 8] {
    std::array::from_fn(|i| if i < 4 { a[i] } else { b[i - 4] })
}

/// One row of a walk.
struct Row<'a, G> {
    axis: Axis,
    row: u64,
    out: &'a mut Vec<u32>,
    generator: PhantomData<G>,
}

impl<G: Generator> Loop for Row<'_, G> {
    #[inline(always)]
    fn run(self) {
        let Self { axis, row, out, .. } = self;
        let zero = Address::default();
        let (low, next) = ((row as u32) << 12, row << 12);
        match axis {
            Axis::Channel => {
                let (group, token) = (low & GROUP_MASK, (row >> 18) as u32);
                calls!(out, ROW, |i| G::at(Address { group: group | i, token, ..zero }));
            }
            Axis::ChannelHigh => {
                let token = (row as u32).reverse_bits();
                calls!(out, ROW, |i| G::at(Address { group: i << 18, token, ..zero }));
            }
            Axis::Token => {
                let (token, group) = (low & 0xF_FFFF, (row >> 8) as u32);
                calls!(out, ROW, |i| G::at(Address { group, token: token | i, ..zero }));
            }
            Axis::TokenHigh => {
                let (group, sample) = ((row >> 20) as u32, row & 0xF_FFFF);
                calls!(out, ROW, |i| G::at(Address { group, sample, token: i << 20, ..zero }));
            }
            Axis::Sample => calls!(out, ROW, |i| G::at(Address { sample: next | u64::from(i), ..zero })),
            Axis::SampleHigh => {
                calls!(out, ROW, |i| G::at(Address { sample: u64::from(i) << 44 | row, ..zero }));
            }
            Axis::Branch => calls!(out, 256, |branch| G::at(Address { branch, sample: row, ..zero })),
            Axis::Layer => {
                let step = row >> 20;
                calls!(out, ROW, |i| G::at(Address { step, layer: low | i, ..zero }));
            }
            Axis::LayerHigh => {
                let (group, step) = ((row >> 20) as u32, row & 0xF_FFFF);
                calls!(out, ROW, |i| G::at(Address { group, step, layer: i << 20, ..zero }));
            }
            Axis::Step => calls!(out, ROW, |i| G::at(Address { step: next | u64::from(i), ..zero })),
            Axis::StepHigh => calls!(out, ROW, |i| G::at(Address { step: u64::from(i) << 52 | row, ..zero })),
            Axis::Seed => calls!(out, ROW, |i| G::at(Address { seed: next | u64::from(i), ..zero })),
            Axis::SeedHigh => calls!(out, ROW, |i| G::at(Address { seed: u64::from(i) << 52 | row, ..zero })),
            Axis::SmallKeys => calls!(out, ROW, |i| {
                let (seed, step) = (u64::from(i >> 8), u64::from(i >> 4 & 15));
                G::at(Address { seed, step, layer: i & 15, group: row as u32, ..zero })
            }),
            Axis::FewBits => few_bits_row::<G>(out, row),
            Axis::Places => {
                let mut in_order = Vec::new();
                calls!(&mut in_order, ROW, |i| G::at(Address { group: low | i, ..zero }));
                out.clear();
                out.extend((0..4).flat_map(|place| in_order[place..].iter().step_by(4)));
            }
            Axis::Keys => calls!(out, 12, |layer| G::key(0, row, layer)),
            Axis::DropPath => calls!(out, ROW, |i| {
                let sample = next | u64::from(i);
                [G::at(Address { token: DROP_PATH, sample, ..zero })[0]]
            }),
            Axis::PerToken | Axis::PerSample | Axis::Transposed | Axis::Columns => {
                training::<G>(axis, row, out);
            }
            _ => related::<G>(axis, row, out),
        }
    }
}

#[inline(always)]
fn few_bits_row<G: Generator>(out: &mut Vec<u32>, row: u64) {
    let counters: &[[u32; 4]] = &FEW_BIT_COUNTERS;
    let rows = counters.len().div_ceil(ROW as usize) as u64;
    let counters = counters.chunks(ROW as usize).nth((row % rows) as usize).unwrap_or_default();
    let key = G::key(FEW_BIT_SEEDS[(row / rows) as usize], 0, 0);
    calls!(out, counters.len() as u32, |i| {
        // Lanes beyond the last counter are not written.
        G::words(counters.get(i as usize).copied().unwrap_or_default(), key)
    });
}

/// Walks in the orders of training: 64 samples, 197 tokens, 768 channels.
#[inline(always)]
fn training<G: Generator>(axis: Axis, row: u64, out: &mut Vec<u32>) {
    let zero = Address::default();
    // The mixed-radix digits of the row, last index first; what is left is the step.
    let mut rest = row;
    let mut digit = |radix: u64| {
        let digit = rest % radix;
        rest /= radix;
        digit
    };
    match axis {
        Axis::PerToken => {
            let token = digit(TOKENS.into()) as u32;
            let (sample, branch, layer) = (digit(64), digit(2) as u32, digit(12) as u32);
            let (step, sample) = (rest, 64 * rest + sample);
            calls!(out, GROUPS, |group| G::at(Address {
                seed: 0,
                step,
                layer,
                branch,
                sample,
                token,
                group
            }));
        }
        Axis::PerSample => {
            let (sample, branch, layer) = (digit(64), digit(2) as u32, digit(12) as u32);
            let (step, sample, token) = (rest, 64 * rest + sample, PER_SAMPLE);
            calls!(out, GROUPS, |group| G::at(Address {
                seed: 0,
                step,
                layer,
                branch,
                sample,
                token,
                group
            }));
        }
        Axis::Transposed => {
            let (sample, group) = (digit(64), digit(GROUPS.into()) as u32);
            let (step, sample) = (rest, 64 * rest + sample);
            calls!(out, TOKENS, |token| G::at(Address { step, sample, token, group, ..zero }));
        }
        _ => {
            let (branch, group) = (digit(2) as u32, digit(GROUPS.into()) as u32);
            let (layer, token) = (digit(12) as u32, PER_SAMPLE);
            let (step, first) = (rest, 64 * rest);
            calls!(out, 64, |i| {
                let sample = first + u64::from(i);
                G::at(Address { seed: 0, step, layer, branch, sample, token, group })
            });
        }
    }
}

/// Two related streams: call by call, or their exclusive or. The sample is the row's number, so that no address comes
/// twice.
#[inline(always)]
fn related<G: Generator>(axis: Axis, row: u64, out: &mut Vec<u32>) {
    let a = Address { sample: row, ..Address::default() };
    let (seed, step, layer) = (row / 64, row, row as u32);
    let (a, b) = match axis {
        Axis::PairSeed | Axis::XorSeed => {
            (Address { seed, ..a }, Address { seed: seed ^ 1 << (row % 64), ..a })
        }
        Axis::PairStep | Axis::XorStep => (Address { step, ..a }, Address { step: step + 1, ..a }),
        Axis::PairBranch | Axis::XorBranch => (a, Address { branch: 1, ..a }),
        Axis::PairLayer | Axis::XorLayer => {
            (Address { layer, ..a }, Address { layer: layer.wrapping_add(1), ..a })
        }
        Axis::XorSample => (a, Address { sample: row + 1, ..a }),
        _ => {
            // Not one of the bits that a row runs through: those pairs would come twice.
            let flip = 1u128 << (12 + row % 114);
            let b = Address {
                group: (flip as u32) & GROUP_MASK,
                token: (flip >> 30) as u32,
                sample: a.sample ^ ((flip >> 62) as u64 & ((1 << 56) - 1)),
                branch: (flip >> 118) as u32,
                ..a
            };
            (a, b)
        }
    };
    if matches!(axis, Axis::PairSeed | Axis::PairStep | Axis::PairBranch | Axis::PairLayer) {
        calls!(out, ROW / 2, |i| {
            eight(G::at(Address { group: i, ..a }), G::at(Address { group: b.group ^ i, ..b }))
        });
    } else {
        calls!(out, ROW, |i| {
            xor(G::at(Address { group: i, ..a }), G::at(Address { group: b.group ^ i, ..b }))
        });
    }
}

/// The words of a walk, one after another.
pub struct Stream<G> {
    axis: Axis,
    row: u64,
    words: Vec<u32>,
    read: usize,
    generator: PhantomData<G>,
}

impl<G: Generator> Stream<G> {
    pub fn new(axis: Axis) -> Self {
        Self { axis, row: 0, words: Vec::new(), read: 0, generator: PhantomData }
    }

    /// The next words.
    pub fn read(&mut self, mut out: &mut [u32]) {
        while !out.is_empty() {
            if self.read == self.words.len() {
                let (axis, row) = (self.axis, self.row);
                wide::run::<G>(Row::<G> { axis, row, out: &mut self.words, generator: PhantomData });
                (self.row, self.read) = (row + 1, 0);
            }
            let words = &self.words[self.read..];
            let n = words.len().min(out.len());
            out[..n].copy_from_slice(&words[..n]);
            self.read += n;
            out = &mut out[n..];
        }
    }
}
