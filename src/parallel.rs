//! Loops over tasks, on the threads of rayon's current pool or of the host program's OpenMP.
//!
//! All of them are one loop to rayon, whose parallel iterators would be compiled again for each: a quarter of this crate's code.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::any::Any;
use std::cell::Cell;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

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
    let threads = rayon::current_num_threads();
    // The threads of a process that this one was forked from are not here.
    let openmp = OPENMP.get().filter(|(_, process)| *process == std::process::id());
    match (most.min(threads), openmp) {
        (0 | 1, _) => work(),
        // OpenMP's loops within loops are serial.
        _ if in_openmp() => work(),
        // All threads, since OpenMP ends those that a smaller team does not have, and starts others for the next.
        (_, Some(&(parallel, _))) => on_openmp(parallel, threads, work),
        (threads, None) => (0..threads).into_par_iter().for_each(|_| work()),
    }
}

thread_local! {
    static IN_OPENMP: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is in a loop on OpenMP's threads. It must not wait for rayon's, which may all be in such loops.
pub(crate) fn in_openmp() -> bool {
    IN_OPENMP.get()
}

/// `GOMP_parallel`: calls `work(data)` on the calling thread and on others of its team, `threads` in all or fewer, and returns when
/// all have returned. `flags` are 0.
pub type OpenMp = unsafe extern "C" fn(
    work: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
    threads: c_uint,
    flags: c_uint,
);

/// The function, and the process that registered it.
static OPENMP: OnceLock<(OpenMp, u32)> = OnceLock::new();

/// Runs the CPU operators on the threads of an OpenMP runtime instead of rayon's, from now until the process ends.
///
/// It is for host programs whose own loops run on that runtime. Its threads wait for the next loop without sleeping, for
/// milliseconds, and threads of another pool would share cores with them. How many threads there are is still what rayon says, and had
/// better be what the host program's loops have. Loops within loops are serial. In a process that is forked after this the operators
/// are on rayon's threads again.
///
/// # Errors
/// [`Error::Argument`] if one has been set already.
///
/// # Safety
/// The function must be `GOMP_parallel` of libgomp, of LLVM's or of Intel's OpenMP, or do the same, callable from any thread at any
/// time, for as long as the process runs.
pub unsafe fn set_openmp(parallel: OpenMp) -> Result<()> {
    let set = OPENMP.set((parallel, std::process::id()));
    set.map_err(|_| Error::Argument { argument: "parallel", problem: "has been set before" })
}

fn on_openmp(parallel: OpenMp, threads: usize, work: &(dyn Fn() + Sync)) {
    struct Job<'a> {
        work: &'a (dyn Fn() + Sync),
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }
    /// # Safety
    /// `data` is a [`Job`].
    unsafe extern "C" fn enter(data: *mut c_void) {
        // SAFETY: the caller's promise; the job is the one below, which outlives the call of `parallel`.
        let job = unsafe { &*data.cast::<Job<'_>>() };
        let before = IN_OPENMP.replace(true);
        // Nothing may unwind through the runtime.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(job.work)) {
            job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        IN_OPENMP.set(before);
    }
    let job = Job { work, panic: Mutex::new(None) };
    // SAFETY: by the promise of `set_openmp`; what threads share of the job is `Sync`.
    unsafe { parallel(enter, (&raw const job).cast_mut().cast(), threads as c_uint, 0) };
    if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
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

    /// Some of the threads that are asked for may be all that there are; a panic on one of them reaches the caller.
    #[test]
    fn openmp_runs_tasks() {
        unsafe extern "C" fn alone(
            work: unsafe extern "C" fn(*mut c_void),
            data: *mut c_void,
            threads: c_uint,
            flags: c_uint,
        ) {
            assert_eq!((threads, flags), (4, 0));
            // SAFETY: `work` is called with its data.
            unsafe {
                work(data);
                work(data);
            }
        }
        let calls = AtomicUsize::new(0);
        on_openmp(alone, 4, &|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        let second = || assert_eq!(calls.fetch_add(1, Ordering::Relaxed), 2, "the second fails");
        let caught = catch_unwind(AssertUnwindSafe(|| on_openmp(alone, 4, &second)));
        let message = *caught.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("the second fails"), "{message}");
        assert_eq!(calls.load(Ordering::Relaxed), 4);
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
