//! Whether the threads of the CPU operators are in this process.

use super::{Failure, PACE_ERROR_FORKED, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Threads may have started, here or in the process that this one was forked from.
static STARTED: AtomicBool = AtomicBool::new(false);
/// This process was forked after that.
static FORKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_fork() {
    FORKED.store(true, Ordering::Relaxed);
}

/// To be called before whatever starts or uses threads. Fails where they are not: a call would wait for them forever.
pub(super) fn check_threads() -> Result<()> {
    if FORKED.load(Ordering::Relaxed) {
        let text = "this process was forked from one that had used the CPU operators, and has none of their threads: \
                    start it afresh (in Python by the start method `spawn`)";
        return Err(Failure::new(PACE_ERROR_FORKED, text));
    }
    if !STARTED.load(Ordering::Acquire) {
        #[cfg(unix)]
        // SAFETY: the function may run in a child of a process with many threads: it stores to an atomic. The loader takes it
        // off the list if it unloads the library. Two threads may both be here; then it stores twice.
        unsafe {
            // Without memory for it, as without the check.
            libc::pthread_atfork(None, None, Some(note_fork));
        }
        // Only now: another thread that sees it starts threads at once.
        STARTED.store(true, Ordering::Release);
    }
    Ok(())
}
