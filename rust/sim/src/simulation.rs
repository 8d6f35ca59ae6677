//! One seed: its world, its faults, and the proof that nothing went wrong. Faults and clients rage for some seconds of
//! virtual time; then everything heals, and every request has to end, every block to come home and every timer to fall
//! silent within a bound. Events are carried out one by one, and the invariants are checked as they go.

mod processes;

use crate::around::Around;
use crate::clients;
use crate::coverage::Coverage;
use crate::faults::{Care, Fault, Mix};
use crate::front_host::{FrontHost, Presence};
use crate::happening::{Frame, Happening, Towards};
use crate::node::NodeProcess;
use crate::random::Random;
use crate::swarm::run_seed;
use crate::versions;
use llmscale_types::{Duration, NodeId, Time};
use llmscale_wire::{FromNode, decode_as};
use std::collections::VecDeque;

/// From the end of the faults until everything must be over. A small budget lets a hundred requests try again one by one.
const MAX_HEALING: Duration = Duration::from_millis(400_000);
/// A front that waits for so long outlasts every pause and every hung worker.
const PATIENT: Duration = Duration::from_millis(20_000);
/// Events between two walks through the whole state; each costs about as much as fifty events.
const CHECK_INTERVAL: u64 = 16;

/// What a seed that went well has shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Over everything that happened, in order.
    pub trace_hash: u64,
    /// Events carried out.
    pub events: u64,
    /// Virtual time that passed.
    pub virtual_time: Duration,
    /// Requests that were taken.
    pub requests: u64,
    /// Tokens that reached their clients.
    pub tokens: u64,
    /// How long clients that were there waited for their first token.
    pub first_tokens: Vec<Duration>,
    /// Faults and paths of recovery that were reached.
    pub coverage: Coverage,
}

/// See the file's header.
#[derive(Debug)]
pub struct Simulation {
    seed: u64,
    pub(crate) around: Around,
    fronts: Vec<FrontHost>,
    deferred: Vec<VecDeque<Happening>>,
    nodes: Vec<Option<NodeProcess>>,
    started_nodes: u64,
    healing: bool,
    /// Those of the mix, which forgets them when it heals.
    faults: Vec<(Fault, Duration)>,
    /// A fault at a place, after so many events.
    strike: Option<(Fault, usize, u64)>,
    events: u64,
    requests: u64,
    tokens: u64,
    first_tokens: Vec<Duration>,
}

impl Simulation {
    /// Runs a seed. Panics with everything that it takes to see it again, if an invariant does not hold.
    pub fn run(seed: u64) -> Report {
        run_seed(seed).unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// The world of a seed, before anything has happened.
    pub(crate) fn new(seed: u64) -> Self {
        let (mix, random) = Self::draw(seed);
        Self::of(seed, mix, random)
    }

    /// The world that a seed had before the latest kinds of trouble were added, which is where it once failed. Panics with
    /// what does not hold.
    pub fn run_kept(seed: u64) -> Report {
        let (mix, random) = Self::draw(seed);
        Self::of(seed, mix.kept(), random).live()
    }

    fn draw(seed: u64) -> (Mix, Random) {
        let mut random = Random::new(seed);
        // Neighbouring seeds start from neighbouring states; the first draw tells them apart.
        let mut random = Random::new(random.draw());
        let mix = Mix::draw(&mut random);
        (mix, random)
    }

    /// A small world in which nothing fails but one thing: this fault strikes the node at a place after so many events.
    /// Panics with what does not hold.
    pub fn run_with_strike(seed: u64, fault: Fault, place: usize, after_events: u64) -> Report {
        let mut random = Random::new(seed);
        let mix = Mix::draw(&mut random).calm();
        let mut simulation = Self::of(seed, mix, random);
        simulation.strike = Some((fault, place, after_events));
        simulation.live()
    }

    /// A world of three nodes in which workers are slow now and then and nothing else fails. Panics with what does not hold.
    pub fn run_with_slow_workers(seed: u64, care: Care) -> Report {
        let mut random = Random::new(seed);
        let mix = Mix::draw(&mut random).slow(care);
        Self::of(seed, mix, random).live()
    }

    /// A small world in which nothing fails while all its processes are replaced by those of the next build, one by one.
    /// Panics with what does not hold.
    pub fn run_with_upgrade(seed: u64) -> Report {
        let mut random = Random::new(seed);
        let mix = Mix::draw(&mut random).upgraded();
        Self::of(seed, mix, random).live()
    }

    fn of(seed: u64, mix: Mix, random: Random) -> Self {
        let mut around = Around::new(mix, random);
        let fronts: Vec<FrontHost> =
            (0..around.mix.fronts).map(|front| FrontHost::start(front, 1, &mut around)).collect();
        let mut simulation = Self {
            seed,
            deferred: fronts.iter().map(|_| VecDeque::new()).collect(),
            fronts,
            nodes: (0..around.mix.nodes).map(|_| None).collect(),
            faults: around.mix.faults.clone(),
            around,
            started_nodes: 0,
            healing: false,
            strike: None,
            events: 0,
            requests: 0,
            tokens: 0,
            first_tokens: Vec::new(),
        };
        simulation.plan_beginnings();
        simulation
    }

    fn plan_beginnings(&mut self) {
        let Around { agenda, random, mix, .. } = &mut self.around;
        for place in 0..self.nodes.len() {
            agenda.after(random.span(0, 50_000), Happening::NodeStart { place });
        }
        for front in 0..self.fronts.len() {
            agenda.at(Time(0), Happening::Look { front, regular: true });
            agenda.after(random.span(0, 400_000), Happening::Submit { front });
        }
        for &(fault, mean) in &mix.faults {
            agenda.after(random.span(0, 2 * mean.0), Happening::Fault(fault));
        }
        if let Some(upgrade) = mix.upgrade {
            agenda.at(upgrade.at, Happening::Upgrade { turn: 0 });
        }
        agenda.after(mix.unrest, Happening::Heal);
    }

    /// Lives through the seed. Panics where an invariant does not hold.
    pub(crate) fn live(&mut self) -> Report {
        let end = Time(0) + self.around.mix.unrest + MAX_HEALING;
        while !self.is_over() {
            let happening = self.around.agenda.next_event().expect("regular looks are always planned");
            assert!(self.around.now() <= end, "it does not come to an end: {:?}", self.unfinished());
            self.carry_out(happening);
            self.keep_books();
            self.events += 1;
            if let Some((fault, place, _)) = self.strike.take_if(|(.., after)| *after == self.events) {
                self.fault_at(fault, place);
            }
            if self.events.is_multiple_of(CHECK_INTERVAL) {
                self.check();
            }
        }
        self.check();
        self.check_rest();
        self.check_deadly_deaths();
        for place in 0..self.nodes.len() {
            self.count_replica(place);
        }
        for front in 0..self.fronts.len() {
            self.count_front(front);
        }
        Report {
            seed: self.seed,
            trace_hash: self.around.trace.hash(),
            events: self.events,
            virtual_time: self.around.now().since(Time(0)),
            requests: self.requests,
            tokens: self.tokens,
            first_tokens: std::mem::take(&mut self.first_tokens),
            coverage: self.around.coverage.clone(),
        }
    }

    /// Faults are over, no request lives, every process is up and at rest, and every front can use every node.
    fn is_over(&self) -> bool {
        let at_rest = |node: &Option<NodeProcess>| node.as_ref().is_some_and(NodeProcess::is_at_rest);
        self.healing
            && self.fronts.iter().all(FrontHost::is_quiet)
            && self.nodes.iter().all(at_rest)
            && self.fronts.iter().all(|front| front.ready_nodes(self.around.now()) == self.nodes.len())
            && self.fronts.iter().all(|front| self.knows_all_caches(front))
    }

    fn knows_all_caches(&self, front: &FrontHost) -> bool {
        let nodes = self.nodes.iter().flatten();
        nodes.enumerate().all(|(place, node)| front.knows_caches(place, node.replica.named_prefixes()))
    }

    fn carry_out(&mut self, happening: Happening) {
        if let Some(front) = self.absent_front(&happening) {
            self.deferred[front].push_back(happening);
            return;
        }
        match happening {
            Happening::Frame(frame) => self.arrive(frame),
            Happening::LinkUp { front, place } => self.link_up(front, place),
            Happening::Round { place, node } => self.round(place, node),
            Happening::Worker { place, node, epoch, turn } => {
                self.with_node(place, node, |process, around| process.worker_turn(epoch, turn, around));
            }
            Happening::LateResult { place, node, bytes } => {
                self.with_node(place, node, |process, around| process.hear_late_result(&bytes, around));
            }
            Happening::NodeDrain { place, node } => self.with_node(place, node, NodeProcess::drain),
            Happening::NodeStart { place } => self.start_node(place),
            Happening::NodeResume { place, node } => self.with_node(place, node, NodeProcess::resume),
            Happening::FrontResume { front } => self.resume_front(front),
            Happening::FrontGone { front } => self.front_gone(front),
            Happening::FrontStart { front } => self.start_front(front),
            Happening::Look { front, regular } => self.fronts[front].look(&mut self.around, regular),
            Happening::Tick { front, at } => {
                if self.fronts[front].wake_at == Some(at) {
                    self.fronts[front].look(&mut self.around, false);
                }
            }
            Happening::Submit { front } => self.submit(front),
            Happening::Client { front, incarnation, request, act } => {
                if self.fronts[front].incarnation == incarnation {
                    self.fronts[front].act(request, act, &mut self.around);
                }
            }
            Happening::Fault(fault) => self.fault(fault),
            Happening::Upgrade { turn } => self.upgrade(turn),
            Happening::Heal => self.heal(),
        }
    }

    /// Clients of a process that is not there wait until it is.
    fn absent_front(&self, happening: &Happening) -> Option<usize> {
        let front = match happening {
            Happening::Submit { front } | Happening::Client { front, .. } => *front,
            _ => return None,
        };
        (self.fronts[front].presence != Presence::Running).then_some(front)
    }

    fn with_node(&mut self, place: usize, node: NodeId, act: impl FnOnce(&mut NodeProcess, &mut Around)) {
        if let Some(process) = self.nodes[place].as_mut().filter(|process| process.node == node) {
            act(process, &mut self.around);
        }
    }

    fn arrive(&mut self, mut frame: Frame) {
        if !frame.late && !self.around.network.carries(&frame) {
            if !self.healing && self.around.random.chance(self.around.mix.late_frames) && self.may_be_late(&frame) {
                frame.late = true;
                let wait = self.around.random.span(1_000, 600_000);
                self.around.agenda.after(wait, Happening::Frame(frame));
            }
            return;
        }
        let Frame { front, incarnation, place, peer, node, towards, bytes, late } = frame;
        match towards {
            Towards::Front if incarnation != self.fronts[front].incarnation => {}
            Towards::Front => {
                if late {
                    self.around.reach("frame_late_to_front", [front as u64, place as u64, node.0, 0]);
                }
                self.fronts[front].hear(place, bytes, &mut self.around);
            }
            Towards::Node => {
                if late {
                    self.around.reach("frame_late_to_node", [front as u64, place as u64, node.0, 0]);
                }
                self.with_node(place, node, |process, around| process.hear(peer, bytes, around));
            }
        }
    }

    /// A socket hands frames over in order, so the welcome of a dead connection never comes after that of a new one.
    fn may_be_late(&self, frame: &Frame) -> bool {
        let read = || decode_as(versions::NEXT, &frame.bytes, &self.around.codec);
        frame.towards == Towards::Node || !matches!(read(), Ok(FromNode::Welcome(_)))
    }

    fn round(&mut self, place: usize, node: NodeId) {
        self.with_node(place, node, NodeProcess::round);
        if self.nodes[place].as_ref().is_some_and(NodeProcess::is_drained) {
            self.around.reach("node_drained", [place as u64, node.0, 0, 0]);
            self.stop_node(place);
        }
    }

    fn submit(&mut self, front: usize) {
        if self.healing {
            return;
        }
        let Around { random, mix, agenda, .. } = &mut self.around;
        let wait = random.span(0, 2 * mix.submit_interval.0);
        let burst = if random.chance(50) { random.between(5, 20) } else { 1 };
        agenda.after(wait, Happening::Submit { front });
        for _ in 0..burst {
            let Around { random, mix, agenda, coverage, .. } = &mut self.around;
            // What was said leaves room for eight more tokens and an answer.
            let room = mix.engine.max_sequence_tokens as usize - 12;
            let next_turn = random.chance(300).then(|| self.fronts[front].ledger.said(random, room)).flatten();
            coverage.add("client_next_turn", u64::from(next_turn.is_some()));
            let wish = clients::wish(mix, random, agenda.now(), next_turn);
            if let Some(request) = self.fronts[front].submit(&wish, &mut self.around) {
                let incarnation = self.fronts[front].incarnation;
                for (wait, act) in wish.acts {
                    self.around.agenda.after(wait, Happening::Client { front, incarnation, request, act });
                }
            }
        }
    }

    fn heal(&mut self) {
        self.healing = true;
        self.around.note("heal", [0; 4]);
        self.around.mix.faults.clear();
        for process in self.nodes.iter_mut().flatten().filter(|process| process.paused) {
            process.resume(&mut self.around);
        }
        for front in 0..self.fronts.len() {
            self.resume_front(front);
            self.start_front(front);
        }
    }

    /// Tells the clients' books which workers have died.
    fn keep_books(&mut self) {
        for (place, ordinary) in std::mem::take(&mut self.around.deaths) {
            self.around.note("worker died", [place as u64, u64::from(ordinary), 0, 0]);
            for front in &mut self.fronts {
                front.ledger.worker_died(place, ordinary);
            }
        }
    }

    fn check(&self) {
        let now = self.around.now();
        let coverage = &self.around.coverage;
        // The headers would hide it from every stream if a replica believed in copies that were never made.
        let (bad, flipped) = (coverage.count("worker_found_bad_host_blocks"), coverage.count("host_bit_flipped"));
        assert!(bad == 0 || flipped > 0, "{bad} steps wanted host blocks back that nobody had put there");
        // A record is written behind the engine, so a node's death may leave one of a place that is overwritten by now.
        let of = |causes: &[&str]| causes.iter().map(|cause| coverage.count(cause)).sum::<u64>();
        let harmed = of(&["disk_bit_flipped", "host_bit_flipped", "disk_torn", "disk_records_lost"]);
        let bad: u64 = self.nodes.iter().flatten().map(|one| one.replica.cache_counters().bad_disk_blocks).sum();
        assert!(bad == 0 || harmed > 0, "{bad} blocks were to be read from a disk that nobody had written there");
        let resets = of(&["worker_needs_snapshot", "worker_raised", "worker_found_bad_host_blocks"]);
        let waits = coverage.count("disk_waits");
        let resets = resets + coverage.count("worker_deadly_token_raised");
        assert!(waits == 0 || resets > 0, "{waits} copies waited for the disk though nothing was given up");
        let causes = ["frame_late_to_front", "node_lost_a_row"];
        let tokens_were_lost = causes.iter().any(|cause| self.around.coverage.count(cause) > 0);
        self.fronts.iter().for_each(|front| front.check(now, tokens_were_lost));
        self.nodes.iter().flatten().for_each(|process| process.replica.check());
    }

    /// Nothing is left anywhere.
    fn check_rest(&self) {
        for process in self.nodes.iter().flatten() {
            let load = process.replica.load();
            assert_eq!(load.free_blocks, load.total_blocks, "blocks of node {} did not come home", process.node);
        }
        for front in &self.fronts {
            let status = front.front.status(self.around.now());
            assert_eq!((status.queued_requests, status.queued_tokens, status.live_requests), (0, 0, 0));
            assert!(status.replicas.iter().all(|replica| replica.load.sequences == 0), "a load is left");
            // Silence is the last resort against what was lost without a trace. Nothing is, so whoever is patient is
            // never silent for so long: without this, a lost order would pass for a slow node.
            let silences = front.front.counters().silences;
            assert!(silences == 0 || self.around.mix.max_silence < PATIENT, "{silences} attempts were lost unseen");
        }
    }

    /// A request that kills workers is convicted, and does not go from node to node. Where nodes are drained or fronts
    /// forget their requests, suspects lawfully start anew, so such seeds prove nothing.
    fn check_deadly_deaths(&self) {
        let starts_anew = |&(fault, _): &(Fault, Duration)| matches!(fault, Fault::NodeDrain | Fault::FrontRestart);
        if self.around.mix.upgrade.is_none() && !self.faults.iter().any(starts_anew) {
            let deaths = self.around.coverage.count("worker_deadly_token");
            let most: u64 = self.fronts.iter().map(|front| front.ledger.most_deadly_deaths(&self.around.mix)).sum();
            assert!(deaths <= most, "{deaths} workers died of their requests, at most {most} had to");
        }
    }

    fn unfinished(&self) -> Vec<String> {
        let requests = self.fronts.iter().flat_map(|front| front.ledger.unfinished());
        let loads = self.nodes.iter().map(|node| match node {
            Some(process) => format!("node {}: {:?} {:?}", process.node, process.state, process.replica.load()),
            None => "no node".to_owned(),
        });
        let wakes = self.fronts.iter().map(|front| format!("front wakes at {:?}", front.wake_at));
        requests.chain(loads).chain(wakes).collect()
    }
}
