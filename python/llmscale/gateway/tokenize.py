"""The two endpoints that tell ids and texts apart: /tokenize and /detokenize, as vLLM has them.

They compute as generation does, before a request would be submitted: the same bounds before tokenizing, the same thread
for large texts, nothing in a queue and nothing on a replica. Linear in texts and ids. Knows nothing of the front.
"""

from __future__ import annotations

from typing import Final

import msgspec

from llmscale.errors import InvalidField, RequestTooLong
from llmscale.gateway import conversation, vllm
from llmscale.gateway.body import read_body
from llmscale.gateway.config import ServedModel
from llmscale.gateway.http import Exchange
from llmscale.gateway.services import Services

_json: Final = msgspec.json.Encoder()


async def tokenize(services: Services, exchange: Exchange, _tenant: str) -> None:
    """POST /tokenize."""
    await _answer(services, exchange, await _tokens(services, exchange))


async def _tokens(services: Services, exchange: Exchange) -> bytes:
    body = await read_body(exchange.scope, exchange.receive, services.limits, services.arriving)
    request = vllm.decode_tokenize(body)
    model = services.model(request.model)
    if isinstance(request, vllm.TokenizeChatRequest):
        conversation.check_messages(request.messages, services.limits.max_messages)

    def work() -> bytes:
        ids = _ids(request, model)
        texts = model.tokenizer.token_texts(ids) if request.return_token_strs else None
        return _json.encode(vllm.TokenizeResponse(len(ids), model.max_sequence_tokens, ids, texts))

    return await services.compute(work, len(body))


def _ids(request: vllm.TokenizePromptRequest | vllm.TokenizeChatRequest, model: ServedModel) -> list[int]:
    """What a generation would begin with; more than the longest sequence is told, not refused."""
    if isinstance(request, vllm.TokenizeChatRequest):
        return model.tokenizer.encode_chat(
            conversation.template_messages(request.messages),
            variables=request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            max_tokens=model.max_sequence_tokens,
        )
    return model.tokenizer.encode(
        request.prompt,
        max_tokens=model.max_sequence_tokens,
        add_special_tokens=request.add_special_tokens is not False,
        parse_special_tokens=bool(request.parse_special_tokens),
    )


async def detokenize(services: Services, exchange: Exchange, _tenant: str) -> None:
    """POST /detokenize."""
    await _answer(services, exchange, await _text(services, exchange))


async def _text(services: Services, exchange: Exchange) -> bytes:
    body = await read_body(exchange.scope, exchange.receive, services.limits, services.arriving)
    request = vllm.decode_detokenize(body)
    model = services.model(request.model)
    tokens = request.tokens
    # An id is short and may stand for a long text, so the body's bound alone would not do.
    if len(tokens) > model.max_sequence_tokens:
        raise RequestTooLong.beyond(
            model.max_sequence_tokens, f"tokens has {len(tokens)}", "send them in parts", field="tokens"
        )
    largest = max(tokens, default=0)
    if largest >= model.vocabulary:
        raise InvalidField(f"tokens has the token id {largest}, the vocabulary is {model.vocabulary}", field="tokens")

    def work() -> bytes:
        return _json.encode(vllm.DetokenizeResponse(model.tokenizer.decode(tokens, skip_special_tokens=False)))

    return await services.compute(work, len(body))


async def _answer(services: Services, exchange: Exchange, body: bytes) -> None:
    """Sends a body that counts among the unsent answers until its client has read it."""
    driver = services.driver
    reply = driver.start(streaming=False)
    try:
        driver.hold(reply, len(body))
        await exchange.respond(body)
    finally:
        driver.abandon(reply)
