//! The Python that tests call.

use std::process::Command;

/// The Python that `PACE_PYTHON` names, or `python3`, if it can import `modules` (comma-separated), or why there is none.
pub fn with(modules: &str) -> Result<String, String> {
    // Tests run elsewhere, and a name alone is looked for in PATH.
    let absolute = |path: String| match path.contains(std::path::MAIN_SEPARATOR) {
        true => std::path::absolute(&path).map_or(path, |path| path.display().to_string()),
        false => path,
    };
    let python = std::env::var("PACE_PYTHON").map_or_else(|_| "python3".into(), absolute);
    let output = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    let problem = match output {
        Ok(output) if output.status.success() => return Ok(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    Err(format!("{python}: {problem}; PACE_PYTHON names another Python"))
}
