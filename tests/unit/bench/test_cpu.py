"""`bench cpu`: who takes part, what is asked, ratios and verdicts, what the load generator's lines mean."""

import argparse
import fcntl
import json
from dataclasses import replace

import pytest

from bench import cpu, cpu_cases, cpu_kernels, cpu_limits, cpu_servers, peers
from bench.cpu_cases import OURS, Variant, choose
from bench.cpu_servers import server_command
from bench.cpu_table import QUESTIONS, Question, answers, best, markdown, number
from bench.shapes import SHAPES
from bench.statistics import Spread, spread
from bench.streams import LoadFailed, parse

BF16, INT8, INT4 = (Variant(OURS, scheme, scheme) for scheme in ("bf16", "int8", "int4"))
Q8, Q4 = Variant("llama.cpp", "Q8_0", "int8"), Variant("llama.cpp", "Q4_0", "int4")
VLLM = Variant("vllm", "int8", "int8")
DECODE = Question("S", "decode1", "int8", 1.8, 2.5)
PREFILL = Question("S", "prefill512", None, 1.0, 1.34)
GAP = Question("S", "mixed/gap-p99", None, 80, 40, "ms", is_absolute=True, is_less_better=True)


def exactly(value):
    return Spread(value, value, value, 5)


def verdict(question, measured):
    (answer,) = answers(measured, [question])
    return answer.verdict


def test_a_scheme_is_compared_with_its_own_class_and_a_case_without_one_with_the_best():
    measured = {
        (INT8, "S", "decode1"): exactly(300.0),
        (INT4, "S", "decode1"): exactly(500.0),
        (Q8, "S", "decode1"): exactly(100.0),
        (VLLM, "S", "decode1"): exactly(150.0),
        (Q4, "S", "decode1"): exactly(250.0),
    }
    (answer,) = answers(measured, [DECODE])
    assert (answer.ours, answer.peer) == ((INT8, exactly(300.0)), (VLLM, exactly(150.0)))
    assert answer.reached == 2.0
    (answer,) = answers(measured, [replace(DECODE, scheme=None)])
    assert (answer.ours[0], answer.peer[0], answer.reached) == (INT4, Q4, 2.0)


@pytest.mark.parametrize(("ours", "expected"), [(250.0, "aim"), (249.0, "must"), (180.0, "must"), (179.0, "**BELOW**")])
def test_ratios_are_judged_at_their_bounds(ours, expected):
    measured = {(INT8, "S", "decode1"): exactly(ours), (Q8, "S", "decode1"): exactly(100.0)}
    assert verdict(DECODE, measured) == expected


@pytest.mark.parametrize(("ours", "expected"), [(40.0, "aim"), (41.0, "must"), (80.0, "must"), (81.0, "**BELOW**")])
def test_waits_are_judged_as_they_are_and_less_is_better(ours, expected):
    # The peer's does not matter, nor that there is one.
    assert verdict(GAP, {(INT8, "S", "mixed/gap-p99"): exactly(ours)}) == expected
    assert verdict(GAP, {(INT8, "S", "mixed/gap-p99"): exactly(ours), (VLLM, "S", GAP.case): exactly(1.0)}) == expected


def test_the_best_of_a_runtime_is_its_best_median_in_the_questions_direction():
    measured = {(BF16, "S", GAP.case): Spread(50.0, 1.0, 90.0, 5), (INT8, "S", GAP.case): Spread(60.0, 2.0, 61.0, 5)}
    assert best(GAP, measured, (OURS,))[0] == BF16
    assert best(replace(GAP, is_less_better=False), measured, (OURS,))[0] == INT8


def test_what_is_missing_is_said_and_judged_by_nothing():
    assert verdict(PREFILL, {(INT8, "S", "prefill512"): exactly(1.0), (Q8, "S", "prefill512"): "not installed"}) == (
        "no peer"
    )
    assert verdict(PREFILL, {(INT8, "S", "prefill512"): "failed", (Q8, "S", "prefill512"): exactly(1.0)}) == (
        "not measured"
    )
    assert answers({(INT8, "S", "decode1"): exactly(1.0)}, [PREFILL]) == []


def test_the_table_has_a_line_per_question_and_a_cell_per_variant():
    measured = {
        (INT8, "S", "decode1"): spread([300.0, 310.0, 290.0]),
        (Q8, "S", "decode1"): exactly(100.0),
        (VLLM, "S", "decode1"): "not installed",
    }
    lines = markdown(measured, {("int8", "S", "decode1"): 0.75}).splitlines()
    asked = [line for line in lines if line.startswith("| S/decode1 int8 ")]
    cells = [cell.strip() for cell in asked[0].strip("|").split("|")]
    assert cells == [
        "S/decode1 int8",
        "tokens/s",
        "300 (290-310) int8",
        "75%",
        "100 (100-100) Q8_0",
        "-",
        "not installed",
        "3x",
        "1.8x",
        "2.5x",
        "aim, without openvino and vllm",
    ]
    assert lines[-3] == "| case | llmscale int8 | llama.cpp Q8_0 | vllm int8 |"
    assert lines[-1] == "| S/decode1 | 300 (290-310) | 100 (100-100) | not installed |"
    assert {line.count("|") for line in lines if line.startswith("| S/decode1 int")} == {12}


def test_a_ratio_names_the_peers_that_it_lacks():
    served = Question("S", "served64", None, 1.4, 2.0)
    found = {(INT8, "S", case): exactly(3.0) for case in ("served64", "decode1", GAP.case)}
    found |= {(VLLM, "S", case): exactly(1.0) for case in ("served64", "decode1")}
    questions, _, _ = markdown(found, {}).partition("\n\n")
    lines = {line.split(" |")[0]: line.rpartition(" | ")[2] for line in questions.splitlines()}
    assert lines["| S/served64"] == "aim, without llama.cpp |"
    assert lines["| S/decode1 int8"] == "aim, without llama.cpp and openvino |"
    # Waits are not compared with anybody's.
    assert lines["| S/mixed/gap-p99"] == "aim |"
    assert served in QUESTIONS


def test_aims_are_beyond_what_must_be():
    for question in QUESTIONS:
        assert question.better(question.aim, question.must), question.name
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_numbers_have_three_digits():
    assert [number(value) for value in (0.1234, 9.876, 99.96, 100.4, 12_345.6)] == [
        "0.123",
        "9.88",
        "100",
        "100",
        "12,346",
    ]


def test_a_peer_takes_part_when_it_and_its_model_are_there(tmp_path):
    lineup = choose(tmp_path, "int8", "llmscale,llama.cpp,vllm")
    assert lineup.variants == (INT8, Q8, VLLM)
    assert lineup.missing(INT8, "S") is None
    assert lineup.missing(Q8, "S") == peers.NOT_INSTALLED
    (tmp_path / "llama.cpp/bin").mkdir(parents=True)
    assert lineup.missing(Q8, "S") == cpu_cases.NO_MODEL
    (tmp_path / "models").mkdir()
    (tmp_path / "models/S-Q8_0.gguf").touch()
    assert lineup.missing(Q8, "S") is None
    assert choose(None, None, None).missing(VLLM, "S") == peers.NOT_INSTALLED
    with pytest.raises(ValueError, match="--schemes has fp8; there are bf16, int8, int4"):
        choose(None, "fp8", None)


def test_a_peer_that_is_not_there_is_measured_as_such_and_nothing_runs(tmp_path):
    found = {}
    cpu_cases.run_offline(choose(tmp_path, None, "vllm"), "S", ("decode1",), 3, 0, 1, found)
    assert set(found.values()) == {"not installed"}
    assert {key[1:] for key in found} == {("S", "decode1")}


def test_servers_get_the_weights_of_their_format(tmp_path):
    lineup = choose(tmp_path, None, None)
    command, environment = server_command(lineup, Q4, "S", 8_001, 2)
    assert command[:3] == [f"{tmp_path}/llama.cpp/bin/llama-server", "-m", f"{tmp_path}/models/S-Q4_0.gguf"]
    assert environment == {}
    command, environment = server_command(lineup, VLLM, "S", 8_001, 2)
    assert command[0] == f"{tmp_path}/vllm/bin/python"
    assert f"{tmp_path}/models/S-int8" in command
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_limits_follow_the_bytes_and_the_arithmetic_of_a_scheme():
    limits = {"bf16_flops_per_second": 1e12, "int8_ops_per_second": 2e12, "read_bytes_per_second": 1e10}
    shape = SHAPES["S"]
    weights = shape.layer_parameters + shape.head_parameters
    assert cpu_limits.limit_of("decode1", "int8", shape, limits) == pytest.approx(1e10 / weights)
    assert cpu_limits.limit_of("decode1", "int4", shape, limits) == pytest.approx(1e10 / (0.5625 * weights))
    assert cpu_limits.limit_of("prefill2048", "int4", shape, limits) == pytest.approx(1e12 / shape.layer_parameters)
    assert cpu_limits.limit_of("batch8", "int8", shape, limits) is None


LINES = """window 1000000 3000000
short 0 2000000 4 500000 1500000 1600000 2000000
long 1000000 4000000 2 1700000 4000000
short 2000000 4000000 2 2500000 3500000
"""


def test_what_counts_lies_in_the_window():
    load = parse(LINES)
    # Three of four tokens of the first request, one of two of the last, in two seconds.
    assert load.tokens_per_second == pytest.approx(2.0)
    assert load.requests_per_second == pytest.approx(0.5)
    assert load.gaps() == pytest.approx([1.0, 0.1, 0.4])
    assert load.gap_ms(99) == pytest.approx(1_000)
    assert load.first_token_ms(50) == pytest.approx(500)
    assert load.first_token_ms(100, of_long=True) == pytest.approx(700)
    assert load.round_trip_ms() == pytest.approx(2_000)


def test_two_tokens_in_one_event_are_two_tokens():
    assert parse("window 0 1000000\nshort 0 1000000 8 250000 500000\n").tokens_per_second == pytest.approx(8.0)


def test_a_failed_request_ends_the_run():
    with pytest.raises(LoadFailed, match=r"a long request failed: HTTP/1\.1 500: no room"):
        parse("window 0 10\nshort 0 5 1 5\nlong 0 5 error HTTP/1.1 500: no room\n")
    with pytest.raises(LoadFailed, match="no request"):
        parse("window 0 10\n")


def test_every_row_of_ours_has_its_peers_beside_it():

    measured = {
        (INT8, "S", "decode1"): exactly(300.0),
        (Q8, "S", "decode1"): exactly(100.0),
        (VLLM, "S", "decode1"): "not installed",
        (Q4, "S", "decode1"): exactly(250.0),
    }
    limits = {"read_bytes_per_second": 1e11, "bf16_flops_per_second": 1e12, "int8_ops_per_second": 1e12}
    run = cpu.Run(choose(None, None, None), ("S",), ("decode1",), 5, 0, 2, quick=False, measured=measured)
    rows = cpu._rows(run, limits)
    assert [row.case for row in rows] == ["S/decode1/int8", "S/decode1/Q8_0@llama.cpp", "S/decode1/Q4_0@llama.cpp"]
    assert rows[0].peers == {"llama.cpp Q8_0": 100.0, "vllm int8": "not installed"}
    assert json.loads(json.dumps(rows[0].to_json()))["limit_share"] == pytest.approx(300 * 134_479_872 / 1e11)


def test_the_kernels_lines_are_read_and_others_are_refused():
    text = """bf16    960 x   576,    1 rows:     33.0 us   33.5 GB/s    67.0 GOP/s (best 70.0)
int8  16384 x  2048,  512 rows:  40000.0 us    0.8 GB/s   858.9 GOP/s (best 870.1)
int8  16384 x  2048,   16 rows:   1000.0 us   33.0 GB/s   600.0 GOP/s (best 610.0)
"""
    one, many = cpu_kernels.parse(text)
    assert (one.case, one.value, one.unit, one.high) == ("kernels/bf16/960x576/1-rows", 33.5, "GB/s", 35.0)
    assert (many.case, many.value, many.high) == ("kernels/int8/16384x2048/512-rows", 858.9, 870.1)
    assert "| int8 16384x2048 | - | - | - | 859 (870) GOP/s |" in cpu_kernels.markdown([one, many])
    beside = [replace(one, peers={"oneDNN": 67.0}), replace(many, peers={"oneDNN": "not installed"})]
    table = cpu_kernels.markdown(beside)
    assert "| bf16 960x576 | 34 (35) GB/s, 0.50x | - | - | - |" in table
    assert "| int8 16384x2048 | - | - | - | 859 (870) GOP/s |" in table
    assert table.endswith("Over all matrices (geometric mean): bf16 1-rows 0.50x.")
    with pytest.raises(ValueError, match="no line of matmul_rates"):
        list(cpu_kernels.parse("warning: unused"))


def test_the_odd_shape_stands_beside_s():
    shares = {("int8", "odd", "decode1"): 0.3, ("int8", "S", "decode1"): 0.4, ("bf16", "odd", "decode1"): None}
    assert "| decode1 int8 | 30% | 40% | 0.75x | 0.7x |" in markdown({}, shares).splitlines()
    assert SHAPES["odd"].layer_parameters == 48 * (320 * 48 * 16 + 3 * 320 * 864)


def test_a_turn_keeps_the_lock_until_it_is_over(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    now = [0.0]
    monkeypatch.setattr(cpu_cases.time, "monotonic", lambda: now[0])
    turn = cpu_cases._Turn()

    def is_free():
        with path.open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    turn.take(str(path))
    now[0] = cpu_cases.MAX_TURN_SECONDS
    turn.give()
    assert not is_free()
    now[0] += 1
    turn.give()
    assert is_free()
    turn.take(str(path))
    assert not is_free()


def test_a_run_that_is_ended_tells_what_it_has(monkeypatch, capsys, tmp_path):
    limits = {"read_bytes_per_second": 1e11, "bf16_flops_per_second": 1e12, "int8_ops_per_second": 1e12}
    monkeypatch.setattr(cpu_limits, "measure", lambda threads: limits)
    monkeypatch.delenv(cpu_cases.LOCK_VARIABLE, raising=False)
    asked = []

    def measure(program, name, task, *, environment):
        asked.append((name, task.scheme))
        if len(asked) == 2:
            raise SystemExit(143)
        return {"decode1": exactly(300.0)}

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setenv("LLMSCALE_BENCH_CACHE", str(tmp_path))
    (tmp_path / "S-seed0").mkdir()
    (tmp_path / "S-seed0/config.json").touch()
    options = {"model": "S", "sections": "offline", "cases": "decode1", "runtimes": OURS, "schemes": None, "seed": 0}
    options |= {"quick": False, "repeats": 3, "threads": None, "peers": None, "markdown": tmp_path / "table.md"}
    with pytest.raises(SystemExit):
        cpu.main(argparse.Namespace(**options))
    assert asked == [("llmscale", "bf16"), ("llmscale", "int8")]
    assert "| S/decode1 | 300 (300-300) |" in capsys.readouterr().err
    assert "300 (300-300) bf16" in (tmp_path / "table.md").read_text()


def test_no_measure_of_a_server_begins_with_a_prompt_that_another_has_sent():
    """A block of 32 ids that came before would be in a prefix cache."""
    seeds = {"served": [], "mixed": []}

    class Recorder:
        def __init__(self, measure):
            self.seeds = seeds[measure]

        def load(self, seed, **_options):
            self.seeds.append(seed)
            return Run()

    class Run:
        tokens_per_second = 1.0

        def gap_ms(self, _percent):
            return 1.0

        def first_token_ms(self, _percent, *, of_long=False):
            return 1.0 + of_long

    cpu_servers.served(Recorder("served"), 5, 7)
    cpu_servers.mixed(Recorder("mixed"), 5, 7)
    sent = seeds["served"] + seeds["mixed"]
    assert len(sent) == 16
    assert len(set(sent)) == len(sent)
