"""`llmscale serve MODEL` is a fleet file of one that nobody wrote: the same settings, the same defaults."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import msgspec
import pytest
from typer.testing import CliRunner

from llmscale._core import Front, FrontStatus
from llmscale.cli import app
from llmscale.cli.serve import ServeOptions, _announce_ready
from llmscale.errors import InvalidCheckpoint, Unavailable
from llmscale.fleet_file import parse_fleet_file
from tests.fakes.fake_front import FakeReplica, FakeStatus


class ClosedFront:
    """One whose command has been ended."""

    def status(self) -> FrontStatus:
        raise Unavailable("the front is closed")


class ReadyFront:
    def status(self) -> FakeStatus:
        return FakeStatus(0, 0, 0, [FakeReplica(model="tiny-chat")])


def test_a_command_that_is_ended_before_it_is_ready_announces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _announce_ready(cast("Front", ClosedFront()), ["tiny-chat"], "http://here", needs_key=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_command_to_try_has_a_place_for_the_key_where_one_is_needed(
    needs_key: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _announce_ready(cast("Front", ReadyFront()), ["tiny-chat"], "http://here", needs_key=needs_key)
    said = capsys.readouterr().out
    assert "curl http://here/v1/chat/completions" in said
    assert ("-H 'authorization: Bearer YOUR-KEY'" in said) == needs_key


def test_a_model_alone_is_the_shortest_file() -> None:
    written = parse_fleet_file('[models.tiny-chat]\nmodel = "tiny-chat"\nreplicas = 1\n', Path("/f"))
    assert ServeOptions(model="tiny-chat").fleet() == written


def test_every_option_has_its_name_in_the_file() -> None:
    options = ServeOptions(
        model="tiny-chat",
        host="0.0.0.0",
        port=9,
        api_key_file="/keys",
        served_model_name="a",
        dtype="float32",
        quantization="int8",
        kv_dtype="int8",
        max_model_len=99,
        max_num_seqs=3,
        max_num_batched_tokens=44,
        step_target_milliseconds=7.5,
        kv_cache_bytes=1 << 24,
        threads=2,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        replicas=4,
        kill_button=True,
        allowed_origins=("https://a.example", "http://localhost:3000"),
    )
    text = """
        [gateway]
        host = "0.0.0.0"
        port = 9
        api_key_file = "/keys"
        kill_button = true
        allowed_origins = ["https://a.example", "http://localhost:3000"]
        [models.a]
        model = "tiny-chat"
        dtype = "float32"
        quantization = "int8"
        kv_dtype = "int8"
        max_model_len = 99
        max_num_seqs = 3
        max_num_batched_tokens = 44
        step_target_milliseconds = 7.5
        kv_cache_bytes = 16_777_216
        threads = 2
        tensor_parallel_size = 2
        pipeline_parallel_size = 3
        replicas = 4
    """
    assert options.fleet() == parse_fleet_file(text, Path("/f"))
    entry = msgspec.structs.asdict(options.fleet().models["a"])
    assert {name for name in entry if name not in ServeOptions.__slots__} == {
        "nodes",
        "max_saving_seconds",
        "max_step_seconds",
        "spare_worker",
    }


def test_the_command_line_takes_origins_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServeOptions] = []
    monkeypatch.setattr("llmscale.cli.serve.run", served.append)
    origins = ["--allowed-origins", "https://a.example", "--allowed-origins", "http://localhost:3000"]
    for words in ([], origins):
        assert CliRunner().invoke(app, ["serve", "tiny-chat", *words]).exit_code == 0
    assert [options.allowed_origins for options in served] == [(), ("https://a.example", "http://localhost:3000")]


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert list(ServeOptions(model=str(tmp_path / "mine")).fleet().models) == ["mine"]
    with pytest.raises(InvalidCheckpoint, match="neither a folder nor an embedded model"):
        ServeOptions(model=str(tmp_path / "yours")).fleet()
