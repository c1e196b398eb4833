//! The Python that tests call.

use std::process::Command;

/// The Python that `PACE_PYTHON` names, or `python3`, if it has `modules`, or why there is none.
pub fn with(modules: &[&str]) -> Result<String, String> {
    // Tests run elsewhere, and a name alone is looked for in PATH.
    let absolute = |path: String| match path.contains(std::path::MAIN_SEPARATOR) {
        true => std::path::absolute(&path).map_or(path, |path| path.display().to_string()),
        false => path,
    };
    let python = std::env::var("PACE_PYTHON").map_or_else(|_| "python3".into(), absolute);
    // Found, not imported: that takes seconds.
    let find = "import sys, importlib.util as i; sys.exit(', '.join(m for m in sys.argv[1:] if not i.find_spec(m)) or 0)";
    let problem = match Command::new(&python).args(["-c", find]).args(modules).output() {
        Ok(output) if output.status.success() => return Ok(python),
        Ok(output) => {
            format!("has no {}", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default())
        }
        Err(error) => format!("does not start: {error}"),
    };
    Err(format!("{python} {problem}; PACE_PYTHON names another Python"))
}
