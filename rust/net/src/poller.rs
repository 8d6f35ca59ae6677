//! Waiting for several endpoints and a wake-up at once.
//! One call of `zmq_poll` per wait: O(endpoints), and its time-out is whole milliseconds, so a shorter one is rounded
//! up and never spins. The wake-up may come from any thread; the endpoints belong to the one that waits.

use crate::error::NetError;
use crate::options::to_ms;
use crate::wake::Waker;

/// What an endpoint lends to a wait.
#[derive(Clone, Copy)]
pub struct PollHandle<'a> {
    pub(crate) socket: &'a zmq::Socket,
    pub(crate) events: zmq::PollEvents,
}

/// What a wait found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ready<'a> {
    /// Whether a waker was used since the last wait.
    pub woken: bool,
    /// For each handle, in order, whether its endpoint has something to receive.
    pub endpoints: &'a [bool],
}

impl Ready<'_> {
    /// Whether the wait ended by its time-out.
    pub fn is_timeout(&self) -> bool {
        !self.woken && !self.endpoints.contains(&true)
    }
}

/// Waits on behalf of one thread.
pub struct Poller {
    waker: Waker,
    ready: Vec<bool>,
}

impl Poller {
    /// A poller with a wake-up of its own.
    pub fn new() -> Result<Self, NetError> {
        let waker = Waker::new().map_err(NetError::system("creating an eventfd"))?;
        Ok(Self { waker, ready: Vec::new() })
    }

    /// What other threads wake this poller with.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Waits until an endpoint is ready, a waker is used or the time is over; `None` waits without end. A signal ends
    /// the wait early, like a time-out.
    pub fn wait(&mut self, handles: &[PollHandle<'_>], max_wait_us: Option<u64>) -> Result<Ready<'_>, NetError> {
        let mut items = Vec::with_capacity(handles.len() + 1);
        items.push(zmq::PollItem::from_fd(self.waker.descriptor(), zmq::POLLIN));
        items.extend(handles.iter().map(|handle| handle.socket.as_poll_item(handle.events)));
        let timeout_ms = max_wait_us.map_or(-1, |time_us| i64::from(to_ms(time_us)));
        match zmq::poll(&mut items, timeout_ms) {
            Ok(_) => {}
            // The items were not filled in.
            Err(zmq::Error::EINTR) => items.clear(),
            Err(error) => return Err(NetError::system("waiting for endpoints")(error)),
        }
        self.ready.clear();
        self.ready.extend(items.iter().skip(1).map(|item| !item.get_revents().is_empty()));
        self.ready.resize(handles.len(), false);
        let woken = items.first().is_some_and(zmq::PollItem::is_readable) && self.waker.take();
        Ok(Ready { woken, endpoints: &self.ready })
    }
}
