"""How long a request may take: the front is told, and whoever loses by it reads the limit and the setting."""

from __future__ import annotations

import asyncio
import re

import openai

from llmscale.gateway.config import GatewayLimits
from llmscale.tokenizer import Tokenizer
from tests.fakes.fake_front import FakeFront
from tests.fakes.gateway_server import serving, until


async def test_a_request_that_is_too_slow_names_the_limit_and_its_setting(tokenizer: Tokenizer) -> None:
    front = FakeFront(automatic=False)
    limits = GatewayLimits(max_request_seconds=2.5, max_drain_seconds=1)
    async with serving(tokenizer, front, limits=limits) as gateway:
        asking = asyncio.ensure_future(gateway.client().completions.create(model="tiny", prompt="x"))
        await until(lambda: front.live)
        (submitted,) = front.live.values()
        front.fail(1, "deadline_exceeded")
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
    assert submitted.timeout_us == 2_500_000
    assert isinstance(answer, openai.APIStatusError)
    assert answer.status_code == 504
    assert re.search(r"did not finish within 2\.5 s \(max_request_seconds of the gateway\); shorten it", answer.message)
