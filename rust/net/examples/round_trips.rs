//! How fast messages go there and back: `cargo run --release -p llmscale-net --example round_trips [seconds per row]`.
//! A client keeps a number of messages in flight to an echoing server in another thread; each row gives the round trips
//! and bytes (both ways) per second and, for one message in flight, the median and 99th percentile of a round trip.
#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use llmscale_net::{
    Address, AllowList, ClientEndpoint, ClientKeys, Context, EndpointOptions, KeyPair, Poller, Principal, Role, Roles,
    SendError, ServerEndpoint, ServerKeys, WorkerLink as _, WorkerSide as _, in_process_link,
};
use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// One row of the table.
struct Row {
    round_trips: u64,
    elapsed: Duration,
    /// Nanoseconds of each round trip, only for one message in flight.
    latencies_ns: Vec<u64>,
}

fn main() -> Outcome<()> {
    let seconds: f64 = std::env::args().nth(1).map_or(Ok(1.0), |text| text.parse())?;
    let time = Duration::from_secs_f64(seconds);
    println!("| transport | keys | bytes | in flight | round trips/s | MB/s | median us | p99 us |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for (bytes, in_flight) in [(90, 1), (90, 64), (65_536, 1), (65_536, 64), (1 << 20, 1), (1 << 20, 8)] {
        print("channel", false, bytes, in_flight, &over_link(bytes, in_flight, time)?);
        for (transport, with_keys) in [("inproc", false), ("ipc", false), ("tcp", false), ("ipc", true), ("tcp", true)]
        {
            print(transport, with_keys, bytes, in_flight, &over_socket(transport, with_keys, bytes, in_flight, time)?);
        }
    }
    Ok(())
}

fn print(transport: &str, with_keys: bool, bytes: usize, in_flight: usize, row: &Row) {
    let keys = if with_keys { "CURVE" } else { "-" };
    let rate = row.round_trips as f64 / row.elapsed.as_secs_f64();
    // A channel moves a frame without touching its bytes.
    let moved = transport == "channel";
    let megabytes = if moved { "-".into() } else { format!("{:.1}", rate * bytes as f64 * 2.0 / 1e6) };
    let mut latencies = row.latencies_ns.clone();
    latencies.sort_unstable();
    let at = |share: f64| {
        let value = latencies.get((latencies.len() as f64 * share) as usize);
        value.map_or_else(|| "-".into(), |ns| format!("{:.1}", *ns as f64 / 1e3))
    };
    println!("| {transport} | {keys} | {bytes} | {in_flight} | {rate:.0} | {megabytes} | {} | {} |", at(0.5), at(0.99));
}

/// Drives one side: `send` takes a frame or gives it back, `receive` waits for one.
fn drive(
    bytes: usize,
    in_flight: usize,
    time: Duration,
    mut send: impl FnMut(Vec<u8>) -> Outcome<Option<Vec<u8>>>,
    mut receive: impl FnMut() -> Outcome<Vec<u8>>,
) -> Outcome<Row> {
    let mut row = Row { round_trips: 0, elapsed: Duration::ZERO, latencies_ns: Vec::new() };
    let mut spare = vec![vec![7_u8; bytes]; in_flight];
    let warm_up = Instant::now() + time / 10;
    let mut start: Option<Instant> = None;
    loop {
        let sent = Instant::now();
        while let Some(frame) = spare.pop() {
            if let Some(back) = send(frame)? {
                spare.push(back);
                break;
            }
        }
        spare.push(receive()?);
        match start {
            None if sent >= warm_up => start = Some(Instant::now()),
            None => {}
            Some(start) => {
                row.round_trips += 1;
                if in_flight == 1 {
                    row.latencies_ns.push(sent.elapsed().as_nanos() as u64);
                }
                row.elapsed = start.elapsed();
                if row.elapsed >= time {
                    return Ok(row);
                }
            }
        }
    }
}

fn over_socket(transport: &str, with_keys: bool, bytes: usize, in_flight: usize, time: Duration) -> Outcome<Row> {
    let (ours, theirs) = (KeyPair::generate()?, KeyPair::generate()?);
    let mut list = AllowList::default();
    list.insert(theirs.public, Principal::new(Role::Node, "bench", None).ok_or("a valid name")?);
    let context = Context::new(list, 1)?;
    let path = std::env::temp_dir().join(format!("llmscale-round-trips-{}.sock", std::process::id()));
    let address: Address = match transport {
        "ipc" => format!("ipc://{}", path.display()).parse()?,
        "inproc" => "inproc://round-trips".parse()?,
        _ => Address::loopback(),
    };
    let options = EndpointOptions::default();
    let server_keys = ServerKeys { own: ours.clone(), admitted: Roles::ALL };
    let client_keys = ClientKeys { own: theirs, server: ours.public };
    let mut server = ServerEndpoint::bind(&context, &address, with_keys.then_some(&server_keys), &options)?;
    // A context of its own, as another process has; only a queue inside the process must share one.
    let context = if transport == "inproc" { context } else { Context::new(AllowList::default(), 1)? };
    let mut client = ClientEndpoint::connect(&context, server.address(), with_keys.then_some(&client_keys), &options)?;
    let mut poller = Poller::new()?;
    let (ending, mut echo_poller) = (AtomicBool::new(false), Poller::new()?);
    let stop = echo_poller.waker();
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| -> Outcome<()> {
            while !ending.load(Ordering::Acquire) {
                echo_poller.wait(&[server.poll_handle()], None)?;
                while let Some(received) = server.receive()? {
                    server.send(received.peer, received.message)?;
                }
            }
            Ok(())
        });
        let client = std::cell::RefCell::new(&mut client);
        let send = |frame: Vec<u8>| match client.borrow_mut().send(frame) {
            Ok(()) => Ok(None),
            Err(SendError::Full(message)) => Ok(Some(message.payload)),
            Err(error) => Err(error.into()),
        };
        let mut receive = || {
            loop {
                if let Some(message) = client.borrow_mut().receive()? {
                    return Ok(message.payload);
                }
                poller.wait(&[client.borrow().poll_handle()], None)?;
            }
        };
        // The first message must wait for the handshake.
        while let Err(SendError::Unreachable(_)) = client.borrow_mut().send(Vec::new()) {
            std::thread::yield_now();
        }
        let receive_first: Outcome<Vec<u8>> = receive();
        let row = receive_first.and_then(|_| drive(bytes, in_flight, time, send, receive));
        ending.store(true, Ordering::Release);
        stop.wake();
        echo.join().map_err(|_| "the echo thread panicked")??;
        row
    })
}

fn over_link(bytes: usize, in_flight: usize, time: Duration) -> Outcome<Row> {
    let mut poller = Poller::new()?;
    let (engine, mut worker) = in_process_link(&EndpointOptions::default(), poller.waker())?;
    let ending = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| -> Outcome<()> {
            while !ending.load(Ordering::Acquire) {
                if let Some(frame) = worker.receive(1000)? {
                    worker.send(frame)?;
                }
            }
            Ok(())
        });
        let engine = std::cell::RefCell::new(engine);
        let send = |frame: Vec<u8>| match engine.borrow_mut().send(frame) {
            Ok(()) => Ok(None),
            Err(llmscale_net::LinkError::Full(back)) => Ok(Some(back)),
            Err(error) => Err(error.into()),
        };
        let receive = || {
            loop {
                if let Some(frame) = engine.borrow_mut().receive()? {
                    return Ok(frame);
                }
                poller.wait(&[], None)?;
            }
        };
        let row = drive(bytes, in_flight, time, send, receive);
        ending.store(true, Ordering::Release);
        echo.join().map_err(|_| "the echo thread panicked")??;
        row
    })
}
