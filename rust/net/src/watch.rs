//! The watch thread of a context: it waits for authentication questions, connection events and the end.
//! One wait covers all sources; work per question and per event is O(1). Events of a client also tell its phase,
//! because libzmq gives a refused client up without a word. It owns no endpoint and sees no frame.

use crate::allow_list::AllowList;
use crate::counters::ConnectionCounters;
use crate::phase::Phase;
use crate::wake::Waker;
use crate::zap::{Verdict, answer};
use crossbeam_channel::Receiver;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Questions or events that are handled before the others get their turn.
const MAX_BATCH: usize = 64;

/// What authentication shares with the context's handles.
pub(crate) struct Authentication {
    pub(crate) list: RwLock<Arc<AllowList>>,
    pub(crate) admitted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) malformed: AtomicU64,
}

/// The connection events of one socket, and where they are counted.
pub(crate) struct Monitor {
    pub(crate) events: zmq::Socket,
    pub(crate) counters: Arc<ConnectionCounters>,
}

/// What the thread owns.
pub(crate) struct Watch {
    handler: zmq::Socket,
    authentication: Arc<Authentication>,
    added: Receiver<Monitor>,
    waker: Waker,
    ending: Arc<AtomicBool>,
    monitors: Vec<Monitor>,
}

impl Watch {
    pub(crate) fn new(
        handler: zmq::Socket,
        authentication: Arc<Authentication>,
        added: Receiver<Monitor>,
        waker: Waker,
        ending: Arc<AtomicBool>,
    ) -> Self {
        Self { handler, authentication, added, waker, ending, monitors: Vec::new() }
    }

    /// Until the context ends. A failed poll can only mean that it did; authentication then fails closed.
    pub(crate) fn run(mut self) {
        while !self.ending.load(Ordering::Acquire) {
            let Some((asked, reported)) = self.wait() else { return };
            if asked {
                self.answer_questions();
            }
            let mut index = 0;
            self.monitors.retain(|monitor| {
                index += 1;
                !reported[index - 1] || monitor.count_events()
            });
            self.waker.take();
            self.monitors.extend(self.added.try_iter());
        }
    }

    /// Whether there are questions, and which monitors have events.
    fn wait(&self) -> Option<(bool, Vec<bool>)> {
        let mut items =
            vec![zmq::PollItem::from_fd(self.waker.descriptor(), zmq::POLLIN), self.handler.as_poll_item(zmq::POLLIN)];
        items.extend(self.monitors.iter().map(|monitor| monitor.events.as_poll_item(zmq::POLLIN)));
        match zmq::poll(&mut items, -1) {
            Ok(_) | Err(zmq::Error::EINTR) => {}
            Err(_) => return None,
        }
        Some((items[1].is_readable(), items[2..].iter().map(zmq::PollItem::is_readable).collect()))
    }

    fn answer_questions(&self) {
        for _ in 0..MAX_BATCH {
            let Ok(question) = self.handler.recv_multipart(zmq::DONTWAIT) else { return };
            let frames: Vec<&[u8]> = question.iter().map(Vec::as_slice).collect();
            // The first frame is libzmq's return address. A question without the empty delimiter is answered too.
            let ([_, [], request @ ..] | [_, request @ ..]) = frames.as_slice() else { return };
            let list = Arc::clone(&self.authentication.list.read().unwrap_or_else(PoisonError::into_inner));
            let reply = answer(request, &list);
            let counter = match reply.verdict {
                Verdict::Admitted => &self.authentication.admitted,
                Verdict::Refused => &self.authentication.refused,
                Verdict::Malformed => &self.authentication.malformed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            let delimiter = [question[0].clone(), Vec::new()];
            // The one that asked may be gone; then the answer has no reader and libzmq drops it.
            let _gone = self.handler.send_multipart(delimiter.into_iter().chain(reply.frames), zmq::DONTWAIT);
        }
    }
}

impl Monitor {
    /// Counts what was reported; `false` once the socket is closed.
    fn count_events(&self) -> bool {
        for _ in 0..MAX_BATCH {
            let Ok(frames) = self.events.recv_multipart(zmq::DONTWAIT) else { return true };
            // The first frame is a 16-bit event and a 32-bit value in host order, the second an address.
            let Some(&[low, high, ..]) = frames.first().map(Vec::as_slice) else { continue };
            if !self.counters.note(u32::from(u16::from_ne_bytes([low, high]))) {
                return false;
            }
        }
        true
    }
}

impl ConnectionCounters {
    /// Counts one event; `false` for the last one.
    fn note(&self, event: u32) -> bool {
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Release);
        match event {
            zmq_sys::ZMQ_EVENT_ACCEPTED => _ = add(&self.connections),
            zmq_sys::ZMQ_EVENT_CONNECTED => {
                add(&self.connections);
                self.phase.set(Phase::Connecting);
            }
            zmq_sys::ZMQ_EVENT_CONNECT_DELAYED | zmq_sys::ZMQ_EVENT_CONNECT_RETRIED => {
                self.phase.set(Phase::Connecting);
            }
            zmq_sys::ZMQ_EVENT_HANDSHAKE_SUCCEEDED => {
                add(&self.admitted);
                self.phase.set(Phase::Up);
            }
            zmq_sys::ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq_sys::ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq_sys::ZMQ_EVENT_HANDSHAKE_FAILED_AUTH => _ = add(&self.refused),
            zmq_sys::ZMQ_EVENT_DISCONNECTED => {
                add(&self.ended);
                self.phase.set(Phase::Stopped);
            }
            zmq_sys::ZMQ_EVENT_ACCEPT_FAILED => _ = add(&self.failed_accepts),
            zmq_sys::ZMQ_EVENT_MONITOR_STOPPED => return false,
            _ => return true,
        }
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
        true
    }
}
