"""The traces that `bench router` plays."""

import gzip
import json

from bench.router import simple_model


def test_a_trace_becomes_lines_and_the_speed_at_which_sixteen_replicas_just_keep_up(tmp_path):
    requests = [
        {"timestamp": 0, "input_length": 1_000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 3_000, "input_length": 600, "output_length": 5, "hash_ids": [0, 2]},
    ]
    text = "".join(json.dumps(request) + "\n" for request in requests)
    plain, packed = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    lines = ["0 1000 0 1", "3000000 600 0 2"]
    # 1,600 tokens in 3 s are 100 tokens per replica: 30 ms each.
    assert simple_model(plain) == (lines, 30_000_000)
    assert simple_model(packed) == simple_model(plain)
