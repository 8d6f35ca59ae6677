"""Goal: several models of one fleet file answer behind one gateway, and what happens to one leaves the other alone.

Method: tiny-chat and tiny-chat-mini in one `llmscale.toml`, real processes, the official client; a worker is killed in
mid-stream, a node elsewhere (with keys) comes after the gateway.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import openai
import pytest

from llmscale.cli.keys import run as make_keys
from tests.e2e.test_worker_death import first_difference
from tests.fleet import Fleet
from tests.processes import Server, free_port, serving_fleet, wait_until
from tests.support_processes import node

MODELS = ("tiny-chat", "mini")
STREAMS = 6
# Float32, so that a continued stream has the ids of an undisturbed one. On a busy machine a node that lives may say
# nothing for seconds.
BOTH = """
max_node_silence_seconds = 30

[models.tiny-chat]
model = "tiny-chat"
dtype = "float32"

[models.mini]
model = "tiny-chat-mini"
dtype = "float32"
"""
QUESTION: Any = [{"role": "user", "content": "What is 23 + 45?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, slow_processor: None) -> Iterator[Server]:
    with serving_fleet(tmp_path_factory.mktemp("fleet"), BOTH) as server:
        yield server


def replicas(server: Server) -> dict[str, dict[str, Any]]:
    """What /fleet says of each model's only replica."""
    return {one["model"]: one for one in server.replicas()}


async def test_both_models_answer_the_official_client_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == list(MODELS)

        async def story(model: str, seed: int) -> str:
            stream = await client.completions.create(
                model=model, prompt="Once upon a time", max_tokens=48, temperature=1, seed=seed, stream=True
            )
            chunks = [chunk async for chunk in stream]
            assert {chunk.model for chunk in chunks} == {model}
            return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

        alone = {model: [await story(model, seed) for seed in range(4)] for model in MODELS}
        mixed = await asyncio.gather(*(story(model, seed) for seed in range(4) for model in MODELS))
        assert {model: list(mixed[place::2]) for place, model in enumerate(MODELS)} == alone
        assert not set(alone["tiny-chat"]) & set(alone["mini"]), "they are not one model under two names"
        answers = await asyncio.gather(
            *(client.chat.completions.create(model=model, messages=QUESTION, temperature=0) for model in MODELS)
        )
        assert [answer.choices[0].message.content for answer in answers] == ["68", "68"]
        with pytest.raises(openai.NotFoundError, match="served are: mini, tiny-chat"):
            await client.chat.completions.create(model="tiny-chat-mini", messages=QUESTION)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One answer: its characters, and what the comments in it say of restarts."""

    text: list[str]
    restarts: list[str]


def streamed(server: Server, model: str, seed: int, begun: Event | None = None) -> Streamed:
    """A stream to its end; `begun` is set when it has text."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 1_000, "ignore_eos": True, "seed": seed}
    text: list[str] = []
    restarts: list[str] = []
    last = ""
    with server.client.stream("POST", f"{server.base}/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith(": restarts"):
                restarts.append(line)
            elif line.startswith("data: {"):
                text += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
                if begun is not None and any(text):
                    begun.set()
            last = line or last
    assert last == "data: [DONE]"
    return Streamed(list("".join(text)), restarts)


ASKED = [(model, seed) for seed in range(STREAMS) for model in MODELS]


def survived(server: Server, pool: ThreadPoolExecutor) -> list[Streamed]:
    """All streams, of which every one has text when the worker of tiny-chat is killed."""
    begun = [Event() for _ in ASKED]
    victim = replicas(server)["tiny-chat"]
    streams = [pool.submit(streamed, server, *one, has_text) for one, has_text in zip(ASKED, begun, strict=True)]
    both = list(zip(begun, streams, strict=True))
    wait_until(lambda: all(has_text.is_set() or one.done() for has_text, one in both), 120, "every stream has text")
    os.kill(victim["worker_pid"], signal.SIGKILL)
    found = [stream.result() for stream in streams]
    wait_until(lambda: is_replaced(server, victim), 120, "there is another worker")
    return found


def is_replaced(server: Server, before: dict[str, Any]) -> bool:
    """Whether one worker has followed on that of before, and serves."""
    now = replicas(server)[before["model"]]
    return bool(now["state"] == "ready" and now["worker_restarts"] == before["worker_restarts"] + 1)


def test_the_death_of_one_models_worker_leaves_the_streams_of_the_other_alone(server: Server) -> None:
    with ThreadPoolExecutor(len(ASKED)) as pool:
        undisturbed = list(pool.map(lambda one: streamed(server, *one), ASKED))
        before = replicas(server)["mini"]
        # What this process reads lags behind: on a busy machine the last token may be computed before the kill. Then
        # other streams are made.
        for _ in range(5):
            found = survived(server, pool)
            differences = [
                first_difference(one.text, other.text) for one, other in zip(undisturbed, found, strict=True)
            ]
            assert differences == [None] * len(ASKED)
            restarts = {
                model: [one.restarts for one, of in zip(found, ASKED, strict=True) if of[0] == model]
                for model in MODELS
            }
            if any(restarts["tiny-chat"]):
                break
        assert any(restarts["tiny-chat"]), "five kills came after the last token"
    assert restarts["mini"] == [[]] * STREAMS
    after = replicas(server)["mini"]
    for figure in ("node", "worker_pid", "worker_restarts", "preemptions"):
        assert after[figure] == before[figure]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("keyed") / "keys"
    make_keys(folder, ("node", "gateway:edge", "client:app:acme"), force=False)
    return folder


@pytest.mark.parametrize("module", ["llmscale.cli serve", "llmscale.gateway"])
def test_a_node_elsewhere_is_found_when_it_comes_and_the_model_here_has_not_waited(
    keys: Path, tmp_path: Path, module: str
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    text = f"""
[keys]
folder = "{keys}"
gateway = "edge"

[models.tiny-chat]
model = "tiny-chat"
threads = 1

[models.mini]
model = "tiny-chat-mini"
nodes = ["{address}"]
"""
    body = {"messages": QUESTION, "temperature": 0, "model": "tiny-chat"}
    with serving_fleet(tmp_path, text, module=module, is_ready=False) as server:
        wait_until(lambda: "no replica of mini (down)" in said(server), 120, "only the model elsewhere is missing")
        assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "68"
        refused = server.post("/v1/chat/completions", body | {"model": "mini"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        with Fleet(keys, keys).node(tmp_path, "--model=tiny-chat-mini", "--served-name=mini", address=address):
            wait_until(server.is_ready, 120, "the gateway has found the node")
            answer = server.post("/v1/chat/completions", body | {"model": "mini"})
            assert answer.json()["choices"][0]["message"]["content"] == "68"
        wait_until(lambda: "no replica of mini (down)" in said(server), 120, "the node is gone again")
        assert server.post("/v1/chat/completions", body).status_code == 200


def said(server: Server) -> str:
    """What a gateway that is not ready says of it."""
    text: str = server.get("/health/ready").text
    return text


def test_replicas_of_one_name_that_are_not_the_same_are_named_once(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    odd = ("--model=tiny-chat-mini", "--served-name=tiny-chat", "--dtype=float32", "--max-model-len=512")
    with node(tmp_path / "node", *odd) as other:
        text = f"""
[models.tiny-chat]
model = "tiny-chat"
dtype = "bfloat16"
replicas = 1
nodes = ["{other.address}"]
"""
        with serving_fleet(tmp_path, text) as server:
            wait_until(lambda: len(server.replicas()) == 2, 120, "both are there")
            wait_until(lambda: "take sequences of 512 and 2048 tokens" in server.log(), 120, "it is said")
    for said in ("have the weights", "compute as", "take sequences of"):
        assert server.log().count(f"replicas of tiny-chat {said}") == 1, server.log()
    assert "have the tokenizer" not in server.log(), "both models read text alike"
