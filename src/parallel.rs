//! Loops over tasks on the threads of rayon's current pool.
//!
//! All of them are one loop to rayon, whose parallel iterators would be compiled again for each: a quarter of this crate's code, and
//! of that of every program which uses its generic operators.

use rayon::prelude::*;
use std::sync::Mutex;

/// Calls `body` with every task.
pub(crate) fn for_each<T>(tasks: impl Iterator<Item = T> + Send, body: impl Fn(T) + Sync) {
    for_each_init(tasks, || (), |(), task| body(task));
}

/// Calls `body` with every task and with what `init` made for the thread, which passes from one of its tasks to the next.
pub(crate) fn for_each_init<T, S>(
    tasks: impl Iterator<Item = T> + Send,
    init: impl Fn() -> S + Sync,
    body: impl Fn(&mut S, T) + Sync,
) {
    let count = tasks.size_hint().1.unwrap_or(usize::MAX);
    // Of those that are left, a thread takes the next.
    let tasks = Mutex::new(tasks.fuse());
    let next = || tasks.lock().expect("no thread panics while it holds this").next();
    on_threads(count, &|| {
        let mut state = None;
        while let Some(task) = next() {
            body(state.get_or_insert_with(&init), task);
        }
    });
}

/// What `body` makes of every task, in the order of the tasks; otherwise as [`for_each_init`].
pub(crate) fn map_init<T, S, R: Send>(
    tasks: impl Iterator<Item = T> + Send,
    init: impl Fn() -> S + Sync,
    body: impl Fn(&mut S, T) -> R + Sync,
) -> Vec<R> {
    let results = Mutex::new(Vec::new());
    for_each_init(tasks.enumerate(), init, |state, (i, task)| {
        let result = body(state, task);
        let mut results = results.lock().expect("no thread panics while it holds this");
        if results.len() <= i {
            results.resize_with(i + 1, || None);
        }
        results[i] = Some(result);
    });
    let results = results.into_inner().expect("no thread panicked");
    results.into_iter().map(|result| result.expect("every task was done")).collect()
}

/// Calls `work` on every thread that is free, of `most` at most.
fn on_threads(most: usize, work: &(dyn Fn() + Sync)) {
    match most.min(rayon::current_num_threads()) {
        0 | 1 => work(),
        threads => (0..threads).into_par_iter().for_each(|_| work()),
    }
}
