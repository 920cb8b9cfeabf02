"""How much of the time prompts are read while a lower band waits, and what comes of it."""

from typing import final

import pytest

from flowcontrol.config import Auto, Ceilings, CeilingSettings, ControllerConfig, Picker, Reclaim
from flowcontrol.controller import FlowController
from flowcontrol.events import (
    Arrived,
    EndpointsChanged,
    Left,
    ObjectivesChanged,
    Reconfigured,
    Settled,
)
from flowcontrol.picker import EndpointPicker
from flowcontrol.reading import ReadingShare
from flowcontrol.request import Request
from flowcontrol.views.explain import Gate, explain
from tests.support.overloads import SECOND

MS = 1_000_000
BASE_NS, TOKEN_NS = 20 * MS, 40_000
LONG = 3750
"""Tokens of a prompt that is read in 150 ms: with two endpoints and three quarters, in 100."""
READ_NS = 100 * MS


class TestShare:
    """When the next prompt of a lower band may go."""

    def test_three_quarters(self) -> None:
        """A prompt of 75 ms keeps a lower band from the endpoints for 100, after those before."""
        share = ReadingShare()
        share.sent(75 * MS, 0)
        share.sent(75 * MS, 50 * MS)

        assert [share.holds(at * MS) for at in (50, 199, 200)] == [True, True, False]

    def test_grows(self) -> None:
        """One that waits for nothing else gets more by and by, up to 0.95 after a minute."""
        _, shares = _grown()

        assert shares[0] == pytest.approx(0.75)
        assert shares[30] == pytest.approx(0.85, abs=0.01)
        assert shares[79] == pytest.approx(0.95)

    def test_begins_again(self) -> None:
        """Once a lower band waits for a place, its next wait for reading is the first."""
        share, _ = _grown()
        share.filled(79 * SECOND)
        share.sent(75 * MS, 80 * SECOND)

        assert share.until_ns == 80 * SECOND + 100 * MS

    def test_pause(self) -> None:
        """So it is once it has not waited for a second."""
        share, _ = _grown()
        share.sent(700 * MS, 160 * SECOND)
        assert share.holds(160 * SECOND)
        share.sent(75 * MS, 161 * SECOND)

        assert share.until_ns == 161 * SECOND + 100 * MS

    def test_bound(self) -> None:
        """Whatever the bands above send, a lower one is held back for two seconds at most."""
        share = ReadingShare()
        for _ in range(100):
            share.sent(SECOND, 0)

        assert share.until_ns == 2 * SECOND

    def test_lately(self) -> None:
        """Whether a lower band waits is known for a second."""
        share = ReadingShare()
        before = share.is_shared(0)
        share.filled(5 * SECOND)

        assert (before, share.is_shared(6 * SECOND), share.is_shared(7 * SECOND)) == (
            False,
            True,
            False,
        )


def _grown() -> tuple[ReadingShare, list[float]]:
    """Return one that a lower band has waited for in every second of 80; and what it was each."""
    share, shares = ReadingShare(), []
    for second in range(80):
        at_ns = second * SECOND
        share.sent(700 * MS, at_ns)
        shares.append(700 * MS / (share.until_ns - at_ns))
        assert share.holds(at_ns)
    return share, shares


def _config(ceilings: Ceilings, picker: Picker = Picker.LEAST_LOADED) -> ControllerConfig:
    return ControllerConfig(
        detectors=(Auto(),),
        ceilings=CeilingSettings(policy=ceilings),
        picker=picker,
        reclaim=Reclaim(is_enabled=True),
    )


@final
class _House:
    """Two endpoints, whose speed is known, with people and a job."""

    def __init__(
        self, ceilings: Ceilings = Ceilings.RESERVE, picker: Picker = Picker.LEAST_LOADED
    ) -> None:
        self.now_ns = 0
        self._count = 0
        self.engine = FlowController(_config(ceilings, picker), 0)
        self.engine.handle(ObjectivesChanged({"chat": 10, "batch": -1}), 0)
        self.engine.handle(EndpointsChanged(("a", "b")), 0)
        for prompt in (100, 100, LONG, LONG) * 8:  # endpoints take turns
            self.now_ns += SECOND
            (number,) = self.arrive("chat", prompt)
            ttft_ns = BASE_NS + TOKEN_NS * prompt
            self.engine.handle(Settled(number, input_tokens=prompt, ttft_ns=ttft_ns), self.now_ns)
            self.engine.handle(Left(number), self.now_ns)
        self.now_ns += SECOND

    def arrive(
        self, objective: str, *prompts: int, subset: tuple[str, ...] | None = None
    ) -> list[int]:
        """Let requests arrive; return who is dispatched."""
        for prompt in prompts:
            self._count += 1
            request = Request(self._count, objective=objective, input_tokens=prompt, subset=subset)
            self.engine.handle(Arrived(request), self.now_ns)
        return self.poll(0)

    def poll(self, after_ns: int) -> list[int]:
        """Let time pass; return who is dispatched."""
        self.now_ns += after_ns
        return [decision.request_id for decision in self.engine.poll(self.now_ns)]

    def let_b_read(self) -> None:
        """Have two in flight at one endpoint, and a prompt at the other that is nearly read.

        One more of the job waits that can only go there.
        """
        _, at_b, _ = self.arrive("chat", 10, 10, 10)
        self.engine.handle(Left(at_b), self.now_ns)
        self.poll(SECOND)
        assert len(self.arrive("batch", LONG)) == 1
        assert self.arrive("batch", LONG, subset=("b",)) == []
        assert self.in_flight == [2, 1]
        self.now_ns += 130 * MS

    @property
    def in_flight(self) -> list[int]:
        """At each endpoint."""
        return [self.engine.pool.loads[address].requests for address in "ab"]

    def gate(self, number: int) -> Gate:
        """Return what a request waits for."""
        explained = explain(self.engine, number, self.now_ns)
        assert explained is not None
        return explained.gate


class TestJob:
    """A job beside people leaves some of the time."""

    def test_one_by_one(self) -> None:
        """With places free and nothing else to happen, its prompts go as time for them comes."""
        house = _House()
        first = house.arrive("batch", *[LONG] * 3)
        wakeup_ns = house.engine.next_wakeup_ns()
        gate = house.gate(34)
        early, due = house.poll(READ_NS - 1), house.poll(1)

        assert (first, early, due) == ([33], [], [34])
        assert gate is Gate.PROMPTS
        assert wakeup_ns is not None
        assert wakeup_ns <= house.now_ns

    def test_forecast(self) -> None:
        """How long the first of it has to wait for that is known."""
        house = _House()
        house.arrive("batch", LONG, LONG)
        forecast = house.engine.expected(34, house.now_ns)

        assert forecast is not None
        assert forecast.raw_ns == pytest.approx(READ_NS, rel=0.01)

    def test_people(self) -> None:
        """A person goes at once, to the endpoint that reads nothing, though more is in flight."""
        house = _House()
        house.let_b_read()
        (person,) = house.arrive("chat", 10)

        assert house.engine.leases[person].endpoint == "a"
        assert house.in_flight == [3, 1]

    def test_no_reserve_any_more(self) -> None:
        """With another policy load alone decides, from the same moment on."""
        house = _House()
        house.let_b_read()
        house.engine.handle(Reconfigured(_config(Ceilings.STATIC)), house.now_ns)
        person, _job = house.arrive("chat", 10)

        assert house.engine.leases[person].endpoint == "b"

    def test_prompt_under_way(self) -> None:
        """Where both endpoints read long prompts even a person waits, and is told for what."""
        house = _House()
        house.arrive("chat", LONG, LONG, LONG)

        assert house.gate(35) is Gate.PROMPTS

    def test_without_a_reserve(self) -> None:
        """Only the reserve holds anything back."""
        assert len(_House(Ceilings.STATIC).arrive("batch", LONG, LONG)) == 2

    @pytest.mark.parametrize("picker", [Picker.LEAST_LOADED, Picker.OFF])
    def test_nobody_ends(self, picker: Picker) -> None:
        """While places are free nothing of the job is reclaimed: its prompts are read all the same.

        Once none is free it is.
        """
        house = _House(Ceilings.STATIC, picker)
        house.arrive("batch", LONG, LONG)
        assert house.arrive("chat", LONG) == [], "a prompt is read before"
        house.arrive("batch", *[10] * 80)
        for _ in range(80):
            house.poll(SECOND // 10)
        ended = house.arrive("chat", 10)

        assert ended
        assert all(house.engine.leases[number].is_reclaimed for number in ended)


class TestPicked:
    """Endpoints that read prompts come last."""

    def test_order(self) -> None:
        """They are picked where no other has room, the least loaded of them first."""
        picker = EndpointPicker()
        picker.set_endpoints("abc")
        picker.put("a", 0.1, is_reading=True)
        picker.put("b", 0.2, is_reading=True)
        picker.put("c", 0.9)
        calm = picker.best(), picker.best_of(("a", "c")), picker.fallbacks(None, "c", 2)
        picker.put("c", 1.0)

        assert calm == ("c", "c", ("a", "b"))
        assert (picker.best(), picker.best_of(("b", "c"))) == ("a", "b")
        assert picker.best_of(("c",)) is None
