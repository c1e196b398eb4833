//! The noisy epilogue in f32, f16 and bf16: bitwise what its documentation says, and close to the CPU operator.

use crate::machine::{Machine, Target};
use crate::support::{SOURCES, Type, Z, compare, rounded, wide};
use crate::{device, output_shape};
use half::{bf16, f16};
use pace_kernels::LinearShape;
use pace_kernels::cpu;
use pace_kernels::cuda::{Direction, NoisyEpilogue};

#[derive(Debug, Clone, Copy)]
struct Case {
    shape: LinearShape,
    z: Z,
    direction: Direction,
    /// Elements past an aligned address at which tensors start.
    shift: usize,
}

fn cases() -> Vec<Case> {
    // Channels around vectors of 4 and 8 elements and blocks of 32 of them; tokens around a block's 8, the batch of 4 that
    // a thread loads at once, and the 64 of a unit.
    let sizes = [
        (1, 1, 1, 1),
        (2, 2, 1, 2),
        (1, 2, 2, 3),
        (2, 1, 3, 4),
        (1, 3, 7, 5),
        (2, 1, 8, 7),
        (2, 2, 9, 8),
        (1, 1, 33, 9),
        (2, 5, 1, 15),
        (1, 1, 64, 16),
        (2, 1, 65, 17),
        (1, 2, 10, 24),
        (2, 3, 3, 100),
        (1, 1, 5, 127),
        (1, 2, 3, 128),
        (1, 1, 4, 129),
        (1, 1, 3, 256),
        (1, 1, 2, 257),
        (2, 1, 197, 20),
    ];
    let mut cases = Vec::new();
    for (branches, batch, tokens, channels) in sizes {
        for z in SOURCES {
            for direction in [Direction::Forward, Direction::Backward] {
                for shift in [0, 1] {
                    let shape = output_shape(branches, batch, tokens, channels);
                    cases.push(Case { shape, z, direction, shift });
                }
            }
        }
    }
    cases
}

/// Operands of one case, and what has to come out.
struct Data<T> {
    input: Vec<T>,
    /// `y` before the forward pass; nothing the backward pass would read.
    before: Vec<T>,
    want: Vec<T>,
}

impl<T: Type> Data<T> {
    fn new(case: &Case) -> Self {
        let len = case.shape.out_rows() * case.shape.out_features;
        let (input, before) = (rounded::<T>(1, len), rounded::<T>(2, len));
        let z = case.z.written_out(&case.shape);
        let operands = || z.iter().zip(&input).zip(&before);
        let round = |value: f32| T::round(value.into());
        let want: Vec<T> = match case.direction {
            Direction::Forward => {
                operands().map(|((z, a), y)| round(z.mul_add(a.widen(), y.widen()))).collect()
            }
            Direction::Backward => operands().map(|((z, dy), _)| round(z * dy.widen())).collect(),
        };
        // The same with every operation rounded to the tensors' type.
        let product = |z: f32, a: T| round(round(z).widen() * a.widen());
        let unfused: Vec<T> = match case.direction {
            Direction::Forward => {
                operands().map(|((z, a), y)| round(product(*z, *a).widen() + y.widen())).collect()
            }
            Direction::Backward => operands().map(|((z, dy), _)| product(*z, *dy)).collect(),
        };
        let given: Vec<f64> = case.z.given(&case.shape).into_iter().map(f64::from).collect();
        let (noise, mut exact) = (case.z.cpu(&given), wide(&before));
        let wide_input = wide(&input);
        let (result, done) = match case.direction {
            Direction::Forward => ("y", cpu::noisy_epilogue(case.shape, noise, &wide_input, &mut exact)),
            Direction::Backward => {
                ("da", cpu::noisy_epilogue_backward(case.shape, noise, &wide_input, &mut exact))
            }
        };
        done.unwrap();
        compare(result, case, &want, &unfused, &exact);
        Self { input, before, want }
    }

    /// Operands on a machine, and the operator on them.
    fn operator(&self, case: &Case, machine: &mut Machine<'_>) -> NoisyEpilogue {
        let (input, output) = match case.direction {
            Direction::Forward => (machine.input("a", &self.input), machine.in_out("y", &self.before)),
            Direction::Backward => {
                (machine.input("dy", &self.input), machine.output::<T>("da", self.before.len()))
            }
        };
        let noise = case.z.source(&case.shape, machine);
        NoisyEpilogue { shape: case.shape, noise, direction: case.direction, dtype: T::DTYPE, input, output }
    }
}

fn typed<T: Type>(case: &Case, target: &Target<'_>) {
    let data = Data::<T>::new(case);
    target.run(case.shift, |machine| {
        let operator = data.operator(case, machine);
        machine.launch(&operator.plan().unwrap());
        assert!(machine.read::<T>(operator.output) == data.want, "{case:?} {:?}", T::DTYPE);
    });
}

pub fn test(target: &Target<'_>) {
    for case in cases() {
        typed::<f32>(&case, target);
        typed::<f16>(&case, target);
        typed::<bf16>(&case, target);
    }
}

/// Results do not depend on how many blocks share the work, nor on how a block's threads are arranged.
pub fn any_grid(target: &Target<'_>) {
    for case in cases() {
        let data = Data::<f16>::new(&case);
        for (rows, block) in [(1, None), (2, None), (1, Some([32, 1, 1])), (3, Some([32, 2, 4]))] {
            target.run(case.shift, |machine| {
                let operator = data.operator(&case, machine);
                let mut plan = operator.plan().unwrap();
                let launch = plan.launches_mut().next().unwrap();
                launch.grid[1] = rows;
                if let Some(block) = block {
                    launch.block = block;
                    launch.grid[0] = case.shape.out_features.div_ceil(8 * 32) as u32;
                }
                machine.launch(&plan);
                assert!(machine.read::<f16>(operator.output) == data.want, "{case:?} {plan:?}");
            });
        }
    }
}

/// The safe methods, on half-open views of larger tensors.
pub fn safe_methods(opened: &device::Opened) {
    let device::Opened { device, stream } = opened;
    for case in cases().iter().filter(|case| matches!(case.z, Z::Generated(_))) {
        let data = Data::<f32>::new(case);
        let shift = case.shift;
        let (input, mut output) = (opened.upload(shift, &data.input), opened.upload(shift, &data.before));
        let Z::Generated(noise) = case.z else { unreachable!("filtered") };
        let generator = crate::support::generator(noise, crate::support::key());
        let noise = pace_kernels::cuda::Noise::Generated(generator);
        let (from, mut to) = (input.slice(shift..), output.slice_mut(shift..));
        match case.direction {
            Direction::Forward => device.noisy_epilogue::<f32>(case.shape, noise, &from, &mut to, stream),
            Direction::Backward => {
                device.noisy_epilogue_backward::<f32>(case.shape, noise, &from, &mut to, stream)
            }
        }
        .unwrap();
        assert!(opened.download(shift, &output) == data.want, "{case:?}");
    }
}
