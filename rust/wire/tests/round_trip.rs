//! What is encoded is decoded to the same message, in bytes that another msgpack implementation reads too.

mod common;

use common::{from_node, from_worker, to_node, to_worker};
use llmscale_wire::{CodecLimits, Message, VersionRange, WireError, decode, decode_as, encode, encode_at};
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

proptest! {
    #[test]
    fn a_frame_is_of_the_version_that_was_agreed_and_a_handshake_always_of_the_first(
        message in to_node(), answer in from_node(), version in 1u8..=9, low in 1u8..=9, more in 0u8..=3
    ) {
        let spoken = VersionRange { low, high: low + more };
        agrees(version, spoken, &message)?;
        agrees(version, spoken, &answer)?;
    }
}

fn agrees<M: Message + PartialEq + std::fmt::Debug>(
    version: u8,
    spoken: VersionRange,
    message: &M,
) -> Result<(), TestCaseError> {
    let limits = CodecLimits::default();
    let frame = encode_at(version, message, &limits).expect("the message keeps the bounds");
    let written = if message.is_handshake() { 1 } else { version };
    prop_assert_eq!(frame[1], written);
    let read = decode_as::<M>(spoken, &frame, &limits);
    if message.is_handshake() || spoken.has(version) {
        prop_assert_eq!(&read.expect("it is spoken here"), message);
    } else {
        let refusal = WireError::UnsupportedVersion { given: version.into(), low: spoken.low, high: spoken.high };
        prop_assert_eq!(read, Err(refusal));
    }
    Ok(())
}
