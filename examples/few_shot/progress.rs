//! Progress on stderr: a bar on a terminal, a plain line every few seconds in a log.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a log gets a line.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress of work that takes a known number of steps.
pub struct Progress {
    bar: ProgressBar,
    label: String,
    last_line: Instant,
}

impl Progress {
    pub fn new(label: impl Into<String>, steps: u64) -> Self {
        let label = label.into();
        let style = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len}, {eta} left  {wide_msg}")
            .expect("the template is valid")
            .progress_chars("=> ");
        let bar = ProgressBar::new(steps).with_style(style).with_prefix(label.clone());
        Self { bar, label, last_line: Instant::now() }
    }

    /// One more step is done; `state` says where the work is.
    pub fn step(&mut self, state: impl Into<String>) {
        let state = state.into();
        self.bar.inc(1);
        // The bar hides itself where stderr is no terminal.
        if self.bar.is_hidden() && self.last_line.elapsed() >= INTERVAL {
            let (done, steps) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let seconds = self.bar.elapsed().as_secs();
            eprintln!("{}: {done}/{steps} after {seconds} s, {state}", self.label);
            self.last_line = Instant::now();
        }
        self.bar.set_message(state);
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
