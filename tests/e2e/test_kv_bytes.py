"""Goal: keys and values kept as bytes are named where it matters, go through every tier, and are served.

Method: tiny-chat in float32 with `kv_dtype="int8"`, offline and served, with a pool of two conversations above a host
tier and a disk; ids are compared with those of a pool that holds everything.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from llmscale import LLM, SamplingParams
from llmscale.config import NodeSettings
from llmscale.errors import ConfigError
from llmscale.node.plan import plan_replica
from tests.e2e.test_host_tier import (
    ANSWER_TOKENS,
    CONVERSATIONS,
    MAX_TOKENS,
    POOL_BLOCKS,
    TURN_TOKENS,
    answers,
    ask,
    conversation,
    two_turns,
)
from tests.processes import serving

pytestmark = pytest.mark.usefixtures("slow_processor")

HOST_BLOCKS = 32
DISK_BLOCKS = 256


@cache
def block_bytes(kv_dtype: str = "int8") -> int:
    settings = NodeSettings(model="tiny-chat", listen="", dtype="float32", kv_dtype=kv_dtype)
    return plan_replica(settings).block_bytes


def llm(pool_blocks: int, host_blocks: int = 0, folder: Path | None = None, kv_dtype: str = "int8") -> LLM:
    disk_bytes = DISK_BLOCKS * (block_bytes(kv_dtype) + 4_096 + 32 + 216) + 2 * (4_096 + 32)
    return LLM(
        "tiny-chat",
        dtype="float32",
        kv_dtype=kv_dtype,
        max_model_len=MAX_TOKENS,
        max_num_seqs=8,
        kv_cache_bytes=pool_blocks * block_bytes(kv_dtype),
        kv_host_bytes=host_blocks * block_bytes(kv_dtype),
        kv_disk=folder,
        kv_disk_bytes=None if folder is None else disk_bytes,
        threads=1,
    )


def test_evicted_blocks_come_back_from_the_host_and_say_the_same() -> None:
    roomy, tight = llm(512), llm(POOL_BLOCKS, 512)
    assert two_turns(tight) == two_turns(roomy)
    tight._replica.check()
    _, offloaded, restored, bad = tight._replica.copied_blocks()
    assert offloaded >= CONVERSATIONS / 2
    assert restored >= CONVERSATIONS / 2
    assert bad == 0


def test_the_disk_keeps_them_for_the_next_process_and_never_for_another_format(tmp_path: Path) -> None:
    roomy, tight = llm(512), llm(POOL_BLOCKS, HOST_BLOCKS, tmp_path)
    assert two_turns(tight) == two_turns(roomy)
    assert tight._replica.disk_blocks()[0] >= CONVERSATIONS
    tight.close()

    again = llm(POOL_BLOCKS, HOST_BLOCKS, tmp_path)
    assert two_turns(again) == two_turns(roomy)
    assert again._replica.disk_blocks()[1] >= CONVERSATIONS / 2
    again.close()

    other = llm(POOL_BLOCKS, HOST_BLOCKS, tmp_path, kv_dtype="auto")
    for number in range(2):
        answers(other, [conversation(number, TURN_TOKENS)], ANSWER_TOKENS)
    assert other._replica.disk_blocks()[1] == 0
    assert other._replica.load()[5] == 0


def test_the_numerics_say_so() -> None:
    assert llm(512).numerics == llm(512, kv_dtype="auto").numerics + "/kv-int8"


@pytest.mark.parametrize("options", [("--executor", "torch"), ("-tp", "2")], ids=str)
def test_who_cannot_keep_bytes_refuses_before_anything_is_loaded(options: tuple[str, ...]) -> None:
    executor = "torch" if options[0] == "--executor" else "auto"
    ranks = 2 if options[0] == "-tp" else 1
    settings = NodeSettings(
        model="tiny-chat", listen="", kv_dtype="int8", executor=executor, tensor_parallel_size=ranks
    )
    with pytest.raises(ConfigError, match=r"kv_dtype is 'int8', and the torch executor keeps .* leave it at auto"):
        plan_replica(settings)


def test_a_server_computes_with_them_what_a_process_computes() -> None:
    with serving("tiny-chat", "--kv-dtype", "int8", "--dtype", "float32", "--threads", "1") as server:
        served = [ask(server, number)[0] for number in range(3)]
    model = llm(512)
    offline = []
    for number in range(3):
        params = SamplingParams(temperature=0.8, seed=number, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        offline.append(list(model.generate([conversation(number, TURN_TOKENS)], params)[0].outputs[0].text))
    assert served == offline
