"""The model goes on with the last message of a conversation where a request asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai as official
import pytest

from llmscale import AsyncClient, SamplingParams, errors
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import serving
from tests.fakes.tiny_tokenizer import write_byte_level, write_metaspace

QUESTION = {"role": "user", "content": "hello"}
BEGUN = [QUESTION, {"role": "assistant", "content": "It is "}]
OPEN = {"add_generation_prompt": False, "continue_final_message": True}


async def test_a_request_can_go_on_with_the_last_message_whole_and_as_a_stream(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_part("two")
    async with serving(tokenizer, FakeFront(tokens=lambda _prompt, _sampling: iter([*ids, 2]))) as gateway:
        create = gateway.client().chat.completions.create
        whole: Any = await create(model="tiny", messages=BEGUN, extra_body=OPEN)
        stream: Any = await create(model="tiny", messages=BEGUN, extra_body=OPEN, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        prompts = [one.prompt for one in gateway.front.submitted.values()]
    assert whole.choices[0].message.content == "".join(pieces) == "two"
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nIt is "
    assert [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts] == [rendered] * 2


async def test_what_goes_on_keeps_the_space_before_its_first_word(tmp_path: Path) -> None:
    spaced = Tokenizer(write_metaspace(tmp_path))
    ids = spaced.encode("the fox")[1:]
    messages = [{"role": "user", "content": "hello"}]
    async with serving(spaced, FakeFront(tokens=lambda _prompt, _sampling: iter([*ids, 2]))) as gateway:
        create = gateway.client().chat.completions.create
        begun: Any = await create(model="tiny", messages=messages)
        gone_on: Any = await create(model="tiny", messages=messages, extra_body=OPEN)
    assert (begun.choices[0].message.content, gone_on.choices[0].message.content) == ("the fox", " the fox")


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": None}, {"add_generation_prompt": True}])
async def test_an_answer_cannot_be_begun_and_gone_on_with_at_once(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    async with serving(tokenizer) as gateway:
        with pytest.raises(official.BadRequestError, match="cannot both be true") as refused:
            await gateway.client().chat.completions.create(
                model="tiny", messages=BEGUN, extra_body={"continue_final_message": True, **fields}
            )
    assert (refused.value.code, refused.value.param) == ("invalid_field", "add_generation_prompt")


async def test_a_template_that_does_not_keep_the_last_text_is_an_error_of_the_request(tmp_path: Path) -> None:
    shouting = Tokenizer(
        write_byte_level(tmp_path, chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    )
    async with serving(shouting) as gateway:
        with pytest.raises(official.BadRequestError, match="leaves out or changes") as refused:
            await gateway.client().chat.completions.create(model="tiny", messages=BEGUN, extra_body=OPEN)
    assert (refused.value.code, refused.value.param) == ("prompt_template_error", "messages")


async def test_the_sdk_goes_on_with_the_last_message_over_http(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, seed=7, ignore_eos=True)
    async with serving(tokenizer) as server, AsyncClient(server.url) as client:
        whole = await client.chat(BEGUN, params, **OPEN)
        stream = client.stream(BEGUN, params, **OPEN)
        text = "".join([chunk.text async for chunk in stream])
        begun = await client.chat(BEGUN, params, add_generation_prompt=False)
        prompts = [one.prompt for one in server.front.submitted.values()]
        with pytest.raises(errors.InvalidField, match="cannot both be true"):
            await client.chat(BEGUN, params, continue_final_message=True)
        with pytest.raises(errors.InvalidField, match="is for conversations"):
            client.stream("It is", params, **OPEN)
    assert whole.outputs[0].text == text
    assert begun.finished
    closed = tokenizer.encode_chat(BEGUN, add_generation_prompt=False)
    open_end = tokenizer.encode_chat(BEGUN, add_generation_prompt=False, continue_final_message=True)
    assert prompts == [open_end, open_end, closed]
