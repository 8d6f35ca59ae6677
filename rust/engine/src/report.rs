//! What a node's thread tells the process around it: a report that is overwritten, events that are queued. The reader
//! sleeps on a descriptor and never blocks the engine.

use llmscale_net::Waker;
use llmscale_scheduler::Drained;
use llmscale_types::Epoch;
use llmscale_wire::{NodeState, Status};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Something that whoever supervises the workers has to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodeEvent {
    /// A worker has loaded the model.
    WorkerReady {
        /// Its incarnation.
        epoch: Epoch,
        /// Its process.
        pid: u32,
        /// Time that loading took.
        loading_ns: u64,
    },
    /// A worker cannot go on and has to be replaced.
    WorkerFailed {
        /// Its incarnation.
        epoch: Epoch,
        /// What it said, or what it did wrong.
        message: String,
    },
    /// A worker gave up its steps in flight and goes on.
    WorkerReset {
        /// Its incarnation.
        epoch: Epoch,
        /// What it said.
        message: String,
    },
    /// The first step has run: the node takes work.
    Ready,
    /// Nothing runs any more after an order to drain, and what could be saved is.
    Drained(Drained),
}

/// The latest state of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeReport {
    /// As fronts see it.
    pub status: Status,
    /// Tokens emitted since the start.
    pub emitted_tokens: u64,
    /// Prompt and recomputed tokens that went through the model.
    pub prefill_tokens: u64,
    /// Requests ended because workers died twice while computing them.
    pub poisoned: u64,
    /// Frames that could not be read, and results of dead workers.
    pub dropped_frames: u64,
    /// Fronts that are connected.
    pub fronts: u32,
}

/// Most events that wait for a reader; the oldest are dropped, because only the latest worker matters.
const MAX_EVENTS: usize = 1_024;

/// Shared between the node's thread and its process.
#[derive(Clone, Debug)]
pub(crate) struct Noticeboard {
    inner: Arc<Mutex<(Option<NodeReport>, VecDeque<NodeEvent>)>>,
    waker: Waker,
}

impl Noticeboard {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { inner: Arc::default(), waker }
    }

    pub(crate) fn publish(&self, report: NodeReport) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(report);
    }

    pub(crate) fn notify(&self, event: NodeEvent) {
        let events = &mut self.inner.lock().unwrap_or_else(PoisonError::into_inner).1;
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        self.waker.wake();
    }

    pub(crate) fn report(&self) -> Option<NodeReport> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn take_events(&self) -> Vec<NodeEvent> {
        self.waker.take();
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).1.drain(..).collect()
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }
}

/// The state that fronts are told while there is no worker yet.
pub(crate) const FIRST_STATE: NodeState = NodeState::Starting;
