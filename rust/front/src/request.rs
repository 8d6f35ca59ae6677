//! The continuation record of one request: everything that it takes to go on from the last token on any replica, and what
//! its reader has seen. Lives from submission to the terminal event. O(1) per token.

use crate::delivery::SoFar;
use crate::event::{EndReason, NewRequest, Usage};
use crate::hedge::Rival;
use crate::options::FrontOptions;
use llmscale_fleet::PoolId;
use llmscale_types::{
    Attempt, Class, Duration, FinishReason, FrontId, Planted, PrefixKey, ReplicaId, RequestId, Sampling, SequenceKey,
    Submission, Time, Token, TokenLogprobs,
};
use std::collections::VecDeque;
use std::sync::Arc;

/// One request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) pool: PoolId,
    /// What the client asked for; waiting promotes it, wherever it is looked at.
    pub(crate) class: Class,
    pub(crate) arrived: Time,
    pub(crate) deadline: Option<Time>,
    pub(crate) sampling: Sampling,
    namespace: [u8; 32],
    /// Prompt ids, then all output ids of all attempts.
    context: Vec<Token>,
    prompt_tokens: u32,
    /// Names of the prompt's prefixes.
    pub(crate) prefix: Arc<[PrefixKey]>,
    /// The attempt that its place names; 0 before the first.
    pub(crate) attempt: Attempt,
    /// The newest of all attempts.
    pub(crate) last_attempt: Attempt,
    /// When a second attempt may begin beside the first.
    pub(crate) hedge_at: Option<Time>,
    /// The second attempt while both are under way; before the first token only.
    pub(crate) rival: Option<Rival>,
    /// Attempts that were lost.
    pub(crate) lost: u32,
    /// Of these, those that a replica ended by answering badly.
    pub(crate) faults: u32,
    /// Losses and worker restarts that the stream survived.
    pub(crate) restarts: u32,
    pub(crate) place: Place,
    /// Output tokens still expected; what queues and replicas are charged with.
    pub(crate) expected_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// How its last token was computed; `None` before the first.
    pub(crate) numerics: Option<Arc<str>>,
    /// A worker died or raised while computing it, and no token has come since.
    pub(crate) suspect: bool,
    pub(crate) reader: Reader,
    /// Output tokens that the reader has for good.
    read_tokens: u32,
    /// Log probabilities by output position, from `read_tokens` on.
    unread_logprobs: VecDeque<(u32, TokenLogprobs)>,
    /// The moment of its entry among the timers.
    pub(crate) timer: Option<Time>,
}

/// Where a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the queue of its pool.
    Queued,
    /// In no queue, until it may be tried again; `None` before that is known.
    SetAside { until: Option<Time> },
    /// On a replica.
    Sent(Sent),
    /// Over, but its reader is away.
    Held(EndReason),
}

/// One attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sent {
    pub(crate) replica: ReplicaId,
    /// Context that the replica has to compute before its first token, as far as was known when it was sent.
    pub(crate) context_tokens: u32,
    /// A token came.
    pub(crate) started: bool,
    /// It was asked back.
    pub(crate) recalled: bool,
    /// It was asked back because nothing was heard of it: a replica that still knows it says so at once.
    pub(crate) doubted: bool,
    /// When it was sent, and how long its first token was predicted to take from then.
    pub(crate) at: Time,
    pub(crate) predicted: Duration,
    /// When something was last heard of it.
    pub(crate) heard: Time,
    /// How long it may stay silent.
    pub(crate) patience: Duration,
}

impl Sent {
    /// From when on its silence means something. One that was asked back is answered within a round trip, if at all.
    pub(crate) fn silent_at(&self) -> Time {
        self.heard + if self.doubted { Duration(self.patience.0 / 8) } else { self.patience }
    }
}

/// Who reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reader {
    /// Tokens are delivered as they come.
    Attached,
    /// Tokens are kept until somebody attaches, or until this moment.
    Detached(Time),
}

impl Request {
    pub(crate) fn new(new: NewRequest, pool: PoolId, now: Time, expected_tokens: u32, options: &FrontOptions) -> Self {
        let reader = if new.detached { Reader::Detached(now + options.limits.max_detached) } else { Reader::Attached };
        Self {
            pool,
            class: new.class,
            arrived: now,
            deadline: new.deadline,
            sampling: new.sampling,
            namespace: new.namespace,
            prompt_tokens: new.prompt.len() as u32,
            prefix: new.prefix,
            context: new.prompt,
            attempt: Attempt(0),
            last_attempt: Attempt(0),
            hedge_at: None,
            rival: None,
            lost: 0,
            faults: 0,
            restarts: 0,
            place: Place::Queued,
            expected_tokens,
            cached_tokens: 0,
            numerics: None,
            suspect: false,
            reader,
            read_tokens: 0,
            unread_logprobs: VecDeque::new(),
            timer: None,
        }
    }

    /// Everything known: prompt and output.
    pub(crate) fn context_tokens(&self) -> u32 {
        self.context.len() as u32
    }

    /// Output so far.
    pub(crate) fn output_tokens(&self) -> u32 {
        self.context_tokens() - self.prompt_tokens
    }

    /// Output that may still come.
    pub(crate) fn remaining_tokens(&self) -> u32 {
        self.sampling.max_tokens.saturating_sub(self.output_tokens())
    }

    /// The longest that the sequence can become.
    pub(crate) fn max_total_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.sampling.max_tokens)
    }

    pub(crate) fn output(&self) -> &[Token] {
        &self.context[self.prompt_tokens as usize..]
    }

    /// Output that the reader does not have for good.
    pub(crate) fn unread_tokens(&self) -> u32 {
        self.output_tokens() - self.read_tokens
    }

    /// Takes the next token. The log probabilities are kept until they are read, as a reader may have to be told again.
    pub(crate) fn push(&mut self, token: Token, logprobs: Option<&TokenLogprobs>) {
        if let Some(logprobs) = logprobs {
            self.unread_logprobs.push_back((self.output_tokens(), logprobs.clone()));
        }
        self.context.push(token);
    }

    /// The reader has got this many output tokens.
    pub(crate) fn read(&mut self, up_to_index: u32) {
        self.read_tokens = self.read_tokens.max(up_to_index.min(self.output_tokens()));
        while self.unread_logprobs.front().is_some_and(|(index, _)| *index < self.read_tokens) {
            self.unread_logprobs.pop_front();
        }
    }

    /// Log probabilities of this and later output positions, as far as they are kept.
    pub(crate) fn logprobs_from(&self, from_index: u32) -> impl Iterator<Item = &(u32, TokenLogprobs)> {
        self.unread_logprobs.iter().skip_while(move |(index, _)| *index < from_index)
    }

    /// What an attempt is sent, as of the class that the request ranks with now.
    pub(crate) fn submission(&self, request: RequestId, attempt: Attempt, class: Class) -> Submission {
        let cut = usize::from(Planted::GoesOnWithoutTheLastToken.is_here() && self.output_tokens() > 0);
        Submission {
            key: SequenceKey { front: FrontId(0), request, attempt },
            namespace: self.namespace,
            class,
            context: self.context[..self.context.len() - cut].to_vec(),
            prompt_tokens: self.prompt_tokens,
            sampling: self.sampling.clone(),
            deadline: self.deadline,
            suspect: self.suspect,
        }
    }

    /// Whether the output is complete though nobody said so: a frame may have been lost after the last token.
    pub(crate) fn complete(&self, eos_tokens: &[Token]) -> Option<FinishReason> {
        let &last = self.output().last()?;
        let stops =
            self.sampling.stop_tokens.contains(&last) || (!self.sampling.ignore_eos && eos_tokens.contains(&last));
        if stops && self.output_tokens() >= self.sampling.min_tokens {
            return Some(FinishReason::Stop);
        }
        (self.remaining_tokens() == 0).then_some(FinishReason::Length)
    }

    /// What goes with its tokens.
    pub(crate) fn so_far(&self) -> SoFar {
        SoFar { cached_tokens: self.cached_tokens, restarts: self.restarts }
    }

    /// A replica found this much of the prompt in its prefix cache.
    pub(crate) fn found_cached(&mut self, tokens: u32) {
        self.cached_tokens = tokens.min(self.prompt_tokens);
    }

    /// What was used when the output is cut after `output_tokens`.
    pub(crate) fn usage(&self, output_tokens: u32) -> Usage {
        Usage { prompt_tokens: self.prompt_tokens, cached_tokens: self.cached_tokens, output_tokens }
    }

    /// The moment at which something about this request is due next.
    pub(crate) fn next_due(&self) -> Option<Time> {
        let silence = match self.place {
            Place::Sent(sent) => Some(sent.silent_at()),
            Place::SetAside { until } => Some(until.unwrap_or(Time(0))),
            Place::Queued | Place::Held(_) => None,
        };
        let away = match self.reader {
            Reader::Detached(until) => Some(until),
            Reader::Attached => None,
        };
        let held = matches!(self.place, Place::Held(_)) || Planted::IgnoresDeadlines.is_here();
        let deadline = if held { None } else { self.deadline };
        let hedge = self.hedge_at.filter(|_| matches!(self.place, Place::Sent(_)));
        [silence, hedge, away, deadline].into_iter().flatten().min()
    }

    /// Positions that `check` compares with the counts.
    pub(crate) fn kept_logprobs(&self) -> impl Iterator<Item = u32> {
        self.unread_logprobs.iter().map(|(index, _)| *index)
    }

    pub(crate) fn read_tokens(&self) -> u32 {
        self.read_tokens
    }
}
