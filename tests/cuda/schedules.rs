//! In how many random schedules the simulator runs each case, and a count of what it has run.

use pace_kernels::cuda::KERNELS;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex};

/// Random schedules of a small case; `PACE_SCHEDULES` says another number. Under sanitizers there is one.
static SCHEDULES: LazyLock<u64> = LazyLock::new(|| match std::env::var("PACE_SCHEDULES") {
    Ok(given) => given.parse().expect("PACE_SCHEDULES is a number"),
    Err(_) if pace_simt::IS_SANITIZED => 1,
    Err(_) => 32,
});
/// Cases that launch up to so many threads run in all of them; up to four times as many, in a quarter.
const SMALL: usize = 1024;

#[derive(Default)]
struct Count {
    /// Cases, by the random schedules that they ran in.
    cases: BTreeMap<u64, usize>,
    /// Launches in random schedules, by kernel.
    launches: BTreeMap<&'static str, u64>,
}

static COUNT: LazyLock<Mutex<Count>> = LazyLock::new(Mutex::default);

/// The random schedules of a case that launches so many threads, of these kernels; it is counted.
pub fn of_case(threads: usize, kernels: &BTreeSet<&'static str>) -> u64 {
    let mut count = COUNT.lock().unwrap();
    let is_new = |kernel: &&str| count.launches.get(kernel).copied().unwrap_or(0) < *SCHEDULES;
    let schedules = match threads {
        0..=SMALL => *SCHEDULES,
        // Each kernel has some case that is in all of them.
        _ if kernels.iter().any(is_new) => *SCHEDULES,
        _ if threads <= 4 * SMALL => SCHEDULES.div_ceil(4),
        _ => 1,
    };
    *count.cases.entry(schedules).or_default() += 1;
    schedules
}

/// Counts a launch in a random schedule.
pub fn count_launch(kernel: &'static str) {
    *COUNT.lock().unwrap().launches.entry(kernel).or_default() += 1;
}

/// Says what was counted in a run of all tests.
///
/// # Panics
/// If there is a kernel that no case ran in all schedules.
pub fn report() {
    let count = COUNT.lock().unwrap();
    let cases: Vec<String> = count.cases.iter().map(|(n, cases)| format!("{cases} in {n}")).collect();
    println!("cases by random schedules: {}", cases.join(", "));
    let launches = |name| count.launches.get(name).copied().unwrap_or(0);
    let launched = KERNELS.iter().map(|kernel| (kernel.name, launches(kernel.name)));
    let few: Vec<_> = launched.filter(|&(_, launches)| launches < *SCHEDULES).collect();
    assert!(few.is_empty(), "launched in fewer than {} random schedules: {few:?}", *SCHEDULES);
}
