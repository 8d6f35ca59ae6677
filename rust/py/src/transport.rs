//! Times a connection between two threads, for `bench transport`: frames of one size, so many under way, each answered by a
//! byte. Over our endpoints with and without keys, and over a bare TCP stream, which is the limit. Decides nothing.

use crate::detach::detached;
use crate::error;
use llmscale_net::{
    Address, AllowList, ClientEndpoint, ClientKeys, Context, EndpointOptions, KeyPair, Message, Phase, Poller,
    Principal, Role, Roles, SendError, ServerEndpoint, ServerKeys,
};
use pyo3::prelude::*;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Longest wait of either side for the other.
const MAX_WAIT_US: u64 = 10_000_000;
const ANSWER: [u8; 1] = [1];

/// Nanoseconds that `frames` frames of `frame_bytes` took, `window` of them under way at a time, each answered by a byte.
/// `kind` is tcp, curve (tcp with keys on both sides) or raw (a bare TCP stream). Raises `ConfigError`.
#[pyfunction]
pub(crate) fn measure_transport(
    py: Python<'_>,
    kind: &str,
    frame_bytes: usize,
    frames: u32,
    window: u32,
) -> PyResult<u64> {
    if frame_bytes == 0 || frame_bytes > 16 << 20 || frames == 0 || window == 0 {
        return Err(error::config("frame_bytes is from 1 to 16777216; frames and window are 1 at least".to_owned()));
    }
    let measured = match kind {
        "raw" => detached(py, || raw(frame_bytes, frames, window)),
        "tcp" => detached(py, || endpoints(false, frame_bytes, frames, window)),
        "curve" => detached(py, || endpoints(true, frame_bytes, frames, window)),
        other => Err(format!("kind is {other:?}, it must be tcp, curve or raw")),
    };
    measured.map_err(error::config)
}

fn raw(frame_bytes: usize, frames: u32, window: u32) -> Result<u64, String> {
    let text = |error: std::io::Error| error.to_string();
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let mut client = TcpStream::connect(listener.local_addr().map_err(text)?).map_err(text)?;
    let (mut server, _) = listener.accept().map_err(text)?;
    client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).map_err(text)?;
    let echo = std::thread::spawn(move || -> std::io::Result<()> {
        let mut frame = vec![0; frame_bytes];
        for _ in 0..frames {
            server.read_exact(&mut frame)?;
            server.write_all(&ANSWER)?;
        }
        Ok(())
    });
    let (frame, mut answer) = (vec![7; frame_bytes], ANSWER);
    let started = Instant::now();
    let (mut sent, mut answered) = (0, 0);
    while answered < frames {
        if sent < frames && sent - answered < window {
            client.write_all(&frame).map_err(text)?;
            sent += 1;
        } else {
            client.read_exact(&mut answer).map_err(text)?;
            answered += 1;
        }
    }
    let elapsed_ns = started.elapsed().as_nanos() as u64;
    echo.join().map_err(|_| "the other side panicked".to_owned())?.map_err(text)?;
    Ok(elapsed_ns)
}

/// A client and a server with a thread of its own, connected.
fn endpoints(secure: bool, frame_bytes: usize, frames: u32, window: u32) -> Result<u64, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let pair = || KeyPair::generate().map_err(|error| text(&error));
    let (server_keys, client_keys) = (pair()?, pair()?);
    let mut list = AllowList::default();
    if let Some(gateway) = Principal::new(Role::Gateway, "bench", None) {
        list.insert(client_keys.public, gateway);
    }
    let context = Context::new(list, 2).map_err(|error| text(&error))?;
    let (server, client) = if secure {
        let keys = ServerKeys { own: server_keys.clone(), admitted: Roles::of(&[Role::Gateway]) };
        (Some(keys), Some(ClientKeys { own: client_keys, server: server_keys.public }))
    } else {
        (None, None)
    };
    let options = EndpointOptions::default();
    let server = ServerEndpoint::bind(&context, &Address::loopback(), server.as_ref(), &options);
    let server = server.map_err(|error| text(&error))?;
    let address = server.address().clone();
    let over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let poller = Poller::new().map_err(|error| text(&error))?;
    let waker = poller.waker();
    let echo = std::thread::spawn(move || answer_all(server, poller, &stop));
    let client = ClientEndpoint::connect(&context, &address, client.as_ref(), &options);
    let measured = client.map_err(|error| text(&error)).and_then(|client| drive(client, frame_bytes, frames, window));
    over.store(true, Ordering::Release);
    waker.wake();
    echo.join().map_err(|_| "the other side panicked".to_owned())??;
    measured
}

fn answer_all(mut server: ServerEndpoint, mut poller: Poller, over: &AtomicBool) -> Result<(), String> {
    while !over.load(Ordering::Acquire) {
        poller.wait(&[server.poll_handle()], Some(MAX_WAIT_US)).map_err(|error| error.to_string())?;
        while let Some(received) = server.receive().map_err(|error| error.to_string())? {
            server.send(received.peer, ANSWER.to_vec()).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn drive(mut client: ClientEndpoint, frame_bytes: usize, frames: u32, window: u32) -> Result<u64, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut poller = Poller::new().map_err(|error| text(&error))?;
    client.wake_on_connections(poller.waker());
    while client.phase() != Phase::Up {
        let timeout =
            poller.wait(&[client.poll_handle()], Some(MAX_WAIT_US)).map_err(|error| text(&error))?.is_timeout();
        if timeout && client.phase() != Phase::Up {
            return Err("no connection within 10 s".to_owned());
        }
        client.receive().map_err(|error| text(&error))?;
    }
    // The first frames find buffers that were never used.
    exchange(&mut client, &mut poller, frame_bytes, window, window)?;
    let started = Instant::now();
    exchange(&mut client, &mut poller, frame_bytes, frames, window)?;
    Ok(started.elapsed().as_nanos() as u64)
}

fn exchange(
    client: &mut ClientEndpoint,
    poller: &mut Poller,
    frame_bytes: usize,
    frames: u32,
    window: u32,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let (mut sent, mut answered) = (0, 0);
    while answered < frames {
        if sent < frames && sent - answered < window {
            match client.send(Message::from(vec![7; frame_bytes])) {
                Ok(()) => {
                    sent += 1;
                    continue;
                }
                Err(SendError::Full(_)) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        if client.receive().map_err(|error| text(&error))?.is_some() {
            answered += 1;
        } else if poller.wait(&[client.poll_handle()], Some(MAX_WAIT_US)).map_err(|error| text(&error))?.is_timeout() {
            return Err(format!("nothing came for 10 s after {answered} of {frames} answers"));
        }
    }
    Ok(())
}
