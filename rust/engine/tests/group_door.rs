//! Goal: the hosts of one replica hear each other at the door, and nobody else is heard there. Method: real sockets on
//! loopback, with and without keys, waits on conditions.

use llmscale_engine::group_door::{Heard, MAX_FRAME_BYTES};
use llmscale_engine::{GroupDoor, GroupKeys};
use llmscale_net::{Address, KeyPair};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

fn eventually<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = step() {
            return value;
        }
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        // Whoever says something again and again leaves the other side time to hear it.
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

fn leader(keys: &GroupKeys) -> GroupDoor {
    GroupDoor::listen(&Address::loopback(), keys).expect("a free port")
}

fn follower(leader: &GroupDoor, keys: &GroupKeys) -> GroupDoor {
    GroupDoor::connect(leader.address(), keys).expect("a follower")
}

/// Says it again until the other side has heard it: a frame that cannot pass yet is dropped.
fn says(from: &GroupDoor, to: &GroupDoor, frame: &[u8]) -> Heard {
    eventually("the frame arrives", || {
        assert!(from.send(None, frame.to_vec()));
        // Frames that others said several times may still come in.
        to.take().into_iter().find(|(_, heard)| heard == frame)
    })
}

fn fleet() -> GroupKeys {
    GroupKeys::new(Some(KeyPair::generate().expect("random numbers")))
}

#[test]
fn hosts_with_the_same_key_hear_each_other_and_answers_go_to_the_one_who_asked() {
    for keys in [GroupKeys::default(), fleet()] {
        let leader = leader(&keys);
        let (first, second) = (follower(&leader, &keys), follower(&leader, &keys));
        let (one, frame) = says(&first, &leader, b"first");
        assert_eq!(frame, b"first");
        leader.take();
        let (two, _) = says(&second, &leader, b"second");
        assert!(one.is_some() && two.is_some() && one != two);
        assert!(leader.send(two, b"for the second".to_vec()));
        let answer = eventually("the answer", || second.take().pop());
        assert_eq!(answer, (None, b"for the second".to_vec()));
        assert!(first.take().is_empty());
        eventually("it is known to be connected", || first.is_connected().then_some(()));
    }
}

#[test]
fn a_host_without_the_fleets_node_key_is_not_heard_and_its_refusal_is_counted() {
    let keys = fleet();
    let leader = leader(&keys);
    let strangers = [follower(&leader, &fleet()), follower(&leader, &GroupKeys::default())];
    eventually("both are refused", || {
        for stranger in &strangers {
            stranger.send(None, b"let me in".to_vec());
        }
        (leader.refusals() >= 2).then_some(())
    });
    says(&follower(&leader, &keys), &leader, b"a host of the fleet");
    assert!(leader.take().iter().all(|(_, frame)| frame == b"a host of the fleet"));
    assert!(strangers.iter().all(|stranger| stranger.take().is_empty()));
}

#[test]
fn a_connection_that_has_ended_is_reported_when_it_is_spoken_to() {
    let keys = GroupKeys::default();
    let leader = leader(&keys);
    let (goes, stays) = (follower(&leader, &keys), follower(&leader, &keys));
    let (gone, _) = says(&goes, &leader, b"here");
    let (there, _) = says(&stays, &leader, b"here too");
    drop(goes);
    let ended = eventually("its end shows", || {
        assert!(leader.send(gone, b"are you there?".to_vec()));
        assert!(leader.send(there, b"are you there?".to_vec()));
        Some(leader.take_ended()).filter(|ended| !ended.is_empty())
    });
    assert_eq!(Some(ended[0]), gone);
    assert_eq!(ended.len(), 1);
}

#[test]
fn a_peer_that_is_ignored_is_not_heard_any_more_and_others_are() {
    let keys = GroupKeys::default();
    let leader = leader(&keys);
    let (bad, good) = (follower(&leader, &keys), follower(&leader, &keys));
    let (peer, _) = says(&bad, &leader, b"nonsense");
    assert!(leader.ignore(peer.expect("a leader's peers have numbers")));
    // What was on its way before the order is still heard.
    eventually("it is quiet", || {
        bad.send(None, b"more nonsense".to_vec());
        says(&good, &leader, b"sense");
        let heard = leader.take();
        heard.iter().all(|(_, frame)| frame == b"sense").then_some(())
    });
}

#[test]
fn a_frame_over_the_limit_is_not_taken_and_one_at_the_limit_passes() {
    let keys = GroupKeys::default();
    let leader = leader(&keys);
    let follower = follower(&leader, &keys);
    assert!(!follower.send(None, vec![1; MAX_FRAME_BYTES as usize + 1]));
    let (_, frame) = says(&follower, &leader, &vec![1; MAX_FRAME_BYTES as usize]);
    assert_eq!(frame.len() as u64, MAX_FRAME_BYTES);
}

#[test]
fn a_follower_finds_a_leader_that_comes_later_or_again_and_says_whether_it_is_there() {
    let keys = GroupKeys::default();
    let address = leader(&keys).address().clone();
    let follower = GroupDoor::connect(&address, &keys).expect("nobody has to be there");
    assert!(!follower.is_connected());
    for life in 1..=2_u8 {
        let leader = eventually("the port is free again", || GroupDoor::listen(&address, &keys).ok());
        assert_eq!(says(&follower, &leader, &[life]).1, [life]);
        eventually("it is connected", || follower.is_connected().then_some(()));
        drop(leader);
        eventually("it has noticed", || (!follower.is_connected()).then_some(()));
    }
}

#[test]
fn an_address_that_others_reach_is_refused_without_keys() {
    let open: Address = "tcp://0.0.0.0:*".parse().expect("an address");
    assert!(GroupDoor::listen(&open, &GroupKeys::default()).is_err_and(|error| error.to_string().contains("CURVE")));
    assert!(GroupDoor::listen(&open, &fleet()).is_ok());
}
