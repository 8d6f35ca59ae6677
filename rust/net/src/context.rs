//! A libzmq context with the one thread that watches over it: it answers authentication questions from the allow-list
//! and counts connection events of every endpoint. The thread ends with the last endpoint and handle of the context,
//! and closing never waits for a peer. It carries no frame: those stay with the thread that owns an endpoint.

use crate::allow_list::AllowList;
use crate::counters::ConnectionCounters;
use crate::error::NetError;
use crate::socket::Socket;
use crate::wake::Waker;
use crate::watch::{Authentication, Monitor, Watch};
use crate::zap::ZAP_ADDRESS;
use crossbeam_channel::{Sender, unbounded};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

/// What the authentication handler decided since the context was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AuthenticationCounters {
    /// Keys that were admitted.
    pub admitted: u64,
    /// Keys that were not on the list, or whose role the endpoint does not admit.
    pub refused: u64,
    /// Questions of the wrong form.
    pub malformed: u64,
}

/// A context; cheap to clone, and every thread may hold one.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    context: zmq::Context,
    authentication: Arc<Authentication>,
    monitors: Sender<Monitor>,
    next_monitor: AtomicU64,
    ending: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    /// The process that made it.
    owner: u32,
}

impl Context {
    /// A context whose endpoints with keys admit the principals of a list; one I/O thread moves about 2 GB/s
    /// plain and 0.6 GB/s with keys, so more are for hosts with faster links.
    pub fn new(list: AllowList, io_threads: u8) -> Result<Self, NetError> {
        let context = zmq::Context::new();
        context.set_io_threads(i32::from(io_threads.max(1))).map_err(NetError::system("setting I/O threads"))?;
        let handler = context.socket(zmq::ROUTER).map_err(NetError::system("opening a socket"))?;
        handler.set_linger(0).map_err(NetError::system("setting socket options"))?;
        // Bound before any endpoint exists, and endpoints with keys refuse all peers while it is not.
        handler.bind(ZAP_ADDRESS).map_err(NetError::system("listening for authentication"))?;
        let authentication = Arc::new(Authentication {
            list: RwLock::new(Arc::new(list)),
            admitted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
        });
        let (monitors, added) = unbounded();
        let waker = Waker::new().map_err(NetError::system("creating an eventfd"))?;
        let ending = Arc::new(AtomicBool::new(false));
        let watch = Watch::new(handler, Arc::clone(&authentication), added, waker.clone(), Arc::clone(&ending));
        let thread = std::thread::Builder::new().name("llmscale-watch".into()).spawn(move || watch.run());
        let thread = Some(thread.map_err(NetError::system("starting the watch thread"))?);
        let next_monitor = AtomicU64::new(0);
        let owner = std::process::id();
        Ok(Self(Arc::new(Inner { context, authentication, monitors, next_monitor, ending, waker, thread, owner })))
    }

    /// Puts another allow-list in force for handshakes from now on. Peers that are connected stay.
    pub fn replace_allow_list(&self, list: AllowList) {
        *self.0.authentication.list.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(list);
    }

    /// What the authentication handler decided so far.
    pub fn authentication(&self) -> AuthenticationCounters {
        let authentication = &self.0.authentication;
        AuthenticationCounters {
            admitted: authentication.admitted.load(Ordering::Relaxed),
            refused: authentication.refused.load(Ordering::Relaxed),
            malformed: authentication.malformed.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn raw(&self) -> &zmq::Context {
        &self.0.context
    }

    /// Counts the connection events of a socket that is not bound or connected yet.
    pub(crate) fn watch(&self, socket: &Socket) -> Result<Arc<ConnectionCounters>, NetError> {
        let number = self.0.next_monitor.fetch_add(1, Ordering::Relaxed);
        let name = format!("inproc://llmscale.monitor.{number}");
        // Opened before the monitor starts: a monitor that nobody listens to blocks whoever causes an event.
        let events = self.0.context.socket(zmq::PAIR).map_err(NetError::system("opening a socket"))?;
        // Without a bound, because a full queue would block libzmq's I/O thread; the watch thread only counts.
        events.set_rcvhwm(0).map_err(NetError::system("setting socket options"))?;
        events.set_linger(0).map_err(NetError::system("setting socket options"))?;
        socket.start_monitor(&name)?;
        events.connect(&name).map_err(NetError::system("monitoring a socket"))?;
        let counters = Arc::new(ConnectionCounters::default());
        let monitor = Monitor { events, counters: Arc::clone(&counters) };
        assert!(self.0.monitors.send(monitor).is_ok(), "the watch thread ended before its context");
        self.0.waker.wake();
        Ok(counters)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::process::id() != self.owner {
            // A forked child has neither the thread nor the library's own, and would wait for them for ever.
            std::mem::forget((self.thread.take(), self.context.clone()));
            return;
        }
        self.ending.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            // A second panic would abort without the first one's message.
            assert!(outcome.is_ok() || std::thread::panicking(), "the watch thread panicked");
        }
    }
}
