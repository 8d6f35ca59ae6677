"""Answers of an offline worker on the fake device with Triton's operations and sampler, and of one on the CPU, as JSON.

To be run with `TRITON_INTERPRET=1`, which must be set before Triton is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from llmscale import LLM, SamplingParams
from llmscale.devices import registry
from tests.fakes.fake_device.machine import SCRIPT

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "executor": "torch",
}
ASKED = [
    SamplingParams(max_tokens=3, temperature=0.0),
    SamplingParams(max_tokens=3, seed=5, top_k=20, top_p=0.9, repetition_penalty=1.2, logprobs=2, min_tokens=3),
]


def said() -> list[tuple[int, ...]]:
    llm = LLM("tiny-chat-mini", device="cpu", **OPTIONS)
    outputs = llm.generate([[20, 30, 40, 50, 60], [25, 35, 45]], ASKED)
    return [output.outputs[0].token_ids for output in outputs]


def main() -> None:
    on_cpu = said()
    registry.DEVICES["cpu"] = "tests.fakes.fake_device.device"
    SCRIPT.triton, SCRIPT.strict = True, False
    json.dump({"cpu": on_cpu, "triton": said(), "broken": SCRIPT.broken}, sys.stdout)


if __name__ == "__main__":
    main()
