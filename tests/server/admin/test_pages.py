"""The dashboard's pages over real HTTP, without a browser."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientSession, web

from flowcontrol.config import Adaptive, Concurrency, ControllerConfig, Detector, Utilization
from flowcontrol.events import DrainBegan, EndpointsChanged, ObjectivesChanged
from flowcontrol.request import Request
from flowcontrol_server.admin import live as live_module
from flowcontrol_server.admin.live import LiveView
from flowcontrol_server.admin.pages import WATCHERS_PER_PEER_MAX, add_pages
from flowcontrol_server.common.plain_text import plain
from flowcontrol_server.requests.gate import FlowGate
from flowcontrol_server.requests.parked import Parked
from tests.support.silent_log import SILENT, silent_log
from tests.support.standing import ABOUT, standing

TIMEOUT_S = 15.0
PROBLEM = ("endpoint-down", "10.0.0.6:8000", "nothing listens there, 3 scrapes in a row")
HOSTILE = "</script><img src=x onerror=alert(1)>\n\ndata: {}"


class House(NamedTuple):
    """Pages of a gate with one slot behind it."""

    gate: FlowGate
    live: LiveView
    looking: "asyncio.Task[None]"
    session: ClientSession
    root: str

    def park(self, flow_id: str, client_id: str = "") -> Parked:
        """A request."""
        return self.gate.park(Request(0, flow_id, "chat", 10), {"x-request-id": client_id})

    async def end(self) -> None:
        """Drain the engine; the view ends with it."""
        self.gate.post(DrainBegan(0))
        await asyncio.wait_for(self.looking, TIMEOUT_S)


@asynccontextmanager
async def house(detector: Detector | None = None) -> AsyncIterator[House]:
    """Running ones."""
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    config = ControllerConfig(detectors=(detector or Concurrency(requests_max=1),))
    gate = FlowGate(config, 1000, lambda _parked, _decision: None, ended.set_result)
    gate.start()
    gate.post(ObjectivesChanged({"chat": 10}))
    gate.post(EndpointsChanged(("10.0.0.5:8000",)))
    live = LiveView(gate, "llama", silent_log(gate), standing(PROBLEM), interval_s=0.02)
    application = web.Application()
    add_pages(application, gate, live)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    looking = asyncio.create_task(live.run())
    try:
        async with ClientSession() as session:
            yield House(gate, live, looking, session, f"http://127.0.0.1:{port}")
    finally:
        gate.post(DrainBegan(0))
        await asyncio.wait_for(ended, TIMEOUT_S)
        await asyncio.wait_for(looking, TIMEOUT_S)
        gate.join(TIMEOUT_S)
        await runner.cleanup()


async def events(it: House) -> AsyncIterator[tuple[str, Any]]:
    """What the server sends, event by event."""
    async with it.session.get(f"{it.root}/api/events") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        while True:
            name = (await asyncio.wait_for(answer.content.readline(), TIMEOUT_S)).decode()
            if not name:
                return
            data = (await answer.content.readline()).decode()
            assert (await answer.content.readline()) == b"\n"
            yield name.removeprefix("event: ").strip(), json.loads(data.removeprefix("data: "))


class TestFiles:
    """What the browser loads, and may load."""

    @pytest.mark.parametrize(
        ("path", "content_type"),
        [
            ("/", "text/html"),
            ("/dashboard/style.css", "text/css"),
            ("/dashboard/app.js", "text/javascript"),
            ("/dashboard/chart.js", "text/javascript"),
            ("/dashboard/icon.svg", "image/svg+xml"),
        ],
    )
    async def test_each(self, path: str, content_type: str) -> None:
        """Of its type, with the policy that it may load nothing from elsewhere."""
        async with house() as it, it.session.get(it.root + path) as answer:
            text = await answer.text()

            assert (answer.status, answer.content_type) == (200, content_type)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "https://" not in text
            assert "innerHTML" not in text

    @pytest.mark.parametrize(
        "path", ["/dashboard/", "/dashboard/index.html", "/dashboard/..%2fpages.py"]
    )
    async def test_nothing_else(self, path: str) -> None:
        """Is served from there."""
        async with house() as it, it.session.get(it.root + path) as answer:
            assert answer.status == 404


class TestEvents:
    """The view, once a second."""

    async def test_history_then_views(self) -> None:
        """With everything in it; what a client sent stays in its place."""
        async with house() as it:
            first, second = it.park(HOSTILE), it.park(HOSTILE, HOSTILE)
            await asyncio.wait_for(asyncio.shield(first.future()), TIMEOUT_S)
            stream = events(it)
            name, history = await anext(stream)
            name_of_view, view = await anext(stream)
            _, later = await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

            assert (name, name_of_view) == ("history", "view")
            assert {"time", "saturation", "in_flight", "limit", "waiting", "refused", "bands"} == (
                history[0].keys()
            )
            assert (view["pool"], view["waiting"], view["in_flight"]) == ("llama", 1, 1)
            (band,) = view["bands"]
            assert (band["priority"], view["objectives"]) == (
                10,
                [{"name": "chat", "priority": 10}],
            )
            assert (band["limits"], view["limits"]) == ({}, {})
            assert [flow["flow_id"] for flow in band["flows"]] == [plain(HOSTILE)]
            assert band["minute"]["dispatched"] == 1
            assert view["endpoints"][0]["address"] == "10.0.0.5:8000"
            assert [each["request_id"] for each in view["decisions"]] == [first.request_id]
            assert later["sample"]["time"] >= view["sample"]["time"]
            assert (history[0]["limit"], later["limit"]) == (1, 1)
            (detector,) = view["detectors"]
            assert (detector["kind"], detector["requests_limit"]) == ("concurrency", 1)
            assert detector["moves"] == []
            assert view["settlements"] == SILENT._asdict()
            (problem,) = view["problems"]
            assert (problem["kind"], problem["about"], problem["text"]) == PROBLEM
            assert view["about"]["configuration_hash"] == ABOUT.configuration
            assert view["about"]["configuration_changed"] == ABOUT.changed_s
            assert band["expected_wait"] is None
            assert 0 <= band["oldest_wait"] < TIMEOUT_S
            del second

    async def test_a_limit_that_is_found_says_how(self) -> None:
        """Every move with its reason, the newest last; the limit is the pool's."""
        async with house(Adaptive(limit_first=2)) as it:
            for addresses in (("a:1", "b:1"), ("a:1", "b:1", "c:1")):
                it.gate.post(EndpointsChanged(addresses))
                await it.gate.snapshot()
            view = json.loads(await it.live.view())

            assert view["limit"] == 6
            moves = view["detectors"][0]["moves"]
            assert [(each["before"], each["after"]) for each in moves] == [(2.0, 4.0), (4.0, 6.0)]
            assert (moves[1]["reason"], moves[1]["address"]) == ("2 endpoints became 3", "")
            assert 0 <= moves[1]["ago"] < TIMEOUT_S

    async def test_no_limit_by_number(self) -> None:
        """Where the detectors go by something else, there is none to draw."""
        async with house(Utilization()) as it:
            view = json.loads(await it.live.view())

            assert (view["limit"], view["detectors"][0]["requests_limit"]) == (None, None)

    async def test_refusals_are_not_crowded_out(self) -> None:
        """By any number of newer dispatches."""
        async with house() as it:
            blocker = it.park("a")
            gone = it.park("b")
            it.gate.leave(gone)
            await asyncio.wait_for(asyncio.shield(gone.future()), TIMEOUT_S)
            it.gate.leave(blocker)
            for _ in range(50):
                parked = it.park("a")
                await asyncio.wait_for(asyncio.shield(parked.future()), TIMEOUT_S)
                it.gate.leave(parked)
            view = json.loads(await it.live.view())

            outcomes = {each["request_id"]: each["outcome"] for each in view["decisions"]}
            assert outcomes[gone.request_id] == "evicted-cancelled"
            assert len(outcomes) == 41
            minute = view["bands"][0]["minute"]
            assert (minute["evicted"], minute["cancelled"]) == (0, 1), "the client went away"
            assert sum(each["refused"] for each in it.live.history) == 0, "nor is it in the curve"

    async def test_the_last_minute_is_counted_whole(self) -> None:
        """Also when it had more decisions than are kept."""
        async with house() as it:
            blocker = it.park("a")
            for _ in range(4):
                gone = [it.park("a") for _ in range(500)]
                for parked in gone:
                    it.gate.leave(parked)
                await asyncio.wait_for(asyncio.shield(gone[-1].future()), TIMEOUT_S)
            minute = json.loads(await it.live.view())["bands"][0]["minute"]

            assert (len(it.gate.recent), it.gate.inbox_refusals) == (1_000, 0)
            assert (minute["dispatched"], minute["cancelled"]) == (1, 2_000)
            it.gate.leave(blocker)

    async def test_the_minute_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was decided before it is not counted."""
        monkeypatch.setattr(live_module, "_MINUTE_NS", 100_000_000)
        async with house() as it, asyncio.timeout(TIMEOUT_S):
            parked = it.park("a")
            await asyncio.shield(parked.future())
            seen: list[tuple[int, bool]] = []
            while not seen or any(seen[-1]):
                minute = json.loads(await it.live.view())["bands"][0]["minute"]
                seen.append((minute["dispatched"], minute["wait_p50"] is not None))

            assert (1, True) in seen

    async def test_it_ends_with_the_engine(self) -> None:
        """Nobody is kept waiting, and who comes later is told."""
        async with house() as it:
            stream = events(it)
            await anext(stream)
            await anext(stream)
            await it.end()
            assert [name async for name, _ in stream] in ([], ["view"])
            async with it.session.get(f"{it.root}/api/events") as answer:
                assert answer.status == 503

    async def test_only_so_many_may_look(self) -> None:
        """One more of an address is refused, until one is gone."""
        async with house() as it:
            streams = [events(it) for _ in range(WATCHERS_PER_PEER_MAX)]
            for stream in streams:
                await anext(stream)
            async with it.session.get(f"{it.root}/api/events") as answer:
                assert answer.status == 503
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    async with it.session.get(f"{it.root}/api/events") as answer:
                        if answer.status == 200:
                            break


class TestExplain:
    """One request, as JSON."""

    async def test_waiting(self) -> None:
        """With who is ahead of it."""
        async with house() as it:
            for _ in range(3):
                parked = it.park("a\x9b")
            async with it.session.get(
                f"{it.root}/api/explain", params={"request": str(parked.request_id)}
            ) as answer:
                said = await answer.json()

            assert said["state"] == "waiting"
            assert said["ahead"] == [{"who": "of its own", "count": 1}]
            assert said["facts"]["Tenant"] == r"a\x9b"

    async def test_ended(self) -> None:
        """With its decision."""
        async with house() as it:
            parked = it.park("a", HOSTILE)
            await asyncio.wait_for(asyncio.shield(parked.future()), TIMEOUT_S)
            it.gate.leave(parked)
            async with it.session.get(
                f"{it.root}/api/explain", params={"request": HOSTILE}
            ) as answer:
                said = await answer.json()

            assert answer.content_type == "application/json"
            assert said["state"] == "ended"
            assert said["ahead"] is None
            assert said["facts"]["Outcome"] == "dispatched"

    async def test_not_known(self) -> None:
        """404, and a sentence."""
        async with (
            house() as it,
            it.session.get(f"{it.root}/api/explain", params={"request": "9"}) as answer,
        ):
            said = await answer.json()

            assert answer.status == 404
            assert said["sentences"] == [
                "Request '9' is neither live nor among the newest decisions."
            ]
