//! Who greets a node before it has had a worker.

use super::Node;
use super::peer::Peer;
use llmscale_wire::FromNode;

#[test]
fn a_front_that_greets_before_there_is_a_worker_is_welcome_when_there_is_one() {
    let mut node = Node::start(None, 1);
    let mut peer = Peer::connect(&node, None);
    // The second greeting is refused at once, which says that the first was read.
    for fleet in ["test", "another"] {
        peer.greet(fleet);
    }
    peer.hears("a refusal", |frame| matches!(frame, FromNode::Rejected(_)));
    let worker = node.give_worker(u64::MAX);
    peer.hears("a welcome", |frame| matches!(frame, FromNode::Welcome(_)));
    node.bury(worker);
}
