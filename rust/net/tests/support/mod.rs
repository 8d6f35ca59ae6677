//! What the tests of endpoints share: waiting for a condition with a deadline, and peers that misbehave.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use llmscale_net::{
    Address, AllowList, ClientEndpoint, Context, Counters, EndpointOptions, Message, PollHandle, Poller, Received,
    ServerEndpoint,
};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Far above what any condition takes, so that a failing test ends.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

/// Repeats a step that waits a little by itself, until it yields something.
pub(crate) fn eventually<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = step() {
            return value;
        }
        assert!(Instant::now() < end, "{what} did not happen within {DEADLINE:?}");
    }
}

/// Up to a millisecond, or until an endpoint is ready.
pub(crate) fn tick(handles: &[PollHandle<'_>]) {
    Poller::new().expect("a poller").wait(handles, Some(1000)).expect("a wait");
}

pub(crate) fn context() -> Context {
    Context::new(AllowList::default(), 1).expect("a context")
}

pub(crate) fn plain_server(context: &Context, options: &EndpointOptions) -> ServerEndpoint {
    ServerEndpoint::bind(context, &Address::loopback(), None, options).expect("a free loopback port")
}

pub(crate) fn plain_client(context: &Context, address: &Address, options: &EndpointOptions) -> ClientEndpoint {
    ClientEndpoint::connect(context, address, None, options).expect("a client")
}

pub(crate) fn receive(server: &mut ServerEndpoint) -> Received {
    eventually("a message to the server", || {
        tick(&[server.poll_handle()]);
        server.receive().expect("a good message")
    })
}

pub(crate) fn receive_answer(client: &mut ClientEndpoint) -> Message {
    eventually("a message to the client", || {
        tick(&[client.poll_handle()]);
        client.receive().expect("a good message")
    })
}

/// Sends as soon as the connection is up.
pub(crate) fn send(client: &mut ClientEndpoint, message: impl Into<Message>) {
    use llmscale_net::SendError::{Full, Unreachable};
    let mut message = Some(message.into());
    eventually("room to send", || match client.send(message.take().expect("given back")) {
        Ok(()) => Some(()),
        Err(Full(back) | Unreachable(back)) => {
            message = Some(back);
            tick(&[client.poll_handle()]);
            assert_eq!(client.receive().expect("nothing wrong"), None);
            None
        }
        Err(error) => panic!("{error}"),
    });
}

/// Waits until the server's counters satisfy a condition; whatever it receives meanwhile fails the test.
pub(crate) fn until_counted(server: &mut ServerEndpoint, what: &str, condition: impl Fn(&Counters) -> bool) {
    eventually(what, || {
        tick(&[server.poll_handle()]);
        assert_eq!(server.receive().expect("nothing wrong"), None, "a message came through");
        condition(&server.counters()).then_some(())
    });
}

/// The port of a TCP address.
pub(crate) fn port_of(address: &Address) -> u16 {
    match address {
        Address::Tcp { port: Some(port), .. } => *port,
        other => panic!("{other} has no port"),
    }
}

/// A folder for sockets, removed with what is returned.
pub(crate) fn fresh_folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// The 64-byte greeting of ZMTP 3.0.
pub(crate) fn greeting(mechanism: &str) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..12 + mechanism.len()].copy_from_slice(mechanism.as_bytes());
    bytes
}

/// A ZMTP command that announces properties.
pub(crate) fn ready(properties: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    for (name, value) in properties {
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value);
    }
    let mut command = vec![4, body.len() as u8];
    command.extend(body);
    command
}

/// A TCP connection to a server, below any library.
pub(crate) fn raw_peer(server: &ServerEndpoint) -> TcpStream {
    raw_peer_at(server.address())
}

pub(crate) fn raw_peer_at(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port_of(address))).expect("the server listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
    stream.set_write_timeout(Some(DEADLINE)).expect("a time-out");
    stream
}

/// A plain peer after its handshake, with properties of its own choice.
pub(crate) fn shaken_peer(server: &ServerEndpoint, properties: &[(&str, &[u8])]) -> TcpStream {
    shake_hands(raw_peer(server), properties)
}

pub(crate) fn shaken_peer_at(address: &Address) -> TcpStream {
    shake_hands(raw_peer_at(address), &[])
}

fn shake_hands(mut stream: TcpStream, properties: &[(&str, &[u8])]) -> TcpStream {
    let mut all: Vec<(&str, &[u8])> = vec![("Socket-Type", b"DEALER")];
    all.extend(properties);
    stream.write_all(&greeting("NULL")).expect("a greeting");
    stream.write_all(&ready(&all)).expect("properties");
    let mut theirs = [0; 64 + 2];
    stream.read_exact(&mut theirs).expect("the server's greeting");
    let mut rest = vec![0; usize::from(theirs[65])];
    stream.read_exact(&mut rest).expect("the server's properties");
    stream
}
