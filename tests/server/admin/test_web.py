"""The HTTP port."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from flowcontrol.errors import NotRunningError
from flowcontrol.views.snapshot import Snapshot
from flowcontrol_server.admin.web import Exposition, web_application
from flowcontrol_server.telemetry.metrics import SnapshotCollector, registry_of

IDLE = Snapshot(
    saturation=0.25,
    waiting=0,
    waiting_bytes=0,
    in_flight=0,
    is_draining=False,
    bands=(),
    totals={},
    endpoints=(),
    objectives={},
    unknown_objectives=0,
)


async def collect() -> CollectorRegistry:
    """The metrics of an idle engine."""
    return registry_of([SnapshotCollector(IDLE, inbox_refusals=3, objective_errors=0)])


async def collect_from_nobody() -> CollectorRegistry:
    """What the gate says when the processor has ended."""
    message = "the processor has stopped"
    raise NotRunningError(message)


@asynccontextmanager
async def client_of(
    application: web.Application,
) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    """A client of the application on a real port."""
    async with TestClient(TestServer(application)) as client:
        yield client


class TestMetrics:
    """/metrics."""

    async def test_text(self) -> None:
        """Prometheus gets its text format, and can read it."""
        application = web_application(collect, lambda: True, lambda: True)
        async with client_of(application) as client, client.get("/metrics") as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/plain; version=")
            text = await response.text()

        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["flowcontrol_saturation"] == 0.25
        assert values["flowcontrol_inbox_refusals_total"] == 3

    async def test_every_scrape_is_fresh(self) -> None:
        """Each scrape asks anew."""
        counts = iter(range(10))

        async def counting() -> CollectorRegistry:
            return registry_of([SnapshotCollector(IDLE, next(counts), objective_errors=0)])

        application = web_application(counting, lambda: True, lambda: True)
        async with client_of(application) as client:
            for number in range(3):
                async with client.get("/metrics") as response:
                    text = await response.text()
                assert f"flowcontrol_inbox_refusals_total {number}.0" in text

    async def test_many_at_once(self) -> None:
        """However many ask while metrics are rendered, one rendering more answers them all."""
        begun = asyncio.Event()
        go_on = asyncio.Event()
        collected = 0

        async def collecting() -> CollectorRegistry:
            nonlocal collected
            collected += 1
            begun.set()
            await go_on.wait()
            return registry_of([SnapshotCollector(IDLE, collected, objective_errors=0)])

        exposition = Exposition(collecting)
        first = asyncio.create_task(exposition.body())
        await begun.wait()
        later = [asyncio.create_task(exposition.body()) for _ in range(100)]
        await asyncio.sleep(0)
        go_on.set()

        assert b"flowcontrol_inbox_refusals_total 1.0" in await first
        for text in await asyncio.gather(*later):
            assert b"flowcontrol_inbox_refusals_total 2.0" in text
        assert collected == 2

    async def test_share(self) -> None:
        """Rendering takes a tenth of the time at most."""
        renderings: list[tuple[float, float]] = []

        async def slow() -> CollectorRegistry:
            began_s = time.monotonic()
            await asyncio.sleep(0.02)
            renderings.append((began_s, time.monotonic()))
            return registry_of([SnapshotCollector(IDLE, 0, objective_errors=0)])

        exposition = Exposition(slow)
        for _ in range(3):
            await exposition.body()

        for (began_s, ended_s), (next_s, _) in itertools.pairwise(renderings):
            assert next_s - ended_s >= 8.9 * (ended_s - began_s)

    async def test_nobody_to_ask(self) -> None:
        """When the processor has ended, /metrics is unavailable and says why."""
        application = web_application(collect_from_nobody, lambda: False, lambda: False)
        async with client_of(application) as client, client.get("/metrics") as response:
            assert response.status == 503
            assert await response.text() == "the processor has stopped\n"


class TestHealth:
    """/healthz and /readyz."""

    @pytest.mark.parametrize("path", ["/healthz", "/readyz"])
    async def test_well(self, path: str) -> None:
        """200 and ok."""
        application = web_application(collect, lambda: True, lambda: True)
        async with client_of(application) as client, client.get(path) as response:
            assert response.status == 200
            assert await response.text() == "ok\n"

    async def test_draining(self) -> None:
        """While draining the process is alive and not ready."""
        application = web_application(collect, lambda: True, lambda: False)
        async with client_of(application) as client:
            async with client.get("/healthz") as live:
                assert live.status == 200
            async with client.get("/readyz") as ready:
                assert ready.status == 503
                assert await ready.text() == "not serving\n"

    async def test_failed(self) -> None:
        """A failed processor is neither."""
        application = web_application(collect_from_nobody, lambda: False, lambda: False)
        async with client_of(application) as client:
            for path in ("/healthz", "/readyz"):
                async with client.get(path) as response:
                    assert response.status == 503

    async def test_it_follows(self) -> None:
        """Health is asked each time, never remembered."""
        answers = iter([True, False, True])
        application = web_application(collect, lambda: next(answers), lambda: True)
        async with client_of(application) as client:
            for status in (200, 503, 200):
                async with client.get("/healthz") as response:
                    assert response.status == status


class TestElsewhere:
    """Everything else."""

    async def test_unknown_path(self) -> None:
        """Other paths are not found."""
        application = web_application(collect, lambda: True, lambda: True)
        async with client_of(application) as client, client.get("/") as response:
            assert response.status == 404

    async def test_only_reading(self) -> None:
        """There is nothing to write to."""
        application = web_application(collect, lambda: True, lambda: True)
        async with client_of(application) as client, client.post("/metrics") as response:
            assert response.status == 405
