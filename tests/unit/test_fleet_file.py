"""A fleet file says what it says, and whatever is wrong in it is one sentence with file, line, name and value."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llmscale.errors import ConfigError
from llmscale.fleet_file import (
    MAX_FILE_BYTES,
    FleetFile,
    GatewayEntry,
    KeysEntry,
    LimitsEntry,
    ModelEntry,
    parse_fleet_file,
    read_fleet_file,
)
from llmscale.gateway.config import GatewayLimits

PATH = Path("/etc/llmscale/llmscale.toml")
WHOLE = """\
fleet = "lab"

[gateway]
host = "0.0.0.0"
port = 9000
api_key_file = "api-keys"
max_node_silence_seconds = 2.5
limits = { max_body_bytes = 1000, max_request_seconds = 60 }

[keys]
folder = "keys"
gateway = "edge"

[models.small]
model = "tiny-chat-mini"
replicas = 2
dtype = "float32"
threads = 1

# Elsewhere.
[models."Qwen/Qwen3-0.6B"]
model = "../models/qwen"
nodes = [
    "tcp://host-a:7000",
    "tcp://[fd00::2]:7000",  # the second
]
"""


def parse(text: str) -> FleetFile:
    return parse_fleet_file(text, PATH)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_everything_that_is_written_is_read_and_paths_begin_where_the_file_is() -> None:
    assert parse(WHOLE) == FleetFile(
        fleet="lab",
        gateway=GatewayEntry(
            host="0.0.0.0",
            port=9000,
            api_key_file="/etc/llmscale/api-keys",
            max_node_silence_seconds=2.5,
            limits=LimitsEntry(max_body_bytes=1000, max_request_seconds=60.0),
        ),
        keys=KeysEntry(folder="/etc/llmscale/keys", gateway="edge"),
        models={
            "small": ModelEntry(model="tiny-chat-mini", replicas=2, dtype="float32", threads=1),
            "Qwen/Qwen3-0.6B": ModelEntry(
                model="/etc/llmscale/../models/qwen", nodes=("tcp://host-a:7000", "tcp://[fd00::2]:7000")
            ),
        },
    )


def test_second_attempts_and_the_time_without_work_are_settings_of_the_gateway() -> None:
    def gateway(text: str) -> str:
        return f'[gateway]\n{text}\n[models.a]\nmodel="tiny-chat"\n'

    usual, other = parse(gateway("")).gateway, parse(gateway("ejection_seconds = 0.1\nhedging = true")).gateway
    assert (usual.ejection_seconds, usual.hedging) == (5.0, False)
    assert (other.ejection_seconds, other.hedging) == (0.1, True)
    assert "expected `float` >= 0.1" in refusal(gateway("ejection_seconds = 0.09"))
    assert "expected `float` <= 600" in refusal(gateway("ejection_seconds = 601"))
    assert "expected `bool`" in refusal(gateway("hedging = 1"))


def test_a_model_runs_once_on_this_host_unless_nodes_or_replicas_are_named() -> None:
    fleet = parse(
        '[models.a]\nmodel="tiny-chat"\n[models.b]\nmodel="tiny-chat"\nnodes=["ipc:///n"]\n'
        '[models.c]\nmodel="tiny-chat"\nnodes=["ipc:///m"]\nreplicas=3\ntensor_parallel_size=2\n'
    )
    assert [entry.local_replicas for entry in fleet.models.values()] == [1, 0, 3]
    assert fleet.local_workers == 7


def test_a_folder_beside_the_file_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[models.a]\nmodel = "owner/name"\n'
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "llmscale.toml"
    assert parse_fleet_file(text, file).models["a"].model == "owner/name"
    (tmp_path / "elsewhere" / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder of the working directory, but paths begin where the file is"):
        parse_fleet_file(text, file)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_fleet_file(text, file).models["a"].model == str(tmp_path / "owner" / "name")


def test_a_gguf_file_one_folder_down_is_a_path_and_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[models.a]\nmodel = "models/small.gguf"\n'
    file, working = tmp_path / "llmscale.toml", tmp_path / "elsewhere"
    for folder in (tmp_path / "models", working / "models"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(working)
    (working / "models" / "small.gguf").touch()
    with pytest.raises(ConfigError, match="is a file of the working directory, but paths begin where the file is"):
        parse_fleet_file(text, file)
    (tmp_path / "models" / "small.gguf").touch()
    assert parse_fleet_file(text, file).models["a"].model == str(tmp_path / "models" / "small.gguf")


@pytest.mark.parametrize("model", ["tiny-chat", "/models/qwen", "owner/name"])
def test_the_folder_of_the_disk_tier_begins_where_the_file_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for said, meant in (("cache", "/etc/llmscale/cache"), ("~/cache", "/home/someone/cache"), ("/cache", "/cache")):
        fleet = parse_fleet_file(f"[models.a]\nmodel = {model!r}\nkv_disk = {said!r}\n", Path("/etc/llmscale/f.toml"))
        assert fleet.models["a"].kv_disk == meant


@pytest.mark.parametrize("field", ["model", "kv_disk", "nodes"])
def test_a_text_that_no_command_line_can_have_is_refused_in_its_line(field: str) -> None:
    fields = {"model": '"tiny-chat"', "kv_disk": '"/cache"', "nodes": '["ipc:///node"]'}
    fields[field] = fields[field].replace('"', '"a\\u0000', 1)
    text = "[models.a]\n" + "\n".join(f"{name} = {value}" for name, value in fields.items())
    line = list(fields).index(field) + 2
    assert f":{line}: models.a.{field}: it has a character 0" in refusal(text)


def test_a_home_folder_that_nobody_has_is_refused_in_its_line() -> None:
    text = "[models.a]\nmodel = 'tiny-chat'\nkv_disk = '~nobody-has-this-name/cache'\n"
    assert ":3: models.a.kv_disk: the home folder of '~nobody-has-this-name/cache' cannot be found" in refusal(text)


def test_a_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "llmscale.toml"
    with pytest.raises(ConfigError, match=r"cannot be read: \[Errno 2"):
        read_fleet_file(file)
    file.write_text("[models.a]\r\nmodel = 'tiny-chat'\r\nreplicas = 'two'\r\n")
    with pytest.raises(ConfigError, match=f"^{file}:3: models.a.replicas: it is 'two'; expected `int"):
        read_fleet_file(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_fleet_file(file)
    file.write_text("#" * MAX_FILE_BYTES)
    with pytest.raises(ConfigError, match="it has 0 models"):
        read_fleet_file(file)
    file.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="262,145 bytes, the limit is 262,144"):
        read_fleet_file(file)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("replicas", "replcas", ":16: models.small.replcas: there is no such name; did you mean replicas?"),
        (
            "dtype",
            "max-model-len",
            ":17: models.small.max-model-len: there is no such name; did you mean max_model",
        ),
        ("[gateway]", "[gatway]", ":3: gatway: there is no such name; did you mean gateway?"),
        (
            "max_body_bytes",
            "x",
            ":8: gateway.limits.x: there is no such name; known are max_body_bytes, max_json",
        ),
        ("folder", "dir", ":11: keys.dir: there is no such name; known are folder, gateway"),
        ('fleet = "lab"', 'flet = "lab"', ":1: flet: there is no such name; did you mean fleet?"),
        ('fleet = "lab"', "fleet = 7", ":1: fleet: it is 7; expected `str`"),
        ("port = 9000", "port = 65_536", ":5: gateway.port: it is 65536; expected `int` <= 65535"),
        ("2.5", "0.99", ":7: gateway.max_node_silence_seconds: it is 0.99; expected `float` >= 1.0"),
        ("2.5", "nan", ":7: gateway.max_node_silence_seconds: it is nan; expected `float` >= 1.0"),
        ("= 1000", "= 0", ":8: gateway.limits.max_body_bytes: it is 0; expected `int` >= 1"),
        ("threads = 1", "threads = true", ":18: models.small.threads: it is True; expected `int"),
        ("threads = 1", "threads = 1025", ":18: models.small.threads: it is 1025; expected `int` <= 1024"),
        ('"float32"', '"float16"', ":17: models.small.dtype: it is 'float16'; expected `str` matching regex"),
        ("replicas = 2", "replicas = 65", ":16: models.small.replicas: it is 65; expected `int` <= 64"),
        ("replicas = 2", "replicas = 0", ":14: models.small: it has neither replicas on this host nor nodes"),
        ('"tcp://host-a:7000"', '"host-a:7000"', ":23: models.'Qwen/Qwen3-0.6B'.nodes: 'host-a:7000' is no address"),
        ('"tcp://host-a:7000"', "7000", ":23: models.'Qwen/Qwen3-0.6B'.nodes: it is 7000; expected `str`"),
        ("tcp://[fd00::2]", "tcp://host-a", ":23: models.'Qwen/Qwen3-0.6B'.nodes: tcp://host-a:7000 stands for Qwen"),
        ('model = "../models/qwen"', "", ":21: models.'Qwen/Qwen3-0.6B': object missing required field `model`"),
        ("nodes = [", "threads = 2\nnodes = [", ":23: models.'Qwen/Qwen3-0.6B'.threads: it is about replicas of this"),
        ("[models.small]", "[[models.small]]", ":14: models.small: it must be a table"),
        ("models.small", 'models."a b"', ":14: models.'a b': a model's name has 1 to 128"),
        ("port = 9000", "kill_button = true", ":5: gateway.kill_button: the button kills processes of this host"),
        (
            "port = 9000",
            'allowed_origins = ["https://a.example/"]',
            ":5: gateway.allowed_origins: 'https://a.example/' is",
        ),
        ("port = 9000", 'allowed_origins = "*"', ":5: gateway.allowed_origins: it is '*'; expected `array`"),
        ("port = 9000", "port = = 1", " is no TOML: Invalid value (at line 5, column 8)"),
        ("port = 9000", "port = " + "9" * 5_000, " is no TOML: "),
        ("port = 9000", "port = " + "[" * 5_000, " is no TOML: "),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_is_wrong_is_named_with_its_line_and_value(before: str, after: str, said: str) -> None:
    assert before in WHOLE
    text = refusal(WHOLE.replace(before, after, 1))
    assert text.startswith(f"{PATH}{said}"), text
    assert "\n" not in text


def test_a_name_in_a_text_of_several_lines_is_not_taken_for_an_entry() -> None:
    text = '[gateway]\nhost = """\nport = "x"\n[models.a]\n"""\nport = "x"\n[models.a]\nmodel = "tiny-chat"\n'
    assert refusal(text).startswith(f"{PATH}:6: gateway.port: it is 'x'")


def test_more_replicas_than_one_host_or_one_gateway_can_have_are_refused() -> None:
    def of(count: int, nodes: int) -> str:
        addresses = ", ".join(f'"ipc:///n{number}"' for number in range(nodes))
        return (
            f'[models.a]\nmodel="tiny-chat"\nreplicas={count}\n'
            f'[models.b]\nmodel="tiny-chat"\nreplicas=32\nnodes=[{addresses}]\n'
        )

    assert parse(of(32, 192)).local_workers == 64
    assert "the models have 65 replicas on this host, the limit is 64" in refusal(of(33, 0))
    assert "the fleet has 257 replicas and nodes, the limit is 256" in refusal(of(32, 193))
    assert "it has 65 models" in refusal("".join(f'[models.m{n}]\nmodel="tiny-chat"\n' for n in range(65)))


def test_every_limit_of_a_gateway_can_be_set_and_its_default_is_within_the_bounds() -> None:
    names = [field.name for field in msgspec.structs.fields(LimitsEntry)]
    # The fields of the dataclass are its slots.
    assert names == list(GatewayLimits.__slots__)
    values = "\n".join(f"{name} = {getattr(GatewayLimits(), name)}" for name in names)
    limits = parse(f'[gateway.limits]\n{values}\n[models.a]\nmodel="tiny-chat"\n').gateway.limits
    assert GatewayLimits(**msgspec.structs.asdict(limits)) == GatewayLimits()
