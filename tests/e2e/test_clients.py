"""The SDK against real processes: a node over ZeroMQ, with and without keys, and a gateway over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import zmq

from llmscale import AsyncClient, Client, SamplingParams, errors
from llmscale.client import CurveKeys
from tests.processes import base_install, serving, stopped, wait_until
from tests.support_processes import node

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=1_900, ignore_eos=True)
CHAT = [{"role": "user", "content": "What is 12 plus 30?"}]
PROMPT = [300, 284, 223, 20, 483, 21]


def read_to_the_end(stream):
    """How many tokens came before the stream ended or was cancelled."""
    tokens = 0
    with contextlib.suppress(errors.Cancelled):
        for chunk in stream:
            tokens += len(chunk.token_ids)
    return tokens


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory):
    """In the base install."""
    with contextlib.ExitStack() as stack:
        with base_install():
            started = stack.enter_context(node(tmp_path_factory.mktemp("node"), "--threads", "1"))
        yield started


@pytest.fixture
def client(shared_node):
    with Client(shared_node.address, tokenizer="tiny-chat") as made:
        yield made


def test_a_rendered_prompt_at_a_node_is_its_conversation_where_the_caller_says_so(client):
    rendered = "<|im_start|>user\nWhat is 12 plus 30?<|im_end|>\n<|im_start|>assistant\n"
    chat = client.chat(CHAT, GREEDY)
    assert client.generate(rendered, GREEDY, parse_special_tokens=True).prompt_token_ids == chat.prompt_token_ids
    stream = client.stream(rendered, GREEDY, parse_special_tokens=True)
    assert read_to_the_end(stream) == 24
    assert stream.output.outputs[0].token_ids == chat.outputs[0].token_ids
    assert client.generate(rendered, GREEDY).prompt_token_ids != chat.prompt_token_ids


def test_a_node_answers_ids_without_a_tokenizer_and_text_with_one(shared_node, client):
    with Client(shared_node.address) as bare:
        by_ids = bare.generate(PROMPT, GREEDY)
        assert by_ids.outputs[0].text == ""
        with pytest.raises(errors.InvalidField, match="tokenizer="):
            bare.generate("hello")
        with pytest.raises(errors.InvalidField, match="tokenizer="):
            bare.chat(CHAT)
    with_text = client.generate(PROMPT, GREEDY)
    assert with_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert len(by_ids.outputs[0].token_ids) == 24
    assert with_text.outputs[0].text


def test_streamed_pieces_make_the_whole_answer(client):
    # So many that they cannot all arrive before the reader looks for the first time, however busy the machine is.
    params = SamplingParams(temperature=0, max_tokens=1_000, ignore_eos=True)
    stream = client.stream(CHAT, params)
    chunks = list(stream)
    whole = client.chat(CHAT, params)
    assert "".join(chunk.text for chunk in chunks) == whole.outputs[0].text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.outputs[0].token_ids)
    assert stream.output.usage.completion_tokens == 1_000
    assert len(chunks) > 1


def test_a_stop_string_ends_the_text_before_it(client):
    text = client.generate(PROMPT, GREEDY).outputs[0].text
    stop = text[len(text) // 2 :][:3]
    output = client.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop))
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.usage.completion_tokens == len(output.outputs[0].token_ids) <= 24


def test_choices_and_log_probabilities_come_back_in_order(client):
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, ignore_eos=True)
    output = client.generate(PROMPT, params)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert [len(choice.logprobs) for choice in output.outputs] == [6, 6, 6]
    assert {len(row) for choice in output.outputs for row in choice.logprobs} == {3}
    assert client.generate(PROMPT, params).outputs == output.outputs


def test_leaving_a_stream_frees_the_node(client):
    for chunk in client.stream(PROMPT, ENDLESS):
        assert chunk.token_ids
        break
    wait_until(lambda: client.health().running == 0, 120, "the node has dropped the request")


def test_cancelling_from_another_thread_ends_a_blocked_reader(shared_node, client):
    # The reader is blocked while the worker stands still. On a busy machine the last token may be computed before that:
    # then there is another stream.
    for _ in range(5):
        stream = client.stream(PROMPT, ENDLESS)
        tokens = len(next(stream).token_ids)
        with stopped(shared_node.worker().pid):
            threading.Timer(0.05, stream.cancel).start()
            tokens += read_to_the_end(stream)
        if tokens < 1_900:
            break
    assert tokens < 1_900
    wait_until(lambda: client.health().running == 0, 120, "the node has dropped the request")


def test_a_timeout_is_typed_and_frees_the_node(shared_node, client):
    with stopped(shared_node.worker().pid), pytest.raises(errors.ClientTimeout):
        client.generate(PROMPT, ENDLESS, timeout=0.1)
    wait_until(lambda: client.health().running == 0, 120, "the node has dropped the request")


def test_what_cannot_run_is_refused_by_name(client):
    with pytest.raises(errors.RequestTooLong, match="2048"):
        client.generate(PROMPT, SamplingParams(max_tokens=2_048))
    with pytest.raises(errors.InvalidField, match="vocabulary"):
        client.generate([1 << 20])
    with pytest.raises(errors.UnknownModel, match="tiny-chat"):
        client.generate(PROMPT, model="huge")


def test_models_and_health_of_a_node(client):
    assert [(model.name, model.max_sequence_tokens) for model in client.models()] == [("tiny-chat", 2_048)]
    assert client.health().ready


def test_many_threads_share_one_client(client):
    expected = client.generate(PROMPT, GREEDY).outputs
    outputs = []
    threads = [
        threading.Thread(target=lambda: outputs.append(client.generate(PROMPT, GREEDY).outputs)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outputs == [expected] * 8


async def test_an_async_client_runs_many_streams_at_once(shared_node):
    async def read(client):
        return [token async for chunk in client.stream(PROMPT, GREEDY) for token in chunk.token_ids]

    async with AsyncClient(shared_node.address) as client:
        alone = await read(client)
        assert await asyncio.gather(*(read(client) for _ in range(16))) == [alone] * 16
        async for _ in client.stream(PROMPT, ENDLESS):
            break
        async with asyncio.timeout(60):
            while (await client.health()).running:  # noqa: ASYNC110 - the condition is in another process
                await asyncio.sleep(0.01)


def test_another_fleet_and_another_tokenizer_are_refused(shared_node, tmp_path):
    with Client(shared_node.address, fleet="other") as client, pytest.raises(errors.ConfigError, match="fleet"):
        client.generate(PROMPT)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    with (
        Client(shared_node.address, tokenizer=folder) as client,
        pytest.raises(errors.InvalidTokenizer, match="tiny-chat"),
    ):
        client.generate("hello")


def test_nobody_at_the_address_is_a_transport_error(tmp_path):
    with Client(f"ipc://{tmp_path}/nobody.sock", connect_timeout=0.2) as client:
        with pytest.raises(errors.TransportError, match="no node answered"):
            client.generate(PROMPT)
        with pytest.raises(errors.ClientTimeout):
            client.generate(PROMPT, timeout=0.1)


@pytest.mark.usefixtures("slow_processor")
def test_a_stream_survives_its_worker_and_a_dead_node_is_a_transport_error(tmp_path):
    with node(tmp_path, "--threads", "1") as started, Client(started.address) as client:
        params = SamplingParams(temperature=0, max_tokens=1_900, ignore_eos=True)
        undisturbed = client.generate(PROMPT, params).outputs[0].token_ids
        # On a busy machine the last token may be computed before the kill: then another stream is made.
        for _ in range(5):
            stream = client.stream(PROMPT, params)
            next(stream)
            started.worker().kill()
            for _ in stream:
                pass
            assert stream.output.outputs[0].token_ids == undisturbed
            if stream.restarts:
                break
        # Two where the next worker takes longer than half a second.
        assert stream.restarts >= 1
        with stopped(started.worker().pid):
            other = client.stream(PROMPT, ENDLESS)
            wait_until(lambda: client.health().running + client.health().waiting == 1, 120, "the node has the stream")
            started.kill()
        with pytest.raises(errors.TransportError):
            list(other)


def test_a_node_with_keys_serves_only_those_on_its_list(tmp_path):
    server, ours, strangers = (zmq.curve_keypair() for _ in range(3))
    key_file, allow_list = tmp_path / "node.key", tmp_path / "allowed"
    key_file.touch(mode=0o600)
    public, secret = (key.decode() for key in server)
    key_file.write_text(f'metadata\ncurve\n    public-key = "{public}"\n    secret-key = "{secret}"\n')
    allow_list.write_text(f"client test tenant {ours[0].decode()}\n")
    keys = CurveKeys(ours[0].decode(), ours[1].decode(), public)
    assert CurveKeys.load(key_file, server=public).public == public
    options = ("--threads", "1", "--key-file", str(key_file), "--allow-list", str(allow_list))
    with node(tmp_path, *options, keys=keys) as started:
        with Client(started.address, keys=keys) as client:
            assert client.generate(PROMPT, GREEDY).finished
        unknown = CurveKeys(strangers[0].decode(), strangers[1].decode(), public)
        with Client(started.address, keys=unknown, connect_timeout=60) as client, pytest.raises(errors.Unauthorized):
            client.generate(PROMPT)
        # A client without keys is told or just cut off, whichever side gives the handshake up first.
        refused = (errors.TransportError, errors.Unauthorized)
        with Client(started.address, connect_timeout=1) as client, pytest.raises(refused):
            client.generate(PROMPT)


def test_both_transports_give_the_same_answer(shared_node, client):
    with serving("tiny-chat", "--threads", "1") as server, Client(server.base) as over_http:
        direct = client.chat(CHAT, GREEDY).outputs[0]
        through = over_http.chat(CHAT, GREEDY)
        assert through.outputs[0].text == direct.text
        assert through.usage.completion_tokens == 24
        text = "".join(chunk.text for chunk in over_http.stream(CHAT, GREEDY))
        assert text == direct.text
        assert over_http.health().ready
        assert [model.name for model in over_http.models()] == ["tiny-chat"]
