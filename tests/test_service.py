"""When something of the service's own fails."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from server.service import JOIN_TIMEOUT_S
from tests import faulty
from tests.streams import PATIENCE_S, Streams, running
from tests.told import eventually

FOUR_WAIT = 'flowcontrol_waiting_requests{priority="0"} 4.0'
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("on_fault", "status", "logged"), [("refuse", 500, 500), ("continue", 200, None)]
)
async def test_a_callback_that_fails_ends_the_service(
    tmp_path: Path, on_fault: str, status: int, logged: int | None
) -> None:
    """Who is parked is answered at once, as is logged; it is said, and the exit status is 1."""
    settings: dict[str, Any] = {
        "endpoints": {"static": []},
        "requests": {"onInternalFault": on_fault},
    }
    program = (faulty.__file__,)
    async with (
        running(tmp_path, settings, {}, program=program) as service,
        ClientSession() as session,
    ):
        streams = Streams(service.grpc)
        asking = [asyncio.create_task(streams.ask("tenant")) for _ in range(3)]
        culprit = asyncio.create_task(streams.ask(faulty.FAULT))
        async with asyncio.timeout(PATIENCE_S):
            while FOUR_WAIT not in await metrics(session, service.http):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
        culprit.cancel()
        async with asyncio.timeout(JOIN_TIMEOUT_S / 2):
            statuses = await asyncio.gather(*asking)
        exit_status = await service.ended()
        await streams.close()
        lines = service.lines("request_decided")

        assert statuses == [status] * 3
        assert exit_status == 1
        assert len(service.lines("processor_failed")) == 1
        assert [line["outcome"] for line in lines] == ["internal"] * 3
        assert [line["http_status"] for line in lines] == [logged] * 3
        assert all(line["waited_ms"] > 0 for line in lines)


async def test_a_task_that_fails_is_said(tmp_path: Path) -> None:
    """At once, with where it failed; the service goes on without it."""
    settings: dict[str, Any] = {"endpoints": {"static": []}}
    program = (faulty.__file__,)
    async with running(tmp_path, settings, {}, program=program, PLANTED="sample") as service:
        await eventually(lambda: "planted" in service.log)
        (line,) = service.lines("dashboard_not_sampled")

        assert line["exception"][0]["exc_type"] == "ValueError"
        assert await service.stopped() == 0


async def metrics(session: ClientSession, address: str) -> str:
    """What Prometheus would read."""
    async with session.get(f"{address}/metrics") as answer:
        return await answer.text()
