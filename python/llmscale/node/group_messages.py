"""What the hosts of one replica tell each other, as bytes with bounds: msgpack of one tagged record per frame.

Both sides say again and again how things should be and how they are, so that no frame has to arrive: a lost one costs a
beat. Decoding is linear in the frame and refuses what is not exactly such a record. It does not know who may say what.
"""

from __future__ import annotations

import msgspec

from llmscale.errors import TransportError

MAX_TEXT = 2_000


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to be the same on every host, in the order in which differences are named."""

    version: str
    fleet: str
    hosts: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    weights: str
    """Digest of the checkpoint's tensors."""
    quantization: str
    """What weights become while they are loaded, "none" for nothing."""
    configuration: str
    """Digest of the model's description."""
    tokenizer: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="report"):
    """A follower: here I am, and this is what runs."""

    host: int
    incarnation: str
    """Drawn by every process anew."""
    facts: HostFacts
    max_kv_blocks: int
    """What this host has memory for."""
    epoch: int = 0
    """Whose ranks run, or ran until the death below; 0 for none."""
    death: str | None = None
    """How a rank of this epoch ended. The others of this host have been ended then."""


class Leave(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="leave"):
    """A follower ends."""

    host: int
    incarnation: str


class RankLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a rank finds the engine: a port of the leader."""

    rank: int
    port: int


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="wanted"):
    """The leader: this is what should run at the follower."""

    incarnation: str
    epoch: int
    """Grows. 0 before the first group."""
    links: tuple[RankLink, ...] = ()
    """The follower's ranks; none: nothing should run."""
    rendezvous_port: int = 0
    serving: bool = False
    """Whether the group is loaded, so that spare processes may be started."""
    draining: bool = False
    """Whether the leader ends when what runs has ended: until then it needs the ranks."""

    @property
    def group(self) -> tuple[str, int]:
        """Which group this is: an epoch of a leader's process."""
        return self.incarnation, self.epoch


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """The leader: this host cannot be of the group; it should end with this reason."""

    reason: str


class Goodbye(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="goodbye"):
    """The leader ends: nothing should run any more."""

    incarnation: str


FollowerMessage = Report | Leave
LeaderMessage = Wanted | Refused | Goodbye

_encoder = msgspec.msgpack.Encoder()
_from_follower: msgspec.msgpack.Decoder[FollowerMessage] = msgspec.msgpack.Decoder(FollowerMessage)
_from_leader: msgspec.msgpack.Decoder[LeaderMessage] = msgspec.msgpack.Decoder(LeaderMessage)


def encode(message: FollowerMessage | LeaderMessage) -> bytes:
    """One frame."""
    return _encoder.encode(message)


def decode_follower(frame: bytes) -> FollowerMessage:
    """What a follower said. Raises TransportError."""
    try:
        return _from_follower.decode(frame)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TransportError(
            f"a frame of {len(frame)} bytes at the group's door is not a follower's: {error}"
        ) from error


def decode_leader(frame: bytes) -> LeaderMessage:
    """What the leader said. Raises TransportError."""
    try:
        return _from_leader.decode(frame)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TransportError(f"a frame of {len(frame)} bytes at the group's door is not a leader's: {error}") from error


def bounded(text: str) -> str:
    """A text that fits a frame with everything else."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def difference(leader: HostFacts, host: int, other: HostFacts) -> str | None:
    """The first fact in which a host differs from the leader, with both values, and what to do; None for none."""
    for name in HostFacts.__struct_fields__:
        ours, theirs = getattr(leader, name), getattr(other, name)
        if ours != theirs:
            what = name.replace("_", " ")
            return (
                f"host {host} cannot join: its {what} is {theirs}, the leader's is {ours}; start every host of a"
                " replica with the same package, model folder and options"
            )
    return None
