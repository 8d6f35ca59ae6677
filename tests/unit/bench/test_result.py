"""Percentiles, the shape of the JSON, shares of limits, peers."""

import json

import pytest

from bench import peers
from bench.offline import limit_of
from bench.offline_cases import Prompts, run_cases
from bench.result import Report, Row
from bench.shapes import SHAPES
from bench.statistics import Spread, percentile, spread


def test_percentiles_are_values_that_were_measured():
    values = list(range(100, 0, -1))
    assert [percentile(values, percent) for percent in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([7.0], 1) == 7.0
    assert percentile([1, 2], 50) == 1
    assert percentile([1, 2], 51) == 2
    with pytest.raises(ValueError, match="percent"):
        percentile([1], 0)


def test_the_json_has_the_documented_keys(tmp_path):
    row = Row.of("S/decode1", "tokens/s", spread([3.0, 1.0, 2.0]), limit=8.0, peers={"vllm": "not installed"})
    path = tmp_path / "deep" / "result.json"
    Report("offline", 7, [row], {"read_bytes_per_second": 1e10}).save(path)
    found = json.loads(path.read_text())
    assert list(found) == ["bench", "commit", "date", "machine", "seed", "limits", "rows"]
    assert found["rows"] == [
        {
            "case": "S/decode1",
            "value": 2.0,
            "unit": "tokens/s",
            "min": 1.0,
            "max": 3.0,
            "repeats": 3,
            "limit_share": 0.25,
            "peers": {"vllm": "not installed"},
        }
    ]


def test_the_table_names_every_peer():
    rows = [Row.of("a", "s", spread([1.0]), peers={"vllm": 2.0}), Row.of("b", "s", spread([1.0]), limit=4.0)]
    lines = Report("x", 0, rows).table().splitlines()
    assert lines[2].split() == ["case", "value", "unit", "min", "-", "max", "n", "of", "limit", "vllm"]
    assert lines[3].split()[-1] == "2"
    assert "25%" in lines[4]


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row.of("a", "s", spread([1.0, 2.0])), Row.of("b", "tokens/s", spread([5.0]))]
    Report("x", 0, rows).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_limits_of_a_shape_are_those_of_its_weights():
    limits = {"bf16_flops_per_second": 1e12, "read_bytes_per_second": 1e10}
    shape = SHAPES["S"]
    # 30 layers of 576 x 64 x (18 + 6) and 3 x 576 x 1536; the head has 576 x 49152.
    assert shape.layer_parameters == 106_168_320
    assert limit_of("prefill512", shape, limits) == pytest.approx(1e12 / (2 * 106_168_320))
    assert limit_of("decode1", shape, limits) == pytest.approx(1e10 / (2 * (106_168_320 + 28_311_552)))
    assert limit_of("batch8", shape, limits) is None


def test_every_case_asks_for_the_tokens_that_its_rate_counts():
    asked, now = [], [0.0]

    def generate(prompts, output_tokens):
        asked.append((len(prompts), len(prompts[0]), output_tokens))
        # A machine that reads 1,000 tokens a second and writes 10 for each prompt.
        now[0] += sum(map(len, prompts)) / 1_000 + (output_tokens - 1) / 10

    found = run_cases(generate, 1_000, ["prefill512", "decode1", "batch8", "c4"], 3, seed=0, clock=lambda: now[0])
    assert {case: len(values) for case, values in found.items()} == dict.fromkeys(found, 3)
    assert set(asked) == {(1, 64, 8), (1, 512, 1), (1, 256, 65), (1, 256, 1), (8, 128, 64), (4, 64, 32)}
    rates = {case: values[0] for case, values in found.items()}
    assert rates == pytest.approx(
        {"prefill512": 1_000, "decode1": 10, "batch8": 8 * 64 / (1.024 + 6.3), "c4": 4 * 32 / (0.256 + 3.1)}
    )


def test_a_machine_that_pauses_in_every_run_is_said_to_be_too_busy():
    with pytest.raises(RuntimeError, match="too busy to measure"):
        run_cases(lambda *_: None, 1_000, ["decode1"], 1, seed=0, clock=lambda: 0.0)


def test_no_prompt_is_drawn_twice():
    prompts = Prompts(32_000, seed=0)
    drawn = [tuple(ids) for _ in range(20) for ids in prompts.draw(8, 64)]
    assert len(set(drawn)) == len(drawn)
    assert max(map(max, drawn)) < 32_000


def test_peers_are_found_by_name_and_others_are_refused():
    assert peers.configured("vllm=/a/python, transformers=/b=c") == {"vllm": "/a/python", "transformers": "/b=c"}
    assert peers.configured("") == {}
    for wrong in ("vllm", "nobody=/a"):
        with pytest.raises(ValueError, match="NAME=PYTHON"):
            peers.configured(wrong)


def test_a_peers_chatter_is_not_its_result():
    output = 'Loading weights...\n{"case": "c1", "values": [3, 1, 2]}\n{"other": 1}\n'
    assert peers.parse(output) == {"c1": Spread(2, 1, 3, 3)}


def test_a_peer_that_is_not_there_is_a_column_that_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv(peers.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = peers.run_all(peers.Task(tmp_path, 100, ("c1",), 3, 0, 1))
    assert set(found.values()) == {"not installed"}
