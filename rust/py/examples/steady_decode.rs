//! Prints the medians of `steady_decode` for three sizes.
#![expect(clippy::print_stdout, reason = "an example prints")]

fn main() {
    for running in [256, 1_024, 8_192] {
        let mut steps = _core::measure::steady_decode(running, 400);
        steps.sort_by_key(|step| step.plan_ns + step.complete_ns);
        let middle = steps[steps.len() / 2];
        let hashing = steps.iter().map(|step| step.hashing_ns).sum::<u64>() / steps.len() as u64;
        let bytes = steps.iter().map(|step| step.delta_bytes).max();
        println!(
            "{running}: plan {} ns complete {} ns, hashing {hashing} ns, delta {bytes:?} bytes at most",
            middle.plan_ns, middle.complete_ns
        );
    }
}
