//! The PyTorch package: `pytest` over `python/tests`, one trial for each file.
//!
//! It takes a Python with torch, timm and pytest: `PACE_PYTHON`, or `python3` if it has them. The package itself need not be
//! installed.

#[path = "common/installed.rs"]
mod installed;
#[path = "common/python.rs"]
mod python;

use installed::{prefix, root};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{LazyLock, Mutex};

/// The Python to use, or why there is none.
static PYTHON: LazyLock<Result<String, String>> = LazyLock::new(|| {
    let python = python::with(&["torch", "timm", "pytest", "safetensors"]);
    // One that was named is meant to be used.
    assert!(python.is_ok() || std::env::var_os("PACE_PYTHON").is_none(), "PACE_PYTHON={python:?}");
    python
});

/// A `files.py`, which has loaded PyTorch, and waits for a file of tests.
struct Server {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Server {
    fn start(python: &str) -> Self {
        let library = format!("libpace_kernels{}", std::env::consts::DLL_SUFFIX);
        let mut process = Command::new(python)
            .arg(tests().join("files.py"))
            .env("PYTHONPATH", root().join("python/src"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PACE_KERNELS_LIBRARY", prefix().join("lib").join(library))
            .current_dir(env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, answers }
    }

    /// Whether these tests pass, and what pytest says.
    fn test(&mut self, file: &str) -> (bool, String) {
        let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file).with_extension("log");
        let (tests, mut answer) = (tests().join(file), String::new());
        writeln!(self.process.stdin.as_ref().unwrap(), "{}\t{}", tests.display(), log.display()).unwrap();
        self.answers.read_line(&mut answer).unwrap();
        (answer == "0\n", std::fs::read_to_string(log).unwrap() + &answer)
    }
}

/// Those that wait: as many as there ever were trials at once.
static SERVERS: Mutex<Vec<Server>> = Mutex::new(Vec::new());

fn tests() -> PathBuf {
    root().join("python/tests")
}

/// Says what is going on while nothing else is printed. Not by `eprintln!`: the test harness keeps that until a test fails.
fn say(what: &str) {
    // It does not matter if nobody listens.
    let _ = writeln!(std::io::stderr(), "... {what}");
}

fn test(file: &str) -> Result<Completion, Failed> {
    let python = match &*PYTHON {
        Ok(python) => python,
        Err(why) => return Ok(Completion::ignored_with(why)),
    };
    let waiting = SERVERS.lock().unwrap().pop();
    let mut server = waiting.unwrap_or_else(|| Server::start(python));
    say(&format!("pytest {file}"));
    let (passed, said) = server.test(file);
    if !passed {
        return Err(said.into());
    }
    SERVERS.lock().unwrap().push(server);
    println!("{said}");
    Ok(Completion::Completed)
}

/// Files of tests that take close to a minute or more.
const LONGEST: [&str; 4] = ["test_compile.py", "test_readme.py", "test_sweep.py", "test_train.py"];

fn main() {
    let arguments = Arguments::from_args();
    let entries = std::fs::read_dir(tests()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = names.filter(|name| name.starts_with("test_") && name.ends_with(".py")).collect();
    // Two run at once: the longest ones come first, so that none is alone at the end.
    files.sort_by_key(|file| (!LONGEST.contains(&file.as_str()), file.clone()));
    assert!(!files.is_empty());
    let trials = files.into_iter().map(|file| Trial::ignorable_test(file.clone(), move || test(&file)));
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
