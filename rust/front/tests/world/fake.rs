//! A fake replica: runs every sequence it was given, one or two tokens per step, each token a hash of all ids before it.
//! Its mail travels over a network that the test may delay, drop, double and let ghosts speak on.

use llmscale_front::{ReplicaFrame, ToReplica};
use llmscale_types::{
    Attempt, Epoch, FinishReason, Finished, NodeId, Outputs, Refusal, RequestId, StepId, Submission, Token,
};
use std::collections::{BTreeMap, VecDeque};

pub(crate) const VOCABULARY: u32 = 40;
pub(crate) const EOS: Token = 0;

/// The token that follows these ids.
pub(crate) fn hash_token(ids: &[Token], seed: u64) -> Token {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    for &id in ids {
        state = (state ^ u64::from(id)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 29;
    }
    (state % u64::from(VOCABULARY)) as Token
}

/// One frame on its way.
#[derive(Clone, Debug)]
pub(crate) struct Mail {
    pub(crate) node: NodeId,
    pub(crate) epoch: Epoch,
    pub(crate) frame: ReplicaFrame,
}

#[derive(Debug)]
struct Sequence {
    submission: Submission,
    stepped: bool,
}

#[derive(Debug)]
pub(crate) struct FakeReplica {
    pub(crate) node: NodeId,
    pub(crate) epoch: Epoch,
    pub(crate) up: bool,
    pub(crate) refuse_next: Option<Refusal>,
    pub(crate) inbox: VecDeque<ToReplica>,
    pub(crate) outbox: VecDeque<Mail>,
    sequences: BTreeMap<RequestId, Sequence>,
    step: u64,
}

impl FakeReplica {
    pub(crate) fn new(node: u64) -> Self {
        Self {
            node: NodeId(node),
            epoch: Epoch(1),
            up: false,
            refuse_next: None,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            sequences: BTreeMap::new(),
            step: 0,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.inbox.is_empty() && self.outbox.is_empty()
    }

    /// Everything is lost but the mail that is on its way.
    pub(crate) fn crash(&mut self) {
        self.up = false;
        self.refuse_next = None;
        self.inbox.clear();
        self.sequences.clear();
        self.node = NodeId(self.node.0 + 1_000);
        self.epoch = Epoch(1);
    }

    fn send(&mut self, frame: ReplicaFrame) {
        self.outbox.push_back(Mail { node: self.node, epoch: self.epoch, frame });
    }

    /// Takes one message.
    pub(crate) fn receive(&mut self) {
        match self.inbox.pop_front() {
            Some(ToReplica::Submit(submission)) => {
                let (request, attempt) = (submission.key.request, submission.key.attempt);
                if let Some(refusal) = self.refuse_next.take() {
                    self.send(ReplicaFrame::GiveBack { request, attempt, refusal: Some(refusal), suspect: false });
                } else {
                    self.sequences.insert(request, Sequence { submission: *submission, stepped: false });
                }
            }
            Some(ToReplica::Abort { request, attempt, .. }) if self.runs(request, attempt) => {
                let sequence = self.sequences.remove(&request).expect("it runs");
                let output_tokens = sequence.submission.emitted_tokens();
                let finished = Finished { request, attempt, reason: FinishReason::Aborted, output_tokens };
                self.send(ReplicaFrame::Outputs(Outputs { finished: vec![finished], ..Outputs::default() }));
            }
            Some(ToReplica::Recall { request, attempt }) if self.runs(request, attempt) => {
                if !self.sequences[&request].stepped {
                    self.sequences.remove(&request);
                    self.send(ReplicaFrame::GiveBack { request, attempt, refusal: None, suspect: false });
                }
            }
            Some(ToReplica::Abort { .. } | ToReplica::Recall { .. } | ToReplica::KvAsk { .. }) | None => {}
        }
    }

    fn runs(&self, request: RequestId, attempt: Attempt) -> bool {
        self.sequences.get(&request).is_some_and(|sequence| sequence.submission.key.attempt == attempt)
    }

    /// Hands back what has not run, as a draining node does.
    pub(crate) fn drain(&mut self) {
        let waiting: Vec<(RequestId, Attempt)> = self
            .sequences
            .iter()
            .filter(|(_, sequence)| !sequence.stepped)
            .map(|(&request, sequence)| (request, sequence.submission.key.attempt))
            .collect();
        for (request, attempt) in waiting {
            self.sequences.remove(&request);
            self.send(ReplicaFrame::GiveBack { request, attempt, refusal: Some(Refusal::Draining), suspect: false });
        }
    }

    /// One step of all sequences, with up to `tokens` tokens each.
    pub(crate) fn step(&mut self, tokens: u32) {
        self.step += 1;
        let mut outputs = Outputs { step: StepId(self.step), ..Outputs::default() };
        let mut ended = Vec::new();
        for (&request, sequence) in &mut self.sequences {
            sequence.stepped = true;
            let attempt = sequence.submission.key.attempt;
            for _ in 0..tokens {
                let submission = &mut sequence.submission;
                let token = hash_token(&submission.context, submission.sampling.seed);
                outputs.requests.push(request);
                outputs.attempts.push(attempt);
                outputs.indexes.push(submission.emitted_tokens());
                outputs.tokens.push(token);
                submission.context.push(token);
                let output_tokens = submission.emitted_tokens();
                let reason = match token {
                    EOS => FinishReason::Stop,
                    _ if output_tokens == submission.sampling.max_tokens => FinishReason::Length,
                    _ => continue,
                };
                outputs.finished.push(Finished { request, attempt, reason, output_tokens });
                ended.push(request);
                break;
            }
        }
        for request in ended {
            self.sequences.remove(&request);
        }
        // Every other step tells its ends apart from its tokens, so that one can be lost without the other.
        let ends = if self.step.is_multiple_of(2) { std::mem::take(&mut outputs.finished) } else { Vec::new() };
        if !outputs.is_empty() {
            self.send(ReplicaFrame::Outputs(outputs));
        }
        if !ends.is_empty() {
            self.send(ReplicaFrame::Outputs(Outputs { finished: ends, ..Outputs::default() }));
        }
    }
}
