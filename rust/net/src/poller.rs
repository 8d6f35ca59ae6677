//! Waiting for several endpoints and a wake-up at once, with a time-out in microseconds.
//! A wait asks every endpoint once, which costs a system call each, and sleeps in one `ppoll` when there is nothing;
//! `zmq_poll` does the same with one more call and whole milliseconds. The wake-up may come from any thread; the
//! endpoints belong to the one that waits.
#![expect(unsafe_code, reason = "ppoll has no safe binding in the standard library")]

use crate::error::NetError;
use crate::wake::Waker;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// What an endpoint lends to a wait.
#[derive(Clone, Copy)]
pub struct PollHandle<'a> {
    pub(crate) socket: &'a zmq::Socket,
    /// Becomes readable when something about the socket may have changed; whether it did, only the socket knows.
    pub(crate) descriptor: RawFd,
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
    descriptors: Vec<libc::pollfd>,
}

impl Poller {
    /// A poller with a wake-up of its own.
    pub fn new() -> Result<Self, NetError> {
        let waker = Waker::new().map_err(NetError::system("creating an eventfd"))?;
        Ok(Self { waker, ready: Vec::new(), descriptors: Vec::new() })
    }

    /// What other threads wake this poller with.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Waits until an endpoint is ready, a waker is used or the time is over, never less; `None` waits without end. A
    /// signal ends the wait early, like a time-out.
    pub fn wait(&mut self, handles: &[PollHandle<'_>], max_wait_us: Option<u64>) -> Result<Ready<'_>, NetError> {
        let deadline = max_wait_us.map(|wait_us| Instant::now() + Duration::from_micros(wait_us));
        let watched = |descriptor| libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: libc::POLLIN };
        self.descriptors.clear();
        self.descriptors.push(watched(self.waker.descriptor()));
        self.descriptors.extend(handles.iter().map(|handle| watched(handle.descriptor)));
        self.ready.clear();
        self.ready.resize(handles.len(), false);
        loop {
            // At first all are asked, afterwards those whose descriptor was readable.
            let mut found = false;
            for ((handle, entry), ready) in handles.iter().zip(&self.descriptors[1..]).zip(&mut self.ready) {
                if entry.revents != 0 {
                    let events = handle.socket.get_events().map_err(NetError::system("waiting for endpoints"))?;
                    *ready = events.contains(zmq::POLLIN);
                    found |= *ready;
                }
            }
            let woken = self.descriptors[0].revents != 0 && self.waker.take();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if found || woken || left.is_some_and(|left| left.is_zero()) {
                return Ok(Ready { woken, endpoints: &self.ready });
            }
            match sleep(&mut self.descriptors, left) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    return Ok(Ready { woken: false, endpoints: &self.ready });
                }
                Err(error) => return Err(NetError::system("waiting for endpoints")(error)),
            }
        }
    }
}

/// Until a descriptor is readable or the time is over.
fn sleep(descriptors: &mut [libc::pollfd], left: Option<Duration>) -> io::Result<()> {
    let time = left.map(|left| libc::timespec {
        tv_sec: left.as_secs().min(i64::MAX as u64) as libc::time_t,
        tv_nsec: libc::c_long::from(left.subsec_nanos()),
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the entries are valid for their number, the time is null or outlives the call, and no mask is given.
    let outcome =
        unsafe { libc::ppoll(descriptors.as_mut_ptr(), descriptors.len() as libc::nfds_t, time, std::ptr::null()) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
