"""Pure. The decision ledger: every fact that the engine took in, the time, and its decisions.

A ledger consists of lines, each a mapping:

    header      the run, the part of it, and the configuration in force
    turn        `t`, the facts that the engine took in then, and its decisions
    checkpoint  the live requests at `t`, for a reader that does not start at the beginning
    gap         the number of turns that were not written; a checkpoint follows

Times are the engine's monotonic nanoseconds. Turns without facts and decisions are written, too,
because time alone can change the state of the engine. With every turn since the engine was created,
a reader can repeat all decisions exactly. A reader that begins at a checkpoint has the requests
waiting and in flight, and what outlives a restart (`memory`). It does not have the endpoints of
those in flight, the speed of prompts, and what forecasts had learnt, so it repeats nearly all
decisions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple, final

from flowcontrol.config import ControllerConfig
from flowcontrol.controller import FlowController
from flowcontrol.errors import LedgerError
from flowcontrol.events import (
    Arrived,
    Decision,
    EndpointsChanged,
    Fact,
    FlowEvicted,
    MemoryRestored,
    ObjectivesChanged,
    Reconfigured,
)
from flowcontrol.memory import BandMemory, EngineMemory
from flowcontrol.replay.plain import plainly
from flowcontrol.request import Request

VERSION = 1
BEGINNING = b'{"header":'
"""How the first line of every file begins."""
_ID_BYTES = 8


class Turn(NamedTuple):
    """One turn of the engine."""

    now_ns: int
    facts: Sequence[Fact]
    decisions: Sequence[Decision]


@final
@dataclass(frozen=True, slots=True)
class Header:
    """The first entry of every file."""

    run: str
    """Identifies the run of the service; the same in all its files."""
    part: int
    """Number of the file in its run, from 0."""
    wall_ns: int
    """Time of day at `now_ns`, since 1970."""
    now_ns: int
    """When this file was begun; for part 0, when the engine was created."""
    config: ControllerConfig
    """Configuration in force then."""
    salt: str = ""
    """Salt of the hashed flow ids; empty: they are not hashed."""
    version: int = VERSION


@final
@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request at a checkpoint."""

    request: Request
    arrived_ns: int
    is_in_flight: bool = False


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The live requests after a turn."""

    now_ns: int
    config: ControllerConfig
    objectives: ObjectivesChanged
    endpoints: EndpointsChanged
    live: tuple[LiveRequest, ...] = ()
    memory: EngineMemory = field(default_factory=EngineMemory)
    """What the engine had learnt."""


@final
@dataclass(frozen=True, slots=True)
class Gap:
    """Turns not written, because the writer could not keep up or the disk was full."""

    turns: int


Entry = Header | Turn | Checkpoint | Gap

_FACT, _DECISION = plainly(Fact), plainly(Decision)
_KINDS: Mapping[str, Any] = {
    "header": Header,
    "checkpoint": Checkpoint,
    "gap": Gap,
}


def take_checkpoint(controller: FlowController, now_ns: int) -> Checkpoint:
    """Return a checkpoint. O(live requests). Only the controller's owner may call this."""
    pool = controller.pool
    return Checkpoint(
        now_ns,
        controller.config,
        ObjectivesChanged(dict(controller.bands.objectives)),
        EndpointsChanged(
            tuple(endpoint.address for endpoint in pool.endpoints),
            {endpoint.address: endpoint.role for endpoint in pool.endpoints},
        ),
        tuple(
            LiveRequest(lease.request, lease.arrived_ns, lease.is_in_flight)
            for lease in controller.leases.values()
        ),
        controller.learned.memory(now_ns),
    )


def restore(checkpoint: Checkpoint, config: ControllerConfig) -> FlowController:
    """Return an engine with the live requests of a checkpoint.

    Waiting requests keep their exact arrival times. Requests in flight are dispatched again, as far
    as the configuration and the limits found allow. What else was learnt is restored after that,
    because it already includes them.
    """
    live = sorted(checkpoint.live, key=lambda each: (not each.is_in_flight, each.arrived_ns))
    first_ns = min((each.arrived_ns for each in live), default=checkpoint.now_ns)
    memory = checkpoint.memory
    controller = FlowController(config, first_ns)
    controller.handle(checkpoint.objectives, first_ns)
    controller.handle(checkpoint.endpoints, first_ns)
    limits = replace(memory, bands=(), drain=None, reserve=None)
    controller.handle(MemoryRestored(limits), first_ns)
    now_ns = first_ns
    for each in live:
        if each.is_in_flight:
            controller.handle(Arrived(each.request), now_ns)
    controller.poll(now_ns)
    for each in live:
        if not each.is_in_flight:
            now_ns = each.arrived_ns
            controller.handle(Arrived(each.request), now_ns)
    now_ns = max(now_ns, checkpoint.now_ns)
    accounts = _still_owed(memory, controller, now_ns)
    controller.handle(MemoryRestored(replace(memory, bands=accounts, stages=(), limits={})), now_ns)
    controller.poll(now_ns)
    return controller


def _still_owed(
    memory: EngineMemory, controller: FlowController, now_ns: int
) -> tuple[BandMemory, ...]:
    """Return the accounts less what requests in flight were charged a second time."""
    present = {band.priority: band.accounts for band in controller.learned.memory(now_ns).bands}
    return tuple(
        replace(
            band,
            accounts={
                flow_id: cost - present.get(band.priority, {}).get(flow_id, 0.0)
                for flow_id, cost in band.accounts.items()
            },
        )
        for band in memory.bands
    )


def to_line(entry: Entry) -> dict[str, Any]:
    """Return an entry as plain values."""
    if isinstance(entry, Turn):
        line: dict[str, Any] = {"t": entry.now_ns}
        if entry.facts:
            write = _FACT.write
            line["facts"] = [write(fact) for fact in entry.facts]
        if entry.decisions:
            write = _DECISION.write
            line["decisions"] = [write(decision) for decision in entry.decisions]
        return line
    for word, kind in _KINDS.items():
        if isinstance(entry, kind):
            return {word: plainly(kind).write(entry)}
    raise AssertionError(entry)


def from_line(line: Any) -> Entry:
    """Read an entry.

    Raises:
        LedgerError: it is not one.
    """
    try:
        if "t" in line:
            return Turn(
                plainly(int).read(line["t"]),
                [_FACT.read(each) for each in line.get("facts", ())],
                [_DECISION.read(each) for each in line.get("decisions", ())],
            )
        ((word, plain),) = line.items()
        entry: Entry = plainly(_KINDS[word]).read(plain)
        if isinstance(entry, Checkpoint):
            entry.memory.check()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"must be a header, turn, checkpoint or gap ({error!r})"
        raise LedgerError(message) from error
    if isinstance(entry, Header) and entry.version != VERSION:
        message = f"must be of version {VERSION}, got {entry.version}"
        raise LedgerError(message)
    return entry


# Hashed flow ids

Disguise = Callable[[str], str]


def disguise_with(salt: str) -> Disguise:
    """Return a function that hashes flow ids: an id always gets the same 16 digits in one run.

    It keeps tenants apart without naming them. It does not protect names that can be guessed,
    because the salt is in the ledger, so that weights of another configuration can be matched.
    """
    key = salt.encode()
    known: dict[str, str] = {}

    def disguise(flow_id: str) -> str:
        hidden = known.get(flow_id)
        if hidden is None:
            if len(known) >= _KNOWN_MAX:
                known.clear()
            hidden = blake2b(flow_id.encode(), digest_size=_ID_BYTES, key=key).hexdigest()
            known[flow_id] = hidden
        return hidden

    return disguise


_KNOWN_MAX = 10_000


def disguised(entry: Entry, disguise: Disguise) -> Entry:
    """Return an entry with hashed flow ids."""
    match entry:
        case Turn(now_ns, facts, decisions):
            return Turn(
                now_ns,
                [_disguised_fact(fact, disguise) for fact in facts],
                list(_disguised_decisions(decisions, disguise)),
            )
        case Checkpoint():
            live = tuple(
                replace(each, request=_disguised_request(each.request, disguise))
                for each in entry.live
            )
            return replace(
                entry,
                config=disguised_config(entry.config, disguise),
                live=live,
                memory=_disguised_memory(entry.memory, disguise),
            )
        case Header():
            return replace(entry, config=disguised_config(entry.config, disguise))
        case Gap():
            return entry


def disguised_config(config: ControllerConfig, disguise: Disguise) -> ControllerConfig:
    """Return a configuration with hashed flow ids."""
    weights = {disguise(flow_id): weight for flow_id, weight in config.weights.items()}
    return replace(config, weights=weights)


def _disguised_fact(fact: Fact, disguise: Disguise) -> Fact:
    match fact:
        case Arrived(request):
            return Arrived(_disguised_request(request, disguise))
        case FlowEvicted(priority, flow_id):
            return FlowEvicted(priority, disguise(flow_id))
        case Reconfigured(config):
            return Reconfigured(disguised_config(config, disguise))
        case MemoryRestored(memory):
            return MemoryRestored(_disguised_memory(memory, disguise))
        case _:
            return fact


def _disguised_memory(memory: EngineMemory, disguise: Disguise) -> EngineMemory:
    bands = [
        replace(band, accounts={disguise(name): cost for name, cost in band.accounts.items()})
        for band in memory.bands
    ]
    estimates = [
        each if each.flow_id is None else replace(each, flow_id=disguise(each.flow_id))
        for each in memory.estimates
    ]
    return replace(memory, bands=tuple(bands), estimates=tuple(estimates))


def _disguised_request(request: Request, disguise: Disguise) -> Request:
    return replace(request, flow_id=disguise(request.flow_id))


def _disguised_decisions(decisions: Sequence[Decision], disguise: Disguise) -> Iterator[Decision]:
    for decision in decisions:
        yield replace(decision, flow_id=disguise(decision.flow_id))
