"""Goal: what the KV pool has no room for goes to the host and comes back, and no id of any answer shows it.

Method: tiny-chat in float32 with a pool of a few sequences, offline and served; ids are compared with those of a pool
that holds everything. Real workers are killed and real bytes of the host's memory overwritten between two turns.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from functools import cache
from typing import Any

import psutil
import pytest

from llmscale import LLM, SamplingParams
from llmscale.config import NodeSettings
from llmscale.node.plan import plan_replica
from tests.e2e.test_worker_death import first_difference
from tests.processes import Server, serving, wait_until

pytestmark = pytest.mark.usefixtures("slow_processor")

MAX_TOKENS = 512
POOL_BLOCKS = 24
"""Two conversations and a half."""
CONVERSATIONS = 8
TURN_TOKENS = 200
ANSWER_TOKENS = 24


@cache
def block_bytes() -> int:
    return plan_replica(NodeSettings(model="tiny-chat", listen="", dtype="float32")).block_bytes


def conversation(number: int, tokens: int) -> list[int]:
    """Ids of no meaning that share no beginning with another conversation's."""
    return [20 + (number * 7_919 + at * at * 31 + at) % 1_900 for at in range(tokens)]


def llm(pool_blocks: int, host_blocks: int) -> LLM:
    return LLM(
        "tiny-chat",
        dtype="float32",
        max_model_len=MAX_TOKENS,
        max_num_seqs=8,
        kv_cache_bytes=pool_blocks * block_bytes(),
        kv_host_bytes=host_blocks * block_bytes(),
        threads=1,
    )


def answers(model: LLM, prompts: Sequence[list[int]], max_tokens: int) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=max_tokens, ignore_eos=True)
    return [output.outputs[0].token_ids for output in model.generate(prompts, params)]


def two_turns(model: LLM) -> list[tuple[int, ...]]:
    """Every conversation's first turn, one after the other, then every second turn."""
    said = []
    for number in range(CONVERSATIONS):
        prompt = conversation(number, TURN_TOKENS)
        said.append([*prompt, *answers(model, [prompt], ANSWER_TOKENS)[0], 20 + number])
    return [answers(model, [prompt], ANSWER_TOKENS)[0] for prompt in said]


def test_conversations_that_come_back_after_their_eviction_are_copied_back_and_go_on_alike() -> None:
    roomy, tight = llm(512, 0), llm(POOL_BLOCKS, 512)
    assert two_turns(tight) == two_turns(roomy)
    evicted, offloaded, restored, bad = tight._replica.copied_blocks()
    assert evicted > CONVERSATIONS * 4
    assert offloaded > CONVERSATIONS * 4
    # A second turn finds the six full blocks of its first one, unless a busy machine makes copies look dear.
    assert restored >= CONVERSATIONS * 6 / 2
    assert bad == 0
    assert roomy._replica.copied_blocks() == (0, 0, 0, 0)


def test_what_is_preempted_under_pressure_comes_back_by_copies_and_says_the_same() -> None:
    roomy, tight = llm(512, 0), llm(POOL_BLOCKS, 512)
    prompts = [conversation(number, 40 + number) for number in range(8)]
    assert answers(tight, prompts, 200) == answers(roomy, prompts, 200)
    preemptions = tight._replica.load()[4]
    restored = tight._replica.copied_blocks()[2]
    assert preemptions > 0, "eight sequences of 240 tokens did not fit a pool of 24 blocks"
    assert restored > 0, "what was preempted was copied back"
    assert roomy._replica.load()[4] == 0


def body(number: int) -> dict[str, Any]:
    return {
        "model": "tiny-chat",
        "prompt": conversation(number, TURN_TOKENS),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.8,
        "seed": number,
        "ignore_eos": True,
    }


def ask(server: Server, number: int) -> tuple[list[str], int]:
    """Text of a conversation's answer, by letters, and how many tokens of its prompt were cached."""
    answer = server.post("/v1/completions", body(number))
    assert answer.status_code == 200, answer.text
    said = answer.json()
    cached: int = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    return list(said["choices"][0]["text"]), cached


def serve_options(*more: str, host_blocks: int = 512, pool_blocks: int = POOL_BLOCKS) -> tuple[str, ...]:
    return (
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--max-model-len",
        str(MAX_TOKENS),
        "--kv-cache-bytes",
        str(pool_blocks * block_bytes()),
        "--kv-host-bytes",
        str(host_blocks * block_bytes()),
        *more,
    )


def copied(server: Server, which: str) -> float:
    """How many blocks the only replica has offloaded, restored, or found bad on the host, as /metrics says."""
    lines = [line.split() for line in server.get("/metrics").text.splitlines()]
    name = f"llmscale:kv_{which}_blocks_total{{"
    (count,) = [float(words[1]) for words in lines if words and words[0].startswith(name)]
    return count


def host_memory(server: Server) -> list[str]:
    """Where the node of a server keeps its host tier, a path per rank."""
    (node,) = [one for one in server.family() if "llmscale.node" in " ".join(one.cmdline())]
    folder = f"/proc/{node.pid}/fd"
    paths = [f"{folder}/{descriptor}" for descriptor in os.listdir(folder)]
    return [path for path in paths if re.match(r"/memfd:llmscale-host-tier", os.readlink(path))]


def overwrite(path: str) -> None:
    """Every byte behind the headers, as no checksum would have it."""
    with open(path, "r+b") as memory:
        size = os.fstat(memory.fileno()).st_size
        first = size - 512 * block_bytes()
        memory.seek(first)
        memory.write(b"\xa5" * (size - first))


def test_what_lies_on_the_host_outlives_a_killed_worker_and_bad_bytes_there_are_never_used() -> None:
    with serving("tiny-chat", *serve_options()) as server:
        first = [ask(server, number) for number in range(CONVERSATIONS)]
        assert [cached for _, cached in first] == [0] * CONVERSATIONS

        worker = server.worker_pid()
        os.kill(worker, signal.SIGKILL)
        wait_until(
            lambda: not psutil.pid_exists(worker) and server.worker_pid() != worker, 60, "the worker is replaced"
        )
        # The pool died with the worker, and with it the three last conversations and the beginning of one before.
        again = [ask(server, number) for number in range(CONVERSATIONS)]
        assert [text for text, _ in again] == [text for text, _ in first]
        assert sum(cached for _, cached in again) >= (CONVERSATIONS - 4) * 160 / 2
        wait_until(lambda: copied(server, "restored") > 0, 120, "the node has told of its copies")

        (path,) = host_memory(server)
        overwrite(path)
        worker = server.worker_pid()
        third = [ask(server, number) for number in range(CONVERSATIONS)]
        for (text, _), (told, _) in zip(third, first, strict=True):
            assert first_difference(text, told) is None
        wait_until(lambda: copied(server, "bad_host") > 0, 120, "bad blocks were found and counted")
        assert server.worker_pid() == worker, "bad bytes on the host are no reason to end a worker"


def test_every_rank_of_a_group_keeps_its_part_of_the_blocks() -> None:
    with serving("tiny-chat", *serve_options("-tp", "2")) as server:
        first = [ask(server, number) for number in range(CONVERSATIONS)]
        again = [ask(server, number) for number in range(CONVERSATIONS)]
        assert [text for text, _ in again] == [text for text, _ in first]
        assert sum(cached for _, cached in again) >= CONVERSATIONS * 160 / 2
        wait_until(lambda: copied(server, "restored") > 0, 120, "the node has told of its copies")
        assert len(host_memory(server)) == 2
