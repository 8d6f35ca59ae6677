//! Every kind of link, in the same conformance tests: inside the process, ipc, tcp, and tcp with keys.

mod support;

use llmscale_net::{
    Address, AllowList, ClientKeys, Context, EndpointOptions, KeyPair, LinkError, PollHandle, Poller, Principal, Role,
    Roles, ServerKeys, SocketLink, SocketWorker, WorkerLink, WorkerSide, in_process_link,
};
use std::io::Write as _;
use std::time::{Duration, Instant};
use support::{DEADLINE, eventually, fresh_folder, raw_peer_at, shaken_peer_at};
use tempfile::TempDir;

const DEADLINE_US: u64 = DEADLINE.as_micros() as u64;

struct Pair {
    kind: &'static str,
    engine: Box<dyn WorkerLink>,
    worker: Box<dyn WorkerSide>,
    poller: Poller,
    /// Of its socket, for as long as it is there.
    _folder: Option<TempDir>,
}

fn options() -> EndpointOptions {
    EndpointOptions {
        max_frame_bytes: 1 << 20,
        max_send_queue_frames: 8,
        max_receive_queue_frames: 8,
        min_reconnect_us: 5000,
        ..EndpointOptions::default()
    }
}

/// A pair of each kind, attached.
fn pairs() -> Vec<Pair> {
    let mut pairs =
        vec![in_process(), over_socket("ipc", false), over_socket("tcp", false), over_socket("curve", true)];
    for pair in &mut pairs {
        pair.attach();
    }
    pairs
}

fn in_process() -> Pair {
    let poller = Poller::new().expect("a poller");
    let (engine, worker) = in_process_link(&options(), poller.waker()).expect("valid options");
    Pair { kind: "in process", engine: Box::new(engine), worker: Box::new(worker), poller, _folder: None }
}

fn over_socket(kind: &'static str, with_keys: bool) -> Pair {
    let poller = Poller::new().expect("a poller");
    let (ours, theirs) = (KeyPair::generate().expect("CURVE"), KeyPair::generate().expect("CURVE"));
    let mut list = AllowList::default();
    list.insert(theirs.public, Principal::new(Role::Node, "worker-0", None).expect("valid"));
    let context = Context::new(list, 1).expect("a context");
    let folder = fresh_folder();
    let address = match kind {
        "ipc" => format!("ipc://{}", folder.path().join("link.sock").display()).parse().expect("valid"),
        _ => Address::loopback(),
    };
    let server_keys = ServerKeys { own: ours.clone(), admitted: Roles::of(&[Role::Node]) };
    let client_keys = ClientKeys { own: theirs, server: ours.public };
    let server_keys = with_keys.then_some(&server_keys);
    let engine = SocketLink::listen(&context, &address, server_keys, &options(), poller.waker()).expect("a link");
    // A context of its own, as in another process.
    let context = support::context();
    let client_keys = with_keys.then_some(&client_keys);
    let worker = SocketWorker::connect(&context, engine.address(), client_keys, &options()).expect("a worker");
    Pair { kind, engine: Box::new(engine), worker: Box::new(worker), poller, _folder: Some(folder) }
}

impl Pair {
    fn attach(&mut self) {
        let kind = self.kind;
        eventually("the greeting", || {
            assert_eq!(self.worker.receive(100).expect(kind), None, "{kind}");
            assert_eq!(self.engine.receive().expect(kind), None, "{kind}");
            self.engine.is_attached().then_some(())
        });
    }

    /// Waits until the engine has something to do, as an engine does.
    fn wait(&mut self) {
        let handles: Vec<PollHandle<'_>> = self.engine.poll_handle().into_iter().collect();
        let ready = self.poller.wait(&handles, Some(DEADLINE_US)).expect("a wait");
        assert!(!ready.is_timeout(), "{}: nothing woke the engine", self.kind);
    }

    fn receive(&mut self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.engine.receive().expect(self.kind) {
                return frame;
            }
            self.wait();
        }
    }
}

fn frame(index: usize, bytes: usize) -> Vec<u8> {
    let mut frame = vec![index as u8; bytes];
    frame.extend((index as u32).to_le_bytes());
    frame
}

#[test]
fn frames_pass_both_ways_whole_and_in_order() {
    for mut pair in pairs() {
        for index in 0..300 {
            let bytes = [0, 7, 600, 40_000][index % 4];
            pair.engine.send(frame(index, bytes)).expect(pair.kind);
            assert_eq!(pair.worker.receive(DEADLINE_US).expect(pair.kind), Some(frame(index, bytes)), "{}", pair.kind);
            pair.worker.send(frame(index + 1, bytes)).expect(pair.kind);
            assert_eq!(pair.receive(), frame(index + 1, bytes), "{}", pair.kind);
        }
    }
}

#[test]
fn an_idle_engine_does_not_wait_and_an_idle_worker_waits_its_time() {
    for mut pair in pairs() {
        assert_eq!(pair.engine.receive().expect(pair.kind), None);
        for wait_us in [0, 1500, 10_000] {
            let start = Instant::now();
            assert_eq!(pair.worker.receive(wait_us).expect(pair.kind), None);
            let waited = start.elapsed();
            assert!(waited >= Duration::from_micros(wait_us), "{}: {wait_us} us took {waited:?}", pair.kind);
        }
    }
}

#[test]
fn a_waiting_worker_is_woken_by_its_frame() {
    for mut pair in pairs() {
        let Pair { kind, engine, worker, .. } = &mut pair;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| worker.receive(DEADLINE_US).expect(kind));
            engine.send(frame(1, 10)).expect(kind);
            assert_eq!(waiting.join().expect("no panic"), Some(frame(1, 10)), "{kind}");
        });
    }
}

/// Nothing is lost: what was refused comes back, and what was taken arrives in order.
#[test]
fn a_worker_that_does_not_read_makes_its_link_full_and_loses_nothing() {
    for mut pair in pairs() {
        let (mut sent, mut refused) = (0, 0);
        let start = Instant::now();
        // Sockets take some frames into the kernel, and are full for good when nothing moved for a while.
        while refused < 200 {
            match pair.engine.send(frame(sent, 500_000)) {
                Ok(()) => (sent, refused) = (sent + 1, 0),
                Err(LinkError::Full(back)) => {
                    assert_eq!(back, frame(sent, 500_000), "{}", pair.kind);
                    refused += 1;
                    support::tick(&[]);
                }
                Err(error) => panic!("{}: {error}", pair.kind),
            }
            assert!(sent < 1000 && start.elapsed() < DEADLINE, "{}: {sent} frames were taken", pair.kind);
        }
        assert!(sent >= 8, "{}", pair.kind);
        for index in 0..sent {
            let received = pair.worker.receive(DEADLINE_US).expect(pair.kind);
            assert!(received == Some(frame(index, 500_000)), "{}: frame {index} of {sent}", pair.kind);
        }
        pair.engine.send(frame(sent, 1)).expect(pair.kind);
        assert_eq!(pair.worker.receive(DEADLINE_US).expect(pair.kind), Some(frame(sent, 1)), "{}", pair.kind);
    }
}

#[test]
fn an_engine_that_does_not_read_makes_its_link_full_too() {
    for mut pair in pairs() {
        let mut sent = 0;
        let start = Instant::now();
        let back = loop {
            match pair.worker.send(frame(sent, 500_000)) {
                Ok(()) => sent += 1,
                Err(LinkError::Full(back)) => break back,
                Err(error) => panic!("{}: {error}", pair.kind),
            }
            assert!(sent < 1000 && start.elapsed() < DEADLINE, "{}: {sent} frames were taken", pair.kind);
        };
        assert_eq!(back, frame(sent, 500_000), "{}", pair.kind);
        for index in 0..sent {
            assert!(pair.receive() == frame(index, 500_000), "{}: frame {index} of {sent}", pair.kind);
        }
    }
}

#[test]
fn a_link_whose_worker_is_gone_is_down_for_good() {
    for mut pair in pairs() {
        for index in 0..5 {
            pair.worker.send(frame(index, 100)).expect(pair.kind);
        }
        for index in 0..5 {
            assert_eq!(pair.receive(), frame(index, 100), "{}", pair.kind);
        }
        pair.worker = Box::new(Nobody);
        until_down(pair.engine.as_mut(), &mut pair.poller, pair.kind);
        assert!(matches!(pair.engine.send(frame(0, 1)), Err(LinkError::Down)), "{}", pair.kind);
        assert!(matches!(pair.engine.receive(), Err(LinkError::Down)), "{}", pair.kind);
    }
}

/// The frames that are received until the link is down.
fn until_down(engine: &mut dyn WorkerLink, poller: &mut Poller, kind: &str) -> Vec<Vec<u8>> {
    let (mut frames, end) = (Vec::new(), Instant::now() + DEADLINE);
    loop {
        match engine.receive() {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => {
                assert!(Instant::now() < end, "{kind}: the loss was not noticed");
                let handles: Vec<PollHandle<'_>> = engine.poll_handle().into_iter().collect();
                poller.wait(&handles, Some(DEADLINE_US)).expect(kind);
            }
            Err(LinkError::Down) => return frames,
            Err(error) => panic!("{kind}: {error}"),
        }
    }
}

/// A raw peer, because the kernel delivers all that it wrote before it closed. libzmq reports the end of a connection
/// before it hands over the last frames; many rounds, so that the order of the two is met.
#[test]
fn the_last_frames_of_a_worker_arrive_before_its_link_is_down() {
    let context = support::context();
    for round in 0..50 {
        let mut poller = Poller::new().expect("a poller");
        let mut engine =
            SocketLink::listen(&context, &Address::loopback(), None, &options(), poller.waker()).expect("a link");
        let mut worker = shaken_peer_at(engine.address());
        let mut bytes = b"\0\0".to_vec();
        for index in 0..20 {
            bytes.extend([0, 3, b'n', b'o', index]);
        }
        worker.write_all(&bytes).expect("a greeting and frames");
        drop(worker);
        let frames = until_down(&mut engine, &mut poller, "raw");
        let expected: Vec<Vec<u8>> = (0..20).map(|index| vec![b'n', b'o', index]).collect();
        assert_eq!(frames, expected, "round {round}");
    }
    let (mut poller, options) = (Poller::new().expect("a poller"), EndpointOptions::default());
    let (mut engine, mut worker) = in_process_link(&options, poller.waker()).expect("valid");
    worker.send(frame(1, 1)).expect("room");
    assert!(poller.wait(&[], Some(DEADLINE_US)).expect("a wait").woken);
    drop(worker);
    assert!(poller.wait(&[], Some(DEADLINE_US)).expect("a wait").woken, "the end woke nobody");
    assert_eq!(until_down(&mut engine, &mut poller, "in process"), [frame(1, 1)]);
}

/// Stands in for a worker that was dropped.
struct Nobody;

impl WorkerSide for Nobody {
    fn send(&mut self, _: Vec<u8>) -> Result<(), LinkError> {
        Err(LinkError::Down)
    }

    fn receive(&mut self, _: u64) -> Result<Option<Vec<u8>>, LinkError> {
        Err(LinkError::Down)
    }
}

#[test]
fn a_worker_whose_engine_is_gone_is_told_while_it_waits() {
    for pair in pairs() {
        let Pair { kind, engine, mut worker, .. } = pair;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let outcome = worker.receive(DEADLINE_US);
                (outcome, worker.send(frame(0, 1)), worker.receive(0))
            });
            drop(engine);
            let (waited, sent, again) = waiting.join().expect("no panic");
            assert!(matches!(waited, Err(LinkError::Down)), "{kind}: {waited:?}");
            assert!(matches!(sent, Err(LinkError::Down)), "{kind}: {sent:?}");
            assert!(matches!(again, Err(LinkError::Down)), "{kind}: {again:?}");
        });
    }
}

#[test]
fn a_frame_over_the_limit_or_without_a_byte_is_not_sent_and_the_link_goes_on() {
    for mut pair in pairs() {
        for outcome in [pair.engine.send(Vec::new()), pair.worker.send(Vec::new())] {
            assert!(matches!(outcome, Err(LinkError::Empty)), "{}: {outcome:?}", pair.kind);
        }
        for outcome in [pair.engine.send(vec![0; (1 << 20) + 1]), pair.worker.send(vec![0; (1 << 20) + 1])] {
            let Err(LinkError::TooLarge { frame_bytes: 1_048_577, limit_bytes: 1_048_576 }) = outcome else {
                panic!("{}: {outcome:?}", pair.kind)
            };
        }
        pair.engine.send(vec![1; 1 << 20]).expect(pair.kind);
        let received = pair.worker.receive(DEADLINE_US).expect(pair.kind);
        assert!(received.is_some_and(|frame| frame == vec![1; 1 << 20]), "{}", pair.kind);
    }
}

#[test]
fn a_frame_for_a_worker_that_has_not_attached_comes_back() {
    let mut pair = over_socket("tcp", false);
    assert!(matches!(pair.engine.send(frame(1, 1)), Err(LinkError::NotAttached(back)) if back == frame(1, 1)));
    assert!(!pair.engine.is_attached());
    let poller = Poller::new().expect("a poller");
    let context = support::context();
    let away = "ipc:///nonexistent/engine.sock".parse().expect("valid");
    let mut worker = SocketWorker::connect(&context, &away, None, &options()).expect("a worker");
    assert!(matches!(worker.send(frame(1, 1)), Err(LinkError::NotAttached(back)) if back == frame(1, 1)));
    assert_eq!(worker.receive(1000).expect("nothing yet"), None);
    drop(poller);
    pair.attach();
    pair.engine.send(frame(1, 1)).expect("attached");
}

#[test]
fn a_stranger_neither_takes_the_workers_place_nor_is_heard() {
    let poller = Poller::new().expect("a poller");
    let context = support::context();
    let mut engine =
        SocketLink::listen(&context, &Address::loopback(), None, &options(), poller.waker()).expect("a link");
    let address = engine.address().clone();
    // One that does not greet, one that is too large, one that only connects.
    let mut rude = shaken_peer_at(&address);
    rude.write_all(b"\x00\x02hi").expect("a frame");
    let mut large = shaken_peer_at(&address);
    large.write_all(&[2]).expect("a flag");
    large.write_all(&(1_500_000_u64).to_be_bytes()).expect("a length");
    large.write_all(&vec![0; 1_500_000]).expect("a frame");
    let _mute = raw_peer_at(&address);
    let worker = SocketWorker::connect(&context, &address, None, &options()).expect("a worker");
    let mut pair = Pair { kind: "tcp", engine: in_process().engine, worker: Box::new(worker), poller, _folder: None };
    eventually("both strangers and the worker", || {
        assert_eq!(engine.receive().expect("nothing wrong"), None);
        assert_eq!(pair.worker.receive(100).expect("nothing yet"), None);
        let counters = engine.counters();
        (engine.is_attached() && counters.oversized == 1 && counters.frames_in >= 2).then_some(())
    });
    // One that greets when the place is taken.
    let mut late = shaken_peer_at(&address);
    late.write_all(b"\x00\x00\x00\x02no").expect("a greeting and a frame");
    eventually("the late one", || {
        support::tick(&engine.poll_handle().into_iter().collect::<Vec<_>>());
        assert_eq!(engine.receive().expect("nothing wrong"), None);
        (engine.counters().malformed >= 1).then_some(())
    });
    pair.engine = Box::new(engine);
    rude.write_all(b"\x00\x00").expect("a late greeting");
    rude.write_all(b"\x00\x02hi").expect("a frame");
    pair.worker.send(frame(5, 5)).expect("attached");
    assert_eq!(pair.receive(), frame(5, 5));
    pair.engine.send(frame(6, 6)).expect("attached");
    assert_eq!(pair.worker.receive(DEADLINE_US).expect("a frame"), Some(frame(6, 6)));
}

/// Both sides use empty frames for themselves: the worker to greet, the engine to ask.
#[test]
fn an_empty_frame_reaches_no_caller() {
    let theirs = zmq::Context::new();
    let engine = theirs.socket(zmq::ROUTER).expect("a socket");
    engine.set_linger(0).expect("an option");
    engine.set_rcvtimeo(DEADLINE.as_millis() as i32).expect("an option");
    engine.bind("tcp://127.0.0.1:*").expect("a port");
    let address = engine.get_last_endpoint().expect("bound").expect("text").parse().expect("valid");
    let context = support::context();
    let mut worker = SocketWorker::connect(&context, &address, None, &options()).expect("a worker");
    let greeting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.receive(DEADLINE_US));
        let greeting = engine.recv_multipart(0).expect("a greeting");
        for payload in [&b""[..], b"", b"frame"] {
            engine.send_multipart([&greeting[0][..], payload], 0).expect("connected");
        }
        assert_eq!(waiting.join().expect("no panic").expect("a frame"), Some(b"frame".to_vec()));
        greeting
    });
    assert_eq!(greeting[1], b"");
    let poller = Poller::new().expect("a poller");
    let mut engine =
        SocketLink::listen(&context, &Address::loopback(), None, &options(), poller.waker()).expect("a link");
    let mut worker = shaken_peer_at(engine.address());
    worker.write_all(b"\0\0\0\0\0\0\0\x02hi").expect("greetings and a frame");
    let frame = eventually("the frame", || {
        support::tick(&engine.poll_handle().into_iter().collect::<Vec<_>>());
        engine.receive().expect("nothing wrong")
    });
    assert_eq!(frame, b"hi");
}
