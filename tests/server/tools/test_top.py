"""The terminal view, driven by textual's pilot."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from flowcontrol.v1 import flowcontrol_pb2 as api
from flowcontrol_server.tools.top import Explained, Top

PATIENCE_S = 10.0
HOSTILE = "[bold]tenant[/bold] \u202e\x1b[2J\x9b"
"""A tenant's id that would like to be markup, and escapes for a terminal."""
SHOWN = r"[bold]tenant[/bold] \u202e\x1b[2J\x9b"
pytestmark = pytest.mark.slow


def snapshot() -> api.Snapshot:
    """Two bands, one of them gated."""
    return api.Snapshot(
        pool="llama",
        saturation=0.9,
        waiting=5,
        in_flight=9,
        bands=[
            api.Band(priority=10, declared=True, ceiling=1.0, in_flight=4),
            api.Band(
                priority=-1,
                declared=True,
                ceiling=0.8,
                waiting=5,
                oldest_wait=Duration(seconds=7),
                expected_wait=Duration(seconds=9),
                flows=[api.Flow(flow_id=HOSTILE, waiting=5, share=0.25, fair_share=0.5)],
                outcomes=[
                    api.OutcomeCount(outcome="dispatched", count=11),
                    api.OutcomeCount(outcome="evicted-ttl", count=2),
                    api.OutcomeCount(outcome="evicted-displaced", count=1),
                    api.OutcomeCount(outcome="reclaimed", count=4),
                    api.OutcomeCount(outcome="internal", count=5),
                    api.OutcomeCount(outcome="rejected-capacity", count=1),
                    api.OutcomeCount(outcome="completed", count=10),
                ],
            ),
        ],
        endpoints=[api.Endpoint(address="10.0.0.5:8000", in_flight=9, saturation=0.9)],
        time=Timestamp(seconds=160),
        problems=[
            api.Problem(
                kind="source", about="chat.yaml", text=HOSTILE, since=Timestamp(seconds=100)
            )
        ],
        about=api.About(version="1.2.3", configuration_hash="abcdef0123456789"),
        objectives=[api.Objective(name="batch", priority=-1)],
        detectors=[
            api.Detector(stage="both", kind="utilization", saturation=0.4),
            api.Detector(
                stage="both",
                kind="adaptive",
                saturation=0.9,
                requests_limit=10,
                moves=[
                    api.Move(ago=Duration(seconds=80), before=8, after=12, reason="0% wait"),
                    api.Move(
                        ago=Duration(seconds=2),
                        address="10.0.0.5:8000",
                        before=12,
                        after=10.5,
                        reason="20% of those in flight wait inside",
                    ),
                ],
            ),
        ],
    )


def decision(request_id: int, outcome: str) -> api.DecisionRecord:
    """One decision."""
    return api.DecisionRecord(
        request_id=request_id, outcome=outcome, flow_id=HOSTILE, reason="because [it] was so"
    )


class RefusedError(grpc.aio.AioRpcError):
    """What a channel says of a service that is not there, or does not know."""

    def __init__(self, details: str) -> None:
        metadata = grpc.aio.Metadata()
        super().__init__(grpc.StatusCode.UNAVAILABLE, metadata, metadata, details, None)


@final
class Told:
    """A source that says what a test puts in."""

    def __init__(self) -> None:
        self.snapshots: asyncio.Queue[api.Snapshot | Exception] = asyncio.Queue()
        self.newest = [decision(7, "evicted-ttl"), decision(6, "dispatched")]
        self.asked: list[str] = []
        self.is_closed = False

    async def watch(self) -> AsyncIterator[api.Snapshot]:
        """Yield what is put in."""
        while True:
            each = await self.snapshots.get()
            if isinstance(each, Exception):
                raise each
            yield each

    async def decisions(self) -> api.ListDecisionsResponse:
        """Return what there is."""
        return api.ListDecisionsResponse(decisions=self.newest)

    async def explain(self, request_id: str) -> api.Explanation:
        """Explain number 7, know nobody else."""
        self.asked.append(request_id)
        if request_id != "7":
            message = "request is not known"
            raise RefusedError(message)
        return api.Explanation(
            request_id=7, state=api.Explanation.ENDED, sentences=["It was [evicted]."]
        )

    async def close(self) -> None:
        """Remember it."""
        self.is_closed = True


@pytest.fixture(name="source")
async def _source() -> Told:
    told = Told()
    told.snapshots.put_nowait(snapshot())
    return told


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> None:
    """Wait for the screen."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await pilot.pause()


def rows(top: Top, name: str) -> list[list[str]]:
    """What a table shows, as text."""
    table: DataTable[Any] = top.screen_stack[0].query_one(f"#{name}-table", DataTable)
    return [
        [cell.plain if isinstance(cell, Text) else str(cell) for cell in table.get_row_at(index)]
        for index in range(table.row_count)
    ]


def explained(top: Top) -> str:
    """What the box over the rest says."""
    assert isinstance(top.screen, Explained)
    return "\n".join(str(each.render()) for each in top.screen.query(Static))


class TestTop:
    """What an operator sees."""

    async def test_everything_is_there(self, source: Told) -> None:
        """Bands, tenants, endpoints, decisions; nobody's id is taken for markup."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            summary = str(top.query_one("#summary", Static).render())
            assert "saturation 90%" in summary
            assert "1.2.3, configuration abcdef0123456789" in summary
            strip = top.query_one("#problems", Static)
            assert str(strip.render()) == f"source chat.yaml: {SHOWN} (for 1 min 0 s)"
            assert strip.display
            assert rows(top, "bands") == [
                ["10", "", "0", "-", "-", "100%", "open", "4", "0", "0", "0"],
                ["-1", "batch", "5", "7.0 s", "9.0 s", "80%", "gated", "0", "11", "6", "7"],
            ]
            assert [row[1] for row in rows(top, "flows")] == [SHOWN]
            assert rows(top, "endpoints")[0][2:] == ["90%", "9"]
            assert "in flight 9 of 10" in summary
            assert rows(top, "moves") == [
                ["2.0 s", "12.0 > 10.5", "10.0.0.5:8000: 20% of those in flight wait inside"],
                ["1 min 20 s", "8.0 > 12.0", "0% wait"],
            ]
            assert rows(top, "decisions")[0][1:] == [
                *("7", "0", SHOWN, "evicted-ttl", "-", "because [it] was so"),
            ]
        assert source.is_closed

    async def test_a_limit_that_is_set_has_no_story(self, source: Told) -> None:
        """Only one that is found is told of."""
        told = snapshot()
        del told.detectors[1]
        source.snapshots.get_nowait()
        source.snapshots.put_nowait(told)
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            assert not top.query_one("#moves").display
            assert "in flight 9 of" not in str(top.query_one("#summary", Static).render())

    async def test_a_standby_says_so(self, source: Told) -> None:
        """Its queue is empty because another replica has it."""
        told = snapshot()
        told.standby = True
        source.snapshots.get_nowait()
        source.snapshots.put_nowait(told)
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            summary = str(top.query_one("#summary", Static).render())
            assert "standby: another replica decides" in summary

    async def test_enter_explains_a_decision(self, source: Told) -> None:
        """And Escape closes it."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(top.screen, Explained))
            assert "Request 7: ended" in explained(top)
            assert "It was [evicted]." in explained(top)
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(top.screen, Explained))

    async def test_any_id_can_be_typed(self, source: Told) -> None:
        """What is not known is said so."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            await pilot.press("e", "a", "b", "enter")
            await until(pilot, lambda: isinstance(top.screen, Explained))
            assert "request is not known." in explained(top)
        assert source.asked == ["ab"]

    async def test_dispatched_can_be_hidden(self, source: Told) -> None:
        """To find the others."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: len(rows(top, "decisions")) == 2)
            await pilot.press("u")
            await until(pilot, lambda: len(rows(top, "decisions")) == 1)
            assert rows(top, "decisions")[0][4] == "evicted-ttl"
            await pilot.press("u")
            await until(pilot, lambda: len(rows(top, "decisions")) == 2)

    async def test_the_cursor_stays_on_its_decision(self, source: Told) -> None:
        """When newer ones come in above it."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            await pilot.press("down")
            source.newest = [decision(9, "dispatched"), *source.newest]
            source.snapshots.put_nowait(snapshot())
            await until(pilot, lambda: len(rows(top, "decisions")) == 3)
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(top.screen, Explained))
        assert source.asked == ["6"]

    async def test_a_cursor_on_top_stays_on_top(self, source: Told) -> None:
        """So that the newest is in sight."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            source.newest = [decision(9, "dispatched"), *source.newest]
            source.snapshots.put_nowait(snapshot())
            await until(pilot, lambda: len(rows(top, "decisions")) == 3)
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(top.screen, Explained))
        assert source.asked == ["9"]

    async def test_a_pause_holds_the_screen(self, source: Told) -> None:
        """Until it is pressed again."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            await pilot.press("p")
            source.newest = []
            source.snapshots.put_nowait(snapshot())
            await until(pilot, source.snapshots.empty)
            await pilot.pause()
            assert len(rows(top, "decisions")) == 2
            await pilot.press("p")
            source.snapshots.put_nowait(snapshot())
            await until(pilot, lambda: not rows(top, "decisions"))

    async def test_a_lost_connection_is_said_and_found_again(self, source: Told) -> None:
        """Without being restarted."""
        top = Top(source)
        async with top.run_test(size=(140, 45)) as pilot:
            await until(pilot, lambda: bool(rows(top, "decisions")))
            source.snapshots.put_nowait(RefusedError("connection refused"))
            summary = top.query_one("#summary", Static)
            await until(pilot, lambda: "connection refused" in str(summary.render()))
            source.snapshots.put_nowait(snapshot())
            await until(pilot, lambda: "saturation" in str(summary.render()))

    @pytest.mark.parametrize("keys", [["q"], ["ctrl+c"], ["e", "1", "ctrl+c"]], ids=" ".join)
    async def test_it_ends(self, source: Told, keys: list[str]) -> None:
        """At once, also while an id is typed."""
        top = Top(source)
        async with top.run_test() as pilot:
            await pilot.press(*keys)
            await until(pilot, lambda: top.return_code is not None)
        assert top.return_code == 0
