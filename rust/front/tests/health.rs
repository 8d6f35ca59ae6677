//! Replicas that answer badly are left alone; what runs there stays, and nobody waits for them longer than it has to.

mod common;

use common::{Bench, new_request};
use llmscale_front::{FrontEvent, FrontOptions, Trust};
use llmscale_types::{Duration, Refusal, RequestId, Time};

impl Bench {
    fn trust(&self, replica: usize) -> Trust {
        self.front.status(self.now).replicas[replica].trust
    }

    /// Where the newest attempts went.
    fn placed(&mut self) -> Vec<(u32, RequestId, u32)> {
        let submissions = self.submissions().into_iter();
        submissions.map(|(replica, sent)| (replica, sent.key.request, sent.key.attempt.0)).collect()
    }

    /// Submits until one request is the probe of a replica that may be tried.
    fn take_probe(&mut self, replica: usize) -> RequestId {
        for _ in 0..10 {
            self.take(new_request(4));
            if let Trust::Probing { request } = self.trust(replica) {
                return request;
            }
        }
        panic!("nobody tries replica {replica}");
    }

    /// A replica says of every attempt there that it knows it already, until it is left alone.
    fn refuse_until_ejected(&mut self, replica: u32) {
        for _ in 0..40 {
            if self.trust(replica as usize) != Trust::Trusted {
                return;
            }
            self.take(new_request(4));
            for (at, request, attempt) in self.placed() {
                if at == replica {
                    self.give_back(replica, request, attempt, Some(Refusal::Duplicate));
                } else {
                    self.event(FrontEvent::Cancel { request, at_token: None });
                }
            }
            for (_, request, _) in self.placed() {
                self.event(FrontEvent::Cancel { request, at_token: None });
            }
        }
        panic!("replica {replica} is still trusted");
    }
}

#[test]
fn a_replica_that_refuses_what_it_should_take_is_left_alone_and_its_requests_go_elsewhere() {
    let mut bench = Bench::with_replicas(2);
    bench.refuse_until_ejected(0);
    let status = bench.front.status(bench.now);
    assert_eq!((status.health.ejections, status.replicas[0].ejections), (1, 1));
    assert!(status.replicas[0].tally.failures >= 5);
    let requests = bench.take_many(3, &new_request(4));
    let sent = bench.placed();
    assert!(requests.iter().all(|id| sent.iter().any(|(replica, request, _)| (*replica, request) == (1, id))));
}

#[test]
fn the_only_replica_keeps_its_work_whatever_it_does() {
    let mut bench = Bench::with_replicas(1);
    for _ in 0..20 {
        let id = bench.take(new_request(4));
        let (_, request, attempt) = *bench.placed().last().expect("it is sent at once");
        assert_eq!(request, id);
        bench.give_back(0, request, attempt, Some(Refusal::Duplicate));
        bench.event(FrontEvent::Cancel { request: id, at_token: None });
        bench.placed();
    }
    assert_eq!(bench.trust(0), Trust::Trusted);
}

#[test]
fn a_stream_stays_on_a_replica_that_is_left_alone_and_is_still_watched() {
    let options = FrontOptions { max_silence: Duration::from_millis(1_000), ..FrontOptions::default() };
    let mut bench = Bench::new(options);
    bench.up(0);
    let stream = bench.take(new_request(8));
    let refused = bench.take_many(3, &new_request(4));
    bench.token(0, stream, 1, 0, 50);
    refused[..2]
        .iter()
        .for_each(|&id| (1..3).for_each(|attempt| bench.give_back(0, id, attempt, Some(Refusal::Duplicate))));
    bench.up(1);
    assert_eq!(bench.trust(0), Trust::Trusted, "the only one until now");
    bench.give_back(0, refused[2], 1, Some(Refusal::Duplicate));
    assert!(matches!(bench.trust(0), Trust::Ejected { .. }));
    for request in refused {
        bench.event(FrontEvent::ClientGone { request });
    }
    bench.token(0, stream, 1, 1, 51);
    assert_eq!(bench.delivered[&stream], [50, 51]);
    bench.placed();
    bench.pass(Duration::from_millis(3_000));
    bench.pass(Duration::from_millis(1_000));
    assert_eq!(bench.front.counters().silences, 1, "a silent stream is given up there as anywhere");
    assert_eq!(bench.placed().last().map(|&(replica, request, _)| (replica, request)), Some((1, stream)));
}

#[test]
fn a_request_that_waits_is_the_probe_as_soon_as_the_span_is_over() {
    let mut bench = Bench::with_replicas(2);
    bench.refuse_until_ejected(0);
    let many = bench.take_many(40, &new_request(4));
    let queued = bench.front.status(bench.now).queued_requests;
    assert!(queued > 0, "one replica alone cannot begin {} requests", many.len());
    bench.placed();
    let Trust::Ejected { until } = bench.trust(0) else { panic!("it was just ejected") };
    bench.now = Time(until.0 - 1);
    bench.event(FrontEvent::Tick);
    assert!(bench.placed().iter().all(|&(replica, ..)| replica == 1));
    bench.pass(Duration(1));
    let probes: Vec<_> = bench.placed().into_iter().filter(|&(replica, ..)| replica == 0).collect();
    let [(_, request, attempt)] = probes[..] else { panic!("one probe at a time: {probes:?}") };
    assert_eq!(bench.trust(0), Trust::Probing { request });
    bench.token(0, request, attempt, 0, 9);
    assert_eq!(bench.trust(0), Trust::Trusted);
    assert!(bench.placed().iter().any(|&(replica, ..)| replica == 0), "it gets work again");
}

#[test]
fn a_probe_whose_client_leaves_decides_nothing() {
    let mut bench = Bench::with_replicas(2);
    bench.refuse_until_ejected(0);
    let Trust::Ejected { until } = bench.trust(0) else { panic!("it was just ejected") };
    bench.now = until;
    let first = bench.take_probe(0);
    bench.event(FrontEvent::ClientGone { request: first });
    assert!(matches!(bench.trust(0), Trust::Ejected { .. }));
    let second = bench.take_probe(0);
    assert_ne!(first, second);
}

#[test]
fn a_node_that_dies_over_and_over_is_left_alone_when_it_comes_back_and_one_that_died_once_is_not() {
    let mut bench = Bench::with_replicas(3);
    for round in 0..5 {
        assert_eq!(bench.trust(0), Trust::Trusted, "after {round} deaths");
        bench.down(0);
        bench.up(0);
    }
    assert!(matches!(bench.trust(0), Trust::Ejected { .. }));
}
