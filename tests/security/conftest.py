"""Gateways with short and with long time limits, on the event loop that they run on in production."""

from __future__ import annotations

import asyncio
import contextlib
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


@contextlib.asynccontextmanager
async def checked(tokenizer: Tokenizer, limits: GatewayLimits) -> AsyncIterator[Serving]:
    """A gateway that answers at the end, whatever a test did to it."""
    async with serving(tokenizer, limits=limits) as running:
        yield running
        assert b" 200 " in await running.exchange(post(BODY))
        assert not running.gateway.services.driver.live_replies


@pytest.fixture
async def gateway(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    """One that waits for nobody for long."""
    limits = GatewayLimits(max_header_seconds=1, max_body_seconds=1, max_idle_connection_seconds=2, max_drain_seconds=1)
    async with checked(tokenizer, limits) as running:
        yield running


@pytest.fixture
async def patient(tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    """One whose time limits end no test: client and gateway share a process, and a busy machine may stop it for
    seconds."""
    async with checked(
        tokenizer, GatewayLimits(max_header_seconds=100, max_body_seconds=100, max_drain_seconds=1)
    ) as running:
        yield running
