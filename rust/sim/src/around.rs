//! What every process of a simulation stands in: time, network, chance, and the books about what happened. Passed
//! down by reference; owns no process.

use crate::agenda::Agenda;
use crate::coverage::Coverage;
use crate::disk_memory::DiskMemory;
use crate::faults::Mix;
use crate::happening::Happening;
use crate::left_disk::LeftDisk;
use crate::network::{Network, Peer};
use crate::random::Random;
use crate::trace::Trace;
use llmscale_types::Time;
use llmscale_wire::{CodecLimits, FromNode, ToNode, encode_at};

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Around {
    pub(crate) mix: Mix,
    pub(crate) agenda: Agenda<Happening>,
    pub(crate) network: Network,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
    pub(crate) coverage: Coverage,
    pub(crate) codec: CodecLimits,
    /// Workers that died: where, and whether by an ordinary fault. Collected here until the clients' books know.
    pub(crate) deaths: Vec<(usize, bool)>,
    /// The disks of places where no node process runs, with what is kept beside them.
    pub(crate) disks: Vec<Option<LeftDisk>>,
    /// Disks that were new.
    new_disks: u64,
    /// For what was added later: earlier worlds keep their draws.
    added: Random,
}

impl Around {
    pub(crate) fn new(mix: Mix, random: Random) -> Self {
        Self {
            network: Network::new(mix.fronts, mix.nodes, mix.max_delay),
            agenda: Agenda::default(),
            trace: Trace::default(),
            coverage: Coverage::default(),
            codec: CodecLimits::default(),
            deaths: Vec::new(),
            disks: (0..mix.nodes).map(|_| None).collect(),
            new_disks: 0,
            added: Random::new(0x6469_736b),
            mix,
            random,
        }
    }

    /// An empty disk.
    pub(crate) fn new_disk(&mut self) -> DiskMemory {
        self.new_disks += 1;
        DiskMemory::new(self.mix.engine.disk_blocks, self.new_disks)
    }

    /// A draw that earlier worlds do not have.
    pub(crate) fn added_below(&mut self, most: u64) -> u64 {
        self.added.below(most)
    }

    pub(crate) fn now(&self) -> Time {
        self.agenda.now()
    }

    pub(crate) fn note(&mut self, what: &'static str, numbers: [u64; 4]) {
        self.trace.note(self.agenda.now(), what, numbers);
    }

    /// Notes and counts something that tests expect to be reached.
    pub(crate) fn reach(&mut self, what: &'static str, numbers: [u64; 4]) {
        self.coverage.reach(what);
        self.note(what, numbers);
    }

    /// A front sends. False if the place cannot be reached.
    pub(crate) fn send_to_node(&mut self, front: usize, place: usize, version: u8, message: &ToNode) -> bool {
        let bytes =
            encode_at(version, message, &self.codec).expect("the front's limits keep messages within the codec's");
        self.network.send_to_node(&mut self.agenda, &mut self.random, (front, place), bytes)
    }

    /// A node sends. False if the peer cannot be reached.
    pub(crate) fn send_to_front(&mut self, place: usize, peer: Peer, version: u8, message: &FromNode) -> bool {
        let bytes =
            encode_at(version, message, &self.codec).expect("the node's limits keep messages within the codec's");
        self.network.send_to_front(&mut self.agenda, &mut self.random, (place, peer), bytes)
    }
}
