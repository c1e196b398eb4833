//! The simulator's f16 and bf16 round as IEEE 754 has it.

use half::{bf16, f16};
use pace_simt::{Launch, Memory, Schedule};

/// Every f16 and bf16, what lies half way between neighbours and just beside that, and a stride over all f32.
fn values() -> Vec<f32> {
    let exact =
        (0..=u16::MAX).flat_map(|bits| [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()]);
    let beside = |value: f32| [0, 1 << 12, 1 << 15].map(|half| f32::from_bits(value.to_bits() | half));
    let around =
        |value: f32| [-1i32, 0, 1].map(|step| f32::from_bits(value.to_bits().wrapping_add_signed(step)));
    let mut values: Vec<f32> = exact.flat_map(beside).flat_map(around).collect();
    // Below 2^-14 an f16 is a multiple of 2^-24, so halves are odd multiples of 2^-25.
    values.extend((0..4096).map(|i| i as f32 * 2f32.powi(-25)).flat_map(around));
    values.extend((0..=u32::MAX).step_by(65521).map(f32::from_bits));
    values
}

fn converted(kernel: &str, x: &[f32]) -> Vec<f32> {
    let mut memory = Memory::new(0);
    let (x, y) = (memory.input("x", x), memory.output::<f32>("y", x.len()));
    let words = [x.address(), y.address(), x.len() as u64];
    let params: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch =
        Launch { kernel, grid: [1; 3], cluster: [1; 3], block: [4, 1, 1], shared_bytes: 0, params: &params };
    memory.launch(&launch, Schedule::InOrder).unwrap();
    memory.read(&y).unwrap()
}

#[test]
fn conversions_round_to_nearest_even() {
    let x = values();
    let check = |kernel: &str, round: fn(f32) -> f32| {
        for (&x, got) in x.iter().zip(converted(kernel, &x)) {
            let want = round(x);
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(same, "{kernel}: {x:e} ({:08x}) gives {got:e}, expected {want:e}", x.to_bits());
        }
    };
    check("round_to_f16", |x| f16::from_f32(x).to_f32());
    check("round_to_bf16", |x| bf16::from_f32(x).to_f32());
}
