"""Ids of texts and texts of ids over HTTP: what a generation would begin with, bounded as it is, and nothing submitted.

Method: the application without sockets, or the real server where memory and threads matter; the same tokenizer says
what must come out.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmscale.gateway import driver
from llmscale.gateway.app import Gateway
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits, ServedModel
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeSampling
from tests.fakes.gateway_server import ask
from tests.fakes.tiny_tokenizer import VOCABULARY, write_metaspace

TEXT = "hello<|im_end|> é"
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": [{"type": "text", "text": "<|im_end|>"}]},
]


def made(models: Sequence[ServedModel]) -> Gateway:
    front = FakeFront(refusal=AssertionError("a text without an answer reached the front"))
    gateway = Gateway(GatewayConfig(limits=GatewayLimits()), front, FakeSampling, models, load_keys([], None))
    gateway.services.open()
    return gateway


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Gateway]:
    running = made([ServedModel("tiny", tokenizer, VOCABULARY, 4_096, created=1)])
    yield running
    assert running.services.driver.held_bytes == 0
    running.services.close()


async def answer(gateway: Gateway, path: str, **fields: Any) -> dict[str, Any]:
    status, told = await ask(gateway, path, json.dumps(fields).encode())
    assert status == 200, told
    return told


async def refused(gateway: Gateway, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    status, told = await ask(gateway, path, json.dumps(fields).encode())
    assert status == 400, told
    return told["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("parse", [None, False, True])
async def test_a_text_has_the_ids_of_its_completion(gateway: Gateway, tokenizer: Tokenizer, parse: bool | None) -> None:
    ids = tokenizer.encode(TEXT, parse_special_tokens=bool(parse))
    told = await answer(gateway, "/tokenize", model="tiny", prompt=TEXT, parse_special_tokens=parse)
    assert told == {"count": len(ids), "max_model_len": 4_096, "tokens": ids, "token_strs": None}
    assert (2 in ids) == bool(parse)


async def test_what_the_model_wants_around_a_text_is_left_out_on_request(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tokenizer = Tokenizer(write_metaspace(tmp_path_factory.mktemp("metaspace")))
    gateway = made([ServedModel("tiny", tokenizer, 600, 64, created=1)])
    for given_value, expected in ((None, [1]), (True, [1]), (False, [])):
        told = await answer(gateway, "/tokenize", prompt="hello", add_special_tokens=given_value)
        assert told["tokens"] == [*expected, *tokenizer.encode_part("hello")]
    gateway.services.close()


async def test_a_conversation_has_the_ids_of_its_answer(gateway: Gateway, tokenizer: Tokenizer) -> None:
    plain = await answer(gateway, "/tokenize", messages=CHAT)
    assert plain["tokens"] == tokenizer.encode_chat(CHAT)
    assert plain["count"] == len(plain["tokens"])
    told = await answer(gateway, "/tokenize", messages=CHAT, add_generation_prompt=False, chat_template_kwargs={"x": 1})
    assert told["tokens"] == tokenizer.encode_chat(CHAT, add_generation_prompt=False)
    assert len(told["tokens"]) < plain["count"]
    open_end = {"add_generation_prompt": False, "continue_final_message": True}
    told = await answer(gateway, "/tokenize", messages=CHAT, **open_end)
    assert told["tokens"] == tokenizer.encode_chat(CHAT, **open_end)


@pytest.mark.parametrize("given_input", [{"prompt": "né hello"}, {"messages": CHAT}])
async def test_tokens_are_spelled_as_the_vocabulary_has_them(
    gateway: Gateway, tokenizer: Tokenizer, given_input: dict[str, Any]
) -> None:
    told = await answer(gateway, "/tokenize", return_token_strs=True, **given_input)
    table = tokenizer._tokenizer
    assert told["token_strs"] == [table.id_to_token(token) for token in told["tokens"]]
    assert ("<|im_start|>" in told["token_strs"]) == ("messages" in given_input)
    assert "\u0120hello" in told["token_strs"] or "messages" in given_input


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=40), parse=st.booleans())
async def test_the_ids_of_a_text_are_the_text_again(gateway: Gateway, text: str, parse: bool) -> None:
    text += "<|im_end|>"
    told = await answer(gateway, "/tokenize", prompt=text, parse_special_tokens=parse)
    assert await answer(gateway, "/detokenize", tokens=told["tokens"]) == {"prompt": text}


async def test_no_tokens_are_no_text(gateway: Gateway) -> None:
    assert await answer(gateway, "/detokenize", tokens=[], model="tiny") == {"prompt": ""}


async def test_a_text_of_more_tokens_than_a_sequence_may_have_is_counted(gateway: Gateway) -> None:
    told = await answer(gateway, "/tokenize", prompt="é" * 5_000)
    assert told["count"] > told["max_model_len"] == 4_096


BAD_TEXTS: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"]}, "prompt"),
    ({"prompt": [1]}, "prompt"),
    ({"prompt": "x", "model": 1}, "model"),
    ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
    ({"prompt": "x", "parse_special_tokens": "yes"}, "parse_special_tokens"),
    ({"prompt": "x", "return_token_strs": "yes"}, "return_token_strs"),
    ({"prompt": "x", "max_tokens": 1}, "max_tokens"),
    ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    ({"prompt": "x" * 500_000}, "prompt"),
    ({"prompt": "<|im_end|>" * 50_000, "parse_special_tokens": True}, "prompt"),
]
BAD_CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"}] * 2_049}, "messages"),
    ({"prompt": "x"}, "prompt"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"_x": 1}}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "messages"),
    ({"temperature": 1}, "temperature"),
]


@pytest.mark.parametrize(
    ("fields", "param"),
    BAD_TEXTS + [({"messages": CHAT, **fields}, param) for fields, param in BAD_CHATS],
    ids=lambda value: str(value)[:60],
)
async def test_a_bad_field_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    assert (await refused(gateway, "/tokenize", fields))["param"] == param


@pytest.mark.parametrize(
    ("field", "only", "other"),
    [
        ("add_special_tokens", False, True),
        ("parse_special_tokens", False, True),
        ("tools", [], [{"type": "function"}]),
        ("chat_template", None, "{{ 1 }}"),
        ("mm_processor_kwargs", None, {}),
    ],
)
async def test_what_is_not_served_of_conversations_is_refused_with_the_only_value(
    gateway: Gateway, field: str, only: Any, other: Any
) -> None:
    plain = await answer(gateway, "/tokenize", messages=CHAT)
    for value in (only, None):
        assert await answer(gateway, "/tokenize", messages=CHAT, **{field: value}) == plain
    error = await refused(gateway, "/tokenize", {"messages": CHAT, field: other})
    assert error["param"] == field
    assert error["message"] == f"{field}: only {json.dumps(only)} is served here; leave the field out"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "tokens", "missing required"),
        ({"tokens": "x"}, "tokens", "Expected `array`"),
        ({"tokens": [-1]}, "tokens[0]", ">= 0"),
        ({"tokens": [True]}, "tokens[0]", "Expected `int`"),
        ({"tokens": [1, 512]}, "tokens", "tokens has the token id 512, the vocabulary is 512"),
        ({"tokens": [3] * 4_097}, "tokens", "context length is 4096 tokens (max_sequence_tokens, the server's"),
        ({"tokens": [3] * 4_097}, "tokens", "tokens has 4097; send them in parts"),
        ({"tokens": [1], "skip_special_tokens": True}, "skip_special_tokens", "unknown field"),
    ],
)
async def test_bad_tokens_are_refused_with_the_limit(
    gateway: Gateway, fields: dict[str, Any], param: str, said: str
) -> None:
    error = await refused(gateway, "/detokenize", fields)
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 1_000_000]
)
async def test_a_body_that_is_not_a_request_is_refused(gateway: Gateway, path: str, body: bytes) -> None:
    status, told = await ask(gateway, path, body)
    assert (status, told["error"]["code"]) == (400, "invalid_field")


async def test_of_several_models_the_named_one_is_asked_and_a_name_is_needed(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Tokenizer(write_metaspace(tmp_path_factory.mktemp("metaspace")))
    tiny = ServedModel("tiny", tokenizer, VOCABULARY, 4_096, created=1)
    gateway = made([tiny, replace(tiny, name="second", tokenizer=other, vocabulary=600, max_sequence_tokens=64)])
    for name, model, longest in (("tiny", tokenizer, 4_096), ("second", other, 64)):
        told = await answer(gateway, "/tokenize", model=name, prompt="hello")
        assert (told["tokens"], told["max_model_len"]) == (model.encode("hello"), longest)
        text = model.decode(told["tokens"], skip_special_tokens=False)
        assert await answer(gateway, "/detokenize", model=name, tokens=told["tokens"]) == {"prompt": text}
    assert await answer(gateway, "/detokenize", model="second", tokens=[599])
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert (await refused(gateway, path, fields))["message"] == "model is missing; served are: second, tiny"
        status, told = await ask(gateway, path, json.dumps({**fields, "model": "third"}).encode())
        assert (status, told["error"]["code"]) == (404, "unknown_model")
    gateway.services.close()


async def test_large_texts_and_lists_are_computed_beside_the_event_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    encode, decode = Tokenizer.encode, Tokenizer.decode

    def watched_encode(given: Tokenizer, text: str, **options: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(given, text, **options)

    def watched_decode(given: Tokenizer, ids: Sequence[int], **options: bool) -> str:
        threads.append(threading.current_thread().name)
        return decode(given, ids, **options)

    monkeypatch.setattr(Tokenizer, "encode", watched_encode)
    monkeypatch.setattr(Tokenizer, "decode", watched_decode)
    text = "hello world " * 500
    told = await answer(gateway, "/tokenize", prompt=text)
    tokens = [*told["tokens"], *told["tokens"]][:4_000]
    assert (await answer(gateway, "/detokenize", tokens=tokens))["prompt"].startswith(text[:1_000])
    assert [name.partition("_")[0] for name in threads] == ["llmscale-prompts"] * 2
    await answer(gateway, "/tokenize", prompt="hello")
    assert threads[2] == threading.current_thread().name


async def test_answers_count_among_the_unsent_ones(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MAX_HELD_BYTES", 1_000)
    await answer(gateway, "/tokenize", prompt="hello")
    for path, fields in (("/tokenize", {"prompt": "é" * 1_000}), ("/detokenize", {"tokens": [1] * 1_000})):
        status, told = await ask(gateway, path, json.dumps(fields).encode())
        assert (status, told["error"]["code"]) == (429, "queue_full")
    assert (await answer(gateway, "/detokenize", tokens=[1]))["prompt"] == "<|im_start|>"
