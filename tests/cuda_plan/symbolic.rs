//! Carries out plans of GEMMs and epilogues on names instead of numbers: what each region of memory holds is a sum of terms such as
//! `z*(x@delta_weight')`.
//!
//! Every read must be of exactly what an input has, or what an earlier step wrote and nothing has overwritten since; every write must
//! lie in an output or in the workspace. A GEMM overwrites all memory that it has for itself.

use pace_kernels::LinearShape;
use pace_kernels::cuda::{Address, Buffer, DType, Gemm, Launch, Plan, Source, Step};
use pace_kernels::noise::NoiseShape;
use std::collections::BTreeMap;
use std::ops::Range;

/// A sum: terms and their factors.
pub type Sum = BTreeMap<String, f32>;

/// A tensor in memory.
struct Tensor {
    name: String,
    start: u64,
    shape: [usize; 2],
    /// Of an element.
    bytes: usize,
    value: Sum,
}

pub struct Machine {
    shape: LinearShape,
    dtype: DType,
    allow_tf32: bool,
    noise: Source,
    workspace: Range<u64>,
    /// What reads find.
    held: Vec<Tensor>,
    outputs: Vec<Tensor>,
    /// The starts of what plans put into the workspace.
    temporaries: Vec<u64>,
    /// A line for each step.
    pub trace: Vec<String>,
}

/// The fields of a parameter struct, one after the other.
struct Fields<'a>(&'a [u8]);

/// What one step reads.
#[derive(Default)]
struct Reads(Vec<Range<u64>>);

/// What one step writes: the start, shape, bytes of an element, and the sum that is then there.
type Write = (u64, [usize; 2], usize, Sum);

impl Tensor {
    fn range(&self) -> Range<u64> {
        range(self.start, self.shape, self.bytes)
    }
}

fn range(start: u64, [rows, columns]: [usize; 2], bytes: usize) -> Range<u64> {
    start..start + (rows * columns * bytes) as u64
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// The sum of these terms.
pub fn sum<S: Into<String>>(terms: impl IntoIterator<Item = (f32, S)>) -> Sum {
    let mut sum = Sum::new();
    for (factor, term) in terms {
        *sum.entry(term.into()).or_default() += factor;
    }
    sum
}

/// `left@right`, each transposed or not.
pub fn product(left: (&str, bool), right: (&str, bool)) -> String {
    let operand = |(term, is_transposed): (&str, bool)| match is_transposed {
        true if term.contains(['@', '*', '(']) => format!("({term})'"),
        true => format!("{term}'"),
        false if term.contains('*') => format!("({term})"),
        false => term.to_owned(),
    };
    format!("{}@{}", operand(left), operand(right))
}

/// A sum with each term inside `function(…)`.
fn map(sum: &Sum, function: &str) -> Sum {
    sum.iter().map(|(term, &factor)| (format!("{function}({term})"), factor)).collect()
}

fn add(a: Sum, b: Sum) -> Sum {
    sum(a.into_iter().chain(b).map(|(term, factor)| (factor, term)))
}

impl Fields<'_> {
    fn take<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        let (first, rest) = self.0.split_at(BYTES);
        self.0 = rest;
        first.try_into().unwrap()
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }
}

impl Machine {
    pub fn new(shape: LinearShape, dtype: DType, allow_tf32: bool, noise: Source, workspace: Buffer) -> Self {
        let workspace = range(workspace.address, [1, workspace.len], 4);
        let (held, outputs, temporaries, trace) = Default::default();
        Self { shape, dtype, allow_tf32, noise, workspace, held, outputs, temporaries, trace }
    }

    fn tensor(&self, name: &str, buffer: Buffer, shape: [usize; 2], value: Sum) -> Tensor {
        assert_eq!(buffer.len, shape[0] * shape[1], "{name}");
        Tensor { name: name.to_owned(), start: buffer.address, shape, bytes: self.dtype.bytes(), value }
    }

    /// A tensor that holds its name.
    pub fn input(&mut self, name: &str, buffer: Buffer, shape: [usize; 2]) {
        self.held.push(self.tensor(name, buffer, shape, sum([(1.0, name)])));
    }

    /// A tensor that may be written, and is not there before.
    pub fn output(&mut self, name: &str, buffer: Buffer, shape: [usize; 2]) {
        self.outputs.push(self.tensor(name, buffer, shape, Sum::new()));
    }

    /// What an output holds.
    pub fn value(&self, name: &str) -> &Sum {
        let output = self.outputs.iter().find(|output| output.name == name).expect(name);
        self.held(output.start, output.shape, output.bytes)
    }

    /// Carries out a plan, whose every step must be one that a machine knows.
    pub fn run(&mut self, plan: &Plan) {
        for step in plan.steps() {
            match step {
                Step::Gemm(gemm) => self.gemm(gemm),
                Step::Launch(launch) => {
                    let dtype = ["f32", "f16", "bf16"][self.dtype as usize];
                    let name = launch.kernel.name.strip_suffix(&format!("_{dtype}"));
                    match name.unwrap_or_else(|| panic!("{dtype}: {launch:?}")) {
                        "layer_epilogue" => self.epilogue(launch),
                        "layer_epilogue_backward" => self.epilogue_backward(launch),
                        "partial_sums" => self.partial_sums(launch),
                        other => panic!("{other} among {plan:?}"),
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn held(&self, start: u64, shape: [usize; 2], bytes: usize) -> &Sum {
        let found = self.held.iter().find(|held| held.range() == range(start, shape, bytes));
        let Some(found) = found.filter(|found| found.shape == shape && found.bytes == bytes) else {
            panic!("nothing of shape {shape:?} at {start:#x} after {:?}", self.trace);
        };
        &found.value
    }

    /// Of an absent tensor nothing.
    fn read(&self, reads: &mut Reads, start: u64, shape: [usize; 2], bytes: usize) -> Sum {
        if start == 0 {
            return Sum::new();
        }
        reads.0.push(range(start, shape, bytes));
        self.held(start, shape, bytes).clone()
    }

    /// What a step wrote. Only a step that reads an element before it writes the same may do it in place.
    fn write(&mut self, reads: &Reads, in_place: bool, writes: Vec<Write>) {
        for (i, (start, shape, bytes, _)) in writes.iter().enumerate() {
            let written = range(*start, *shape, *bytes);
            let mut allowed = self.outputs.iter().map(Tensor::range).chain([self.workspace.clone()]);
            assert!(allowed.any(|allowed| contains(&allowed, &written)), "{written:#x?}: {:?}", self.trace);
            assert!(start.is_multiple_of(*bytes as u64));
            for read in &reads.0 {
                assert!(!overlap(read, &written) || (in_place && *read == written), "{:?}", self.trace);
            }
            for (other, shape, bytes, _) in &writes[..i] {
                assert!(!overlap(&range(*other, *shape, *bytes), &written), "{:?}", self.trace);
            }
            self.held.retain(|held| !overlap(&held.range(), &written));
        }
        for (start, shape, bytes, value) in writes {
            let name = self.name(start);
            self.held.push(Tensor { name, start, shape, bytes, value });
        }
    }

    /// A tensor's name; places in the workspace are `t0`, `t1` and so on.
    fn name(&mut self, start: u64) -> String {
        if let Some(tensor) = self.held.iter().chain(&self.outputs).find(|tensor| tensor.start == start) {
            return tensor.name.clone();
        }
        let known = self.temporaries.iter().position(|&temporary| temporary == start);
        let i = known.unwrap_or_else(|| {
            // Vectors and the library like it; the GEMMs' own memory needs it.
            assert!(start.is_multiple_of(256) && self.workspace.contains(&start), "{start:#x}");
            self.temporaries.push(start);
            self.temporaries.len() - 1
        });
        format!("t{i}")
    }

    fn gemm(&mut self, gemm: &Gemm) {
        let &Gemm { dtype, output, allow_tf32, m, n, k, a, b, d: Address(d), alpha, beta, bias, workspace } =
            gemm;
        assert_eq!((dtype, output, allow_tf32), (self.dtype, self.dtype, self.allow_tf32));
        assert!([m, n, k].iter().all(|&size| (1..1 << 31).contains(&size)), "{gemm:?}");
        // The library's own memory is lost first: nothing that this GEMM or a later one reads may lie there.
        let own = range(workspace.address.0, [1, workspace.bytes], 1);
        assert!(
            own.start.is_multiple_of(256) && !own.is_empty() && contains(&self.workspace, &own),
            "{gemm:?}"
        );
        self.held.retain(|held| !overlap(&held.range(), &own));

        let (bytes, mut reads) = (dtype.bytes(), Reads::default());
        let shape = |[rows, columns]: [usize; 2], is_transposed| match is_transposed {
            true => [columns, rows],
            false => [rows, columns],
        };
        let left = self.read(&mut reads, a.address.0, shape([m, k], a.is_transposed), bytes);
        let right = self.read(&mut reads, b.address.0, shape([k, n], b.is_transposed), bytes);
        let bias = bias.map_or(0, |Address(bias)| bias);
        // The library loads vectors of it.
        assert!(bias.is_multiple_of(16), "{gemm:?}");
        let mut value = self.read(&mut reads, bias, [1, n], bytes);
        for (left, left_factor) in &left {
            for (right, right_factor) in &right {
                let term = product((left, a.is_transposed), (right, b.is_transposed));
                value = add(value, sum([(alpha * left_factor * right_factor, term)]));
            }
        }
        let sign = match beta {
            0.0 => "=",
            1.0 => "+=",
            _ => panic!("{gemm:?}"),
        };
        if beta == 1.0 {
            value = add(value, self.held(d, [m, n], bytes).clone());
        }
        assert!(!overlap(&own, &range(d, [m, n], bytes)));
        let names = [d, a.address.0, b.address.0].map(|address| self.name(address));
        let [to, left, right] = &names;
        let scale = if alpha == 1.0 { String::new() } else { format!("{alpha} ") };
        let product = product((left, a.is_transposed), (right, b.is_transposed));
        let bias = if bias == 0 { String::new() } else { format!(" + {}", self.name(bias)) };
        self.trace.push(format!("{to} {sign} {scale}{product}{bias} [{m}, {n}, {k}]"));
        self.write(&reads, false, vec![(d, [m, n], bytes, value)]);
    }

    /// Checks the noise of a launch; gives what comes before what it multiplies.
    fn noise(&self, fields: &mut Fields<'_>) -> &'static str {
        let (given, key_address) = (fields.u64(), fields.u64());
        let (key, first_sample) = ([fields.u32(), fields.u32()], fields.u64());
        let (batch, kind, sigma, _) =
            (fields.u32(), fields.u32(), f32::from_bits(fields.u32()), fields.u32());
        // Copies of biases have none in layers that do.
        if kind == 0 {
            assert_eq!((given, key_address), (0, 0));
            return "";
        }
        let (address, first_kind) = match self.noise {
            Source::Off => panic!("noise of kind {kind} in a layer without"),
            Source::Generated(_) => ((0, 0), 1),
            Source::Keyed { key, .. } => ((0, key.address), 1),
            Source::Given { z, .. } => ((z.address, 0), 3),
        };
        let is_per_token = self.noise.shape() == Some(NoiseShape::PerToken);
        assert_eq!((given, key_address), address);
        assert_eq!((batch as usize, kind), (self.shape.batch, first_kind + u32::from(is_per_token)));
        if let Source::Generated(generator) | Source::Keyed { generator, .. } = self.noise {
            let want = (generator.key().0, generator.first_sample(), generator.sigma());
            assert_eq!((key, first_sample, sigma), want);
        }
        "z*"
    }

    fn epilogue(&mut self, launch: &Launch) {
        let mut fields = Fields(launch.params.bytes());
        let z = self.noise(&mut fields);
        let [base, a, bias, output, total, bias_sums] = std::array::from_fn(|_| fields.u64());
        let (rows, channels, branches) = self.tiles(&mut fields, launch, &[base, a, bias, output]);
        assert_eq!((total, bias_sums, launch.shared_bytes), (0, 0, 0));
        let (bytes, mut reads) = (self.dtype.bytes(), Reads::default());
        let [first, second] =
            [base, a].map(|address| self.read(&mut reads, address, [rows, channels], bytes));
        let third = self.read(&mut reads, bias, [1, channels], bytes);
        let noisy = add(second, third);
        let noisy = if z.is_empty() { noisy } else { map(&noisy, z) };
        let name = |machine: &mut Self, address| match address {
            0 => "0".to_owned(),
            address => machine.name(address),
        };
        let [base, a, bias] = [base, a, bias].map(|address| name(self, address));
        let to = self.name(output);
        self.trace.push(format!("{to} = {base} + {z}({a} + {bias})"));
        let shape = [branches * rows, channels];
        self.write(&reads, branches == 1, vec![(output, shape, bytes, add(first, noisy))]);
    }

    fn epilogue_backward(&mut self, launch: &Launch) {
        let mut fields = Fields(launch.params.bytes());
        let z = self.noise(&mut fields);
        let [base, dy, bias, e, total, bias_sums] = std::array::from_fn(|_| fields.u64());
        let (rows, channels, branches) = self.tiles(&mut fields, launch, &[dy, e, total]);
        assert_eq!((base, bias), (0, 0));
        // The sums of each thread's channels.
        let (threads, bytes) = (launch.block.iter().product::<u32>(), self.dtype.bytes());
        let shared = if bias_sums == 0 { 0 } else { threads * 16 / bytes as u32 * 4 };
        assert_eq!(launch.shared_bytes, shared);
        let mut reads = Reads::default();
        let g = self.read(&mut reads, dy, [branches * rows, channels], bytes);
        let noisy = if z.is_empty() { g.clone() } else { map(&g, z) };
        let over_branches = |sum: &Sum| if branches > 1 { map(sum, "Σb") } else { sum.clone() };
        let [sum_of_g, sum_of_e] = [&g, &noisy].map(over_branches);
        let dy = self.name(dy);
        let b = if branches > 1 { "Σb " } else { "" };
        let (mut writes, mut line): (Vec<Write>, Vec<String>) = Default::default();
        if total != 0 {
            line.push(format!("{} = {b}{dy}", self.name(total)));
            writes.push((total, [rows, channels], bytes, sum_of_g));
        }
        if e != 0 {
            line.push(format!("{} = {b}{z}{dy}", self.name(e)));
            writes.push((e, [rows, channels], bytes, sum_of_e.clone()));
        }
        if bias_sums != 0 {
            line.push(format!("{} = parts of Σr {b}{z}{dy}", self.name(bias_sums)));
            let parts = launch.grid[1] as usize;
            writes.push((bias_sums, [parts, channels], 4, map(&sum_of_e, "parts")));
        }
        assert!(!writes.is_empty(), "nothing to do");
        self.trace.push(line.join(", "));
        self.write(&reads, false, writes);
    }

    /// Checks the sizes that an epilogue is launched with. Gives the rows, channels and branches.
    fn tiles(&self, fields: &mut Fields<'_>, launch: &Launch, vectors: &[u64]) -> (usize, usize, usize) {
        let [rows, tokens, channels, branches, part, aligned]: [u32; 6] =
            std::array::from_fn(|_| fields.u32());
        assert!(fields.0.is_empty());
        let is_shared = self.shape.shared_input && self.shape.branches == 2;
        // Copies of biases have one row.
        if (rows, tokens, branches) != (1, 1, 1) {
            assert_eq!((tokens as usize, branches), (self.shape.tokens, if is_shared { 2 } else { 1 }));
        }
        let width = 16 / self.dtype.bytes() as u32;
        let ([grid_x, grid_y, 1], [block_x, block_y, 1]) = (launch.grid, launch.block) else {
            panic!("{launch:?}");
        };
        let covered = u64::from(grid_x * block_x * width);
        assert!(covered >= channels.into() && block_x * block_y == 256, "{launch:?}");
        // Every part has a row, and there is none behind them.
        assert!(
            u64::from(grid_y) * u64::from(part) >= rows.into() && (grid_y - 1) * part < rows,
            "{launch:?}"
        );
        // Vectors of 16 bytes wherever they work, also of a given z, whose rows are of f32.
        let is_aligned = |start: u64| start.is_multiple_of(16);
        let z = match self.noise {
            Source::Given { z, .. } => z.address,
            _ => 0,
        };
        let works = channels.is_multiple_of(width) && vectors.iter().all(|&start| is_aligned(start));
        assert_eq!(aligned, u32::from(works && is_aligned(z)), "{vectors:#x?}, z {z:#x}");
        (rows as usize, channels as usize, branches as usize)
    }

    fn partial_sums(&mut self, launch: &Launch) {
        let mut fields = Fields(launch.params.bytes());
        let (partial, out, length) = (fields.u64(), fields.u64(), fields.u64() as usize);
        let is_aligned = fields.u64() != 0;
        let (parts, groups) = (fields.u32() as usize, fields.u32());
        assert!(groups.is_power_of_two());
        assert!(!is_aligned || (partial.is_multiple_of(16) && length.is_multiple_of(4)));
        assert!(fields.0.is_empty());
        let mut reads = Reads::default();
        let value = self.read(&mut reads, partial, [parts, length], 4);
        let total = value.iter().map(|(term, &factor)| {
            let rows = term.strip_prefix("parts").unwrap_or_else(|| panic!("{term}"));
            (factor, format!("Σr{rows}"))
        });
        let (total, to, from) = (sum(total), self.name(out), self.name(partial));
        self.trace.push(format!("{to} = Σ {from}"));
        self.write(&reads, false, vec![(out, [1, length], self.dtype.bytes(), total)]);
    }
}
