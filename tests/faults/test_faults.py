"""The fault suite at the size of a test, and its judgement of accounts that the test makes up."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.accounts import (
    Asked,
    Books,
    Excess,
    Served,
    excess,
    read_dispatches,
    read_ledger,
)
from tests.faults.planted import FAULTS
from tests.faults.run import run
from tests.support.valkey_server import BINARY

REQUESTS = 300
SMOKE = ("gate killed", "gate killed, no store", "hand-over", "model server killed")


def served(name: str, arrived_s: float, ended_s: float, ticket: str = "") -> Served:
    """Return an entry of a model server's ledger."""
    ticket = ticket or f"ab.{name}.cd"
    return Served(name, ticket, "0", arrived_s, ended_s, is_whole=True, has_died=False)


def books(*entries: Served, asked: tuple[Asked, ...] = (), logged: tuple[str, ...] = ()) -> Books:
    """Return the accounts of a run."""
    started = {each.name: each.sent_s for each in asked}
    return Books([*asked], [*entries], started, limit=1, dispatches=read_dispatches(logged, "gate"))


def logged(name: str, number: int, came_s: float, decided_s: float, left_s: float) -> str:
    """Return the line of a gate about a dispatch."""
    entry = {
        "event": "request_decided",
        "request_id": number,
        "client_request_id": name,
        "outcome": "dispatched",
        "waited_ms": (decided_s - came_s) * 1000,
        "in_flight_ms": (left_s - decided_s) * 1000,
        "timestamp": datetime.fromtimestamp(left_s, UTC).isoformat(),
    }
    return json.dumps(entry)


def answered(name: str, sent_s: float) -> Asked:
    """Return a request that was answered."""
    return Asked(name, "flow", sent_s, status=200, is_whole=True)


def test_ledger() -> None:
    """Arrivals and ends are paired; what a server had not ended, its death ended."""
    lines = ["A 1.0 one ab.1.cd", "A 2.0 two -", "E 3.0 one whole", "A 5.0 three ab.3.cd"]
    one, two, three = read_ledger(lines, "0", [4.0])

    assert one == Served("one", "ab.1.cd", "0", 1.0, 3.0, is_whole=True, has_died=False)
    assert (two.ended_s, two.has_died) == (4.0, True)
    assert three.ended_s == float("inf")


def test_excess() -> None:
    """The most beyond the limit at one endpoint, and for how long there was any."""
    entries = [served("one", 0.0, 3.0), served("two", 1.0, 2.0), served("three", 3.0, 4.0)]

    assert excess(entries, 1) == Excess(1, 1.0)
    assert excess(entries, 2) == Excess(0, 0.0)


def test_cut_and_unanswered() -> None:
    """A client that left is neither."""
    cut = Asked("cut", "flow", 0.0, status=200)
    none = Asked("none", "flow", 0.0, problem="TimeoutError()")
    left = Asked("left", "flow", 0.0, is_left=True)
    account = books(asked=(answered("whole", 0.0), cut, none, left))

    assert (account.cut(), account.unanswered()) == ([cut], [none])


def test_double_and_ungated() -> None:
    """The same name twice; no ticket, or the ticket of another request."""
    own, again = served("one", 0.0, 1.0), served("one", 2.0, 3.0)
    bare, stolen = served("two", 0.0, 1.0, "-"), served("three", 0.0, 1.0, own.ticket)
    account = books(own, again, bare, stolen)

    assert account.double() == ["one"]
    assert account.ungated() == [bare, stolen]


def test_order() -> None:
    """Who overtakes by more than the margin is counted once, whoever else waits."""
    asked = tuple(answered(name, at) for name, at in (("one", 0.0), ("two", 1.0), ("three", 2.0)))
    kept = books(served("one", 3.0, 4.0), served("two", 4.0, 5.0), asked=asked)
    broken = books(
        served("two", 3.0, 4.0), served("three", 4.0, 5.0), served("one", 5.0, 6.0), asked=asked
    )

    assert kept.overtaken() == []
    assert [(each.name, each.earlier) for each in broken.order_breaks()] == [
        ("two", "one"),
        ("three", "one"),
    ]


@pytest.mark.parametrize(
    ("one", "two", "is_excused"),
    [
        pytest.param((1, 0.0, 3.0), (2, 1.0, 2.0), False, id="waited at the gate"),
        pytest.param((2, 0.1, 3.0), (1, 1.0, 2.0), False, id="came later, but in time"),
        pytest.param((1, 0.0, 2.0), (2, 1.0, 2.0), True, id="dispatched first"),
        pytest.param((2, 2.5, 3.0), (1, 1.0, 2.0), True, id="came too late"),
        pytest.param((3, 0.1, 3.0), (1, 1.0, 2.0), True, id="came too late, and looks old"),
    ],
)
def test_order_by_the_log(
    one: tuple[int, float, float], two: tuple[int, float, float], *, is_excused: bool
) -> None:
    """A gate is blamed for the order of its dispatches alone, among what had come to it."""
    asked = answered("one", 0.0), answered("two", 1.0), answered("three", 1.1)
    lines = [logged("three", 2, 2.2, 5.0, 6.0)] if one[0] == 3 else []
    lines += [logged("one", *one, 6.0), logged("two", *two, 5.0)]
    entries = served("two", 2.0, 5.0), served("one", 3.0, 6.0)
    (overtaken,) = books(*entries, asked=asked, logged=tuple(lines)).overtaken()

    assert (overtaken.name, overtaken.earlier, overtaken.is_excused) == ("two", "one", is_excused)


def test_order_by_a_wrong_clock() -> None:
    """What a gate noted by a clock that was an hour off excuses nobody."""
    asked = answered("one", 0.0), answered("two", 1.0)
    entries = served("two", 2.0, 5.0), served("one", 3.0, 6.0)
    lines = logged("two", 1, 1.0, 2.0, 5.0), logged("one", 2, 3602.5, 3603.0, 3606.0)

    assert len(books(*entries, asked=asked, logged=lines).order_breaks()) == 1


@pytest.mark.e2e
@pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server")
@pytest.mark.parametrize("name", SMOKE)
async def test_smoke(name: str, tmp_path: Path) -> None:
    """Some faults under a little load; `make faults` has them all."""
    (fault,) = [each for each in FAULTS if each.name == name]
    row = await run(fault, tmp_path, REQUESTS, seed=1)

    assert row.broken() == [], str(row)
