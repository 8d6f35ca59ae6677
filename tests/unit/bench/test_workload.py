"""Traces and drawn arrivals."""

import gzip
import json

import pytest

from bench.workload import Arrival, InvalidTrace, fit, load_trace, poisson

TABLE = "t_ms,prompt_tokens,output_tokens\n2000,30,4\n500,10,2\n5000,7,1\n"


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_table_is_read_in_order_of_arrival_from_its_first_request(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(TABLE.encode()) if name.endswith("gz") else TABLE.encode())
    assert load_trace(path) == [Arrival(0.0, 10, 2), Arrival(1.5, 30, 4), Arrival(4.5, 7, 1)]
    assert [arrival.at_seconds for arrival in load_trace(path, speed=3)] == [0, 0.5, 1.5]
    assert len(load_trace(path, max_requests=2)) == 2


def test_a_mooncake_trace_is_read(tmp_path):
    rows = [{"timestamp": at, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]} for at in (3_000, 0)]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert load_trace(path) == [Arrival(0, 6755, 500), Arrival(3, 6755, 500)]


@pytest.mark.parametrize(
    "text", ["t_ms,prompt_tokens,output_tokens\n1,x,2\n", "a,b\n1,2\n", "t_ms,prompt_tokens,output_tokens\n1,0,2\n", ""]
)
def test_a_trace_that_is_none_is_refused_with_its_place(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidTrace, match=r"trace\.csv"):
        load_trace(path)


def test_broken_json_is_refused_with_its_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{')
    with pytest.raises(InvalidTrace, match=":2"):
        load_trace(path)


def test_poisson_arrivals_are_the_same_for_one_seed_and_have_their_rate():
    drawn = poisson(50, 200, 100, 20, seed=1)
    assert drawn == poisson(50, 200, 100, 20, seed=1)
    assert drawn != poisson(50, 200, 100, 20, seed=2)
    # 10,000 arrivals have a standard deviation of 100.
    assert abs(len(drawn) - 10_000) < 500
    assert abs(sum(arrival.prompt_tokens for arrival in drawn) / len(drawn) - 100) < 5
    assert all(arrival.output_tokens >= 1 and 0 <= arrival.at_seconds < 200 for arrival in drawn)


def test_lengths_beyond_the_model_are_cut_and_counted():
    fitted, cut = fit([Arrival(0, 10, 10), Arrival(1, 500, 10), Arrival(2, 10, 500)], 100)
    assert fitted == [Arrival(0, 10, 10), Arrival(1, 90, 10), Arrival(2, 10, 50)]
    assert cut == 2
