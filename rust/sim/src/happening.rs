//! Everything that a simulation plans: frames under way, processes that start, work and end, clients that act. Plain
//! data; each is carried out by the file that names its subject.

use crate::faults::Fault;
use crate::network::Peer;
use llmscale_types::{Epoch, NodeId, RequestId, Time};

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Towards {
    Front,
    Node,
}

/// Bytes on their way.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) front: usize,
    /// Which process at the front's end; a later one has other sockets.
    pub(crate) incarnation: u64,
    pub(crate) place: usize,
    pub(crate) peer: Peer,
    pub(crate) node: NodeId,
    pub(crate) towards: Towards,
    pub(crate) bytes: Vec<u8>,
    /// Its connection broke and it arrives all the same.
    pub(crate) late: bool,
}

/// What a client does about its request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ClientAct {
    Cancel,
    CutAtToken,
    Leave,
    Detach,
    Attach,
}

/// What happens to the worker of a node process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WorkerTurn {
    /// The supervisor has seen that it is dead.
    Buried,
    /// The supervisor has started it.
    Started,
    /// It has loaded the model.
    Ready,
    /// It has computed the step that it is at.
    StepDone,
    /// A transfer between its host tier and its disk has ended.
    TransferDone,
}

/// See the file's header.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Frame(Frame),
    /// A front may reach the process at a place again.
    LinkUp {
        front: usize,
        place: usize,
    },
    /// A node process goes through its loop once.
    Round {
        place: usize,
        node: NodeId,
    },
    Worker {
        place: usize,
        node: NodeId,
        epoch: Epoch,
        turn: WorkerTurn,
    },
    /// A result of a dead worker comes through.
    LateResult {
        place: usize,
        node: NodeId,
        bytes: Vec<u8>,
    },
    NodeDrain {
        place: usize,
        node: NodeId,
    },
    NodeStart {
        place: usize,
    },
    NodeResume {
        place: usize,
        node: NodeId,
    },
    FrontResume {
        front: usize,
    },
    /// A front process has ended, and its connections break.
    FrontGone {
        front: usize,
    },
    FrontStart {
        front: usize,
    },
    /// A front goes through its loop because time has passed.
    Look {
        front: usize,
        regular: bool,
    },
    Submit {
        front: usize,
    },
    Client {
        front: usize,
        incarnation: u64,
        request: RequestId,
        act: ClientAct,
    },
    Fault(Fault),
    /// An operator replaces one process after the other: first the nodes, then the fronts.
    Upgrade {
        turn: usize,
    },
    /// Faults end and clients submit no more.
    Heal,
    /// Planned moments that nobody needs any more are told apart by theirs.
    Tick {
        front: usize,
        at: Time,
    },
}
