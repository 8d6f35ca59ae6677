//! Times, memory and how they are told: one line `case unit value` per figure.

use std::hint::black_box;
use std::time::Instant;

/// Tells one figure.
pub fn tell(case: &str, unit: &str, value: f64) {
    println!("{case} {unit} {value}");
}

/// Resident memory of this process in bytes.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("this is Linux");
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("the second number is the resident set") * 4_096
}

/// Runs `once` for every prompt: all in a row for the rate, and again one by one for the percentiles.
pub fn time_each<P, R>(case: &str, prompts: &[P], mut once: impl FnMut(&P) -> R) {
    let started = Instant::now();
    for prompt in prompts {
        black_box(once(prompt));
    }
    tell(&format!("{case}/rate"), "1/s", prompts.len() as f64 / started.elapsed().as_secs_f64());
    let mut nanoseconds: Vec<u64> = prompts
        .iter()
        .map(|prompt| {
            let started = Instant::now();
            black_box(once(prompt));
            started.elapsed().as_nanos() as u64
        })
        .collect();
    nanoseconds.sort_unstable();
    for (name, share) in [("p50", 50), ("p99", 99)] {
        tell(&format!("{case}/{name}"), "us", nanoseconds[nanoseconds.len() * share / 100] as f64 / 1e3);
    }
}
