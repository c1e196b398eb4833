//! ldmatrix, stmatrix and mma.sync by shared addresses against what the PTX ISA documents, element by element.

use half::{bf16, f16};
use pace_simt::{Launch, Memory, Schedule};

const LANES: usize = 32;

fn run(kernel: &str, x: &[u32], outputs: usize, schedule: Schedule) -> Vec<u32> {
    let mut memory = Memory::new(0);
    let (x, y) = (memory.input("x", x), memory.output::<u32>("y", outputs));
    let params: Vec<u8> = [x.address(), y.address()].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel,
        grid: [1; 3],
        cluster: [1; 3],
        block: [LANES as u32, 1, 1],
        shared_bytes: 1024,
        params: &params,
    };
    memory.launch(&launch, schedule).unwrap();
    memory.read(&y).unwrap()
}

fn schedules() -> impl Iterator<Item = Schedule> {
    (0..8).map(Schedule::Random).chain([Schedule::InOrder])
}

/// Two elements, each a number of its own.
fn pairs() -> Vec<u32> {
    (0..4 * LANES as u32).map(|i| (2 * i + 1) | (2 * i + 2) << 16).collect()
}

fn half_of(x: &[u32], lane: usize, matrix: usize, i: usize) -> u16 {
    (x[4 * lane + matrix] >> (16 * i)) as u16
}

#[test]
fn stmatrix_puts_each_element_where_it_belongs() {
    let x = pairs();
    for (kernel, count, is_transposed) in [
        ("store_four", 4, false),
        ("store_four_transposed", 4, true),
        ("store_two", 2, false),
        ("store_two_transposed", 2, true),
    ] {
        let mut want = vec![0u16; 512];
        for (matrix, row, column) in
            (0..count).flat_map(|i| (0..64).map(move |element| (i, element / 8, element % 8)))
        {
            let (major, minor) = if is_transposed { (column, row) } else { (row, column) };
            let line = (8 * matrix + row) * 5 % 64;
            want[8 * line + column] = half_of(&x, 4 * major + minor / 2, matrix, minor % 2);
        }
        for schedule in schedules() {
            let got: Vec<u16> = run(kernel, &x, 256, schedule)
                .iter()
                .flat_map(|word| [*word as u16, (word >> 16) as u16])
                .collect();
            assert!(got == want, "{kernel}");
        }
    }
}

#[test]
fn ldmatrix_gives_back_what_stmatrix_stored() {
    let x = pairs();
    for schedule in schedules() {
        for kernel in ["store_and_load_four", "store_and_load_four_transposed"] {
            assert!(run(kernel, &x, 4 * LANES, schedule) == x, "{kernel}");
        }
    }
}

#[test]
fn mma_adds_products_to_what_is_there() {
    let small = |i: usize| (i * 37 % 13) as f32 - 6.0;
    let check = |kernel: &str, bits: fn(f32) -> u16| {
        let x: Vec<u32> = (0..4 * LANES)
            .map(|i| u32::from(bits(small(2 * i))) | u32::from(bits(small(2 * i + 1))) << 16)
            .collect();
        // Element i of register j of a lane.
        let held = |lane: usize, j: usize, i: usize| small(2 * (4 * lane + j) + i);
        let a = |row: usize, k: usize| held(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
        let b = |k: usize, column: usize| held(column * 4 + k % 8 / 2, k / 8, k % 2);
        let want = (0..4 * LANES).map(|at| {
            let (lane, i) = (at / 4, at % 4);
            let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            1.0 + (0..16).map(|k| a(row, k) * b(k, column)).sum::<f32>()
        });
        let got = run(kernel, &x, 4 * LANES, Schedule::Random(1));
        assert!(got.iter().map(|&bits| f32::from_bits(bits)).eq(want), "{kernel}");
    };
    check("multiply_small_f16", |value| f16::from_f32(value).to_bits());
    check("multiply_small_bf16", |value| bf16::from_f32(value).to_bits());
}
