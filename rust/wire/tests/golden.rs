//! The bytes of version 1, kept: every message encodes to the file that was written when the version was made, and the
//! file decodes to the message. Another implementation reads the same files in `tests/unit/test_wire_golden.py`.
//!
//! A file is written once, when its message is added: `cargo test -p llmscale-wire --test golden -- --ignored`. A change
//! of an existing file is a change of the protocol and needs a new version.

use llmscale_types::error::QueueUnit;
use llmscale_types::{
    Admission, Attempt, BlockCopy, BlockId, Chunk, Class, CopyDirection, Delta, DiskBlockId, DiskDirection, DiskReport,
    DiskTransfer, Duration, EngineLimits, Epoch, FinishReason, Finished, GroupId, HostBlockId, NodeId, Outputs,
    PrefixKey, Refusal, RequestId, RowError, Sampling, Slot, StepId, StepResult, TokenLogprobs,
};
use llmscale_wire::{
    Abort, CodecLimits, Configure, Dtype, Failed, FailureCode, FromNode, FromWorker, GiveBack, Hello, KvAsk, KvChanges,
    KvSnapshot, Message, ModelIdentity, ModelRef, NeedSnapshot, NodeLimits, NodeOutputs, NodeState, Ping, Pong, Ready,
    Recall, RejectCode, Rejected, Status, Submit, ToNode, ToWorker, VersionRange, Welcome, decode, encode,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const NODE: NodeId = NodeId(0x0123_4567_89ab_cdef);
const EPOCH: Epoch = Epoch(3);

fn folder() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().expect("the crate is where it was built");
    manifest.join("../../tests/golden/wire/v1")
}

fn digest(first: u8) -> [u8; 32] {
    std::array::from_fn(|place| first.wrapping_add(place as u8))
}

fn full_sampling() -> Sampling {
    Sampling {
        temperature: 0.75,
        top_k: 40,
        top_p: 0.875,
        min_p: 0.0625,
        repetition_penalty: 1.125,
        presence_penalty: -0.5,
        frequency_penalty: 0.25,
        seed: u64::MAX,
        choice: 2,
        logprobs: Some(5),
        logit_bias: vec![(7, -100.0), (70_000, 1.5)],
        max_tokens: 256,
        min_tokens: 4,
        stop_tokens: vec![2, 300],
        ignore_eos: true,
    }
}

fn to_node() -> Vec<(&'static str, ToNode)> {
    let versions = VersionRange { low: 1, high: 1 };
    let model = ModelRef { name: "tiny-chat".into(), revision: Some("main".into()), adapter: None };
    let submit = Submit {
        request: RequestId(1_000_000),
        attempt: Attempt(2),
        namespace: digest(16),
        class: Class::Interactive,
        context: vec![1, 127, 128, 255, 256, 65_535, 65_536, 42],
        prompt_tokens: 7,
        sampling: full_sampling(),
        remaining: Some(Duration(30_000_000)),
        suspect: true,
    };
    let minimal = Submit {
        request: RequestId(1),
        attempt: Attempt(1),
        namespace: [0; 32],
        class: Class::Standard,
        context: vec![5],
        prompt_tokens: 1,
        sampling: Sampling::default(),
        remaining: None,
        suspect: false,
    };
    let (request, attempt) = (RequestId(1_000_000), Attempt(2));
    vec![
        ("hello", ToNode::Hello(Hello { versions, front: "gateway-1".into(), fleet: "f".into(), model: Some(model) })),
        ("hello_any_model", ToNode::Hello(Hello { versions, front: "g".into(), fleet: "f".into(), model: None })),
        ("submit", ToNode::Submit(submit)),
        ("submit_minimal", ToNode::Submit(minimal)),
        ("abort", ToNode::Abort(Abort { request, attempt, at_token: None })),
        ("abort_at_token", ToNode::Abort(Abort { request, attempt, at_token: Some(12) })),
        ("recall", ToNode::Recall(Recall { request, attempt })),
        ("ping", ToNode::Ping(Ping { nonce: 1 << 40 })),
        ("goodbye", ToNode::Goodbye),
        ("kv_ask", ToNode::KvAsk(KvAsk { from: 12 })),
    ]
}

fn status() -> Status {
    Status {
        node: NODE,
        epoch: EPOCH,
        state: NodeState::Ready,
        running: 12,
        waiting: 3,
        queued_tokens: 4_500,
        predicted_backlog_ns: 180_000_000,
        free_blocks: 7_000,
        steps: 70_000,
        preemptions: 1,
        prefix_queries: 90_000,
        prefix_hits: 30_000,
        offloaded_blocks: 900,
        restored_blocks: 70_001,
        bad_host_blocks: 1,
        worker_restarts: 2,
        worker_pid: Some(4_242),
        step_ns: 161_000_000_000,
        stage_wait_ns: 3_000_000_000,
        kv_changes: 12,
        disk_written_blocks: 800,
        disk_read_blocks: 70_002,
        bad_disk_blocks: 2,
        failed_disk_writes: 3,
        disk_waits: 4,
        lost_disk_records: 5,
        predicted_step_ns: 158_000_000_000,
        step_error_ns: 9_000_000_000,
        paced_steps: 321,
    }
}

fn from_node() -> Vec<(&'static str, FromNode)> {
    let changes = KvChanges {
        node: NODE,
        epoch: EPOCH,
        number: 12,
        cleared: true,
        runs: vec![0, 1, 2],
        keys: vec![PrefixKey(7), PrefixKey(u64::MAX), PrefixKey(1 << 40)],
    };
    let snapshot =
        KvSnapshot { node: NODE, epoch: EPOCH, number: 13, keys: vec![PrefixKey(7), PrefixKey(u64::MAX - 1)] };
    let welcome = Welcome {
        version: 1,
        node: NODE,
        epoch: EPOCH,
        model: ModelIdentity {
            name: "tiny-chat".into(),
            revision: "main".into(),
            adapter: Some("medical".into()),
            weights_digest: digest(0),
            tokenizer_digest: digest(224),
            numerics: "native-avx2-float32-tp1".into(),
        },
        limits: NodeLimits {
            vocabulary: 4_096,
            max_sequence_tokens: 2_048,
            max_sequences: 64,
            max_waiting_sequences: 256,
            total_blocks: 8_192,
            block_tokens: 32,
            eos_tokens: vec![2],
        },
    };
    let outputs = Outputs {
        step: StepId(70_000),
        requests: vec![RequestId(1_000_000), RequestId(1_000_001)],
        attempts: vec![Attempt(2), Attempt(1)],
        indexes: vec![0, 299],
        tokens: vec![42, 2],
        logprobs: vec![(1, TokenLogprobs { chosen: -0.25, top: vec![(2, -0.25), (900, -1.5)] })],
        cached: vec![(0, 64)],
        finished: vec![Finished {
            request: RequestId(1_000_001),
            attempt: Attempt(1),
            reason: FinishReason::Stop,
            output_tokens: 300,
        }],
    };
    let status = status();
    let starting = Status { state: NodeState::Starting, worker_pid: None, ..status };
    let rejected = Rejected {
        code: RejectCode::WrongModel,
        message: "this node runs tiny-chat, the front expects tiny-chat-mini".into(),
        versions: VersionRange { low: 1, high: 1 },
    };
    let give_back = |refusal| {
        let (request, attempt) = (RequestId(1_000_000), Attempt(2));
        let suspect = Option::is_none(&refusal);
        FromNode::GiveBack(GiveBack { node: NODE, epoch: EPOCH, request, attempt, refusal, suspect })
    };
    let retry_after = Duration(1_500_000);
    let full = Refusal::QueueFull { queued: 256, limit: 256, unit: QueueUnit::Requests, retry_after };
    vec![
        ("welcome", FromNode::Welcome(welcome)),
        ("outputs", FromNode::Outputs(NodeOutputs { node: NODE, epoch: EPOCH, outputs })),
        ("give_back_recalled", give_back(None)),
        ("give_back_queue_full", give_back(Some(full))),
        ("give_back_too_long", give_back(Some(Refusal::TooLong { needed: 3_000, limit: 2_048 }))),
        ("give_back_empty_prompt", give_back(Some(Refusal::EmptyPrompt))),
        ("give_back_unknown_token", give_back(Some(Refusal::UnknownToken { given: 4_096, limit: 4_096 }))),
        ("give_back_bad_sampling", give_back(Some(Refusal::BadSampling))),
        ("give_back_duplicate", give_back(Some(Refusal::Duplicate))),
        ("give_back_draining", give_back(Some(Refusal::Draining))),
        ("status", FromNode::Status(status)),
        ("status_starting", FromNode::Status(starting)),
        ("pong", FromNode::Pong(Pong { node: NODE, epoch: EPOCH, nonce: 1 << 40 })),
        ("kv_changes", FromNode::KvChanges(changes)),
        ("kv_snapshot", FromNode::KvSnapshot(snapshot)),
        ("rejected", FromNode::Rejected(rejected)),
    ]
}

fn to_worker() -> Vec<(&'static str, ToWorker)> {
    let limits = EngineLimits {
        block_tokens: 32,
        total_blocks: 8_192,
        host_blocks: 4_096,
        max_sequences: 64,
        max_step_tokens: 2_048,
        max_sequence_tokens: 2_048,
        max_waiting_sequences: 256,
        max_steps_in_flight: 2,
        groups: 1,
        eos_tokens: vec![2],
        vocabulary: 4_096,
        disk_blocks: 70_000,
    };
    let configure =
        Configure { epoch: EPOCH, model_folder: "/models/tiny-chat".into(), dtype: Dtype::Bfloat16, limits };
    let mut steady = Delta::new(EPOCH, StepId(70_001), StepId(70_000));
    steady.group = GroupId(1);
    steady.decodes = true;
    steady.append_slots = vec![Slot(3), Slot(17)];
    steady.append_blocks = vec![BlockId(811), BlockId(70_002)];
    let mut admission = Delta::new(EPOCH, StepId(70_002), StepId(70_001));
    admission.leave = vec![Slot(5)];
    admission.admit = vec![Admission {
        slot: Slot(5),
        context: vec![10, 11, 12, 1_000],
        prompt_tokens: 3,
        computed_tokens: 2,
        blocks: vec![BlockId(6), BlockId(7)],
        sampling: full_sampling(),
    }];
    admission.chunks = vec![Chunk { slot: Slot(5), start_tokens: 2, tokens: 2 }];
    admission.copies = vec![
        BlockCopy { direction: CopyDirection::Offload, block: BlockId(6), host: HostBlockId(70_003), tag: u64::MAX },
        BlockCopy { direction: CopyDirection::Restore, block: BlockId(7), host: HostBlockId(1), tag: 5 },
    ];
    let moved = |number, direction, host, disk, tag| {
        let (host, disk) = (HostBlockId(host), DiskBlockId(disk));
        DiskTransfer { number, direction, host, disk, tag }
    };
    admission.transfers = vec![
        moved(70_004, DiskDirection::Write, 70_003, 9, u64::MAX),
        moved(70_005, DiskDirection::Read, 2, 70_006, 5),
    ];
    vec![
        ("configure", ToWorker::Configure(configure)),
        ("step_steady", ToWorker::Step(steady)),
        ("step_admission", ToWorker::Step(admission)),
        ("stop", ToWorker::Stop),
    ]
}

fn from_worker() -> Vec<(&'static str, FromWorker)> {
    let ready = Ready {
        epoch: EPOCH,
        pid: 4_242,
        total_blocks: 8_000,
        layers: 6,
        numerics: "native-avx2-float32-tp1".into(),
        loading_ns: 812_000_000,
        host_memory: 0x0123_4567_89ab_cdef,
        disk_files: 0xfedc_ba98_7654_3210,
    };
    let result = StepResult {
        epoch: EPOCH,
        step: StepId(70_001),
        slots: vec![Slot(3), Slot(17), Slot(17)],
        tokens: vec![42, 4_095, 2],
        logprobs: vec![(Slot(3), TokenLogprobs { chosen: -0.5, top: vec![(42, -0.5)] })],
        errors: vec![(Slot(9), RowError::NotANumber), (Slot(10), RowError::NothingToSample)],
        elapsed_ns: 2_345_678,
        waited_ns: 45_678,
        copied_ns: 12_345,
    };
    let failed = Failed {
        epoch: EPOCH,
        step: Some(StepId(70_001)),
        code: FailureCode::Memory,
        message: "out of memory: 1.5 GiB asked for, 0.9 GiB free".into(),
    };
    let failed_to_load =
        Failed { step: None, code: FailureCode::Model, message: "no tensors".into(), ..failed.clone() };
    let (epoch, step) = (EPOCH, StepId(70_001));
    let need = NeedSnapshot { epoch, step, last: Some(StepId(69_999)), bad_host_blocks: Vec::new() };
    let bad_host_blocks = vec![HostBlockId(3), HostBlockId(70_000)];
    let need_from_the_start = NeedSnapshot { epoch, step, last: None, bad_host_blocks };
    let disk = DiskReport {
        epoch,
        through: 70_005,
        failed: vec![70_004],
        refused: true,
        read_blocks: 1,
        read_ns: 812_000,
        waits: 2,
    };
    vec![
        ("disk", FromWorker::Disk(disk)),
        ("ready", FromWorker::Ready(ready)),
        ("result", FromWorker::Result(result)),
        ("need_snapshot", FromWorker::NeedSnapshot(need)),
        ("need_snapshot_from_the_start", FromWorker::NeedSnapshot(need_from_the_start)),
        ("failed", FromWorker::Failed(failed)),
        ("failed_to_load", FromWorker::Failed(failed_to_load)),
    ]
}

fn path(direction: &str, name: &str) -> PathBuf {
    folder().join(format!("{direction}.{name}.msgpack"))
}

fn holds<M: Message + PartialEq + std::fmt::Debug>(direction: &str, samples: &[(&str, M)]) -> BTreeSet<PathBuf> {
    let limits = CodecLimits::default();
    for (name, message) in samples {
        let file = path(direction, name);
        let golden = std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert_eq!(encode(message, &limits).as_ref(), Ok(&golden), "{direction}.{name} is written differently");
        assert_eq!(decode::<M>(&golden, &limits).as_ref(), Ok(message), "{direction}.{name} is read differently");
    }
    samples.iter().map(|(name, _)| path(direction, name)).collect()
}

#[test]
fn every_message_keeps_the_bytes_of_its_version() {
    let mut bound = holds("to_node", &to_node());
    bound.extend(holds("from_node", &from_node()));
    bound.extend(holds("to_worker", &to_worker()));
    bound.extend(holds("from_worker", &from_worker()));
    let entries =
        std::fs::read_dir(folder()).expect("the folder is there").map(|entry| entry.expect("readable").path());
    let files: BTreeSet<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "msgpack")).collect();
    assert_eq!(files, bound, "a golden file that no sample holds");
}

fn write<M: Message>(direction: &str, samples: &[(&str, M)]) {
    for (name, message) in samples {
        let file = path(direction, name);
        if !file.exists() {
            let frame = encode(message, &CodecLimits::default()).expect("within bounds");
            std::fs::write(&file, frame).expect("the folder is writable");
        }
    }
}

#[test]
#[ignore = "writes the files of new messages; run by hand"]
fn write_the_bytes_of_new_messages() {
    write("to_node", &to_node());
    write("from_node", &from_node());
    write("to_worker", &to_worker());
    write("from_worker", &from_worker());
}
