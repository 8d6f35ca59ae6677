"""A gateway with short time limits, on the event loop that it runs on in production."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from llmscale.gateway.config import GatewayLimits
from llmscale.tokenizer import Tokenizer
from tests.fakes.gateway_server import Serving, serving
from tests.fakes.raw_http import BODY, post
from tests.fakes.tiny_tokenizer import write_byte_level


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as in production."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(write_byte_level(folder))


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    limits = GatewayLimits(max_header_seconds=1, max_body_seconds=1, max_idle_connection_seconds=2, max_drain_seconds=1)
    async with serving(tokenizer, limits=limits) as running:
        yield running
        # Whatever a test did, the gateway still answers.
        assert b" 200 " in await running.exchange(post(BODY))
        assert not running.gateway.services.driver.live_replies
