//! What the sanitizers stop in kernels. They end the process, so each fault has one of its own.

use pace_simt::{Launch, Memory, Schedule};
use std::process::Command;

/// The kernel that `run` runs.
const KERNEL: &str = "PACE_SIMT_KERNEL";

#[test]
#[ignore = "a process of its own for `faults_are_found`"]
fn run() {
    let kernel = std::env::var(KERNEL).unwrap();
    let mut memory = Memory::new(0);
    let (x, y) = (memory.input("x", &[1f32; 16]), memory.output::<f32>("y", 16));
    let params: Vec<u8> = [x.address(), y.address(), 16].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let launch = Launch {
        kernel: &kernel,
        grid: [1; 3],
        cluster: [1; 3],
        block: [16, 1, 1],
        shared_bytes: 64,
        params: &params,
    };
    memory.launch(&launch, Schedule::InOrder).unwrap();
}

#[test]
fn faults_are_found() {
    for (kernel, message) in [
        ("copy", None),
        ("copy_unseen_write", Some("use-after-poison")),
        ("sum_past_shared_memory", Some("use-after-poison")),
        ("unseen_read", Some("use-after-poison")),
        ("unseen_read_past_the_red_zone", Some("heap-buffer-overflow")),
        ("read_past_shared_memory", Some("use-after-poison")),
        ("index_past_an_array", Some("index 16 out of bounds")),
        ("overflow", Some("signed integer overflow")),
        ("shift_too_far", Some("shift exponent 32 is too large")),
        ("cast_too_large", Some("-16 is outside the range")),
        ("misaligned", Some("misaligned address")),
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--ignored", "--exact", "run"]).env(KERNEL, kernel).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), message.is_none(), "{kernel}: {stderr}");
        assert!(message.is_none_or(|message| stderr.contains(message)), "{kernel}: {stderr}");
    }
}
