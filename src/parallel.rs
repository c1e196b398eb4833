//! Loops over tasks on the threads of rayon's current pool.
//!
//! All of them are one loop to rayon, whose parallel iterators would be compiled again for each: a quarter of this crate's code.

use rayon::prelude::*;
use std::sync::Mutex;

/// Elements of one task that does little with each: so many are worth handing over.
pub(crate) const TASK: usize = 1 << 14;

/// Rows of such a task.
pub(crate) fn rows(width: usize) -> usize {
    (TASK / width).max(1)
}

/// Calls `body` with every task.
pub(crate) fn for_each<T>(tasks: impl Iterator<Item = T> + Send, body: impl Fn(T) + Sync) {
    for_each_init(tasks, || (), |(), task| body(task));
}

/// Calls `body` with every task and with what `init` made, which a thread takes from one of its tasks to the next.
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

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::ThreadPoolBuilder;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// More and fewer tasks than threads, on the caller's threads and in pools.
    fn in_pools(test: impl Fn(usize) + Sync) {
        for count in [0, 1, 2, 3, 100] {
            test(count);
            for threads in [1, 2, 5] {
                ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| test(count));
            }
        }
    }

    #[test]
    fn every_task_is_done_once_and_results_are_in_order() {
        in_pools(|count| {
            let mut done = vec![0; count];
            for_each(done.iter_mut().enumerate(), |(i, done)| *done += i + 1);
            assert!(done.into_iter().eq(1..=count));
            assert!(map_init(0..count, || (), |(), i| i * i).into_iter().eq((0..count).map(|i| i * i)));
        });
    }

    /// A thread makes one, and only if it has a task.
    #[test]
    fn threads_keep_what_they_made() {
        in_pools(|count| {
            let made = AtomicUsize::new(0);
            let init = || made.fetch_add(1, Ordering::Relaxed);
            for_each_init(0..count, init, |_, _| {});
            let made = made.into_inner();
            assert!(made <= count.min(rayon::current_num_threads()) && (made > 0) == (count > 0), "{made}");
        });
    }

    #[test]
    fn tasks_have_tasks() {
        in_pools(|count| {
            let sums = map_init(
                0..count,
                || (),
                |(), i| {
                    map_init(0..i, || (), |(), j| map_init(0..j, || (), |(), k| k).len())
                        .into_iter()
                        .sum::<usize>()
                },
            );
            assert!(sums.into_iter().eq((0..count).map(|i| (0..i).sum::<usize>())));
        });
    }

    /// A panic reaches the caller, and whoever comes next finds nothing broken.
    #[test]
    fn panics_reach_the_caller() {
        in_pools(|count| {
            let run = || for_each(0..count, |i| assert!(i + 1 < count, "the last one"));
            let caught = catch_unwind(AssertUnwindSafe(run));
            assert_eq!(caught.is_err(), count > 0);
        });
    }
}
