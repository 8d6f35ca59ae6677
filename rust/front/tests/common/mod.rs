//! A front with a clock, a log of what it wants, and frames made by hand.

#![allow(dead_code, reason = "each test file uses its own part")]

use llmscale_front::{
    EndReason, Front, FrontAction, FrontEvent, FrontOptions, ModelKey, NewRequest, Offer, ReplicaFrame, ReplicaLimits,
    ReplicaState, Report, SoFar, SubmitError, ToReplica,
};
use llmscale_types::{
    Attempt, Class, Duration, Epoch, FinishReason, Finished, NodeId, Outputs, Refusal, ReplicaId, RequestId, Sampling,
    StepId, Submission, Time, Token, TokenLogprobs,
};
use std::collections::BTreeMap;

/// Limits of every replica in these tests.
pub(crate) fn replica_limits() -> ReplicaLimits {
    ReplicaLimits {
        vocabulary: 1_000,
        max_sequence_tokens: 64,
        max_sequences: 4,
        max_waiting_sequences: 4,
        total_blocks: 100,
        block_tokens: 8,
        eos_tokens: vec![0],
    }
}

/// What a node offers that runs "tiny".
pub(crate) fn offer(node: u64) -> Offer {
    Offer {
        node: NodeId(node),
        epoch: Epoch(1),
        model: ModelKey {
            name: "tiny".into(),
            revision: "main".into(),
            adapter: None,
            weights_digest: [1; 32],
            tokenizer_digest: [2; 32],
        },
        numerics: "cpu".into(),
        limits: replica_limits(),
        state: ReplicaState::Ready,
    }
}

/// A node's report when it has nothing to do.
pub(crate) fn report(state: ReplicaState) -> Report {
    Report {
        state,
        running: 0,
        waiting: 0,
        queued_tokens: 0,
        predicted_backlog_ns: 0,
        free_blocks: 100,
        steps: 0,
        preemptions: 0,
        prefix_queries: 0,
        prefix_hits: 0,
        offloaded_blocks: 0,
        restored_blocks: 0,
        bad_host_blocks: 0,
        worker_restarts: 0,
        worker_pid: Some(7),
        step_ns: 0,
        stage_wait_ns: 0,
        kv_changes: 0,
        disk_written_blocks: 0,
        disk_read_blocks: 0,
        bad_disk_blocks: 0,
        failed_disk_writes: 0,
        disk_waits: 0,
        lost_disk_records: 0,
        predicted_step_ns: 0,
        step_error_ns: 0,
        paced_steps: 0,
    }
}

/// A short request for `max_tokens` tokens.
pub(crate) fn new_request(max_tokens: u32) -> NewRequest {
    NewRequest {
        namespace: [3; 32],
        model: "tiny".into(),
        class: Class::Standard,
        prompt: vec![5, 6, 7],
        prefix: std::sync::Arc::default(),
        sampling: Sampling { max_tokens, seed: 9, ..Sampling::default() },
        deadline: None,
        detached: false,
    }
}

/// A front under test.
pub(crate) struct Bench {
    pub(crate) front: Front,
    pub(crate) now: Time,
    pub(crate) wake_at: Option<Time>,
    /// What was sent and not looked at.
    pub(crate) sends: Vec<(ReplicaId, ToReplica)>,
    /// Questions for caches, and from which change on.
    pub(crate) asks: Vec<(u32, u64)>,
    /// What readers have got.
    pub(crate) delivered: BTreeMap<RequestId, Vec<Token>>,
    pub(crate) logprobs: BTreeMap<RequestId, Vec<(u32, TokenLogprobs)>>,
    /// What was told with them.
    pub(crate) so_far: BTreeMap<RequestId, Vec<(u32, SoFar)>>,
    /// Terminal events: reason, output tokens, cached tokens, restarts.
    pub(crate) ends: BTreeMap<RequestId, (EndReason, u32, u32, u32)>,
}

impl Bench {
    pub(crate) fn new(options: FrontOptions) -> Self {
        Self {
            front: Front::new(options).expect("the options are sound"),
            now: Time(1_000_000),
            wake_at: None,
            sends: Vec::new(),
            asks: Vec::new(),
            delivered: BTreeMap::new(),
            logprobs: BTreeMap::new(),
            so_far: BTreeMap::new(),
            ends: BTreeMap::new(),
        }
    }

    /// With `replicas` nodes numbered from 0, whose incarnation is 100 more than their number.
    pub(crate) fn with_replicas(replicas: u32) -> Self {
        let mut bench = Self::new(FrontOptions::default());
        (0..replicas).for_each(|replica| bench.up(replica));
        bench
    }

    pub(crate) fn event(&mut self, event: FrontEvent) {
        let mut out = Vec::new();
        self.front.on_event(self.now, event, &mut out);
        self.absorb(out);
    }

    pub(crate) fn submit(&mut self, new: NewRequest) -> Result<RequestId, SubmitError> {
        let mut out = Vec::new();
        let result = self.front.submit(self.now, new, &mut out);
        self.absorb(out);
        result
    }

    /// Submits what must be taken.
    pub(crate) fn take(&mut self, new: NewRequest) -> RequestId {
        self.submit(new).expect("it is within all bounds")
    }

    /// Submits several that must be taken.
    pub(crate) fn take_many(&mut self, count: usize, new: &NewRequest) -> Vec<RequestId> {
        (0..count).map(|_| self.take(new.clone())).collect()
    }

    fn absorb(&mut self, out: Vec<FrontAction>) {
        self.front.check();
        for action in out {
            match action {
                FrontAction::Send { replica, message: ToReplica::KvAsk { from } } => self.asks.push((replica.0, from)),
                FrontAction::Send { replica, message } => self.sends.push((replica, message)),
                FrontAction::Deliver(deliveries) => {
                    for delivery in deliveries.iter() {
                        assert!(!self.ends.contains_key(&delivery.request), "tokens after the end");
                        let held = self.delivered.entry(delivery.request).or_default();
                        assert!(delivery.index as usize <= held.len(), "a token is missing");
                        held.truncate(delivery.index as usize);
                        held.extend(delivery.tokens);
                        let so_far = self.so_far.entry(delivery.request).or_default();
                        so_far.push((delivery.index, delivery.so_far));
                        self.logprobs.entry(delivery.request).or_default().extend(delivery.logprobs.iter().cloned());
                    }
                }
                FrontAction::Finish { request, reason, usage, restarts } => {
                    let end = (reason, usage.output_tokens, usage.cached_tokens, restarts);
                    assert!(self.ends.insert(request, end).is_none(), "two terminal events for {request}");
                }
                FrontAction::WakeAt(at) => self.wake_at = Some(at),
            }
        }
    }

    /// Lets time pass, with a tick at the end.
    pub(crate) fn pass(&mut self, span: Duration) {
        self.now = self.now + span;
        self.event(FrontEvent::Tick);
    }

    pub(crate) fn up(&mut self, replica: u32) {
        self.up_with(replica, offer(u64::from(replica) + 100));
    }

    pub(crate) fn up_with(&mut self, replica: u32, offer: Offer) {
        self.event(FrontEvent::ReplicaUp { replica: ReplicaId(replica), offer: Box::new(offer) });
    }

    pub(crate) fn down(&mut self, replica: u32) {
        self.event(FrontEvent::ReplicaDown { replica: ReplicaId(replica) });
    }

    /// A frame of the incarnation that `up` announced.
    pub(crate) fn frame(&mut self, replica: u32, frame: ReplicaFrame) {
        let (replica, node, epoch) = (ReplicaId(replica), NodeId(u64::from(replica) + 100), Epoch(1));
        self.event(FrontEvent::Frame { replica, node, epoch, frame });
    }

    pub(crate) fn status(&mut self, replica: u32, state: ReplicaState) {
        self.frame(replica, ReplicaFrame::Status(Box::new(report(state))));
    }

    pub(crate) fn give_back(&mut self, replica: u32, request: RequestId, attempt: u32, refusal: Option<Refusal>) {
        self.frame(replica, ReplicaFrame::GiveBack { request, attempt: Attempt(attempt), refusal, suspect: false });
    }

    /// One token of one request.
    pub(crate) fn token(&mut self, replica: u32, request: RequestId, attempt: u32, index: u32, token: Token) {
        self.frame(replica, ReplicaFrame::Outputs(row(request, attempt, index, token)));
    }

    /// The end of one request.
    pub(crate) fn end(&mut self, replica: u32, request: RequestId, attempt: u32, reason: FinishReason, tokens: u32) {
        self.frame(replica, ReplicaFrame::Outputs(end(request, attempt, reason, tokens)));
    }

    /// What was sent since the last look.
    pub(crate) fn sent(&mut self) -> Vec<(u32, ToReplica)> {
        std::mem::take(&mut self.sends).into_iter().map(|(replica, message)| (replica.0, message)).collect()
    }

    /// The submissions among them.
    pub(crate) fn submissions(&mut self) -> Vec<(u32, Submission)> {
        let sent = self.sent().into_iter();
        sent.filter_map(|(replica, message)| match message {
            ToReplica::Submit(submission) => Some((replica, *submission)),
            ToReplica::Abort { .. } | ToReplica::Recall { .. } | ToReplica::KvAsk { .. } => None,
        })
        .collect()
    }

    pub(crate) fn tokens(&self, request: RequestId) -> &[Token] {
        self.delivered.get(&request).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn reason(&self, request: RequestId) -> Option<EndReason> {
        self.ends.get(&request).map(|end| end.0)
    }
}

/// One row of outputs.
pub(crate) fn row(request: RequestId, attempt: u32, index: u32, token: Token) -> Outputs {
    Outputs {
        step: StepId(u64::from(index)),
        requests: vec![request],
        attempts: vec![Attempt(attempt)],
        indexes: vec![index],
        tokens: vec![token],
        cached: if index == 0 { vec![(0, 2)] } else { Vec::new() },
        ..Outputs::default()
    }
}

/// An end without tokens.
pub(crate) fn end(request: RequestId, attempt: u32, reason: FinishReason, output_tokens: u32) -> Outputs {
    let finished = Finished { request, attempt: Attempt(attempt), reason, output_tokens };
    Outputs { finished: vec![finished], ..Outputs::default() }
}

pub(crate) const STOP: EndReason = EndReason::Finished(FinishReason::Stop);
pub(crate) const LENGTH: EndReason = EndReason::Finished(FinishReason::Length);
pub(crate) const ABORTED: EndReason = EndReason::Finished(FinishReason::Aborted);
pub(crate) const DEADLINE: EndReason = EndReason::Finished(FinishReason::Deadline);
