"""The OpenAPI document says what the gateway does, because both come from the same structs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmscale.gateway.app import ROUTES
from llmscale.gateway.openapi import document

DOCUMENT: dict[str, Any] = json.loads(document())
# The page is not part of the API.
PARTS = {"/v1/models/*": "/v1/models/{model}", "/fleet/kill/*": "/fleet/kill/{pid}"}
API = {(method.lower(), PARTS.get(path, path)) for method, path, _, _ in ROUTES if not path.startswith("/page")}


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_route_of_the_api_is_described_and_nothing_else() -> None:
    described = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert described == API - {("get", "/"), ("get", "/openapi.json")}


def test_every_reference_has_a_schema() -> None:
    names = {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)}
    assert names <= set(DOCUMENT["components"]["schemas"])


def test_routes_that_need_a_key_say_so() -> None:
    for _, path, _, needs_key in ROUTES:
        if item := DOCUMENT["paths"].get(path.replace("*", "{model}")):
            [operation] = item.values()
            assert ("security" in operation) == needs_key


def test_bounds_of_fields_are_part_of_the_schema() -> None:
    properties = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    [temperature, _] = properties["temperature"]["anyOf"]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 100)
    assert properties["messages"]["minItems"] == 1
    assert DOCUMENT["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert DOCUMENT["openapi"] == "3.1.0"
