"""Values of the engine as plain ones."""

import json

import pytest

from flowcontrol.config import (
    Adaptive,
    BandSettings,
    BandTemplate,
    Ceilings,
    CeilingSettings,
    Concurrency,
    ControllerConfig,
    Limits,
    Role,
)
from flowcontrol.events import (
    Answered,
    Arrived,
    Decision,
    DrainBegan,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    LeasesRecovered,
    Left,
    LoadObserved,
    MemoryRestored,
    ObjectivesChanged,
    Reconfigured,
    RecoveredLease,
    RecoveredLeaseEnded,
    Settled,
    SettlementLost,
)
from flowcontrol.memory import (
    BandMemory,
    BandNeed,
    CountsMemory,
    Drain,
    EngineMemory,
    Estimate,
    PlaceMemory,
    ReserveMemory,
    StageMemory,
)
from flowcontrol.replay.plain import plainly
from flowcontrol.request import FlowKey, Outcome, Request

CONFIG = ControllerConfig(
    limits=Limits(requests_max=5),
    templates=(BandTemplate(priority_min=1, settings=BandSettings(ttl_ns=7)),),
    detectors=(Adaptive(limit_max=9), Concurrency(requests_max=None, tokens_max=1000)),
    ceilings=CeilingSettings(policy=Ceilings.HOLDBACK_BY_RANK),
    weights={"tenant": 2.5},
)
COUNTS = CountsMemory((8.0, 1.0), (2.5, 20.0), (9.0, 400.0))
FACTS: list[Fact] = [
    Arrived(Request(7, "tenant", "chat", 100, ttl_ns=5, model="llama")),
    Left(7),
    Answered(7),
    Settled(7, 10, None, 20, is_success=False),
    LoadObserved("10.0.0.1:8000", 3, 2, 0.5),
    ObjectivesChanged({"chat": 10}),
    EndpointsChanged(("10.0.0.1:8000",), {"10.0.0.1:8000": Role.PREFILL}),
    Reconfigured(CONFIG),
    FlowEvicted(-1, "tenant"),
    DrainBegan(5),
    LeasesRecovered((RecoveredLease("run.7", "10.0.0.1:8000", 100.0, 5),), 9, 3),
    RecoveredLeaseEnded("run.7"),
    MemoryRestored(
        EngineMemory(
            (BandMemory(10, {"tenant": 2.5}, Drain(1.0, 2.0)),),
            (Estimate(None, "llama", 1, 20.0, 1, 10.0, 40.0),),
            {"10.0.0.1:8000": 8.0},
            stages=(StageMemory(Role.BOTH, {"": PlaceMemory(8.0, 6.0, tokens=900.0)}),),
            reserve=ReserveMemory((BandNeed(10, COUNTS, 0.1),), COUNTS, 0.5),
        )
    ),
    SettlementLost(7),
]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: type(fact).__name__)
def test_every_fact_survives_json(fact: Fact) -> None:
    """What is read equals what was written."""
    form = plainly(Fact)

    assert fact == form.read(json.loads(json.dumps(form.write(fact))))


def test_every_kind_of_fact_is_tried() -> None:
    """The list above is complete."""
    assert {type(fact) for fact in FACTS} == set(Fact.__args__)


def test_a_fact_is_named_and_leaves_out_defaults() -> None:
    """So that people can read it, and it stays short."""
    assert plainly(Fact).write(Arrived(Request(7, objective="chat"))) == {
        "arrived": {"request": {"request_id": 7, "objective": "chat"}}
    }


def test_a_decision_survives() -> None:
    """Enumerations are their values."""
    decision = Decision(7, Outcome.EVICTED_TTL, -1, "tenant", 5, retry_after_ns=6, saturation=0.5)
    form = plainly(Decision)

    assert form.write(decision)["outcome"] == "evicted-ttl"
    assert decision == form.read(form.write(decision))


def test_named_tuples_are_lists() -> None:
    """In the order of their fields."""
    assert plainly(FlowKey).write(FlowKey(3, "a")) == [3, "a"]
    assert FlowKey(3, "a") == plainly(FlowKey).read([3, "a"])


@pytest.mark.parametrize(
    "plain",
    [
        {"arrived": {"request": {"request_id": "7"}}},
        {"arrived": {"request": {"request_id": True}}},
        {"arrived": {"request": {"request_id": 7, "colour": "red"}}},
        {"arrived": {"request": {}}},
        {"arrived": {}, "left": {}},
        {"sat_down": {}},
        {"left": {"request_id": 1.5}},
        {"drain_began": None},
        [],
    ],
)
def test_what_was_never_written_is_not_read(plain: object) -> None:
    """Neither by another type nor by another name."""
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        plainly(Fact).read(plain)
