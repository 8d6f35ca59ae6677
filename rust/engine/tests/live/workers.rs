//! Workers that are of no use: what a node does with them, and what its streams notice.

use super::worker::Lapses;
use super::{Node, Reader, config, front, limits, request, wait_until};
use llmscale_engine::{NodeConfig, NodeEvent, RankLinks};
use llmscale_front::ReplicaState;
use llmscale_net::link::WorkerSide as _;
use llmscale_net::link::socket::SocketWorker;
use llmscale_net::{AllowList, Context, EndpointOptions};
use llmscale_types::Duration;
use llmscale_wire::NodeState;

#[test]
fn a_worker_that_failed_is_given_up_before_its_process_is_dead() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker_that(60, Lapses::Lingers);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    for seed in 0..4 {
        reader.submit(&front, request(vec![9, seed as u32 + 1], seed, 300));
    }
    node.wait_for(|event| matches!(event, NodeEvent::WorkerFailed { message, .. } if message == "it lingers"));
    wait_until("the front sees that the node recovers", || {
        reader.read(&front);
        front.status().replicas.iter().any(|replica| replica.state == Some(ReplicaState::Recovering))
    });
    let status = |node: &Node| node.handle.report().expect("it reports").status;
    wait_until("nothing runs", || status(&node).running == 0 && status(&node).state == NodeState::Recovering);
    assert_eq!(status(&node).worker_restarts, 0, "it is not dead");
    node.bury(worker);
    let worker = node.give_worker(u64::MAX);
    reader.finish(&front);
    wait_until("the node reports", || status(&node).state == NodeState::Ready);
    assert_eq!(status(&node).worker_restarts, 1, "its death is counted once");
    node.bury(worker);
}

#[test]
fn a_worker_that_is_ready_twice_is_condemned_and_the_node_goes_on_with_the_next_one() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker_that(u64::MAX, Lapses::ReadyTwice);
    node.wait_for(
        |event| matches!(event, NodeEvent::WorkerFailed { message, .. } if message == "it said twice that it is ready"),
    );
    node.bury(worker);
    let worker = node.give_worker(u64::MAX);
    wait_until("the node is ready", || {
        node.handle.report().is_some_and(|report| report.status.state == NodeState::Ready)
    });
    node.bury(worker);
}

#[test]
fn a_group_of_which_a_rank_never_connects_is_condemned_by_the_name_of_that_rank() {
    let max_attach = Duration::from_millis(1_000);
    let config = NodeConfig { max_attach, ..config(1, limits()) };
    let mut node = Node::with_config(None, config, AllowList::default(), None);
    let ((first, address), (second, _)) = (node.listen(0), node.listen(1));
    let links = RankLinks::new(vec![Box::new(first), Box::new(second)], 0, node.epoch.next());
    node.configure(Box::new(links));
    let context = Context::new(AllowList::default(), 1).unwrap();
    let mut rank = SocketWorker::connect(&context, &address, None, &EndpointOptions::default()).unwrap();
    let mut said = String::new();
    wait_until("the node gives the group up", || {
        // Its greeting goes out when it first listens.
        assert_eq!(rank.receive(1_000).unwrap(), None, "the group is not whole");
        for event in node.handle.take_events() {
            if let NodeEvent::WorkerFailed { message, .. } = event {
                said = message;
            }
        }
        !said.is_empty()
    });
    assert_eq!(said, "rank 1 did not connect to the engine within 1 s");
}
