//! In how many random schedules the simulator runs each case, and a count of what it has run.

use pace_kernels::cuda::KERNELS;
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex};

/// Random schedules of a small case. What sanitizers look for depends little on the order.
const SCHEDULES: u64 = if pace_simt::IS_SANITIZED { 1 } else { 32 };
/// Cases that launch up to so many threads run in all of them; up to four times as many, in a quarter.
const SMALL: usize = 1024;
/// As many for every case: `PACE_SCHEDULES=1000 cargo test --release --test cuda -- simt::`.
static GIVEN: LazyLock<Option<u64>> = LazyLock::new(|| {
    std::env::var("PACE_SCHEDULES").ok().map(|given| given.parse().expect("PACE_SCHEDULES is a number"))
});

#[derive(Default)]
struct Count {
    /// Cases, by the random schedules that they ran in.
    cases: BTreeMap<u64, usize>,
    /// Launches in random schedules, by kernel.
    launches: BTreeMap<&'static str, u64>,
}

static COUNT: LazyLock<Mutex<Count>> = LazyLock::new(Mutex::default);

/// The random schedules of a case that launches so many threads, which is counted.
pub fn of_case(threads: usize) -> u64 {
    let schedules = GIVEN.unwrap_or(match threads {
        0..=SMALL => SCHEDULES,
        _ if threads <= 4 * SMALL => SCHEDULES.div_ceil(4),
        _ => 1,
    });
    *COUNT.lock().unwrap().cases.entry(schedules).or_default() += 1;
    schedules
}

/// Counts a launch in a random schedule.
pub fn count_launch(kernel: &'static str) {
    *COUNT.lock().unwrap().launches.entry(kernel).or_default() += 1;
}

/// Says what was counted.
pub fn report() {
    let count = COUNT.lock().unwrap();
    let cases: Vec<String> = count.cases.iter().map(|(n, cases)| format!("{cases} in {n}")).collect();
    let launches = |name| count.launches.get(name).copied().unwrap_or(0);
    let (fewest, kernel) =
        KERNELS.iter().map(|kernel| (launches(kernel.name), kernel.name)).min().expect("there are kernels");
    println!("cases by random schedules: {}", cases.join(", "));
    println!("launches of each kernel in random schedules: {fewest} or more ({kernel})");
}
