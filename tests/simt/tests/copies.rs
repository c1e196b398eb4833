//! Copies of boxes against what the driver's documentation says of tensor maps, element by element.

use bytemuck::{Pod, Zeroable};
use pace_simt::{Access, Fault, Launch, Memory, Schedule, TensorMap};

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    map: TensorMap,
    shared: u64,
    staged: u64,
    corner: [i32; 3],
    bytes: u32,
    words: u32,
    ranks: u32,
    padding: [u32; 6],
}

/// A box of a tensor of 16-bit elements or of 32-bit ones.
#[derive(Debug, Clone, Copy)]
struct Case {
    element_bytes: usize,
    dims: [usize; 3],
    /// Elements from one row to the next; the rest of each belongs to nobody.
    pitch: usize,
    box_dims: [usize; 3],
    swizzle: usize,
    corner: [i32; 3],
}

const CASES: [Case; 7] = [
    // Rows that end before the box, a sample that ends before it.
    Case {
        element_bytes: 2,
        dims: [72, 13, 3],
        pitch: 80,
        box_dims: [64, 16, 1],
        swizzle: 128,
        corner: [64, 8, 1],
    },
    Case {
        element_bytes: 2,
        dims: [72, 13, 3],
        pitch: 72,
        box_dims: [32, 16, 2],
        swizzle: 64,
        corner: [16, 0, 2],
    },
    Case {
        element_bytes: 2,
        dims: [40, 20, 2],
        pitch: 40,
        box_dims: [16, 8, 1],
        swizzle: 32,
        corner: [8, 3, 0],
    },
    Case {
        element_bytes: 2,
        dims: [40, 20, 2],
        pitch: 40,
        box_dims: [24, 5, 2],
        swizzle: 0,
        corner: [17, 17, 0],
    },
    // Before the tensor, and all of it outside.
    Case {
        element_bytes: 2,
        dims: [72, 13, 3],
        pitch: 80,
        box_dims: [64, 24, 2],
        swizzle: 128,
        corner: [-5, -7, -1],
    },
    Case {
        element_bytes: 2,
        dims: [72, 13, 3],
        pitch: 80,
        box_dims: [64, 8, 1],
        swizzle: 128,
        corner: [0, 0, 3],
    },
    Case {
        element_bytes: 4,
        dims: [50, 9, 2],
        pitch: 52,
        box_dims: [32, 8, 2],
        swizzle: 128,
        corner: [20, 5, -1],
    },
];

impl Case {
    fn map(&self, address: u64) -> TensorMap {
        let &Case { element_bytes, dims: [x, y, z], pitch, box_dims, swizzle, .. } = self;
        TensorMap {
            address,
            dims: [x as u64, y as u64, z as u64, 0, 0],
            strides: [(pitch * element_bytes) as u64, (pitch * y * element_bytes) as u64, 0, 0],
            box_dims: [box_dims[0] as u32, box_dims[1] as u32, box_dims[2] as u32, 0, 0],
            swizzle: swizzle as u32,
            rank: 3,
            element_bytes: element_bytes as u32,
            reserved: [0; 4],
        }
    }

    fn row_bytes(&self) -> usize {
        self.box_dims[0] * self.element_bytes
    }

    fn box_bytes(&self) -> usize {
        self.row_bytes() * self.box_dims[1] * self.box_dims[2]
    }

    fn global_bytes(&self) -> usize {
        self.pitch * self.dims[1] * self.dims[2] * self.element_bytes
    }

    /// Of every byte of the box: where it lies in shared memory, and in global memory if it does there.
    fn bytes(&self) -> impl Iterator<Item = (usize, Option<usize>)> {
        let this = *self;
        (0..this.box_bytes()).map(move |linear| {
            let (row, column) = (linear / this.row_bytes(), linear % this.row_bytes());
            // The chunk of 16 bytes within the span changes with the row: of 128 bytes with each, of 64 with every second.
            let chunk = match this.swizzle {
                128 => (column / 16) ^ (row % 8),
                64 => (column / 16) ^ (row / 2 % 4),
                32 => (column / 16) ^ (row / 4 % 2),
                _ => column / 16,
            };
            let shared = row * this.row_bytes() + chunk * 16 + column % 16;
            let at = [
                (column / this.element_bytes) as i32 + this.corner[0],
                (row % this.box_dims[1]) as i32 + this.corner[1],
                (row / this.box_dims[1]) as i32 + this.corner[2],
            ];
            let is_inside = (0..3).all(|i| at[i] >= 0 && at[i] < this.dims[i] as i32);
            let global = is_inside.then(|| {
                let [x, y, z] = at.map(|at| at as usize);
                ((z * this.dims[1] + y) * this.pitch + x) * this.element_bytes + column % this.element_bytes
            });
            (shared, global)
        })
    }
}

/// Bytes none of which is zero.
fn values(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 131 % 251 + 1) as u8).collect()
}

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..8).map(Schedule::Random).chain([Schedule::InOrder])
}

fn launch(kernel: &str, memory: &mut Memory, params: &Params, schedule: Schedule) -> Result<(), Fault> {
    memory.launch(
        &Launch {
            kernel,
            grid: [1; 3],
            cluster: [1; 3],
            block: [32, 1, 1],
            shared_bytes: 4 * params.words + 8,
            params: bytemuck::bytes_of(params),
        },
        schedule,
    )
}

fn params(case: Case, address: u64) -> Params {
    let bytes = case.box_bytes() as u32;
    let (corner, words) = (case.corner, bytes / 4);
    Params { map: case.map(address), shared: 0, staged: 0, corner, bytes, words, ranks: 0, padding: [0; 6] }
}

#[test]
fn boxes_land_swizzled_and_zeros_where_there_is_no_tensor() {
    for case in CASES {
        let global = values(case.global_bytes());
        let mut want = vec![0; case.box_bytes()];
        case.bytes().for_each(|(shared, from)| want[shared] = from.map_or(0, |from| global[from]));
        for (schedule, ranks) in schedules().flat_map(|schedule| [(schedule, 0), (schedule, 1)]) {
            let mut memory = Memory::new(0);
            let x = memory.input("x", &global);
            let shared = memory.output::<u8>("shared", case.box_bytes());
            let params = Params { shared: shared.address(), ranks, ..params(case, x.address()) };
            launch("copy_box_in", &mut memory, &params, schedule).unwrap();
            assert!(memory.read::<u8>(&shared).unwrap() == want, "{case:?} {schedule:?}");
        }
    }
}

#[test]
fn stores_leave_out_what_lies_outside() {
    for case in CASES {
        let staged = values(case.box_bytes());
        let before = vec![0; case.global_bytes()];
        let mut want = before.clone();
        for (shared, to) in case.bytes() {
            if let Some(to) = to {
                want[to] = staged[shared];
            }
        }
        for schedule in schedules() {
            let mut memory = Memory::new(0);
            let y = memory.in_out("y", &before);
            let staged = memory.input("staged", &staged);
            let params = Params { staged: staged.address(), ..params(case, y.address()) };
            launch("copy_box_out", &mut memory, &params, schedule).unwrap();
            assert!(memory.read::<u8>(&y).unwrap() == want, "{case:?} {schedule:?}");
        }
    }
}

#[test]
fn copies_read_what_was_written_and_write_what_is_no_input() {
    let case = CASES[0];
    let mut memory = Memory::new(0);
    let x = memory.output::<u8>("x", case.global_bytes());
    let shared = memory.output::<u8>("shared", case.box_bytes());
    let load = Params { shared: shared.address(), ..params(case, x.address()) };
    let found = launch("copy_box_in", &mut memory, &load, Schedule::InOrder).unwrap_err();
    assert!(matches!(&found, Fault::ReadBeforeWrite { tensor, .. } if tensor == "x"), "{found}");

    let mut memory = Memory::new(0);
    let y = memory.input("y", &values(case.global_bytes()));
    let staged = memory.input("staged", &values(case.box_bytes()));
    let store = Params { staged: staged.address(), ..params(case, y.address()) };
    let found = launch("copy_box_out", &mut memory, &store, Schedule::InOrder).unwrap_err();
    let Fault::WriteToInput { thread, access, tensor } = found else { panic!("{found}") };
    // The part of the first row that lies in the tensor: sample 1, row 8, from element 64 on.
    let offset = ((13 + 8) * 80 + 64) * 2;
    assert_eq!((thread.thread, access), ([0; 3], Access { offset, bytes: 16, is_write: true }));
    assert_eq!(tensor, "y");
}

#[test]
fn copies_take_maps_of_the_parameters_and_blocks_of_the_cluster() {
    let case = CASES[0];
    let mut memory = Memory::new(0);
    let x = memory.input("x", &values(case.global_bytes()));
    let mut found = |kernel, ranks| {
        let params = Params { ranks, ..params(case, x.address()) };
        match launch(kernel, &mut memory, &params, Schedule::InOrder) {
            Err(Fault::Instruction { why, .. }) => why,
            other => panic!("{kernel}: {other:?}"),
        }
    };
    assert_eq!(found("copy_box_by_copied_map", 0), "a tensor map that is not in the kernel's parameters");
    assert_eq!(found("copy_box_in", 0b11), "a copy to blocks 0b11 of 1");
}
