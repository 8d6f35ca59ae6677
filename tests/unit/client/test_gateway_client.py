"""The client against the real gateway over real HTTP, with a scripted front behind it."""

from __future__ import annotations

import asyncio

import pytest

from llmscale import AsyncClient, Client, SamplingParams, errors
from llmscale.client.results import ModelInfo
from llmscale.gateway.config import GatewayLimits
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import serving, until
from tests.processes import free_port

ENDLESS = SamplingParams(max_tokens=4_000, ignore_eos=True)
# A request that hangs must not hold up the others.


async def test_whole_and_streamed_answers_are_the_same(tokenizer):
    params = SamplingParams(max_tokens=12, temperature=0, seed=7, ignore_eos=True)
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        whole = await client.generate("hello", params)
        stream = client.stream("hello", params)
        text = "".join([chunk.text async for chunk in stream])
    assert whole.finished
    assert whole.outputs[0].finish_reason == "length"
    assert text == whole.outputs[0].text == stream.output.outputs[0].text
    assert whole.usage == stream.output.usage
    assert whole.usage.completion_tokens == 12


async def test_every_choice_of_a_chat_comes_back(tokenizer):
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        output = await client.chat([{"role": "user", "content": "hi"}], SamplingParams(n=3, max_tokens=5))
    assert [choice.index for choice in output.outputs] == [0, 1, 2]


async def test_sampling_reaches_the_front_unchanged(tokenizer):
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=(1 << 64) - 5, max_tokens=6, logit_bias={4: -1.5}
    )
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        await client.generate([5, 6], params, priority="batch")
        [sent] = server.front.submitted.values()
    assert sent.prompt == [5, 6]
    assert sent.priority == "batch"
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.top_k) == (0.5, 0.9, 3)
    assert sent.sampling.seed == (1 << 64) - 5
    assert list(sent.sampling.logit_bias) == [(4, -1.5)]


async def test_special_tokens_of_a_prompt_are_text_unless_the_caller_asks_for_their_ids(tokenizer):
    prompt = "<|im_start|>user\nhello<|im_end|>\n"
    params = SamplingParams(max_tokens=1)
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        await client.generate(prompt, params)
        await client.generate(prompt, params, parse_special_tokens=True)
        async for _ in client.stream(prompt, params, parse_special_tokens=True):
            pass
        await client.generate([5, 6], params, parse_special_tokens=True)
        with pytest.raises(errors.InvalidField, match="leave it out"):
            client.stream([{"role": "user", "content": "hello"}], params, parse_special_tokens=True)
        plain, parsed, streamed, ids = (one.prompt for one in server.front.submitted.values())
    assert plain == tokenizer.encode(prompt)
    assert not set(plain) & set(tokenizer.control_ids.values())
    assert parsed == streamed == tokenizer.encode(prompt, parse_special_tokens=True)
    assert set(parsed) & set(tokenizer.control_ids.values()) == {1, 2}
    assert ids == [5, 6]


async def test_a_client_without_a_loop_asks_for_special_tokens_too(tokenizer):
    prompt = "hello<|im_end|>"

    def ask(url):
        with Client(url) as client:
            client.generate(prompt, parse_special_tokens=True)
            list(client.stream(prompt, parse_special_tokens=True))

    async with serving(tokenizer) as server:
        await asyncio.to_thread(ask, server.url)
        asked = [one.prompt for one in server.front.submitted.values()]
    assert asked == [tokenizer.encode(prompt, parse_special_tokens=True)] * 2


async def test_leaving_a_stream_cancels_the_request(tokenizer):
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        async for chunk in client.stream("hello", ENDLESS):
            if chunk.text:
                break
        await until(lambda: len(server.front.cancelled) == 1)
        assert not server.front.live


async def test_cancelling_from_another_task_ends_the_reader_with_an_error(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server, AsyncClient(server.url) as client:
        stream = client.stream("hello", ENDLESS)
        reading = asyncio.create_task(stream.next_pieces())
        await until(lambda: len(front.live) == 1)
        stream.cancel()
        with pytest.raises(errors.Cancelled):
            await reading
        await until(lambda: not front.live)


async def test_a_timeout_is_typed_and_cancels(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server, AsyncClient(server.url) as client:
        await client.models()
        with pytest.raises(errors.ClientTimeout, match=r"0\.2 s"):
            await client.generate("hello", ENDLESS, timeout=0.2)
        await until(lambda: not front.live)


async def test_a_gateway_that_has_less_time_than_the_caller_names_its_own_limit(tokenizer):
    front = FakeFront(automatic=False)
    limits = GatewayLimits(max_request_seconds=2.5, max_drain_seconds=1)
    async with serving(tokenizer, front, limits=limits) as server, AsyncClient(server.url) as client:
        asking = asyncio.create_task(client.generate("hello", ENDLESS, timeout=3_600))
        await until(lambda: front.live)
        front.fail(1, "deadline_exceeded")
        with pytest.raises(errors.DeadlineExceeded, match=r"within 2\.5 s \(max_request_seconds of the gateway\)"):
            await asking


async def test_a_cancelled_task_cancels_its_request(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server, AsyncClient(server.url) as client:
        task = asyncio.create_task(client.generate("hello", ENDLESS))
        await until(lambda: len(front.live) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not front.live)


async def test_a_refusal_of_the_front_keeps_its_type_and_its_time(tokenizer):
    front = FakeFront(refusal=errors.Overloaded("full", retry_after_seconds=3.2))
    async with serving(tokenizer, front) as server, AsyncClient(server.url) as client:
        with pytest.raises(errors.Overloaded, match="full") as raised:
            await client.generate("hello")
        with pytest.raises(errors.Overloaded):
            await client.stream("hello").next_pieces()
    assert raised.value.retry_after_seconds == 4


@pytest.mark.parametrize(
    ("reason", "seconds", "kind"),
    [
        ("request_poisoned", None, errors.RequestPoisoned),
        ("deadline_exceeded", None, errors.DeadlineExceeded),
        ("deadline_exceeded", 300, errors.DeadlineExceeded),
    ],
)
async def test_a_failure_in_the_middle_of_a_stream_is_typed_and_its_text_is_not_the_whole(
    tokenizer, reason, seconds, kind
):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server, AsyncClient(server.url) as client:
        stream = client.stream("hello", ENDLESS, timeout=seconds)
        reading = asyncio.create_task(stream.next_pieces())
        await until(lambda: len(front.live) == 1)
        front.step(32)
        await reading
        front.fail(next(iter(front.live)), reason)
        with pytest.raises(kind):
            [chunk async for chunk in stream]
        assert await stream.next_pieces() == []
    assert stream.output.outputs[0].text
    assert not stream.output.finished


async def test_a_wrong_key_is_unauthorized_and_the_right_one_is_sent(tokenizer):
    async with serving(tokenizer, api_keys=("correct-key",)) as server:
        async with AsyncClient(server.url, api_key="wrong-key") as client:
            with pytest.raises(errors.Unauthorized):
                await client.models()
        async with AsyncClient(server.url, api_key="correct-key") as client:
            assert [model.name for model in await client.models()] == ["tiny"]


async def test_an_unknown_model_names_those_that_there_are(tokenizer):
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        with pytest.raises(errors.UnknownModel, match="tiny"):
            await client.generate("hello", model="huge")


async def test_a_server_that_is_not_there_is_a_transport_error():
    async with AsyncClient("http://127.0.0.1:1") as client:
        with pytest.raises(errors.TransportError, match=r"127\.0\.0\.1:1"):
            await client.generate("hello")


async def test_a_server_that_goes_away_ends_its_streams_with_a_transport_error(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front, limits=GatewayLimits(max_drain_seconds=0.1)) as server:
        client = AsyncClient(server.url)
        stream = client.stream("hello", ENDLESS)
        reading = asyncio.create_task(stream.next_pieces())
        await until(lambda: len(front.live) == 1)
        front.step(32)
        await reading
        for connection in list(server.server.server_state.connections):
            connection.transport.abort()
        with pytest.raises(errors.TransportError):
            [chunk async for chunk in stream]
        await client.close()


async def test_health_and_connections_are_reused(tokenizer):
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        assert (await client.health()).ready
        for _ in range(5):
            await client.generate("hello", SamplingParams(max_tokens=2))
            async for _chunk in client.stream("hello", SamplingParams(max_tokens=2)):
                pass
        assert len(server.server.server_state.connections) == 1


async def test_a_closed_client_says_so(tokenizer):
    async with serving(tokenizer) as server:
        client = AsyncClient(server.url)
        await client.close()
        await client.close()
        with pytest.raises(errors.TransportError, match="closed"):
            await client.generate("hello")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("127.0.0.1:8000", {}),
        ("ftp://host", {}),
        ("http://host", {"tokenizer": "tiny-chat"}),
        ("ipc:///tmp/x", {"api_key": "k"}),
        ("http://host", {"connect_timeout": 0}),
        ("http://", {}),
        ("http://[::1", {}),
        ("http://127.0.0.1:99999", {}),
        ("http://127.0.0.1:0", {}),
        ("http://127.0.0.1:port", {}),
        ("http://\ud800", {}),
        ("http://host", {"api_key": "ключ"}),
        ("http://host", {"api_key": "key\n"}),
        ("http://host", {"api_key": b"key"}),
    ],
)
def test_options_that_do_not_fit_the_address_are_refused(url, options):
    with pytest.raises(errors.ConfigError):
        AsyncClient(url, **options)


async def test_closing_a_client_ends_the_calls_that_wait(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server:
        client = AsyncClient(server.url)
        stream = client.stream("hello", ENDLESS)
        waiting = [asyncio.create_task(client.generate("hello", ENDLESS)), asyncio.create_task(stream.next_pieces())]
        await until(lambda: len(front.live) == 2)
        await client.close()
        for call in waiting:
            with pytest.raises(errors.Cancelled):
                await call


async def test_a_thread_that_waits_hears_that_another_closed_its_client(tokenizer):
    front = FakeFront(automatic=False)
    async with serving(tokenizer, front) as server:
        client = Client(server.url)
        calls = [asyncio.create_task(asyncio.to_thread(client.generate, "hello", ENDLESS)) for _ in range(2)]
        await until(lambda: len(front.live) == 2)
        await asyncio.to_thread(client.close)
        for call in calls:
            with pytest.raises(errors.Cancelled):
                await call


async def test_closing_a_client_ends_its_wait_for_a_node():
    client = AsyncClient(f"tcp://127.0.0.1:{free_port()}")
    asked = asyncio.create_task(client.models())
    greeted = asyncio.create_task(client.health())
    await asyncio.sleep(0)
    await client.close()
    for call in (asked, greeted):
        with pytest.raises(errors.Cancelled, match="was closed"):
            await call


async def test_what_is_served_is_asked_for_again_when_a_model_is_gone(tokenizer):
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        client._transport._models = {"of yesterday": ModelInfo("of yesterday", 100)}
        with pytest.raises(errors.UnknownModel, match="of yesterday"):
            await client.generate("hello", SamplingParams(max_tokens=2))
        assert (await client.generate("hello", SamplingParams(max_tokens=2))).finished
