"""`llmscale serve MODEL` is a fleet file of one that nobody wrote: the same settings, the same defaults."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llmscale.cli.serve import ServeOptions
from llmscale.errors import InvalidCheckpoint
from llmscale.fleet_file import parse_fleet_file


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
    )
    text = """
        [gateway]
        host = "0.0.0.0"
        port = 9
        api_key_file = "/keys"
        kill_button = true
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


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert list(ServeOptions(model=str(tmp_path / "mine")).fleet().models) == ["mine"]
    with pytest.raises(InvalidCheckpoint, match="neither a folder nor an embedded model"):
        ServeOptions(model=str(tmp_path / "yours")).fleet()
