//! Everything that can happen to a front, as random values: mostly work and mail, now and then a disaster.

use crate::MODELS;
use crate::fake::VOCABULARY;
use llmscale_front::{NewRequest, ReplicaState};
use llmscale_types::error::QueueUnit;
use llmscale_types::{Class, Duration, Refusal, Sampling};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Submit { new: Box<NewRequest>, timeout_us: Option<u64> },
    Receive(usize),
    Step { replica: usize, tokens: u32 },
    Deliver(usize),
    Lose(usize),
    Ghost(Index),
    Crash { replica: usize, noticed: bool },
    Up(usize),
    WorkerRestart(usize),
    Refuse { replica: usize, refusal: Refusal },
    Status { replica: usize, state: ReplicaState },
    Drain(usize),
    Cancel { request: Index, at_token: Option<u32> },
    Gone(Index),
    Detach(Index),
    Attach { request: Index, from_index: u32 },
    Read { request: Index, up_to_index: u32 },
    Pass(u64),
}

fn submit() -> impl Strategy<Value = Happening> {
    (
        select(Class::ALL.to_vec()),
        prop::collection::vec(1..VOCABULARY, 1..12),
        1_u32..14,
        any::<u64>(),
        prop::option::weighted(0.3, 1_u64..3_000_000),
        prop::bool::weighted(0.15),
        prop_oneof![6 => Just("tiny"), 3 => Just("mini"), 1 => Just("none")],
        prop_oneof![20 => Just(None), 1 => Just(Some(VOCABULARY)), 1 => Just(Some(1))],
    )
        .prop_map(|(class, mut prompt, mut max_tokens, seed, timeout_us, detached, model, spoil)| {
            match spoil {
                Some(VOCABULARY) => prompt.push(VOCABULARY),
                Some(_) => max_tokens = 60,
                None => {}
            }
            let sampling = Sampling { max_tokens, seed, ..Sampling::default() };
            let (namespace, model) = ([0; 32], model.into());
            let new = NewRequest {
                namespace,
                model,
                class,
                prompt,
                prefix: std::sync::Arc::default(),
                sampling,
                deadline: None,
                detached,
            };
            Happening::Submit { new: Box::new(new), timeout_us }
        })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let full = |ms| {
        let retry_after = Duration::from_millis(ms);
        Refusal::QueueFull { queued: 1, limit: 1, unit: QueueUnit::Requests, retry_after }
    };
    prop_oneof![
        (10_u64..500).prop_map(full),
        select(vec![
            Refusal::Draining,
            Refusal::Duplicate,
            Refusal::BadSampling,
            Refusal::TooLong { needed: 2, limit: 1 }
        ]),
    ]
}

/// Anything that may happen.
pub(crate) fn happening() -> impl Strategy<Value = Happening> {
    let replica = || 0..MODELS.len();
    let request = any::<Index>;
    let states = vec![
        ReplicaState::Ready,
        ReplicaState::Ready,
        ReplicaState::Recovering,
        ReplicaState::Draining,
        ReplicaState::Starting,
    ];
    prop_oneof![
        12 => submit(),
        16 => replica().prop_map(Happening::Receive),
        16 => (replica(), 1_u32..3).prop_map(|(replica, tokens)| Happening::Step { replica, tokens }),
        20 => replica().prop_map(Happening::Deliver),
        1 => replica().prop_map(Happening::Lose),
        2 => any::<Index>().prop_map(Happening::Ghost),
        1 => (replica(), any::<bool>()).prop_map(|(replica, noticed)| Happening::Crash { replica, noticed }),
        4 => replica().prop_map(Happening::Up),
        1 => replica().prop_map(Happening::WorkerRestart),
        1 => (replica(), refusal()).prop_map(|(replica, refusal)| Happening::Refuse { replica, refusal }),
        2 => (replica(), select(states)).prop_map(|(replica, state)| Happening::Status { replica, state }),
        1 => replica().prop_map(Happening::Drain),
        1 => (request(), prop::option::of(0_u32..10)).prop_map(|(request, at_token)| Happening::Cancel { request, at_token }),
        1 => request().prop_map(Happening::Gone),
        1 => request().prop_map(Happening::Detach),
        2 => (request(), 0_u32..10).prop_map(|(request, from_index)| Happening::Attach { request, from_index }),
        3 => (request(), 0_u32..16).prop_map(|(request, up_to_index)| Happening::Read { request, up_to_index }),
        4 => prop_oneof![1_u64..50_000, 100_000_u64..700_000].prop_map(Happening::Pass),
    ]
}
