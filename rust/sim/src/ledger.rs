//! The books of one front's clients, kept apart from the front and held against it: what each request may be given is
//! computed from its prompt alone. Every token must be the model's next, every request must end once and for a reason
//! that really was one. O(context) per token, as the hash model needs.

use crate::faults::{DEADLY, EOS_TOKENS, Mix, VOCABULARY};
use crate::hash_worker::hash_token;
use crate::random::Random;
use llmscale_front::{Delivery, EndReason, NewRequest, Usage};
use llmscale_types::{Attempt, Duration, FinishReason, RequestId, Sampling, Submission, Time, Token};
use std::collections::BTreeMap;

/// What a client did to end its request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ByClient {
    Nothing,
    Ended,
    CutAt(u32),
}

/// One request as its client knows it.
#[derive(Debug)]
pub(crate) struct Account {
    prompt: Vec<Token>,
    sampling: Sampling,
    pub(crate) deadline: Option<Time>,
    delivered: Vec<Token>,
    pub(crate) attached: bool,
    pub(crate) reads: bool,
    /// When the reader left last.
    away_since: Option<Time>,
    pub(crate) by_client: ByClient,
    opened: Time,
    /// Where attempts are that may be under way: the newest, and one beside it while its first token is late.
    stays: Vec<(Attempt, usize)>,
    attempts: u32,
    /// Workers that died at that place since, and how many of them by an ordinary fault.
    crashes: u32,
    ordinary_crashes: u32,
    /// How the last token was computed, as far as its client has always been there.
    numerics: Option<&'static str>,
    /// Attempts that may have been lost, and workers that died at its places, over all attempts.
    losses: u32,
    deaths: u32,
    ended: bool,
}

/// What a front's host knows about the moment of an end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now: Time,
    /// Since when no node is connected.
    pub(crate) alone_since: Option<Time>,
    /// When none had been for too long, the last time.
    pub(crate) gave_up: Option<Time>,
}

/// See the file's header.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    accounts: BTreeMap<RequestId, Account>,
    pub(crate) tokens: u64,
    /// How long clients that were there waited for their first token.
    pub(crate) first_tokens: Vec<Duration>,
    /// Streams that were seen to go on under other numerics.
    pub(crate) numerics_changes: u64,
    live: usize,
}

impl Ledger {
    /// A request was taken.
    pub(crate) fn open(&mut self, request: RequestId, new: &NewRequest, reads: bool, now: Time) {
        let account = Account {
            prompt: new.prompt.clone(),
            sampling: new.sampling.clone(),
            deadline: new.deadline,
            delivered: Vec::new(),
            attached: !new.detached,
            reads,
            away_since: new.detached.then_some(now),
            by_client: ByClient::Nothing,
            opened: now,
            stays: Vec::new(),
            attempts: 0,
            crashes: 0,
            ordinary_crashes: 0,
            numerics: None,
            losses: 0,
            deaths: 0,
            ended: false,
        };
        self.live += 1;
        assert!(self.accounts.insert(request, account).is_none(), "request {request} was given out twice");
    }

    pub(crate) fn len(&self) -> usize {
        self.accounts.len()
    }

    /// Requests that have not ended.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// A request, while it lives.
    pub(crate) fn alive(&mut self, request: RequestId) -> Option<&mut Account> {
        self.accounts.get_mut(&request).filter(|account| !account.ended)
    }

    /// Tokens came. Returns how many the reader has now.
    pub(crate) fn deliver(&mut self, now: Time, delivery: &Delivery<'_>, mix: &Mix) -> u32 {
        let request = delivery.request;
        let account = self.accounts.get_mut(&request).expect("tokens belong to a request");
        assert!(!account.ended, "request {request} gets tokens after its end");
        assert!(account.attached, "request {request} gets tokens though nobody reads");
        assert_eq!(delivery.index as usize, account.delivered.len(), "position of the next token of request {request}");
        for &token in delivery.tokens {
            account.check_next(request, token);
            account.delivered.push(token);
        }
        if account.delivered.len() == delivery.tokens.len() && account.away_since.is_none() {
            self.first_tokens.push(now.since(account.opened));
        }
        let stay = account.stays.last().filter(|_| account.away_since.is_none());
        let here = stay.map(|&(_, place)| mix.numerics(place));
        self.numerics_changes += u64::from(here.is_some() && account.numerics.is_some() && here != account.numerics);
        account.numerics = here;
        self.tokens += delivery.tokens.len() as u64;
        account.delivered.len() as u32
    }

    /// How the last token of a request was computed, if that is known: while its client is away, tokens come unseen.
    pub(crate) fn numerics(&self, request: RequestId) -> Option<&'static str> {
        let account = &self.accounts[&request];
        account.numerics.filter(|_| account.away_since.is_none())
    }

    /// An attempt leaves for a place, instead of the one before or beside it.
    pub(crate) fn sent(&mut self, place: usize, submission: &Submission, beside: bool) {
        let request = submission.key.request;
        let account = self.accounts.get_mut(&request).expect("attempts belong to a request");
        assert!(!account.ended, "request {request} is sent out after its end");
        account.attempts += 1;
        assert_eq!(submission.key.attempt.0, account.attempts, "attempts of request {request} are counted one by one");
        account.check_context(request, submission);
        if beside {
            assert!(account.delivered.is_empty(), "request {request} is tried twice after its first token");
            let elsewhere = matches!(account.stays[..], [(_, first)] if first != place);
            assert!(elsewhere, "request {request} is tried beside {:?}", account.stays);
        } else {
            account.stays.clear();
        }
        account.stays.push((submission.key.attempt, place));
        // What a replica has told against it goes along; what it has not is forgotten with the replica.
        if !submission.suspect && !beside {
            (account.crashes, account.ordinary_crashes) = (0, 0);
        }
    }

    /// An attempt was given up by the front while the request goes on.
    pub(crate) fn given_up(&mut self, request: RequestId, attempt: Attempt) {
        if let Some(account) = self.alive(request) {
            account.losses += 1;
            account.stays.retain(|&(stay, _)| stay != attempt);
        }
    }

    /// A worker died at a place.
    pub(crate) fn worker_died(&mut self, place: usize, ordinary: bool) {
        for account in self.at(place) {
            account.crashes += 1;
            account.deaths += 1;
            account.ordinary_crashes += u32::from(ordinary);
        }
    }

    /// The front has lost a place.
    pub(crate) fn place_lost(&mut self, place: usize) {
        for account in self.at(place) {
            account.losses += 1;
            account.stays.retain(|&(_, stay)| stay != place);
        }
    }

    fn at(&mut self, place: usize) -> impl Iterator<Item = &mut Account> {
        self.accounts.values_mut().filter(move |account| !account.ended && account.is_at(place))
    }

    /// What a request is told to have survived, it did.
    pub(crate) fn check_restarts(&self, request: RequestId, restarts: u32) {
        let account = &self.accounts[&request];
        let most = account.attempts + account.deaths;
        assert!(restarts <= most, "request {request} survived {restarts} restarts, there were {most} at most");
    }

    /// How many workers the requests that may hold the deadly token may have taken down: two per replica that had to find
    /// out by itself, and only a lost attempt brings a request to another one unconvicted.
    pub(crate) fn most_deadly_deaths(&self, mix: &Mix) -> u64 {
        let may_kill = self.accounts.values().filter(|account| account.may_kill(mix));
        may_kill.map(|account| 2 * (1 + u64::from(account.losses))).sum()
    }

    /// The one end of a request.
    pub(crate) fn end(&mut self, request: RequestId, reason: EndReason, usage: Usage, mix: &Mix, moment: Moment) {
        let account = self.accounts.get_mut(&request).expect("an end belongs to a request");
        assert!(!account.ended, "request {request} ends twice, now as {}", reason.label());
        account.check_usage(request, usage);
        let just = account.justifies(reason, usage, mix, moment);
        assert!(just, "request {request} ends as {} for no reason: {account:?} {usage:?} {moment:?}", reason.label());
        account.ended = true;
        self.live -= 1;
    }

    /// Nobody has been left alive after its deadline.
    pub(crate) fn check_deadlines(&self, now: Time) {
        for (request, account) in &self.accounts {
            let over = account.deadline.is_some_and(|deadline| deadline < now);
            assert!(account.ended || !over || !account.attached, "request {request} outlives its deadline");
        }
    }

    /// Prompt and answer of one of the last requests, if that has ended and leaves room for a next turn.
    pub(crate) fn said(&self, random: &mut Random, max_tokens: usize) -> Option<Vec<Token>> {
        let back = random.below(8) as usize;
        let account = self.accounts.values().rev().filter(|account| account.ended).nth(back)?;
        let said: Vec<Token> = account.prompt.iter().chain(&account.delivered).copied().collect();
        (said.len() <= max_tokens && !account.ate_deadly_token()).then_some(said)
    }

    /// Requests that have not ended, for a failing test.
    pub(crate) fn unfinished(&self) -> Vec<String> {
        let alive = self.accounts.iter().filter(|(_, account)| !account.ended);
        alive.map(|(request, account)| format!("request {request}: {account:?}")).collect()
    }
}

impl Account {
    pub(crate) fn delivered_tokens(&self) -> u32 {
        self.delivered.len() as u32
    }

    pub(crate) fn detach(&mut self, now: Time) {
        if std::mem::take(&mut self.attached) {
            self.away_since = Some(now);
        }
    }

    fn check_next(&self, request: RequestId, token: Token) {
        let ids: Vec<Token> = self.prompt.iter().chain(&self.delivered).copied().collect();
        let Sampling { seed, choice, .. } = self.sampling;
        assert_eq!(token, hash_token(&ids, seed, choice, VOCABULARY), "the next token of request {request}");
        assert!(self.delivered.len() < self.sampling.max_tokens as usize, "request {request} gets surplus tokens");
        let stopped = self.delivered.last().is_some_and(|&last| self.stops(last));
        assert!(!stopped, "request {request} gets a token after its stop token");
    }

    fn check_context(&self, request: RequestId, submission: &Submission) {
        let context = &submission.context;
        let prompt = self.prompt.len();
        assert_eq!(context[..prompt], self.prompt[..], "request {request} leaves with a foreign prompt");
        assert_eq!(submission.prompt_tokens as usize, prompt, "request {request}");
        let known = self.delivered.len().min(context.len() - prompt);
        assert_eq!(context[prompt..prompt + known], self.delivered[..known], "request {request} forgot its answer");
        assert!(known == self.delivered.len(), "request {request} leaves without tokens that its client has");
        for at in prompt + known..context.len() {
            let Sampling { seed, choice, .. } = self.sampling;
            assert_eq!(context[at], hash_token(&context[..at], seed, choice, VOCABULARY), "request {request} at {at}");
        }
    }

    fn check_usage(&self, request: RequestId, usage: Usage) {
        assert_eq!(usage.prompt_tokens as usize, self.prompt.len(), "prompt of request {request}");
        assert!(usage.cached_tokens <= usage.prompt_tokens, "request {request} found more than its prompt");
        let delivered = self.delivered_tokens();
        let counted = match self.by_client {
            ByClient::CutAt(at_token) => delivered.min(at_token),
            ByClient::Nothing | ByClient::Ended => delivered,
        };
        if self.attached {
            assert_eq!(usage.output_tokens, counted, "tokens that request {request} pays for");
        } else {
            // Tokens may have come that nobody read.
            let possible = counted..=self.sampling.max_tokens;
            assert!(possible.contains(&usage.output_tokens), "request {request} pays for {}", usage.output_tokens);
        }
    }

    fn is_at(&self, place: usize) -> bool {
        self.stays.iter().any(|&(_, stay)| stay == place)
    }

    fn stops(&self, token: Token) -> bool {
        self.sampling.stop_tokens.contains(&token) || (!self.sampling.ignore_eos && EOS_TOKENS.contains(&token))
    }

    /// Whether what happened explains the end.
    fn justifies(&self, reason: EndReason, usage: Usage, mix: &Mix, moment: Moment) -> bool {
        let stopped = self.delivered.last().is_some_and(|&last| self.stops(last));
        let EndReason::Finished(reason) = reason else {
            let alone = |since: Time| moment.now.since(since) >= mix.max_without_replica;
            // A reader who was away is told late.
            let told_late = self.away_since.is_some_and(|since| moment.gave_up.is_some_and(|at| at >= since));
            return reason == EndReason::Unavailable
                && (self.losses >= mix.front.max_attempts || moment.alone_since.is_some_and(alone) || told_late);
        };
        match reason {
            FinishReason::Stop => matches!(self.by_client, ByClient::CutAt(_)) || stopped || !self.attached,
            FinishReason::Length => usage.output_tokens == self.sampling.max_tokens,
            FinishReason::Aborted => self.by_client == ByClient::Ended || self.left_too_much(mix, moment),
            FinishReason::Deadline => self.deadline.is_some_and(|deadline| deadline <= moment.now),
            FinishReason::Poisoned => {
                let deadly = mix.deadly_token().is_some();
                let ate = self.ate_deadly_token();
                let unseen = !self.attached && deadly;
                (deadly && ate) || unseen || (self.crashes >= 2 && self.ordinary_crashes >= 1)
            }
            FinishReason::NotANumber | FinishReason::NothingToSample => false,
        }
    }

    fn ate_deadly_token(&self) -> bool {
        self.prompt.iter().chain(&self.delivered).any(|&token| token == DEADLY)
    }

    /// Whether the deadly token is in the prompt, or among what the model says: its client may not have seen all that was
    /// computed, as rows are planned ahead of what is known. Of steps in flight, the first reads what ends the answer, and
    /// each further one what the one before it has drawn.
    fn may_kill(&self, mix: &Mix) -> bool {
        let Sampling { seed, choice, max_tokens, .. } = self.sampling;
        let mut ids = self.prompt.clone();
        let mut surplus = mix.engine.max_steps_in_flight.saturating_sub(2);
        let mut stopped = false;
        for _ in 0..max_tokens {
            let token = hash_token(&ids, seed, choice, VOCABULARY);
            ids.push(token);
            surplus -= u32::from(stopped);
            stopped |= self.stops(token);
            if stopped && surplus == 0 {
                break;
            }
        }
        ids.contains(&DEADLY)
    }

    fn left_too_much(&self, mix: &Mix, moment: Moment) -> bool {
        let unread = !self.reads && self.delivered_tokens() > mix.front.max_unread_tokens;
        // Whether too much came or too much time went by while nobody read cannot be told from outside.
        let away = self.away_since.is_some_and(|since| moment.now.since(since) >= mix.front.max_detached);
        unread || (!self.attached && (away || mix.front.max_unread_tokens < self.sampling.max_tokens))
    }
}
