//! The long form of the tests of the noise; see `USAGE`.

use pace_noise_evidence::finding::{Finding, LEAST, uniformity};
use pace_noise_evidence::generator::Library;
use pace_noise_evidence::stream::{Axis, Stream};
use pace_noise_evidence::{normals, words};
use std::error::Error;
use std::io::{self, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

const USAGE: &str = "\
pace-noise-evidence [BYTES DRAWS]   all tests on 2^BYTES bytes of words and 2^DRAWS normals in all (38 and 33)
pace-noise-evidence words AXIS      the words of a walk without end, for other programs
pace-noise-evidence dieharder AXIS  all tests of dieharder on a walk; hours
";

/// Findings of all walks, printed as they come.
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// A table of walks × tests.
    fn table(&mut self, title: &str, axes: &[Axis], run: impl Fn(Axis) -> Vec<Finding>) {
        println!("\n{title}: the probability of the tail, per walk and test\n");
        for (i, &axis) in axes.iter().enumerate() {
            let start = Instant::now();
            let findings = run(axis);
            if i == 0 {
                for (column, finding) in (1..).zip(&findings) {
                    println!("({column}) {}", finding.test);
                }
                let columns: String = (1..=findings.len()).map(|column| format!("{column:>6}")).collect();
                println!("\n{:<12}{columns}  seconds", "walk");
            }
            let p: String = findings.iter().map(|finding| format!("{:>6.0e}", finding.p())).collect();
            println!("{:<12}{p}  {:.0}", format!("{axis:?}"), start.elapsed().as_secs_f64());
            for finding in findings.iter().filter(|finding| finding.fails()) {
                println!("    FAILS: {}, p = {:e}", finding.test, finding.p());
            }
            self.findings.extend(findings);
        }
    }

    /// The rule: no probability below `LEAST`, and those that should be uniform are.
    fn verdict(mut self) -> ExitCode {
        let uniform = uniformity(&self.findings);
        println!("\n{}: p = {:.3}", uniform.test, uniform.p());
        let least = self.findings.iter().min_by(|a, b| a.p().total_cmp(&b.p())).expect("findings");
        println!("{} findings, the least p is {:.2e} ({})", self.findings.len(), least.p(), least.test);
        self.findings.push(uniform);
        let failed = self.findings.iter().filter(|finding| finding.fails()).count();
        println!("{failed} below {LEAST:e}, which an ideal generator has in one of 5e8 findings");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn all(log2_bytes: u32, log2_draws: u32) -> ExitCode {
    let mut report = Report { findings: Vec::new() };
    let bytes = log2_bytes - Axis::ALL.len().ilog2();
    println!("walks, the index that moves fastest last:");
    for axis in Axis::ALL {
        println!("{:<12}  {}", format!("{axis:?}"), axis.walk());
    }
    let title = format!("words, {} walks of 2^{bytes} bytes", Axis::ALL.len());
    report.table(&title, Axis::ALL, |axis| words::run::<Library>(axis, bytes, words::Form::Long));
    let draws = log2_draws - normals::AXES.len().ilog2();
    let title = format!("normals, {} walks of 2^{draws} draws", normals::AXES.len());
    report.table(&title, &normals::AXES, |axis| normals::run::<Library>(axis, draws, 4));
    report.verdict()
}

fn write_words(axis: Axis, mut to: impl Write) -> io::Result<()> {
    let mut stream = Stream::<Library>::new(axis);
    let (mut words, mut bytes) = (vec![0; 1 << 14], Vec::new());
    loop {
        stream.read(&mut words);
        bytes.clear();
        bytes.extend(words.iter().flat_map(|word: &u32| word.to_le_bytes()));
        match to.write_all(&bytes) {
            // The reader has enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
    }
}

fn dieharder(axis: Axis) -> Result<ExitCode, Box<dyn Error>> {
    let mut child = Command::new("dieharder").args(["-a", "-g", "200"]).stdin(Stdio::piped()).spawn()?;
    write_words(axis, child.stdin.take().expect("a pipe"))?;
    Ok(if child.wait()?.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn axis(name: &str) -> Result<Axis, Box<dyn Error>> {
    let axis = Axis::ALL.iter().find(|axis| format!("{axis:?}") == name);
    Ok(*axis.ok_or_else(|| format!("no walk is called {name}; there are {:?}", Axis::ALL))?)
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok(all(38, 33)),
        ["words", name] => {
            write_words(axis(name)?, io::stdout().lock())?;
            Ok(ExitCode::SUCCESS)
        }
        ["dieharder", name] => dieharder(axis(name)?),
        [bytes, draws] => Ok(all(bytes.parse()?, draws.parse()?)),
        _ => Err(USAGE.into()),
    }
}
