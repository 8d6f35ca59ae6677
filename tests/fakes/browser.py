"""A headless Chromium, driven over a pipe by its debugging protocol: no port, no driver program, no further package.

`browsing` starts it with an empty profile and gives one page; commands and events are JSON ended by a zero byte. Each
call costs one round trip. Knows nothing of what the page shows.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab. `failures` collects what the page logged as an error or broke of its content security policy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self.failures: list[str] = []
        self._listening = asyncio.ensure_future(self._listen())

    async def open(self, url: str) -> None:
        """Opens a tab and waits until it has loaded."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def leave(self) -> None:
        """Empties the tab. A page that asks its server again and again must not outlive it: a connection that is
        refused would be a failure of the page."""
        await self.call("Page.navigate", url="about:blank")
        await self.until("location.href === 'about:blank' && document.readyState === 'complete'")

    @contextlib.asynccontextmanager
    async def visiting(self, url: str) -> AsyncIterator[None]:
        """Opens a tab and leaves it when the block ends."""
        await self.open(url)
        yield
        await self.leave()

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        if self._listening.done():
            raise ConnectionError("the browser has ended")
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps(message).encode() + b"\0")
        answer = await asyncio.wait_for(self._waiting[number], 120)
        assert "error" not in answer, answer
        return dict(answer["result"])

    async def value(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, *, seconds: float = 120) -> None:
        """Waits until an expression in the page is true."""
        async with asyncio.timeout(seconds):
            while not await self.value(f"Boolean({expression})"):  # noqa: ASYNC110 - the page is another process
                await asyncio.sleep(0.02)

    async def screenshot(self) -> bytes:
        """What the tab shows, as a PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def close(self) -> None:
        """Stops listening."""
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening

    async def _listen(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await self._hear_all()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError("the browser has ended"))

    async def _hear_all(self) -> None:
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if "id" in message:
                waiting = self._waiting.pop(message["id"])
                # Whoever waited for too long has given up.
                if not waiting.done():
                    waiting.set_result(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.failures.append(json.dumps(message["params"]))
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.failures.append(message["params"]["entry"]["text"])


@contextlib.asynccontextmanager
async def browsing(profile: Path, *, width: int = 1_100, height: int = 800) -> AsyncIterator[Page]:
    """A browser with one page; ends with the block."""
    assert CHROMIUM is not None, "no Chromium is installed"
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    names = (
        "headless=new no-sandbox disable-gpu remote-debugging-pipe no-first-run hide-scrollbars disable-dev-shm-usage"
        " disable-extensions disable-background-networking disable-component-update"
    )
    arguments = [*(f"--{name}" for name in names.split()), f"--user-data-dir={profile}"]
    arguments.append(f"--window-size={width},{height}")
    # The protocol is fixed to descriptors 3 and 4 of the browser's process.
    command = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        command,
        CHROMIUM,
        *arguments,
        pass_fds=(to_read, from_write),
        stderr=asyncio.subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=64 << 20)
    incoming, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(from_read, "rb"))
    outgoing, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(to_write, "wb"))
    page = Page(reader, outgoing)
    try:
        yield page
    finally:
        with contextlib.suppress(TimeoutError, AssertionError, ConnectionError):
            page._session = None
            await asyncio.wait_for(page.call("Browser.close"), 60)
        await page.close()
        incoming.close()
        outgoing.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
