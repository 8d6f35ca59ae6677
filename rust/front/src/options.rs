//! What an operator may set about a front, checked once when it starts. The bounds that other crates share are in
//! `FrontLimits`; here are the spans that only the front's own decisions use.

use crate::hedge::HedgeOptions;
use crate::retry::RetryOptions;
use llmscale_fleet::{HealthOptions, IndexOptions};
use llmscale_types::{Duration, FrontLimits, LimitError};

/// Settings of one front.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontOptions {
    /// Bounds of queues and buffers.
    pub limits: FrontLimits,
    /// Most replicas, those that are down included.
    pub max_replicas: u32,
    /// After this much waiting, a request ranks one class higher.
    pub promote_after: Duration,
    /// How long requests wait when no replica of their model is connected, or none but such as have lost their worker.
    pub max_without_replica: Duration,
    /// How long the streams of a replica wait for its next worker before they go on elsewhere. A spare takes 150 ms; a
    /// worker that has to import and load first takes seconds.
    pub max_recovering: Duration,
    /// How long a ready replica may stay silent about an attempt, beyond eight times what was predicted, before the
    /// attempt is given up: the last resort against a frame that was lost without a trace.
    pub max_silence: Duration,
    /// What is remembered of the replicas' prefix caches; `None` places requests without looking at them.
    pub prefixes: Option<IndexOptions>,
    /// When a replica that answers badly is left alone, and for how long.
    pub health: HealthOptions,
    /// How often attempts are made again after replicas answered badly.
    pub retries: RetryOptions,
    /// When a request is tried at a second replica because its first token is late; `None`: never.
    pub hedging: Option<HedgeOptions>,
}

impl Default for FrontOptions {
    fn default() -> Self {
        Self {
            limits: FrontLimits::default(),
            max_replicas: 256,
            promote_after: Duration::from_millis(5_000),
            max_without_replica: Duration::from_millis(60_000),
            max_recovering: Duration::from_millis(500),
            max_silence: Duration::from_millis(120_000),
            prefixes: Some(IndexOptions::default()),
            health: HealthOptions::default(),
            retries: RetryOptions::default(),
            hedging: None,
        }
    }
}

impl FrontOptions {
    /// Checks that the sizes fit together.
    pub fn check(&self) -> Result<(), LimitError> {
        self.limits.check()?;
        LimitError::at_least("max_replicas", u64::from(self.max_replicas), 1)?;
        LimitError::at_most("max_replicas", u64::from(self.max_replicas), 65_536)?;
        self.health.check()?;
        self.retries.check()?;
        self.hedging.as_ref().map_or(Ok(()), HedgeOptions::check)?;
        self.prefixes.as_ref().map_or(Ok(()), IndexOptions::check)?;
        LimitError::at_least("promote_after", self.promote_after.0, 1)?;
        LimitError::at_least("max_silence", self.max_silence.0, 1)
    }
}
