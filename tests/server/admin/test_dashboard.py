"""The dashboard in a real browser, in front of a real service; skipped without chromium."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientSession

from flowcontrol_server.admin.pages import WATCHERS_PER_PEER_MAX
from tests.support.browser import CHROMIUM, Page, browser
from tests.support.streams import Running, Streams, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
HOSTILE = "<img src=x onerror=document.title='owned'>"
SETTINGS = {
    "endpoints": {"static": ["10.0.0.5:8000"]},
    "saturation": {"maxConcurrency": 1},
    "flowControl": {"maxRequests": 3},
}
CONTRAST = """
(() => {
  const curve = part => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
  const channel = value => curve(value / 255);
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const ground = element => {
    for (let each = element; each; each = each.parentElement) {
      const found = colour(getComputedStyle(each).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "NOSCRIPT"].includes(element.tagName)) continue;
    const pair = [light(colour(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    if (ratio < 4.5) poor.push(`${walker.currentNode.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""
"""Texts whose contrast is below what WCAG 2 asks for at level AA."""


class Stage(NamedTuple):
    """A service with one request in flight, three waiting and one refused; and a browser on it."""

    service: Running
    page: Page
    streams: Streams
    release: asyncio.Event


@asynccontextmanager
async def stage(directory: Path, width: int = 1440) -> AsyncIterator[Stage]:
    """Set up, and everybody gone at the end."""
    service_directory = directory / "service"
    service_directory.mkdir()
    objectives = {"chat": 10, "batch": -1}
    async with (
        running(service_directory, SETTINGS, objectives) as service,
        browser(directory / "profile", width) as page,
    ):
        streams, release = Streams(service.grpc), asyncio.Event()

        def ask(flow_id: str, objective: str, client_id: str) -> None:
            """Send a request."""
            stream = streams.ask(flow_id, objective=objective, client_id=client_id, until=release)
            asking.append(asyncio.create_task(stream))

        asking: list[asyncio.Task[int]] = []
        try:
            await page.open(service.http)
            ask("web", "chat", "first")
            await page.until("document.getElementById('in-flight')?.textContent === '1'")
            ask("web", "chat", "second")
            for client_id in ("third", "fourth", "fifth"):
                ask(HOSTILE, "batch", client_id)
            await page.until("document.getElementById('waiting')?.textContent === '3'")
            yield Stage(service, page, streams, release)
        finally:
            release.set()
            statuses = await asyncio.gather(*asking)
            await streams.close()
        assert sorted(statuses) == [200, 200, 200, 200, 429]


@asynccontextmanager
async def quiet(
    directory: Path, settings: Mapping[str, Any] = SETTINGS
) -> AsyncIterator[tuple[Running, Page]]:
    """A service that nobody has asked anything, and a browser; both gone at the end."""
    (directory / "service").mkdir()
    async with (
        running(directory / "service", settings, {"chat": 10, "batch": -1}) as service,
        browser(directory / "profile") as page,
    ):
        yield service, page


async def text(page: Page, selector: str) -> str:
    """What an element says."""
    said = await page.run(f"document.querySelector({selector!r}).innerText")
    assert isinstance(said, str)
    return said


async def test_an_operator_sees_and_asks(tmp_path: Path) -> None:
    """Bands, tenants, endpoints, decisions; who waits for what; and nobody's text is markup."""
    async with stage(tmp_path) as (_, page, __, release):
        assert await text(page, "#pool") == "llama"
        assert await text(page, "#state") == "serving"
        assert await text(page, "#saturation") == "100%"
        bands = await text(page, "#band-rows")
        assert "10 chat" in bands
        assert "-1 batch" in bands
        assert "gated" in bands
        assert HOSTILE in await text(page, "#flow-rows")
        assert "10.0.0.5:8000" in await text(page, "#endpoint-rows")
        assert await page.run("document.querySelectorAll('#limit-chart path').length") >= 5

        await page.run("document.querySelector('input[value=undone]').click()")
        await page.until("document.querySelectorAll('#decision-rows tr').length === 1")
        outcome = await text(page, "#decision-rows .pill")
        assert outcome in {"rejected-capacity", "evicted-displaced"}  # whoever came last
        await page.run("document.querySelector('#decision-rows button').focus()")
        await page.press("Enter")
        await page.until("document.getElementById('explained').open")
        said = await text(page, "#explained-sentences")
        assert "the queue " in said or "displaced" in said
        await page.press("Escape")
        await page.until("!document.getElementById('explained').open")
        assert await page.run("document.activeElement.closest('#decision-rows') !== null")

        await page.run("document.getElementById('ask-id').focus()")
        for letter in "second":
            await page.press(letter)
        await page.press("Enter")
        await page.until("document.getElementById('explained').open")
        explained = await text(page, "#explained")
        assert "It waits because the pool is full: 100%, 1 in flight" in explained
        assert "web recently got 100% of its band's service" in explained
        await page.press("Escape")

        release.set()
        await page.until("document.getElementById('waiting').textContent === '0'")
        await page.run("document.querySelector('input[value=all]').click()")
        await page.until("document.querySelectorAll('#decision-rows tr').length === 5")
        assert "waiting" in await page.run("document.title")
        assert page.complaints == []


async def test_light_and_dark_can_be_read(tmp_path: Path) -> None:
    """As the system prefers, or as chosen; every text with enough contrast."""
    async with stage(tmp_path) as (_, page, __, ___):
        await page.until("document.querySelectorAll('#decision-rows tr').length === 2")
        await page.run("document.querySelector('#decision-rows button').click()")
        await page.until("document.getElementById('explained').open")
        for scheme in ("light", "dark"):
            await page.prefer(scheme)
            await page.until(f"document.documentElement.dataset.theme === '{scheme}'")
            assert await page.run(CONTRAST) == []
        await page.run("document.getElementById('close').click()")
        for theme in ("light", "dark", "dark"):
            await page.run("document.getElementById('theme').click()")
            assert await page.run("document.documentElement.dataset.theme") == theme


async def test_a_phone_is_enough(tmp_path: Path) -> None:
    """At 390 pixels nothing is cut off, rows are short, and what is touched is large enough."""
    async with stage(tmp_path, width=390) as (_, page, __, ___):
        await page.until("document.querySelectorAll('#decision-rows tr').length === 2")
        (tmp_path / "service" / "objectives" / "bad.yaml").write_text("[")
        await page.until("!document.getElementById('problems').hidden")
        assert "bad.yaml" in await text(page, "#problem-rows")
        assert await page.run("document.documentElement.scrollWidth") == 390
        heights = "[...document.querySelectorAll('#decision-rows tr')].map(r => r.offsetHeight)"
        assert max(await page.run(heights)) <= 120
        box = "document.getElementById('filter').getBoundingClientRect()"
        assert await page.run(f"{box}.height") >= 40
        assert await page.run(f"{box}.width") >= 300
        await page.picture(tmp_path / "phone.png", whole=True)


async def test_a_lost_service_is_said(tmp_path: Path) -> None:
    """Nobody takes old figures for new ones."""
    async with stage(tmp_path) as (service, page, _, release):
        release.set()
        await page.until("document.getElementById('waiting').textContent === '0'")
        assert await service.stopped() == 0
        await page.until("document.getElementById('state').textContent === 'disconnected'")
        assert await page.run("document.body.classList.contains('lost')")


async def test_tenants_that_look_alike(tmp_path: Path) -> None:
    """One named by a control character and one by its escape: two rows, gone when they are."""
    rows = "document.querySelectorAll('#flow-rows tr').length"
    async with quiet(tmp_path) as (service, page):
        streams, release = Streams(service.grpc), asyncio.Event()
        await page.open(service.http)
        asking = [
            asyncio.create_task(streams.ask(flow_id, until=release))
            for flow_id in ("a\x9b", r"a\x9b")
        ]
        await page.until(f"{rows} === 2")
        for _ in range(2):
            now = await text(page, "#clock")
            await page.until(f"document.getElementById('clock').textContent !== {now!r}")
        assert await page.run(rows) == 2
        release.set()
        assert await asyncio.gather(*asking) == [200, 200]
        await streams.close()
        await page.until(f"{rows} === 0")


async def test_a_refused_page_tries_again(tmp_path: Path) -> None:
    """One dashboard too many begins to show figures when another has been closed."""
    async with quiet(tmp_path) as (service, page), ClientSession() as session:
        events = f"{service.http}/api/events"
        others = [await session.get(events) for _ in range(WATCHERS_PER_PEER_MAX)]
        await page.open(service.http)
        await page.until("document.getElementById('state')?.textContent === 'disconnected'")
        for other in others:
            other.close()
        await page.until("document.getElementById('state').textContent === 'serving'")


async def test_a_question_that_nobody_answers(tmp_path: Path) -> None:
    """Whoever asks about a request while the service is gone is told so."""
    async with quiet(tmp_path) as (service, page):
        await page.open(service.http)
        await page.until("document.getElementById('state')?.textContent === 'serving'")
        assert await service.stopped() == 0
        await page.run("document.getElementById('ask-id').value = '1'")
        await page.run("document.getElementById('ask').requestSubmit()")
        await page.until("document.getElementById('explained').open")
        assert await text(page, "#explained-sentences") == "The service does not answer."


async def test_decisions_after_a_restart(tmp_path: Path) -> None:
    """The first request of the new process is shown, though an earlier one had its number."""
    cells = "[...document.querySelectorAll('#decision-rows tr')].map(row => row.children[3])"
    async with quiet(tmp_path) as (service, page), ClientSession() as session:
        await page.open(service.http)
        for tenant in ("before", "after"):
            if tenant == "after":
                assert await service.stopped() == 0
                await service.start(session)
            streams = Streams(service.grpc)
            assert await streams.ask(tenant) == 200
            await streams.close()
            await page.until(f"{cells}.map(cell => cell.innerText).join() === '{tenant}'")


async def test_more_tenants_than_are_shown(tmp_path: Path) -> None:
    """Those of each band are shown, and how many there are."""
    bands = "[...document.querySelectorAll('#flow-rows tr')].map(row => row.children[1].innerText)"
    async with quiet(tmp_path, {"endpoints": {"static": []}}) as (service, page):
        streams = Streams(service.grpc)
        await page.open(service.http)
        asking = [
            asyncio.create_task(streams.ask(f"tenant-{number}", objective=objective))
            for objective in ("chat", "", "batch")
            for number in range(31)
        ]
        await page.until("document.getElementById('waiting')?.textContent === '93'")
        await page.until(f"{bands}.length === 60")
        shown = await page.run(bands)
        note = await text(page, "#flow-note")
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await streams.close()

    assert shown == ["10"] * 20 + ["0"] * 20 + ["-1"] * 20
    shown_note = "93 tenants with requests, shown are 60, those with most waiting in each band."
    assert note.startswith(shown_note)
