"""Which hosts run one replica, and which of them this is: from flags, or from what a launcher left in the environment.

Pure: a mapping and the flags in, a frozen answer or a typed error that names the variable out; linear in the length of
a Slurm node list. Facts come from the launcher nearest to the process, torchrun before LeaderWorkerSet before Slurm,
because one starts within the other; host counts of all must agree. It opens no socket and resolves no name.

Meaning of the variables: torchrun, https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables;
LeaderWorkerSet, https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables; Slurm,
https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES. Of Slurm only a step's variables count: a
shell in an allocation, or a batch script, has the job's, and no other host of it runs the same command.
SLURM_LAUNCH_NODE_IPADDR is where srun was typed, often a login node, so the leader is the step's first node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmscale.errors import ConfigError
from llmscale.parallel.node_list import expand_node_list

DEFAULT_GROUP_PORT = 7070
MAX_HOSTS = 1_024
T = TypeVar("T", int, str)


@dataclass(frozen=True, slots=True)
class HostFlags:
    """What the command line says of hosts; None where it says nothing."""

    hosts: int | None = None
    host_index: int | None = None
    leader: str | None = None
    """HOST or HOST:PORT."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of one replica as this process sees them. Alone by default."""

    count: int = 1
    index: int = 0
    leader: str = "127.0.0.1"
    """Name or address of host 0, without a port."""
    port: int = DEFAULT_GROUP_PORT
    """Where host 0 listens for the others."""
    sources: tuple[str, str, str] = ("default", "default", "default")
    """Where count, index and leader come from: names of flags or variables."""
    acts: bool = True
    """False for a process that a launcher has started beside the one that runs this host."""

    @property
    def is_leader(self) -> bool:
        """Whether this host owns the engine."""
        return self.index == 0

    @property
    def address(self) -> str:
        """Where the hosts meet: tcp://HOST:PORT."""
        return tcp_address(self.leader, self.port)


def tcp_address(host: str, port: int | str) -> str:
    """tcp://HOST:PORT, with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


@dataclass(frozen=True, slots=True)
class _Fact(Generic[T]):
    value: T
    source: str

    def __str__(self) -> str:
        return f"{self.source} is {self.value}"


@dataclass(frozen=True, slots=True)
class _View:
    """What one launcher says. A leader that it does not name is a hole."""

    launcher: str
    count: _Fact[int]
    index: _Fact[int]
    leader: _Fact[str] | None
    leader_variable: str
    local_index: int = 0


def resolve_hosts(environment: Mapping[str, str], flags: HostFlags) -> Hosts:
    """The answer. Flags that say everything, or `--hosts 1`, are taken as they are. Raises ConfigError."""
    given = _FlagFacts.of(flags)
    if given.count is not None and given.count.value == 1:
        return _alone(given)
    said_all = given.count is not None and given.index is not None and given.leader is not None
    view = None if said_all else _nearest_view(environment)
    if view is None and given.says_nothing:
        return Hosts()
    count = _agreed(given.count, view.count if view else None, "--hosts", "how many hosts share the replica")
    index = _agreed(given.index, view.index if view else None, "--host-index", "which of them this is, from 0")
    if not 1 <= count.value <= MAX_HOSTS:
        raise ConfigError(f"{count}; a replica spans 1 to {MAX_HOSTS:,} hosts")
    if not 0 <= index.value < count.value:
        raise ConfigError(f"{index}, but {count}: indices go from 0 to {count.value - 1}")
    acts = view is None or view.local_index == 0
    if count.value == 1:
        return Hosts(sources=(count.source, index.source, "default"), acts=acts)
    leader = given.leader or (view.leader if view else None)
    if leader is None:
        variable = f" (or {view.leader_variable})" if view else ""
        raise ConfigError(f"{count}, and no leader is named; set --leader{variable} to the address of host 0")
    host, port = _host_and_port(leader)
    if environment.get("MASTER_PORT") == str(port) and view is not None and view.launcher == "torchrun":
        raise ConfigError(
            f"MASTER_PORT is {port}, where torchrun itself listens, and so would host 0; set --leader {host}:PORT with"
            " another port, the same on every host"
        )
    return Hosts(count.value, index.value, host, port, (count.source, index.source, leader.source), acts)


@dataclass(frozen=True, slots=True)
class _FlagFacts:
    count: _Fact[int] | None
    index: _Fact[int] | None
    leader: _Fact[str] | None

    @classmethod
    def of(cls, flags: HostFlags) -> _FlagFacts:
        return cls(
            None if flags.hosts is None else _Fact(flags.hosts, "--hosts"),
            None if flags.host_index is None else _Fact(flags.host_index, "--host-index"),
            None if flags.leader is None else _Fact(flags.leader, "--leader"),
        )

    @property
    def says_nothing(self) -> bool:
        return self.count is None and self.index is None and self.leader is None


def _alone(given: _FlagFacts) -> Hosts:
    if given.index is not None and given.index.value != 0:
        raise ConfigError(f"{given.index}, but --hosts is 1: the only host has index 0")
    return Hosts(sources=("--hosts", "--hosts", "default"))


def _agreed(flag: _Fact[int] | None, launcher: _Fact[int] | None, name: str, meaning: str) -> _Fact[int]:
    if flag is not None and launcher is not None and flag.value != launcher.value:
        raise ConfigError(f"{flag}, but {launcher}; drop {name}, or give --hosts, --host-index and --leader together")
    fact = flag or launcher
    if fact is None:
        raise ConfigError(f"{name} is not set and no launcher says it; set it to {meaning}")
    return fact


def _nearest_view(environment: Mapping[str, str]) -> _View | None:
    views = [view for view in (_torchrun(environment), _leader_worker_set(environment), _slurm(environment)) if view]
    if not views:
        if _number(environment, "WORLD_SIZE", least=1, absent=1).value > 1 and "RANK" in environment:
            raise ConfigError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']} and RANK {environment['RANK']}, but neither GROUP_RANK nor"
                " NODE_RANK says which host this is; start with torchrun, or set --hosts, --host-index and --leader"
            )
        return None
    nearest = views[0]
    for other in views[1:]:
        if other.count.value not in (1, nearest.count.value):
            raise ConfigError(f"{nearest.count}, but {other.count}; set --hosts, --host-index and --leader")
    return nearest


def _torchrun(environment: Mapping[str, str]) -> _View | None:
    names = [name for name in ("GROUP_RANK", "NODE_RANK") if environment.get(name)]
    if not names:
        return None
    index = _same(environment, names, least=0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", least=1, absent=1)
    counts = [name for name in ("GROUP_WORLD_SIZE", "NNODES") if environment.get(name)]
    world = _number(environment, "WORLD_SIZE", least=1) if environment.get("WORLD_SIZE") else None
    if counts:
        count = _same(environment, counts, least=1)
        if world is not None and world.value != count.value * local_size.value:
            raise ConfigError(
                f"{world}, but {count} and {local_size}; the first must be the product of the others:"
                " start the same number of processes on every host, best one"
            )
    elif world is not None and world.value % local_size.value == 0:
        count = _Fact(world.value // local_size.value, "WORLD_SIZE over LOCAL_WORLD_SIZE")
    else:
        raise ConfigError(f"{index}, but neither GROUP_WORLD_SIZE nor NNODES says of how many hosts; set --hosts")
    local = _number(environment, "LOCAL_RANK", least=0, absent=0)
    if local.value >= local_size.value:
        raise ConfigError(f"{local}, but {local_size}: local ranks go from 0 to {local_size.value - 1}")
    return _View("torchrun", count, index, _text(environment, "MASTER_ADDR"), "MASTER_ADDR", local.value)


def _leader_worker_set(environment: Mapping[str, str]) -> _View | None:
    names = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
    present = [name for name in names if environment.get(name)]
    if not present:
        return None
    missing = [name for name in names if name not in present]
    if missing:
        raise ConfigError(
            f"{present[0]} is {environment[present[0]]}, but {missing[0]} is not set; set --hosts 1 or it"
        )
    return _View(
        "LeaderWorkerSet",
        _number(environment, "LWS_GROUP_SIZE", least=1),
        _number(environment, "LWS_WORKER_INDEX", least=0),
        _text(environment, "LWS_LEADER_ADDRESS"),
        "LWS_LEADER_ADDRESS",
    )


def _slurm(environment: Mapping[str, str]) -> _View | None:
    """A task of a step that srun has started."""
    nodes = environment.get("SLURM_STEP_NODELIST") or None
    if nodes is None and not environment.get("SLURM_STEP_NUM_NODES"):
        return None
    index = _number(environment, "SLURM_NODEID", least=0)
    source = "SLURM_STEP_NODELIST"
    if nodes is None:
        source, nodes = "SLURM_JOB_NODELIST", environment.get("SLURM_JOB_NODELIST") or None
    listed = None if nodes is None else expand_node_list(nodes, source, MAX_HOSTS)
    if environment.get("SLURM_STEP_NUM_NODES"):
        count = _number(environment, "SLURM_STEP_NUM_NODES", least=1)
    else:
        assert listed is not None, "one of the two is set"
        count = _Fact(len(listed), source)
    if listed is not None and len(listed) != count.value:
        raise ConfigError(f"{count}, but {source} is {nodes!r}, which names {len(listed)}; set --leader and --hosts")
    local = _number(environment, "SLURM_LOCALID", least=0, absent=0)
    leader = None if listed is None else _Fact(listed[0], source)
    return _View("Slurm", count, index, leader, "SLURM_STEP_NODELIST", local.value)


def _same(environment: Mapping[str, str], names: list[str], least: int) -> _Fact[int]:
    """The value of several names for one thing."""
    facts = [_number(environment, name, least=least) for name in names]
    for other in facts[1:]:
        if other.value != facts[0].value:
            raise ConfigError(f"{facts[0]}, but {other}; they mean the same: unset one of them")
    return facts[0]


def _number(environment: Mapping[str, str], name: str, *, least: int, absent: int | None = None) -> _Fact[int]:
    text = environment.get(name) or None
    if text is None:
        if absent is None:
            raise ConfigError(f"{name} is not set; start every host by the launcher, or set --hosts and --host-index")
        return _Fact(absent, name)
    if not (text.isascii() and text.isdecimal() and len(text) <= 9) or int(text) < least:
        raise ConfigError(f"{name} is {text!r}, it must be a whole number of at least {least}")
    return _Fact(int(text), name)


def _text(environment: Mapping[str, str], name: str) -> _Fact[str] | None:
    text = environment.get(name) or None
    return None if text is None else _Fact(text, name)


def _host_and_port(leader: _Fact[str]) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPV6]:PORT; an address of IPv6 without brackets has no port."""
    text = leader.value.removeprefix("tcp://")
    host, separator, port = text.rpartition(":")
    if not separator or (":" in host and not host.endswith("]")):
        host, port = text, ""
    host = host.removeprefix("[").removesuffix("]")
    if not host or any(character.isspace() or character == "/" for character in host):
        raise ConfigError(f"{leader}, it must be HOST or HOST:PORT")
    if not port:
        return host, DEFAULT_GROUP_PORT
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise ConfigError(f"{leader}, its port must be from 1 to 65535")
    return host, int(port)
