//! Waiting for endpoints and wake-ups.

mod support;

use llmscale_net::{EndpointOptions, Poller};
use std::time::{Duration, Instant};
use support::{DEADLINE, context, plain_client, plain_server, receive, send};

#[test]
fn a_wait_ends_at_its_time_out_and_not_before() {
    let context = context();
    let server = plain_server(&context, &EndpointOptions::default());
    let mut poller = Poller::new().expect("a poller");
    for wait_us in [0, 1, 1500, 20_000] {
        let start = Instant::now();
        let ready = poller.wait(&[server.poll_handle()], Some(wait_us)).expect("a wait");
        assert!(ready.is_timeout());
        assert_eq!(ready.endpoints, [false]);
        assert!(start.elapsed() >= Duration::from_micros(wait_us), "{wait_us} us took {:?}", start.elapsed());
    }
}

#[test]
fn a_wait_without_end_is_ended_by_a_wake_up_from_another_thread() {
    let context = context();
    let server = plain_server(&context, &EndpointOptions::default());
    let mut poller = Poller::new().expect("a poller");
    let waker = poller.waker();
    std::thread::scope(|scope| {
        scope.spawn(move || waker.wake());
        let ready = poller.wait(&[server.poll_handle()], None).expect("a wait");
        assert!(ready.woken);
        assert_eq!(ready.endpoints, [false]);
    });
    assert!(poller.wait(&[], Some(0)).expect("a wait").is_timeout());
}

#[test]
fn a_wake_up_before_the_wait_is_not_lost_and_counts_once() {
    let mut poller = Poller::new().expect("a poller");
    let waker = poller.waker();
    waker.wake();
    waker.wake();
    assert!(poller.wait(&[], None).expect("a wait").woken);
    assert!(!poller.wait(&[], Some(0)).expect("a wait").woken);
}

#[test]
fn only_the_endpoint_with_a_message_is_ready_and_stays_so_until_it_is_read() {
    let context = context();
    let mut servers: Vec<_> = (0..20).map(|_| plain_server(&context, &EndpointOptions::default())).collect();
    let mut client = plain_client(&context, servers[13].address(), &EndpointOptions::default());
    send(&mut client, b"hello".to_vec());
    let mut poller = Poller::new().expect("a poller");
    for _ in 0..3 {
        let handles: Vec<_> = servers.iter().map(llmscale_net::ServerEndpoint::poll_handle).collect();
        let start = Instant::now();
        let ready = poller.wait(&handles, Some(DEADLINE.as_micros() as u64)).expect("a wait");
        assert!(start.elapsed() < DEADLINE / 2, "a ready endpoint did not end the wait");
        let expected: Vec<bool> = (0..20).map(|index| index == 13).collect();
        assert_eq!(ready.endpoints, expected);
    }
    receive(&mut servers[13]);
    let handles: Vec<_> = servers.iter().map(llmscale_net::ServerEndpoint::poll_handle).collect();
    assert!(poller.wait(&handles, Some(0)).expect("a wait").is_timeout());
}

#[test]
fn connections_that_begin_and_end_wake_the_owner() {
    let context = context();
    let server = plain_server(&context, &EndpointOptions::default());
    let mut poller = Poller::new().expect("a poller");
    server.wake_on_connections(poller.waker());
    let mut until = |what: &str, condition: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !condition() {
            // No endpoint is polled, so that only the wake-up can end a wait.
            let ready = poller.wait(&[], Some(DEADLINE.as_micros() as u64)).expect("a wait");
            assert!(ready.woken && start.elapsed() < DEADLINE, "{what} woke nobody");
        }
    };
    let client = plain_client(&context, server.address(), &EndpointOptions::default());
    until("the handshake", &|| server.counters().admitted_peers == 1);
    drop(client);
    until("the end", &|| server.counters().open_connections() == 0);
}

/// Endpoints move between threads with everything they hold.
#[test]
fn an_endpoint_may_be_moved_to_the_thread_that_uses_it() {
    let context = context();
    let mut server = plain_server(&context, &EndpointOptions::default());
    let address = server.address().clone();
    let echo = std::thread::spawn(move || {
        let received = receive(&mut server);
        server.send(received.peer, received.message).expect("connected");
        // The answer is on its way only until the endpoint closes.
        support::until_counted(&mut server, "the client's end", |counters| counters.open_connections() == 0);
    });
    let mut client = plain_client(&context, &address, &EndpointOptions::default());
    send(&mut client, b"there and back".to_vec());
    assert_eq!(support::receive_answer(&mut client).payload, b"there and back");
    drop(client);
    echo.join().expect("the echo ended well");
}
