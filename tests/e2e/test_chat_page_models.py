"""Goal: the chat page asks the model that was chosen, shows what is behind each, and an answer outlives the workers
that its own buttons kill.

Method: a real browser before a scripted front with two models, and before real processes with two replicas; there
other streams make the answer last, and workers are stopped while the buttons are looked for, so that they are pressed
in the middle of the answer on any machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from llmscale.gateway.config import ServedModel
from llmscale.tokenizer import Tokenizer
from tests.fakes.browser import CHROMIUM, Page, browsing
from tests.fakes.fake_front import FakeFront, FakeReplica
from tests.fakes.gateway_server import serving, until
from tests.fakes.tiny_tokenizer import write_byte_level, write_metaspace
from tests.processes import Server, serving_fleet, wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

LAST = "document.querySelector('.assistant:last-of-type')"
TEXT = f"{LAST}.querySelector('.text').textContent"
IDLE = "!document.getElementById('send').hidden"
PID = "row.querySelector('.pid').textContent"
STORY = "Tell me a story."
BESIDE = 24
BODY = {"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": 1_000, "ignore_eos": True}
OPTIONS = "[...document.getElementById('model').options].map(option => option.textContent)"


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with browsing(tmp_path / "profile") as opened:
        yield opened
        assert opened.failures == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel("second", Tokenizer(write_metaspace(tmp_path_factory.mktemp("second"))), 600, 4_096, created=2)


async def put(page: Page, field: str, value: str, event: str = "input") -> None:
    """What a user's typing or choosing does to a field."""
    await page.value(
        f"(() => {{ const field = document.getElementById('{field}'); field.value = {json.dumps(value)};"
        f"field.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


async def ask(page: Page, text: str) -> None:
    await put(page, "prompt", text)
    await page.value("document.getElementById('form').requestSubmit()")


def replica(model: str, state: str = "ready", **more: Any) -> FakeReplica:
    return FakeReplica(node=f"{model}-{more.get('worker_pid', 0)}", model=model, state=state, **more)


async def test_the_page_asks_the_chosen_model_and_says_which_one_answered(
    tokenizer: Tokenizer, second: ServedModel, page: Page
) -> None:
    script = itertools.chain([[*tokenizer.encode("from tiny"), 2]], [[*second.tokenizer.encode("stop here.")[1:], 2]])
    front = FakeFront(tokens=lambda _prompt, _sampling: next(script), eos=frozenset({2}))
    front.replicas = [replica("tiny"), replica("second")]
    async with serving(tokenizer, front, more_models=[second]) as gateway, page.visiting(gateway.url):
        await page.until("document.getElementById('model').value === 'tiny'")
        assert await page.value(OPTIONS) == ["tiny", "second"]
        await ask(page, "hello")
        await page.until(f"{IDLE} && {TEXT} === 'from tiny'")
        assert (await page.value(f"{LAST}.querySelector('.figures').textContent")).startswith("tiny · ")
        await put(page, "model", "second", "change")
        assert await page.value("document.title") == "second · llmscale"
        await ask(page, "hello again")
        await page.until(f"{IDLE} && {TEXT} === 'stop here.'")
        assert (await page.value(f"{LAST}.querySelector('.figures').textContent")).startswith("second · ")
    assert [one.model for one in front.submitted.values()] == ["tiny", "second"]
    # The conversation goes on, in the other model's own template.
    asked = second.tokenizer.decode(front.submitted[2].prompt, skip_special_tokens=False)
    assert asked.startswith("<s>")
    assert "hello" in asked
    assert "from tiny" in asked


async def test_a_model_without_a_replica_is_marked_and_each_replica_shows_its_model(
    tokenizer: Tokenizer, second: ServedModel, page: Page
) -> None:
    front = FakeFront(automatic=False)
    front.replicas = [replica("tiny"), replica("second", "starting"), replica("stranger")]
    async with serving(tokenizer, front, more_models=[second]) as gateway, page.visiting(gateway.url):
        await page.until(f"{OPTIONS}.join() === 'tiny,second (starting)'")
        assert await page.value("document.getElementById('fleet-state').textContent") == "starting"
        await page.value("document.getElementById('fleet-button').click()")
        rows = "[...document.querySelectorAll('.replica')].map(row => ['name', 'state'].map("
        rows += "part => row.querySelector('.' + part).textContent).join())"
        await page.until(f"{rows}.length === 3")
        assert await page.value(rows) == ["tiny,ready", "second,starting", "stranger,not served here"]
        summary = await page.value("document.getElementById('fleet-summary').textContent")
        assert summary.startswith("3 replicas of 2 models, ")
        front.replicas[1] = replica("second", trust="ejected")
        await page.until(f"{OPTIONS}.join() === 'tiny,second'")
        await page.until(f"{rows}[1] === 'second,ready, ejected'")
        await page.until("document.getElementById('fleet-state').textContent === 'ready'")


async def test_a_replica_that_is_down_shows_dashes_where_nothing_is_known(tokenizer: Tokenizer, page: Page) -> None:
    front = FakeFront()
    front.replicas = [FakeReplica(node="a"), FakeReplica(node="b", state="down", free_blocks=0, worker_pid=0)]
    async with serving(tokenizer, front) as gateway, page.visiting(gateway.url):
        await page.until("document.getElementById('fleet-state').textContent === 'ready'")
        await page.value("document.getElementById('fleet-button').click()")
        parts = "['state', 'running', 'steps', 'used'].map(part => row.querySelector('.' + part).textContent)"
        rows = f"[...document.querySelectorAll('.replica')].map(row => {parts}.join())"
        await page.until(f"{rows}.length === 2")
        assert await page.value(rows) == ["ready,0,0,22 %", "down,-,-,-"]
        assert await page.value("document.querySelectorAll('.replica progress')[1].value") == 0


async def test_a_worker_of_another_model_is_no_news_for_an_answer(
    tokenizer: Tokenizer, second: ServedModel, page: Page
) -> None:
    answer = [*tokenizer.encode("one two three four"), 2]
    front = FakeFront(tokens=lambda _prompt, _sampling: iter(answer), automatic=False)
    front.replicas = [replica("tiny"), replica("second")]
    async with serving(tokenizer, front, more_models=[second]) as gateway, page.visiting(gateway.url):
        await page.until("document.getElementById('model').value === 'tiny'")
        await ask(page, "count")
        await until(lambda: front.live)
        front.step(tokens=2)
        await page.until(f"{TEXT}.length > 0")
        front.replicas[1] = replica("second", "recovering")
        await page.until(f"{OPTIONS}.join() === 'tiny,second (recovering)'")
        assert await page.value("document.getElementById('notice').hidden")
        front.replicas[1] = replica("second", worker_restarts=1)
        await page.until(f"{OPTIONS}.join() === 'tiny,second'")
        assert await page.value(f"{LAST}.querySelector('.badge').hidden")
        front.replicas[0] = replica("tiny", "recovering")
        await page.until("document.getElementById('notice').textContent.includes('being replaced')")
        front.replicas[0] = replica("tiny", worker_restarts=1)
        await page.until(f"{LAST}.querySelector('.badge').textContent === 'worker replaced'")
        while front.live:
            front.step()
        await page.until(f"{IDLE} && {TEXT} === 'one two three four'")


TWO_REPLICAS = """
kill_button = true

[models.tiny-chat]
model = "tiny-chat"
replicas = 2
dtype = "float32"
"""


async def stopped_in_its_middle(
    page: Page, server: Server, pool: ThreadPoolExecutor, undisturbed: str
) -> list[Future[httpx2.Response]]:
    """Asks for the story beside others; all workers stand still in its middle. Gives what runs beside it. A story that
    is nearly through before they stand still, because this process had to wait, is asked for again."""
    for _ in range(5):
        # They share every step with the story and outlast it, however busy the machine is.
        others = [pool.submit(server.post, "/v1/completions", BODY) for _ in range(BESIDE)]
        await ask(page, STORY)
        await page.until(f"{LAST} !== null && {TEXT}.length > 20", seconds=300)
        workers = workers_of(server)
        send(signal.SIGSTOP, workers)
        # One that waits for a processor stands still once it has got it.
        await until(lambda workers=workers: all(stands_still(worker) for worker in workers))
        # Of the other third some may have left the worker and be on its way to the page.
        if len(await page.value(TEXT)) < len(undisturbed) * 2 // 3:
            return others
        send(signal.SIGCONT, workers)
        for other in others:
            assert (await asyncio.wrap_future(other)).status_code == 200
        await page.until(IDLE, seconds=300)
        await page.value("document.getElementById('new-chat').click()")
    raise AssertionError("five stories ended before their workers stood still")


@pytest.mark.usefixtures("slow_processor")
async def test_an_answer_goes_on_when_the_workers_are_killed_with_their_buttons(page: Page, tmp_path: Path) -> None:
    with serving_fleet(tmp_path, TWO_REPLICAS) as server, ThreadPoolExecutor(BESIDE) as pool:
        await asyncio.to_thread(wait_until, lambda: server.states() == ["ready"] * 2, 120, "both replicas are ready")
        await page.open(server.base)
        await page.until("document.getElementById('model').value === 'tiny-chat'")
        for field, value in (("seed", "21"), ("temperature", "0")):
            await put(page, field, value)
        await ask(page, STORY)
        await page.until(f"{IDLE} && {TEXT}.length > 100", seconds=300)
        undisturbed = await page.value(TEXT)
        await page.value("document.getElementById('new-chat').click()")
        await page.value("document.getElementById('fleet-button').click()")
        others = await stopped_in_its_middle(page, server, pool, undisturbed)
        workers = workers_of(server)
        try:
            await press_kill(page, workers[0])
            # Each button is its own worker's: the other one still stands.
            assert stands_still(workers[1])
            await press_kill(page, workers[1])
        finally:
            send(signal.SIGCONT, workers)
        await page.until(IDLE, seconds=300)
        assert await page.value(TEXT) == undisturbed
        # Two where the next worker takes longer than half a second: then the replica gives its streams back.
        assert (await page.value(f"{LAST}.querySelector('.badge').textContent")).startswith("survived ")
        figures = await page.value(f"{LAST}.querySelector('.figures').textContent")
        assert " · longest pause " in figures
        restarts = "[...document.querySelectorAll('.replica .restarts')].map(one => one.textContent).sort().join()"
        await page.until(f"{restarts} === '1,1'", seconds=300)
        assert {(await asyncio.wrap_future(other)).status_code for other in others} == {200}
        await page.leave()


async def press_kill(page: Page, worker: int) -> None:
    """Presses the button in the row of a worker, and waits until that worker is gone."""
    row = f"[...document.querySelectorAll('.replica')].find(row => {PID} === '{worker}')"
    await page.until(f"{row} !== undefined")
    await page.value(f"{row}.querySelector('.kill').click()")
    await until(lambda: not psutil.pid_exists(worker))


def stands_still(worker: int) -> bool:
    return psutil.Process(worker).status() == psutil.STATUS_STOPPED


def send(number: signal.Signals, processes: Sequence[int]) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            assert number == signal.SIGCONT


def workers_of(server: Server) -> list[int]:
    found = [one["worker_pid"] for one in server.replicas()]
    # A replica between two workers has none, and whoever kills process 0 kills this one.
    assert min(found) > 0
    return found
