//! One replica as a front sees it: its incarnation, what it offers, what it last reported, and what this front has sent
//! there. Loads are exact counts; they become predicted time only when somebody asks, with the newest cost model, so
//! sums never drift. Everything is O(1).

use crate::health::Health;
use llmscale_cost::{CostModel, StepShape};
use llmscale_types::{Duration, Epoch, NodeId, ReplicaId, StepId, Time, Token};
use std::sync::Arc;

/// Replicas whose streams can continue on each other, as the fleet numbers them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PoolId(pub u32);

/// What makes two replicas interchangeable in the middle of a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModelKey {
    /// Name of the model.
    pub name: String,
    /// Which state of it.
    pub revision: String,
    /// The adapter on top, if there is one.
    pub adapter: Option<String>,
    /// Digest of the weights.
    pub weights_digest: [u8; 32],
    /// Digest of tokenizer and template.
    pub tokenizer_digest: [u8; 32],
}

impl ModelKey {
    /// The name that requests use: the adapter's, if there is one.
    pub fn served_name(&self) -> &str {
        self.adapter.as_deref().unwrap_or(&self.name)
    }
}

/// Bounds of one replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaLimits {
    /// Size of the vocabulary.
    pub vocabulary: u32,
    /// Longest sequence, prompt and output together.
    pub max_sequence_tokens: u32,
    /// Most sequences that run at once.
    pub max_sequences: u32,
    /// Most sequences that wait there.
    pub max_waiting_sequences: u32,
    /// KV blocks.
    pub total_blocks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Ids that end a sequence.
    pub eos_tokens: Vec<Token>,
}

/// What a node said when it was connected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Incarnation of the node.
    pub node: NodeId,
    /// Incarnation of its workers.
    pub epoch: Epoch,
    /// What it runs.
    pub model: ModelKey,
    /// How it computes; two replicas of one numerics id give equal tokens.
    pub numerics: String,
    /// Its bounds.
    pub limits: ReplicaLimits,
    /// What it can do now.
    pub state: ReplicaState,
}

/// What a connected replica can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplicaState {
    /// It loads its model.
    Starting,
    /// It takes work.
    Ready,
    /// A worker died and the next one starts.
    Recovering,
    /// It hands its work back and will go.
    Draining,
}

impl ReplicaState {
    /// The stable label used in status and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Recovering => "recovering",
            Self::Draining => "draining",
        }
    }
}

/// What a replica says about itself, all fronts together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// What it can do.
    pub state: ReplicaState,
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait there.
    pub waiting: u32,
    /// Context tokens of those that wait.
    pub queued_tokens: u64,
    /// Predicted time until everything that waits has started.
    pub predicted_backlog_ns: u64,
    /// KV blocks without an owner.
    pub free_blocks: u32,
    /// Steps completed since the process started.
    pub steps: u64,
    /// Sequences that lost their blocks, since the start.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, since the start.
    pub prefix_queries: u64,
    /// Prompt tokens found there, since the start.
    pub prefix_hits: u64,
    /// KV blocks copied to the host when they were evicted, since the start.
    pub offloaded_blocks: u64,
    /// KV blocks copied back from the host, since the start.
    pub restored_blocks: u64,
    /// Host blocks that did not hold what they should, since the start.
    pub bad_host_blocks: u64,
    /// Workers started again, since the start.
    pub worker_restarts: u32,
    /// Process id of the first worker; `None` while there is none.
    pub worker_pid: Option<u32>,
    /// Time that steps took, since the start.
    pub step_ns: u64,
    /// Of it, what the last stage of a pipeline waited for the stages before it: the bubble.
    pub stage_wait_ns: u64,
    /// Number of the last change of the prefix cache that fronts were told.
    pub kv_changes: u64,
    /// KV blocks written from the host to the disk, since the start.
    pub disk_written_blocks: u64,
    /// KV blocks read from the disk to the host, since the start.
    pub disk_read_blocks: u64,
    /// Disk blocks that did not hold what they should, or could not be read, since the start.
    pub bad_disk_blocks: u64,
    /// Writes to the disk that failed, since the start.
    pub failed_disk_writes: u64,
    /// How often a step's copies waited for the disk, since the start.
    pub disk_waits: u64,
    /// Records of what the disk holds that were not written beside it, since the start: misses after the next start.
    pub lost_disk_records: u64,
    /// What those steps were predicted to take without their copies, since the start.
    pub predicted_step_ns: u64,
    /// By how much each of them took longer or shorter, added up.
    pub step_error_ns: u64,
    /// Steps whose prefill was cut so that streams beside it wait less, since the start.
    pub paced_steps: u64,
}

/// What one front has on one replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Attempts there.
    pub sequences: u32,
    /// Of these, attempts that have not given a token yet.
    pub unstarted_sequences: u32,
    /// Context tokens of those.
    pub unstarted_tokens: u64,
    /// Output tokens that are expected from all attempts.
    pub output_tokens: u64,
}

/// One replica.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its number.
    pub id: ReplicaId,
    /// Incarnation of the node.
    pub node: NodeId,
    /// The newest incarnation of its workers that a frame named.
    pub epoch: Epoch,
    /// What it can do; `None` while it is not connected.
    pub state: Option<ReplicaState>,
    /// Which replicas it is interchangeable with.
    pub pool: PoolId,
    /// How it computes.
    pub numerics: Arc<str>,
    /// Its bounds.
    pub limits: ReplicaLimits,
    /// What it last said, and when.
    pub report: Option<(Time, Report)>,
    /// What this front has there.
    pub load: Load,
    /// Nothing is sent before this moment: the replica said that it is full.
    pub refused_until: Option<Time>,
    /// How well it answers.
    pub health: Health,
    cost: CostModel,
    last_frame: Option<(StepId, Time)>,
}

impl Member {
    pub(crate) fn new(id: ReplicaId, pool: PoolId, offer: Offer) -> Self {
        Self {
            id,
            node: offer.node,
            epoch: offer.epoch,
            state: Some(offer.state),
            pool,
            numerics: offer.numerics.into(),
            limits: offer.limits,
            report: None,
            load: Load::default(),
            refused_until: None,
            health: Health::default(),
            cost: CostModel::new(),
            last_frame: None,
        }
    }

    /// The same place with a new incarnation; what was learned about its speed and its health stays.
    pub(crate) fn rejoin(&mut self, pool: PoolId, offer: Offer) {
        assert_eq!(self.load, Load::default(), "the attempts of the last incarnation were taken back");
        let (health, cost) = (self.health.clone(), self.cost.clone());
        *self = Self { health, cost, ..Self::new(self.id, pool, offer) };
    }

    /// Whether a frame comes from this incarnation. Workers may have been replaced since the last frame: that raises the
    /// epoch, and frames of the older one are refused from then on. `None` refuses; else, whether the epoch rose.
    pub fn fence(&mut self, node: NodeId, epoch: Epoch) -> Option<bool> {
        if self.state.is_none() || node != self.node || epoch < self.epoch {
            return None;
        }
        let rose = epoch > self.epoch;
        self.epoch = epoch;
        if rose {
            self.last_frame = None;
        }
        Some(rose)
    }

    /// Learns from a frame: steps that follow each other while work was there took the time between their frames.
    pub fn observe(&mut self, step: StepId, now: Time, shape: StepShape) {
        if let Some((last, at)) = self.last_frame
            && last.0.checked_add(1) == Some(step.0)
        {
            self.cost.observe(shape, now.since(at).0.saturating_mul(1_000));
        }
        self.last_frame = Some((step, now));
    }

    /// Forgets when the last frame came. To be called when nothing of ours runs there any more: the replica may idle
    /// until its next step, and the time between would teach nonsense.
    pub fn pause(&mut self) {
        self.last_frame = None;
    }

    /// What it has learned about its speed.
    pub fn cost(&self) -> &CostModel {
        &self.cost
    }

    /// Whether this front may send it anything at all now: it can take it, and it has answered well enough.
    pub fn takes_work(&self, now: Time) -> bool {
        self.is_willing(now) && self.health.lets_in(now)
    }

    /// Whether it says that it can take work now.
    pub fn is_willing(&self, now: Time) -> bool {
        self.state == Some(ReplicaState::Ready) && self.refused_until.is_none_or(|until| now >= until)
    }

    /// Predicted time to compute this many prompt tokens.
    pub fn prefill_ns(&self, tokens: u64) -> u64 {
        self.prompts_ns(tokens, 1)
    }

    /// Predicted time to compute several prompts of this many tokens in all. Attention costs the square of each prompt's
    /// length, so this is less than for one prompt of all of them.
    pub fn prompts_ns(&self, tokens: u64, prompts: u32) -> u64 {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        if tokens == 0 { 0 } else { self.cost.predict_prompts(tokens, prompts) }
    }

    /// Predicted time to decode this many tokens with `sequences` of them side by side.
    pub fn decode_ns(&self, tokens: u64, sequences: u32) -> u64 {
        let side_by_side = sequences.clamp(1, self.limits.max_sequences.max(1));
        let total = u128::from(self.cost.predict_decode_step(side_by_side)) * u128::from(tokens);
        u64::try_from(total / u128::from(side_by_side)).unwrap_or(u64::MAX)
    }

    /// Predicted time until a request sent now would start: what waits there already, by our count or by the replica's.
    pub fn backlog_ns(&self, now: Time) -> u64 {
        let ours = self.prompts_ns(self.load.unstarted_tokens, self.load.unstarted_sequences);
        let reported = self.report.map_or(0, |(at, report)| {
            report.predicted_backlog_ns.saturating_sub(now.since(at).0.saturating_mul(1_000))
        });
        ours.max(reported)
    }

    /// Predicted time until everything that this front has sent is done.
    pub fn remaining_ns(&self, now: Time) -> u64 {
        self.backlog_ns(now).saturating_add(self.decode_ns(self.load.output_tokens, self.load.sequences))
    }

    /// `remaining_ns` at the moment of the last report: a measure that changes only when something is said about the replica.
    pub(crate) fn last_known_work_ns(&self) -> u64 {
        self.remaining_ns(self.report.map_or(Time(0), |(at, _)| at))
    }

    /// Predicted time that one more sequence of `output_tokens` costs in decoding: its own, and what it adds to each of those
    /// that run beside it.
    pub fn marginal_decode_ns(&self, output_tokens: u64) -> u64 {
        let reported = self.report.map_or(0, |(_, report)| report.running);
        let running = self.load.sequences.max(reported).min(self.limits.max_sequences.saturating_sub(1));
        let (before, after) = (self.cost.predict_decode_step(running), self.cost.predict_decode_step(running + 1));
        let per_token = after.saturating_add(u64::from(running).saturating_mul(after - before));
        per_token.saturating_mul(output_tokens)
    }

    /// Attempts that this front may have there: those that can run, and those whose turn comes within `look_ahead`.
    pub fn seats(&self, look_ahead: Duration) -> u32 {
        let Load { sequences, output_tokens, .. } = self.load;
        if sequences < self.limits.max_sequences {
            return self.limits.max_sequences;
        }
        // One sequence ends after its expected rest; of n, n times as many do in the same time.
        let rest_ns = u128::from(self.decode_ns(output_tokens, sequences)).max(1);
        let soon = u128::from(look_ahead.0) * 1_000 * u128::from(sequences) / rest_ns;
        let waiting = u32::try_from(soon).unwrap_or(u32::MAX).min(self.limits.max_waiting_sequences);
        self.limits.max_sequences.saturating_add(waiting)
    }
}
