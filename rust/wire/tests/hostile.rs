//! Bytes that no honest peer sends: refused with a typed error, never a panic.

mod common;

use common::{from_node, from_worker, to_node, to_worker};
use llmscale_types::{Attempt, LimitError, NodeId, Outputs, RequestId};
use llmscale_wire::{
    CodecLimits, FromNode, FromWorker, Hello, Message, NodeOutputs, Ping, ToNode, ToWorker, VERSIONS, WireError,
    decode, encode,
};
use proptest::prelude::*;

fn limits() -> CodecLimits {
    CodecLimits::default()
}

/// Decodes as every direction; a frame that one takes must be one that it can make.
fn is_handled(bytes: &[u8]) {
    fn by<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        if let Ok(message) = decode::<M>(bytes, &limits()) {
            encode(&message, &limits()).expect("what is taken can be made");
        }
    }
    by::<ToNode>(bytes);
    by::<FromNode>(bytes);
    by::<ToWorker>(bytes);
    by::<FromWorker>(bytes);
}

#[derive(Clone, Debug)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Truncate(prop::sample::Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let place = any::<prop::sample::Index>;
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|(place, byte)| Mutation::Set(place, byte)),
        1 => (place(), any::<u8>()).prop_map(|(place, byte)| Mutation::Insert(place, byte)),
        1 => place().prop_map(Mutation::Remove),
        1 => place().prop_map(Mutation::Truncate),
    ]
}

fn mutate(frame: &mut Vec<u8>, mutations: &[Mutation]) {
    for mutation in mutations {
        if frame.is_empty() {
            return;
        }
        let length = frame.len();
        match mutation {
            Mutation::Set(place, byte) => frame[place.index(length)] = *byte,
            Mutation::Insert(place, byte) => frame.insert(place.index(length), *byte),
            Mutation::Remove(place) => drop(frame.remove(place.index(length))),
            Mutation::Truncate(place) => frame.truncate(place.index(length)),
        }
    }
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        to_node().prop_map(|message| encode(&message, &limits()).expect("within bounds")),
        from_node().prop_map(|message| encode(&message, &limits()).expect("within bounds")),
        to_worker().prop_map(|message| encode(&message, &limits()).expect("within bounds")),
        from_worker().prop_map(|message| encode(&message, &limits()).expect("within bounds")),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), framed in any::<bool>(), tag in 0_u8..8) {
        if framed && bytes.len() >= 3 {
            bytes[..3].copy_from_slice(&[0x93, 1, tag]);
        }
        is_handled(&bytes);
    }

    #[test]
    fn mutated_frames_never_panic(mut frame in any_frame(), mutations in prop::collection::vec(mutation(), 1..4)) {
        mutate(&mut frame, &mutations);
        is_handled(&frame);
    }

    #[test]
    fn a_frame_cut_anywhere_is_refused(frame in any_frame(), place in any::<prop::sample::Index>()) {
        let cut = &frame[..place.index(frame.len())];
        prop_assert!(decode::<ToNode>(cut, &limits()).is_err());
        prop_assert!(decode::<FromNode>(cut, &limits()).is_err());
        prop_assert!(decode::<ToWorker>(cut, &limits()).is_err());
        prop_assert!(decode::<FromWorker>(cut, &limits()).is_err());
    }
}

#[test]
fn pickles_of_every_protocol_are_refused() {
    // pickle.dumps({"a": [1, 2.5, "x"]}, protocol) of CPython, protocols 0 to 5.
    let pickles: [&[u8]; 6] = [
        b"(dp0\nVa\np1\n(lp2\nI1\naF2.5\naVx\np3\nas.",
        b"}q\x00X\x01\x00\x00\x00aq\x01]q\x02(K\x01G@\x04\x00\x00\x00\x00\x00\x00X\x01\x00\x00\x00xq\x03es.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01]q\x02(K\x01G@\x04\x00\x00\x00\x00\x00\x00X\x01\x00\x00\x00xq\x03es.",
        b"\x80\x03}q\x00X\x01\x00\x00\x00aq\x01]q\x02(K\x01G@\x04\x00\x00\x00\x00\x00\x00X\x01\x00\x00\x00xq\x03es.",
        b"\x80\x04\x95\x19\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94]\x94(K\x01G@\x04\x00\x00\x00\x00\x00\x00\x8c\x01x\x94es.",
        b"\x80\x05\x95\x19\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94]\x94(K\x01G@\x04\x00\x00\x00\x00\x00\x00\x8c\x01x\x94es.",
    ];
    for bytes in pickles {
        assert_eq!(decode::<ToNode>(bytes, &limits()), Err(WireError::NotAFrame));
        assert_eq!(decode::<FromWorker>(bytes, &limits()), Err(WireError::NotAFrame));
    }
}

#[test]
fn an_unknown_tag_is_named() {
    let frame = [0x93, 1, 99, 0x90];
    assert_eq!(decode::<ToNode>(&frame, &limits()), Err(WireError::UnknownTag { direction: "ToNode", given: 99 }));
}

#[test]
fn an_unknown_version_is_named() {
    let frame = [0x93, 2, 5, 0x90];
    let refusal = WireError::UnsupportedVersion { given: 2, low: 1, high: 1 };
    assert_eq!(decode::<ToNode>(&frame, &limits()), Err(refusal));
    assert_eq!(decode::<ToNode>(&[0x93, 1, 5, 0x90], &limits()), Ok(ToNode::Goodbye));
}

#[test]
fn a_message_of_the_other_direction_is_refused() {
    let frame = encode(&ToNode::Ping(Ping { nonce: 7 }), &limits()).expect("within bounds");
    // Tag 4 is a pong with three fields in the other direction.
    assert_eq!(
        decode::<FromNode>(&frame, &limits()),
        Err(WireError::FieldCount { record: "Pong", given: 1, expected: 3 })
    );
}

#[test]
fn columns_of_different_lengths_are_refused_in_both_directions() {
    let outputs =
        Outputs { requests: vec![RequestId(1), RequestId(2)], attempts: vec![Attempt(1)], ..Outputs::default() };
    let frame = FromNode::Outputs(NodeOutputs { node: NodeId(1), epoch: llmscale_types::Epoch(1), outputs });
    let refusal = WireError::ColumnLength { column: "attempts", given: 1, expected: 2 };
    assert_eq!(encode(&frame, &limits()), Err(refusal.clone()));
    // [1, 1, [node, epoch, [step, requests, attempts, indexes, tokens, logprobs, cached, finished]]]
    let bytes = [0x93, 1, 1, 0x93, 1, 1, 0x98, 0, 0x92, 1, 2, 0x91, 1, 0x92, 0, 0, 0x92, 5, 6, 0x90, 0x90, 0x90];
    assert_eq!(decode::<FromNode>(&bytes, &limits()), Err(refusal));
}

#[test]
fn what_names_a_row_twice_or_one_that_is_not_there_is_refused() {
    let outputs = |cached: &[(u32, u32)]| {
        let outputs = Outputs {
            requests: vec![RequestId(1), RequestId(2)],
            attempts: vec![Attempt(1); 2],
            indexes: vec![0; 2],
            tokens: vec![5, 6],
            cached: cached.to_vec(),
            ..Outputs::default()
        };
        FromNode::Outputs(NodeOutputs { node: NodeId(1), epoch: llmscale_types::Epoch(1), outputs })
    };
    let frame = encode(&outputs(&[(0, 32), (1, 64)]), &limits()).expect("each row once");
    assert_eq!(decode::<FromNode>(&frame, &limits()), Ok(outputs(&[(0, 32), (1, 64)])));
    let twice = WireError::NotAscending { column: "cached" };
    assert_eq!(encode(&outputs(&[(1, 32), (1, 64)]), &limits()), Err(twice));
    let absent = WireError::Limit(LimitError::TooLarge { field: "cached row", given: 2, limit: 1 });
    assert_eq!(encode(&outputs(&[(2, 32)]), &limits()), Err(absent.clone()));
    let row = frame.len() - 7;
    assert_eq!(frame[row..row + 5], [0x92, 0, 32, 0x92, 1]);
    let mut changed = frame;
    changed[row + 4] = 2;
    assert_eq!(decode::<FromNode>(&changed, &limits()), Err(absent));
}

#[test]
fn a_name_one_byte_over_its_limit_is_refused_in_both_directions() {
    let hello = |length| {
        ToNode::Hello(Hello { versions: VERSIONS, front: "f".repeat(length), fleet: String::new(), model: None })
    };
    let longest = encode(&hello(256), &limits()).expect("256 bytes are allowed");
    assert_eq!(decode::<ToNode>(&longest, &limits()), Ok(hello(256)));
    let refusal = WireError::Limit(LimitError::TooLarge { field: "front", given: 257, limit: 256 });
    assert_eq!(encode(&hello(257), &limits()), Err(refusal.clone()));
    let wide = CodecLimits { max_name_bytes: 1_000, ..limits() };
    let frame = encode(&hello(257), &wide).expect("within the wider bound");
    assert_eq!(decode::<ToNode>(&frame, &limits()), Err(refusal));
}

#[test]
fn a_prompt_longer_than_its_context_is_refused() {
    // Submit with an empty context and one prompt token; would make the count of emitted tokens negative.
    let mut frame = vec![0x93, 1, 1, 0x99, 1, 1, 0xc4, 32];
    frame.extend([0; 32]);
    frame.extend([1, 0x90, 1]);
    frame.extend([0x9f, 0xca, 0, 0, 0, 0, 0, 0xca, 0, 0, 0, 0, 0xca, 0, 0, 0, 0, 0xca, 0, 0, 0, 0]);
    frame.extend([0xca, 0, 0, 0, 0, 0xca, 0, 0, 0, 0, 0, 0, 0xc0, 0x90, 1, 0, 0x90, 0xc2, 0xc0, 0xc2]);
    let refusal = WireError::Limit(LimitError::TooLarge { field: "prompt_tokens", given: 1, limit: 0 });
    assert_eq!(decode::<ToNode>(&frame, &limits()), Err(refusal));
}

#[test]
fn a_greeting_of_a_later_version_with_more_fields_is_read() {
    let hello = ToNode::Hello(Hello { versions: VERSIONS, front: "a".into(), fleet: "b".into(), model: None });
    let mut frame = encode(&hello, &limits()).expect("within bounds");
    assert_eq!(frame[3], 0x94);
    frame[3] = 0x96;
    frame.extend([0x92, 1, 0xa1, b'x', 0xc0]);
    assert_eq!(decode::<ToNode>(&frame, &limits()), Ok(hello));
}
