"""Pages of other origins: which may ask, what they are told, and that a preflight opens nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.errors import ConfigError, Overloaded, Unavailable
from llmscale.gateway.config import GatewayConfig
from llmscale.origins import MAX_ORIGINS, wrong_origins
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import Serving, serving, until
from tests.fakes.raw_http import BODY, code, post, status

KEY = "a-key-for-these-tests"
PAGE = "https://app.example"
OTHER = "http://localhost:3000"
STRANGER = "https://evil.example"
WITH_KEY = f"Authorization: Bearer {KEY}\r\n"


def fields(answer: bytes) -> dict[str, str]:
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def grants(answer: bytes) -> dict[str, str]:
    """The fields of CORS, without their common beginning."""
    beginning = "access-control-"
    return {name.removeprefix(beginning): value for name, value in fields(answer).items() if name.startswith(beginning)}


async def ask(gateway: Serving, origin: str | None, request: str = "GET /v1/models", extra: str = WITH_KEY) -> bytes:
    named = f"Origin: {origin}\r\n" if origin else ""
    head = f"{request} HTTP/1.1\r\nHost: api.example\r\n{named}{extra}Connection: close\r\n\r\n"
    return await gateway.exchange(head.encode())


async def preflight(gateway: Serving, origin: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    asked = f"Access-Control-Request-Method: {method}\r\n"
    asked += "Access-Control-Request-Headers: authorization,content-type,x-stainless-lang\r\n"
    return await ask(gateway, origin, f"OPTIONS {path}", asked)


async def test_a_listed_page_may_ask_with_a_key_and_no_other_page_may(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, api_keys=(KEY,), allowed_origins=(PAGE, OTHER)) as gateway:
        for origin in (PAGE, OTHER):
            asked, answer = await preflight(gateway, origin), await ask(gateway, origin)
            assert (status(asked), status(answer)) == (200, 200)
            assert grants(asked) == {
                "allow-origin": origin,
                "allow-methods": "GET, HEAD, POST",
                "allow-headers": "authorization,content-type,x-stainless-lang",
                "max-age": "600",
            }
            assert grants(answer) == {
                "allow-origin": origin,
                "expose-headers": "X-Request-Id, Retry-After, X-Should-Retry",
            }
            assert "Origin" in fields(asked)["vary"]
            assert fields(answer)["vary"] == "Origin"
        for origin in (STRANGER, "null", f"{PAGE}.evil.example", f"{PAGE}:8443", PAGE.upper(), "*", f"{PAGE}, {OTHER}"):
            asked, answer = await preflight(gateway, origin), await ask(gateway, origin)
            assert status(asked) == 400
            assert "allow-origin" not in grants(asked) | grants(answer)
            assert fields(answer)["vary"] == "Origin"


async def test_every_page_may_ask_with_a_key_where_all_are_allowed_but_never_with_the_browsers_own(
    tokenizer: Tokenizer,
) -> None:
    async with serving(tokenizer, api_keys=(KEY,), allowed_origins=("*",)) as gateway:
        for answer in (await preflight(gateway, STRANGER), await ask(gateway, STRANGER)):
            assert status(answer) == 200
            assert grants(answer)["allow-origin"] == "*"
            assert "allow-credentials" not in grants(answer)
        assert status(await ask(gateway, STRANGER, extra="Cookie: key=a-key-for-these-tests\r\n")) == 401


async def test_without_the_setting_no_page_is_told_that_it_may(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, api_keys=(KEY,)) as gateway:
        asked, answer = await preflight(gateway, PAGE), await ask(gateway, PAGE)
    assert (status(asked), status(answer)) == (405, 200)
    assert grants(asked) == grants(answer) == {}
    assert "vary" not in fields(answer)


async def test_a_preflight_needs_no_key_opens_nothing_and_tells_nothing_of_a_path(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, api_keys=(KEY,), allowed_origins=(PAGE,)) as gateway:
        paths = ("/v1/chat/completions", "/v1/models", "/fleet/kill/1", "/health", "/nothing")
        bodies = {(await preflight(gateway, PAGE, path)).partition(b"\r\n\r\n")[2] for path in paths}
        assert bodies == {b"OK"}
        assert status(await preflight(gateway, PAGE, method="DELETE")) == 400
        assert gateway.front.submitted == {}
        # What only looks like one goes the usual way.
        for origin, extra in ((PAGE, ""), (None, "Access-Control-Request-Method: POST\r\n"), (PAGE, WITH_KEY)):
            answer = await ask(gateway, origin, "OPTIONS /v1/models", extra)
            assert (status(answer), fields(answer)["allow"]) == (405, "GET, HEAD")
        assert status(await ask(gateway, PAGE, extra="Access-Control-Request-Method: GET\r\n")) == 401


async def test_a_listed_page_can_read_errors_with_their_headers(tokenizer: Tokenizer) -> None:
    front = FakeFront(refusal=Overloaded("full", retry_after_seconds=7))
    async with serving(tokenizer, front, api_keys=(KEY,), allowed_origins=(PAGE,)) as gateway:
        sent = f"Origin: {PAGE}\r\n{WITH_KEY}Connection: close\r\n".encode()
        answers = [
            await ask(gateway, PAGE, extra=""),
            await ask(gateway, PAGE, "GET /nothing"),
            await ask(gateway, PAGE, "PUT /v1/models"),
            await gateway.exchange(post(b"{", extra=sent)),
            await gateway.exchange(post(BODY, extra=sent)),
        ]
        front.refusal = Unavailable("nobody is there")
        answers.append(await gateway.exchange(post(BODY, extra=sent)))
        front.refusal = RuntimeError("a defect")  # type: ignore[assignment]
        answers.append(await gateway.exchange(post(BODY, extra=sent)))
    assert [status(answer) for answer in answers] == [401, 404, 405, 400, 429, 503, 500]
    for answer in answers:
        assert grants(answer)["allow-origin"] == PAGE
        assert code(answer)
        shown = grants(answer)["expose-headers"].lower().split(", ")
        assert fields(answer)["x-request-id"]
        assert {"x-request-id", "retry-after", "x-should-retry"} == set(shown)
    assert fields(answers[4])["retry-after"] == "7"


async def test_a_listed_page_gets_a_stream_and_ends_it_by_leaving(tokenizer: Tokenizer) -> None:
    # A letter at each step: a token whose text is not complete yet would be no event.
    letter = tokenizer.encode("x")[0]
    front = FakeFront(tokens=lambda _prompt, _sampling: itertools.repeat(letter), automatic=False)
    body = json.dumps({**json.loads(BODY), "stream": True, "max_tokens": 100}).encode()
    async with serving(tokenizer, front, api_keys=(KEY,), allowed_origins=(PAGE,)) as gateway:
        reader, writer = await gateway.raw()
        writer.write(post(body, extra=f"Origin: {PAGE}\r\n{WITH_KEY}".encode()))
        await until(lambda: front.live)
        front.step()
        async with asyncio.timeout(120):
            answer = await reader.readuntil(b"data: ")
        assert grants(answer)["allow-origin"] == PAGE
        assert fields(answer)["content-type"].startswith("text/event-stream")
        writer.transport.abort()
        await until(lambda: front.cancelled)


def test_pages_of_other_origins_need_keys_and_have_no_button() -> None:
    with pytest.raises(ConfigError, match="no API key is set"):
        GatewayConfig(allowed_origins=(PAGE,))
    with pytest.raises(ConfigError, match="the gateway's own page"):
        GatewayConfig(allowed_origins=(PAGE,), api_keys=(KEY,), kill_button=True)
    assert GatewayConfig(allowed_origins=(PAGE,), api_keys=(KEY,)).allowed_origins == (PAGE,)


# fmt: off
GOOD = [
    "https://a.example", "http://localhost:3000", "http://[::1]:8080", "https://a_b.example:8443", "http://127.0.0.1",
    "https://a.example:80", "https://xn--e1afmkfd.example", "tauri://localhost", "chrome-extension://abcdefghijklmnop",
]
# fmt: on


@pytest.mark.parametrize("origin", GOOD)
def test_an_origin_as_browsers_send_it_can_be_listed(origin: str) -> None:
    assert wrong_origins([origin]) is None


@pytest.mark.parametrize(
    "origin",
    [
        *("", "null", "a.example", "https://", "https://a.example/", "https://a.example/app", "https://*.example"),
        *("HTTPS://a.example", "https://A.example", "https://a.example:443", "http://a.example:80", "https://a.example:"),
        *("https://a.example:0", "https://a.example:65536", "https://u@a.example", "https://a.example?x", "https://é.example"),
        *(" https://a.example", "https://a.example\n", "https://a.example, https://b.example", '["https://a.example"]'),
        *("https://a.example\r\nX: y", "x" * 5_000),
    ],
)  # fmt: skip
def test_what_no_browser_sends_is_refused_with_what_is_right(origin: str) -> None:
    with pytest.raises(
        ConfigError, match=r"allowed_origins: .* is no origin as browsers send it: write SCHEME"
    ) as refused:
        GatewayConfig(allowed_origins=(PAGE, origin), api_keys=(KEY,))
    assert repr(origin[:60])[1:-1] in str(refused.value)
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_a_list_of_origins_is_bounded_and_all_stands_alone() -> None:
    many = [f"https://a{number}.example" for number in range(MAX_ORIGINS + 1)]
    assert wrong_origins(many[:-1]) is None
    assert "65 origins, the limit is 64" in str(wrong_origins(many))
    assert "stands for every origin already" in str(wrong_origins(["*", PAGE]))
    assert wrong_origins(["*"]) is wrong_origins([]) is None


@given(st.text(st.sampled_from("ahtps:/.*[]@ é\n019-"), max_size=20))
def test_an_origin_that_is_taken_has_no_path_no_space_and_no_capital(text: str) -> None:
    if text != "*" and wrong_origins([text]) is None:
        assert re.fullmatch(r"[a-z0-9+.-]+://[^/@*\s]+", text)
        assert text == text.lower()
        assert text.isascii()
