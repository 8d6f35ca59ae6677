"""The page's button that kills a worker: there only when asked for, and only for workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from llmscale.errors import ConfigError
from llmscale.gateway.config import GatewayConfig
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront, FakeReplica
from tests.fakes.gateway_server import serving


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def front_with(worker_pid: int) -> FakeFront:
    front = FakeFront()
    front.replicas = [FakeReplica(worker_pid=worker_pid)]
    return front


async def test_the_worker_that_is_named_dies_and_no_other_process(
    tokenizer: Tokenizer, victim: subprocess.Popen[bytes]
) -> None:
    async with (
        serving(tokenizer, front_with(victim.pid), kill_button=True) as gateway,
        httpx2.AsyncClient(base_url=gateway.url) as client,
    ):
        assert (await client.get("/fleet")).json()["may_kill"] is True
        for pid in (os.getpid(), 1, 0, victim.pid + 1):
            refused = await client.post(f"/fleet/kill/{pid}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
        assert victim.poll() is None
        assert (await client.get(f"/fleet/kill/{victim.pid}")).status_code == 405
        assert (await client.post(f"/fleet/kill/{victim.pid}")).json() == {"status": "killed"}
        assert victim.wait() == -signal.SIGKILL
        assert "dead already" in (await client.post(f"/fleet/kill/{victim.pid}")).text


async def test_without_the_setting_there_is_no_button(tokenizer: Tokenizer, victim: subprocess.Popen[bytes]) -> None:
    async with (
        serving(tokenizer, front_with(victim.pid)) as gateway,
        httpx2.AsyncClient(base_url=gateway.url) as client,
    ):
        assert (await client.get("/fleet")).json()["may_kill"] is False
        assert (await client.post(f"/fleet/kill/{victim.pid}")).status_code == 404
        assert victim.poll() is None


async def test_a_page_from_elsewhere_cannot_press_it(tokenizer: Tokenizer, victim: subprocess.Popen[bytes]) -> None:
    async with (
        serving(tokenizer, front_with(victim.pid), kill_button=True) as gateway,
        httpx2.AsyncClient(base_url=gateway.url) as client,
    ):
        for headers in ({"origin": "https://elsewhere.example"}, {"host": "elsewhere.example"}):
            assert (await client.post(f"/fleet/kill/{victim.pid}", headers=headers)).status_code == 403
        assert victim.poll() is None


def test_it_is_refused_where_others_can_reach_it() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 only"):
        GatewayConfig(host="0.0.0.0", api_keys=("k" * 32,), kill_button=True)
