//! Many seeds: each on its own, a failing one told with everything that it takes to see it again. Every tenth runs twice,
//! because a simulation that is not deterministic proves nothing. Linear in the seeds; one thread.

use crate::coverage::Coverage;
use crate::simulation::{Report, Simulation};
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A seed that broke an invariant.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed: the same one fails again.
    pub seed: u64,
    /// What did not hold.
    pub message: String,
    /// What the seed was made of.
    pub mix: String,
    /// The last events before it.
    pub last_events: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "seed {} fails: {}", self.seed, self.message)?;
        writeln!(formatter, "its mix: {}", self.mix)?;
        writeln!(formatter, "its last {} events:", self.last_events.len())?;
        self.last_events.iter().try_for_each(|event| writeln!(formatter, "  {event}"))
    }
}

/// What a range of seeds has shown.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds that were run.
    pub seeds: u64,
    /// Events of all of them.
    pub events: u64,
    /// Requests of all of them.
    pub requests: u64,
    /// Tokens of all of them.
    pub tokens: u64,
    /// Virtual time of all of them, in microseconds.
    pub virtual_us: u64,
    /// Faults and paths of recovery that were reached.
    pub coverage: Coverage,
    /// Seeds that failed, at most `Summary::MAX_FAILURES` of them.
    pub failures: Vec<Failure>,
}

impl Summary {
    /// After this many failures no more seeds are run.
    pub const MAX_FAILURES: usize = 10;

    fn add(&mut self, report: &Report) {
        self.events += report.events;
        self.requests += report.requests;
        self.tokens += report.tokens;
        self.virtual_us += report.virtual_time.0;
        self.coverage.merge(&report.coverage);
    }

    /// Takes the summary of another range.
    pub fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.virtual_us += other.virtual_us;
        self.coverage.merge(&other.coverage);
        self.failures.extend(other.failures);
    }
}

/// Runs one seed.
pub fn run_seed(seed: u64) -> Result<Report, Box<Failure>> {
    let mut simulation = Simulation::new(seed);
    let mix = format!("{:?}", simulation.around.mix);
    // What is left of the simulation after a panic is only read for its trace.
    catch_unwind(AssertUnwindSafe(|| simulation.live())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
        Box::new(Failure { seed, message: text.to_owned(), mix, last_events: simulation.around.trace.last() })
    })
}

/// Runs a range of seeds, every tenth of them twice.
pub fn run_seeds(seeds: Range<u64>) -> Summary {
    let mut summary = Summary::default();
    for seed in seeds {
        if summary.failures.len() >= Summary::MAX_FAILURES {
            break;
        }
        summary.seeds += 1;
        match run_seed(seed).and_then(|report| same_again(seed, report)) {
            Ok(report) => summary.add(&report),
            Err(failure) => summary.failures.push(*failure),
        }
    }
    summary
}

fn same_again(seed: u64, report: Report) -> Result<Report, Box<Failure>> {
    if !seed.is_multiple_of(10) {
        return Ok(report);
    }
    let again = run_seed(seed)?;
    if again == report {
        return Ok(report);
    }
    let message = format!("two runs differ: {report:?} and {again:?}");
    Err(Box::new(Failure { seed, message, mix: String::new(), last_events: Vec::new() }))
}
