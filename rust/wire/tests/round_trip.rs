//! What is encoded is decoded to the same message, in bytes that another msgpack implementation reads too.

mod common;

use common::{from_node, from_worker, to_node, to_worker};
use llmscale_wire::{CodecLimits, Message, WireError, decode, encode};
use proptest::prelude::*;
use serde::de::IgnoredAny;

fn survives<M: Message + PartialEq + std::fmt::Debug>(message: &M) -> Result<(), TestCaseError> {
    let limits = CodecLimits::default();
    let frame = encode(message, &limits).expect("the message keeps the bounds");
    let (version, tag, _): (u8, u8, IgnoredAny) = rmp_serde::from_slice(&frame).expect("a peer's msgpack reads it");
    prop_assert_eq!(version, 1);
    prop_assert!(tag < 8);
    prop_assert_eq!(&decode::<M>(&frame, &limits).expect("our own frame is taken"), message);
    // The bounds are applied at the exact length on both sides.
    let exact = CodecLimits { max_frame_bytes: frame.len(), ..limits };
    prop_assert!(encode(message, &exact).is_ok() && decode::<M>(&frame, &exact).is_ok());
    let short = CodecLimits { max_frame_bytes: frame.len() - 1, ..limits };
    let refusal = WireError::TooLarge { given: frame.len(), limit: frame.len() - 1 };
    prop_assert_eq!(encode(message, &short), Err(refusal.clone()));
    prop_assert_eq!(decode::<M>(&frame, &short).map(|_| ()), Err(refusal));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_message_to_a_node_survives_the_wire(message in to_node()) {
        survives(&message)?;
    }

    #[test]
    fn every_message_from_a_node_survives_the_wire(message in from_node()) {
        survives(&message)?;
    }

    #[test]
    fn every_message_to_a_worker_survives_the_wire(message in to_worker()) {
        survives(&message)?;
    }

    #[test]
    fn every_message_from_a_worker_survives_the_wire(message in from_worker()) {
        survives(&message)?;
    }
}
