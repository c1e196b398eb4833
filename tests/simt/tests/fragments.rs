//! The host twins of tensor cores and asynchronous copies against what the PTX ISA documents: its formulas for who holds
//! which element stand here a second time, element by element.

use half::{bf16, f16};
use pace_simt::{Launch, Memory, Schedule};

const LANES: usize = 32;

/// What a warp running a kernel of `kernels/fragments.cu` makes of `x`.
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

/// A whole number from -8 to 8, exact in every type, as are sums of products of a few.
fn whole(i: usize, j: usize, seed: usize) -> f32 {
    let mixed = (i * 31 + j * 7 + seed * 101 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    (mixed % 17) as f32 - 8.0
}

/// One 16-bit element in the low half, the other in the high half.
fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

#[test]
fn ldmatrix_gives_each_lane_its_part_of_four_matrices() {
    // Element (row, column) of the eight by eight matrix at shared row 8 i is 1000 i + 10 row + column.
    let element =
        |shared_row: usize, column: usize| (1000 * (shared_row / 8) + 10 * (shared_row % 8) + column) as u16;
    let rows = (0..32)
        .flat_map(|row| (0..4).map(move |word| pair(element(row, 2 * word), element(row, 2 * word + 1))));
    // Rows may lie anywhere: lane 8 i + j says where row j of matrix i is.
    let place = |matrix: usize, row: usize| (8 * matrix + row) * 5 % 32;
    let places = (0..LANES).map(|lane| place(lane / 8, lane % 8) as u32);
    let x: Vec<u32> = rows.chain(places).collect();
    for schedule in schedules() {
        let plain = run("load_plain", &x, 4 * LANES, schedule);
        let transposed = run("load_transposed", &x, 4 * LANES, schedule);
        for lane in 0..LANES {
            for matrix in 0..4 {
                let at = |row: usize, column| element(place(matrix, row), column);
                let (major, minor) = (lane / 4, 2 * (lane % 4));
                assert_eq!(plain[4 * lane + matrix], pair(at(major, minor), at(major, minor + 1)));
                assert_eq!(transposed[4 * lane + matrix], pair(at(minor, major), at(minor + 1, major)));
            }
        }
    }
}

/// Row and column of element `i` of `a`, `b` or `c` that a lane with this group and thread in the group holds.
type Layout = fn(group: usize, thread: usize, i: usize) -> (usize, usize);

/// Checks c += a b for two b, with `per_register` elements in a register.
fn check_product(kernel: &str, k: usize, a_at: Layout, b_at: Layout, bits: impl Fn(f32) -> u32) {
    let per_register = k / 8;
    let c_at =
        |group: usize, thread: usize, i: usize| (if i < 2 { group } else { group + 8 }, thread * 2 + i % 2);
    let a = |(row, column)| whole(row, column, 0);
    let b = |matrix: usize, (row, column)| whole(row, column, 1 + matrix);
    let c = |matrix: usize, (row, column)| 100.0 * whole(row, column, 3 + matrix);
    let register = |elements: Vec<f32>| {
        let each = 32 / per_register;
        elements.iter().enumerate().fold(0, |register, (i, &value)| register | bits(value) << (each * i))
    };
    let lanes = || (0..LANES).map(|lane| (lane / 4, lane % 4));
    let registers = |count: usize, element: &dyn Fn(usize) -> f32| -> Vec<u32> {
        let one = |r: usize| register((0..per_register).map(|i| element(per_register * r + i)).collect());
        (0..count).map(one).collect()
    };
    let x: Vec<u32> = lanes()
        .flat_map(|(group, thread)| {
            let mut x = registers(4, &|i| a(a_at(group, thread, i)));
            for matrix in 0..2 {
                x.extend(registers(2, &|i| b(matrix, b_at(group, thread, i))));
            }
            for matrix in 0..2 {
                x.extend((0..4).map(|i| c(matrix, c_at(group, thread, i)).to_bits()));
            }
            x
        })
        .collect();
    let want: Vec<f32> = lanes()
        .flat_map(|(group, thread)| {
            (0..8).map(move |i| {
                let (matrix, (row, column)) = (i / 4, c_at(group, thread, i % 4));
                let products = (0..k).map(|k| a((row, k)) * b(matrix, (k, column)));
                c(matrix, (row, column)) + products.sum::<f32>()
            })
        })
        .collect();
    for schedule in schedules() {
        let got = run(kernel, &x, 8 * LANES, schedule);
        assert_eq!(got.into_iter().map(f32::from_bits).collect::<Vec<_>>(), want, "{kernel}");
    }
}

#[test]
fn mma_m16n8k16_of_16_bit_types() {
    let a_at = |group: usize, thread: usize, i: usize| {
        let row = if matches!(i, 0 | 1 | 4 | 5) { group } else { group + 8 };
        (row, thread * 2 + i % 2 + if i < 4 { 0 } else { 8 })
    };
    let b_at =
        |group: usize, thread: usize, i: usize| (thread * 2 + i % 2 + if i < 2 { 0 } else { 8 }, group);
    check_product("multiply_f16", 16, a_at, b_at, |value| f16::from_f32(value).to_bits().into());
    check_product("multiply_bf16", 16, a_at, b_at, |value| bf16::from_f32(value).to_bits().into());
}

#[test]
fn mma_m16n8k8_of_tf32() {
    let a_at = |group: usize, thread: usize, i: usize| match i {
        0 => (group, thread),
        1 => (group + 8, thread),
        2 => (group, thread + 4),
        _ => (group + 8, thread + 4),
    };
    let b_at = |group: usize, thread: usize, i: usize| (if i == 0 { thread } else { thread + 4 }, group);
    check_product("multiply_tf32", 8, a_at, b_at, f32::to_bits);
}

#[test]
fn tf32_has_ten_fraction_bits_and_rounds_ties_away_from_zero() {
    let ulp = 2f32.powi(-10);
    let (below, above) = (f32::EPSILON, 0.5 * ulp + f32::EPSILON);
    let cases = [
        (0.0, 0.0),
        (-0.0, -0.0),
        (1.0, 1.0),
        (1.0 + ulp, 1.0 + ulp),
        // Ties, just below, just above.
        (1.0 + 0.5 * ulp, 1.0 + ulp),
        (-1.0 - 0.5 * ulp, -1.0 - ulp),
        (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
        (1.0 + 0.5 * ulp - below, 1.0),
        (-1.0 - 0.5 * ulp + below, -1.0),
        (1.0 + above, 1.0 + ulp),
        // Up to the next power of two.
        (2.0 - 0.5 * ulp, 2.0),
        (2.0 - 0.5 * ulp - below, 2.0 - ulp),
        // Past the largest, and what is no number to begin with.
        (f32::MAX, f32::INFINITY),
        (f32::INFINITY, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        // The smallest of normal ones.
        (f32::MIN_POSITIVE * (1.0 + 0.5 * ulp), f32::MIN_POSITIVE * (1.0 + ulp)),
    ];
    let mut x: Vec<u32> = cases.iter().map(|(x, _)| x.to_bits()).collect();
    // Quiet NaN of either sign; only that it stays one is promised.
    x.extend([0x7fc0_0000, 0xffc0_0000]);
    x.resize(LANES, 0);
    let got = run("round_to_tf32", &x, LANES, Schedule::InOrder);
    for ((x, want), &got) in cases.iter().zip(&got) {
        assert_eq!(got, want.to_bits(), "{x:e} gives {:e}, expected {want:e}", f32::from_bits(got));
    }
    assert!(got[cases.len()..][..2].iter().all(|&bits| f32::from_bits(bits).is_nan()));
}

#[test]
fn pack_puts_its_first_argument_into_the_low_half() {
    let values: Vec<f32> = (0..2 * LANES).map(|i| i as f32 - 20.25).collect();
    let x: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    let check = |kernel: &str, bits: fn(f32) -> u16| {
        let want: Vec<u32> = values.chunks(2).map(|two| pair(bits(two[0]), bits(two[1]))).collect();
        assert_eq!(run(kernel, &x, LANES, Schedule::InOrder), want, "{kernel}");
    };
    check("pack_f16", |value| f16::from_f32(value).to_bits());
    check("pack_bf16", |value| bf16::from_f32(value).to_bits());
}

#[test]
fn copies_of_nothing_fill_with_zeros() {
    let x: Vec<u32> = (1..=4 * LANES as u32).collect();
    let want: Vec<u32> = x.iter().map(|&word| if (word - 1) / 4 % 2 == 0 { word } else { 0 }).collect();
    for schedule in schedules() {
        assert_eq!(run("copy_every_other", &x, x.len(), schedule), want);
    }
}

#[test]
fn copies_arrive_when_their_group_is_waited_for_or_earlier() {
    let x: Vec<u32> = (1..=8 * LANES as u32).collect();
    let early = |schedule| {
        let y = run("copy_in_groups", &x, 3 * LANES, schedule);
        let is_early = |(x, y): (&[u32], &[u32])| {
            assert_eq!([y[0], y[2]], [x[0], x[4]]);
            assert!([x[4], u32::MAX].contains(&y[1]), "{}", y[1]);
            y[1] == x[4]
        };
        x.chunks(8).zip(y.chunks(3)).map(is_early).filter(|&early| early).count()
    };
    assert_eq!(early(Schedule::InOrder), 0);
    for seed in 0..8 {
        assert!((1..LANES).contains(&early(Schedule::Random(seed))));
    }
}
