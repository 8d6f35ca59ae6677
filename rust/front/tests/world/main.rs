//! A front among fake replicas on a hostile network: random submissions, readers, crashes, restarts, drains, refusals,
//! lost, doubled, late and ghostly frames. After every event the naive book must agree with everything the front said,
//! and its own books must add up; when the network heals, every request ends.

mod admission;
mod book;
mod fake;
mod happening;
mod hold;

use book::{Book, Place};
use fake::{EOS, FakeReplica, Mail, VOCABULARY};
use happening::{Happening, happening};
use llmscale_front::{
    Front, FrontAction, FrontCounters, FrontEvent, FrontOptions, HealthOptions, ModelKey, NewRequest, Offer,
    ReplicaFrame, ReplicaLimits, ReplicaState, Report, RetryOptions, SubmitError, Trust,
};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Duration, Epoch, FrontLimits, Refusal, ReplicaId, RequestId, Time};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

pub(crate) const MODELS: [&str; 3] = ["tiny", "tiny", "mini"];

fn options() -> FrontOptions {
    FrontOptions {
        limits: FrontLimits {
            max_queued_requests: 8,
            max_queued_tokens: 60,
            max_live_requests: 16,
            max_attempts: 4,
            max_detached: Duration::from_millis(1_000),
            max_unread_tokens: 6,
            ..FrontLimits::default()
        },
        max_replicas: 3,
        promote_after: Duration::from_millis(300),
        max_without_replica: Duration::from_millis(2_000),
        // Silence has tests of its own; here it would need the book to predict times.
        max_silence: Duration(u64::MAX / 4),
        prefixes: None,
        max_recovering: Duration(u64::MAX / 4),
        health: HealthOptions::default(),
        // Waiting for a retry has tests of its own as well.
        hedging: None,
        retries: RetryOptions { least_retries: u32::MAX, delay: Duration(0), ..RetryOptions::default() },
    }
}

struct World {
    front: Front,
    book: Book,
    replicas: Vec<FakeReplica>,
    history: Vec<(usize, Mail)>,
    now: Time,
    taken: Vec<RequestId>,
    /// Requests that a full queue let through.
    above: u64,
}

impl World {
    fn new() -> Self {
        let replicas = (0..MODELS.len()).map(|replica| FakeReplica::new(replica as u64 + 1)).collect();
        let mut world = Self {
            front: Front::new(options()).expect("the options are sound"),
            book: Book::new(options(), MODELS.to_vec()),
            replicas,
            history: Vec::new(),
            now: Time(1_000),
            taken: Vec::new(),
            above: 0,
        };
        world.up(0);
        world.up(2);
        world
    }

    fn offer(&self, replica: usize) -> Offer {
        Offer {
            node: self.replicas[replica].node,
            epoch: self.replicas[replica].epoch,
            model: ModelKey {
                name: MODELS[replica].into(),
                revision: "main".into(),
                adapter: None,
                weights_digest: [1; 32],
                tokenizer_digest: [2; 32],
            },
            numerics: "hash".into(),
            limits: ReplicaLimits {
                vocabulary: VOCABULARY,
                max_sequence_tokens: 40,
                max_sequences: 4,
                max_waiting_sequences: 4,
                total_blocks: 100,
                block_tokens: 8,
                eos_tokens: vec![EOS],
            },
            state: ReplicaState::Ready,
        }
    }

    /// Gives the front an event that the book was told already.
    fn tell(&mut self, event: FrontEvent) {
        let mut out = Vec::new();
        self.front.on_event(self.now, event, &mut out);
        self.take(&out);
    }

    fn take(&mut self, out: &[FrontAction]) {
        self.book.expire(self.now);
        let untrusted = self.front.status(self.now).replicas.into_iter().filter(|one| one.trust != Trust::Trusted);
        self.book.left_alone = untrusted.map(|one| one.replica.0).collect();
        self.book.hold_against(self.now, out);
        self.front.check();
        for action in out {
            if let FrontAction::Send { replica, message } = action {
                let fake = &mut self.replicas[replica.index()];
                // Mail to a process that has died unnoticed goes nowhere.
                if fake.up {
                    fake.inbox.push_back(message.clone());
                }
            }
        }
        assert_eq!(self.front.status(self.now).live_requests as usize, self.book.live());
    }

    fn up(&mut self, replica: usize) {
        if !self.replicas[replica].up {
            self.replicas[replica].up = true;
            let offer = Box::new(self.offer(replica));
            self.book.up(self.now, replica as u32, offer.node, offer.epoch);
            self.tell(FrontEvent::ReplicaUp { replica: ReplicaId(replica as u32), offer });
        }
    }

    fn down(&mut self, replica: usize) {
        self.book.down(self.now, replica as u32);
        self.tell(FrontEvent::ReplicaDown { replica: ReplicaId(replica as u32) });
    }

    fn mail(&mut self, replica: usize, mail: Mail) {
        let Mail { node, epoch, frame } = mail;
        self.book.frame(self.now, replica as u32, node, epoch, &frame);
        self.tell(FrontEvent::Frame { replica: ReplicaId(replica as u32), node, epoch, frame });
    }

    fn deliver(&mut self, replica: usize) {
        if let Some(mail) = self.replicas[replica].outbox.pop_front() {
            self.history.push((replica, mail.clone()));
            self.mail(replica, mail);
        }
    }

    fn status(&mut self, replica: usize, state: ReplicaState) {
        let report = Report {
            state,
            running: 0,
            waiting: 0,
            queued_tokens: 0,
            predicted_backlog_ns: 0,
            free_blocks: 9,
            steps: 0,
            preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            offloaded_blocks: 0,
            restored_blocks: 0,
            bad_host_blocks: 0,
            worker_restarts: 0,
            worker_pid: None,
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
        };
        let (node, epoch) = (self.replicas[replica].node, self.replicas[replica].epoch);
        self.mail(replica, Mail { node, epoch, frame: ReplicaFrame::Status(Box::new(report)) });
    }

    fn submit(&mut self, mut new: NewRequest, timeout_us: Option<u64>) {
        new.deadline = timeout_us.map(|timeout| self.now + Duration(timeout));
        let must = self.book.admission(self.now, &new);
        let mut out = Vec::new();
        let said = self.front.submit(self.now, new.clone(), &mut out);
        let above = matches!(
            must,
            Err(SubmitError::Refused(Refusal::QueueFull { unit: QueueUnit::Requests | QueueUnit::Tokens, .. }))
        );
        match (&must, &said) {
            (_, Ok(id)) if must.is_ok() || above => {
                self.book.submitted(self.now, *id, new);
                self.taken.push(*id);
            }
            (Err(must), Err(said)) => {
                let forgive = |error: &SubmitError| match error.clone() {
                    SubmitError::Refused(Refusal::QueueFull { queued, limit, unit, retry_after }) => {
                        assert!(retry_after.0 > 0 || std::ptr::eq(error, must), "retry at once");
                        (None, Some((queued, limit, unit)))
                    }
                    other => (Some(other), None),
                };
                assert_eq!(forgive(must), forgive(said));
            }
            _ => panic!("the book says {must:?}, the front {said:?}"),
        }
        self.take(&out);
        if let (true, Ok(id)) = (above, said) {
            // Which replica has room is the front's to know: a full queue takes what does not wait in it.
            self.above += 1;
            let place = self.book.find(id).map(|entry| entry.place);
            assert!(matches!(place, Some(Place::On(_))), "request {id} waits above the bound");
        }
    }

    /// One of the requests that were ever taken, alive or not.
    fn any(&self, index: Index) -> Option<RequestId> {
        (!self.taken.is_empty()).then(|| *index.get(&self.taken))
    }

    fn happen(&mut self, happening: Happening) {
        // What is due comes before what happens, for the book as for the front.
        self.book.expire(self.now);
        match happening {
            Happening::Submit { new, timeout_us } => self.submit(*new, timeout_us),
            Happening::Receive(replica) => self.replicas[replica].receive(),
            Happening::Step { replica, tokens } => self.replicas[replica].step(tokens),
            Happening::Deliver(replica) => self.deliver(replica),
            Happening::Lose(replica) => drop(self.replicas[replica].outbox.pop_front()),
            Happening::Ghost(index) if !self.history.is_empty() => {
                let (replica, mail) = index.get(&self.history).clone();
                self.mail(replica, mail);
            }
            Happening::Ghost(_) => {}
            Happening::Crash { replica, noticed } => {
                self.replicas[replica].crash();
                if noticed {
                    self.down(replica);
                }
            }
            Happening::Up(replica) => self.up(replica),
            Happening::WorkerRestart(replica) => {
                let epoch = &mut self.replicas[replica].epoch;
                *epoch = Epoch(epoch.0 + 1);
            }
            Happening::Refuse { replica, refusal } => self.replicas[replica].refuse_next = Some(refusal),
            Happening::Status { replica, state } => self.status(replica, state),
            Happening::Drain(replica) => self.replicas[replica].drain(),
            Happening::Pass(span) => {
                self.now = self.now + Duration(span);
                self.book.expire(self.now);
                self.tell(FrontEvent::Tick);
            }
            client => self.client(client),
        }
    }

    fn client(&mut self, happening: Happening) {
        match happening {
            Happening::Cancel { request, at_token } => {
                let Some(request) = self.any(request) else { return };
                self.book.cancelled(request, at_token);
                self.tell(FrontEvent::Cancel { request, at_token });
            }
            Happening::Gone(request) => {
                let Some(request) = self.any(request) else { return };
                self.book.cancelled(request, None);
                self.tell(FrontEvent::ClientGone { request });
            }
            Happening::Detach(request) => {
                let Some(request) = self.any(request) else { return };
                self.book.detached(self.now, request);
                self.tell(FrontEvent::Detach { request });
            }
            Happening::Attach { request, from_index } => {
                let Some(request) = self.any(request) else { return };
                self.book.attached(request, from_index);
                self.tell(FrontEvent::Attach { request, from_index });
            }
            Happening::Read { request, up_to_index } => {
                let Some(request) = self.any(request) else { return };
                self.book.has_read(request, up_to_index);
                self.tell(FrontEvent::Read { request, up_to_index });
            }
            other => unreachable!("{other:?} is no deed of a client"),
        }
    }

    /// All processes are replaced, nothing fails any more, everybody reads: every request must end.
    fn heal(&mut self) {
        for replica in 0..MODELS.len() {
            self.book.expire(self.now);
            self.replicas[replica].crash();
            self.replicas[replica].outbox.clear();
            self.up(replica);
        }
        for round in 0.. {
            for request in self.book.ids() {
                self.book.attached(request, u32::MAX);
                self.tell(FrontEvent::Attach { request, from_index: u32::MAX });
            }
            if self.book.live() == 0 {
                break;
            }
            assert!(round < 1_000, "requests never end");
            for replica in 0..MODELS.len() {
                assert!(self.book.is_up(ReplicaId(replica as u32)));
                while !self.replicas[replica].inbox.is_empty() {
                    self.replicas[replica].receive();
                }
                self.replicas[replica].step(1);
                while !self.replicas[replica].outbox.is_empty() {
                    self.deliver(replica);
                }
            }
        }
        for replica in 0..MODELS.len() {
            while !self.replicas[replica].inbox.is_empty() {
                self.replicas[replica].receive();
            }
            self.replicas[replica].outbox.clear();
            assert!(self.replicas[replica].is_idle(), "a replica runs what nobody wants");
        }
        let counters = self.front.counters();
        assert_eq!((counters.submitted, counters.finished), (self.taken.len() as u64, self.taken.len() as u64));
    }
}

/// A test that never meets a gap proves nothing about gaps.
#[test]
fn the_random_worlds_meet_every_case() {
    let mut runner = TestRunner::deterministic();
    let mut seen = FrontCounters::default();
    let mut above = 0;
    for _ in 0..300 {
        let happenings = prop::collection::vec(happening(), 300).new_tree(&mut runner).expect("nothing is filtered");
        let mut world = World::new();
        happenings.current().into_iter().for_each(|happening| world.happen(happening));
        world.heal();
        above += world.above;
        let counters = world.front.counters();
        seen.refused += counters.refused;
        seen.lost_attempts += counters.lost_attempts;
        seen.given_back += counters.given_back;
        seen.recalls += counters.recalls;
        seen.moved += counters.moved;
        seen.tokens += counters.tokens;
        seen.stale_frames += counters.stale_frames;
        seen.stale_rows += counters.stale_rows;
        seen.late += counters.late;
        seen.duplicate_tokens += counters.duplicate_tokens;
        seen.gaps += counters.gaps;
        seen.expired += counters.expired;
        seen.slow_readers += counters.slow_readers;
    }
    let counts = [
        ("refused", seen.refused),
        ("let through above the bound", above),
        ("lost attempts", seen.lost_attempts),
        ("given back", seen.given_back),
        ("recalls", seen.recalls),
        ("moved", seen.moved),
        ("tokens", seen.tokens),
        ("stale frames", seen.stale_frames),
        ("stale rows", seen.stale_rows),
        ("late", seen.late),
        ("duplicate tokens", seen.duplicate_tokens),
        ("gaps", seen.gaps),
        ("expired", seen.expired),
        ("slow readers", seen.slow_readers),
    ];
    for (case, count) in counts {
        assert!(count >= 20, "{case}: {count} times only, of {counts:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_front_does_what_the_book_says(happenings in prop::collection::vec(happening(), 0..300)) {
        let mut world = World::new();
        for happening in happenings {
            world.happen(happening);
        }
        world.heal();
    }
}
