//! Whether one replica answers well enough to get more work: a circuit breaker. Answers, late answers and failures are
//! counted in a window of the front's time; an ejected replica gets nothing for a span that doubles with every repetition
//! and shrinks again with every span of calm; then one request at a time is its probe, and decides. Integers only, O(1) per event. Knows nothing of other
//! replicas: how many may be ejected at a time, and what is late or slow beside others, is `ejection`'s to say.

use llmscale_types::{Duration, LimitError, RequestId, Time};

/// Settings of all breakers of a fleet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthOptions {
    /// Answers and failures count for at least half of this, and at most all of it.
    pub window: Duration,
    /// Fewer failures in a window, or fewer late answers, eject nobody.
    pub least_failures: u32,
    /// How long the first ejection lasts.
    pub ejection: Duration,
    /// How long any lasts.
    pub max_ejection: Duration,
    /// So much time after an ejection takes back one doubling.
    pub forgive_after: Duration,
    /// A first token is late when it took this many times what was predicted, and `late_grace` longer than predicted.
    pub late_factor: u32,
    /// See `late_factor`.
    pub late_grace: Duration,
    /// A replica is slow when its steps take this many times the median of three or more that compute alike.
    pub slow_factor: u32,
}

impl Default for HealthOptions {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(10_000),
            least_failures: 5,
            ejection: Duration::from_millis(5_000),
            max_ejection: Duration::from_millis(60_000),
            forgive_after: Duration::from_millis(60_000),
            late_factor: 4,
            late_grace: Duration::from_millis(500),
            slow_factor: 8,
        }
    }
}

impl HealthOptions {
    /// Checks that the spans fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        LimitError::at_least("health window", self.window.0, 2)?;
        LimitError::at_least("least_failures", u64::from(self.least_failures), 1)?;
        LimitError::at_least("ejection", self.ejection.0, 1)?;
        LimitError::at_least("max_ejection", self.max_ejection.0, self.ejection.0)?;
        LimitError::at_least("forgive_after", self.forgive_after.0, 1)?;
        LimitError::at_least("late_factor", u64::from(self.late_factor), 2)?;
        LimitError::at_least("slow_factor", u64::from(self.slow_factor), 2)
    }

    /// Whether a first token that took so long came late.
    pub fn is_late(&self, predicted: Duration, taken: Duration) -> bool {
        let most = predicted.0.saturating_mul(u64::from(self.late_factor));
        taken.0 > most.max(predicted.0.saturating_add(self.late_grace.0))
    }
}

/// Whether a replica gets work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// It does.
    Trusted,
    /// It gets none before this moment, and one request after it.
    Ejected {
        /// The end of the span.
        until: Time,
    },
    /// It has got one request, which decides.
    Probing {
        /// Which.
        request: RequestId,
    },
}

impl Trust {
    /// The stable label used in status and metrics, at this moment.
    pub fn label(self, now: Time) -> &'static str {
        match self {
            Self::Trusted => "trusted",
            Self::Ejected { until } if now < until => "ejected",
            Self::Ejected { .. } | Self::Probing { .. } => "probing",
        }
    }
}

/// What was counted in one window.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// First tokens that came.
    pub answers: u32,
    /// Of these, late ones.
    pub late: u32,
    /// Attempts that ended by the replica's fault.
    pub failures: u32,
}

impl Tally {
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            answers: self.answers + other.answers,
            late: self.late + other.late,
            failures: self.failures + other.failures,
        }
    }
}

/// How bad something is: more is worse. Failures are worse than lateness, and that is worse than slow steps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Badness(u64);

impl Badness {
    const FAILING: u64 = 2_000;
    const LATE: u64 = 1_000;

    /// Steps that take this many times the median.
    pub(crate) fn slow(times: u64) -> Self {
        Self(times.min(Self::LATE - 1))
    }
}

/// See the file's header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Health {
    trust: Trust,
    /// Why it was ejected.
    badness: Badness,
    /// This half of a window and the one before.
    halves: [Tally; 2],
    half: u64,
    /// Ejections that are not forgiven.
    strikes: u32,
    last_end: Time,
    /// Ejections since the start.
    ejections: u64,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            trust: Trust::Trusted,
            badness: Badness::default(),
            halves: [Tally::default(); 2],
            half: 0,
            strikes: 0,
            last_end: Time(0),
            ejections: 0,
        }
    }
}

impl Health {
    /// Whether it gets work.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// Ejections since the start.
    pub fn ejections(&self) -> u64 {
        self.ejections
    }

    /// Whether it may get a request now.
    pub fn lets_in(&self, now: Time) -> bool {
        match self.trust {
            Trust::Trusted => true,
            Trust::Ejected { until } => now >= until,
            Trust::Probing { .. } => false,
        }
    }

    /// When it may be tried again, while it is ejected.
    pub(crate) fn end(&self) -> Option<Time> {
        match self.trust {
            Trust::Ejected { until } => Some(until),
            Trust::Trusted | Trust::Probing { .. } => None,
        }
    }

    /// Whether it gets work without being tried first.
    pub fn is_trusted(&self) -> bool {
        self.trust == Trust::Trusted
    }

    pub(crate) fn badness(&self) -> Badness {
        self.badness
    }

    /// What was counted in the window that ends now.
    pub fn tally(&self, now: Time, options: &HealthOptions) -> Tally {
        match half_of(now, options).saturating_sub(self.half) {
            0 => self.halves[0].plus(self.halves[1]),
            1 => self.halves[0],
            _ => Tally::default(),
        }
    }

    fn newest(&mut self, now: Time, options: &HealthOptions) -> &mut Tally {
        let half = half_of(now, options);
        self.halves = match half.saturating_sub(self.half) {
            0 => self.halves,
            1 => [Tally::default(), self.halves[0]],
            _ => [Tally::default(); 2],
        };
        self.half = self.half.max(half);
        &mut self.halves[0]
    }

    /// A request is sent there. While it is not trusted, that is its probe.
    pub fn sent(&mut self, request: RequestId) {
        if let Trust::Ejected { .. } = self.trust {
            self.trust = Trust::Probing { request };
        }
    }

    /// A request gave its first token. Whether it was a probe that failed by being late.
    pub(crate) fn answered(&mut self, now: Time, options: &HealthOptions, request: RequestId, late: bool) -> bool {
        let newest = self.newest(now, options);
        newest.answers += 1;
        newest.late += u32::from(late);
        if self.trust != (Trust::Probing { request }) {
            return false;
        }
        if late {
            self.eject(now, options, self.badness);
        } else {
            self.pardon();
        }
        late
    }

    /// It failed, with this request if there is one. Whether that was its probe.
    pub(crate) fn failed(&mut self, now: Time, options: &HealthOptions, request: Option<RequestId>) -> bool {
        self.newest(now, options).failures += 1;
        let was_probe = matches!(self.trust, Trust::Probing { request: probe } if Some(probe) == request);
        if was_probe {
            self.eject(now, options, self.badness);
        }
        was_probe
    }

    /// A request has left it and nothing was learned. The next one is the probe.
    pub fn let_go(&mut self, now: Time, request: RequestId) {
        if self.trust == (Trust::Probing { request }) {
            self.trust = Trust::Ejected { until: now };
        }
    }

    /// How bad its failures or late answers are, if that is enough to eject it. `others` is what the rest of its pool did:
    /// where a quarter of all first tokens are late, nobody stands out.
    pub(crate) fn verdict(&self, now: Time, options: &HealthOptions, others: Tally) -> Option<Badness> {
        let tally = self.tally(now, options);
        let permille = |part: u32, whole: u32| u64::from(part) * 1_000 / u64::from(whole.max(1));
        let failing = permille(tally.failures, tally.failures + tally.answers);
        if tally.failures >= options.least_failures && failing >= 500 {
            return Some(Badness(Badness::FAILING + failing));
        }
        let late = permille(tally.late, tally.answers);
        let alone = others.answers > 0 && permille(others.late, others.answers) < 250;
        (tally.late >= options.least_failures && late >= 500 && alone).then_some(Badness(Badness::LATE + late - 1))
    }

    /// It gets nothing for a while.
    pub(crate) fn eject(&mut self, now: Time, options: &HealthOptions, badness: Badness) {
        let forgiven = now.since(self.last_end).0 / options.forgive_after.0;
        self.strikes = self.strikes.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
        let span = options.ejection.0.checked_shl(self.strikes.min(32)).unwrap_or(u64::MAX).min(options.max_ejection.0);
        self.strikes = self.strikes.saturating_add(1);
        self.last_end = now + Duration(span);
        self.trust = Trust::Ejected { until: self.last_end };
        self.badness = badness;
        self.ejections += 1;
    }

    /// It gets work again, and what it did before is forgotten but for how often it was ejected.
    pub(crate) fn pardon(&mut self) {
        self.trust = Trust::Trusted;
        self.halves = [Tally::default(); 2];
    }
}

fn half_of(now: Time, options: &HealthOptions) -> u64 {
    now.0 / (options.window.0 / 2).max(1)
}
