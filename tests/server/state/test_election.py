"""One leads, stops on time, and hands over; on a clock and a lock of the test's own."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import final

import pytest

from flowcontrol_server.state.election import (
    HAND_OVER_WITHIN_S,
    MARGIN,
    STANDBY_ASKS_S,
    Election,
)
from flowcontrol_server.state.store import StateError
from tests.support.told import eventually

DURATION_S = 0.4


@final
class MemoryLock:
    """A lock in memory that a test can give away, break or hold up."""

    retry_s = 0.01

    def __init__(self) -> None:
        self.token: int | None = 1
        """What is answered; None: another holds it."""
        self.problem: str | None = None
        self.is_hanging = False
        self.asked = 0
        self.released = 0

    async def acquire(self) -> int | None:
        """Answer as the test says."""
        self.asked += 1
        if self.is_hanging:
            await asyncio.Event().wait()
        if self.problem is not None:
            raise StateError(self.problem)
        return self.token

    async def release(self) -> None:
        """Count."""
        self.released += 1

    async def is_held_by_another(self) -> bool:
        """Whether it was given away."""
        return self.token is None

    async def close(self) -> None:
        """Have nothing to close."""


@final
class House:
    """One process in an election."""

    def __init__(self) -> None:
        self.lock = MemoryLock()
        self.told: list[int | None] = []
        """Tokens it was elected with; None where it was deposed."""
        self.fault: Exception | None = None
        """Raised when it is elected."""
        self.now_s = 1_000.0
        """It stands still unless a test sets it forward."""
        self.election = Election(
            self.lock, DURATION_S, self._elected, self._deposed, clock=lambda: self.now_s
        )

    async def _elected(self, token: int) -> None:
        if self.fault is not None:
            raise self.fault
        self.told.append(token)

    async def _deposed(self) -> None:
        self.told.append(None)


@pytest.fixture(name="house")
async def _house() -> AsyncIterator[House]:
    house = House()
    house.election.begin()
    await eventually(house.election.is_leader)
    yield house
    await house.election.resign()


async def test_it_renews(house: House) -> None:
    """And is told once."""
    asked = house.lock.asked
    await eventually(lambda: house.lock.asked >= asked + 4)

    assert house.election.is_leader()
    assert house.told == [1]


async def test_another_holds_it(house: House) -> None:
    """It stops as soon as it knows, asks on, and leads again with another token."""
    house.lock.token = None
    await eventually(lambda: house.told == [1, None])
    led_meanwhile = house.election.is_leader()
    house.lock.token = 5
    await eventually(lambda: house.told == [1, None, 5])

    assert not led_meanwhile


async def test_a_long_lease(house: House) -> None:
    """However seldom a lock would be asked, a standby is there for a leader that hands over."""
    house.lock.retry_s = 60.0
    house.lock.token = None
    await eventually(lambda: house.told == [1, None])
    house.lock.token = 5
    began_s = time.monotonic()
    await eventually(lambda: house.told == [1, None, 5])

    assert STANDBY_ASKS_S <= HAND_OVER_WITHIN_S / 2
    assert time.monotonic() - began_s < 10 * STANDBY_ASKS_S


@pytest.mark.parametrize("is_hanging", [False, True])
async def test_it_cannot_renew(house: House, *, is_hanging: bool) -> None:
    """It leads on until a quarter of the lease is left, and not longer."""
    house.lock.is_hanging = is_hanging
    house.lock.problem = "out of reach"
    began_s = house.now_s
    await eventually(lambda: house.election.problem is not None)
    led_at: list[bool] = []
    for passed_s in (0.0, DURATION_S * (1 - MARGIN) - 0.001, DURATION_S * (1 - MARGIN)):
        house.now_s = began_s + passed_s
        led_at.append(house.election.is_leader())
    await eventually(lambda: house.told == [1, None])

    assert led_at == [True, True, False]


async def test_it_was_stopped(house: House) -> None:
    """From the first moment on it knows that it leads no more, before it asks anybody."""
    house.now_s += DURATION_S
    led = house.election.is_leader()
    house.lock.token = 2
    await eventually(lambda: house.told == [1, None, 2])

    assert not led


async def test_role(house: House) -> None:
    """It leads, is a standby, or cannot ask: said in words."""
    house.lock.token = 7
    await eventually(lambda: house.told == [1, None, 7])
    leading = house.election.role()
    house.lock.token = None
    await eventually(lambda: not house.election.is_leader())
    standing_by = house.election.role()
    house.lock.problem = "out of reach"
    await eventually(lambda: house.election.problem is not None)

    assert leading.startswith("this replica leads, term 7, for 0.")
    assert standing_by == "this replica is a standby and decides nothing: ask the one that leads"
    assert house.election.role() == (
        "this replica does not lead: the lease cannot be requested (out of reach)"
    )


async def test_it_resigns(house: House) -> None:
    """It leads no more at once, lets go of the lease, and waits for whoever comes next."""
    await house.election.resign()
    led = house.election.is_leader()
    nobody = await house.election.another_leads(0.05)
    house.lock.token = None
    somebody = await house.election.another_leads(0.05)

    assert not led
    assert house.lock.released == 1
    assert (nobody, somebody) == (False, True)
    assert house.told == [1]


async def test_a_fault_when_elected() -> None:
    """The lease is released for another replica, and asked for again."""
    house = House()
    house.fault = RuntimeError("planted")
    house.election.begin()
    await eventually(lambda: house.lock.released > 0)
    house.fault = None
    await eventually(house.election.is_leader)
    await house.election.resign()

    assert house.told[-1] == 1
    assert house.election.failures > 0


async def test_a_lease_that_lapsed(house: House) -> None:
    """Renewed after its end, with the same token, it begins a new term: streams were moved."""
    house.now_s += DURATION_S
    await eventually(lambda: house.told == [1, None, 1])
