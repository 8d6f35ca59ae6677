//! A simulated front process: the production front in a copy of the live driver's loop, with one conversation per node,
//! and the clients' books beside it. Every delivery, every attempt and every end goes through the books. Knows nothing
//! of how nodes work.

mod conversation;

use crate::around::Around;
use crate::clients::Wish;
use crate::happening::{ClientAct, Happening};
use crate::ledger::{ByClient, Ledger, Moment};
use crate::node::SECRET;
use crate::retry_book::RetryBook;
use crate::versions;
use conversation::Conversation;
use llmscale_blocks::ChainHasher;
use llmscale_front::{
    EndReason, Front, FrontAction, FrontEvent, FrontOptions, IndexOptions, ReplicaFrame, ReplicaState, ReplicaStatus,
    SubmitError, ToReplica, Trust,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Attempt, Duration, FinishReason, PrefixKey, Refusal, ReplicaId, RequestId, Time};
use llmscale_wire::{FromNode, VersionRange, decode_as};
use std::collections::VecDeque;

/// Connections are looked at this often even if nothing happens.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Whether the process is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Presence {
    Running,
    /// It stands still.
    Paused,
    /// It has ended, and its requests with it.
    Down,
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct FrontHost {
    number: usize,
    pub(crate) front: Front,
    pub(crate) ledger: Ledger,
    retry_book: RetryBook,
    pub(crate) presence: Presence,
    /// How often the process has been started.
    pub(crate) incarnation: u64,
    /// What this process speaks.
    spoken: VersionRange,
    conversations: Vec<Conversation>,
    inbox: VecDeque<(usize, Vec<u8>)>,
    outgoing: VecDeque<(ReplicaId, ToReplica)>,
    /// What clients have read and the front does not know yet.
    reads: VecDeque<(RequestId, u32)>,
    actions: Vec<FrontAction>,
    /// Since when no node is connected, or none but such as have lost their worker.
    alone_since: Option<Time>,
    /// When there had been no node to wait for for too long, the last time.
    gave_up: Option<Time>,
    pub(crate) wake_at: Option<Time>,
}

impl FrontHost {
    /// A process that has just started and knows the nodes' places.
    pub(crate) fn start(number: usize, incarnation: u64, around: &mut Around) -> Self {
        let options = FrontOptions {
            limits: around.mix.front.clone(),
            max_replicas: 8,
            promote_after: Duration::from_millis(300),
            max_without_replica: around.mix.max_without_replica,
            // Less than a new worker takes, so that streams move.
            max_recovering: Duration::from_millis(30),
            max_silence: around.mix.max_silence,
            prefixes: around.mix.caches.then(|| index_options(around.mix.engine.block_tokens)),
            health: around.mix.health,
            retries: around.mix.retries,
            hedging: around.mix.hedging,
        };
        let spoken = versions::spoken_by_a_new_process(around);
        Self {
            number,
            incarnation,
            spoken,
            front: Front::new(options).expect("a mix draws bounds that fit together"),
            ledger: Ledger::default(),
            retry_book: RetryBook::default(),
            presence: Presence::Running,
            conversations: (0..around.mix.nodes).map(|place| Conversation::new(number, place, spoken)).collect(),
            inbox: VecDeque::new(),
            outgoing: VecDeque::new(),
            reads: VecDeque::new(),
            actions: Vec::new(),
            alone_since: Some(around.now()),
            gave_up: None,
            wake_at: None,
        }
    }

    /// A frame has arrived.
    pub(crate) fn hear(&mut self, place: usize, bytes: Vec<u8>, around: &mut Around) {
        self.inbox.push_back((place, bytes));
        if self.presence == Presence::Running {
            self.read(around);
        }
    }

    /// The process ends, with or without a word to the nodes that it knows.
    pub(crate) fn stop(&mut self, polite: bool, around: &mut Around) {
        for conversation in self.conversations.iter().filter(|conversation| polite && conversation.is_welcome()) {
            conversation.say_goodbye(around);
        }
        self.presence = Presence::Down;
    }

    fn read(&mut self, around: &mut Around) {
        while let Some((place, bytes)) = self.inbox.pop_front() {
            let frame = decode_as::<FromNode>(self.spoken, &bytes, &around.codec).expect("a node's frame can be read");
            let event = self.conversations[place].hear(frame, around);
            self.happen(event, around);
        }
    }

    /// What the clock says: lost and silent nodes, greetings, pings, what is due.
    pub(crate) fn look(&mut self, around: &mut Around, regular: bool) {
        if regular {
            around.agenda.after(LOOK_INTERVAL, Happening::Look { front: self.number, regular: true });
        }
        if self.presence != Presence::Running {
            return;
        }
        for place in 0..self.conversations.len() {
            let event = self.conversations[place].look_at_time(around);
            self.happen(event, around);
        }
        self.tick_if_due(around);
    }

    fn tick_if_due(&mut self, around: &mut Around) {
        if self.wake_at.take_if(|at| *at <= around.now()).is_some() {
            self.happen(Some(FrontEvent::Tick), around);
        }
    }

    /// Goes on after a pause: what arrived meanwhile comes first.
    pub(crate) fn resume(&mut self, around: &mut Around) {
        self.presence = Presence::Running;
        self.read(around);
        self.look(around, false);
    }

    /// Applies an event, if there is one, and carries out what follows from it.
    fn happen(&mut self, event: Option<FrontEvent>, around: &mut Around) {
        if let Some(event) = event {
            self.apply(event, around);
            self.flush(around);
        }
    }

    /// Sends what is to leave, and tells the front what clients have read; both may make more of either.
    fn flush(&mut self, around: &mut Around) {
        loop {
            if let Some((request, up_to_index)) = self.reads.pop_front() {
                self.apply(FrontEvent::Read { request, up_to_index }, around);
            } else if let Some((replica, message)) = self.outgoing.pop_front() {
                if let Some(event) = self.conversations[replica.index()].send(message, around) {
                    self.apply(event, around);
                }
            } else {
                return;
            }
        }
    }

    fn apply(&mut self, event: FrontEvent, around: &mut Around) {
        match &event {
            FrontEvent::ReplicaDown { replica } => self.ledger.place_lost(replica.index()),
            // Nothing was there twice: a node that says so errs, and the attempt is lost.
            FrontEvent::Frame {
                frame: ReplicaFrame::GiveBack { request, attempt, refusal: Some(Refusal::Duplicate), .. },
                ..
            } => self.ledger.given_up(*request, *attempt),
            _ => {}
        }
        self.front.on_event(around.now(), event, &mut self.actions);
        self.carry_out(around);
    }

    fn carry_out(&mut self, around: &mut Around) {
        // Set after an event that connects or loses a node, but read for the end that the same event brings.
        let moment = Moment { now: around.now(), alone_since: self.alone_since, gave_up: self.gave_up };
        for action in std::mem::take(&mut self.actions) {
            match action {
                FrontAction::Send { replica, message } => {
                    match &message {
                        ToReplica::Submit(submission) => {
                            let request = submission.key.request;
                            around
                                .note("front sends", [replica.0.into(), request.0, submission.key.attempt.0.into(), 0]);
                            self.check_numerics(replica, request, around);
                            let beside = self.front.is_hedged(request) && submission.key.attempt != Attempt(1);
                            self.ledger.sent(replica.index(), submission, beside);
                        }
                        ToReplica::Abort { request, attempt, .. } => self.ledger.given_up(*request, *attempt),
                        ToReplica::Recall { .. } | ToReplica::KvAsk { .. } => {}
                    }
                    self.outgoing.push_back((replica, message));
                }
                FrontAction::Deliver(deliveries) => {
                    for delivery in deliveries.iter() {
                        let request = delivery.request;
                        assert!(!self.front.is_hedged(request), "request {request} has a token and two attempts");
                        let tokens = self.ledger.deliver(around.now(), &delivery, &around.mix);
                        if self.ledger.alive(delivery.request).is_some_and(|account| account.reads) {
                            self.reads.push_back((delivery.request, tokens));
                        }
                        around.note("front delivers", [self.number as u64, delivery.request.0, tokens.into(), 0]);
                    }
                }
                FrontAction::Finish { request, reason, usage, restarts } => {
                    self.ledger.check_restarts(request, restarts);
                    self.ledger.end(request, reason, usage, &around.mix, moment);
                    around.reach(end_name(reason), [self.number as u64, request.0, usage.output_tokens.into(), 0]);
                    if restarts > 0 && usage.output_tokens > 0 {
                        around.coverage.reach("stream_survived_restart");
                        around.coverage.add("stream_survived_two_restarts", u64::from(restarts > 1));
                    }
                }
                FrontAction::WakeAt(at) => {
                    self.wake_at = Some(at);
                    around.agenda.at(at, Happening::Tick { front: self.number, at });
                }
            }
        }
        self.retry_book.retried(around.now(), self.front.counters().repeated_retries, &around.mix.retries);
        let prospect = self.has_prospect(around.now());
        if self.alone_since.is_some_and(|since| around.now().since(since) >= around.mix.max_without_replica) {
            self.gave_up = Some(around.now());
            let connected = self.conversations.iter().any(Conversation::is_welcome);
            around.coverage.add("front_gave_up_workers", u64::from(connected));
        }
        self.alone_since = if prospect { None } else { self.alone_since.or(Some(around.now())) };
    }

    fn has_prospect(&self, now: Time) -> bool {
        let mut welcome = self.conversations.iter().filter(|conversation| conversation.is_welcome());
        let waits = |node: &ReplicaStatus| node.state.is_some_and(|state| state != ReplicaState::Recovering);
        // What the front believes is asked only where it matters.
        welcome.any(|node| !node.has_lost_worker()) || self.front.status(now).replicas.iter().any(waits)
    }

    /// A stream that goes on is not sent where it is computed otherwise while an idle node computes alike. A node that was
    /// full is left alone for a while, idle or not.
    fn check_numerics(&self, replica: ReplicaId, request: RequestId, around: &mut Around) {
        let Some(wanted) = self.ledger.numerics(request) else { return };
        if around.mix.numerics(replica.index()) == wanted {
            around.coverage.reach("stream_kept_numerics");
            return;
        }
        let alike_and_idle = |other: &ReplicaStatus| {
            let idle = other.report.is_some_and(|report| report.predicted_backlog_ns == 0 && report.waiting == 0);
            let ready = other.state == Some(ReplicaState::Ready) && other.load.sequences == 0;
            let trusted = other.trust == Trust::Trusted;
            around.mix.numerics(other.replica.index()) == wanted && ready && idle && trusted
        };
        let passed_over = self.front.status(around.now()).replicas.iter().any(alike_and_idle);
        let was_full = around.coverage.count("replica_queue_full") > 0;
        assert!(was_full || !passed_over, "request {request} changes its numerics though an idle node computes alike");
    }

    /// A client submits. Returns the request, if it was taken.
    pub(crate) fn submit(&mut self, wish: &Wish, around: &mut Around) -> Option<RequestId> {
        let now = around.now();
        let mut new = wish.new.clone();
        if let Some(block_tokens) = self.front.block_tokens_for_names(&new.model) {
            let hasher = ChainHasher::new(SECRET);
            new.prefix = hasher.keys(&new.namespace, &new.prompt, block_tokens, block_tokens).into();
            around.coverage.reach("prompt_named");
        }
        let outcome = self.front.submit(now, new, &mut self.actions);
        let taken = match outcome {
            Ok(request) => {
                self.ledger.open(request, &wish.new, wish.reads, now);
                self.retry_book.taken(now);
                if !wish.reads {
                    around.coverage.reach("client_slow_reader");
                }
                around.note("client submits", [self.number as u64, request.0, wish.new.prompt.len() as u64, 0]);
                Some(request)
            }
            Err(error) => {
                around.reach(self.check_refusal(&error), [self.number as u64, 0, 0, 0]);
                None
            }
        };
        self.carry_out(around);
        self.flush(around);
        taken
    }

    fn check_refusal(&self, error: &SubmitError) -> &'static str {
        match error {
            SubmitError::Refused(Refusal::QueueFull { queued, limit, unit, retry_after }) => {
                assert!(retry_after.0 > 0, "a refused client is told when to come back");
                match unit {
                    QueueUnit::Requests => {
                        assert!(queued >= limit, "refused though there is room");
                        "client_refused_queue"
                    }
                    QueueUnit::LiveRequests => {
                        assert!(queued >= limit, "refused though there is room");
                        "client_refused_live"
                    }
                    QueueUnit::Tokens => "client_refused_tokens",
                }
            }
            SubmitError::Unavailable { .. } => {
                assert!(self.alone_since.is_some(), "refused though a node is connected");
                "client_refused_unavailable"
            }
            other => panic!("a good request is refused: {other}"),
        }
    }

    /// A client acts on its request, if that still lives.
    pub(crate) fn act(&mut self, request: RequestId, act: ClientAct, around: &mut Around) {
        // What is due at this very moment comes first, for the front as for its clients' books.
        self.tick_if_due(around);
        let now = around.now();
        let Some(account) = self.ledger.alive(request) else { return };
        let event = match act {
            ClientAct::Cancel => {
                account.by_client = ByClient::Ended;
                around.reach("client_cancelled", [self.number as u64, request.0, 0, 0]);
                FrontEvent::Cancel { request, at_token: None }
            }
            ClientAct::CutAtToken => {
                let at_token = around.random.count(0, account.delivered_tokens());
                account.by_client = ByClient::CutAt(at_token);
                around.reach("client_cut_at_token", [self.number as u64, request.0, at_token.into(), 0]);
                FrontEvent::Cancel { request, at_token: Some(at_token) }
            }
            ClientAct::Leave => {
                account.by_client = ByClient::Ended;
                around.reach("client_gone", [self.number as u64, request.0, 0, 0]);
                FrontEvent::ClientGone { request }
            }
            ClientAct::Detach => {
                account.detach(now);
                around.reach("client_detached", [self.number as u64, request.0, 0, 0]);
                FrontEvent::Detach { request }
            }
            ClientAct::Attach => {
                account.attached = true;
                let from_index = account.delivered_tokens();
                around.reach("client_attached", [self.number as u64, request.0, from_index.into(), 0]);
                FrontEvent::Attach { request, from_index }
            }
        };
        self.happen(Some(event), around);
        assert!(
            !matches!(act, ClientAct::Cancel | ClientAct::CutAtToken | ClientAct::Leave)
                || self.ledger.alive(request).is_none(),
            "request {request} lives on after its client ended it"
        );
    }

    /// Nothing is left of any request.
    pub(crate) fn is_quiet(&self) -> bool {
        self.ledger.live() == 0 && self.wake_at.is_none()
    }

    /// Whether this front has heard what a node's prefix cache holds. A front without an index has nothing to hear.
    pub(crate) fn knows_caches(&self, place: usize, named: impl Iterator<Item = PrefixKey>) -> bool {
        let replica = ReplicaId(place as u32);
        let mut unknown = named.filter(|&key| self.front.says_held(replica, key) == Some(false));
        unknown.next().is_none()
    }

    /// Nodes that take work from this front.
    pub(crate) fn ready_nodes(&self, now: Time) -> usize {
        let status = self.front.status(now);
        status.replicas.iter().filter(|replica| replica.state == Some(ReplicaState::Ready)).count()
    }

    /// The books and the front agree. Only where nodes lose tokens, or dead connections deliver what comes after lost ones,
    /// may a stream lack one.
    pub(crate) fn check(&self, now: Time, tokens_were_lost: bool) {
        self.front.check();
        let status = self.front.status(now);
        assert_eq!(status.live_requests, self.ledger.live() as u64, "the front and its clients agree on who lives");
        let counters = self.front.counters();
        assert_eq!((counters.duplicate_tokens, counters.surplus_tokens), (0, 0), "a stream has a token twice");
        let changes = counters.numerics_changes;
        assert!(self.ledger.numerics_changes <= changes, "a change of numerics was not counted");
        assert!(counters.gaps == 0 || tokens_were_lost, "a stream lacks a token");
        let ready = status.replicas.iter().filter(|replica| replica.state == Some(ReplicaState::Ready));
        let (ready, alone) = ready
            .fold((0, 0), |(ready, alone), replica| (ready + 1, alone + usize::from(replica.trust != Trust::Trusted)));
        assert!(alone * 2 <= ready, "{alone} of {ready} ready nodes are left alone");
        if self.presence == Presence::Running {
            self.ledger.check_deadlines(now);
        }
    }
}

fn index_options(block_tokens: u32) -> IndexOptions {
    IndexOptions {
        tokens_per_key: block_tokens,
        max_bytes: 2 << 20,
        max_pending_keys: 256,
        max_pending: Duration::from_millis(300),
        ask_again_after: Duration::from_millis(50),
    }
}

fn end_name(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Unavailable => "end_unavailable",
        EndReason::Refused(_) => "end_refused",
        EndReason::Finished(FinishReason::Stop) => "end_stop",
        EndReason::Finished(FinishReason::Length) => "end_length",
        EndReason::Finished(FinishReason::Aborted) => "end_aborted",
        EndReason::Finished(FinishReason::Deadline) => "end_deadline",
        EndReason::Finished(FinishReason::Poisoned) => "end_poisoned",
        EndReason::Finished(FinishReason::NotANumber) => "end_not_a_number",
        EndReason::Finished(FinishReason::NothingToSample) => "end_nothing_to_sample",
    }
}
