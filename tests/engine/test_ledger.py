"""The decision ledger's entries, without files."""

import json
from dataclasses import replace

import pytest

from flowcontrol.config import Auto, Fairness, Limits, Role
from flowcontrol.errors import LedgerError
from flowcontrol.events import (
    Arrived,
    EndpointsChanged,
    FlowEvicted,
    Left,
    MemoryRestored,
    ObjectivesChanged,
)
from flowcontrol.memory import (
    BandMemory,
    Drain,
    EngineMemory,
    Estimate,
    PlaceMemory,
    StageMemory,
)
from flowcontrol.replay.ledger import (
    Checkpoint,
    Entry,
    Gap,
    Header,
    LiveRequest,
    Turn,
    disguise_with,
    disguised,
    from_line,
    restore,
    take_checkpoint,
    to_line,
)
from flowcontrol.request import Request
from tests.support.recorded import (
    ENDPOINTS,
    OBJECTIVES,
    SECOND,
    Recording,
    small_config,
    whole_config,
)


def recorded(in_flight_max: int = 1) -> Recording:
    """Two requests in flight, three waiting, one gone."""
    recording = Recording(small_config(in_flight_max), now_ns=SECOND)
    recording.turn(SECOND, ObjectivesChanged(OBJECTIVES), EndpointsChanged(ENDPOINTS))
    for request_id in range(1, 4):
        now_ns = SECOND + request_id
        recording.turn(now_ns, Arrived(Request(request_id, "tenant-0", "chat")))
    recording.turn(SECOND + 4, Left(1), Arrived(Request(4, "tenant-0", "batch")))
    recording.turn(SECOND + 5, Arrived(Request(5, "tenant-1")), Arrived(Request(6, "tenant-1")))
    return recording


MEMORY = EngineMemory(
    (BandMemory(10, {"tenant-0": 2.5, "tenant-1": 1.0}, Drain(1.0, 2.0)),),
    (Estimate("tenant-0", "llama", 1, 20.0), Estimate(None, "llama", 1, 20.0)),
    stages=(StageMemory(Role.BOTH, {ENDPOINTS[0]: PlaceMemory(requests=20.0, calm=20.0)}),),
)
ENTRIES: list[Entry] = [
    Header("run", 3, 5, 6, small_config(), salt="s"),
    Header("run", 0, 5, 6, whole_config()),
    *recorded().turns,
    Turn(9, [], []),
    Checkpoint(
        7,
        small_config(),
        ObjectivesChanged(OBJECTIVES),
        EndpointsChanged(ENDPOINTS, {ENDPOINTS[0]: Role.DECODE}),
        (LiveRequest(Request(8), 5, is_in_flight=True),),
        MEMORY,
    ),
    Gap(12),
]


class TestLines:
    """Entries as lines of JSON."""

    @pytest.mark.parametrize("entry", ENTRIES)
    def test_survive(self, entry: Entry) -> None:
        """What is read equals what was written."""
        assert entry == from_line(json.loads(json.dumps(to_line(entry))))

    def test_a_turn_can_be_read_by_people(self) -> None:
        """Facts by name, decisions by the words of the API."""
        line = json.dumps(to_line(recorded().turns[1]))

        assert '"t": 1000000001' in line
        assert '"facts": [{"arrived": {"request": {"request_id": 1, "flow_id": "tenant-0"' in line
        assert '"outcome": "dispatched", "priority": 10' in line

    @pytest.mark.parametrize(
        "line",
        [[], "turn", None, {}, {"t": "now"}, {"t": 1, "facts": [{}]}, {"gap": {}}, {"other": {}}],
    )
    def test_anything_else_is_refused(self, line: object) -> None:
        """As no entry of a ledger."""
        with pytest.raises(LedgerError, match="must be a header, turn, checkpoint or gap"):
            from_line(line)

    def test_another_version_is_refused(self) -> None:
        """By its number."""
        line = to_line(replace(Header("run", 0, 5, 6, small_config()), version=2))

        with pytest.raises(LedgerError, match="must be of version 1, got 2"):
            from_line(line)


class TestCheckpoints:
    """Who is live, for those who come late."""

    def test_it_knows_who_is_live(self) -> None:
        """In the order of arrival, in flight or not."""
        checkpoint = take_checkpoint(recorded().controller, 9)

        assert [(each.request.request_id, each.is_in_flight) for each in checkpoint.live] == [
            (2, True),
            (3, True),
            (4, False),
            (5, False),
            (6, False),
        ]
        assert ObjectivesChanged(OBJECTIVES) == checkpoint.objectives
        assert checkpoint.endpoints.addresses == ENDPOINTS

    def test_restored_who_waits_waits_since_then(self) -> None:
        """And is evicted when it would have been."""
        recording = recorded()
        now_ns = SECOND + 10
        again = restore(take_checkpoint(recording.controller, now_ns), recording.config)

        again.check_invariants()
        assert (again.in_flight, again.waiting) == (2, 3)
        assert recording.controller.next_wakeup_ns() == again.next_wakeup_ns()
        assert [d.request_id for d in again.poll(4 * SECOND)] == [4, 5, 6]

    def test_restored_by_the_limits_that_were_found(self) -> None:
        """All that was in flight is again, though a limit that finds itself begins with fewer."""
        config = replace(small_config(), detectors=(Auto(),), limits=Limits())
        recording = Recording(config)
        known = EngineMemory(
            stages=(StageMemory(Role.BOTH, {"": PlaceMemory(requests=20.0, calm=20.0)}),)
        )
        recording.turn(0, EndpointsChanged(ENDPOINTS), MemoryRestored(known))
        arrivals = [Arrived(Request(number, f"tenant-{number}")) for number in range(50)]
        recording.turn(1, *arrivals)
        again = restore(take_checkpoint(recording.controller, 5), config)

        assert recording.controller.in_flight == 40
        assert (again.in_flight, again.waiting) == (40, 10)

    def test_restored_accounts(self) -> None:
        """Nobody is charged twice for what is in flight."""
        small = small_config(2)
        settings = replace(small.default_settings, fairness=Fairness.LEAST_ATTAINED_SERVICE)
        recording = Recording(replace(small, default_settings=settings))
        recording.turn(0, EndpointsChanged(ENDPOINTS))
        for number, tenant in enumerate(("much", "much", "little", "little") * 2):
            tokens = 1000 if tenant == "much" else 10
            recording.turn(1, Arrived(Request(number, tenant, input_tokens=tokens)))
        again = restore(take_checkpoint(recording.controller, 5), recording.config)
        (before,), (after,) = (
            each.learned.memory(5).bands for each in (recording.controller, again)
        )

        assert before.accounts["much"] > before.accounts["little"] > 0
        assert after.accounts == pytest.approx(before.accounts)

    def test_nothing_live(self) -> None:
        """Bands and endpoints are known all the same."""
        recording = Recording(small_config())
        recording.turn(1, ObjectivesChanged(OBJECTIVES), EndpointsChanged(ENDPOINTS))
        again = restore(take_checkpoint(recording.controller, 5), recording.config)

        assert [band.priority for band in again.bands] == [10, -1]
        assert not again.pool.is_empty


class TestDisguise:
    """Flow ids, hidden."""

    def test_nobody_is_named(self) -> None:
        """In any entry."""
        hide = disguise_with("salt")
        entries = [*ENTRIES, Turn(1, [FlowEvicted(0, "tenant-0"), MemoryRestored(MEMORY)], [])]
        text = json.dumps([to_line(disguised(entry, hide)) for entry in entries])

        assert "tenant-" not in text
        assert text.count(hide("tenant-0")) > 10

    def test_flows_stay_apart(self) -> None:
        """The same id is the same hash, with the same salt only."""
        hide = disguise_with("salt")

        assert hide("a") == hide("a") == disguise_with("salt")("a")
        assert hide("a") != hide("b")
        assert hide("a") != disguise_with("pepper")("a")
        assert len(hide("a")) == 16

    def test_it_remembers_only_so_many(self) -> None:
        """Clients may invent ids without end."""
        hide = disguise_with("salt")
        first = hide("tenant-0")
        for number in range(20_001):
            hide(f"tenant-{number}")

        assert first == hide("tenant-0")
