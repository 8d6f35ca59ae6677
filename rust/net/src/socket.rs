//! One libzmq socket with our options set, and the few calls that the `zmq` crate cannot make safely: it panics on
//! error numbers that it does not know, and it lacks two calls that security and shutdown need.
//! Every send and receive is non-blocking. It does not know who the peer is or what a frame means.
#![expect(unsafe_code, reason = "calls of libzmq that the zmq crate lacks or turns into a panic")]

use crate::address::Address;
use crate::error::NetError;
use crate::message::{MAX_COPIED_BYTES, Message, into_part};
use crate::options::{EndpointOptions, to_ms};
use crate::poller::PollHandle;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// `ZMQ_ZAP_ENFORCE_DOMAIN` of zmq.h, which the bindings lack: without it libzmq admits every CURVE peer while no
/// authentication handler answers.
const ZAP_ENFORCE_DOMAIN: c_int = 93;

/// A socket; owned by one thread at a time.
pub(crate) struct Socket {
    inner: zmq::Socket,
    descriptor: RawFd,
}

/// A received message, its parts still in libzmq's memory.
pub(crate) type Parts = Vec<zmq::Message>;

impl Socket {
    /// A socket whose limits are set and which is not connected to anything.
    pub(crate) fn open(
        context: &zmq::Context,
        kind: zmq::SocketType,
        address: &Address,
        options: &EndpointOptions,
    ) -> Result<Self, NetError> {
        options.validate()?;
        let inner = context.socket(kind).map_err(NetError::system("opening a socket"))?;
        let set = || -> Result<(), zmq::Error> {
            // A closing context must not wait for peers that do not read.
            inner.set_linger(0)?;
            inner.set_ipv6(address.is_ipv6())?;
            inner.set_maxmsgsize(options.hard_limit_bytes())?;
            inner.set_sndhwm(options.max_send_queue_frames as i32)?;
            inner.set_rcvhwm(options.max_receive_queue_frames as i32)?;
            inner.set_handshake_ivl(to_ms(options.max_handshake_us))?;
            inner.set_heartbeat_ivl(to_ms(options.heartbeat_us))?;
            inner.set_heartbeat_timeout(to_ms(options.max_silence_us))?;
            inner.set_heartbeat_ttl(to_ms(options.max_silence_us))?;
            inner.set_connect_timeout(to_ms(options.max_connect_us))?;
            inner.set_reconnect_ivl(to_ms(options.min_reconnect_us))?;
            inner.set_reconnect_ivl_max(to_ms(options.max_reconnect_us))?;
            inner.set_backlog(options.max_waiting_connections as i32)?;
            inner.set_tcp_keepalive(1)?;
            inner.set_tcp_keepalive_idle(options.keepalive_idle_us.div_ceil(1_000_000) as i32)?;
            inner.set_tcp_keepalive_intvl(options.keepalive_interval_us.div_ceil(1_000_000) as i32)?;
            inner.set_tcp_keepalive_cnt(options.max_keepalive_probes as i32)
        };
        set().map_err(NetError::system("setting socket options"))?;
        let descriptor = inner.get_fd().map_err(NetError::system("reading a descriptor"))?;
        Ok(Self { inner, descriptor })
    }

    /// The socket itself, for options and polling.
    pub(crate) const fn inner(&self) -> &zmq::Socket {
        &self.inner
    }

    /// For a poller.
    pub(crate) const fn poll_handle(&self) -> PollHandle<'_> {
        PollHandle { socket: &self.inner, descriptor: self.descriptor }
    }

    /// How long closing waits, in the background, for what was sent and has not left.
    pub(crate) fn linger(&self, longest: Duration) -> Result<(), NetError> {
        let longest_ms = to_ms(longest.as_micros().try_into().unwrap_or(u64::MAX));
        self.inner.set_linger(longest_ms).map_err(NetError::system("setting socket options"))
    }

    /// Makes a CURVE server ask the authentication handler about every key, and refuse all while none answers.
    pub(crate) fn enforce_authentication(&mut self, domain: &str) -> Result<(), NetError> {
        self.inner.set_zap_domain(domain).map_err(NetError::system("setting the authentication domain"))?;
        let enforce: c_int = 1;
        // SAFETY: the socket is open, and the value is an int of the given size that outlives the call.
        let outcome = unsafe {
            zmq_sys::zmq_setsockopt(
                self.inner.as_mut_ptr(),
                ZAP_ENFORCE_DOMAIN,
                (&raw const enforce).cast::<c_void>(),
                size_of::<c_int>(),
            )
        };
        if outcome == 0 { Ok(()) } else { Err(NetError::system("enforcing authentication")(last_error())) }
    }

    /// Listens; returns the address with its wildcards resolved.
    pub(crate) fn bind(&mut self, address: &Address) -> Result<Address, NetError> {
        check_vacant(address)?;
        let failed = |source| NetError::Bind { address: address.clone(), source };
        self.call(zmq_sys::zmq_bind, &address.to_string()).map_err(failed)?;
        let bound = self.inner.get_last_endpoint().map_err(NetError::system("reading the bound address"))?;
        let bound = bound.map_err(|_| failed(io::Error::other("the bound address is not UTF-8")))?;
        Ok(bound.parse()?)
    }

    /// Connects in the background; a peer that is away is no error.
    pub(crate) fn connect(&mut self, address: &Address) -> Result<(), NetError> {
        let failed = |source| NetError::Connect { address: address.clone(), source };
        self.call(zmq_sys::zmq_connect, &address.to_string()).map_err(failed)
    }

    /// Forgets a connection; one that is gone already is no error.
    pub(crate) fn disconnect(&mut self, address: &Address) -> Result<(), NetError> {
        match self.call(zmq_sys::zmq_disconnect, &address.to_string()) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(NetError::Connect { address: address.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn call(
        &mut self,
        function: unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int,
        text: &str,
    ) -> io::Result<()> {
        let text = CString::new(text)?;
        // SAFETY: the socket is open, and the string is closed by a zero and outlives the call.
        if unsafe { function(self.inner.as_mut_ptr(), text.as_ptr()) } == 0 { Ok(()) } else { Err(last_error()) }
    }

    /// Reports connection events on an in-process address from now on.
    pub(crate) fn start_monitor(&self, name: &str) -> Result<(), NetError> {
        self.inner.monitor(name, zmq::SocketEvent::ALL as i32).map_err(NetError::system("monitoring a socket"))
    }

    fn stop_monitor(&mut self) {
        // SAFETY: the socket is open; a null address is the documented way to stop its monitor.
        let outcome = unsafe { zmq_sys::zmq_socket_monitor(self.inner.as_mut_ptr(), std::ptr::null(), 0) };
        // ETERM alone can be met here, and then libzmq has stopped the monitor by itself.
        assert!(outcome == 0 || zmq::Error::ETERM.to_raw() == last_errno(), "a monitor did not stop");
    }

    /// Sends to the peer with this routing id.
    pub(crate) fn send_to(&self, routing_id: &[u8], message: Message) -> Result<(), Unsent> {
        // The identity alone is refused when the peer is away or full, so the message is still whole.
        match self.send_insistently(routing_id, zmq::DONTWAIT | zmq::SNDMORE) {
            Ok(()) => self.send_parts(message).map_err(Unsent::System),
            Err(zmq::Error::EAGAIN) => Err(Unsent::Full(message)),
            Err(zmq::Error::EHOSTUNREACH) => Err(Unsent::Away(message)),
            Err(error) => Err(Unsent::System(error)),
        }
    }

    /// Sends to the one peer of this socket.
    pub(crate) fn send(&self, message: Message) -> Result<(), Unsent> {
        let sent = if message.payload.len() > MAX_COPIED_BYTES {
            // The part is handed over whether it is sent or not, so ask first; that costs a system call.
            match self.inner.get_events() {
                Ok(events) if events.contains(zmq::POLLOUT) => self.send_parts(message),
                Ok(_) => return Err(Unsent::Full(message)),
                Err(error) => return Err(Unsent::System(error)),
            }
        } else {
            let flags = zmq::DONTWAIT | if message.attachments.is_empty() { 0 } else { zmq::SNDMORE };
            match self.send_insistently(&message.payload, flags) {
                Ok(()) => self.send_rest(message.attachments),
                Err(zmq::Error::EAGAIN) => return Err(Unsent::Full(message)),
                Err(error) => Err(error),
            }
        };
        match sent {
            // The connection ended between two calls; it would have taken the message with it a moment later.
            Ok(()) | Err(zmq::Error::EAGAIN) => Ok(()),
            Err(error) => Err(Unsent::System(error)),
        }
    }

    /// The first part of a message, copied. libzmq looks for news of its queues only once per million cycles or so, and
    /// says full until then; asking for events makes it look. Found as refusals of a queue of 8 with one in flight.
    fn send_insistently(&self, part: &[u8], flags: i32) -> Result<(), zmq::Error> {
        match retry(|| self.inner.send(part, flags)) {
            Err(zmq::Error::EAGAIN) => {
                self.inner.get_events()?;
                retry(|| self.inner.send(part, flags))
            }
            outcome => outcome,
        }
    }

    fn send_parts(&self, message: Message) -> Result<(), zmq::Error> {
        let more = if message.attachments.is_empty() { 0 } else { zmq::SNDMORE };
        self.inner.send(into_part(message.payload), zmq::DONTWAIT | more)?;
        self.send_rest(message.attachments)
    }

    fn send_rest(&self, attachments: Vec<Vec<u8>>) -> Result<(), zmq::Error> {
        let last = attachments.len().saturating_sub(1);
        for (index, part) in attachments.into_iter().enumerate() {
            let more = if index < last { zmq::SNDMORE } else { 0 };
            self.inner.send(into_part(part), zmq::DONTWAIT | more)?;
        }
        Ok(())
    }

    /// The next message, if one has arrived.
    pub(crate) fn receive(&self) -> Result<Option<Parts>, zmq::Error> {
        let first = match retry(|| self.inner.recv_msg(zmq::DONTWAIT)) {
            Ok(part) => part,
            Err(zmq::Error::EAGAIN) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut parts = vec![first];
        while parts.last().is_some_and(zmq::Message::get_more) {
            // A message arrives whole, so its further parts are there.
            parts.push(retry(|| self.inner.recv_msg(0))?);
        }
        Ok(Some(parts))
    }
}

impl Drop for Socket {
    /// The monitor ends before the socket does: an event that nobody reads would block libzmq's I/O thread.
    fn drop(&mut self) {
        self.stop_monitor();
    }
}

/// Why nothing was sent.
pub(crate) enum Unsent {
    Full(Message),
    Away(Message),
    System(zmq::Error),
}

/// A signal interrupts any call of libzmq; it is made again.
fn retry<T>(mut call: impl FnMut() -> Result<T, zmq::Error>) -> Result<T, zmq::Error> {
    loop {
        match call() {
            Err(zmq::Error::EINTR) => {}
            outcome => return outcome,
        }
    }
}

fn last_errno() -> c_int {
    // SAFETY: reads a thread-local number.
    unsafe { zmq_sys::zmq_errno() }
}

fn last_error() -> io::Error {
    let number = last_errno();
    if number < zmq_sys::ZMQ_HAUSNUMERO as c_int {
        return io::Error::from_raw_os_error(number);
    }
    // SAFETY: libzmq returns a static string for each of its own numbers.
    let text = unsafe { CStr::from_ptr(zmq_sys::zmq_strerror(number)) };
    io::Error::other(text.to_string_lossy().into_owned())
}

/// libzmq removes whatever lies at an ipc path before it listens there: a live socket of another process is then
/// silently cut off, and a file is lost.
fn check_vacant(address: &Address) -> Result<(), NetError> {
    let Address::Ipc(path) = address else { return Ok(()) };
    let occupant = match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => "a file that is no socket",
        Ok(_) if UnixStream::connect(path).is_ok() => "a listening process",
        _ => return Ok(()),
    };
    Err(NetError::Occupied { address: address.clone(), occupant })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyPair;

    /// libzmq admits every CURVE client when nobody answers for its keys, unless it is told otherwise.
    #[test]
    fn without_an_answering_handler_every_key_is_refused() {
        let context = zmq::Context::new();
        let (server_pair, client_pair) = (KeyPair::generate().expect("CURVE"), KeyPair::generate().expect("CURVE"));
        let options = EndpointOptions::default();
        let mut server = Socket::open(&context, zmq::ROUTER, &Address::loopback(), &options).expect("a socket");
        server.inner().set_curve_server(true).expect("CURVE");
        server.inner().set_curve_secretkey(server_pair.secret.as_bytes()).expect("CURVE");
        server.enforce_authentication("node").expect("a known option");
        server.start_monitor("inproc://events").expect("a monitor");
        let events = context.socket(zmq::PAIR).expect("a socket");
        events.connect("inproc://events").expect("the monitor");
        events.set_rcvtimeo(20_000).expect("an option");
        let address = server.bind(&Address::loopback()).expect("a port");
        let client = context.socket(zmq::DEALER).expect("a socket");
        client.set_linger(0).expect("an option");
        client.set_curve_serverkey(server_pair.public.as_bytes()).expect("CURVE");
        client.set_curve_publickey(client_pair.public.as_bytes()).expect("CURVE");
        client.set_curve_secretkey(client_pair.secret.as_bytes()).expect("CURVE");
        client.connect(&address.to_string()).expect("an address");
        client.send("hello", 0).expect("queued");
        loop {
            let event = events.recv_multipart(0).expect("an event before the deadline");
            let event = u32::from(u16::from_ne_bytes([event[0][0], event[0][1]]));
            assert_ne!(event, zmq_sys::ZMQ_EVENT_HANDSHAKE_SUCCEEDED);
            if event == zmq_sys::ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL {
                break;
            }
        }
        assert!(server.receive().expect("nothing wrong").is_none());
        // Before its events' reader: the end of a monitor is told, and that waits for ever where nobody is there.
        drop(server);
    }
}
