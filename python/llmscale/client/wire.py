"""Messages between a front and a node as msgpack bytes: version 1 of the protocol, the client's half.

A frame is `[version, tag, body]`, bodies are arrays in field order, and the classes below state that order. What is
sent is written by msgpack with 32-bit floats, byte for byte as the native codec writes it; what arrives is checked by
msgspec against the types in one pass, linear in the frame, so nothing after it meets a field of the wrong kind. Knows
nothing of sockets or of the state of a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgpack  # type: ignore[import-untyped]
import msgspec

from llmscale.errors import TransportError
from llmscale.types import SamplingParams

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 16 << 20

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# msgspec bounds integers by 64 signed bits, and ids use all 64 unsigned ones; decoding refuses wider ones anyway.
U64 = Annotated[int, msgspec.Meta(ge=0)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]

CLASSES: Final = {"interactive": 0, "standard": 1, "batch": 2, "background": 3}
FINISH_REASONS: Final = (
    "stop",
    "length",
    "aborted",
    "deadline_exceeded",
    "request_poisoned",
    "not_a_number",
    "nothing_to_sample",
)
NODE_STATES: Final = ("starting", "ready", "recovering", "draining")
REJECTIONS: Final = (
    "unsupported_version",
    "wrong_fleet",
    "wrong_model",
    "too_many_fronts",
    "malformed",
    "not_greeted",
)
QUEUE_UNITS: Final = ("requests", "tokens", "live requests")


class Record(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """An array of fields in order, and nothing after them."""


class OpenRecord(msgspec.Struct, array_like=True, frozen=True):
    """Part of the handshake: fields that a later version adds at the end are passed over."""


class Versions(Record, frozen=True):
    """Both ends included."""

    low: U8
    high: U8


class ModelIdentity(OpenRecord, frozen=True):
    """Exactly what a node computes with."""

    name: str
    revision: str
    adapter: str | None
    weights_digest: Digest
    tokenizer_digest: Digest
    numerics: str


class NodeLimits(OpenRecord, frozen=True):
    """The bounds of a node, in tokens, sequences and blocks."""

    vocabulary: U32
    max_sequence_tokens: U32
    max_sequences: U32
    max_waiting_sequences: U32
    total_blocks: U32
    block_tokens: U32
    eos_tokens: list[U32]


class Welcome(OpenRecord, frozen=True):
    """The answer to a greeting."""

    version: U8
    node: U64
    epoch: U64
    model: ModelIdentity
    limits: NodeLimits


class TokenLogprobs(Record, frozen=True):
    """Of the drawn token, and the best tokens with theirs."""

    chosen: float
    top: list[tuple[U32, float]]


class Finished(Record, frozen=True):
    """The end of an attempt."""

    request: U64
    attempt: U32
    reason: Annotated[int, msgspec.Meta(ge=0, lt=len(FINISH_REASONS))]
    output_tokens: U32


class Columns(Record, frozen=True):
    """Tokens of one step: requests, attempts, indexes and tokens are parallel."""

    step: U64
    requests: list[U64]
    attempts: list[U32]
    indexes: list[U32]
    tokens: list[U32]
    logprobs: list[tuple[U32, TokenLogprobs]]
    cached: list[tuple[U32, U32]]
    finished: list[Finished]

    def __post_init__(self) -> None:
        rows = len(self.requests)
        if not rows == len(self.attempts) == len(self.indexes) == len(self.tokens):
            raise ValueError("the columns of an output are not of one length")
        if any(row >= rows for row, _ in self.logprobs):
            raise ValueError("log probabilities belong to a row that is not there")
        if any(row >= rows for row, _ in self.cached):
            raise ValueError("tokens found in a cache belong to a row that is not there")


class Outputs(Record, frozen=True):
    """What one step made for this client."""

    node: U64
    epoch: U64
    columns: Columns


class GiveBack(Record, frozen=True):
    """An attempt that the node does not run. A refusal is its code, then the numbers of that code."""

    node: U64
    epoch: U64
    request: U64
    attempt: U32
    refusal: Annotated[list[U64], msgspec.Meta(min_length=1, max_length=5)] | None
    suspect: bool


class Status(Record, frozen=True):
    """How a node is doing."""

    node: U64
    epoch: U64
    state: Annotated[int, msgspec.Meta(ge=0, lt=len(NODE_STATES))]
    running: U32
    waiting: U32
    queued_tokens: U64
    predicted_backlog_ns: U64
    free_blocks: U32
    steps: U64
    preemptions: U64
    prefix_queries: U64
    prefix_hits: U64
    offloaded_blocks: U64
    restored_blocks: U64
    bad_host_blocks: U64
    worker_restarts: U32
    worker_pid: U32 | None
    step_ns: U64
    stage_wait_ns: U64
    kv_changes: U64
    disk_written_blocks: U64
    disk_read_blocks: U64
    bad_disk_blocks: U64
    failed_disk_writes: U64
    disk_waits: U64
    lost_disk_records: U64
    predicted_step_ns: U64
    step_error_ns: U64
    paced_steps: U64


class Pong(Record, frozen=True):
    """The answer to a ping."""

    node: U64
    epoch: U64
    nonce: U64


class KvChanges(Record, frozen=True):
    """A change of the prefix cache; only for fronts that ask."""

    node: U64
    epoch: U64
    number: U64
    cleared: bool
    runs: list[U32]
    keys: list[U64]


class KvSnapshot(Record, frozen=True):
    """All that the prefix cache holds; only for fronts that ask."""

    node: U64
    epoch: U64
    number: U64
    keys: list[U64]


class Rejected(OpenRecord, frozen=True):
    """The end of a connection, by the node's wish."""

    code: Annotated[int, msgspec.Meta(ge=0, lt=len(REJECTIONS))]
    message: str
    versions: Versions


FromNode = Welcome | Outputs | GiveBack | Status | Pong | Rejected | KvChanges | KvSnapshot

_ENVELOPE: Final = msgspec.msgpack.Decoder(tuple[U8, U8, msgspec.Raw])
_BODIES: Final[tuple[msgspec.msgpack.Decoder[Any], ...]] = tuple(
    msgspec.msgpack.Decoder(kind)
    for kind in (Welcome, Outputs, GiveBack, Status, Pong, Rejected, KvChanges, KvSnapshot)
)


def decode(frame: bytes) -> FromNode:
    """The message of a frame from a node. Raises TransportError for anything else."""
    if len(frame) > MAX_FRAME_BYTES:
        raise TransportError(f"the node sent a frame of {len(frame)} bytes, the limit is {MAX_FRAME_BYTES}")
    try:
        version, tag, body = _ENVELOPE.decode(frame)
        if version != VERSION:
            raise TransportError(f"the node speaks version {version} of the protocol, this client version {VERSION}")
        if tag >= len(_BODIES):
            raise TransportError(f"the node sent message {tag}, which version {VERSION} does not have")
        message: FromNode = _BODIES[tag].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise TransportError(f"the peer sent bytes that are no message of a node: {error}") from error
    return message


def _frame(tag: int, body: Sequence[Any]) -> bytes:
    return bytes(msgpack.packb((VERSION, tag, body), use_single_float=True))


def hello(front: str, fleet: str, model: str | None) -> bytes:
    """A greeting: the client's name, its fleet, and the model it expects (None for any)."""
    wanted = None if model is None else (model, None, None)
    return _frame(0, ((VERSION, VERSION), front, fleet, wanted))


def submit(
    request: int,
    attempt: int,
    *,
    namespace: bytes,
    priority: str,
    prompt: Sequence[int],
    sampling: tuple[Any, ...],
    remaining_us: int | None,
) -> bytes:
    """A request to run. `sampling` comes from `sampling_fields`, `priority` is a key of `CLASSES`."""
    context = tuple(prompt)
    body = (request, attempt, namespace, CLASSES[priority], context, len(context), sampling, remaining_us, False)
    return _frame(1, body)


def abort(request: int, attempt: int, at_token: int | None) -> bytes:
    """Ends an attempt; with `at_token`, only that many output tokens count."""
    return _frame(2, (request, attempt, at_token))


def ping(nonce: int) -> bytes:
    """A sign of life that is answered."""
    return _frame(4, (nonce,))


def goodbye() -> bytes:
    """The client goes away."""
    return _frame(5, ())


def sampling_fields(params: SamplingParams, *, seed: int, choice: int, max_tokens: int) -> tuple[Any, ...]:
    """The sampling record of one choice. `seed` has 64 unsigned bits."""
    return (
        float(params.temperature),
        params.top_k,
        float(params.top_p),
        float(params.min_p),
        float(params.repetition_penalty),
        float(params.presence_penalty),
        float(params.frequency_penalty),
        seed,
        choice,
        params.logprobs,
        tuple((token, float(bias)) for token, bias in params.logit_bias),
        max_tokens,
        min(params.min_tokens, max_tokens),
        params.stop_token_ids,
        params.ignore_eos,
    )
