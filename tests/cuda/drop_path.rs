//! Shared DropPath in f32, f16 and bf16: bitwise what its documentation says, and close to the CPU operator.

use crate::device::Opened;
use crate::machine::{Machine, Target};
use crate::support::{Type, compare, key, rounded, wide};
use crate::uniform;
use half::{bf16, f16};
use pace_kernels::cpu;
use pace_kernels::cuda::{Direction, DropPath, Mask, MaskSource};
use pace_kernels::noise::{Key, drop_path_mask};

#[derive(Debug, Clone, Copy)]
enum Source {
    /// Any values.
    Given,
    /// The same value for every sample.
    Constant(f32),
    Generated(f64),
    /// Generated, with a key in device memory.
    Keyed(f64),
}

const SOURCES: [Source; 5] = [
    Source::Given,
    Source::Constant(0.0),
    Source::Generated(0.0),
    Source::Generated(0.5),
    Source::Keyed(0.3),
];

#[derive(Debug, Clone, Copy)]
struct Case {
    branches: usize,
    batch: usize,
    features: usize,
    source: Source,
    direction: Direction,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

/// The samples' numbers cross 2³².
const FIRST_SAMPLE: u64 = (1 << 32) - 2;

fn cases() -> Vec<Case> {
    // Features around vectors of 4 and 8 elements, the two that a thread has of an item, and the 256 threads of a block; batches
    // around the 256 terms that a block adds at once.
    let sizes = [
        (1, 1, 1),
        (2, 3, 3),
        (1, 2, 4),
        (2, 2, 5),
        (2, 1, 7),
        (1, 5, 8),
        (2, 33, 9),
        (2, 2, 31),
        (1, 1, 32),
        (2, 65, 33),
        (2, 3, 100),
        (1, 255, 2),
        (2, 256, 1),
        (1, 257, 3),
        (2, 300, 8),
        (1, 1, 4095),
        (2, 1, 4096),
        (1, 2, 4097),
        (1, 1, 8192),
        (2, 1, 8200),
    ];
    let variants = [(Direction::Forward, 0), (Direction::Backward, 1)];
    let all = sizes.into_iter().flat_map(|size| variants.map(|variant| (size, variant)));
    // The sources take turns: each meets sizes of every kind.
    all.zip(SOURCES.into_iter().cycle())
        .map(|(((branches, batch, features), (direction, shift)), source)| Case {
            branches,
            batch,
            features,
            source,
            direction,
            shift,
        })
        .collect()
}

impl Case {
    fn mask(&self) -> Vec<f32> {
        let mut mask = vec![0f32; self.batch];
        match self.source {
            Source::Given => return uniform(3, self.batch),
            Source::Constant(value) => mask.fill(value),
            Source::Generated(p) | Source::Keyed(p) => {
                drop_path_mask(key(), p, FIRST_SAMPLE, &mut mask).unwrap();
            }
        }
        mask
    }

    fn operator<T: Type>(&self, input: &[T], machine: &mut Machine<'_>) -> DropPath {
        let &Self { branches, batch, features, source, direction, .. } = self;
        let first_sample = FIRST_SAMPLE;
        let mask = match source {
            Source::Given | Source::Constant(_) => MaskSource::Given(machine.input("mask", &self.mask())),
            Source::Generated(drop_probability) => {
                MaskSource::Generated { key: key(), key_address: None, drop_probability, first_sample }
            }
            Source::Keyed(drop_probability) => {
                let key_address = Some(machine.input("key", &[u64::from(key())]));
                MaskSource::Generated { key: Key([0, 0]), key_address, drop_probability, first_sample }
            }
        };
        let (input, output) = (machine.input("input", input), machine.output::<T>("output", input.len()));
        DropPath { branches, batch, features, mask, direction, dtype: T::DTYPE, input, output }
    }
}

/// Input of a case, and what has to come out.
fn data<T: Type>(case: &Case) -> (Vec<T>, Vec<T>) {
    let Case { branches, batch, features, direction, .. } = *case;
    let (input, mask) = (rounded::<T>(1, branches * batch * features), case.mask());
    // The sums of these masks are exact, in any order.
    let mean = mask.iter().copied().map(f64::from).sum::<f64>() / batch as f64;
    let scale = (1.0 / (mean + 1e-12)) as f32;
    let product = |(i, x): (usize, &T), factor: &dyn Fn(f32) -> f32| {
        T::round((x.widen() * factor(mask[i / features % batch])).into())
    };
    let want: Vec<T> = input.iter().enumerate().map(|at| product(at, &|mask| mask * scale)).collect();
    // The same with every operation rounded to the tensors' type.
    let round = |value: f32| T::round(value.into()).widen();
    let unfused: Vec<T> =
        input.iter().enumerate().map(|at| product(at, &|mask| round(round(mask) * round(scale)))).collect();
    let mut exact = vec![0.0; input.len()];
    let (mask, wide_input) = (wide(&mask), wide(&input));
    let (result, done) = match direction {
        Direction::Forward => {
            ("y", cpu::shared_drop_path(branches, features, &mask, &wide_input, &mut exact))
        }
        Direction::Backward => {
            ("dx", cpu::shared_drop_path_backward(branches, features, &mask, &wide_input, &mut exact))
        }
    };
    done.unwrap();
    compare(result, case, &want, &unfused, &exact);
    (input, want)
}

fn typed<T: Type>(case: &Case, target: &Target<'_>) {
    let (input, want) = data::<T>(case);
    // As many blocks as there are items, one, and some of which the last has less to do or nothing.
    for blocks in [None, Some(1), Some(2), Some(3)] {
        target.run(case.shift, |machine| {
            let operator = case.operator(&input, machine);
            let mut plan = operator.plan().unwrap();
            plan.launches_mut().for_each(|launch| launch.grid[0] = blocks.unwrap_or(launch.grid[0]));
            machine.launch(&plan);
            assert!(machine.read::<T>(operator.output) == want, "{case:?} {:?}", T::DTYPE);
        });
    }
}

pub fn test(target: &Target<'_>) {
    for case in cases() {
        typed::<f32>(&case, target);
        typed::<f16>(&case, target);
        typed::<bf16>(&case, target);
    }
}

/// The safe methods, on half-open views of larger tensors.
pub fn safe_methods(opened: &Opened) {
    let Opened { device, stream } = opened;
    for case in cases() {
        let Case { branches, batch, features, source, direction, shift } = case;
        let (input, want) = data::<f16>(&case);
        let mask = opened.upload(shift, &case.mask());
        let mask = mask.slice(shift..);
        let address = opened.upload(0, &[u64::from(key())]);
        let first_sample = FIRST_SAMPLE;
        let mask = match source {
            Source::Given | Source::Constant(_) => Mask::Given(&mask),
            Source::Generated(drop_probability) => {
                Mask::Generated { key: key(), key_address: None, drop_probability, first_sample }
            }
            Source::Keyed(drop_probability) => {
                let key_address = Some(&address as _);
                Mask::Generated { key: Key([0, 0]), key_address, drop_probability, first_sample }
            }
        };
        let (from, mut to) = (opened.upload(shift, &input), opened.upload(shift, &input));
        let (x, mut y) = (from.slice(shift..), to.slice_mut(shift..));
        match direction {
            Direction::Forward => {
                device.shared_drop_path::<f16>(branches, batch, features, mask, &x, &mut y, stream)
            }
            Direction::Backward => {
                device.shared_drop_path_backward::<f16>(branches, batch, features, mask, &x, &mut y, stream)
            }
        }
        .unwrap();
        assert!(opened.download(shift, &to) == want, "{case:?}");
    }
}
