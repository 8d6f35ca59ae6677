"""Every field of a request has a bound, and what is refused is refused in milliseconds, by name, before anything
runs."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import InvalidField
from llmscale.gateway import conversation, openai
from llmscale.gateway.app import Gateway
from llmscale.gateway.auth import load_keys
from llmscale.gateway.config import GatewayConfig, GatewayLimits, ServedModel
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeSampling
from tests.fakes.gateway_server import ask

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> Any:
    model = ServedModel("tiny", tokenizer, 512, 4_096, created=1)
    front = FakeFront(refusal=AssertionError("a refused request reached the front"))
    made = Gateway(GatewayConfig(limits=GatewayLimits()), front, FakeSampling, [model], load_keys([], None))
    made.services.open()
    yield made
    made.services.close()
    front.close()


BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"model": 1}, "model"),
    ({"model": "x" * 257}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 2_049}, "messages"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
    ({"messages": [{"role": "user", "content": "x", "name": "<|im_start|>"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann\n"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "type": "image"}]}, "messages[0].type"),
    ({"messages": [{"role": "user", "content": "x", "cache_control": {}}]}, "messages[0].cache_control"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].id",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": "x" * 513}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "x" * 513}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]}, "messages[0].tool_call_id"),
    ({"continue_final_message": "yes"}, "continue_final_message"),
    ({"continue_final_message": True}, "add_generation_prompt"),
    ({"add_generation_prompt": 1}, "add_generation_prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1 << 23}, "max_tokens"),
    ({"max_completion_tokens": 4_096}, "max_tokens"),
    ({"n": 129}, "n"),
    ({"n": 0}, "n"),
    ({"n": 128, "max_tokens": 9_000}, "max_tokens"),
    ({"n": 128, "max_tokens": 8_192, "logprobs": True, "top_logprobs": 20}, "logprobs"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 11}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "x" * 513}, "stop"),
    ({"stop": "é" * 300}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [512]}, "stop_token_ids"),
    ({"logit_bias": {"512": 1}}, "logit_bias"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 4_096}, "min_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1e9}}, None),
    ({"logit_bias": {str(n): 1 for n in range(1_025)}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": {}}}, "chat_template_kwargs[...]"),
    ({"chat_template_kwargs": {f"x{n}": n for n in range(17)}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x" * 65: 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"_x": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x\n": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x.y": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"priority": "root"}, "priority"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"user": "x" * 513}, "user"),
    ({"verbosity": "high"}, "verbosity"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"tenant": "acme"}, "tenant"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, None),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [1.0]}, None),
    ({"prompt": [True]}, None),
    ({"prompt": [1 << 40]}, None),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 64, "n": 3}, "n"),
    ({"prompt": [3] * 5_000}, "prompt"),
    ({"prompt": "a" * 500_000}, "prompt"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"continue_final_message": False}, "continue_final_message"),
    ({"parse_special_tokens": "true"}, "parse_special_tokens"),
    ({"parse_special_tokens": 1}, "parse_special_tokens"),
    ({"prompt": "<|im_end|>" * 50_000, "parse_special_tokens": True}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"messages": []}, "messages"),
]


async def refused(gateway: Gateway, path: str, body: bytes) -> dict[str, Any]:
    started = time.thread_time()
    status, answer = await ask(gateway, path, body)
    spent = time.thread_time() - started
    assert status in {400, 404}, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status == 400 else "not_found_error")
    assert len(error["message"]) < 1_000
    # What grows with the square of a body takes minutes; garbage of a process with torch in it was seen to take 0.3 s.
    assert spent < 2.0
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
async def test_a_bad_field_of_a_chat_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    error = await refused(gateway, "/v1/chat/completions", json.dumps({**CHAT, **fields}).encode())
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"prompt": [3] * 5_000}, "the prompt has 5000; shorten"),
        ({"prompt": [3] * 10, "max_tokens": 4_096}, "the request needs 10 for the prompt and 4096 for the answer"),
        ({"prompt": "x" * 500_000}, "the prompt has 500000 bytes, which cannot fit"),
    ],
    ids=["ids", "answer", "text"],
)
async def test_a_request_that_is_too_long_says_so_in_openai_s_words_with_the_setting_of_the_server(
    gateway: Gateway, fields: dict[str, Any], given: str
) -> None:
    error = await refused(gateway, "/v1/completions", json.dumps({**COMPLETION, **fields}).encode())
    assert error["code"] == "request_too_long"
    setting = "max_sequence_tokens, the server's --max-model-len"
    assert error["message"].startswith(f"This model's maximum context length is 4096 tokens ({setting}), {given}")
    assert "; shorten" in error["message"]


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_a_bad_field_of_a_completion_is_refused_by_name(
    gateway: Gateway, fields: dict[str, Any], param: str
) -> None:
    error = await refused(gateway, "/v1/completions", json.dumps({**COMPLETION, **fields}).encode())
    assert param is None or error["param"] == param


# Each with its only value beside null, and with another one.
UNSERVED: list[tuple[str, Any, Any]] = [
    ("store", False, True),
    ("spaces_between_special_tokens", True, False),
    ("truncate_prompt_tokens", None, 8),
    ("prompt_logprobs", None, 1),
    ("bad_words", [], ["x"]),
    ("length_penalty", 1.0, 1.5),
    ("use_beam_search", False, True),
    ("guided_json", None, {"type": "object"}),
    ("guided_regex", None, "x"),
    ("guided_choice", None, ["x"]),
    ("guided_grammar", None, "x"),
    ("return_token_ids", False, True),
    ("allowed_token_ids", None, [1]),
]
UNSERVED_OF_COMPLETIONS: list[tuple[str, Any, Any]] = [("add_special_tokens", True, False), ("suffix", "", "x")]
UNSERVED_OF_CHATS: list[tuple[str, Any, Any]] = [
    ("add_special_tokens", False, True),
    ("parse_special_tokens", False, True),
    ("best_of", 1, 2),
    ("echo", False, True),
    ("verbosity", "medium", "high"),
    ("prediction", None, {}),
]


@pytest.mark.parametrize(
    ("path", "field", "only", "other"),
    [("/v1/completions", *row) for row in UNSERVED + UNSERVED_OF_COMPLETIONS]
    + [("/v1/chat/completions", *row) for row in UNSERVED + UNSERVED_OF_CHATS],
)
async def test_what_is_not_served_may_say_so_and_is_otherwise_refused_with_the_only_value(
    gateway: Gateway, path: str, field: str, only: Any, other: Any
) -> None:
    body = CHAT if path.endswith("chat/completions") else COMPLETION
    decode = openai.decode_chat if body is CHAT else openai.decode_completion
    for value in (only, None):
        assert getattr(decode(json.dumps({**body, field: value}).encode()), field) == value
    error = await refused(gateway, path, json.dumps({**body, field: other}).encode())
    assert error["param"] == field
    assert error["message"] == f"{field}: only {json.dumps(only)} is served here; leave the field out"


@pytest.mark.parametrize(
    "fields",
    [{"top_logprobs": 0}, {"response_format": {"type": "text"}}, {"prompt_cache_retention": "24h"}],
    ids=["logprobs", "format", "retention"],
)
def test_what_changes_nothing_is_taken(fields: dict[str, Any]) -> None:
    conversation.check_chat(openai.decode_chat(json.dumps({**CHAT, **fields}).encode()), 1)
    if "top_logprobs" not in fields:
        openai.check_format(openai.decode_completion(json.dumps({**COMPLETION, **fields}).encode()))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "x"} trailing',
        b'{"model": "tiny", "prompt": "x", "x": ' + b"[" * 60 + b"]" * 60 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 1_000_000,
        b'\xef\xbb\xbf{"model": "tiny", "prompt": "x"}',
        "{'model': 'tiny'}".encode("utf-16"),
        b'{"prompt": "x"}',
    ],
    ids=range(16),
)
async def test_a_body_that_is_not_a_request_is_refused(gateway: Gateway, body: bytes) -> None:
    await refused(gateway, "/v1/completions", body)


async def test_of_a_duplicate_key_the_last_value_counts(gateway: Gateway) -> None:
    error = await refused(gateway, "/v1/completions", b'{"model": "tiny", "model": "other", "prompt": "x"}')
    assert error["code"] == "unknown_model"


NUMBERS = ("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
           "seed", "max_tokens", "min_tokens", "logprobs", "best_of")  # fmt: skip


@given(
    st.sampled_from(NUMBERS),
    st.one_of(
        st.sampled_from(
            ["true", "-0", "1e308", "-1e308", "1e400", "9223372036854775808", "18446744073709551616", "null"]
        ),
        st.integers().map(str),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
    ),
)
def test_any_json_number_is_either_within_its_bounds_or_an_error_of_that_field(name: str, text: str) -> None:
    body = f'{{"model": "tiny", "prompt": "x", "{name}": {text}}}'.encode()
    try:
        value = getattr(openai.decode_completion(body), name)
    except InvalidField as error:
        field = error.field
    else:
        field = name
        assert value is None or (not isinstance(value, bool) and abs(value) < 1 << 64)
    assert field == name


async def test_every_documented_field_of_the_official_client_is_known() -> None:
    known = {field.encode_name for field in msgspec.structs.fields(openai.ChatRequest)}
    from openai.types.chat import completion_create_params

    official = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    missing = official - known - {"moderation", "prompt_cache_options"}
    assert not missing


def test_the_text_parts_of_a_message_are_joined_by_line_ends(tokenizer: Tokenizer) -> None:
    body = (
        b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},'
        b'{"role":"assistant"}]}'
    )
    plain = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": ""}]
    assert tokenizer.encode_chat(
        conversation.template_messages(openai.decode_chat(body).messages)
    ) == tokenizer.encode_chat(plain)


@pytest.mark.parametrize("kind", ["text", "message", None])
def test_a_message_with_the_type_of_a_part_and_a_part_to_be_cached_are_read_as_without(kind: str | None) -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    body = {"model": "m", "messages": [{"role": "user", "type": kind, "content": [part]}]}
    messages = conversation.template_messages(openai.decode_chat(json.dumps(body).encode()).messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    "fields", [{"reasoning": "b"}, {"reasoning_content": "b"}, {"reasoning": "a", "reasoning_content": "b"}]
)
def test_reasoning_reaches_the_template_under_either_name(fields: dict[str, str]) -> None:
    body = {"model": "m", "messages": [{"role": "assistant", "content": "c", **fields}]}
    messages = conversation.template_messages(openai.decode_chat(json.dumps(body).encode()).messages)
    assert messages == [{"role": "assistant", "content": "c", "reasoning_content": "b"}]


def test_the_effort_reaches_the_template_unless_its_variables_say_otherwise() -> None:
    head = b'{"model":"m","messages":[{"role":"user","content":"a"}],"reasoning_effort":"low"'
    assert conversation.template_variables(openai.decode_chat(head + b"}")) == {"reasoning_effort": "low"}
    both = openai.decode_chat(head + b',"chat_template_kwargs":{"reasoning_effort":"high","tool_style":true}}')
    assert conversation.template_variables(both) == {"reasoning_effort": "high", "tool_style": True}
