//! The running set in groups, one per stage of a pipeline. All decoding sequences of a group advance by one token per
//! round, and with several groups each has at most one step in flight: while one stage computes a group's step, the stages
//! before it compute other groups', and nobody waits for what the last stage samples. One group is the ordinary case.
//! Steps take turns; a choice costs O(groups). Knows nothing of blocks' owners or of workers.

use crate::wheel::BlockWheel;
use llmscale_types::{GroupId, Slot};
use std::collections::{BTreeMap, VecDeque};

/// Sequences that decode together, and those that will join them.
#[derive(Debug)]
pub(crate) struct Group {
    /// Rounds planned so far.
    pub(crate) round: u64,
    pub(crate) wheel: BlockWheel,
    /// Rounds before which sequences leave because their last row is planned.
    pub(crate) endings: BTreeMap<u64, Vec<(Slot, u64)>>,
    /// Contexts that are partly computed, in the order of admission.
    pub(crate) prefilling: VecDeque<Slot>,
    pub(crate) decoding: u32,
    /// Sum of the positions of the next rows.
    pub(crate) decoding_tokens: u64,
}

impl Group {
    fn new(block_tokens: u32) -> Self {
        Self {
            round: 0,
            wheel: BlockWheel::new(block_tokens),
            endings: BTreeMap::new(),
            prefilling: VecDeque::new(),
            decoding: 0,
            decoding_tokens: 0,
        }
    }

    fn members(&self) -> usize {
        self.decoding as usize + self.prefilling.len()
    }
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct Groups {
    all: Vec<Group>,
    block_tokens: u32,
    /// Whose turn the next step is.
    turn: usize,
}

impl Groups {
    pub(crate) fn new(groups: u32, block_tokens: u32) -> Self {
        let all = (0..groups).map(|_| Group::new(block_tokens)).collect();
        Self { all, block_tokens, turn: 0 }
    }

    /// Nothing runs in any of them any more.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.all.len() as u32, self.block_tokens);
    }

    pub(crate) fn get(&self, group: GroupId) -> &Group {
        &self.all[group.index()]
    }

    pub(crate) fn get_mut(&mut self, group: GroupId) -> &mut Group {
        &mut self.all[group.index()]
    }

    pub(crate) fn is_one(&self) -> bool {
        self.all.len() == 1
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Group> {
        self.all.iter()
    }

    /// All groups in the order of their turns.
    pub(crate) fn in_turn(&self) -> impl Iterator<Item = GroupId> + use<> {
        let (turn, count) = (self.turn, self.all.len());
        (0..count).map(move |offset| GroupId(((turn + offset) % count) as u32))
    }

    /// A step of this group was planned: the turn passes to the one behind it.
    pub(crate) fn pass_turn(&mut self, planned: GroupId) {
        self.turn = (planned.index() + 1) % self.all.len();
    }

    /// The group that a new sequence joins: the smallest, `preferred` among equals.
    pub(crate) fn smallest(&self, preferred: GroupId) -> GroupId {
        let least = self.all.iter().map(Group::members).min().expect("there is a group");
        if self.get(preferred).members() == least {
            return preferred;
        }
        let place = self.all.iter().position(|group| group.members() == least);
        GroupId(place.expect("one of them is the smallest") as u32)
    }
}
