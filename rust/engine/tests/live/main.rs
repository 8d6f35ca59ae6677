//! Goal: the live drivers carry requests from a front's thread to a worker's link and back, over real sockets, and keep
//! streams whole when workers and nodes die. Method: real threads, the hash worker as the model, waits on conditions.

mod greetings;
mod peer;
mod tenants;
mod worker;
mod workers;

use llmscale_engine::{
    Arrival, Command, Drained, FrontConfig, FrontHandle, MAX_ATTACH, NodeAddress, NodeConfig, NodeEvent, NodeHandle,
};
use llmscale_front::{EndReason, FrontEvent, FrontOptions, NewRequest, ReplicaState};
use llmscale_net::link::WorkerLink;
use llmscale_net::link::socket::SocketLink;
use llmscale_net::{Address, AllowList, Context, EndpointOptions, ServerKeys};
use llmscale_scheduler::Pace;
use llmscale_sim::hash_token;
use llmscale_types::{Class, Duration, EngineLimits, Epoch, FinishReason, NodeId, RequestId, Sampling, Token};
use llmscale_wire::{Configure, Dtype, ModelIdentity};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;
use worker::{Lapses, Worker};

const DEADLINE: std::time::Duration = std::time::Duration::from_mins(2);

fn limits() -> EngineLimits {
    EngineLimits {
        block_tokens: 8,
        host_blocks: 0,
        disk_blocks: 0,
        total_blocks: 256,
        max_sequences: 16,
        max_step_tokens: 64,
        max_sequence_tokens: 512,
        max_waiting_sequences: 64,
        max_steps_in_flight: 2,
        groups: 1,
        eos_tokens: Vec::new(),
        vocabulary: 1_000,
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::yield_now();
    }
}

fn config(node: u64, limits: EngineLimits) -> NodeConfig {
    NodeConfig {
        limits,
        model: ModelIdentity {
            name: "hash".to_owned(),
            revision: "1".to_owned(),
            adapter: None,
            weights_digest: [1; 32],
            tokenizer_digest: [2; 32],
            numerics: String::new(),
        },
        fleet: "test".to_owned(),
        node: NodeId(node),
        secret: [3; 32],
        disk_index: None,
        max_fronts: 4,
        max_front_silence: Duration::from_millis(10_000),
        status_interval: Duration::from_millis(50),
        max_step: Duration::from_millis(60_000),
        max_attach: MAX_ATTACH,
        pace: Pace::of(Duration::from_millis(20)),
    }
}

/// A node with the means to give it workers.
struct Node {
    handle: NodeHandle,
    context: Context,
    folder: TempDir,
    limits: EngineLimits,
    epoch: Epoch,
}

impl Node {
    fn start(address: Option<&Address>, node: u64) -> Self {
        Self::with_limits(address, node, limits())
    }

    fn with_limits(address: Option<&Address>, node: u64, limits: EngineLimits) -> Self {
        Self::with_keys(address, node, limits, AllowList::default(), None)
    }

    fn with_keys(
        address: Option<&Address>,
        node: u64,
        limits: EngineLimits,
        list: AllowList,
        keys: Option<&ServerKeys>,
    ) -> Self {
        Self::with_config(address, config(node, limits), list, keys)
    }

    fn with_config(address: Option<&Address>, config: NodeConfig, list: AllowList, keys: Option<&ServerKeys>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own: Address = format!("ipc://{}/node", folder.path().display()).parse().unwrap();
        let limits = config.limits.clone();
        let context = Context::new(list, 1).unwrap();
        let address = address.unwrap_or(&own);
        let handle = NodeHandle::start(config, &context, address, keys, &EndpointOptions::default()).unwrap();
        Self { handle, context, folder, limits, epoch: Epoch(0) }
    }

    fn give_worker(&mut self, steps: u64) -> Worker {
        self.give_worker_that(steps, Lapses::Never)
    }

    fn give_worker_that(&mut self, steps: u64, lapses: Lapses) -> Worker {
        let (link, address) = self.listen(0);
        self.configure(Box::new(link));
        Worker::start(&address, self.epoch, steps, lapses)
    }

    /// A link for a rank of the next worker.
    fn listen(&self, rank: u32) -> (SocketLink, Address) {
        let epoch = self.epoch.next();
        let path = format!("ipc://{}/worker-{epoch}-{rank}", self.folder.path().display());
        let (address, waker): (Address, _) = (path.parse().unwrap(), self.handle.link_waker());
        let link = SocketLink::listen(&self.context, &address, None, &EndpointOptions::default(), waker);
        (link.unwrap(), address)
    }

    /// Makes whoever connects to the link the next worker.
    fn configure(&mut self, link: Box<dyn WorkerLink>) {
        self.epoch = self.epoch.next();
        let epoch = self.epoch;
        let limits = self.limits.clone();
        let configure = Configure { epoch, model_folder: "/".to_owned(), dtype: Dtype::Float32, limits };
        let order = Command::WorkerStarted { epoch, link, configure: Box::new(configure) };
        assert!(self.handle.order(order));
    }

    fn bury(&self, worker: Worker) {
        worker.kill();
        assert!(self.handle.order(Command::WorkerDied(self.epoch)));
    }

    fn wait_for(&self, wanted: fn(&NodeEvent) -> bool) {
        wait_until("the node's event", || self.handle.take_events().iter().any(wanted));
    }
}

fn front(node: &NodeHandle) -> FrontHandle {
    let config = FrontConfig {
        name: "front".to_owned(),
        fleet: "test".to_owned(),
        options: FrontOptions::default(),
        secret: [3; 32],
        max_node_silence: Duration::from_millis(25_000),
    };
    let context = Context::new(AllowList::default(), 1).unwrap();
    let handle = FrontHandle::start(config, &context, &[NodeAddress { address: node.address().clone(), keys: None }]);
    let handle = handle.unwrap();
    wait_until("the front sees a ready replica", || {
        handle.status().replicas.iter().any(|replica| replica.state == Some(ReplicaState::Ready))
    });
    handle
}

fn request(prompt: Vec<Token>, seed: u64, max_tokens: u32) -> NewRequest {
    NewRequest {
        namespace: [5; 32],
        model: "hash".to_owned(),
        class: Class::Standard,
        prompt,
        prefix: Arc::default(),
        sampling: Sampling { seed, max_tokens, ..Sampling::default() },
        deadline: None,
        detached: false,
    }
}

/// Collects streams and checks every token against the model as it comes.
#[derive(Default)]
struct Reader {
    streams: BTreeMap<RequestId, (NewRequest, Vec<Token>, Option<EndReason>)>,
    restarts: u32,
}

impl Reader {
    fn submit(&mut self, front: &FrontHandle, new: NewRequest) {
        let id = front.submit(new.clone()).unwrap();
        self.streams.insert(id, (new, Vec::new(), None));
    }

    fn read(&mut self, front: &FrontHandle) {
        for Arrival { request, index, so_far, tokens, end, .. } in front.take() {
            let (new, seen, ended) = self.streams.get_mut(&request).expect("a stream that was asked for");
            assert_eq!((ended.is_none(), index as usize), (true, seen.len()), "request {request}");
            for token in tokens {
                let ids: Vec<Token> = new.prompt.iter().chain(seen.iter()).copied().collect();
                assert_eq!(token, hash_token(&ids, new.sampling.seed, 0, 1_000), "request {request}");
                seen.push(token);
            }
            front.event(FrontEvent::Read { request, up_to_index: seen.len() as u32 });
            self.restarts = self.restarts.max(so_far.restarts);
            if let Some((reason, output_tokens)) = end {
                assert_eq!(output_tokens as usize, seen.len());
                *ended = Some(reason);
            }
        }
    }

    fn tokens(&self) -> usize {
        self.streams.values().map(|stream| stream.1.len()).sum()
    }

    fn finish(&mut self, front: &FrontHandle) {
        wait_until("all streams end", || {
            self.read(front);
            self.streams.values().all(|stream| stream.2.is_some())
        });
        for (_, _, reason) in self.streams.values() {
            assert_eq!(*reason, Some(EndReason::Finished(FinishReason::Length)));
        }
    }
}

#[test]
fn requests_of_a_front_come_back_as_the_models_tokens() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    for seed in 0..20 {
        reader.submit(&front, request((1..=(seed as u32 % 9) * 11 + 1).collect(), seed, 40));
    }
    reader.finish(&front);
    node.bury(worker);
}

#[test]
fn streams_go_on_when_their_worker_dies_again_and_again() {
    // Workers that die by themselves, in the middle by their own count: a kill from here came after the last token when
    // this thread had to wait for a processor.
    let mut node = Node::start(None, 1);
    let mut worker = node.give_worker(60);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    for seed in 0..8 {
        reader.submit(&front, request(vec![9, seed as u32 + 1], seed, 300));
    }
    for steps in [60, 60, u64::MAX] {
        wait_until("the worker has died", || {
            reader.read(&front);
            worker.is_over()
        });
        node.bury(worker);
        worker = node.give_worker(steps);
    }
    reader.finish(&front);
    assert!(reader.restarts >= 1, "streams say what they survived");
    node.bury(worker);
}

#[test]
fn streams_go_on_when_a_worker_loses_the_order_of_steps_or_a_step_raises() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker_that(u64::MAX, Lapses::Now);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    for seed in 0..8 {
        reader.submit(&front, request(vec![9, seed as u32 + 1], seed, 300));
    }
    reader.finish(&front);
    let events = node.handle.take_events();
    let resets = |why: &str| {
        let said =
            |event: &&NodeEvent| matches!(event, NodeEvent::WorkerReset { message, .. } if message.contains(why));
        events.iter().filter(said).count()
    };
    assert!(resets("lost the order") > 0 && resets("it raised") > 0, "{events:?}");
    assert_eq!(reader.restarts, 0, "no worker was replaced");
    assert_eq!(node.handle.report().map(|report| report.status.worker_restarts), Some(0));
    node.bury(worker);
}

#[test]
fn a_model_that_gives_no_number_condemns_its_worker_instead_of_starting_for_ever() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker_that(u64::MAX, Lapses::Broken);
    node.wait_for(
        |event| matches!(event, NodeEvent::WorkerFailed { message, .. } if message.contains("ended with not_a_number")),
    );
    node.bury(worker);
    let worker = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    node.bury(worker);
}

#[test]
fn streams_go_on_when_their_node_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let address: Address = format!("ipc://{}/node", folder.path().display()).parse().unwrap();
    let mut node = Node::start(Some(&address), 1);
    let worker = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    for seed in 0..4 {
        reader.submit(&front, request(vec![4, seed as u32 + 1], seed, 400));
    }
    wait_until("the streams have begun", || {
        reader.read(&front);
        reader.tokens() > 40
    });
    worker.kill();
    drop(node);
    let mut successor = Node::start(Some(&address), 2);
    let worker = successor.give_worker(u64::MAX);
    reader.finish(&front);
    successor.bury(worker);
}

#[test]
fn a_cancelled_request_leaves_the_node_with_all_its_blocks() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let id = front.submit(request(vec![1, 2, 3], 1, 500)).unwrap();
    wait_until("a token has come", || !front.take().is_empty());
    front.event(FrontEvent::Cancel { request: id, at_token: None });
    wait_until("the node is empty", || {
        node.handle.report().is_some_and(|report| report.status.running == 0 && report.status.free_blocks == 256)
    });
    node.bury(worker);
}

#[test]
fn draining_lets_running_work_end_and_says_so() {
    let mut node = Node::start(None, 1);
    let worker = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    let mut reader = Reader::default();
    reader.submit(&front, request(vec![1, 2, 3], 1, 200));
    wait_until("the stream has begun", || {
        reader.read(&front);
        reader.tokens() > 0
    });
    let (max_drain, max_saving) = (Duration::from_millis(60_000), Duration::from_millis(5_000));
    assert!(node.handle.order(Command::Drain { max_drain, max_saving }));
    reader.finish(&front);
    node.wait_for(|event| {
        let nothing = Drained { saved_blocks: 0, unsaved_blocks: 0, cut_short: false };
        *event == NodeEvent::Drained(nothing)
    });
    node.bury(worker);
}

#[test]
fn a_thousand_requests_that_waited_for_a_node_reach_it_at_once() {
    let mut node = Node::with_limits(
        None,
        1,
        EngineLimits { max_sequences: 1_024, max_step_tokens: 2_048, total_blocks: 4_096, ..limits() },
    );
    let first = node.give_worker(u64::MAX);
    node.wait_for(|event| *event == NodeEvent::Ready);
    let front = front(&node.handle);
    node.bury(first);
    wait_until("the front sees that the node recovers", || {
        front.status().replicas.iter().any(|replica| replica.state == Some(ReplicaState::Recovering))
    });
    let mut reader = Reader::default();
    for seed in 0..1_000 {
        reader.submit(&front, request(vec![1, 2, 3], seed, 2));
    }
    let worker = node.give_worker(u64::MAX);
    reader.finish(&front);
    assert_eq!(front.status().counters.lost_attempts, 0, "{:?}", front.status().counters);
    node.bury(worker);
}
