"""A simulated incident: steady chat, three tenants of an API, and a burst of batch work.

`python -m tests.support.incident FOLDER` plays it and saves pictures of the dashboard.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import click

from flowcontrol_server.admin.client import AdminSource
from flowcontrol_server.tools.top import Top
from tests.support.browser import Page, browser
from tests.support.streams import Running, Streams, running

OBJECTIVES = {"chat": 10, "api": 0, "batch": -1}
ENDPOINTS = [f"10.0.0.{number}:8000" for number in (5, 6, 7)]
RUNS_AT_ONCE = 8
"""Requests that a model server runs at once; further ones wait inside it."""
SETTINGS: dict[str, Any] = {
    "endpoints": {"static": ENDPOINTS},
    "picker": "least-loaded",
    "saturation": {"maxConcurrency": RUNS_AT_ONCE},
    "flowControl": {
        "maxRequests": 160,
        "requestTTL": "20s",
        "ceilings": {"policy": "priority-holdback", "minCeiling": 0.75},
        "weights": {"acme": 2},
        "bands": [{"match": {"minPriority": 10}, "requestTTL": "5s"}],
    },
}
_BUTTONS = "#decision-rows button"
_SETTLED_S = 3.0
"""Time for the screen to fill."""


@asynccontextmanager
async def traffic(service: Running, seed: int = 889) -> AsyncIterator[None]:
    """Endless traffic, more than the pool can serve."""
    chance = Random(seed)
    streams = Streams(service.grpc)
    servers = {address: asyncio.Semaphore(RUNS_AT_ONCE) for address in ENDPOINTS}
    asking: set[asyncio.Task[int]] = set()

    def ask(flow_id: str, objective: str, seconds: float) -> None:
        hold_s = seconds * chance.uniform(0.5, 1.5)
        client_id = f"{chance.getrandbits(64):016x}"
        task = asyncio.create_task(
            streams.ask(
                flow_id, objective=objective, client_id=client_id, hold_s=hold_s, servers=servers
            )
        )
        asking.add(task)
        task.add_done_callback(asking.discard)

    async def come(
        objective: str, flows: Mapping[str, float], per_s: float, seconds: float
    ) -> None:
        while True:
            await asyncio.sleep(chance.expovariate(per_s))
            ask(chance.choices(list(flows), list(flows.values()))[0], objective, seconds)

    async def burst() -> None:
        while True:
            for _ in range(90):
                ask("nightly-embeddings", "batch", 2.5)
            await asyncio.sleep(24)

    chat = {"web": 5, "mobile": 3, "support-desk": 1}
    coming = [
        asyncio.create_task(come("chat", chat, 6, 1.2)),
        asyncio.create_task(come("api", {"acme": 3, "globex": 3, "initech": 1}, 9, 1.6)),
        asyncio.create_task(burst()),
    ]
    try:
        yield
    finally:
        for task in (*coming, *asking):
            task.cancel()
        await asyncio.gather(*coming, *asking, return_exceptions=True)
        await streams.close()


async def _pictures(folder: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "service").mkdir()
        async with (
            running(directory / "service", SETTINGS, OBJECTIVES) as service,
            traffic(service),
            browser(directory / "profile", 1440, 1250) as page,
        ):
            await asyncio.sleep(seconds)
            for scheme in ("light", "dark"):
                await page.prefer(scheme)
                await page.open(service.http)
                await page.until("document.querySelectorAll('#decision-rows tr').length > 20")
                await asyncio.sleep(_SETTLED_S)
                await page.picture(folder / f"dashboard-{scheme}.png")
            await page.run("document.querySelector('input[value=undone]').click()")
            await page.run(f"document.querySelector('{_BUTTONS}').click()")
            await _picture_of_dialog(page, folder / "explained-ended.png")
            waiting = await _waiting(page)
            await page.run(f"document.getElementById('ask-id').value = '{waiting}'")
            await page.run("document.querySelector('#ask button').click()")
            await _picture_of_dialog(page, folder / "explained-waiting.png")
            await _terminal(service, page, folder, waiting)


async def _picture_of_dialog(page: Page, path: Path) -> None:
    await page.until("document.getElementById('explained').open")
    await page.picture(path)
    await page.run("document.getElementById('close').click()")


async def _waiting(page: Page) -> str:
    """Return the id of a waiting request."""
    await page.run("document.querySelector('input[value=all]').click()")
    ids = f"[...document.querySelectorAll('{_BUTTONS}')].map(each => each.textContent)"
    newest = int(await page.run(f"Math.max(...{ids})"))
    for request_id in range(newest + 40, 0, -1):
        asked = f"fetch('/api/explain?request={request_id}').then(answer => answer.json())"
        if (await page.run(asked)).get("state") == "waiting":
            return str(request_id)
    message = "nobody waits: let it play longer"
    raise AssertionError(message)


async def _terminal(service: Running, page: Page, folder: Path, request_id: str) -> None:
    top = Top(AdminSource(service.grpc))
    async with top.run_test(size=(164, 46)) as pilot:
        await asyncio.sleep(_SETTLED_S)
        await pilot.pause()
        (folder / "top.svg").write_text(top.export_screenshot())
        await pilot.press("e", *request_id, "enter")
        await asyncio.sleep(_SETTLED_S)
        (folder / "top-explained.svg").write_text(top.export_screenshot())
    for name in ("top", "top-explained"):
        await page.open((folder / f"{name}.svg").resolve().as_uri())
        await asyncio.sleep(1)
        await page.picture(folder / f"{name}.png")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("seconds", type=click.FloatRange(10), default=40.0)
def main(folder: Path, seconds: float) -> None:
    """Play the incident for SECONDS, and save pictures of dashboard and terminal in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(_pictures(folder, seconds))


if __name__ == "__main__":
    main()
