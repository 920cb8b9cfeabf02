"""A real browser, Debian's chromium, driven over its debugging protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, final

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 30.0
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--remote-debugging-port=0", "--no-first-run", "--disable-extensions", "--mute-audio"),
    *("--disable-background-networking", "--force-color-profile=srgb", "--hide-scrollbars"),
)


@final
class Page:
    """One page of the browser."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        """Exceptions, errors on the console, and requests of the page that were blocked."""
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listening = asyncio.create_task(self._listen())

    async def begin(self, width: int, height: int) -> None:
        """Receive all events, in a window of that size."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def end(self) -> None:
        """Stop receiving events."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the browser; return its result."""
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(
            json.dumps({"id": number, "method": method, "params": parameters})
        )
        answer = await asyncio.wait_for(self._waiting[number], PATIENCE_S)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        """Open a URL."""
        await self.call("Page.navigate", url=url)

    async def prefer(self, scheme: str) -> None:
        """Set the preferred colour scheme, light or dark."""
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        result = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> Any:
        """Wait until an expression is true; return its value."""
        async with asyncio.timeout(PATIENCE_S):
            while not (value := await self.run(script)):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        return value

    async def press(self, key: str) -> None:
        """Press a key: Tab, Enter, Escape or a letter."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        text = {"Enter": "\r", "Tab": "", "Escape": ""}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=codes.get(key, 0),
                text=text if kind == "keyDown" else "",
            )

    async def picture(self, path: Path, *, whole: bool = False) -> None:
        """Save a picture of the window, or of the whole page."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def _listen(self) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                return
            said = json.loads(message.data)
            if "id" in said:
                self._waiting.pop(said["id"]).set_result(said)
                continue
            parameters = said.get("params", {})
            if said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                self.complaints.append(json.dumps(parameters["entry"]))


@asynccontextmanager
async def browser(profile: Path, width: int = 1440, height: int = 900) -> AsyncIterator[Page]:
    """Open a page in a new browser."""
    assert CHROMIUM is not None, "chromium is installed"
    process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE_S):
            while not _has_line(port_file):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        port = port_file.read_text().partition("\n")[0]
        async with ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                targets = await answer.json()
            url = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            async with session.ws_connect(url, max_msg_size=0) as socket:
                page = Page(socket)
                await page.begin(width, height)
                try:
                    yield page
                finally:
                    await page.end()
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, PATIENCE_S)


def _has_line(path: Path) -> bool:
    return path.exists() and "\n" in path.read_text()
