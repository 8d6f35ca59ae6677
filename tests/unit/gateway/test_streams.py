"""Streams: what they say, how they end, and what they leave behind when nobody reads."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from llmscale.gateway import services
from llmscale.gateway.answers import CompletionFormat
from llmscale.gateway.config import GatewayLimits
from llmscale.gateway.reply import Reply
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeReplica
from tests.fakes.gateway_server import Serving, serving, until

QUESTION = [{"role": "user", "content": "hello"}]


def endless(tokenizer: Tokenizer, text: str = " hello") -> FakeFront:
    ids = tokenizer.encode(text)

    def forever(_prompt: Any, _sampling: Any) -> Iterator[int]:
        while True:
            yield from ids

    return FakeFront(tokens=forever, automatic=False)


def request(gateway: Serving, path: str = "/v1/completions", **fields: Any) -> bytes:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1_000, "stream": True, **fields}
    if path.endswith("chat/completions"):
        body["messages"] = QUESTION
        del body["prompt"]
    content = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


async def events(reader: asyncio.StreamReader, count: int) -> list[str]:
    """The next events or comments of a stream, without the framing of the chunks."""
    found: list[str] = []
    async with asyncio.timeout(120):
        while len(found) < count:
            line = (await reader.readline()).decode().rstrip("\r\n")
            if line.startswith(("data: ", ": ")):
                found.append(line)
    return found


async def test_tokens_of_one_wake_up_are_one_write(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway))
        await until(lambda: front.live)
        front.step(tokens=5)
        [event] = await events(reader, 1)
        writer.close()
    assert json.loads(event[6:])["choices"][0]["text"] == tokenizer.decode(tokenizer.encode(" hello" * 5)[:5])


async def test_a_client_that_leaves_cancels_its_stream(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway, n=2))
        await until(lambda: len(front.live) == 2)
        front.step()
        await events(reader, 1)
        writer.close()
        await until(lambda: front.cancelled == {1: None, 2: None})
        assert gateway.gateway.services.driver.live_replies == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_while_its_request_is_queued_cancels_it(tokenizer: Tokenizer, stream: bool) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        _, writer = await gateway.raw()
        writer.write(request(gateway, stream=stream))
        await until(lambda: front.live)
        writer.transport.abort()
        await until(lambda: 1 in front.cancelled)


async def test_a_client_that_closes_only_its_sending_side_is_gone(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        _, writer = await gateway.raw()
        writer.write(request(gateway))
        await until(lambda: front.live)
        writer.write_eof()
        await until(lambda: 1 in front.cancelled)
        writer.close()


async def test_a_slow_reader_is_evicted_and_others_go_on(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    limits = GatewayLimits(max_stall_seconds=2, max_stream_buffer_bytes=100_000, max_drain_seconds=1)
    async with serving(tokenizer, front, limits=limits, max_sequence_tokens=1 << 20) as gateway:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", gateway.port))
        # Log probabilities make the events large, so that the kernel's buffers fill soon.
        await asyncio.get_running_loop().sock_sendall(slow, request(gateway, max_tokens=49_000, logprobs=20))
        reader, writer = await gateway.raw()
        writer.write(request(gateway, max_tokens=500_000))
        await until(lambda: len(front.live) == 2)

        async def generate() -> None:
            while 1 not in front.cancelled:
                front.step(tokens=20)
                await asyncio.sleep(0.001)

        async def read() -> None:
            while await reader.read(1 << 16):
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.wait_for(generate(), 60)
        assert 2 not in front.cancelled
        assert gateway.gateway.services.metrics.evicted_readers == 1
        slow.close()
        writer.close()
        await reading


async def test_an_idle_stream_is_pinged(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front, limits=GatewayLimits(ping_seconds=0.5, max_drain_seconds=1)) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway))
        assert await events(reader, 1) == [": ping"]
        front.step()
        # On a busy machine there may be more of them before the token.
        while (event := (await events(reader, 1))[0]) == ": ping":
            pass
        assert "hello" in event
        writer.close()


async def test_a_stop_string_over_two_tokens_ends_the_sequence_at_its_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two. stop here and more")
    front = FakeFront(tokens=lambda _prompt, _sampling: iter(ids))
    async with serving(tokenizer, front) as gateway:
        answer = await gateway.client().completions.create(model="tiny", prompt="x", stop=[" stop he"], max_tokens=100)
    [choice] = answer.choices
    position = next(n for n in range(len(ids)) if " stop he" in tokenizer.decode(ids[:n]))
    assert (choice.text, choice.finish_reason) == ("one two.", "stop")
    assert choice.model_extra == {"stop_reason": " stop he"}
    assert front.cancelled == {1: position}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == position


async def test_the_stop_string_is_kept_when_it_is_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two. stop here and more")
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter(ids))) as gateway:
        answer = await gateway.client().completions.create(
            model="tiny", prompt="x", stop="stop", max_tokens=100, extra_body={"include_stop_str_in_output": True}
        )
    assert answer.choices[0].text == "one two. stop"


async def test_stop_strings_are_not_looked_for_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("stop stop stop stop")
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter(ids))) as gateway:
        answer = await gateway.client().completions.create(
            model="tiny", prompt="x", stop="stop", max_tokens=100, extra_body={"min_tokens": 3}
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 3


async def test_a_stop_token_is_named_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    front = FakeFront(tokens=lambda _prompt, _sampling: iter(ids))
    async with serving(tokenizer, front) as gateway:
        answer = await gateway.client().completions.create(
            model="tiny", prompt="x", max_tokens=100, extra_body={"stop_token_ids": [ids[-1]]}
        )
    assert answer.choices[0].text == tokenizer.decode(ids[:-1])
    assert answer.choices[0].model_extra == {"stop_reason": ids[-1]}


async def test_choices_of_several_prompts_keep_their_index_and_count_prompts_once(tokenizer: Tokenizer) -> None:
    front = FakeFront(tokens=lambda prompt, sampling: iter([prompt[0], 10 + sampling.choice, 2]))
    async with serving(tokenizer, front) as gateway:
        answer = await gateway.client().completions.create(
            model="tiny", prompt=[[30, 31], [40]], n=2, max_tokens=10, seed=-1
        )
    expected = [tokenizer.decode([first, 10 + choice]) for first in (30, 40) for choice in (0, 1)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    assert {entry.sampling.seed for entry in front.submitted.values()} == {(1 << 64) - 1}


async def test_echo_repeats_the_prompt_whole_and_streamed(tokenizer: Tokenizer) -> None:
    front = FakeFront(tokens=lambda _prompt, _sampling: iter([*tokenizer.encode(" dog"), 2]))
    async with serving(tokenizer, front) as gateway:
        client = gateway.client()
        whole = await client.completions.create(model="tiny", prompt="the lazy", echo=True)
        stream = await client.completions.create(model="tiny", prompt="the lazy", echo=True, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
    assert whole.choices[0].text == streamed == "the lazy dog"


@pytest.mark.parametrize("stream", [True, False])
async def test_chat_log_probabilities_have_an_entry_per_token(tokenizer: Tokenizer, stream: bool) -> None:
    ids = tokenizer.encode("one two é")
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter([*ids, 2]))) as gateway:
        create = gateway.client().chat.completions.create
        if stream:
            chunks = await create(model="tiny", messages=QUESTION, logprobs=True, top_logprobs=3, stream=True)
            rows = [
                row
                async for chunk in chunks
                for row in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else None) or []
            ]
        else:
            answer = await create(model="tiny", messages=QUESTION, logprobs=True, top_logprobs=3)
            assert answer.choices[0].logprobs is not None
            rows = list(answer.choices[0].logprobs.content or [])
    assert b"".join(bytes(row.bytes or []) for row in rows[:-1]).decode() == "one two é"
    assert all(row.logprob == -0.25 and len(row.top_logprobs) == 3 for row in rows)


async def test_completion_log_probabilities_are_parallel_lists_with_offsets(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two")
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter(ids))) as gateway:
        answer = await gateway.client().completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=len(ids))
    rows = answer.choices[0].logprobs
    assert rows is not None
    assert rows.tokens is not None
    assert "".join(rows.tokens) == "one two"
    assert rows.text_offset == [len("".join(rows.tokens[:n])) for n in range(len(rows.tokens))]
    assert rows.token_logprobs == [-0.25] * len(ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_are_parts_of_characters_are_named_by_their_bytes(tokenizer: Tokenizer, stream: bool) -> None:
    ids = tokenizer.encode("a€b")
    parts = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(parts) == "a€b".encode()
    assert len(parts) > 3, "the tokenizer knows no such character"
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter(ids))) as gateway:
        create = gateway.client().completions.create
        if stream:
            chunks = await create(model="tiny", prompt="x", logprobs=2, max_tokens=len(ids), stream=True)
            found = [chunk.choices[0].logprobs async for chunk in chunks if chunk.choices]
        else:
            answer = await create(model="tiny", prompt="x", logprobs=2, max_tokens=len(ids))
            found = [answer.choices[0].logprobs]
    rows = [rows for rows in found if rows is not None]
    tokens = [token for part in rows for token in part.tokens or []]
    offsets = [offset for part in rows for offset in part.text_offset or []]
    assert tokens[0] == "a"
    assert tokens[-1] == "b"
    assert all(token.startswith("bytes:\\x") for token in tokens[1:-1]), tokens
    assert offsets == [0, *[1] * (len(ids) - 2), 2]


async def test_answers_with_many_log_probabilities_are_written_beside_the_event_loop(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    whole = CompletionFormat.whole

    def watched(form: CompletionFormat, reply: Reply) -> bytes:
        threads.append(threading.current_thread().name)
        return whole(form, reply)

    monkeypatch.setattr(CompletionFormat, "whole", watched)
    monkeypatch.setattr(services, "MAX_INLINE_VALUES", 30)
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter([5] * 20))) as gateway:
        create = gateway.client().completions.create
        answers = [await create(model="tiny", prompt="x", logprobs=2, max_tokens=count) for count in (10, 11)]
    found = [answer.choices[0].logprobs for answer in answers]
    assert [len(rows.tokens or []) for rows in found if rows is not None] == [10, 11]
    assert threads[0] == threading.current_thread().name
    assert threads[1].startswith("llmscale-prompts")


FAILURES = {
    "aborted": (500, "cancelled"),
    "deadline_exceeded": (504, "deadline_exceeded"),
    "request_poisoned": (500, "request_poisoned"),
    "not_a_number": (500, "not_a_number"),
    "nothing_to_sample": (400, "nothing_to_sample"),
    "unavailable": (503, "unavailable"),
}


@pytest.mark.parametrize("reason", FAILURES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_token_is_the_status(tokenizer: Tokenizer, reason: str, stream: bool) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        asking = asyncio.ensure_future(
            gateway.client().completions.create(model="tiny", prompt="x", n=2, stream=stream)
        )
        await until(lambda: len(front.live) == 2)
        front.fail(1, reason)
        with pytest.raises(openai.APIStatusError) as failed:
            await asking
        await until(lambda: 2 in front.cancelled)
    assert (failed.value.status_code, failed.value.code) == FAILURES[reason]


async def test_a_failure_after_the_first_token_is_an_event(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway, "/v1/chat/completions"))
        await until(lambda: front.live)
        front.step()
        await events(reader, 2)
        front.fail(1, "request_poisoned")
        error, done = await events(reader, 2)
        writer.close()
    assert json.loads(error[6:])["error"]["code"] == "request_poisoned"
    assert done == "data: [DONE]"


async def test_a_stream_says_that_it_survived_a_restart(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway))
        await until(lambda: front.live)
        front.step()
        await events(reader, 1)
        front.live[1].restarts = 1
        front.step()
        comment, event = await events(reader, 2)
        writer.close()
    assert comment == ": restarts 1"
    assert "hello" in event


async def test_a_gap_in_the_tokens_ends_the_request_and_not_the_gateway(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        client = gateway.client()
        asking = [
            asyncio.ensure_future(client.completions.create(model="tiny", prompt="x", max_tokens=2)) for _ in range(2)
        ]
        await until(lambda: len(front.live) == 2)
        front.live[1].emitted = 7
        front.step()
        front.step()
        results = await asyncio.gather(*asking, return_exceptions=True)
    [failed] = [result for result in results if isinstance(result, openai.InternalServerError)]
    assert failed.code == "internal_error"
    assert sum(not isinstance(result, Exception) for result in results) == 1


async def test_when_the_gateway_ends_streams_end_with_an_error_that_says_so(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front, limits=GatewayLimits(max_drain_seconds=1)) as gateway:
        reader, writer = await gateway.raw()
        writer.write(request(gateway))
        await until(lambda: front.live)
        front.step()
        await events(reader, 1)
        gateway.server.should_exit = True
        received = await events(reader, 2)
        assert json.loads(received[0][6:])["error"]["code"] == "unavailable"
        assert received[1] == "data: [DONE]"
        assert 1 in front.cancelled
        writer.close()


async def test_a_draining_gateway_is_not_ready_and_lets_streams_finish(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front, limits=GatewayLimits(max_drain_seconds=20)) as gateway:
        kept_reader, kept_writer = await gateway.raw()
        probe = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
        kept_writer.write(probe)
        assert b"200 OK" in await kept_reader.readuntil(b"}")
        reader, writer = await gateway.raw()
        writer.write(request(gateway, max_tokens=2))
        await until(lambda: front.live)
        front.step()
        await events(reader, 1)
        gateway.gateway.services.draining = True
        kept_writer.write(probe)
        assert b"503 Service Unavailable" in await kept_reader.readuntil(b"}}")
        gateway.server.should_exit = True
        front.step()
        received = await events(reader, 2)
        assert json.loads(received[0][6:])["choices"][0]["finish_reason"] == "length"
        writer.close()
        kept_writer.close()


async def test_the_fleet_page_shows_each_replica_and_metrics_count_tokens(tokenizer: Tokenizer) -> None:
    front = FakeFront(replicas=[FakeReplica(state="recovering", worker_restarts=3, worker_pid=77, numerics="native/x")])
    async with serving(tokenizer, front) as gateway:
        client = gateway.client()
        answer = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=5, extra_body={"ignore_eos": True}
        )
        fleet = await client.get("../fleet", cast_to=object)
        text = (
            await gateway.exchange(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        ).decode()
    assert answer.usage is not None
    assert isinstance(fleet, dict)
    assert fleet["state"] == "recovering"
    said = {"worker_pid": 77, "worker_restarts": 3, "numerics": "native/x"}
    assert fleet["replicas"][0] | said == fleet["replicas"][0]
    assert 'llmscale:generation_tokens_total{model_name="tiny"} 5.0' in text
    assert f'llmscale:prompt_tokens_total{{model_name="tiny"}} {answer.usage.prompt_tokens}.0' in text
    assert 'llmscale:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text
    assert 'llmscale:worker_restarts_total{model_name="tiny",node="tcp://127.0.0.1:9000"} 3.0' in text
    assert re.search(r'llmscale:inter_token_latency_seconds_count\{model_name="tiny"\} 4\.0', text)
    assert 'llmscale:http_requests_total{route="/v1/completions",status="200"} 1.0' in text


async def test_a_thousand_streams_that_come_and_go_leave_nothing_behind(tokenizer: Tokenizer) -> None:
    front = endless(tokenizer)
    async with serving(tokenizer, front) as gateway:
        for _ in range(20):
            connections = [await gateway.raw() for _ in range(50)]
            for _, writer in connections:
                writer.write(request(gateway))
            await until(lambda: len(front.live) == 50)
            front.step()
            for _, writer in connections:
                writer.transport.abort()
            await until(lambda: not front.live)
        services = gateway.gateway.services
        await until(lambda: not gateway.server.server_state.tasks)
        assert services.driver.live_replies == 0
        assert len(front.cancelled) == 1_000
