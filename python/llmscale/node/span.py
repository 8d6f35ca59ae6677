"""What a replica on several hosts needs beyond one host's: the door where they meet, and what each shows at it.

From settings, hosts and plan to open doors; costs one look-up of the leader's name. It does not know what passes a
door.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from importlib.metadata import version
from typing import Self

from llmscale._core import GroupDoor
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError
from llmscale.node.group_messages import HostFacts
from llmscale.node.leader_group import LeaderGroup
from llmscale.node.plan import ReplicaPlan
from llmscale.parallel.hosts import Hosts, tcp_address

# Enough to tell two folders apart by accident; nobody gains by a collision with a folder of his own.
DIGEST_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class Span:
    """The leader's side."""

    group: LeaderGroup
    door: GroupDoor
    address: str
    """This host's own, at which the others reach ranks' links and the rendezvous."""
    max_join_seconds: float

    @classmethod
    def open(cls, settings: NodeSettings, hosts: Hosts, plan: ReplicaPlan) -> Self:
        """Listens at the leader's address. Raises ConfigError."""
        address = _own_address(hosts)
        try:
            door = GroupDoor.listen(tcp_address(address, hosts.port), _key_file(settings))
        except ConfigError as error:
            raise ConfigError(
                f"host 0 cannot listen at {hosts.address} ({hosts.sources[2]}), where the other hosts look for it:"
                f" {error}"
            ) from error
        facts = host_facts(settings, hosts, plan)
        group = LeaderGroup(door, secrets.token_hex(8), facts, plan.limits.total_blocks)
        return cls(group, door, address, settings.max_join_seconds)

    def close(self) -> None:
        """Closes the door; the group has said goodbye before."""
        self.door.close()


def connect_to_leader(settings: NodeSettings, hosts: Hosts) -> GroupDoor:
    """A follower's side. Raises ConfigError."""
    return GroupDoor.connect(hosts.address, _key_file(settings))


def host_facts(settings: NodeSettings, hosts: Hosts, plan: ReplicaPlan) -> HostFacts:
    """What this host shows."""
    return HostFacts(
        version=version("llmscale"),
        fleet=settings.fleet,
        hosts=hosts.count,
        tensor_parallel_size=plan.layout.tensor_size,
        pipeline_parallel_size=plan.layout.stages,
        weights=plan.weights_digest.hex()[:DIGEST_CHARACTERS],
        configuration=plan.configuration_digest.hex()[:DIGEST_CHARACTERS],
        tokenizer=plan.tokenizer_digest.hex()[:DIGEST_CHARACTERS],
        dtype=plan.dtype,
        quantization=plan.quantization or "none",
        max_model_len=plan.limits.max_sequence_tokens,
        max_num_seqs=plan.limits.max_sequences,
        max_num_batched_tokens=plan.limits.max_step_tokens,
    )


def _key_file(settings: NodeSettings) -> str | None:
    return None if settings.key_file is None else str(settings.key_file)


def _own_address(hosts: Hosts) -> str:
    """The address behind the leader's name: sockets listen at addresses."""
    try:
        found = socket.getaddrinfo(hosts.leader, hosts.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"the leader's name {hosts.leader!r} ({hosts.sources[2]}) leads nowhere: {error}") from error
    # Ranks and stores speak IPv4 wherever there is a choice.
    addresses = sorted(found, key=lambda entry: entry[0] is not socket.AF_INET)
    return str(addresses[0][4][0])
