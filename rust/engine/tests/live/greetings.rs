//! Who greets a node before it has had a worker.

use super::peer::Peer;
use super::{Node, wait_until};
use llmscale_wire::{FromNode, RejectCode, Rejected, ToNode};

/// A peer whose greeting has been read and not been answered.
fn early(node: &Node) -> Peer {
    let mut peer = Peer::connect(node, None);
    // The second greeting is refused at once, which says that the first was read.
    for fleet in ["test", "another"] {
        peer.greet(fleet);
    }
    peer.hears("a refusal", is_wrong_fleet);
    peer
}

fn is_wrong_fleet(frame: &FromNode) -> bool {
    matches!(frame, FromNode::Rejected(Rejected { code: RejectCode::WrongFleet, .. }))
}

#[test]
fn a_front_that_greets_before_there_is_a_worker_is_welcome_when_there_is_one() {
    let mut node = Node::start(None, 1);
    let mut peer = early(&node);
    let worker = node.give_worker(u64::MAX);
    peer.hears("a welcome", |frame| matches!(frame, FromNode::Welcome(_)));
    node.bury(worker);
}

#[test]
fn greetings_of_fronts_that_are_gone_do_not_keep_a_later_one_from_being_welcome() {
    let mut node = Node::start(None, 1);
    // As many as the node serves.
    drop([(); 4].map(|()| early(&node)));
    let mut peer = early(&node);
    let worker = node.give_worker(u64::MAX);
    peer.hears("a welcome", |frame| matches!(frame, FromNode::Welcome(_)));
    wait_until("those that are gone are forgotten", || node.handle.report().is_some_and(|report| report.fronts == 1));
    node.bury(worker);
}

#[test]
fn a_front_that_says_goodbye_before_there_is_a_worker_is_not_welcome_when_there_is_one() {
    let mut node = Node::start(None, 1);
    let (mut leaver, mut peer) = (early(&node), early(&node));
    leaver.say(&ToNode::Goodbye);
    // Refused, which says that the goodbye was read.
    leaver.greet("another");
    leaver.hears("a refusal", is_wrong_fleet);
    let worker = node.give_worker(u64::MAX);
    peer.hears("a welcome", |frame| matches!(frame, FromNode::Welcome(_)));
    leaver.greet("another");
    leaver.hears("a refusal", is_wrong_fleet);
    // Neither is its goodbye refused.
    assert!(leaver.heard.iter().all(is_wrong_fleet), "{:?}", leaver.heard);
    node.bury(worker);
}
