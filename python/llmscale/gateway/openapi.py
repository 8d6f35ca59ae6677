"""The OpenAPI 3.1 document, made from the structs that check the requests, so that it cannot disagree with them.

Built once per process, in O(schema). Knows nothing of handlers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from llmscale.gateway import openai, vllm

_JSON: Final = "application/json"
_TEXT_EVENTS: Final = "text/event-stream"
_COMPONENTS: Final = (
    openai.CompletionRequest,
    openai.ChatRequest,
    openai.Completion,
    openai.ChatCompletion,
    openai.ChatChunk,
    openai.ModelList,
    openai.ModelObject,
    openai.ErrorResponse,
    vllm.TokenizePromptRequest,
    vllm.TokenizeChatRequest,
    vllm.TokenizeResponse,
    vllm.DetokenizeRequest,
    vllm.DetokenizeResponse,
)
_ERRORS: Final = {
    "400": "The request is at fault; `code` and `param` say where.",
    "401": "No API key, or one that is not known.",
    "404": "The model is not served here.",
    "413": "The body is too large.",
    "429": "A queue is full; Retry-After says for how long.",
    "500": "The request was started and failed; x-should-retry is false where it would fail again.",
    "503": "No replica can take the request now.",
    "504": "The request did not finish before its deadline.",
}


def _refer(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _responses(description: str, content: dict[str, Any], *errors: str) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": description, "content": content}}
    for status in errors:
        answers[status] = {"description": _ERRORS[status], "content": _content(_JSON, _refer("ErrorResponse"))}
    return answers


def _generation(request: str, response: str, chunk: str, summary: str) -> dict[str, Any]:
    content = {**_content(_JSON, _refer(response)), **_content(_TEXT_EVENTS, _refer(chunk))}
    return {
        "summary": summary,
        "security": [{}, {"key": []}],
        "requestBody": {"required": True, "content": _content(_JSON, _refer(request))},
        "responses": _responses("The answer, or its events when `stream` is true", content, *_ERRORS),
    }


def _text(requests: Sequence[str], response: str, summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "security": [{}, {"key": []}],
        "requestBody": {"required": True, "content": _content(_JSON, {"anyOf": [*map(_refer, requests)]})},
        "responses": _responses(summary, _content(_JSON, _refer(response)), "400", "401", "404", "413", "429"),
    }


def _get(summary: str, content: dict[str, Any], *errors: str, key: bool = False) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": _responses(summary, content, *errors)}
    return {**operation, "security": [{}, {"key": []}]} if key else operation


@functools.cache
def document() -> bytes:
    """The document as JSON."""
    schemas, components = msgspec.json.schema_components(_COMPONENTS, ref_template="#/components/schemas/{name}")
    assert len(schemas) == len(_COMPONENTS)
    anything = _content(_JSON, {"type": "object"})
    model_path = _get("One model", _content(_JSON, _refer("ModelObject")), "401", "404", key=True)
    model_path["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    kill = _get("Kill a worker of this machine, where the gateway has the button", anything, "401", "404", key=True)
    kill["parameters"] = [{"name": "pid", "in": "path", "required": True, "schema": {"type": "integer"}}]
    paths = {
        "/v1/completions": {"post": _generation("CompletionRequest", "Completion", "Completion", "Continue a prompt")},
        "/v1/chat/completions": {
            "post": _generation("ChatRequest", "ChatCompletion", "ChatChunk", "Answer a conversation")
        },
        "/tokenize": {
            "post": _text(("TokenizePromptRequest", "TokenizeChatRequest"), "TokenizeResponse", "The ids of a text")
        },
        "/detokenize": {"post": _text(("DetokenizeRequest",), "DetokenizeResponse", "The text of ids")},
        "/v1/models": {"get": _get("The served models", _content(_JSON, _refer("ModelList")), "401", key=True)},
        "/v1/models/{model}": {"get": model_path},
        "/fleet": {"get": _get("State of the replicas", anything, "401", key=True)},
        "/fleet/kill/{pid}": {"post": kill},
        "/metrics": {
            "get": _get("Metrics for Prometheus", _content("text/plain", {"type": "string"}), "401", key=True)
        },
        "/health": {"get": _get("The same as /health/ready", anything, "503")},
        "/health/live": {"get": _get("Whether the process answers", anything)},
        "/health/ready": {"get": _get("Whether a request would be computed now", anything, "503")},
    }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "llmscale", "version": "1", "description": "OpenAI-compatible inference."},
            "paths": paths,
            "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        }
    )
