//! wgmma's operands against the PTX ISA's canonical layouts, which stand here a second time, element by element, and its
//! results against plain sums.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use pace_simt::{Fault, Launch, Memory, Schedule};

const THREADS: usize = 128;
const ROWS: usize = 64;
const K: usize = 16;
/// Shared address of the first byte.
const BASE: usize = 1024;
const SHARED_BYTES: usize = 96 << 10;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    shared: u64,
    a: u64,
    c: u64,
    d: u64,
    a_tile: u64,
    b_tile: u64,
    elements: u32,
    n: u32,
    is_bf16: u32,
    in_registers: u32,
    is_a_transposed: u32,
    is_b_transposed: u32,
    accumulate: u32,
    is_fenced: u32,
}

/// How an operand lies in shared memory.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Bytes of the swizzle's span; 0: none.
    span: usize,
    is_transposed: bool,
    /// Which 16 of the inner dimension.
    step: usize,
}

/// An operand `[mn, K]` at byte `start` of shared memory.
#[derive(Clone, Copy)]
struct Operand {
    layout: Layout,
    start: usize,
    mn: usize,
}

/// By what chunks of 16 bytes are permuted in row `row` of a pattern.
fn permutation(span: usize, row: usize) -> usize {
    match span {
        128 => row % 8,
        64 => row / 2 % 4,
        32 => row / 4 % 2,
        _ => 0,
    }
}

impl Operand {
    /// Elements of the inner dimension that lie there in all.
    fn depth(&self) -> usize {
        match (self.layout.span, self.layout.is_transposed) {
            (0, _) | (_, true) => 32,
            (span, false) => span / 2,
        }
    }

    /// Byte of element (mn, k), k counted from the first that lies there.
    fn byte(&self, mn: usize, k: usize) -> usize {
        let Layout { span, is_transposed, .. } = self.layout;
        let within = match (span, is_transposed) {
            // Matrices of 8 x 16 bytes, one after the other along mn, then along K.
            (0, false) => mn / 8 * 128 + k / 8 * (self.mn * 16) + mn % 8 * 16 + k % 8 * 2,
            (0, true) => mn / 8 * 128 + k / 8 * (self.mn * 16) + k % 8 * 16 + mn % 8 * 2,
            // Rows of one span.
            (_, false) => mn * span + ((k / 8) ^ permutation(span, mn)) * 16 + k % 8 * 2,
            // Panels of one span, each with rows of k.
            (_, true) => {
                let (panel, column) = (mn / (span / 2), mn % (span / 2));
                let chunk = (column / 8) ^ permutation(span, k);
                panel * self.depth() * span + k * span + chunk * 16 + column % 8 * 2
            }
        };
        self.start + within
    }

    fn bytes(&self) -> usize {
        let mn = self.mn.next_multiple_of((self.layout.span / 2).max(8));
        (mn * self.depth() * 2).next_multiple_of(1024)
    }

    fn descriptor(&self) -> u64 {
        let Layout { span, is_transposed, step } = self.layout;
        let (leading, stride, each) = match (span, is_transposed) {
            (0, _) => (self.mn * 16, 128, 2 * self.mn * 16),
            (_, false) => (16, 8 * span, 32),
            (_, true) => (self.depth() * span, 8 * span, 16 * span),
        };
        // Without a swizzle, K-major: leading along K, stride along MN; MN-major: the field called stride is along MN as well.
        let mode = [0, 3, 2, 0, 1][span / 32];
        let address = (BASE + self.start + step * each) as u64;
        address >> 4 | (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | mode << 62
    }
}

/// A whole number from -8 to 8, exact in every type, as are sums of products of a few.
fn whole(i: usize, j: usize, seed: usize) -> f32 {
    let mixed = (i * 31 + j * 7 + seed * 101 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    (mixed % 17) as f32 - 8.0
}

#[derive(Debug, Clone, Copy)]
struct Case {
    n: usize,
    is_bf16: bool,
    /// `None`: in registers.
    a: Option<Layout>,
    b: Layout,
    accumulate: bool,
    is_fenced: bool,
}

/// Row and column of accumulator `i` of a thread.
fn accumulator(thread: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (i % 4 / 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

/// What the kernel makes of `c + a b`, and what it should.
fn run(case: Case, schedule: Schedule, change: impl Fn(&mut Params)) -> (Result<Vec<f32>, Fault>, Vec<f32>) {
    let Case { n, is_bf16, a: a_layout, b: b_layout, accumulate, is_fenced } = case;
    let bits =
        |value: f32| if is_bf16 { bf16::from_f32(value).to_bits() } else { f16::from_f32(value).to_bits() };
    let a_operand = a_layout.map(|layout| Operand { layout, start: 0, mn: ROWS });
    let b_operand =
        Operand { layout: b_layout, start: a_operand.map_or(0, |operand| operand.bytes()), mn: n };
    let mut shared = vec![0u16; SHARED_BYTES / 2];
    let mut fill = |operand: &Operand, seed| {
        for mn in 0..operand.mn {
            for k in 0..operand.depth() {
                shared[operand.byte(mn, k) / 2] = bits(whole(mn, k, seed));
            }
        }
    };
    a_operand.iter().for_each(|operand| fill(operand, 0));
    fill(&b_operand, 1);
    let a_step = a_layout.map_or(0, |layout| layout.step) * K;
    let a = |row, k| whole(row, a_step + k, 0);
    let b = |column, k| whole(column, b_layout.step * K + k, 1);
    let c = |row, column| 100.0 * whole(row, column, 2);

    let registers: Vec<u32> = (0..THREADS * 4)
        .map(|at| {
            let (thread, j) = (at / 4, at % 4);
            let (warp, group, within) = (thread / 32, thread % 32 / 4, thread % 4);
            let element = |i| bits(a(16 * warp + group + 8 * (j % 2), 2 * within + 8 * (j / 2) + i));
            u32::from(element(0)) | u32::from(element(1)) << 16
        })
        .collect();
    let places = (0..THREADS * n / 2).map(|at| accumulator(at / (n / 2), at % (n / 2)));
    let before: Vec<f32> = places.clone().map(|(row, column)| c(row, column)).collect();
    let want = places
        .map(|(row, column)| {
            let sum: f32 = (0..K).map(|k| a(row, k) * b(column, k)).sum();
            if accumulate { c(row, column) + sum } else { sum }
        })
        .collect();

    let mut memory = Memory::new(0);
    let d = memory.output::<f32>("d", before.len());
    let mut params = Params {
        shared: memory.input("shared", &shared).address(),
        a: memory.input("a", &registers).address(),
        c: memory.input("c", &before).address(),
        d: d.address(),
        a_tile: a_operand.map_or(0, |operand| operand.descriptor()),
        b_tile: b_operand.descriptor(),
        elements: shared.len() as u32,
        n: n as u32,
        is_bf16: is_bf16.into(),
        in_registers: a_layout.is_none().into(),
        is_a_transposed: a_layout.is_some_and(|layout| layout.is_transposed).into(),
        is_b_transposed: b_layout.is_transposed.into(),
        accumulate: accumulate.into(),
        is_fenced: is_fenced.into(),
    };
    change(&mut params);
    let launch = Launch {
        kernel: "one_wgmma",
        grid: [1; 3],
        cluster: [1; 3],
        block: [THREADS as u32, 1, 1],
        shared_bytes: SHARED_BYTES as u32,
        params: bytemuck::bytes_of(&params),
    };
    let got = memory.launch(&launch, schedule).and_then(|()| memory.read(&d));
    (got, want)
}

fn check(case: Case) {
    let (got, want) = run(case, Schedule::InOrder, |_| {});
    let got = got.unwrap_or_else(|fault| panic!("{case:?}: {fault}"));
    let wrong = got.iter().zip(&want).position(|(got, want)| got != want);
    assert_eq!(
        wrong.map(|i| (accumulator(i / (case.n / 2), i % (case.n / 2)), got[i], want[i])),
        None,
        "{case:?}"
    );
}

fn layouts() -> impl Iterator<Item = Layout> {
    [0, 32, 64, 128].into_iter().flat_map(|span| {
        [false, true].into_iter().flat_map(move |is_transposed| {
            let steps = if is_transposed || span == 0 { 2 } else { span / 32 };
            (0..steps).map(move |step| Layout { span, is_transposed, step })
        })
    })
}

#[test]
fn b_is_read_as_the_canonical_layouts_say() {
    for b in layouts() {
        for n in [8, 64, 200, 208, 256] {
            check(Case { n, is_bf16: n % 16 == 8, a: None, b, accumulate: true, is_fenced: true });
        }
    }
}

#[test]
fn a_is_read_as_the_canonical_layouts_say() {
    let b = Layout { span: 128, is_transposed: false, step: 0 };
    for a in layouts() {
        for (n, is_bf16) in [(64, true), (200, false)] {
            check(Case { n, is_bf16, a: Some(a), b, accumulate: n == 200, is_fenced: true });
        }
        let b = Layout { span: 64, is_transposed: true, step: 1 };
        check(Case { n: 64, is_bf16: false, a: Some(a), b, accumulate: false, is_fenced: true });
    }
}

#[test]
fn wgmma_needs_a_fence_after_what_threads_wrote() {
    let layout = Layout { span: 128, is_transposed: false, step: 0 };
    for a in [None, Some(layout)] {
        let case = Case { n: 64, is_bf16: true, a, b: layout, accumulate: false, is_fenced: false };
        for schedule in (0..8).map(Schedule::Random).chain([Schedule::InOrder]) {
            let fault = run(case, schedule, |_| {}).0.unwrap_err();
            let Fault::MissingProxyFence { writer: Some(writer), address, .. } = fault else {
                panic!("{fault}")
            };
            assert_eq!(writer.thread[0] as usize, (address as usize - BASE) / 2 % THREADS, "{fault}");
        }
    }
}

#[test]
fn descriptors_are_what_the_hardware_takes() {
    let layout = Layout { span: 128, is_transposed: false, step: 0 };
    let case = Case { n: 64, is_bf16: true, a: None, b: layout, accumulate: false, is_fenced: true };
    let found = |change: fn(&mut Params)| run(case, Schedule::InOrder, change).0.unwrap_err();
    for (change, what) in [
        ((|params| params.b_tile |= 1 << 49) as fn(&mut Params), "base offset"),
        (|params| params.b_tile |= 1 << 52, "bits that mean nothing"),
        (|params| params.b_tile += 128 >> 4, "in the middle of a pattern"),
    ] {
        let fault = found(change);
        assert!(matches!(&fault, Fault::Instruction { why, .. } if why.contains(what)), "{fault}");
    }
    // Below the block's memory, and past its end.
    for change in
        [(|params| params.b_tile -= 1024 >> 4) as fn(&mut Params), |params| params.b_tile += 90 << 6]
    {
        let fault = found(change);
        assert!(matches!(&fault, Fault::OutOfBounds { tensor, .. } if tensor == "shared memory"), "{fault}");
    }
}
