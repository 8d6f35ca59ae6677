//! Which faults a seed suffers, how often, and how large its world is. Every seed draws a subset (swarm testing: Groce et
//! al., ISSTA 2012), because faults hide each other: a fleet that always crashes never fills its queues. Plain data,
//! drawn once.

use crate::random::Random;
use crate::versions::Upgrade;
use llmscale_front::{HealthOptions, HedgeOptions, RetryOptions};
use llmscale_types::frame::MAX_ADMISSION_BYTES;
use llmscale_types::{Duration, EngineLimits, FrontLimits, Time, Token};

/// Something that goes wrong by itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// A worker process dies.
    WorkerCrash,
    /// A worker never finishes its step.
    WorkerHang,
    /// A worker computes twenty times slower for a while.
    WorkerSlow,
    /// A worker loses the order of steps: it forgets what runs, or a step never reaches it.
    WorkerLosesSteps,
    /// A step raises in a worker that lives on.
    StepRaises,
    /// A result of a dead worker reaches the node after the next one came up.
    LateResult,
    /// A node process dies and starts again.
    NodeCrash,
    /// A node process stands still for longer than fronts wait, then goes on where it was.
    NodePause,
    /// A node loses tokens on their way out, and refuses what it should take, for a while.
    NodeErrs,
    /// An operator drains a node and starts it again.
    NodeDrain,
    /// A front process stands still for longer than nodes wait, then goes on where it was.
    FrontPause,
    /// A front process ends, with or without a goodbye, and starts again without its requests.
    FrontRestart,
    /// A connection breaks; what was under way is lost.
    ConnectionLoss,
    /// A bit flips in what a node keeps in its host tier.
    HostBitFlips,
    /// A worker finds another host memory than the one before it.
    HostMemoryLost,
    /// A bit flips on a node's disk.
    DiskBitFlips,
    /// A node's disk takes nothing in for a while.
    DiskFull,
    /// A node finds another disk than the one before it.
    DiskLost,
}

impl Fault {
    /// All of them, but those that were added later.
    pub const FIRST: [Self; 10] = [
        Self::WorkerCrash,
        Self::WorkerHang,
        Self::WorkerSlow,
        Self::LateResult,
        Self::NodeCrash,
        Self::NodePause,
        Self::NodeDrain,
        Self::FrontPause,
        Self::FrontRestart,
        Self::ConnectionLoss,
    ];
    /// Drawn from a generator of their own.
    pub const ADDED: [Self; 2] = [Self::WorkerLosesSteps, Self::StepRaises];
    /// Drawn from there too, after everything that was there before them.
    pub const ADDED_LAST: [Self; 3] = [Self::NodeErrs, Self::HostBitFlips, Self::HostMemoryLost];
    /// And after those.
    pub const OF_DISKS: [Self; 3] = [Self::DiskBitFlips, Self::DiskFull, Self::DiskLost];
}

/// End a sequence in every simulated model: six of two hundred, so that answers of 24 tokens often end by themselves.
pub const EOS_TOKENS: [Token; 6] = [3, 4, 5, 6, 7, 8];
/// Kills the worker that computes it, where the mix says so. The model draws it now and then by itself.
pub const DEADLY: Token = 199;
/// Size of every simulated model's vocabulary.
pub const VOCABULARY: u32 = 200;

/// What a front does about nodes that answer badly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Care {
    /// It leaves them alone for a while.
    pub ejects: bool,
    /// It asks for late first tokens twice.
    pub hedges: bool,
}

/// What one seed is made of.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Front processes.
    pub fronts: usize,
    /// Places where node processes run.
    pub nodes: usize,
    /// Faults that happen, with the mean time between two of a kind.
    pub faults: Vec<(Fault, Duration)>,
    /// Sizes of every replica.
    pub engine: EngineLimits,
    /// What prefill may add to a step that streams wait for; zero bounds nothing.
    pub step_target: Duration,
    /// Most bytes that the admissions of one delta take, unless it has only one.
    pub max_admission_bytes: u64,
    /// Nodes of odd places compute otherwise than those of even ones.
    pub two_numerics: bool,
    /// Fronts ask nodes what their prefix caches hold, and look at that when they place requests.
    pub caches: bool,
    /// When fronts leave nodes alone that answer badly, and for how long.
    pub health: HealthOptions,
    /// How often fronts try again after nodes answered badly.
    pub retries: RetryOptions,
    /// When fronts try a request at a second node because its first token is late.
    pub hedging: Option<HedgeOptions>,
    /// When the fleet gets another build.
    pub upgrade: Option<Upgrade>,
    /// What copying one block between tiers takes.
    pub copy_ns: u64,
    /// What moving one block to or from the disk takes at least.
    pub disk_us: u64,
    /// Bounds of every front.
    pub front: FrontLimits,
    /// How long a ready replica may be silent about an attempt.
    pub max_silence: Duration,
    /// How long requests wait without any replica.
    pub max_without_replica: Duration,
    /// A node that is silent for longer is lost for a front.
    pub max_node_silence: Duration,
    /// A front that is silent for longer is gone for a node.
    pub max_front_silence: Duration,
    /// A worker whose step takes longer is hung.
    pub max_step: Duration,
    /// Slowest way of a frame from one process to another.
    pub max_delay: Duration,
    /// Of a thousand frames that were under way when their connection broke, this many arrive later all the same.
    pub late_frames: u64,
    /// Of a thousand prompts, this many hold the deadly token. `None`: no token is deadly.
    pub deadly_prompts: Option<u64>,
    /// The deadly token raises in its step and leaves the worker alive.
    pub deadly_raises: bool,
    /// Mean time between two submissions of one front.
    pub submit_interval: Duration,
    /// Of a thousand requests, this many are ended, left or cut by their client.
    pub impatient_clients: u64,
    /// Of a thousand requests, this many have a client that never reads.
    pub slow_readers: u64,
    /// Of a thousand requests, this many have a deadline.
    pub deadlines: u64,
    /// How long clients submit and faults happen.
    pub unrest: Duration,
}

impl Mix {
    /// What this seed draws.
    pub(crate) fn draw(random: &mut Random) -> Self {
        // What was added later is drawn from a generator of its own, so that earlier seeds keep their worlds.
        let mut added = random.branch();
        let mut faults = draw_faults(&Fault::FIRST, random);
        faults.extend(draw_faults(&Fault::ADDED, &mut added));
        let tiny_queues = random.chance(200);
        let max_admission_bytes = *added.pick(&[300, 600, MAX_ADMISSION_BYTES]);
        let (deadly_raises, two_numerics) = (added.chance(500), added.chance(500));
        let pipelines = added.chance(300);
        let caches = added.chance(400);
        let (health, retries) = (draw_health(&mut added), draw_retries(&mut added));
        let hedging = added.chance(500).then(|| draw_hedging(&mut added));
        let upgrade = added.chance(300).then(|| Upgrade::draw(&mut added));
        faults.extend(draw_faults(&Fault::ADDED_LAST, &mut added));
        let host_blocks = if added.chance(500) { added.count(1, 60) } else { 0 };
        let copy_ns = *added.pick(&[2_000, 100_000, 400_000]);
        let disk_blocks = if host_blocks > 0 && added.chance(500) { added.count(1, 80) } else { 0 };
        let disk_us = *added.pick(&[20, 500, 20_000]);
        if disk_blocks > 0 {
            // Often: of what is written to a disk, little is ever read back.
            let often = |&fault: &Fault| added.chance(600).then(|| (fault, added.span(50_000, 400_000)));
            faults.extend(Fault::OF_DISKS.iter().filter_map(often));
        }
        let step_target = Duration(if added.chance(500) { added.between(1, 5_000) } else { 0 });
        Self {
            step_target,
            fronts: 1 + usize::from(random.chance(400)),
            nodes: random.between(1, 3) as usize,
            faults,
            engine: EngineLimits { host_blocks, disk_blocks, ..draw_engine(random, pipelines) },
            copy_ns,
            disk_us,
            max_admission_bytes,
            caches,
            health,
            retries,
            hedging,
            upgrade,
            front: FrontLimits {
                max_queued_requests: if tiny_queues { random.count(1, 4) } else { 64 },
                max_queued_tokens: if random.chance(200) { random.between(20, 120) } else { 10_000 },
                max_live_requests: if tiny_queues { random.count(3, 12) } else { 256 },
                look_ahead: Duration::from_millis(*random.pick(&[1, 10, 250])),
                max_attempts: random.count(3, 8),
                max_detached: random.span(100_000, 2_000_000),
                max_unread_tokens: random.count(8, 64),
            },
            max_silence: Duration::from_millis(*random.pick(&[400, 1_500, 20_000])),
            max_without_replica: Duration::from_millis(*random.pick(&[200, 2_000, 20_000])),
            max_node_silence: random.span(600_000, 1_500_000),
            max_front_silence: random.span(2_200_000, 4_000_000),
            max_step: random.span(300_000, 1_000_000),
            max_delay: Duration(*random.pick(&[300, 2_000, 40_000])),
            late_frames: *random.pick(&[0, 300, 900]),
            deadly_prompts: random.chance(300).then(|| random.between(5, 80)),
            deadly_raises,
            two_numerics,
            submit_interval: Duration(*random.pick(&[10_000, 40_000, 120_000])),
            impatient_clients: *random.pick(&[0, 150, 500]),
            slow_readers: *random.pick(&[0, 0, 150]),
            deadlines: *random.pick(&[0, 100, 400]),
            unrest: random.span(1_500_000, 4_000_000),
        }
    }

    /// The same without upgrades, host tiers, bounds on the time of steps and the faults that were added last.
    pub(crate) fn kept(mut self) -> Self {
        self.faults.retain(|(fault, _)| !Fault::ADDED_LAST.contains(fault) && !Fault::OF_DISKS.contains(fault));
        (self.engine.host_blocks, self.engine.disk_blocks) = (0, 0);
        Self { upgrade: None, step_target: Duration(0), ..self }
    }

    /// The same sizes without faults: two nodes, one front, half a second of requests whose clients read and stay.
    pub(crate) fn calm(self) -> Self {
        Self {
            fronts: 1,
            nodes: 2,
            faults: Vec::new(),
            deadly_prompts: None,
            impatient_clients: 0,
            slow_readers: 0,
            upgrade: None,
            submit_interval: Duration(20_000),
            unrest: Duration::from_millis(500),
            ..self
        }
    }

    /// Nodes and a front that are replaced one after the other while requests come, and nothing else.
    pub(crate) fn upgraded(self) -> Self {
        let upgrade = Upgrade { at: Time(300_000), rolled_back: 0 };
        Self { upgrade: Some(upgrade), unrest: Duration::from_millis(2_500), ..self.calm() }
    }

    /// Three nodes whose workers are slow now and then, and a front that takes this care.
    pub(crate) fn slow(self, care: Care) -> Self {
        let calm = self.calm();
        let hedging = HedgeOptions { least_answers: 50, least_wait: Duration(1_000), ..HedgeOptions::default() };
        let health = HealthOptions {
            window: Duration::from_millis(1_000),
            ejection: Duration::from_millis(200),
            max_ejection: Duration::from_millis(2_000),
            late_grace: Duration::from_millis(20),
            ..HealthOptions::default()
        };
        let never = HealthOptions { least_failures: u32::MAX, slow_factor: u32::MAX, ..health };
        let engine = EngineLimits {
            total_blocks: 160,
            max_sequences: 8,
            max_step_tokens: 64,
            max_waiting_sequences: 64,
            max_steps_in_flight: 2,
            groups: 1,
            ..calm.engine
        };
        Self {
            nodes: 3,
            faults: vec![(Fault::WorkerSlow, Duration::from_millis(500))],
            engine,
            two_numerics: false,
            caches: false,
            health: if care.ejects { health } else { never },
            hedging: care.hedges.then_some(hedging),
            front: FrontLimits::default(),
            max_silence: Duration::from_millis(20_000),
            // Just longer than the slowest step of a slow worker: a node that counts what a step waits for kills it.
            max_step: Duration(112_000),
            max_delay: Duration(300),
            deadlines: 0,
            unrest: Duration::from_millis(10_000),
            ..calm
        }
    }

    /// Whether a fault is on.
    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.faults.iter().any(|&(on, _)| on == fault)
    }

    /// How the node at a place computes. The tokens are the same, as they may be: equal numerics are what promises them.
    pub(crate) fn numerics(&self, place: usize) -> &'static str {
        if self.two_numerics && place % 2 == 1 { "hash-other" } else { "hash" }
    }

    /// The token that kills workers.
    pub(crate) fn deadly_token(&self) -> Option<Token> {
        self.deadly_prompts.map(|_| DEADLY)
    }
}

fn draw_faults(kinds: &[Fault], random: &mut Random) -> Vec<(Fault, Duration)> {
    let drawn = kinds.iter().filter_map(|&fault| {
        let on = random.chance(350);
        on.then(|| (fault, random.span(200_000, 2_000_000)))
    });
    drawn.collect()
}

/// Spans that fit a world of seconds.
fn draw_health(random: &mut Random) -> HealthOptions {
    HealthOptions {
        window: random.span(200_000, 2_000_000),
        least_failures: random.count(1, 5),
        ejection: random.span(20_000, 400_000),
        max_ejection: Duration::from_millis(800),
        forgive_after: random.span(100_000, 2_000_000),
        late_factor: random.count(2, 4),
        late_grace: random.span(1_000, 50_000),
        slow_factor: random.count(2, 8),
    }
}

fn draw_retries(random: &mut Random) -> RetryOptions {
    let delay = random.span(0, 20_000);
    RetryOptions {
        window: random.span(100_000, 1_000_000),
        permille: random.count(0, 200),
        least_retries: random.count(1, 4),
        delay,
        max_delay: delay + random.span(1_000, 200_000),
    }
}

fn draw_hedging(random: &mut Random) -> HedgeOptions {
    HedgeOptions {
        permille: *random.pick(&[50, 200, 1_000]),
        max_saved_tokens: 200,
        least_answers: random.count(1, 20),
        least_wait: random.span(0, 20_000),
        max_busy_permille: random.count(200, 1_000),
    }
}

/// With `pipelines`, every step in flight is of another group.
fn draw_engine(random: &mut Random, pipelines: bool) -> EngineLimits {
    let (block_tokens, max_sequence_tokens) = (4, 64);
    let least = max_sequence_tokens / block_tokens;
    let max_sequences = random.count(1, 8);
    let limits = EngineLimits {
        block_tokens,
        host_blocks: 0,
        disk_blocks: 0,
        total_blocks: if random.chance(350) { random.count(least, least + 8) } else { random.count(60, 160) },
        max_sequences,
        max_step_tokens: random.count(max_sequences, 64),
        max_sequence_tokens,
        max_waiting_sequences: if random.chance(250) { random.count(1, 2) } else { 64 },
        max_steps_in_flight: random.count(1, 3),
        groups: 1,
        eos_tokens: EOS_TOKENS.to_vec(),
        vocabulary: VOCABULARY,
    };
    EngineLimits { groups: if pipelines { limits.max_steps_in_flight } else { 1 }, ..limits }
}
