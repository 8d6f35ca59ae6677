//! The one place of the live process where monotonic time is read, in microseconds since the clock was made.

use llmscale_types::Time;
use std::time::Instant;

/// Starts at zero and only goes forward.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock at zero.
    #[expect(clippy::new_without_default, reason = "a clock that starts by default would start at odd moments")]
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// Now.
    pub fn now(&self) -> Time {
        Time(self.0.elapsed().as_micros() as u64)
    }

    /// Nanoseconds since the start, for measuring spans below a microsecond.
    pub fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}
