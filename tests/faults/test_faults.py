"""The fault suite at the size of a test, and its judgement of accounts that the test makes up."""

from pathlib import Path

import pytest

from tests.faults.accounts import Asked, Books, Excess, Served, excess, read_ledger
from tests.faults.planted import FAULTS
from tests.faults.run import run
from tests.support.valkey_server import BINARY

REQUESTS = 300
SMOKE = ("gate killed", "gate killed, no store", "hand-over", "model server killed")


def served(name: str, arrived_s: float, ended_s: float, ticket: str = "") -> Served:
    """Return an entry of a model server's ledger."""
    ticket = ticket or f"ab.{name}.cd"
    return Served(name, ticket, "0", arrived_s, ended_s, is_whole=True, has_died=False)


def books(*entries: Served, asked: tuple[Asked, ...] = ()) -> Books:
    """Return the accounts of a run."""
    return Books([*asked], [*entries], {each.name: each.sent_s for each in asked}, limit=1)


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

    assert (kept.order_breaks(), broken.order_breaks()) == (0, 2)


@pytest.mark.e2e
@pytest.mark.skipif(BINARY is None, reason="needs redis-server or valkey-server")
@pytest.mark.parametrize("name", SMOKE)
async def test_smoke(name: str, tmp_path: Path) -> None:
    """Some faults under a little load; `make faults` has them all."""
    (fault,) = [each for each in FAULTS if each.name == name]
    row = await run(fault, tmp_path, REQUESTS, seed=1)

    assert row.broken() == [], str(row)
