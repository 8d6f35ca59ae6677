"""`llmscale.toml`: the models of a fleet, where each of them runs, and the gateway before them all.

Reads the text with tomllib into frozen structs in O(its size). Every name and number is checked, and what is wrong is
one `ConfigError` with file, line, name and value; the line costs some twenty further readings, so it is looked for only
then. Paths are relative to the file. Starts nothing, and knows neither what a model folder holds nor what a node says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from llmscale.config import (
    DEVICES,
    DTYPES,
    EXECUTORS,
    KV_DTYPES,
    LEAST_EJECTION_SECONDS,
    LEAST_NODE_SILENCE_SECONDS,
    MAX_DRAIN_SECONDS,
    MAX_NODES,
    MAX_REPLICAS,
    MAX_SEQUENCES,
    MAX_STEP_SECONDS,
    MAX_STEP_TARGET_MILLISECONDS,
    MAX_STEP_TOKENS,
    MAX_THREADS,
    MOST_EJECTION_SECONDS,
    MOST_NODE_SILENCE_SECONDS,
    QUANTIZATIONS,
    USUAL_EJECTION_SECONDS,
    USUAL_NODE_SILENCE_SECONDS,
)
from llmscale.embedded import EMBEDDED_MODELS
from llmscale.errors import ConfigError
from llmscale.origins import MAX_ORIGINS, wrong_origins
from llmscale.toml_document import TomlDocument

MAX_FILE_BYTES: Final = 256 << 10
MAX_MODELS: Final = 64
# The longest of a name on the wire, and what can stand in a URL.
_NAME: Final = re.compile(r"[A-Za-z0-9_.-][A-Za-z0-9_./:-]{0,127}")
_HUB_ID: Final = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_Path = Annotated[str, Meta(min_length=1, max_length=4_096)]
_ADDRESS: Final = re.compile(r"tcp://[^\s:]{1,255}:[0-9]{1,5}|tcp://\[[^\s\]]{2,45}\]:[0-9]{1,5}|ipc:///\S{1,100}")
_Count = Annotated[int, Meta(ge=1, le=1 << 20)]
_Bytes = Annotated[int, Meta(ge=1, le=1 << 30)]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`[models.NAME]`: one model under the name that clients use. Names are those of options, of `llmscale serve` or
    of a node; but for `model` and `nodes` they are about the replicas of this host."""

    model: _Path
    """A folder, a GGUF file, a hub id in the local cache, or the name of an embedded model."""
    nodes: Annotated[tuple[str, ...], Meta(max_length=MAX_NODES)] = ()
    """Nodes that somebody else starts."""
    replicas: Annotated[int, Meta(ge=0, le=MAX_REPLICAS)] | None = None
    """On this host; None: 1, or 0 where there are `nodes`."""
    dtype: Annotated[str, Meta(pattern=f"^({'|'.join(DTYPES)})\\Z")] = "auto"
    quantization: Annotated[str, Meta(pattern=f"^({'|'.join(QUANTIZATIONS)})\\Z")] | None = None
    """What dense weights become while they are loaded."""
    kv_dtype: Annotated[str, Meta(pattern=f"^({'|'.join(KV_DTYPES)})\\Z")] = "auto"
    """What keys and values are kept as; auto: as the activations."""
    max_model_len: Annotated[int, Meta(ge=2, le=2 << 20)] | None = None
    max_num_seqs: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=1, le=MAX_STEP_TOKENS)] = 512
    max_step_seconds: Annotated[float, Meta(gt=0, le=MAX_STEP_SECONDS)] = 120.0
    step_target_milliseconds: Annotated[float, Meta(ge=0, le=MAX_STEP_TARGET_MILLISECONDS)] = 20.0
    """What a prompt may add to a step that streams wait for; 0 for no bound."""
    kv_cache_bytes: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None
    kv_host_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] | None = None
    device: Annotated[str, Meta(pattern=f"^({'|'.join(DEVICES)})\\Z")] = "auto"
    """What workers compute on; auto: CUDA where torch sees a device for each, else the CPU."""
    executor: Annotated[str, Meta(pattern=f"^({'|'.join(EXECUTORS)})\\Z")] = "auto"
    """What computes steps; auto: native for one rank on the CPU that it can run, else torch."""
    kv_disk: _Path | None = None
    """A folder; every replica has one of its own in it."""
    kv_disk_bytes: Annotated[int, Meta(ge=1, le=1 << 60)] | None = None
    """Of each replica."""
    max_saving_seconds: Annotated[float, Meta(ge=0, le=MAX_DRAIN_SECONDS)] = 5.0
    """How long a drain may write what is cached above the disk; 0 for not at all."""
    threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)] | None = None
    """Of a worker; None: its share of the CPUs, fewer for a small model."""
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=256)] = 1
    pipeline_parallel_size: Annotated[int, Meta(ge=1, le=256)] = 1
    spare_worker: bool = True

    @property
    def local_replicas(self) -> int:
        """How many replicas this host runs."""
        if self.replicas is not None:
            return self.replicas
        return 0 if self.nodes else 1

    @property
    def local_workers(self) -> int:
        """How many worker processes these are."""
        return self.local_replicas * self.tensor_parallel_size * self.pipeline_parallel_size


class LimitsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`[gateway.limits]`: the names of `GatewayLimits`; None is its default."""

    max_body_bytes: _Bytes | None = None
    max_json_depth: Annotated[int, Meta(ge=8, le=512)] | None = None
    max_header_bytes: _Bytes | None = None
    max_headers: _Count | None = None
    max_header_seconds: _Seconds | None = None
    max_body_seconds: _Seconds | None = None
    max_idle_connection_seconds: _Seconds | None = None
    max_connections: _Count | None = None
    max_messages: _Count | None = None
    max_sequences: _Count | None = None
    max_request_tokens: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    max_request_logprobs: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None
    max_request_seconds: _Seconds | None = None
    max_stream_buffer_bytes: _Bytes | None = None
    max_stall_seconds: _Seconds | None = None
    ping_seconds: _Seconds | None = None
    max_drain_seconds: _Seconds | None = None
    max_inline_bytes: _Bytes | None = None
    max_waiting_large_prompts: _Count | None = None


class GatewayEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`[gateway]`: where clients connect, and who they may be."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    api_key_file: _Path | None = None
    kill_button: bool = False
    allowed_origins: Annotated[tuple[str, ...], Meta(max_length=MAX_ORIGINS)] = ()
    """Of web pages elsewhere that may ask, with a key; `*` alone is every page."""
    max_node_silence_seconds: Annotated[float, Meta(ge=LEAST_NODE_SILENCE_SECONDS, le=MOST_NODE_SILENCE_SECONDS)] = (
        USUAL_NODE_SILENCE_SECONDS
    )
    ejection_seconds: Annotated[float, Meta(ge=LEAST_EJECTION_SECONDS, le=MOST_EJECTION_SECONDS)] = (
        USUAL_EJECTION_SECONDS
    )
    """How long a replica that answers badly gets nothing, the first time."""
    hedging: bool = False
    """Whether a request whose first token is late is tried at a second replica."""
    limits: LimitsEntry = LimitsEntry()


class KeysEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`[keys]`: CURVE keys as `llmscale keys` writes them, needed as soon as a node is on another host."""

    folder: _Path
    gateway: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    """The name under which this gateway's pair was made: `gateway:NAME`."""

    @property
    def pair(self) -> Path:
        """This gateway's key pair."""
        return Path(self.folder, f"gateway-{self.gateway}.key")

    @property
    def node_public(self) -> Path:
        """The public key of all nodes."""
        return Path(self.folder, "node.public")

    @property
    def node_pair(self) -> Path:
        """The key pair of the nodes of this host."""
        return Path(self.folder, "node.key")

    @property
    def allow_list(self) -> Path:
        """Whom the nodes of this host admit."""
        return Path(self.folder, "allowed")


class FleetFile(msgspec.Struct, frozen=True, kw_only=True):
    """A whole file. `models` is by the names that clients use, in the order of the file."""

    models: dict[str, ModelEntry]
    fleet: Annotated[str, Meta(min_length=1, max_length=128)] = "llmscale"
    """Only nodes of the same fleet are used."""
    gateway: GatewayEntry = GatewayEntry()
    keys: KeysEntry | None = None

    @property
    def local_workers(self) -> int:
        """Worker processes of this host."""
        return sum(entry.local_workers for entry in self.models.values())

    @property
    def device_workers(self) -> int:
        """Of them, those that may have a device of this host's."""
        return sum(entry.local_workers for entry in self.models.values() if entry.device != "cpu")

    def first_device(self, model: str, replica: int = 0) -> int:
        """Of this host's devices, the one where a replica begins: workers have one each, in the file's order."""
        before = 0
        for name, entry in self.models.items():
            if name == model:
                return before + replica * entry.tensor_parallel_size * entry.pipeline_parallel_size
            before += 0 if entry.device == "cpu" else entry.local_workers
        raise KeyError(model)


def read_fleet_file(path: Path) -> FleetFile:
    """The fleet that a file describes. Raises `ConfigError`."""
    try:
        size = path.stat().st_size
        text = path.read_bytes().decode("utf-8") if size <= MAX_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the fleet file {path} cannot be read: {error}") from error
    if size > MAX_FILE_BYTES:
        raise ConfigError(f"the fleet file {path} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
    return parse_fleet_file(text, path)


def parse_fleet_file(text: str, path: Path) -> FleetFile:
    """The same from its text; `path` is where paths in it begin, and what errors name. Raises `ConfigError`."""
    document = TomlDocument(text, path)
    document.check_names((), FleetFile)
    models = document.table(("models",))
    if not 1 <= len(models) <= MAX_MODELS:
        raise document.error((), f"it has {len(models)} models, it must have 1 to {MAX_MODELS}: add [models.NAME]")
    for name in models:
        if not _NAME.fullmatch(name) or ".." in name:
            raise document.error(
                ("models", name),
                "a model's name has 1 to 128 of A-Z a-z 0-9 _ . - / :, neither '..' nor a first / or :",
            )
    base = path.absolute().parent
    fleet = FleetFile(
        models={name: _placed(document, name, base) for name in models},
        fleet=document.value(("fleet",), FleetFile, "llmscale"),
        gateway=_gateway(document, base),
        keys=_keys(document, base) if "keys" in document.values else None,
    )
    _check_whole(document, fleet)
    return fleet


def _placed(document: TomlDocument, name: str, base: Path) -> ModelEntry:
    entry = document.struct(("models", name), ModelEntry)
    if entry.kv_disk is not None:
        place = _absolute(document, ("models", name, "kv_disk"), base, entry.kv_disk)
        entry = msgspec.structs.replace(entry, kv_disk=place)
    if entry.model in EMBEDDED_MODELS:
        return entry
    path = _absolute(document, ("models", name, "model"), base, entry.model)
    # A GGUF file one folder down is written as a hub id is.
    if Path(path).exists() or not _HUB_ID.fullmatch(entry.model):
        return msgspec.structs.replace(entry, model=path)
    if (elsewhere := Path(entry.model)).exists():
        raise document.error(
            ("models", name, "model"),
            f"{entry.model!r} is a {'folder' if elsewhere.is_dir() else 'file'} of the working directory, but paths"
            f" begin where the file is ({base}); write a path from there",
        )
    return entry


def _gateway(document: TomlDocument, base: Path) -> GatewayEntry:
    entry = document.struct(("gateway",), GatewayEntry)
    if (wrong := wrong_origins(entry.allowed_origins)) is not None:
        raise document.error(("gateway", "allowed_origins"), wrong)
    if entry.api_key_file is None:
        return entry
    place = _absolute(document, ("gateway", "api_key_file"), base, entry.api_key_file)
    return msgspec.structs.replace(entry, api_key_file=place)


def _keys(document: TomlDocument, base: Path) -> KeysEntry:
    entry = document.struct(("keys",), KeysEntry)
    return msgspec.structs.replace(entry, folder=_absolute(document, ("keys", "folder"), base, entry.folder))


def _absolute(document: TomlDocument, where: tuple[str, ...], base: Path, path: str) -> str:
    try:
        return str(base / Path(path).expanduser())
    except RuntimeError as error:
        raise document.error(where, f"the home folder of {path!r} cannot be found; write the whole path") from error


def _check_whole(document: TomlDocument, fleet: FleetFile) -> None:
    """What each entry alone cannot know."""
    seen: dict[str, str] = {}
    for name, entry in fleet.models.items():
        if entry.local_replicas == 0:
            _check_elsewhere(document, name, entry)
        for address in entry.nodes:
            if not _ADDRESS.fullmatch(address):
                raise document.error(
                    ("models", name, "nodes"),
                    f"{address[:80]!r} is no address of a node: write tcp://HOST:PORT, or ipc:///PATH on this host",
                )
            if address in seen:
                raise document.error(
                    ("models", name, "nodes"),
                    f"{address} stands for {seen[address]} already; a node serves one model: leave one of them out",
                )
            seen[address] = name
    local = sum(entry.local_replicas for entry in fleet.models.values())
    if local > MAX_REPLICAS:
        raise document.error(
            ("models",), f"the models have {local} replicas on this host, the limit is {MAX_REPLICAS} for all together"
        )
    if local + len(seen) > MAX_NODES:
        raise document.error(
            ("models",), f"the fleet has {local + len(seen)} replicas and nodes, the limit is {MAX_NODES}"
        )
    if seen and fleet.gateway.kill_button:
        # The process ids of another host are those of other processes here.
        raise document.error(
            ("gateway", "kill_button"),
            f"the button kills processes of this host, and {next(iter(seen))} may be another: leave one of them out",
        )


def _check_elsewhere(document: TomlDocument, name: str, entry: ModelEntry) -> None:
    """A setting that nobody would follow is a mistake."""
    if not entry.nodes:
        raise document.error(("models", name), "it has neither replicas on this host nor nodes: add one of them")
    for field in document.table(("models", name)):
        if field not in {"model", "nodes", "replicas"}:
            raise document.error(
                ("models", name, field),
                "it is about replicas of this host, and there are none; nodes elsewhere have it on their command line",
            )
