//! Where a test runs: the simulator, or a device, with plans of one family. A test is written once, against plans and buffers.

use crate::device::Opened;
use crate::simulate::Launched;
use crate::{schedules, simulate};
use bytemuck::Pod;
use pace_kernels::cuda::cudarc::driver::{CudaSlice, DevicePtr};
use pace_kernels::cuda::{Buffer, Gpu, Plan};
use pace_simt::{Memory, Schedule, Tensor};
use std::collections::HashMap;

/// What to run tests on: what plans are made for, and a machine.
pub struct Target<'a> {
    pub gpu: Gpu,
    /// A device, or else the simulator.
    pub device: Option<&'a Opened>,
}

impl Target<'_> {
    /// Runs `body` on an empty machine whose tensors start `shift` elements past an aligned address. In the simulator it
    /// runs again and again with threads in other orders, and has to find the same each time.
    pub fn run(&self, shift: usize, body: impl Fn(&mut Machine<'_>)) {
        // What sanitizers look for depends little on the order: one does.
        let (first, seed) = match pace_simt::IS_SANITIZED {
            true => (Schedule::Random(0), 1),
            false => (Schedule::InOrder, 0),
        };
        let launched = self.run_once(first, shift, &body);
        if self.device.is_none() {
            let seeds = schedules::of_case(launched.threads, &launched.kernels);
            (seed..seeds).for_each(|seed| {
                self.run_once(Schedule::Random(seed), shift, &body);
            });
        }
    }

    /// The same, but once and with threads in their order. Gives what was launched in the simulator.
    pub fn once(&self, shift: usize, body: impl Fn(&mut Machine<'_>)) -> Launched {
        self.run_once(Schedule::InOrder, shift, &body)
    }

    /// Without a parameter for the body's type: there are many of them.
    fn run_once(&self, schedule: Schedule, shift: usize, body: &dyn Fn(&mut Machine<'_>)) -> Launched {
        let place = match self.device {
            Some(opened) => Place::Device { opened, memory: HashMap::new() },
            None => {
                let (memory, tensors) = (Memory::new(shift), HashMap::new());
                Place::Simulator { memory, tensors, schedule, launched: Launched::default() }
            }
        };
        let mut machine = Machine { gpu: self.gpu, shift, place };
        body(&mut machine);
        match machine.place {
            Place::Simulator { launched, .. } => launched,
            Place::Device { .. } => Launched::default(),
        }
    }
}

enum Place<'a> {
    Simulator { memory: Memory, tensors: HashMap<u64, Tensor>, schedule: Schedule, launched: Launched },
    Device { opened: &'a Opened, memory: HashMap<u64, CudaSlice<u8>> },
}

/// Memory, and something that runs plans on it.
pub struct Machine<'a> {
    /// What plans are made for.
    pub gpu: Gpu,
    shift: usize,
    place: Place<'a>,
}

impl Machine<'_> {
    /// A tensor that kernels may read.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T]) -> Buffer {
        match &mut self.place {
            Place::Simulator { memory, tensors, .. } => keep(tensors, memory.input(name, values)),
            Place::Device { .. } => self.upload(values),
        }
    }

    /// A tensor that kernels may read and write.
    pub fn in_out<T: Pod>(&mut self, name: &str, values: &[T]) -> Buffer {
        match &mut self.place {
            Place::Simulator { memory, tensors, .. } => keep(tensors, memory.in_out(name, values)),
            Place::Device { .. } => self.upload(values),
        }
    }

    /// A tensor that kernels have to write before anybody reads it; on a device it holds NaN.
    pub fn output<T: Pod>(&mut self, name: &str, len: usize) -> Buffer {
        match &mut self.place {
            Place::Simulator { memory, tensors, .. } => keep(tensors, memory.output::<T>(name, len)),
            Place::Device { .. } => {
                let poison: Vec<T> = bytemuck::pod_collect_to_vec(&vec![0xFFu8; len * size_of::<T>()]);
                self.upload(&poison)
            }
        }
    }

    fn upload<T: Pod>(&mut self, values: &[T]) -> Buffer {
        let Place::Device { opened, memory } = &mut self.place else {
            unreachable!("only called with a device");
        };
        let bytes: Vec<u8> = vec![0; self.shift * size_of::<T>()]
            .into_iter()
            .chain(bytemuck::cast_slice(values).iter().copied())
            .collect();
        let slice = opened.stream.clone_htod(&bytes).unwrap();
        let start = slice.device_ptr(&opened.stream).0;
        let address = start + (self.shift * size_of::<T>()) as u64;
        memory.insert(address, slice);
        Buffer { address, len: values.len() }
    }

    /// Overwrites a tensor that is not an input, as a copy from the host would.
    pub fn write<T: Pod>(&mut self, buffer: Buffer, values: &[T]) {
        match &mut self.place {
            Place::Simulator { memory, tensors, .. } => memory.write(&tensors[&buffer.address], values),
            Place::Device { opened, memory } => {
                let slice = memory.get_mut(&buffer.address).expect("a tensor of this machine");
                let mut slice = slice.slice_mut(self.shift * size_of::<T>()..);
                opened.stream.memcpy_htod::<u8, _, _>(bytemuck::cast_slice(values), &mut slice).unwrap();
            }
        }
    }

    /// Carries out a plan.
    pub fn launch(&mut self, plan: &Plan) {
        match &mut self.place {
            Place::Simulator { memory, schedule, launched, .. } => {
                simulate::run(plan, memory, *schedule, launched);
            }
            Place::Device { opened, .. } => {
                // SAFETY: tests make their plans from buffers of this machine, which live as long as it does.
                unsafe { opened.device.launch(plan, &opened.stream) }.unwrap();
            }
        }
    }

    /// The values of a tensor, all of which must have been written.
    pub fn read<T: Pod>(&self, buffer: Buffer) -> Vec<T> {
        match &self.place {
            Place::Simulator { memory, tensors, .. } => {
                memory.read(&tensors[&buffer.address]).unwrap_or_else(|fault| panic!("{fault}"))
            }
            Place::Device { opened, memory } => {
                let bytes = opened.stream.clone_dtoh(&memory[&buffer.address]).unwrap();
                bytemuck::pod_collect_to_vec(&bytes[self.shift * size_of::<T>()..])
            }
        }
    }
}

fn keep(tensors: &mut HashMap<u64, Tensor>, tensor: Tensor) -> Buffer {
    tensors.insert(tensor.address(), tensor);
    Buffer { address: tensor.address(), len: tensor.len() }
}
