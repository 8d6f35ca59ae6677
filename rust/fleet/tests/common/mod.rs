//! A fleet of equal replicas and the needs of a small request.

use llmscale_fleet::{Fleet, Member, ModelKey, Need, Offer, PoolId, ReplicaLimits, ReplicaState};
use llmscale_types::{Duration, Epoch, NodeId, ReplicaId, RequestId, Time};
use std::sync::Arc;

pub(crate) fn model(name: &str) -> ModelKey {
    ModelKey {
        name: name.into(),
        revision: "main".into(),
        adapter: None,
        weights_digest: [1; 32],
        tokenizer_digest: [2; 32],
    }
}

pub(crate) fn offer(name: &str) -> Offer {
    Offer {
        node: NodeId(1),
        epoch: Epoch(1),
        model: model(name),
        numerics: "test".into(),
        limits: ReplicaLimits {
            vocabulary: 100,
            max_sequence_tokens: 1_000,
            max_sequences: 8,
            max_waiting_sequences: 4,
            total_blocks: 1_000,
            block_tokens: 32,
            eos_tokens: vec![0],
        },
        state: ReplicaState::Ready,
    }
}

pub(crate) fn need(pool: PoolId) -> Need {
    Need {
        request: RequestId(1),
        pool,
        total_tokens: 100,
        context_tokens: 50,
        output_tokens: 10,
        prefix: Arc::default(),
        numerics: None,
        look_ahead: Duration::from_millis(250),
        now: Time(1_000),
    }
}

pub(crate) fn fleet(replicas: u32) -> (Fleet, PoolId) {
    filled(Fleet::new(1_024), replicas)
}

pub(crate) fn filled(mut fleet: Fleet, replicas: u32) -> (Fleet, PoolId) {
    let mut pool = PoolId(0);
    for id in 0..replicas {
        pool = fleet.join(ReplicaId(id), offer("a")).expect("there is room");
    }
    (fleet, pool)
}

pub(crate) fn set(fleet: &mut Fleet, id: u32, change: impl FnOnce(&mut Member)) {
    change(&mut fleet.get_mut(ReplicaId(id)).expect("it joined"));
}
