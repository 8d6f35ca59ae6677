"""The two endpoints that generate text: /v1/completions and /v1/chat/completions.

From the bytes of a body to a started reply: decode, check products of fields, render and tokenize, submit one request
per sequence, then write the answer whole or as events. The costs are those of the parts. Knows nothing of sockets or of
replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from llmscale.choice import Choice
from llmscale.errors import InvalidField, RequestTooLong
from llmscale.gateway import connection, conversation, openai
from llmscale.gateway.answers import ChatFormat, CompletionFormat, Format
from llmscale.gateway.body import read_body
from llmscale.gateway.config import ServedModel
from llmscale.gateway.http import Exchange
from llmscale.gateway.reply import Reply
from llmscale.gateway.services import Services
from llmscale.gateway.stream import EventStream
from llmscale.types import SamplingParams

MAX_ECHO_BYTES: Final = 16 << 20
"""Of all repetitions of a request's prompts in its answer."""
_DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request, ready to start."""

    model: ServedModel
    tenant: str
    prompts: list[list[int]]
    """Emptied when the front has them."""
    params: SamplingParams
    format: Format
    priority: str
    stream: bool
    most_tokens: int
    """Of an answer whose length nobody bounded."""
    echo_bytes: int = 0
    """Of the prompts that the answer repeats, once per sequence."""
    goes_on: bool = False
    """Whether the answer's text goes on from the prompt's; else it begins a text of its own."""


async def completions(services: Services, exchange: Exchange, tenant: str) -> None:
    """POST /v1/completions."""
    # While the answer comes, nothing holds the body or what was parsed of it: thousands of requests may be live.
    await _answer(services, exchange, await _completion_job(services, exchange, tenant))


async def _completion_job(services: Services, exchange: Exchange, tenant: str) -> _Job:
    body = await read_body(exchange.scope, exchange.receive, services.limits, services.arriving)
    request = openai.decode_completion(body)
    model = services.model(request.model)
    openai.check_format(request)
    prompts = openai.prompts_of(request.prompt)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidField(f"best_of is {request.best_of}, it must equal n: answers are not ranked", field="best_of")
    if request.echo and request.logprobs is not None:
        raise InvalidField("echo with logprobs is not supported: prompts have no log probabilities here", field="echo")
    params = _params(request, model, request.max_tokens or _DEFAULT_COMPLETION_TOKENS, request.logprobs)
    most_tokens = _check(services, model, len(prompts), params)

    def tokenize() -> tuple[list[list[int]], list[bytes] | None]:
        ids = [
            model.tokenizer.encode(
                prompt, max_tokens=model.max_sequence_tokens, parse_special_tokens=bool(request.parse_special_tokens)
            )
            if isinstance(prompt, str)
            else _check_ids(prompt, model)
            for prompt in prompts
        ]
        return ids, _echoes(prompts, params.n, model) if request.echo else None

    ids, echoes = await services.compute(tokenize, len(body))
    form = CompletionFormat(
        f"cmpl-{exchange.request_id}",
        model.name,
        tokenizer=model.tokenizer,
        options=_stream_options(request),
        logprobs=request.logprobs,
        echoes=echoes,
    )
    return _Job(
        model,
        tenant,
        ids,
        params,
        form,
        request.priority or "standard",
        bool(request.stream),
        most_tokens,
        params.n * sum(map(len, echoes or ())),
        goes_on=True,
    )


async def chat_completions(services: Services, exchange: Exchange, tenant: str) -> None:
    """POST /v1/chat/completions."""
    await _answer(services, exchange, await _chat_job(services, exchange, tenant))


async def _chat_job(services: Services, exchange: Exchange, tenant: str) -> _Job:
    body = await read_body(exchange.scope, exchange.receive, services.limits, services.arriving)
    request = openai.decode_chat(body)
    model = services.model(request.model)
    conversation.check_chat(request, services.limits.max_messages)
    max_tokens = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = _params(request, model, max_tokens, logprobs)
    most_tokens = _check(services, model, 1, params)

    def tokenize() -> list[int]:
        return model.tokenizer.encode_chat(
            conversation.template_messages(request.messages),
            variables=conversation.template_variables(request),
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            max_tokens=model.max_sequence_tokens,
        )

    ids = await services.compute(tokenize, len(body))
    form = ChatFormat(
        f"chatcmpl-{exchange.request_id}",
        model.name,
        tokenizer=model.tokenizer,
        options=_stream_options(request),
        logprobs=logprobs,
    )
    return _Job(
        model,
        tenant,
        [ids],
        params,
        form,
        request.priority or "standard",
        bool(request.stream),
        most_tokens,
        goes_on=bool(request.continue_final_message),
    )


async def _answer(services: Services, exchange: Exchange, job: _Job) -> None:
    driver = services.driver
    reply = driver.start(streaming=job.stream)
    stop_watching: Callable[[], None] | None = None
    try:
        driver.hold(reply, job.echo_bytes // job.params.n)
        _submit(services, job, reply)
        job.prompts.clear()
        stop_watching = connection.watch(exchange.scope, exchange.receive, lambda: driver.client_gone(reply))
        if job.stream:
            await services.sweeper.run(EventStream(exchange, reply, job.format, services.limits), exchange)
            return
        await reply.wait()
        if reply.gone:
            return
        if reply.error is not None:
            raise reply.error
        values = sum(len(choice.logprobs) for choice in reply.choices) * (1 + (job.params.logprobs or 0))
        await exchange.respond(await services.build(lambda: job.format.whole(reply), values, job.echo_bytes))
    finally:
        if stop_watching is not None:
            stop_watching()
        driver.abandon(reply)


def _submit(services: Services, job: _Job, reply: Reply) -> None:
    metrics = services.metrics.of_model(job.model.name)
    params = job.params
    index = 0
    for position, prompt in enumerate(job.prompts):
        most = params.max_tokens
        if most is None:
            most = min(job.most_tokens, job.model.max_sequence_tokens - len(prompt))
        if most < 1 or len(prompt) + most > job.model.max_sequence_tokens:
            raise RequestTooLong.beyond(
                job.model.max_sequence_tokens,
                f"the request needs {len(prompt)} for the prompt and {max(most, 1)} for the answer",
                "shorten the prompt or lower max_tokens",
                field="max_tokens" if params.max_tokens is not None else None,
            )
        if params.min_tokens > most:
            raise InvalidField(
                f"min_tokens is {params.min_tokens}, the sequence has room for {most}; lower it", field="min_tokens"
            )
        reply.prompt_tokens += len(prompt)
        context = prompt if job.goes_on else ()
        for number in range(params.n):
            sampling = services.sampling(
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                seed=None if params.seed is None else params.seed % (1 << 64),
                choice=number,
                logprobs=params.logprobs,
                logit_bias=params.logit_bias,
                max_tokens=most,
                min_tokens=params.min_tokens,
                stop_tokens=params.stop_token_ids,
                ignore_eos=params.ignore_eos,
            )
            services.driver.submit(
                reply,
                Choice(index, position, job.model.tokenizer, params, context),
                metrics=metrics,
                tenant=job.tenant,
                prompt=prompt,
                sampling=sampling,
                priority=job.priority,
            )
            index += 1
        metrics.admitted(job.tenant, len(prompt))


def _params(
    request: openai.SamplingFields, model: ServedModel, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The request's sampling, then what the model's author recommends, then OpenAI's defaults."""
    author = model.tokenizer.generation_defaults
    top_k = request.top_k if request.top_k is not None else author.top_k
    bias = request.logit_bias
    return SamplingParams(
        n=request.n or 1,
        temperature=_first(request.temperature, author.temperature, 1.0),
        top_p=_first(request.top_p, author.top_p, 1.0),
        top_k=max(top_k or 0, 0),
        min_p=_first(request.min_p, author.min_p, 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, author.repetition_penalty, 1.0),
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        logprobs=logprobs,
        logit_bias=[(int(token), value) for token, value in bias.items()] if bias else None,
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
    )


def _first(given: float | None, recommended: float | None, otherwise: float) -> float:
    if given is not None:
        return given
    return recommended if recommended is not None else otherwise


def _stream_options(request: openai.SamplingFields) -> openai.StreamOptions:
    if request.stream_options is None:
        return openai.StreamOptions()
    if not request.stream:
        raise InvalidField("stream_options needs stream to be true", field="stream_options")
    return request.stream_options


def _check(services: Services, model: ServedModel, prompts: int, params: SamplingParams) -> int:
    """Each field may be in bounds and their product still far too much, or an id outside this model's vocabulary.

    Returns how long an answer gets whose length nobody bounded: what the bounds leave each, and it ends by its length.
    """
    for field, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in params.logit_bias)),
    ):
        if ids and max(ids) >= model.vocabulary:
            raise InvalidField(
                f"{field} has the token id {max(ids)}, the vocabulary is {model.vocabulary}", field=field
            )
    sequences = prompts * params.n
    if sequences > services.limits.max_sequences:
        raise InvalidField(
            f"{prompts} prompts with n={params.n} make {sequences} sequences,"
            f" the limit is {services.limits.max_sequences} (max_sequences); send fewer at once",
            field="n" if params.n > 1 else "prompt",
        )
    if params.max_tokens is None:
        tokens = services.limits.max_request_tokens
        if params.logprobs is not None:
            tokens = min(tokens, services.limits.max_request_logprobs // (1 + params.logprobs))
        return max(1, tokens // sequences)
    most = params.max_tokens
    tokens = sequences * most
    if tokens > services.limits.max_request_tokens:
        raise InvalidField(
            f"{sequences} sequences of up to {most} tokens make {tokens} tokens, the limit is"
            f" {services.limits.max_request_tokens} (max_request_tokens); lower max_tokens or n",
            field="max_tokens",
        )
    if params.logprobs is not None and tokens * (1 + params.logprobs) > services.limits.max_request_logprobs:
        raise InvalidField(
            f"{tokens} tokens with {params.logprobs} top log probabilities each make"
            f" {tokens * (1 + params.logprobs)} values, the limit is {services.limits.max_request_logprobs}"
            " (max_request_logprobs); lower max_tokens, n or the number of log probabilities",
            field="logprobs",
        )
    return most


def _check_ids(prompt: list[int], model: ServedModel) -> list[int]:
    if not prompt:
        raise InvalidField("prompt has no tokens, at least 1 is needed", field="prompt")
    if len(prompt) > model.max_sequence_tokens:
        raise RequestTooLong.beyond(
            model.max_sequence_tokens, f"the prompt has {len(prompt)}", "shorten it", field="prompt"
        )
    largest = max(prompt)
    if largest >= model.vocabulary:
        raise InvalidField(f"prompt has the token id {largest}, the vocabulary is {model.vocabulary}", field="prompt")
    return prompt


def _echoes(prompts: list[str | list[int]], n: int, model: ServedModel) -> list[bytes]:
    """The prompts as texts in JSON. Linear in what they are, so it runs where they are tokenized."""
    echoes, size = [], 0
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, skip_special_tokens=False)
        echo = msgspec.json.encode(text)
        size += n * len(echo)
        # Looked at after each prompt: ids are short in a body and may stand for long texts.
        if size > MAX_ECHO_BYTES:
            raise InvalidField(
                f"echo with n={n} repeats the prompts in {size} bytes or more, the limit is {MAX_ECHO_BYTES};"
                " lower n, send shorter prompts or leave echo out",
                field="echo",
            )
        echoes.append(echo)
    return echoes
