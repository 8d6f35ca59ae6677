//! Endpoints without keys: what passes, what is given back, and what peers that misbehave cannot do.

mod support;

use llmscale_net::{
    Address, AddressError, ClientEndpoint, EndpointOptions, Message, NetError, Phase, ReceiveError, SendError,
    ServerEndpoint,
};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};
use support::{
    DEADLINE, context, eventually, fresh_folder, plain_client, plain_server, raw_peer, receive, receive_answer, send,
    shaken_peer, tick, until_counted,
};

fn small() -> EndpointOptions {
    EndpointOptions { max_frame_bytes: 1024, max_parts: 3, ..EndpointOptions::default() }
}

#[test]
fn a_message_and_its_answer_pass_whole_over_every_transport() {
    let context = context();
    let folder = fresh_folder();
    let path = folder.path().join("pass.sock");
    for text in ["tcp://127.0.0.1:*", "tcp://[::1]:*", &format!("ipc://{}", path.display()), "inproc://pass"] {
        let address: Address = text.parse().expect(text);
        let options = EndpointOptions::default();
        let mut server = ServerEndpoint::bind(&context, &address, None, &options).expect(text);
        let mut client = plain_client(&context, server.address(), &options);
        for bytes in [0, 1, 255, 512, 513, 70_000] {
            let message =
                Message { payload: vec![b'p'; bytes], attachments: vec![vec![1; bytes / 2], Vec::new(), vec![2; 3]] };
            send(&mut client, message.clone());
            let received = receive(&mut server);
            assert_eq!((received.message, received.principal), (message.clone(), None), "{text}");
            server.send(received.peer, message.clone()).expect("the peer is connected");
            assert_eq!(receive_answer(&mut client), message, "{text}");
        }
        let (ours, theirs) = (server.counters(), client.counters());
        assert_eq!((ours.frames_in, ours.frames_out, theirs.frames_in, theirs.frames_out), (6, 6, 6, 6));
        assert_eq!((ours.bytes_in, theirs.bytes_out), (ours.bytes_out, theirs.bytes_in));
    }
}

#[test]
fn each_peer_gets_its_own_answers() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut clients: Vec<_> =
        (0..5).map(|_| plain_client(&context, server.address(), &EndpointOptions::default())).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        send(client, vec![index as u8]);
    }
    for _ in 0..5 {
        let received = receive(&mut server);
        server.send(received.peer, received.message).expect("connected");
    }
    for (index, client) in clients.iter_mut().enumerate() {
        assert_eq!(receive_answer(client).payload, vec![index as u8]);
    }
}

#[test]
fn a_peer_that_is_gone_gives_the_message_back() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut client = plain_client(&context, server.address(), &EndpointOptions::default());
    send(&mut client, b"hello".to_vec());
    let peer = receive(&mut server).peer;
    drop(client);
    eventually("the loss of the peer", || {
        tick(&[server.poll_handle()]);
        match server.send(peer, b"answer".to_vec()) {
            Ok(()) => None,
            Err(SendError::Unreachable(back)) => {
                assert_eq!(back.payload, b"answer");
                Some(())
            }
            Err(error) => panic!("{error}"),
        }
    });
    assert!(server.counters().unreachable >= 1);
    until_counted(&mut server, "the end of its connection", |counters| counters.open_connections() == 0);
}

#[test]
fn a_server_that_never_answers_the_door_blocks_nobody() {
    let context = context();
    // Listens, but nobody accepts beyond the kernel's queue, and nobody shakes hands.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let away = format!("tcp://127.0.0.1:{}", silent.local_addr().expect("bound").port()).parse().expect("an address");
    let mut client = plain_client(&context, &away, &EndpointOptions::default());
    let start = Instant::now();
    for _ in 0..1000 {
        match client.send(b"x".to_vec()) {
            Err(SendError::Unreachable(back)) => assert_eq!(back.payload, b"x"),
            other => panic!("{other:?}"),
        }
        assert!(client.receive().expect("nothing").is_none());
    }
    assert!(start.elapsed() < DEADLINE);
    assert_eq!((client.counters().unreachable, client.counters().frames_out), (1000, 0));
    assert_ne!(client.phase(), Phase::Up);
}

/// The kernel takes some megabytes first, then libzmq's queue fills to its limit.
#[test]
fn a_peer_that_never_reads_fills_its_own_queue_and_no_other() {
    let context = context();
    let options = EndpointOptions { max_send_queue_frames: 4, ..EndpointOptions::default() };
    let mut server = plain_server(&context, &options);
    let mut stuck = shaken_peer(&server, &[]);
    stuck.write_all(&[0, 2, b'h', b'i']).expect("a frame");
    let peer = receive(&mut server).peer;
    let mut reader = plain_client(&context, server.address(), &options);
    send(&mut reader, b"me".to_vec());
    let other = receive(&mut server).peer;
    let (mut sent, start) = (0, Instant::now());
    let back = loop {
        match server.send(peer, vec![7; 1 << 20]) {
            Ok(()) => sent += 1,
            Err(SendError::Full(back)) => {
                // Full now; full for good once the kernel takes no more.
                if sent > 4 && server.counters().full > 200 {
                    break back;
                }
                tick(&[server.poll_handle()]);
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1000 && start.elapsed() < DEADLINE, "{sent} MiB were taken for a peer that never reads");
    };
    assert_eq!(back.payload, vec![7; 1 << 20]);
    server.send(other, b"you".to_vec()).expect("room for the other peer");
    assert_eq!(receive_answer(&mut reader).payload, b"you");
}

#[test]
fn a_part_over_the_limit_names_its_peer_and_the_next_message_passes() {
    let context = context();
    let mut server = plain_server(&context, &small());
    let mut client = plain_client(&context, server.address(), &EndpointOptions::default());
    send(&mut client, vec![0; 1024]);
    let peer = receive(&mut server).peer;
    send(&mut client, vec![0; 1025]);
    send(&mut client, Message { payload: b"many".to_vec(), attachments: vec![Vec::new(); 3] });
    send(&mut client, b"next".to_vec());
    let mut errors = Vec::new();
    let next = eventually("the next message", || {
        tick(&[server.poll_handle()]);
        server.receive().unwrap_or_else(|error| {
            errors.push(error);
            None
        })
    });
    assert_eq!((next.message.payload.as_slice(), next.peer), (&b"next"[..], peer));
    let [large, many] = errors.as_slice() else { panic!("{errors:?}") };
    assert!(
        matches!(large, ReceiveError::TooLarge { peer: Some(who), part_bytes: 1025, limit_bytes: 1024 } if *who == peer)
    );
    assert!(matches!(many, ReceiveError::TooManyParts { peer: Some(who), parts: 4, limit: 3 } if *who == peer));
    let counters = server.counters();
    assert_eq!((counters.oversized, counters.malformed, counters.frames_in), (1, 1, 2));
}

#[test]
fn a_frame_far_over_the_limit_costs_the_peer_its_connection() {
    let context = context();
    let mut server = plain_server(&context, &small());
    let mut hostile = shaken_peer(&server, &[]);
    until_counted(&mut server, "the handshake", |counters| counters.admitted_peers == 1);
    // Announces 64 MiB; a library that trusted it would take the memory and wait for them.
    hostile.write_all(&[2]).expect("a flag");
    hostile.write_all(&(1_u64 << 26).to_be_bytes()).expect("a length");
    until_counted(&mut server, "the cut", |counters| counters.ended_connections == 1);
    let mut left = Vec::new();
    assert!(matches!(hostile.read_to_end(&mut left), Ok(0) | Err(_)), "the server said {left:?}");
    let mut client = plain_client(&context, server.address(), &EndpointOptions::default());
    send(&mut client, vec![0; 2000]);
    assert!(matches!(
        eventually("the milder case", || {
            tick(&[server.poll_handle()]);
            server.receive().err()
        }),
        ReceiveError::TooLarge { part_bytes: 2000, .. }
    ));
    send(&mut client, b"still here".to_vec());
    assert_eq!(receive(&mut server).message.payload, b"still here");
}

#[test]
fn a_message_over_our_own_limit_is_not_sent() {
    let context = context();
    let mut server = plain_server(&context, &small());
    let mut client = plain_client(&context, server.address(), &small());
    send(&mut client, b"hello".to_vec());
    let peer = receive(&mut server).peer;
    for outcome in [server.send(peer, vec![0; 1025]), client.send(vec![0; 1025])] {
        assert!(matches!(outcome, Err(SendError::TooLarge { part_bytes: 1025, limit_bytes: 1024 })));
    }
    let many = Message { payload: Vec::new(), attachments: vec![Vec::new(); 3] };
    assert!(matches!(client.send(many), Err(SendError::TooManyParts { parts: 4, limit: 3 })));
    assert_eq!((server.counters().frames_out, client.counters().frames_out), (0, 1));
}

#[test]
fn bytes_that_another_program_would_unpickle_are_bytes() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut client = plain_client(&context, server.address(), &EndpointOptions::default());
    let pickle = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.".to_vec();
    send(&mut client, pickle.clone());
    assert_eq!(receive(&mut server).message, Message::from(pickle));
}

#[test]
fn an_identity_of_the_peers_own_choice_is_not_heard() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let theirs = zmq::Context::new();
    let chosen = theirs.socket(zmq::DEALER).expect("a socket");
    chosen.set_identity(b"gateway-1").expect("an identity");
    chosen.set_linger(0).expect("an option");
    chosen.connect(&server.address().to_string()).expect("an address");
    chosen.send("hello", 0).expect("queued");
    let error = eventually("the message", || {
        tick(&[server.poll_handle()]);
        server.receive().err()
    });
    assert!(matches!(error, ReceiveError::ChosenIdentity));
    assert_eq!((server.counters().malformed, server.counters().frames_in), (1, 0));
}

/// libzmq hands on a User-Id that a plain peer wrote into its own handshake.
#[test]
fn a_user_id_that_a_plain_peer_claims_is_ignored() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut forger = shaken_peer(&server, &[("User-Id", b"gateway:edge"), ("Identity", b"")]);
    forger.write_all(&[0, 2, b'h', b'i']).expect("a frame");
    let received = receive(&mut server);
    assert_eq!((received.message.payload.as_slice(), received.principal), (&b"hi"[..], None));
}

#[test]
fn an_ignored_peer_is_not_heard_and_others_are() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut noisy = plain_client(&context, server.address(), &EndpointOptions::default());
    let mut quiet = plain_client(&context, server.address(), &EndpointOptions::default());
    send(&mut noisy, b"first".to_vec());
    let peer = receive(&mut server).peer;
    server.ignore(peer);
    for _ in 0..200 {
        send(&mut noisy, b"noise".to_vec());
    }
    send(&mut quiet, b"word".to_vec());
    let heard = receive(&mut server);
    assert_eq!((heard.message.payload.as_slice(), heard.peer == peer), (&b"word"[..], false));
    until_counted(&mut server, "the noise", |counters| counters.malformed == 200);
}

#[test]
fn an_address_that_other_hosts_reach_is_refused_without_keys() {
    let context = context();
    let options = EndpointOptions::default();
    for text in ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*"] {
        let outcome = ServerEndpoint::bind(&context, &text.parse().expect(text), None, &options);
        let error = outcome.err().expect("refused");
        assert!(matches!(error, NetError::Address(AddressError::KeysRequired { .. })), "{text}: {error}");
    }
    let outcome = ClientEndpoint::connect(&context, &"tcp://10.0.0.1:5555".parse().expect("valid"), None, &options);
    assert!(matches!(outcome.err(), Some(NetError::Address(AddressError::KeysRequired { .. }))));
    let wildcard = ClientEndpoint::connect(&context, &"tcp://127.0.0.1:*".parse().expect("valid"), None, &options);
    assert!(matches!(wildcard.err(), Some(NetError::Address(AddressError::Wildcard { .. }))));
}

#[test]
fn what_lies_at_an_ipc_path_is_not_replaced_unless_it_is_dead() {
    let context = context();
    let options = EndpointOptions::default();
    let folder = fresh_folder();
    let path = folder.path().join("taken.sock");
    let address: Address = format!("ipc://{}", path.display()).parse().expect("valid");
    let bind = || ServerEndpoint::bind(&context, &address, None, &options);
    std::fs::write(&path, "precious").expect("own folder");
    assert!(matches!(bind().err(), Some(NetError::Occupied { .. })));
    assert_eq!(std::fs::read_to_string(&path).expect("still there"), "precious");
    std::fs::remove_file(&path).expect("own file");
    let listener = UnixListener::bind(&path).expect("own folder");
    assert!(matches!(bind().err(), Some(NetError::Occupied { .. })));
    // A process that died leaves its socket behind, and nobody listens.
    drop(listener);
    assert!(path.exists());
    drop(bind().expect("a dead socket is replaced"));
    let missing: Address = "ipc:///nonexistent/folder/x.sock".parse().expect("valid");
    assert!(matches!(ServerEndpoint::bind(&context, &missing, None, &options).err(), Some(NetError::Bind { .. })));
    let below_file: Address = "ipc:///proc/self/status/x.sock".parse().expect("valid");
    assert!(matches!(ServerEndpoint::bind(&context, &below_file, None, &options).err(), Some(NetError::Bind { .. })));
}

#[test]
fn two_servers_cannot_share_a_port() {
    let context = context();
    let first = plain_server(&context, &EndpointOptions::default());
    let second = ServerEndpoint::bind(&context, first.address(), None, &EndpointOptions::default());
    assert!(matches!(second.err(), Some(NetError::Bind { .. })));
}

#[test]
fn a_connection_that_does_not_shake_hands_in_time_is_cut_and_counted() {
    let context = context();
    let options = EndpointOptions { max_handshake_us: 50_000, ..EndpointOptions::default() };
    let mut server = plain_server(&context, &options);
    let mut silent = raw_peer(&server);
    until_counted(&mut server, "the refusal", |counters| {
        counters.refused_peers == 1 && counters.ended_connections == 1
    });
    let mut greeting = Vec::new();
    assert!(matches!(silent.read_to_end(&mut greeting), Ok(0..=64) | Err(_)));
    assert_eq!(server.counters().admitted_peers, 0);
}

/// libzmq takes an unknown greeting for ZMTP 1.0, whose peers choose their own identity.
#[test]
fn a_browser_that_lost_its_way_is_not_heard() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut browser = raw_peer(&server);
    browser
        .write_all(&b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".repeat(100))
        .expect("a request");
    let error = eventually("the refusal", || {
        tick(&[server.poll_handle()]);
        server.receive().err()
    });
    assert!(matches!(error, ReceiveError::ChosenIdentity));
    assert_eq!(server.counters().frames_in, 0);
}

#[test]
fn a_peer_that_falls_silent_is_cut() {
    let context = context();
    let options = EndpointOptions { heartbeat_us: 200_000, max_silence_us: 20_000_000, ..EndpointOptions::default() };
    let mut server = plain_server(&context, &options);
    let _frozen = shaken_peer(&server, &[]);
    let mut alive = plain_client(&context, server.address(), &options);
    send(&mut alive, b"hello".to_vec());
    let peer = receive(&mut server).peer;
    until_counted(&mut server, "the cut", |counters| counters.admitted_peers == 2 && counters.open_connections() == 1);
    server.send(peer, b"you live".to_vec()).expect("the other one answers heartbeats");
    assert_eq!(receive_answer(&mut alive).payload, b"you live");
}

#[test]
fn a_client_finds_a_server_that_came_back_and_sends_it_nothing_stale() {
    let context = context();
    let options = EndpointOptions { min_reconnect_us: 5000, max_reconnect_us: 50_000, ..EndpointOptions::default() };
    let mut server = plain_server(&context, &options);
    let mut client = plain_client(&context, server.address(), &options);
    send(&mut client, b"before".to_vec());
    assert_eq!(receive(&mut server).message.payload, b"before");
    let address = server.address().clone();
    drop(server);
    eventually("the loss", || {
        tick(&[client.poll_handle()]);
        client.receive().expect("nothing wrong");
        matches!(client.send(b"stale".to_vec()), Err(SendError::Unreachable(_))).then_some(())
    });
    let mut again = eventually("the port to be free", || ServerEndpoint::bind(&context, &address, None, &options).ok());
    send(&mut client, b"after".to_vec());
    assert_eq!(receive(&mut again).message.payload, b"after");
    // The watch thread may report a moment later than the first message.
    eventually("the report", || {
        tick(&[]);
        (client.phase() == Phase::Up).then_some(())
    });
}

#[test]
fn a_server_that_lingers_leaves_after_what_it_has_sent() {
    // More than a connection holds, to a peer that reads nothing before the server is dropped.
    const MESSAGES: usize = 100;
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut late = shaken_peer(&server, &[]);
    late.write_all(&[0, 1, b'x']).expect("a frame");
    let peer = receive(&mut server).peer;
    for _ in 0..MESSAGES {
        server.send(peer, vec![0; 1 << 20]).expect("room in the queue");
    }
    server.linger(DEADLINE).expect("an option");
    drop(server);
    let mut found = Vec::new();
    late.read_to_end(&mut found).expect("whole frames");
    assert!(found.len() > MESSAGES << 20, "{} bytes came", found.len());
}

#[test]
fn closing_does_not_wait_for_what_was_not_delivered() {
    let context = context();
    let options = EndpointOptions::default();
    let mut server = plain_server(&context, &options);
    let mut stuck = shaken_peer(&server, &[]);
    stuck.write_all(&[0, 1, b'x']).expect("a frame");
    let peer = receive(&mut server).peer;
    while server.counters().full == 0 {
        match server.send(peer, vec![0; 1 << 20]) {
            Ok(()) | Err(SendError::Full(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let client = plain_client(&context, server.address(), &options);
    let start = Instant::now();
    drop(client);
    drop(server);
    drop(context);
    assert!(start.elapsed() < Duration::from_mins(1), "closing took {:?}", start.elapsed());
}

/// Column 6 of /proc/net/tcp is `timer:jiffies`; 02 is keepalive, and the default idle time is two hours.
#[test]
fn the_kernel_watches_idle_connections_too() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let mut client = plain_client(&context, server.address(), &EndpointOptions::default());
    send(&mut client, b"hello".to_vec());
    receive(&mut server);
    let port = format!(":{:04X}", support::port_of(server.address()));
    let jiffies = eventually("keepalive timers on both ends", || {
        tick(&[server.poll_handle()]);
        let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc is mounted");
        let timers: Vec<u64> = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|columns| {
                columns.len() > 5 && columns[3] == "01" && columns[1..3].iter().any(|end| end.ends_with(&port))
            })
            .filter_map(|columns| u64::from_str_radix(columns[5].strip_prefix("02:")?, 16).ok())
            .collect();
        (timers.len() == 2).then_some(timers)
    });
    assert!(jiffies.iter().all(|jiffies| *jiffies <= 31 * 100), "{jiffies:?}");
}
